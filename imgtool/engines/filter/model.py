"""The networks: ``(B, 3, H + 2 r, W + 2 r)`` RGB in 0..1 to ``(B, C, H, W)``, r being the network's reach.

Local networks have valid convolutions and no statistics: the photo is mirrored once, by the reach, and an
output pixel is a function of the (2 r + 1)^2 pixels around it and of nothing else. So tiles are exact.
With three output channels a network learns the change of the photo, with one the map itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtool import traced
from imgtool.engines.filter import targets
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.engines.filter.settings import Model

SLOPE = 0.1
"""Of LeakyReLU below zero."""
RAMP: Sequence[int] = (1, 1, 1, 1)
WIDE: Sequence[int] = (1, 2, 4, 8, 16, 1)
"""Dilations where the settings name none."""
MOST_REACH = 512
"""Pixels: what no network of these kinds should exceed."""


def inner(x: Tensor, margin: int) -> Tensor:
    """Return pictures without a margin of some pixels."""
    return x[..., margin : x.shape[-2] - margin, margin : x.shape[-1] - margin]


def chain(widths: Sequence[int], dilations: Sequence[int]) -> nn.Sequential:
    """Return valid 3x3 convolutions, each followed by LeakyReLU.

    They begin as in He et al., "Delving deep into rectifiers", 2015: torch's own weights are smaller, and
    what several layers make of them is next to nothing.
    """
    layers: list[nn.Module] = []
    for before, after, dilation in zip(widths, widths[1:], dilations, strict=False):
        layer = nn.Conv2d(before, after, 3, dilation=dilation)
        nn.init.kaiming_normal_(layer.weight, SLOPE)
        layers += [layer, nn.LeakyReLU(SLOPE, inplace=True)]
    return nn.Sequential(*layers)


def last(width: int, channels: int, residual: bool) -> nn.Conv2d:
    """Return the 1x1 convolution at the end; it begins at zero where its output is a change."""
    layer = nn.Conv2d(width, channels, 1)
    if residual:
        nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Local(nn.Module, ABC):
    """What local networks share.

    Attributes:
        reach: Pixels around the block of ``multiple`` pixels that an output pixel lies in, on which it may
            depend; a multiple of ``multiple``.
        multiple: Sizes of the input, and places where tiles begin, are multiples of this.
        count: Channels of the output.
        target: What the network imitates, as the settings have it.
        local: Whether an output pixel depends on nothing beyond the reach.
    """

    local = True

    def __init__(self, channels: int, reach: int, multiple: int = 1) -> None:
        """Make a network of 1 or 3 output channels."""
        super().__init__()
        self.count, self.residual, self.target = channels, channels == 3, ""
        self.reach, self.multiple = -(-reach // multiple) * multiple, multiple

    def forward(self, x: Tensor) -> Tensor:
        """Return the filtered pictures."""
        out = self.values(x)
        return out + inner(x, self.reach) if self.residual else out

    @abstractmethod
    def values(self, x: Tensor) -> Tensor:
        """Return what the layers compute: a change, or the map."""


class Fold(Local):
    """``depth`` 3x3 convolutions and a 1x1: 2,003 parameters with 8 channels, 4 deep, for three colours."""

    def __init__(self, channels: int, width: int = 8, depth: int = 4) -> None:
        """Make it."""
        super().__init__(channels, depth)
        self.body = chain([3] + [width] * depth, [1] * depth)
        self.head = last(width, channels, self.residual)

    def values(self, x: Tensor) -> Tensor:
        """Return what the layers compute."""
        found: Tensor = self.head(self.body(x))
        return found


class Dilated(Local):
    """3x3 convolutions with growing dilations, and a 1x1.

    Chen, Xu and Koltun, "Fast image processing with fully-convolutional networks", ICCV 2017, without its
    normalisation, which looks at the whole picture.
    """

    def __init__(self, channels: int, width: int = 24, dilations: Sequence[int] = WIDE) -> None:
        """Make it."""
        super().__init__(channels, sum(dilations))
        self.body = chain([3] + [width] * len(dilations), dilations)
        self.head = last(width, channels, self.residual)

    def values(self, x: Tensor) -> Tensor:
        """Return what the layers compute."""
        found: Tensor = self.head(self.body(x))
        return found


class Unshuffled(Local):
    """All layers at a fraction of the size, whose pixels hold blocks of the photo's."""

    def __init__(
        self, channels: int, width: int = 24, factor: int = 4, dilations: Sequence[int] = RAMP
    ) -> None:
        """Make it."""
        super().__init__(channels, factor * sum(dilations), factor)
        block = factor * factor
        self.body = chain([3 * block] + [width] * len(dilations), dilations)
        self.head = last(width, channels * block, self.residual)

    def values(self, x: Tensor) -> Tensor:
        """Return what the layers compute."""
        small = traced.unshuffle(x, self.multiple)
        found: Tensor = F.pixel_shuffle(self.head(self.body(small)), self.multiple)
        return found


class Pooled(Local):
    """A few layers at full size, which are handed what others found at a fraction of it.

    The wide layers that look far cost little there; what they carry up is computed with sub-pixel
    convolution (Shi et al., CVPR 2016). The small picture holds all of the photo's pixels.
    """

    def __init__(
        self,
        channels: int,
        full: tuple[int, int],
        small: tuple[int, int, int],
        dilations: Sequence[int] = RAMP,
    ) -> None:
        """Make it.

        Args:
            channels: Of the output.
            full: Channels and number of the layers at full size.
            small: How much smaller the other picture is, channels of its layers, channels carried up.
            dilations: Of its layers.
        """
        (width, depth), (factor, context, carried) = full, small
        super().__init__(channels, factor * sum(dilations) + depth, factor)
        self.depth, block = depth, factor * factor
        self.surplus = self.reach - factor * sum(dilations) - depth
        self.small = chain([3 * block] + [context] * len(dilations), dilations)
        self.carry = nn.Conv2d(context, carried * block, 1)
        self.body = chain([3 + carried] + [width] * depth, [1] * depth)
        self.head = last(width, channels, self.residual)

    def values(self, x: Tensor) -> Tensor:
        """Return what the layers compute."""
        small = traced.unshuffle(x, self.multiple)
        carried = inner(F.pixel_shuffle(self.carry(self.small(small)), self.multiple), self.surplus)
        found: Tensor = self.head(self.body(torch.cat([inner(x, self.reach - self.depth), carried], 1)))
        return found


# --- the original ----------------------------------------------------------------------------

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class Block(nn.Module):
    """A block of the original: y = activation(pad(convolution(norm(x)))), z = alpha y + beta x.

    The convolution is valid, and zeros are put around it afterwards. ``rezero`` is alpha, per channel, from
    1; ``reskip`` is beta, from 0: without it there is no skip.
    """

    def __init__(self, settings: Model) -> None:
        """Make it."""
        super().__init__()
        width, kernel = settings.width, settings.kernel
        self.norm = nn.GroupNorm(1, width)
        self.conv = nn.Conv2d(width, width, kernel)
        self.pad = nn.ZeroPad2d(kernel // 2)
        self.activation = ACTIVATIONS[settings.activation]()
        self.alpha = nn.Parameter(torch.ones(1, width, 1, 1)) if settings.rezero else None
        self.beta = nn.Parameter(torch.zeros(1, width, 1, 1)) if settings.reskip else None
        self.flip = settings.flip

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, width, H, W)``, the shape of the input."""
        inside = self.pad(self.conv(self.norm(x))) if self.flip else self.norm(self.pad(self.conv(x)))
        y: Tensor = self.activation(inside)
        if self.alpha is not None:
            y = self.alpha * y
        return y if self.beta is None else y + self.beta * x


class Clapp(nn.Module):
    """The original's FilterNet: 2,505 parameters with 8 channels, 4 deep, kernels of 3, one output channel.

    Its normalisation looks at the whole picture: it is not local, and may not be cut into tiles.
    """

    local = False
    reach = 0
    multiple = 1
    residual = False

    def __init__(self, channels: int, settings: Model) -> None:
        """Make it.

        Raises:
            ImgtoolError: Code 2, for kernels whose size is even.
        """
        super().__init__()
        if settings.kernel % 2 == 0:
            raise ImgtoolError(f"--kernel {settings.kernel} is even", "take an odd size", USAGE)
        self.count, self.target = channels, settings.target
        self.prepare = nn.Conv2d(3, settings.width, 1)
        self.blocks = nn.Sequential(*(Block(settings) for _ in range(settings.depth)))
        self.finish = nn.Conv2d(settings.width, channels, 1)
        self.least = settings.kernel

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, channels, H, W)``, the size of the input, which may be smaller than the kernel."""
        height, width = x.shape[-2:]
        short = (max(self.least - width, 0), max(self.least - height, 0))
        if any(short):
            x = F.pad(x, (0, short[0], 0, short[1]), mode="replicate")
        found: Tensor = self.finish(self.blocks(self.prepare(x)))
        return found[..., :height, :width]


# --- from settings ---------------------------------------------------------------------------


def channels(settings: Model) -> int:
    """Return the channels of the output."""
    if settings.channels != "auto":
        return int(settings.channels)
    name = settings.target.partition(":")[0]
    return targets.parse(settings.target).channels if name in targets.KINDS else 3


def dilations(settings: Model) -> list[int]:
    """Return the dilations that the settings name, or their default.

    Raises:
        ImgtoolError: Code 2, where they are no numbers from 1 on, or reach too far.
    """
    if not settings.dilations:
        return list(WIDE if settings.arch == "dilated" else RAMP)
    try:
        found = [int(each) for each in settings.dilations.split(",")]
    except ValueError:
        found = [0]
    factor = 1 if settings.arch == "dilated" else settings.factor
    if min(found) < 1 or factor * sum(found) > MOST_REACH:
        what = f"--dilations {settings.dilations} are no dilations that reach at most {MOST_REACH} pixels"
        raise ImgtoolError(what, "give whole numbers from 1 on, as 1,2,4,1", USAGE)
    return found


def build(settings: Model) -> Any:
    """Build the network that the settings name.

    Raises:
        ImgtoolError: Code 2, for settings of which no network can be made.
    """
    net = _shaped(settings)
    net.target = settings.target
    if settings.arithmetic == "int8":
        from imgtool.engines.filter import quantise

        return quantise.quantised(net)
    return net


def _shaped(settings: Model) -> Any:
    count, width = channels(settings), settings.width
    if settings.arch == "fold":
        return Fold(count, width, settings.depth)
    if settings.arch == "dilated":
        return Dilated(count, width, dilations(settings))
    if settings.arch == "unshuffle":
        return Unshuffled(count, width, settings.factor, dilations(settings))
    if settings.arch == "pooled":
        small = (settings.factor, settings.context, settings.carried)
        return Pooled(count, (width, settings.depth), small, dilations(settings))
    return Clapp(count, settings)
