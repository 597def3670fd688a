"""Where data sets of mosaics and photographs lie, and how a pair of them is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imgtool import files, images, mosaic, raw
from imgtool.engines.isp import bayer, unprocess
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.mosaic import Mosaic

Picture = npt.NDArray[Any]

LIST = "samples.jsonl"
PHOTOS = frozenset(files.READABLE - files.RAW)
"""Suffixes of the photographs of pairs."""

SPLITS = ("train", "val", "test")
APART = "full_resolution"
"""Folder of the Zurich data set whose photographs are not aligned with its RAW files."""

LISTED = "imgtool data check isp lists all such pairs"


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


def of_another_camera(folder: Path) -> bool:
    """Tell whether a folder holds pairs of two cameras, of a phone and one that is better."""
    return any(group.layout.black is not None for group in groups(folder))


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
        known = (known[0], max(known[1], rounding(frame)))
    return replace(frame, gains=each.facts.gains or frame.gains, noise=known)


def rounding(frame: Mosaic) -> float:
    """Return the variance of whole numbers, white 1."""
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
    return to_size(frame, target, each), target


def to_size(frame: Mosaic, target: Picture, each: Files) -> Mosaic:
    """Cut a mosaic to the pixels of its target.

    Raises:
        ImgtoolError: Their sizes differ.
    """
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
