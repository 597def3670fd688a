"""What the network sees: histograms of log-chroma, in coordinates in which cameras are alike.

A light multiplies the channels of a raw frame, so in log(R/G), log(B/G) another light is a shift (the
idea of Convolutional Color Constancy, Barron, ICCV 2015). The origin is the camera's white at 5000 K,
and both axes are scaled so that the curve of white points is as long as that of other cameras. So one
network serves all cameras whose curve is known, also those that it was never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imgtool.engines.awb.camera import Camera
from imgtool.engines.awb.stats import COVERED, AwbStats

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

BINS = 32
REACH = 1.4
"""Histograms span -REACH to REACH on both axes."""
MAPS = 3
"""Histograms: of cells, of cells by brightness, of edges."""

LIGHTS = 40
COOLEST, WARMEST = 1e6 / 9000, 1e6 / 2400
"""Candidate lights along the curve, evenly spaced in mired (10^6 K)."""
OFFSETS = np.linspace(-2.0, 2.0, 9)
"""Candidates across the curve, in standard deviations of how far lights lie off it."""
SPREAD = {"tuning": 0.01, "matrix": 0.05, "generic": 0.25}
"""Those standard deviations, in aligned log-chroma, by what the curve was made from."""

_ENDS = (3000.0, 7500.0)
_LENGTH = 0.65
DARK = 0.01
"""Share of the mean green that a cell must exceed to count."""
FLAT = 0.002
"""Share of the mean below which a channel is taken for that."""
BRIGHTEST = 4.0
"""How many times the mean a cell counts at most where cells count by brightness."""


@dataclass(frozen=True, eq=False)
class Space:
    """Aligned log-chroma of a camera.

    Attributes:
        origin: ``(2,)`` log of R/G and B/G of white at 5000 K.
        scale: ``(2,)`` factors of both axes.
    """

    origin: Array
    scale: Array

    @staticmethod
    @lru_cache(maxsize=64)
    def of(camera: Camera) -> Space:
        """Return the coordinates for a camera's curve of white points."""
        warm, cool = np.log(camera.locus.at(np.array(_ENDS)))
        return Space(np.log(camera.locus.at(5000.0)), _LENGTH / np.maximum(np.abs(cool - warm), 0.1))

    def place(self, white: Array) -> Array:
        """Return the coordinates of white points ``(..., 2)`` R/G, B/G."""
        placed: Array = (np.log(white) - self.origin) * self.scale
        return placed

    def white(self, place: Array) -> Array:
        """Return the white points of coordinates ``(..., 2)``."""
        white: Array = np.exp(place / self.scale + self.origin)
        return white


class Points(NamedTuple):
    """A frame in aligned log-chroma, before it is counted.

    Attributes:
        cells: ``(N, 2)`` of the cells that count.
        weight: ``(N,)`` what each counts.
        bright: ``(N,)`` the same by brightness.
        edges: ``(M, 2)`` of the differences between neighbours.
        contrast: ``(M,)`` what each of those counts.
    """

    cells: Floats
    weight: Floats
    bright: Floats
    edges: Floats
    contrast: Floats


def points(stats: AwbStats, space: Space) -> Points:
    """Return a frame's colours and edges, independent of its exposure.

    A frame without a cell that counts has no points.
    """
    cells = stats.cells
    red, green, blue = cells[..., 0], cells[..., 1], cells[..., 2]
    with np.errstate(invalid="ignore"):
        counts = (stats.coverage >= COVERED) & (red > 0) & (green > 0) & (blue > 0)
        counts &= np.isfinite(red + green + blue)
    level = float(green[counts].mean()) if counts.any() else 0.0
    counts &= green > DARK * level
    gains = np.exp(-np.array([space.origin[0], 0, space.origin[1]])).astype(np.float32)
    balanced = np.where(counts[..., None], cells, np.float32(0)) * gains
    weight = np.where(counts, stats.coverage, np.float32(0))
    chosen, kept = balanced[counts], weight[counts]
    light = chosen[:, 0] + chosen[:, 1] + chosen[:, 2]
    mean = max(float(light.mean()) / 3 if len(light) else 0.0, 1e-12)
    edges, contrast = _edges(balanced, weight, mean, space)
    bright = kept * np.minimum(light / np.float32(3 * mean), np.float32(BRIGHTEST))
    return Points(_chroma(chosen, space, FLAT * mean), kept, bright, edges, contrast)


def _chroma(colours: Array, space: Space, least: float) -> Floats:
    logs = np.log(np.maximum(colours, np.float32(least)))
    return (logs[:, ::2] - logs[:, 1:2]) * space.scale.astype(np.float32)


def _edges(cells: Array, weight: Floats, mean: float, space: Space) -> tuple[Floats, Floats]:
    down, right = np.abs(cells[1:] - cells[:-1]), np.abs(cells[:, 1:] - cells[:, :-1])
    steps = np.concatenate([down.reshape(-1, 3), right.reshape(-1, 3)])
    shares = np.concatenate(
        [
            np.minimum(weight[1:], weight[:-1]).reshape(-1),
            np.minimum(weight[:, 1:], weight[:, :-1]).reshape(-1),
        ]
    )
    steps, shares = steps[shares > 0], shares[shares > 0]
    sums = steps[:, 0] + steps[:, 1] + steps[:, 2]
    contrast = shares * np.minimum(sums / np.float32(mean), np.float32(BRIGHTEST))
    return _chroma(steps, space, FLAT * mean), contrast


def histograms(seen: Points) -> Floats:
    """Count the points: ``(MAPS, BINS, BINS)``, rows along log(R/G), columns along log(B/G).

    Each point is shared by the four bins around it; each histogram is divided by its sum, and the root
    is taken, which brings out the rare colours.
    """
    maps = [
        _histogram(seen.cells, seen.weight),
        _histogram(seen.cells, seen.bright),
        _histogram(seen.edges, seen.contrast),
    ]
    return np.stack(maps).astype(np.float32)


def _histogram(places: Floats, weight: Floats) -> Array:
    at = np.clip((places.T + np.float32(REACH)) * np.float32((BINS - 1) / (2 * REACH)), 0, BINS - 1.001)
    low = at.astype(np.int32)
    (u, v), (row, column) = at - low, low
    where = np.empty((4, len(weight)), np.intp)
    where[0] = row * BINS + column
    where[1:] = where[0] + np.array([[1], [BINS], [BINS + 1]])
    shares = np.empty((4, len(weight)))
    both = u * v * weight
    shares[3], shares[2], shares[1] = both, u * weight - both, v * weight - both
    shares[0] = weight - u * weight - shares[1]
    counted = np.bincount(where.ravel(), shares.ravel(), minlength=BINS * BINS)
    root: Array = np.sqrt(counted * (50 / (counted.sum() + 1e-6))).reshape(BINS, BINS)
    return root


class Candidates(NamedTuple):
    """The lights that come into question, ``K = LIGHTS x len(OFFSETS)``.

    Attributes:
        place: ``(K, 2)`` in aligned log-chroma.
        white: ``(K, 2)`` R/G and B/G.
        mired: ``(K,)``.
        prior: ``(K,)`` log of how likely a light lies so far off the curve.
    """

    place: Floats
    white: Floats
    mired: Floats
    prior: Floats


def kind(camera: Camera) -> str:
    """Return what a camera's curve was made from: a key of ``SPREAD``."""
    if camera.tuning is not None:
        return "tuning"
    return "matrix" if camera.known else "generic"


def calibrated(ct: Array | float, camera: Camera) -> Array:
    """Keep colour temperatures in a tuning's range: beyond, its curve only goes on straight."""
    clipped: Array = np.clip(ct, camera.locus.ct[0], camera.locus.ct[-1])
    return clipped if camera.tuning is not None else np.asarray(ct)


@lru_cache(maxsize=64)
def candidates(camera: Camera) -> Candidates:
    """Return the candidate lights of a camera: along its curve, and off it as far as the curve is unsure."""
    space = Space.of(camera)
    mired = np.linspace(COOLEST, WARMEST, LIGHTS)
    curve = space.place(camera.locus.at(calibrated(1e6 / mired, camera)))
    along = np.gradient(curve, axis=0)
    across = (
        np.stack([-along[:, 1], along[:, 0]], 1) / np.maximum(np.linalg.norm(along, axis=1), 1e-9)[:, None]
    )
    place = curve[:, None] + SPREAD[kind(camera)] * OFFSETS[:, None] * across[:, None]
    place = place.reshape(-1, 2)
    return Candidates(
        place.astype(np.float32),
        space.white(place).astype(np.float32),
        np.repeat(mired, len(OFFSETS)).astype(np.float32),
        np.tile(-0.5 * OFFSETS**2, LIGHTS).astype(np.float32),
    )


def side(lights: Candidates, lux: float | None) -> Floats:
    """Return what the prior sees of candidates, ``(K, 3)``: mired, log of lux, whether lux is known."""
    seen = np.zeros((len(lights.mired), 3), np.float32)
    seen[:, 0] = lights.mired / 200 - 1.3
    if lux is not None and np.isfinite(lux) and lux >= 0:
        seen[:, 1:] = np.log1p(lux) / 10, 1
    return seen


def picture(stats: AwbStats, height: int, width: int) -> Floats:
    """Return a frame as the original's network sees it, ``(3, height, width)``.

    The cells, 0 where they do not count, scaled so that a mean of a quarter is reached, under a gamma of
    2.2, and stretched bilinearly.
    """
    counts = (stats.coverage >= COVERED) & np.isfinite(stats.cells).all(2)
    cells = np.where(counts[..., None], stats.cells, 0).astype(np.float32)
    mean = float(cells[counts].mean()) if counts.any() else 0.0
    seen = np.clip(cells / max(4 * mean, 1e-9), 0, 1) ** np.float32(1 / 2.2)
    tall = _stretch(height, seen.shape[0]) @ seen.reshape(seen.shape[0], -1)
    wide = tall.reshape(height, seen.shape[1], 3).transpose(2, 0, 1) @ _stretch(width, seen.shape[1]).T
    return np.ascontiguousarray((wide - 0.45) / 0.25, np.float32)


def _stretch(wanted: int, given: int) -> Floats:
    """Return the matrix ``(wanted, given)`` that interpolates linearly between pixel centres."""
    at = np.clip((np.arange(wanted) + 0.5) * given / wanted - 0.5, 0, given - 1)
    low = np.minimum(at.astype(np.int64), max(given - 2, 0))
    matrix = np.zeros((wanted, given), np.float32)
    rows = np.arange(wanted)
    matrix[rows, low] = 1 - (at - low)
    matrix[rows, np.minimum(low + 1, given - 1)] += at - low
    return matrix
