"""The rival that is easily forgotten: the filter on a smaller photo, enlarged with the photo as guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from imgtool.engines.filter import targets
from imgtool.engines.filter.targets import Target

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[Any]
Number = int | float

RADIUS, EPS = 2, 1e-4
"""Of the fit: windows of (2 RADIUS + 1)^2 small pixels, and what is added to the variance of 0..1."""


def _times(value: Number, factor: float) -> Number:
    return value * factor


def _sigma(value: Number, factor: float) -> Number:
    """Scale a sigma of distances, to at least a tenth of a pixel."""
    return max(0.1, value * factor)


def _slowly(value: Number, factor: float) -> Number:
    """Scale by the fourth root of the factor."""
    return float(value * factor**0.25)


def _radius(value: Number, factor: float) -> Number:
    """Scale a radius, rounded to nearest, halves up, at least 1."""
    return max(1, int(value * factor + 0.5))


def _diameter(value: Number, factor: float) -> Number:
    """Scale the radius of a window whose edge is odd."""
    return 2 * int(_radius(value // 2, factor)) + 1


def _area(value: Number, factor: float) -> Number:
    """Scale as an area; whole numbers stay whole, at least 1."""
    scaled = value * factor * factor
    return max(1, int(scaled + 0.5)) if isinstance(value, int) else scaled


SCALED: Mapping[str, Mapping[str, Callable[[Number, float], Number]]] = {
    "gaussian": {"sigma": _sigma},
    "unsharp": {"sigma": _sigma},
    "median": {"size": _diameter},
    "erode": {"size": _diameter},
    "dilate": {"size": _diameter},
    "bilateral": {"d": _diameter, "ss": _sigma},
    "guided": {"radius": _radius},
    "anisotropic": {"n": _area},
    "tv": {"weight": _times},
    "nlm": {"h": _slowly, "patch": _diameter, "search": _diameter},
    "rolling_guidance": {"ss": _sigma},
    "weighted_median": {"radius": _radius},
    "wls": {"lam": _area},
    "rtv": {"sigma": _sigma},
}
"""Filter to parameter to how it goes with the size of the photo; all others stay as they are.

Distances are those of pixels. The sum of gradients goes with the length of edges, that of squared gradients
stays, and the squared change that weights compare them with goes with the area, as the time of a diffusion
does. A smaller photo has less noise for nlm: the fourth root was nearest on photographs at half and at
quarter size.
"""


def at_size(target: Target, factor: float) -> Target:
    """Return the filter whose effect on a photo scaled by ``factor`` is nearest to that on the photo.

    >>> at_size(targets.parse("bilateral"), 0.5).spec
    'bilateral:d=5,ss=1.5'
    """
    scaled = SCALED.get(target.name, {})
    if not scaled:
        return target
    name, _, rest = target.spec.partition(":")
    given = dict(part.split("=") for part in rest.split(",") if part)
    values = {word: type(usual)(given.get(word, usual)) for word, usual in targets.parameters(name).items()}
    values |= {word: rule(values[word], factor) for word, rule in scaled.items()}
    return targets.parse(f"{name}:" + ",".join(f"{word}={value}" for word, value in values.items()))


def reduced(target: Target, photo: Pixels, factor: float) -> Floats:
    """Return the map of a photo, ``(H, W, 3)`` uint8, by way of one of ``factor`` times its size.

    Returns:
        As ``target.map``: float32 ``(H, W)`` or ``(H, W, C)``.
    """
    height, width = (max(1, round(length * factor)) for length in photo.shape[:2])
    small = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA)
    found = at_size(target, factor).map(small)
    if target.channels != 3:
        photo, small = (_greys(each, target.channels) for each in (photo, small))
    return guided(targets.unit(small), found, targets.unit(photo))


def _greys(image: Pixels, channels: int) -> Pixels:
    return np.asarray(cv2.merge([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)] * channels))


def guided(small: Floats, found: Floats, photo: Floats, radius: int = RADIUS, eps: float = EPS) -> Floats:
    """Enlarge what a filter made of a small photo so that its edges are those of the photo.

    He and Sun, "Fast guided filter", 2015, each channel guided by the same one of the photo: the result is
    a I + b, where a and b fit the filtered small photo to the small photo in windows; their means over
    windows are enlarged bilinearly. Windows mirror the border without repeating the edge.

    Args:
        small: The small photo, ``(h, w)`` or ``(h, w, C)`` in 0..1.
        found: What the filter made of it, the same shape.
        photo: The photo, ``(H, W)`` or ``(H, W, C)``.
        radius: Of the windows, in small pixels.
        eps: Added to the variance of a window.

    Returns:
        float32, the shape of ``photo``.
    """

    def mean(values: npt.NDArray[Any]) -> Floats:
        edge = 2 * radius + 1
        return np.asarray(cv2.blur(values, (edge, edge)), np.float32)

    centre, level = mean(small), mean(found)
    slope = (mean(small * found) - centre * level) / (mean(small * small) - centre * centre + eps)
    size = (photo.shape[1], photo.shape[0])
    slopes, result = (
        np.asarray(cv2.resize(mean(each), size, interpolation=cv2.INTER_LINEAR), np.float32)
        for each in (slope, level - slope * centre)
    )
    result += slopes * photo
    return result
