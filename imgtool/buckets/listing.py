"""What a URL of ``infer`` stands for among the files that are listed there: folders, files and patterns."""

from __future__ import annotations

import glob
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote, unquote

from imgtool import files, names
from imgtool.buckets import Found, Place
from imgtool.errors import USAGE, ImgtoolError

_UNTOLD = Found("")


@dataclass(frozen=True)
class Photo(files.Item):
    """An input that is fetched from a URL.

    Attributes:
        found: What was told of it when it was listed.
        refused: Why it is not fetched; "" where it is.
    """

    found: Found = _UNTOLD
    refused: str = ""


def tame(path: str) -> str:
    r"""Return a path that stays below its folder and is that of one file alone, for any that is listed.

    >>> tame("a/b 1.jpg"), tame("a//b.jpg"), tame("../b.jpg"), tame("a\\..\\b.jpg")
    ('a/b 1.jpg', 'a/%2F/b.jpg', '%2E%2E/b.jpg', 'a%5C..%5Cb.jpg')
    """
    odd = {"": "%2F", ".": "%2E", "..": "%2E%2E"}
    return "/".join(odd.get(part) or _without(part, "\\\0") for part in path.split("/"))


def _without(part: str, characters: str) -> str:
    for each in characters:
        part = part.replace(each, quote(each))
    return part


def split(url: str) -> tuple[str, str]:
    """Return the URL of the folder that holds what a URL names, and the name.

    Of a bucket, a host and a repository it is their own URL, and "".

    >>> split("s3://b/a/x.jpg"), split("s3://b/a/"), split("s3://b")
    (('s3://b/a/', 'x.jpg'), ('s3://b/', 'a'), ('s3://b/', ''))
    >>> split("https://h/a/x%20y.jpg?key=1"), split("hf://datasets/u/n@refs/pr/1")
    (('https://h/a/?key=1', 'x y.jpg'), ('hf://datasets/u/n@refs/pr/1/', ''))
    """
    url, query = address(url)
    scheme, _, rest = url.partition("://")
    parts = rest.rstrip("/").split("/")
    if len(parts) <= _root(scheme, parts):
        return f"{scheme}://{'/'.join(parts)}/{query}", ""
    name = unquote(parts[-1]) if scheme.startswith("http") else parts[-1]
    return f"{scheme}://{'/'.join(parts[:-1])}/{query}", name


def _root(scheme: str, parts: Sequence[str]) -> int:
    """Return how many parts name the bucket, the host or the repository."""
    if scheme != "hf":
        return 1
    count = 3 if parts[0] in ("datasets", "spaces", "models") else 2
    return count + 2 * (len(parts) >= count and parts[count - 1].endswith("@refs"))


def address(url: str) -> tuple[str, str]:
    """Return an address, and what follows its ?, if it is one of the web: elsewhere a ? may be in a name."""
    if not url.startswith("http"):
        return url, ""
    address, mark, query = url.partition("?")
    return address, mark + query


def fixed(url: str) -> tuple[str, str]:
    """Return the URL of the folder that a URL's files are found in, and the pattern of them or "".

    >>> fixed("s3://b/a/**/x*.jpg"), fixed("s3://b/a/x.jpg")
    (('s3://b/a/', '**/x*.jpg'), ('s3://b/a/', ''))
    """
    whole, query = address(url)
    if not glob.has_magic(whole):
        return split(url)[0], ""
    parts = whole.split("/")
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]) + "/" + query, "/".join(parts[first:])


def single(listing: Sequence[Found], url: str, place: Place) -> bool:
    """Tell whether what was listed is the file that a URL names: in a folder, its URL is longer."""
    name = split(url)[1]
    if len(listing) != 1 or listing[0].path != name or url.endswith("/"):
        return False
    return place.url(name).count("/") == address(url)[0].count("/")


def named(found: Sequence[Photo], name: str) -> list[Photo]:
    """Return the file of a name, or the files in the folder of that name."""
    name = name.rstrip("/")
    for item in found:
        if item.relative.as_posix() == name:
            return [replace(item, relative=Path(item.relative.name), folder=False)]
    inside = [item for item in found if item.relative.is_relative_to(name)]
    return [replace(item, relative=item.relative.relative_to(name)) for item in inside]


def photos(found: Sequence[Photo], url: str, pattern: str, suffixes: Collection[str]) -> list[files.Item]:
    """Return what a folder or pattern stands for, sorted; what could not be listed is among it."""
    if not found:
        raise ImgtoolError(f"there is nothing at {names.public(url)}", "check the address", USAGE)
    if pattern:
        wanted = pattern.split("/")
        found = [item for item in found if item.found.fault or matches(item.relative.parts, wanted)]
        what = f"no photo matches {names.public(url)}"
    else:
        what = f"no photo in the folder {names.public(url)}"
    photos = [
        item
        for item in found
        if (item.found.fault or item.relative.suffix.lower() in suffixes)
        and not any(part.startswith(".") for part in item.relative.parts)
    ]
    if not photos:
        hint = "photos end in " + " ".join(sorted(suffixes)) if found else "check the pattern"
        raise ImgtoolError(what, hint, USAGE)
    return sorted(photos, key=lambda item: item.relative.parts)


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Tell whether a path matches a pattern, part by part; ``**`` stands for any number of parts.

    >>> matches(["a", "b", "x.jpg"], ["**", "*.jpg"]), matches(["a", "x.jpg"], ["*.jpg"])
    (True, False)
    """
    if not pattern:
        return not parts
    if pattern[0] == "**":
        rest = pattern[1:]
        return any(matches(parts[n:], rest) for n in range(len(parts) + 1)) or not rest
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])
