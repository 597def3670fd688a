"""Operations on pictures that exporters follow while sizes are free: no branch of them depends on a size.

In a trace, a free size is a symbol: what torch checks of it, such as that it can be divided, would fix it.
Where sizes are numbers, these are torch's own operations and NumPy's indices, which become constants.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from imgtool import tiles


def mirror(x: Tensor, border: int, multiple: int = 1) -> Tensor:
    """Mirror pictures beyond their edges, however small they are, without repeating the edge.

    Args:
        x: ``(..., H, W)``.
        border: Pixels to add on every side.
        multiple: At the right and at the bottom, as many more as make H and W multiples of this.
    """
    for axis in (-2, -1):
        size = x.shape[axis]
        end = (size + multiple - 1) // multiple * multiple  # of -(-size // multiple) less is known in a trace
        x = x.index_select(axis, _mirrored(-border, end + border, size))
    return x


def _mirrored(start: int, stop: int, size: int) -> Tensor:
    if isinstance(size, int):
        return torch.from_numpy(tiles.mirrored(start, stop, size))
    last = torch.arange(size)[-1:]
    position = torch.arange(start, stop) % (2 * last).clamp(min=1)
    return torch.minimum(position, 2 * last - position)


def crop(x: Tensor, border: int, height: int, width: int) -> Tensor:
    """Return ``(..., height, width)`` of pictures, from ``border`` rows and columns on."""
    for axis, size in ((-2, height), (-1, width)):
        if isinstance(size, int):
            x = x.narrow(axis, border, size)
        else:
            x = x.index_select(axis, torch.arange(border, border + size))
    return x


def unshuffle(x: Tensor, factor: int) -> Tensor:
    """Return ``torch.nn.functional.pixel_unshuffle`` of ``(B, C, H, W)``; of free sizes by a convolution."""
    if isinstance(x.shape[-1], int):
        return F.pixel_unshuffle(x, factor)
    block = factor * factor
    kernel = torch.eye(block, dtype=x.dtype).view(block, 1, factor, factor).repeat(x.shape[1], 1, 1, 1)
    return F.conv2d(x, kernel, stride=factor, groups=x.shape[1])
