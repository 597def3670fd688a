"""Distortion models applied to whole photos: straightened, distorted, and where they have nothing.

The output is made block by block: where its pixels lie in the source is computed in float32 (within
0.001 pixels at 24 MP), and OpenCV looks them up. Of the source only the rows and columns that a block
needs are shown to OpenCV, whose look-up ends at edges of 32767 pixels, so panoramas work too.

The arithmetic is that of ``geometry``, its terms sorted so that those of x and of y alone are computed
once a row or column: with X, Y the straight coordinates around the centre of distortion and
q = 1 + k1 r^2 + k2 r^4 + k3 r^6 + 2 p1 Y + 2 p2 X, the photo's are X q + p2 r^2 and Y q + p1 r^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from imgtool.engines.lens.geometry import BrownConrady, diagonal

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Interpolation = Literal["linear", "cubic", "lanczos"]
Border = Literal["black", "replicate", "reflect"]
Done = Callable[[int, int], None]

BLOCK = 1 << 19
"""Output pixels of a block: 87 rows of 24 MP. Larger ones take more memory and no less time."""
LONGEST = 32_000
"""Edges that cv2.remap takes end at 32767."""
_CHUNK = 1 << 16  # so that the arithmetic stays in the processor's cache
_REACH = 8  # pixels around a look-up that may count: Lanczos takes 4
_NEWTON = 6
_WAYS = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "lanczos": cv2.INTER_LANCZOS4}
_BORDERS = {
    "black": cv2.BORDER_CONSTANT, "replicate": cv2.BORDER_REPLICATE, "reflect": cv2.BORDER_REFLECT_101,
}  # fmt: skip


class Block(NamedTuple):
    """A rectangle of the output: rows top to bottom - 1, columns left to right - 1."""

    top: int
    bottom: int
    left: int
    right: int


Place = Callable[[Block], tuple[Floats, Floats]]
"""Gives for each pixel of a block its x and y in the source, in pixels."""


def _nothing(finished: int, total: int) -> None:
    """Tell nobody."""


def _axis(start: int, stop: int, length: int, unit: float, zoom: float, centre: float) -> Floats:
    """Return normalised coordinates of pixels, around the centre of distortion."""
    exact = (np.arange(start, stop) - (length - 1) / 2) / (unit * zoom) - centre
    return exact.astype(np.float32)


def _chunks(block: Block) -> list[slice]:
    rows = max(1, _CHUNK // (block.right - block.left))
    return [slice(top, top + rows) for top in range(0, block.bottom - block.top, rows)]


def _straightening(model: BrownConrady, zoom: float, width: int, height: int) -> Place:
    """Return the look-up of a straight picture's pixels in the photo."""
    unit = diagonal(width, height) / 2
    middle_x, middle_y = (width - 1) / 2 + model.cx * unit, (height - 1) / 2 + model.cy * unit
    terms = (model.k3, model.k2, model.k1) if model.k3 else (model.k2, model.k1)

    @np.errstate(over="ignore", invalid="ignore")
    def place(block: Block) -> tuple[Floats, Floats]:
        """Return columns and rows to look up, in pixels, for each pixel of a block."""
        across = _axis(block.left, block.right, width, unit, zoom, model.cx)[None]
        down = _axis(block.top, block.bottom, height, unit, zoom, model.cy)[:, None]
        found_x, found_y = np.empty((2, down.size, across.size), np.float32)
        flat, sideways, wide = 1 + 2 * model.p1 * down, 2 * model.p2 * across, across * unit
        for rows in _chunks(block):
            r2 = across * across + down[rows] * down[rows]
            q = r2 * np.float32(terms[0])
            for coefficient in terms[1:]:
                q += coefficient
                q *= r2
            q += flat[rows]
            if model.p2:
                q += sideways
            for target, linear, tangential, middle in (
                (found_x[rows], wide, model.p2, middle_x),
                (found_y[rows], down[rows] * unit, model.p1, middle_y),
            ):
                np.multiply(linear, q, out=target)
                if tangential:
                    target += r2 * (tangential * unit)
                target += middle
        return found_x, found_y

    return place


def _distorting(model: BrownConrady, zoom: float, width: int, height: int) -> Place:
    """Return the look-up of a distorted photo's pixels in the straight picture."""
    unit = diagonal(width, height) / 2

    @np.errstate(over="ignore", invalid="ignore")
    def place(block: Block) -> tuple[Floats, Floats]:
        """Return columns and rows to look up, in pixels, for each pixel of a block."""
        across = _axis(block.left, block.right, width, unit, 1.0, 0.0)[None]
        down = _axis(block.top, block.bottom, height, unit, 1.0, 0.0)[:, None]
        found_x, found_y = np.empty((2, down.size, across.size), np.float32)
        for rows in _chunks(block):
            x, y = np.broadcast_arrays(across, down[rows])
            x, y = model.undistort(x, y, _NEWTON)
            found_x[rows] = x * (unit * zoom) + (width - 1) / 2
            found_y[rows] = y * (unit * zoom) + (height - 1) / 2
        return found_x, found_y

    return place


def _fold(found: Floats, length: int) -> None:
    """Mirror coordinates into 0 .. length - 1, in place, as often as that takes."""
    last = max(length - 1, 1)
    np.remainder(found, 2 * last, out=found)
    np.subtract(last, np.abs(found - last), out=found)
    np.minimum(found, length - 1, out=found)


def _span(found: Floats, length: int, border: Border) -> tuple[int, int]:
    """Return which source pixels, from first to last + 1, are looked at along one axis.

    Coordinates far outside, or not finite, are brought to where the border is the same.
    """
    low, high = float(found.min()), float(found.max())
    if not (low >= -_REACH and high <= length - 1 + _REACH):
        np.nan_to_num(found, copy=False, nan=-_REACH, posinf=1e9, neginf=-1e9)
        if border == "reflect":
            _fold(found, length)
        np.clip(found, -_REACH, length - 1 + _REACH, out=found)
        low, high = float(found.min()), float(found.max())
    first = min(max(math.floor(low) - _REACH, 0), length - 1)
    return first, max(first + 1, min(math.ceil(high) + _REACH + 1, length))


def _share(x: Floats, y: Floats, width: int, height: int) -> Floats:
    """Return how much of each looked-up pixel lies within the source, 0..1, as bilinear weights say."""
    across, down = (
        np.minimum(found + 1, length - found).clip(0, 1) for found, length in ((x, width), (y, height))
    )
    share: Floats = np.nan_to_num(across * down, nan=0.0)
    return share


def _halves(block: Block) -> tuple[Block, Block]:
    top, bottom, left, right = block
    if right - left > bottom - top:
        middle = (left + right) // 2
        return Block(top, bottom, left, middle), Block(top, bottom, middle, right)
    middle = (top + bottom) // 2
    return Block(top, middle, left, right), Block(middle, bottom, left, right)


def _look_up(
    pixels: Array, out: Array, block: Block, place: Place, way: tuple[Interpolation, Border]
) -> None:
    """Fill a block of the output."""
    interpolation, border = way
    height, width = pixels.shape[:2]
    if border == "reflect" and min(height, width) == 1:
        border = "replicate"  # one pixel mirrors to itself, but with Lanczos cv2.remap never returns
    x, y = place(block)
    left, right = _span(x, width, border)
    top, bottom = _span(y, height, border)
    if max(right - left, bottom - top) > LONGEST and x.size > 1:
        for half in _halves(block):
            _look_up(pixels, out, half, place, way)
        return
    black = border == "black" and interpolation != "linear"
    share = _share(x, y, width, height) if black else None
    if left:
        x -= left
    if top:
        y -= top
    target = out[block.top : block.bottom, block.left : block.right]
    source = pixels[top:bottom, left:right]
    cv2.remap(source, x, y, _WAYS[interpolation], target, _BORDERS["replicate" if black else border], 0)
    if share is not None and share.min() < 1:
        shade = share.reshape(share.shape + (1,) * (target.ndim - 2))
        target[...] = np.rint(target * shade) if target.dtype.kind == "u" else target * shade


def _blocks(width: int, height: int) -> list[Block]:
    columns = min(width, LONGEST)
    rows = min(max(1, BLOCK // columns), LONGEST)
    return [
        Block(top, min(top + rows, height), left, min(left + columns, width))
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]


def _filled(
    pixels: Array, place: Place, interpolation: Interpolation, border: Border, done: Done = _nothing
) -> Array:
    out = np.empty_like(pixels, order="C")
    blocks = _blocks(pixels.shape[1], pixels.shape[0])
    for number, block in enumerate(blocks, 1):
        _look_up(pixels, out, block, place, (interpolation, border))
        done(number, len(blocks))
    return out


def straighten(
    pixels: Array,
    model: BrownConrady,
    zoom: float = 1.0,
    *,
    interpolation: Interpolation = "linear",
    border: Border = "black",
    done: Done = _nothing,
) -> Array:
    """Straighten a photo.

    Args:
        pixels: ``(H, W, 3)``, or ``(H, W)`` such as an alpha plane: uint8, uint16 or float32.
        model: The distortion of the photo.
        zoom: How much larger the straight picture is shown (see ``geometry.zoom``), above 0.
        interpolation: Between pixels: bilinear, bicubic (a = -0.75) or Lanczos of 8x8 pixels. Integers
            are clipped to their range; floats may overshoot.
        border: What is shown where the photo has nothing. Black fades in over one pixel, whatever the
            interpolation: cubic and Lanczos would else ring along the edge.
        done: Told how many blocks of how many are finished.

    Returns:
        An array of the same shape and type; an equal one where the model is straight and zoom 1.
    """
    if model.straight and zoom == 1:
        done(1, 1)
        return pixels.copy()
    height, width = pixels.shape[:2]
    return _filled(pixels, _straightening(model, zoom, width, height), interpolation, border, done)


def distort(
    pixels: Array,
    model: BrownConrady,
    zoom: float = 1.0,
    *,
    interpolation: Interpolation = "cubic",
    border: Border = "black",
) -> Array:
    """Distort a straight picture: the inverse of ``straighten`` with the same model and zoom.

    Where the look-up lies is found by Newton's method, so the model may not fold.

    Args:
        pixels: As for ``straighten``.
        model: The distortion that the photo gets.
        zoom: How much larger than the photo the straight picture is shown, above 0.
        interpolation: As for ``straighten``.
        border: As for ``straighten``.

    Returns:
        An array of the same shape and type; an equal one where the model is straight and zoom 1.
    """
    if model.straight and zoom == 1:
        return pixels.copy()
    height, width = pixels.shape[:2]
    return _filled(pixels, _distorting(model, zoom, width, height), interpolation, border)


def coverage(model: BrownConrady, zoom: float, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Return how much of each straightened pixel the photo has: ``(H, W)`` uint8, 255 is all.

    The edge is as soft as bilinear interpolation: what a photo of 255 everywhere would become with a
    black border. For a photo with alpha, ``straighten`` its alpha plane instead.

    Args:
        model: The distortion of the photo.
        zoom: As for ``straighten``.
        width: Of photo and output, in pixels.
        height: The same.
    """
    place = _straightening(model, zoom, width, height)
    out = np.empty((height, width), np.uint8)
    for block in _blocks(width, height):
        share = _share(*place(block), width, height)
        out[block.top : block.bottom, block.left : block.right] = np.rint(share * 255)
    return out
