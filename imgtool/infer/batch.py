"""The books of a batch: what is left out, made and failed, and all that is written of the whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool import files, outputs, report
from imgtool.console import plain
from imgtool.engine import Engine, Watch
from imgtool.errors import DONE, FAILED, Fatal, ImgtoolError
from imgtool.infer.listing import Job, Order, Places, many
from imgtool.infer.work import Outcome, Work, no_memory
from imgtool.settings import Infer

if TYPE_CHECKING:
    from imgtool.console import Bar, Console
    from imgtool.runner.manifest import Manifest
    from imgtool.runner.shards import Shard

AHEAD = 8
"""Photos that are fetched before it is their turn."""

EVERY = 30.0
"""Seconds after which the table and the manifest are sent to where they belong, as far as they have come."""


@dataclass
class Batch:
    """A list of inputs, what was made of them, and what failed.

    Attributes:
        console: Told of every input as it ends.
        jobs: The inputs, of the whole or of one part of it.
        places: Every file that is written.
        work: What is done to one input.
        shard: Which part it is, None for the whole.
        manifest: Where each input is noted as it begins and ends.
        made: Inputs whose output is there: what an archive holds.
        ended: How many inputs are done or left out.
        unwritten: Why the table or the manifest is not where it belongs.
    """

    console: Console
    jobs: Sequence[Job]
    places: Places
    work: Work
    shard: Shard | None = None
    folder: Path | None = None
    names: Mapping[Path, str] = field(default_factory=dict)
    table: outputs.Table | None = None
    manifest: Manifest | None = None
    failures: list[tuple[str, ImgtoolError]] = field(default_factory=list)
    entries: list[report.Entry] = field(default_factory=list)
    made: list[Job] = field(default_factory=list)
    ended: int = 0
    unwritten: list[ImgtoolError] = field(default_factory=list)
    _unsaved: str = ""
    _next: float = 0.0
    _send_at: float = field(default_factory=lambda: time.monotonic() + EVERY)
    _closed: bool = False
    _doomed: bool = False
    _open: dict[Job, Order] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self.work.engine

    @property
    def settings(self) -> Infer:
        """Settings of ``infer``."""
        return self.work.settings

    def open_books(self) -> None:
        """Name the outputs within their folder, and begin or go on with the engine's table.

        The manifest of a runner or of a part is opened by ``open_manifest``.

        Raises:
            ImgtoolError: A table exists that may not be overwritten, or is damaged.
        """
        settings = self.settings
        if files.is_folder([job.item for job in self.places.jobs], settings.out):
            self.folder = Path(str(settings.out))
        self.names = outputs.below(self.folder, [job.place for job in self.jobs if job.place])
        if not self.folder or not self.engine.table:
            return
        path = self.folder / self.engine.table
        path = self.shard.named(path) if self.shard else path
        self.table = outputs.Table(path, list(self.names.values()))
        self._check_new(path, settings.force or settings.skip_existing)
        if settings.skip_existing:
            self._take_back(path)
            self.table.load()

    def _take_back(self, path: Path) -> bool:
        """Fetch what an earlier run sent, such as a table to go on with; tell whether it was fetched."""
        transit = self.work.transit
        if transit is None or path.exists() or path not in transit.sent():
            return False
        from imgtool import buckets
        from imgtool.buckets.outlet import awaited
        from imgtool.buckets.patience import patiently

        url = transit.shown(path)
        place = buckets.open(url)
        found = awaited(place.list)
        if not found:
            raise ImgtoolError(f"no such file: {url}", "it may have been removed since it was listed")
        files.write(path, awaited(lambda: patiently(lambda: place.whole(found[0]))))
        return True

    @contextmanager
    def _taken_back(self, path: Path | None) -> Iterator[None]:
        """Have an output that an earlier run sent here while it is read."""
        fetched = path is not None and self._take_back(path)
        try:
            yield
        finally:
            if path and fetched:
                path.unlink(missing_ok=True)

    def open_manifest(self) -> None:
        """Begin or go on with the manifest, where there is a folder that holds it.

        Raises:
            ImgtoolError: It cannot be read or written.
        """
        if self.folder:
            from imgtool.runner import manifest

            path = self.folder / manifest.name(self.shard)
            self._take_back(path)
            self.manifest = manifest.Manifest(path, self.engine.name)
        if self.manifest and self.table and self.settings.skip_existing:
            self._take_rows()

    def _take_rows(self) -> None:
        """Take back rows of the table that an earlier run wrote into the manifest alone."""
        from imgtool.runner.manifest import known_as

        assert self.manifest is not None
        assert self.table is not None
        places = {known_as(plain(job.item.name)): job.place for job in self.jobs if job.place}
        for name, row in self.manifest.rows.items():
            place = places.get(known_as(name))
            if place and self.names[place] not in self.table.rows:
                self._unsaved = self.names[place]
                self.table.rows[self._unsaved] = row

    def close(self) -> None:
        """Write the rest of the table, close the manifest, and send both to where they belong, once.

        What fails is said, keeps nothing else from being tried, and is part of the verdict.
        """
        if self._closed:
            return
        self._closed = True
        if self.table and self._unsaved:
            self._try(partial(self.table.add, self._unsaved, self.table.rows[self._unsaved]))
        if self.manifest:
            self._try(self.manifest.close)
        transit = self.work.transit
        if transit is None:
            return
        for path in self._books():
            self._try(partial(transit.send, [path]))
        for path in (path for order in self._open.values() for path in order.written):
            if transit.shown(path) != str(path):  # it was on its way, and will be made again
                path.unlink(missing_ok=True)

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except ImgtoolError as fault:
            self.unwritten.append(fault)
            self.console.error(fault)
            self.console.result({"error": fault.what, "hint": fault.hint})

    def _books(self) -> list[Path]:
        """Return the files of the table and the manifest, of those that are there."""
        books = (self.table, self.manifest)
        return [each.path for each in books if each and each.path.exists()]

    def _send_on(self) -> None:
        """Send the table and the manifest as far as they have come, now and then: who is killed has them."""
        transit = self.work.transit
        if transit is None or time.monotonic() < self._send_at:
            return
        from imgtool import buckets
        from imgtool.buckets.outlet import awaited

        for path in self._books():
            url = transit.shown(path)
            if url == str(path):
                continue
            above, _, name = url.rpartition("/")
            try:
                awaited(partial(buckets.open(above).write, path, name))
            except (ImgtoolError, buckets.Interrupted) as fault:
                self.console.detail(f"{fault}; it is tried again")
        self._send_at = time.monotonic() + EVERY

    def go(self, bar: Bar) -> None:
        """Process every input, after a look at all of them where the engine wants one."""
        surveyed = self._survey(bar)
        for number, job in enumerate(self.jobs, 1):
            if not self.console.live:
                self.console.detail(f"{number}/{len(self.jobs)} {job.item.name}")
            self._fetch_ahead(number - 1)
            self._each(self.places.order(job), bar, [surveyed[number - 1]] if surveyed else [])
            bar.advance(1)
            if self.stopped:
                break

    @property
    def stopped(self) -> bool:
        """Whether no further input is to be begun, for one has failed."""
        return self._doomed or (bool(self.failures) and self.settings.fail_fast)

    def _fetch_ahead(self, number: int) -> None:
        if self.work.transit:
            coming = self.jobs[:AHEAD] if number == 0 else self.jobs[number + AHEAD - 1 : number + AHEAD]
            self.work.transit.ahead([job.item for job in coming if self._is_wanted(job)])

    def _is_wanted(self, job: Job) -> bool:
        """Tell whether an input is to be worked on: neither left out nor refused."""
        try:
            self._check(self.places.order(job))
        except ImgtoolError:
            return False
        return not self._is_done(job)

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
            (job.item.name, partial(self.work.glimpsed, job.item)) for job in self.jobs
        ]
        watch = Watch(lambda done, total: bar.update(f"looking at {done}/{total}"), self.console.say)
        return engine.survey(self.work.net, readers, self.settings, watch)

    def _there(self, path: Path) -> bool:
        """Tell whether a file exists, here or where it is sent to."""
        return path.exists() or (self.work.transit is not None and path in self.work.transit.sent())

    def _is_done(self, job: Job) -> bool:
        """Tell whether an input is left out: its output exists, or without a picture all files beside."""
        if not self.settings.skip_existing or (self.manifest and self.manifest.broken(job.item)):
            return False
        if job.target:
            return self._there(job.target)
        written = [] if job.stream else self.places.written(job)
        return bool(written) and all(map(self._there, written))

    def _check_new(self, path: Path, force: bool) -> None:
        files.check_new(path, force)
        if not force and self._there(path):
            raise ImgtoolError(f"{path} exists", "--force overwrites it, --skip-existing leaves it out")

    def _each(self, order: Order, bar: Bar, known: list[object]) -> None:
        """Process one input and say how it went."""
        if self.admitted(order, bar, known):
            self.begun(order)
            try:
                put = partial(self.made.append, order.job)
                outcome = self.work.do(order, known, bar, partial(self.keep, order.job), put)
            except ImgtoolError as fault:
                self.failed(order, fault)
            else:
                self.done(order, outcome)

    def admitted(self, order: Order, bar: Bar, known: Sequence[object] = ()) -> bool:
        """Tell whether an input is to be worked on; where not, say why: its output is there.

        Args:
            order: The input.
            bar: Told how the page's picture of a photo that is left out goes on.
            known: What a survey found of the photo, if there was one.
        """
        job = order.job
        try:
            if job.place and self._is_done(job):
                self._left_out(order, job.place, bar, known)
                return False
            self._check(order)
            return True
        except ImgtoolError as fault:
            self.failed(order, fault, begun=False)
        except MemoryError:
            self.failed(order, no_memory(), begun=False)
        self.work.drop(job.item)
        return False

    def _check(self, order: Order) -> None:
        """Refuse to overwrite files that were there before."""
        job = order.job
        # A row without its output was interrupted between the two: what lies beside is ours.
        again = self.table is not None and job.place is not None and self.names[job.place] in self.table.rows
        ours = self.settings.skip_existing and self.manifest is not None and self.manifest.broken(job.item)
        for path in order.written:
            self._check_new(path, self.settings.force or ours or (again and path != job.target))

    def begun(self, order: Order, worker: str = "") -> None:
        """Note that an input's files may be written from now on."""
        self._open[order.job] = order
        self._note(order, {"status": "begun", "worker": worker})

    def done(self, order: Order, outcome: Outcome, worker: str = "") -> None:
        """Note and say what was made of an input."""
        record = outcome.record
        self._open.pop(order.job, None)
        self.ended += 1
        if outcome.entry:
            self.entries.append(outcome.entry)
        more = {"row": outcome.row} if self.table else {}
        told = {"seconds": record["seconds"], "facts": record["facts"]}
        self._note(order, {"status": "done", "worker": worker, **told, **more})
        self.console.result(record, outcome.line)
        self._send_on()

    def keep(self, job: Job, row: Mapping[str, object]) -> None:
        """Put a photo's row into the table, where there is one.

        Where the manifest has it too, the table, written whole each time, takes a twentieth of the time.
        """
        if not self.table or not job.place:
            return
        name, now = self.names[job.place], time.monotonic()
        if self.manifest and now < self._next:
            self.table.rows[name], self._unsaved = dict(row), name
            return
        self.table.add(name, row)
        self._unsaved, self._next = "", now + 20 * (time.monotonic() - now)

    def _note(self, order: Order, told: Mapping[str, Any]) -> None:
        if self.manifest:
            job = order.job
            self.manifest.add({"input": job.item.name, "output": job.target and str(job.target), **told})

    def _left_out(self, order: Order, place: Path, bar: Bar, known: Sequence[object]) -> None:
        """Say that an output is there already; the page shows it as if it were made now."""
        item, target = order.job.item, order.job.target
        self._note(order, {"status": "left out"})
        self.console.result({"input": item.name, "output": target and str(target), "skipped": True})
        rowless = self.table is not None and self.names[place] not in self.table.rows
        note = f", without a row in {self.engine.table}" if rowless else ""
        there = f"{target} exists" if target else "its files exist"
        self.console.say(f"{item.name}: {there}, left out{note}")
        self.made.append(order.job)
        self.ended += 1
        if self.settings.report and item.source and (target or self.engine.open):
            self._shown_again(order, bar, known)

    def _shown_again(self, order: Order, bar: Bar, known: Sequence[object]) -> None:
        """Show on the page an output that was there already.

        What lies before the output of an engine that reads its inputs itself, it alone can tell.
        """
        from imgtool import images

        item, target, work = order.job.item, order.job.target, self.work
        before, facts = work.opened(item), {"left out": "it was there already"}
        with self._taken_back(target):
            after = images.read(target).pixels if target else None
        if self.engine.open:
            result = self.engine.apply(work.net, before, self.settings, work.watch(order, bar, True), *known)
            before, after = result.before or before, result.image if after is None else after
        work.drop(item)
        if after is not None:
            icc = before.icc or b""
            self.entries.append(report.entry(item.name, before.pixels, after, facts, icc=icc))

    def failed(self, order: Order, fault: ImgtoolError, worker: str = "", begun: bool = True) -> None:
        """Note and say what went wrong with an input.

        Args:
            order: The input.
            fault: What went wrong.
            worker: Who worked on it.
            begun: Whether some of its files may have been written.
        """
        name = order.job.item.name
        self._open.pop(order.job, None)
        self.failures.append((name, fault))
        self._doomed = self._doomed or isinstance(fault, Fatal)
        told = {"error": fault.what, "hint": fault.hint}
        self._note(order, {"status": "failed", "worker": worker, **told, "begun": begun})
        self.console.error(fault, "" if name in fault.what else name)
        self.console.result({"input": name, **told})
        if self.settings.report:
            self.entries.append(report.failed(name, fault.what, fault.hint))
        self._send_on()

    def write_page(self, page: Path) -> None:
        """Write the page of the report, of what was done and what failed."""
        about: dict[str, object] = {"engine": self.engine.name, "weights": self.work.model}
        if len(self.entries) < len(self.jobs):
            about["not done, or left out"] = len(self.jobs) - len(self.entries)
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

    def left(self) -> str:
        """Return how far an interrupted batch came, and how it goes on."""
        goes_on = ": the same command with --skip-existing goes on" if self.names else ""
        verb = "is" if len(self.jobs) == 1 else "are"
        return f"{self.ended} of {many(len(self.jobs), 'photo')} {verb} done{goes_on}"

    def verdict(self) -> int:
        """Say what failed, all together at the end of a batch, and return the exit code."""
        if not self.failures:
            return FAILED if self.unwritten else DONE
        if len(self.jobs) == 1:
            return self.failures[0][1].code
        self.console.say(f"{len(self.failures)} of {len(self.jobs)} failed:")
        for name, fault in self.failures:
            self.console.say(f"  {fault.what}" if name in fault.what else f"  {name}: {fault.what}")
        if self._doomed:
            self.console.say(self.left())
        return FAILED
