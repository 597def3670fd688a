"""How many pixels a file claims, read off its header: a small file can claim more than memory holds."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from imgtool.errors import ImgtoolError

PLAIN = (b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF")
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""What files of photos begin with."""

MOST_PAGES = 32
"""Pages of a TIFF that are looked at, those below others counted."""

PIXEL = 16
"""Bytes of a pixel, RGB and alpha in float, up to which it counts once."""

ENDLESS = 1 << 62
"""Pixels of a file that claims more than its library would ever open."""

MOST_SCANS = 100
"""Scans of a JPEG, each of which goes over all of its pixels; what programs write has 10 or so."""

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # in a scan; a restart is none, nor is a stuffed zero
_SCAN, _END = 0xDA, 0xD9


def known(data: bytes) -> bool:
    """Tell whether the first bytes are those of a kind of photo that is read."""
    from imgtool import raw

    return data.startswith(PLAIN + TIFF) or raw.has_signature(data[:64])


def claimed(data: bytes) -> int:
    """Return the pixels that a file claims, the most of all ways to read it; 0 where it does not say."""
    if data.startswith(PLAIN):
        return _of_pillow(data)
    return max(_of_tiff(data) if data.startswith(TIFF) else 0, _of_libraw(data))


def scans(data: bytes) -> int:
    """Return how often a JPEG goes over its pixels, counted up to one more than MOST_SCANS; 0 of others."""
    place, found = 2, 0
    while data.startswith(PLAIN[0]) and place + 4 <= len(data) and found <= MOST_SCANS:
        marker = data[place + 1]
        if data[place] != 0xFF or marker == _END:
            break
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == _SCAN:
            found += 1
            after = _MARKER.search(data, place)
            place = after.start() if after else len(data)
    return found


def _of_pillow(data: bytes) -> int:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "BMP", "DIB")) as image:
                return image.width * image.height
    except Image.DecompressionBombError:
        return ENDLESS
    except Exception:  # noqa: BLE001 - what is wrong with the file, its reader will say in words
        return 0


def _of_tiff(data: bytes) -> int:
    import tifffile

    most = 0
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as opened:
            for number, page in enumerate(_pages(opened.pages)):
                if number == MOST_PAGES:
                    return ENDLESS
                most = max(most, _of_page(page))
    except Exception:  # noqa: BLE001 - as above
        return most
    return most


def _pages(pages: Iterable[Any]) -> Iterator[Any]:
    """Yield pages and those below them, of which the sensor's own is one in camera RAW."""
    for page in pages:
        yield page
        yield from page.pages or ()


def _of_page(page: Any) -> int:
    """Return the pixels of a page, or half of those that its tiles unpack to where these are more.

    A tile reaches over the photo's edge, and may be larger than a small photo; not by as much again.
    """
    pixels = int(page.imagewidth) * int(page.imagelength) * max(1, int(page.imagedepth))
    samples = max(1, int(page.samplesperpixel))
    if page.is_tiled:
        pixels = max(pixels, math.prod((*page.chunks, *page.chunked)) // samples // 2)
    bits = page.bitspersample if isinstance(page.bitspersample, tuple) else (page.bitspersample,)
    return pixels * max(1, -(-samples * int(max(bits)) // (8 * PIXEL)))


def _of_libraw(data: bytes) -> int:
    from imgtool import decoder, files

    try:
        with files.as_file(data, "input.dng") as path:
            facts, _ = decoder.ask("imgtool.serve.sizes:of_raw", path, "photo")
    except (ImgtoolError, RuntimeError):
        return 0
    return int(facts["pixels"])


# What follows runs in the decoder's child.


def of_raw(path: Path, name: str) -> tuple[dict[str, Any], bytes]:
    """Return the pixels of a camera RAW file's sensor, none of which is unpacked.

    Args:
        path: The file.
        name: What messages call it.

    Raises:
        ImgtoolError: LibRaw does not know it.
    """
    import rawpy

    from imgtool import raw

    with raw.faults(name), rawpy.imread(str(path)) as opened:
        sizes = opened.sizes
        most = max(sizes.raw_width * sizes.raw_height, sizes.width * sizes.height)
    return {"pixels": int(most)}, b""
