"""Views of photos of any type for people to look at: bytes, a size, the parts that changed most."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

LARGEST_PIXEL = 32
STRIP = 1 << 20


class Region(NamedTuple):
    """A rectangle of a photo, in pixels from its top left corner."""

    x: int
    y: int
    width: int
    height: int

    def cut(self, pixels: Array) -> Array:
        """Return this part of ``(H, W, ...)`` pixels, not copied."""
        return pixels[self.y : self.y + self.height, self.x : self.x + self.width]


def to_bytes(pixels: Array) -> Bytes:
    """Return ``(H, W, 3)`` uint8 RGB of pixels in any type that a photo may have.

    Args:
        pixels: ``(H, W)``, ``(H, W, 1)``, ``(H, W, 3)`` or ``(H, W, 4)`` (alpha is dropped); uint8,
            uint16 (full range) or floating (0..1; what lies outside is clipped, NaN is black).

    Raises:
        TypeError: The pixels are of another type.
    """
    if pixels.dtype == np.uint16:
        values = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif np.issubdtype(pixels.dtype, np.floating):
        known = np.nan_to_num(pixels, nan=0.0, posinf=1.0, neginf=0.0)
        values = np.rint(np.clip(known, 0, 1) * 255).astype(np.uint8)
    elif pixels.dtype == np.uint8:
        values = pixels
    else:
        raise TypeError(f"pixels of type {pixels.dtype}; uint8, uint16 or float is needed")
    colours = np.atleast_3d(values)[:, :, :3]
    return np.ascontiguousarray(np.broadcast_to(colours, (*colours.shape[:2], 3)))


def shrink(pixels: Array, width: int, height: int) -> Bytes:
    """Return pixels as uint8 RGB, averaged down by area to fit a box; never enlarged.

    Args:
        pixels: As for ``to_bytes``.
        width: Of the box, in pixels.
        height: Of the box, in pixels.
    """
    import cv2

    rows, columns = pixels.shape[:2]
    scale = min(width / columns, height / rows)
    if scale >= 1:
        return to_bytes(pixels)
    # Scaled before the conversion: the copy is then small, whatever the photo's type.
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    return to_bytes(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))


def fit(pixels: Array, width: int, height: int) -> Bytes:
    """Return pixels as uint8 RGB scaled to fit a box, its proportions kept.

    A photo smaller than the box is enlarged by the largest whole factor that fits, each pixel
    staying a sharp square.

    Args:
        pixels: As for ``to_bytes``.
        width: Of the box, in pixels.
        height: Of the box, in pixels.
    """
    small = shrink(pixels, width, height)
    factor = min(width // small.shape[1], height // small.shape[0], LARGEST_PIXEL)
    return enlarge(small, max(1, factor))


def enlarge(pixels: Bytes, factor: int) -> Bytes:
    """Return pixels with each one repeated ``factor`` times in both directions."""
    return np.repeat(np.repeat(pixels, factor, axis=0), factor, axis=1)


def detail_view(photo: tuple[int, int], view: tuple[int, int], part: float) -> tuple[int, tuple[int, int]]:
    """Return the whole factor of a detail view and the part of the photo that it shows.

    The factor is 1 (a "100 %" view) for photos of today's cameras; small photos are enlarged until
    a view shows no more than a part of them, but not above 8.

    Args:
        photo: Width and height of the photo in pixels.
        view: Width and height of the view in pixels.
        part: Largest share of the photo's width and of its height that a view shows.
    """
    factor = max(math.ceil(shown / (part * whole)) for shown, whole in zip(view, photo, strict=True))
    factor = max(1, min(8, factor))
    size = tuple(min(whole, max(1, shown // factor)) for shown, whole in zip(view, photo, strict=True))
    return factor, (size[0], size[1])


def _texture(pixels: Array, cell: int) -> npt.NDArray[np.float32]:
    """Root mean square gradient in square cells, in strips: a large photo takes no second copy."""
    import cv2

    rows, columns = pixels.shape[0] // cell, pixels.shape[1] // cell
    texture = np.empty((rows, columns), np.float32)
    step = max(1, STRIP // (pixels.shape[1] * cell))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        strip = to_bytes(pixels[first * cell : last * cell + 1, : columns * cell + 1])
        grey = cv2.cvtColor(strip, cv2.COLOR_RGB2GRAY).astype(np.float32)
        energy = np.zeros_like(grey)
        energy[:, :-1] += np.square(np.diff(grey, axis=1))
        energy[:-1] += np.square(np.diff(grey, axis=0))
        whole = energy[: (last - first) * cell, : columns * cell]
        mean = cv2.resize(whole, (columns, last - first), interpolation=cv2.INTER_AREA)
        texture[first:last] = np.sqrt(mean)
    return texture


def _far_from(row: int, column: int, shape: tuple[int, ...]) -> Array:
    """Weights that rise from 0 at a cell to 1 far away: three views of one wall say less than one."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    reach = 0.2 * math.hypot(*shape)
    weights: Array = 1 - np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * reach**2))
    return weights


def regions(before: Array, after: Array, count: int, size: tuple[int, int]) -> list[Region]:
    """Find where two versions of a photo differ most in detail.

    The first differs most; the next ones keep away from it, a little less difference being worth
    another part of the photo. Where the versions are equal, the regions with the most detail come.

    Args:
        before: ``(H, W, 3)`` pixels; see ``to_bytes``.
        after: The same shape.
        count: Regions wanted; fewer come back where no more fit without overlap.
        size: Width and height of a region, at most those of the photo.
    """
    width, height = size
    cell = max(1, min(size) // 16)
    old, new = _texture(before, cell), _texture(after, cell)
    gain = (np.abs(new - old) + 1e-3 * (new + old)).astype(np.float64)
    across, down = max(1, width // cell), max(1, height // cell)
    sums = np.pad(gain, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    score = sums[down:, across:] - sums[:-down, across:] - sums[down:, :-across] + sums[:-down, :-across]
    # A region that does not end on a cell may be moved back by part of one: keep them further apart.
    right, below = across + 2 * bool(width % cell), down + 2 * bool(height % cell)
    found: list[Region] = []
    while len(found) < count and score.max() > -math.inf:
        row, column = (int(n) for n in np.unravel_index(score.argmax(), score.shape))
        x, y = min(column * cell, before.shape[1] - width), min(row * cell, before.shape[0] - height)
        found.append(Region(x, y, width, height))
        score *= _far_from(row, column, score.shape)
        top, left = max(0, row - below + 1), max(0, column - right + 1)
        score[top : row + below, left : column + right] = -math.inf
    return found


def same_size(before: Array, after: Array) -> Array:
    """Return ``before`` at the size of ``after``, for engines that change the size."""
    import cv2

    if before.shape[:2] == after.shape[:2]:
        return before
    return np.asarray(cv2.resize(before, (after.shape[1], after.shape[0]), interpolation=cv2.INTER_LINEAR))


def colour_profile(icc: bytes) -> bytes | None:
    """Return an ICC profile if it can describe an RGB picture, else None."""
    return icc if icc[16:20] == b"RGB " else None
