"""How real lenses distort: random draws of coefficients, and their density.

Fitted to the distortion of 6,394 lens and focal length settings of rectilinear camera lenses (the
lensfun database, August 2026), of which only the percentiles are used: k1 follows a Student t with
another scale on either side of its mode, and so does what k2 deviates from a line over k1. Action and
machine cameras, which that database hardly knows, come from the calibrations of a few.
Coefficients are in the half-diagonal normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from imgtool.engines.lens.geometry import BrownConrady

Floats = npt.NDArray[np.float64]
Kind = Literal["photo", "mixed", "wide"]

STRONG = 0.15
"""Share of action and machine cameras in "mixed"."""


@dataclass(frozen=True)
class Student:
    """A Student t with one scale below its mode and another above (Fernandez and Steel, 1998).

    A side is drawn with a probability in proportion to its scale, so that the density has no step.

    Attributes:
        freedom: Degrees of freedom.
        mode: Where the density is largest.
        below: Scale below the mode.
        above: Scale above it.
    """

    freedom: float
    mode: float
    below: float
    above: float

    def draw(self, rng: np.random.Generator, count: int) -> Floats:
        """Draw ``(count,)`` values."""
        size = np.abs(rng.standard_t(self.freedom, count))
        is_below = rng.random(count) < self.below / (self.below + self.above)
        return self.mode + size * np.where(is_below, -self.below, self.above)

    def log_density(self, values: Floats) -> Floats:
        """Return the logarithm of the density at values, any shape."""
        away = values - self.mode
        scaled = away / np.where(away < 0, self.below, self.above)
        half = (self.freedom + 1) / 2
        constant = math.lgamma(half) - math.lgamma(self.freedom / 2) - 0.5 * math.log(self.freedom * math.pi)
        constant += math.log(2 / (self.below + self.above))
        return np.asarray(constant - half * np.log1p(scaled**2 / self.freedom))


@dataclass(frozen=True)
class Lenses:
    """One kind of lenses: k1, then k2 = offset + slope k1 + rest, both within what was measured.

    Attributes:
        k1: Its distribution.
        offset: Of the line of k2 over k1.
        slope: Of that line.
        rest: Distribution of what k2 is beyond the line.
        lowest: Least k1 and k2 that are drawn; the density goes on.
        highest: The largest ones.
    """

    k1: Student
    offset: float
    slope: float
    rest: Student
    lowest: tuple[float, float]
    highest: tuple[float, float]

    def draw(self, rng: np.random.Generator, count: int) -> Floats:
        """Draw ``(count, 2)`` k1 and k2, also beyond what was measured."""
        k1 = self.k1.draw(rng, count)
        return np.stack([k1, self.offset + self.slope * k1 + self.rest.draw(rng, count)], 1)

    def within(self, drawn: Floats) -> npt.NDArray[np.bool_]:
        """Tell which ``(N, 2)`` k1 and k2 lie within what was measured."""
        return np.asarray(((drawn > self.lowest) & (drawn < self.highest)).all(1))

    def log_density(self, k1: Floats, k2: Floats) -> Floats:
        """Return the logarithm of the density at k1 and k2 of the same shape."""
        rest = k2 - self.offset - self.slope * k1
        return self.k1.log_density(k1) + self.rest.log_density(rest)


PHOTO = Lenses(
    Student(2.2, 0.003, 0.0375, 0.0285), 0.001, -0.43, Student(2.4, 0.0, 0.0125, 0.0115),
    (-0.30, -0.15), (0.20, 0.18),
)  # fmt: skip
"""Lenses of cameras."""
WIDE = Lenses(
    Student(8.0, -0.034, 0.066, 0.031), 0.0, -0.335, Student(3.4, 0.0, 0.0145, 0.0165),
    (-0.30, -0.15), (0.15, 0.25),
)  # fmt: skip
"""Those below 35 mm."""
ACTION = Lenses(
    Student(8.0, -0.30, 0.085, 0.085), -0.045, -0.44, Student(5.0, 0.0, 0.025, 0.025),
    (-0.50, -0.05), (-0.12, 0.28),
)  # fmt: skip
"""Action and machine cameras."""
PARTS: Mapping[Kind, Sequence[tuple[float, Lenses]]] = {
    "photo": [(1.0, PHOTO)],
    "mixed": [(1 - STRONG, PHOTO), (STRONG, ACTION)],
    "wide": [(1.0, WIDE)],
}
"""Kind of a prior to the share and the kind of its lenses."""
LEAST_SLOPE = 0.2
"""Least slope of the radius anywhere in a photo: no lens squeezes its corners more than 5 times."""
_RADII = np.linspace(0, 2.5, 101)


def _possible(drawn: Floats) -> npt.NDArray[np.bool_]:
    """Tell which ``(N, 4)`` coefficients neither fold in the straight frame nor before the photo's corner.

    A lens whose radius turns back before it reaches the corner leaves the corner of the photo empty.
    """
    r2 = _RADII**2
    k1, k2 = drawn[:, :1], drawn[:, 1:2]
    tangential = np.hypot(drawn[:, 2:3], drawn[:, 3:])
    steep = 1 + r2 * (3 * k1 + r2 * 5 * k2) - 6 * tangential * _RADII
    rising = np.logical_and.accumulate(steep > LEAST_SLOPE, axis=1)
    reached = _RADII * (1 + r2 * (k1 + r2 * k2)) - 3 * tangential * r2
    inside = _RADII <= 1.025  # a step of the radii beyond the corner
    return np.asarray((rising | ~inside).all(1) & (np.where(rising, reached, 0).max(1) >= 1.01))


def _some(lenses: Lenses, rng: np.random.Generator, count: int, decentred: float) -> Floats:
    found = np.empty((0, 4))
    while len(found) < count:
        missing = count - len(found)
        radial, tangential = lenses.draw(rng, missing), rng.normal(0, decentred, (missing, 2))
        drawn = np.concatenate([radial, tangential], 1)
        found = np.concatenate([found, drawn[lenses.within(radial) & _possible(drawn)]])
    return found


def draws(rng: np.random.Generator, kind: Kind, decentred: float, count: int) -> Floats:
    """Draw many distortions at once.

    Args:
        rng: Source of all that is random.
        kind: "photo": camera lenses; "wide": those below 35 mm; "mixed": camera lenses and, in
            ``STRONG`` of the draws, action and machine cameras.
        decentred: Standard deviation of p1 and of p2.
        count: How many.

    Returns:
        ``(count, 4)``: k1, k2, p1, p2. None folds, and all reach the corners of the photo.
    """
    parts = PARTS[kind]
    chosen = rng.choice(len(parts), count, p=[share for share, _ in parts])
    out = np.empty((count, 4))
    for number, (_, lenses) in enumerate(parts):
        of_this = chosen == number
        out[of_this] = _some(lenses, rng, int(of_this.sum()), decentred)
    return out


def draw(rng: np.random.Generator, kind: Kind, decentred: float) -> BrownConrady:
    """Draw one distortion; see ``draws``."""
    k1, k2, p1, p2 = draws(rng, kind, decentred, 1)[0].tolist()
    return BrownConrady(k1, k2, p1, p2)


def log_density(k1: npt.ArrayLike, k2: npt.ArrayLike, kind: Kind) -> Floats:
    """Return the log of the density of (k1, k2): smooth, with heavy tails, finite everywhere.

    It integrates to 1 over the plane; the draws lack its outermost parts, where lenses are not
    known or cannot be.

    Args:
        k1: Any shape.
        k2: The same shape.
        kind: As for ``draws``.
    """
    first, second = np.asarray(k1, np.float64), np.asarray(k2, np.float64)
    parts = [math.log(share) + lenses.log_density(first, second) for share, lenses in PARTS[kind]]
    return np.asarray(np.logaddexp.reduce(parts, axis=0))
