"""What filters share: kinds of pixels, a mirrored border, and the limits of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[Any]
"""uint8, or float32 in 0..1."""

Floats = npt.NDArray[Any]
"""float32; the stubs of OpenCV tell no type so narrow."""


# --- limits ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """Between what a parameter must lie, both ends included, and whether it must be odd."""

    least: float
    most: float
    odd: bool = False

    def allow(self, value: float) -> bool:
        """Tell whether a value is allowed."""
        return self.least <= value <= self.most and (not self.odd or value % 2 == 1)

    def __str__(self) -> str:
        """Say what is allowed."""
        return f"{'odd and ' if self.odd else ''}from {self.least:g} to {self.most:g}"


Window = Annotated[int, Limits(3, 99, odd=True)]
"""Edge of a square window in pixels, its centre being a pixel."""

Radius = Annotated[int, Limits(1, 64)]
"""Of a window, in pixels."""

Sigma = Annotated[float, Limits(0.1, 50)]
"""Standard deviation of distances, in pixels."""

Tone = Annotated[float, Limits(0.001, 10)]
"""Standard deviation of differences of values, where white is 1."""

Strength = Annotated[float, Limits(1e-6, 1e6)]
"""A weight, a divisor or a level above zero."""

Factor = Annotated[float, Limits(1.01, 100)]
"""From one iteration to the next."""

Count = Annotated[int, Limits(1, 1000)]
"""Number of iterations."""

Seed = Annotated[int, Limits(0, 2**31 - 1)]
"""Of a generator of random numbers."""


# --- pixels ----------------------------------------------------------------------------------


def unit(image: Pixels) -> Floats:
    """Return pixels as float32, integers scaled to 0..1; float32 itself is returned, not a copy."""
    if image.dtype.kind == "f":
        return image.astype(np.float32, copy=False)
    return image.astype(np.float32) / np.float32(np.iinfo(image.dtype).max)


def eight_bit(image: Pixels) -> npt.NDArray[np.uint8]:
    """Return pixels as uint8, rounded to nearest; uint8 itself is returned, not a copy."""
    if image.dtype == np.uint8:
        return image
    levels: npt.NDArray[np.uint8] = np.rint(np.clip(unit(image), 0, 1) * 255).astype(np.uint8)
    return levels


def grey(image: Pixels) -> Floats:
    """Return 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), ``(H, W)``, not rounded."""
    found: Floats = cv2.cvtColor(unit(image), cv2.COLOR_RGB2GRAY)
    return found


def mirrored(run: Callable[[Pixels], Pixels], image: Pixels, margin: int) -> Pixels:
    """Run a filter on a photo with a mirrored margin, and cut the margin off.

    For filters that treat the border in another way, or refuse photos smaller than their window: a filter
    that reaches no farther than ``margin`` then mirrors the photo without repeating the edge.
    """
    sides = (margin, margin, margin, margin)
    found = run(cv2.copyMakeBorder(image, *sides, cv2.BORDER_REFLECT_101))
    return np.ascontiguousarray(found[margin : margin + image.shape[0], margin : margin + image.shape[1]])
