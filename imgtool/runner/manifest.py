"""The manifest of a batch: a line as each photo begins and ends, from which a later run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

from imgtool import files, names
from imgtool.console import plain
from imgtool.errors import ImgtoolError
from imgtool.runner.shards import Shard

NAME = Path("infer-manifest.jsonl")


def name(shard: Shard | None) -> Path:
    """Return the name of the manifest of a whole batch, or of a part of one."""
    return shard.named(NAME) if shard else NAME


class Manifest:
    """A file with one JSON object a line, which is only ever added to; one batch at a time holds it.

    Keys: ``engine``, ``input``, ``output`` (None where no picture is written), ``status``, ``worker`` (host
    and process), and as they apply ``error``, ``hint``, ``begun``, ``seconds``, ``facts``, ``row`` (of the
    engine's table). The status is "begun" as soon as a photo's files may be written, and when it ends "done",
    "failed" (with ``begun`` where some of them may be there) or "left out" (its output was there). What has
    begun stays so until it is done, however often it fails before it begins, or until another engine may
    have written its output: of other engines' lines nothing else matters.

    Attributes:
        path: The file.
        engine: Name of the engine.
        rows: Photo to row of the table, as earlier runs found it.
    """

    def __init__(self, path: Path, engine: str) -> None:
        """Read what is there, and open the file for more.

        Raises:
            ImgtoolError: It cannot be read or written, or another batch holds it.
        """
        self.path, self.engine = path, engine
        self.rows: dict[str, dict[str, Any]] = {}
        self._begun: dict[str, str] = {}  # input to output
        _resolved.cache_clear()
        self._file = self._opened()
        try:
            self._take_up()
        except BaseException:
            self._file.close()
            raise

    def _take_up(self) -> None:
        """Read what earlier runs wrote, and end a line that the last one did not."""
        self._hold()
        for line in files.json_lines(self.path):
            if isinstance(line.get("input"), str):
                self._take(line, known_as(line["input"]), known_as(line.get("output") or ""))
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._write(b"\n")

    def _take(self, line: Mapping[str, Any], photo: str, output: str) -> None:
        begun = line.get("status") == "begun" or line.get("begun")
        if line.get("engine") != self.engine:
            if begun and line.get("output") and self._begun.get(photo) == output:
                del self._begun[photo]  # what is there now is not ours to overwrite
            return
        if line.get("row"):
            self.rows[line["input"]] = line["row"]
        if begun:
            self._begun[photo] = output
        elif line.get("status") == "done":
            self._begun.pop(photo, None)

    def _opened(self) -> FileIO:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self.path.open("a+b", buffering=0)
        except OSError as fault:
            raise self._unwritable(fault) from None

    def _hold(self) -> None:
        """Keep other batches out until the file is closed, or the process is gone."""
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"another batch writes into {self.path.parent}"
            raise ImgtoolError(what, "wait until it has ended, or choose another folder with -o") from None
        except (ImportError, OSError):  # Windows, or a file system without locks
            return

    def _unwritable(self, fault: OSError) -> ImgtoolError:
        return ImgtoolError(
            f"cannot write {self.path}: {(fault.strerror or str(fault)).lower()}",
            "make room, or choose another folder with -o",
        )

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a line, at once and in one piece.

        Raises:
            ImgtoolError: The disk is full, ...
        """
        line = plain({"engine": self.engine, **record})
        self._write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as fault:
            raise self._unwritable(fault) from None

    def broken(self, item: files.Item) -> bool:
        """Tell whether earlier work on an input began and did not succeed: its files are not all there.

        It is the same input by whatever path it is named.
        """
        return known_as(plain(item.name)) in self._begun

    def close(self) -> None:
        """Have the file on the disk, and close it."""
        with suppress(OSError):  # a file system without it has done what it can
            os.fsync(self._file.fileno())
        self._file.close()


def known_as(name: str) -> str:
    """Return a URL as it is, or the one path of a file of many names."""
    if names.is_url(name):
        return name
    folder, last = os.path.split(name)
    return os.path.join(_resolved(os.path.abspath(folder)), last)


@cache
def _resolved(folder: str) -> str:
    return os.path.realpath(folder)
