"""The photo, and how its numbers change type."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from imgtool.engine import Pixels

Array = npt.NDArray[Any]

LARGE = 64_000_000
"""Pixels of a photo from which memory counts more than all else."""

_NEAREST_EIGHT_BIT: Array = ((np.arange(65536) + 128) // 257).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo, upright.

    Attributes:
        pixels: ``(H, W, 3)`` RGB, C-contiguous: uint8, uint16 (full range) or float32 (nominally
            0..1, other values are kept). Of a grey photo made by ``with_pixels``, the three are one memory,
            that is not to be written to.
        alpha: ``(H, W)`` of the same type, not multiplied into the pixels; None where there is none.
        grey: True where the file had one channel; the three are then equal.
        exif: EXIF block (a TIFF structure, without "Exif" in front), orientation 1.
        icc: ICC profile.
        xmp: XMP packet.
        format: What the file was: "jpg", "png", "tif", "webp", "bmp" or "raw".
    """

    pixels: Pixels
    alpha: Pixels | None = None
    grey: bool = False
    exif: bytes | None = None
    icc: bytes | None = None
    xmp: bytes | None = None
    format: str = ""

    def with_pixels(self, pixels: Pixels) -> Photo:
        """Return this photo with other pixels; alpha takes their type and stays where its size fits.

        Args:
            pixels: ``(H, W, 3)``; or ``(H, W)``, which makes the photo grey, without its ICC profile
                where that is not for grey.
        """
        fits = self.alpha is not None and self.alpha.shape == pixels.shape[:2]
        alpha = convert(self.alpha, pixels.dtype) if fits and self.alpha is not None else None
        if pixels.ndim == 2:
            icc = self.icc if (self.icc or b"")[16:20] == b"GRAY" else None
            return replace(self, pixels=_three(pixels), alpha=alpha, grey=True, icc=icc)
        plain: Array = np.ascontiguousarray(pixels)
        return replace(self, pixels=plain, alpha=alpha)

    def rows(self, first: int, last: int) -> Photo:
        """Return the photo of some of the rows, not copied."""
        alpha = None if self.alpha is None else self.alpha[first:last]
        return replace(self, pixels=self.pixels[first:last], alpha=alpha)


def _three(grey: Array) -> Array:
    """Return ``(H, W)`` as three equal channels in the same memory."""
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))


def is_large(height: int, width: int) -> bool:
    """Tell whether a photo is to be read and written without a second copy of it."""
    return height * width >= LARGE


def to_float(pixels: Array) -> npt.NDArray[np.float32]:
    """Return float32, with the full range of an integer type as 0..1; floats stay as they are."""
    plain = pixels.astype(np.float32, copy=False)
    return plain if pixels.dtype.kind == "f" else plain / np.float32(np.iinfo(pixels.dtype).max)


def to_type(values: Array, dtype: npt.DTypeLike) -> Array:
    """Return values of 0..1 as a type: clipped and rounded to nearest for integers (NaN becomes 0)."""
    wanted = np.dtype(dtype)
    if wanted.kind == "f":
        return values.astype(wanted, copy=False)
    plain = np.clip(np.nan_to_num(values, nan=0.0), 0, 1).astype(np.float32, copy=False)
    scaled = plain * np.float32(np.iinfo(wanted).max)
    rounded: Array = np.rint(scaled).astype(wanted)
    return rounded


def convert(pixels: Array, dtype: npt.DTypeLike) -> Array:
    """Return pixels in another type, rounded to nearest: 16 to 8 bit is v / 257."""
    wanted = np.dtype(dtype)
    if pixels.dtype == wanted:
        return pixels
    if pixels.ndim == 3 and not pixels.strides[2]:
        return _three(convert(pixels[..., 0], wanted))
    if pixels.dtype == np.uint16 and wanted == np.uint8:
        eight: Array = _NEAREST_EIGHT_BIT[pixels]
        return eight
    if pixels.dtype == np.uint8 and wanted == np.uint16:
        return pixels.astype(np.uint16) * np.uint16(257)
    return to_type(to_float(pixels), wanted)


def turn(plane: Array, orientation: int) -> Array:
    """Bring an array ``(H, W, ...)`` upright that lies as the EXIF orientation (1..8) says."""
    if orientation >= 5:
        plane = plane.swapaxes(0, 1)  # 5 is the mirror image on the main diagonal; 6, 7, 8 flip it too
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(plane[rows, columns])


def split(array: Array) -> tuple[Array, Array | None, bool]:
    """Split 1 to 4 channels, ``(H, W)`` or ``(H, W, C)``, into RGB, alpha and whether it was grey."""
    channels = array[..., None] if array.ndim == 2 else array
    count = channels.shape[2]
    colour = channels[..., :1].repeat(3, axis=2) if count < 3 else channels[..., :3]
    alpha = np.ascontiguousarray(channels[..., -1]) if count in (2, 4) else None
    return np.ascontiguousarray(colour), alpha, count < 3


def _mean(colour: Array) -> Array:
    with np.errstate(invalid="ignore"):  # infinities of both signs have none
        mean: Array = to_float(colour).mean(axis=2, dtype=np.float64)
        return mean


def merge(photo: Photo) -> Array:
    """Return a photo's channels as one array: ``(H, W)`` grey, or ``(H, W, C)`` with C of 2, 3 or 4."""
    colour: Array = photo.pixels
    if photo.grey:
        first = colour[..., 0]
        same = not colour.strides[2] or all(np.array_equal(first, colour[..., i]) for i in (1, 2))
        colour = first if same else to_type(_mean(colour), colour.dtype)
    return np.ascontiguousarray(colour if photo.alpha is None else np.dstack([colour, photo.alpha]))
