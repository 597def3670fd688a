"""What a batch is made of: every input, where what is made of it goes, and every file beside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from imgtool import files, outputs
from imgtool.engine import Engine
from imgtool.errors import USAGE, ImgtoolError
from imgtool.settings import Infer

if TYPE_CHECKING:
    from imgtool.buckets.transit import Transit


def many(count: int, noun: str) -> str:
    """Return a number of things in words.

    >>> many(1, "photo"), many(0, "photo")
    ('1 photo', '0 photos')
    """
    return f"{count} {noun}{'s' * (count != 1)}"


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


@dataclass(frozen=True)
class Order:
    """All that the work on one input needs to know of the batch; it can be sent to another process.

    Attributes:
        job: The input.
        beside: Suffix to path of the files beside.
        unfit: Suffix to the reason why the input goes without that file.
        written: Every file that the work will write.
    """

    job: Job
    beside: Mapping[str, Path]
    unfit: Mapping[str, str]
    written: Sequence[Path]


def jobs(engine: Engine, settings: Infer, transit: Transit | None = None) -> list[Job]:
    """Return every input and where its output goes.

    Args:
        engine: The engine.
        settings: Of ``infer``; ``out`` names a place of this machine.
        transit: Knows inputs that are URLs.

    Raises:
        ImgtoolError: Nothing is found, or outputs that cannot be.
    """
    pictures = engine.picture or settings.out is not None
    endings = engine.sheets if engine.picture else (*engine.sheets, *files.SHEETS)
    items = _without_drawn(_items(engine, settings, endings, transit), engine)
    if pictures:
        form = settings.format or engine.form(settings)
        targets = files.outputs(
            items, engine.name, settings.out, lambda item: form or files.extension(item.source)
        )
        found = [Job(*pair, pair[1], pair[1] is None) for pair in zip(items, targets, strict=True)]
    else:
        found = [Job(item, None, item.source) for item in items]
    for name in ("compare", "side_by_side", "zip"):
        if getattr(settings, name) and any(job.place is None for job in found):
            flag = name.replace("_", "-")
            what = f"--{flag} needs outputs that are files, and standard output is none"
            raise ImgtoolError(what, "give -o FILE", USAGE)
    for job in found if pictures else ():
        _check_form(form_of(engine, settings, job), job.target)
    return found


def _items(
    engine: Engine, settings: Infer, endings: Collection[str], transit: Transit | None
) -> list[files.Item]:
    suffixes = engine.suffixes or files.READABLE
    if transit is None:
        return files.expand(settings.inputs, suffixes, engine.name, endings)
    from imgtool import names

    found: list[files.Item] = []
    for text in settings.inputs:
        is_url = names.is_url(text)
        found += transit.items(names.url(text), suffixes) if is_url else files.expand([text], suffixes)
    # One photo of two inputs may lie in two places here: its URL tells that it is one.
    called = [replace(item, source=Path(names.public(item.url))) if item.url else item for item in found]
    own = [*(f"-{engine.name}{more}" for more in ("", *files.SHEETS)), *endings]
    kept = set(map(id, files.without_own(called, own)))
    unique: dict[object, files.Item] = {}
    for item, name in zip(found, called, strict=True):
        if id(name) in kept:
            unique.setdefault(item.url or (item.source and item.source.resolve()), item)
    return list(unique.values())


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


def form_of(engine: Engine, settings: Infer, job: Job) -> str:
    """Return the file type of an output, as a suffix or word."""
    own = job.target.suffix if job.target else engine.form(settings) or files.extension(job.item.source)
    return settings.format or own


def _check_form(form: str, target: Path | None) -> None:
    kind = files.file_type(form)
    if target and target.suffix and files.file_type(target.suffix) != kind:
        raise ImgtoolError(f"{target} is not named like a {form} file", "let -o and --format agree", USAGE)


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

    def order(self, job: Job) -> Order:
        """Return what the work on an input needs to know."""
        return Order(job, self.beside[job], self.unfit[job], self.written(job))

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
