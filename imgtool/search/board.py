"""What the processes of a search share: a folder of files, on this machine or on a file server.

Nothing is locked: a trial belongs to who could create its file first, which every file system grants one
process alone. A file whose process has ended belongs to nobody: on this machine the process itself tells, of
another machine a file that is not touched any more.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from imgtool import files
from imgtool.errors import ImgtoolError

Row = dict[str, Any]

FOLDER = "trials"
TRIALS = "search.jsonl"
"""One line for each candidate: all that the search knows."""
BEAT = 10.0
"""Seconds between two touches of what a process holds."""
STALE = 90.0
"""Seconds without a touch after which its process counts as dead."""
ENDED = ("trained", "failed", "rejected", "repeated")
"""States of trials for which nothing is left to do."""

_TOKEN = secrets.token_hex(8)
_HOST = socket.gethostname()


class Board:
    """The trials of a search in a folder that many processes write."""

    def __init__(self, folder: Path) -> None:
        """Make the folder below that of the search."""
        self._home = folder
        self._folder = folder / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._held: dict[str, Path] = {}
        self._over = threading.Event()

    def __enter__(self) -> Board:
        """Begin to touch what is held, so that others see that this process lives."""
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give everything back."""
        self._over.set()
        for name in list(self._held):
            self.release(name)
        (self._folder / f"clock-{_TOKEN}").unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            for path in list(self._held.values()):
                with suppress(OSError):  # a file server that is gone for a while
                    _touch(path)

    # --- trials ---

    def rows(self) -> list[Row]:
        """Return all trials by their numbers."""
        found: list[Row] = []
        for path in self._folder.glob("[0-9]*.json"):
            found += files.json_lines(path)
        return sorted(found, key=lambda row: int(row["trial"]))

    def save(self, row: Row) -> None:
        """Write what is known of a trial, and the table of all."""
        files.write(self._folder / f"{row['trial']:03}.json", json.dumps(row).encode())
        self.write_table()

    def write_table(self) -> None:
        """Write ``search.jsonl``; whoever writes last has seen all that was written before."""
        rows = None
        while rows != (rows := self.rows()):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            files.write(self._home / TRIALS, text.encode())

    # --- who works on what ---

    def claim(self, name: str) -> bool:
        """Take something for this process alone; tell whether that was possible.

        What a dead process held is taken over: by a file with the next number, which only one can create.
        """
        if name in self._held:
            return True
        path, before = self._latest(name)
        if before is not None and not self._abandoned(before):
            return False
        owner = {"host": _HOST, "pid": os.getpid(), "born": _born(os.getpid()), "token": _TOKEN}
        if not _create(path, json.dumps(owner)):
            return False
        self._held[name] = path
        return True

    def holds(self, name: str) -> bool:
        """Tell whether what was claimed is still this process's own, and not taken for dead meanwhile."""
        return name in self._held and self._latest(name)[1] == self._held[name]

    def release(self, name: str) -> None:
        """Give back what was claimed."""
        if self.holds(name):
            files.write(self._held[name], json.dumps({"free": True}).encode())
        self._held.pop(name, None)

    def _latest(self, name: str) -> tuple[Path, Path | None]:
        """Return the file that would claim next, and the one that claimed last."""
        before, number = None, 0
        while (path := self._folder / f"{name}.claim-{number}").exists():
            before, number = path, number + 1
        return path, before

    def _abandoned(self, path: Path) -> bool:
        try:
            owner = json.loads(files.read(path) or b"{}")
        except ValueError:  # not written to the end: its process was killed, or will write it at once
            owner = {}
        if owner.get("free"):
            return True
        if owner.get("host") == _HOST and os.name == "posix":  # it may have slept, and not touched its files
            return not _lives(owner)
        return self._age(path) > STALE

    def _age(self, path: Path) -> float:
        """Return seconds since a file was touched, by the clock of the one who keeps the files."""
        clock = self._folder / f"clock-{_TOKEN}"
        _touch(clock)
        return clock.stat().st_mtime - path.stat().st_mtime

    # --- how many are trained ---

    def started(self) -> int:
        """Return how many trials were let into training."""
        return len(list(self._folder.glob("training-*")))

    def admit(self, trial: int, most: int) -> bool:
        """Let a trial into training, once, unless as many were; tell whether it may train."""
        for number in range(most):
            path = self._folder / f"training-{number:03}"
            if _create(path, str(trial)) or path.read_text(encoding="ascii") == str(trial):
                return True
        return False

    def admitted(self, trial: int) -> bool:
        """Tell whether a trial was let into training."""
        return any(path.read_text(encoding="ascii") == str(trial) for path in self._folder.glob("training-*"))

    def worker(self) -> int:
        """Return a number that no other process of the search has got."""
        number = 0
        while not _create(self._folder / f"worker-{number:03}", f"{_HOST} {os.getpid()} {time.time():.0f}"):
            number += 1
        return number


def _create(path: Path, text: str) -> bool:
    """Write a file, whole, unless there is one; tell whether it was written."""
    blank = path.with_name(f".{path.name}-{_TOKEN}")
    try:
        blank.write_text(text, encoding="ascii")
        os.link(blank, path)
    except FileExistsError:
        return False
    except OSError:
        return _create_here(path, text)
    finally:
        blank.unlink(missing_ok=True)
    return True


def _create_here(path: Path, text: str) -> bool:
    """Do the same on a file system without links, where a killed process may leave the file empty."""
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    try:
        files.write(path, text.encode())
    except ImgtoolError:  # the disk is full: nobody else shall find it taken
        path.unlink()
        raise
    return True


def _touch(path: Path) -> None:
    with path.open("ab"):  # on a file server it is the server's clock that counts
        os.utime(path)


def _lives(owner: Row) -> bool:
    """Tell whether the process that claimed something on this machine still runs."""
    if owner["pid"] == os.getpid():
        return bool(owner["token"] == _TOKEN)
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    born = _born(owner["pid"])
    return not born or owner.get("born", "") in ("", born)  # another process may have got its number


def _born(pid: int) -> str:
    """Return when a process of this machine began, "" where the system does not tell; proc(5), starttime.

    One that has ended, and that nobody has asked how, is "ended".
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "ended" if fields[0] in "ZX" else f"{boot} {fields[19]}"
