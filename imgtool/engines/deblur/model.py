"""Networks of the deblur engine: ``(B, 3, H, W)`` blurred sRGB in 0..1 to sharp, any size.

``unet-lite`` has no statistic over space (its normalisation is of each pixel's own channels): an
output pixel of a stage depends on input pixels at most ``HALO`` away, so tiles that carry that much
context equal the whole image. ``unet-seed`` is the original, with GroupNorm over the whole image.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtool import traced

HALO = 64
"""Reach of a ``LocalUNet`` in pixels; a test takes it from the gradient."""


def reflect(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """Mirror an image ``(…, H, W)`` beyond its edges, however small it is.

    Like ``numpy.pad(mode="reflect")``, which goes on mirroring where torch's own padding refuses
    because the padding is wider than the image.
    """
    height, width = x.shape[-2:]
    if left or right:
        x = x.index_select(-1, mirrored(-left, width + right, width, x.device))
    if top or bottom:
        x = x.index_select(-2, mirrored(-top, height + bottom, height, x.device))
    return x


def mirrored(start: int, stop: int, size: int, device: torch.device | None = None) -> Tensor:
    """Return the indices of positions ``start..stop`` in an endlessly mirrored row of ``size``."""
    if size == 1:
        return torch.zeros(stop - start, dtype=torch.long, device=device)
    period = 2 * (size - 1)
    position = torch.arange(start, stop, device=device) % period
    return torch.minimum(position, period - position)


def pad_to(x: Tensor, multiple: int) -> Tensor:
    """Mirror the right and bottom edges until both sides are multiples of ``multiple``."""
    return reflect(x, 0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple)


class ChannelNorm(nn.Module):
    """Normalise the channels of every pixel by themselves: nothing crosses from pixel to pixel."""

    def __init__(self, channels: int) -> None:
        """Start with unit gain."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        last = x.permute(0, 2, 3, 1)
        return F.layer_norm(last, (x.shape[1],), self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Residual block of one 3x3 convolution whose two halves are multiplied: reaches one cell.

    The product is the simple gate of Chen et al., "Simple baselines for image restoration"
    (NAFNet), ECCV 2022; the convolution is dense, which costs a CPU less time than a depthwise one.
    """

    def __init__(self, channels: int) -> None:
        """Start as the identity, so that depth costs nothing at the beginning."""
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.spatial = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.mix = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        first, second = self.spatial(self.norm(x)).chunk(2, 1)
        out: Tensor = x + self.mix(first * second)
        return out


class LocalUNet(nn.Module):
    """Strictly local U-Net on 2x2 pixel-unshuffled input, three scales, residual to the input."""

    multiple = 8

    def __init__(
        self, widths: tuple[int, int, int] = (24, 48, 128), blocks: tuple[int, int, int] = (1, 2, 4)
    ) -> None:
        """Build the network.

        Args:
            widths: Channels at 1/2, 1/4 and 1/8 of the resolution.
            blocks: Residual blocks at each scale, in the encoder and again in the decoder (the
                lowest scale has them once).
        """
        super().__init__()
        fine, middle, coarse = widths
        self.stem = nn.Conv2d(12, fine, 3, padding=1)
        self.encoders = nn.ModuleList(_stack(w, n) for w, n in zip(widths, blocks, strict=True))
        self.downs = nn.ModuleList([nn.Conv2d(fine, middle, 2, 2), nn.Conv2d(middle, coarse, 2, 2)])
        self.ups = nn.ModuleList([_up(middle, fine), _up(coarse, middle)])
        self.decoders = nn.ModuleList(_stack(w, n) for w, n in zip(widths[:2], blocks[:2], strict=True))
        self.head = nn.Conv2d(fine, 12, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        """Sharpen ``(B, 3, H, W)`` sRGB in 0..1; the result has the same shape and is not clipped."""
        height, width = image.shape[-2:]
        change = self.change(pad_to(image, self.multiple))
        return image + change[..., :height, :width].to(image.dtype)

    def change(self, image: Tensor) -> Tensor:
        """Return what ``forward`` adds to an image whose sides are multiples of ``multiple``."""
        fine = self.encoders[0](self.stem(traced.unshuffle(image * 2 - 1, 2)))
        middle = self.encoders[1](self.downs[0](fine))
        coarse = self.encoders[2](self.downs[1](middle))
        middle = self.decoders[1](middle + self.ups[1](coarse))
        fine = self.decoders[0](fine + self.ups[0](middle))
        return F.pixel_shuffle(self.head(fine), 2) / 2


class UNetLite(nn.Module):
    """Two local U-Nets, coarse to fine: the first mends the photo shrunk by 4, the second the rest.

    Blur of 24 pixels is blur of 6 at a quarter of the size, where it takes a sixteenth of the
    arithmetic and a small reach. Scale recurrence after Tao et al., "Scale-recurrent network for
    deep image deblurring", CVPR 2018, with weights of their own for each scale.
    """

    multiple = LocalUNet.multiple
    shrink = 4

    def __init__(self) -> None:
        """Build both stages."""
        super().__init__()
        self.coarse = LocalUNet()
        self.fine = LocalUNet()

    def forward(self, image: Tensor) -> Tensor:
        """Sharpen ``(B, 3, H, W)`` sRGB in 0..1; the result has the same shape and is not clipped."""
        height, width = image.shape[-2:]
        small = F.avg_pool2d(pad_to(image, self.shrink), self.shrink)
        correction = enlarge(self.coarse(small) - small, self.shrink)[..., :height, :width]
        out: Tensor = self.fine(image + correction)
        return out


def enlarge(image: Tensor, factor: int) -> Tensor:
    """Enlarge ``(B, C, h, w)`` bilinearly by a whole factor; beyond the outer centres it is constant."""
    return F.interpolate(image, scale_factor=factor, mode="bilinear", align_corners=False)


def _stack(channels: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*(Block(channels) for _ in range(blocks)))


def _up(coarse: int, fine: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(coarse, 4 * fine, 1), nn.PixelShuffle(2))


class UNetSeed(nn.Module):
    """The original network: 8,636,451 parameters, GroupNorm over the whole image, no residual."""

    multiple = 16

    def __init__(self) -> None:
        """Build four levels of 32 to 256 channels and a bottleneck of 512."""
        super().__init__()
        widths = (3, 32, 64, 128, 256)
        self.encoders = nn.ModuleList(_double(a, b) for a, b in pairwise(widths))
        self.bottleneck = _double(256, 512)
        self.ups = nn.ModuleList(nn.Conv2d(2 * w, w, 3, padding=1) for w in widths[1:])
        self.decoders = nn.ModuleList(_double(2 * w, w) for w in widths[1:])
        self.final = nn.Conv2d(32, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Sharpen ``(B, 3, H, W)`` sRGB in 0..1; inside, the original's range -1..1."""
        height, width = image.shape[-2:]
        return self.whole(pad_to(image, self.multiple))[..., :height, :width]

    def whole(self, image: Tensor) -> Tensor:
        """Do so with an image whose sides are multiples of ``multiple``."""
        x, skips = image * 2 - 1, []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottleneck(x)
        for skip, up, decoder in zip(skips[::-1], reversed(self.ups), reversed(self.decoders), strict=True):
            x = up(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
            x = decoder(torch.cat([x, skip], 1))
        out: Tensor = (self.final(x) + 1) / 2
        return out


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1),
            nn.GroupNorm(8, outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
