"""Distorted photographs from straight ones, with nothing in them that tells the distortion but its bends.

Every sample, also one that is not distorted, is cut, mirrored, zoomed, shifted and resampled in the same
way. No border ever shows: the part of the straight photo that is seen is always inside it. The zoom is
mostly random, so that it does not tell how strong the distortion is. What is drawn is a function of a
``numpy.random.Generator``, so a seed and a number give one sample.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from imgtool.engines.lens import geometry
from imgtool.engines.lens.geometry import BrownConrady

Picture = npt.NDArray[Any]
Plane = npt.NDArray[np.float32]

ASPECTS = (1.0, 4 / 3, 3 / 2, 3 / 2, 16 / 9, 3 / 4, 2 / 3)
"""Width over height of the samples; 3:2, the commonest, twice."""
NODES = 48
"""Nodes per side at which the inverse is computed."""
STEPS = 16
"""Newton steps there."""
OVERSAMPLED = 2
"""Pixels per pixel and direction that are interpolated and then averaged: no aliasing in the corners."""
SMALLEST_CROP, WIDEST_VIEW, NARROWEST_VIEW = 0.7, 1.0, 0.75
QUALITIES = (60, 98)


class Made(NamedTuple):
    """A sample: photo and straight partner, ``(H, W, 3)`` uint8, and the model between them."""

    distorted: Picture
    straight: Picture
    model: BrownConrady


class View(NamedTuple):
    """Where the straight picture lies in a clean photo: at ``scale`` (x, y) + ``shift``, normalised."""

    scale: float
    right: float = 0.0
    down: float = 0.0


@lru_cache(maxsize=16)
def _interpolation(size: int, half: float) -> tuple[npt.NDArray[np.float64], Plane]:
    """Return Chebyshev nodes in -half..half and the ``(size, NODES)`` matrix from values there to pixels."""
    nodes = np.cos(np.pi * (np.arange(NODES) + 0.5) / NODES)
    pixels = (2 * np.arange(size) + 1 - size) / size
    chebyshev = np.polynomial.chebyshev.chebvander
    matrix = chebyshev(pixels, NODES - 1) @ np.linalg.inv(chebyshev(nodes, NODES - 1))
    return nodes * half, matrix.astype(np.float32)


def _product(first: Plane, second: Plane) -> Plane:
    """Multiply two matrices with OpenCV, which starts no threads for it as BLAS does."""
    return cv2.gemm(first, second, 1, np.empty((0, 0), np.float32), 0)  # type: ignore[return-value]


def inverse_map(model: BrownConrady, width: int, height: int) -> tuple[Plane, Plane]:
    """Return where every pixel of a distorted photo lies in the straight picture, normalised.

    The inverse is smooth, so Newton's method is used at Chebyshev nodes only and the polynomial through
    them does the rest: within 0.02 pixels of 2000 for what ``prior`` draws.

    Args:
        model: The distortion.
        width: Of the photo.
        height: The same.

    Returns:
        x and y, ``(height, width)``.
    """
    half_width, half_height = geometry.half_size(width, height)
    x, across = _interpolation(width, half_width)
    y, down = _interpolation(height, half_height)
    planes = (plane.astype(np.float32) for plane in model.undistort(*np.meshgrid(x, y), STEPS))
    first, second = (_product(_product(down, plane), across.T) for plane in planes)
    return first, second


def straight_map(width: int, height: int) -> tuple[Plane, Plane]:
    """Return the normalised coordinates of every pixel of a straight picture, ``(height, width)``."""
    x, y = geometry.normalise(
        np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None], width, height
    )
    first, second = np.broadcast_arrays(x, y)
    return first.copy(), second.copy()


def zoom(model: BrownConrady, width: int, height: int) -> float:
    """Return the largest scale at which photo and straight partner show nothing outside the clean photo.

    Raises:
        ValueError: The model folds before it reaches the corners of the photo.
    """
    return min(geometry.zoom(model, width, height, "keep"), 1.0)


def draw_view(model: BrownConrady, width: int, height: int, rng: np.random.Generator) -> View:
    """Draw a zoom and a shift that keep the whole view inside the clean photo.

    Args:
        model: The distortion.
        width: Of the clean photo, or anything of its shape.
        height: The same.
        rng: Source of all that is random.

    Raises:
        ValueError: The model folds before it reaches the corners of the photo.
    """
    most = zoom(model, width, height)
    scale = min(most, float(rng.uniform(NARROWEST_VIEW, WIDEST_VIEW))) * 0.995
    free = np.array(geometry.half_size(width, height)) * (1 - scale / most)
    right, down = (free * rng.uniform(-1, 1, 2)).tolist()
    return View(scale, right, down)


def look(clean: Picture, x: Plane, y: Plane, view: View) -> Picture:
    """Resample a clean photo at normalised coordinates of the straight picture, cubic.

    Args:
        clean: ``(H, W, 3)``.
        x: ``(h, w)``.
        y: The same.
        view: Where the straight picture lies in the clean photo.
    """
    height, width = clean.shape[:2]
    unit = view.scale * geometry.diagonal(width, height) / 2
    right, down = geometry.pixels(view.right, view.down, width, height)
    columns, rows = x * unit + right, y * unit + down
    return cv2.remap(clean, columns, rows, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def crop(photo: Picture, rng: np.random.Generator) -> Picture:
    """Cut a random part of a usual aspect out of a photo, mirrored half of the time."""
    height, width = photo.shape[:2]
    aspect = float(rng.choice(ASPECTS)) * float(rng.uniform(0.985, 1.015))
    share = float(rng.uniform(SMALLEST_CROP, 1))
    wide = max(round(share * min(width, height * aspect)), 1)
    high = max(round(share * min(height, width / aspect)), 1)
    top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
    part = photo[top : top + high, left : left + wide]
    return np.ascontiguousarray(part[:, ::-1] if rng.random() < 0.5 else part)


def degrade(photo: Picture, rng: np.random.Generator) -> Picture:
    """Add a little blur, noise and JPEG, as cameras and websites do."""
    degraded = cv2.GaussianBlur(photo.astype(np.float32), (0, 0), float(rng.uniform(0.2, 1.2)))
    noise: Picture = rng.standard_normal(photo.shape, dtype=np.float32)
    degraded = degraded + noise * float(np.exp(rng.uniform(np.log(0.3), np.log(8))))
    whole = np.rint(np.clip(degraded, 0, 255)).astype(np.uint8)
    quality = int(rng.integers(QUALITIES[0], QUALITIES[1] + 1))
    data = cv2.imencode(".jpg", whole[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded: Any = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return np.ascontiguousarray(decoded[..., ::-1])


def distorted(
    photo: Picture,
    model: BrownConrady,
    rng: np.random.Generator,
    size: int,
    noisy: float = 0.0,
    partner: bool = True,
) -> Made:
    """Make a distorted photo and its straight partner from a part of a clean, straight photo.

    The partner has the same size and, in the middle, the same scale: pixel u of it lies at
    ``model.distort(u)`` of the distorted photo (``crop`` "same" in ``infer``).

    Args:
        photo: ``(H, W, 3)`` uint8 sRGB.
        model: The distortion.
        rng: Source of all that is random.
        size: Longer side of what is made, in pixels; less where the photo has no more to show.
        noisy: Share of samples whose distorted photo gets blur, noise and JPEG.
        partner: Make the straight partner, else leave it empty, ``(0, 0, 3)``; nothing else depends on it.

    Raises:
        ValueError: The model folds before it reaches the corners of the photo.
    """
    clean = crop(photo, rng)
    height, width = clean.shape[:2]
    view = draw_view(model, width, height, rng)
    longer = max(height, width)
    edge = max(min(size, round(view.scale * longer)), 2)
    wide, high = (max(round(edge * each / longer), 1) for each in (width, height))
    shrink = OVERSAMPLED * edge / (view.scale * longer)
    if shrink < 1:
        smaller = (max(round(width * shrink), 1), max(round(height * shrink), 1))
        clean = cv2.resize(clean, smaller, interpolation=cv2.INTER_AREA)
    fine = (OVERSAMPLED * wide, OVERSAMPLED * high)

    def seen(x: Plane, y: Plane) -> Picture:
        return cv2.resize(look(clean, x, y, view), (wide, high), interpolation=cv2.INTER_AREA)

    bent = seen(*inverse_map(model, *fine))
    straight = seen(*straight_map(*fine)) if partner else np.empty((0, 0, 3), np.uint8)
    return Made(degrade(bent, rng) if rng.random() < noisy else bent, straight, model)
