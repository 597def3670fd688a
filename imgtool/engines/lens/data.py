"""Data sets of the lens engine: straight photographs distorted on the fly, and folders of pairs.

A folder of pairs holds ``<id>_original.jpg`` (distorted), ``<id>_generated.jpg`` (straight) and, where
the coefficients are known, ``labels.jsonl``. Views of one photograph never lie on both sides of the
split: photographs with the same "from" in an ``index.tsv`` beside them, pairs with the same "source" in
their label, and else files whose names differ in a short number at the end (``house-1``, ``house-2``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imgtool import files, samples
from imgtool.engines.lens import prior, synthesis
from imgtool.engines.lens.geometry import BrownConrady
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import read_rgb8
from imgtool.samples import (
    CACHE_BYTES,
    VALIDATION_SEED,
    Decoded,
    distinct,
    indexed_source,
    pictures_in,
    split,
)

if TYPE_CHECKING:
    from imgtool.engines.lens.settings import Synthesis, Train

Picture = npt.NDArray[Any]
Row = Mapping[str, Any]

LABELS = "labels.jsonl"
ORIGINAL, GENERATED = "_original", "_generated"
PADDING = (124, 116, 104)
"""Grey around a letterboxed photo: the mean of ImageNet."""
SMALLEST = 32
"""Least length of the shorter side of a photo, in pixels."""
SHARPER = 1.5
"""How much more of a photo is decoded than the longer side of a sample shows."""


class Sample(NamedTuple):
    """One sample; a batch has a leading dimension.

    Attributes:
        image: Distorted photo, letterboxed: ``(3, S, S)`` uint8 sRGB, S the network's input.
        frame: ``(2,)`` float32: half width and half height of the photo in S / 2; the larger is 1.
        target: Straight partner, letterboxed: ``(3, P, P)`` uint8; ``(3, 0, 0)`` where no loss needs it.
        source: Distorted photo at that size.
        coefficients: ``(4,)`` float32: k1, k2, p1, p2 in the half-diagonal normalisation, else NaN.
        known: Whether the coefficients are known, bool.
    """

    image: Tensor
    frame: Tensor
    target: Tensor
    source: Tensor
    coefficients: Tensor
    known: Tensor


class Drawn(NamedTuple):
    """A pair ``(H, W, 3)`` uint8 and its model.

    Attributes:
        distorted: The photo.
        straight: Its partner; empty where it is not needed.
        model: What leads from one to the other, where it is known.
    """

    distorted: Picture
    straight: Picture
    model: BrownConrady | None


class Source(Protocol):
    """Something that samples can be drawn from."""

    def __len__(self) -> int:
        """Return how many different photos or pairs there are."""
        ...

    def draw(self, index: int, rng: np.random.Generator) -> Drawn:
        """Return a pair from item ``index``."""
        ...


def read_small(path: Path, least: int = 0) -> Picture:
    """Read a photo as ``(H, W, 3)`` uint8, shrunk so that its shorter side is ``least`` where that is less.

    Raises:
        ImgtoolError: Unreadable, or smaller than ``SMALLEST``.
    """
    picture = read_rgb8(path, least)
    height, width = picture.shape[:2]
    if min(height, width) < SMALLEST:
        raise ImgtoolError(f"{path} is only {width}x{height} pixels", f"at least {SMALLEST} are needed")
    scale = least / min(height, width)
    if not 0 < scale < 1:
        return picture
    return cv2.resize(picture, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)


def draw_model(settings: Synthesis, rng: np.random.Generator) -> BrownConrady:
    """Draw the distortion of a sample; the share ``untouched`` has none."""
    if rng.random() < settings.untouched:
        return BrownConrady()
    return prior.draw(rng, settings.prior, settings.decentred)


@dataclass
class Photographs:
    """Straight photographs, distorted on the fly to samples of ``size`` pixels at most.

    ``partner`` says whether the straight halves are needed; without, they are empty.
    """

    paths: Sequence[Path]
    settings: Synthesis
    decoded: Decoded
    size: int
    partner: bool = True

    def __len__(self) -> int:
        """Return the number of photographs."""
        return len(self.paths)

    def draw(self, index: int, rng: np.random.Generator) -> Drawn:
        """Draw a part of a photo and distort it."""
        photo = self.decoded(self.paths[index], round(SHARPER * self.size))
        model = draw_model(self.settings, rng)
        made = synthesis.distorted(photo, model, rng, self.size, self.settings.noisy, self.partner)
        return Drawn(*made)


@dataclass
class Pairs:
    """Distorted and straight files of the same size, mirrored half of the time where ``augment`` says so."""

    pairs: Sequence[Pair]
    decoded: Decoded
    size: int
    augment: bool = True

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def draw(self, index: int, rng: np.random.Generator) -> Drawn:
        """Return a pair."""
        pair = self.pairs[index]
        first, second = (self.decoded(path, self.size) for path in (pair.original, pair.generated))
        if first.shape != second.shape:
            raise ImgtoolError(
                f"sizes differ: {pair.original} and {pair.generated}",
                "imgtool data check lens lists all such pairs",
            )
        if self.augment and rng.random() < 0.5:
            return Drawn(first[:, ::-1], second[:, ::-1], pair.model and pair.model.mirrored())
        return Drawn(first, second, pair.model)


def letterbox(picture: Picture, edge: int) -> Picture:
    """Return a picture in the middle of a grey square, its aspect kept: ``(edge, edge, 3)``."""
    height, width = picture.shape[:2]
    scale = edge / max(height, width)
    high, wide = max(round(height * scale), 1), max(round(width * scale), 1)
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    square = np.empty((edge, edge, 3), np.uint8)
    square[:] = PADDING
    top, left = (edge - high) // 2, (edge - wide) // 2
    square[top : top + high, left : left + wide] = cv2.resize(
        np.ascontiguousarray(picture), (wide, high), interpolation=way
    )
    return square


def frame_of(width: int, height: int) -> tuple[float, float]:
    """Return half width and half height of a letterboxed photo in half edges of the square."""
    longer = max(width, height)
    return width / longer, height / longer


def _tensor(picture: Picture) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))


class Images(samples.Order[Source]):
    """The data set: sources in proportion to their sizes."""

    def __init__(self, sources: Sequence[Source], seed: int, length: int, sizes: tuple[int, int]) -> None:
        """Draw from ``sources``.

        Args:
            sources: Photographs and pairs.
            seed: Of everything that is random.
            length: Samples in an epoch.
            sizes: Edge of what the network sees, and of the pair; 0 leaves the pair out.
        """
        super().__init__(sources, seed)
        self.length, self.sizes = length, sizes

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return self.length

    def __getitem__(self, number: int) -> Sample:
        """Return sample ``number``, for any number from 0 on."""
        cv2.setNumThreads(0)  # the worker processes are the parallelism
        source, index, rng = self.chosen(number)
        distorted, straight, model = source.draw(index, rng)
        edge, whole = self.sizes
        empty = torch.empty((3, 0, 0), dtype=torch.uint8)
        values = (model.k1, model.k2, model.p1, model.p2) if model else (math.nan,) * 4
        return Sample(
            _tensor(letterbox(distorted, edge)),
            torch.tensor(frame_of(distorted.shape[1], distorted.shape[0]), dtype=torch.float32),
            _tensor(letterbox(straight, whole)) if whole else empty,
            _tensor(letterbox(distorted, whole)) if whole else empty,
            torch.tensor(values, dtype=torch.float32),
            torch.tensor(model is not None),
        )


# --- labels and pairs ------------------------------------------------------------------------------


def model_of(row: Row) -> BrownConrady:
    """Return the model of a label.

    Raises:
        ValueError: A coefficient is missing, no number or not finite.
    """
    values = [row.get(name) for name in ("k1", "k2", "p1", "p2")]
    values += [row.get(name, 0.0) for name in ("k3", "cx", "cy")]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise ValueError("no finite k1, k2, p1, p2")
    return BrownConrady(*(float(value) for value in values if value is not None))


def read_labels(folder: Path) -> dict[str, Row]:
    """Return the rows of a folder's ``labels.jsonl`` by the name of their file; {} where there is none."""
    path = folder / LABELS
    return {str(row.get("file", "")): row for row in files.json_lines(path)} if path.exists() else {}


class Pair(NamedTuple):
    """Two files and what their label says."""

    original: Path
    generated: Path
    model: BrownConrady | None
    group: str


def find_pairs(folder: Path) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """Find ``<id>_original`` and ``<id>_generated`` of any type in a folder and those below it.

    Returns:
        The pairs ``(distorted, straight)``, sorted, and the pictures that lack a partner.
    """
    found: dict[Path, dict[str, Path]] = {}
    for path in pictures_in(folder):
        for ending in (ORIGINAL, GENERATED):
            if path.stem.endswith(ending):
                found.setdefault(path.with_name(path.stem.removesuffix(ending)), {})[ending] = path
    pairs = [(both[ORIGINAL], both[GENERATED]) for both in found.values() if len(both) == 2]
    lonely = [path for both in found.values() if len(both) == 1 for path in both.values()]
    return sorted(pairs), sorted(lonely)


def _labelled(pairs: Sequence[tuple[Path, Path]]) -> list[Pair]:
    labels = {folder: read_labels(folder) for folder in {pair[0].parent for pair in pairs}}
    found = []
    for original, generated in pairs:
        row = labels[original.parent].get(original.name)
        try:
            model = model_of(row) if row else None
        except ValueError as fault:
            raise ImgtoolError(
                f"{original.parent / LABELS}: {fault} for {original.name}",
                "imgtool data check lens lists all such labels",
            ) from None
        group = str((row or {}).get("source") or _stem(original.stem.removesuffix(ORIGINAL)))
        found.append(Pair(original, generated, model, group))
    return found


# --- the split -------------------------------------------------------------------------------------


def _stem(name: str) -> str:
    """Return a file's name without a number of one or two digits at its end, which numbers views."""
    return re.sub(r"(?<=.)[-_]\d{1,2}$", "", name)


def group_of(path: Path) -> str:
    """Return the name of the photograph that a file is a view of."""
    return indexed_source(path) or _stem(path.stem)


def photographs(settings: Train) -> tuple[list[Path], list[Path]]:
    """Return the straight photographs to train on and those held out, whatever the seed.

    Held out are those of ``validate_on``, which are then not trained on, else 5 %, chosen by a hash of
    the name of the photograph that they are views of.

    Raises:
        ImgtoolError: Code 2: folders that do not exist or hold too little.
    """
    held = distinct(settings.validate_on)
    paths = [path for real, path in distinct(settings.photos).items() if real not in held]
    if len(paths) < 2:
        raise ImgtoolError(
            "fewer than two photographs found", "name a folder with straight photographs by --photos", USAGE
        )
    if settings.validate_on:
        if not held:
            raise ImgtoolError("no photos to validate on", "check the path of --validate-on", USAGE)
        return paths, list(held.values())
    return split(paths, group_of)


def _pairs(settings: Train, apart: set[Path]) -> tuple[list[Pair], list[Pair]]:
    found = {pair[0].resolve(): pair for folder in settings.pairs for pair in find_pairs(folder)[0]}
    pairs = _labelled([pair for real, pair in found.items() if real not in apart])
    if settings.pairs and len(pairs) < 2:
        raise ImgtoolError(
            "fewer than two pairs found", f"expected <id>{ORIGINAL}.jpg beside <id>{GENERATED}.jpg", USAGE
        )
    return (pairs, []) if settings.validate_on else split(pairs, lambda pair: pair.group)


def _to_validate(settings: Train) -> tuple[list[Path], list[Pair]]:
    photos: list[Path] = []
    pairs: list[Pair] = []
    for folder in settings.validate_on:
        found = find_pairs(folder)[0]
        pairs += _labelled(found)
        photos += [] if found else pictures_in(folder)
    if settings.validate_on and not (photos or pairs):
        raise ImgtoolError("no photos to validate on", "check the path of --validate-on", USAGE)
    return photos, pairs


def load_images(settings: Train) -> tuple[Images, Images]:
    """Build the training and the held-out set of a network that looks at pixels.

    Held-out samples are fixed: the same pixels and distortions for every run and every seed. See
    ``photographs`` for the split.

    Raises:
        ImgtoolError: Code 2, for folders that do not exist or hold too little; code 1 for bad labels.
    """
    if not (settings.photos or settings.pairs):
        raise ImgtoolError("no training data named", "give --photos DIR or --pairs DIR", USAGE)
    held_photos, held_pairs = _to_validate(settings)
    kept_photos: list[Path] = []
    if settings.photos:
        kept_photos, out = photographs(settings)
        held_photos = held_photos if settings.validate_on else out
    kept_pairs, out_pairs = _pairs(settings, set(distinct(settings.validate_on)))
    held_pairs = held_pairs if settings.validate_on else out_pairs
    compared = bool(settings.loss != "field" or kept_pairs or held_pairs)
    sizes = (settings.input, settings.photo_size if compared else 0)
    size = max(2 * sizes[0], sizes[1])
    decoded = Decoded(read_small, CACHE_BYTES // max(settings.workers, 1))

    def sources(photos: Sequence[Path], pairs: Sequence[Pair], augment: bool) -> list[Source]:
        return [
            Photographs(photos, settings, decoded, size, compared),
            Pairs(pairs, decoded, size, augment),
        ]

    length = settings.epoch_steps * settings.batch
    train = Images(sources(kept_photos, kept_pairs, True), settings.seed, length, sizes)
    held = Images(sources(held_photos, held_pairs, False), VALIDATION_SEED, settings.held_out, sizes)
    return train, held
