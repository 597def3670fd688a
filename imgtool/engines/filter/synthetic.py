"""Drawn pictures: what a filter can be learnt from without any photograph.

Dead leaves, gradients, writing, noise, and mixtures. A dead leaves picture is what discs of many sizes make
that cover one another: where the number of those of radius r falls as r^-3, edges and their spacing are
distributed as in photographs (Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 2001).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cv2
import numpy as np
import numpy.typing as npt

from imgtool import images

Floats = npt.NDArray[np.float32]
Draw = Callable[[np.random.Generator, int, int], Floats]

FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_SCRIPT_SIMPLEX,
)
LETTERS = "ABCDEFGHIKLMNOPRSTUVWXYZabcdefghiklmnoprstuvwxyz0123456789+-=/?!&%"


def _colours(rng: np.random.Generator, count: int) -> Floats:
    """Draw colours that belong together: shades of a few hues, ``(count, 3)``."""
    few = rng.random((int(rng.integers(2, 7)), 3))
    chosen = few[rng.integers(len(few), size=count)]
    shades = rng.uniform(0.2, 1.4, (count, 1))
    return np.clip(chosen * shades + rng.normal(0, 0.03, (count, 3)), 0, 1).astype(np.float32)


def leaves(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Draw dead leaves: discs, ellipses and polygons, some of them striped."""
    long, short = max(height, width), 2.0
    number = 240
    # The inverse of the distribution of r^-3 between the shortest and the longest radius.
    low, high = short**-2, (long / 2) ** -2 if long > 8 else short**-2 / 4
    radii = (low - rng.random(number) * (low - high)) ** -0.5
    radii[:6] = long * rng.uniform(0.3, 0.7, 6)  # the ground is covered
    places = rng.integers((-8, -8), (width + 8, height + 8), (number, 2))
    labels = np.zeros((height, width), np.int32)
    for label in range(number):
        _leaf(rng, labels, (int(places[label][0]), int(places[label][1])), float(radii[label]), label)
    colours = _colours(rng, number)
    waves = np.where(rng.random((number, 1)) < 0.3, rng.uniform(-1.5, 1.5, (number, 2)), 0).astype(np.float32)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    each = waves[labels]
    stripes = np.sin(each[..., 0] * rows + each[..., 1] * columns) * rng.uniform(0.02, 0.2)
    return np.asarray(colours[labels] + stripes[..., None], np.float32)


def _leaf(
    rng: np.random.Generator, labels: npt.NDArray[np.int32], place: tuple[int, int], radius: float, label: int
) -> None:
    kind = int(rng.integers(3))
    if kind == 0:
        cv2.circle(labels, place, max(round(radius), 1), label, -1)
    elif kind == 1:
        axes = (max(round(radius), 1), max(round(radius * float(rng.uniform(0.2, 1))), 1))
        cv2.ellipse(labels, place, axes, float(rng.uniform(0, 180)), 0, 360, label, -1)
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
        corners = np.stack([np.cos(angles), np.sin(angles)], 1) * radius + place
        cv2.fillPoly(labels, [np.rint(corners).astype(np.int32)], label)


def gradients(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Draw soft tones: a few colours on a coarse grid, and what lies smoothly or straight between."""
    rows, columns = (int(rng.integers(2, 5)) for _ in range(2))
    coarse = _colours(rng, rows * columns).reshape(rows, columns, 3)
    way = cv2.INTER_CUBIC if rng.random() < 0.5 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=way), np.float32)


def writing(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Draw lines of letters of several fonts and sizes, and thin strokes, on a soft ground."""
    ground = gradients(rng, height, width) * rng.uniform(0.3, 1)
    canvas = images.to_type(ground, np.uint8)  # letters are drawn in bytes alone
    for _ in range(int(rng.integers(4, 12))):
        text = "".join(rng.choice(list(LETTERS), int(rng.integers(2, 12))))
        place = (int(rng.integers(-10, width)), int(rng.integers(0, height + 10)))
        colour = tuple(int(each) for each in rng.integers(0, 256, 3))
        font = FONTS[int(rng.integers(len(FONTS)))]
        size, weight = float(rng.uniform(0.3, 1.6)), int(rng.integers(1, 3))
        cv2.putText(canvas, text, place, font, size, colour, weight)
    for _ in range(int(rng.integers(0, 5))):
        ends = rng.integers((0, 0), (width, height), (2, 2))
        first, second = ((int(x), int(y)) for x, y in ends)
        cv2.line(canvas, first, second, tuple(int(each) for each in rng.integers(0, 256, 3)), 1)
    return np.asarray(canvas / 255, np.float32)


def noise(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Draw noise: white, coarse, of all scales alike (as 1/f), or single bright and dark pixels."""
    kind = int(rng.integers(4))
    if kind == 0:
        return rng.normal(rng.random(3), rng.uniform(0.02, 0.3), (height, width, 3)).astype(np.float32)
    if kind == 1:
        edge = int(rng.integers(2, 9))
        small = rng.random((-(-height // edge), -(-width // edge), 3), np.float32)
        return small.repeat(edge, 0).repeat(edge, 1)[:height, :width]
    if kind == 2:
        total = np.full((height, width, 3), 0.5, np.float32)
        for octave in range(1, 7):
            coarse = rng.normal(0, 0.12, (2**octave, 2**octave, 3)).astype(np.float32)
            total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        return total
    canvas = gradients(rng, height, width)
    hit = rng.random((height, width)) < rng.uniform(0.002, 0.1)
    canvas[hit] = rng.integers(0, 2, (int(hit.sum()), 1))
    return canvas


def mixed(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Draw two of the other kinds, one over the other inside a large disc with a sharp or a soft rim."""
    kinds = rng.choice(len(_PURE), 2, replace=False)
    first, second = (_PURE[int(kind)](rng, height, width) for kind in kinds)
    mask = np.zeros((height, width), np.float32)
    place = (int(rng.integers(width)), int(rng.integers(height)))
    radius = int(max(height, width) * rng.uniform(0.2, 0.7)) + 1
    cv2.circle(mask, place, radius, float(rng.uniform(0.4, 1)), -1)
    if rng.random() < 0.5:
        mask = np.asarray(cv2.GaussianBlur(mask, (0, 0), float(rng.uniform(1, 6))), np.float32)
    return first + (second - first) * mask[..., None]


_PURE: tuple[Draw, ...] = (leaves, gradients, writing, noise)
KINDS: Mapping[str, tuple[Draw, float]] = {
    "leaves": (leaves, 0.45),
    "gradients": (gradients, 0.05),
    "writing": (writing, 0.1),
    "noise": (noise, 0.1),
    "mixed": (mixed, 0.3),
}
"""Kinds of pictures and their shares."""


def picture(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Draw a picture ``(height, width, 3)`` uint8 RGB, a function of ``rng`` alone.

    Half of them are a little soft, as lenses are, and half a little noisy, as sensors are.
    """
    draws, shares = zip(*KINDS.values(), strict=True)
    canvas = draws[int(rng.choice(len(draws), p=shares))](rng, height, width)
    if rng.random() < 0.5:
        canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), float(rng.uniform(0.4, 1.6))), np.float32)
    if rng.random() < 0.5:
        spread = np.float32(rng.uniform(0.002, 0.04))
        canvas = canvas + spread * rng.standard_normal(canvas.shape, np.float32)
    return images.to_type(canvas, np.uint8)
