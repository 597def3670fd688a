"""Shards of a stream: which there are, and how those in buckets come, one after the other."""

from __future__ import annotations

import atexit
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from imgtool import files, names
from imgtool.errors import USAGE, ImgtoolError

KINDS = {".parquet": "parquet", ".tar": "webdataset"}
"""Suffix of a shard to what the library calls it."""
BUCKETS = ("s3://", "gs://", "hf://")
"""How URLs begin whose shards are fetched whole; the library itself reads those of the web."""
MOMENT = 0.1
"""Seconds between two looks whether a shard has come."""


def listed(text: str) -> list[str]:
    """List the shards that words stand for, [] where they are the name of a data set.

    A file, a folder or a glob of ``.parquet`` or ``.tar`` (WebDataset); or their URL, in which ``{000..012}``
    stands for each number. Of a web address's suffix, what follows a ``?`` is no part.

    Raises:
        ImgtoolError: Code 2: no such file, nothing in a folder, or shards of both kinds.
    """
    if names.is_url(text):
        found = [each for one in _numbered(names.url(text)) for each in _elsewhere(one)]
    elif Path(text).is_dir():
        found = sorted(str(path) for path in Path(text).rglob("*") if path.suffix.lower() in KINDS)
    elif os.path.exists(text):
        found = [text]
    elif glob.has_magic(text) or Path(text).suffix.lower() in KINDS or text.startswith((".", "/", "~")):
        found = sorted(glob.glob(os.path.expanduser(text), recursive=True))
    else:
        return []
    if not found:
        raise ImgtoolError(f"no shards at {names.public(text)}", "they end in .parquet or .tar", USAGE)
    if len({suffix(each) for each in found}) > 1 or suffix(found[0]) not in KINDS:
        what = f"{names.public(text)} are no shards of one kind"
        raise ImgtoolError(what, "they all end in .parquet, or in .tar", USAGE)
    return found


def suffix(shard: str) -> str:
    """Return how the name of a shard ends, in lower case."""
    return Path(shard.partition("?")[0] if shard.startswith("http") else shard).suffix.lower()


def _numbered(text: str) -> list[str]:
    found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if not found:
        return [text]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    return [f"{text[: found.start()]}{each:0{len(first)}d}{text[found.end() :]}" for each in numbers]


def _elsewhere(url: str) -> list[str]:
    """Return the URLs of the shards that the URL of a folder, a file or a pattern stands for."""
    if not url.startswith(BUCKETS) and not url.endswith("/"):
        return [url]
    from imgtool import buckets
    from imgtool.buckets import listing
    from imgtool.buckets.outlet import awaited

    above, pattern = listing.fixed(url)
    place = buckets.open(above if pattern else url)
    found = [each.path for each in awaited(place.list) if suffix(each.path) in KINDS]
    if pattern:
        found = [path for path in found if listing.matches(path.split("/"), pattern.split("/"))]
    return [place.url(path) for path in sorted(found)]


def arriving(found: Sequence[str], moved: Callable[[], None]) -> Iterator[list[str]]:
    """Yield shards as they can be read: all at once, but those in buckets one by one.

    Of these two at most lie here, in the cache: the one that is read, and the next, which comes meanwhile.

    Args:
        found: The shards, in the order in which they are read.
        moved: Called while one is waited for.

    Raises:
        ImgtoolError: One cannot be fetched.
    """
    if not found or not found[0].startswith(BUCKETS):
        yield [*found]
        return
    with _folder() as folder, ExitStack() as stack:
        coming = _Shards(found, folder)
        stack.enter_context(_at_the_latest(coming.stop))
        coming.begin(0)
        for number in range(1, len(found) + 1):
            path = coming.awaited(moved)
            coming.begin(number)
            yield [str(path)]
            shutil.rmtree(path.parent)


@contextmanager
def _at_the_latest(work: Callable[[], None]) -> Iterator[None]:
    """Do something when the block ends, or with the process: threads that nobody waits for end no block."""
    atexit.register(work)
    try:
        yield
    finally:
        work()  # or the end of the process does, while this thread is at it
        atexit.unregister(work)


class _Shards:
    """Fetches shards one after the other, until it is stopped by whichever thread."""

    def __init__(self, urls: Sequence[str], folder: Path) -> None:
        self._urls, self._folder = urls, folder
        self._turn, self._stopped = threading.Lock(), False
        self._coming: _Coming | None = None

    def begin(self, number: int) -> None:
        """Have the shard of a number come; there may be none."""
        with self._turn:
            if number < len(self._urls) and not self._stopped:
                self._coming = _Coming(self._urls[number], self._folder / str(number))

    def awaited(self, moved: Callable[[], None]) -> Path:
        """Return the file of the latest shard when it is whole."""
        assert self._coming
        return self._coming.awaited(moved)

    def stop(self) -> None:
        """End what comes, and let nothing more come."""
        with self._turn:
            self._stopped = True
            if self._coming:
                self._coming.stop()


class _Coming:
    """A shard that a process of its own fetches: workers that load samples are forks, where obstore fails."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url, folder
        words = ["data", "fetch", url, "-o", str(folder), "--json", "--quiet"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "imgtool", *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True, env=os.environ | {"WORLD_SIZE": "1"},  # it is none of those of torchrun
        )  # fmt: skip

    def awaited(self, moved: Callable[[], None]) -> Path:
        """Return the file when it is whole."""
        while self._process.poll() is None:
            moved()  # what brings nothing ends by itself
            time.sleep(MOMENT)
        told, _ = self._process.communicate()
        if self._process.returncode == 0:
            return next(path for path in self._folder.iterdir() if suffix(path.name) in KINDS)
        record = {}
        with suppress(ValueError, IndexError):
            record = json.loads(told.splitlines()[-1])
        why = record.get("error") or "; ".join(record.get("faults", ())) or "its process was ended"
        raise ImgtoolError(f"the stream {self._url} failed: {why}", record.get("hint", ""))

    def stop(self) -> None:
        """End it, whatever it has."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def _folder() -> Iterator[Path]:
    """Give a folder in the cache, and remove those that processes which were killed have left."""
    from imgtool.buckets import spool

    parent = files.cache_folder().absolute() / "streams"
    for lock in parent.glob(f"[!.]*/{spool.LOCK}"):
        with suppress(OSError):
            own = os.open(lock, os.O_RDWR)
            if spool.alone(own):
                shutil.rmtree(lock.parent, ignore_errors=True)
            os.close(own)
    folder = parent / os.urandom(8).hex()
    held = spool.make(folder, {})
    try:
        with _at_the_latest(partial(shutil.rmtree, folder, ignore_errors=True)):
            yield folder
    finally:
        if held >= 0:
            os.close(held)
