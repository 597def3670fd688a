"""Writes Bayer mosaics as DNG: uncompressed, little endian, with what a developer needs to know of them.

Source: Adobe, Digital Negative (DNG) Specification 1.4; TIFF 6.0 for the structure around it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imgtool import files
from imgtool.images.metadata import EXIF_IFD, Entry, directory

if TYPE_CHECKING:
    from imgtool.mosaic import Mosaic

BYTE, ASCII, SHORT, LONG, RATIONAL, SIGNED_RATIONAL, DOUBLE = 1, 2, 3, 4, 5, 10, 12
"""Types of a tag's values, as TIFF numbers them."""

Tag = tuple[int, int, Any]
"""Number, type and values of a tag: a sequence of numbers, or text."""

ORIENTATIONS = {0: 1, 1: 2, 3: 3, 2: 4, 4: 5, 6: 6, 7: 7, 5: 8}
"""LibRaw's flip to the orientation of TIFF."""

D65 = 21
"""The light of the colour matrix, as EXIF's LightSource numbers it."""

_CODES = {BYTE: "B", SHORT: "H", LONG: "I", RATIONAL: "I", SIGNED_RATIONAL: "i", DOUBLE: "d"}
_FINEST = 1_000_000
_LARGEST = {RATIONAL: 2**32 - 2, SIGNED_RATIONAL: 2**31 - 2}
_START = 8


def write(path: Path, mosaic: Mosaic, more: Sequence[Tag] = ()) -> None:
    """Write a frame as a DNG, whole or not at all.

    What is None of the frame is left out. The camera's name is parted into maker and model at its first
    space. Noise is written alike for the three colours. A frame without a colour matrix makes a file that
    some programs refuse: the specification asks for one.

    Args:
        path: The file.
        mosaic: The frame. Its levels are those of the file, whose pixels have 16 bits.
        more: Further tags of the first directory; they replace what is written without them.

    Raises:
        ImgtoolError: The file cannot be written.
    """
    tags = {tag: (kind, values) for tag, kind, values in [*_frame(mosaic), *_facts(mosaic), *more]}
    exif = [_entry(*tag) for tag in _exif(mosaic.exif)]
    # Where the pixels begin, right behind the directory, does not change how long the directory is.
    tags[273] = (LONG, [_START + len(_directory(tags, exif))])
    with files.atomic(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, _START) + _directory(tags, exif))
        mosaic.values.astype("<u2", copy=False).tofile(file)


def _directory(tags: Mapping[int, tuple[int, Any]], exif: Sequence[Entry]) -> bytes:
    found = [_entry(tag, kind, values) for tag, (kind, values) in tags.items()]
    if exif:
        found.append(Entry(EXIF_IFD, LONG, 1, b"", tuple(exif)))
    data = directory(found, "<", _START)
    return data + b"\0" * (len(data) % 2)


def _entry(tag: int, kind: int, values: Any) -> Entry:
    """Return a tag as bytes; fractions have denominators up to 10^6, less where numerators would not fit."""
    if kind == ASCII:
        text = values if isinstance(values, bytes) else str(values).encode("ascii", "replace")
        text = text.rstrip(b"\0") + b"\0"
        return Entry(tag, kind, len(text), text)
    numbers = list(values)
    if kind in (RATIONAL, SIGNED_RATIONAL):
        fractions = [_fraction(float(value), _LARGEST[kind]) for value in values]
        numbers = [part for each in fractions for part in (each.numerator, each.denominator)]
    return Entry(tag, kind, len(values), struct.pack(f"<{len(numbers)}{_CODES[kind]}", *numbers))


def _fraction(value: float, largest: int) -> Fraction:
    finest = min(_FINEST, int(largest / max(abs(value), 1)))
    return Fraction(value).limit_denominator(max(finest, 1))


def _frame(mosaic: Mosaic) -> Iterator[Tag]:
    """Yield what says how the pixels lie and which colours they have."""
    height, width = mosaic.values.shape
    edge = round(len(mosaic.pattern) ** 0.5)
    yield from (
        (254, LONG, [0]), (256, LONG, [width]), (257, LONG, [height]), (258, SHORT, [16]),
        (259, SHORT, [1]), (262, SHORT, [32803]), (273, LONG, [0]),
        (274, SHORT, [ORIENTATIONS[mosaic.flip]]), (277, SHORT, [1]), (278, LONG, [height]),
        (279, LONG, [2 * mosaic.values.size]), (284, SHORT, [1]), (33421, SHORT, [edge, edge]),
        (33422, BYTE, ["RGB".index(colour) for colour in mosaic.pattern]), (50706, BYTE, [1, 4, 0, 0]),
        (50707, BYTE, [1, 1, 0, 0]), (50710, BYTE, [0, 1, 2]), (50711, SHORT, [1]),
    )  # fmt: skip
    if mosaic.crop is not None:
        top, left, high, wide = mosaic.crop
        yield from ((50719, LONG, [left, top]), (50720, LONG, [wide, high]))


def _facts(mosaic: Mosaic) -> Iterator[Tag]:
    """Yield levels, colours, noise and the camera's name."""
    maker, _, model = mosaic.camera.partition(" ")
    yield from ((271, ASCII, maker), (272, ASCII, model)) if model else ()
    yield (305, ASCII, "imgtool")
    yield (50708, ASCII, mosaic.camera or "unknown")
    across = round(len(mosaic.black) ** 0.5)
    yield (50713, SHORT, [across, across])
    whole = all(float(level).is_integer() for level in mosaic.black)
    yield (50714, LONG, [int(level) for level in mosaic.black]) if whole else (50714, RATIONAL, mosaic.black)
    yield (50717, LONG, [round(mosaic.white)])
    if mosaic.xyz_to_camera is not None:
        yield from ((50721, SIGNED_RATIONAL, np.ravel(mosaic.xyz_to_camera)), (50778, SHORT, [D65]))
    if mosaic.gains is not None:
        yield (50728, RATIONAL, [1 / gain for gain in mosaic.gains])
    if mosaic.noise is not None:
        yield (51041, DOUBLE, [*mosaic.noise] * 3)


def _exif(facts: Mapping[str, Any]) -> Iterator[Tag]:
    """Yield the tags of the EXIF directory."""
    for name, tag in (("exposure", 33434), ("aperture", 33437), ("focal", 37386)):
        if facts.get(name):
            yield (tag, RATIONAL, [facts[name]])
    if facts.get("iso"):
        yield (34855, SHORT, [min(round(facts["iso"]), 65535)])
    if facts.get("time"):
        yield (36867, ASCII, facts["time"])
