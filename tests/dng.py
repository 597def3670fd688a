"""Writes small camera RAW files: uncompressed Bayer DNG (Adobe, DNG Specification 1.4)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PATTERNS = ("RGGB", "BGGR", "GRBG", "GBRG")

SRGB_CAMERA = (3.2405, -1.5372, -0.4985, -0.9693, 1.8760, 0.0416, 0.0556, -0.2040, 1.0573)
"""XYZ to camera of a camera whose colours are those of linear sRGB."""

_BYTE, _ASCII, _SHORT, _LONG, _RATIONAL, _SIGNED_RATIONAL = 1, 2, 3, 4, 5, 10
_CODES = {_BYTE: "B", _SHORT: "H", _LONG: "I", _RATIONAL: "I", _SIGNED_RATIONAL: "i"}
_PARTS = 10_000


def mosaic(rgb: npt.NDArray[Any], pattern: str = "RGGB") -> npt.NDArray[Any]:
    """Keep one colour of each pixel: ``(H, W, 3)`` to ``(H, W)``."""
    flat = np.empty(rgb.shape[:2], rgb.dtype)
    for place, colour in enumerate(pattern):
        part = np.s_[place // 2 :: 2, place % 2 :: 2]
        flat[part] = rgb[..., "RGB".index(colour)][part]
    return flat


def write(
    path: Path,
    values: npt.NDArray[np.uint16],
    pattern: str = "RGGB",
    *,
    black: int | Sequence[int] = 64,
    white: int = 4095,
    neutral: Sequence[float] | None = (0.5, 1.0, 0.7),
    matrix: Sequence[float] | None = SRGB_CAMERA,
    more: Sequence[tuple[int, int, Any]] = (),
) -> Path:
    """Write a mosaic as a DNG.

    Args:
        path: The file.
        values: ``(H, W)``.
        pattern: Colours of the first two pixels of the first two rows; of 2x2, 4x4, ... letters.
        black: Level of black: one, or four for the places of the pattern.
        white: Level of white.
        neutral: AsShotNeutral: the camera's idea of white, R, G, B.
        matrix: ColorMatrix1, XYZ to camera at D65, row by row.
        more: Further tags: (number, type, values); they replace what is written without them.
    """
    height, width = values.shape
    edge = round(len(pattern) ** 0.5)
    blacks = [black] if isinstance(black, int) else list(black)
    across = round(len(blacks) ** 0.5)
    tags: dict[int, tuple[int, Any]] = {
        254: (_LONG, [0]), 256: (_LONG, [width]), 257: (_LONG, [height]), 258: (_SHORT, [16]),
        259: (_SHORT, [1]), 262: (_SHORT, [32803]), 271: (_ASCII, b"Maker\0"), 272: (_ASCII, b"Model 1\0"),
        273: (_LONG, [0]), 274: (_SHORT, [1]), 277: (_SHORT, [1]), 278: (_LONG, [height]),
        279: (_LONG, [2 * values.size]), 284: (_SHORT, [1]), 33421: (_SHORT, [edge, edge]),
        33422: (_BYTE, ["RGB".index(colour) for colour in pattern]), 50706: (_BYTE, [1, 4, 0, 0]),
        50708: (_ASCII, b"Maker Model 1\0"), 50713: (_SHORT, [across, across]), 50714: (_LONG, blacks),
        50717: (_LONG, [white]), 50778: (_SHORT, [21]),
    }  # fmt: skip
    if neutral is not None:
        tags[50728] = (_RATIONAL, neutral)
    if matrix is not None:
        tags[50721] = (_SIGNED_RATIONAL, matrix)
    tags |= {tag: (kind, value) for tag, kind, value in more}
    tags[273] = (_LONG, [len(_directory(tags))])  # where the pixels begin, right behind the directory
    with path.open("wb") as file:
        file.write(_directory(tags))
        values.astype("<u2", copy=False).tofile(file)
    return path


def _packed(kind: int, values: Any) -> bytes:
    if kind == _ASCII:
        return bytes(values)
    if kind in (_RATIONAL, _SIGNED_RATIONAL):
        values = [part for value in values for part in (round(value * _PARTS), _PARTS)]
    return struct.pack(f"<{len(values)}{_CODES[kind]}", *values)


def _directory(tags: dict[int, tuple[int, Any]]) -> bytes:
    head, body = struct.pack("<2sHIH", b"II", 42, 8, len(tags)), b""
    base = len(head) + 12 * len(tags) + 4
    for tag, (kind, values) in sorted(tags.items()):
        data = _packed(kind, values)
        count = len(values) if kind != _ASCII else len(data)
        place = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", base + len(body))
        head += struct.pack("<HHI", tag, kind, count) + place
        body += data + b"\0" * (len(data) % 2) if len(data) > 4 else b""
    return head + bytes(4) + body
