"""The one input of every method: means over the cells of a frame, linear, in the camera's own colours."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from imgtool.engines.awb.camera import GENERIC, Camera
from imgtool.errors import ImgtoolError

Array = npt.NDArray[Any]
Domain = Literal["raw", "srgb"]

CELLS = 1536
"""About how many cells a frame is averaged into; they are square."""

COVERED = 0.25
"""Least share of a cell's pixels that must be valid, for the cell to count."""

SATURATED = 0.98
"""Share of the range from which on a pixel is saturated."""

DULLEST = 0.6
"""Share of the range below which no plateau is one of saturation."""


@dataclass(frozen=True, eq=False)
class AwbStats:
    """What a frame's cells look like.

    Attributes:
        cells: ``(H, W, 3)`` float32 RGB: means of the valid pixels of each cell, linear, black
            subtracted, white at 1.
        coverage: ``(H, W)`` float32 in 0..1: share of a cell's pixels that are valid, which is neither
            saturated, nor masked, nor NaN.
        camera: What is known of the camera whose colours these are.
        domain: "raw", or "srgb" where the frame was a rendered photo, inverted as far as that goes.
        lux: Scene illuminance in lux, where known.
        saturated: Share of the frame's pixels at the white level, in 0..1.
        black: Black level that was subtracted, in the file's numbers.
        white: White level, in the file's numbers.
        name: Where it came from, for messages.
        truth: R/G and B/G of the white of the scene, where known.
        group: Photographer, camera or day: what a split keeps together; "" where unknown.
        about: What else the source says, such as the camera's own estimate.
    """

    cells: npt.NDArray[np.float32]
    coverage: npt.NDArray[np.float32]
    camera: Camera = GENERIC
    domain: Domain = "raw"
    lux: float | None = None
    saturated: float = 0.0
    black: float = 0.0
    white: float = 1.0
    name: str = ""
    truth: tuple[float, float] | None = None
    group: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    def points(self) -> npt.NDArray[np.float32]:
        """Return the colours ``(N, 3)`` of the cells that count: covered, finite and above black."""
        usable = (self.coverage >= COVERED) & np.isfinite(self.cells).all(2) & (self.cells > 0).all(2)
        return self.cells[usable]

    def changed(self, **values: Any) -> AwbStats:
        """Return a copy with some attributes replaced."""
        return replace(self, **values)


def of_linear(
    frame: Array,
    black: float | Array = 0.0,
    white: float = 1.0,
    valid: npt.NDArray[np.bool_] | None = None,
    cells: int = CELLS,
) -> AwbStats:
    """Average a linear frame into cells.

    Pixels at 98 % of the range or more are saturated; where the frame's own plateau of saturation lies
    lower than ``white``, as it may from photo to photo, the plateau counts. Where a cell has many pixels,
    those on a regular grid stand for all: about 16 of them.

    Args:
        frame: ``(H, W, 3)`` RGB in any type, linear.
        black: Level of black, one or one per channel.
        white: Level of white.
        valid: ``(H, W)``: False where a pixel does not count, such as a colour chart.
        cells: About how many cells.

    Returns:
        The statistics, of a generic camera.

    Raises:
        ImgtoolError: Black is not below white.
    """
    dark = float(np.mean(black))
    check_levels(dark, white)
    grid = Grid.of(frame.shape[0], frame.shape[1], cells)
    planes = grid.planes(frame)
    counts = np.ones(planes.shape[1:], np.bool_) if valid is None else grid.sampled(valid)
    if planes.dtype.kind == "f":
        finite = np.isfinite(planes).all(0)
        planes, counts = np.where(finite, planes, 0), counts & finite
    peak = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    white = saturation(planes, peak, dark, white)
    saturated = peak >= dark + SATURATED * (white - dark)
    stats = of_samples(planes, counts & ~saturated, grid.side, black, white)
    return stats.changed(saturated=float(np.count_nonzero(saturated)) / saturated.size)


def check_levels(black: float, white: float) -> None:
    """Raise ``ImgtoolError`` where black is not below white."""
    if not black < white:
        what = f"the black level {black:g} is not below the white level {white:g}"
        raise ImgtoolError(what, "check --black and --white")


@dataclass(frozen=True)
class Grid:
    """Which pixels stand for the cells of a frame.

    Attributes:
        rows: Of the pixels, ``side[0]`` per cell.
        columns: Of the pixels, ``side[1]`` per cell.
        side: Samples per cell, down and across.
    """

    rows: slice
    columns: slice
    side: tuple[int, int]

    @classmethod
    def of(cls, height: int, width: int, cells: int = CELLS, samples: int = 4) -> Grid:
        """Lay square cells over a frame; what is left over at the edges is less than a cell.

        Args:
            height: Of the frame, at least 1.
            width: Of the frame, at least 1.
            cells: About how many.
            samples: About how many samples a side of a cell has, where it has the pixels.
        """
        edge = max(1.0, math.sqrt(height * width / cells))
        stride = max(1, round(edge / samples))
        side = max(1, round(edge / stride))
        rows, down = _samples(height, stride, side)
        columns, across = _samples(width, stride, side)
        return cls(rows, columns, (down, across))

    def sampled(self, plane: Array) -> Array:
        """Return the samples of a plane ``(H, W, ...)``, as a view."""
        return plane[self.rows, self.columns]

    def planes(self, frame: Array) -> Array:
        """Return the samples of a frame ``(H, W, 3)`` as planes ``(3, h, w)`` in memory of their own."""
        return np.ascontiguousarray(self.sampled(frame).transpose(2, 0, 1))


def _samples(length: int, stride: int, side: int) -> tuple[slice, int]:
    """Return the samples along one axis, and how many a cell has; a thin frame has one cell."""
    if length < stride * side:
        side = min(side, length)
        stride = length // side
    covered = length - length % (stride * side)
    start = (length - covered) // 2 + stride // 2
    return slice(start, start + covered - stride + 1, stride), side


def saturation(planes: Array, peak: Array, black: float, white: float) -> float:
    """Return the level at which a frame saturates: ``white``, or a plateau below it.

    A plateau is a crowd of samples at one level above which there is nothing, where one channel stands
    still while others go on, or where all have stopped at the same number. An evenly lit surface is
    none: there all channels stand still, at different numbers.

    Args:
        planes: ``(3, h, w)`` samples as the file has them.
        peak: ``(h, w)`` largest of each sample's channels.
        black: Level of black.
        white: Largest level that there may be.
    """
    few = max(8, peak.size // 2048)
    if peak.size < 32 * few:
        return white
    top = float(np.partition(peak, peak.size - few, None)[peak.size - few])
    height = top - black
    if not DULLEST * (white - black) <= height < SATURATED * (white - black):
        return white
    band = max(0.005 * height, 1.0 if peak.dtype.kind in "iu" else 0.0)
    near = peak >= top - band
    crowd = np.count_nonzero(near)
    below = np.count_nonzero(peak >= top - 3 * band) - crowd
    if not 4 * below + few <= crowd <= peak.size // 2:
        return white
    high, low = peak[near].astype(np.float32), planes[:, near].min(0).astype(np.float32)
    stopped = float(np.median(low)) >= top - 2 * band
    moving = float(low.std()) > max(4 * float(high.std()), 0.01 * height)
    return top if stopped or moving else white


def of_samples(
    planes: Array,
    counts: npt.NDArray[np.bool_],
    side: tuple[int, int],
    black: float | Array = 0.0,
    white: float = 1.0,
) -> AwbStats:
    """Average samples into cells.

    Args:
        planes: ``(3, h, w)`` linear samples in any type, finite.
        counts: ``(h, w)``: False where a sample is saturated or masked.
        side: Samples per cell, down and across, which divide h and w.
        black: Level of black, one or one per channel.
        white: Level of white, above black.

    Returns:
        The statistics, of a generic camera, its share of saturated pixels unknown.
    """
    weights = counts.astype(np.float32)
    sums = _blocks(planes.astype(np.float32, copy=False) * weights, side)
    number = _blocks(weights, side)
    dark = np.broadcast_to(np.asarray(black, np.float32), (3,))[:, None, None]
    scale = 1.0 / (white - float(dark.mean()))
    cells = (sums - dark * number) * (np.float32(scale) / np.maximum(number, 1))
    coverage = number / np.float32(side[0] * side[1])
    return AwbStats(
        np.ascontiguousarray(cells.transpose(1, 2, 0)), coverage, black=float(dark.mean()), white=float(white)
    )


def _blocks(planes: npt.NDArray[np.float32], side: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Sum blocks of samples: ``(..., h, w)`` to ``(..., h / side[0], w / side[1])``."""
    down, across = side
    rows = planes[..., ::down, :].copy()
    for offset in range(1, down):
        rows += planes[..., offset::down, :]
    blocks = rows[..., ::across].copy()
    for offset in range(1, across):
        blocks += rows[..., offset::across]
    return blocks
