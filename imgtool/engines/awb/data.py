"""Data sets: real frames with known white, under their own light or another, and photographs relit."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imgtool import samples
from imgtool.engines.awb import features, sets, synthesis
from imgtool.engines.awb.camera import GENERIC
from imgtool.engines.awb.features import Points, Space
from imgtool.engines.awb.network import Sample
from imgtool.engines.awb.settings import Model, Train
from imgtool.engines.awb.stats import AwbStats
from imgtool.engines.awb.synthesis import Relit
from imgtool.errors import USAGE, ImgtoolError

Array = npt.NDArray[Any]

JITTER = 0.03
"""Standard deviation of how far a camera's colours are off its curve, in log-chroma."""
LIGHTS = (2500.0, 8000.0)
"""Colour temperatures in kelvin between which real frames are relit."""
UNKNOWN = 0.5
"""Share of the strange samples, and of relit photographs, whose camera is not told at all."""
UNLIT = 0.1
"""Share of real frames whose lux is not told."""
DENSITY_LIMITS = (0.1, 15.0)


def density_weights(whites: Array) -> Array:
    """Return weights ``(N,)`` of mean 1 that make rare white points count more.

    One over a Gaussian kernel density of R/G and B/G, with half of the data's own covariance scale
    squared as bandwidth, divided by its mean and clipped to 0.1..15: the original's weights.

    Args:
        whites: ``(N, 2)``.
    """
    if len(whites) < 3:
        return np.ones(len(whites))
    covariance = 0.25 * np.cov(whites.T) + 1e-8 * np.eye(2)
    apart = whites[:, None] - whites[None]
    inverse = np.linalg.inv(covariance)
    density = np.exp(-0.5 * np.einsum("abi,ij,abj->ab", apart, inverse, apart)).mean(1)
    density /= 2 * np.pi * np.sqrt(np.linalg.det(covariance))
    weights = 1 / (density + 1e-6)
    clipped: Array = np.clip(weights / weights.mean(), *DENSITY_LIMITS)
    return clipped


@dataclass(frozen=True)
class Frames:
    """Real frames, read, and what each counts."""

    stats: Sequence[AwbStats]
    importance: Sequence[float]

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.stats)


class Real:
    """Frames with known white; sample n is a frame under its own light or, by chance, another."""

    def __init__(self, frames: Frames, settings: Train, *, disturb: bool) -> None:
        """Draw from ``frames``; without ``disturb`` sample n is frame n as it is."""
        self.frames, self.shape, self.disturb = frames, _shape(settings), disturb
        self.relight, self.strange = settings.relight, settings.strange
        self.order = samples.Order([range(len(frames))], settings.seed)

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.frames)

    def __getitem__(self, number: int) -> Sample:
        """Return a sample; see the class."""
        if not self.disturb:
            index = number % len(self.frames)
            return sample(self.frames.stats[index], self.shape, self.frames.importance[index])
        _, index, rng = self.order.chosen(number)
        stats = self.frames.stats[index]
        chance = rng.random()
        if chance < self.strange:
            stats = strange(stats, rng)
        elif chance < self.strange + self.relight:
            stats = relit(stats, rng)
        elif rng.random() < UNLIT:
            stats = stats.changed(lux=None)
        return sample(stats, self.shape, self.frames.importance[index], rng)


class Synthetic:
    """Photographs relit for imagined cameras."""

    def __init__(self, source: Relit, count: int, settings: Train, *, disturb: bool) -> None:
        """Make ``count`` an epoch of ``source``."""
        self.source, self.count, self.shape, self.disturb = source, count, _shape(settings), disturb
        self.seed = settings.seed

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return self.count

    def __getitem__(self, number: int) -> Sample:
        """Return a sample; it is a function of the number."""
        rng = np.random.default_rng([self.seed if self.disturb else samples.VALIDATION_SEED, 5, number])
        # Here lights are drawn whatever the brightness: lux would teach that it tells nothing.
        stats = self.source.sample(number).changed(lux=None)
        if rng.random() < UNKNOWN:
            stats = stats.changed(camera=GENERIC)
        return sample(stats, self.shape, 1.0, rng if self.disturb else None)


class Mixed:
    """Real frames and relit photographs, one or the other by chance."""

    def __init__(self, real: Real, synthetic: Synthetic, share: float, seed: int) -> None:
        """Draw relit photographs with probability ``share``."""
        self.real, self.synthetic, self.share, self.seed = real, synthetic, share, seed

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return len(self.real)

    def __getitem__(self, number: int) -> Sample:
        """Return a sample; it is a function of the number."""
        rng = np.random.default_rng([self.seed, 6, number])
        return (self.synthetic if rng.random() < self.share else self.real)[number]


Set = Real | Synthetic | Mixed


def _shape(settings: Train) -> Model:
    return Model(**{name: getattr(settings, name) for name in Model.model_fields})


def relit(stats: AwbStats, rng: np.random.Generator) -> AwbStats:
    """Return a frame of known white as it would look under another light of its camera's curve.

    Its lux is not known any more: how bright scenes are goes with their light.
    """
    if stats.truth is None or not stats.camera.known:
        return stats
    mired = rng.uniform(1e6 / LIGHTS[1], 1e6 / LIGHTS[0])
    white = stats.camera.locus.at(features.calibrated(1e6 / mired, stats.camera))
    change = white / np.asarray(stats.truth)
    cells = stats.cells * np.array([change[0], 1, change[1]], np.float32)
    return stats.changed(cells=cells, truth=(float(white[0]), float(white[1])), lux=None)


def strange(stats: AwbStats, rng: np.random.Generator) -> AwbStats:
    """Return a frame relit by a light off the curve, of a camera of which less is known.

    Either its curve is only about right, as one made from a colour matrix, or it is some other camera,
    whose red and blue are weaker or stronger, of which nothing is known.
    """
    lit = relit(stats, rng)
    if lit.truth is None or not stats.camera.known:
        return lit
    camera = GENERIC if rng.random() < UNKNOWN else replace(stats.camera, tuning=None)
    space = features.Space.of(stats.camera)
    off = rng.normal(0, features.SPREAD[features.kind(camera)], 2)
    white = space.white(space.place(np.asarray(lit.truth)) + off)
    change = white / np.asarray(lit.truth)
    cells = lit.cells * np.array([change[0], 1, change[1]], np.float32)
    return lit.changed(cells=cells, truth=(float(white[0]), float(white[1])), camera=camera)


def disturbed(seen: Points, rng: np.random.Generator) -> Points:
    """Return points as a somewhat other camera, exposure, and part of the scene would give."""
    off = rng.normal(0, JITTER, 2)
    kept = rng.random(len(seen.weight)) >= 0.8 * rng.random()
    shading = np.exp(rng.normal(0, 0.3, len(seen.bright)))
    return Points(
        (seen.cells + off + rng.normal(0, 0.03, seen.cells.shape)).astype(np.float32),
        (seen.weight * kept).astype(np.float32),
        (seen.bright * kept * shading).astype(np.float32),
        (seen.edges + off).astype(np.float32),
        (seen.contrast * np.exp(rng.normal(0, 0.3, len(seen.contrast)))).astype(np.float32),
    )


def sample(
    stats: AwbStats, shape: Model, importance: float, rng: np.random.Generator | None = None
) -> Sample:
    """Return a frame as the networks see it; ``rng`` disturbs it.

    Raises:
        ImgtoolError: Its white is not known.
    """
    if stats.truth is None:
        raise ImgtoolError(f"{stats.name}: its white is not known", "train on frames with known white")
    space = Space.of(stats.camera)
    if shape.arch == "hist":
        seen = features.points(stats, space)
        x: Array = features.histograms(disturbed(seen, rng) if rng else seen)
    else:
        x = features.picture(_flipped(stats, rng) if rng else stats, shape.height, shape.width)
    lights = features.candidates(stats.camera)
    truth = np.asarray(stats.truth)
    lux = stats.lux if rng is None or stats.lux is None else stats.lux * float(np.exp(rng.normal(0, 0.5)))
    origin = np.exp(space.origin)
    return Sample(
        _tensor(x),
        _tensor(lights.place),
        _tensor(lights.white),
        _tensor(lights.prior),
        _tensor(features.side(lights, lux)),
        _tensor(truth),
        _tensor(space.place(truth)),
        _tensor(np.asarray(importance)),
        _tensor(_picture(stats, origin)),
        _tensor(origin),
    )


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32, order="C"))


def _flipped(stats: AwbStats, rng: np.random.Generator) -> AwbStats:
    rows, columns = (slice(None, None, int(step)) for step in rng.choice([-1, 1], 2))
    return stats.changed(cells=stats.cells[rows, columns], coverage=stats.coverage[rows, columns])


def _picture(stats: AwbStats, origin: Array) -> Array:
    gamma = features.picture(stats, 32, 32) * 0.25 + 0.45
    balanced: Array = gamma**2.2 / np.array([origin[0], 1, origin[1]])[:, None, None]
    return balanced


# --- the sets ---


def frames(settings: Train) -> list[AwbStats]:
    """Read every frame of ``--data``, but those of a part that the data set sets aside for testing.

    Raises:
        ImgtoolError: A fault of a data set, of a frame, or no frame at all.
    """
    found = []
    for folder in settings.data:
        for entry in sets.dataset(folder, settings):
            if entry.part == "test":
                continue
            if entry.fault:
                raise ImgtoolError(
                    f"{entry.name}: {entry.fault}", f"imgtool data check awb {folder} lists every fault"
                )
            found.append(entry.read())
    usable = [stats for stats in found if len(stats.points()) and stats.truth]
    if settings.data and not usable:
        raise ImgtoolError(
            "no frame with known white in --data", "imgtool data check awb FOLDER says why", USAGE
        )
    return usable


def groups(every: Sequence[AwbStats], by: str) -> list[str]:
    """Return what a split keeps together, frame by frame."""
    if by == "none":
        return [stats.name for stats in every]
    if by == "camera":
        return [stats.camera.name for stats in every]
    return [stats.group or stats.name for stats in every]


def fold_of(names: Sequence[str], folds: int) -> dict[str, int]:
    """Deal groups into folds, the largest first, each into the fold that is smallest.

    Raises:
        ImgtoolError: Code 2, for fewer groups than folds.
    """
    counts = Counter(names)
    if len(counts) < folds:
        raise ImgtoolError(
            f"{len(counts)} groups cannot make {folds} folds", "lower --folds, or another --group", USAGE
        )
    sizes, dealt = [0] * folds, {}
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        smallest = sizes.index(min(sizes))
        dealt[name] = smallest
        sizes[smallest] += count
    return dealt


def mark(name: str) -> str:
    """Return eight letters that stand for a frame: the hash of its file's stem."""
    return hashlib.sha256(Path(name).stem.encode()).hexdigest()[:8]


def describe(examples: Set) -> dict[str, list[str]]:
    """Return the marks of the real frames that a set trains on: errors on them are no test."""
    real = examples.real if isinstance(examples, Mixed) else examples
    names = [stats.name for stats in real.frames.stats] if isinstance(real, Real) else []
    return {"frames": sorted(mark(name) for name in names)}


def divided(every: Sequence[AwbStats], settings: Train) -> tuple[list[AwbStats], list[AwbStats]]:
    """Split frames into those to train on and those held out, groups whole.

    Raises:
        ImgtoolError: Code 2, for a fold that there is not.
    """
    if settings.train_on_all:
        return list(every), list(every)
    if settings.fold >= settings.folds > 0 or (settings.fold >= 0 and not settings.folds):
        hint = f"--fold counts from 0 to {settings.folds - 1}" if settings.folds else "give --folds too"
        raise ImgtoolError(f"no fold {settings.fold} of {settings.folds}", hint, USAGE)
    names = groups(every, settings.group)
    if settings.fold < 0:
        pairs = list(zip(every, names, strict=True))
        kept, out = samples.split(pairs, lambda pair: pair[1])
        return [stats for stats, _ in kept], [stats for stats, _ in out]
    dealt = fold_of(names, settings.folds)
    held = [dealt[name] == settings.fold for name in names]
    return (
        [stats for stats, out in zip(every, held, strict=True) if not out],
        [stats for stats, out in zip(every, held, strict=True) if out],
    )


def _frames(every: Sequence[AwbStats], power: float) -> Frames:
    weights = density_weights(np.array([stats.truth for stats in every])) ** power
    return Frames(every, [float(weight) for weight in weights / weights.mean()])


def load(settings: Train) -> tuple[Set, Set]:
    """Return the training set and the held-out set.

    Held out are whole groups of the real frames; without real frames, photographs.

    Raises:
        ImgtoolError: Nothing to train on, or data that cannot be used.
    """
    if not settings.data and not settings.photos:
        raise ImgtoolError(
            "nothing to train on",
            "--data DIR takes frames with known white, --photos DIR photographs to relit",
            USAGE,
        )
    synthetic = held = None
    if settings.photos:
        pictures = synthesis.photographs(settings.photos)
        kept, out = samples.split(pictures, synthesis.source_of)
        if not kept:
            raise ImgtoolError(
                "no photographs in --photos", "give a folder with at least two photographs", USAGE
            )
        synthetic = Synthetic(Relit(kept, settings.seed), 50 * len(kept), settings, disturb=True)
        fixed = Relit(out or kept, samples.VALIDATION_SEED)
        held = Synthetic(fixed, settings.held_out, settings, disturb=False)
    if not settings.data:
        assert synthetic is not None
        assert held is not None
        return synthetic, held
    train, test = divided(frames(settings), settings)
    real = Real(_frames(train, settings.density), settings, disturb=True)
    still = Real(_frames(test, 0.0), settings, disturb=False)
    if synthetic is None:
        return real, still
    return Mixed(real, synthetic, settings.synthetic, settings.seed), still
