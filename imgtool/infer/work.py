"""The work on one input at a time, the same in this process and in those of a runner.

Torch is imported only for engines whose network is one of torch, and what decodes and draws photos only
where there are pictures.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from imgtool import engines, files, header, loading, outputs, report, sheets
from imgtool.console import Bar
from imgtool.engine import Engine, Result, Watch
from imgtool.errors import ImgtoolError
from imgtool.infer.listing import Job, Order, form_of
from imgtool.settings import Infer
from imgtool.settings.sources import make

if TYPE_CHECKING:
    from imgtool.buckets.transit import Transit
    from imgtool.images import Photo


class Voice(Protocol):
    """What the work needs of a console."""

    def say(self, text: str) -> None:
        """Say a line."""
        ...

    def warn(self, text: str) -> None:
        """Say what may be wrong."""
        ...

    def binary(self, data: bytes) -> None:
        """Give the bytes of a photo that goes to standard output."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What was made of one input.

    Attributes:
        record: The record of the JSON contract.
        line: The same for people.
        row: The photo's row in the engine's table.
        entry: What the page of the report shows.
    """

    record: Mapping[str, Any]
    line: str = ""
    row: Mapping[str, object] = field(default_factory=dict)
    entry: report.Entry | None = None


def weights_of(engine: Engine, settings: Infer) -> Path | None:
    """Return the file of the weights, None where the settings need none."""
    return header.find(engine.chosen(settings), engine.name) if engine.uses_weights(settings) else None


def no_memory() -> ImgtoolError:
    """Return the error of a photo for which memory ran out."""
    return ImgtoolError("out of memory", "close other programs, or shrink the photo")


def silent(text: str) -> None:
    """Say nothing."""


def unnoted() -> None:
    """Note nothing."""


@dataclass
class Work:
    """One network, and what is done with it to one input.

    Attributes:
        engine: The engine.
        settings: Of ``infer``; ``out`` names a place of this machine.
        voice: Told what a user should know.
        weights: File of the weights.
        total: Inputs of the whole batch: of many, each message says which it is about.
        transit: Brings inputs that are URLs, and sends outputs to them.
        net: What ``load`` built.
    """

    engine: Engine
    settings: Infer
    voice: Voice
    weights: Path | None
    total: int = 1
    transit: Transit | None = None
    net: Any = None
    consulted: dict[str, Work] = field(default_factory=dict)
    _stream: bytes = b""

    @property
    def model(self) -> str | None:
        """Name of the weights, None where there are none."""
        return self.weights.stem if self.weights else None

    def load(self) -> None:
        """Build the network, before the first photo: what is wrong with it is not a photo's fault.

        Raises:
            ImgtoolError: The device is not there, or the weights do not fit.
        """
        if self.weights:
            self.net = loading.network(self.engine, self.weights, self.settings, self.voice.say)

    def do(
        self,
        order: Order,
        known: Collection[object],
        bar: Bar,
        kept: Callable[[Mapping[str, object]], None],
        put: Callable[[], None] = unnoted,
    ) -> Outcome:
        """Process one input and write what is made of it; files that exist are overwritten.

        Args:
            order: The input.
            known: What a survey found of it, if there was one.
            bar: Told how many tiles are finished.
            kept: Given the photo's row before any file is written.
            put: Called when the output is written, with all beside it but pictures of before and after.

        Raises:
            ImgtoolError: What is wrong with the input, or with the place of an output.
        """
        job = order.job
        for suffix, reason in order.unfit.items():
            self.voice.say(f"{job.item.name}: no {suffix} is written: {reason}")
        try:
            began = time.monotonic()
            opened = self.opened(job.item)
            result = self.engine.apply(self.net, opened, self.settings, self.watch(order, bar), *known)
            kept(result.row)
            photo: Photo = result.before or opened
            untouched = self._put(photo, result, order)
            put()
            record = self._record(job, result, time.monotonic() - began, untouched)
            entry = self._picture(job, photo, result)
            self._send(order)
        except MemoryError:
            raise no_memory() from None
        finally:
            self.drop(job.item)
        return Outcome(record, _line(record, result), result.row, entry)

    def _record(self, job: Job, result: Result, seconds: float, untouched: bool) -> dict[str, Any]:
        height, width = (None, None) if result.image is None else result.image.shape[:2]
        record: dict[str, Any] = {
            "input": job.item.name,
            "output": str(job.target) if job.target else "-" if job.stream else None,
            "engine": self.engine.name,
            "model": self.model,
            "width": width,
            "height": height,
            "seconds": seconds,
            "facts": result.facts,
        }
        return record | {"untouched": True} if untouched else record

    def _send(self, order: Order) -> None:
        """Send what was written to where it belongs; the picture last: where it is, all is."""
        if self.transit:
            there = [path for path in order.written if path.exists()]
            self.transit.send(sorted(there, key=lambda path: path == order.job.target))

    def opened(self, item: files.Item) -> Any:
        """Read an input, as the engine does where it does it itself."""
        if self.transit:
            self.transit.bring(item)
        return self.read(self.source(item), item.name)

    def drop(self, item: files.Item) -> None:
        """Let go of what was fetched of an input."""
        if self.transit:
            self.transit.drop(item)

    def glimpsed(self, item: files.Item) -> Any:
        """Read an input that is not worked on yet."""
        try:
            return self.opened(item)
        finally:
            self.drop(item)

    def read(self, source: Path | bytes, name: str) -> Any:
        """Read a file or its content, as the engine does where it does it itself."""
        if self.engine.open:
            return self.engine.open(source, name, self.settings, self.net)
        from imgtool import images

        return images.read(source, name)

    def source(self, item: files.Item) -> Path | bytes:
        """Return an input's file, or its content: standard input is read once and kept."""
        if item.source is None:
            self._stream = self._stream or sys.stdin.buffer.read()
        return item.source or self._stream

    def watch(self, order: Order, bar: Bar, quiet: bool = False) -> Watch:
        """Return what the engine is told beside the photo; where quiet, nothing is said."""
        settings, job = self.settings, order.job
        shown = bool(settings.compare or settings.side_by_side or settings.report)
        name, say = job.item.name, self.voice.say
        if self.total > 1:
            say = lambda text: self.voice.say(f"{name}: {text}")  # noqa: E731
        say = silent if quiet else say
        return Watch(
            lambda done, total: bar.update(f"tile {done}/{total}") if total > 1 else None,
            say,
            str(job.item.relative),
            self.source(job.item),
            job.place,
            order.beside,
            picture=bool(job.target or job.stream or shown),
            before=shown,
            overwrite=not shown,
            consult=partial(self._consult, job.item, say),
        )

    def _consult(
        self,
        item: files.Item,
        say: Callable[[str], None],
        name: str,
        source: bytes | None = None,
        **settings: Any,
    ) -> Mapping[str, Any]:
        """Return what another engine finds in an input; see ``Watch.consult``."""
        asked = make(engines.settings(name).Infer, {"inputs": ("-",), **settings}, f"infer {name}")
        other = self.consulted.get(name)
        if other is None:
            engine = engines.load(name)
            other = Work(engine, asked, self.voice, weights_of(engine, asked))
            other.load()
            self.consulted[name] = other
        other.settings = asked
        given = self.source(item) if source is None else source
        watch = Watch(say=say, name=item.name, source=given, picture=False)
        return other.engine.apply(other.net, other.read(given, item.name), asked, watch).facts

    def _put(self, photo: Photo, result: Result, order: Order) -> bool:
        """Write what was made of a photo; return whether it was left as it is."""
        job = order.job
        untouched, fill = self._encoder(photo, result, job) if job.target or job.stream else (False, None)
        if job.stream and fill:
            buffer = io.BytesIO()
            fill(buffer)
            self.voice.binary(buffer.getvalue())
        for suffix, path in order.beside.items():
            if suffix in result.files:
                files.write(path, result.files[suffix])
        if job.target and fill:
            files.fill(job.target, fill)
        return untouched

    def _encoder(self, photo: Photo, result: Result, job: Job) -> tuple[bool, Callable[[BinaryIO], object]]:
        """Return whether a photo was left as it is, and what writes the file that is made of it."""
        from imgtool import images

        form = form_of(self.engine, self.settings, job)
        after = outputs.made(photo, result)
        if after is photo and photo.format == files.file_type(form):
            data = files.read(job.item.source) if job.item.source else self._stream
            return True, lambda file: file.write(data)
        for loss in images.losses(after, form):
            self.voice.warn(f"{job.item.name}: {loss}")
        return False, images.encoder(after, form, self.settings.quality)

    def _picture(self, job: Job, photo: Photo, result: Result) -> report.Entry | None:
        """Draw what shows before and after; return what the page shows."""
        if result.image is None or not (
            self.settings.compare or self.settings.side_by_side or self.settings.report
        ):
            return None
        before, after, icc, name = photo.pixels, result.image, photo.icc or b"", job.item.name
        if self.settings.compare and job.place:
            sheet = outputs.compared(job.place)
            more = [] if result.reference is None else [result.reference]
            sheets.compare(before, after, sheet, title=name, labels=result.labels, more=more, icc=icc)
            self.voice.say(f"before/after: {sheet}")
        if self.settings.side_by_side and job.place:
            pair = outputs.paired(job.place)
            scale = sheets.side_by_side(before, after, pair, self.settings.quality, icc)
            small = "" if scale == 1 else f", at {100 * scale:.0f} %: JPEG holds no more"
            self.voice.say(f"side by side: {pair}{small}")
        return report.entry(name, before, after, result.facts, icc=icc) if self.settings.report else None


def _line(record: Mapping[str, Any], result: Result) -> str:
    """Return the line of one input for people."""
    if record["output"] is None:
        return f"{record['input']}  {result.line}"
    size = f"{record['width']}x{record['height']}  {record['seconds']:.1f} s"
    note = "  left as it is" if record.get("untouched") else ""
    told = f"  {result.line}" if result.line else ""
    return f"{record['input']} -> {record['output']}  {size}{note}{told}"
