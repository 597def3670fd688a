"""Structure without texture: relative total variation, a filter that solves large linear systems."""

from __future__ import annotations

from typing import Annotated

import cv2
import numpy as np

from imgtool.engines.filter.pixels import Floats, Limits, Pixels, Sigma, Strength, Tone, unit

Turns = Annotated[int, Limits(1, 20)]

TINY = 1e-3
"""Least of what divides the windowed variation, as the paper has it."""

TOLERANCE = 3e-3
"""Relative length of the residual at which a system counts as solved."""

MOST = 300
"""Iterations for one system."""


def rtv(
    image: Pixels, lam: Strength = 0.01, sigma: Sigma = 3.0, sharpness: Tone = 0.02, n: Turns = 4
) -> Floats:
    """Return the photo without texture, by relative total variation, in float32.

    Xu, Yan, Xia and Jia, "Structure extraction from texture via relative total variation", ACM TOG 31(6),
    2012: in each of ``n`` turns, weights of the last result, then a linear system, here solved by conjugate
    gradients; sigma halves from turn to turn, down to 0.5.

    Args:
        image: The photo.
        lam: The larger, the smoother.
        sigma: Of the window that tells texture from structure, in pixels.
        sharpness: The larger, the softer the edges.
        n: Turns.
    """
    values = np.ascontiguousarray(unit(image).transpose(2, 0, 1))
    out = values
    for _ in range(n):
        right, below = (np.float32(lam) * each for each in _weights(out, sigma, sharpness))
        out = _solved(values, out, right, below)
        sigma = max(sigma / 2, 0.5)
    return np.ascontiguousarray(np.clip(out, 0, 1).transpose(1, 2, 0))


def _weights(planes: Floats, sigma: float, sharpness: float) -> tuple[Floats, Floats]:
    """Return the weights of the differences to the right, ``(H, W - 1)``, and down, ``(H - 1, W)``."""
    size = round(5 * sigma) | 1
    smooth = np.stack([cv2.GaussianBlur(plane, (size, size), sigma) for plane in planes])
    right, below = np.zeros_like(planes), np.zeros_like(planes)
    right[:, :, :-1], below[:, :-1] = np.diff(planes, axis=2), np.diff(planes, axis=1)
    steep = np.maximum(np.sqrt(right * right + below * below).mean(0), np.float32(sharpness))
    across, down = (
        np.maximum(np.abs(np.diff(smooth, axis=axis)).mean(0), np.float32(TINY)) for axis in (2, 1)
    )
    return 1 / (across * steep[:, :-1]), 1 / (down * steep[:-1])


def _solved(wanted: Floats, start: Floats, right: Floats, below: Floats) -> Floats:
    """Solve (1 + D'WD) x = ``wanted`` by conjugate gradients, preconditioned by the diagonal."""
    diagonal = np.ones(wanted.shape[1:], np.float32)
    for part, flow in (
        (diagonal[:, :-1], right), (diagonal[:, 1:], right), (diagonal[:-1], below), (diagonal[1:], below),
    ):  # fmt: skip
        part += flow
    inverse = np.float32(1) / diagonal
    out = start.copy()
    residual = wanted - _applied(out, right, below)
    limit = TOLERANCE**2 * float(np.vdot(wanted, wanted))
    scaled = residual * inverse
    way = scaled.copy()
    gain = float(np.vdot(residual, scaled))
    for _ in range(MOST):
        if float(np.vdot(residual, residual)) <= limit:
            break
        turned = _applied(way, right, below)
        step = np.float32(gain / float(np.vdot(way, turned)))
        turned *= step
        residual -= turned
        np.multiply(way, step, out=turned)
        out += turned
        np.multiply(residual, inverse, out=scaled)
        before, gain = gain, float(np.vdot(residual, scaled))
        way *= np.float32(gain / before)
        way += scaled
    return out


def _applied(planes: Floats, right: Floats, below: Floats) -> Floats:
    """Return (1 + D'WD) x."""
    out = planes.copy()
    flow = np.diff(planes, axis=2)
    flow *= right
    out[:, :, :-1] -= flow
    out[:, :, 1:] += flow
    flow = np.diff(planes, axis=1)
    flow *= below
    out[:, :-1] -= flow
    out[:, 1:] += flow
    return out
