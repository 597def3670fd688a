"""Fetching: a folder elsewhere becomes one here, many requests at once, and is the same at the end.

What is there and has not changed is left alone. A file appears under its name when it is whole and its hashes
are right. A broken connection goes on at the byte that it had reached; a process that was killed leaves
notes, from which the next one goes on.
"""

from __future__ import annotations

import itertools
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from imgtool import buckets, names
from imgtool.buckets import Found, Place, etags, manifest, paths, pool
from imgtool.buckets.getting import Full, Getter, reason
from imgtool.buckets.manifest import Entry, Manifest, hashes
from imgtool.buckets.state import FOLDER, PIECE, Part, State, held
from imgtool.engine import Watch
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.settings import Fetch

JOBS = 32
"""Requests at once: 30 ms of latency each, and a request of a small file takes little else."""

LARGE = 2 * PIECE
"""Bytes above which a file is fetched in pieces, by several threads, and survives a kill in parts."""

ROOM = JOBS * PIECE
"""Bytes that all requests together may ask for at a time; memory holds up to twice as much."""

STOP_AFTER = 64
"""Failures in a row after which the rest is not tried: the network or the permission is gone."""

Task = tuple[str, Callable[[], Entry | None]]


def action(settings: Fetch, watch: Watch) -> dict[str, object]:
    """Carry out ``imgtool data fetch URL -o DIR``; see ``fetch`` and ``checked`` for the record."""
    if settings.check:
        return checked(settings.url, Path(settings.out), watch)
    return fetch(
        settings.url,
        Path(settings.out),
        suffixes=settings.suffix,
        jobs=settings.jobs,
        force=settings.force,
        watch=watch,
    )


def fetch(
    source: str | Place,
    folder: Path,
    *,
    suffixes: Sequence[str] = (),
    jobs: int = JOBS,
    force: bool = False,
    watch: Watch | None = None,
) -> dict[str, object]:
    """Fetch a folder elsewhere, or what is missing of it or has changed; see the module's first lines.

    Args:
        source: Its URL, or the place.
        folder: The folder here; it gets a manifest.
        suffixes: Where given, only files that end so (in any case).
        jobs: Requests at once. Together they ask for 256 MiB at most, and a file whose size is not told
            before is fetched while nothing else is: memory holds it whole.
        force: Overwrite files that were not fetched from there.
        watch: Told of progress, in files or pieces of large ones, and of what a user should know.

    Returns:
        ``url``, ``folder``; ``files`` and ``bytes`` that lie there now, of which ``fetched`` came in this run
        and ``unchanged`` did not, and ``doubtful`` were kept though their ETag is not their MD5 (see
        ``etags``); ``seconds``, ``files_per_second`` and ``mb_per_second`` of this run; ``faults``, a line
        for each file that could not be had; ``warnings``, of what is doubtful.

    Raises:
        ImgtoolError: Nothing can be listed or there is nothing; the folder holds another URL's files; the
            disk is full.
    """
    return _Fetch(source, folder, watch or Watch(), jobs).run(suffixes, force)


def checked(url: str | Path, folder: Path, watch: Watch | None = None) -> dict[str, object]:
    """Check what lies in a folder against its manifest, without a network.

    Returns:
        ``url``, ``folder``; ``whole`` files of ``files`` are as the manifest says, ``doubtful`` ones as they
        came; ``bytes``, ``seconds``, ``faults`` and ``warnings``.
    """
    known = manifest.read(folder)
    if known is None:
        raise ImgtoolError(f"{folder} has no {manifest.NAME}", "fetch into it first, without --check", USAGE)
    _refuse_other(known, names.url(url), folder)
    if not known.date:
        raise ImgtoolError(f"a fetch into {folder} has not ended", "run it again, without --check")
    start = time.monotonic()
    faults = manifest.check(known, folder, watch.done if watch else lambda finished, total: None)
    total = sum(entry.size for entry in known.entries.values())
    return {
        "url": known.url,
        "folder": str(folder),
        "whole": len(known.entries) - len(faults),
        "files": len(known.entries),
        "bytes": total,
        **_doubts(known.doubtful),
        "seconds": round(time.monotonic() - start, 3),
        "faults": faults,
    }


def refreshed(url: str, folder: Path, watch: Watch) -> dict[str, object]:
    """Fetch as ``fetch`` does, over whatever lies there, and remove what is listed no more."""
    return _Fetch(url, folder, watch, JOBS).run((), force=True, mirrored=True)


def shown(url: str) -> str:
    """Return a URL as it may be shown and kept, the same for every way to write it."""
    url = names.public(url).rstrip("/")
    if not url.startswith("http"):
        return url
    return "/".join(_escaped(unquote(part)) for part in url.split("/"))


def _escaped(part: str) -> str:
    return re.sub("[%/?#]", lambda match: quote(match[0], safe=""), part)


def _refuse_other(known: Manifest, url: str, folder: Path) -> None:
    if known.url != shown(url):
        hint = "choose another folder with -o, or --force takes this one over"
        raise ImgtoolError(f"{folder} holds files of {known.url}", hint, USAGE)


def _doubts(paths: Collection[str]) -> dict[str, object]:
    """Return what a record tells of doubtful files."""
    return {"doubtful": len(paths), "warnings": [etags.warning(paths)] if paths else []}


class _Fetch:
    """One fetch into one folder."""

    def __init__(self, source: str | Place, folder: Path, watch: Watch, jobs: int) -> None:
        self.place = buckets.open(source) if isinstance(source, str) else source
        self.folder, self.watch, self.jobs = folder, watch, max(1, jobs)
        self.url = shown(source if isinstance(source, str) else self.place.url(""))
        self.faults: list[str] = []
        self.known = Manifest(self.url)
        self._in_the_way: set[str] = set()
        self._stop = threading.Event()

    def run(self, suffixes: Sequence[str], force: bool, mirrored: bool = False) -> dict[str, object]:
        """Do all of it; ``mirrored`` removes what is listed no more."""
        start = time.monotonic()
        fetched: list[Entry] = []
        with held(self.folder, self.watch.say) as state:
            listed = pool.apart(self.place.list).result()
            if not listed:
                raise ImgtoolError(f"there is nothing at {self.url}", "check the name", USAGE)
            self.known = self._before(state, force)
            chosen = paths.chosen(listed, suffixes)
            if suffixes and not chosen:
                raise _none_of(listed, suffixes)
            folds = (self.folder / FOLDER / "LOCK").exists()  # its file system does not tell "a" from "A"
            wanted, self.faults = paths.fitting(chosen, folds)
            self.known.single = len(listed) == 1 and shown(self.place.url(listed[0].path)) == self.url
            gone = set(self.known.entries) - {found.path for found in wanted} if mirrored else set()
            state.sweep({found.path for found in wanted})
            todo = self._todo(wanted, force)
            if todo or gone:
                self.known.begin(self.folder)
            try:
                self._remove(gone)
                self._all(todo, state, fetched)
                self.known.complete = not suffixes and not self.faults
            finally:
                state.close()
                self._take_up(state)
                self.known.write(self.folder)
                state.forget()
        return self._record(wanted, fetched, time.monotonic() - start)

    def _record(self, wanted: list[Found], fetched: list[Entry], seconds: float) -> dict[str, object]:
        names = [each.path for each in wanted if each.path not in self._in_the_way]
        have = [self.known.entries[name] for name in names if name in self.known.entries]
        return {
            "url": self.url,
            "folder": str(self.folder),
            "files": len(have),
            "bytes": _bytes(have),
            "fetched": len(fetched),
            "unchanged": len(have) - len(fetched),
            **_doubts([entry.path for entry in have if entry.doubtful]),
            "seconds": round(seconds, 3),
            "files_per_second": round(len(fetched) / seconds, 1) if seconds else 0.0,
            "mb_per_second": round(_bytes(fetched) / seconds / 1e6, 1) if seconds else 0.0,
            "faults": self.faults,
        }

    def _before(self, state: State, force: bool) -> Manifest:
        """Return what is known of the folder: its manifest, and the notes of a fetch that was killed."""
        known = manifest.read(self.folder)
        if known is not None and known.url != self.url:
            if not force:
                _refuse_other(known, self.url, self.folder)
            known = None
            state.forget()
        self.known = known or Manifest(self.url)
        self._take_up(state)
        return self.known

    def _take_up(self, state: State) -> None:
        """Take what is noted as finished into the manifest."""
        for path, entry in state.finished().items():
            if _untouched(self.folder / path, entry):  # else the kill came between its note and its name
                self.known.entries[path] = entry

    def _remove(self, gone: Iterable[str]) -> None:
        """Remove files, and the folders that are empty then."""
        for path in gone:
            target = self.folder / path
            try:
                target.unlink(missing_ok=True)
            except (IsADirectoryError, NotADirectoryError):
                pass  # it is no file of ours any more
            except OSError as fault:
                self.faults.append(f"{path}: cannot be removed: {reason(fault)}")
                continue
            del self.known.entries[path]
            for parent in list(target.parents)[: path.count("/")]:
                with suppress(FileNotFoundError, NotADirectoryError):
                    if any(parent.iterdir()):
                        break
                    parent.rmdir()

    def _todo(self, wanted: list[Found], force: bool) -> list[Found]:
        """Return what has to be fetched, the largest first; add a fault for each file that is in the way."""
        with ThreadPoolExecutor(self.jobs) as threads:
            states = list(threads.map(self._lies_there, wanted))
        todo = []
        for found, entry in zip(wanted, states, strict=True):
            if isinstance(entry, Entry):
                self.known.entries[found.path] = entry
            elif entry and not force:
                self.faults.append(f"{found.path}: {entry}; --force overwrites it")
                self._in_the_way.add(found.path)
            else:
                self.known.entries.pop(found.path, None)
                todo.append(found)
        return sorted(todo, key=lambda found: (-found.size if found.size > LARGE else 0, found.path))

    def _lies_there(self, found: Found) -> Entry | str:
        """Return the entry of a file that need not be fetched, "" where it must be, or what is in the way."""
        target = self.folder / found.path
        try:
            state = target.stat()
        except OSError:
            return ""
        entry = self.known.entries.get(found.path)
        if entry and (_untouched(target, entry) or _same(target, entry)):
            new = found.tag != entry.tag or not found.tag or found.size not in (-1, entry.size)
            return "" if new else replace(entry, modified=state.st_mtime_ns)
        with suppress(PermissionError):
            if found.digests and state.st_size == found.size and target.is_file():
                made = hashes(target, dict(found.digests))
                if all(made.get(name, value) == value for name, value in found.digests):
                    return Entry.of(found, state, made)
        return "it was changed here" if entry else "another file is there already"

    def _all(self, todo: list[Found], state: State, fetched: list[Entry]) -> None:
        """Fetch them, ``fetched`` taking each as it is finished."""
        large = [Part(state, found) for found in todo if found.size > LARGE]
        small = [found for found in todo if found.size <= LARGE]
        self._refuse_full(sum(part.missing for part in large) + sum(max(0, found.size) for found in small))
        room = pool.Room(ROOM, self._stop)
        getter = Getter(self.place, self.folder, state, room, self._stop)
        tasks: Iterator[Task] = itertools.chain(
            (
                (part.found.path, partial(getter.piece, part, piece))
                for part in large
                for piece in part.todo()
            ),
            ((found.path, partial(getter.small, found)) for found in small),
        )
        outcomes = (partial(_outcome, getter, task) for task in tasks)
        total = sum(len(part.todo()) for part in large) + len(small)
        row = 0
        with closing(pool.each(outcomes, min(self.jobs, total), self._stop)) as results:
            for number, (path, got) in enumerate(results, 1):
                if isinstance(got, Entry):
                    self.known.entries[path] = got
                    fetched.append(got)
                elif got:
                    self.faults.append(f"{path}: {got}")
                row = row + 1 if isinstance(got, str) else 0
                self.watch.done(number, total)
                if row == STOP_AFTER and number < total:
                    self.faults.append(f"{total - number} more were not tried, after {row} failures in a row")
                    return

    def _refuse_full(self, need: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if need > free:
            what = f"{self.folder} has {free / 1e6:.1f} MB free, and {need / 1e6:.1f} MB are to be fetched"
            raise Full(what, "free some space or choose another folder with -o")


def _none_of(listed: Sequence[Found], suffixes: Sequence[str]) -> ImgtoolError:
    endings = Counter(PurePosixPath(found.path).suffix or found.path for found in listed)
    there = ", ".join(ending for ending, _ in endings.most_common(5))
    what = f"none of {len(listed)} files ends in {' or '.join(suffixes)}"
    return ImgtoolError(what, f"what is there ends in {there}", USAGE)


def _outcome(getter: Getter, task: Task) -> tuple[str, Entry | str | None]:
    return task[0], getter.outcome(task[1])


def _untouched(path: Path, entry: Entry) -> bool:
    try:
        state = path.stat()
    except OSError:
        return False
    return (state.st_size, state.st_mtime_ns) == (entry.size, entry.modified)


def _same(path: Path, entry: Entry) -> bool:
    try:
        return path.is_file() and path.stat().st_size == entry.size and hashes(path)["sha256"] == entry.sha256
    except PermissionError:
        return False


def _bytes(entries: Iterable[Entry]) -> int:
    return sum(entry.size for entry in entries)
