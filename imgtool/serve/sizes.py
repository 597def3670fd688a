"""How many pixels a file claims, read off its header: a small file can claim more than memory holds."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

from imgtool.errors import ImgtoolError

PLAIN = (b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF")
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""What files of photos begin with."""

MOST_PAGES = 32
"""Pages of a TIFF that are looked at."""

ENDLESS = 1 << 62
"""Pixels of a file that claims more than its library would ever open."""


def known(data: bytes) -> bool:
    """Tell whether the first bytes are those of a kind of photo that is read."""
    from imgtool import raw

    return data.startswith(PLAIN + TIFF) or raw.has_signature(data[:64])


def claimed(data: bytes) -> int:
    """Return the pixels that a file claims, the most of all ways to read it; 0 where it does not say."""
    if data.startswith(PLAIN):
        return _of_pillow(data)
    return max(_of_tiff(data) if data.startswith(TIFF) else 0, _of_libraw(data))


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
            page: Any
            for number, page in enumerate(opened.pages):
                if number == MOST_PAGES:
                    return ENDLESS
                channels = max(1, int(page.samplesperpixel) // 4)
                most = max(most, int(page.imagewidth) * int(page.imagelength) * channels)
    except Exception:  # noqa: BLE001 - as above
        return most
    return most


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
