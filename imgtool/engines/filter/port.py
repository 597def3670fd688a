"""What a file that runs elsewhere holds of a filter network, and such a file as the network again."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from imgtool import loading, pictures, traced
from imgtool.engines.filter import edges, model, quantise, targets
from imgtool.errors import ImgtoolError
from imgtool.port import Axis, Port, Slot

if TYPE_CHECKING:
    from imgtool.engines.filter.settings import Export
    from imgtool.runtime import Loaded

Floats = npt.NDArray[np.float32]

USUAL = 512
LEAST = 8
"""Pixels: a trace of free sizes tells one pixel from several, also of blocks of pixels."""
SLOPES, COLOURS = 2, 3
"""Channels of a map of derivatives, which have both signs, and of a photo."""

SEEN = "The photo: RGB, 0 black, 1 white."
OVER_MAXIMUM = (
    "Divide the map of the whole photo by its maximum, multiply by 255 and round down, so that the maximum "
    f"becomes 255; all is 0 where the maximum is below {edges.NOTHING:g}."
)
WHOLE = (
    " The network looks at the whole photo, which may not be cut; one of fewer than {} rows or columns is "
    "filled up to these by repeating the last."
)
CUT = (
    " A photo that is too large is cut: tiles begin at multiples of {}; of each, {} pixels are thrown away "
    "on every side that is not the photo's own edge."
)
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
        pictures.BEFORE,
        last_steps(net.target)
        + (CUT.format(net.multiple, net.reach) if net.local else WHOLE.format(net.least)),
        pictures.real,
        pictures.made,
        {name: getattr(net, name) for name in FACTS} | ({} if net.local else {"filled_to": least}),
        refuse=dict.fromkeys(refused, ROUNDS),
    )


FACTS = ("target", "reach", "multiple", "count", "residual", "local")
"""What a file says of the network in it, by its attributes."""


class Facts(loading.Facts):
    """What is read of a file's facts: of a network as in ``model``.

    Attributes:
        filled_to: Rows and columns that a photo is filled up to, where it may not be cut.
    """

    target: str
    reach: int = Field(ge=0, le=4096)
    multiple: int = Field(ge=1, le=4096)
    count: int = Field(ge=1, le=3)
    residual: bool
    local: bool
    filled_to: int = Field(0, ge=1, le=4096)

    @model_validator(mode="after")
    def _fits(self) -> Facts:
        """Refuse what no network is."""
        if self.residual and self.count != COLOURS:
            raise ValueError("only a photo can be added to a photo")
        if not self.local and (self.reach or not self.filled_to):
            raise ValueError("a network that looks at the whole photo has filled_to, and reach 0")
        if self.target.partition(":")[0] in targets.KINDS:
            try:
                channels = targets.parse(self.target).channels
            except ImgtoolError as fault:
                raise ValueError(fault.what) from None
            if channels != self.count:
                raise ValueError(f"{self.target} has {channels} channels, not {self.count}")
        return self


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
        return pictures.AFTER
    target = targets.parse(spec)
    last = target.levels or target.finish
    if last is None:
        return pictures.AFTER
    words = OVER_MAXIMUM if target.levels else (
        f"Multiply by {edges.LEVELS} and round to the nearest, to 16-bit integers."
    )  # fmt: skip
    limits = [each.default for each in inspect.signature(last).parameters.values()][1:]
    if not limits:
        return words
    given = "the levels" if target.levels else "both derivatives"
    return f"{words} Then OpenCV's cv2.Canny of {given}, thresholds {limits[0]:g} and {limits[1]:g}."


class Ported(nn.Module):
    """An exported file as a network: ``(1, 3, H + 2 r, W + 2 r)`` to ``(1, C, H, W)``, as those of ``model``.

    The file mirrors what it is given by the reach r, as if it were a whole photo. What comes of that lies in
    the margin, which is cut off.

    Attributes:
        size: Height and width of what the file takes, where it takes no others; None where they are free.
        window: The same without the margin.
    """

    def __init__(self, loaded: Loaded) -> None:
        """Look at what the file says of itself.

        Raises:
            ImgtoolError: It says too little, or what cannot be, its size is too small, or it is no file of
                such a network.
        """
        super().__init__()
        self.path, facts = loaded.path, loading.facts(loaded.path, loaded.about, Facts)
        self.target, self.reach, self.multiple = facts.target, facts.reach, facts.multiple
        self.count, self.residual, self.local = facts.count, facts.residual, facts.local
        self.least = facts.filled_to
        picture: loading.Shape = ("height", "width")
        self.run = loading.checked(loaded, [(1, 3, *picture)], [(1, facts.count, *picture)])
        self.size = pictures.fixed_size(loaded)
        self.window = self.size and (self._inside(self.size[0]), self._inside(self.size[1]))

    def _inside(self, length: int) -> int:
        """Return what is left of a fixed length without the margin."""
        left = (length - 2 * self.reach) // self.multiple * self.multiple
        if left < 1:
            raise ImgtoolError(
                f"{self.path} takes {length} pixels; its network reaches {self.reach} to each side",
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
            pictures.check_size(self.path, self.size, (height, width))
            given = _filled(given, (max(self.least, height), max(self.least, width)), "edge")
        elif self.size:
            given = _filled(given, self.size, "constant")
        found = self.run(np.ascontiguousarray(given))[0]
        cut = self.reach
        return torch.from_numpy(found[..., cut : height - cut, cut : width - cut])


def _filled(x: Floats, size: tuple[int, int], mode: Literal["edge", "constant"]) -> Floats:
    more = [(0, own - side) for own, side in zip(size, x.shape[2:], strict=True)]
    return np.pad(x, [(0, 0), (0, 0), *more], mode=mode)


def ported(loaded: Any, settings: Any) -> Ported:
    """Return an exported file as a network that ``apply`` takes."""
    return Ported(loaded)
