"""Writes small camera RAW files for tests, whole or wrong on purpose: uncompressed Bayer DNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imgtool import dng
from imgtool.mosaic import PATTERNS, Mosaic

__all__ = ["PATTERNS", "SRGB_CAMERA", "mosaic", "write"]

SRGB_CAMERA = (3.2405, -1.5372, -0.4985, -0.9693, 1.8760, 0.0416, 0.0556, -0.2040, 1.0573)
"""XYZ to camera of a camera whose colours are those of linear sRGB."""


def mosaic(rgb: npt.NDArray[Any], pattern: str = "RGGB") -> npt.NDArray[Any]:
    """Keep one colour of each pixel: ``(H, W, 3)`` to ``(H, W)``."""
    flat = np.empty(rgb.shape[:2], rgb.dtype)
    for place, colour in enumerate(pattern):
        part = np.s_[place // 2 :: 2, place % 2 :: 2]
        flat[part] = rgb[..., "RGB".index(colour)][part]
    return flat


def write(
    path: Path,
    values: npt.NDArray[np.uint16],
    pattern: str = "RGGB",
    *,
    black: int | Sequence[int] = 64,
    white: int = 4095,
    neutral: Sequence[float] | None = (0.5, 1.0, 0.7),
    matrix: Sequence[float] | None = SRGB_CAMERA,
    more: Sequence[tuple[int, int, Any]] = (),
) -> Path:
    """Write a mosaic as a DNG.

    Args:
        path: The file.
        values: ``(H, W)``.
        pattern: Colours of the first two pixels of the first two rows; of 2x2, 4x4, ... letters.
        black: Level of black: one, or four for the places of the pattern.
        white: Level of white.
        neutral: AsShotNeutral: the camera's idea of white, R, G, B.
        matrix: ColorMatrix1, XYZ to camera at D65, row by row.
        more: Further tags: (number, type, values); they replace what is written without them.
    """
    frame = Mosaic(
        values,
        pattern,
        black=(black,) if isinstance(black, int) else tuple(black),  # type: ignore[arg-type]
        white=white,
        gains=None if neutral is None else tuple(1 / part for part in neutral),  # type: ignore[arg-type]
        xyz_to_camera=None if matrix is None else np.array(matrix),
        camera="Maker Model 1",
    )
    dng.write(path, frame, more)
    return path
