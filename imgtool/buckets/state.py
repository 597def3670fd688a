"""The hidden folder of a fetch: its lock, what is finished, and the parts of large files."""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha1
from pathlib import Path

from imgtool import files
from imgtool.buckets import Found
from imgtool.buckets.manifest import Entry, entries
from imgtool.errors import ImgtoolError

FOLDER = ".imgtool-fetch"
"""Its name, in the folder that is fetched into; it is gone when all is there."""

PIECE = 8 << 20
"""Bytes of a large file that one request asks for."""


class Closed(Exception):
    """The fetch has ended; what comes now is left."""


class State:
    """What a fetch keeps while it runs, and leaves to the next one when it is killed."""

    def __init__(self, folder: Path) -> None:
        """Take the hidden folder of ``folder``, whose lock is held."""
        self.folder = folder / FOLDER
        self._log = self.folder / "finished.jsonl"
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Have no more files finished: threads that are not waited for may still come with some."""
        with self._lock:
            self._closed = True

    def check(self) -> None:
        """Raise ``Closed`` where it is too late."""
        if self._closed:
            raise Closed

    def temporary(self, path: str, suffix: str) -> Path:
        """Return the file that a path's content is put into before it is whole; always the same one.

        Raises:
            Closed: Too late: it is another fetch's now.
        """
        self.check()
        return self.folder / (sha1(path.encode(errors="surrogateescape")).hexdigest() + suffix)

    def finished(self) -> dict[str, Entry]:
        """Return what a fetch that was killed had finished."""
        return entries(files.json_lines(self._log)) if self._log.exists() else {}

    def add(self, entry: Entry, temporary: Path, target: Path) -> None:
        """Note a file as finished and give it its name, in that order: a file has a note or is not there.

        Raises:
            OSError: Something is in the way, or nothing may be written there.
            Closed: Too late.
        """
        with self._lock:
            self.check()
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as log:
                log.write(entry.line())
            os.replace(temporary, target)

    def forget(self) -> None:
        """Drop the notes, which the manifest holds now."""
        self._log.unlink(missing_ok=True)

    def sweep(self, keep: set[str]) -> None:
        """Remove what was left of files that nobody wants any more.

        Args:
            keep: Paths whose parts may still serve.
        """
        wanted = {self.temporary(path, suffix).name for path in keep for suffix in (".part", ".journal")}
        for path in self.folder.iterdir():
            if path.suffix in (".new", ".part", ".journal") and path.name not in wanted:
                path.unlink(missing_ok=True)


class Part:
    """A large file on its way: the pieces that came lie at their place, the journal names them.

    A piece counts only where its bytes still have the checksum that the journal gives: neither a killed
    process nor a power cut can leave a hole in the file. Another content (size or tag) begins anew.
    """

    def __init__(self, state: State, found: Found) -> None:
        """Look at what is there of a file."""
        self.found, self._state = found, state
        self.file = state.temporary(found.path, ".part")
        self._journal = state.temporary(found.path, ".journal")
        self._lock = threading.Lock()
        self.failed = False
        have = self._have() if found.tag else set()
        self.left = [piece for piece in pieces(found.size) if piece not in have]
        self._count = len(self.left)
        self._begun = bool(have)

    def _begin(self) -> None:
        head = {"path": self.found.path, "size": self.found.size, "tag": self.found.tag}
        self._journal.write_bytes(json.dumps(head).encode() + b"\n")
        self.file.write_bytes(b"")
        os.truncate(self.file, self.found.size)
        self._begun = True

    def todo(self) -> list[tuple[int, int]]:
        """Return the pieces to fetch; an empty one where all had come and the file lacks its name alone."""
        return self.left or [(self.found.size, self.found.size)]

    @property
    def missing(self) -> int:
        """Return the bytes that have not come."""
        return sum(end - begin for begin, end in self.left)

    def _have(self) -> set[tuple[int, int]]:
        if not (self._journal.exists() and self.file.exists()):
            return set()
        head, *rows = files.json_lines(self._journal) or [{}]
        if (head.get("size"), head.get("tag")) != (self.found.size, self.found.tag):
            return set()
        have = set()
        with self.file.open("rb") as file:
            for row in rows:
                begin, end = int(row["begin"]), int(row["end"])
                file.seek(begin)
                if zlib.crc32(file.read(end - begin)) == row["crc32"]:
                    have.add((begin, end))
        return have

    def put(self, begin: int, data: bytes) -> bool:
        """Keep a piece; return whether it was the last one; raises ``Closed`` where it is too late."""
        self._state.check()
        with self._lock:
            if not self._begun:
                self._begin()
        self.write(begin, data)
        row = {"begin": begin, "end": begin + len(data), "crc32": zlib.crc32(data)}
        with self._lock, self._journal.open("ab") as journal:
            journal.write(json.dumps(row).encode() + b"\n")
            self._count -= 1
            return self._count == 0

    def write(self, begin: int, data: bytes) -> None:
        """Write bytes at their place."""
        with self.file.open("r+b") as file:
            file.seek(begin)
            file.write(data)

    def drop(self) -> None:
        """Remove the journal, and the file where it has not got its name."""
        for path in (self._journal, self.file):
            path.unlink(missing_ok=True)


def pieces(size: int) -> list[tuple[int, int]]:
    """Cut a size in bytes into (begin, end) of at most ``PIECE`` each."""
    return [(begin, min(begin + PIECE, size)) for begin in range(0, size, PIECE)]


@contextmanager
def held(folder: Path, say: Callable[[str], None]) -> Iterator[State]:
    """Hold a folder against other processes that fetch into it; wait for one that does, and say so.

    Raises:
        ImgtoolError: Nothing can be written there.
    """
    path = folder / FOLDER / "lock"
    try:
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        lock = _taken(path, lambda: say(f"another process is fetching into {folder}: waiting for it"))
    except OSError as fault:
        reason = (fault.strerror or str(fault)).lower()
        raise ImgtoolError(f"cannot write {folder}: {reason}", "choose another folder with -o") from None
    state = State(folder)
    try:
        yield state
    finally:
        with suppress(OSError):
            if {each.name for each in state.folder.iterdir()} == {"lock"}:
                path.unlink()
                for each in (state.folder, *made):  # of a folder that nothing came into, nothing is left
                    each.rmdir()
        os.close(lock)


def _taken(path: Path, wait: Callable[[], None]) -> int:
    """Open and lock a file; one that was removed by its last holder in the meantime is made anew."""
    try:
        import fcntl
    except ImportError:  # Windows: two processes at once are left to their users
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        os.close(lock)
