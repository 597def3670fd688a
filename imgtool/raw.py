"""Camera RAW: rendered to sRGB by LibRaw, the same way every time; and what LibRaw says of a file, checked.

LibRaw can crash on broken files, so it runs in the child of ``imgtool.decoder``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgtool import decoder, files
from imgtool.errors import ImgtoolError

if TYPE_CHECKING:
    import rawpy

SUFFIXES = files.RAW
"""Suffixes of camera RAW files, in lower case. ``.raw`` is read only where the file has a header."""

SIGNATURES = (
    (0, b"FUJIFILMCCD-RAW"),
    (0, b"IIU\0"),  # Panasonic and Leica
    (0, b"IIRO"),
    (0, b"IIRS"),
    (0, b"MMOR"),  # Olympus
    (0, b"FOVb"),  # Sigma
    (0, b"\0MRM"),  # Minolta
    (6, b"HEAPCCDR"),  # Canon CRW
    (8, b"CR\x02"),  # Canon CR2
    (4, b"ftypcrx"),  # Canon CR3
)
"""(offset, bytes) that only a camera RAW file begins with."""

_HOPELESS = 2.0


def has_signature(head: bytes) -> bool:
    """Tell whether a file's first bytes are those of a camera RAW that is no plain TIFF."""
    return any(head[offset : offset + len(mark)] == mark for offset, mark in SIGNATURES)


def render(
    path: Path, gains: Sequence[float] = (), *, demosaic: str = "", upright: bool = True
) -> npt.NDArray[np.uint16]:
    """Render a camera RAW file as LibRaw does, with the camera's white balance or with another.

    No automatic brightness and no adjusted white level, both of which shift the exposure from
    photo to photo. X-Trans and other sensors that LibRaw knows are fine.

    Args:
        path: The file.
        gains: Of red, green and blue, above 0; what they lift above white is clipped, the least lifts
            nothing. () takes the camera's own.
        demosaic: LibRaw's algorithm: "linear", "vng", "ppg", "ahd", "dcb", "dht" or "aahd"; "" leaves the
            choice to LibRaw.
        upright: Turn the photo as the camera says; else it lies as the sensor does.

    Returns:
        ``(H, W, 3)`` sRGB, 16 bit, every pixel that sees light.

    Raises:
        ImgtoolError: Truncated, not a supported RAW, corrupt, or the decoder crashed.
    """
    refuse_headerless(path)
    how: dict[str, Any] = {"gains": [float(gain) for gain in gains], "demosaic": demosaic, "upright": upright}
    facts, data = decoder.ask("imgtool.raw:develop", path, str(path), **how)
    return np.frombuffer(data, np.uint16).reshape(facts["shape"])


def head(path: Path, name: str) -> bytes:
    """Return a file's first bytes.

    Raises:
        ImgtoolError: There is no such file, or it is empty.
    """
    try:
        with path.open("rb") as file:
            found = file.read(64)
    except OSError as fault:
        raise files.unreadable(Path(name), fault) from None
    if not found:
        raise ImgtoolError(f"{name} is empty", "copy the file again")
    return found


def has_header(first: bytes, path: Path) -> bool:
    """Tell a camera's file from a ``.raw`` without a header, for which LibRaw would guess a camera."""
    return path.suffix.lower() != ".raw" or has_signature(first) or first[:4] in (b"II*\0", b"MM\0*")


def refuse_headerless(path: Path) -> None:
    """Refuse a ``.raw`` without a header.

    Raises:
        ImgtoolError: So; or there is no such file, or it is empty.
    """
    if not has_header(head(path, str(path)), path):
        what = f"{path} has no header: its size, pattern and levels are unknown"
        raise ImgtoolError(what, "give the camera's own file (DNG, CR2, NEF, ...) or a rendered photo")


# What follows runs in the child.


def _white_balance(raw: rawpy.RawPy) -> dict[str, Any]:
    """Choose the camera's white balance, daylight's where it is missing, grey-world's where both are."""
    colours = max(3, raw.num_colors)
    if usable(raw.camera_whitebalance[:colours]):
        return {"use_camera_wb": True}
    daylight = list(raw.daylight_whitebalance)
    if usable(daylight[:colours]):
        return {"user_wb": [*daylight[:3], daylight[3] or daylight[1]]}
    return {"use_auto_wb": True}


def usable(gains: Sequence[float]) -> bool:
    """Tell gains of a white balance from zeros and worse, LibRaw's sign for unknown ones."""
    return all(math.isfinite(gain) and gain > 0 for gain in gains)


def bayer(raw: rawpy.RawPy, name: str, hint: str) -> dict[str, list[tuple[int, int, int]]]:
    """Return where in a block of 2x2 pixels each colour is.

    Args:
        raw: The file, open.
        name: What messages call it.
        hint: What to give instead of a file that is no Bayer mosaic.

    Returns:
        "R", "G" and "B" to row, column and LibRaw's number of the channel; of "G" there are two.

    Raises:
        ImgtoolError: Anything but a Bayer mosaic of red, green and blue.
    """
    import rawpy

    if raw.raw_type != rawpy.RawType.Flat:
        what = "holds several values per pixel (linear DNG, Foveon or sRAW)"
        raise ImgtoolError(f"{name} {what}, not a Bayer mosaic", hint)
    pattern, letters = raw.raw_pattern, raw.color_desc.decode("ascii", "replace")
    if pattern is None or raw.num_colors == 1:
        what = f"{name} is monochrome: it has no colours"
        raise ImgtoolError(what, "give a RAW of a camera that sees colours")
    if pattern.shape != (2, 2):
        size = f"{pattern.shape[0]}×{pattern.shape[1]}"
        raise ImgtoolError(f"{name} has a colour pattern of {size} pixels, such as X-Trans", hint)
    places: dict[str, list[tuple[int, int, int]]] = {}
    for (row, column), channel in np.ndenumerate(pattern):
        places.setdefault(letters[channel], []).append((row, column, int(channel)))
    if {letter: len(found) for letter, found in places.items()} != {"R": 1, "G": 2, "B": 1}:
        colours = "".join(letters[channel] for channel in pattern.ravel())
        larger = "a pattern larger than 2×2 pixels, such as quad-Bayer"
        what = larger if set(colours) <= set("RGB") else f"the colours {colours}"
        raise ImgtoolError(f"{name} has {what}, not red, two greens and blue in 2×2 pixels (Bayer)", hint)
    return places


def hopeless(white: float, values: npt.NDArray[Any]) -> float:
    """Return what one of a thousand values surpasses where that is beyond twice white, else 0.

    A sensor may pass the white level that LibRaw's table says, but not by a factor of two.
    """
    place = int(0.999 * (values.size - 1))
    top = float(np.partition(values, place, None)[place])
    return top if top > _HOPELESS * white else 0.0


def check_levels(black: float, white: float, values: npt.NDArray[Any], name: str) -> None:
    """Refuse levels and values that no sensor gives: a truncated DNG decodes to noise without an error.

    Args:
        black: Level of black.
        white: Level of white.
        values: Pixels of the mosaic, or a sample of them.
        name: What messages call the file.

    Raises:
        ImgtoolError: Black is not below white, or the values are far beyond white.
    """
    top = hopeless(white, values)
    if black >= white or top:
        what = f"{name} is corrupt: black level {black:g}, white level {white:g}"
        more = f", values to {top:g}" if top else ""
        raise ImgtoolError(what + more, "copy the file again from the card")


@contextmanager
def faults(name: str) -> Iterator[None]:
    """Turn what LibRaw raises of a file into ``ImgtoolError`` in our words."""
    import rawpy

    try:
        yield
    except rawpy.LibRawFileUnsupportedError:
        hint = "copy it again from the card, or convert it to DNG with the camera maker's software"
        raise ImgtoolError(f"{name} is not a camera RAW that LibRaw knows, or is cut short", hint) from None
    except rawpy.LibRawIOError:
        raise ImgtoolError(f"{name} is truncated", "copy the file again from the card") from None
    except rawpy.LibRawError as fault:
        said = fault.args[0] if fault.args else type(fault).__name__
        words = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        raise ImgtoolError(
            f"cannot decode {name}: {words.lower()}", "copy the file again, or convert it"
        ) from None


def develop(
    path: Path, name: str, gains: Sequence[float], demosaic: str, upright: bool
) -> tuple[dict[str, Any], npt.NDArray[np.uint16]]:
    """Render in this process, which a broken file may crash: what ``render`` asks for.

    Args:
        path: The file.
        name: What messages call it.
        gains: As for ``render``.
        demosaic: As for ``render``.
        upright: As for ``render``.

    Returns:
        "shape", and ``(H, W, 3)`` sRGB, 16 bit.

    Raises:
        ImgtoolError: Truncated, not a supported RAW, or corrupt.
    """
    import rawpy

    with faults(name), rawpy.imread(str(path)) as raw:
        values = raw.raw_image_visible
        seen = values[::5, ::5] if values.ndim == 2 else np.zeros(1)
        if raw.white_level:
            check_levels(max(raw.black_level_per_channel, default=0), raw.white_level, seen, name)
        balance = {"user_wb": [*gains, gains[1]]} if gains else _white_balance(raw)
        pixels: npt.NDArray[Any] = raw.postprocess(
            **balance,
            demosaic_algorithm=rawpy.DemosaicAlgorithm[demosaic.upper()] if demosaic else None,
            user_flip=None if upright else 0,
            no_auto_bright=True,
            adjust_maximum_thr=0.0,
            gamma=(2.4, 12.92),
            output_color=rawpy.ColorSpace.sRGB,
            output_bps=16,
        )
    return {"shape": pixels.shape}, np.ascontiguousarray(pixels)
