"""Large photos decoded straight into the one array that holds them; what is not plain is left to others."""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path

import cv2
import numpy as np

from imgtool.images import metadata
from imgtool.images.photo import Array

_PNG_CHANNELS = {0: (1, 1), 2: (3, 3), 4: (2, 4), 6: (4, 4)}  # by colour type: stored, and as OpenCV decodes
_PNG_ODD = frozenset({b"tRNS", b"acTL"})
_SCAN, _END = 0xDA, b"\xff\xd9"
_BAND = 64


def hollow_jpeg(data: mmap.mmap) -> bytes:
    """Return a JPEG up to its pixels.

    Raises:
        ValueError: The file ends within them.
    """
    place, marker = 2, 0
    while marker != _SCAN:
        lead, marker = data[place : place + 2]
        if lead != _END[0]:
            raise ValueError("its segments are not where they should be")
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    if data.rfind(_END, place) < 0:
        raise ValueError("the file ends within its pixels")
    return data[:place]


def hollow_png(data: mmap.mmap) -> tuple[bytes, int]:
    """Return a PNG of one pixel with all but the pixels of another, and the channels that OpenCV decodes.

    Raises:
        ValueError: The file is cut short, a check sum is wrong, or it is not plain.
    """
    depth, kind = data[24], data[25]
    if depth not in (8, 16) or kind not in _PNG_CHANNELS:
        raise ValueError("not plain")
    stored, channels = _PNG_CHANNELS[kind]
    parts = []
    for name, whole in metadata.chunks(memoryview(data)):
        if name in _PNG_ODD:
            raise ValueError("not plain")
        if name == b"IEND":
            parts.append((b"IDAT", zlib.compress(bytes(1 + stored * depth // 8))))
        if name != b"IDAT":
            parts.append((name, bytes(whole[8:-4])))
    size = (1).to_bytes(4, "big")
    parts[0] = (b"IHDR", size + size + parts[0][1][8:12] + b"\0")
    return metadata.png(parts), channels


def decode(path: Path, height: int, width: int, channels: int, dtype: type) -> Array | None:
    """Decode a JPEG or PNG file into ``(H, W)`` grey or ``(H, W, C)`` RGB(A); None where OpenCV does not."""
    space: Array = np.empty((height, width, channels) if channels > 1 else (height, width), dtype)
    array = cv2.imread(str(path), space, cv2.IMREAD_UNCHANGED)
    if array is None or array.shape != space.shape or array.dtype != dtype:
        return None
    swap = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}
    for first in range(0, height if channels > 1 else 0, _BAND):
        band = array[first : first + _BAND]
        cv2.cvtColor(band, swap[channels], dst=band)
    return array


def split(array: Array) -> tuple[Array, Array]:
    """Split ``(H, W, 4)`` into RGB, which stays in the same memory, and alpha; the array is lost."""
    height, width, _ = array.shape
    alpha = array[..., 3].copy()
    colour = array.reshape(-1)[: height * width * 3].reshape(height, width, 3)
    for first in range(0, height, _BAND):
        colour[first : first + _BAND] = array[first : first + _BAND, :, :3].copy()
    return colour, alpha
