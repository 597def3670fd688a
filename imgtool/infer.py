"""The verb ``infer``: photos in, photos out, one after the other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool import checkpoint, compute, files, images, outputs, report, sheets
from imgtool.engine import Engine, Result, Watch
from imgtool.errors import DONE, FAILED, USAGE, ImgtoolError
from imgtool.images import metadata
from imgtool.settings import Infer

if TYPE_CHECKING:
    from torch import nn

    from imgtool.console import Bar, Console

PAGE = "index.html"
Pair = tuple[files.Item, Path | None]


def _listed(engine: Engine, settings: Infer) -> list[Pair]:
    """Return every input and its output, None for standard output."""
    items = files.expand(settings.inputs, images.READABLE, engine.name)
    targets = files.outputs(
        items, engine.name, settings.out, lambda item: settings.format or images.extension(item.source)
    )
    for name in ("compare", "side_by_side", "zip"):
        if None in targets and getattr(settings, name):
            flag = name.replace("_", "-")
            what = f"--{flag} needs outputs that are files, and standard output is none"
            raise ImgtoolError(what, "give -o FILE", USAGE)
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
    engine.check(settings)
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
        ImgtoolError: For what concerns all inputs: nothing found, unknown weights or device, a table,
            page or archive that exists.
    """
    pairs = _listed(engine, settings)
    engine.check(settings)
    _check_stream(pairs, console)
    page = settings.report / PAGE if settings.report else None
    for path in (page, settings.zip):
        if path:
            files.check_new(path, settings.force or settings.skip_existing)
    compute.use_threads(settings.threads)
    batch = Batch(engine, settings, console, _weights(engine, settings), pairs)
    batch.check_places()
    batch.open_table()
    batch.load()
    try:
        with console.progress(len(pairs), f"infer {engine.name}") as bar:
            batch.work(bar)
    finally:  # a batch that is interrupted has its page too, of what was done
        if page and batch.entries:
            batch.write_page(page, len(pairs))
    if settings.zip and batch.made:
        batch.write_archive(settings.zip)
    return batch.verdict(len(pairs))


def _check_stream(pairs: list[Pair], console: Console) -> None:
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
    """The work on a list of inputs: one network, what was made, and what failed."""

    engine: Engine
    settings: Infer
    console: Console
    weights: checkpoint.Weights
    pairs: list[Pair]
    net: nn.Module = field(init=False)
    folder: Path | None = None
    names: Mapping[Path, str] = field(default_factory=dict)
    table: outputs.Table | None = None
    failures: list[tuple[str, ImgtoolError]] = field(default_factory=list)
    entries: list[report.Entry] = field(default_factory=list)
    made: list[Path] = field(default_factory=list)
    _stream: bytes = b""

    def check_places(self) -> None:
        """Refuse, before anything is computed, files that would fall on each other.

        Raises:
            ImgtoolError: Code 2: two files of one name, an archive in the place of a photo, or files
                beside standard output.
        """
        sources = {item.source.resolve() for item, _ in self.pairs if item.source}
        taken: dict[Path, str] = {}
        for item, target in self.pairs:
            if target is None and self.engine.beside(self.settings):
                raise ImgtoolError(
                    "files beside the output need an output that is a file", "give -o FILE", USAGE
                )
            for path in self._written(target):
                real = path.resolve()
                if real in taken:
                    what = f"{taken[real]} and {item.name} would both write {path}"
                    raise ImgtoolError(what, "run them apart into different folders", USAGE)
                taken[real] = item.name
        archive = self.settings.zip.resolve() if self.settings.zip else None
        if archive in sources or archive in taken:
            raise ImgtoolError(
                f"--zip {self.settings.zip} is a photo of the batch", "name another file", USAGE
            )

    def open_table(self) -> None:
        """Name the outputs within their folder, and begin or go on with the engine's table.

        Raises:
            ImgtoolError: A table exists that may not be overwritten, or is damaged.
        """
        settings = self.settings
        if files.is_folder([item for item, _ in self.pairs], settings.out):
            self.folder = Path(str(settings.out))
        self.names = outputs.below(self.folder, [target for _, target in self.pairs if target])
        if not self.folder or not self.engine.table:
            return
        self.table = outputs.Table(self.folder / self.engine.table, list(self.names.values()))
        files.check_new(self.table.path, settings.force or settings.skip_existing)
        if settings.skip_existing:
            self.table.load()

    def load(self) -> None:
        """Build the network, before the first photo: what is wrong with it is not a photo's fault.

        Raises:
            ImgtoolError: The device is not there, or the weights do not fit.
        """
        where = compute.device(self.settings.device)
        self.net = compute.channels_last(checkpoint.network(self.engine, self.weights).to(where))

    def work(self, bar: Bar) -> None:
        """Process every input, after a look at all of them where the engine wants one."""
        surveyed = self._survey(bar)
        for number, (item, target) in enumerate(self.pairs, 1):
            if not self.console.live:
                self.console.detail(f"{number}/{len(self.pairs)} {item.name}")
            self._each(item, target, bar, [surveyed[number - 1]] if surveyed else [])
            bar.advance(1)
            if self.failures and self.settings.fail_fast:
                break

    def _survey(self, bar: Bar) -> Sequence[object]:
        """Let the engine look at every photo, also at those whose output is there already."""
        engine = self.engine
        if (
            engine.survey is None
            or not engine.wants_survey(self.settings)
            or all(map(self._is_done, self.pairs))
        ):
            return ()
        readers: list[tuple[str, Callable[[], images.Photo]]] = [
            (item.name, partial(self._photo, item)) for item, _ in self.pairs
        ]
        watch = Watch(lambda done, total: bar.update(f"looking at {done}/{total}"), self.console.say)
        return engine.survey(self.net, readers, self.settings, watch)

    def _is_done(self, pair: Pair) -> bool:
        """Tell whether an input is left out: its output exists."""
        _, target = pair
        return target is not None and self.settings.skip_existing and target.exists()

    def _each(self, item: files.Item, target: Path | None, bar: Bar, known: list[object]) -> None:
        """Process one input and say how it went."""
        try:
            if target and self._is_done((item, target)):
                self._left_out(item, target)
            else:
                self._one(item, target, bar, known)
        except ImgtoolError as fault:
            self._failed(item, fault)
        except MemoryError:
            self._failed(item, ImgtoolError("out of memory", "close other programs, or shrink the photo"))

    def _left_out(self, item: files.Item, target: Path) -> None:
        """Say that an output is there already; the page shows it as if it were made now."""
        record = {"input": item.name, "output": str(target), "skipped": True}
        self.console.result(record)
        rowless = self.table is not None and self.names[target] not in self.table.rows
        note = f", without a row in {self.engine.table}" if rowless else ""
        self.console.say(f"{item.name}: {target} exists, left out{note}")
        self.made.append(target)
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

    def _photo(self, item: files.Item) -> images.Photo:
        """Read an input; standard input is read once and kept."""
        if item.source is None:
            self._stream = self._stream or sys.stdin.buffer.read()
        return images.read(item.source or self._stream, item.name)

    def _one(self, item: files.Item, target: Path | None, bar: Bar, known: list[object]) -> None:
        # A row without its output was interrupted between the two: what lies beside is ours.
        again = self.table is not None and target is not None and self.names[target] in self.table.rows
        for path in self._written(target):
            files.check_new(path, self.settings.force or (again and path != target))
        began = time.monotonic()
        photo = self._photo(item)
        watch = Watch(
            lambda done, total: bar.update(f"tile {done}/{total}") if total > 1 else None,
            self.console.say,
            str(item.relative),
        )
        result = self.engine.apply(self.net, photo, self.settings, watch, *known)
        if self.table and target:
            self.table.add(self.names[target], result.row)
        untouched = self._put(photo, result, target, item)
        height, width = result.image.shape[:2]
        record: dict[str, Any] = {
            "input": item.name,
            "output": str(target or "-"),
            "engine": self.engine.name,
            "model": self.weights.name,
            "width": width,
            "height": height,
            "seconds": time.monotonic() - began,
            "facts": result.facts,
        }
        if untouched:
            record["untouched"] = True
        self._picture(item, target, photo, result)
        note = "  left as it is" if untouched else ""
        size = f"{width}x{height}  {record['seconds']:.1f} s"
        self.console.result(record, f"{item.name} -> {target or '-'}  {size}{note}")

    def _written(self, target: Path | None) -> list[Path]:
        """Return every file that an input's work will write."""
        if target is None:
            return []
        found = [outputs.beside(target, suffix) for suffix in self.engine.beside(self.settings)]
        found += [outputs.compared(target)] * self.settings.compare
        return [target, *found, *[outputs.paired(target)] * self.settings.side_by_side]

    def _put(self, photo: images.Photo, result: Result, target: Path | None, item: files.Item) -> bool:
        """Write what was made of a photo; return whether it was left as it is."""
        form = _form(self.settings, item, target)
        after = _made(photo, result)
        untouched = after is photo and photo.format == images.file_type(form)
        if untouched:
            data = files.read(item.source) if item.source else self._stream
        else:
            for loss in images.losses(after, form):
                self.console.warn(f"{item.name}: {loss}")
            data = images.encode(after, form, self.settings.quality)
        if target is None:
            self.console.binary(data)
            return untouched
        for suffix, content in result.files.items():
            files.write(outputs.beside(target, suffix), content)
        files.write(target, data)
        self.made.append(target)
        return untouched

    def _picture(self, item: files.Item, target: Path | None, photo: images.Photo, result: Result) -> None:
        icc = photo.icc or b""
        if self.settings.compare and target:
            sheet = outputs.compared(target)
            sheets.compare(photo.pixels, result.image, sheet, title=item.name, icc=icc)
            self.console.say(f"before/after: {sheet}")
        if self.settings.side_by_side and target:
            pair = outputs.paired(target)
            scale = sheets.side_by_side(photo.pixels, result.image, pair, self.settings.quality, icc)
            small = "" if scale == 1 else f", at {100 * scale:.0f} %: JPEG holds no more"
            self.console.say(f"side by side: {pair}{small}")
        if self.settings.report:
            self.entries.append(report.entry(item.name, photo.pixels, result.image, result.facts, icc=icc))

    def write_page(self, page: Path, total: int) -> None:
        """Write the page of the report, of what was done and what failed."""
        about: dict[str, object] = {"engine": self.engine.name, "weights": self.weights.name}
        if len(self.entries) < total:
            about["not done, or left out"] = total - len(self.entries)
        report.page(self.entries, page, title=f"imgtool infer {self.engine.name}", about=about)
        self.console.say(f"report: {page}")

    def write_archive(self, path: Path) -> None:
        """Write the archive of every output that is there, with what lies beside it."""
        members: dict[str, Path] = {}
        for target in self.made:
            suffixes = self.engine.beside(self.settings)
            for each in (target, *(outputs.beside(target, suffix) for suffix in suffixes)):
                name = Path("outputs", self.names[target]).with_name(each.name)
                members |= {name.as_posix(): each} if each.exists() else {}
            pair = outputs.paired(target)
            if self.settings.side_by_side and pair.exists():
                members[Path("side_by_side", self.names[target]).with_name(pair.name).as_posix()] = pair
        if self.table and self.table.path.exists():
            members[self.table.path.name] = self.table.path
        outputs.archive(path, members)
        self.console.say(f"archive: {path}, {len(members)} files")

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


def _made(photo: images.Photo, result: Result) -> images.Photo:
    """Return the photo that a result makes of one; the same object where nothing changes."""
    if result.image is photo.pixels and result.alpha is None and not result.xmp:
        return photo
    after = photo.with_pixels(result.image)
    if result.alpha is not None:
        after = replace(after, alpha=result.alpha)
    if result.xmp:
        after = replace(after, xmp=metadata.with_xmp_properties(after.xmp, *metadata.AUX, result.xmp))
    return after
