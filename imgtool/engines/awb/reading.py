"""Every kind of frame to statistics.

What a file is decides its content: camera RAW, the statistics of a Raspberry Pi, linear 16-bit PNG as of
Cube++ (Ershov et al., "The Cube++ Illumination Estimation Dataset", 2020), or a rendered photo.
"""

from __future__ import annotations

import io
import json
import re
import struct
import tempfile
import zlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from imgtool import files, tags
from imgtool import raw as render
from imgtool.engines.awb import mosaic, stats
from imgtool.engines.awb.camera import Camera, Locus
from imgtool.engines.awb.stats import AwbStats, Grid
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.engines.awb.tuning import Tuning
    from imgtool.images import Photo

Array = npt.NDArray[Any]

XYZ_TO_SRGB = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
"""XYZ to linear sRGB (IEC 61966-2-1)."""

CUBE_LEVELS = (2048.0, 16383.0)
"""Black level of Cube++, and the level that its frames stay below; where they saturate differs."""

CUBE_SIZES = ((432, 648), (1728, 2592))
"""Rows and columns of SimpleCube++ and Cube++."""

CUBE_CORNER = (175 / 432, 250 / 648)
"""Share of rows and columns at the bottom right that the colour cube of Cube++ takes."""

RENDERED_AT = 5000.0
"""Colour temperature for which Raspberry Pi statistics are rendered, in kelvin."""

CLIPPED_COVERAGE = 0.5
"""Coverage of their cells where a channel was clipped: its colour is not quite the sensor's."""

LIGHTEST, DARKEST = 0.95, 0.04
"""Values of rendered photos, in 0..1, outside of which a pixel does not count: curves and clipping."""

STATISTICS_SIZES = ((32, 32), (12, 16))
"""Rows and columns of the statistics of a Raspberry Pi."""

GT, LEVELS, PREVIEW = "gt.csv", "levels.json", "preview.png"
"""Files that describe a data set: the white of its frames, their levels, what it looks like."""

_LEAST = 192
_STATISTICS = re.compile(r"([^,/]+),([^,/]+),([^,/]+),(\d+(?:\.\d+)?),(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)\.png")
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*")
_HEAD = 1 << 16
_SHOWN = (b"iCCP", b"sRGB", b"cICP", b"eXIf")
_WORDS = ("auto", "none", "cube")
_DRAWN = ("gains.png", "gains-histogram.png", "ct.png", "ct_curve.png")
_AGAIN = "copy the file again from its source"


class Sources(Protocol):
    """How frames are read: see the settings of the same names."""

    @property
    def tuning(self) -> Path | None: ...  # noqa: D102
    @property
    def black(self) -> float: ...  # noqa: D102
    @property
    def white(self) -> float: ...  # noqa: D102
    @property
    def mask(self) -> str: ...  # noqa: D102
    @property
    def domain(self) -> str: ...  # noqa: D102


class Statistics(NamedTuple):
    """What the name of a Raspberry Pi statistic says.

    Attributes:
        photographer: Who took it.
        sensor: Which is the name of its tuning file.
        scene: Its number or name.
        ct: True colour temperature in kelvin.
        lux: Illuminance.
        camera_ct: The camera's own estimate in kelvin.
    """

    photographer: str
    sensor: str
    scene: str
    ct: float
    lux: float
    camera_ct: float

    @classmethod
    def of(cls, name: str) -> Statistics | None:
        """Read the name of a file or a path, None where it is another kind of name."""
        match = _STATISTICS.fullmatch(Path(name).name)
        if not match:
            return None
        photographer, sensor, scene = match.groups()[:3]
        return cls(photographer, sensor, scene, *map(float, match.groups()[3:]))


def cells_for(shape: object) -> int:
    """Return about how many cells a network sees: the original's as many as its input has pixels.

    Args:
        shape: ``Model`` settings; others have the usual number.
    """
    if getattr(shape, "arch", "") != "deepawb":
        return stats.CELLS
    return int(shape.height * shape.width)  # type: ignore[attr-defined]


def read(source: Path | bytes, name: str, sources: Sources, cells: int = stats.CELLS) -> AwbStats:
    """Read a frame of any kind.

    A 16-bit PNG that says how it is shown (an ICC profile, sRGB, a gamma other than 1, cICP, or EXIF) is a
    photo unless the settings say otherwise.

    Args:
        source: The file, or its content.
        name: What messages call it; tells Raspberry Pi statistics.
        sources: How it is read.
        cells: About how many cells a linear frame or a photo is averaged into.

    Returns:
        Its statistics, with "camera_ct", "true_ct" and "sensor" in ``about`` where it is one of a
        Raspberry Pi, and "notes", a list of what a user should know of how it was read, where there
        is something; for camera RAW see ``mosaic.read``.

    Raises:
        ImgtoolError: Code 2: no such file, or settings that do not fit it. Code 1: truncated, corrupt,
            not an image, without colour, or a sensor whose tuning is not there.
    """
    path = source if isinstance(source, Path) else None
    called = path or Path(name)
    head = _head(source) if isinstance(source, Path) else source[:_HEAD]
    if _is_raw(head, called.suffix.lower()):
        return _noted(_with_tuning(_mosaic(source, name, sources.mask), sources), _unused(sources))
    deep = head.startswith(_PNG) and head[24:25] == b"\x10"
    told = Statistics.of(called.name) if deep else None
    guessed = "raw" if deep and (told or not _is_shown(source)) else "srgb"
    if sources.domain == "srgb" or (sources.domain == "auto" and guessed == "srgb"):
        return _noted(_photo(source, name, sources.mask, cells), _unused(sources), _untuned(sources))
    data = files.read(source) if isinstance(source, Path) else source
    pixels = _png(data, name) if deep else _any(data, name)
    if told:
        found = _statistics(pixels, told, _tuning(told.sensor, path, sources))
        found = _masked(found, _box(sources.mask, pixels.shape, name), *map(_edges, found.coverage.shape))
        return _noted(found, _other_sensor(told, sources)).changed(name=name)
    return _with_tuning(_linear(pixels, path, name, sources, cells), sources).changed(name=name)


def is_drawn(path: Path) -> bool:
    """Tell pictures that ``data synth`` and ``data stats`` draw, by name and by what lies beside them."""
    if path.name == PREVIEW:
        return (path.parent / GT).is_file() and (path.parent / LEVELS).is_file()
    return path.name in _DRAWN and all((path.parent / name).is_file() for name in _DRAWN[:2])


def is_raw(source: Path | bytes, name: str) -> bool:
    """Tell whether a frame is a camera RAW file.

    Args:
        source: The file, or its content.
        name: What content without a name is called.
    """
    if isinstance(source, Path):
        return _is_raw(_head(source), source.suffix.lower())
    return _is_raw(source[:_HEAD], Path(name).suffix.lower())


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD)
    except OSError as fault:
        raise files.unreadable(path, fault) from None


def _is_raw(head: bytes, suffix: str) -> bool:
    """Tell camera RAW by content; the suffix decides only where the content is TIFF or unknown."""
    if render.has_signature(head):
        return True
    if head.startswith(_TIFF):
        found = tags.read(io.BytesIO(head), {tags.DNG_VERSION, tags.SUBFILE_TYPE})
        preview = found.get(tags.SUBFILE_TYPE) == (1.0,)
        return suffix in render.SUFFIXES or preview or tags.DNG_VERSION in found
    return suffix in render.SUFFIXES and not head.startswith((_PNG, b"\xff\xd8", b"BM", b"RIFF"))


def _is_shown(source: Path | bytes) -> bool:
    """Tell a PNG that says how it is shown, by its chunks before the pixels (PNG, third edition, 5.6)."""
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        file.seek(len(_PNG))
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            length, kind = struct.unpack(">I4s", head)
            value = file.read(min(length, 4))
            if kind in _SHOWN or (kind == b"gAMA" and int.from_bytes(value, "big") != 100_000):
                return True
            file.seek(length - len(value) + 4, io.SEEK_CUR)
    return False


def _noted(found: AwbStats, *notes: str) -> AwbStats:
    """Add to what a user should know of how a frame was read; "" is nothing."""
    told = [note for note in (*found.about.get("notes", ()), *notes) if note]
    return found.changed(about=found.about | {"notes": told}) if told else found


def _unused(sources: Sources) -> str:
    given = max(sources.black, sources.white) >= 0
    return "--black and --white are not used: they are for linear PNG and TIFF only" if given else ""


def _untuned(sources: Sources) -> str:
    return "--tuning is not used: a rendered photo is not in a sensor's colours" if sources.tuning else ""


def _other_sensor(told: Statistics, sources: Sources) -> str:
    file = sources.tuning
    if file is None or file.is_dir() or file.stem == told.sensor:
        return ""
    return f"a statistic of the sensor {told.sensor} is read by the tuning of another: {file}"


def _mosaic(source: Path | bytes, name: str, mask: str) -> AwbStats:
    if isinstance(source, Path):
        found = mosaic.read(source, name)
    else:
        with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
            path = Path(folder, "input.dng")
            files.write(path, source)
            found = mosaic.read(path, name)
    if mask in ("auto", "none"):
        return found
    if "size" not in found.about:
        what = f"--mask {mask} does not serve {found.name}: its size is not known"
        raise ImgtoolError(what, "give --mask none", USAGE)
    height, width = found.about["size"]
    grid = Grid.of(height // 2, width // 2, samples=mosaic.SAMPLES)
    axes = zip((grid.rows, grid.columns), grid.side, found.coverage.shape, strict=True)
    edges = [
        2 * (taken.start - taken.step // 2 + taken.step * side * _edges(number))
        for taken, side, number in axes
    ]
    return _masked(found, _box(mask, (height, width), name), *edges)


def _edges(number: int) -> Array:
    """Return the edges of ``number`` cells of one pixel each."""
    return np.arange(number + 1)


def _masked(found: AwbStats, box: tuple[slice, slice] | None, rows: Array, columns: Array) -> AwbStats:
    """Take out the cells that a rectangle touches.

    Args:
        found: The frame.
        box: Rows and columns of the rectangle; None takes nothing out.
        rows: Edges of the cells, in the pixels that the rectangle counts.
        columns: The same.
    """
    if box is None:
        return found
    down, across = (
        (edges[:-1] < part.stop) & (edges[1:] > part.start)
        for edges, part in zip((rows, columns), box, strict=True)
    )
    return found.changed(coverage=np.where(down[:, None] & across, np.float32(0), found.coverage))


# Linear frames.


def _png(data: bytes, name: str) -> Array:
    """Decode a 16-bit PNG as ``(H, W, 3)`` RGB, a view of OpenCV's BGR."""
    import cv2

    _check_png(data, name)
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    finally:
        cv2.utils.logging.setLogLevel(level)
    if pixels is None:
        raise ImgtoolError(f"{name} is truncated or corrupt: its pixels do not unpack", _AGAIN)
    if pixels.ndim != 3:
        raise _grey(name)
    return pixels[..., 2::-1]


def _grey(name: str) -> ImgtoolError:
    hint = "give a frame in colour; a Bayer mosaic has to come as camera RAW, such as DNG"
    return ImgtoolError(f"{name} is grey: it has no white balance", hint)


def _check_png(data: bytes, name: str) -> None:
    """Refuse a PNG that is cut short or has a wrong check sum: libpng would print about it, or guess."""
    view, place, kind = memoryview(data), len(_PNG), b""
    while kind != b"IEND":
        if place + 12 > len(data):
            raise ImgtoolError(f"{name} is truncated", _AGAIN)
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            raise ImgtoolError(f"{name} is truncated", _AGAIN)
        if zlib.crc32(view[place + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise ImgtoolError(f"{name} is corrupt: a check sum is wrong", _AGAIN)
        place = end


def _any(data: bytes, name: str) -> Array:
    """Decode a photo whose numbers are said to be linear."""
    from imgtool import images

    photo = images.read(data, name)
    if photo.grey:
        raise _grey(name)
    return photo.pixels


def _linear(pixels: Array, path: Path | None, name: str, sources: Sources, cells: int) -> AwbStats:
    cube = _is_cube(pixels, path)
    black, white = _levels(pixels, path, sources, cube)
    valid = _valid(pixels, sources.mask, cube, name)
    found = stats.of_linear(pixels, black, white, valid, cells)
    return _noted(found, "" if cube else _assumed(pixels, path, sources))


def _assumed(pixels: Array, path: Path | None, sources: Sources) -> str:
    """Return what to say of a PNG that nothing but its depth tells to be linear."""
    if sources.domain != "auto" or (path and (_beside(path, LEVELS) or _beside(path, GT))):
        return ""
    if pixels.shape[:2] in STATISTICS_SIZES:
        return (
            "it looks like statistics of a Raspberry Pi camera, whose name tells sensor and light "
            "(photographer,sensor,scene,CT,lux,CT.png); without that it is read as a plain frame"
        )
    if max(sources.black, sources.white) >= 0:
        return ""
    return "taken as linear camera data; --domain srgb if it is a photo"


def _corner(pixels: Array) -> Array:
    """Return the part of a frame of Cube++ that its colour cube takes, as a view."""
    high, wide = pixels.shape[:2]
    return pixels[high - round(high * CUBE_CORNER[0]) :, wide - round(wide * CUBE_CORNER[1]) :]


def _is_cube(pixels: Array, path: Path | None) -> bool:
    """Tell frames of Cube++ by their size and their folder, or the black corner of SimpleCube++."""
    if pixels.shape[:2] not in CUBE_SIZES or (path and _beside(path, LEVELS)):
        return False
    return bool((path and path.resolve().parent.name == "PNG") or not _corner(pixels).any())


def _beside(path: Path, name: str) -> Path | None:
    """Return a file that describes a data set: beside the frame, or beside the folder of frames."""
    places = (path.parent / name, path.resolve().parent.parent / name)
    return next((place for place in places if place.is_file()), None)


def _levels(pixels: Array, path: Path | None, sources: Sources, cube: bool) -> tuple[float, float]:
    """Return the levels of black and white: as asked, as the data set says, or as the numbers suggest."""
    file = _beside(path, LEVELS) if path else None
    if file:
        black, white = _told_levels(file)
    elif cube:
        black, white = CUBE_LEVELS
    else:
        black, white = 0.0, _likely_white(pixels)
    return (
        sources.black if sources.black >= 0 else black,
        sources.white if sources.white >= 0 else white,
    )


def _likely_white(pixels: Array) -> float:
    """Return the white of 8, 10, 12, 14 or 16 bit, whichever is the first that holds the numbers."""
    if pixels.dtype.kind == "f":
        return 1.0
    top = int(pixels.max(initial=0))
    return float(next(2**bits - 1 for bits in (8, 10, 12, 14, 16, 64) if top < 2**bits))


def read_json(path: Path) -> Any:
    """Read a JSON file that describes a data set.

    Raises:
        ImgtoolError: It cannot be read, or is no JSON.
    """
    try:
        return json.loads(files.read(path))
    except ValueError as fault:
        raise ImgtoolError(f"{path} is no JSON: {fault}", "write it again, or remove it") from None


def _told_levels(path: Path) -> tuple[float, float]:
    told = read_json(path)
    try:
        return float(told["black"]), float(told["white"])
    except (TypeError, KeyError, ValueError):
        hint = 'it should read {"black": 1024, "white": 16383}'
        raise ImgtoolError(f"{path} does not say black and white", hint) from None


def _valid(pixels: Array, mask: str, cube: bool, name: str) -> npt.NDArray[np.bool_] | None:
    """Return which pixels count, None for all."""
    if mask == "auto" and not cube:
        return np.asarray((pixels[..., 0] != 0) | (pixels[..., 1] != 0) | (pixels[..., 2] != 0))
    return _outside("cube" if mask == "auto" else mask, pixels.shape, name)


def _outside(mask: str, shape: tuple[int, ...], name: str) -> npt.NDArray[np.bool_] | None:
    """Return which pixels lie outside of a rectangle, None where there is none."""
    box = _box(mask, shape, name)
    if box is None:
        return None
    valid = np.ones(shape[:2], np.bool_)
    valid[box] = False
    return valid


def _box(mask: str, shape: tuple[int, ...], name: str) -> tuple[slice, slice] | None:
    """Return the rows and columns that do not count, None where there are none."""
    high, wide = shape[:2]
    if mask == "cube":
        top, left = high - round(high * CUBE_CORNER[0]), wide - round(wide * CUBE_CORNER[1])
        return slice(top, high), slice(left, wide)
    box = rectangle(mask)
    if box and not (box[0].start < high and box[1].start < wide):
        what = f"--mask {mask} lies outside of {name}, which has {wide}×{high} pixels"
        raise ImgtoolError(what, "x and y count from the top left", USAGE)
    return box


def rectangle(text: str) -> tuple[slice, slice] | None:
    """Return the rows and columns that ``--mask`` names, None for one of its words.

    Raises:
        ImgtoolError: Code 2: it is neither a word nor x,y,w,h with w and h of at least 1.
    """
    if text in _WORDS:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*,\s*0*([1-9]\d*)\s*,\s*0*([1-9]\d*)\s*", text)
    if not match:
        raise ImgtoolError(f"--mask {text} is not understood", "give auto, none, cube or x,y,w,h", USAGE)
    left, top, wide, high = map(int, match.groups())
    return slice(top, top + high), slice(left, left + wide)


# Tunings, and the statistics that need them.


@lru_cache(maxsize=64)
def _loaded(path: Path, changed: int) -> Tuning:
    """Load a tuning once, as long as its file stays as it is."""
    from imgtool.engines.awb.tuning import Tuning

    return Tuning.load(path)


def load_tuning(path: Path) -> Tuning:
    """Load a libcamera tuning file.

    Raises:
        ImgtoolError: Code 2 where there is no such file, code 1 where it is no tuning.
    """
    try:
        return _loaded(path, path.stat().st_mtime_ns)
    except OSError as fault:
        raise files.unreadable(path, fault) from None


def _with_tuning(found: AwbStats, sources: Sources) -> AwbStats:
    """Take the camera of the tuning file that is given; what else is known of it stays."""
    if sources.tuning is None:
        return found
    if sources.tuning.is_dir():
        note = "no tuning is taken: which sensor the frame is of, is not known; let --tuning name the file"
        return _noted(found, note)
    camera = _tuned(load_tuning(sources.tuning), found.camera.name)
    own = found.camera
    return found.changed(camera=replace(camera, xyz_to_camera=own.xyz_to_camera, matrices=own.matrices))


@lru_cache(maxsize=64)
def _tuned(tuning: Tuning, name: str = "") -> Camera:
    return Camera(name or tuning.name, tuning.locus, known=True, tuning=tuning)


def _tuning(sensor: str, path: Path | None, sources: Sources) -> Tuning:
    """Find the tuning of a sensor: the one asked for, or beside the frame or its folder."""
    if sources.tuning is not None and not sources.tuning.is_dir():
        return load_tuning(sources.tuning)
    folders = [] if sources.tuning is None else [sources.tuning]
    if path is not None and not folders:
        own = path.resolve().parent
        above = own.parent / "tunings"
        folders = [above, own / "tunings", above / own.name]
    places = [folder / f"{sensor}.json" for folder in folders]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        looked = f" in {places[0].parent}" if places else ""
        hint = "--tuning names a libcamera tuning file, or a folder that holds SENSOR.json"
        raise ImgtoolError(f"no tuning of the sensor {sensor}{looked}", hint)
    return load_tuning(found)


@lru_cache(maxsize=64)
def _canonical(tuning: Tuning) -> Tuning:
    """Return a tuning for statistics: they are in the colours of the sensor of the curve."""
    parameters = tuning.parameters._replace(sensitivity_r=1.0, sensitivity_b=1.0)
    return replace(tuning, parameters=parameters)


def _statistics(pixels: Array, told: Statistics, tuning: Tuning) -> AwbStats:
    """Undo the rendering of Raspberry Pi statistics: gains and colour matrix of 5000 K.

    raspberrypi/awb_nn renders lens shading, the gains of the CT curve, and the colour correction matrix,
    clipping to 0..1 before and after the matrix.
    """
    tuning = _canonical(tuning)
    values = pixels.astype(np.float32) / np.float32(65535)
    clipped = ((pixels == 0) | (pixels == 65535)).any(2)
    red, blue = np.asarray(tuning.locus.at(RENDERED_AT), np.float64)
    back = np.diag([red, 1.0, blue]) @ np.linalg.inv(tuning.ccm(RENDERED_AT))
    return AwbStats(
        (values @ back.T.astype(np.float32)).astype(np.float32),
        np.where(clipped, np.float32(CLIPPED_COVERAGE), np.float32(1)),
        _tuned(tuning, told.sensor),
        lux=told.lux,
        saturated=float((pixels == 65535).any(2).mean()),
        white=65535.0,
        truth=_white_at(tuning, told.ct),
        group=told.photographer,
        about={"camera_ct": told.camera_ct, "true_ct": told.ct, "sensor": told.sensor},
    )


def white_of(told: Statistics, path: Path, sources: Sources) -> tuple[float, float]:
    """Return R/G and B/G of the white of a Raspberry Pi statistic, by the tuning of its sensor.

    Args:
        told: What its name says.
        path: Its file, which need not be read for that.
        sources: How it would be read.

    Raises:
        ImgtoolError: There is no such tuning, or it cannot be read.
    """
    return _white_at(_canonical(_tuning(told.sensor, path, sources)), told.ct)


def _white_at(tuning: Tuning, ct: float) -> tuple[float, float]:
    red, blue = np.asarray(tuning.locus.at(ct), np.float64)
    return float(red), float(blue)


# Rendered photos.


@lru_cache(maxsize=1)
def srgb_camera() -> Camera:
    """Return the camera whose colours are those of linear sRGB, which is no sensor's."""
    return Camera("sRGB", Locus.of_matrix(XYZ_TO_SRGB))


def _photo(source: Path | bytes, name: str, mask: str, cells: int) -> AwbStats:
    from imgtool import images

    least = _LEAST if rectangle(mask) is None and cells == stats.CELLS else 0
    return of_photo(images.read(source, name, least), name, mask, cells)


def of_photo(photo: Photo, name: str, mask: str = "none", cells: int = stats.CELLS) -> AwbStats:
    """Average a rendered photo: sRGB inverted (IEC 61966-2-1), without highlights and deep shadows.

    Args:
        photo: The photo; pixels that are clear through do not count.
        name: What messages call it.
        mask: The setting of that name; "auto" takes nothing out.
        cells: About how many cells.

    Raises:
        ImgtoolError: It is grey; or code 2 for a mask outside of it.
    """
    from imgtool import images

    if photo.grey:
        raise _grey(name)
    grid = Grid.of(photo.pixels.shape[0], photo.pixels.shape[1], cells)
    outside = None if mask == "auto" else _outside(mask, photo.pixels.shape, name)
    values = np.clip(np.nan_to_num(images.to_float(grid.planes(photo.pixels))), 0, 1)
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    peak = values.max(0)
    counts = (peak <= LIGHTEST) & (peak >= DARKEST)
    if photo.alpha is not None:
        counts &= grid.sampled(photo.alpha) > 0
    if outside is not None:
        counts &= grid.sampled(outside)
    found = stats.of_samples(linear.astype(np.float32), counts, grid.side)
    share = float((peak > LIGHTEST).mean())
    return found.changed(camera=srgb_camera(), domain="srgb", saturated=share, name=name)
