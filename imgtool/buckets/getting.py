"""Getting one file: again where the connection breaks, and until it is what the store tells."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from imgtool.buckets import Denied, Found, Interrupted, Place
from imgtool.buckets.etags import Etags, Verdict
from imgtool.buckets.manifest import Entry, hashes
from imgtool.buckets.pool import Room
from imgtool.buckets.state import Closed, Part, State, pieces
from imgtool.errors import ImgtoolError

WAITS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts that bring nothing; half of it to all of it, by chance."""

DENIED = 3
"""Files that may not be read after which, while none could be, the rest is not tried."""

Content = TypeVar("Content", bytes, Path)

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Full(ImgtoolError):
    """The disk is full: nothing else can be fetched either."""


class Getter:
    """Gets files of one place into one folder; may be asked from many threads at once."""

    def __init__(self, place: Place, folder: Path, state: State, room: Room, stop: threading.Event) -> None:
        """Get nothing yet.

        Args:
            place: Where the files are.
            folder: Where they shall be.
            state: What the folder's fetch keeps while it runs.
            room: What all requests share.
            stop: Ends every wait.
        """
        self._place, self._folder, self._state = place, folder, state
        self._room, self._stop = room, stop
        self._etags = Etags()
        self._denied, self._got = 0, False

    def outcome(self, task: Callable[[], Entry | None]) -> Entry | str | None:
        """Return what a task comes to, a fault in words; raises what no other would be spared."""
        try:
            entry = task()
            self._got |= entry is not None
            return entry
        except Full:
            raise
        except Closed:
            return None
        except ImgtoolError as fault:
            self._denied += isinstance(fault, Denied)
            if self._denied >= DENIED and not self._got:
                raise
            return f"{fault.what} ({fault.hint})" if fault.hint else fault.what
        except OSError as fault:
            if fault.errno in _FULL:
                hint = "free some space, and run it again: what has come is kept"
                raise Full(f"cannot write {self._folder}: {reason(fault)}", hint) from None
            return f"cannot be written: {reason(fault)}"

    def small(self, found: Found) -> Entry:
        """Get a file in one request."""

        def read() -> bytes:
            return self._read(found, 0, found.size)

        with self._room.of(found.size):
            data, made, doubtful = self._right(found, read(), read)
            temporary = self._state.temporary(found.path, ".new")
            temporary.write_bytes(data)
        return self._finish(found, temporary, made, doubtful)

    def piece(self, part: Part, piece: tuple[int, int]) -> Entry | None:
        """Get a piece of a large file; the last one makes it whole, and brings its entry."""
        if part.failed or self._stop.is_set():
            return None
        try:
            if piece in part.left and not self._put(part, piece):
                return None
            _, made, doubtful = self._right(part.found, part.file, lambda: self._once_more(part))
        except BaseException:
            part.failed = True
            raise
        entry = self._finish(part.found, part.file, made, doubtful)
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

    def _finish(self, found: Found, temporary: Path, made: dict[str, str], doubtful: bool) -> Entry:
        entry = Entry.of(found, temporary.stat(), made, doubtful)
        self._state.add(entry, temporary, self._folder / found.path)
        return entry

    def _read(self, found: Found, begin: int, end: int) -> bytes:
        """Read a range, going on at the byte reached when the connection breaks; -1 as the end reads all.

        What could not be told from a piece of another content is read anew.
        """
        got, tries = b"", 0
        while True:
            try:
                if end < 0:
                    return self._place.whole(found)
                return got + self._place.read(found, begin + len(got), end)
            except Interrupted as broke:
                if broke.got and end >= 0 and found.telling:
                    got, tries = got + broke.got, 0
                if self._stop.is_set():
                    raise Closed from None
                if tries == len(WAITS) or self._stop.wait(WAITS[tries] * random.uniform(0.5, 1)):
                    raise ImgtoolError(str(broke), "run it again: what has come is kept") from None
                tries += 1

    def _right(
        self, found: Found, content: Content, again: Callable[[], Content]
    ) -> tuple[Content, dict[str, str], bool]:
        """Return a content, fetched once more where it is wrong, its hashes, and whether it is doubtful."""
        made = hashes(content, dict(found.digests))
        verdict = self._etags.judge(found, made)
        if verdict is Verdict.AGAIN:
            content, before = again(), made
            made = hashes(content, dict(found.digests))
            verdict = self._etags.judge(found, made, before)
        return content, made, verdict is Verdict.DOUBTFUL


def reason(fault: OSError) -> str:
    """Return in a few words what the system says."""
    return (fault.strerror or str(fault)).lower()
