"""What is known of a camera: how white looks to it under lights of every colour temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgtool.errors import ImgtoolError

if TYPE_CHECKING:
    from imgtool.engines.awb.tuning import Tuning

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Matrices = Sequence[tuple[float, Array]]

LOWEST, HIGHEST = 2000.0, 12000.0
"""Colour temperatures in kelvin that a curve made from a matrix spans."""

BEYOND = 1.15
"""Factor on the colour temperatures of its ends, as far as which a curve is extended to meet a point."""

LEAST = 0.01
"""Smallest R/G and B/G on a curve, where it is extended in straight lines."""

MIDDLING = 4200.0
"""Colour temperature midway along lights of which nothing else is known: in mired, that between an
incandescent lamp (2850 K) and shade (8000 K)."""

DAYLIGHT = 6500.0
"""Colour temperature for which a colour matrix counts that does not say for which it is."""

_STEPS = 26
_STEEPEST = 0.9
_ROUNDS = 20
_RESOLUTION = 16


@dataclass(frozen=True, eq=False)
class Locus:
    """The curve of white points: R/G and B/G of a white surface by colour temperature.

    Piecewise linear, and beyond its ends as its last pieces are, as libcamera's ``Pwl``, but nowhere
    below ``LEAST``.

    Attributes:
        ct: ``(N,)`` colour temperatures in kelvin, rising, N >= 2.
        r: ``(N,)`` R/G, positive.
        b: ``(N,)`` B/G, positive.

    Raises:
        ValueError: The numbers describe no such curve.
    """

    ct: Floats
    r: Floats
    b: Floats

    def __post_init__(self) -> None:
        """Refuse what is no curve."""
        if not self.ct.shape == self.r.shape == self.b.shape or self.ct.ndim != 1 or len(self.ct) < 2:
            raise ValueError("a curve of white points takes two points or more of three numbers each")
        whole = np.stack([self.ct, self.r, self.b])
        if not (np.isfinite(whole).all() and (whole > 0).all() and (np.diff(self.ct) > 0).all()):
            raise ValueError("a curve of white points takes rising temperatures and positive R/G and B/G")

    def at(self, ct: float | Array) -> Floats:
        """Return R/G and B/G, ``(..., 2)``, at colour temperatures in kelvin."""
        white = piecewise(np.asarray(ct, np.float64), self.ct, np.stack([self.r, self.b]))
        return np.maximum(np.moveaxis(white, 0, -1), LEAST)

    def nearest(self, r: float, b: float) -> tuple[float, float]:
        """Return the colour temperature whose white is nearest to a point, and the distance from the curve.

        Returns:
            Kelvin, at most 15 % beyond the curve's ends; and the signed transverse distance in units of r
            and b, positive towards larger r and b (greener light has smaller ones).
        """
        ct = np.concatenate([self.ct[:1] / BEYOND, self.ct, self.ct[-1:] * BEYOND])
        knots = self.at(ct)
        steps, away = np.diff(knots, axis=0), np.array([r, b]) - knots[:-1]
        share = np.clip((steps * away).sum(1) / np.maximum(np.square(steps).sum(1), 1e-18), 0, 1)
        across = away - share[:, None] * steps
        distance = np.hypot(across[:, 0], across[:, 1])
        piece = int(distance.argmin())
        outwards = across[piece] @ (steps[piece, 1], -steps[piece, 0])
        kelvin = ct[piece] + share[piece] * (ct[piece + 1] - ct[piece])
        return float(kelvin), math.copysign(float(distance[piece]), outwards)

    def distance(self, r: float, b: float) -> float:
        """Return the angle in degrees between a white point's colour and the nearest on the curve."""
        near = self.at(self.nearest(r, b)[0])
        one, two = np.array([r, 1.0, b]), np.array([near[0], 1.0, near[1]])
        return math.degrees(math.atan2(float(np.linalg.norm(np.cross(one, two))), float(one @ two)))

    def ct_curve(self) -> list[float]:
        """Return the curve as libcamera's tuning files have it: T, r, b, T, r, b, ..."""
        return [float(value) for value in np.stack([self.ct, self.r, self.b], 1).ravel()]

    @classmethod
    def of_matrix(cls, xyz_to_camera: Array) -> Locus:
        """Return the curve that a colour matrix ``(3, 3)`` tells; see ``of_matrices``."""
        return cls.of_matrices([(DAYLIGHT, xyz_to_camera)])

    @classmethod
    def of_matrices(cls, matrices: Matrices) -> Locus:
        """Return the curve that colour matrices tell: of Planckian radiators, and daylight from 5000 K on.

        Args:
            matrices: One for every light, or those of some temperatures, between which it is interpolated;
                see ``matrix_at``.

        Raises:
            ImgtoolError: To these matrices lights are not red, green and blue.
        """
        ct = 1e6 / np.linspace(1e6 / LOWEST, 1e6 / HIGHEST, _STEPS)
        x, y = chromaticity(ct)
        xyz = np.stack([x / y, np.ones_like(x), (1 - x - y) / y], -1)
        rgb = np.einsum("nij,nj->ni", matrix_at(matrices, ct), xyz)
        with np.errstate(divide="ignore", invalid="ignore"):
            white = rgb[:, ::2] / rgb[:, 1:2]
        # To a matrix made for daylight, the reddest lights may have less than no blue.
        seen = (rgb > 0).all(1) & np.isfinite(white).all(1) & (white > LEAST).all(1)
        if np.count_nonzero(seen) < 2:
            what = "by its colour matrix this camera sees no red, green and blue in any light"
            raise ImgtoolError(what, "give the matrix from XYZ to the camera's colours, as DNG's ColorMatrix")
        return cls(ct[seen], *white[seen].T)

    @classmethod
    def fit(cls, points: Array, reference: Locus | None = None) -> Locus:
        """Estimate the curve from white points: a robust cubic in log(r) + log(b) over log(r) - log(b).

        Along the curve log(r / b) falls with the colour temperature, so the temperature of a place on it
        is where the reference has that value of log(r / b). Without a reference, the curve of a generic
        camera serves, shifted so that the curve's middle is at 4200 K: temperatures are then nominal.

        Args:
            points: ``(N, 2)`` R/G and B/G; outliers are weighed down (Huber's M-estimator).
            reference: A curve of the same camera, such as its colour matrix tells.

        Returns:
            A curve along the points, from the 1st to the 99th percentile, on which r falls and b rises.

        Raises:
            ImgtoolError: Fewer than two different points that are finite and positive.
        """
        points = np.asarray(points, np.float64).reshape(-1, 2)
        logs = np.log(points[np.isfinite(points).all(1) & (points > 0).all(1)])
        along, across = logs[:, 0] - logs[:, 1], logs.sum(1)
        if not len(along) or np.ptp(along) < 1e-6:
            what = "a curve of white points cannot be drawn through lights of one colour"
            raise ImgtoolError(what, "give frames under different lights, from lamps to shade")
        warm, cool = (float(end) for end in np.quantile(along, [0.99, 0.01]))
        place = np.linspace(warm, cool, _RESOLUTION)
        height = _smooth(along, across, place)
        ct = _temperatures(place, reference)
        kept = np.concatenate([[True], np.diff(ct) > 0])
        r, b = np.exp((height + place) / 2), np.exp((height - place) / 2)
        return cls(ct[kept], r[kept], b[kept])


def piecewise(at: Array, x: Array, y: Array) -> Floats:
    """Interpolate linearly between points, and extend the first and the last piece.

    Args:
        at: ``(...)`` places.
        x: ``(N,)`` rising, N >= 2.
        y: ``(N,)`` or ``(C, N)``.

    Returns:
        ``(...)`` or ``(C, ...)``.
    """
    piece = np.minimum(np.maximum(np.searchsorted(x, at, side="right") - 1, 0), len(x) - 2)
    slopes = (y[..., 1:] - y[..., :-1]) / (x[1:] - x[:-1])
    found: Floats = y[..., piece] + (at - x[piece]) * slopes[..., piece]
    return found


def matrix_at(matrices: Matrices, ct: float | Array) -> Floats:
    """Return the colour matrix at colour temperatures, ``(..., 3, 3)``.

    Linear in 1 / temperature between the calibration lights, and beyond them that of the nearest: DNG
    Specification 1.7, chapter 6.

    Args:
        matrices: One or more: temperature of the calibration light in kelvin, each another, and ``(3, 3)``.
        ct: Kelvin.
    """
    ordered = sorted(matrices, key=lambda told: -told[0])
    mired = [1e6 / kelvin for kelvin, _ in ordered]
    places = 1e6 / np.asarray(ct, np.float64)
    shares = np.stack([np.interp(places, mired, one) for one in np.eye(len(mired))], -1)
    return np.tensordot(shares, np.array([matrix for _, matrix in ordered], np.float64), 1)


def chromaticity(ct: float | Array) -> tuple[Floats, Floats]:
    """Return CIE 1931 x and y of the lights: Planckian below 4000 K, daylight above 5000 K, blended between.

    Planckian radiators by the cubics of Kang et al., "Design of Advanced Color Temperature Control System
    for HDTV Applications", Journal of the Korean Physical Society 41, 2002, from 1667 to 25000 K;
    daylight by CIE 15, from 4000 to 25000 K.
    """
    kelvin = np.clip(np.asarray(ct, np.float64), 1667, 25000)
    t = 1e3 / kelvin
    x = np.where(
        kelvin < 4000,
        np.polyval([-0.2661239, -0.2343589, 0.8776956, 0.179910], t),
        np.polyval([-3.0258469, 2.1070379, 0.2226347, 0.240390], t),
    )
    y = np.select(
        [kelvin < 2222, kelvin < 4000],
        [
            np.polyval([-1.1063814, -1.34811020, 2.18555832, -0.20219683], x),
            np.polyval([-0.9549476, -1.37418593, 2.09137015, -0.16748867], x),
        ],
        np.polyval([3.0817580, -5.87338670, 3.75112997, -0.37001483], x),
    )
    day_x = np.where(
        kelvin < 7000,
        np.polyval([-4.6070, 2.9678, 0.09911, 0.244063], t),
        np.polyval([-2.0064, 1.9018, 0.24748, 0.237040], t),
    )
    day_y = np.polyval([-3.0, 2.87, -0.275], day_x)
    share = np.clip((kelvin - 4000) / 1000, 0, 1)
    share = share * share * (3 - 2 * share)
    return x + share * (day_x - x), y + share * (day_y - y)


def _smooth(along: Floats, across: Floats, place: Floats) -> Floats:
    """Fit a cubic, or less where points are few, and return its values where r still falls and b rises."""
    degree = int(np.clip(len(along) // 8, 0, 3))
    middle, spread = along.mean(), max(float(np.std(along)), 1e-6)
    weights = np.ones_like(along)
    for _ in range(_ROUNDS):
        curve = np.polynomial.Polynomial.fit(
            along, across, degree, domain=[middle - spread, middle + spread], w=np.sqrt(weights)
        )
        residual = np.abs(across - curve(along))
        limit = 1.345 * max(1.4826 * float(np.median(residual)), 1e-9)
        weights = np.minimum(1, limit / np.maximum(residual, 1e-12))
    # log(r) = (height + place) / 2 and log(b) = (height - place) / 2 go their ways while |slope| < 1.
    fine = np.linspace(place[0], place[-1], 32 * (_RESOLUTION - 1) + 1)
    slope = np.clip(curve.deriv()(fine), -_STEEPEST, _STEEPEST)
    rise = np.concatenate([[0.0], np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(fine))])
    height = rise + np.mean(curve(fine) - rise)
    found: Floats = np.interp(-place, -fine, height)
    return found


def _temperatures(place: Floats, reference: Locus | None) -> Floats:
    """Return the colour temperatures where a reference curve has the values of log(r / b)."""
    mired = np.linspace(1e6 / HIGHEST, 1e6 / LOWEST, 64)
    white = np.log((reference or GENERIC_LOCUS).at(1e6 / mired))
    known = np.maximum.accumulate(white[:, 0] - white[:, 1]) + 1e-9 * np.arange(64)
    shift = 0.0 if reference else float(np.interp(1e6 / MIDDLING, mired, known) - place.mean())
    found: Floats = 1e6 / np.clip(piecewise(place + shift, known, mired), 40, 600)
    return found


@dataclass(frozen=True, eq=False)
class Camera:
    """A camera.

    Attributes:
        name: Sensor or model, "" where unknown.
        locus: Its curve of white points.
        known: Whether the locus is this camera's own: from a tuning file or its colour matrix.
        xyz_to_camera: ``(3, 3)``: XYZ to camera RGB at D65, as the ColorMatrix of DNG; None where unknown.
        matrices: Where it has one for each of several lights: colour temperature of the light in kelvin,
            and ``(3, 3)``, all on one scale. "xyz_to_camera" is among them, but for its scale.
        tuning: Its libcamera tuning, where there is one.
    """

    name: str = ""
    locus: Locus = field(default_factory=lambda: GENERIC_LOCUS)
    known: bool = False
    xyz_to_camera: Floats | None = None
    matrices: tuple[tuple[float, Floats], ...] = ()
    tuning: Tuning | None = None

    def matrix(self, ct: float) -> Floats | None:
        """Return XYZ to camera RGB under a light of a colour temperature in kelvin, None where unknown."""
        return matrix_at(self.matrices, ct) if self.matrices else self.xyz_to_camera


GENERIC_LOCUS: Locus = Locus(
    *np.array(
        [
            (2000, 0.8358, 0.1788), (2300, 0.7815, 0.2556), (2600, 0.7248, 0.3264), (2900, 0.6729, 0.3888),
            (3300, 0.6138, 0.4590), (3800, 0.5549, 0.5286), (4500, 0.4936, 0.6005), (5500, 0.4339, 0.6695),
            (6500, 0.3937, 0.7147), (7600, 0.3628, 0.7484), (9000, 0.3353, 0.7772), (12000, 0.2997, 0.8123),
        ]
    ).T
)  # fmt: skip
"""A middling camera, for frames of which nothing is known.

Geometric means over the seven sensors of raspberrypi/awb_nn's tunings: of each curve, log(r) and log(b)
as quadratics in mired.
"""

GENERIC = Camera()
