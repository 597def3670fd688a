"""The verb ``infer``: photos in, photos out, one after the other."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from imgtool import checkpoint, compute, files, images, report, sheets
from imgtool.engine import Engine, Result, Watch
from imgtool.errors import DONE, FAILED, USAGE, ImgtoolError
from imgtool.settings import Infer

if TYPE_CHECKING:
    from torch import nn

    from imgtool.console import Bar, Console

PAGE = "index.html"


def _listed(engine: Engine, settings: Infer) -> list[tuple[files.Item, Path | None]]:
    """Return every input and its output, None for standard output."""
    items = files.expand(settings.inputs, images.READABLE, engine.name)
    targets = files.outputs(
        items, engine.name, settings.out, lambda item: settings.format or images.extension(item.source)
    )
    if None in targets and settings.compare:
        raise ImgtoolError("--compare writes beside the output, which is not a file", "give -o FILE", USAGE)
    for item, target in zip(items, targets, strict=True):
        _check_form(_form(settings, item, target), target)
    return list(zip(items, targets, strict=True))


def _form(settings: Infer, item: files.Item, target: Path | None) -> str:
    return settings.format or (target.suffix if target else images.extension(item.source))


def _check_form(form: str, target: Path | None) -> None:
    kind = images.file_type(form)
    if target and target.suffix and images.file_type(target.suffix) != kind:
        raise ImgtoolError(f"{target} is not named like a {form} file", "let -o and --format agree", USAGE)


def _weights(engine: Engine, settings: Infer) -> checkpoint.Weights:
    return checkpoint.read_weights(checkpoint.find(settings.weights or engine.weights), engine.name)


def plan(engine: Engine, settings: Infer) -> Mapping[str, object]:
    """Return what ``--dry-run`` tells: device, network and every output path."""
    weights = _weights(engine, settings)
    net = checkpoint.network(engine, weights)
    pairs = _listed(engine, settings)
    return {
        "device": str(compute.device(settings.device)),
        "weights": weights.name,
        "parameters": sum(p.numel() for p in net.parameters()),
        "outputs": [f"{item.name} -> {target or '-'}" for item, target in pairs],
    }


def run(engine: Engine, settings: Infer, console: Console) -> int:
    """Process every input; a failure stops only itself, unless ``fail_fast``.

    Returns:
        0, or 1 where any input failed (a single input's own code).

    Raises:
        ImgtoolError: For what concerns all inputs: nothing found, unknown weights or device.
    """
    pairs = _listed(engine, settings)
    _check_stream(pairs, console)
    page = settings.report / PAGE if settings.report else None
    if page:
        files.check_new(page, settings.force or settings.skip_existing)
    compute.use_threads(settings.threads)
    batch = Batch(engine, settings, console, _weights(engine, settings))
    batch.load()
    try:
        with console.progress(len(pairs), f"infer {engine.name}") as bar:
            for number, (item, target) in enumerate(pairs, 1):
                batch.work(item, target, bar, f"{number}/{len(pairs)}")
                bar.advance(1)
                if batch.failures and settings.fail_fast:
                    break
    finally:  # a batch that is interrupted has its page too, of what was done
        if page and batch.entries:
            batch.write_page(page, len(pairs))
    return batch.verdict(len(pairs))


def _check_stream(pairs: list[tuple[files.Item, Path | None]], console: Console) -> None:
    """Refuse, before anything is computed, a photo on standard output that nobody could use there."""
    if all(target for _, target in pairs):
        return
    console.check_binary()
    if console.json:
        raise ImgtoolError(
            "standard output cannot take both the photo and JSON", "give -o FILE, or leave out --json", USAGE
        )


@dataclass
class Batch:
    """The work on a list of inputs: one network, and what failed."""

    engine: Engine
    settings: Infer
    console: Console
    weights: checkpoint.Weights
    net: nn.Module = field(init=False)
    failures: list[tuple[str, ImgtoolError]] = field(default_factory=list)
    entries: list[report.Entry] = field(default_factory=list)

    def work(self, item: files.Item, target: Path | None, bar: Bar, place: str) -> None:
        """Process one input and say how it went."""
        if not self.console.live:
            self.console.detail(f"{place} {item.name}")
        try:
            if target and self.settings.skip_existing and target.exists():
                self._left_out(item, target)
            else:
                self._one(item, target, bar)
        except ImgtoolError as fault:
            self._failed(item, fault)
        except MemoryError:
            self._failed(item, ImgtoolError("out of memory", "close other programs, or shrink the photo"))

    def _left_out(self, item: files.Item, target: Path) -> None:
        """Say that an output is there already; the page shows it as if it were made now."""
        record = {"input": item.name, "output": str(target), "skipped": True}
        self.console.result(record)
        self.console.say(f"{item.name}: {target} exists, left out")
        if self.settings.report and item.source:
            before, after = images.read(item.source), images.read(target)
            facts = {"left out": "it was there already"}
            self.entries.append(report.entry(item.name, before.pixels, after.pixels, facts))

    def _failed(self, item: files.Item, fault: ImgtoolError) -> None:
        self.failures.append((item.name, fault))
        self.console.error(fault, "" if item.name in fault.what else item.name)
        self.console.result({"input": item.name, "error": fault.what, "hint": fault.hint})
        if self.settings.report:
            self.entries.append(report.failed(item.name, fault.what, fault.hint))

    def load(self) -> None:
        """Build the network, before the first photo: what is wrong with it is not a photo's fault.

        Raises:
            ImgtoolError: The device is not there, or the weights do not fit.
        """
        where = compute.device(self.settings.device)
        self.net = compute.channels_last(checkpoint.network(self.engine, self.weights).to(where))

    def _one(self, item: files.Item, target: Path | None, bar: Bar) -> None:
        for path in self._written(target):
            files.check_new(path, self.settings.force)
        began = time.monotonic()
        photo = images.read(item.source or sys.stdin.buffer.read(), item.name)
        watch = Watch(
            lambda done, total: bar.update(f"tile {done}/{total}") if total > 1 else None, self.console.say
        )
        result = self.engine.apply(self.net, photo.pixels, self.settings, watch)
        after = photo.with_pixels(result.image)
        self._put(after, target, item)
        height, width = result.image.shape[:2]
        record = {
            "input": item.name,
            "output": str(target or "-"),
            "engine": self.engine.name,
            "model": self.weights.name,
            "width": width,
            "height": height,
            "seconds": time.monotonic() - began,
            "facts": result.facts,
        }
        self._picture(item, target, photo, result)
        self.console.result(
            record, f"{item.name} -> {target or '-'}  {width}x{height}  {record['seconds']:.1f} s"
        )

    def _written(self, target: Path | None) -> list[Path]:
        if target is None:
            return []
        return [target, _sheet(target)] if self.settings.compare else [target]

    def _put(self, photo: images.Photo, target: Path | None, item: files.Item) -> None:
        form = _form(self.settings, item, target)
        for loss in images.losses(photo, form):
            self.console.warn(f"{item.name}: {loss}")
        if target is None:
            self.console.binary(images.encode(photo, form, self.settings.quality))
        else:
            images.write(target, photo, self.settings.quality, form)

    def _picture(self, item: files.Item, target: Path | None, photo: images.Photo, result: Result) -> None:
        if self.settings.compare and target:
            sheets.compare(photo.pixels, result.image, _sheet(target), title=item.name, icc=photo.icc or b"")
            self.console.say(f"before/after: {_sheet(target)}")
        if self.settings.report:
            self.entries.append(
                report.entry(item.name, photo.pixels, result.image, result.facts, icc=photo.icc or b"")
            )

    def write_page(self, page: Path, total: int) -> None:
        """Write the page of the report, of what was done and what failed."""
        about: dict[str, object] = {"engine": self.engine.name, "weights": self.weights.name}
        if len(self.entries) < total:
            about["not done, or left out"] = total - len(self.entries)
        report.page(self.entries, page, title=f"imgtool infer {self.engine.name}", about=about)
        self.console.say(f"report: {page}")

    def verdict(self, total: int) -> int:
        """Say what failed, all together at the end of a batch, and return the exit code."""
        if not self.failures:
            return DONE
        if total == 1:
            return self.failures[0][1].code
        self.console.say(f"{len(self.failures)} of {total} failed:")
        for name, fault in self.failures:
            self.console.say(f"  {fault.what}" if name in fault.what else f"  {name}: {fault.what}")
        return FAILED


def _sheet(target: Path) -> Path:
    return target.with_name(f"{target.stem}-compare.png")
