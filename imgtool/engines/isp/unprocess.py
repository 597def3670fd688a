"""Photographs turned into raw frames: the front end backwards, a mosaic, noise, whole numbers.

The way is that of Brooks et al., "Unprocessing images for learned raw denoising", CVPR 2019, with the exact
curve of sRGB and no tone curve, so that the front end's rendering of the noise-free colours is the truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imgtool.engines.isp import bayer, colour
from imgtool.mosaic import Mosaic

Floats = npt.NDArray[np.float64]
Picture = npt.NDArray[np.uint8]

CAMERAS: Mapping[str, tuple[int, ...]] = {
    "Canon PowerShot G2": (9087, -2693, -1049, -6715, 14382, 2537, -2291, 2819, 7790),
    "Canon PowerShot S40": (8510, -2487, -940, -6869, 14231, 2900, -2318, 2829, 9013),
    "Canon EOS 20D": (6599, -537, -891, -8071, 15783, 2424, -1983, 2234, 7462),
    "Canon EOS 5D Mark II": (4716, 603, -830, -7798, 15474, 2480, -1496, 1937, 6651),
    "Canon EOS 5D Mark III": (6722, -635, -963, -4287, 12460, 2028, -908, 2162, 5668),
    "Canon EOS 7D": (6844, -996, -856, -3876, 11761, 2396, -593, 1772, 6198),
}
"""CIE XYZ to camera at D65 in ten-thousandths, row by row: measured by Adobe, as LibRaw's table has them."""

RED, BLUE = (0.9, 2.8), (1.1, 3.2)
"""Ranges of their gains where that of green is 1: from tungsten to shade."""

BITS = (10, 12, 12, 14)
"""Bits of a pixel, as often as they stand here."""

BRIGHTENED = 0.15
"""Share of the frames that are exposed otherwise, some until highlights clip."""

HOT = 1e-5
"""Share of the pixels that are hot or dead."""


@dataclass(frozen=True)
class Recipe:
    """How a photograph becomes a raw frame.

    Attributes:
        gains: White balance that the frame needs: red, green, blue; the least is 1.
        matrix: ``(3, 3)`` balanced camera RGB to linear sRGB.
        shot: Variance of a pixel is shot x signal + read, with white at 1.
        read: The same.
        bits: Of a pixel; white is 2^bits - 1.
        black: Level of black.
        exposure: Factor on linear light before it meets the sensor.
        hot: Share of the pixels that are hot or dead.
    """

    gains: tuple[float, float, float]
    matrix: Floats
    shot: float
    read: float
    bits: int = 12
    black: int = 256
    exposure: float = 1.0
    hot: float = 0.0

    @property
    def white(self) -> int:
        """Level of white."""
        return (1 << self.bits) - 1


def xyz_to_camera(name: str) -> Floats:
    """Return a known camera's ``(3, 3)`` matrix; raises ``KeyError`` for another name."""
    return np.array(CAMERAS[name], np.float64).reshape(3, 3) / 10_000


def mixture(rng: np.random.Generator) -> Floats:
    """Return the XYZ-to-camera matrix of a camera between the known ones: a random convex mixture."""
    shares = rng.dirichlet(np.ones(len(CAMERAS)))
    known = np.stack([xyz_to_camera(name) for name in CAMERAS])
    mixed: Floats = np.tensordot(shares, known, 1)
    return mixed


def typical_read(shot: float) -> float:
    """Return the variance of read noise that goes with a shot noise; none with none.

    Brooks et al.'s line through smartphones, and as much beside it as two compact cameras at ISO 50 had.
    """
    return float(np.exp(2.18 * np.log(shot) + 1.2)) + 3e-7 if shot > 0 else 0.0


def draw_noise(rng: np.random.Generator, least: float, most: float, free: float) -> tuple[float, float]:
    """Draw shot and read noise.

    Args:
        rng: Randomness.
        least: Least shot noise.
        most: Largest shot noise; log-uniform between.
        free: Share of frames that have none.

    Returns:
        Shot and read, without what rounding adds.
    """
    if rng.random() < free:
        return 0.0, 0.0
    shot = float(np.exp(rng.uniform(np.log(least), np.log(max(most, least)))))
    read = np.exp(2.18 * np.log(shot) + 1.2 + 0.4 * rng.standard_normal())
    return shot, float(read + np.exp(rng.uniform(np.log(1e-8), np.log(1e-6))))


def draw(
    rng: np.random.Generator, least_shot: float = 5e-5, most_shot: float = 2e-2, noise_free: float = 0.1
) -> Recipe:
    """Draw a camera, a light, an exposure and a noise."""
    matrix = colour.camera_to_srgb(mixture(rng))
    red, blue = np.exp(rng.uniform(*np.log(np.transpose([RED, BLUE]))))
    bits = int(rng.choice(BITS))
    shot, read = draw_noise(rng, least_shot, most_shot, noise_free)
    exposure = 2.0 ** rng.uniform(-2.5, 1.0) if rng.random() < BRIGHTENED else 1.0
    black = int(rng.choice([0, 1, 2, 4]) * (1 << bits) // 64)
    return Recipe(bayer.least_is_one((red, 1.0, blue)), matrix, shot, read, bits, black, float(exposure), HOT)


def expected(recipe: Recipe) -> tuple[float, float]:
    """Return the shot and read variance of a frame, with that of rounding to whole numbers."""
    return recipe.shot, recipe.read + rounding(recipe.white - recipe.black)


def rounding(levels: float) -> float:
    """Return the variance of rounding to whole numbers, where white is so many levels above black."""
    return 1 / (12 * levels * levels)


_LINEAR = colour.linear_of_bytes()


def frame(rgb: Picture, recipe: Recipe, rng: np.random.Generator) -> tuple[npt.NDArray[np.uint16], Picture]:
    """Turn a photograph into a raw frame.

    Args:
        rgb: ``(H, W, 3)`` sRGB, sides even.
        recipe: How.
        rng: Noise comes from it.

    Returns:
        ``(H, W)`` RGGB raw integers, and the truth, ``(H, W, 3)``: what the front end makes of the frame's
        colours without noise and mosaic.
    """
    camera = _LINEAR[rgb] @ np.linalg.inv(recipe.matrix).T.astype(np.float32)
    camera = np.maximum(camera * np.float32(recipe.exposure), 0)
    values = mosaic_of(camera / np.asarray(recipe.gains, np.float32))
    return noisy(values, recipe, rng), truth(np.minimum(camera, 1), recipe.matrix)


def mosaic_of(camera: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Keep one colour of each pixel: ``(H, W, 3)`` to ``(H, W)``, RGGB."""
    values = np.empty(camera.shape[:2], np.float32)
    for (row, column), channel in zip(bayer.PLACES, (0, 1, 1, 2), strict=True):
        values[row::2, column::2] = camera[row::2, column::2, channel]
    return values


def truth(camera: npt.NDArray[Any], matrix: Floats) -> Picture:
    """Render ``(H, W, 3)`` balanced camera RGB as the front end does, in 8 bits."""
    linear = torch.from_numpy(camera @ matrix.T.astype(np.float32))
    picture: Picture = (colour.encode(linear).clamp_(0, 1) * 255).round_().to(torch.uint8).numpy()
    return picture


def noisy(
    values: npt.NDArray[np.float32], recipe: Recipe, rng: np.random.Generator
) -> npt.NDArray[np.uint16]:
    """Add noise to ``(H, W)`` signals and round them to raw integers; what is above white then is white."""
    if recipe.shot or recipe.read:
        deviation = np.sqrt(np.float32(recipe.shot) * values + np.float32(recipe.read))
        values = values + deviation * rng.standard_normal(values.shape, np.float32)
    if recipe.hot:
        struck = rng.random(values.shape, np.float32) < recipe.hot
        values = np.where(struck, rng.random(values.shape, np.float32), values)
    levels = np.rint(recipe.black + values * np.float32(recipe.white - recipe.black))
    rounded: npt.NDArray[np.uint16] = np.clip(levels, 0, recipe.white).astype(np.uint16)
    return rounded


def as_mosaic(values: npt.NDArray[np.uint16], recipe: Recipe, name: str = "") -> Mosaic:
    """Return ``(H, W)`` of ``frame`` as a mosaic that tells its levels, balance, matrix and noise."""
    black = float(recipe.black)
    return Mosaic(
        values,
        black=(black, black, black, black),
        white=float(recipe.white),
        gains=recipe.gains,
        matrix=recipe.matrix,
        matrix_source="file",
        noise=expected(recipe),
        name=name,
    )


def unit(values: npt.NDArray[np.uint16], black: Sequence[float] | float, white: float) -> npt.NDArray[Any]:
    """Return ``(4, H/2, W/2)`` packed planes with black at 0 and white at 1, float32."""
    packed = bayer.pack(values.astype(np.float32))
    levels = np.broadcast_to(np.asarray(black, np.float32), (4,))[:, None, None]
    return ((packed - levels) / (np.float32(white) - levels)).astype(np.float32)
