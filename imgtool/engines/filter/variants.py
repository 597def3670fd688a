"""Smaller forms of a trained network, whose loss of accuracy can be measured beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from imgtool.engines.filter import quantise
from imgtool.tiles import mirrored, unit

EDGE = 256
"""Largest edge in pixels of what is taken of a photo."""
PHOTOS = 16
"""Most photos to calibrate with."""


def variants(net: Any, photos: Sequence[npt.NDArray[Any]]) -> dict[str, nn.Module]:
    """Return the forms of a network by name, each in evaluation mode.

    ``float16 weights``: weights of half the size, arithmetic in float32. ``int8, calibrated``: 8-bit
    arithmetic without any training for it; not of a network that has it already, nor without photos.

    Args:
        net: A network of this engine.
        photos: ``(H, W, 3)`` RGB, uint8, uint16 or float32 in 0..1, of any size, to calibrate with; they
            should not be those that the accuracy is then measured on.
    """
    found = {"float16 weights": halved(net)}
    if photos and not quantise.is_quantised(net):
        seen = [seen_by(net, photo) for photo in photos[:PHOTOS]]
        found["int8, calibrated"] = quantise.calibrated(net, seen)
    return found


def halved(net: nn.Module) -> nn.Module:
    """Return a network as it comes out of a file with float16 weights."""
    net = copy.deepcopy(net).eval()
    net.load_state_dict({name: value.half().float() for name, value in net.state_dict().items()})
    return net


def seen_by(net: Any, photo: npt.NDArray[Any], edge: int = EDGE) -> Tensor:
    """Return the middle of a photo as a network sees it: ``(1, 3, H, W)`` in 0..1, mirrored around.

    Args:
        net: A network of this engine.
        photo: ``(H, W, 3)``, of any size.
        edge: Largest edge of the middle, in pixels.
    """
    places = []
    for size in photo.shape[:2]:
        length = min(edge // net.multiple, -(-size // net.multiple)) * net.multiple
        first = max(size - length, 0) // 2
        places.append(mirrored(first - net.reach, first + length + net.reach, size))
    values = unit(photo[places[0]][:, places[1]])
    device = next(net.parameters()).device
    return torch.from_numpy(values).permute(2, 0, 1)[None].to(device)
