"""Edges: maps of derivatives, ``(H, W, 3)`` RGB to float32 ``(H, W)`` (``(H, W, 2)`` of Canny)."""

from __future__ import annotations

import random

import cv2
import numpy as np
import numpy.typing as npt

from imgtool.engines.filter.pixels import Floats, Pixels, Seed, Strength, eight_bit, grey, unit

Levels = npt.NDArray[np.uint8]

NOTHING = 1e-6
"""A maximum below this is the rounding of a flat photo."""

LEVELS = 4 * 255
"""The Sobel derivative of an 8-bit step from black to white."""


def sobel_3(image: Pixels, scale: Strength = 4.0) -> Floats:
    """Return the magnitude of the Sobel gradient, kernels of 3 pixels, of the grey photo, over ``scale``.

    Grey is 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), not rounded. At scale 4 a step from black to white
    along an axis gives 1.
    """
    return _sobel(grey(image), 3, scale)


def sobel_3_max(image: Pixels) -> Floats:
    """Return the magnitude of the Sobel gradient, kernels of 3 pixels, over the maximum of the photo.

    The grey photo is smoothed by a binomial kernel of 3x3 before: the target of the original. The map is on
    the scale at which a step along an axis gives at most 1; its last step divides and cuts to 8 bits. Unlike
    the original's, grey and smoothed grey are not rounded.
    """
    return _sobel(cv2.GaussianBlur(grey(image), (3, 3), 0), 3, 4.0)


def sobel_5_canny(image: Pixels) -> Floats:
    """Return Canny's edges of the Sobel magnitude, kernels of 5 pixels, over the maximum of the photo.

    The grey photo is smoothed by a binomial kernel of 3x3 before. The map is the magnitude, on the scale at
    which a step along an axis gives at most 1; its last step divides, cuts to 8 bits and runs Canny's filter,
    with thresholds in levels of that, as the original does.
    """
    return _sobel(cv2.GaussianBlur(grey(image), (3, 3), 0), 5, 64.0)


def _sobel(values: Floats, size: int, scale: float) -> Floats:
    across = cv2.Sobel(values, cv2.CV_32F, 1, 0, ksize=size, scale=1 / scale)
    down = cv2.Sobel(values, cv2.CV_32F, 0, 1, ksize=size, scale=1 / scale)
    return _length(across, down)


def _length(across: Floats, down: Floats) -> Floats:
    """Return the root of the sum of squares in the memory of the first; to the last bit, unlike OpenCV's."""
    across *= across
    down *= down
    across += down
    return np.sqrt(across, out=across)


def scharr(image: Pixels, scale: Strength = 16.0) -> Floats:
    """Return the magnitude of the Scharr gradient of the grey photo, over ``scale``.

    Scharr, "Optimale Operatoren in der digitalen Bildverarbeitung", Heidelberg 2000: kernels of 3 pixels
    with the weights 3, 10, 3, nearer to isotropic than Sobel's. At scale 16 a step from black to white along
    an axis gives 1.
    """
    values = grey(image)
    across = cv2.Scharr(values, cv2.CV_32F, 1, 0, scale=1 / scale)
    return _length(across, cv2.Scharr(values, cv2.CV_32F, 0, 1, scale=1 / scale))


def laplacian(image: Pixels, scale: Strength = 4.0) -> Floats:
    """Return the absolute Laplacian of the grey photo, by the four neighbours, over ``scale``.

    At scale 4 a white pixel on black gives 1, and a step from black to white 1/4.
    """
    found: Floats = np.abs(cv2.Laplacian(grey(image), cv2.CV_32F, ksize=1, scale=1 / scale))
    return found


def canny(image: Pixels) -> Floats:
    """Return OpenCV's Canny edges of the 8-bit grey photo (Canny, IEEE TPAMI 8(6), 1986), 0 or 1.

    The map is what is local in it: the Sobel derivatives to the right and down, kernels of 3 pixels, each in
    -1..1, where 1 is a step from black to white. Thinning and hysteresis are the last step, so that one map
    serves all thresholds. They compare the sum of both absolute derivatives, in levels of 8 bits.
    """
    levels = cv2.cvtColor(eight_bit(image), cv2.COLOR_RGB2GRAY)
    slopes = [cv2.Sobel(levels, cv2.CV_32F, *way, ksize=3, scale=1 / LEVELS) for way in ((1, 0), (0, 1))]
    return np.stack(slopes, axis=-1)


def random_sobel(image: Pixels, seed: Seed = 51, second: Seed = 15) -> Floats:
    """Return the magnitude of two random 3x3 convolutions like Sobel's, over the maximum of the photo.

    As the original draws them: 13 uniform numbers of 0..1, their negatives and 0, shuffled over 3x3 pixels
    and three colours, absolute sum 1; by default with its seeds. The map is the root of the sum of both
    squares, its last step divides and cuts to 8 bits. The photo is mirrored, where the original adds zeros.

    Args:
        image: The photo.
        seed: Of the first kernel.
        second: Seed of the second kernel.
    """
    values = unit(image)
    return _length(correlate(values, antisymmetric(seed)), correlate(values, antisymmetric(second)))


def antisymmetric(seed: int) -> Floats:
    """Return 27 weights, ``(3, 3, 3)`` by colour, row and column, of which 13 are the others' negatives."""
    rng = random.Random(seed)
    half = [rng.random() for _ in range(13)]
    return shuffled([*half, 0.0, *(-each for each in half)], rng)


def shuffled(weights: list[float], rng: random.Random) -> Floats:
    """Return 27 weights in random order and of absolute sum 1, ``(3, 3, 3)`` by colour, row and column."""
    rng.shuffle(weights)
    kernel = np.array(weights, np.float32).reshape(3, 3, 3)
    kernel /= np.abs(kernel).sum()
    return kernel


def correlate(values: Floats, kernel: Floats) -> Floats:
    """Return the sum of the three colours, each correlated with its 3x3 weights, ``(H, W)``."""
    parts = [cv2.filter2D(values[..., colour], -1, kernel[colour]) for colour in range(3)]
    return parts[0] + parts[1] + parts[2]


# --- last steps, of the map of a whole photo -------------------------------------------------


def over_maximum(found: Floats, most: float) -> Levels:
    """Return a map divided by its maximum and cut to 8 bits, as the original does; nothing stays black.

    Args:
        found: The map, or a part of it.
        most: The maximum of the whole map.
    """
    if most < NOTHING:
        return np.zeros(found.shape, np.uint8)
    levels = np.floor(found * np.float32(255 / most))
    levels[found >= most] = 255
    return np.clip(levels, 0, 255).astype(np.uint8)


def as_they_are(levels: Levels) -> Levels:
    """Return what divides a map and does no more."""
    return levels


def thin_edges(levels: Levels, low: Strength = 50.0, high: Strength = 150.0) -> Levels:
    """Return Canny's edges, 0 or 255, of a map over its maximum in 8 bits; thresholds in units of that."""
    return np.asarray(cv2.Canny(levels, low, high), np.uint8)


def follow_edges(found: Floats, low: Strength = 100.0, high: Strength = 200.0) -> Floats:
    """Return Canny's edges, 0 or 1, of a map of derivatives in -1..1, ``(H, W, 2)``."""
    levels = np.clip(np.rint(found * LEVELS), -LEVELS, LEVELS).astype(np.int16)
    across, down = (np.ascontiguousarray(levels[..., way]) for way in (0, 1))
    return unit(cv2.Canny(across, down, low, high))
