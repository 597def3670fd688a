"""Photographs relit: raw frames of imagined cameras whose white is known.

A photograph whose colours are balanced is taken for a scene in white light; its labels are as good as
its own white balance, so weak. What it had clipped, or lost in shadows, is masked before it is relit,
for a highlight that stayed white would tell the light. Exposure, clipping, noise and quantisation come
after. Split by photograph, never by sample: what is drawn is a function of a seed and a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from imgtool import images, samples
from imgtool.engines.awb import stats
from imgtool.engines.awb.camera import Camera
from imgtool.engines.awb.imagined import imagine
from imgtool.engines.awb.stats import AwbStats
from imgtool.errors import USAGE, ImgtoolError
from imgtool.samples import CACHE_BYTES, Decoded

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Planes = npt.NDArray[np.float32]

SRGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
"""Linear sRGB to XYZ (IEC 61966-2-1)."""
LIGHTEST, DARKEST = 0.95, 0.04
"""Values of a photo, in 0..1, outside of which a pixel is masked."""
PANORAMA = ".hdr"
WIDEST_PANORAMA = 1024
"""Columns to which panoramas are shrunk."""
ROWS, COLUMNS = 32, 48
"""Cells of a sample."""
LARGEST_CELL = 4
"""Pixels along a cell at most."""
PANORAMA_CELL = 3
"""Pixels along a cell of a panorama."""
SHORTER = ROWS * LARGEST_CELL
"""Shorter side of the photos that samples are cut from."""
MIREDS = (115.0, 430.0)
"""Lights, evenly in 10^6 / kelvin: about 8700 to 2300 K."""
BEYOND = 1.1
"""Factor by which lights may lie beyond the ends of a camera's locus, in kelvin."""
DUV_SPREAD, GREEN_SHARE, GREEN_MEAN = 0.006, 0.15, 0.012
"""Distances of lights from the locus, in CIE 1960 uv: normal, and for a share more towards green."""
FARTHEST_DUV = 0.03
"""Where they end."""
PER_DUV = np.array(
    [
        [111.0, 154.0, 222.0, 345.0, 455.0],
        [-9.6, -7.9, -5.0, -2.3, -0.9],
        [-4.9, -6.7, -11.6, -24.6, -54.5],
    ]
)
"""Mired, and how the logarithms of R/G and B/G of white change by Duv: means over imagined cameras."""
MIXED = 0.2
"""Share of frames with a second light."""
EXPOSURES = (-2.5, 1.0)
"""Stops by which the brightest of a scene is off the white level."""
ELECTRONS = (1000.0, 40000.0)
"""At white; shot noise follows."""
READ_NOISE = (1e-4, 3e-3)
"""Standard deviation as share of white."""
BITS = (10, 14)
PEDESTAL = 1 / 16
"""Black level as share of white: what noise below black is not cut off."""
TOLD_LUX = 0.5
"""Share of samples whose lux is told."""
LUX_BY_MIRED = np.array([[150.0, 200.0, 245.0, 300.0, 345.0], [8.0, 7.5, 5.5, 4.5, 4.0]])
"""Mired, and the mean logarithm of lux under such lights among the frames of raspberrypi/awb_nn."""
LUX_SPREAD = 1.8
POOL = 512
"""Imagined cameras per seed."""
LEAST_USABLE = 0.05
"""Share of the cells of a frame that must count, else another photo is taken."""
ATTEMPTS = 8
BLACK, WHITE = 1024, 16383
"""Levels of the frames that are written."""


class Light(NamedTuple):
    """What a scene is lit with.

    Attributes:
        white: R/G and B/G of white.
        ct: Colour temperature of the point of the locus it is beside, in kelvin.
        duv: Distance from there in CIE 1960 uv, positive towards green.
    """

    white: Floats
    ct: float
    duv: float


class Frame(NamedTuple):
    """A frame to write.

    Attributes:
        pixels: ``(H, W, 3)`` uint16 RGB, linear from ``BLACK`` to ``WHITE``; masked pixels are 0.
        truth: R/G and B/G of white.
        camera: The camera.
        about: "ct", "duv", "mixed" (share of a second light, 0 for none), "source" (the file's name) and
            "group" (the photograph's).
    """

    pixels: npt.NDArray[np.uint16]
    truth: tuple[float, float]
    camera: Camera
    about: dict[str, Any]


class Shot(NamedTuple):
    """A frame as the sensor gives it: planes ``(3, h, w)``, white at 1, and where they count ``(h, w)``."""

    planes: Planes
    counts: npt.NDArray[np.bool_]
    truth: tuple[float, float]
    camera: Camera
    about: dict[str, Any]


Framing = Callable[[Array, bool, np.random.Generator], tuple[Planes, int]]
"""Decoded photograph, whether it is a panorama, and randomness, to a scene and its pixels along a cell."""


def photographs(folders: Sequence[Path]) -> list[Path]:
    """List the pictures and HDR panoramas in folders, each once, sorted; a file stands for itself.

    Raises:
        ImgtoolError: Code 2: no such folder.
    """
    found = set(samples.distinct(folders).values())
    for folder in folders:
        found |= {path for path in folder.rglob("*") if path.suffix.lower() == PANORAMA}
        found |= {folder} if folder.suffix.lower() == PANORAMA else set()
    return sorted(found)


def source_of(path: Path) -> str:
    """Return the photograph that a file is a view of, what a split keeps together: else the file's stem."""
    return samples.indexed_source(path) or path.stem


def linear(path: Path, least: int) -> Array:
    """Read a photograph as linear sRGB.

    Args:
        path: A photo of any kind, whose sRGB curve (IEC 61966-2-1) is inverted, or a Radiance panorama.
        least: Shorter side of a photo in pixels; panoramas are at most ``WIDEST_PANORAMA`` wide.

    Returns:
        ``(H, W, 3)``, float16 for photos, float32 for panoramas; NaN where a photo was too bright or too
        dark to be believed.

    Raises:
        ImgtoolError: It cannot be read.
    """
    if path.suffix.lower() == PANORAMA:
        return _panorama(path)
    pixels = images.read(path, str(path), least).pixels[..., :3]
    values = images.to_float(pixels).astype(np.float32)
    peak = values.max(2)
    good = ((peak <= LIGHTEST) & (peak >= DARKEST)).astype(np.float32)
    bright = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) * good[..., None]
    scale = least / min(good.shape)
    size = tuple(max(least, round(length * scale)) for length in good.shape[1::-1])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    share = np.asarray(cv2.resize(good, size, interpolation=how))
    mean = np.asarray(cv2.resize(bright, size, interpolation=how)) / np.maximum(share, 1e-6)[..., None]
    return np.where(share[..., None] > 0.5, mean, np.nan).astype(np.float16)


def _panorama(path: Path) -> Planes:
    try:
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    if pixels is None or pixels.ndim != 3 or pixels.dtype != np.float32:
        raise ImgtoolError(f"{path} is not a Radiance panorama, or corrupt", "give a whole .hdr file")
    width = min(WIDEST_PANORAMA, pixels.shape[1])
    small = cv2.resize(pixels[..., 2::-1], (width, width // 2), interpolation=cv2.INTER_AREA)
    return np.maximum(np.nan_to_num(small), 0)


def view(panorama: Array, height: int, width: int, rng: np.random.Generator) -> Planes:
    """Look into an equirectangular panorama at random.

    Returns:
        ``(height, width, 3)``, the brightest hundredth of green at 1.
    """
    yaw, pitch = rng.uniform(-np.pi, np.pi), np.clip(rng.normal(0, 0.25), -0.8, 0.8)
    half = np.tan(np.radians(rng.uniform(40, 90)) / 2)
    across, down = np.meshgrid(
        np.linspace(-half, half, width, dtype=np.float32),
        np.linspace(-half, half, height, dtype=np.float32) * np.float32(height / width),
    )
    forward, up = np.cos(pitch) + down * np.sin(pitch), np.sin(pitch) - down * np.cos(pitch)
    high, wide = panorama.shape[:2]
    longitude = np.arctan2(across, forward) + yaw
    latitude = np.arctan2(up, np.hypot(across, forward))
    columns = ((longitude / (2 * np.pi) + 0.5) * wide).astype(np.float32)
    rows = ((0.5 - latitude / np.pi) * high).astype(np.float32)
    seen = cv2.remap(panorama, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    top = float(np.percentile(seen[..., 1], 99))
    return np.asarray(seen, np.float32) / np.float32(max(top, 1e-6))


def _cut(photo: Array, height: int, width: int, rng: np.random.Generator) -> Planes:
    """Cut a random part out of a photo, mirrored half of the time."""
    top = int(rng.integers(photo.shape[0] - height + 1))
    left = int(rng.integers(photo.shape[1] - width + 1))
    part = photo[top : top + height, left : left + width]
    return (part[:, ::-1] if rng.random() < 0.5 else part).astype(np.float32)


def srgb_to_balanced(camera: Camera) -> Floats:
    """Return the matrix from linear sRGB to a camera's white-balanced colours; its rows sum to 1.

    From the colour matrix, else the colour correction of the tuning; a camera with neither sees as sRGB.
    """
    if camera.xyz_to_camera is not None:
        matrix = np.asarray(camera.xyz_to_camera) @ SRGB_TO_XYZ
    elif camera.tuning is not None:
        matrix = np.linalg.inv(camera.tuning.ccm(5000.0))
    else:
        matrix = np.eye(3)
    balanced: Floats = matrix / matrix.sum(1, keepdims=True)
    return balanced


def draw_light(camera: Camera, rng: np.random.Generator) -> Light:
    """Draw a light on a camera's locus, or beside it as lamps are."""
    coldest, warmest = 1e6 / (BEYOND * camera.locus.ct[-1]), 1e6 * BEYOND / camera.locus.ct[0]
    mired = float(rng.uniform(max(MIREDS[0], coldest), min(MIREDS[1], warmest)))
    green = float(rng.exponential(GREEN_MEAN)) if rng.random() < GREEN_SHARE else 0.0
    duv = float(np.clip(rng.normal(0, DUV_SPREAD) + green, -FARTHEST_DUV, FARTHEST_DUV))
    slope = np.array([np.interp(mired, PER_DUV[0], change) for change in PER_DUV[1:]])
    ct = 1e6 / mired
    return Light(camera.locus.at(ct) * np.exp(slope * duv), ct, duv)


def _shares(shape: tuple[int, ...], rng: np.random.Generator) -> Planes:
    """Return the share, by pixel, of a second light: from one side, softly."""
    height, width = shape
    angle, place = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3)
    softness = np.exp(rng.uniform(np.log(0.03), np.log(0.5)))
    x, y = np.linspace(-0.5, 0.5, width), np.linspace(-0.5, 0.5, height)[:, None]
    distance = np.cos(angle) * x + np.sin(angle) * y - place
    return np.asarray(0.5 + 0.5 * np.tanh(distance / softness), np.float32)


def _lit(balanced: Planes, counts: Array, camera: Camera, rng: np.random.Generator) -> tuple[Light, float]:
    """Light planes in place, and return the dominant light and the other's share."""
    light = draw_light(camera, rng)
    if rng.random() >= MIXED:
        balanced[0] *= light.white[0]
        balanced[2] *= light.white[1]
        return light, 0.0
    other, share = draw_light(camera, rng), _shares(counts.shape, rng)
    second = float(share[counts].mean()) if counts.any() else 0.0
    if second > 0.5:
        share, second = 1 - share, 1 - second
    for channel, (own, strange) in zip((0, 2), zip(light.white, other.white, strict=True), strict=True):
        balanced[channel] *= own + (strange - own) * share
    return light, second


def _sensed(planes: Planes, rng: np.random.Generator) -> Planes:
    """Expose, add noise, clip and quantise."""
    stops = rng.uniform(*EXPOSURES)
    top = max(float(planes.max()), 1e-6)
    seen = planes * np.float32(2.0**stops / min(top, 1.0))
    electrons = np.exp(rng.uniform(*np.log(ELECTRONS)))
    read = np.exp(rng.uniform(*np.log(READ_NOISE)))
    deviation = np.sqrt(np.maximum(seen, 0) * np.float32(1 / electrons) + np.float32(read**2))
    seen += deviation * rng.standard_normal(seen.shape, dtype=np.float32)
    steps = np.float32(2 ** int(rng.integers(BITS[0], BITS[1] + 1)) - 1)
    np.clip(seen, -PEDESTAL, 1, out=seen)
    return np.asarray(np.rint(seen * steps) / steps, np.float32)


def relight(scene: Planes, camera: Camera, rng: np.random.Generator) -> Shot:
    """Take a raw frame of a scene with a camera in a light that is drawn.

    Args:
        scene: ``(h, w, 3)`` linear sRGB as in white light; NaN where it is not known.
        camera: The camera.
        rng: Source of all that is random.
    """
    counts = np.asarray(np.isfinite(scene).all(2))
    known = np.where(counts, scene.transpose(2, 0, 1), np.float32(0))
    balanced = np.einsum("ij,jhw->ihw", srgb_to_balanced(camera).astype(np.float32), known)
    np.maximum(balanced, 0, out=balanced)
    light, mixed = _lit(balanced, counts, camera, rng)
    about = {"ct": light.ct, "duv": light.duv, "mixed": mixed, "label": "weak"}
    truth = (float(light.white[0]), float(light.white[1]))
    return Shot(_sensed(balanced, rng), counts, truth, camera, about)


def _cells(photo: Array, panorama: bool, rng: np.random.Generator) -> tuple[Planes, int]:
    """Frame ``ROWS`` x ``COLUMNS`` cells."""
    if panorama:
        return view(photo, ROWS * PANORAMA_CELL, COLUMNS * PANORAMA_CELL, rng), PANORAMA_CELL
    most = min(photo.shape[0] // ROWS, photo.shape[1] // COLUMNS)
    cell = int(rng.integers(min(2, most), most + 1))
    return _cut(photo, ROWS * cell, COLUMNS * cell, rng), cell


def _lux(ct: float, rng: np.random.Generator) -> float | None:
    """Draw the illuminance of a scene, as goes with the colour of its light, or do not tell it."""
    if rng.random() >= TOLD_LUX:
        return None
    return float(np.exp(rng.normal(np.interp(1e6 / ct, *LUX_BY_MIRED), LUX_SPREAD)))


@lru_cache(maxsize=2 * POOL)
def imagined_camera(seed: int, number: int) -> Camera:
    """Return camera ``number`` of those imagined for a seed."""
    return imagine(np.random.default_rng([seed, 7, number]))


class Relit:
    """Relit photographs: sample n is a function of the photographs, the seed and n alone."""

    def __init__(self, paths: Sequence[Path], seed: int, cameras: Sequence[Camera] | None = None) -> None:
        """Draw from photographs and panoramas.

        Args:
            paths: At least one.
            seed: Whatever is drawn depends on it, imagined cameras too.
            cameras: To take frames with; without them, cameras are imagined.

        Raises:
            ImgtoolError: Code 2: no photographs.
        """
        if not paths:
            raise ImgtoolError("no photographs to relight", "name folders with photographs", USAGE)
        self.paths, self.seed, self.cameras = list(paths), seed, cameras
        self._order = samples.Order([range(len(self.paths))], seed)
        self._decoded = Decoded(linear, CACHE_BYTES // 4)

    def camera(self, rng: np.random.Generator) -> Camera:
        """Draw a camera."""
        if self.cameras:
            return self.cameras[int(rng.integers(len(self.cameras)))]
        return imagined_camera(self.seed, int(rng.integers(POOL)))

    def every_camera(self) -> list[Camera]:
        """Return all cameras that frames may be taken with."""
        return list(self.cameras or (imagined_camera(self.seed, number) for number in range(POOL)))

    def _taken(self, number: int, framed: Framing, least: int) -> tuple[Shot, int]:
        """Take shot ``number``, and return it with the length of its cells in pixels."""
        _, index, rng = self._order.chosen(number)
        for attempt in range(ATTEMPTS):
            path = self.paths[(index + attempt) % len(self.paths)]
            scene, cell = framed(self._decoded(path, least), path.suffix.lower() == PANORAMA, rng)
            shot = relight(scene, self.camera(rng), rng)
            usable = shot.counts & (shot.planes.max(0) < stats.SATURATED)
            if usable.mean() >= LEAST_USABLE:
                shot.about["source"], shot.about["group"] = path.name, source_of(path)
                return shot, cell
        raise ImgtoolError(f"{path} and others are too dark or too bright to relight", "give other photos")

    def sample(self, number: int) -> AwbStats:
        """Return sample ``number``: about ``stats.CELLS`` cells of a part of a photograph, relit.

        Its ``group`` is the photograph's name. ``about`` says "ct", "duv", "mixed" (the share of a second
        light, 0 for none), "label" ("weak": as good as the photograph's own balance), "source" and "group".

        Raises:
            ImgtoolError: A photograph that cannot be read, or many that show nothing.
        """
        shot, cell = self._taken(number, _cells, SHORTER)
        saturated = shot.planes.max(0) >= stats.SATURATED
        found = stats.of_samples(shot.planes, shot.counts & ~saturated, (cell, cell))
        return found.changed(
            camera=shot.camera,
            lux=_lux(shot.about["ct"], np.random.default_rng([self.seed, 8, number])),
            saturated=float((saturated & shot.counts).mean()),
            name=f"{shot.about['source']} {number}",
            truth=shot.truth,
            group=shot.about["group"],
            about=shot.about,
        )

    def frame(self, number: int, height: int = 432, width: int = 648) -> Frame:
        """Return frame ``number`` with all its pixels; another than ``sample(number)``, as large as asked.

        Raises:
            ImgtoolError: A photograph that cannot be read, or many that show nothing.
        """

        def framed(photo: Array, panorama: bool, rng: np.random.Generator) -> tuple[Planes, int]:
            return (view if panorama else _cut)(photo, height, width, rng), 1

        shot, _ = self._taken(number, framed, max(height, width))
        levels = np.rint(BLACK + shot.planes.transpose(1, 2, 0) * (WHITE - BLACK))
        pixels = np.where(shot.counts[..., None], np.maximum(levels, 1), 0).astype(np.uint16)
        return Frame(pixels, shot.truth, shot.camera, shot.about)
