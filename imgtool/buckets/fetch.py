"""Fetching: a folder elsewhere becomes one here, many requests at once, and is the same at the end.

What is there and has not changed is left alone. A file appears under its name when it is whole and its hashes
are right. A broken connection goes on at the byte that it had reached; a process that was killed leaves
notes, from which the next one goes on.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path, PurePosixPath, PureWindowsPath
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

from imgtool import buckets, files, names
from imgtool.buckets import Found, Interrupted, Offline, Place, manifest
from imgtool.buckets.manifest import Entry, Manifest, hashes
from imgtool.buckets.state import FOLDER, PIECE, Closed, Part, State, held, pieces, use
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

WAITS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts that bring nothing; half of it to all of it, by chance."""

STOP_AFTER = 64
"""Failures in a row after which the rest is not tried: the network or the permission is gone."""

T = TypeVar("T")
Content = TypeVar("Content", bytes, Path)

_FULL = (errno.ENOSPC, errno.EDQUOT)


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
        and ``unchanged`` did not; ``seconds``, ``files_per_second`` and ``mb_per_second`` of this run;
        ``faults``, a line for each file that could not be had.

    Raises:
        ImgtoolError: Nothing can be listed or there is nothing; the folder holds another URL's files; the
            disk is full.
    """
    return _Fetch(source, folder, watch or Watch(), jobs).run(suffixes, force)


def checked(url: str | Path, folder: Path, watch: Watch | None = None) -> dict[str, object]:
    """Check what lies in a folder against its manifest, without a network.

    Returns:
        ``url``, ``folder``; ``whole`` files of ``files`` are as the manifest says; ``bytes``, ``seconds`` and
        ``faults``.
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
        "seconds": round(time.monotonic() - start, 3),
        "faults": faults,
    }


def mirror(
    url: str | Path,
    say: Callable[[str], None] = lambda text: None,
    done: Callable[[int, int], None] = lambda finished, total: None,
) -> Path:
    """Return a copy on this machine, in the cache: what has changed is fetched, what has gone is removed.

    While this process lives, the copy stays as it is: processes that ask for it meanwhile, this one among
    them, get it so. Without a network the copy of an earlier call serves where it is complete. Both is said.

    Returns:
        The folder; of a URL that names a file, the file.

    Raises:
        ImgtoolError: As ``fetch``, or a file could not be had.
    """
    name = names.url(url)
    folder = _cached(name)

    def refresh() -> None:
        try:
            faults: Any = _Fetch(name, folder, Watch(done, say), JOBS).run((), force=True, mirrored=True)[
                "faults"
            ]
        except Offline as fault:
            known = manifest.head(folder)
            if known is None or not known.complete:
                raise
            say(f"{fault.what}; the copy of {known.date} is used")
            return
        if faults:
            what = f"{len(faults)} files of {names.public(name)} could not be fetched: {faults[0]}"
            raise ImgtoolError(what, "run it again: what has come is kept")

    use(folder, refresh, say)
    known = manifest.head(folder)
    if known is None or not known.single:
        return folder
    return folder / next(iter(manifest.entries(files.json_lines(folder / manifest.NAME)[1:])))


def _cached(url: str) -> Path:
    """Return the folder of a URL's copy, each of its own, beside that of a folder above or below it."""
    scheme, _, path = _shown(url).partition("://")
    if scheme.startswith("http") and "?" in url:
        path += "?" + sha256(url.encode()).hexdigest()
    return files.cache_folder().joinpath("buckets", scheme, *map(_part, path.split("/")), ".copy")


def _part(part: str) -> str:
    """Return a part of a URL as the name of a folder; what had to be changed ends in % and a hash.

    >>> _part("photos 2026"), _part("..")
    ('photos 2026', '%2E%2E%5ec1f7e700f37c3d')
    """
    safe = quote(part, safe=" @+=,()").replace("..", "%2E%2E")
    safe = "%2E" + safe[1:] if safe.startswith(".") else safe
    if safe == part and 0 < len(part) <= 200:
        return part
    return f"{safe[:150]}%{sha256(part.encode(errors='surrogateescape')).hexdigest()[:16]}"


def _shown(url: str) -> str:
    """Return a URL as it may be shown and kept, the same for every way to write it."""
    url = names.public(url).rstrip("/")
    if not url.startswith("http"):
        return url
    return "/".join(_escaped(unquote(part)) for part in url.split("/"))


def _escaped(part: str) -> str:
    return re.sub("[%/?#]", lambda match: quote(match[0], safe=""), part)


def _refuse_other(known: Manifest, url: str, folder: Path) -> None:
    if known.url != _shown(url):
        hint = "choose another folder with -o, or --force takes this one over"
        raise ImgtoolError(f"{folder} holds files of {known.url}", hint, USAGE)


def _record(
    url: str, folder: Path, counts: tuple[int, int, int, int], start: float, faults: list[str]
) -> dict[str, object]:
    """Return what a run tells; counts are files, bytes, files fetched and bytes fetched."""
    seconds = time.monotonic() - start
    number, size, fetched, brought = counts
    return {
        "url": url,
        "folder": str(folder),
        "files": number,
        "bytes": size,
        "fetched": fetched,
        "unchanged": number - fetched,
        "seconds": round(seconds, 3),
        "files_per_second": round(fetched / seconds, 1) if seconds else 0.0,
        "mb_per_second": round(brought / seconds / 1e6, 1) if seconds else 0.0,
        "faults": faults,
    }


class _Full(ImgtoolError):
    """The disk is full: nothing else can be fetched either."""


class _Fetch:
    """One fetch into one folder."""

    def __init__(self, source: str | Place, folder: Path, watch: Watch, jobs: int) -> None:
        self.place = buckets.open(source) if isinstance(source, str) else source
        self.folder, self.watch, self.jobs = folder, watch, max(1, jobs)
        self.url = _shown(source if isinstance(source, str) else self.place.url(""))
        self.faults: list[str] = []
        self.known = Manifest(self.url)
        self._in_the_way: set[str] = set()
        self._stop = threading.Event()
        self._room = _Room(ROOM, self._stop)
        self._believed = True  # that an ETag which looks like an MD5 is one

    def run(self, suffixes: Sequence[str], force: bool, mirrored: bool = False) -> dict[str, object]:
        """Do all of it; ``mirrored`` removes what is listed no more."""
        start = time.monotonic()
        fetched: list[Entry] = []
        with held(self.folder, self.watch.say) as state:
            listed = _apart(self.place.list).result()
            if not listed:
                raise ImgtoolError(f"there is nothing at {self.url}", "check the name", USAGE)
            self.known = self._before(state, force)
            wanted = self._safe(_chosen(listed, suffixes))
            self.known.single = len(listed) == 1 and _shown(self.place.url(listed[0].path)) == self.url
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
        paths = [each.path for each in wanted if each.path not in self._in_the_way]
        have = [self.known.entries[path] for path in paths if path in self.known.entries]
        counts = (len(have), _bytes(have), len(fetched), _bytes(fetched))
        return _record(self.url, self.folder, counts, start, self.faults)

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

    def _safe(self, listed: list[Found]) -> list[Found]:
        """Leave out what could not lie in the folder by its name; each is a fault."""
        folds = (self.folder / FOLDER / "LOCK").exists()  # the file system does not tell "a" from "A"
        folders = {
            parent.lower() if folds else parent for each in listed for parent in manifest.above(each.path)
        }
        kept: dict[str, Found] = {}
        for found in listed:
            name = found.path.lower() if folds else found.path
            if _odd(found.path):
                self.faults.append(f"{found.path}: refused, for a part of its name is empty or a dot")
            elif _outside(found.path):
                self.faults.append(f"{found.path}: refused, for it would lie outside the folder")
            elif name in folders:
                self.faults.append(f"{found.path}: refused, for it is the name of a folder too")
            elif name in kept:
                self.faults.append(f"{found.path}: refused, for {kept[name].path} has the same name here")
            else:
                kept[name] = found
        return list(kept.values())

    def _remove(self, gone: Iterable[str]) -> None:
        """Remove files, and the folders that are empty then."""
        for path in gone:
            target = self.folder / path
            try:
                target.unlink(missing_ok=True)
            except (IsADirectoryError, NotADirectoryError):
                pass  # it is no file of ours any more
            except OSError as fault:
                self.faults.append(f"{path}: cannot be removed: {_reason(fault)}")
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
                    return _entry(found, state, made)
        return "it was changed here" if entry else "another file is there already"

    def _all(self, todo: list[Found], state: State, fetched: list[Entry]) -> None:
        """Fetch them, ``fetched`` taking each as it is finished."""
        large = [Part(state, found) for found in todo if found.size > LARGE]
        small = [found for found in todo if found.size <= LARGE]
        self._refuse_full(sum(part.missing for part in large) + sum(max(0, found.size) for found in small))
        tasks: Iterator[tuple[str, Callable[[], Entry | None]]] = itertools.chain(
            (
                (part.found.path, _bound(self._piece, part, state, piece))
                for part in large
                for piece in part.todo()
            ),
            ((found.path, _bound(self._small, found, state)) for found in small),
        )
        total = sum(len(part.todo()) for part in large) + len(small)
        row = 0
        with closing(self._each(tasks, min(self.jobs, total))) as results:
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
            raise _Full(what, "free some space or choose another folder with -o")

    def _each(
        self, tasks: Iterator[tuple[str, Callable[[], Entry | None]]], threads: int
    ) -> Generator[tuple[str, Entry | str | None]]:
        """Yield what each task came to, an entry, None or a fault, as they end; closing it stops them."""
        lock = threading.Lock()
        ended: SimpleQueue[tuple[str, Entry | str | None] | None] = SimpleQueue()

        def work() -> None:
            try:
                while not self._stop.is_set():
                    with lock:
                        task = next(tasks, None)
                    if task is None:
                        return
                    ended.put((task[0], self._outcome(task[1])))
            except BaseException:
                self._stop.set()
                raise
            finally:
                ended.put(None)

        crew = [_apart(work) for _ in range(threads)]
        try:
            for _ in crew:
                while (result := ended.get()) is not None:
                    yield result
        finally:
            self._stop.set()
        for each in crew:
            each.result()

    def _outcome(self, task: Callable[[], Entry | None]) -> Entry | str | None:
        try:
            return task()
        except _Full:
            raise
        except Closed:
            return None
        except ImgtoolError as fault:
            return f"{fault.what} ({fault.hint})" if fault.hint else fault.what
        except OSError as fault:
            if fault.errno in _FULL:
                hint = "free some space, and run it again: what has come is kept"
                raise _Full(f"cannot write {self.folder}: {_reason(fault)}", hint) from None
            return f"cannot be written: {_reason(fault)}"

    def _small(self, found: Found, state: State) -> Entry:
        with self._room.of(found.size):
            data, made = self._right(
                found, self._read(found, 0, found.size), lambda: self._read(found, 0, found.size)
            )
            temporary = state.temporary(found.path, ".new")
            temporary.write_bytes(data)
        return self._finish(found, state, temporary, made)

    def _piece(self, part: Part, state: State, piece: tuple[int, int]) -> Entry | None:
        """Fetch a piece; the last one makes the file whole."""
        if part.failed or self._stop.is_set():
            return None
        try:
            if piece in part.left and not self._put(part, piece):
                return None
            _, made = self._right(part.found, part.file, lambda: self._once_more(part))
        except BaseException:
            part.failed = True
            raise
        entry = self._finish(part.found, state, part.file, made)
        part.drop()
        return entry

    def _put(self, part: Part, piece: tuple[int, int]) -> bool:
        with self._room.of(piece[1] - piece[0]):
            return part.put(piece[0], self._read(part.found, *piece))

    def _once_more(self, part: Part) -> Path:
        for begin, end in pieces(part.found.size):
            with self._room.of(end - begin):
                part.write(begin, self._read(part.found, begin, end))
        return part.file

    def _finish(self, found: Found, state: State, temporary: Path, made: dict[str, str]) -> Entry:
        entry = _entry(found, temporary.stat(), made)
        state.add(entry, temporary, self.folder / found.path)
        return entry

    def _read(self, found: Found, begin: int, end: int) -> bytes:
        """Read a range, going on at the byte reached when the connection breaks; -1 as the end reads all."""
        got, tries = b"", 0
        while True:
            try:
                if end < 0:
                    return self.place.whole(found)
                return got + self.place.read(found, begin + len(got), end)
            except Interrupted as broke:
                if broke.got and end >= 0:
                    got, tries = got + broke.got, 0
                if self._stop.is_set():
                    raise Closed from None
                if tries == len(WAITS) or self._stop.wait(WAITS[tries] * random.uniform(0.5, 1)):
                    raise ImgtoolError(str(broke), "run it again: what has come is kept") from None
                tries += 1

    def _right(
        self, found: Found, content: Content, again: Callable[[], Content]
    ) -> tuple[Content, dict[str, str]]:
        """Return a content and its hashes once they are those that the store tells.

        A content that is not what the store tells is fetched once more. Where an ETag alone says so, and the
        same comes again, the ETag is no MD5 (a store that encrypts with a key of the user makes such ones)
        and none is believed from then on.
        """
        made = hashes(content, dict(found.digests))
        for last in (False, True):
            wrong = [name for name, value in self._told(found) if made.get(name, value) != value]
            if not wrong:
                return content, made
            if last:
                break
            content, before = again(), made
            made = hashes(content, dict(found.digests))
            if wrong == ["etag-md5"] and made == before:
                self._doubt()
        hint = "run it again; where that does not help, what is stored or the way to it is damaged"
        raise ImgtoolError(f"its {wrong[0].upper()} is not what the store tells, twice", hint)

    def _told(self, found: Found) -> Iterable[tuple[str, str]]:
        unsure = () if self._believed else ("etag-md5",)
        return [(name, value) for name, value in found.digests if name not in ("etag-parts", *unsure)]

    def _doubt(self) -> None:
        if self._believed:
            self._believed = False
            self.watch.say("the store's ETags are no MD5s (encrypted with a key?): sizes alone are checked")


class _Room:
    """Lets requests begin while what they ask for together is not too much."""

    def __init__(self, size: int, stop: threading.Event) -> None:
        """Hold nothing.

        Args:
            size: Bytes; what alone is more has it alone.
            stop: Ends every wait.
        """
        self._size, self._stop = size, stop
        self._held = 0
        self._less = threading.Condition()

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Hold room for so many bytes, -1 for all of it; raises ``Closed`` when it is too late."""
        size = min(size, self._size) if size >= 0 else self._size
        with self._less:
            while self._held + size > self._size:
                if self._stop.is_set():
                    raise Closed
                self._less.wait(0.2)
            self._held += size
        try:
            yield
        finally:
            with self._less:
                self._held -= size
                self._less.notify_all()


def _apart(work: Callable[[], T]) -> Future[T]:
    """Do a work in a thread that nobody waits for when the process ends: a request may take long."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as fault:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(fault)

    threading.Thread(target=run, name="imgtool-fetch", daemon=True).start()
    return future


def _reason(fault: OSError) -> str:
    return (fault.strerror or str(fault)).lower()


def _bound(function: Callable[..., Any], *arguments: object) -> Callable[[], Any]:
    return lambda: function(*arguments)


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


def _entry(found: Found, state: os.stat_result, made: dict[str, str]) -> Entry:
    told = dict(found.digests)
    md5 = next(
        (made[name] for name in ("md5", "etag-md5") if told.get(name) and made[name] == told[name]), ""
    )
    return Entry(found.path, state.st_size, found.tag, made["sha256"], state.st_mtime_ns, md5)


def _bytes(entries: Iterable[Entry]) -> int:
    return sum(entry.size for entry in entries)


def _chosen(listed: list[Found], suffixes: Sequence[str]) -> list[Found]:
    """Return the files with one of these suffixes, without what a fetch itself writes."""
    endings = tuple(suffix.lower() for suffix in suffixes)
    own = (manifest.NAME, FOLDER)
    return [
        found
        for found in listed
        if found.path.partition("/")[0] not in own and (not endings or found.path.lower().endswith(endings))
    ]


def _odd(path: str) -> bool:
    """Tell whether a path could be that of another file, too.

    >>> [_odd(path) for path in ("a/b.jpg", "a//b.jpg", "a/./b.jpg", "a/", "../b.jpg", "/b.jpg")]
    [False, True, True, True, False, False]
    """
    return str(PurePosixPath(path)) != path


def _outside(path: str) -> bool:
    r"""Tell whether a path could lead out of a folder, on this system or another.

    >>> [_outside(path) for path in ("a/b.jpg", "../b.jpg", "/b", "C:/b", "a/..\\..\\b", "a..b", "")]
    [False, True, True, True, True, False, True]
    """
    windows = PureWindowsPath(path)
    parts = (*PurePosixPath(path).parts, *windows.parts)
    return not parts or bool(windows.anchor) or path.startswith("/") or ".." in parts or "\0" in path
