"""TIFF, which is many formats: tifffile reads and writes it, with libtiff's help for old compressions."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import tifffile
from PIL import Image

from imgtool.errors import ImgtoolError
from imgtool.images import metadata
from imgtool.images.photo import Array, Photo, merge, split, to_float, to_type

_PLAIN_COMPRESSIONS = (1, 8, 32946)  # none, deflate under its two numbers
_NO_OR_HORIZONTAL_PREDICTOR = (1, 2)
_GREY_OR_RGB = (0, 1, 2)
_WHITE_IS_ZERO, _ASSOCIATED, _FLOAT, _PLANAR = 0, 1, 3, 2
_PREVIEW_OR_MASK = 1 | 4
_AT_ONCE = 1 << 24  # compressed bytes, which tifffile takes 256 MB of
_DEFLATE = (8, 32946)
_SMALL_TILE = 1 << 20  # pixels: some programs take one size of tile for every photo
_SPARE = 1 << 16  # bytes that a strip may hold behind its pixels


def _only_page(file: Any, name: str) -> Any:
    pages = [page for page in file.pages if not int(getattr(page, "subfiletype", 0) or 0) & _PREVIEW_OR_MASK]
    if len(pages) > 1:
        raise ImgtoolError(f"{name} holds {len(pages)} pages", "split it into single photos")
    return pages[0] if pages else file.pages[0]


def _check_strips(page: Any, length: int) -> None:
    """Refuse strips that reach behind the file's end, which would be read as black."""
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        if not count or offset + count > length:
            raise ValueError("the file ends within its pixels")


def _check_tiles(page: Any) -> None:
    """Refuse tiles that are far larger than the photo: they are unpacked whole, whatever is shown of them."""
    if page.is_tiled:
        edges = (page.imagewidth, page.imagelength)
        padded = math.prod(-(-edge // 16) * 16 for edge in edges) * max(1, page.imagedepth)
        unpacked = math.prod((*page.chunks, *page.chunked)) // max(1, page.samplesperpixel)
        if unpacked > 4 * padded + _SMALL_TILE:
            raise ValueError("its tiles are larger than the photo")


def _bound(page: Any) -> None:
    """Have strips and tiles of deflate unpacked here: one that holds far more than its pixels is refused.

    tifffile would unpack it all. It is given the same bytes without compression.
    """
    most, decode = 2 * math.prod(page.chunks) * (-(-page.bitspersample // 8)) + _SPARE, page.decode

    def bounded(data: bytes | None, *given: Any, **named: Any) -> Any:
        return decode(data and zlib.compress(_inflated(data, most), 0), *given, **named)

    page.decode = bounded


def _inflated(data: bytes, most: int) -> bytes:
    unpacker = zlib.decompressobj()
    found = unpacker.decompress(data, most)
    if not unpacker.eof:
        raise ValueError(
            "its strips hold " + ("less than the photo", "more than the photo")[len(found) == most]
        )
    return found


def _array(page: Any, data: metadata.Data) -> Array:
    """Decode a page: tifffile where it can alone, Pillow's and OpenCV's libtiff for the rest."""
    bits = page.bitspersample if isinstance(page.bitspersample, int) else 0
    compressed = page.compression not in _PLAIN_COMPRESSIONS
    odd = page.predictor not in _NO_OR_HORIZONTAL_PREDICTOR or page.photometric not in _GREY_OR_RGB
    if bits in (8, 16, 32, 64) and not compressed and not odd:
        if page.compression in _DEFLATE:
            _bound(page)
        return _with_tifffile(page)
    flat = metadata.upright(bytes(data))  # else libtiff would turn it first, and then we
    if bits <= 8:
        from imgtool.images.reading import pillow_array

        with Image.open(io.BytesIO(flat), formats=("TIFF",)) as image:
            return pillow_array(image)
    return _with_opencv(page, flat)


def _with_tifffile(page: Any) -> Array:
    array: Array = page.asarray(buffersize=_AT_ONCE)
    if page.planarconfig == _PLANAR and array.ndim == 3:
        array = np.moveaxis(array, 0, -1)
    if page.photometric == _WHITE_IS_ZERO:
        array = 1 - array if array.dtype.kind == "f" else np.invert(array)
    return array


def _with_opencv(page: Any, data: bytes) -> Array:
    from imgtool.images.reading import opencv_array

    half = page.sampleformat == _FLOAT and page.bitspersample == 16
    if half or page.planarconfig == _PLANAR or page.photometric not in _GREY_OR_RGB[1:]:
        raise ValueError("this kind of TIFF is read only without compression or with deflate")
    return opencv_array(data)


def _checked(array: Array, name: str) -> Array:
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype not in (np.uint8, np.uint16, np.float32) or array.ndim > 3 or channels > 4:
        what = f"{name} holds {channels} channels of {array.dtype}"
        raise ImgtoolError(what, "1 to 4 channels of 8 bit, 16 bit or floating point are read")
    return array


def _unmultiplied(array: Array) -> Array:
    """Divide alpha out of pixels it was multiplied into."""
    values = to_float(array)
    colour, alpha = values[..., :-1], values[..., -1:]
    plain = np.divide(colour, alpha, out=np.zeros_like(colour), where=alpha > 0)
    return to_type(np.concatenate([plain, alpha], axis=2), array.dtype)


def read(
    data: metadata.Data, check_size: Callable[[int, int], None], name: str, file: BinaryIO | None = None
) -> Photo:
    """Read a TIFF of one photo, as it lies.

    Args:
        data: The file.
        check_size: Raises where (width, height) is too much.
        name: What messages call it.
        file: The file itself, where there is one: pixels are then read straight into their array.

    Raises:
        ImgtoolError: Several pages, or channels that no photo has.
        ValueError: And others of the libraries' own, where the file is broken.
    """
    with tifffile.TiffFile(file or io.BytesIO(data)) as opened:
        page = _only_page(opened, name)
        check_size(page.imagewidth, page.imagelength)
        _check_strips(page, len(data))
        _check_tiles(page)
        array = _checked(_array(page, data), name)
        if array.ndim == 3 and array.shape[2] in (2, 4) and page.extrasamples[:1] == (_ASSOCIATED,):
            array = _unmultiplied(array)
    pixels, alpha, grey = split(array)
    icc, xmp = metadata.tag_bytes(data, metadata.ICC), metadata.tag_bytes(data, metadata.XMP)
    return Photo(pixels, alpha, grey, metadata.exif_of_tiff(data), icc, xmp, "tif")


def header(file: BinaryIO) -> tuple[int, int, int]:
    """Return width, height and orientation as they are stored."""
    with tifffile.TiffFile(file) as opened:
        page: Any = opened.pages[0]
        way = page.tags.valueof(metadata.ORIENTATION, 1)
        return page.imagewidth, page.imagelength, int(way) if way in range(1, 9) else 1


def encode(photo: Photo) -> bytes:
    """Write a TIFF with deflate compression, in the byte order of the photo's EXIF block.

    EXIF is kept as far as it speaks of the photo: description, maker, model, software, date, artist,
    copyright, resolution, rating, and the whole Exif and GPS directories.
    """
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, merge(photo), **options(photo))
    metadata.add_to_tiff(buffer, photo.exif, photo.icc, photo.xmp)
    return buffer.getvalue()


def options(photo: Photo) -> dict[str, Any]:
    """Return how tifffile is to write a photo."""
    return {
        "bigtiff": False,
        "byteorder": ">" if metadata.byte_order(photo.exif or b"") == ">" else "<",
        "photometric": "minisblack" if photo.grey else "rgb",
        "planarconfig": None if photo.grey and photo.alpha is None else "contig",
        "extrasamples": None if photo.alpha is None else ["unassalpha"],
        "compression": "zlib",
        "predictor": photo.pixels.dtype.kind == "u",
        "metadata": None,
        "software": False,
    }
