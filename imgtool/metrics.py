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


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean by bootstrap over images (2,000 draws)."""
    sample = np.asarray(values)
    draws = np.random.default_rng(seed).choice(sample, (2000, len(sample))).mean(1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))
