"""Synthesis of blurred photographs from sharp ones: kernels, camera shake, motion, noise, JPEG.

Everything is a function of a ``numpy.random.Generator``, so a seed and a number give one picture.
Blur is physical: in linear light, with kernels of sum 1 whose centroid is at the centre (so that
blur does not move the picture), with light above white gathered in saturated areas, and with noise
that grows with the signal. The recipe follows RSBlur (Rim et al., ECCV 2022), whose ablation gives
noise as what carries most to real photographs; trajectories are random walks with inertia after
Boracchi and Foi, "Modeling the performance of image restoration from motion blur", TIP 2012.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[Any]
Kernel = npt.NDArray[Any]

MARGIN = 40
"""Pixels needed around a crop: the largest kernel reaches this far."""


@dataclass(frozen=True)
class Recipe:
    """How one sample was blurred; written beside synthesised pairs.

    Attributes:
        kind: "none", "shake", "rotation", "linear", "steps", "defocus" or "object".
        length: Extent of the blur in pixels: path length, or diameter.
        linear: True where light was averaged in linear light, False in gamma-coded values.
        saturation: Extra light in clipped areas, as a multiple of white.
        shot: Variance of the noise per unit of linear signal.
        read: Variance of the noise at black, linear.
        jpeg: JPEG quality, 0 where none.
    """

    kind: str
    length: float = 0.0
    linear: bool = True
    saturation: float = 0.0
    shot: float = 0.0
    read: float = 0.0
    jpeg: int = 0

    def record(self) -> dict[str, object]:
        """Return the fields as plain values for JSON."""
        return asdict(self)


_LINEAR = np.empty(256, np.float32)
_code = np.arange(256) / 255
_LINEAR[:] = np.where(_code <= 0.04045, _code / 12.92, ((_code + 0.055) / 1.055) ** 2.4)


def to_linear(srgb: npt.NDArray[np.uint8]) -> Image:
    """Decode 8-bit sRGB to linear light in 0..1 (IEC 61966-2-1)."""
    return _LINEAR[srgb]


def to_srgb(linear: Image) -> Image:
    """Encode linear light to sRGB in 0..1, clipping (IEC 61966-2-1)."""
    clipped = np.clip(linear, 0, 1)
    curve: Image = 1.055 * cv2.pow(np.maximum(clipped, 0.0031308), 1 / 2.4) - 0.055
    return np.where(clipped <= 0.0031308, clipped * 12.92, curve).astype(np.float32)


# --- kernels ---------------------------------------------------------------------------------


def rasterise(points: npt.NDArray[Any], weights: npt.NDArray[Any] | None = None) -> Kernel:
    """Turn a path into a kernel: odd size, sum 1, centroid at the centre, bilinear splats.

    Args:
        points: ``(N, 2)`` positions (x, y) in pixels.
        weights: Time spent at each, ``(N,)``; equal if not given.
    """
    share = np.full(len(points), 1 / len(points)) if weights is None else weights / weights.sum()
    centred = points - share @ points
    radius = min(int(np.ceil(np.abs(centred).max())) + 1, MARGIN - 1)
    centred = np.clip(centred, -radius + 1, radius - 1) + radius
    size = 2 * radius + 1
    kernel = np.zeros(size * size)
    cell = np.floor(centred).astype(int)
    part = centred - cell
    for dx in (0, 1):
        for dy in (0, 1):
            share_x = part[:, 0] if dx else 1 - part[:, 0]
            share_y = part[:, 1] if dy else 1 - part[:, 1]
            np.add.at(kernel, (cell[:, 1] + dy) * size + cell[:, 0] + dx, share * share_x * share_y)
    return kernel.reshape(size, size).astype(np.float32)


def trajectory(rng: np.random.Generator, length: float, points: int = 160) -> npt.NDArray[Any]:
    """Draw a camera-shake path of a given length in pixels, ``(points, 2)``.

    A velocity with inertia, a pull back to the start, gaussian tremor and rare jerks.
    """
    pull, tremor, jerk = rng.uniform(0, 0.7), rng.uniform(0.02, 0.4), rng.uniform(0, 0.02)
    angle = rng.uniform(0, 2 * np.pi)
    velocity = np.array([np.cos(angle), np.sin(angle)])
    jerks = rng.random(points) < jerk
    tremors = rng.standard_normal((points, 2)) * tremor
    path = np.zeros((points, 2))
    for step in range(1, points):
        position = path[step - 1]
        if jerks[step]:
            velocity = -velocity + rng.standard_normal(2)
        velocity = velocity + tremors[step] - pull * position / points
        velocity /= max(float(np.hypot(*velocity)), 1e-6)
        path[step] = position + velocity
    travelled = np.hypot(*np.diff(path, axis=0).T).sum()
    scaled: npt.NDArray[Any] = path * (length / travelled)
    return scaled


def line(length: float, angle: float, points: int = 64) -> npt.NDArray[Any]:
    """Return a straight path of ``length`` pixels at ``angle`` radians, ``(points, 2)``."""
    along = np.linspace(-0.5, 0.5, points) * length
    return np.stack([along * np.cos(angle), along * np.sin(angle)], 1)


def defocus(radius: float) -> Kernel:
    """Return an anti-aliased disc, sum 1: the blur of an out-of-focus lens."""
    reach = int(np.ceil(radius)) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)
    kernel: Kernel = (disc / disc.sum()).astype(np.float32)
    return kernel


def convolve(image: Image, kernel: Kernel) -> Image:
    """Convolve ``(H, W)`` or ``(H, W, 3)``, mirroring at the edges."""
    out: Image = cv2.filter2D(image, -1, kernel[::-1, ::-1], borderType=cv2.BORDER_REFLECT_101)
    return out


def shake_poses(image: Image, rng: np.random.Generator, length: float, poses: int = 12) -> Image:
    """Average views of a camera that shifts and rolls: blur that differs over the picture.

    The roll moves the corners about as far as the shift moves the centre.
    """
    height, width = image.shape[:2]
    path = trajectory(rng, length)[np.linspace(0, 159, poses).astype(int)]
    path = path - path.mean(0)
    roll = trajectory(rng, length)[np.linspace(0, 159, poses).astype(int), 0]
    roll = (roll - roll.mean()) / max(np.hypot(height, width) / 4, 1.0) * rng.uniform(0.3, 1.0)
    centre = rng.uniform(-0.5, 1.5, 2) * (width, height)
    total = np.zeros_like(image)
    for (dx, dy), angle in zip(path, roll, strict=True):
        cos, sin = np.cos(angle), np.sin(angle)
        shift = centre - np.array([[cos, -sin], [sin, cos]]) @ centre + (dx, dy)
        warp = np.array([[cos, -sin, shift[0]], [sin, cos, shift[1]]])
        total += cv2.warpAffine(
            image, warp, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        )
    return total / poses


# --- one sample ------------------------------------------------------------------------------

KINDS = {"shake": 0.28, "steps": 0.16, "linear": 0.28, "rotation": 0.08, "object": 0.15, "defocus": 0.05}
"""Share of each kind of blur among the samples that are blurred."""


def draw_kernel(rng: np.random.Generator, kind: str, length: float) -> Kernel:
    """Draw a kernel of a kind ("shake", "steps", "linear" or "defocus") and an extent in pixels."""
    if kind == "defocus":
        return defocus(0.5 + length / 6)
    if kind == "linear":
        return rasterise(line(length, rng.uniform(0, np.pi)))
    path = trajectory(rng, length)
    if kind == "steps":  # a few exposures, as when high-speed frames are averaged
        return rasterise(path[np.linspace(0, len(path) - 1, int(rng.integers(7, 14))).astype(int)])
    exposed = rng.choice([0.3, 0.6, 1.0], p=[0.2, 0.3, 0.5])
    start = int(rng.uniform(0, 1 - exposed) * len(path))
    return rasterise(path[start : start + max(int(exposed * len(path)), 2)])


def moving_object(image: Image, rng: np.random.Generator, length: float) -> Image:
    """Blur a region with one kernel and the rest with another, mixed as light mixes.

    The region is a smooth blob; its blurred mask is its share of the light at every pixel.
    """
    height, width = image.shape[:2]
    field = cv2.resize(
        rng.standard_normal((5, 5)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    mask = (field > np.quantile(field[::8, ::8], rng.uniform(0.3, 0.7))).astype(np.float32)
    mask = cv2.GaussianBlur(mask, (0, 0), 1.0)
    front = draw_kernel(rng, str(rng.choice(["linear", "steps", "shake"])), length)
    back = draw_kernel(rng, "linear", length * rng.uniform(0, 0.5)) if rng.random() < 0.5 else None
    share = convolve(mask, front)[..., None]
    behind = image if back is None else convolve(image, back)
    mixed: Image = convolve(image * mask[..., None], front) + (1 - share) * behind
    return mixed


def blur_light(image: Image, rng: np.random.Generator, kind: str, length: float) -> Image:
    """Blur ``(H, W, 3)`` light with a blur of the given kind and extent in pixels."""
    if kind == "rotation":
        return shake_poses(image, rng, length)
    if kind == "object":
        return moving_object(image, rng, length)
    return convolve(image, draw_kernel(rng, kind, length))


def noisy(linear: Image, rng: np.random.Generator, shot: float, read: float) -> Image:
    """Add signal-dependent gaussian noise of variance ``shot * signal + read``, linear light.

    Half of the time the noise is smoothed, as a camera's demosaicing leaves it, and its standard
    deviation is 1.3 times lower.
    """
    noise: Image = rng.standard_normal(linear.shape, dtype=np.float32)
    if rng.random() < 0.5:
        sigma = rng.uniform(0.4, 0.8)
        noise = cv2.GaussianBlur(noise, (5, 5), sigma)
        noise = noise / (float(noise.std()) * 1.3)
    out: Image = linear + noise * cv2.sqrt(np.maximum(linear, 0) * shot + read)
    return out


@dataclass(frozen=True)
class Severity:
    """How hard pictures are treated.

    Attributes:
        untouched: Share to which nothing is done at all.
        shortest: Least extent of the blur, in pixels.
        longest: Largest extent of the blur, in pixels; extents are drawn evenly on a log scale.
        noisy: Share of the blurred pictures that get noise; 0.6 of it get JPEG.
    """

    untouched: float = 0.1
    shortest: float = 2.0
    longest: float = 26.0
    noisy: float = 0.5


def degrade(
    sharp: npt.NDArray[Any], rng: np.random.Generator, severity: Severity = Severity()
) -> tuple[npt.NDArray[Any], Recipe]:
    """Blur a sharp 8-bit sRGB picture as a camera would have.

    Args:
        sharp: ``(H, W, 3)`` uint8; at least ``MARGIN`` pixels around the part that will be used.
        rng: Source of all that is random.
        severity: How hard it is treated.

    Returns:
        The degraded picture, same shape and type, and what was done.
    """
    if rng.random() < severity.untouched:
        return sharp, Recipe("none")
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    length = float(np.exp(rng.uniform(np.log(severity.shortest), np.log(severity.longest))))
    linear = bool(rng.random() < 0.6)
    light = to_linear(sharp) if linear else sharp.astype(np.float32) / 255
    gain = float(rng.uniform(0.25, 1.75)) if linear and rng.random() < 0.5 else 0.0
    if gain:
        light = light + gain * (cv2.GaussianBlur((sharp >= 254).astype(np.float32), (3, 3), 0))
    blurred = blur_light(light, rng, kind, length)
    shot, read, quality = 0.0, 0.0, 0
    if rng.random() < severity.noisy:
        shot = float(np.exp(rng.uniform(np.log(3e-6), np.log(1e-3))))
        read = shot * shot * float(rng.uniform(0.1, 3.0))
        if not linear:
            blurred = _gamma_to_linear(blurred)
        blurred = to_srgb(noisy(np.clip(blurred, 0, 1), rng, shot, read))
    elif linear:
        blurred = to_srgb(blurred)
    out = np.rint(np.clip(blurred, 0, 1) * 255).astype(np.uint8)
    if rng.random() < 0.6 * severity.noisy:
        quality = int(rng.integers(75, 98))
        out = _jpeg(out, quality)
    return out, Recipe(kind, length, linear, gain, shot, read, quality)


def _jpeg(picture: npt.NDArray[Any], quality: int) -> npt.NDArray[Any]:
    data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded: Any = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return np.ascontiguousarray(decoded[..., ::-1])


def _gamma_to_linear(srgb: Image) -> Image:
    return to_linear(np.rint(np.clip(srgb, 0, 1) * 255).astype(np.uint8))
