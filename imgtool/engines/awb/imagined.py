"""Imagined cameras: smooth random spectral sensitivities, with white points in the range of real sensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from imgtool.engines.awb.camera import Camera, Locus

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

WAVELENGTHS = np.arange(380.0, 731.0, 5.0)
"""Nanometres at which spectra are sampled."""
D65 = np.array([0.95047, 1.0, 1.08883])
"""XYZ of the white of sRGB (IEC 61966-2-1)."""
D65_CT = 6504.0
MIDDLE_CT = 5000.0
"""Colour temperature at which the white of a camera is drawn."""
REDS, BLUES = (0.28, 0.8), (0.4, 0.9)
"""R/G and B/G of white at ``MIDDLE_CT``."""
PEAKS = ((594.0, 618.0), (524.0, 542.0), (455.0, 474.0))
"""Nanometres between which red, green and blue are most sensitive."""
WIDTHS = (((22.0, 34.0), (28.0, 45.0)), ((32.0, 46.0), (34.0, 48.0)), ((24.0, 38.0), (26.0, 42.0)))
"""Standard deviations in nm on the short and on the long side of each peak."""
CROSSTALK = 0.08
"""Most that a channel sees in a broad second lobe, beside its peak of 1."""
CUTS = ((395.0, 425.0), (645.0, 700.0))
"""Nanometres at which the filters against ultraviolet and infrared pass half."""
REFLECTANCES, WAVES = 96, 6
WHITE_WEIGHT = 10.0
"""How often a white surface counts in the fit of a colour matrix."""


def _lobe(peak: float, short: float, long: float) -> Floats:
    """Return a Gaussian of different standard deviations on both sides of its peak."""
    width = np.where(peak > WAVELENGTHS, short, long)
    lobe: Floats = np.exp(-0.5 * ((WAVELENGTHS - peak) / width) ** 2)
    return lobe


@lru_cache(maxsize=1)
def matching() -> Floats:
    """Return the CIE 1931 colour matching functions ``(3, N)`` at ``WAVELENGTHS``.

    The multi-lobe fit of Wyman, Sloan and Shirley, "Simple Analytic Approximations to the CIE XYZ Color
    Matching Functions", JCGT 2(2), 2013.
    """
    x = 1.056 * _lobe(599.8, 37.9, 31.0) + 0.362 * _lobe(442.0, 16.0, 26.7) - 0.065 * _lobe(501.1, 20.4, 26.2)
    y = 0.821 * _lobe(568.8, 46.9, 40.5) + 0.286 * _lobe(530.9, 16.3, 31.1)
    z = 1.217 * _lobe(437.0, 11.8, 36.0) + 0.681 * _lobe(459.0, 26.0, 13.8)
    return np.stack([x, y, z])


def planck(ct: float) -> Floats:
    """Return the spectrum of a black body at ``WAVELENGTHS``, 1 at 560 nm (Planck's law).

    Args:
        ct: Temperature in kelvin, above 0.
    """
    second = 1.438776877e7 / ct  # hc/k in nanometre kelvin
    spectrum: Floats = (560 / WAVELENGTHS) ** 5 * np.expm1(second / 560) / np.expm1(second / WAVELENGTHS)
    return spectrum


@lru_cache(maxsize=1)
def _reflectances() -> Floats:
    """Return smooth reflectances ``(REFLECTANCES, N)`` in 0..1, as most surfaces have, and white's ones."""
    rng = np.random.default_rng(0)
    order = np.arange(WAVES)
    phase = (WAVELENGTHS - WAVELENGTHS[0]) / (WAVELENGTHS[-1] - WAVELENGTHS[0])
    waves = np.cos(np.pi * order[:, None] * phase)
    surfaces = rng.normal(0, 1.6 / (1 + order), (REFLECTANCES, WAVES)) @ waves - 0.6
    white = np.full((1, WAVELENGTHS.size), WHITE_WEIGHT)
    return np.concatenate([1 / (1 + np.exp(-surfaces)), white])


def sensitivities(rng: np.random.Generator) -> Floats:
    """Draw the spectral sensitivities ``(3, N)`` of red, green and blue; the largest is about 1."""
    (low, high), (near, far) = CUTS
    short, long = rng.uniform(low, high), rng.uniform(near, far)
    passed = 1 / ((1 + np.exp((short - WAVELENGTHS) / 6)) * (1 + np.exp((WAVELENGTHS - long) / 8)))
    curves = []
    for peak, (left, right) in zip(PEAKS, WIDTHS, strict=True):
        own = _lobe(rng.uniform(*peak), rng.uniform(*left), rng.uniform(*right))
        stray = rng.uniform(0, CROSSTALK) * _lobe(rng.uniform(430, 640), 60, 60)
        curves.append((own + stray) * passed)
    return np.stack(curves)


def colour_matrix(seen: Array) -> Floats:
    """Return the matrix from XYZ to a camera's RGB that fits smooth surfaces in the light of D65 best.

    The light is a black body of D65's temperature, whose spectrum needs no table. White counts most.

    Args:
        seen: ``(3, N)`` spectral sensitivities at ``WAVELENGTHS``.

    Returns:
        ``(3, 3)``, scaled so that G of D65 white is 1.
    """
    lit = _reflectances() * planck(D65_CT)
    fitted = np.linalg.lstsq(lit @ matching().T, lit @ np.asarray(seen, np.float64).T, rcond=None)[0].T
    matrix: Floats = fitted / (fitted[1] @ D65)
    return matrix


def imagine(rng: np.random.Generator) -> Camera:
    """Draw a camera: its name, its colour matrix and the curve of white points that follows from it.

    R/G and B/G of white at 5000 K are drawn evenly in their logarithm; how they change with the light
    follows from the sensitivities.
    """
    matrix = colour_matrix(sensitivities(rng))
    red, green, blue = matrix @ (matching() @ planck(MIDDLE_CT))
    r, b = np.exp(rng.uniform(*np.log([REDS, BLUES]).T))
    matrix = matrix * np.array([r * green / red, 1, b * green / blue])[:, None]
    name = f"imagined-{int(rng.integers(1 << 32)):08x}"
    return Camera(name, Locus.of_matrix(matrix), known=True, xyz_to_camera=matrix)
