"""Data set of the network "lines": the edges of straight photographs, bent as a lens would bend them.

Edges are traced in a few variants of every photograph (resized, noisy, compressed) and kept;
a sample bends those of one variant by a lens drawn anew. That saves
tracing them again for every lens, and held-out samples, whose pixels are bent, check that it is the same.
Beside the truth, a sample holds candidates to tell it from: a third drawn like the truth, the others
near it, with the weights that make sums over them integrals over the prior.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imgtool.engines.lens import lines, prior, synthesis
from imgtool.engines.lens.geometry import BrownConrady, edges, half_size
from imgtool.engines.lens.settings import Synthesis
from imgtool.images import read_rgb8
from imgtool.samples import VALIDATION_SEED

Floats = npt.NDArray[np.float64]

EDGES = 128
"""Edges of a sample: the longest, filled up with none."""
CANDIDATES = 72
VARIANTS = 4
"""Variants of a photograph."""
KEPT = 40_000
"""Variants kept in memory, about 10 kB each."""
LARGEST = 1280
"""Pixels of the longer side of a variant at most."""
_NEAR = ((0.0175, 0.0136), (0.0035, 0.0034))
"""Standard deviations of the two clouds of near candidates: of the corner, and across it."""
_SLOPE = 0.437
_TANGENTIAL = (0.6, 0.15)
"""Those of p1 and p2, as shares of the prior's."""


class Sample(NamedTuple):
    """One sample, or a batch of them with ``B`` in front.

    Attributes:
        points: ``(EDGES, POINTS, 2)`` float32, see ``lines.Lines``.
        facts: ``(EDGES, 4)`` float32; edges that fill up have 0 pixels.
        half_diagonal: ``()`` float32.
        frame: ``(2,)`` float32, half width and half height in half diagonals.
        coefficients: ``(4,)`` float32: k1, k2, p1, p2, all 0 where nothing is distorted.
        candidates: ``(CANDIDATES, 4)`` float32.
        log_weights: ``(CANDIDATES,)`` float32: prior density over the density drawn from.
    """

    points: Tensor
    facts: Tensor
    half_diagonal: Tensor
    frame: Tensor
    coefficients: Tensor
    candidates: Tensor
    log_weights: Tensor


class Traced(NamedTuple):
    """The edges of a variant and its size in pixels."""

    found: lines.Lines
    width: int
    height: int


def variant(photo: npt.NDArray[Any], rng: np.random.Generator) -> Traced:
    """Resize and soil a photograph ``(H, W, 3)`` uint8 at random, and trace its edges."""
    height, width = photo.shape[:2]
    factor = float(np.exp(rng.uniform(math.log(0.7), math.log(1.5))))
    factor = min(factor, LARGEST / max(height, width))
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    resized = cv2.resize(photo, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    if rng.random() < 0.5:
        resized = _soiled(resized, rng)
    return Traced(lines.find(resized), *size)


def _soiled(picture: npt.NDArray[Any], rng: np.random.Generator) -> npt.NDArray[Any]:
    if rng.random() < 0.5:
        noise = rng.normal(0, rng.uniform(1, 8), picture.shape)
        picture = np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 98))]
    return np.asarray(cv2.imdecode(cv2.imencode(".jpg", picture, quality)[1], cv2.IMREAD_COLOR))


def bent(traced: Traced, model: BrownConrady, turn: Sequence[bool]) -> Traced:
    """Return the edges as they lie in a photo through a lens, of the part that fills the photo's frame.

    Args:
        traced: Edges of a straight picture.
        model: The lens.
        turn: Whether to mirror left to right, top to bottom, and at the diagonal, before.
    """
    points, width, height = traced.found.points, traced.width, traced.height
    points = points * [-1 if turn[0] else 1, -1 if turn[1] else 1]
    if turn[2]:
        points, width, height = points[..., ::-1], height, width
    half_width, half_height = half_size(width, height)
    x, y = model.undistort(*edges(width, height))
    scale = max(float(np.abs(x).max()) / half_width, float(np.abs(y).max()) / half_height)
    x, y = model.distort(points[..., 0] * scale, points[..., 1] * scale)
    inside = ((np.abs(x) <= half_width) & (np.abs(y) <= half_height)).mean(1) >= 0.6
    facts = traced.found.facts * [scale, 1, 1, 1]
    found = lines.Lines(np.stack([x, y], -1)[inside], facts[inside], traced.found.half_diagonal)
    return Traced(found, width, height)


def candidates(truth: Floats, settings: Synthesis, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Draw candidates ``(CANDIDATES, 4)`` beside a truth ``(4,)``, and their log-weights.

    The weights are the prior over the mixture of three densities from which equal shares are drawn.
    """
    count, spread = CANDIDATES // 3, max(settings.decentred, 1e-4)
    parts = [prior.draws(rng, settings.prior, spread, count)]
    for (corner, across), tangential in zip(_NEAR, _TANGENTIAL, strict=True):
        shift = rng.standard_normal((count, 4)) * [corner, across, tangential * spread, tangential * spread]
        k1 = truth[0] + (shift[:, 0] - shift[:, 1]) / (1 - _SLOPE)
        k2 = truth[1] + shift[:, 0] - (k1 - truth[0])
        parts.append(np.stack([k1, k2, truth[2] + shift[:, 2], truth[3] + shift[:, 3]], 1))
    drawn = np.concatenate(parts)
    from_prior = prior.log_density(drawn[:, 0], drawn[:, 1], settings.prior)
    from_prior = from_prior - 0.5 * (drawn[:, 2:] ** 2).sum(1) / spread**2 - math.log(2 * math.pi * spread**2)
    away = drawn - truth
    axes = np.stack([away[:, 0] + away[:, 1], away[:, 1] + _SLOPE * away[:, 0], away[:, 2], away[:, 3]], 1)
    densities = [from_prior]
    for (corner, across), tangential in zip(_NEAR, _TANGENTIAL, strict=True):
        scale = np.array([corner, across, tangential * spread, tangential * spread])
        normal = -0.5 * ((axes / scale) ** 2).sum(1) - np.log(scale).sum() - 2 * math.log(2 * math.pi)
        densities.append(normal + math.log(1 - _SLOPE))
    weights = from_prior - np.logaddexp.reduce(densities, axis=0) + math.log(len(densities))
    return drawn, np.asarray(weights)


def sample(traced: Traced, model: BrownConrady, settings: Synthesis, rng: np.random.Generator) -> Sample:
    """Return the sample of a photo's edges and its lens."""
    points, facts = np.zeros((EDGES, lines.POINTS, 2)), np.zeros((EDGES, 4))
    found = traced.found
    length = np.hypot(*(found.points[:, -1] - found.points[:, 0]).T)
    order = np.argsort(-length)[:EDGES]
    points[: len(order)], facts[: len(order)] = found.points[order], found.facts[order]
    truth = np.array([model.k1, model.k2, model.p1, model.p2])
    drawn, log_weights = candidates(truth, settings, rng)
    half = np.array(found.half_diagonal)
    frame = np.array(half_size(traced.width, traced.height))
    arrays = (points, facts, half, frame, truth, drawn, log_weights)
    return Sample(*(torch.from_numpy(array.astype(np.float32)) for array in arrays))


class Bent:
    """Photographs whose edges are bent: the training set."""

    def __init__(self, paths: Sequence[Path], settings: Any) -> None:
        """Take photographs; their edges are traced when first asked for."""
        self.paths, self.settings = list(paths), settings
        self._kept: OrderedDict[tuple[int, int], Traced] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return int(self.settings.epoch_steps * self.settings.batch)

    def __getstate__(self) -> dict[str, object]:
        """Leave the traced edges behind when sent to a worker process."""
        return self.__dict__ | {"_kept": OrderedDict()}

    def _traced(self, photo: int, number: int) -> Traced:
        key = (photo, number)
        if key not in self._kept:
            picture = read_rgb8(self.paths[photo], LARGEST)
            self._kept[key] = variant(picture, np.random.default_rng([self.settings.seed, 1, *key]))
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def __getitem__(self, number: int) -> Sample:
        """Return sample ``number``, for any number from 0 on."""
        cv2.setNumThreads(0)
        rng = np.random.default_rng([self.settings.seed, 0, number])
        traced = self._traced(int(rng.integers(len(self.paths))), int(rng.integers(VARIANTS)))
        straight = rng.random() < self.settings.untouched
        model = BrownConrady() if straight else prior.draw(rng, self.settings.prior, self.settings.decentred)
        turned = bent(traced, model, [bool(flip) for flip in rng.random(3) < (0.5, 0.5, 0.3)])
        kept = rng.random(len(turned.found.points)) < rng.choice([1.0, rng.uniform(0.5, 1)])
        found = lines.Lines(turned.found.points[kept], turned.found.facts[kept], turned.found.half_diagonal)
        return sample(turned._replace(found=found), model, self.settings, rng)


class Held:
    """Photographs whose pixels are bent and then traced: the held-out set, the same for every seed."""

    def __init__(self, paths: Sequence[Path], settings: Any) -> None:
        """Take photographs; each serves several times where there are fewer than samples."""
        self.paths, self.settings = list(paths), settings
        self._kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self.settings.held_out)

    def __getitem__(self, number: int) -> Sample:
        """Return sample ``number``."""
        if number not in self._kept:
            rng = np.random.default_rng([VALIDATION_SEED, number])
            photo = read_rgb8(self.paths[number % len(self.paths)], LARGEST)
            straight = rng.random() < self.settings.untouched
            model = (
                BrownConrady() if straight else prior.draw(rng, self.settings.prior, self.settings.decentred)
            )
            made = synthesis.distorted(photo, model, rng, lines.LONGEST_SIDE, self.settings.noisy)
            height, width = made.distorted.shape[:2]
            traced = Traced(lines.find(made.distorted), width, height)
            self._kept[number] = sample(traced, made.model, self.settings, rng)
        return self._kept[number]
