"""The corrected picture: RAW files by LibRaw, linear frames by their camera's matrix, photos by von Kries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgtool import files, raw
from imgtool.engines.awb import angles, reading
from imgtool.engines.awb.camera import Camera
from imgtool.engines.awb.stats import AwbStats

if TYPE_CHECKING:
    from imgtool.engine import Pixels
    from imgtool.images import Photo

Array = npt.NDArray[Any]
White = tuple[float, float]

DAYLIGHT = 5500.0
"""Kelvin of the light that a picture "before" is balanced for, where the camera is known."""

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
"""Of linear sRGB (ITU-R BT.709)."""

SMALL = 640
"""Pixels of the longer side of a picture for a sheet."""

_KEPT = 0.001
_HIGHLIGHT = (0.8, 1.0)
_STRIP = 1 << 20


def linear(values: Array) -> Array:
    """Undo the sRGB curve (IEC 61966-2-1) of values in 0..1; what lies outside keeps its sign."""
    size = np.abs(values)
    below: Array = np.where(size <= 0.04045, size / 12.92, ((size + 0.055) / 1.055) ** 2.4)
    return np.copysign(below, values)


def display(values: Array) -> Array:
    """Apply the sRGB curve (IEC 61966-2-1) to linear values, as ``linear`` undoes it."""
    size = np.abs(values)
    curve: Array = np.where(size <= 0.0031308, 12.92 * size, 1.055 * size ** (1 / 2.4) - 0.055)
    return np.copysign(curve, values)


def gains_of(white: White) -> Array:
    """Return the gains of red, green and blue that make a white point grey, the least of them 1."""
    gains: Array = np.array([1 / white[0], 1.0, 1 / white[1]])
    return np.asarray(gains / gains.min())


def camera_to_srgb(camera: Camera, white: White) -> Array:
    """Return the matrix ``(3, 3)`` from balanced camera RGB to linear sRGB, in which white stays white.

    It is that of the libcamera tuning for the white's colour temperature, or the inverse of the camera's
    colour matrix, its rows scaled as dcraw does it; the identity where nothing is known.
    """
    if camera.tuning is not None:
        return np.asarray(camera.tuning.ccm(camera.locus.nearest(*white)[0]), np.float64)
    if camera.xyz_to_camera is None:
        return np.eye(3)
    forward = camera.xyz_to_camera @ np.linalg.inv(reading.XYZ_TO_SRGB)
    return np.asarray(np.linalg.inv(forward / forward.sum(1, keepdims=True)))


def _by_strips(pixels: Array, change: Callable[[Array], Array]) -> Pixels:
    """Change a picture in strips: a large one takes no second copy in float."""
    from imgtool.images import to_type

    out = np.empty(pixels.shape, pixels.dtype)
    step = max(1, _STRIP // pixels.shape[1])
    for top in range(0, len(pixels), step):
        out[top : top + step] = to_type(change(pixels[top : top + step]), pixels.dtype)
    return out


def develop(frame: Array, stats: AwbStats, white: White, black: float, top: float) -> Pixels:
    """Make a picture of a linear frame.

    The least gain is 1 and everything is clipped at white before the matrix: what is saturated in the
    frame is white, not magenta.

    Args:
        frame: ``(H, W, 3)`` camera RGB, linear; 8 bit come back as 8, 16 bit as 16, floats as floats.
        stats: What is known of its camera.
        white: R/G and B/G of white.
        black: Level of black in the frame.
        top: Level of white.

    Returns:
        sRGB of the same shape and type.
    """
    gains = (gains_of(white) / (top - black)).astype(np.float32)
    matrix = camera_to_srgb(stats.camera, white).T.astype(np.float32)

    def change(strip: Array) -> Array:
        balanced = (np.nan_to_num(strip.astype(np.float32)) - np.float32(black)) * gains
        return display(np.clip(np.clip(balanced, 0, 1) @ matrix, 0, 1))

    return _by_strips(frame, change)


def correct(pixels: Pixels, white: White) -> Pixels:
    """Take a colour cast out of a rendered photo: von Kries' gains in linear light.

    A grey surface keeps its luminance. Towards a channel's clipping the gains fade to none, for what is
    clipped has lost its colour: white stays white.

    Args:
        pixels: ``(H, W, 3)`` sRGB, uint8, uint16 or float32.
        white: R/G and B/G of white in linear sRGB.

    Returns:
        The same type; the same array where the gains are 1.
    """
    light = np.array([white[0], 1.0, white[1]])
    if np.abs(light - 1).max() < _KEPT:
        return pixels
    gains = np.log(float(LUMINANCE @ light) / light).astype(np.float32)

    def change(strip: Array) -> Array:
        """Return rows ``(h, W, 3)`` in display light, 0..1, with the gains; fading towards clipping."""
        from imgtool.images import to_float

        values = linear(np.nan_to_num(to_float(strip)))
        peak = values.max(2, keepdims=True)
        share = np.clip((peak - _HIGHLIGHT[0]) / (_HIGHLIGHT[1] - _HIGHLIGHT[0]), 0, 1)
        return display(values * np.exp(gains * (1 - share * share * (3 - 2 * share))))

    return _by_strips(pixels, change)


@dataclass(frozen=True, eq=False)
class Scene:
    """A frame of which pictures are made.

    Attributes:
        photo: Its metadata; and its pixels, where it is a rendered photo.
        picture: White to picture, ``(H, W, 3)`` sRGB.
        small: White to picture of at most ``SMALL`` pixels a side: quick, where a sheet shows many.
        neutral: The white for which the picture "before" is balanced.
        before: What that is, in words.
    """

    photo: Photo
    picture: Callable[[White], Pixels]
    small: Callable[[White], Pixels]
    neutral: White
    before: str

    def photo_before(self, shown: bool) -> Photo:
        """Return the photo before, with its pixels where they are ``shown``."""
        if not shown or self.photo.pixels.size:
            return self.photo
        return replace(self.photo, pixels=self.picture(self.neutral))


def scene(stats: AwbStats, source: Path | bytes | Photo) -> Scene:
    """Prepare the pictures of a frame.

    Args:
        stats: What ``reading.read`` made of it.
        source: The file, its content, or the photo.

    Raises:
        ImgtoolError: As ``images.read``.
    """
    from imgtool import images

    if isinstance(source, images.Photo):
        return _rendered(source)
    if stats.domain == "srgb":
        return _rendered(images.read(source, stats.name))
    if "true_ct" in stats.about:  # statistics of a Raspberry Pi: the cells are all there is
        return _linear(stats, images.Photo(stats.cells), (0.0, 1.0), np.uint16)
    if reading.is_raw(source, stats.name):
        return _raw(stats, source)
    photo = images.read(source, stats.name)
    return _linear(stats, photo, (stats.black, stats.white), photo.pixels.dtype)


def _shrunk(pixels: Array) -> Array:
    """Return a picture averaged down to ``SMALL`` pixels a side, in its own type."""
    import cv2

    high, wide = pixels.shape[:2]
    scale = SMALL / max(high, wide)
    if scale >= 1:
        return pixels
    size = (max(1, round(wide * scale)), max(1, round(high * scale)))
    return np.asarray(cv2.resize(np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_AREA))


def _rendered(photo: Photo) -> Scene:
    from imgtool.images.metadata import srgb_profile

    little = _shrunk(photo.pixels)
    deep = photo.pixels.dtype == np.uint16
    return Scene(
        replace(photo, icc=srgb_profile()) if deep and photo.icc is None else photo,
        lambda white: correct(photo.pixels, white),
        lambda white: correct(little, white),
        (1.0, 1.0),
        "the photo as it is",
    )


def _neutral(stats: AwbStats) -> tuple[White, str]:
    """Return the white of the picture "before": daylight's, as far as the camera is known."""
    gains = stats.about.get("daylight_gains")
    if gains:
        return (1 / gains[0], 1 / gains[1]), "daylight gains"
    if stats.camera.known:
        r, b = np.asarray(stats.camera.locus.at(DAYLIGHT), np.float64)
        return (float(r), float(b)), f"gains of {DAYLIGHT:.0f} K"
    return (1.0, 1.0), "no gains"


def _linear(stats: AwbStats, photo: Photo, levels: tuple[float, float], dtype: npt.DTypeLike) -> Scene:
    from imgtool.images.metadata import srgb_profile

    wanted = np.dtype(dtype)

    def made(frame: Array, white: White) -> Pixels:
        from imgtool.images import convert

        return convert(develop(frame, stats, white, *levels), wanted)

    little = _shrunk(photo.pixels)
    bare = replace(
        photo, pixels=photo.pixels[:0], icc=srgb_profile()
    )  # linear numbers show nothing to people
    return Scene(
        bare, lambda white: made(photo.pixels, white), lambda white: made(little, white), *_neutral(stats)
    )


def _raw(stats: AwbStats, source: Path | bytes) -> Scene:
    """Let LibRaw render; the small pictures are all made from one rendering, its gains undone."""
    from imgtool.images import Photo, metadata, to_float

    neutral, words = _neutral(stats)
    exif = metadata.exif_of_raw(files.read(source) if isinstance(source, Path) else source)
    none = np.empty((0, 0, 3), np.uint16)
    photo = Photo(none, exif=exif, icc=metadata.srgb_profile(), format="raw")
    kept: list[Array] = []

    def picture(white: White) -> Pixels:
        with files.as_file(source, "input.dng") as path:
            return raw.render(path, list(gains_of(white)))

    def small(white: White) -> Pixels:
        if not kept:
            seen = linear(to_float(_shrunk(picture(neutral))))
            back = np.linalg.inv(camera_to_srgb(stats.camera, neutral)).T
            kept.append((seen @ back / gains_of(neutral)).astype(np.float32))
        return develop(kept[0], stats, white, 0.0, 1.0)

    return Scene(photo, picture, small, neutral, words)


def methods_sheet(view: Scene, whites: Mapping[str, White], title: str, truth: White | None = None) -> bytes:
    """Return a PNG of the picture as each method corrects it, with its gains.

    Args:
        view: The frame.
        whites: Label of a method to the white that it found.
        title: Line at the top.
        truth: The true white, where it is known: then each label says the recovery error in degrees.
    """
    from imgtool import sheets

    tiles = {f"before: {view.before}": view.small(view.neutral)}
    for name, white in whites.items():
        error = "" if truth is None else f", {_error(white, truth):.1f}°"
        tiles[f"{name}: red {1 / white[0]:.2f}, blue {1 / white[1]:.2f}{error}"] = view.small(white)
    if truth is not None:
        tiles[f"truth: red {1 / truth[0]:.2f}, blue {1 / truth[1]:.2f}"] = view.small(truth)
    return sheets.grid(tiles, title=title)


def _error(white: White, truth: White) -> float:
    return float(angles.recovery(np.array(white), np.array(truth))[0])
