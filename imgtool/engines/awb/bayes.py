"""The Bayesian white balance of libcamera's Raspberry Pi cameras.

The arithmetic is that of rpi.awb (src/ipa/rpi/controller/rpi/awb.cpp, from 2019 on): the most likely light
is sought along the curve of white points and then across it, where a light is the likelier the nearer to
grey it makes the zones, as far as they are grey at all, and by what lights occur at this illuminance.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imgtool.engines.awb.stats import COVERED, AwbStats
from imgtool.engines.awb.tuning import LUX, Parameters, Tuning

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

FULL = 65535.0
"""White on libcamera's scale."""

_FLAT = 1e-3
_STILL = 1e-6
_DARKEST = 1e-6
_STEPS = 5
_FEWEST, _MOST = 3, 12


class Found(NamedTuple):
    """A white.

    Attributes:
        ct: Colour temperature in kelvin.
        r: R/G in the sensor's own colours.
        b: B/G.
        zones: How many cells counted.
    """

    ct: float
    r: float
    b: float
    zones: int


def bayes(stats: AwbStats, tuning: Tuning | None = None, ct_range: str = "auto") -> Found | None:
    """Find the white of a frame as libcamera does.

    Two things differ from libcamera: zones are not rounded to whole numbers, and count where enough of
    their pixels are valid rather than by the number of pixels. Where versions of libcamera differ, the
    white that is aimed at is 1 plus ``whitepoint_r``, as before the code was split in 2025.

    Args:
        stats: The frame; 400 lux where it does not know its illuminance.
        tuning: Of the sensor; without one that of the frame's camera, or its curve with libcamera's defaults.
        ct_range: A mode of the tuning, or "LOW,HIGH" in kelvin.

    Returns:
        The white, or None where no more zones count than the tuning's ``min_regions``: then libcamera
        leaves the white as it was.

    Raises:
        ImgtoolError: Code 2: no such mode, or no range.
    """
    tuning = tuning or Tuning.of(stats.camera)
    low, high = tuning.span(ct_range)
    parameters = tuning.parameters
    zones = _zones(stats, parameters)
    if zones.shape[1] <= parameters.min_regions:
        return None
    lux = LUX if stats.lux is None else stats.lux
    search = _Search(zones, tuning, lux, zones.shape[1] / stats.coverage.size)
    ct, r, b = search.across(search.along(low, high))
    return Found(ct, r / parameters.sensitivity_r, b / parameters.sensitivity_b, zones.shape[1])


def _zones(stats: AwbStats, parameters: Parameters) -> Floats:
    """Return R/G and B/G ``(2, N)`` of the zones that count, in the canonical sensor's colours."""
    cells = stats.cells
    counts = (
        (stats.coverage >= COVERED) & np.isfinite(cells.sum(2)) & (cells[..., 1] * FULL >= parameters.min_G)
    )
    red, green, blue = cells[counts].T.astype(np.float64) * FULL
    zones: Floats = np.stack([parameters.sensitivity_r * red, parameters.sensitivity_b * blue]) / (green + 1)
    return zones


class _Search:
    """The search for the white of one frame: where distance from grey less log-likelihood is smallest.

    Args:
        zones: ``(2, N)`` R/G and B/G.
        tuning: The tuning.
        lux: Illuminance.
        share: How many of all zones count, in 0..1, which weighs the prior.
    """

    def __init__(self, zones: Floats, tuning: Tuning, lux: float, share: float) -> None:
        self.zones, self.tuning, self.lux, self.share = zones, tuning, lux, share

    def prior(self, ct: Array) -> Floats:
        """Return the weighed log-likelihood of temperatures ``(K,)``."""
        prior: Floats = self.share * self.tuning.likelihood(ct, self.lux)
        return prior

    def distances(self, whites: Array) -> Floats:
        """Return how far from grey white points ``(2, K)`` leave the zones, ``(K,)``."""
        return _distances(self.zones, whites, self.tuning.parameters)

    def white(self, ct: Array) -> Floats:
        """Return the curve's white points ``(2, K)``."""
        return np.ascontiguousarray(self.tuning.curve.at(ct).T)

    def along(self, low: float, high: float) -> float:
        """Return the likeliest temperature on the curve: the coarse search."""
        steps = [low]
        while steps[-1] < high:
            steps.append(min(steps[-1] + steps[-1] / 10 * self.tuning.parameters.coarse_step, high))
        ct = np.array(steps)
        cost = self.distances(self.white(ct)) - self.prior(ct)
        best = int(cost.argmin())
        if len(ct) < 3:
            return float(ct[best])
        best = min(max(best, 1), len(ct) - 2)
        around = slice(best - 1, best + 2)
        return float(_lowest(ct[around, None], cost[around, None])[0])

    def across(self, ct: float) -> tuple[float, float, float]:
        """Return the likeliest temperature near one, and R/G and B/G on or off the curve: the fine search."""
        parameters = self.tuning.parameters
        step = ct / 100 * parameters.coarse_step
        ends = self.white(ct + _STEPS * step * np.array([1.0, -1.0]))
        along = ends[:, 0] - ends[:, 1]
        if along @ along < _STILL:
            r, b = self.white(np.array([ct]))[:, 0]
            return ct, float(r), float(b)
        outwards = np.array([along[1], -along[0]]) / math.hypot(*along)
        reach = parameters.transverse_neg + parameters.transverse_pos
        count = min(max(math.floor(reach * 100 + 0.5) + 1, _FEWEST), _MOST)
        steps = _STEPS + count
        tried = ct + step * np.arange(-steps, steps + 1)
        off = -parameters.transverse_neg + reach * np.arange(count) / (count - 1)
        curve = self.white(tried)
        whites = curve[:, :, None] + outwards[:, None, None] * off
        prior = self.prior(tried)
        cost = self.distances(whites.reshape(2, -1)).reshape(len(tried), count) - prior[:, None]
        best = np.clip(cost.argmin(1), 1, count - 2)
        around = best + np.array([[-1], [0], [1]])
        lowest = _lowest(off[around], cost[np.arange(len(tried)), around])
        whites = curve + outwards[:, None] * lowest
        chosen = int((self.distances(whites) - prior).argmin())
        return float(tried[chosen]), float(whites[0, chosen]), float(whites[1, chosen])


def _distances(zones: Floats, whites: Array, parameters: Parameters) -> Floats:
    """Return how far from grey white points ``(2, K)`` leave the zones ``(2, N)``: ``(K,)``.

    That is the sum over zones of min(delta^2, limit), delta^2 = (gr r - wr)^2 + (gb b - wb)^2 for gains gr
    and gb. Where all the white points leave a zone within the limit, or all beyond it, it needs not be
    looked at for each; for the others, one product of matrices has every delta^2, for it is linear in
    (gr^2, gr, gb^2, gb, 1).
    """
    aim = np.array([[1 + parameters.whitepoint_r], [1 + parameters.whitepoint_b]])
    gains = 1 / np.maximum(whites, _DARKEST)
    ends = np.stack([gains.min(1), gains.max(1)])[:, :, None] * zones - aim
    most = np.square(ends).max(0)
    least = np.where(ends[0] * ends[1] > 0, np.square(ends).min(0), 0).sum(0)
    within, beyond = most.sum(0) < parameters.delta_limit, least > parameters.delta_limit
    lights = np.concatenate([gains * gains, gains, np.ones_like(gains[:1])])
    surfaces = np.concatenate(
        [zones * zones, -2 * aim * zones, np.full_like(zones[:1], float(np.square(aim).sum()))]
    )
    doubtful = lights.T @ surfaces[:, ~(within | beyond)]
    np.minimum(doubtful, parameters.delta_limit, out=doubtful)
    whole = surfaces[:, within].sum(1) @ lights + parameters.delta_limit * np.count_nonzero(beyond)
    summed: Floats = whole + doubtful.sum(1)
    return summed


def _lowest(x: Array, y: Array) -> Floats:
    """Return where the parabolas through three points each, ``(3, K)``, have their extremum between them.

    Where three points are nearly on a line, it is the lower end, or the middle of a level one.
    """
    far, near = x[2] - x[0], x[1] - x[0]
    high, middle = y[2] - y[0], y[1] - y[0]
    bend = 2 * (middle * far - high * near)
    bent = np.abs(bend) > _FLAT
    place = (middle * far * far - high * near * near) / np.where(bent, bend, 1) + x[0]
    straight = np.select([y[0] < y[2] - _FLAT, y[2] < y[0] - _FLAT], [x[0], x[2]], x[1])
    lowest: Floats = np.where(bent, np.clip(place, x[0], x[2]), straight)
    return lowest
