"""Bayer mosaics of camera RAW files, of PNG files and of files without a header: raw integers and facts."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgtool import decoder, files, raw, tags
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    import rawpy

PATTERNS = ("RGGB", "BGGR", "GRBG", "GBRG")
"""Colours of the first two pixels of the first two rows, row by row."""

SRGB_TO_XYZ = np.array([
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
])  # fmt: skip
"""Linear sRGB to CIE XYZ, D65 (IEC 61966-2-1)."""

_PNG, _GREY = b"\x89PNG\r\n\x1a\n", 0
_TIFF = (b"II*\0", b"MM\0*")
_PHOTOS = (b"\xff\xd8", b"BM", b"RIFF")
_OTHER = "give a Bayer RAW"
_AGAIN = "copy the file again from its source"
_DEPTHS = (8, 10, 12, 14, 16)
_SHAPES = ((16, 9), (4, 3), (3, 2), (1, 1))
_LEAST_CROP = 0.25
_LEAST_OWN = 0.125

Numbers = list[list[float]] | None


@dataclass(frozen=True)
class Mosaic:
    """A frame as the sensor lies, not turned.

    Attributes:
        values: ``(H, W)`` uint16, every pixel that sees light.
        pattern: One of ``PATTERNS``, of the first 2x2 pixels of ``values``.
        black: Levels of the four places of the pattern, row by row.
        white: Level of white.
        gains: The camera's own white balance, red, green (1), blue; None where unknown.
        daylight: The same for daylight.
        matrix: ``(3, 3)`` balanced camera RGB to linear sRGB, rows sum to 1 (dcraw's model); None unknown.
        matrix_source: "library" (LibRaw's table), "file" (a DNG's), "" where unknown.
        xyz_to_camera: ``(3, 3)`` CIE XYZ to camera at D65, a file's own but for the scale of its rows; None
            where unknown.
        crop: Top, left, height, width of the camera's own crop within ``values``.
        flip: LibRaw's: 0 upright, 3 half a turn, 5 a quarter counterclockwise, 6 a quarter clockwise.
        noise: Shot and read: variance of a pixel is shot x signal + read, black 0, white 1; as the file
            says (DNG's NoiseProfile), None where it does not.
        camera: Maker and model, "" where unknown.
        exif: What is known of the shot: "iso", "exposure" in seconds, "aperture", "focal" in mm, "time"
            as "2004:05:06 07:08:09".
        warnings: What a user should know of levels and orientation, such as that they are guessed.
        name: What messages call it.
    """

    values: npt.NDArray[np.uint16]
    pattern: str = "RGGB"
    black: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    white: float = 65535.0
    gains: tuple[float, float, float] | None = None
    daylight: tuple[float, float, float] | None = None
    matrix: npt.NDArray[np.float64] | None = None
    matrix_source: str = ""
    xyz_to_camera: npt.NDArray[np.float64] | None = None
    crop: tuple[int, int, int, int] | None = None
    flip: int = 0
    noise: tuple[float, float] | None = None
    camera: str = ""
    exif: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Stated:
    """What a user says of mosaics that do not say it themselves: files without a header, PNG.

    Attributes:
        size: Of a file without a header: WIDTHxHEIGHT.
        pattern: One of ``PATTERNS``.
        bits: Of a pixel; 0 takes those of the largest value.
        black: Level of black: one, or four for the places of the pattern, row by row; () is 0.
        white: Level of white; below 0 it is 2^bits - 1.
    """

    size: str = ""
    pattern: str = "RGGB"
    bits: int = 0
    black: tuple[float, ...] = ()
    white: float = -1.0


_NOTHING = Stated()


def blacks(text: str) -> tuple[float, ...]:
    """Return the levels of black that a user writes: one number, four with commas between, or nothing.

    Raises:
        ImgtoolError: Code 2, for anything else.

    >>> blacks("58,60,61,62"), blacks("64"), blacks("")
    ((58.0, 60.0, 61.0, 62.0), (64.0,), ())
    """
    words = text.split(",") if text.strip() else []
    try:
        levels = tuple(float(word) for word in words)
    except ValueError:
        levels = (math.nan,)
    if len(levels) not in (0, 1, 4) or not all(0 <= level < math.inf for level in levels):
        hint = "give one level from 0 up, or four, of the pattern's places row by row, as 58,60,61,62"
        raise ImgtoolError(f"--black {text} makes no sense", hint, USAGE)
    return levels


def camera_to_srgb(xyz_to_camera: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the matrix from balanced camera RGB to linear sRGB; its rows sum to 1 (dcraw's model).

    Args:
        xyz_to_camera: ``(3, 3)``, CIE XYZ to camera at D65 (ColorMatrix of a DNG, LibRaw's table).

    >>> (camera_to_srgb(np.linalg.inv(SRGB_TO_XYZ)).round(9) + 0).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    forward = np.asarray(xyz_to_camera, np.float64) @ SRGB_TO_XYZ
    forward /= forward.sum(1, keepdims=True)
    inverse: npt.NDArray[np.float64] = np.linalg.inv(forward)
    return inverse


def warm() -> None:
    """Start the decoder of camera RAW early, while torch is imported, say."""
    decoder.warm()


def read(source: Path | bytes, stated: Stated = _NOTHING, name: str = "") -> Mosaic:
    """Read the mosaic of a camera RAW file, of a PNG of one channel, or of a file without a header.

    Camera RAW says all itself, and what is stated is passed over; LibRaw decodes it in a child process.
    Files without a header hold 16-bit little-endian pixels, or 8-bit ones, row by row and nothing else.

    Args:
        source: The file, or its content.
        stated: Size, pattern and levels of files that do not say them.
        name: What messages call it, the path where "".

    Raises:
        ImgtoolError: Code 2 where there is no such file or what is stated cannot be; code 1 for what is no
            Bayer mosaic (X-Trans, quad-Bayer, monochrome, already demosaicked, a photograph), has pixels
            that are not square, is empty, truncated or corrupt, or crashes the decoder.
    """
    if isinstance(source, Path):
        return _of_file(source, stated, name or str(source))
    with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
        path = Path(folder, "input.raw" if stated.size else "input.dng")
        path.write_bytes(source)
        return _of_file(path, stated, name or "-")


def _of_file(path: Path, stated: Stated, name: str) -> Mosaic:
    first = raw.head(path, name)
    if first.startswith(_PNG):
        return _of_values(_png(path, name), stated, name)
    foreign = path.suffix.lower() not in raw.SUFFIXES
    if (
        foreign
        and not stated.size
        and not raw.has_signature(first)
        and not first.startswith((*_TIFF, *_PHOTOS))
    ):
        raise ImgtoolError(
            f"{name} is not a camera RAW", "give a RAW file, or --size of one without a header"
        )
    if (foreign and stated.size) or not raw.has_header(first, path):
        return _of_values(_headerless(path, stated.size, name), stated, name)
    if first.startswith(_PHOTOS):
        raise _photograph(name)
    facts, data = decoder.ask("imgtool.mosaic:decode", path, name)
    return _unpacked(facts, data, name)


def _unpacked(facts: dict[str, Any], data: bytearray, name: str) -> Mosaic:
    values = np.frombuffer(data, np.uint16).reshape(facts.pop("shape"))
    colours = _matrices(facts.pop("own"), facts.pop("xyz"), facts.pop("is_dng"), facts.pop("shown"))
    tuples = {key: tuple(value) for key, value in facts.items() if isinstance(value, list)}
    return Mosaic(values, **facts | tuples | colours, name=name)


def _matrices(own: Numbers, xyz: Numbers, is_dng: bool, shown: Numbers) -> dict[str, Any]:
    """Return the matrix that LibRaw's own rendering uses, its source, and that from XYZ.

    LibRaw prefers a DNG's own to its table's, if the first number is above 1/8 (identify.cpp). Of its own
    it tells only the inverse, in which the scale of the rows is lost: white of D65 is taken for 1.
    """
    if own and (not xyz or (is_dng and own[0][0] > _LEAST_OWN)):
        return _inverse(own, "file")
    if shown and not xyz:
        return _inverse(shown, "library")
    if not xyz:
        return {}
    table = np.array(xyz)
    return {"matrix": camera_to_srgb(table), "matrix_source": "library", "xyz_to_camera": table}


def _inverse(numbers: Sequence[Sequence[float]], source: str) -> dict[str, Any]:
    matrix = np.array(numbers)
    return {
        "matrix": matrix,
        "matrix_source": source,
        "xyz_to_camera": np.linalg.inv(SRGB_TO_XYZ @ matrix),
    }


def _photograph(name: str) -> ImgtoolError:
    return ImgtoolError(f"{name} is a photograph, not a mosaic", "give a camera RAW, or a PNG of one channel")


def _png(path: Path, name: str) -> npt.NDArray[Any]:
    """Read a PNG of one channel of 8 or 16 bit."""
    from imgtool.images import metadata, reading

    data = files.read(path)
    depth, kind = data[24:26] if len(data) > 26 else (8, _GREY)
    if kind != _GREY or depth < 8:
        raise _photograph(name)
    try:
        values: npt.NDArray[Any] = reading.opencv_array(metadata.bare_png(data))
    except reading.FAULTS as fault:
        words = str(fault).split("\n")[0] or type(fault).__name__
        raise ImgtoolError(f"{name} is truncated or corrupt: {words}", _AGAIN) from None
    return values


def _headerless(path: Path, size: str, name: str) -> npt.NDArray[Any]:
    """Read pixels row by row, of as many bytes as the file's length says."""
    length = path.stat().st_size
    if not size:
        what = f"{name} has no header: its size, pattern and levels are unknown"
        raise ImgtoolError(what, f"give --size WIDTHxHEIGHT{_fitting(length)}, --pattern and --bits")
    found = re.fullmatch(r"([1-9]\d{0,5})[xX×]([1-9]\d{0,5})", size)
    if not found:
        raise ImgtoolError(f"{size!r} is no size", "write WIDTHxHEIGHT, as 1920x1080", USAGE)
    width, height = int(found[1]), int(found[2])
    for kind in ("<u2", "u1"):
        if width * height * np.dtype(kind).itemsize == length:
            return np.fromfile(path, kind).reshape(height, width)
    what = f"{name} holds {length} bytes, not the pixels of {width}×{height}, of 8 or 16 bit"
    raise ImgtoolError(what, f"give another --size{_fitting(length)}")


def _fitting(length: int) -> str:
    """Return sizes of usual shapes that a file without a header may have, as words in brackets."""
    found = []
    for size in (2, 1):
        for across, down in _SHAPES:
            unit = math.isqrt(length // (size * across * down))
            if unit and unit * unit * across * down * size == length:
                found.append(f"{across * unit}x{down * unit} at {8 * size} bit")
    return f" (it may be {', or '.join(found)})" if found else ""


def _of_values(values: npt.NDArray[Any], stated: Stated, name: str) -> Mosaic:
    """Give pixels the levels that are stated."""
    warnings, bits = [], stated.bits
    if not bits:
        top = int(values.max())
        bits = min(depth for depth in _DEPTHS if top < 2**depth)
        if stated.white < 0 and values.dtype.itemsize > 1:
            warnings.append(f"{bits} bits are taken from the largest value, {top}; --bits states them")
    white = stated.white if stated.white >= 0 else float(2**bits - 1)
    first, second, third, fourth = stated.black * 4 if len(stated.black) == 1 else stated.black or (0.0,) * 4
    if (highest := max(first, second, third, fourth)) >= white:
        what = f"the black level {highest:g} is not below the white level {white:g}"
        raise ImgtoolError(what, "check --black, --white and --bits", USAGE)
    if beyond := raw.hopeless(white, values[::5, ::5]):
        what = f"{name} holds values to {beyond:g}, far beyond the white level {white:g}"
        raise ImgtoolError(what, "check --bits and --white")
    return Mosaic(
        values.astype(np.uint16, copy=False),
        stated.pattern,
        (first, second, third, fourth),
        white,
        warnings=tuple(warnings),
        name=name,
    )


# What follows runs in the child.

_CLIPPED, _ROUNDED, _SAME = 65_000, 4.0, 1e-3


def decode(path: Path, name: str) -> tuple[dict[str, Any], npt.NDArray[np.uint16]]:
    """Unpack a camera RAW in this process, which a broken file may crash: what ``read`` asks for.

    Args:
        path: The file.
        name: What messages call it.

    Returns:
        The fields of ``Mosaic``, in types of JSON; and the visible pixels, as the sensor lies.

    Raises:
        ImgtoolError: As ``read``.
    """
    import rawpy

    with raw.faults(name), rawpy.imread(str(path)) as file:
        places = raw.bayer(file, name, _OTHER)
        if abs(file.sizes.pixel_aspect - 1) > 1e-3:
            what = f"{name} has pixels that are not square, {file.sizes.pixel_aspect:g} to 1"
            raise ImgtoolError(what, _OTHER)
        values = file.raw_image_visible.copy()
        return _facts(file, places, path, name, values), values


def _facts(
    file: rawpy.RawPy,
    places: dict[str, list[tuple[int, int, int]]],
    path: Path,
    name: str,
    values: npt.NDArray[np.uint16],
) -> dict[str, Any]:
    wanted = (tags.MAKER, tags.MODEL, tags.UNIQUE_MODEL, tags.DNG_VERSION, tags.NEUTRAL)
    more = (tags.ACTIVE_AREA, tags.BLACK_REPEAT, tags.BLACK_LEVEL, tags.NOISE_PROFILE)
    found = tags.of_file(path, {*wanted, *more}, below=True)
    raster = sorted(
        (row, column, channel, letter) for letter in places for row, column, channel in places[letter]
    )
    black = [float(file.black_level_per_channel[channel]) for _, _, channel, _ in raster]
    white = float(file.white_level or values.max())
    raw.check_levels(max(black), white, values[::5, ::5], name)
    if values.size > 1 and values.min() == values.max():
        raise ImgtoolError(f"{name} is damaged: every pixel is {values.flat[0]}", _AGAIN)
    xyz, own = file.rgb_xyz_matrix[:3].astype(float), file.color_matrix[:3, :3].astype(float)
    flip = file.sizes.flip
    known = xyz.any() or (np.isfinite(own).all() and np.linalg.matrix_rank(own) == 3)
    return {
        "shape": values.shape,
        "pattern": "".join(letter for *_, letter in raster),
        "black": black,
        "white": white,
        "gains": _balance(file.camera_whitebalance, tags.NEUTRAL in found or tags.DNG_VERSION not in found),
        "daylight": _balance(file.daylight_whitebalance),
        "xyz": xyz.tolist() if xyz.any() else None,
        "own": own.tolist() if np.isfinite(own).all() and np.linalg.matrix_rank(own) == 3 else None,
        "is_dng": tags.DNG_VERSION in found,
        "shown": None if known else _shown(file),
        "crop": _crop(file.sizes),
        "flip": flip if flip in (0, 3, 5, 6) else 0,
        "noise": _noise(tags.numbers(found, tags.NOISE_PROFILE)),
        "camera": tags.camera(found),
        "exif": _exif(file.other),
        "warnings": _doubts(found, black, flip, bool(file.white_level)),
    }


def _shown(file: rawpy.RawPy) -> list[list[float]] | None:
    """Return the matrix from camera to linear sRGB that LibRaw uses and does not tell.

    Of a few old cameras it has one written into its code. It is found by rendering the file twice, with it
    and without, which differ by nothing else; None where there is none, or too little to see it by.
    """
    import rawpy

    def rendered(space: rawpy.ColorSpace) -> npt.NDArray[np.float64]:
        """Return ``(pixels, 3)`` linear values of 16 bits."""
        picture = file.postprocess(
            half_size=True,
            gamma=(1, 1),
            no_auto_bright=True,
            adjust_maximum_thr=0.0,
            output_bps=16,
            user_wb=[1.0, 1.0, 1.0, 1.0],
            user_flip=0,
            output_color=space,
        )
        values: npt.NDArray[np.float64] = picture.reshape(-1, 3).astype(np.float64)
        return values

    without, with_it = rendered(rawpy.ColorSpace.raw), rendered(rawpy.ColorSpace.sRGB)
    inside = ((without > 0) & (without < _CLIPPED) & (with_it > 0) & (with_it < _CLIPPED)).all(1)
    solved, _, rank, _ = np.linalg.lstsq(without[inside], with_it[inside], rcond=1e-6)
    wrong = np.abs(without[inside] @ solved - with_it[inside])
    if rank < 3 or wrong.max(initial=0) > _ROUNDED or np.abs(solved - np.eye(3)).max() < _SAME:
        return None
    return [[float(part / row.sum()) for part in row] for row in solved.T]


def _balance(gains: Sequence[float], even: bool = False) -> list[float] | None:
    """Return gains of which green's is 1, None where unknown.

    Where nothing is known, LibRaw has zeros, or of a DNG three that are equal; these count only if ``even``.
    Of other files three equal ones say that the camera balanced its pixels itself.
    """
    red, green, blue = gains[:3]
    if not raw.usable((red, green, blue)) or (red == green == blue and not even):
        return None
    return [red / green, 1.0, blue / green]


def _crop(sizes: Any) -> list[int] | None:
    """Return the camera's own crop within the visible pixels, None where there is none that makes sense."""
    top, left = sizes.crop_top_margin - sizes.top_margin, sizes.crop_left_margin - sizes.left_margin
    height, width = sizes.crop_height, sizes.crop_width
    inside = 0 <= top <= sizes.height - height and 0 <= left <= sizes.width - width
    large = height * width >= _LEAST_CROP * sizes.height * sizes.width
    return [top, left, height, width] if inside and large else None


def _noise(profile: Sequence[float]) -> list[float] | None:
    """Return the mean over planes of a DNG's NoiseProfile (DNG Specification 1.7): shot, read, shot, ..."""
    usable = len(profile) >= 2 and len(profile) % 2 == 0 and all(0 <= part < 1 for part in profile)
    if not usable or not sum(profile):
        return None
    return [math.fsum(profile[first::2]) / (len(profile) // 2) for first in (0, 1)]


def _exif(other: Any) -> dict[str, Any]:
    named = {"iso": "iso_speed", "exposure": "shutter_speed", "aperture": "aperture", "focal": "focal_length"}
    numbers = {key: float(getattr(other, attribute)) for key, attribute in named.items()}
    found: dict[str, Any] = {key: value for key, value in numbers.items() if raw.usable([value])}
    if other.timestamp.year > 1970:
        found["time"] = other.timestamp.strftime("%Y:%m:%d %H:%M:%S")
    return found


def _doubts(found: tags.Tags, black: Sequence[float], flip: int, knows_white: bool) -> list[str]:
    """Return what a user should know of levels and orientation."""
    doubts = []
    corner, repeat = tags.numbers(found, tags.ACTIVE_AREA)[:2], tags.numbers(found, tags.BLACK_REPEAT)
    if len(set(black)) > 1 and any(edge % 2 for edge in corner):
        doubts.append("its active area begins at an odd pixel: black levels of the colours may be exchanged")
    if len(set(tags.numbers(found, tags.BLACK_LEVEL))) > 1 and any(edge > 2 for edge in repeat):
        doubts.append("its black level changes over more than 2×2 pixels, which is not followed")
    if flip not in (0, 3, 5, 6):
        doubts.append("it is marked as mirrored, which is not followed")
    if not knows_white:
        doubts.append("its white level is unknown: the largest value is taken")
    return doubts
