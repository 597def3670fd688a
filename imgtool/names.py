"""URLs where a folder may be named, and what folders of this machine are called that stand for them."""

from __future__ import annotations

import os
import re
from pathlib import Path

SCHEMES = ("gs", "s3", "hf", "https", "http")
_URL = re.compile(rf"^({'|'.join(SCHEMES)}):/+(?=[^/])")

_CALLED: dict[str, str] = {}


def call(local: object, url: str) -> None:
    """Have a folder or file of this machine, and all below it, shown by a URL from now on."""
    _CALLED[os.path.abspath(str(local))] = public(url).rstrip("/")


def shown(text: str) -> str:
    """Return a text in which every path that stands for something elsewhere is its URL.

    >>> call("/cache/buckets/s3/b", "s3://b")
    >>> shown("cannot read /cache/buckets/s3/b/1.jpg")
    'cannot read s3://b/1.jpg'
    """
    for local in sorted(_CALLED, key=len, reverse=True):
        if local in text:
            # Not a part of another name.
            whole = r"(?<![\w/.-])" + re.escape(local) + r"(?!\w|[.-]\w)"
            text = re.sub(whole, lambda _, url=_CALLED[local]: url, text)  # type: ignore[misc]
    return text


def is_url(text: object) -> bool:
    """Return whether a word, or a path made of one, names a folder elsewhere.

    >>> is_url("s3://bucket/photos"), is_url(Path("gs://bucket")), is_url("C:/photos"), is_url("photos")
    (True, True, False, False)
    """
    return isinstance(text, str | Path) and _URL.match(str(text)) is not None


def url(text: str | Path) -> str:
    """Return a URL as it was typed: a path made of one has lost a slash.

    >>> url(Path("s3://bucket/photos"))
    's3://bucket/photos'
    """
    return _URL.sub(r"\1://", str(text))


def public(text: str | Path) -> str:
    """Return a URL without what is nobody's business: of the web's, name, password, query and fragment.

    >>> public("https://ann:p@ss@host/photos?signature=1"), public("s3://bucket/a?b")
    ('https://host/photos', 's3://bucket/a?b')
    """
    whole = url(text)
    scheme, mark, rest = whole.partition("://")
    if not mark or scheme not in ("http", "https"):
        return whole
    host, slash, path = rest.partition("/")  # a password may hold what begins a query elsewhere
    return f"{scheme}://" + re.split(r"[?#]", host.rpartition("@")[2] + slash + path, maxsplit=1)[0]


def many() -> bool:
    """Return whether ``torchrun``, or who else sets its variables, started more processes than this one."""
    return {"RANK", "MASTER_ADDR"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Return the number of this process among those that ``torchrun`` started, 0 where it is alone."""
    return int(os.environ["RANK"]) if many() else 0
