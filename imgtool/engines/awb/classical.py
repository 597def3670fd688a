"""White without training: grey-world, white-patch, shades-of-grey, grey-edge and the grayness index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from imgtool.engines.awb.camera import Camera
from imgtool.engines.awb.stats import COVERED, AwbStats
from imgtool.errors import ImgtoolError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Point = tuple[float, float]

LARGEST = 16.0
"""Largest gain, and 1 / the smallest."""

WHITEST = 0.99
"""Quantile of each channel that the white patch has."""

NORM = 6
"""Minkowski norm of shades-of-grey."""

GREYEST = 0.1
"""Share of the cells that are averaged as the most grey."""

_CONTRAST = 1e-4


def grey_world(stats: AwbStats) -> Point:
    """Return the mean colour (Buchsbaum, "A Spatial Processor Model for Object Colour Perception", 1980).

    Args:
        stats: The frame.

    Returns:
        R/G and B/G of white, within 1/16 to 16.

    Raises:
        ImgtoolError: No cell of the frame counts.
    """
    colours, weights = _chosen(stats)
    return _point(weights @ colours)


def white_patch(stats: AwbStats) -> Point:
    """Return the brightest red, green and blue (Land and McCann, "Lightness and Retinex Theory", 1971).

    The 99th percentiles stand for the maxima, which one lamp would decide; see ``grey_world``.
    """
    return _point(np.quantile(_chosen(stats)[0], WHITEST, axis=0))


def shades_of_grey(stats: AwbStats) -> Point:
    """Return the mean of norm 6 (Finlayson and Trezzi, "Shades of Gray and Colour Constancy", 2004).

    See ``grey_world``.
    """
    colours, weights = _chosen(stats)
    scaled = colours / colours.max()
    return _point((weights @ scaled**NORM) ** (1 / NORM))


def grey_edge(stats: AwbStats) -> Point:
    """Return the mean step between neighbours (van de Weijer et al., "Edge-Based Color Constancy", 2007).

    First order, norm 1, after binomial smoothing; only between cells that both count. Without any edge
    it is grey-world; see there.
    """
    counts = _counts(stats)
    smooth = _smoothed(stats.cells, counts)
    down = np.abs(np.diff(smooth, axis=0))[counts[1:] & counts[:-1]]
    right = np.abs(np.diff(smooth, axis=1))[counts[:, 1:] & counts[:, :-1]]
    steps = down.sum(0) + right.sum(0)
    if not (steps > 0).all():
        return grey_world(stats)
    return _point(steps)


def grayness_index(stats: AwbStats) -> Point:
    """Return the mean of the most grey tenth of the cells (Qian et al., "On Finding Gray Pixels", CVPR 2019).

    A surface is grey under one light where log(R / luminance) and log(B / luminance) have no contrast to
    their surroundings, though the surface itself has some. The contrast is a cell's difference from the
    binomial mean of the cells around it, which approximates the Laplacian of Gaussian. Where nothing has
    contrast it is grey-world; see there.
    """
    counts = _counts(stats)
    cells = np.where(counts[..., None], stats.cells, 1).astype(np.float64)
    logs = np.log(np.concatenate([cells, cells.mean(2, keepdims=True)], 2))
    contrast = logs - _smoothed(logs, counts)
    grayness = np.hypot(contrast[..., 0] - contrast[..., 3], contrast[..., 2] - contrast[..., 3])
    grayness = _smoothed(grayness[..., None], counts)[..., 0]
    usable = counts & (np.abs(contrast[..., :3]) > _CONTRAST).all(2)
    if not usable.any():
        return grey_world(stats)
    scores = grayness[usable]
    few = max(1, round(GREYEST * len(scores)))
    chosen = np.argpartition(scores, few - 1)[:few]
    return _point(stats.coverage[usable][chosen] @ cells[usable][chosen])


METHODS: Mapping[str, Callable[[AwbStats], Point]] = {
    "grey-world": grey_world,
    "white-patch": white_patch,
    "shades-of-grey": shades_of_grey,
    "grey-edge": grey_edge,
    "grayness-index": grayness_index,
}
"""Name to the method: R/G and B/G of white from a frame; see ``grey_world``."""


def snapped(point: Point, camera: Camera) -> Point:
    """Return the white point on a camera's curve that is nearest to a point R/G, B/G.

    Not beyond the ends of the curve; the point itself where the camera's own curve is not known.
    """
    if not camera.known:
        return point
    locus = camera.locus
    r, b = locus.at(np.clip(locus.nearest(*point)[0], locus.ct[0], locus.ct[-1]))
    return float(r), float(b)


def _counts(stats: AwbStats) -> npt.NDArray[np.bool_]:
    """Return which cells count, ``(H, W)``, at least one; those that ``AwbStats.points`` has."""
    counts = (stats.coverage >= COVERED) & np.isfinite(stats.cells).all(2) & (stats.cells > 0).all(2)
    if not counts.any():
        name = f"{stats.name}: " if stats.name else ""
        what = f"{name}nothing to measure: every pixel is black, saturated or masked"
        raise ImgtoolError(what, "give a frame with other exposure, or check --black, --white and --mask")
    return np.asarray(counts)


def _chosen(stats: AwbStats) -> tuple[Floats, Floats]:
    """Return the colours ``(N, 3)`` and the coverages ``(N,)`` of the cells that count."""
    counts = _counts(stats)
    return stats.cells[counts].astype(np.float64), stats.coverage[counts].astype(np.float64)


def _point(colour: Array) -> Point:
    """Return R/G and B/G of a colour, within bounds."""
    red, green, blue = (float(value) for value in colour)
    green = max(green, 1e-30)
    return min(max(red / green, 1 / LARGEST), LARGEST), min(max(blue / green, 1 / LARGEST), LARGEST)


def _smoothed(values: Array, counts: npt.NDArray[np.bool_]) -> Floats:
    """Return the binomial means of 3x3 cells of ``(H, W, C)``, of those that count."""
    weights = counts[..., None].astype(np.float64)
    parts = np.concatenate([np.where(counts[..., None], values, 0), weights], 2)
    padded = np.pad(parts, ((1, 1), (1, 1), (0, 0)))
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    parts = rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]
    smooth: Floats = parts[..., :-1] / np.maximum(parts[..., -1:], 1e-9)
    return smooth
