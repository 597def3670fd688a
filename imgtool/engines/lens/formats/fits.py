"""Least squares: models fitted to pairs of points and of radii."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from imgtool.engines.lens import geometry
from imgtool.engines.lens.geometry import BrownConrady

Floats = npt.NDArray[np.float64]

_RADIAL = ("k1", "k2", "k3")


def fit(
    straight: tuple[Floats, Floats],
    photo: tuple[Floats, Floats],
    free: Sequence[str],
    start: BrownConrady = BrownConrady(),  # noqa: B008 - frozen
) -> tuple[BrownConrady, float]:
    """Fit a model and a zoom of the straight picture to pairs of points.

    Gauss-Newton with halved steps; fields that the points do not determine stay near their start.

    Args:
        straight: x and y of points of the straight picture, normalised.
        photo: x and y of the same points in the photo.
        free: Fields of ``BrownConrady`` to fit; the others are 0.
        start: Values to begin with.

    Returns:
        The model, and the largest distance that it leaves, in half diagonals.
    """
    wanted = np.concatenate(photo)

    def left(values: Floats) -> Floats:
        model = BrownConrady(**dict(zip(free, values[:-1].tolist(), strict=True)))
        return np.concatenate(model.distort(straight[0] * values[-1], straight[1] * values[-1])) - wanted

    values = np.array([getattr(start, name) for name in free] + [1.0])
    rest = left(values)
    for _ in range(50):
        slopes = [(left(values + step) - left(values - step)) / 2e-6 for step in np.eye(len(values)) * 1e-6]
        full = np.linalg.lstsq(np.stack(slopes, axis=1), -rest, rcond=1e-9)[0]
        trials = (values + full / 2**halving for halving in range(12))
        better = next(((trial, now) for trial in trials if (now := left(trial)) @ now < rest @ rest), None)
        if better is None:
            break
        moved = float(np.abs(better[0] - values).max())
        values, rest = better
        if moved < 1e-12:
            break
    model = BrownConrady(**dict(zip(free, values[:-1].tolist(), strict=True)))
    return model, float(np.hypot(*np.split(rest, 2)).max())


def radial_fit(radius: Floats, distorted: Floats) -> tuple[BrownConrady, float]:
    """Fit k1, k2 and k3, or k1 and k2 where the three would fold, to pairs of radii; see ``fit``."""
    for free in (_RADIAL, _RADIAL[:2]):
        model, left = fit((radius, np.zeros_like(radius)), (distorted, np.zeros_like(radius)), free)
        if not model.folds():
            break
    return model, left


def points(width: int, height: int) -> tuple[Floats, Floats]:
    """Return normalised points over a whole frame, its corners included."""
    return geometry.grid(width, height, 25, 17, part=1.0)
