"""Tags of the directories of TIFF structures (TIFF 6.0), as camera RAW files have them; without NumPy."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO

Tags = Mapping[int, tuple[float, ...] | str]

SUBFILE_TYPE, MAKER, MODEL = 254, 271, 272
DNG_VERSION, UNIQUE_MODEL = 50706, 50708
BLACK_REPEAT, BLACK_LEVEL = 50713, 50714
NEUTRAL, ACTIVE_AREA, NOISE_PROFILE = 50728, 50829, 51041

_BELOW = 330
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_CODES = {1: "B", 3: "H", 4: "I", 5: "I", 6: "b", 8: "h", 9: "i", 10: "i", 11: "f", 12: "d", 13: "I"}
_LONGEST, _MOST_BELOW = 4096, 16


def read(file: BinaryIO, wanted: Collection[int], below: bool = False) -> dict[int, tuple[float, ...] | str]:
    """Read tags of the first directory of a TIFF structure; broken ones are left out.

    Args:
        file: At least the head and what the tags point to.
        wanted: Numbers of tags.
        below: Also look in the directories right below it (SubIFDs); the first that has a tag is right.

    Returns:
        Tag to its numbers, or its text.
    """
    file.seek(0)
    head = file.read(8)
    order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
    if not order or len(head) < 8:
        return {}
    found = _directory(file, struct.unpack(order + "I", head[4:])[0], order, {*wanted, _BELOW})
    for offset in numbers(found, _BELOW)[:_MOST_BELOW] if below else ():
        found = _directory(file, int(offset), order, set(wanted)) | found
    return {tag: value for tag, value in found.items() if tag in wanted}


def of_file(path: Path, wanted: Collection[int], below: bool = False) -> dict[int, tuple[float, ...] | str]:
    """Read tags of a file; see ``read``."""
    with path.open("rb") as file:
        return read(file, wanted, below)


def numbers(found: Tags, tag: int) -> tuple[float, ...]:
    """Return the numbers of a tag, () where it is missing or a text."""
    value = found.get(tag, ())
    return () if isinstance(value, str) else value


def camera(found: Tags) -> str:
    """Return the name of the camera: a DNG's unique one, else maker and model; "" where unknown.

    >>> camera({MAKER: "NIKON CORPORATION", MODEL: "NIKON D90"}), camera({MAKER: "Maker", MODEL: "One"})
    ('NIKON D90', 'Maker One')
    """
    maker, model = str(found.get(MAKER, "")), str(found.get(MODEL, ""))
    said = any(word.lower() in model.lower() for word in maker.split())
    name = str(found.get(UNIQUE_MODEL, "")) or (model if said else f"{maker} {model}")
    return name.strip()


def _directory(
    file: BinaryIO, offset: int, order: str, wanted: Collection[int]
) -> dict[int, tuple[float, ...] | str]:
    file.seek(offset)
    count = int.from_bytes(file.read(2), "little" if order == "<" else "big")
    directory = file.read(12 * count)
    found = {}
    for place in range(0, len(directory) - 11, 12):
        tag, kind, number = struct.unpack_from(order + "HHI", directory, place)
        length = _SIZES.get(kind, 0) * number
        if tag not in wanted or not 0 < length <= _LONGEST:
            continue
        data = directory[place + 8 : place + 8 + length]
        if length > 4:
            file.seek(struct.unpack_from(order + "I", directory, place + 8)[0])
            data = file.read(length)
        if len(data) == length:
            found[tag] = _value(data, kind, order)
    return found


def _value(data: bytes, kind: int, order: str) -> tuple[float, ...] | str:
    if kind == 2:
        return data.split(b"\0")[0].decode("ascii", "replace").strip()
    values = [float(value) for (value,) in struct.iter_unpack(order + _CODES[kind], data)]
    if kind in (5, 10):
        parts = zip(values[::2], values[1::2], strict=True)
        return tuple(over / under if under else 0.0 for over, under in parts)
    return tuple(values)
