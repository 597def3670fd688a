"""What the data sets give."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sample(NamedTuple):
    """One sample; a batch has one more dimension in front.

    Attributes:
        seen: ``(3, h + 2 r, w + 2 r)`` uint8 RGB: the crop and, around it, what a network of reach r sees.
        wanted: ``(C, h, w)`` float32, what the filter makes of the crop (its map, see ``Target``).
    """

    seen: Tensor
    wanted: Tensor
