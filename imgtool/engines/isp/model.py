"""Networks from packed Bayer planes to RGB, and the classical demosaicing that they begin with.

All are convolutions alone, so an output pixel depends on nothing farther away than ``halo`` pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtool.engines.isp import bayer, colour

if TYPE_CHECKING:
    import numpy.typing as npt

    from imgtool.engines.isp.settings import Model

FED = 8
"""Planes that a network is fed: R, Gr, Gb, B, and the noise expected in each."""

OUT = 12
"""Planes that become RGB of twice the rows and columns."""

_CROSS = ((0, 0, -1, 0, 0), (0, 0, 2, 0, 0), (-1, 2, 4, 2, -1), (0, 0, 2, 0, 0), (0, 0, -1, 0, 0))
_ROW = ((0, 0, 0.5, 0, 0), (0, -1, 0, -1, 0), (-1, 4, 5, 4, -1), (0, -1, 0, -1, 0), (0, 0, 0.5, 0, 0))
_DIAGONAL = ((0, 0, -1.5, 0, 0), (0, 2, 0, 2, 0), (-1.5, 0, 6, 0, -1.5), (0, 2, 0, 2, 0), (0, 0, -1.5, 0, 0))
MALVAR = {"cross": _CROSS, "row": _ROW, "diagonal": _DIAGONAL}
"""Eighths: Malvar, He and Cutler, "High-quality linear interpolation for demosaicing of Bayer-patterned
color images", ICASSP 2004: green at red or blue, a colour between two of its own in a row, red at blue."""

LINEAR = {
    "cross": ((0, 0, 0, 0, 0), (0, 0, 2, 0, 0), (0, 2, 0, 2, 0), (0, 0, 2, 0, 0), (0, 0, 0, 0, 0)),
    "row": ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0), (0, 4, 0, 4, 0), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0)),
    "diagonal": ((0, 0, 0, 0, 0), (0, 2, 0, 2, 0), (0, 0, 0, 0, 0), (0, 2, 0, 2, 0), (0, 0, 0, 0, 0)),
}
"""Eighths: means of the nearest pixels of the colour."""

Kernels = Mapping[str, "Sequence[Sequence[float]]"]


class Size(NamedTuple):
    """How large an ``Lrfu`` is: channels, channels within a unit, units in a block, blocks."""

    channels: int
    middle: int
    units: int
    blocks: int


SIZES = {
    "xs": Size(12, 16, 1, 1),
    "s": Size(16, 32, 3, 1),
    "m": Size(16, 32, 3, 2),
    "l": Size(32, 64, 3, 2),
}


def demosaicing(kernels: Kernels) -> Tensor:
    """Return demosaicing by 5x5 kernels as one convolution of packed planes.

    Args:
        kernels: "cross", "row" and "diagonal", in eighths.

    Returns:
        ``(12, 4, 3, 3)``: from R, Gr, Gb, B to the planes that ``pixel_shuffle(2)`` makes RGB of.
    """
    weight = torch.zeros(OUT, 4, 3, 3)
    for colour_of in range(3):
        for row, column in bayer.PLACES:
            for down, right, value in _taps(kernels, colour_of, row, column):
                y, x = row + down, column + right
                weight[4 * colour_of + 2 * row + column, 2 * (y % 2) + x % 2, y // 2 + 1, x // 2 + 1] = value
    return weight


def _taps(kernels: Kernels, colour_of: int, row: int, column: int) -> list[tuple[int, int, float]]:
    """Return the offsets and weights with which a pixel of an RGGB mosaic gets one of its colours."""
    own = row + column
    if colour_of == own and (colour_of != 1 or own == 1):
        return [(0, 0, 1.0)]
    if colour_of == 1:
        kernel = kernels["cross"]
    elif own == 1:  # a green pixel: red lies in even rows, blue in odd ones
        in_row = (row == 0) == (colour_of == 0)
        kernel = kernels["row"] if in_row else list(zip(*kernels["row"], strict=True))
    else:
        kernel = kernels["diagonal"]
    return [
        (y - 2, x - 2, value / 8) for y, line in enumerate(kernel) for x, value in enumerate(line) if value
    ]


class Demosaic(nn.Module):
    """The front end's demosaicing alone, with nothing learned."""

    halo: ClassVar[int] = 2
    multiple: ClassVar[int] = 2
    packing: ClassVar[str] = "rggb"
    scaling: ClassVar[str] = "levels"
    colour: ClassVar[str] = "camera"

    def __init__(self, method: str = "malvar") -> None:
        """Take "malvar" or "linear"."""
        super().__init__()
        self.weight = nn.Parameter(demosaicing(LINEAR if method == "linear" else MALVAR), requires_grad=False)

    def forward(self, fed: Tensor) -> Tensor:
        """Return ``(B, 3, 2h, 2w)`` balanced camera RGB of ``(B, 8, h, w)``."""
        return F.pixel_shuffle(F.conv2d(fed[:, :4], self.weight, padding=1), 2)


class Unit(nn.Module):
    """Adaptive-weight residual unit: a (conv ReLU conv)(x) + b x, with a and b learned.

    Wang, Li and Shi, "Lightweight image super-resolution with adaptive weighted learning network" (AWSRN),
    arXiv 1904.02358, 2019.
    """

    def __init__(self, channels: int, middle: int) -> None:
        """Widen to ``middle`` channels between the two convolutions."""
        super().__init__()
        self.wide = nn.Conv2d(channels, middle, 3, padding=1)
        self.narrow = nn.Conv2d(middle, channels, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(1))
        self.skip = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the shape that it gets, ``(B, channels, h, w)``."""
        weight, bias = _scaled(self.narrow, self.gain)
        change = F.conv2d(F.relu(self.wide(x), inplace=True), weight, bias, padding=1)
        return torch.addcmul(change, x, self.skip)


class Block(nn.Module):
    """Units in a chain, all of whose outputs are fused: c fuse(concatenation) + d x, with c and d learned.

    Local residual fusion as in AWSRN; the fusion is by 1x1, as in Zhang et al., "Residual dense network for
    image super-resolution", CVPR 2018: on this task 3x3 costs a sixth more.
    """

    def __init__(self, size: Size) -> None:
        """Chain ``size.units`` units."""
        super().__init__()
        self.chain = nn.ModuleList(Unit(size.channels, size.middle) for _ in range(size.units))
        self.fuse = nn.Conv2d(size.channels * size.units, size.channels, 1)
        self.gain = nn.Parameter(torch.ones(1))
        self.skip = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the shape that it gets, ``(B, channels, h, w)``."""
        y, found = x, []
        for unit in self.chain:
            y = unit(y)
            found.append(y)
        weight, bias = _scaled(self.fuse, self.gain)
        return torch.addcmul(F.conv2d(torch.cat(found, 1), weight, bias), x, self.skip)


def _scaled(layer: nn.Conv2d, gain: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a convolution's weights times a learned number: cheaper than its output times that."""
    if gain is None:
        return layer.weight, layer.bias
    return layer.weight * gain, None if layer.bias is None else layer.bias * gain


class Net(nn.Module):
    """What every network here tells: its reach, and what it is fed.

    Attributes:
        halo: Pixels of the mosaic that an output pixel depends on, to each side.
        multiple: Sides of the mosaic must be multiples of this.
        packing: Order of the planes it is fed.
        scaling: Levels of the planes it is fed.
        colour: "camera" where it returns balanced camera RGB, "learned" where display RGB.
    """

    halo: int
    multiple: int = 2

    def __init__(self, settings: Model) -> None:
        """Take what is fed from the settings."""
        super().__init__()
        self.packing, self.scaling, self.colour = settings.packing, settings.scaling, settings.colour


class Lrfu(Net):
    """A demosaicing that is learned from Malvar's on, and blocks of units that correct it.

    At first the correction is zero: an untrained network is Malvar's demosaicing.
    """

    def __init__(self, settings: Model) -> None:
        """Build the size that the settings name."""
        super().__init__(settings)
        size = SIZES[settings.size]
        self.halo = 2 * (2 + size.blocks * 2 * size.units)
        self.head = nn.Conv2d(FED, size.channels, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.blocks)))
        self.tail = nn.Conv2d(size.channels, OUT, 3, padding=1)
        self.demosaic = nn.Conv2d(4, OUT, 3, padding=1, bias=False)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]
        order = bayer.MAI21 if self.packing == "mai21" else range(4)
        with torch.no_grad():
            self.demosaic.weight.copy_(demosaicing(MALVAR)[:, list(order)])
        self.mix = nn.Conv2d(3, 3, 1) if self.colour == "learned" else nn.Identity()
        if isinstance(self.mix, nn.Conv2d):
            nn.init.dirac_(self.mix.weight)
            nn.init.zeros_(self.mix.bias)  # type: ignore[arg-type]

    def forward(self, fed: Tensor) -> Tensor:
        """Return ``(B, 3, 2h, 2w)`` of ``(B, 8, h, w)``; see ``Net.colour`` for what it means."""
        change = self.tail(self.blocks(self.head(fed)))
        # A part of a tensor would be convolved by the slow, general code.
        planes = fed[:, :4].contiguous(memory_format=torch.channels_last)
        rgb = F.pixel_shuffle((change + self.demosaic(planes)).contiguous(), 2)
        return colour.encode(self.mix(rgb)) if self.colour == "learned" else rgb


def _pair(before: int, after: int) -> nn.Sequential:
    """Return two convolutions with leaky ReLUs."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(after, after, 3, padding=1), nn.LeakyReLU(0.2),
    )  # fmt: skip


def _up(before: int, after: int) -> nn.Sequential:
    """Return a transposed convolution that doubles the sides, with a leaky ReLU."""
    layer = nn.ConvTranspose2d(before, after, 3, 2, padding=1, output_padding=1, bias=False)
    return nn.Sequential(layer, nn.LeakyReLU(0.2))


class Punet(Net):
    """The U-Net that the Mobile AI 2021 challenge gave as its baseline, after PyNET.

    Ignatov et al., "Learned smartphone ISP on mobile NPUs with deep learning, Mobile AI 2021 challenge:
    report", CVPRW 2021. 5,725,199 parameters at width 16. It is fed the four planes alone.
    """

    halo = 512  # its reach, 470 by hand, and what the multiple asks for
    multiple = 32

    def __init__(self, settings: Model) -> None:
        """Build the width that the settings name."""
        super().__init__(settings)
        n = int(settings.width)
        self.down = nn.ModuleList(
            _pair(a, b) for a, b in ((4, n), (n, 2 * n), (2 * n, 4 * n), (4 * n, 8 * n))
        )
        self.bottom = nn.ModuleList([_pair(8 * n, 16 * n), *(_pair(16 * n, 16 * n) for _ in range(3))])
        self.up = nn.ModuleList(_up(2 * k * n, k * n) for k in (8, 4, 2, 1))
        self.across = nn.ModuleList([_pair(2 * n, 2 * n), _pair(n, n)])
        self.join = nn.ModuleList(
            [_pair(16 * n, 8 * n), _pair(8 * n, 4 * n), _pair(4 * n, 2 * n), _pair(3 * n, n)]
        )
        self.grow = _up(n, n // 4)
        self.last = nn.Conv2d(n // 4, 3, 3, padding=1)

    def forward(self, fed: Tensor) -> Tensor:
        """Return ``(B, 3, 2h, 2w)`` of ``(B, 8, h, w)``; see ``Net.colour`` for what it means."""
        display = self.display(fed[:, :4])
        return display if self.colour == "learned" else colour.decode(display)

    def display(self, planes: Tensor) -> Tensor:
        """Return ``(B, 3, 2h, 2w)`` in -0.08..1.08 of four planes whose sides are multiples of 16."""
        seen, x = [], planes
        for stage in self.down:
            x = stage(x)
            seen.append(x)
            x = F.max_pool2d(x, 2)
        first, second, third, fourth = self.bottom
        x = first(x)
        x = second(x) + x
        x = fourth(third(x) + x)
        x = self.join[0](torch.cat([self.up[0](x), seen[3]], 1))
        x = self.join[1](torch.cat([self.up[1](x), seen[2]], 1))
        x = self.join[2](torch.cat([self.across[0](seen[1]), self.up[2](x)], 1))
        x = self.join[3](torch.cat([self.across[1](seen[0]), self.up[3](x), seen[0]], 1))
        display: Tensor = torch.tanh(self.last(self.grow(x))) * 0.58 + 0.5
        return display


NETWORKS: dict[str, type[Net]] = {"lrfu": Lrfu, "punet": Punet}


def build(settings: Model) -> nn.Module:
    """Build the network that ``settings.arch`` names."""
    return NETWORKS[settings.arch](settings)


def feed(net: nn.Module, packed: Tensor, gains: Tensor, noise: Tensor) -> Tensor:
    """Return what a network is fed, in its own order and scale.

    Args:
        net: With ``packing`` and ``scaling``.
        packed: ``(B, 4, h, w)`` R, Gr, Gb, B: black 0, white 1, not balanced; where the scaling is "mai21",
            values / 1020.
        gains: ``(B, 3)`` of red, green and blue, the least 1.
        noise: ``(B, 2)`` shot and read.

    Returns:
        ``(B, 8, h, w)``.
    """
    if net.scaling == "mai21":
        fed = torch.cat([packed, torch.zeros_like(packed)], 1)
    else:
        fed = bayer.prepare(packed, gains, noise)
    if net.packing == "mai21":
        fed = fed[:, [*bayer.MAI21, *(4 + place for place in bayer.MAI21)]]
    return fed


def photo(net: nn.Module, fed: Tensor, matrix: Tensor, ev: float = 0.0) -> Tensor:
    """Return the photograph that a network makes.

    Args:
        net: The network.
        fed: What ``feed`` gives.
        matrix: Balanced camera RGB to linear sRGB, ``(3, 3)`` or ``(B, 3, 3)``.
        ev: Exposure compensation in stops.

    Returns:
        ``(B, 3, 2h, 2w)`` sRGB, not clipped.
    """
    rgb = net(fed)
    with torch.autocast(fed.device.type, enabled=False):
        rgb = rgb.float() if rgb.dtype != torch.float64 else rgb
        if net.colour == "camera":
            return colour.render(rgb, matrix.to(rgb.dtype), ev)
        return colour.encode(colour.decode(rgb) * 2.0**ev) if ev else rgb


def folded(net: nn.Module) -> nn.Module:
    """Return an equal network for inference, in which learned gains are part of the weights."""
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for part in net.modules():
        if isinstance(part, Unit | Block):
            layer = part.narrow if isinstance(part, Unit) else part.fuse
            layer.weight.mul_(part.gain)
            layer.bias.mul_(part.gain)  # type: ignore[union-attr]
            part.register_parameter("gain", None)
    return net


def repacked(net: nn.Module) -> nn.Module:
    """Return an equal network, for inference, that takes its planes in the order R, Gr, Gb, B."""
    net = folded(net)
    if net.packing == "rggb":
        return net
    first: Any = [net.head, net.demosaic] if isinstance(net, Lrfu) else [net.get_submodule("down.0.0")]
    for layer in first:
        weight = layer.weight
        order = [bayer.MAI21.index(plane) for plane in range(4)]
        order += [4 + place for place in order] if weight.shape[1] == FED else []
        layer.weight = nn.Parameter(weight[:, order], requires_grad=False)
    net.packing = "rggb"  # type: ignore[assignment]
    return net


class Camera(NamedTuple):
    """What a network is told of a frame beside its planes.

    Attributes:
        gains: White balance of red, green and blue, the least 1.
        noise: Shot and read variance, black at 0 and white at 1.
        matrix: ``(3, 3)`` balanced camera RGB to linear sRGB.
    """

    gains: tuple[float, float, float]
    noise: tuple[float, float]
    matrix: npt.NDArray[Any]


@dataclass(frozen=True)
class Exported:
    """A network in a file, run by a runtime; see ``port`` for what such a file holds.

    Attributes:
        run: Arrays in the order of ``inputs`` to ``[(B, 3, H, W)]``, sRGB in 0..1.
        inputs: "planes", then some of "gains", "noise" and "matrix".
        camera: What is fixed in the file of what is no input.
        fixed: Whether that is one camera's; else planes are balanced before, and colours sRGB's.
        size: Rows and columns of the mosaic that it takes; None takes any.
        mirrors: Whether it mirrors at the edges of what it is given.
        packing: Order of the planes.
        scaling: As ``Net``, and so ``colour``, ``halo`` and ``multiple``.
        bytes_per_pixel: As ``TileFacts``, and so ``largest``.
    """

    run: Callable[..., Sequence[npt.NDArray[Any]]]
    inputs: tuple[str, ...]
    camera: Camera
    fixed: bool
    size: tuple[int, int] | None
    mirrors: bool
    packing: str
    scaling: str
    colour: str
    halo: int
    multiple: int
    bytes_per_pixel: int
    largest: int

    @property
    def balanced(self) -> bool:
        """Whether planes are to be balanced before."""
        return "gains" not in self.inputs and not self.fixed and self.scaling != "mai21"
