"""What folders of this machine are called where they stand for folders elsewhere."""

from __future__ import annotations

import re

_CALLED: dict[str, str] = {}


def call(local: object, url: str) -> None:
    """Have a folder or file of this machine, and all below it, shown by a URL from now on."""
    _CALLED[str(local)] = url.rstrip("/")


def shown(text: str) -> str:
    """Return a text in which every path that stands for something elsewhere is its URL.

    >>> call("/cache/buckets/s3/b", "s3://b")
    >>> shown("cannot read /cache/buckets/s3/b/1.jpg")
    'cannot read s3://b/1.jpg'
    """
    for local in sorted(_CALLED, key=len, reverse=True):
        if local in text:
            whole = re.escape(local) + r"(?!\w|[.-]\w)"  # not the beginning of another name
            text = re.sub(whole, lambda _, url=_CALLED[local]: url, text)  # type: ignore[misc]
    return text
