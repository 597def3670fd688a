"""Losses: pure functions, tensors in, scalar tensors out. Images are ``(B, C, H, W)`` in 0..1."""

from __future__ import annotations

import torch
from pytorch_msssim import ms_ssim
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
