"""What a file that runs elsewhere holds of a filter network, and such a file as the network again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from imgtool import images, tiles, traced
from imgtool.engine import Axis, Port, Slot
from imgtool.engines.filter import edges, model, quantise, targets
from imgtool.errors import ImgtoolError

if TYPE_CHECKING:
    from imgtool.engine import Pixels
    from imgtool.engines.filter.settings import Export
    from imgtool.runtime import Loaded

Floats = npt.NDArray[np.float32]

USUAL = 512
LEAST = 8
"""Pixels: a trace of free sizes tells one pixel from several, also of blocks of pixels."""
SHIFT = 40
"""Pixels between the pictures of a batch."""
SLOPES = 2
"""Channels of a map of derivatives, which have both signs."""

SEEN = "The photo: RGB, 0 black, 1 white."
BEFORE = (
    "Decode the photo and turn it upright as its EXIF orientation says; its colours and gamma stay; channels "
    "R, G, B; divide levels of 8 bits by 255, of 16 bits by 65535; clip to 0..1."
)
PLAIN = "Clip to 0..1, multiply by 255 (65535) and round to the nearest."
OVER_MAXIMUM = (
    "Divide the map of the whole photo by its maximum, multiply by 255 and round down; the maximum is 255, "
    f"and all is 0 where the maximum is below {edges.NOTHING:g}."
)
WHOLE = " The network looks at the whole photo, which may not be cut."
ROUNDS = (
    "it was trained in 8-bit arithmetic and rounds between its layers, so that the last bit of a float "
    "changes a whole step: train it with --arithmetic float, and export it with --precision int8"
)


class Filter(nn.Module):
    """A local network over a whole photo, mirrored at its edges within."""

    def __init__(self, net: model.Local) -> None:
        """Wrap the network."""
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` of ``(B, 3, H, W)`` RGB in 0..1; not clipped."""
        found = self.net(traced.mirror(image, self.net.reach, self.net.multiple))
        return traced.crop(found, 0, *image.shape[-2:])


def port(net: Any, settings: Export) -> Port:
    """Return what a file holds of a network: a photo in; the filtered photo, or a map, out."""
    least = getattr(net, "least", 1)
    side = Axis(max(USUAL, least), least=max(LEAST, least))
    shape = ("batch", net.count, "height", "width")
    low = -1 if net.count == SLOPES else 0
    refused = ("fp32", "fp16", "int8") if quantise.is_quantised(net) else ()
    return Port(
        Filter(net).eval() if net.local else net,
        (Slot("image", ("batch", 3, "height", "width"), 0, 1, SEEN, picture=True),),
        (Slot("filtered", shape, low, 1, meaning(net), picture=True),),
        {"batch": Axis(1), "height": side, "width": side},
        BEFORE,
        last_steps(net.target) + ("" if net.local else WHOLE),
        real,
        made,
        {name: getattr(net, name) for name in FACTS} | {"least": least},
        refuse=dict.fromkeys(refused, ROUNDS),
    )


FACTS: Mapping[str, Callable[[Any], object]] = {
    "target": str,
    "reach": int,
    "multiple": int,
    "count": int,
    "residual": bool,
    "local": bool,
}
"""What a file says of the network in it."""


def meaning(net: Any) -> str:
    """Return what the output is, in words."""
    if net.count == SLOPES:
        return f"Derivatives of {net.target}'s grey photo to the right and down; 1 is black to white."
    if net.count == 1:
        return f"The map of {net.target}: nominally 0 to 1, not clipped."
    return f"The photo as {net.target} filters it: RGB, 0 black, 1 white, not clipped."


def last_steps(spec: str) -> str:
    """Return what is done with a network's output, in words."""
    name = spec.partition(":")[0]
    if name not in targets.KINDS:
        return PLAIN
    target = targets.parse(spec)
    last = target.levels or target.finish
    if last is None:
        return PLAIN
    words = OVER_MAXIMUM if target.levels else (
        f"Multiply by {edges.LEVELS} and round to the nearest, to 16-bit integers."
    )  # fmt: skip
    limits = [each.default for each in inspect.signature(last).parameters.values()][1:]
    if not limits:
        return words
    given = "the levels" if target.levels else "both derivatives"
    return f"{words} Then OpenCV's cv2.Canny of {given}, thresholds {limits[0]:g} and {limits[1]:g}."


def real(path: Path, sizes: Mapping[str, int]) -> tuple[Pixels, ...]:
    """Return the middle of a photo as the network's input; further pictures of a batch lie beside it."""
    photo = images.read(path).pixels
    size = sizes["height"], sizes["width"]
    parts = [tiles.middle(photo, *size, SHIFT * number).clip(0, 1) for number in range(sizes["batch"])]
    return (np.ascontiguousarray(np.stack(parts).transpose(0, 3, 1, 2)),)


def made(kind: str, sizes: Mapping[str, int], rng: np.random.Generator) -> tuple[Pixels, ...]:
    """Return an input of noise, of one grey, or of black and white pixels."""
    values: Floats = rng.random((sizes["batch"], 3, sizes["height"], sizes["width"]), np.float32)
    if kind == "flat":
        values[:] = 0.5
    return (np.rint(values) if kind == "extreme" else values,)


class Ported(nn.Module):
    """An exported file as a network: ``(1, 3, H + 2 r, W + 2 r)`` to ``(1, C, H, W)``, as those of ``model``.

    The file mirrors what it is given by the reach r, as if it were a whole photo. What comes of that lies in
    the margin, which is cut off.

    Attributes:
        size: Height and width of what the file takes, where it takes no others; None where they are free.
        window: The same without the margin.
    """

    target: str
    reach: int
    multiple: int
    count: int
    residual: bool
    local: bool

    def __init__(self, loaded: Loaded) -> None:
        """Look at what the file says of itself.

        Raises:
            ImgtoolError: It says too little, or its size is too small.
        """
        super().__init__()
        self.loaded = loaded
        facts = loaded.about.get("facts", {})
        try:
            for name, kind in FACTS.items():
                setattr(self, name, kind(facts[name]))
            self.least = int(facts["least"])
        except (KeyError, TypeError, ValueError):
            raise ImgtoolError(f"{loaded.path} does not say how it may be used", "export it again") from None
        height, width = loaded.inputs[0].shape[-2:]
        self.size = None if height is None or width is None else (height, width)
        self.window = self.size and (self._inside(self.size[0]), self._inside(self.size[1]))

    def _inside(self, length: int) -> int:
        """Return what is left of a fixed length without the margin."""
        left = (length - 2 * self.reach) // self.multiple * self.multiple
        if left < 1:
            raise ImgtoolError(
                f"{self.loaded.path} takes {length} pixels; its network reaches {self.reach} to each side",
                f"export it for free sizes, or for at least {2 * self.reach + USUAL} pixels",
            )
        return left

    def forward(self, x: Tensor) -> Tensor:
        """Return the filtered block; one that is smaller than the file's size is filled up with black.

        Raises:
            ImgtoolError: A file of a network that looks at the whole photo takes no photo of this size.
        """
        height, width = x.shape[-2:]
        given = x.numpy()
        if not self.local:
            self._check(height, width)
            given = _filled(given, (max(self.least, height), max(self.least, width)), "edge")
        elif self.size:
            given = _filled(given, self.size, "constant")
        found = self.loaded(np.ascontiguousarray(given))[0]
        cut = self.reach
        return torch.from_numpy(found[..., cut : height - cut, cut : width - cut])

    def _check(self, height: int, width: int) -> None:
        if self.size and self.size != (height, width):
            own, given = ("x".join(map(str, each)) for each in (self.size, (height, width)))
            raise ImgtoolError(
                f"{self.loaded.path} takes photos of {own} alone, and this one has {given}",
                f"export it for free sizes, or with --size {given}: it normalises over the whole photo",
            )


def _filled(x: Floats, size: tuple[int, int], mode: Literal["edge", "constant"]) -> Floats:
    more = [(0, own - side) for own, side in zip(size, x.shape[2:], strict=True)]
    return np.pad(x, [(0, 0), (0, 0), *more], mode=mode)


def ported(loaded: Any, settings: Any) -> Ported:
    """Return an exported file as a network that ``apply`` takes."""
    return Ported(loaded)
