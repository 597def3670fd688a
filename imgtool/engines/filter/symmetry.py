"""Changes of a photo that a filter goes along with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imgtool import images
from imgtool.engines.filter import synthetic
from imgtool.engines.filter.targets import Target

Picture = npt.NDArray[Any]

ALIKE = 0.1 / 255
"""Mean difference up to which what a filter makes of a changed picture is its result, changed."""


@dataclass(frozen=True)
class Symmetries:
    """Changes of a photo that a filter goes along with: they make several samples of one.

    Attributes:
        turned: What it makes of a photo mirrored and turned is its result, mirrored and turned.
        colours: What it makes of a photo whose colours are exchanged is its result, with them exchanged.
        negative: What it makes of a negative: "negative" of the result, the "same" result, or "" neither.
    """

    turned: bool = False
    colours: bool = False
    negative: str = ""

    def changed(self, seen: Picture, wanted: Picture, rng: np.random.Generator) -> tuple[Picture, Picture]:
        """Return a sample changed at random: what a network sees, uint8, and what is wanted, float32."""
        if self.turned:
            quarter, mirror = int(rng.integers(4)), bool(rng.integers(2))
            seen, wanted = (np.rot90(p[:, ::-1] if mirror else p, quarter) for p in (seen, wanted))
        if self.colours:
            order = rng.permutation(3)
            seen, wanted = seen[..., order], wanted[..., order] if wanted.shape[2] == 3 else wanted
        if self.negative and rng.random() < 0.5:
            seen = 255 - seen
            wanted = 1 - wanted if self.negative == "negative" else wanted
        return seen, wanted


def symmetries(target: Target) -> Symmetries:
    """Try a filter on a small drawn picture.

    Where it does not go along, as with directed kernels, iterations that sweep in one direction, or grey that
    weighs the colours, changed samples would teach what the filter does not do.
    """
    probe = synthetic.leaves(np.random.default_rng(1), 40, 56)
    photo = images.to_type(probe, np.uint8)
    plain = target.map(photo)

    def alike(changed: Picture, wanted: Picture) -> bool:
        found = target.map(np.ascontiguousarray(changed))
        return found.shape == wanted.shape and float(np.abs(found - wanted).mean()) <= ALIKE

    order = [1, 2, 0]
    forms = {"negative": 1 - plain, "same": plain}
    return Symmetries(
        alike(photo[:, ::-1], plain[:, ::-1]) and alike(np.rot90(photo), np.rot90(plain)),
        alike(photo[..., order], plain[..., order] if plain.shape[2:] == (3,) else plain),
        next((name for name, wanted in forms.items() if alike(255 - photo, wanted)), ""),
    )
