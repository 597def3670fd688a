"""Data sets of the deblur engine: photographs blurred on the fly, pairs, averaged frames.

Sample ``number`` of a set is a function of the seed and the number alone, whoever asks and in
whatever order, so that data order survives worker processes and a resumed run.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imgtool.engines.deblur import blur
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import READABLE, read_rgb8

if TYPE_CHECKING:
    from imgtool.engines.deblur.settings import Train

Picture = npt.NDArray[Any]
VALIDATION_SEED = 20_000_003
CACHE_BYTES = 1_500_000_000


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


class Decoded:
    """Decoded pictures by path, the least recently used dropped when they exceed a budget."""

    def __init__(self, budget: int = CACHE_BYTES) -> None:
        """Hold up to ``budget`` bytes."""
        self._held: OrderedDict[Path, Picture] = OrderedDict()
        self._budget, self._bytes = budget, 0

    def __call__(self, path: Path) -> Picture:
        """Return the picture ``(H, W, 3)``, from memory where it is held."""
        if path in self._held:
            self._held.move_to_end(path)
            return self._held[path]
        picture = read_rgb8(path)
        self._held[path] = picture
        self._bytes += picture.nbytes
        while self._bytes > self._budget and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return picture


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


@dataclass
class Photographs:
    """Sharp photographs; blur is synthesised on the fly."""

    paths: Sequence[Path]
    untouched: float
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
        photo = self.decoded(self.paths[index])
        size = crop + 2 * blur.MARGIN
        largest = min(min(photo.shape[:2]) / size, 4.0)
        shrink = float(np.exp(rng.uniform(0, np.log(largest)))) if largest > 1 and rng.random() < 0.6 else 1.0
        part = self._detailed(photo, round(size * shrink), rng)
        if shrink > 1:
            part = cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA)
        degraded, recipe = blur.degrade(part, rng, self.untouched)
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
        """Return the number of centres."""
        return len(self.windows)

    def draw(self, index: int, rng: np.random.Generator, crop: int) -> tuple[Picture, Picture]:
        """Average 3 to all frames of a window, in linear light (gamma 2.2) or as they are."""
        window = self.windows[index]
        half = int(rng.integers(1, len(window) // 2 + 1))
        centre = len(window) // 2
        chosen = [self.decoded(path) for path in window[centre - half : centre + half + 1]]
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


class Samples:
    """The data set: sources in proportion to their sizes, flips and rotations, crops."""

    def __init__(
        self, sources: Sequence[Source], crop: int, seed: int, length: int, *, augment: bool = True
    ) -> None:
        """Draw from ``sources``; ``length`` samples are called an epoch."""
        self.sources = [source for source in sources if len(source)]
        self.crop, self.seed, self.length, self.augment = crop, seed, length, augment
        self._ends = np.cumsum([len(source) for source in self.sources])
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return self.length

    def _shuffled(self, turn: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, 1, turn]).permutation(int(self._ends[-1]))

    def __getstate__(self) -> dict[str, object]:
        """Leave the cache of orders behind when sent to a worker process."""
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take up the state in a worker process."""
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def __getitem__(self, number: int) -> Pair:
        """Return sample ``number``, for any number from 0 on."""
        cv2.setNumThreads(0)  # the worker processes are the parallelism
        turn, position = divmod(number, int(self._ends[-1]))
        chosen = int(self._order(turn)[position])
        source = int(np.searchsorted(self._ends, chosen, side="right"))
        index = chosen - (int(self._ends[source - 1]) if source else 0)
        rng = np.random.default_rng([self.seed, 0, number])
        pictures = self.sources[source].draw(index, rng, self.crop)
        if self.augment:
            quarter, mirror = int(rng.integers(4)), bool(rng.integers(2))
            pictures = tuple(np.rot90(p[:, ::-1] if mirror else p, quarter) for p in pictures)  # type: ignore[assignment]
        return Pair(*(torch.from_numpy(np.ascontiguousarray(p.transpose(2, 0, 1))) for p in pictures))


# --- folders ---------------------------------------------------------------------------------


def pictures_in(folder: Path) -> list[Path]:
    """List the pictures in a folder and its sub-folders, sorted; a file stands for itself."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ImgtoolError(f"no such folder: {folder}", "check the path", USAGE)
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in READABLE and p.is_file())


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
    if folder.name in ("blur", "blur_gamma"):
        return None, False
    if picture.stem.endswith("_gt"):
        return picture.with_name(picture.stem.removesuffix("_gt") + picture.suffix), True
    return picture.with_name(f"{picture.stem}_gt{picture.suffix}"), False


def _held(name: str, share: float) -> bool:
    """Decide by the name alone whether a picture is held out, whatever else is in its folder."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < share * 2**32


def _split(items: Sequence[Path], share: float = 0.05) -> tuple[list[Path], list[Path]]:
    kept = [item for item in items if not _held(item.stem, share)]
    out = [item for item in items if _held(item.stem, share)]
    if not out:
        kept, out = list(items[:-1]), list(items[-1:])
    return kept, out


def _of_photos(settings: Train, decoded: Decoded) -> tuple[list[Source], list[Source]]:
    paths = [path for folder in settings.photos for path in pictures_in(folder)]
    if settings.photos and len(paths) < 2:
        raise ImgtoolError(
            "fewer than two photographs found", "name a folder with sharp photographs by --photos", USAGE
        )
    kept, out = (paths, []) if settings.validate_on else _split(paths)
    return [Photographs(kept, settings.untouched, decoded)], [Photographs(out, 0.0, decoded)]


def _of_pairs(settings: Train, decoded: Decoded) -> tuple[list[Source], list[Source]]:
    found = [pair for folder in settings.pairs for pair in find_pairs(folder, settings.blur_folder)[0]]
    if settings.pairs and len(found) < 2:
        raise ImgtoolError(
            "fewer than two pairs found", "expected blur/ beside sharp/, or X.png beside X_gt.png", USAGE
        )
    sequences = sorted({pair[1].parent for pair in found})
    out = [] if settings.validate_on else sequences[-1:] if len(sequences) > 1 else []
    held = [pair for pair in found if pair[1].parent in out] or (
        [] if settings.validate_on else found[-max(len(found) // 20, 1) :]
    )
    kept = [pair for pair in found if pair not in held]
    return [Pairs(kept, decoded)], [Pairs(held, decoded)]


def _of_frames(settings: Train, decoded: Decoded) -> tuple[list[Source], list[Source]]:
    kept: list[list[Path]] = []
    held: list[list[Path]] = []
    longest = 13
    for folder in settings.frames:
        frames = pictures_in(folder)
        if len(frames) < 2 * longest:
            raise ImgtoolError(
                f"{len(frames)} frames in {folder}",
                f"at least {2 * longest} consecutive frames are needed",
                USAGE,
            )
        last = 0 if settings.validate_on else max(longest, len(frames) // 20)
        kept += windows(frames[: len(frames) - last], longest)
        held += windows(frames[len(frames) - last :], longest) if last else []
    return [Frames(kept, decoded)], [Frames(held, decoded)]


def load(settings: Train) -> tuple[Samples, Samples]:
    """Build the training and the held-out set from the folders that the settings name.

    Held out are the folders of ``validate_on``, else photographs chosen by a hash of their names
    (5 %), the last sequence of pairs and the last frames. Held-out crops are fixed: the same
    pixels, blur and noise for every run and every seed; all of them are blurred.

    Raises:
        ImgtoolError: Code 2, for folders that do not exist or hold too little.
    """
    if not (settings.photos or settings.pairs or settings.frames):
        raise ImgtoolError("no training data named", "give --photos DIR, --pairs DIR or --frames DIR", USAGE)
    decoded = Decoded()
    kept: list[Source] = []
    held: list[Source] = []
    for part in (_of_photos, _of_pairs, _of_frames):
        sources, out = part(settings, decoded)
        kept += sources
        held += out
    for folder in settings.validate_on:
        pairs = find_pairs(folder, settings.blur_folder)[0]
        held.append(Pairs(pairs, decoded) if pairs else Photographs(pictures_in(folder), 0.0, decoded))
    train = Samples(kept, settings.crop, settings.seed, settings.epoch_steps * settings.batch)
    return train, Samples(held, settings.crop, VALIDATION_SEED, settings.held_out, augment=False)
