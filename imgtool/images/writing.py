"""Photos written: with everything that the format holds of them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import Image

from imgtool import files
from imgtool.errors import ImgtoolError
from imgtool.files import file_type
from imgtool.images import metadata, streaming, tiff
from imgtool.images.photo import Array, Photo, convert, is_large, merge
from imgtool.images.reading import FAULTS, rgb_of_bgr

_NAMES = {"jpg": "JPEG", "png": "PNG", "tif": "TIFF", "webp": "WebP"}
_LONGEST_EDGE = {"jpg": 65_500, "webp": 16_383}
_LONGEST_JPEG_EXIF, _LONGEST_JPEG_XMP = 65_527, 65_502
_PNG_LEVEL, _LARGE_LEVEL = 4, 1  # of zlib: 4 takes half the time of 6 for a few percent more bytes, 1 a third
_LARGE = 12_000_000  # values of a picture from which time counts more than bytes
_FULL_COLOUR = 90  # JPEG quality from which colour keeps its resolution


def _depth(photo: Photo, kind: str) -> str:
    """Return the deepest type the format holds that the photo has use for."""
    if kind in ("jpg", "webp"):
        return "uint8"
    if kind == "png" and photo.pixels.dtype.kind == "f":
        return "uint16"
    return str(photo.pixels.dtype.name)


def _kept(photo: Photo, kind: str) -> tuple[Photo, list[str]]:
    """Return the photo as the format can hold it, and sentences on what that loses."""
    lost: dict[str, dict[str, Any]] = {}
    depth = _depth(photo, kind)
    if depth != photo.pixels.dtype.name:
        before = "floating point is" if photo.pixels.dtype.kind == "f" else "16 bit are"
        sentence = f"{before} rounded to {8 * np.dtype(depth).itemsize} bit: {_NAMES[kind]} holds no more"
        lost[sentence] = {
            "pixels": convert(photo.pixels, depth),
            "alpha": None if photo.alpha is None else convert(photo.alpha, depth),
        }
    if kind == "jpg" and photo.alpha is not None:
        lost["alpha is dropped: JPEG has none"] = {"alpha": None}
    if kind == "jpg" and len(photo.exif or b"") > _LONGEST_JPEG_EXIF:
        lost["EXIF is dropped: it is longer than JPEG allows"] = {"exif": None}
    if kind == "jpg" and len(photo.xmp or b"") > _LONGEST_JPEG_XMP:
        lost["XMP is dropped: it is longer than JPEG allows"] = {"xmp": None}
    if kind == "webp" and photo.grey and (photo.icc or b"")[16:20] == b"GRAY":
        lost["the ICC profile is dropped: it is for grey, and WebP stores RGB"] = {"icc": None}
    for changes in lost.values():
        photo = replace(photo, **changes)
    return photo, list(lost)


def losses(photo: Photo, format: str) -> list[str]:
    """Return sentences on what of a photo a format cannot hold; [] where it holds all.

    The lossy compression of JPEG and WebP is not counted.
    """
    return _kept(photo.rows(0, 1), file_type(format))[1]


def _png_of_two(array: Array) -> bytes:
    """Write grey with alpha in 16 bit, which neither Pillow nor OpenCV does."""
    height, width, _ = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 4, 0, 0, 0)
    rows = array.astype(">u2").reshape(height, -1).view(np.uint8)
    filtered = np.pad(rows, ((0, 0), (1, 0)))  # filter 0 in front of each row
    packed = zlib.compress(filtered.tobytes(), _PNG_LEVEL)
    return metadata.png([(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")])


def _plain_png(array: Array) -> bytes:
    two = array.ndim == 3 and array.shape[2] == 2
    if array.dtype == np.uint8 and (two or array.size < _LARGE):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG", compress_level=_PNG_LEVEL)
        return buffer.getvalue()
    if two:
        return _png_of_two(array)
    level = _PNG_LEVEL if array.size < _LARGE else _LARGE_LEVEL
    done, packed = cv2.imencode(".png", rgb_of_bgr(array), [cv2.IMWRITE_PNG_COMPRESSION, level])
    if not done:
        raise ValueError("OpenCV refuses")
    return packed.tobytes()


def _lossy(photo: Photo, kind: str, quality: int) -> bytes:
    array = merge(photo)
    if kind == "webp":
        array = np.stack([array] * 3, axis=2) if array.ndim == 2 else array
        array = array[..., [0, 0, 0, 1]] if array.shape[2] == 2 else array
    buffer = io.BytesIO()
    options = _options(photo, kind, quality)
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, _NAMES[kind], **options)
    return buffer.getvalue()


def _options(photo: Photo, kind: str, quality: int) -> dict[str, Any]:
    """Return how Pillow is to write a JPEG or WebP."""
    options: dict[str, Any] = {"quality": quality}
    exif = photo.exif
    if kind == "jpg":
        options["subsampling"] = 0 if quality >= _FULL_COLOUR else 2
        exif = exif and b"Exif\0\0" + exif
    else:
        options |= {"lossless": quality == 100, "exact": True}  # exact: colours under alpha 0 stay
    told = {"exif": exif, "icc_profile": photo.icc, "xmp": photo.xmp}
    return options | {name: value for name, value in told.items() if value}


def _check_edge(photo: Photo, kind: str) -> None:
    height, width = photo.pixels.shape[:2]
    if max(height, width) > _LONGEST_EDGE.get(kind, 1 << 31):
        what = f"{width}×{height} is too large for {_NAMES[kind]}, whose edges end at {_LONGEST_EDGE[kind]}"
        raise ImgtoolError(what, "write PNG or TIFF")


def encode(photo: Photo, format: str, quality: int = 95) -> bytes:
    """Encode a photo with all that the format holds of it; ``losses`` says what it does not.

    Args:
        photo: The photo. Where it is marked grey, one channel is written (three by WebP).
        format: "jpg", "png", "tif" or "webp".
        quality: 1..100, of JPEG and WebP. WebP of quality 100 is lossless.

    Raises:
        ImgtoolError: Code 2 for an unknown format; code 1 where the photo is too large for it.
    """
    buffer = io.BytesIO()
    encoder(photo, format, quality)(buffer)
    return buffer.getvalue()


def encoder(photo: Photo, format: str, quality: int = 95) -> Callable[[BinaryIO], object]:
    """Return what writes a photo into an open file: small ones are encoded now, large ones piece by piece.

    Args:
        photo: As for ``encode``.
        format: As for ``encode``.
        quality: As for ``encode``.

    Returns:
        A function of a file that is empty, and can be read and sought too. It may raise what this does.

    Raises:
        ImgtoolError: As ``encode``.
    """
    kind = file_type(format)
    _check_edge(photo, kind)
    if is_large(*photo.pixels.shape[:2]) and kind != "webp":
        return partial(_in_bands, photo, kind, quality)
    data = _encoded(_kept(photo, kind)[0], kind, quality)
    return lambda file: file.write(data)


@contextmanager
def _told(kind: str) -> Iterator[None]:
    """Turn the faults of the encoding libraries into one error; those of the system are ``files``'s."""
    try:
        yield
    except FAULTS as fault:
        if isinstance(fault, OSError) and fault.errno:
            raise
        raise ImgtoolError(
            f"cannot write {_NAMES[kind]}: {fault}", "try another format with --format"
        ) from None


def _encoded(photo: Photo, kind: str, quality: int) -> bytes:
    with _told(kind):
        if kind == "png":
            return metadata.into_png(_plain_png(merge(photo)), photo.exif, photo.icc, photo.xmp)
        return tiff.encode(photo) if kind == "tif" else _lossy(photo, kind, quality)


def _in_bands(photo: Photo, kind: str, quality: int, file: BinaryIO) -> None:
    top = _kept(photo.rows(0, 1), kind)[0]
    whole = replace(top, pixels=photo.pixels, alpha=top.alpha if top.alpha is None else photo.alpha)
    bands = streaming.Bands(whole, lambda first, last: merge(_kept(whole.rows(first, last), kind)[0]))
    with _told(kind):
        if kind == "png":
            streaming.png(file, bands)
        elif kind == "tif":
            streaming.tiff(file, bands, tiff.options(whole))
        else:
            streaming.jpeg(file, bands, _options(whole, kind, quality))


def write(path: Path, photo: Photo, quality: int = 95, format: str = "") -> None:
    """Write a photo whole or not at all; the suffix names the format unless ``format`` does.

    Raises:
        ImgtoolError: As ``encode`` and ``files.atomic``.
    """
    files.fill(path, encoder(photo, format or path.suffix, quality))
