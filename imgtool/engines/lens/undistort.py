"""Undistortion in torch: differentiable in the coefficients, for losses and networks.

The model leads from the straight picture to the photo (see ``geometry``), so straightening is one
look-up per output pixel, closed in form. Coordinates are computed in float32 at least, outside
autocast: at 6000 pixels half precision would misplace them by 0.7 pixels and bfloat16 by 6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from imgtool.engines.lens.geometry import BrownConrady, diagonal

FARTHEST = 4.0
"""Grid coordinates are held within this, in half widths: grid_sample turns huge ones into NaN."""
TOLERANCE = 0.01
"""Pixels by which a look-up may miss the photo and still count as inside: rounding does."""


def _wide(coefficients: Tensor) -> Tensor:
    """Return the coefficients in float64 where they are, else in float32."""
    return coefficients if coefficients.dtype == torch.float64 else coefficients.float()


def _model(coefficients: Tensor, shape: tuple[int, ...]) -> BrownConrady:
    """Return the model whose fields are columns of a batch, shaped to broadcast over points."""
    if coefficients.ndim != 2 or coefficients.shape[1] not in (4, 5):
        raise ValueError(f"coefficients are (B, 4) or (B, 5), not {tuple(coefficients.shape)}")
    columns: list[Any] = [column.reshape(-1, *shape) for column in coefficients.unbind(1)]
    return BrownConrady(*columns)


def sampling_grid(coefficients: Tensor, height: int, width: int, zoom: Tensor | float = 1.0) -> Tensor:
    """Return where each pixel of the straight picture lies in the photo.

    Args:
        coefficients: ``(B, 4)`` k1, k2, p1, p2, or ``(B, 5)`` with k3, half-diagonal normalisation.
        height: Of photo and output, in pixels.
        width: The same.
        zoom: How much larger the straight picture is shown (see ``geometry.zoom``): one number, or
            ``(B,)``.

    Returns:
        ``(B, H, W, 2)`` x, y for ``grid_sample`` with ``align_corners=True``: float64 where the
        coefficients are, else float32; within ±``FARTHEST``, and never NaN.

    Raises:
        ValueError: Coefficients of another shape.
    """
    with torch.autocast(coefficients.device.type, enabled=False):
        wide = _wide(coefficients)
        facts: dict[str, Any] = {"dtype": wide.dtype, "device": wide.device}
        size = diagonal(width, height)
        factor = torch.as_tensor(zoom, **facts).reshape(-1, 1, 1)
        x = (torch.arange(width, **facts) * 2 - (width - 1)) / size
        y = (torch.arange(height, **facts) * 2 - (height - 1)) / size
        xd, yd = _model(wide, (1, 1)).distort(x.reshape(1, 1, -1) / factor, y.reshape(1, -1, 1) / factor)
        found = torch.stack([xd * (size / max(width - 1, 1)), yd * (size / max(height - 1, 1))], dim=-1)
        return found.nan_to_num(FARTHEST, FARTHEST, -FARTHEST).clamp(-FARTHEST, FARTHEST)


def undistort(images: Tensor, coefficients: Tensor, zoom: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Straighten photos; differentiable in photos, coefficients and zoom.

    Args:
        images: ``(B, C, H, W)`` photos of any range.
        coefficients: See ``sampling_grid``.
        zoom: See ``sampling_grid``.

    Returns:
        The straight pictures in the type of ``images``, bilinear, 0 where the photo has nothing;
        and ``(B, 1, H, W)``, 1 where the photo has something and 0 where not.

    Raises:
        ValueError: Coefficients of another shape.
    """
    height, width = images.shape[-2:]
    grid = sampling_grid(coefficients, height, width, zoom)
    slack = grid.new_tensor([2 * TOLERANCE / max(width - 1, 1), 2 * TOLERANCE / max(height - 1, 1)])
    inside = (grid.detach().abs() <= 1 + slack).all(dim=-1, keepdim=True)
    grid = torch.where(inside, grid.clamp(-1, 1), grid)
    with torch.autocast(images.device.type, enabled=False):
        straight = functional.grid_sample(
            images.to(grid.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=True
        )
    mask = inside.movedim(-1, 1)
    return straight.to(images.dtype), mask.to(images.dtype)


def displacement(coefficients: Tensor, points: Tensor) -> Tensor:
    """Return by how much the model moves points of the straight picture on their way to the photo.

    Args:
        coefficients: ``(B, 4)`` or ``(B, 5)``; see ``sampling_grid``.
        points: ``(N, 2)`` x, y in the half-diagonal normalisation.

    Returns:
        ``(B, N, 2)`` in half diagonals, in the type of ``sampling_grid``.

    Raises:
        ValueError: Coefficients of another shape.
    """
    with torch.autocast(coefficients.device.type, enabled=False):
        wide = _wide(coefficients)
        x, y = points.to(wide).unbind(-1)
        xd, yd = _model(wide, (1,)).distort(x, y)
        return torch.stack([xd - x, yd - y], dim=-1)
