"""The manifest of a fetched folder: what lies there, where it came from, and hashes to check it by."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from imgtool import files
from imgtool.buckets import Found
from imgtool.errors import ImgtoolError

NAME = "imgtool-manifest.jsonl"
"""Its file, in the folder: a line about the whole, then a line per file, sorted by path."""

_BLOCK = 1 << 20

PARTS = (5, 6, 7, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 512, 1024)
"""Sizes in MiB of the parts in which tools send large files to S3."""


@dataclass(frozen=True)
class Entry:
    """A file that was fetched.

    Attributes:
        path: Its path below the folder, with slashes.
        size: Bytes.
        tag: ``Found.tag`` of the content that was fetched.
        sha256: SHA-256 in hexadecimal.
        modified: Time of its last change on this machine, in nanoseconds: one that was not touched since is
            not read again.
        md5: MD5 in hexadecimal where the store told it, else "".
        doubtful: Whether it was kept though its ETag is not its MD5: see ``etags``.
    """

    path: str
    size: int
    tag: str
    sha256: str
    modified: int = 0
    md5: str = ""
    doubtful: bool = False

    @classmethod
    def of(
        cls, found: Found, state: os.stat_result, made: Mapping[str, str], doubtful: bool = False
    ) -> Entry:
        """Return the entry of a file that lies here, ``made`` being what ``hashes`` makes of it."""
        told = dict(found.digests)
        names = (name for name in ("md5", "etag-md5") if told.get(name) and made[name] == told[name])
        md5 = next((made[name] for name in names), "")
        return cls(found.path, state.st_size, found.tag, made["sha256"], state.st_mtime_ns, md5, doubtful)

    def line(self) -> bytes:
        """Return its line of JSON."""
        return (
            json.dumps(
                {name: value for name, value in vars(self).items() if value != "" and value is not False}
            ).encode()
            + b"\n"
        )


@dataclass
class Manifest:
    """What a folder holds.

    Attributes:
        url: Where it came from.
        entries: Path to entry.
        complete: Whether the last fetch brought every file that was listed, without a choice of suffixes.
        single: Whether the URL names a file, which is all that the folder holds.
        date: When the last fetch ended, in UTC (ISO 8601); "" from its first change until then.
    """

    url: str
    entries: dict[str, Entry] = field(default_factory=dict)
    complete: bool = False
    single: bool = False
    date: str = ""

    @property
    def doubtful(self) -> list[str]:
        """Return the paths of the doubtful files."""
        return [path for path, entry in self.entries.items() if entry.doubtful]

    def begin(self, folder: Path) -> None:
        """Write that a fetch is about to change the folder: until it ends, the folder is not complete."""
        self.complete, self.date = False, ""
        self._write(folder)

    def write(self, folder: Path) -> None:
        """Write it whole or not at all, with the time of now."""
        self.date = datetime.now(UTC).isoformat(timespec="seconds")
        self._write(folder)

    def _write(self, folder: Path) -> None:
        rows = [self.entries[path] for path in sorted(self.entries)]
        head = {"url": self.url, "date": self.date, "complete": self.complete, "single": self.single}
        counts = {"files": len(rows), "bytes": sum(row.size for row in rows)}
        lines = [json.dumps(head | counts).encode() + b"\n", *(row.line() for row in rows)]
        files.write(folder / NAME, b"".join(lines))


def read(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; None where it has none."""
    try:
        first, *rows = files.json_lines(folder / NAME) or [{}]
    except ImgtoolError:
        return None
    return _of(first, entries(rows))


def head(folder: Path) -> Manifest | None:
    """Return the manifest of a folder without its entries, which may be many; None where it has none."""
    try:
        with (folder / NAME).open("rb") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    return _of(first, {}) if isinstance(first, dict) else None


def _of(first: dict[str, Any], rows: dict[str, Entry]) -> Manifest:
    told: dict[str, Any] = {
        name: first[name] for name in ("url", "complete", "single", "date") if name in first
    }
    return Manifest(entries=rows, **{"url": ""} | told)


def entries(rows: Iterable[dict[str, Any]]) -> dict[str, Entry]:
    """Return the entries of lines by path; a line that is none is left out, the last of a path counts."""
    found = {}
    for row in rows:
        try:
            entry = Entry(**row)
        except TypeError:
            continue
        found[entry.path] = entry
    return found


def hashes(content: bytes | Path, told: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return hashes of a content or a file in hexadecimal: SHA-256, and those that were told of it.

    Args:
        content: The bytes, or the file that holds them.
        told: Name to value, of which "md5", "etag-md5", "git-sha1" (git's name of it: SHA-1 of a header and
            the content) and "etag-parts" are known. The last is what S3 calls an object that was sent in N
            parts: the MD5 of the MD5s of the parts, "-" and N. How large the parts were is not told. The
            value comes back where it is that of a usual size (``PARTS``, or the smallest whole MiB), and ""
            where not: then nothing is known.
    """
    told = told or {}
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    made: dict[str, Any] = {"sha256": hashlib.sha256()}
    for name in told:
        if name == "etag-parts":
            made[name] = _Parts(told[name], size)
        elif name in ("md5", "etag-md5"):
            made[name] = hashlib.md5(usedforsecurity=False)
        elif name == "git-sha1":
            made[name] = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    for block in [content] if isinstance(content, bytes) else _blocks(content):
        for each in made.values():
            each.update(block)
    return {name: each.hexdigest() for name, each in made.items()}


class _Parts:
    """The ETag of an object that was sent in parts, for every size of a part that could be."""

    def __init__(self, told: str, size: int) -> None:
        self._told, self._count = told, int(told.rpartition("-")[2])
        sizes = {*PARTS, -(-size // self._count >> 20)}
        usual = {mib << 20 for mib in sizes if mib > 0 and -(-size // (mib << 20)) == self._count}
        self._rows = [_Row(each) for each in usual]

    def update(self, block: bytes) -> None:
        for row in self._rows:
            row.update(block)

    def hexdigest(self) -> str:
        made = {f"{row.hexdigest()}-{self._count}" for row in self._rows}
        return self._told if self._told in made else ""


class _Row:
    """The MD5 of the MD5s of parts of one size in bytes."""

    def __init__(self, size: int) -> None:
        self._size, self._left, self._done = size, size, b""
        self._part = hashlib.md5(usedforsecurity=False)

    def update(self, block: bytes) -> None:
        rest = memoryview(block)
        while rest:
            now, rest = rest[: self._left], rest[self._left :]
            self._part.update(now)
            self._left -= len(now)
            if not self._left:
                self._end()

    def _end(self) -> None:
        self._done += self._part.digest()
        self._part, self._left = hashlib.md5(usedforsecurity=False), self._size

    def hexdigest(self) -> str:
        if self._left < self._size:
            self._end()
        return hashlib.md5(self._done, usedforsecurity=False).hexdigest()


def _blocks(source: Path) -> Iterable[bytes]:
    with source.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def above(path: str) -> list[str]:
    """Return every folder on the way to a path.

    >>> above("a/b/c.jpg")
    ['a', 'a/b']
    """
    return [path[: match.start()] for match in re.finditer("/", path)]


def check(
    manifest: Manifest, folder: Path, done: Callable[[int, int], None] = lambda finished, total: None
) -> list[str]:
    """Read every file of a manifest again and return what is wrong, a line each; no network is needed."""
    faults = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        rows = list(manifest.entries.values())
        for number, fault in enumerate(threads.map(lambda row: _wrong(row, folder), rows), 1):
            if fault:
                faults.append(fault)
            done(number, len(rows))
    return faults


def _wrong(entry: Entry, folder: Path) -> str:
    path = folder / entry.path
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"{entry.path}: {size} bytes, not {entry.size}"
        if hashes(path)["sha256"] != entry.sha256:
            return f"{entry.path}: its SHA-256 is not that of the manifest"
    except OSError as fault:
        return f"{entry.path}: {(fault.strerror or str(fault)).lower()}"
    return ""
