"""Errors between white points, in degrees, and what they come to."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

DRAWS = 2000
"""Bootstrap draws for the interval of the mean."""


def recovery(estimated: Array, truth: Array) -> Floats:
    """Return the angles between estimated and true white (Hordley and Finlayson, 2004).

    Args:
        estimated: ``(N, 2)`` R/G and B/G, or ``(N, 3)`` RGB of any scale; one row may come without N.
        truth: The same.

    Returns:
        ``(N,)`` degrees in 0..180.
    """
    return _angles(_colours(estimated), _colours(truth))


def reproduction(estimated: Array, truth: Array) -> Floats:
    """Return the angles between white as it is reproduced and grey (Finlayson and Zakizadeh, BMVC 2014).

    A white surface is reproduced as truth / estimated, by channel; see ``recovery``.
    """
    reproduced = _colours(truth) / _colours(estimated)
    return _angles(reproduced, np.ones_like(reproduced))


def _colours(white: Array) -> Floats:
    """Return RGB ``(N, 3)``."""
    rows = np.atleast_2d(np.asarray(white, np.float64))
    return np.insert(rows, 1, 1.0, axis=1) if rows.shape[1] == 2 else rows


def _angles(one: Floats, two: Floats) -> Floats:
    """Return angles in degrees by the arctangent, which unlike the arccosine is exact near 0."""
    across = np.linalg.norm(np.cross(one, two), axis=1)
    angles: Floats = np.degrees(np.arctan2(across, (one * two).sum(1)))
    return angles


def summary(errors: Array) -> dict[str, float | int | list[float]]:
    """Return what is usually reported of angular errors.

    Args:
        errors: ``(N,)`` degrees, N >= 1.

    Returns:
        "count", "mean", "median", "trimean" (Tukey's, (Q1 + 2 Q2 + Q3) / 4), "best25" and "worst25" (means
        of the best and worst quarter), "p95", "p99", "max", "over3", "over5" and "over10" (shares of the
        errors above so many degrees), and "mean_ci": the 95 % bootstrap interval of the mean.
    """
    ordered = np.sort(np.asarray(errors, np.float64).ravel())
    quarter = max(1, round(len(ordered) / 4))
    low, middle, high, p95, p99 = (float(q) for q in np.quantile(ordered, [0.25, 0.5, 0.75, 0.95, 0.99]))
    rng = np.random.default_rng(0)
    draws = [ordered[rng.integers(len(ordered), size=len(ordered))].mean() for _ in range(DRAWS)]
    return {
        "count": len(ordered),
        "mean": float(ordered.mean()),
        "median": middle,
        "trimean": (low + 2 * middle + high) / 4,
        "best25": float(ordered[:quarter].mean()),
        "worst25": float(ordered[-quarter:].mean()),
        "p95": p95,
        "p99": p99,
        "max": float(ordered[-1]),
        **{f"over{limit}": float((ordered > limit).mean()) for limit in (3, 5, 10)},
        "mean_ci": [float(end) for end in np.quantile(draws, [0.025, 0.975])],
    }
