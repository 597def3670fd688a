"""The noise of a frame, measured in the frame itself.

A pixel's variance is shot x signal + read (Foi et al., "Practical Poissonian-Gaussian noise modeling and
fitting for single-image raw-data", IEEE TIP 17(10), 2008). Flat parts of a photo tell it: the product of
second differences in both directions (Immerkaer, "Fast noise variance estimation", CVIU 64(2), 1996) of
pixels of one colour takes out what changes slowly, and of many small blocks of one brightness those with
the least left hold little but noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgtool.engines.isp.bayer import PLACES

if TYPE_CHECKING:
    from imgtool.mosaic import Mosaic

Floats = npt.NDArray[np.float64]

BLOCK = 8
"""Edge of a block, in pixels of one colour."""

PIXELS = 1_500_000
"""Of the mosaic that are looked at, in bands all over it."""

BINS, FEWEST = 24, 8
"""Brightnesses that are told apart, and the blocks that one needs."""

SHARE = 0.05
"""Share of the blocks of a brightness that are taken for flat."""

ABOVE = 0.01
"""What a variance above the line counts, of one below."""

CLIPPED = 0.96
"""Level from which pixels may be clipped."""

_LAPLACIAN = 36.0  # the sum of the squares of (1, -2, 1) x (1, -2, 1)
_NORMAL = -1.6448536269514722  # the normal distribution's quantile of SHARE


def _freedom() -> float:
    """Return the degrees of freedom of the mean square of a block: neighbouring differences are related."""
    related = (1.0, -4 / 6, 1 / 6)
    pairs = sum((2 if step else 1) * (BLOCK - step) * r * r for step, r in enumerate(related))
    return BLOCK**4 / pairs**2


def _low_quantile() -> float:
    """Return the quantile ``SHARE`` of a block's mean square at variance 1 (Wilson and Hilferty)."""
    spread = 2 / (9 * _freedom())
    return float((1 - spread + _NORMAL * spread**0.5) ** 3)


def estimate(mosaic: Mosaic) -> tuple[float, float]:
    """Return shot and read noise of a frame: variances with black at 0 and white at 1.

    Read noise is at least that of rounding to whole numbers. Where the frame is too small, or nowhere flat
    and unclipped, shot is 0.
    """
    levels = mosaic.white - float(np.mean(mosaic.black))
    least = 1 / (12 * levels * levels)
    found = [_blocks(mosaic, place) for place in range(4)]
    means, squares = (np.concatenate(parts) for parts in zip(*found, strict=True))
    points = _points(means, squares)
    if not len(points):
        return 0.0, least
    shot, read = _line(points, least)
    return shot, max(read, least)


def _blocks(mosaic: Mosaic, place: int) -> tuple[Floats, Floats]:
    """Return mean and mean squared difference, per unit of noise, of the unclipped blocks of one colour."""
    row, column = PLACES[place]
    plane = mosaic.values[row::2, column::2]
    high, wide = ((size - 2) // BLOCK for size in plane.shape)
    if min(high, wide) < 1:
        return np.empty(0), np.empty(0)
    step = max(1, round(mosaic.values.size / PIXELS))
    tops = np.arange(0, high, step) * BLOCK
    rows = (tops[:, None] + np.arange(BLOCK + 2)).ravel()
    bands = plane[rows, : wide * BLOCK + 2].reshape(len(tops), BLOCK + 2, -1).astype(np.float32)
    black, white = np.float32(mosaic.black[place]), np.float32(mosaic.white)
    across = bands[..., :-2] - 2 * bands[..., 1:-1] + bands[..., 2:]
    change = across[:, :-2] - 2 * across[:, 1:-1] + across[:, 2:]
    inner = bands[:, 1:-1, 1:-1]
    kept = (inner > 0) & (inner < black + CLIPPED * (white - black))
    parts = (_tiled(part) for part in (inner, change * change, kept))
    mean, square, whole = (part.mean(2, dtype=np.float64) for part in parts)
    good = whole == 1
    scale = float(white - black)
    return (mean[good] - float(black)) / scale, square[good] / (_LAPLACIAN * scale * scale)


def _tiled(bands: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return ``(N, blocks, pixels)`` of bands ``(N, BLOCK, W)``."""
    count, _, wide = bands.shape
    cut = bands.reshape(count, BLOCK, wide // BLOCK, BLOCK).swapaxes(1, 2)
    return cut.reshape(count, wide // BLOCK, -1)


def _points(means: Floats, squares: Floats) -> Floats:
    """Return ``(N, 3)`` brightness, variance and number of blocks, of brightnesses with enough of them."""
    order = np.argsort(means)
    count = min(BINS, len(order) // FEWEST)
    found = [
        (means[part].mean(), np.quantile(squares[part], SHARE) / _low_quantile(), len(part))
        for part in (np.array_split(order, count) if count else ())
    ]
    return np.array(found).reshape(-1, 3)


def _line(points: Floats, least: float) -> tuple[float, float]:
    """Fit variance = shot x mean + read from below: texture adds to variances, and nothing takes away.

    A point above the line counts ``ABOVE`` of one below, measured: at 0.2, twelve detailed photos with shot
    noise 1e-4 gave 10 times that on the mean, at 0.01 with half the share of flat blocks 3.6 times.
    """
    means, variances, weights = points.T
    shot, read = 0.0, float(np.median(variances))
    for _ in range(40):
        model = np.maximum(shot * means + read, least)
        share = weights * np.where(variances > model, ABOVE, 1.0) / model**2
        shot, read = _least_squares(means, variances, share)
    return shot, read


def _least_squares(x: Floats, y: Floats, weights: Floats) -> tuple[float, float]:
    """Return slope and intercept of a line, neither below 0."""
    total = weights.sum()
    middle, level = (weights @ x) / total, (weights @ y) / total
    spread = weights @ (x - middle) ** 2
    slope = float(weights @ ((x - middle) * (y - level)) / spread) if spread > 0 else 0.0
    intercept = float(level - slope * middle)
    if slope < 0:
        return 0.0, float(level)
    if intercept < 0:
        return float((weights @ (x * y)) / (weights @ (x * x))), 0.0
    return slope, intercept
