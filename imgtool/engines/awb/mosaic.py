"""Camera RAW to statistics: the mosaic itself is averaged, nothing is demosaicked or rendered.

LibRaw can crash on broken files, so a child process decodes: a fork of this one, which shares the memory
of interpreter and libraries, or the one of ``imgtool.decoder`` where forking is unsafe.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgtool import decoder, tags
from imgtool import raw as render
from imgtool.engines.awb.camera import DAYLIGHT, GENERIC, Camera, Locus
from imgtool.engines.awb.stats import SATURATED, AwbStats, Grid, of_samples, saturation
from imgtool.errors import FAILED, ImgtoolError
from imgtool.memory import give_back, resident_mb

if TYPE_CHECKING:
    import rawpy

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

SAMPLES = 8
"""Super-pixels of 2x2 that a side of a cell has, where the frame is large enough."""

_MATRICES, _CALIBRATIONS, _LIGHTS = (50721, 50722), (50723, 50724), (50778, 50779)
_BALANCE = 50727
_KELVIN: Mapping[float, float] = {
    1: 5500, 2: 4150, 3: 2850, 4: 5500, 9: 5500, 10: 6500, 11: 7500, 12: 6400, 13: 5050, 14: 4150, 15: 3525,
    16: 2925, 17: 2850, 18: 5500, 19: 6500, 20: 5500, 21: 6500, 22: 7500, 23: 5000, 24: 3200,
}  # fmt: skip
"""EXIF's LightSource to kelvin, as the DNG SDK has it (dng_camera_profile.cpp, IlluminantToTemperature)."""

_D50 = np.array([0.96422, 1.0, 0.82521])
_CRASHED = "convert it to DNG or TIFF with the camera maker's software"
_OTHER = "give a Bayer RAW, or a rendered photo, whose gains are a correction"


def read(path: Path, name: str = "", timeout: float = decoder.TIMEOUT) -> AwbStats:
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
        data = _forked(path, timeout) if forks else _asked(path, timeout)
    except ImgtoolError as fault:
        what = fault.what.replace(str(path.absolute()), str(path)).replace(str(path), name or str(path))
        raise ImgtoolError(what, fault.hint, fault.code) from None
    return _unpacked(data).changed(name=name or str(path))


def _crashed(path: Path, how: str = "decoding crashed") -> ImgtoolError:
    return ImgtoolError(f"cannot decode {path}: {how}", _CRASHED)


def _asked(path: Path, timeout: float) -> bytes:
    """Have this process's decoder do it."""
    _, data = decoder.ask("imgtool.engines.awb.mosaic:answer", path, str(path), timeout)
    return bytes(data)


def _forked(path: Path, timeout: float) -> bytes:
    """Decode in a fork of this process, which is made as small as it gets before."""
    gc.collect()
    give_back()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of forking among threads, such as those of OpenBLAS; the child starts none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        os.close(reader)
        _answer(path, writer, timeout)
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


# What follows runs in the child.


def _answer(path: Path, writer: int, timeout: float) -> None:
    """Write the statistics of a file, or what is wrong with it, and end the process."""
    status = FAILED
    try:
        shared = resident_mb("VmRSS")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # LibRaw speaks of its own accord
            os.dup2(nowhere, stream)
        try:
            with decoder.limited(timeout):
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

    with render.faults(str(path)), rawpy.imread(str(path)) as raw:
        places = render.bayer(raw, str(path), _OTHER)
        return _averaged(raw, places, path).changed(camera=_identity(raw, path), about=_about(raw))


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
    render.check_levels(black, white, peak, str(path))
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


def _about(raw: rawpy.RawPy) -> dict[str, Any]:
    found: dict[str, Any] = {"size": [int(edge) for edge in raw.raw_image_visible.shape]}
    for key, balance in (
        ("camera_gains", raw.camera_whitebalance),
        ("daylight_gains", raw.daylight_whitebalance),
    ):
        red, green, blue = balance[:3]
        usable = render.usable((red, green, blue))
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
    names = (tags.MAKER, tags.MODEL, tags.UNIQUE_MODEL)
    found = tags.of_file(path, {*names, _BALANCE, *_MATRICES, *_CALIBRATIONS, *_LIGHTS})
    matrix, matrices = _matrices(found)
    if matrix is None and raw.rgb_xyz_matrix[:3].any():
        matrix = raw.rgb_xyz_matrix[:3].astype(np.float64)
    return Camera(tags.camera(found), GENERIC.locus, xyz_to_camera=matrix, matrices=matrices)


def _matrices(found: tags.Tags) -> tuple[Floats | None, tuple[tuple[float, Floats], ...]]:
    """Return XYZ to camera of a DNG for the light nearest to D65; and for both lights, where it has two."""
    there = [number for number in (1, 0) if len(tags.numbers(found, _MATRICES[number])) == 9]
    if not there:
        return None, ()
    kelvin = {number: _light(found, number) for number in there}
    away = {number: abs(1 / (light or DAYLIGHT) - 1 / DAYLIGHT) for number, light in kelvin.items()}
    nearest = min(there, key=lambda number: (away[number], not kelvin[number]))
    two = len({light for light in kelvin.values() if light}) == 2
    several = ((light, _product(found, number, even=True)) for number, light in kelvin.items() if two)
    return _product(found, nearest), tuple(several)


def _light(found: tags.Tags, number: int) -> float:
    """Return the colour temperature of a calibration light in kelvin, 0 where unknown."""
    told = tags.numbers(found, _LIGHTS[number])
    return _KELVIN.get(told[0], 0.0) if told else 0.0


def _product(found: tags.Tags, number: int, even: bool = False) -> Floats:
    """Return AnalogBalance x CameraCalibration x ColorMatrix: DNG Specification 1.7, chapter 6.

    Two are interpolated on even scales: as in the DNG SDK, the largest part of white under D50 is 1.
    """
    matrix = np.array(tags.numbers(found, _MATRICES[number]), np.float64).reshape(3, 3)
    largest = float((matrix @ _D50).max())
    if even and largest > 0:
        matrix /= largest
    calibration, balance = tags.numbers(found, _CALIBRATIONS[number]), tags.numbers(found, _BALANCE)
    if len(calibration) == 9:
        matrix = np.array(calibration, np.float64).reshape(3, 3) @ matrix
    if len(balance) == 3:
        matrix = np.diag(np.array(balance, np.float64)) @ matrix
    return matrix


def _no_memory(path: Path) -> ImgtoolError:
    return ImgtoolError(f"not enough memory to decode {path}", "close other programs")


def _said(fault: ImgtoolError) -> str:
    return json.dumps({"what": fault.what, "hint": fault.hint}) + "\n"


def answer(path: Path, name: str) -> tuple[dict[str, Any], bytes]:
    """Average a camera RAW in this process, for ``imgtool.decoder``."""
    return {}, _packed(decode(path))
