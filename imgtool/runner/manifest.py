"""The manifest of a batch: a line as each photo begins and ends, from which a later run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from imgtool import files
from imgtool.console import plain
from imgtool.errors import ImgtoolError


def name(part: str) -> str:
    """Return the name of the manifest of a whole batch (``part`` is ""), or of a part such as "3/16".

    >>> name(""), name("3/16")
    ('infer-manifest.jsonl', 'infer-manifest-3-of-16.jsonl')
    """
    return f"infer-manifest{'-' * bool(part)}{part.replace('/', '-of-')}.jsonl"


class Manifest:
    """A file with one JSON object a line, which is only ever added to: the last line of a photo counts.

    Keys: ``input``, ``output`` (None where no picture is written), ``status``, ``worker`` (host and process),
    and as they apply ``error``, ``hint``, ``begun``, ``seconds``, ``facts``, ``row`` (of the engine's table).
    The status is "begun" as soon as a photo's files may be written, and when it ends "done", "failed" (with
    ``begun`` where some of them may be there) or "left out" (its output was there).

    Attributes:
        path: The file.
        earlier: What earlier runs wrote last of each photo.
        rows: Photo to row of the table, as earlier runs found it.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there, and open the file for more.

        Raises:
            ImgtoolError: It cannot be read or written.
        """
        self.path = path
        self.earlier: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        torn = False
        if path.exists():
            lines = [line for line in files.json_lines(path) if "input" in line]
            self.earlier = {line["input"]: line for line in lines}
            self.rows = {line["input"]: line["row"] for line in lines if line.get("row")}
            torn = not files.read(path).endswith(b"\n")
        self._file = self._opened()
        if torn:
            self._file.write(b"\n")

    def _opened(self) -> BinaryIO:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self.path.open("ab", buffering=0)
        except OSError as fault:
            raise self._unwritable(fault) from None

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
        try:
            self._file.write(json.dumps(plain(record), allow_nan=False).encode() + b"\n")
        except OSError as fault:
            raise self._unwritable(fault) from None

    def broken(self, item: files.Item) -> bool:
        """Tell whether earlier work on an input began and did not succeed: its files are not all there."""
        last = self.earlier.get(plain(item.name), {})
        return last.get("status") == "begun" or bool(last.get("begun"))

    def close(self) -> None:
        """Have the file on the disk, and close it."""
        with suppress(OSError):  # a file system without it has done what it can
            os.fsync(self._file.fileno())
        self._file.close()
