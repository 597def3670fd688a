"""Folders in the cache that photos and outputs of ``infer`` pass through: who holds them, what is left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from imgtool import files
from imgtool.errors import ImgtoolError

LOCK, URLS = "lock", "urls.json"
"""Its own files: the lock, and the URLs that the folders in it stand for."""

DATE = 1_000_000_000
"""Time of the last change, in seconds since 1970, that photos get here: what is made here has another."""


def make(spool: Path, urls: Mapping[str, str]) -> int:
    """Make a spool, and hold it.

    Args:
        spool: The folder.
        urls: What outputs in it go to: name of a folder in it to the URL.

    Returns:
        Its lock, see ``held``.

    Raises:
        ImgtoolError: No disk space, no permission, ...
    """
    hidden = spool.with_name(f".{spool.name}")
    try:
        hidden.mkdir(parents=True)
        lock = held(hidden)
        (hidden / URLS).write_text(json.dumps(urls), encoding="utf-8")
        hidden.rename(spool)  # who sweeps sees no spool that is not held
    except OSError as fault:
        raise ImgtoolError(f"cannot write {spool}: {fault.strerror}", "set IMGTOOL_CACHE") from None
    return lock


def held(spool: Path) -> int:
    """Open the lock of a spool, and share it with all who take part in the run; -1 where there are none."""
    try:
        import fcntl
    except ImportError:  # Windows: what a killed process leaves stays
        return -1
    lock = os.open(spool / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return lock


def alone(lock: int) -> bool:
    """Take a lock for oneself; tell whether nobody else holds it."""
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def sweep(folder: Path) -> list[tuple[str, str]]:
    """Clear the spools that nobody holds; return URL and path of each output that was not sent."""
    left = []
    for lock in sorted(folder.glob(f"[!.]*/{LOCK}")):
        with suppress(OSError):
            own = os.open(lock, os.O_RDWR)
            if alone(own):
                urls = _urls(lock.parent)
                for path in cleared(lock.parent):
                    within, _, rest = path.relative_to(lock.parent).as_posix().partition("/")
                    left.append((address(urls[within], rest) if within in urls else "", str(path)))
            os.close(own)
    return left


def _urls(spool: Path) -> dict[str, str]:
    try:
        urls: dict[str, str] = json.loads((spool / URLS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of an older version
        return {}
    return urls


def address(url: str, path: str) -> str:
    """Return the URL of a path below a folder in a bucket.

    >>> address("s3://b/", "x.png"), address("s3://b/a", "x.png")
    ('s3://b/x.png', 's3://b/a/x.png')
    """
    return f"{url.rstrip('/')}/{path}"


def cleared(spool: Path) -> list[Path]:
    """Remove all of a spool but outputs, and return these; without any, it is gone."""
    left = []
    for parent, _, found in os.walk(spool, topdown=False):
        for path in (Path(parent, name) for name in found):
            with suppress(OSError):
                if path.name.startswith(".imgtool-") or path.stat().st_mtime == DATE:
                    path.unlink()
                elif path not in (spool / LOCK, spool / URLS):
                    left.append(path)
        with suppress(OSError):  # something stays in it
            os.rmdir(parent)
    if not left:
        shutil.rmtree(spool, ignore_errors=True)
    return sorted(left)


def told(left: Iterable[str]) -> str:
    """Return what is to be said of outputs that earlier runs could not send."""
    paths = [Path(path) for path in left]
    size = 0
    for path in paths:
        with suppress(OSError):
            size += path.stat().st_size
    parent = files.cache_folder().absolute() / "spool"
    folders = sorted({str(parent / path.relative_to(parent).parts[0]) for path in paths})
    where = ", ".join(folders[:3]) + (f" and {len(folders) - 3} more" if len(folders) > 3 else "")
    many = "1 file" if len(paths) == 1 else f"{len(paths)} files"
    was = "was" if len(paths) == 1 else "were"
    return (
        f"{many} of earlier runs ({size / 1e6:.1f} MB) {was} never sent: each goes when it is made and sent "
        f"again; else remove {where}"
    )
