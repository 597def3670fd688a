"""Paths that may be given to files of a folder here, of those that were listed elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath, PureWindowsPath

from imgtool.buckets import Found, manifest
from imgtool.buckets.state import FOLDER


def chosen(listed: Iterable[Found], suffixes: Sequence[str]) -> list[Found]:
    """Return the files with one of these suffixes, or all, without what a fetch itself writes."""
    endings = tuple(suffix.lower() for suffix in suffixes)
    own = (manifest.NAME, FOLDER)
    return [
        found
        for found in listed
        if found.path.partition("/")[0] not in own and (not endings or found.path.lower().endswith(endings))
    ]


def fitting(listed: Sequence[Found], folds: bool) -> tuple[list[Found], list[str]]:
    """Return the files that may lie in a folder together, and a fault for each of the others.

    Args:
        listed: What was listed.
        folds: Whether the folder's file system does not tell "a" from "A".
    """
    folders = {parent.lower() if folds else parent for each in listed for parent in manifest.above(each.path)}
    kept: dict[str, Found] = {}
    faults = []
    for found in listed:
        name = found.path.lower() if folds else found.path
        fault = found.fault or _refusal(found.path)
        if fault:
            faults.append(f"{found.path}: {fault}")
        elif name in folders:
            faults.append(f"{found.path}: refused, for it is the name of a folder too")
        elif name in kept:
            faults.append(f"{found.path}: refused, for {kept[name].path} has the same name here")
        else:
            kept[name] = found
    return list(kept.values()), faults


def _refusal(path: str) -> str:
    if _odd(path):
        return "refused, for a part of its name is empty or a dot"
    return "refused, for it would lie outside the folder" if _outside(path) else ""


def _odd(path: str) -> bool:
    """Tell whether a path could be that of another file, too.

    >>> [_odd(path) for path in ("a/b.jpg", "a//b.jpg", "a/./b.jpg", "a/", "../b.jpg", "/b.jpg")]
    [False, True, True, True, False, False]
    """
    return str(PurePosixPath(path)) != path


def _outside(path: str) -> bool:
    r"""Tell whether a path could lead out of a folder, on this system or another.

    >>> [_outside(path) for path in ("a/b.jpg", "../b.jpg", "/b", "C:/b", "a/..\\..\\b", "a..b", "")]
    [False, True, True, True, True, False, True]
    """
    windows = PureWindowsPath(path)
    parts = (*PurePosixPath(path).parts, *windows.parts)
    return not parts or bool(windows.anchor) or path.startswith("/") or ".." in parts or "\0" in path
