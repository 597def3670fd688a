"""Local Laplacian filters: detail at all scales, without halos."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import cv2
import numpy as np

from imgtool.engines.filter.pixels import Floats, Limits, Pixels, Tone, grey, unit

Detail = Annotated[float, Limits(-1, 10)]
Levels = Annotated[int, Limits(2, 256)]

DARK = 0.01
"""Added to both sides of the ratio by which colours follow the grey photo."""


def local_laplacian(image: Pixels, detail: Detail = 1.0, sigma: Tone = 0.1, levels: Levels = 12) -> Floats:
    """Return the photo with more detail (or less) at all scales, edges kept, clipped to 0..1, in float32.

    Fast local Laplacian filters: Aubry, Paris, Hasinoff, Kautz and Durand, ACM TOG 33(5), 2014, after Paris,
    Hasinoff and Kautz, 2011. A Laplacian pyramid of the grey photo takes each coefficient from photos whose
    differences d from one of ``levels`` greys grew by ``detail`` d exp(-d^2 / (2 sigma^2)), interpolated
    between the two greys next to its own. Colours keep their ratios.

    Args:
        image: The photo.
        detail: How much is added: -1 takes detail away, 0 changes nothing.
        sigma: Differences that count as detail, where white is 1.
        levels: Greys, from black to white.
    """
    values = unit(image)
    shade = grey(values)
    change = (_remapped(shade, detail, sigma, levels) + DARK) / (shade + DARK)
    found: Floats = np.clip(values * np.maximum(change, 0)[..., None], 0, 1)
    return found


def _remapped(shade: Floats, detail: float, sigma: float, levels: int) -> Floats:
    depth = max(1, int(np.log2(max(1, min(shade.shape)))))
    tones = _gaussian_pyramid(shade, depth)
    out = [np.zeros_like(tone) for tone in tones[:-1]]
    spacing = np.float32(1 / (levels - 1))
    for number in range(levels):
        away = shade - np.float32(number) * spacing
        changed = shade + np.float32(detail) * away * np.exp(away * away / np.float32(-2 * sigma * sigma))
        for total, tone, band in zip(out, tones, _bands(_gaussian_pyramid(changed, depth)), strict=False):
            near = 1 - np.abs(np.clip(tone, 0, 1) / spacing - number)
            total += np.maximum(near, 0) * band
    found = tones[-1]
    for band in reversed(out):
        found = band + _doubled(found, band)
    return found


def _gaussian_pyramid(values: Floats, depth: int) -> list[Floats]:
    found = [values]
    for _ in range(depth):
        found.append(cv2.pyrDown(found[-1]))
    return found


def _bands(pyramid: list[Floats]) -> list[Floats]:
    return [fine - _doubled(coarse, fine) for fine, coarse in pairwise(pyramid)]


def _doubled(coarse: Floats, fine: Floats) -> Floats:
    found: Floats = cv2.pyrUp(coarse, dstsize=(fine.shape[1], fine.shape[0]))
    return found
