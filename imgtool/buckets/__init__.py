"""Folders elsewhere: ``gs://``, ``s3://``, ``hf://`` and ``https://`` where a folder is named.

What is read is fetched into the cache, in parallel, and checked; what is written is sent when it is whole.
Nothing here is imported before a URL is met.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from imgtool.errors import USAGE, ImgtoolError
from imgtool.names import SCHEMES, is_url, url


@dataclass(frozen=True)
class Found:
    """A file elsewhere.

    Attributes:
        path: Its path below the folder that was listed, with slashes; of a single file, its name.
        size: Bytes; -1 where that is not told before it is read.
        tag: What changes whenever the content does (ETag, hash or date); "" where no such thing is told.
        digests: Name of a hash ("md5", "sha256", "git-sha1") to its value in hexadecimal, where told.
            "etag-md5" is an ETag that looks like an MD5, and is none where a store encrypts with a key of the
            user (SSE-KMS, SSE-C): see ``etags``.
            "etag-parts" is the ETag of an object of S3 that was sent in parts: see ``manifest.hashes``.
        fault: Why it cannot be had, where the listing tells: a folder that cannot be listed is one such file.
    """

    path: str
    size: int = -1
    tag: str = ""
    digests: tuple[tuple[str, str], ...] = ()
    fault: str = ""

    @property
    def telling(self) -> bool:
        """Whether it is told apart from another content of the same size."""
        return bool(self.tag or self.digests)


class Place(Protocol):
    """A folder, or a single file, elsewhere. Methods may be called from many threads at once.

    All raise ``ImgtoolError`` in plain words: no such bucket, no permission (and how to give it); ``Offline``
    where there is no network.
    """

    def list(self) -> list[Found]:
        """Return every file below, by name; one where the URL is a file; [] where there is nothing."""
        ...

    def read(self, found: Found, begin: int, end: int) -> bytes:
        """Return bytes ``begin`` to ``end`` (excluded) of a file, all of them.

        Raises:
            Interrupted: The connection broke, or the server was too busy: asking again may help.
            ImgtoolError: Asking again does not help: it is gone, it has changed, it may not be read.
        """
        ...

    def whole(self, found: Found) -> bytes:
        """Return a file of any, perhaps unknown, size in one request; raises as ``read``."""
        ...

    def write(self, source: Path, path: str) -> None:
        """Send a file of this machine, to a path below; raises as ``read``."""
        ...

    def url(self, path: str) -> str:
        """Return the URL of a path below; of a single file, once it was listed, its own."""
        ...


class Interrupted(Exception):
    """A connection broke, or a server had no time; the same request may succeed later.

    Args:
        what: What happened.
        got: What had come until then, from the first byte that was asked for on.
    """

    def __init__(self, what: str, got: bytes = b"") -> None:
        """Keep what had come: the next request may begin behind it."""
        super().__init__(what)
        self.got = got


class Denied(ImgtoolError):
    """The store refuses this machine, or whoever it is that asks."""


class Offline(ImgtoolError):
    """There is no network, or nobody answers, after several attempts: what was fetched before may serve."""


_PLACES = {"s3": "stores", "gs": "stores", "hf": "web", "https": "web", "http": "web"}


def open(text: str | Path) -> Place:
    """Return the place that a URL names; nothing is asked of it yet.

    Raises:
        ImgtoolError: Code 2: no URL, or one without a bucket. Code 1: an extra is not installed.
    """
    if not is_url(text):
        raise ImgtoolError(
            f"{text} is no URL", "URLs begin with " + ", ".join(f"{s}://" for s in SCHEMES), USAGE
        )
    name = url(text)
    place: Place = importlib.import_module(f"imgtool.buckets.{_PLACES[name.partition(':')[0]]}").open(name)
    return place
