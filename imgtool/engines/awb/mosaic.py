"""Camera RAW to statistics: the mosaic itself is averaged, nothing is demosaicked or rendered.

LibRaw can crash on broken files, so a child process decodes: a fork of this one, which shares the memory
of interpreter and libraries, or ``python -m imgtool.engines.awb.mosaic IN OUT`` where forking is unsafe.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from imgtool import raw as render
from imgtool.engines.awb.camera import DAYLIGHT, GENERIC, Camera, Locus
from imgtool.engines.awb.stats import SATURATED, AwbStats, Grid, of_samples, saturation
from imgtool.errors import FAILED, ImgtoolError
from imgtool.memory import resident_mb

if TYPE_CHECKING:
    import rawpy

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Tags = Mapping[int, tuple[float, ...] | str]

SAMPLES = 8
"""Super-pixels of 2x2 that a side of a cell has, where the frame is large enough."""

DNG_VERSION, SUBFILE_TYPE = 50706, 254
_MAKER, _MODEL, _UNIQUE_MODEL = 271, 272, 50708
_MATRICES, _CALIBRATIONS, _LIGHTS = (50721, 50722), (50723, 50724), (50778, 50779)
_BALANCE = 50727
_KELVIN: Mapping[float, float] = {
    1: 5500, 2: 4150, 3: 2850, 4: 5500, 9: 5500, 10: 6500, 11: 7500, 12: 6400, 13: 5050, 14: 4150, 15: 3525,
    16: 2925, 17: 2850, 18: 5500, 19: 6500, 20: 5500, 21: 6500, 22: 7500, 23: 5000, 24: 3200,
}  # fmt: skip
"""EXIF's LightSource to kelvin, as the DNG SDK has it (dng_camera_profile.cpp, IlluminantToTemperature)."""

_D50 = np.array([0.96422, 1.0, 0.82521])
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_CODES = {1: "B", 3: "H", 4: "I", 5: "I", 6: "b", 8: "h", 9: "i", 10: "i", 11: "f", 12: "d"}
_LONGEST = 4096
_CRASHED = "convert it to DNG or TIFF with the camera maker's software"
_OTHER = "give a Bayer RAW, or a rendered photo, whose gains are a correction"
_HOPELESS = 2.0


def read(path: Path, name: str = "", timeout: float = render.TIMEOUT) -> AwbStats:
    """Average a camera RAW file into cells, as the sensor lies.

    Bayer mosaics of three colours are read. White is the level that LibRaw knows, or the plateau of
    saturation where that is lower.

    Args:
        path: The file.
        name: What messages and the statistics call it, the path where "".
        timeout: Seconds after which a decoding that does not end is given up.

    Returns:
        The statistics. ``about`` holds "size", the visible mosaic's height and width in pixels; where
        known, "camera_gains" (the camera's own white balance: gains of red and blue), "daylight_gains",
        "iso", "exposure" in seconds, "aperture"; and of the process that decoded, in 10^6 bytes:
        "peak_mb", its peak resident memory, and "shared_mb", how much of that it shares with this process.

    Raises:
        ImgtoolError: No such file, empty, no header, truncated, corrupt, no Bayer mosaic, or the
            decoder crashed.
    """
    try:
        render.refuse_headerless(path)
        forks = hasattr(os, "fork") and "torch" not in sys.modules
        data = _forked(path, timeout) if forks else _fresh(path, timeout)
    except ImgtoolError as fault:
        what = fault.what.replace(str(path.absolute()), str(path)).replace(str(path), name or str(path))
        raise ImgtoolError(what, fault.hint, fault.code) from None
    return _unpacked(data).changed(name=name or str(path))


def _crashed(path: Path, how: str = "decoding crashed") -> ImgtoolError:
    return ImgtoolError(f"cannot decode {path}: {how}", _CRASHED)


def _fresh(path: Path, timeout: float) -> bytes:
    """Decode in a new interpreter."""
    with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
        target = Path(folder, "stats")
        command = [sys.executable, "-m", "imgtool.engines.awb.mosaic", str(path.absolute()), str(target)]
        render.run(command, path, timeout)
        return target.read_bytes()


def _forked(path: Path, timeout: float) -> bytes:
    """Decode in a fork of this process, which is made as small as it gets before."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's; elsewhere the heap stays as it is
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of forking among threads, such as those of OpenBLAS; the child starts none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        os.close(reader)
        _answer(path, writer)
    os.close(writer)
    try:
        data = _received(reader, path, timeout)
    finally:
        os.close(reader)
        # Whatever made us stop reading, nobody needs an answer any more; one that has answered is gone.
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if not data:
        raise _crashed(path)
    fault = json.loads(data.split(b"\n", 1)[0])
    if "what" in fault:
        raise ImgtoolError(fault["what"], fault["hint"])
    return data


def _received(reader: int, path: Path, timeout: float) -> bytes:
    """Read all that the child writes; an answer that it did not finish is none."""
    end = time.monotonic() + timeout
    parts: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        while selector.select(max(end - time.monotonic(), 0)):
            part = os.read(reader, 1 << 16)
            if not part:
                data = b"".join(parts)
                return data if data.endswith(b"\n") else b""
            parts.append(part)
    raise _crashed(path, f"no end after {timeout:g} s")


def _unpacked(data: bytes) -> AwbStats:
    line, body = data.split(b"\n", 1)
    head = json.loads(line)
    high, wide = head["shape"]
    numbers = np.frombuffer(body, np.float32, 4 * high * wide).copy()
    cells, coverage = numbers[: 3 * high * wide], numbers[3 * high * wide :]
    return AwbStats(
        cells.reshape(high, wide, 3),
        coverage.reshape(high, wide),
        camera_of(head["camera"], head["matrix"], head["matrices"]),
        saturated=head["saturated"],
        black=head["black"],
        white=head["white"],
        about=head["about"],
    )


def camera_of(
    name: str, matrix: Sequence[float] | Array | None, matrices: Sequence[tuple[float, Any]] = ()
) -> Camera:
    """Return a camera by its colour matrix, or matrices.

    Args:
        name: Its name, "" where unknown.
        matrix: XYZ to camera at D65, 9 numbers row by row; None, or one that makes no sense, is unknown.
        matrices: Colour temperature of a light and the matrix for it; where one makes no sense, or they do
            not go together, ``matrix`` serves for all lights.
    """
    if matrix is None:
        return Camera(name) if name else GENERIC
    xyz_to_camera = np.asarray(matrix, np.float64).reshape(3, 3)
    several = tuple((kelvin, np.asarray(one, np.float64).reshape(3, 3)) for kelvin, one in matrices)
    for lights in filter(None, (several, ((DAYLIGHT, xyz_to_camera),))):
        if all(_sensible(one) for _, one in lights):
            with suppress(ImgtoolError):
                told = several if lights is several else ()
                return Camera(name, Locus.of_matrices(lights), True, xyz_to_camera, told)
    return Camera(name)


def _sensible(matrix: Floats) -> bool:
    return bool(np.isfinite(matrix).all() and abs(np.linalg.det(matrix)) >= 1e-6)


def tiff_tags(file: BinaryIO, wanted: Collection[int]) -> dict[int, tuple[float, ...] | str]:
    """Read tags of the first directory of a TIFF structure (TIFF 6.0); broken ones are left out.

    Args:
        file: At least the head and what the tags point to.
        wanted: Numbers of tags.

    Returns:
        Tag to its numbers, or its text.
    """
    file.seek(0)
    head = file.read(8)
    order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
    if not order or len(head) < 8:
        return {}
    file.seek(struct.unpack(order + "I", head[4:])[0])
    count = int.from_bytes(file.read(2), "little" if order == "<" else "big")
    directory = file.read(12 * count)
    found = {}
    for place in range(0, len(directory) - 11, 12):
        tag, kind, number = struct.unpack_from(order + "HHI", directory, place)
        length = _SIZES.get(kind, 0) * number
        if tag not in wanted or not 0 < length <= _LONGEST:
            continue
        data = directory[place + 8 : place + 8 + length]
        if length > 4:
            file.seek(struct.unpack_from(order + "I", directory, place + 8)[0])
            data = file.read(length)
        if len(data) == length:
            found[tag] = _value(data, kind, order)
    return found


def _value(data: bytes, kind: int, order: str) -> tuple[float, ...] | str:
    if kind == 2:
        return data.split(b"\0")[0].decode("ascii", "replace").strip()
    numbers = [float(value) for (value,) in struct.iter_unpack(order + _CODES[kind], data)]
    if kind in (5, 10):
        parts = zip(numbers[::2], numbers[1::2], strict=True)
        return tuple(over / under if under else 0.0 for over, under in parts)
    return tuple(numbers)


# What follows runs in the child.


def _answer(path: Path, writer: int) -> None:
    """Write the statistics of a file, or what is wrong with it, and end the process."""
    status = FAILED
    try:
        shared = resident_mb("VmRSS")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # LibRaw speaks of its own accord
            os.dup2(nowhere, stream)
        try:
            data = _packed(decode(path), shared)
        except ImgtoolError as fault:
            data = _said(fault).encode()
        except MemoryError:
            data = _said(_no_memory(path)).encode()
        with os.fdopen(writer, "wb") as file:
            file.write(data)
        status = 0
    finally:
        os._exit(status)


def _packed(stats: AwbStats, shared: float | None = None) -> bytes:
    """Return statistics as a line of JSON, the numbers of the cells, and a last line feed."""
    matrix = stats.camera.xyz_to_camera
    memory = {"peak_mb": resident_mb("VmHWM"), "shared_mb": shared}
    head = {
        "shape": stats.coverage.shape,
        "camera": stats.camera.name,
        "matrix": None if matrix is None else matrix.ravel().tolist(),
        "matrices": [(kelvin, one.ravel().tolist()) for kelvin, one in stats.camera.matrices],
        "saturated": stats.saturated,
        "black": stats.black,
        "white": stats.white,
        "about": stats.about | {key: value for key, value in memory.items() if value is not None},
    }
    numbers = stats.cells.astype(np.float32).tobytes() + stats.coverage.astype(np.float32).tobytes()
    return json.dumps(head).encode() + b"\n" + numbers + b"\n"


def decode(path: Path) -> AwbStats:
    """Average a camera RAW in this process, which a broken file may crash; see ``read``."""
    import rawpy

    with render.faults(path), rawpy.imread(str(path)) as raw:
        places = _places(raw, path)
        return _averaged(raw, places, path).changed(camera=_identity(raw, path), about=_about(raw))


def _places(raw: rawpy.RawPy, path: Path) -> dict[str, list[tuple[int, int, int]]]:
    """Return where in a 2x2 block each colour is: row, column and LibRaw's number of the channel.

    Raises:
        ImgtoolError: Anything but a Bayer mosaic of red, green and blue.
    """
    import rawpy

    if raw.raw_type != rawpy.RawType.Flat:
        what = "holds several values per pixel (linear DNG, Foveon or sRAW)"
        raise ImgtoolError(f"{path} {what}, not a Bayer mosaic", _OTHER)
    pattern, letters = raw.raw_pattern, raw.color_desc.decode("ascii", "replace")
    if pattern is None or raw.num_colors == 1:
        raise ImgtoolError(
            f"{path} is monochrome: it has no white balance", "give a RAW of a camera that sees colours"
        )
    if pattern.shape != (2, 2):
        size = f"{pattern.shape[0]}×{pattern.shape[1]}"
        raise ImgtoolError(f"{path} has a colour pattern of {size} pixels, such as X-Trans", _OTHER)
    places: dict[str, list[tuple[int, int, int]]] = {}
    for (row, column), channel in np.ndenumerate(pattern):
        places.setdefault(letters[channel], []).append((row, column, int(channel)))
    if {letter: len(found) for letter, found in places.items()} != {"R": 1, "G": 2, "B": 1}:
        colours = "".join(letters[channel] for channel in pattern.ravel())
        larger = "a pattern larger than 2×2 pixels, such as quad-Bayer"
        what = larger if set(colours) <= set("RGB") else f"the colours {colours}"
        raise ImgtoolError(f"{path} has {what}, not red, two greens and blue in 2×2 pixels (Bayer)", _OTHER)
    return places


def _averaged(raw: rawpy.RawPy, places: dict[str, list[tuple[int, int, int]]], path: Path) -> AwbStats:
    values = raw.raw_image_visible
    high, wide = values.shape[0] // 2, values.shape[1] // 2
    if not high or not wide:
        raise ImgtoolError(
            f"{path} has {values.shape[1]}×{values.shape[0]} pixels, less than one of each colour"
        )
    grid = Grid.of(high, wide, samples=SAMPLES)
    order = [places["R"][0], *places["G"], places["B"][0]]
    parts = [grid.sampled(values[row::2, column::2][:high, :wide]).copy() for row, column, _ in order]
    levels = np.array(raw.black_level_per_channel, np.float32)[[channel for _, _, channel in order]]
    green = np.maximum(parts[1], parts[2])
    peak = np.maximum(np.maximum(parts[0], parts[3]), green)
    black, white = float(levels.mean()), _white(raw, peak)
    _check_levels(black, white, peak, path)
    white = saturation(np.stack([parts[0], green, parts[3]]), peak, black, white)
    saturated = peak >= black + SATURATED * (white - black)
    red, first, second, blue = (part - level for part, level in zip(parts, levels, strict=True))
    planes = np.stack([red, (first + second) / 2, blue])
    stats = of_samples(planes, ~saturated, grid.side, 0.0, white - black)
    share = float(np.count_nonzero(saturated)) / saturated.size
    return stats.changed(black=black, white=white, saturated=share)


def _white(raw: rawpy.RawPy, peak: Array) -> float:
    """Return the lowest level of white that the file or LibRaw's table names, else the largest value."""
    named = [raw.white_level, *(raw.camera_white_level_per_channel or ())]
    return float(min((level for level in named if level > 0), default=max(int(peak.max()), 1)))


def _check_levels(black: float, white: float, peak: Array, path: Path) -> None:
    """Refuse levels and values that no sensor gives: a truncated DNG decodes to noise without an error."""
    # A sensor may pass the white level that LibRaw's table says, but not by a factor of two.
    place = int(0.999 * (peak.size - 1))
    top = float(np.partition(peak, place, None)[place])
    if black >= white or top > _HOPELESS * white:
        what = f"{path} is corrupt: black level {black:g}, white level {white:g}, values to {top:g}"
        raise ImgtoolError(what, "copy the file again from the card")


def _about(raw: rawpy.RawPy) -> dict[str, Any]:
    found: dict[str, Any] = {"size": [int(edge) for edge in raw.raw_image_visible.shape]}
    for key, balance in (
        ("camera_gains", raw.camera_whitebalance),
        ("daylight_gains", raw.daylight_whitebalance),
    ):
        red, green, blue = balance[:3]
        usable = all(np.isfinite(gain) and gain > 0 for gain in (red, green, blue))
        if usable and max(red, green, blue) > 1.001 * min(red, green, blue):  # all alike: not known
            found[key] = [float(red / green), float(blue / green)]
    other = getattr(raw, "other", None)
    for key, attribute in (("iso", "iso_speed"), ("exposure", "shutter_speed"), ("aperture", "aperture")):
        value = float(getattr(other, attribute, 0.0))
        if np.isfinite(value) and value > 0:
            found[key] = value
    return found


def _identity(raw: rawpy.RawPy, path: Path) -> Camera:
    """Return the camera's name and its matrices from XYZ, the file's own or LibRaw's, unchecked."""
    wanted = {_MAKER, _MODEL, _UNIQUE_MODEL, _BALANCE, *_MATRICES, *_CALIBRATIONS, *_LIGHTS}
    with path.open("rb") as file:
        tags = tiff_tags(file, wanted)
    maker, model = str(tags.get(_MAKER, "")), str(tags.get(_MODEL, ""))
    said = any(word.lower() in model.lower() for word in maker.split())
    name = str(tags.get(_UNIQUE_MODEL, "")) or (model if said else f"{maker} {model}")
    matrix, matrices = _matrices(tags)
    if matrix is None and raw.rgb_xyz_matrix[:3].any():
        matrix = raw.rgb_xyz_matrix[:3].astype(np.float64)
    return Camera(name.strip(), GENERIC.locus, xyz_to_camera=matrix, matrices=matrices)


def _matrices(tags: Tags) -> tuple[Floats | None, tuple[tuple[float, Floats], ...]]:
    """Return XYZ to camera of a DNG for the light nearest to D65; and for both lights, where it has two."""
    there = [number for number in (1, 0) if len(_numbers(tags, _MATRICES[number])) == 9]
    if not there:
        return None, ()
    kelvin = {number: _light(tags, number) for number in there}
    away = {number: abs(1 / (light or DAYLIGHT) - 1 / DAYLIGHT) for number, light in kelvin.items()}
    nearest = min(there, key=lambda number: (away[number], not kelvin[number]))
    two = len({light for light in kelvin.values() if light}) == 2
    several = ((light, _product(tags, number, even=True)) for number, light in kelvin.items() if two)
    return _product(tags, nearest), tuple(several)


def _light(tags: Tags, number: int) -> float:
    """Return the colour temperature of a calibration light in kelvin, 0 where unknown."""
    told = _numbers(tags, _LIGHTS[number])
    return _KELVIN.get(told[0], 0.0) if told else 0.0


def _numbers(tags: Tags, tag: int) -> tuple[float, ...]:
    found = tags.get(tag, ())
    return () if isinstance(found, str) else found


def _product(tags: Tags, number: int, even: bool = False) -> Floats:
    """Return AnalogBalance x CameraCalibration x ColorMatrix: DNG Specification 1.7, chapter 6.

    Two are interpolated on even scales: as in the DNG SDK, the largest part of white under D50 is 1.
    """
    matrix = np.array(_numbers(tags, _MATRICES[number]), np.float64).reshape(3, 3)
    largest = float((matrix @ _D50).max())
    if even and largest > 0:
        matrix /= largest
    calibration, balance = _numbers(tags, _CALIBRATIONS[number]), _numbers(tags, _BALANCE)
    if len(calibration) == 9:
        matrix = np.array(calibration, np.float64).reshape(3, 3) @ matrix
    if len(balance) == 3:
        matrix = np.diag(np.array(balance, np.float64)) @ matrix
    return matrix


def _no_memory(path: Path) -> ImgtoolError:
    return ImgtoolError(f"not enough memory to decode {path}", "close other programs")


def _said(fault: ImgtoolError) -> str:
    """Return a fault as the line of JSON that ``imgtool.raw.run`` reads too."""
    return json.dumps({"what": fault.what, "hint": fault.hint}) + "\n"


def main(source: str, target: str) -> int:
    """Write the statistics of ``source`` to ``target``; a fault is one line of JSON on standard output."""
    path = Path(source)
    try:
        Path(target).write_bytes(_packed(decode(path)))
    except ImgtoolError as fault:
        sys.stdout.write(_said(fault))
        return FAILED
    except MemoryError:
        sys.stdout.write(_said(_no_memory(path)))
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
