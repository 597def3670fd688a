"""Fast filters: ``(H, W, 3)`` RGB, uint8 or float32 in 0..1, to float32 ``(H, W, 3)`` in 0..1.

``random_conv`` alone returns ``(H, W)``.
"""

from __future__ import annotations

import random
from typing import Annotated

import cv2
import numpy as np

from imgtool.engines.filter.edges import correlate, shuffled
from imgtool.engines.filter.pixels import (
    Floats,
    Limits,
    Pixels,
    Seed,
    Sigma,
    Strength,
    Window,
    eight_bit,
    mirrored,
    unit,
)

Amount = Annotated[float, Limits(-1, 20)]
Tiles = Annotated[int, Limits(1, 64)]


def reach_of(sigma: float) -> int:
    """Return how far a gaussian reaches: 4 sigma, to the nearest pixel, at least 1."""
    return max(1, round(4 * sigma))


def gaussian(image: Pixels, sigma: Sigma = 2.0) -> Floats:
    """Return the photo smoothed by a gaussian, cut off at 4 sigma, in float32.

    Args:
        image: The photo.
        sigma: Standard deviation in pixels.
    """
    size = 2 * reach_of(sigma) + 1
    found: Floats = cv2.GaussianBlur(unit(image), (size, size), sigma)
    return found


def unsharp(image: Pixels, sigma: Sigma = 2.0, amount: Amount = 1.0) -> Floats:
    """Return the photo sharpened by what a gaussian takes away, clipped to 0..1, in float32.

    Args:
        image: The photo.
        sigma: Of the gaussian, in pixels.
        amount: How many times the difference is added.
    """
    found: Floats = cv2.addWeighted(unit(image), 1 + amount, gaussian(image, sigma), -amount, 0)
    return np.clip(found, 0, 1, out=found)


def median(image: Pixels, size: Window = 5) -> Floats:
    """Return the median of each colour in a square window, on 8 bits (Tukey 1977).

    Args:
        image: The photo.
        size: Edge of the window in pixels.
    """
    return unit(mirrored(lambda pixels: cv2.medianBlur(pixels, size), eight_bit(image), size // 2))


def erode(image: Pixels, size: Window = 5) -> Floats:
    """Return the least value of each colour in a square window.

    Args:
        image: The photo.
        size: Edge of the window in pixels.
    """
    return unit(cv2.erode(image, np.ones((size, size), np.uint8)))


def dilate(image: Pixels, size: Window = 5) -> Floats:
    """Return the largest value of each colour in a square window.

    Args:
        image: The photo.
        size: Edge of the window in pixels.
    """
    return unit(cv2.dilate(image, np.ones((size, size), np.uint8)))


def clahe(image: Pixels, clip: Strength = 2.0, tiles: Tiles = 8) -> Floats:
    """Return the photo with the histogram of its CIELAB lightness equalised in parts, on 8 bits.

    OpenCV's contrast-limited adaptive histogram equalisation: Zuiderveld, Graphics Gems IV, 1994.

    Args:
        image: The photo.
        clip: Largest slope of the curve of a part.
        tiles: Parts along each side of the photo.
    """
    lab = cv2.cvtColor(eight_bit(image), cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(clip, (tiles, tiles)).apply(np.ascontiguousarray(lab[..., 0]))
    return unit(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB))


def random_conv(image: Pixels, seed: Seed = 41) -> Floats:
    """Return a random 3x3 convolution of the three colours to one, in 0..1.

    As the original draws it: 27 uniform numbers of 0..1, shuffled, sum 1; by default with its seed. The photo
    is mirrored, where the original adds zeros.
    """
    rng = random.Random(seed)
    kernel = shuffled([rng.random() for _ in range(27)], rng)
    return np.clip(correlate(unit(image), kernel), 0, 1)
