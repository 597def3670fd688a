"""Measured lens profiles: lensfun's database, through the optional package lensfunpy.

A profile is found by what EXIF says of camera, lens and focal length. Whatever model lensfun has for
the lens, its own code is asked where points lie, and k1, k2 and a zoom are fitted to that.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from imgtool.engines.lens import formats
from imgtool.engines.lens.geometry import BrownConrady, diagonal, normalise
from imgtool.errors import ImgtoolError

HINT = "pip install 'imgtool[lensfun]'"
SAME_ASPECT = 0.02
"""Relative difference between the aspect of a photo and that of its exposure that is no crop."""
FOCAL_SLACK = 0.05
"""Relative distance of a focal length outside a lens's range that rounding explains."""
ROWS = 24
"""Rows, from the middle down, at which lensfun is asked where points lie."""
COLUMNS = 32
"""Points in each of them, from the middle to the right."""

_BASE, _TAGS = ExifTags.Base, ExifTags.IFD


class Taken(NamedTuple):
    """What EXIF says of how a photo was taken; "" and 0 where it says nothing.

    Attributes:
        make: Maker of the camera.
        model: The camera.
        lens: The lens.
        focal_mm: Focal length in mm.
        cropped: Whether the photo is known to be a part of the exposure: digital zoom.
        width: Of the exposure, in pixels.
        height: The same.
    """

    make: str = ""
    model: str = ""
    lens: str = ""
    focal_mm: float = 0.0
    cropped: bool = False
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Profile:
    """A lens profile found for a photo.

    Attributes:
        model: The distortion.
        camera: Maker and model in lensfun's words.
        lens: The lens in lensfun's words.
        focal_mm: Focal length in mm.
        residual_px: Largest distance between lensfun's coordinates and the model's, up to a zoom.
    """

    model: BrownConrady
    camera: str
    lens: str
    focal_mm: float
    residual_px: float


def available() -> bool:
    """Tell whether lensfunpy is installed."""
    return importlib.util.find_spec("lensfunpy") is not None


def facts_of(exif: bytes | None) -> Taken:
    """Return what EXIF says of how a photo was taken.

    Args:
        exif: A TIFF structure, with or without "Exif" in front; None and damaged ones say nothing.
    """
    tags = _tags(exif)
    focal, zoom = _positive(tags.get(_BASE.FocalLength)), _positive(tags.get(_BASE.DigitalZoomRatio))
    return Taken(
        make=_text(tags.get(_BASE.Make)),
        model=_text(tags.get(_BASE.Model)),
        lens=_text(tags.get(_BASE.LensModel)),
        focal_mm=focal,
        cropped=zoom > 1,
        width=int(_positive(tags.get(_BASE.ExifImageWidth))),
        height=int(_positive(tags.get(_BASE.ExifImageHeight))),
    )


def group_key(exif: bytes | None, width: int, height: int) -> tuple[str, str, str, float, int, int] | None:
    """Return what photos of one distortion have in common: camera, lens, focal length and size.

    Args:
        exif: See ``facts_of``.
        width: Of the photo, in pixels.
        height: The same.

    Returns:
        A key to group by; None where EXIF does not name camera and focal length, or where the photo
        is a part of the exposure.
    """
    taken = facts_of(exif)
    if not taken.model or not taken.focal_mm or _part(taken, width, height):
        return None
    return taken.make, taken.model, taken.lens, round(taken.focal_mm, 1), width, height


def find(exif: bytes | None, width: int, height: int) -> Profile | None:
    """Return the profile of the lens that took a photo.

    Args:
        exif: See ``facts_of``.
        width: Of the photo, upright, in pixels.
        height: The same.

    Returns:
        None where EXIF does not name camera and focal length, lensfun does not know the camera or
        the lens, the lens is not rectilinear, or the photo is a part of the exposure.

    Raises:
        ImgtoolError: lensfunpy is not installed, or cannot read its database.
    """
    database = _database()
    taken = facts_of(exif)
    if not taken.model or not taken.focal_mm or _part(taken, width, height):
        return None
    cameras = database.find_cameras(taken.make or None, taken.model)
    lens = _lens(database, cameras[0], taken) if cameras else None
    if lens is None:
        return None
    found = _fit(lens, cameras[0].crop_factor, taken.focal_mm, width, height)
    if found is None:
        return None
    camera = f"{cameras[0].maker} {cameras[0].model.removeprefix(cameras[0].maker).strip()}"
    return Profile(found[0], camera, lens.model, taken.focal_mm, found[1])


def _lensfunpy() -> Any:
    try:
        return importlib.import_module("lensfunpy")
    except ImportError:
        raise ImgtoolError("lens profiles need lensfunpy, which is not installed", HINT) from None


@functools.cache
def _database() -> Any:
    lensfunpy = _lensfunpy()
    try:
        return lensfunpy.Database()
    except (lensfunpy.LensfunError, lensfunpy.XMLFormatError, OSError) as fault:
        raise ImgtoolError(
            f"lensfun cannot read its database: {fault}", "check ~/.local/share/lensfun"
        ) from None


def _lens(database: Any, camera: Any, taken: Taken) -> Any:
    """Return lensfun's entry for the lens, None where none or two fit equally well.

    For a camera with a fixed lens EXIF need not name it: then there is one lens only.
    """
    lenses = database.find_lenses(camera, None, taken.lens or None)
    best = {lens.model: lens for lens in reversed(lenses) if lens.score == lenses[0].score or not taken.lens}
    if len(best) > 1:
        best = {
            name: lens
            for name, lens in best.items()
            if _bare(name, lens.maker) == _bare(taken.lens, lens.maker)
        }
    if len(best) != 1:
        return None
    lens = next(iter(best.values()))
    near = lens.min_focal * (1 - FOCAL_SLACK) <= taken.focal_mm <= lens.max_focal * (1 + FOCAL_SLACK)
    straight = lens.type == _lensfunpy().LensType.RECTILINEAR
    return lens if near and straight and lens.calib_distortion else None


def _bare(name: str, maker: str) -> str:
    """Return a lens's name without its maker, spaces and signs."""
    return "".join(filter(str.isalnum, name.lower())).removeprefix(
        "".join(filter(str.isalnum, maker.lower()))
    )


def _fit(lens: Any, crop: float, focal: float, width: int, height: int) -> tuple[BrownConrady, float] | None:
    """Return the model of lensfun's coordinates and its largest error in pixels."""
    lensfunpy = _lensfunpy()
    modifier = lensfunpy.Modifier(lens, crop, width, height)
    modifier.initialize(focal, 8.0, scale=1.0, flags=lensfunpy.ModifyFlags.DISTORTION)
    columns = np.unique(np.linspace(width // 2, width - 1, COLUMNS).astype(int))
    rows = np.unique(np.linspace(height // 2, height - 1, ROWS).astype(int))
    lines = [modifier.apply_geometry_distortion(0.0, float(row), width, 1) for row in rows]
    if any(line is None for line in lines):
        return None
    photo = np.stack([line[0, columns] for line in lines]).astype(np.float64)
    across, down = np.meshgrid(columns, rows)
    radii = np.hypot(*normalise(across, down, width, height)).ravel()
    distorted = np.hypot(*normalise(photo[..., 0], photo[..., 1], width, height)).ravel()
    zero = np.zeros_like(radii)
    model, left = formats.fit((radii, zero), (distorted, zero), ("k1", "k2"))
    return model, left * diagonal(width, height) / 2


def _part(taken: Taken, width: int, height: int) -> bool:
    """Tell whether the photo is known to be a part of the exposure, its centre hence unknown."""
    if not taken.width or not taken.height:
        return taken.cropped
    aspects = [max(sides) / min(sides) for sides in ((width, height), (taken.width, taken.height))]
    return taken.cropped or abs(aspects[0] / aspects[1] - 1) > SAME_ASPECT


def _tags(exif: bytes | None) -> dict[int, Any]:
    """Return the tags of the first and of the EXIF directory; as many as can be read."""
    found: dict[int, Any] = {}
    if not exif:
        return found
    block = Image.Exif()
    # Pillow raises whatever struct, its TIFF reader and its rationals raise on damaged bytes.
    with contextlib.suppress(Exception):
        block.load(exif if exif.startswith(b"Exif\0\0") else b"Exif\0\0" + exif)
        found.update(block)
        found.update(block.get_ifd(_TAGS.Exif))
    return found


def _text(value: object) -> str:
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    return " ".join(value.partition("\0")[0].split()) if isinstance(value, str) else ""


def _positive(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0
