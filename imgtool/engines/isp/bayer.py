"""Bayer geometry: any pattern and size brought to RGGB without losing a pixel, packed planes, levels.

Reflection without repeating the edge keeps a mosaic's phase: pixel -k has the colour of pixel k. So a
frame of any pattern is read, from one pixel before its first where need be, as an endless RGGB mosaic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imgtool import tiles
from imgtool.errors import ImgtoolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imgtool.mosaic import Mosaic

PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Row and column of R, Gr, Gb and B in a 2x2 block of an RGGB mosaic."""

MAI21 = (3, 1, 0, 2)
"""The planes of the Mobile AI 2021 challenge's baseline, as indices into R, Gr, Gb, B: its code calls the
green in the rows of red "Gb", and that in the rows of blue "Gr"."""

MAI21_WHITE = 1020.0
"""What that baseline divides its 10-bit values by: 4 x 255."""


def phase(pattern: str) -> tuple[int, int]:
    """Return how many rows and columns before the first pixel an RGGB mosaic begins.

    >>> phase("RGGB"), phase("GRBG"), phase("GBRG"), phase("BGGR")
    ((0, 0), (0, 1), (1, 0), (1, 1))
    """
    place = pattern.index("R")
    return place // 2, place % 2


def aligned_size(mosaic: Mosaic) -> tuple[int, int]:
    """Return the rows and columns of the RGGB mosaic, both even, that covers a frame.

    Raises:
        ImgtoolError: A frame of a single row or column, which does not hold all colours.
    """
    height, width = mosaic.values.shape
    if min(height, width) < 2:
        name = mosaic.name or "the mosaic"
        raise ImgtoolError(
            f"{name} has {width}x{height} pixels, less than one of each colour", "give a larger one"
        )
    down, right = phase(mosaic.pattern)
    return (height + down + 1) // 2 * 2, (width + right + 1) // 2 * 2


def window(mosaic: Mosaic, rows: tuple[int, int], columns: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Read a part of a frame as RGGB, black at 0 and white at 1, mirrored where it lies outside.

    Args:
        mosaic: The frame.
        rows: First and end row, even, in the coordinates of the aligned mosaic (``phase``).
        columns: The same for columns.

    Returns:
        ``(rows, columns)`` float32; noise below black is negative.
    """
    down, right = phase(mosaic.pattern)
    height, width = mosaic.values.shape
    part = _cut(
        mosaic.values,
        (rows[0] - down, rows[1] - down),
        (columns[0] - right, columns[1] - right),
        height,
        width,
    )
    values = part.astype(np.float32)
    black = rggb_black(mosaic)
    for (row, column), level in zip(PLACES, black, strict=True):
        scale = np.float32(1 / (mosaic.white - level))
        plane = values[row::2, column::2]
        plane -= np.float32(level)
        plane *= scale
    return values


def _cut(
    values: npt.NDArray[Any], rows: tuple[int, int], columns: tuple[int, int], height: int, width: int
) -> npt.NDArray[Any]:
    inside = rows[0] >= 0 and rows[1] <= height and columns[0] >= 0 and columns[1] <= width
    if inside:
        return values[rows[0] : rows[1], columns[0] : columns[1]]
    return values[tiles.mirrored(*rows, height)][:, tiles.mirrored(*columns, width)]


def rggb_black(mosaic: Mosaic) -> tuple[float, float, float, float]:
    """Return the black levels of R, Gr, Gb and B."""
    down, right = phase(mosaic.pattern)
    red, green_right, green_below, blue = (
        mosaic.black[2 * ((row + down) % 2) + (column + right) % 2] for row, column in PLACES
    )
    return red, green_right, green_below, blue


def pack(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return ``(4, H/2, W/2)`` planes R, Gr, Gb, B of an RGGB mosaic of even sides.

    >>> pack(np.arange(4, dtype=np.float32).reshape(2, 2)).ravel().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    return np.stack([values[row::2, column::2] for row, column in PLACES])


def four(gains: Tensor) -> Tensor:
    """Return ``(B, 4, 1, 1)`` gains of R, Gr, Gb, B of ``(B, 3)`` of red, green and blue."""
    return gains[:, [0, 1, 1, 2], None, None]


def prepare(packed: Tensor, gains: Tensor, noise: Tensor) -> Tensor:
    """Return what the network is fed: balanced planes, white clipped at 1, and the noise to expect in them.

    Args:
        packed: ``(B, 4, h, w)`` R, Gr, Gb, B; black 0, white 1, negatives kept.
        gains: ``(B, 3)`` of red, green and blue; the least is 1, so that clipped highlights are white.
        noise: ``(B, 2)`` shot and read: variances before the gains.

    Returns:
        ``(B, 8, h, w)``: the four planes, and the standard deviation of each.
    """
    scale = four(gains)
    shot, read = noise[:, 0, None, None, None], noise[:, 1, None, None, None]
    sigma = scale * (shot * packed.clamp_min(0) + read).sqrt()
    return torch.cat([(packed * scale).clamp_max(1), sigma], 1)


def least_is_one(gains: Sequence[float]) -> tuple[float, float, float]:
    """Return gains of red, green and blue whose least is 1: what saturates, turns white, not pink.

    >>> least_is_one((1.5, 1.0, 0.5))
    (3.0, 2.0, 1.0)
    """
    red, green, blue = (float(gain) / min(gains) for gain in gains)
    return red, green, blue
