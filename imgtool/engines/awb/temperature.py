"""Correlated colour temperature and tint, as raw converters have them, of a white in camera colours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from imgtool.engines.awb.camera import Camera

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

TINT = 3000.0
"""Adobe's tint by distance from the Planckian locus in CIE 1960 uv (dng_temperature.cpp of the DNG SDK)."""

ISOTHERMS: Floats = np.array(
    [
        (0, 0.18006, 0.26352, -0.24341), (10, 0.18066, 0.26589, -0.25479),
        (20, 0.18133, 0.26846, -0.26876), (30, 0.18208, 0.27119, -0.28539),
        (40, 0.18293, 0.27407, -0.30470), (50, 0.18388, 0.27709, -0.32675),
        (60, 0.18494, 0.28021, -0.35156), (70, 0.18611, 0.28342, -0.37915),
        (80, 0.18740, 0.28668, -0.40955), (90, 0.18880, 0.28997, -0.44278),
        (100, 0.19032, 0.29326, -0.47888), (125, 0.19462, 0.30141, -0.58204),
        (150, 0.19962, 0.30921, -0.70471), (175, 0.20525, 0.31647, -0.84901),
        (200, 0.21142, 0.32312, -1.0182), (225, 0.21807, 0.32909, -1.2168),
        (250, 0.22511, 0.33439, -1.4512), (275, 0.23247, 0.33904, -1.7298),
        (300, 0.24010, 0.34308, -2.0637), (325, 0.24792, 0.34655, -2.4681),
        (350, 0.25591, 0.34951, -2.9641), (375, 0.26400, 0.35200, -3.5814),
        (400, 0.27218, 0.35407, -4.3633), (425, 0.28039, 0.35577, -5.3762),
        (450, 0.28863, 0.35714, -6.7262), (475, 0.29685, 0.35823, -8.5955),
        (500, 0.30505, 0.35907, -11.324), (525, 0.31320, 0.35968, -15.628),
        (550, 0.32129, 0.36011, -23.325), (575, 0.32931, 0.36038, -40.770),
        (600, 0.33724, 0.36051, -116.45),
    ]
)  # fmt: skip
"""Mired, u, v and slope of the isotherm: Robertson, "Computation of Correlated Color Temperature and
Distribution Temperature", J. Opt. Soc. Am. 58, 1968, as in Wyszecki and Stiles, Color Science, 1982."""

_MIRED, _UV = ISOTHERMS[:, 0], ISOTHERMS[:, 1:3]
_ACROSS = np.stack([np.ones(len(ISOTHERMS)), ISOTHERMS[:, 3]], 1) / np.hypot(1, ISOTHERMS[:, 3:])


_START = 5000.0
_PASSES, _NEAR = 30, 1e-3


class Light(NamedTuple):
    """The colour of a light.

    Attributes:
        ct: Correlated colour temperature in kelvin, from 1667.
        tint: Adobe's: positive for greener light, which raw converters answer with magenta.
        duv: Distance from the Planckian locus in CIE 1960 uv, positive above it (greener).
    """

    ct: float
    tint: float
    duv: float


def of_white(r: float, b: float, camera: Camera) -> Light | None:
    """Return the light under which white has R/G = r and B/G = b.

    A camera with matrices for several lights needs the light to have the matrix and the matrix to have the
    light, so one is found from the other in turn: DNG Specification 1.7, chapter 6. Where that swings
    between two lights, the answer lies midway, in mired.

    Args:
        r: R/G.
        b: B/G.
        camera: What made the numbers.

    Returns:
        The light; None where the camera has no matrix, or to its matrix this is no colour of a light.
    """
    kelvin, before = _START, _START
    for _ in range(_PASSES if camera.matrices else 1):
        light = _seen(r, b, camera.matrix(kelvin))
        if light is None or abs(1e6 / light.ct - 1e6 / kelvin) < _NEAR:
            return light
        before, kelvin = kelvin, light.ct
    return _seen(r, b, camera.matrix(2 / (1 / before + 1 / kelvin)))


def _seen(r: float, b: float, xyz_to_camera: Array | None) -> Light | None:
    if xyz_to_camera is None:
        return None
    try:
        x, y, z = np.linalg.solve(np.asarray(xyz_to_camera, np.float64), [r, 1.0, b])
    except np.linalg.LinAlgError:
        return None
    total = x + 15 * y + 3 * z
    if not (math.isfinite(total) and total > 0 and y > 0):
        return None
    return of_uv(4 * x / total, 6 * y / total)


def of_xy(x: float, y: float) -> Light:
    """Return the light of CIE 1931 chromaticities, y above 0."""
    total = 3 - 2 * x + 12 * y
    return of_uv(4 * x / total, 6 * y / total)


def of_uv(u: float, v: float) -> Light:
    """Return the light of CIE 1960 chromaticities by Robertson's method: interpolate between isotherms."""
    away = np.array([u, v]) - _UV
    # How far the point lies beyond each isotherm, towards lower temperatures.
    beyond = away[:, 1] * _ACROSS[:, 0] - away[:, 0] * _ACROSS[:, 1]
    after = int(np.argmax(beyond <= 0)) if (beyond <= 0).any() else len(beyond) - 1
    after = max(after, 1)
    span = float(beyond[after - 1] - beyond[after])
    share = min(max(float(beyond[after - 1]) / span, 0.0), 1.0) if span > 0 else 1.0
    mired, locus, across = _between(after - 1, share)
    duv = -float((np.array([u, v]) - locus) @ across)
    return Light(1e6 / max(mired, 1e-3), TINT * duv, duv)


def _between(before: int, share: float) -> tuple[float, Floats, Floats]:
    """Return mired, uv and the direction of the isotherm between two of the table."""
    mired, uv, across = (
        (1 - share) * values[before] + share * values[before + 1] for values in (_MIRED, _UV, _ACROSS)
    )
    return float(mired), uv, across / np.linalg.norm(across)
