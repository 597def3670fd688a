"""Losses: pure functions, tensors in, scalar tensors out. Images are ``(B, C, H, W)`` in 0..1."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pytorch_msssim import ms_ssim, ssim
from torch import Tensor

from imgtool.errors import USAGE, ImgtoolError

MS_SSIM_SMALLEST = 161
"""Shortest side that five scales of an 11-pixel window allow: (11 - 1) * 2^4 + 1."""


def charbonnier(output: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    """Return the mean of sqrt(difference^2 + eps^2): L1 that is smooth at zero.

    Charbonnier et al., "Two deterministic half-quadratic regularization algorithms for computed
    imaging", ICIP 1994.

    >>> charbonnier(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)).item() < 0.00101
    True
    """
    return torch.sqrt((output - target).square() + eps * eps).mean()


def log_cosh(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean of log cosh of the difference: half its square near zero, L1 - log 2 far from it.

    As ``|d| + softplus(-2 |d|) - log 2``, which large differences do not overflow.

    >>> round(log_cosh(torch.full((1,), 200.0), torch.zeros(1)).item(), 3)
    199.307
    """
    apart = (output - target).abs()
    return (apart + F.softplus(-2 * apart) - math.log(2)).mean()


def frequency(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean magnitude of the difference's 2-D spectrum (orthonormal FFT).

    Cho et al., "Rethinking coarse-to-fine approach in single image deblurring" (MIMO-UNet), ICCV
    2021, equation 9, with the transform scaled so that its size does not depend on the crop.

    >>> frequency(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8)).item()
    0.0
    """
    spectrum = torch.fft.rfft2(output - target, norm="ortho")
    return torch.view_as_real(spectrum).abs().mean()


def relative_mse(output: Tensor, target: Tensor, given: Tensor, floor: float = 1e-4) -> Tensor:
    """Return the mean over images of the squared error left, as a share of the input's.

    1 where nothing was gained; its -10 log10 is an image's gain in dB, so that lightly and heavily
    damaged images count alike. ``floor`` (40 dB) is added below the line: what was not damaged and
    is changed by as much costs 1 too.

    >>> relative_mse(torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)).item()
    0.0
    """
    left = (output - target).square().mean((1, 2, 3))
    damage = (given - target).square().mean((1, 2, 3))
    return (left / (damage + floor)).mean()


class _Clamp(torch.autograd.Function):
    """Clamp to 0..1 whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def clamp_straight_through(x: Tensor) -> Tensor:
    """Clamp to 0..1 in the forward pass and let every gradient through in the backward pass."""
    clamped: Tensor = _Clamp.apply(x)  # type: ignore[no-untyped-call]
    return clamped


def check_ms_ssim(side: int) -> None:
    """Raise ``ImgtoolError`` (code 2) where crops are too small for MS-SSIM."""
    if side < MS_SSIM_SMALLEST:
        raise ImgtoolError(
            f"MS-SSIM needs crops of at least {MS_SSIM_SMALLEST} pixels, not {side}",
            "take larger crops (--crop 176), or another --loss",
            USAGE,
        )


def ms_ssim_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return 1 - MS-SSIM (Wang, Simoncelli and Bovik, 2003) of images clamped to 0..1.

    Computed in float32 whatever autocast says: half precision overflows in its variances.

    Raises:
        ImgtoolError: Code 2, when a side is under 161 pixels, which five scales do not allow.
    """
    check_ms_ssim(min(output.shape[-2:]))
    with torch.autocast(output.device.type, enabled=False):
        similarity: Tensor = ms_ssim(clamp_straight_through(output.float()), target.float(), data_range=1.0)
    return 1 - similarity


def ssim_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return 1 - SSIM (Wang, Bovik, Sheikh and Simoncelli, 2004) of images clamped to 0..1.

    A Gaussian window of 11 pixels and sigma 1.5, where it fits; K = 0.01 and 0.03. Computed in float32
    whatever autocast says.

    Args:
        output: ``(B, C, H, W)``, sides of at least 11 pixels.
        target: The same.
    """
    with torch.autocast(output.device.type, enabled=False):
        similarity: Tensor = ssim(clamp_straight_through(output.float()), target.float(), data_range=1.0)
    return 1 - similarity


def fidelity_and_features(
    output: Tensor, target: Tensor, features: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the terms of the loss of the Mobile AI 2021 challenge's baseline: 20 MSE + VGG + 20 (1 - SSIM).

    Ignatov et al., "Learned smartphone ISP on mobile NPUs with deep learning, Mobile AI 2021 challenge:
    report", CVPRW 2021; the weights are those of its code.

    Args:
        output: ``(B, 3, H, W)`` sRGB, nominally in 0..1.
        target: The same.
        features: Pictures to what a fixed network sees in them, of which the MSE is taken.
    """
    with torch.no_grad():
        wanted = features(target)
    return {
        "mse": 20 * F.mse_loss(output, target),
        "vgg": F.mse_loss(features(output), wanted),
        "ssim": 20 * ssim_loss(output, target),
    }


def masked_ssim(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean SSIM of each image over the windows that lie wholly inside its mask, ``(B,)``.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural
    similarity", 2004: Gaussian window of 11 pixels and sigma 1.5, K = 0.01 and 0.03. Computed in
    float32 at least, whatever autocast says. An image without such a window counts as equal, 1.

    Args:
        output: ``(B, C, H, W)`` in 0..1, sides of at least 11 pixels.
        target: The same.
        mask: ``(B, 1, H, W)``, 1 where the images may be compared, else 0.
    """
    with torch.autocast(output.device.type, enabled=False):
        output, target = (each if each.dtype == torch.float64 else each.float() for each in (output, target))
        mean, other, squares, product = _windows(
            torch.stack([output, target, output * output + target * target, output * target])
        )
        variances = squares - mean * mean - other * other
        similarity = (2 * mean * other + 1e-4) / (mean * mean + other * other + 1e-4)
        similarity = similarity * (2 * (product - mean * other) + 9e-4) / (variances + 9e-4)
        inside = -F.max_pool2d(-mask.to(output.dtype), 11, 1)
        count = inside.sum((1, 2, 3))
        total = (similarity.mean(1, keepdim=True) * inside).sum((1, 2, 3))
        return torch.where(count > 0, total / count.clamp(min=1), torch.ones_like(total))


def _windows(images: Tensor) -> Tensor:
    """Return means over Gaussian windows of 11 pixels, of ``(..., H, W)``, where the window fits.

    As products with band matrices: on CPUs 8 times as fast, forth and back, as convolutions of one channel.
    """
    down, across = (_bands(size, images) for size in images.shape[-2:])
    return down.T @ images @ across


def _bands(size: int, like: Tensor) -> Tensor:
    """Return the ``(size, size - 10)`` matrix whose columns are the windows along one side."""
    place = torch.arange(size, device=like.device)[:, None] - torch.arange(5, size - 5, device=like.device)
    weights = torch.exp(-place.to(like.dtype).square() / (2 * 1.5**2)) * (place.abs() <= 5)
    return weights / weights.sum(0)
