"""A place in memory for the tests of fetches, and what they share."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from imgtool.buckets import Found, Interrupted, Offline, manifest
from imgtool.buckets import mirror as mirrors
from imgtool.errors import ImgtoolError

PHOTOS = {"a.jpg": b"one", "b/c.JPG": b"two" * 50, "b/notes.txt": b"", "ü #%.jpg": b"three"}


class Shelf:
    """A place in memory: what it holds, what it was asked, and what goes wrong."""

    def __init__(self, files: dict[str, bytes], digests: bool = True, url: str = "gs://shelf") -> None:
        self.files, self.digests, self._url = files, digests, url
        self.tags: dict[str, str] = {}
        self.asked: list[tuple[str, int, int]] = []
        self.breaks: list[int] = []
        self.damaged: list[bytes] = []
        self.offline = False

    def list(self) -> list[Found]:
        if self.offline:
            raise Offline("no answer from the shelf", "check the network")
        return [
            Found(
                path,
                len(data),
                self.tags.get(path, md5(data)),
                (("md5", md5(data)),) if self.digests else (),
            )
            for path, data in sorted(self.files.items())
        ]

    def read(self, found: Found, begin: int, end: int) -> bytes:
        self.asked.append((found.path, begin, end))
        if found.path not in self.files:
            raise ImgtoolError(f"no such file: {found.path}")
        data = self.files[found.path][begin:end]
        if self.damaged:
            return self.damaged.pop(0)
        if self.breaks:
            raise Interrupted("the connection broke", data[: self.breaks.pop(0)])
        return data

    def whole(self, found: Found) -> bytes:
        return self.read(found, 0, len(self.files[found.path]))

    def write(self, source: Path, path: str) -> None:
        raise AssertionError

    def url(self, path: str) -> str:
        return f"{self._url}/{path}"


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def lies(folder: Path) -> dict[str, bytes]:
    """Return all that lies in a folder but the manifest."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != manifest.NAME
    }


def as_another_process() -> None:
    """Let go of the copies that this process uses, as its end would."""
    for lock in mirrors._USED.values():
        os.close(lock)
    mirrors._USED.clear()


def fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child leaves alone
        return os.fork()


def killed(work: Callable[[], object]) -> None:
    """Do a work in a process that ends in the middle of it."""
    child = fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
