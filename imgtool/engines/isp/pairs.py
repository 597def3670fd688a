"""Mosaics with the photographs that belong to them: folders, reading, crops that keep their colours.

Flips and turns move red to another place of the 2x2 block. So a crop begins, before it is turned, where red
comes to lie first once it is: the planes keep their names, and mosaic and photograph their places, to the
pixel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
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

MADE = Layout("made", "raw", "rgb")
"""Of what data synth and data render write."""

LAYOUTS = (
    Layout("mai21", "mediatek_raw", "fujifilm", (58.0, 60.0, 61.0, 62.0)),
    Layout("zurich", "huawei_raw", "canon", (63.0, 63.0, 63.0, 63.0)),
    MADE,
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
        gains: White balance that the photograph has, red, green (1), blue, where the folder's list says it.
    """

    layout: Layout
    split: str = ""
    source: str = ""
    noise: tuple[float, float] | None = None
    gains: tuple[float, float, float] | None = None


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
        return Facts(self.layout, self.split, str(row.get("photo", stem)), noise, _listed_gains(row))


def _listed_gains(row: Mapping[str, Any]) -> tuple[float, float, float] | None:
    found = row.get("gains")
    if not (isinstance(found, list) and len(found) == 3 and raw.usable(found)):
        return None
    red, green, blue = found
    return red / green, 1.0, blue / green


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
    """Read a pair's mosaic; the layout says the levels of PNG files, the list the balance.

    Its noise is what the file says, else what the list says, and not less than that of whole numbers.

    Raises:
        ImgtoolError: It cannot be read.
    """
    layout = each.facts.layout
    if layout.black is None:
        frame = mosaic.read(each.raw)
    else:
        read = mosaic.read(each.raw, mosaic.Stated(bits=BITS))
        frame = replace(read, black=layout.black, white=WHITE)
    known = frame.noise or each.facts.noise
    if known:
        known = (known[0], max(known[1], _rounding(frame)))
    return replace(frame, gains=each.facts.gains or frame.gains, noise=known)


def _rounding(frame: Mosaic) -> float:
    return unprocess.rounding(frame.white - float(np.mean(frame.black)))


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


def balance(frame: Mosaic) -> tuple[float, float, float]:
    """Return the gains to train a frame with: the camera's, else daylight's, else 1; the least is 1."""
    known = frame.gains or frame.daylight
    return bayer.least_is_one(known) if known else (1.0, 1.0, 1.0)


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
            target = raw.render(path, balance(frame), demosaic=self.demosaic, upright=False)
            frame = _to_size(frame, target, each)
        known = frame.noise or noise.estimate(frame)
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

    def source(self, path: Path) -> str:
        """Return the photograph that the pair of a mosaic's path was made from; see ``Facts``."""
        return self._of[0][path].facts.source

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
            packed = bayer.pack(square.values * np.float32(WHITE / (bayer.MAI21_WHITE * square.white)))
            return Drawn(packed, (1.0, 1.0, 1.0), np.eye(3), (0.0, 0.0), photo, square)
        packed = bayer.pack(bayer.window(square, (0, crop), (0, crop)))
        matrix = np.eye(3) if square.matrix is None else square.matrix
        return Drawn(packed, balance(square), matrix, square.noise or (0.0, 0.0), photo, square)

    def names(self) -> list[str]:
        """Return the photograph that each pair was made from; see ``Facts``."""
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
    added = (own[0] + shot, own[1] + read + (_rounding(frame) if shot or read else 0.0))
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


def _of_raws(folders: Sequence[Path]) -> tuple[list[Files], list[Files]]:
    seen = _looked_at(folders)
    paths = [path for path, each in seen.items() if not each.fault]
    if folders and len(paths) < 2:
        first = next((f": {each.fault}" for each in seen.values() if each.fault), "")
        what = f"fewer than two RAW files that can be read{first}"
        raise ImgtoolError(what, "name a folder of RAW files by --raws", USAGE)
    found = [Files(path, None, Facts(RENDERED, source=path.stem)) for path in paths]
    return samples.split(found, lambda each: each.facts.source) if found else ([], [])


def of_another_camera(folder: Path) -> bool:
    """Tell whether a folder holds pairs of two cameras, of a phone and one that is better."""
    return any(group.layout.black is not None for group in groups(folder))


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
