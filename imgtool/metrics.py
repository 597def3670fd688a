"""Metrics: pure functions, images ``(B, C, H, W)`` in 0..1 in, one value per image out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor


def to_8_bit(image: Tensor) -> Tensor:
    """Clip to 0..1 and round to the 256 levels that an 8-bit file holds."""
    return (image.clamp(0, 1) * 255).round() / 255


def batch_of(picture: npt.NDArray[Any]) -> Tensor:
    """Return an 8-bit picture ``(H, W, 3)`` as a batch of one, ``(1, 3, H, W)`` in 0..1, float64."""
    return torch.from_numpy(picture).permute(2, 0, 1)[None].double() / 255


def psnr(output: Tensor, target: Tensor, peak: float = 1.0) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, ``(B,)``, float64, at most 100.

    The field's convention for photographs: RGB, all channels together, per image; round first
    (``to_8_bit``) where 8-bit files are compared.

    >>> psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1)).round(decimals=3).item()
    20.0
    """
    error = (output.double() - target.double()).square().mean((1, 2, 3))
    return (10 * torch.log10(peak * peak / error.clamp_min(peak * peak * 1e-10))).cpu()


def ssim(output: Tensor, target: Tensor, peak: float = 1.0) -> Tensor:
    """Return the structural similarity, ``(B,)``, float64.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", TIP
    2004: gaussian window of 11 pixels and sigma 1.5, K1 0.01, K2 0.03, population covariance, mean
    over the valid area and over channels; not the three-dimensional variant that some deblurring
    papers print. Images need at least 11 pixels a side.

    >>> ssim(torch.rand(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)).item() < 0.5
    True
    """
    x, y = output.double(), target.double()
    channels = x.shape[1]
    position = torch.arange(-5, 6, dtype=torch.float64, device=x.device)
    window = torch.exp(-position.square() / (2 * 1.5**2))
    window = (window / window.sum()).expand(channels, 1, 1, 11)

    def mean(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, window, groups=channels), window.mT, groups=channels)

    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2, mean(x * y) - mu_x * mu_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    values = ((2 * mu_x * mu_y + c1) * (2 * cov + c2)) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return values.mean((1, 2, 3)).cpu()


def lab(image: Tensor) -> Tensor:
    """Return CIE L*a*b* of sRGB (IEC 61966-2-1), both ``(B, 3, H, W)``; the white is D65 (2 degrees).

    >>> lab(torch.tensor([1.0, 1.0, 1.0]).view(1, 3, 1, 1)).round(decimals=2).abs().flatten().tolist()
    [100.0, 0.0, 0.0]
    """
    bent = ((image + 0.055) / 1.055).clamp_min(0).pow(2.4)
    linear = torch.where(image <= 0.04045, image / 12.92, bent)
    xyz = torch.einsum("ij,bjhw->bihw", linear.new_tensor(_TO_XYZ), linear)
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp_min(1e-9).pow(1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


_TO_XYZ = (
    (0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883),
)
"""Linear sRGB to CIE XYZ over that of white (ITU-R BT.709's primaries)."""


def ciede2000(first: Tensor, second: Tensor) -> Tensor:
    """Return colour differences, CIEDE2000 with all weights 1: ``(..., 3)`` L*, a*, b* to ``(...)``.

    Sharma, Wu and Dalal, "The CIEDE2000 color-difference formula: implementation notes, supplementary
    test data, and mathematical observations", Color Research and Application 2005.
    """
    (l1, a1, b1), (l2, a2, b2) = first.unbind(-1), second.unbind(-1)
    stretch = 1.5 - 0.5 * _saturating((torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2)
    (c1, h1), (c2, h2) = (
        (torch.hypot(stretch * a, b), _angle(b, stretch * a)) for a, b in ((a1, b1), (a2, b2))
    )
    lightness, chroma, product = (l1 + l2) / 2, (c1 + c2) / 2, c1 * c2
    apart = (h2 - h1 + 180).remainder(360) - 180  # an angle that is 180 exactly counts either way
    turn = torch.where(product == 0, 0.0, apart)
    hue = torch.where(product == 0, h1 + h2, h1 + apart / 2).remainder(360)
    wave = (
        1
        - 0.17 * _cos(hue - 30)
        + 0.24 * _cos(2 * hue)
        + 0.32 * _cos(3 * hue + 6)
        - 0.20 * _cos(4 * hue - 63)
    )
    light = (lightness - 50).square()
    in_light = (l2 - l1) / (1 + 0.015 * light / (20 + light).sqrt())
    in_chroma = (c2 - c1) / (1 + 0.045 * chroma)
    in_hue = 2 * product.sqrt() * torch.sin(torch.deg2rad(turn / 2)) / (1 + 0.015 * chroma * wave)
    blue = torch.deg2rad(60 * torch.exp(-((hue - 275) / 25).square()))
    rotation = -2 * _saturating(chroma) * torch.sin(blue)
    total = in_light.square() + in_chroma.square() + in_hue.square() + rotation * in_chroma * in_hue
    return total.clamp_min(0).sqrt()


def _saturating(chroma: Tensor) -> Tensor:
    """Return sqrt(C^7 / (C^7 + 25^7))."""
    seventh = chroma.pow(7)
    return (seventh / (seventh + 25.0**7)).sqrt()


def _angle(y: Tensor, x: Tensor) -> Tensor:
    """Return the angle in degrees, 0 to 360."""
    return torch.rad2deg(torch.atan2(y, x)).remainder(360)


def _cos(degrees: Tensor) -> Tensor:
    return torch.cos(torch.deg2rad(degrees))


def colour_difference(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean CIEDE2000 of sRGB images over their pixels, ``(B,)``, float64.

    >>> colour_difference(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)).item()
    0.0
    """
    first, second = (lab(image.double()).movedim(1, -1) for image in (output, target))
    return ciede2000(first, second).mean((1, 2)).cpu()


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean by bootstrap over images (2,000 draws)."""
    sample = np.asarray(values)
    draws = np.random.default_rng(seed).choice(sample, (2000, len(sample))).mean(1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))
