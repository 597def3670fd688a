"""Training on mosaics and the photographs that belong to them: crops that keep their colours.

Flips and turns move red to another place of the 2x2 block. So a crop begins, before it is turned, where red
comes to lie first once it is: the planes keep their names, and mosaic and photograph their places, to the
pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from imgtool import files, images, mosaic, raw, samples, tiles
from imgtool.engines.isp import bayer, layouts, noise, unprocess
from imgtool.engines.isp.sample import Drawn
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.engines.isp.settings import Train
    from imgtool.mosaic import Mosaic

Added = tuple[float, float, float]
"""Least and largest shot noise that is drawn, and the share of frames that get none."""

SENSITIVE = 800
"""ISO above which LibRaw's rendering of a file is no target: it is noisy itself."""


class Frame(NamedTuple):
    """A mosaic, its noise known or measured, and its target, ``(H, W, 3)`` uint8 sRGB, pixel upon pixel."""

    mosaic: Mosaic
    target: npt.NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        """Memory that both take."""
        return self.mosaic.values.nbytes + self.target.nbytes


# --- reading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """Reads frames by the paths of their mosaics."""

    pairs: Mapping[Path, layouts.Files]
    demosaic: str

    def __call__(self, path: Path, least: int) -> Any:
        each = self.pairs[path]
        frame, target = layouts.read_pair(each)
        if target is None:
            if each.facts.layout != layouts.RENDERED:
                raise ImgtoolError(f"no partner of {path}", layouts.LISTED)
            target = raw.render(path, layouts.balance(frame), demosaic=self.demosaic, upright=False)
            frame = layouts.to_size(frame, target, each)
        known = frame.noise or noise.estimate(frame)
        return Frame(replace(frame, noise=known), images.convert(target, np.uint8))


class Frames(samples.Decoded):
    """Frames by the paths of their mosaics, the least recently used dropped when they exceed a budget."""

    def __init__(self, pairs: Mapping[Path, layouts.Files], demosaic: str, budget: int) -> None:
        """Hold up to ``budget`` bytes.

        Args:
            pairs: Path of a mosaic to the pair.
            demosaic: LibRaw's algorithm, where it renders the target.
            budget: Bytes.
        """
        super().__init__(_Reader(pairs, demosaic), budget)
        self._of = (pairs, demosaic, budget)

    def __reduce__(self) -> tuple[type[Frames], tuple[Any, ...]]:
        """Come empty to a worker process."""
        return Frames, self._of

    def source(self, path: Path) -> str:
        """Return the photograph that the pair of a mosaic's path was made from; see ``layouts.Facts``."""
        return self._of[0][path].facts.source

    def frame(self, path: Path) -> Frame:
        """Return the frame of a mosaic's path.

        Raises:
            ImgtoolError: As ``layouts.read_pair``; or no partner, or LibRaw cannot render it.
        """
        return cast("Frame", self(path))


# --- crops -----------------------------------------------------------------------------------


class Turn(NamedTuple):
    """One of the eight symmetries of a square: mirrored first, then turned by quarters counterclockwise."""

    mirror: bool = False
    quarters: int = 0

    def __call__(self, picture: layouts.Picture) -> layouts.Picture:
        """Turn ``(H, W, ...)``."""
        return np.rot90(picture[:, ::-1] if self.mirror else picture, self.quarters)

    def corner(self) -> tuple[int, int]:
        """Return which corner of a square comes to lie first: 0 the upper or left, 1 the lower or right."""
        row, column = divmod(int(self(np.arange(4).reshape(2, 2))[0, 0]), 2)
        return row, column


def cut(frame: Frame, crop: int, turn: Turn, rng: np.random.Generator) -> Frame:
    """Cut the same square out of mosaic and target and turn both, red first in the turned mosaic.

    Args:
        frame: Both; mirrored at their edges where they are too small.
        crop: Edge of the square, even.
        turn: How it is turned.
        rng: Draws the place.

    Returns:
        ``(crop, crop)`` RGGB with its own black levels, and ``(crop, crop, 3)`` uint8.
    """
    before, corner, size = bayer.phase(frame.mosaic.pattern), turn.corner(), frame.mosaic.values.shape
    starts = [
        _start(first, first + edge - crop, parity, rng)
        for first, edge, parity in zip(before, size, corner, strict=True)
    ]
    places = np.ix_(*(
        tiles.mirrored(start - first, start - first + crop, edge)
        for start, first, edge in zip(starts, before, size, strict=True)
    ))  # fmt: skip
    block = np.roll(np.reshape(bayer.rggb_black(frame.mosaic), (2, 2)), corner, (0, 1))
    first, second, third, fourth = turn(block).ravel().tolist()
    square = replace(
        frame.mosaic,
        values=np.ascontiguousarray(turn(frame.mosaic.values[places])),
        pattern="RGGB",
        black=(first, second, third, fourth),
        crop=None,
        flip=0,
    )
    return Frame(square, turn(frame.target[places]))


def _start(first: int, last: int, parity: int, rng: np.random.Generator) -> int:
    """Draw an even place from first to last, odd for parity 1; where there is none, the one before."""
    low = first + (first + parity) % 2
    if low > last:
        return first - (first + parity) % 2
    return low + 2 * int(rng.integers((last - low) // 2 + 1))


@dataclass
class Pairs:
    """Mosaics and their targets, as a source of samples.

    Attributes:
        paths: Of the mosaics.
        frames: Where they are read.
        scaling: "levels", or "mai21": as the original has it, value / 1020, nothing subtracted.
        augment: Whether crops are flipped and turned.
        added: Noise that is added to the mosaics; None adds none.
    """

    paths: Sequence[Path]
    frames: Frames
    scaling: str = "levels"
    augment: bool = True
    added: Added | None = None

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.paths)

    def draw(self, index: int, rng: np.random.Generator, crop: int) -> Drawn:
        """Cut a crop of a pair."""
        frame = self.frames.frame(self.paths[index])
        turn = Turn(bool(rng.integers(2)), int(rng.integers(4))) if self.augment else Turn()
        square, target = cut(frame, crop, turn, rng)
        if self.added is not None:
            square = _with_noise(square, self.added, rng)
        photo = target.transpose(2, 0, 1)
        if self.scaling == "mai21":
            scale = np.float32(layouts.WHITE / (bayer.MAI21_WHITE * square.white))
            packed = bayer.pack(square.values * scale)
            return Drawn(packed, (1.0, 1.0, 1.0), np.eye(3), (0.0, 0.0), photo, square)
        packed = bayer.pack(bayer.window(square, (0, crop), (0, crop)))
        matrix = np.eye(3) if square.matrix is None else square.matrix
        return Drawn(packed, layouts.balance(square), matrix, square.noise or (0.0, 0.0), photo, square)

    def names(self) -> list[str]:
        """Return the photograph that each pair was made from; see ``layouts.Facts``."""
        return [self.frames.source(path) for path in self.paths]


def _with_noise(frame: Mosaic, levels: Added, rng: np.random.Generator) -> Mosaic:
    """Add noise to an RGGB frame, in whole numbers; what is white stays white, and nothing gets beyond."""
    shot, read = unprocess.draw_noise(rng, *levels)
    black = np.tile(np.reshape(frame.black, (2, 2)), np.array(frame.values.shape) // 2).astype(np.float32)
    span = np.float32(frame.white) - black
    values = (frame.values - black) / span
    deviation = np.sqrt(np.float32(shot) * np.maximum(values, 0) + np.float32(read))
    noisy = black + span * (values + deviation * rng.standard_normal(values.shape, np.float32))
    whole = np.rint(np.clip(noisy, 0, frame.white)).astype(np.uint16)
    own = frame.noise or (0.0, 0.0)
    added = (own[0] + shot, own[1] + read + (layouts.rounding(frame) if shot or read else 0.0))
    return replace(frame, values=np.where(values < 1, whole, frame.values), noise=added)


# --- training --------------------------------------------------------------------------------

Split = tuple[list[Pairs], list[Pairs]]


def load(settings: Train, added: Added, budget: int) -> Split:
    """Return what is trained on and what is held out of ``data`` and ``raws``.

    A folder's own val split is held out, else its test split, where they have photographs; where it has
    neither, pairs are chosen by a hash of the names of their sources (5 %). Held-out crops are not turned.

    Args:
        settings: Of the training.
        added: Noise that the mosaics of ``raws`` get.
        budget: Bytes of frames to keep.

    Raises:
        ImgtoolError: Code 2, for folders that do not exist or hold too little; code 1, where a mosaic to
            train on has no partner.
    """
    kept: list[layouts.Files] = []
    held: list[layouts.Files] = []
    for folder in settings.data:
        train, out = split(folder)
        kept += train
        held += out
    apart = {each.raw.resolve() for each in held}
    kept = [each for each in kept if each.raw.resolve() not in apart]  # folders may overlap
    raws, raws_held = _of_raws(settings.raws)
    found = {each.raw: each for each in (*kept, *held, *raws, *raws_held)}
    frames = Frames(found, settings.demosaic, budget)

    def source(chosen: Sequence[layouts.Files], noise: Added | None, *, augment: bool = True) -> Pairs:
        once = {each.raw.resolve(): each.raw for each in chosen}
        return Pairs(list(once.values()), frames, settings.scaling, augment, noise)

    return (
        [source(kept, None), source(raws, added)],
        [source(held, None, augment=False), source(raws_held, added, augment=False)],
    )


def split(folder: Path) -> tuple[list[layouts.Files], list[layouts.Files]]:
    """Return the pairs of a folder to train on, and those that are held out.

    Raises:
        ImgtoolError: Code 2, where there are fewer than two pairs; code 1, where one to train on lacks its
            partner.
    """
    found = layouts.files_of(folder)
    parts = {name: [each for each in found if each.facts.split == name] for name in layouts.SPLITS}
    whole = {name: [each for each in part if each.rgb] for name, part in parts.items()}
    held = whole["val"] or whole["test"]
    kept = [each for each in found if each.facts.split in ("train", "")]
    if not kept:
        kept, held = [each for part in whole.values() for each in part], []
    for each in kept:
        if each.rgb is None:
            raise ImgtoolError(f"no partner of {each.raw}", layouts.LISTED)
    if not held:
        kept, held = samples.split(kept, lambda each: each.facts.source)
    if not (kept and held):
        raise ImgtoolError(f"fewer than two pairs in {folder}", "name a folder with more by --data", USAGE)
    return kept, held


class _Seen(NamedTuple):
    """What is known of a RAW file before a training.

    Attributes:
        fault: Why it cannot be trained on, "" where it can.
        iso: Its sensitivity, 0 where unknown.
        balanced: Whether its white balance is known, the camera's or daylight's.
    """

    fault: str = ""
    iso: float = 0.0
    balanced: bool = True


@lru_cache(maxsize=1 << 16)
def _look(path: Path, _changed: int) -> _Seen:
    try:
        frame = mosaic.read(path)
    except ImgtoolError as fault:
        return _Seen(fault.what)
    return _Seen("", frame.exif.get("iso") or 0.0, bool(frame.gains or frame.daylight))


def _looked_at(folders: Sequence[Path]) -> dict[Path, _Seen]:
    """Decode every RAW file of folders, once in a process: a bad one would stop the training later."""
    paths = [path for path in samples.distinct(folders).values() if path.suffix.lower() in files.RAW]
    return {path: _look(path, path.stat().st_mtime_ns) for path in paths}


def _of_raws(folders: Sequence[Path]) -> tuple[list[layouts.Files], list[layouts.Files]]:
    seen = _looked_at(folders)
    paths = [path for path, each in seen.items() if not each.fault]
    if folders and len(paths) < 2:
        first = next((f": {each.fault}" for each in seen.values() if each.fault), "")
        what = f"fewer than two RAW files that can be read{first}"
        raise ImgtoolError(what, "name a folder of RAW files by --raws", USAGE)
    found = [layouts.Files(path, None, layouts.Facts(layouts.RENDERED, source=path.stem)) for path in paths]
    return samples.split(found, lambda each: each.facts.source) if found else ([], [])


def warning(settings: Train) -> str:
    """Return what a user should know of the RAW files that are rendered, "" where there is nothing."""
    seen = _looked_at(settings.raws)
    faults = [each.fault for each in seen.values() if each.fault]
    noisy = [path for path, each in seen.items() if each.iso > SENSITIVE]
    bare = [path for path, each in seen.items() if not each.balanced]
    words = []
    if faults:
        left = f"{len(faults)} of {len(seen)} RAW files cannot be used and are left out: {faults[0]}"
        words.append(f"{left} (imgtool data inspect tells of each)")
    if noisy:
        words.append(
            f"{len(noisy)} of {len(seen)} RAW files were shot above ISO {SENSITIVE}, as {noisy[0]}: the "
            "noise of their renderings is learnt too"
        )
    if bare:
        words.append(
            f"{len(bare)} of {len(seen)} RAW files say no white balance, as {bare[0]}: they are rendered "
            "and learnt with gains of 1"
        )
    return "; ".join(words)
