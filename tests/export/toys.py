"""Networks small enough to be written as files in a moment, and orders to write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtool.export.order import Order
from imgtool.port import Axis, Port, Slot

ABOUT = {"format": "imgtool-export/1", "engine": "toy", "facts": {"grey": "grün"}}


class Picture(nn.Module):
    """``(B, 3, H, W)`` with even sides to the same: statistics of the whole picture, and sub-pixel layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(12, 8, 3, padding=1)
        self.norm = nn.GroupNorm(1, 8)
        self.groups = nn.GroupNorm(4, 8, eps=1e-3)
        self.tail = nn.Conv2d(8, 12, 3, padding=1)
        for part in (self.norm, self.groups):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)

    def forward(self, photo: Tensor) -> Tensor:
        seen = self.norm(self.stem(F.pixel_unshuffle(photo, 2)))
        change = self.tail(self.groups(F.leaky_relu(seen, 0.1)))
        return photo + F.pixel_shuffle(change, 2) / 4


class Pair(nn.Module):
    """A picture ``(B, 3, H, W)`` and gains ``(B, 3)`` to a larger picture, in a curve, and to ``(B, 2)``."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 3, 2, 2)
        self.ends = nn.Linear(8, 2)

    def forward(self, photo: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
        seen = F.relu(self.wide(photo * gains[:, :, None, None]))
        light = self.up(seen).clamp(0, 1)
        return (light + 0.01) ** (1 / 2.4), torch.softmax(self.ends(seen.mean((2, 3))), 1)


class Ends(nn.Module):
    """``(B, 2, 8, 8)`` to ``(B, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 3)
        )

    def forward(self, maps: Tensor) -> Tensor:
        found: Tensor = self.layers(maps)
        return found


def seeded(module: type[nn.Module]) -> nn.Module:
    """Return a network whose random numbers are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return module().eval()


def made(slots: tuple[Slot, ...], lengths: Mapping[str, int], seed: int = 0) -> tuple[np.ndarray, ...]:
    """Return inputs of noise over their whole ranges."""
    rng = np.random.default_rng(seed)
    shapes = [tuple(lengths[n] if isinstance(n, str) else n for n in slot.shape) for slot in slots]
    return tuple(
        rng.uniform(slot.low, slot.high, shape).astype(np.float32)
        for slot, shape in zip(slots, shapes, strict=True)
    )


def _port(
    module: type[nn.Module], inputs: tuple[Slot, ...], outputs: tuple[Slot, ...], axes: Mapping[str, Axis]
) -> Port:
    def real(path: Path, lengths: Mapping[str, int]) -> tuple[np.ndarray, ...]:
        return made(inputs, lengths, len(path.name))

    def invented(kind: str, lengths: Mapping[str, int], rng: Any) -> tuple[np.ndarray, ...]:
        return made(inputs, lengths, len(kind))

    return Port(seeded(module), inputs, outputs, axes, "before", "after", real, invented)


def _photo(name: str, *sides: str) -> Slot:
    return Slot(name, ("batch", 3, *sides), 0.0, 1.0, "A picture.", picture=True)


def picture() -> Port:
    """Return the port of ``Picture``."""
    axes = {"batch": Axis(1), "height": Axis(16, 2, 4), "width": Axis(24, 2, 4)}
    return _port(Picture, (_photo("photo", "height", "width"),), (_photo("sharp", "height", "width"),), axes)


def pair() -> Port:
    """Return the port of ``Pair``."""
    axes = {"batch": Axis(1), "height": Axis(10), "width": Axis(12)}
    inputs = (
        _photo("photo", "height", "width"),
        Slot("gains", ("batch", 3), 0.5, 2.0, "Gains of red, green, blue."),
    )
    outputs = (
        _photo("large", "2*height", "2*width"),
        Slot("shares", ("batch", 2), 0.0, 1.0, "Two shares."),
    )
    return _port(Pair, inputs, outputs, axes)


def ends() -> Port:
    """Return the port of ``Ends``, whose batch is 1."""
    return _port(
        Ends,
        (Slot("maps", (1, 2, 8, 8), 0.0, 1.0, "Two maps."),),
        (Slot("ends", (1, 3), -1.0, 1.0, "Three numbers."),),
        {},
    )


def order(port: Port, *, fixed: bool = False, **more: Any) -> Order:
    """Return an order of a port's usual sizes, with its axes free or ``fixed``."""
    sizes = {name: axis.usual for name, axis in port.axes.items()}
    free = frozenset() if fixed else frozenset(port.axes)
    return Order(port, sizes, free, ABOUT, **more)


def calibration(port: Port, count: int = 4) -> list[tuple[np.ndarray, ...]]:
    """Return inputs to find the ranges of 8 bits with."""
    lengths = {name: axis.usual for name, axis in port.axes.items()}
    return [made(port.inputs, lengths, seed) for seed in range(count)]


def outputs(port: Port, inputs: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """Return what the network gives in float64."""
    import copy

    with torch.inference_mode():
        module = copy.deepcopy(port.module).double()
        found = module(*(torch.from_numpy(x).double() for x in inputs))
    return [each.numpy() for each in (found if isinstance(found, tuple) else (found,))]
