"""Mosaics with the photographs that belong to them: folders, reading, crops that keep their colours.

Flips and turns move red to another place of the 2x2 block. So a crop begins, before it is turned, where red
comes to lie first once it is: the planes keep their names, and mosaic and photograph their places, to the
pixel.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from imgtool import files, images, mosaic, raw, samples, tiles
from imgtool.engines.isp import bayer, noise, unprocess
from imgtool.engines.isp.sample import Drawn
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.engines.isp.settings import Train
    from imgtool.mosaic import Mosaic

Picture = npt.NDArray[Any]
Added = tuple[float, float, float]
"""Least and largest shot noise that is drawn, and the share of frames that get none."""

LIST = "samples.jsonl"
PHOTOS = frozenset(files.READABLE - files.RAW)
"""Suffixes of the photographs of pairs."""

SPLITS = ("train", "val", "test")
APART = "full_resolution"
"""Folder of the Zurich data set whose photographs are not aligned with its RAW files."""

LISTED = "imgtool data check isp lists all such pairs"

LOOKED_AT = 40
"""RAW files whose sensitivity is looked at."""

SENSITIVE = 800
"""ISO above which LibRaw's rendering of a file is no target: it is noisy itself."""


@dataclass(frozen=True)
class Layout:
    """How a data set lays out its folders, and what its PNG mosaics (RGGB, 10 bits) hold.

    Attributes:
        name: What records call it.
        raws: Name of the folder of mosaics.
        photos: Name of the folder of photographs beside it.
        black: Levels of the four places of the pattern; None where the files say it themselves.
    """

    name: str
    raws: str
    photos: str
    black: tuple[float, float, float, float] | None = None

    @property
    def suffixes(self) -> frozenset[str]:
        """Suffixes of the mosaics."""
        return frozenset({".png"}) if self.black else files.RAW | {".png"}


BITS = 10
WHITE = 1023.0
"""Of the PNG mosaics of both challenges."""

LAYOUTS = (
    Layout("mai21", "mediatek_raw", "fujifilm", (58.0, 60.0, 61.0, 62.0)),
    Layout("zurich", "huawei_raw", "canon", (63.0, 63.0, 63.0, 63.0)),
    Layout("made", "raw", "rgb"),
)
"""Of the Mobile AI 2021 challenge, the Zurich RAW-to-RGB data set, and data synth and data render."""

RENDERED = Layout("rendered", "", "")
"""RAW files alone: LibRaw renders the target."""


@dataclass(frozen=True)
class Facts:
    """What is known of a pair beside its files.

    Attributes:
        layout: How it was found.
        split: "train", "val", "test"; "" where the folder does not say.
        source: The photograph that it was made from: what stays on one side when pairs are held out.
        noise: Shot and read variance, white 1, where the folder's list says it.
    """

    layout: Layout
    split: str = ""
    source: str = ""
    noise: tuple[float, float] | None = None


class Files(NamedTuple):
    """A mosaic's file, its photograph's (None where there is none), and what is known of them."""

    raw: Path
    rgb: Path | None
    facts: Facts


class Frame(NamedTuple):
    """A mosaic, its noise known or measured, and its target, ``(H, W, 3)`` uint8 sRGB, pixel upon pixel."""

    mosaic: Mosaic
    target: npt.NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        """Memory that both take."""
        return self.mosaic.values.nbytes + self.target.nbytes


# --- folders ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """A folder of mosaics and that of their photographs.

    Attributes:
        layout: Which.
        folder: Where both lie.
        split: "train", "val", "test", or "".
        raws: The mosaics, sorted.
        photos: Stem to photograph.
        rows: Stem to what ``samples.jsonl`` says.
    """

    layout: Layout
    folder: Path
    split: str
    raws: Sequence[Path]
    photos: Mapping[str, Path]
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def files(self) -> list[Files]:
        """Return the mosaics with their partners."""
        return [Files(raw, self.photos.get(raw.stem), self._facts(raw.stem)) for raw in self.raws]

    def lonely(self) -> list[Path]:
        """Return what lacks its partner; a val or test split without any photograph lacks none."""
        if self.split in ("val", "test") and not self.photos:
            return []
        stems = {raw.stem for raw in self.raws}
        return [raw for raw in self.raws if raw.stem not in self.photos] + [
            photo for stem, photo in self.photos.items() if stem not in stems
        ]

    def _facts(self, stem: str) -> Facts:
        row = self.rows.get(stem, {})
        shot, read = row.get("shot"), row.get("read")
        known = isinstance(shot, int | float) and isinstance(read, int | float)
        noise = (float(shot), float(read)) if known else None  # type: ignore[arg-type]
        source = Path(str(row["photo"])).stem if "photo" in row else stem
        return Facts(self.layout, self.split, source, noise)


def groups(folder: Path) -> list[Group]:
    """Find the folders of pairs in a folder, at any depth.

    Raises:
        ImgtoolError: Code 2: no such folder, or none of a known layout in it.
    """
    if not folder.is_dir():
        raise ImgtoolError(f"no such folder: {folder}", "check the path", USAGE)
    found = [_group(parent, layout) for parent, layout in _laid_out(folder)]
    if not any(group.raws for group in found):
        pairs = [f"{layout.raws}/ beside {layout.photos}/" for layout in LAYOUTS]
        hint = f"expected {', '.join(pairs[:-1])} or {pairs[-1]}"
        raise ImgtoolError(f"no pairs in {folder}", hint, USAGE)
    return found


def _laid_out(folder: Path) -> Iterator[tuple[Path, Layout]]:
    for place, names, _ in os.walk(folder):
        names.sort()
        for layout in LAYOUTS:
            # The folder of the test split may lack its photographs, but "raw" alone says nothing.
            here = layout.raws in names and (layout.black is not None or layout.photos in names)
            if here and Path(place).name != APART:
                yield Path(place), layout
                names[:] = [name for name in names if name not in (layout.raws, layout.photos)]


def _group(folder: Path, layout: Layout) -> Group:
    split = folder.resolve().name
    photos = folder / layout.photos
    lines = files.json_lines(folder / LIST) if (folder / LIST).exists() else []
    return Group(
        layout,
        folder,
        split if split in SPLITS else "",
        _listed(folder / layout.raws, layout.suffixes),
        {path.stem: path for path in _listed(photos, PHOTOS)} if photos.is_dir() else {},
        {str(row.get("name")): row for row in lines},
    )


def _listed(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    names = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in names if path.suffix.lower() in suffixes)


def files_of(folder: Path) -> list[Files]:
    """Return the pairs of a folder, and mosaics without a partner, sorted.

    Raises:
        ImgtoolError: Code 2, as ``groups``.
    """
    return [each for group in groups(folder) for each in group.files()]


# --- reading ---------------------------------------------------------------------------------


def read_mosaic(each: Files) -> Mosaic:
    """Read a pair's mosaic; the layout says the levels of PNG files.

    Raises:
        ImgtoolError: It cannot be read.
    """
    layout = each.facts.layout
    if layout.black is None:
        return mosaic.read(each.raw)
    read = mosaic.read(each.raw, mosaic.Stated(bits=BITS))
    return replace(read, black=layout.black, white=WHITE)


def read_pair(each: Files) -> tuple[Mosaic, Picture | None]:
    """Read a mosaic and its photograph, cut to the same pixels.

    Returns:
        The mosaic, and ``(H, W, 3)`` sRGB uint8 or uint16 of the same height and width, as the sensor lies;
        None without a photograph. Where the photograph has the size of the camera's crop, both are of that.

    Raises:
        ImgtoolError: One cannot be read, or their sizes differ.
    """
    frame = read_mosaic(each)
    if each.rgb is None:
        return frame, None
    target = images.read(each.rgb).pixels
    if target.dtype.kind == "f":
        target = images.convert(target, np.uint16)
    return _to_size(frame, target, each), target


def _to_size(frame: Mosaic, target: Picture, each: Files) -> Mosaic:
    size = target.shape[:2]
    if size == frame.values.shape:
        return frame
    if frame.crop is not None and size == frame.crop[2:]:
        return within(frame, frame.crop)
    first, second = (f"{width}x{height}" for height, width in (frame.values.shape, size))
    turned = size == frame.values.shape[::-1]
    hint = "give it as the sensor lies, not turned" if turned else LISTED
    raise ImgtoolError(f"sizes differ: {each.raw} has {first}, {each.rgb} {second}", hint)


def within(frame: Mosaic, crop: tuple[int, int, int, int]) -> Mosaic:
    """Return a part of a mosaic: top, left, height, width, all inside."""
    top, left, height, width = crop
    places = [2 * ((row + top) % 2) + (column + left) % 2 for row, column in bayer.PLACES]
    first, second, third, fourth = (frame.black[place] for place in places)
    return replace(
        frame,
        values=np.ascontiguousarray(frame.values[top : top + height, left : left + width]),
        pattern="".join(frame.pattern[place] for place in places),
        black=(first, second, third, fourth),
        crop=(0, 0, height, width),
    )


@dataclass(frozen=True)
class _Reader:
    """Reads frames by the paths of their mosaics."""

    pairs: Mapping[Path, Files]
    demosaic: str

    def __call__(self, path: Path, least: int) -> Any:
        each = self.pairs[path]
        frame, target = read_pair(each)
        if target is None:
            if each.facts.layout != RENDERED:
                raise ImgtoolError(f"no partner of {path}", LISTED)
            target = raw.render(path, demosaic=self.demosaic, upright=False)
            frame = _to_size(frame, target, each)
        known = each.facts.noise or frame.noise or noise.estimate(frame)
        return Frame(replace(frame, noise=known), images.convert(target, np.uint8))


class Frames(samples.Decoded):
    """Frames by the paths of their mosaics, the least recently used dropped when they exceed a budget."""

    def __init__(self, pairs: Mapping[Path, Files], demosaic: str, budget: int) -> None:
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

    def frame(self, path: Path) -> Frame:
        """Return the frame of a mosaic's path.

        Raises:
            ImgtoolError: As ``read_pair``; or no partner, or LibRaw cannot render it.
        """
        return cast("Frame", self(path))


# --- crops -----------------------------------------------------------------------------------


class Turn(NamedTuple):
    """One of the eight symmetries of a square: mirrored first, then turned by quarters counterclockwise."""

    mirror: bool = False
    quarters: int = 0

    def __call__(self, picture: Picture) -> Picture:
        """Turn ``(H, W, ...)``."""
        return np.rot90(picture[:, ::-1] if self.mirror else picture, self.quarters)

    def corner(self) -> tuple[int, int]:
        """Return which corner of a square comes to lie first: 0 the upper or left, 1 the lower or right."""
        row, column = divmod(int(self(np.arange(4).reshape(2, 2))[0, 0]), 2)
        return row, column


def cut(frame: Frame, crop: int, turn: Turn, rng: np.random.Generator) -> tuple[Picture, Picture]:
    """Cut the same square out of mosaic and target and turn both, red first in the turned mosaic.

    Args:
        frame: Both; mirrored at their edges where they are too small.
        crop: Edge of the square, even.
        turn: How it is turned.
        rng: Draws the place.

    Returns:
        ``(crop, crop)`` float32 RGGB, black 0, white 1, and ``(crop, crop, 3)`` uint8.
    """
    before = bayer.phase(frame.mosaic.pattern)
    top, left = (
        _start(first, first + size - crop, parity, rng)
        for first, size, parity in zip(before, frame.mosaic.values.shape, turn.corner(), strict=True)
    )
    rows, columns = ((start - start % 2, start - start % 2 + crop + 2) for start in (top, left))
    values = bayer.window(frame.mosaic, rows, columns)
    values = values[top % 2 : top % 2 + crop, left % 2 : left % 2 + crop]
    down, across = (
        tiles.mirrored(start - first, start - first + crop, size)
        for start, first, size in zip((top, left), before, frame.target.shape, strict=False)
    )
    return np.ascontiguousarray(turn(values)), turn(frame.target[down][:, across])


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
        path = self.paths[index]
        frame = self.frames.frame(path)
        turn = Turn(bool(rng.integers(2)), int(rng.integers(4))) if self.augment else Turn()
        if self.scaling == "mai21":
            frame = Frame(_as_original(frame.mosaic), frame.target)
        values, target = cut(frame, crop, turn, rng)
        told = frame.mosaic.noise or (0.0, 0.0)
        if self.added is not None:
            values, told = _with_noise(values, told, self.added, rng)
        matrix = np.eye(3) if frame.mosaic.matrix is None else frame.mosaic.matrix
        return Drawn(bayer.pack(values), _gains(frame.mosaic), matrix, told, target.transpose(2, 0, 1))


def _as_original(frame: Mosaic) -> Mosaic:
    """Return a mosaic that is scaled by 1020 where its white is 1023, and of which nothing else is known."""
    white = frame.white * bayer.MAI21_WHITE / WHITE
    return replace(frame, black=(0.0,) * 4, white=white, gains=None, daylight=None, matrix=None, noise=None)


def _gains(frame: Mosaic) -> tuple[float, float, float]:
    known = frame.gains or frame.daylight
    return bayer.least_is_one(known) if known else (1.0, 1.0, 1.0)


def _with_noise(
    values: Picture,
    own: tuple[float, float],
    levels: Added,
    rng: np.random.Generator,
) -> tuple[Picture, tuple[float, float]]:
    """Add noise to ``(H, W)`` of black 0 and white 1; return it, and shot and read of all its noise."""
    shot, read = unprocess.draw_noise(rng, *levels, BITS)
    deviation = np.sqrt(np.float32(shot) * np.maximum(values, 0) + np.float32(read))
    noisy = values + deviation * rng.standard_normal(values.shape, np.float32)
    return noisy, (own[0] + shot, own[1] + read)


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
    kept: list[Files] = []
    held: list[Files] = []
    for folder in settings.data:
        train, out = split(folder)
        kept += train
        held += out
    apart = {each.raw.resolve() for each in held}
    kept = [each for each in kept if each.raw.resolve() not in apart]  # folders may overlap
    raws, raws_held = _of_raws(settings.raws)
    found = {each.raw: each for each in (*kept, *held, *raws, *raws_held)}
    frames = Frames(found, settings.demosaic, budget)

    def source(chosen: Sequence[Files], noise: Added | None, *, augment: bool = True) -> Pairs:
        once = {each.raw.resolve(): each.raw for each in chosen}
        return Pairs(list(once.values()), frames, settings.scaling, augment, noise)

    return (
        [source(kept, None), source(raws, added)],
        [source(held, None, augment=False), source(raws_held, added, augment=False)],
    )


def split(folder: Path) -> tuple[list[Files], list[Files]]:
    """Return the pairs of a folder to train on, and those that are held out.

    Raises:
        ImgtoolError: Code 2, where there are fewer than two pairs; code 1, where one to train on lacks its
            partner.
    """
    found = files_of(folder)
    parts = {name: [each for each in found if each.facts.split == name] for name in SPLITS}
    whole = {name: [each for each in part if each.rgb] for name, part in parts.items()}
    held = whole["val"] or whole["test"]
    kept = [each for each in found if each.facts.split in ("train", "")]
    if not kept:
        kept, held = [each for part in whole.values() for each in part], []
    for each in kept:
        if each.rgb is None:
            raise ImgtoolError(f"no partner of {each.raw}", LISTED)
    if not held:
        kept, held = samples.split(kept, lambda each: each.facts.source)
    if not (kept and held):
        raise ImgtoolError(f"fewer than two pairs in {folder}", "name a folder with more by --data", USAGE)
    return kept, held


def _of_raws(folders: Sequence[Path]) -> tuple[list[Files], list[Files]]:
    paths = [path for path in samples.distinct(folders).values() if path.suffix.lower() in files.RAW]
    if folders and len(paths) < 2:
        raise ImgtoolError("fewer than two RAW files found", "name a folder of RAW files by --raws", USAGE)
    found = [Files(path, None, Facts(RENDERED, source=path.stem)) for path in paths]
    return samples.split(found, lambda each: each.facts.source) if found else ([], [])


def of_another_camera(folder: Path) -> bool:
    """Tell whether a folder holds pairs of two cameras, of a phone and one that is better."""
    return any(group.layout.black is not None for group in groups(folder))


def warning(settings: Train) -> str:
    """Return what a user should know of the RAW files that are rendered, "" where there is nothing.

    Looks at no more than ``LOOKED_AT`` of them, evenly over all.
    """
    paths = [each.raw for part in _of_raws(settings.raws) for each in part]
    some = paths[:: math.ceil(len(paths) / LOOKED_AT) or 1]
    noisy = [path for path in some if (mosaic.read(path).exif.get("iso") or 0) > SENSITIVE]
    if not noisy:
        return ""
    return (
        f"{len(noisy)} of {len(some)} RAW files were shot above ISO {SENSITIVE}, as {noisy[0]}: the noise of "
        "their renderings is learnt too"
    )
