"""The photo that coefficients are read for, and what of them is believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from typing import NamedTuple

import numpy as np

from imgtool.engines.lens.geometry import BrownConrady, diagonal
from imgtool.errors import ImgtoolError

Say = Callable[[str], None]
FIELDS = tuple(field.name for field in fields(BrownConrady))
"""The coefficients of the model."""
MOST = 50.0
"""Largest coefficient that is believed."""
SAME_ASPECT = 0.01
"""Relative difference of two aspect ratios that are still the same."""
TOLD = 0.0005
"""An approximation that misses by more, in half diagonals, is told: half a pixel of 2000."""


class Frame(NamedTuple):
    """The photo that coefficients are read for."""

    width: int
    height: int
    focal_mm: float | None
    say: Say

    def approximated(self, missed: float, why: str) -> None:
        """Tell of an approximation that can be seen; ``missed`` in half diagonals."""
        if missed > TOLD:
            wrong = missed * diagonal(self.width, self.height) / 2
            self.say(f"approximated, wrong by {wrong:.1f} pixels at most: {why}")

    def fitted(self, model: BrownConrady, width: int, height: int) -> BrownConrady:
        """Return the model of a picture of another size for the photo.

        Raises:
            ImgtoolError: The pictures differ in their aspect.
        """
        own = self.width / self.height
        if abs(width / height / own - 1) <= SAME_ASPECT:
            return model
        if abs(height / width / own - 1) <= SAME_ASPECT:
            return self.upright(model, turned=True)
        raise ImgtoolError(
            f"its coefficients are for {width}x{height} pixels, the photo has {self.width}x{self.height}",
            "photos of another aspect were cropped: calibrate them apart",
        )

    def upright(self, model: BrownConrady, turned: bool | None = None) -> BrownConrady:
        """Return the radial part where the camera was turned: which way is not known."""
        turned = self.height > self.width if turned is None else turned
        if turned and (model.p1 or model.p2 or model.cx or model.cy):
            self.say("the photo is turned against its calibration: p1, p2 and the centre are left out")
            return replace(model, p1=0.0, p2=0.0, cx=0.0, cy=0.0)
        return model


def at_focal(models: Sequence[tuple[float, BrownConrady]], frame: Frame) -> BrownConrady:
    """Return the model at the photo's focal length, between two of them linearly."""
    byfocal = dict(sorted(models, key=lambda pair: pair[0]))
    if len(byfocal) == 1:
        return next(iter(byfocal.values()))
    if not frame.focal_mm:
        least, most = min(byfocal), max(byfocal)
        raise ImgtoolError(
            f"it has {len(byfocal)} focal lengths, {least:g} to {most:g} mm, and the photo's is unknown",
            "keep the calibration of the photo's focal length only",
        )
    table = np.array([[getattr(model, field) for field in FIELDS] for model in byfocal.values()])
    values = [float(np.interp(frame.focal_mm, list(byfocal), column)) for column in table.T]
    return BrownConrady(*values)


def believed(model: BrownConrady) -> BrownConrady:
    """Return the model where its values are finite and not beyond belief."""
    for name, value in asdict(model).items():
        if not abs(value) <= MOST:
            raise ImgtoolError(
                f"{name} would be {value:.3g} half diagonals, which no lens has", "check the units"
            )
    return model


def number(text: object, name: str) -> float:
    """Return a text as a finite number; ``name`` is what an error calls it."""
    try:
        value = float(str(text))
    except ValueError:
        raise ImgtoolError(f"{name} is {str(text)[:40]!r}, not a number") from None
    if not math.isfinite(value):
        raise ImgtoolError(f"{name} is {value}, not a finite number")
    return value
