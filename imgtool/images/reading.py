"""Photos read: by their content, upright, in their own bit depth."""

from __future__ import annotations

import io
import logging
import mmap
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError

from imgtool import files, raw
from imgtool.errors import ImgtoolError
from imgtool.images import large, metadata
from imgtool.images.photo import Array, Photo, convert, is_large, split, turn

WRITABLE = frozenset(files.FORMATS)
"""Suffixes of the photos that can be written, in lower case with their dot."""

READABLE = files.READABLE
"""Suffixes of the photos that can be read, camera RAW among them."""

LARGEST = 500_000_000
"""Most pixels of a photo: a small file can claim more than any memory holds."""

FAULTS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    ArithmeticError,
    TypeError,
    RuntimeError,
    struct.error,
    zlib.error,
    cv2.error,
)
"""What the libraries raise at broken files and at photos that they cannot write."""

_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "DIB": "bmp"}
_OPENED = ("JPEG", "PNG", "WEBP", "BMP", "DIB")  # a JPEG turns out to be MPO when it is open
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PLAIN = (b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF")
_MODES = {"LA": "LA", "La": "LA", "PA": "RGBA", "RGBA": "RGBA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB"}
_OPAQUE = {"1": "L", "L": "L", "RGB": "RGB", "P": "RGB"}
_TRANSPARENT = {"1": "LA", "L": "LA", "RGB": "RGBA", "P": "RGBA"}
_PNG_GREY, _PNG_GREY_ALPHA = 0, 4
_JPEG_CHANNELS = {"L": 1, "RGB": 3}
_AGAIN = "copy the file again from its source"
_HEAD = 1 << 16

for _library in ("tifffile", "PIL"):
    # Their warnings would reach standard error of a program that has set up no logging.
    logging.getLogger(_library).addHandler(logging.NullHandler())


def opencv_array(data: bytes) -> Array:
    """Decode with OpenCV as the file is, in our order of channels; OpenCV's own messages are kept in."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(level)
    if array is None:
        raise ValueError("its pixels do not unpack")
    return rgb_of_bgr(array)


@contextmanager
def _guarded(name: str) -> Iterator[None]:
    """Turn the faults of the decoding libraries into one error, and keep their warnings in."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.MAX_IMAGE_PIXELS = None  # ours is larger and holds for every library
            yield
    except FAULTS as fault:
        words = str(fault).split("\n")[0] or type(fault).__name__
        raise ImgtoolError(f"{name} is truncated or corrupt: {words}", _AGAIN) from None
    except MemoryError:
        raise ImgtoolError(f"not enough memory to decode {name}", "crop or shrink it first") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > LARGEST:
        what = f"{name} claims {width}×{height} pixels, {width * height / 1e6:.0f} MP"
        raise ImgtoolError(what, f"the limit is {LARGEST // 1_000_000} MP; crop or shrink it first")


def _unknown(name: str, data: bytes) -> ImgtoolError:
    if not data:
        return ImgtoolError(f"{name} is empty", _AGAIN)
    if data[4:8] == b"ftyp":
        return ImgtoolError(f"{name} is HEIC, AVIF or video, which is not read", "convert it to JPEG or PNG")
    if data.startswith(_PLAIN + _TIFF):
        return ImgtoolError(f"{name} is truncated or corrupt", _AGAIN)
    return ImgtoolError(f"{name} is not an image", "JPEG, PNG, TIFF, WebP, BMP and camera RAW are read")


def pillow_array(image: Image.Image) -> Array:
    """Decode what Pillow has opened: 8 bit in 1 to 4 channels, or one channel of 16 bit or float."""
    if image.mode.startswith("I;16"):
        grey = np.array(image).astype(np.uint16)
        clear = image.info.get("transparency")
        return (
            grey if clear is None else np.dstack([grey, np.where(grey == clear, 0, 65535).astype(np.uint16)])
        )
    if image.mode == "F":
        return np.array(image, dtype=np.float32)
    if image.mode == "CMYK":
        return np.array(_rgb_of_cmyk(image))
    modes = _MODES | (_TRANSPARENT if "transparency" in image.info else _OPAQUE)
    if image.mode not in modes:
        raise ValueError(f"pixels of the kind {image.mode} are not read")
    mode = modes[image.mode]
    return np.array(image if image.mode == mode else image.convert(mode))


def _rgb_of_cmyk(image: Image.Image) -> Image.Image:
    """Convert printing inks to sRGB, through the photo's own profile where it has one."""
    profile = image.info.pop("icc_profile", None)  # that of the inks says nothing of RGB
    if profile:
        try:
            inks = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            display = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, inks, display, outputMode="RGB") or image.convert("RGB")
        except (ImageCms.PyCMSError, OSError):
            return image.convert("RGB")
    return image.convert("RGB")


def _deep_png(data: bytes) -> Array | None:
    """Decode a PNG of 16 bit in several channels, which Pillow would cut to 8; None for any other."""
    bare = metadata.bare_png(data)  # also finds what is cut short: libpng would print it
    depth, kind = bare[24], bare[25]
    if depth != 16 or kind == _PNG_GREY:
        return None
    colour = opencv_array(bare)
    if colour.dtype != np.uint16:
        raise ValueError("its pixels do not unpack")
    return colour[..., [0, 3]] if kind == _PNG_GREY_ALPHA else colour


def rgb_of_bgr(array: Array) -> Array:
    """Change OpenCV's order of channels into ours, and back."""
    return array[..., [2, 1, 0, 3][: array.shape[2]]] if array.ndim == 3 else array


def text_bytes(value: object) -> bytes | None:
    """Return metadata as bytes, None where there is nothing."""
    text = value.encode() if isinstance(value, str) else value
    return text if isinstance(text, bytes) and text else None


def _exif(image: Image.Image) -> bytes | None:
    block = text_bytes(image.info.get("exif"))
    while block and block.startswith(b"Exif\0\0"):
        block = block[6:]
    return block or None


def _with_pillow(data: bytes, name: str, least: int = 0) -> Photo:
    try:
        opened = Image.open(io.BytesIO(data), formats=_OPENED)
    except UnidentifiedImageError:
        raise _unknown(name, data) from None
    with opened as image:
        _check_size(name, *image.size)
        kind = _FORMATS[str(image.format)]
        if kind != "jpg" and getattr(image, "is_animated", False):
            raise ImgtoolError(f"{name} is an animation", "split it into single photos")
        if kind == "jpg" and least:
            image.draft(image.mode, (least, least))  # the decoder itself shrinks: less to decode
        deep = _deep_png(data) if kind == "png" else None
        image.load()  # also finds what stands behind the pixels
        pixels, alpha, grey = split(pillow_array(image) if deep is None else deep)
        return _photo(image, pixels, alpha, grey)


def _photo(image: Image.Image, pixels: Array, alpha: Array | None, grey: bool) -> Photo:
    """Return a photo with what Pillow has found beside the pixels."""
    xmp = text_bytes(image.info.get("xmp") or image.info.get("XML:com.adobe.xmp"))
    icc = text_bytes(image.info.get("icc_profile"))
    return Photo(pixels, alpha, grey, _exif(image), icc, xmp, _FORMATS[str(image.format)])


def _is_raw(head: metadata.Data, suffix: str) -> bool:
    """Tell camera RAW by content; the suffix decides only where the content is TIFF or unknown."""
    if raw.has_signature(head[:_HEAD]):
        return True
    if head[:4] in _TIFF:
        # A first picture that is only a preview, or a DNG's version: RAW whatever it is called.
        preview = (metadata.tag_value(head, metadata.SUBFILE_TYPE) or 0) & 1
        return suffix in raw.SUFFIXES or preview == 1 or metadata.has_tag(head, metadata.DNG_VERSION)
    return suffix in raw.SUFFIXES and not head[:8].startswith(_PLAIN)


def _with_libraw(path: Path, data: bytes) -> Photo:
    pixels: Array = np.ascontiguousarray(raw.render(path))
    return Photo(pixels, exif=metadata.exif_of_raw(data), format="raw")


def _raw_of_bytes(data: bytes, name: str) -> Photo:
    with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
        path = Path(folder, "input.dng")
        files.write(path, data)
        try:
            return _with_libraw(path, data)
        except ImgtoolError as fault:
            raise ImgtoolError(fault.what.replace(str(path), name), fault.hint, fault.code) from None


def _upright(photo: Photo) -> Photo:
    way = metadata.orientation(photo.exif)
    if way == 1 or photo.exif is None:
        return photo
    alpha = None if photo.alpha is None else turn(photo.alpha, way)
    exif, xmp = metadata.upright(photo.exif), photo.xmp and metadata.upright_xmp(photo.xmp)
    return replace(photo, pixels=turn(photo.pixels, way), alpha=alpha, exif=exif, xmp=xmp)


def _large(path: Path, name: str) -> Photo | None:
    """Read a large photo without a second copy of it; None where it is not large, not plain, or broken."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            file.seek(0)
            if not head.startswith((*_PLAIN[:2], *_TIFF)) or _is_raw(head, path.suffix.lower()):
                return None
            width, height, _ = _header(file, head, name)
            if not is_large(height, width):
                return None
            _check_size(name, width, height)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if not head.startswith(_TIFF):
                return _with_opencv(path, data, height, width)
            from imgtool.images import tiff

            file.seek(0)
            return None if _is_raw(data, "") else tiff.read(data, _check_nothing, name, file)
    except FAULTS:
        return None


def _check_nothing(width: int, height: int) -> None:
    """Find nothing wrong."""


def _with_opencv(path: Path, data: mmap.mmap, height: int, width: int) -> Photo | None:
    png = data[:2] != _PLAIN[0]
    hollow, channels = large.hollow_png(data) if png else (large.hollow_jpeg(data), 0)
    depth, kind = data[24:26] if png else (8, 0)
    data.close()  # what is mapped counts as memory
    with Image.open(io.BytesIO(hollow), formats=_OPENED) as image:
        if png:
            image.load()  # also finds what stands behind the pixels
        channels = channels or _JPEG_CHANNELS.get(image.mode, 0)
        dtype = np.uint16 if depth == 16 else np.uint8
        array = large.decode(path, height, width, channels, dtype) if channels else None
        if array is None:
            return None
        if channels < 4:
            return _photo(image, *split(array))
        return _photo(image, *large.split(array), kind == _PNG_GREY_ALPHA)


def read(source: Path | bytes, name: str = "", least: int = 0) -> Photo:
    """Read a photo, upright, in its own bit depth.

    JPEG, PNG, TIFF (LZW, deflate and other compressions; grey, RGB, with alpha; 8 and 16 bit, float),
    WebP, BMP and camera RAW. Animations and several pages in one file are refused; previews that
    cameras add are passed over. Inks (CMYK) become sRGB.

    Args:
        source: The file, or its content.
        name: What messages call it.
        least: Pixels that the shorter side must keep: a JPEG is decoded at the smallest of 1/8,
            1/4, 1/2 and its own size that has them, in a fraction of the time. 0 decodes it whole.

    Raises:
        ImgtoolError: Code 2 where there is no such file; code 1 where it cannot be read or decoded.
    """
    shown = name or (str(source) if isinstance(source, Path) else "-")
    if isinstance(source, Path) and not least:
        with _guarded(shown):
            photo = _large(source, shown)
            if photo:
                return _upright(photo)
    data = files.read(source) if isinstance(source, Path) else source
    if not data:
        raise _unknown(shown, data)
    if _is_raw(data, source.suffix.lower() if isinstance(source, Path) else ""):
        return _with_libraw(source, data) if isinstance(source, Path) else _raw_of_bytes(data, shown)
    with _guarded(shown):
        if data.startswith(_TIFF):
            from imgtool.images import tiff

            return _upright(tiff.read(data, lambda width, height: _check_size(shown, width, height), shown))
        return _upright(_with_pillow(data, shown, least))


def read_rgb8(source: Path, least: int = 0) -> npt.NDArray[np.uint8]:
    """Read a photo as ``(H, W, 3)`` uint8 RGB, upright, without alpha.

    Args:
        source: The file.
        least: As for ``read``: a large JPEG may come smaller.

    Raises:
        ImgtoolError: As ``read``.
    """
    return convert(read(source, least=least).pixels, np.uint8)


def size(path: Path) -> tuple[int, int] | None:
    """Return (width, height) of the upright photo from its header; None for camera RAW.

    Raises:
        ImgtoolError: As ``read``, as far as the header shows it.
    """
    try:
        file = path.open("rb")
    except OSError as fault:
        raise files.unreadable(path, fault) from None
    with file, _guarded(str(path)):
        head = file.read(_HEAD)
        file.seek(0)
        if _is_raw(head, path.suffix.lower()):
            return None
        width, height, way = _header(file, head, str(path))
    return (height, width) if way >= 5 else (width, height)


def _header(file: BinaryIO, head: bytes, name: str) -> tuple[int, int, int]:
    """Return width, height and orientation as they are stored."""
    if head.startswith(_TIFF):
        from imgtool.images import tiff

        return tiff.header(file)
    try:
        with Image.open(file, formats=_OPENED) as image:
            width, height = image.size
            return width, height, metadata.orientation(_exif(image))
    except UnidentifiedImageError:
        raise _unknown(name, head) from None
