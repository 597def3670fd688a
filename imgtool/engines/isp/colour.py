"""The fixed colour front end: balanced camera RGB to sRGB.

The matrix is ``mosaic.camera_to_srgb``'s; the curve is that of IEC 61966-2-1 (sRGB).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imgtool.mosaic import SRGB_TO_XYZ as SRGB_TO_XYZ
from imgtool.mosaic import camera_to_srgb as camera_to_srgb

KNEE = 0.0031308
"""Linear value at which the curve of sRGB begins to bend."""


def encode(linear: Tensor) -> Tensor:
    """Return display values of linear ones by the curve of sRGB, which goes on beyond 0..1.

    >>> encode(torch.tensor([0.0, 0.0031308, 1.0])).round(decimals=4).tolist()
    [0.0, 0.0404, 1.0]
    """
    bent = 1.055 * linear.clamp_min(KNEE).pow(1 / 2.4) - 0.055
    return torch.where(linear <= KNEE, 12.92 * linear, bent)


def decode(display: Tensor) -> Tensor:
    """Return linear values of display ones: the inverse of ``encode``."""
    bent = ((display.clamp_min(12.92 * KNEE) + 0.055) / 1.055).pow(2.4)
    return torch.where(display <= 12.92 * KNEE, display / 12.92, bent)


def linear_of_bytes() -> npt.NDArray[np.float32]:
    """Return the linear values of the 256 levels of an 8-bit photo."""
    table: npt.NDArray[np.float32] = decode(torch.arange(256, dtype=torch.float64) / 255).float().numpy()
    return table


def mix(camera: Tensor, matrix: Tensor) -> Tensor:
    """Apply matrices to images.

    Args:
        camera: ``(B, 3, H, W)``.
        matrix: ``(B, 3, 3)`` or ``(3, 3)``.
    """
    batch = matrix if matrix.ndim == 3 else matrix[None].expand(camera.shape[0], 3, 3)
    return torch.einsum("bij,bjhw->bihw", batch, camera)


def render(camera: Tensor, matrix: Tensor, ev: float = 0.0) -> Tensor:
    """Return the photograph of balanced camera RGB.

    Args:
        camera: ``(B, 3, H, W)`` linear, balanced, white 1.
        matrix: Camera to linear sRGB, ``(3, 3)`` or ``(B, 3, 3)``.
        ev: Exposure compensation in stops.

    Returns:
        The same shape in sRGB, not clipped: losses see what lies outside 0..1.
    """
    linear = mix(camera, matrix)
    return encode(linear * 2.0**ev if ev else linear)
