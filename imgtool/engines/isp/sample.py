"""What the data sets of the isp engine give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from imgtool.mosaic import Mosaic

Picture = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class Sample(NamedTuple):
    """One sample; a batch has one more dimension in front.

    Attributes:
        packed: ``(4, h, w)`` float32 R, Gr, Gb, B; black 0, white 1, not balanced.
        gains: ``(3,)`` white balance, red, green, blue, the least 1.
        matrix: ``(3, 3)`` balanced camera RGB to linear sRGB.
        noise: ``(2,)`` shot and read variance.
        target: ``(3, 2h, 2w)`` uint8 sRGB.
        rival: ``(3, 2h, 2w)`` uint8, what LibRaw makes of the same frame; ``(3, 0, 0)`` where nobody asks.
        progress: ``()`` share of the training that lies behind this sample.
    """

    packed: Tensor
    gains: Tensor
    matrix: Tensor
    noise: Tensor
    target: Tensor
    rival: Tensor
    progress: Tensor


class Drawn(NamedTuple):
    """The same in arrays, as a source gives it.

    Attributes:
        packed: As ``Sample``, and so the others.
        gains: White balance.
        matrix: Camera to linear sRGB.
        noise: Shot and read.
        target: Photograph.
        rival: The very crop as a frame that LibRaw can be given, where ``packed`` alone would not do.
    """

    packed: Floats
    gains: Sequence[float]
    matrix: npt.NDArray[np.float64]
    noise: tuple[float, float]
    target: Picture
    rival: Mosaic | None = None


class Source(Protocol):
    """Something that samples can be drawn from."""

    def __len__(self) -> int:
        """Return how many different photos or pairs there are."""
        ...

    def names(self) -> list[str]:
        """Return the photograph behind each of them."""
        ...

    def draw(self, index: int, rng: np.random.Generator, crop: int) -> Drawn:
        """Return a crop of item ``index``: a frame of ``crop`` x ``crop`` pixels and its target."""
        ...
