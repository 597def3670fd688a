"""The verb ``infer``: photos in, photos or facts out, one after the other.

Torch is imported only for engines whose network is one of torch, and what decodes and draws photos only
where there are pictures.
"""

from __future__ import annotations

import io
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from imgtool import engines, files, header, loading, outputs, report, sheets
from imgtool.engine import Engine, Result, Watch
from imgtool.errors import DONE, FAILED, USAGE, ImgtoolError
from imgtool.settings import Infer, make

if TYPE_CHECKING:
    from imgtool.console import Bar, Console
    from imgtool.images import Photo

PAGE = "index.html"
ARCHIVE = ".npz"
"""Suffix of exported networks that NumPy alone runs."""


@dataclass(frozen=True)
class Job:
    """One input, and where what is made of it goes.

    Attributes:
        item: The input.
        target: File of the picture; None where it goes to standard output, or is not wanted.
        place: Path whose folder and stem the files beside take: that of the picture, or of the input
            where no picture is wanted; None where neither is a file.
        stream: Whether the picture goes to standard output.
    """

    item: files.Item
    target: Path | None
    place: Path | None
    stream: bool = False


def _listed(engine: Engine, settings: Infer) -> list[Job]:
    """Return every input and where its output goes."""
    pictures = engine.picture or settings.out is not None
    endings = engine.sheets if engine.picture else (*engine.sheets, *files.SHEETS)
    suffixes = engine.suffixes or files.READABLE
    items = _without_drawn(files.expand(settings.inputs, suffixes, engine.name, endings), engine)
    if pictures:
        form = settings.format or engine.form(settings)
        targets = files.outputs(
            items, engine.name, settings.out, lambda item: form or files.extension(item.source)
        )
        jobs = [Job(*pair, pair[1], pair[1] is None) for pair in zip(items, targets, strict=True)]
    else:
        jobs = [Job(item, None, item.source) for item in items]
    for name in ("compare", "side_by_side", "zip"):
        if getattr(settings, name) and any(job.place is None for job in jobs):
            flag = name.replace("_", "-")
            what = f"--{flag} needs outputs that are files, and standard output is none"
            raise ImgtoolError(what, "give -o FILE", USAGE)
    for job in jobs if pictures else ():
        _check_form(_form(engine, settings, job), job.target)
    return jobs


def _without_drawn(items: list[files.Item], engine: Engine) -> list[files.Item]:
    """Leave out pictures found in folders that imgtool drew of data sets, or beside photos by whole name.

    Raises:
        ImgtoolError: Code 2: nothing is left.
    """
    found = {item.source for item in items}

    def own(item: files.Item) -> bool:
        path = item.source
        if path is None or not item.folder:
            return False
        ends = (ending for ending in engine.sheets if path.stem.endswith(ending))
        return engine.drawn(path) or any(path.with_name(path.stem.removesuffix(end)) in found for end in ends)

    kept = [item for item in items if not own(item)]
    if not kept:
        raise ImgtoolError("no photo is there but pictures that imgtool drew", "give other inputs", USAGE)
    return kept


def _form(engine: Engine, settings: Infer, job: Job) -> str:
    own = job.target.suffix if job.target else engine.form(settings) or files.extension(job.item.source)
    return settings.format or own


def _check_form(form: str, target: Path | None) -> None:
    kind = files.file_type(form)
    if target and target.suffix and files.file_type(target.suffix) != kind:
        raise ImgtoolError(f"{target} is not named like a {form} file", "let -o and --format agree", USAGE)


def _weights(engine: Engine, settings: Infer) -> Path | None:
    """Return the file of the weights, None where the settings need none."""
    return header.find(engine.chosen(settings), engine.name) if engine.uses_weights(settings) else None


def plan(engine: Engine, settings: Infer) -> Mapping[str, object]:
    """Return what ``--dry-run`` tells: device, network and every output path."""
    from imgtool import runtime

    path = _weights(engine, settings)
    about: dict[str, object] = {"device": "cpu", "weights": None, "parameters": 0}
    kind = runtime.kind_of(path) if path else ""
    if path and engine.prepare and path.suffix.lower() == ARCHIVE:
        kind = "numpy"
    if path and kind:
        about |= {"weights": path.stem, "parameters": None, "runtime": kind}
    elif engine.prepare is None and path:
        from imgtool import checkpoint, compute

        net = checkpoint.network(engine, checkpoint.read_weights(path, engine.name))
        about |= {"device": str(compute.device(settings.device))}
        about |= {"weights": path.stem, "parameters": sum(p.numel() for p in net.parameters())}
    elif path:
        state = header.read(path, engine.name).state
        about |= {"weights": path.stem, "parameters": sum(array.size for array in state.values())}
    jobs = _listed(engine, settings)
    engine.check(settings)
    places = Places(engine, settings, jobs)
    places.check()
    outcomes = []
    for job in jobs:
        others = [str(path) for path in places.written(job) if path != job.target]
        made = str(job.target) if job.target else "-" if job.stream else "facts"
        outcomes.append(f"{job.item.name} -> {', '.join([made, *others])}")
    return about | {"outputs": outcomes}


def run(engine: Engine, settings: Infer, console: Console) -> int:
    """Process every input; a failure stops only itself, unless ``fail_fast``.

    Returns:
        0, or 1 where any input failed (a single input's own code).

    Raises:
        ImgtoolError: For what concerns all inputs: nothing found, unknown weights or device, a table,
            page or archive that exists.
    """
    jobs = _listed(engine, settings)
    engine.check(settings)
    _check_stream(jobs, console)
    page = settings.report / PAGE if settings.report else None
    for path in (page, settings.zip):
        if path:
            files.check_new(path, settings.force or settings.skip_existing)
    places = Places(engine, settings, jobs)
    batch = Batch(engine, settings, console, _weights(engine, settings), jobs, places)
    places.check()
    batch.open_table()
    batch.load()
    try:
        with console.progress(len(jobs), f"infer {engine.name}") as bar:
            batch.work(bar)
    finally:  # a batch that is interrupted has its page too, of what was done
        if page and batch.entries:
            batch.write_page(page, len(jobs))
    if settings.zip and batch.made:
        batch.write_archive(settings.zip)
    return batch.verdict(len(jobs))


def _check_stream(jobs: list[Job], console: Console) -> None:
    """Refuse, before anything is computed, a photo on standard output that nobody could use there."""
    if not any(job.stream for job in jobs):
        return
    console.check_binary()
    if console.json:
        raise ImgtoolError(
            "standard output cannot take both the photo and JSON", "give -o FILE, or leave out --json", USAGE
        )


class Places:
    """Every file that a batch will write.

    A file beside an output takes the output's stem and a suffix. Where several would fall on each other,
    as for RAW and JPEG of one stem, each takes the whole name: ``x.CRW.awb.json``.

    Attributes:
        beside: Of each input, suffix to path of the files beside.
        unfit: Of each input, suffix to the reason why it goes without that file.
    """

    def __init__(self, engine: Engine, settings: Infer, jobs: Sequence[Job]) -> None:
        """Name the files."""
        self.settings, self.jobs, self.suffixes = settings, jobs, engine.beside(settings)
        self.unfit: dict[Job, dict[str, str]] = {job: {} for job in jobs}
        for job in jobs if len(jobs) > 1 else ():
            reasons = {
                suffix: engine.unfit(suffix, job.item.source) for suffix in self.suffixes if job.item.source
            }
            self.unfit[job] = {suffix: reason for suffix, reason in reasons.items() if reason}
        plain = {job: self._named(job) for job in jobs}
        count = Counter(path for paths in plain.values() for path in paths.values())
        self.beside = {
            job: {
                suffix: path if count[path] == 1 or job.place is None else Path(f"{job.place}{suffix}")
                for suffix, path in paths.items()
            }
            for job, paths in plain.items()
        }

    def _named(self, job: Job) -> dict[str, Path]:
        if job.place is None:
            return {}
        wanted = [suffix for suffix in self.suffixes if suffix not in self.unfit[job]]
        return {suffix: outputs.beside(job.place, suffix) for suffix in wanted}

    def written(self, job: Job) -> list[Path]:
        """Return every file that an input's work will write."""
        if job.place is None:
            return []
        found = [*([job.target] if job.target else []), *self.beside[job].values()]
        found += [outputs.compared(job.place)] * bool(self.settings.compare)
        return [*found, *[outputs.paired(job.place)] * self.settings.side_by_side]

    def check(self) -> None:
        """Refuse, before anything is computed, files that would fall on each other.

        Raises:
            ImgtoolError: Code 2: two files of one name, a file in the place of a photo, an archive
                of nothing, or files beside standard output.
        """
        sources = {job.item.source.resolve() for job in self.jobs if job.item.source}
        taken: dict[Path, str] = {}
        for job in self.jobs:
            if job.place is None and self.suffixes:
                raise ImgtoolError(
                    "files beside the output need an output that is a file", "give -o FILE", USAGE
                )
            for path in self.written(job):
                real = path.resolve()
                if real in sources:
                    raise ImgtoolError(f"{path}, an input, would be overwritten", "run them apart", USAGE)
                if real in taken:
                    what = f"{taken[real]} and {job.item.name} would both write {path}"
                    raise ImgtoolError(what, "rename one, or run them apart into different folders", USAGE)
                taken[real] = job.item.name
        self._check_archive(sources, taken)

    def _check_archive(self, sources: Collection[Path], taken: Collection[Path]) -> None:
        archive = self.settings.zip
        if archive and (archive.resolve() in sources or archive.resolve() in taken):
            raise ImgtoolError(f"--zip {archive} is a photo of the batch", "name another file", USAGE)
        if archive and not taken:
            raise ImgtoolError("--zip: no file is written that it could hold", "give -o DIR too", USAGE)


@dataclass
class Batch:
    """The work on a list of inputs: one network, what was made, and what failed."""

    engine: Engine
    settings: Infer
    console: Console
    weights: Path | None
    jobs: list[Job]
    places: Places
    net: Any = None
    folder: Path | None = None
    names: Mapping[Path, str] = field(default_factory=dict)
    table: outputs.Table | None = None
    failures: list[tuple[str, ImgtoolError]] = field(default_factory=list)
    entries: list[report.Entry] = field(default_factory=list)
    made: list[Job] = field(default_factory=list)
    consulted: dict[str, Batch] = field(default_factory=dict)
    _stream: bytes = b""

    @property
    def model(self) -> str | None:
        """Name of the weights, None where there are none."""
        return self.weights.stem if self.weights else None

    def open_table(self) -> None:
        """Name the outputs within their folder, and begin or go on with the engine's table.

        Raises:
            ImgtoolError: A table exists that may not be overwritten, or is damaged.
        """
        settings = self.settings
        if files.is_folder([job.item for job in self.jobs], settings.out):
            self.folder = Path(str(settings.out))
        self.names = outputs.below(self.folder, [job.place for job in self.jobs if job.place])
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
        if self.weights:
            self.net = loading.network(self.engine, self.weights, self.settings, self.console.say)

    def work(self, bar: Bar) -> None:
        """Process every input, after a look at all of them where the engine wants one."""
        surveyed = self._survey(bar)
        for number, job in enumerate(self.jobs, 1):
            if not self.console.live:
                self.console.detail(f"{number}/{len(self.jobs)} {job.item.name}")
            self._each(job, bar, [surveyed[number - 1]] if surveyed else [])
            bar.advance(1)
            if self.failures and self.settings.fail_fast:
                break

    def _survey(self, bar: Bar) -> Sequence[object]:
        """Let the engine look at every photo, also at those whose output is there already."""
        engine = self.engine
        if (
            engine.survey is None
            or not engine.wants_survey(self.settings)
            or all(map(self._is_done, self.jobs))
        ):
            return ()
        readers: list[tuple[str, Callable[[], Any]]] = [
            (job.item.name, partial(self._opened, job.item)) for job in self.jobs
        ]
        watch = Watch(lambda done, total: bar.update(f"looking at {done}/{total}"), self.console.say)
        return engine.survey(self.net, readers, self.settings, watch)

    def _is_done(self, job: Job) -> bool:
        """Tell whether an input is left out: its output exists, or without a picture all files beside."""
        if not self.settings.skip_existing:
            return False
        if job.target:
            return job.target.exists()
        written = [] if job.stream else self.places.written(job)
        return bool(written) and all(path.exists() for path in written)

    def _each(self, job: Job, bar: Bar, known: list[object]) -> None:
        """Process one input and say how it went."""
        try:
            if job.place and self._is_done(job):
                self._left_out(job, job.place, bar, known)
            else:
                self._one(job, bar, known)
        except ImgtoolError as fault:
            self._failed(job.item, fault)
        except MemoryError:
            self._failed(job.item, ImgtoolError("out of memory", "close other programs, or shrink the photo"))

    def _left_out(self, job: Job, place: Path, bar: Bar, known: list[object]) -> None:
        """Say that an output is there already; the page shows it as if it were made now."""
        item, target = job.item, job.target
        self.console.result({"input": item.name, "output": target and str(target), "skipped": True})
        rowless = self.table is not None and self.names[place] not in self.table.rows
        note = f", without a row in {self.engine.table}" if rowless else ""
        there = f"{target} exists" if target else "its files exist"
        self.console.say(f"{item.name}: {there}, left out{note}")
        self.made.append(job)
        if self.settings.report and item.source and (target or self.engine.open):
            self._shown_again(job, bar, known)

    def _shown_again(self, job: Job, bar: Bar, known: list[object]) -> None:
        """Show on the page an output that was there already.

        What lies before the output of an engine that reads its inputs itself, it alone can tell.
        """
        from imgtool import images

        before, facts = self._opened(job.item), {"left out": "it was there already"}
        after = images.read(job.target).pixels if job.target else None
        if self.engine.open:
            consult = partial(self._consult, job.item, _silent)
            watch = replace(self._watch(job, bar), say=_silent, consult=consult)
            result = self.engine.apply(self.net, before, self.settings, watch, *known)
            before, after = result.before or before, result.image if after is None else after
        if after is not None:
            icc = before.icc or b""
            self.entries.append(report.entry(job.item.name, before.pixels, after, facts, icc=icc))

    def _failed(self, item: files.Item, fault: ImgtoolError) -> None:
        self.failures.append((item.name, fault))
        self.console.error(fault, "" if item.name in fault.what else item.name)
        self.console.result({"input": item.name, "error": fault.what, "hint": fault.hint})
        if self.settings.report:
            self.entries.append(report.failed(item.name, fault.what, fault.hint))

    def _opened(self, item: files.Item) -> Any:
        return self.read(self._source(item), item.name)

    def read(self, source: Path | bytes, name: str) -> Any:
        """Read a file or its content, as the engine does where it does it itself."""
        if self.engine.open:
            return self.engine.open(source, name, self.settings, self.net)
        from imgtool import images

        return images.read(source, name)

    def _source(self, item: files.Item) -> Path | bytes:
        """Return an input's file, or its content: standard input is read once and kept."""
        if item.source is None:
            self._stream = self._stream or sys.stdin.buffer.read()
        return item.source or self._stream

    def _watch(self, job: Job, bar: Bar) -> Watch:
        settings = self.settings
        shown = bool(settings.compare or settings.side_by_side or settings.report)
        alone, name = len(self.jobs) == 1, job.item.name
        say = self.console.say if alone else lambda text: self.console.say(f"{name}: {text}")
        return Watch(
            lambda done, total: bar.update(f"tile {done}/{total}") if total > 1 else None,
            say,
            str(job.item.relative),
            self._source(job.item),
            job.place,
            self.places.beside[job],
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
            other = Batch(engine, asked, self.console, _weights(engine, asked), [], self.places)
            other.load()
            self.consulted[name] = other
        other.settings = asked
        given = self._source(item) if source is None else source
        watch = Watch(say=say, name=item.name, source=given, picture=False)
        return other.engine.apply(other.net, other.read(given, item.name), asked, watch).facts

    def _one(self, job: Job, bar: Bar, known: list[object]) -> None:
        # A row without its output was interrupted between the two: what lies beside is ours.
        again = self.table is not None and job.place is not None and self.names[job.place] in self.table.rows
        for path in self.places.written(job):
            files.check_new(path, self.settings.force or (again and path != job.target))
        for suffix, reason in self.places.unfit[job].items():
            self.console.say(f"{job.item.name}: no {suffix} is written: {reason}")
        began = time.monotonic()
        opened = self._opened(job.item)
        result = self.engine.apply(self.net, opened, self.settings, self._watch(job, bar), *known)
        if self.table and job.place:
            self.table.add(self.names[job.place], result.row)
        photo: Photo = result.before or opened
        untouched = self._put(photo, result, job)
        height, width = (None, None) if result.image is None else result.image.shape[:2]
        record: dict[str, Any] = {
            "input": job.item.name,
            "output": str(job.target) if job.target else "-" if job.stream else None,
            "engine": self.engine.name,
            "model": self.model,
            "width": width,
            "height": height,
            "seconds": time.monotonic() - began,
            "facts": result.facts,
        }
        if untouched:
            record["untouched"] = True
        self._picture(job, photo, result)
        self.console.result(record, _line(record, result))

    def _put(self, photo: Photo, result: Result, job: Job) -> bool:
        """Write what was made of a photo; return whether it was left as it is."""
        untouched, fill = self._encoder(photo, result, job) if job.target or job.stream else (False, None)
        if job.stream and fill:
            buffer = io.BytesIO()
            fill(buffer)
            self.console.binary(buffer.getvalue())
        if job.place is None:
            return untouched
        for suffix, path in self.places.beside[job].items():
            if suffix in result.files:
                files.write(path, result.files[suffix])
        if job.target and fill:
            files.fill(job.target, fill)
        self.made.append(job)
        return untouched

    def _encoder(self, photo: Photo, result: Result, job: Job) -> tuple[bool, Callable[[BinaryIO], object]]:
        """Return whether a photo was left as it is, and what writes the file that is made of it."""
        from imgtool import images

        form = _form(self.engine, self.settings, job)
        after = outputs.made(photo, result)
        if after is photo and photo.format == files.file_type(form):
            data = files.read(job.item.source) if job.item.source else self._stream
            return True, lambda file: file.write(data)
        for loss in images.losses(after, form):
            self.console.warn(f"{job.item.name}: {loss}")
        return False, images.encoder(after, form, self.settings.quality)

    def _picture(self, job: Job, photo: Photo, result: Result) -> None:
        if result.image is None or not (
            self.settings.compare or self.settings.side_by_side or self.settings.report
        ):
            return
        before, after, icc, name = photo.pixels, result.image, photo.icc or b"", job.item.name
        if self.settings.compare and job.place:
            sheet = outputs.compared(job.place)
            more = [] if result.reference is None else [result.reference]
            sheets.compare(before, after, sheet, title=name, labels=result.labels, more=more, icc=icc)
            self.console.say(f"before/after: {sheet}")
        if self.settings.side_by_side and job.place:
            pair = outputs.paired(job.place)
            scale = sheets.side_by_side(before, after, pair, self.settings.quality, icc)
            small = "" if scale == 1 else f", at {100 * scale:.0f} %: JPEG holds no more"
            self.console.say(f"side by side: {pair}{small}")
        if self.settings.report:
            self.entries.append(report.entry(name, before, after, result.facts, icc=icc))

    def write_page(self, page: Path, total: int) -> None:
        """Write the page of the report, of what was done and what failed."""
        about: dict[str, object] = {"engine": self.engine.name, "weights": self.model}
        if len(self.entries) < total:
            about["not done, or left out"] = total - len(self.entries)
        report.page(self.entries, page, title=f"imgtool infer {self.engine.name}", about=about)
        self.console.say(f"report: {page}")

    def write_archive(self, path: Path) -> None:
        """Write the archive of every output that is there, with what lies beside it."""
        members: dict[str, Path] = {}
        inputs = {job.item.source for job in self.jobs}
        for job in self.made:
            place, beside = job.place or Path(), self.places.beside[job].values()
            for each in beside if place in inputs else [place, *beside]:
                name = Path("outputs", self.names[place]).with_name(each.name)
                members |= {name.as_posix(): each} if each.exists() else {}
            pair = outputs.paired(place)
            if self.settings.side_by_side and pair.exists():
                members[Path("side_by_side", self.names[place]).with_name(pair.name).as_posix()] = pair
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


def _silent(text: str) -> None:
    """Say nothing."""


def _line(record: Mapping[str, Any], result: Result) -> str:
    """Return the line of one input for people."""
    if record["output"] is None:
        return f"{record['input']}  {result.line}"
    size = f"{record['width']}x{record['height']}  {record['seconds']:.1f} s"
    note = "  left as it is" if record.get("untouched") else ""
    told = f"  {result.line}" if result.line else ""
    return f"{record['input']} -> {record['output']}  {size}{note}{told}"
