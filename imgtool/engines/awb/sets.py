"""Folders of frames whose white is known: their layouts, their tables, and what a split keeps together."""

from __future__ import annotations

import csv
import io
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imgtool import files
from imgtool import raw as render
from imgtool.engines.awb import mosaic
from imgtool.engines.awb.camera import Camera, Locus
from imgtool.engines.awb.reading import (
    GT,
    PREVIEW,
    Sources,
    Statistics,
    cells_for,
    read,
    read_json,
    white_of,
)
from imgtool.engines.awb.stats import AwbStats
from imgtool.errors import USAGE, ImgtoolError

Row = Mapping[str, str]

_CAMERAS = "cameras.json"
_HEADINGS = (("mean_r", "mean_g", "mean_b"), ("r", "g", "b"))


@dataclass(frozen=True, eq=False)
class Entry:
    """One frame of a data set.

    Attributes:
        path: Its file.
        name: What messages call it.
        truth: R/G and B/G of its white; None where there is a fault.
        group: What a split keeps together: photographer, day, source photo, or neighbours in number.
        read: Reads it, with truth and group; raises where there is a fault. Can be pickled.
        fault: What is wrong with it, "" where nothing is as far as the folder shows.
        part: "train" or "test" where the data set is split.
    """

    path: Path
    name: str
    truth: tuple[float, float] | None
    group: str
    read: Callable[[], AwbStats]
    fault: str = ""
    part: str = ""


def dataset(folder: Path, sources: Sources) -> list[Entry]:
    """List a folder of frames whose white is known.

    Raspberry Pi statistics (the folder of PNGs, or its parent with ``tunings/``), Cube++ and
    SimpleCube++ (``PNG/`` and ``gt.csv``, or ``train`` and ``test`` with these), what ``imgtool data
    synth awb`` writes, and any photos with a ``gt.csv`` beside them. Its columns are ``image`` and
    ``mean_r,mean_g,mean_b`` or ``r,g,b``; where there are both, the mean. Others that count: ``camera``,
    ``group``, ``day``, ``date``, ``lux``. Rows of Cube++ with an empty mean, scenes of several lights,
    are left out with their frames.

    Args:
        folder: The folder.
        sources: How the frames are read.

    Returns:
        The frames in the order of their names, and an entry with a fault for each row that makes no
        sense, row without a frame, frame without a row, and statistic without a tuning.

    Raises:
        ImgtoolError: Code 2: no such folder, or nothing in it that is known. Code 1: a ``gt.csv``
            that cannot be read, or lacks a column.
    """
    if not folder.is_dir():
        raise ImgtoolError(f"no such folder: {folder}", "check the path", USAGE)
    told = [path for path in sorted(folder.glob("*.png")) if Statistics.of(path.name)]
    told = told or [path for path in sorted(folder.glob("*/*.png")) if Statistics.of(path.name)]
    if told:
        return [_of_statistics(path, sources) for path in told]
    if (folder / GT).is_file():
        return list(_of_table(folder, sources, ""))
    parts = [part for part in ("train", "test") if (folder / part / GT).is_file()]
    if parts:
        return [entry for part in parts for entry in _of_table(folder / part, sources, part)]
    hint = "it should hold gt.csv and its frames, train/ and test/ with these, or Raspberry Pi statistics"
    raise ImgtoolError(f"{folder} is no data set with known white", hint, USAGE)


def _entry_read(path: Path, sources: Sources, camera: Camera | str, more: Mapping[str, Any]) -> AwbStats:
    """Read a frame, with what a table says of it; a camera of which only the name is said keeps its facts."""
    found = read(path, str(path), sources, cells_for(sources))
    if isinstance(camera, str):
        camera = replace(found.camera, name=found.camera.name or camera)
    return found.changed(camera=camera, **more)


def _refuse(what: str) -> AwbStats:
    raise ImgtoolError(what, "imgtool data check awb lists all faults")


def _faulty(path: Path, what: str, part: str = "") -> Entry:
    return Entry(path, str(path), None, "", partial(_refuse, what), what, part)


def _of_statistics(path: Path, sources: Sources) -> Entry:
    told = Statistics.of(path.name)
    assert told
    try:
        truth = white_of(told, path, sources)
    except ImgtoolError as fault:
        return _faulty(path, f"{path}: {fault.what}")
    reader = partial(_entry_read, path, sources, "", {})
    return Entry(path, str(path), truth, told.photographer, reader)


class _Table(NamedTuple):
    """A ``gt.csv`` and what stands beside it."""

    rows: Sequence[Row]
    columns: Sequence[str]
    more: Mapping[str, Row]
    cameras: Mapping[str, Camera]


def _csv(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """Read a table with its headings, in lower case."""
    try:
        text = files.read(path).decode("utf-8-sig")
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as fault:
        raise ImgtoolError(f"{path} is no table of text: {fault}", "write it again as CSV in UTF-8") from None
    headings = [heading.strip().lower() for heading in lines[0]] if lines else []
    rows = [
        dict(zip(headings, (value.strip() for value in line), strict=False))
        for line in lines[1:]
        if any(line)
    ]
    return rows, headings


def _table(folder: Path) -> _Table:
    path = folder / GT
    rows, headings = _csv(path)
    columns = next((triple for triple in _HEADINGS if set(triple) <= set(headings)), None)
    if "image" not in headings or columns is None:
        hint = "it needs the columns image, and mean_r, mean_g, mean_b or r, g, b"
        raise ImgtoolError(f"{path} lacks a column: it has {', '.join(headings) or 'none'}", hint)
    if not rows:
        raise ImgtoolError(f"{path} has no rows", "give a row for each frame")
    tables = (folder / "properties.csv", folder.parent / "auxiliary" / f"{folder.name}_properties.csv")
    more = next((table for table in tables if table.is_file()), None)
    properties = {_stem(row.get("image", "")): row for row in (_csv(more)[0] if more else [])}
    return _Table(rows, columns, properties, _cameras(folder / _CAMERAS))


def _cameras(path: Path) -> dict[str, Camera]:
    """Read the cameras that ``data synth`` has imagined."""
    if not path.is_file():
        return {}
    told = read_json(path)
    try:
        return {name: _imagined(name, facts) for name, facts in told.items()}
    except (TypeError, KeyError, ValueError, AttributeError):
        hint = 'it should read {"NAME": {"ct_curve": [T, r, b, ...], "xyz_to_camera": [9 numbers]}}'
        raise ImgtoolError(f"{path} does not describe cameras", hint) from None


def _imagined(name: str, facts: Mapping[str, Any]) -> Camera:
    matrix = facts.get("xyz_to_camera")
    known = mosaic.camera_of(name, matrix)
    if "ct_curve" not in facts:
        return known
    curve = np.asarray(facts["ct_curve"], np.float64).reshape(-1, 3)
    xyz = None if matrix is None else np.asarray(matrix, np.float64).reshape(3, 3)
    return Camera(name, Locus(*curve.T), known=True, xyz_to_camera=xyz)


def _stem(image: str) -> str:
    """Return the name of an image without its suffix, if it has one that we know."""
    suffix = Path(image).suffix.lower()
    return image[: -len(suffix)] if suffix in files.READABLE else image


def _frames(folder: Path) -> dict[str, list[Path]]:
    """Return the frames of a folder by stem."""
    place = folder / "PNG" if (folder / "PNG").is_dir() else folder
    found: dict[str, list[Path]] = {}
    for path in sorted(place.iterdir()):
        known = path.suffix.lower() in files.READABLE
        if known and not path.name.startswith(".") and path.name != PREVIEW:
            found.setdefault(path.stem, []).append(path)
    return found


def _chosen(image: str, frames: Sequence[Path]) -> Path | None:
    """Return the frame that a row means: the one of that name, else the RAW file, else the only one."""
    exact = [path for path in frames if path.name == Path(image).name]
    raw = [path for path in frames if path.suffix.lower() in render.SUFFIXES]
    if exact or _stem(image) != image:
        return exact[0] if exact else None
    return next(iter(raw or frames), None)


def _of_table(folder: Path, sources: Sources, part: str) -> Iterator[Entry]:
    table, frames = _table(folder), _frames(folder)
    seen: set[Path] = set()
    stems = {_stem(Path(row.get("image", "")).name) for row in table.rows}
    for row in table.rows:
        image = row.get("image", "")
        path = _chosen(image, frames.get(_stem(Path(image).name), []))
        if path is None:
            yield _faulty(folder / image, f"{folder / GT}: the row {image or '(empty)'} has no frame", part)
        elif path in seen:
            yield _faulty(path, f"{folder / GT}: {image} has two rows", part)
        elif any(row.get(column) for column in table.columns) or "left_r" not in row:
            yield _of_row(path, row, table, sources, part)
        seen |= {path} if path else set()
    for stem, paths in frames.items():
        if stem not in stems:
            yield _faulty(paths[0], f"{paths[0]} has no row in {folder / GT}", part)


def _number(text: str | None) -> float:
    """Return a positive number, NaN where it is none."""
    try:
        value = float(text or "")
    except ValueError:
        return math.nan
    return value if 0 < value < math.inf else math.nan


def _of_row(path: Path, row: Row, table: _Table, sources: Sources, part: str) -> Entry:
    red, green, blue = (_number(row.get(column)) for column in table.columns)
    if math.isnan(red + green + blue):
        given = ", ".join(row.get(column) or "nothing" for column in table.columns)
        return _faulty(path, f"{path}: its white is not three positive numbers: {given}", part)
    told = {**table.more.get(path.stem, {}), **row}
    truth, group = (red / green, blue / green), _group(path.stem, told)
    more: dict[str, Any] = {"truth": truth, "group": group}
    name = told.get("camera") or told.get("exif:model", "")
    if not math.isnan(_number(told.get("lux"))):
        more["lux"] = _number(told["lux"])
    reader = partial(_entry_read, path, sources, table.cameras.get(name, name), more)
    return Entry(path, str(path), truth, group, reader, "", part)


def _group(stem: str, row: Row) -> str:
    """Return what a row says belongs together, else its hundred of a running number: those share days."""
    for column in ("group", "photographer", "day", "date"):
        if row.get(column):
            return row[column]
    match = re.fullmatch(r"(.*\d+)\d\d", stem)
    return match[1] if match else f"{zlib.crc32(stem.encode()) % 100:02d}"
