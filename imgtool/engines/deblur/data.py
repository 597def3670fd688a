"""Data sets of the deblur engine: photographs blurred on the fly, pairs, averaged frames.

Sample ``number`` of a set is a function of the seed and the number alone, whoever asks and in
whatever order, so that data order survives worker processes and a resumed run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imgtool import samples
from imgtool.engines.deblur import blur
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import read_rgb8
from imgtool.samples import CACHE_BYTES, VALIDATION_SEED, distinct, split
from imgtool.samples import held as _held
from imgtool.samples import pictures_in as pictures_in

if TYPE_CHECKING:
    from imgtool.engines.deblur.settings import Severity, Train

Picture = npt.NDArray[Any]
MOST_SHRUNK = 4
"""Most times that a crop of a photograph is shrunk."""
LONGEST = 13
"""Most frames in a run that is averaged."""
HALVES = (3, 4, 5, 6)
"""Frames on either side of a run's centre: runs have 7, 9, 11 or 13."""


class Pair(NamedTuple):
    """One sample: two ``(3, H, W)`` uint8 sRGB tensors (a batch has ``(B, 3, H, W)``)."""

    blurred: Tensor
    sharp: Tensor


class Source(Protocol):
    """Something that samples can be drawn from."""

    def __len__(self) -> int:
        """Return how many different pictures, pairs or windows there are."""
        ...

    def draw(self, index: int, rng: np.random.Generator, crop: int) -> tuple[Picture, Picture]:
        """Return a blurred and a sharp ``(crop, crop, 3)`` picture from item ``index``."""
        ...


class Decoded(samples.Decoded):
    """Decoded pictures by path, the least recently used dropped when they exceed a budget."""

    def __init__(self, budget: int = CACHE_BYTES) -> None:
        """Hold up to ``budget`` bytes of pictures as ``read_rgb8`` reads them."""
        super().__init__(read_rgb8, budget)

    def __reduce__(self) -> tuple[type[Decoded], tuple[Any, ...]]:
        """Come empty to a worker process."""
        return Decoded, (self._budget,)


def place(picture: Picture, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the top left corner of a square; 0 along a side that is too short for it."""
    height, width = picture.shape[:2]
    return int(rng.integers(0, max(height - size, 0) + 1)), int(rng.integers(0, max(width - size, 0) + 1))


def cut(picture: Picture, top: int, left: int, size: int) -> Picture:
    """Cut a square out of a picture, mirroring where the picture is too small for it."""
    part = picture[top : top + size, left : left + size]
    short = (size - part.shape[0], size - part.shape[1])
    if any(short):
        part = np.pad(
            part,
            ((0, short[0]), (0, short[1]), (0, 0)),
            mode="reflect" if min(part.shape[:2]) > 1 else "edge",
        )
    return np.ascontiguousarray(part)


def severity(settings: Severity) -> blur.Severity:
    """Return how hard photographs are treated, as the settings say.

    Raises:
        ImgtoolError: Code 2, where the least extent of blur is above the largest.
    """
    if settings.shortest_blur > settings.longest_blur:
        raise ImgtoolError(
            f"--shortest-blur {settings.shortest_blur:g} is above --longest-blur {settings.longest_blur:g}",
            "raise --longest-blur",
            USAGE,
        )
    return blur.Severity(settings.untouched, settings.shortest_blur, settings.longest_blur, settings.noisy)


ALL_BLURRED = blur.Severity(untouched=0.0)
"""How held-out photographs are treated, whatever the settings: figures stay comparable."""


@dataclass
class Photographs:
    """Sharp photographs; blur is synthesised on the fly.

    A JPEG much larger than the crops is decoded at 1/2, 1/4 or 1/8 of its size: no crop shows more
    of it than ``MOST_SHRUNK`` times its own edge and margins.
    """

    paths: Sequence[Path]
    severity: blur.Severity
    decoded: Decoded

    def __len__(self) -> int:
        """Return the number of photographs."""
        return len(self.paths)

    def draw(self, index: int, rng: np.random.Generator, crop: int) -> tuple[Picture, Picture]:
        """Draw one crop, shrunk when the photo is large (that removes its own blur), and blur it."""
        picture, _, sharp = self.draw_with_recipe(index, rng, crop)
        return picture, sharp

    def draw_with_recipe(
        self, index: int, rng: np.random.Generator, crop: int
    ) -> tuple[Picture, blur.Recipe, Picture]:
        """Do the same and also tell how the crop was blurred: ``(blurred, recipe, sharp)``."""
        size = crop + 2 * blur.MARGIN
        photo = self.decoded(self.paths[index], MOST_SHRUNK * size)
        largest = min(min(photo.shape[:2]) / size, MOST_SHRUNK)
        shrink = float(np.exp(rng.uniform(0, np.log(largest)))) if largest > 1 and rng.random() < 0.6 else 1.0
        part = self._detailed(photo, round(size * shrink), rng)
        if shrink > 1:
            part = cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA)
        degraded, recipe = blur.degrade(part, rng, self.severity)
        inside = slice(blur.MARGIN, blur.MARGIN + crop)
        return degraded[inside, inside], recipe, part[inside, inside]

    @staticmethod
    def _detailed(photo: Picture, size: int, rng: np.random.Generator) -> Picture:
        """Of two places take, two times in three, the one with more to see."""
        parts = [cut(photo, *place(photo, size, rng), size) for _ in range(2)]
        if rng.random() < 1 / 3:
            return parts[0]
        return max(
            parts, key=lambda part: float(np.abs(np.diff(part[::4, ::4, 1].astype(np.int16), axis=0)).mean())
        )


@dataclass
class Pairs:
    """Blurred and sharp files of the same size."""

    paths: Sequence[tuple[Path, Path]]
    decoded: Decoded

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.paths)

    def draw(self, index: int, rng: np.random.Generator, crop: int) -> tuple[Picture, Picture]:
        """Cut the same square out of both pictures."""
        blurred, sharp = (self.decoded(path) for path in self.paths[index])
        if blurred.shape != sharp.shape:
            names = " and ".join(str(path) for path in self.paths[index])
            raise ImgtoolError(f"sizes differ: {names}", "imgtool data check deblur lists all such pairs")
        top, left = place(sharp, crop, rng)
        return cut(blurred, top, left, crop), cut(sharp, top, left, crop)


@dataclass
class Frames:
    """Runs of consecutive sharp frames; a run's mean is the blurred picture, its centre the sharp."""

    windows: Sequence[Sequence[Path]]
    decoded: Decoded

    def __len__(self) -> int:
        """Return the number of centres times that of the lengths: 7, 9, 11 and 13 frames."""
        return len(self.windows) * len(HALVES)

    def draw(self, index: int, rng: np.random.Generator, crop: int) -> tuple[Picture, Picture]:
        """Average a run around a centre, in linear light (gamma 2.2) or as the frames are."""
        window = self.windows[index // len(HALVES)]
        half = HALVES[index % len(HALVES)]
        centre = len(window) // 2
        chosen = [self.decoded(path) for path in window[centre - half : centre + half + 1]]
        if len({frame.shape for frame in chosen}) > 1:
            raise ImgtoolError(
                f"frames of different sizes around {window[centre]}", "give frames of one recording"
            )
        top, left = place(chosen[0], crop, rng)
        parts = [cut(frame, top, left, crop) for frame in chosen]
        return average(parts, 2.2 if rng.random() < 0.5 else 1.0), parts[half]


def average(frames: Sequence[Picture], gamma: float) -> Picture:
    """Average ``(H, W, 3)`` uint8 frames in the light that ``gamma`` decodes to; 1 as they are."""
    table = ((np.arange(256) / 255) ** gamma).astype(np.float32)
    mean = np.zeros(frames[0].shape, np.float32)
    for frame in frames:
        mean += table[frame]
    return np.rint((mean / len(frames)) ** (1 / gamma) * 255).astype(np.uint8)


def windows(frames: Sequence[Path], longest: int) -> list[list[Path]]:
    """Return every run of ``longest`` frames, one per possible centre."""
    return [list(frames[start : start + longest]) for start in range(len(frames) - longest + 1)]


class Samples(samples.Order[Source]):
    """The data set: sources in proportion to their sizes, flips and rotations, crops."""

    def __init__(
        self, sources: Sequence[Source], crop: int, seed: int, length: int, *, augment: bool = True
    ) -> None:
        """Draw from ``sources``; ``length`` samples are called an epoch."""
        super().__init__(sources, seed)
        self.crop, self.length, self.augment = crop, length, augment

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return self.length

    def __getitem__(self, number: int) -> Pair:
        """Return sample ``number``, for any number from 0 on."""
        cv2.setNumThreads(0)  # the worker processes are the parallelism
        source, index, rng = self.chosen(number)
        pictures = source.draw(index, rng, self.crop)
        if self.augment:
            quarter, mirror = int(rng.integers(4)), bool(rng.integers(2))
            pictures = tuple(np.rot90(p[:, ::-1] if mirror else p, quarter) for p in pictures)  # type: ignore[assignment]
        return Pair(*(torch.from_numpy(np.ascontiguousarray(p.transpose(2, 0, 1))) for p in pictures))


# --- folders ---------------------------------------------------------------------------------


def find_pairs(folder: Path, blurred: str = "blur") -> tuple[list[tuple[Path, Path]], list[Path]]:
    """Find the pairs in a folder.

    Known layouts: any depth of folders that hold ``blur/`` (or ``blur_gamma/``) beside ``sharp/``
    with the same file names (GoPro: ``train/GOPR*/{blur,sharp}``), and ``X.png`` beside
    ``X_gt.png`` in one folder.

    Returns:
        The pairs ``(blurred, sharp)``, sorted, and the pictures that lack a partner.
    """
    pairs: list[tuple[Path, Path]] = []
    lonely: list[Path] = []
    for picture in pictures_in(folder):
        partner, is_sharp = _partner(picture, blurred)
        if partner is None:
            continue
        if not partner.exists():
            lonely.append(picture)
        elif not is_sharp:
            pairs.append((picture, partner))
    return pairs, lonely


def _partner(picture: Path, blurred: str) -> tuple[Path | None, bool]:
    """Return the other half of a pair (None for what is no half) and whether this is the sharp one."""
    folder = picture.parent
    if folder.name == blurred:
        return folder.parent / "sharp" / picture.name, False
    if folder.name == "sharp":
        return folder.parent / blurred / picture.name, True
    if folder.name in ("blur", "blur_gamma") or (folder / "sharp").is_dir():  # beside it: a preview
        return None, False
    if picture.stem.endswith("_gt"):
        return picture.with_name(picture.stem.removesuffix("_gt") + picture.suffix), True
    return picture.with_name(f"{picture.stem}_gt{picture.suffix}"), False


Split = tuple[list[Source], list[Source]]


def _of_photos(settings: Train, apart: set[Path], decoded: Decoded) -> Split:
    paths = [path for real, path in distinct(settings.photos).items() if real not in apart]
    if settings.photos and len(paths) < 2:
        raise ImgtoolError(
            "fewer than two photographs found", "name a folder with sharp photographs by --photos", USAGE
        )
    kept, out = (paths, []) if settings.validate_on else split(paths, lambda path: path.stem, _held)
    return [Photographs(kept, severity(settings), decoded)], [Photographs(out, ALL_BLURRED, decoded)]


def _of_pairs(settings: Train, apart: set[Path], decoded: Decoded) -> Split:
    found = [pair for folder in settings.pairs for pair in find_pairs(folder, settings.blur_folder)[0]]
    found = list({pair[1].resolve(): pair for pair in found if pair[1].resolve() not in apart}.values())
    if settings.pairs and len(found) < 2:
        raise ImgtoolError(
            "fewer than two pairs found", "expected blur/ beside sharp/, or X.png beside X_gt.png", USAGE
        )
    if settings.validate_on:
        return [Pairs(found, decoded)], []
    sequences = sorted({pair[1].parent for pair in found})
    if len(sequences) > 1:
        kept = [pair for pair in found if pair[1].parent != sequences[-1]]
        held = [pair for pair in found if pair[1].parent == sequences[-1]]
    else:
        last = max(len(found) // 20, 1)
        kept, held = found[:-last], found[-last:]
    return [Pairs(kept, decoded)], [Pairs(held, decoded)]


def sequences_in(folders: Sequence[Path]) -> dict[Path, list[Path]]:
    """Return the frames of every folder that holds any: a run never goes from one into the next."""
    found: dict[Path, list[Path]] = {}
    for path in distinct(folders).values():
        found.setdefault(path.parent, []).append(path)
    return found


def _of_frames(settings: Train, apart: set[Path], decoded: Decoded) -> Split:
    kept: list[list[Path]] = []
    held: list[list[Path]] = []
    needed = LONGEST if settings.validate_on else 2 * LONGEST
    for folder, frames in sequences_in(settings.frames).items():
        if len(frames) < needed:
            raise ImgtoolError(
                f"{len(frames)} frames in {folder}", f"at least {needed} consecutive frames are needed", USAGE
            )
        last = 0 if settings.validate_on else max(LONGEST, len(frames) // 20)
        runs = windows(frames[: len(frames) - last], LONGEST)
        kept += [run for run in runs if apart.isdisjoint(path.resolve() for path in run)] if apart else runs
        held += windows(frames[len(frames) - last :], LONGEST) if last else []
    if settings.frames and not kept:
        raise ImgtoolError("no frames found", "name folders of consecutive frames by --frames", USAGE)
    return [Frames(kept, decoded)], [Frames(held, decoded)]


def _to_validate(settings: Train, decoded: Decoded) -> list[Source]:
    sources: list[Source] = []
    for folder in settings.validate_on:
        pairs = find_pairs(folder, settings.blur_folder)[0]
        sources.append(
            Pairs(pairs, decoded) if pairs else Photographs(pictures_in(folder), ALL_BLURRED, decoded)
        )
        if not len(sources[-1]):
            raise ImgtoolError(f"no photos or pairs in {folder}", "check the path of --validate-on", USAGE)
    return sources


def load(settings: Train) -> tuple[Samples, Samples]:
    """Build the training and the held-out set from the folders that the settings name.

    Held out are the folders of ``validate_on``, which are then not trained on, else photographs
    chosen by a hash of their names (5 %), the last sequence of pairs and the last frames of every
    folder. Held-out crops are fixed: the same pixels, blur and noise for every run and every seed;
    all of them are blurred.

    Raises:
        ImgtoolError: Code 2, for folders that do not exist or hold too little.
    """
    if not (settings.photos or settings.pairs or settings.frames):
        raise ImgtoolError("no training data named", "give --photos DIR, --pairs DIR or --frames DIR", USAGE)
    decoded = Decoded(CACHE_BYTES // max(settings.workers, 1))
    apart = set(distinct(settings.validate_on))
    kept: list[Source] = []
    held = _to_validate(settings, decoded)
    for part in (_of_photos, _of_pairs, _of_frames):
        sources, out = part(settings, apart, decoded)
        kept += sources
        held += out
    train = Samples(kept, settings.crop, settings.seed, settings.epoch_steps * settings.batch)
    return train, Samples(held, settings.crop, VALIDATION_SEED, settings.held_out, augment=False)
