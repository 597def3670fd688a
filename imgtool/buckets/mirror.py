"""Copies of folders elsewhere, in the cache of this machine."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from imgtool import files, names
from imgtool.buckets import Offline, fetch, manifest
from imgtool.engine import Watch
from imgtool.errors import ImgtoolError

LOCK = ".lock"
"""Name of a file beside a copy: who uses the copy shares it, who changes the copy has it alone."""

_USED: dict[Path, int] = {}
"""Locks of the copies that this process uses, open until it ends, and until its forks end."""

_ONE = threading.Lock()


def mirror(
    url: str | Path,
    say: Callable[[str], None] = lambda text: None,
    done: Callable[[int, int], None] = lambda finished, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Path:
    """Return a copy on this machine, in the cache: what has changed is fetched, what has gone is removed.

    While this process lives, the copy stays as it is: processes that ask for it meanwhile, this one among
    them, get it so. Without a network the copy of an earlier call serves where it is complete. Both is said.

    Args:
        url: A folder or a file elsewhere.
        say: Told of a wait, and of a copy that is not refreshed.
        done: Told of progress, as ``Watch.done``.
        warn: Told of files that were kept and may be damaged: see ``etags``.

    Returns:
        The folder; of a URL that names a file, the file.

    Raises:
        ImgtoolError: As ``fetch``, or a file could not be had.
    """
    name = names.url(url)
    folder = _cached(name)

    def refresh() -> None:
        try:
            record: Any = fetch.refreshed(name, folder, Watch(done, say))
        except Offline as fault:
            known = manifest.head(folder)
            if known is None or not known.complete:
                raise
            say(f"{fault.what}; the copy of {known.date} is used")
            return
        faults = record["faults"]
        for text in record["warnings"]:
            warn(f"{names.public(name)}: {text}")
        if faults:
            what = f"{len(faults)} files of {names.public(name)} could not be fetched: {faults[0]}"
            raise ImgtoolError(what, "run it again: what has come is kept")

    _use(folder, refresh, say)
    known = manifest.head(folder)
    if known is None or not known.single:
        return folder
    return folder / next(iter(manifest.entries(files.json_lines(folder / manifest.NAME)[1:])))


def _cached(url: str) -> Path:
    """Return the folder of a URL's copy, each of its own, beside that of a folder above or below it."""
    scheme, _, path = fetch.shown(url).partition("://")
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


def _use(folder: Path, refresh: Callable[[], None], say: Callable[[str], None]) -> None:
    """Bring a copy in the cache up to date where nobody uses it; it stays so while this process lives.

    A copy that this process or another one uses stays as it is. Who comes while another process fetches it
    waits until that has ended, and has the same. None waits for those that use it, so none waits for ever.

    Args:
        folder: The copy; its lock lies beside it.
        refresh: Makes it complete, or raises; called by one process at a time.
        say: Told of a wait, and of a copy that is not refreshed.

    Raises:
        ImgtoolError: The cache cannot be written and holds no complete copy.
    """
    path = folder.with_name(LOCK)
    with _ONE:
        if path in _USED:
            if _complete(folder):
                return
            os.close(_USED.pop(path))  # somebody has cleared the cache
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as fault:
            reason = (fault.strerror or str(fault)).lower()
            if not _complete(folder):
                what = f"cannot write {path.parent}: {reason}"
                raise ImgtoolError(what, "IMGTOOL_CACHE names another folder for copies") from None
            say(f"the copy cannot be refreshed: {reason}")
            return
        try:
            _settle(lock, folder, refresh, say)
        except BaseException:
            os.close(lock)
            raise
        _USED[path] = lock


def _complete(folder: Path) -> bool:
    head = manifest.head(folder)
    return head is not None and head.complete


def _settle(lock: int, folder: Path, refresh: Callable[[], None], say: Callable[[str], None]) -> None:
    """Return with the lock shared and the copy complete."""
    try:
        import fcntl
    except ImportError:  # Windows: two processes at once are left to their users
        return refresh()
    waited = False
    while True:
        if _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
            refresh()
            # A lock that is changed is given back for a moment, in which another process may refresh too.
            fcntl.flock(lock, fcntl.LOCK_SH)
        elif not _locked(lock, fcntl.LOCK_SH | fcntl.LOCK_NB):
            say(f"another process is fetching into {folder}: waiting for it")
            waited = True
            fcntl.flock(lock, fcntl.LOCK_SH)
        elif not waited and _complete(folder):
            say("another process uses the copy: it is not refreshed")
        if _complete(folder):
            return None
        fcntl.flock(lock, fcntl.LOCK_UN)
        time.sleep(random.uniform(0.01, 0.1))  # else two could share it, and neither have it alone


def _locked(lock: int, how: int) -> bool:
    import fcntl

    try:
        fcntl.flock(lock, how)
    except BlockingIOError:
        return False
    return True
