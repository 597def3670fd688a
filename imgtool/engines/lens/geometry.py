"""The Brown-Conrady lens model in one normalisation, its inverse, folds, zooms and the error measure.

Every coefficient in imgtool is in the half-diagonal normalisation: pixels are square, the origin is
the middle of the picture, ((w - 1) / 2, (h - 1) / 2) in pixel centres, and the unit is half of the
diagonal, hypot(w, h) / 2. So r = 1 at the corners, and k1 + k2 is what a corner moves by, in half
diagonals. As in OpenCV the model leads from the straight picture to the distorted photo:

    xd = x (1 + k1 r^2 + k2 r^4 + k3 r^6) + 2 p1 x y + p2 (r^2 + 2 x^2)
    yd = y (1 + k1 r^2 + k2 r^4 + k3 r^6) + p1 (r^2 + 2 y^2) + 2 p2 x y

(Brown, "Close-range camera calibration", 1971.) To straighten a photo is to look up, for every pixel
of the output, where the model says that it lies in the photo: no inverse is needed. To distort a
straight picture is to look up the inverse.

Functions take NumPy arrays and torch tensors alike where they say "arrays".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Crop = Literal["fill", "keep", "same"]

HALF_DIAGONAL = "half-diagonal"
EDGE_POINTS = 129
"""Points per edge at which a zoom is computed."""
FARTHEST = 4.0
"""Largest radius that a zoom may look at, in half diagonals."""
STEEPEST = 0.05
"""Least slope of the radius that counts as not folded: below it, a pixel is stretched 20 times."""


@dataclass(frozen=True)
class BrownConrady:
    """Distortion of a lens, in the half-diagonal normalisation.

    Attributes:
        k1: Radial coefficient of r^2.
        k2: Radial coefficient of r^4.
        p1: Tangential coefficient, OpenCV's order and sign.
        p2: The other one.
        k3: Radial coefficient of r^6; estimators leave it at 0.
        cx: Centre of distortion, to the right of the middle of the picture, in half diagonals.
        cy: The same downwards.
    """

    k1: float = 0.0
    k2: float = 0.0
    p1: float = 0.0
    p2: float = 0.0
    k3: float = 0.0
    cx: float = 0.0
    cy: float = 0.0

    @property
    def corner(self) -> float:
        """Return what the radius of a corner changes by, as a share of itself: k1 + k2 + k3."""
        return self.k1 + self.k2 + self.k3

    @property
    def straight(self) -> bool:
        """Return whether nothing is distorted."""
        return not any((self.k1, self.k2, self.p1, self.p2, self.k3))

    def scaled(self, strength: float) -> BrownConrady:
        """Return a share of the distortion: every coefficient times ``strength``."""
        terms = {name: strength * getattr(self, name) for name in ("k1", "k2", "p1", "p2", "k3")}
        return replace(self, **terms)

    def turned(self, quarters: int) -> BrownConrady:
        """Return the model of the photo after ``quarters`` counter-clockwise quarter turns (``np.rot90``)."""
        model = self
        for _ in range(quarters % 4):  # (x, y) of the turned picture is (y, -x) of the one before
            model = replace(model, p1=-model.p2, p2=model.p1, cx=model.cy, cy=-model.cx)
        return model

    def mirrored(self) -> BrownConrady:
        """Return the model of the photo mirrored left to right."""
        return replace(self, p2=-self.p2, cx=-self.cx)

    def distort(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return where points of the straight picture lie in the photo.

        Args:
            x: Arrays of normalised coordinates.
            y: The same, downwards.
        """
        x, y = x - self.cx, y - self.cy
        r2 = x * x + y * y
        radial = 1 + r2 * (self.k1 + r2 * (self.k2 + r2 * self.k3))
        xd = x * radial + 2 * self.p1 * x * y + self.p2 * (r2 + 2 * x * x)
        yd = y * radial + self.p1 * (r2 + 2 * y * y) + 2 * self.p2 * x * y
        return xd + self.cx, yd + self.cy

    def jacobian(self, x: Any, y: Any) -> tuple[Any, Any, Any, Any]:
        """Return the derivatives (dxd/dx, dxd/dy = dyd/dx, dyd/dy) and their determinant, as arrays."""
        x, y = x - self.cx, y - self.cy
        r2 = x * x + y * y
        radial = 1 + r2 * (self.k1 + r2 * (self.k2 + r2 * self.k3))
        slope = 2 * (self.k1 + r2 * (2 * self.k2 + r2 * 3 * self.k3))
        xx = radial + slope * x * x + 2 * self.p1 * y + 6 * self.p2 * x
        xy = slope * x * y + 2 * self.p1 * x + 2 * self.p2 * y
        yy = radial + slope * y * y + 6 * self.p1 * y + 2 * self.p2 * x
        return xx, xy, yy, xx * yy - xy * xy

    def undistort(self, xd: Any, yd: Any, steps: int = 8) -> tuple[Any, Any]:
        """Return where points of the photo lie in the straight picture: the inverse, by Newton.

        Args:
            xd: Arrays of normalised coordinates.
            yd: The same, downwards.
            steps: Newton steps; on the distribution of real lenses 3 leave less than 0.001 pixels
                of 24 MP. The step is damped where the map is nearly folded.
        """
        x, y = xd, yd
        for _ in range(steps):
            ex, ey = self.distort(x, y)
            ex, ey = xd - ex, yd - ey
            xx, xy, yy, det = self.jacobian(x, y)
            det = det.clip(min=0.05)
            x, y = x + (yy * ex - xy * ey) / det, y + (xx * ey - xy * ex) / det
        return x, y

    def slope(self, radius: Any) -> Any:
        """Return the derivative of the distorted radius by the straight one, without p1 and p2."""
        r2 = radius * radius
        return 1 + r2 * (3 * self.k1 + r2 * (5 * self.k2 + r2 * 7 * self.k3))

    def reach(self) -> float:
        """Return the straight radius up to which the map is monotone, at most ``FARTHEST``.

        The tangential terms are taken at their worst: they change a derivative by 6 p r at most.
        """
        radius = np.linspace(0, FARTHEST, 1601)
        tangential = 6 * math.hypot(self.p1, self.p2)
        bad = np.flatnonzero(self.slope(radius) - tangential * radius < STEEPEST)
        return float(radius[bad[0] - 1]) if len(bad) and bad[0] else 0.0 if len(bad) else FARTHEST

    def folds(self) -> bool:
        """Tell whether two places of the straight picture's frame lie on one place of the photo."""
        return self.reach() < 1 + math.hypot(self.cx, self.cy)

    def clamped(self) -> BrownConrady:
        """Return the model, or the largest share of it that does not fold."""
        if not self.folds():
            return self
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self.scaled(middle).folds() else (middle, high)
        return self.scaled(low)


def diagonal(width: int, height: int) -> float:
    """Return the diagonal of a picture in pixels."""
    return math.hypot(width, height)


def half_size(width: int, height: int) -> tuple[float, float]:
    """Return half the width and half the height in half diagonals."""
    size = diagonal(width, height)
    return width / size, height / size


def normalise(x: Any, y: Any, width: int, height: int) -> tuple[Any, Any]:
    """Return normalised coordinates of pixel coordinates (0, 0 is the centre of the first pixel)."""
    unit = diagonal(width, height) / 2
    return (x - (width - 1) / 2) / unit, (y - (height - 1) / 2) / unit


def pixels(x: Any, y: Any, width: int, height: int) -> tuple[Any, Any]:
    """Return pixel coordinates of normalised ones."""
    unit = diagonal(width, height) / 2
    return x * unit + (width - 1) / 2, y * unit + (height - 1) / 2


def grid(
    width: int, height: int, columns: int = 24, rows: int = 16, part: float = 0.96
) -> tuple[Floats, Floats]:
    """Return normalised points spread evenly over the middle ``part`` of a frame."""
    half_width, half_height = half_size(width, height)
    x, y = np.meshgrid(np.linspace(-1, 1, columns), np.linspace(-1, 1, rows))
    return x.ravel() * half_width * part, y.ravel() * half_height * part


def edges(width: int, height: int) -> tuple[Floats, Floats]:
    """Return normalised points along the four edges of a frame, corners included (pixel centres)."""
    line = np.linspace(0, 1, EDGE_POINTS)
    zeros = np.zeros_like(line)
    x = np.concatenate([line, line, zeros, zeros + 1]) * (width - 1)
    y = np.concatenate([zeros, zeros + 1, line, line]) * (height - 1)
    return normalise(x, y, width, height)


def error(estimate: BrownConrady, truth: BrownConrady, width: int, height: int) -> float:
    """Return the mean displacement error in % of the diagonal, after the best similarity.

    A zoom, turn or shift of the whole picture bends no line, so the similarity that brings the two
    distorted grids closest is taken out first (least squares in complex numbers).
    """
    x, y = grid(width, height)
    first, second = estimate.distort(x, y), truth.distort(x, y)
    return float(np.mean(apart(first[0] + 1j * first[1], second[0] + 1j * second[1]))) * 50


def apart(points: Any, wanted: Any) -> Any:
    """Return the distances between two sets of complex points after the best similarity of the first."""
    points, wanted = points - points.mean(), wanted - wanted.mean()
    factor = (np.conj(points) * wanted).sum() / (np.conj(points) * points).sum()
    return np.abs(factor * points - wanted)


def zoom(model: BrownConrady, width: int, height: int, crop: Crop) -> float:
    """Return how much larger the straight picture is shown, so that its frame fits the photo's.

    Output pixel u (normalised) shows the straight picture at u / zoom.

    Args:
        model: The distortion.
        width: Of photo and output, in pixels.
        height: The same.
        crop: "fill": the least zoom without any border; "keep": the largest that loses nothing;
            "same": 1.

    Raises:
        ValueError: No such zoom: the model folds before it reaches the corners of the photo.
    """
    if crop == "same" or model.straight:
        return 1.0
    x, y = edges(width, height)
    half_width, half_height = (width - 1) / diagonal(width, height), (height - 1) / diagonal(width, height)
    if crop == "keep":
        straight_x, straight_y = model.undistort(x, y, 30)
        back_x, back_y = model.distort(straight_x, straight_y)
        reached = np.hypot(straight_x - model.cx, straight_y - model.cy).max()
        if np.hypot(back_x - x, back_y - y).max() > 1e-6 or reached > model.reach():
            raise ValueError("the model folds before it reaches the corners of the photo")
        widest = np.maximum(
            np.abs(straight_x) / max(half_width, 1e-9), np.abs(straight_y) / max(half_height, 1e-9)
        )
        return 1 / float(widest.max())

    def inside(factor: float) -> bool:
        far = np.hypot(x / factor - model.cx, y / factor - model.cy).max()
        if far > model.reach():
            return False
        xd, yd = model.distort(x / factor, y / factor)
        return bool((np.abs(xd) <= half_width + 1e-9).all() and (np.abs(yd) <= half_height + 1e-9).all())

    low, high = 1 / FARTHEST, 16.0
    if not inside(high):
        raise ValueError("the model leaves no part of the photo")
    for _ in range(60):  # the zooms that are inside are those above a limit
        middle = math.sqrt(low * high)
        low, high = (low, middle) if inside(middle) else (middle, high)
    return high
