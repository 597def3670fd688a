"""Data sets of the isp engine: photographs unprocessed on the fly, pairs, RAW files with LibRaw's rendering.

Sample ``number`` of a set is a function of the seed and the number alone, whoever asks and in whatever
order, so that data order survives worker processes and a resumed run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from imgtool import files, samples
from imgtool.engines.isp import bayer, libraw, pairs, unprocess
from imgtool.engines.isp.sample import Drawn, Sample, Source
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import read_rgb8
from imgtool.mosaic import Mosaic
from imgtool.samples import CACHE_BYTES, VALIDATION_SEED, Decoded, distinct, indexed_source, split

if TYPE_CHECKING:
    from imgtool.engines.isp.settings import Noise, Train

Picture = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

SHRINK = (1.25, 2.5)
"""By how much a crop of a photograph is shrunk, which hides the marks of JPEG and of its own mosaic."""

AS_IT_IS = 0.15
"""Share of the crops that are not shrunk, where the photo is not much larger than the crop."""

VALIDATED = 128
"""Least edge of held-out crops."""

LEVELS = (0.0, 1e-4, 1e-3, 4e-3, 1e-2)
"""Shot noise of held-out frames that are made of photographs, in turn."""


@dataclass
class Photographs:
    """Photographs that are made into raw frames on the fly.

    Attributes:
        paths: Their files.
        noise: Least and largest shot noise, and the share of frames without any.
        decoded: Where decoded pictures are kept.
        fixed: Take the levels of ``LEVELS`` in turn: for validation.
    """

    paths: Sequence[Path]
    noise: tuple[float, float, float]
    decoded: Decoded
    fixed: bool = False

    def __len__(self) -> int:
        """Return the number of photographs."""
        return len(self.paths)

    def names(self) -> list[str]:
        """Return the photograph that each is a view of, as ``samples.indexed_source`` has it, or its stem."""
        return [indexed_source(path) or path.stem for path in self.paths]

    def draw(self, index: int, rng: np.random.Generator, crop: int) -> Drawn:
        """Cut a crop, shrink it, turn it, and make a raw frame of it."""
        rgb = self._crop(self.decoded(self.paths[index]), rng, crop)
        rgb = np.rot90(rgb[:, ::-1] if rng.integers(2) else rgb, int(rng.integers(4)))
        recipe = unprocess.draw(rng, *self.noise)
        if self.fixed:
            shot = LEVELS[int(rng.integers(len(LEVELS)))]
            recipe = replace(recipe, shot=shot, read=unprocess.typical_read(shot), exposure=1.0)
        values, target = unprocess.frame(np.ascontiguousarray(rgb), recipe, rng)
        black = recipe.black if self.fixed else recipe.black + rng.uniform(-0.3, 0.3)
        packed = unprocess.unit(values, black, recipe.white)
        return Drawn(packed, recipe.gains, recipe.matrix, self._told(recipe, rng), target.transpose(2, 0, 1))

    def _told(self, recipe: unprocess.Recipe, rng: np.random.Generator) -> tuple[float, float]:
        """Return the noise that the network is told: nobody knows it exactly."""
        shot, read = unprocess.expected(recipe)
        error = 1.0 if self.fixed else float(np.exp(0.2 * rng.standard_normal()))
        return shot * error, read * error

    def _crop(self, photo: Picture, rng: np.random.Generator, crop: int) -> Picture:
        largest = min(min(photo.shape[:2]) / crop, SHRINK[1])
        shrink = 1.0
        if largest > SHRINK[0] and rng.random() >= AS_IT_IS:
            shrink = float(rng.uniform(SHRINK[0], largest))
        size = round(crop * shrink)
        part = _square(photo, size, rng)
        return cv2.resize(part, (crop, crop), interpolation=cv2.INTER_AREA) if size != crop else part  # type: ignore[return-value]


def _square(photo: Picture, size: int, rng: np.random.Generator) -> Picture:
    """Cut a square, mirroring where the photo is too small for it; of two places the one with more to see."""
    short = [max(size - edge, 0) for edge in photo.shape[:2]]
    if any(short):
        photo = np.pad(photo, ((0, short[0]), (0, short[1]), (0, 0)), mode="symmetric")
    parts = []
    for _ in range(2):
        top, left = (int(rng.integers(0, edge - size + 1)) for edge in photo.shape[:2])
        parts.append(photo[top : top + size, left : left + size])
    if rng.random() < 1 / 3:
        return parts[0]
    return max(
        parts, key=lambda part: float(np.abs(np.diff(part[::4, ::4, 1].astype(np.int16), axis=0)).mean())
    )


class Samples(samples.Order[Source]):
    """The data set: sources in proportion to their sizes."""

    def __init__(
        self, sources: Sequence[Source], crop: int, seed: int, length: int, *, total: int = 0
    ) -> None:
        """Draw from ``sources``; ``length`` samples are called an epoch.

        Args:
            sources: Where from.
            crop: Edge of the crops, in pixels of the mosaic.
            seed: Of everything random.
            length: Samples that are called an epoch.
            total: Samples of the whole training; 0 for validation, where LibRaw renders every frame too.
        """
        super().__init__(sources, seed)
        self.crop, self.length, self.total = crop, length, total

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return self.length

    def __getitem__(self, number: int) -> Sample:
        """Return sample ``number``, for any number from 0 on."""
        cv2.setNumThreads(0)  # the worker processes are the parallelism
        source, index, rng = self.chosen(number)
        drawn = source.draw(index, rng, self.crop)
        rival = np.zeros((3, 0, 0), np.uint8) if self.total else rendered(drawn)
        return Sample(
            torch.from_numpy(np.ascontiguousarray(drawn.packed)),
            torch.tensor(drawn.gains, dtype=torch.float32),
            torch.from_numpy(drawn.matrix.astype(np.float32)),
            torch.tensor(drawn.noise, dtype=torch.float32),
            torch.from_numpy(np.ascontiguousarray(drawn.target)),
            torch.from_numpy(rival),
            torch.tensor(number / self.total if self.total else 1.0),
        )


BLACK, WHITE = 4096, 65535
"""Levels of the frames that LibRaw is given: noise below black is kept."""


def rendered(drawn: Drawn) -> Picture:
    """Return LibRaw's rendering of a frame by its default algorithm, ``(3, 2h, 2w)``."""
    frame = drawn.rival or _frame(drawn)
    picture: Picture = libraw.of_mosaic(frame)[libraw.DEFAULT].transpose(2, 0, 1)
    return np.ascontiguousarray(picture)


def _frame(drawn: Drawn) -> Mosaic:
    planes = np.rint(drawn.packed * (WHITE - BLACK) + BLACK)
    values = np.empty((2 * planes.shape[1], 2 * planes.shape[2]), np.uint16)
    for (row, column), plane in zip(bayer.PLACES, planes, strict=True):
        values[row::2, column::2] = np.clip(plane, 0, WHITE)
    red, green, blue = (float(gain) for gain in drawn.gains)
    return Mosaic(values, black=(BLACK,) * 4, white=WHITE, gains=(red, green, blue), matrix=drawn.matrix)


def _levels(settings: Noise) -> tuple[float, float, float]:
    if settings.least_shot > settings.most_shot:
        what = f"--least-shot {settings.least_shot:g} is above --most-shot {settings.most_shot:g}"
        raise ImgtoolError(what, "raise --most-shot", USAGE)
    return settings.least_shot, settings.most_shot, settings.noise_free


Split = tuple[list[Source], list[Source]]


def _of_photos(settings: Train, noise: tuple[float, float, float], decoded: Decoded) -> Split:
    paths = [path for path in distinct(settings.photos).values() if path.suffix.lower() not in files.RAW]
    if len(paths) < 2:
        raise ImgtoolError(
            "fewer than two photographs found", "name folders by --photos; of RAW files, by --raws", USAGE
        )
    kept, out = split(paths, lambda path: indexed_source(path) or path.stem)
    return [Photographs(kept, noise, decoded)], [Photographs(out, noise, decoded, fixed=True)]


def load(settings: Train) -> tuple[Samples, Samples]:
    """Build the training and the held-out set from the folders that the settings name.

    Raises:
        ImgtoolError: Code 2, for folders that do not exist or hold too little.
    """
    if not (settings.photos or settings.raws or settings.data):
        raise ImgtoolError("no training data named", "give --photos DIR, --raws DIR or --data DIR", USAGE)
    budget = CACHE_BYTES // max(settings.workers, 1)
    noise = _levels(settings)
    kept: list[Source] = []
    held: list[Source] = []
    if settings.photos:
        kept, held = _of_photos(settings, noise, Decoded(read_rgb8, budget))
    if settings.raws or settings.data:
        sources, out = pairs.load(settings, noise, budget)
        kept += sources
        held += out
    length, total = settings.epoch_steps * settings.batch, settings.steps * settings.batch
    train = Samples(kept, settings.crop, settings.seed, length, total=total)
    return train, Samples(held, max(settings.crop, VALIDATED), VALIDATION_SEED, settings.held_out)


def describe(examples: Samples) -> dict[str, Any]:
    """Return what the weights' header keeps of the training set: the photographs, by source or name.

    Names that are mere numbers, as in large sets of pairs, say nothing and are left out, but counted.
    """
    names: set[str] = set()
    left_out = 0
    for source in examples.sources:
        found = source.names()
        telling = [name for name in found if not Path(name).stem.isdecimal()]
        names |= set(telling)
        left_out += len(found) - len(telling)
    return {"trained_on": sorted(names), "trained_on_left_out": left_out}
