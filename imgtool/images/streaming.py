"""Large photos written band by band of rows: beside the photo itself, memory holds no more than a band."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from imgtool.images import metadata
from imgtool.images.photo import Array, Photo

Bytes = npt.NDArray[np.uint8]

BAND = 8_000_000
"""Bytes of the rows that are worked on at once, about."""

LEVEL = 1
"""Of zlib: from 1 to 3, time doubles for a few percent."""

_STRIP = 1 << 18
_CACHED = 1 << 19  # bytes of rows that are filtered at once: what the processor keeps near
_SAMPLED = 7  # one byte of so many decides on a row's filter; it divides no pixel, so all channels count
_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # channels to PNG's colour type
_MOST_BLOCKS = 65_535  # between two restart markers of JPEG
_SCAN, _FRAMES, _INTERVAL, _RESTART, _END = 0xDA, (0xC0, 0xC1), 0xDD, 0xD0, b"\xff\xd9"


@dataclass(frozen=True)
class Bands:
    """A photo as a format will hold it, whatever its own type.

    Attributes:
        photo: The photo: its metadata are those to be written.
        rows: ``(first, last) -> (n, W)`` grey, or ``(n, W, C)`` with C of 2, 3 or 4.
    """

    photo: Photo
    rows: Callable[[int, int], Array]

    @property
    def height(self) -> int:
        """Rows of the photo."""
        return len(self.photo.pixels)

    def each(self, step: int) -> Iterator[Array]:
        """Yield the photo from top to bottom, ``step`` rows at a time."""
        for first in range(0, self.height, step):
            yield self.rows(first, min(first + step, self.height))


def _channels(rows: Array) -> int:
    return rows.shape[2] if rows.ndim == 3 else 1


def png(file: BinaryIO, bands: Bands) -> None:
    """Write a PNG (ISO/IEC 15948): each row with that filter of none, left and up that leaves least."""
    top = bands.rows(0, 1)
    bits = 8 * top.dtype.itemsize
    header = struct.pack(">IIBBBBB", top.shape[1], bands.height, bits, _COLOURS[_channels(top)], 0, 0, 0)
    photo = bands.photo
    file.write(metadata.into_png(metadata.png([(b"IHDR", header)]), photo.exif, photo.icc, photo.xmp))
    # Runs only: of photos, looking further back makes larger files, as numbers of short repeats cost more.
    packer = zlib.compressobj(LEVEL, strategy=zlib.Z_RLE)
    above: Bytes = np.zeros(top.nbytes, np.uint8)
    for rows in bands.each(max(1, _CACHED // top.nbytes)):
        plain = rows.astype(rows.dtype.newbyteorder(">"), copy=False).reshape(len(rows), -1).view(np.uint8)
        packed = packer.compress(_filtered(plain, above, top.nbytes // top.shape[1]).data)
        file.write(metadata.chunk(b"IDAT", packed) if packed else b"")
        above = plain[-1].copy()
    file.write(metadata.chunk(b"IDAT", packer.flush()) + metadata.chunk(b"IEND", b""))


def _filtered(rows: Bytes, above: Bytes, pixel: int) -> Bytes:
    """Return rows of bytes ``(n, 1 + L)``: the number of the filter, then the row filtered.

    Args:
        rows: ``(n, L)``.
        above: ``(L,)``, the row before them.
        pixel: Bytes of a pixel.
    """
    left, up = rows.copy(), rows.copy()
    left[:, pixel:] -= rows[:, :-pixel]
    up[0] -= above
    up[1:] -= rows[:-1]
    ways = (rows, left, up)
    # As signed numbers, which is how libpng chooses too; -128 stays what it is, as a byte 128.
    some = (way[:, ::_SAMPLED].view(np.int8) for way in ways)
    best = np.argmin([np.abs(each).view(np.uint8).sum(1, dtype=np.uint64) for each in some], axis=0)
    out = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
    out[:, 0] = best
    for row, number in enumerate(best):
        out[row, 1:] = ways[number][row]
    return out


def tiff(file: BinaryIO, bands: Bands, options: dict[str, Any]) -> None:
    """Write a TIFF of strips with deflate compression, its directory at the end.

    Args:
        file: Empty, and can be read too.
        bands: The photo.
        options: For ``tifffile.imwrite``: all but what follows from the pixels.
    """
    top = bands.rows(0, 1)
    step = max(1, _STRIP // top.nbytes)
    order = options["byteorder"]

    def packed(rows: Array) -> bytes:
        """Return a strip; whole numbers as differences to their left neighbours (predictor 2)."""
        plain = rows.reshape(*rows.shape[:2], -1).copy()
        if options["predictor"]:
            plain[:, 1:] -= rows.reshape(plain.shape)[:, :-1]
        return zlib.compress(plain.astype(plain.dtype.newbyteorder(order), copy=False).data, LEVEL)

    shape = (bands.height, *top.shape[1:])
    tifffile.imwrite(
        file, map(packed, bands.each(step)), shape=shape, dtype=top.dtype, rowsperstrip=step, **options
    )
    metadata.add_to_tiff(file, bands.photo.exif, bands.photo.icc, bands.photo.xmp)


def jpeg(file: BinaryIO, bands: Bands, options: dict[str, Any]) -> None:
    """Write a JPEG (ITU-T T.81) whose pixels are those that Pillow would write in one piece.

    Bands of whole blocks are coded apart and joined with restart markers, at which a decoder begins
    anew, just as each band did.

    Args:
        file: Where to.
        bands: The photo, grey or RGB in 8 bit.
        options: Of Pillow: quality, subsampling (0 or 2), metadata.
    """
    top = bands.rows(0, 1)
    edge = 16 if options["subsampling"] and top.ndim == 3 else 8
    across = -(-top.shape[1] // edge)
    down = max(1, min(_MOST_BLOCKS // across, BAND // (top.nbytes * edge)))
    for number, rows in enumerate(bands.each(down * edge)):
        if number == 0:
            coded = _coded(rows, options)
            file.write(_head(coded, bands.height, across * down))
        else:
            coded = _coded(rows, {name: options[name] for name in ("quality", "subsampling")})
            file.write(bytes([0xFF, _RESTART + (number - 1) % 8]))
        *_, (_, _, start) = _segments(coded)
        file.write(memoryview(coded)[start : -len(_END)])
    file.write(_END)


def _coded(rows: Array, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rows)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _segments(coded: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of the segments of a JPEG, that of the first scan being the last."""
    place, marker = 2, 0
    while marker != _SCAN:
        marker = coded[place + 1]
        end = place + 2 + int.from_bytes(coded[place + 2 : place + 4], "big")
        yield marker, place, end
        place = end


def _head(coded: bytes, height: int, interval: int) -> bytes:
    """Return all of a JPEG before its scan, for another height and with a restart interval."""
    out = coded[:2]
    for marker, start, end in _segments(coded):
        part = coded[start:end]
        if marker in _FRAMES:
            part = part[:5] + struct.pack(">H", height) + part[7:]
        if marker == _SCAN:
            out += struct.pack(">BBHH", 0xFF, _INTERVAL, 4, interval)
        out += part
    return out
