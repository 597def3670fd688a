"""Data sets: pictures, and what a filter makes of them.

A filter is run over whole pictures, so that crops hold what it makes of them in their surroundings; the
maps of slow filters are kept in the cache folder. Sample ``number`` is a function of the seed and the number
alone, except with a stream: what its buffer holds depends on how fast pictures come, so that neither a
second run nor one that is resumed draws the same; a resumed run fills its buffer anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch

from imgtool import images, samples
from imgtool.engines.filter import blackbox, model, stream, targets
from imgtool.engines.filter.sample import Sample
from imgtool.engines.filter.sources import (
    WINDOW,
    Drawn,
    Listed,
    Mapped,
    Pairs,
    Photographs,
    Reader,
    Source,
    Streamed,
    read_grey,
    with_map,
)
from imgtool.engines.filter.symmetry import Symmetries, symmetries
from imgtool.engines.filter.targets import Target
from imgtool.errors import USAGE, ImgtoolError
from imgtool.samples import CACHE_BYTES, VALIDATION_SEED, Decoded, distinct, indexed_source, split
from imgtool.tiles import mirrored

if TYPE_CHECKING:
    from imgtool.engines.filter.settings import Train

Picture = npt.NDArray[Any]


# --- samples ---------------------------------------------------------------------------------


class Stage(NamedTuple):
    """A part of a run: its steps, samples per step, and the edge of their crops."""

    steps: int
    batch: int
    crop: int


def course(settings: Train) -> list[Stage]:
    """Return the parts of a run: equal numbers of steps, crops that double, batches that halve."""
    count, steps = settings.stages, settings.steps
    ends = [steps * part // count for part in range(count + 1)]
    parts = [
        Stage(end - start, max(settings.batch >> number, 1), settings.crop << number)
        for number, (start, end) in enumerate(pairwise(ends))
    ]
    return [part for part in parts if part.steps]


def stages(settings: Train) -> list[tuple[int, int]]:
    """Return steps and samples per step of the parts of a run, as ``Engine.stages`` wants them."""
    return [(part.steps, part.batch) for part in course(settings)]


NONE = Symmetries()
"""Samples that stay as they are."""


@dataclass(frozen=True)
class Shape:
    """What samples look like.

    Attributes:
        parts: The parts of the run, by which crops grow.
        reach: Pixels around a crop that the network sees.
        symmetries: How samples are changed at random.
        drawn: Share of the samples that show drawn pictures.
    """

    parts: Sequence[Stage]
    reach: int
    symmetries: Symmetries = NONE
    drawn: float = 0.0

    def crop(self, number: int) -> int:
        """Return the edge of the crop of a sample."""
        return self.parts[samples.stage_of([part[:2] for part in self.parts], number)].crop


class Samples(samples.Order[Source]):
    """The data set: crops of sources in proportion to their sizes, with surroundings, changed at random."""

    def __init__(
        self, sources: Sequence[Source], seed: int, length: int, shape: Shape, drawn: Source | None = None
    ) -> None:
        """Draw from ``sources``, and from ``drawn`` the share that ``shape`` says.

        Args:
            sources: Where from.
            seed: Of everything random.
            length: Samples that are called an epoch.
            shape: What they look like.
            drawn: The source of drawn pictures.
        """
        super().__init__(sources, seed)
        self.length, self.shape, self.drawn = length, shape, drawn

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return self.length

    def __getitem__(self, number: int) -> Sample:
        """Return sample ``number``, for any number from 0 on."""
        cv2.setNumThreads(0)  # the worker processes are the parallelism
        source, index, rng = self.chosen(number)
        crop, reach = self.shape.crop(number), self.shape.reach
        mapped = source.draw(index, rng, crop)
        top, left = (int(rng.integers(0, max(size - crop, 0) + 1)) for size in mapped.photo.shape[:2])
        seen, wanted = cut(mapped, (top, left), crop, reach)
        seen, values = self.shape.symmetries.changed(seen, images.to_float(wanted), rng)
        return Sample(
            torch.from_numpy(np.ascontiguousarray(seen.transpose(2, 0, 1))),
            torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1))),
        )

    def chosen(self, number: int) -> tuple[Source, int, np.random.Generator]:
        """Return the source of a sample, the index in it, and the sample's own randomness."""
        share = self.shape.drawn
        if self.drawn is not None and math.floor((number + 1) * share) > math.floor(number * share):
            return self.drawn, 0, np.random.default_rng([self.seed, 0, number])
        return super().chosen(number)


def cut(mapped: Mapped, corner: tuple[int, int], crop: int, reach: int) -> tuple[Picture, Picture]:
    """Cut what a network sees for a crop, and the crop of the map: mirrored where the picture ends.

    Args:
        mapped: The picture.
        corner: Top and left of the crop.
        crop: Its edge.
        reach: Pixels around it that the network sees.
    """
    spans = list(zip(corner, mapped.photo.shape[:2], strict=True))
    near, far = (
        [mirrored(start - more, start + crop + more, size) for start, size in spans] for more in (0, reach)
    )
    return mapped.photo[np.ix_(*far)], mapped.wanted[np.ix_(*near)]


# --- from settings ---------------------------------------------------------------------------

Split = tuple[list[Source], list[Source]]


def load(settings: Train) -> tuple[Samples, Samples]:
    """Build the training and the held-out set.

    Held out are the photographs of ``validate_on``, which are then not trained on; else those that a hash of
    their names chooses (5 %); of a stream alone its first pictures, and of drawn pictures alone others.
    Held-out crops are the same for every run, every seed and every part of a run.

    Raises:
        ImgtoolError: Code 2, for folders that do not exist or hold too little, sources that contradict each
            other, or crops that the network cannot take. Code 1: a stream fails.
    """
    net = model.build(settings)
    if settings.crop % net.multiple:
        what = f"--crop {settings.crop} is no multiple of {net.multiple}, as this network needs"
        raise ImgtoolError(what, f"take {-(-settings.crop // net.multiple) * net.multiple}", USAGE)
    folder = settings.target.removeprefix(f"{blackbox.PAIRS}:")
    (kept, held), drawn, changes = (
        (_of_pairs(settings, Path(folder).expanduser()), None, Symmetries())
        if folder != settings.target
        else _of_filter(settings, net.count)
    )
    parts = course(settings)
    share = settings.synthetic if kept else 1.0
    train = Shape(parts, net.reach, changes, share if drawn else 0.0)
    fixed = Shape([Stage(1, 1, settings.crop)], net.reach, drawn=0.0 if held else 1.0)
    length = settings.epoch_steps * settings.batch
    return (
        Samples(kept, settings.seed, length, train, drawn),
        Samples(held, VALIDATION_SEED, settings.held_out, fixed, None if held else drawn),
    )


def describe(examples: Samples) -> dict[str, Any]:
    """Return what the weights' header keeps of the training set: photographs by name, stream, drawn share."""
    found: dict[str, Any] = {"trained_on": []}
    for source in [*examples.sources, *([examples.drawn] if examples.drawn else [])]:
        found |= source.about()
    return found | ({"synthetic": examples.shape.drawn} if examples.drawn else {})


def _of_filter(settings: Train, count: int) -> tuple[Split, Source | None, Symmetries]:
    """Return the sources of a filter that can be run, that of drawn pictures, and how to change samples."""
    target = blackbox.resolve(settings.target)
    if target.channels != count:
        what = f"{settings.target} gives {target.channels} channel(s), and the network {count}"
        ours = settings.target.partition(":")[0] in targets.KINDS
        raise ImgtoolError(
            what, "leave out --channels" if ours else f"give --channels {target.channels}", USAGE
        )
    _check_shares(settings)
    edge = max(WINDOW, course(settings)[-1].crop)
    reader = Reader(target, edge)
    kept: list[Source] = []
    held: list[Source] = []
    apart = distinct(settings.validate_on)
    if settings.validate_on:
        held.append(_held_photographs(list(apart.values()), reader))
    if settings.photos:
        inside, out = _photographs(settings, set(apart), reader)
        kept.append(inside)
        held += [] if held else [out]
    if settings.stream:
        streamed, first = _streamed(settings, target, not held)
        kept.append(streamed)
        held += first
    return (kept, held), Drawn(target) if settings.synthetic else None, symmetries(target)


def _check_shares(settings: Train) -> None:
    """Refuse to train on nothing, and sources of which nothing would be taken."""
    others = bool(settings.photos or settings.stream)
    if not others and settings.synthetic < 1:
        hint = "give --photos DIR or --stream NAME, or --synthetic 1"
        what = "no training data named"
        if settings.synthetic:
            what = f"--synthetic {settings.synthetic:g} leaves samples for which no source is named"
        raise ImgtoolError(what, hint, USAGE)
    if others and settings.synthetic == 1:
        what = "--synthetic 1 leaves nothing for --photos and --stream"
        raise ImgtoolError(what, "lower it; to validate on photos, give --validate-on", USAGE)


def _held_photographs(paths: Sequence[Path], reader: Reader) -> Photographs:
    if not paths:
        raise ImgtoolError("no photographs to validate on", "check the path of --validate-on", USAGE)
    return Photographs(paths, Decoded(reader))


def _photographs(settings: Train, apart: set[Path], reader: Reader) -> tuple[Photographs, Photographs]:
    paths = [path for real, path in distinct(settings.photos).items() if real not in apart]
    if len(paths) < 2 - bool(apart):
        raise ImgtoolError("fewer than two photographs found", "name folders by --photos", USAGE)
    decoded = Decoded(reader, CACHE_BYTES // max(settings.workers, 1))
    if apart:
        return Photographs(paths, decoded), Photographs([], decoded)
    kept, out = split(paths, lambda path: indexed_source(path) or path.stem)
    return Photographs(kept, decoded), Photographs(out, Decoded(reader))


def _streamed(settings: Train, target: Target, validated: bool) -> tuple[Streamed, list[Source]]:
    """Return a stream, and its first pictures where they are what is validated on."""
    if settings.buffer_max < settings.buffer_min:
        what = f"--buffer-min {settings.buffer_min} is above --buffer-max {settings.buffer_max}"
        raise ImgtoolError(what, "raise --buffer-max", USAGE)
    place = stream.Place.of(settings)
    held: list[Source] = []
    apart: frozenset[bytes] = frozenset()
    if validated:
        first = stream.first(place, settings.held_out)
        if not first:
            raise ImgtoolError(f"the stream {place.text} holds no pictures", "name another by --stream")
        apart = frozenset(picture.digest for picture in first)
        held = [Listed([with_map(picture, target) for picture in first])]
    counts = torch.zeros(max(settings.workers, 1), 2, dtype=torch.int64)
    counts.share_memory_()  # type: ignore[no-untyped-call]
    limits = stream.Limits(settings.buffer_min, settings.buffer_max, settings.buffer_delay, CACHE_BYTES)
    return Streamed(place, target, limits, apart, counts), held


def _of_pairs(settings: Train, folder: Path) -> Split:
    for name in ("photos", "stream", "synthetic"):
        if getattr(settings, name):
            what = f"--{name} cannot be used with --target {settings.target}"
            raise ImgtoolError(what, "what made the pairs cannot be run on other pictures", USAGE)
    apart = [pair for each in settings.validate_on for pair in blackbox.pairs_in(each)]
    taken = {before.resolve() for before, _ in apart}
    found = [pair for pair in blackbox.pairs_in(folder) if pair[0].resolve() not in taken]
    if len(found) < 2 - bool(apart):
        raise ImgtoolError(f"fewer than two pairs in {folder}", blackbox.LAYOUTS, USAGE)
    kept, out = (found, apart) if apart else split(found, lambda pair: pair[0].stem)
    read = images.read_rgb8 if model.channels(settings) == 3 else read_grey

    def source(paths: Sequence[tuple[Path, Path]], budget: int) -> Source:
        return Pairs(paths, Decoded(images.read_rgb8, budget // 2), Decoded(read, budget // 2))

    return [source(kept, CACHE_BYTES // max(settings.workers, 1))], [source(out, CACHE_BYTES)]
