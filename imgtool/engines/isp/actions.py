"""What ``imgtool data`` does for the isp engine: say what RAW files hold, make pairs, check folders.

``synth`` and ``render`` keep a list of what they wrote and add a row as soon as a pair is on disk. The same
command given again goes on where it was interrupted; a folder of other pairs is refused.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from imgtool import dng, files, images, mosaic, raw, samples, sheets
from imgtool.engine import Watch
from imgtool.engines.isp import bayer, check, colour, noise, unprocess
from imgtool.engines.isp.layouts import LIST, MADE, balance
from imgtool.engines.isp.unprocess import Recipe
from imgtool.errors import USAGE, ImgtoolError, did_you_mean
from imgtool.mosaic import Mosaic

if TYPE_CHECKING:
    from imgtool.engines.isp.settings import Inspect, Render, Synth

Row = dict[str, Any]
Picture = npt.NDArray[np.uint8]

PREVIEW = "preview.png"
RAW, RGB = MADE.raws, MADE.photos
PERCENTILES = (1, 50, 99, 99.9)
SHOWN, EDGE = 6, 320
"""Pairs on the preview, and the edge of what is shown of each, in pixels."""
LEAST = 16
"""Shortest side of a photo that is taken."""
MOST_SHOT = 0.1
NO_SHOT = 1e-8
"""What stands for no shot noise in a DNG, where it has to be above 0."""


# --- inspect ---------------------------------------------------------------------------------


def inspect(settings: Inspect, watch: Watch) -> Mapping[str, object]:
    """Read RAW files and say what each holds.

    Returns:
        The record: how many files and how many of them can be read, an entry for each file, and the
        faults of those that cannot. Levels are raw integers; noise is given with black at 0, white at 1.

    Raises:
        ImgtoolError: Code 2: no such file, or none in a folder.
    """
    paths = _raws(settings.inputs)
    black = mosaic.blacks(settings.black)
    stated = mosaic.Stated(settings.size, settings.pattern, settings.bits, black, settings.white)
    entries: list[Row] = []
    for number, path in enumerate(paths, 1):
        try:
            entries.append({"input": str(path), **_facts(mosaic.read(path, stated))})
        except ImgtoolError as fault:
            entries.append({"input": str(path), "error": fault.what, "hint": fault.hint})
        watch.done(number, len(paths))
    faults = [entry["error"] for entry in entries if "error" in entry]
    return {"inputs": len(paths), "readable": len(paths) - len(faults), "files": entries, "faults": faults}


def _raws(inputs: Iterable[Path]) -> list[Path]:
    found = [item.source for item in files.expand([str(path) for path in inputs], files.RAW)]
    paths = [path for path in found if path is not None]
    if len(paths) < len(found):
        raise ImgtoolError("standard input is not read here", "name files or folders", USAGE)
    return paths


def _facts(frame: Mosaic) -> Row:
    height, width = frame.values.shape
    crop = frame.crop and dict(zip(("top", "left", "height", "width"), frame.crop, strict=True))
    shot, read = frame.noise or noise.estimate(frame)
    return {
        "camera": frame.camera or None,
        "width": width,
        "height": height,
        "crop": crop,
        "flip": frame.flip,
        "pattern": frame.pattern,
        "black": list(frame.black),
        "white": frame.white,
        "bits": math.ceil(frame.white).bit_length(),
        **_levels(frame),
        "gains": frame.gains and list(frame.gains),
        "daylight": frame.daylight and list(frame.daylight),
        "matrix": None if frame.matrix is None else frame.matrix.tolist(),
        "matrix_source": frame.matrix_source or None,
        "noise": {"shot": shot, "read": read, "source": "file" if frame.noise else "measured"},
        "exif": dict(frame.exif),
        "warnings": list(frame.warnings),
    }


def _levels(frame: Mosaic) -> Row:
    """Return percentiles of the raw integers, and the share of the pixels that are white, of R, G and B."""
    counts = []
    for letter in "RGB":
        places = [place for place, each in enumerate(frame.pattern) if each == letter]
        parts = [frame.values[place // 2 :: 2, place % 2 :: 2].ravel() for place in places]
        counts.append(np.bincount(np.concatenate(parts), minlength=1 << 16))
    below = np.cumsum(counts, axis=1)
    totals = below[:, -1]
    percentiles = {
        f"{percent:g}": [
            int(np.searchsorted(ends, math.ceil(percent / 100 * int(ends[-1])))) for ends in below
        ]
        for percent in PERCENTILES
    }
    white = np.asarray(counts)[:, math.ceil(frame.white) :].sum(axis=1)
    return {"percentiles": percentiles, "saturated": (white / totals).tolist()}


# --- folders of pairs ------------------------------------------------------------------------


class Pairs:
    """A folder of pairs being written, ``raw/NAME.*`` and ``rgb/NAME.png``, with the list of those there."""

    def __init__(self, folder: Path, wanted: Mapping[str, Row]) -> None:
        """Take up a folder: a new one, or one that the same command left unfinished.

        Args:
            folder: Where ``raw/``, ``rgb/`` and the list go.
            wanted: The row of each pair by the pair's name; what is made may add to it.

        Raises:
            ImgtoolError: The folder holds other pairs, or all of these already.
        """
        self.folder, self.wanted, self._list = folder, wanted, folder / LIST
        rows = files.json_lines(self._list) if self._list.exists() else []
        self.rows: dict[str, Row] = {str(row.get("name")): row for row in rows}
        if not self._ours():
            raise ImgtoolError(f"{folder} already holds other pairs", "name another folder by -o")
        if len(self.rows) == len(wanted):
            raise ImgtoolError(f"{folder} already holds these pairs", "name another folder by -o")
        self._save()

    def _ours(self) -> bool:
        if not self._list.exists():
            return not any((self.folder / part).exists() for part in (RAW, RGB))
        return all(
            name in self.wanted and row == {**row, "name": name, **self.wanted[name]}
            for name, row in self.rows.items()
        )

    def _save(self) -> None:
        lines = (json.dumps(row) + "\n" for _, row in sorted(self.rows.items()))
        files.write(self._list, "".join(lines).encode())

    def _add(self, name: str) -> None:
        self.rows[name] = {"name": name, **self.wanted[name]}
        try:
            with self._list.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[name]) + "\n")
        except OSError as fault:
            what = f"cannot write {self._list}: {str(fault.strerror).lower()}"
            raise ImgtoolError(what, "free some space, then go on") from None

    def fill(self, make: Callable[[str], Callable[[], None]], watch: Watch) -> Row:
        """Make and write every pair that is not there yet.

        Args:
            make: Name to what writes the pair; raises ``ImgtoolError`` where the source cannot be used.
            watch: Told how it goes on.

        Returns:
            The record: folder, how many pairs are there and how many are new, and the faults of
            sources that could not be used; their pairs are left out.

        Raises:
            ImgtoolError: A file cannot be written.
        """
        missing = [name for name in self.wanted if name not in self.rows]
        faults: dict[str, None] = {}
        for number, name in enumerate(missing, 1):
            try:
                put = make(name)
            except ImgtoolError as fault:
                faults[fault.what] = None
            else:
                put()
                self._add(name)
            watch.done(number, len(missing))
        self._save()
        new = sum(name in self.rows for name in missing)
        return {"folder": str(self.folder), "pairs": len(self.rows), "new": new, "faults": list(faults)}


def _named(paths: Iterable[Path]) -> dict[str, Path]:
    """Return files by their stems, numbered where another before has the same."""
    found: dict[str, Path] = {}
    for path in paths:
        name, number = path.stem, 1
        while name in found:
            number += 1
            name = f"{path.stem}-{number}"
        found[name] = path
    return found


# --- synth -----------------------------------------------------------------------------------


def synth(settings: Synth, watch: Watch) -> Mapping[str, object]:
    """Write a DNG and its truth for each photo, at each noise, with a list of recipes and a preview.

    A recipe and its noise are functions of the photo's name and the seed alone. The DNG's colour matrix
    is scaled so that its white is daylight (D65): every program then renders the truth's colours.

    Raises:
        ImgtoolError: No photographs, wrong settings, or a folder that holds other pairs.
    """
    photos = _chosen(settings)
    shots: Sequence[float | None] = _shots(settings.shot) or [None]
    _check(settings)
    recipes: dict[str, Recipe] = {}
    sources: dict[str, str] = {}
    for photo in photos:
        for shot in shots:
            name = photo if shot is None else f"{photo}-shot{shot:g}"
            recipes[name], sources[name] = _recipe(settings, photo, shot), photo
    same = {"pattern": settings.pattern, "camera": settings.camera, "shrink": settings.shrink}
    wanted = {
        name: {**_origin(photos[sources[name]]), "seed": settings.seed, **same, **_row(recipe)}
        for name, recipe in recipes.items()
    }
    pairs = Pairs(settings.out, wanted)
    decoded = samples.Decoded(images.read_rgb8, 1)

    def make(name: str) -> Callable[[], None]:
        photo = _shrunk(decoded(photos[sources[name]]), photos[sources[name]], settings.shrink)
        rng = _randomness(settings.seed, 5, sources[name])
        frame, truth = _framed(photo, recipes[name], settings.pattern, rng)
        return lambda: _put(settings.out, name, frame, truth)

    record = pairs.fill(make, watch)
    _preview(pairs, f"raw frames made of photographs, seed {settings.seed}")
    return {**record, "photos": len(photos)}


def _chosen(settings: Synth) -> dict[str, Path]:
    paths = list(samples.distinct(settings.photos).values())
    if not paths:
        raise ImgtoolError("no photographs found", "name folders with photographs", USAGE)
    count = min(settings.count or len(paths), len(paths))
    picked = sorted(np.random.default_rng([settings.seed, 3]).permutation(len(paths))[:count])
    names = list(_named(paths).items())
    return dict(names[place] for place in picked)


def _shots(text: str) -> list[float]:
    words = [word for word in text.split(",") if word.strip()]
    try:
        found = [float(word) for word in words]
    except ValueError:
        found = [math.nan]
    if not all(0 <= shot <= MOST_SHOT for shot in found):
        hint = f"give numbers from 0 to {MOST_SHOT:g} with commas between them, as 0,1e-3,1e-2"
        raise ImgtoolError(f"--shot {text} makes no sense", hint, USAGE)
    return list(dict.fromkeys(found))


def _check(settings: Synth) -> None:
    if settings.camera and settings.camera not in unprocess.CAMERAS:
        hint = did_you_mean(settings.camera, unprocess.CAMERAS)
        raise ImgtoolError(f"no known camera named {settings.camera}", hint, USAGE)
    if settings.least_shot > settings.most_shot:
        what = f"--least-shot {settings.least_shot:g} is above --most-shot {settings.most_shot:g}"
        raise ImgtoolError(what, "raise --most-shot", USAGE)


def _randomness(seed: int, use: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, use, zlib.crc32(name.encode())])


def _recipe(settings: Synth, photo: str, shot: float | None) -> Recipe:
    """Draw what becomes of a photo; a stated shot noise brings the read noise that goes with it."""
    rng = _randomness(settings.seed, 4, photo)
    drawn = unprocess.draw(rng, settings.least_shot, settings.most_shot, settings.noise_free)
    black = (drawn.black << settings.bits) >> drawn.bits
    recipe = replace(drawn, bits=settings.bits, black=black)
    if settings.camera:
        recipe = replace(recipe, matrix=colour.camera_to_srgb(unprocess.xyz_to_camera(settings.camera)))
    if shot is None:
        return recipe
    hot = recipe.hot if shot else 0.0
    return replace(recipe, shot=shot, read=unprocess.typical_read(shot), hot=hot)


def _origin(path: Path) -> Row:
    """Return the photograph that a file is, or is a view of, as weights name it; and the file's name."""
    return {"photo": samples.indexed_source(path) or path.stem, "file": path.name}


def _row(recipe: Recipe) -> Row:
    return {
        "gains": list(recipe.gains),
        "matrix": recipe.matrix.tolist(),
        "shot": recipe.shot,
        "read": recipe.read,
        "bits": recipe.bits,
        "black": recipe.black,
        "exposure": recipe.exposure,
        "hot": recipe.hot,
    }


def _shrunk(photo: Picture, path: Path, times: float) -> Picture:
    """Return a photo shrunk by area averaging and cut to even sides."""
    height, width = (max(round(side / times), 1) for side in photo.shape[:2])
    if min(height, width) < LEAST:
        raise ImgtoolError(
            f"{path}: {width}x{height} pixels, less than {LEAST} along a side", "leave it out", USAGE
        )
    small = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA) if times > 1 else photo
    even: Picture = np.ascontiguousarray(small[: height // 2 * 2, : width // 2 * 2])
    return even


def _framed(photo: Picture, recipe: Recipe, pattern: str, rng: np.random.Generator) -> tuple[Mosaic, Picture]:
    """Return the frame of a photo, and its truth.

    A pattern other than RGGB begins within the first block: the two cut the same rows and columns off.
    """
    values, truth = unprocess.frame(photo, recipe, rng)
    cuts = [slice(cut, side - cut) for cut, side in zip(bayer.phase(pattern), values.shape, strict=True)]
    shot, read = unprocess.expected(recipe)
    neutral = 1 / np.asarray(recipe.gains)
    from_srgb = np.linalg.inv(recipe.matrix)
    frame = replace(
        unprocess.as_mosaic(values[cuts[0], cuts[1]], recipe),
        pattern=pattern,
        xyz_to_camera=neutral[:, None] * from_srgb @ np.linalg.inv(colour.SRGB_TO_XYZ),
        noise=(max(shot, NO_SHOT), read),
        camera="imgtool synthetic",
    )
    return frame, np.ascontiguousarray(truth[cuts[0], cuts[1]])


def _put(folder: Path, name: str, frame: Mosaic, truth: Picture) -> None:
    dng.write(folder / RAW / f"{name}.dng", frame)
    images.write(folder / RGB / f"{name}.png", images.Photo(truth))


def _preview(pairs: Pairs, title: str) -> None:
    """Write a sheet of the middle of some frames, halved as they are and enlarged, beside their truth."""
    names = sorted(pairs.rows)[:SHOWN]
    if not names:
        return
    truths = [images.read_rgb8(pairs.folder / RGB / f"{name}.png") for name in names]
    edge = min(EDGE, *(side for truth in truths for side in truth.shape[:2])) // 2 * 2
    frames = [mosaic.read(pairs.folder / RAW / f"{name}.dng") for name in names]
    rows = [pairs.rows[name] for name in names]
    columns = {
        "mosaic": np.stack([_glimpse(*pair, edge) for pair in zip(frames, rows, strict=True)]),
        "truth": np.stack([_middle(truth, edge) for truth in truths]),
    }
    captions = [f"{row['name']}: shot {row['shot']:.2g}, read {row['read']:.2g}" for row in rows]
    sheets.sheet(columns, pairs.folder / PREVIEW, title=title, captions=captions)


def _corner(shape: Sequence[int], edge: int) -> tuple[int, int]:
    """Return the first row and column, both even, of the square in the middle."""
    return (shape[0] - edge) // 4 * 2, (shape[1] - edge) // 4 * 2


def _middle(picture: Picture, edge: int) -> Picture:
    top, left = _corner(picture.shape, edge)
    return picture[top : top + edge, left : left + edge]


def _glimpse(frame: Mosaic, row: Row, edge: int) -> Picture:
    """Return the middle of a frame, each block of 2x2 one colour; it may lie a pixel off the truth."""
    top, left = _corner(frame.values.shape, edge)
    packed = bayer.pack(bayer.window(frame, (top, top + edge), (left, left + edge)))
    red, green, other, blue = torch.from_numpy(packed)
    gains = torch.tensor(row["gains"], dtype=torch.float32)[:, None, None]
    camera = (torch.stack([red, (green + other) / 2, blue]) * gains).clamp_max(1)
    shown = colour.render(camera[None], torch.tensor(row["matrix"], dtype=torch.float32))[0]
    small = (shown.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    whole: Picture = small.repeat(2, axis=0).repeat(2, axis=1)
    return whole


# --- render ----------------------------------------------------------------------------------


def render(settings: Render, watch: Watch) -> Mapping[str, object]:
    """Write LibRaw's rendering of each RAW file, as the sensor lies, beside the file itself.

    ``rgb/NAME.png`` has 16 bits and the size of all pixels that see light; ``raw/`` has a hard link, or a
    copy where the file system has none. Files that the engine does not read are faults. The list says the
    white balance: the camera's, else daylight's, else gains of 1.

    Raises:
        ImgtoolError: No such file, none in a folder, or a folder that holds other pairs.
    """
    sources = _named(_raws(settings.raws))
    wanted: dict[str, Row] = {
        name: {"raw": path.name, "demosaic": settings.demosaic} for name, path in sources.items()
    }

    def make(name: str) -> Callable[[], None]:
        """Render one file; return what keeps it."""
        path = sources[name]
        frame = mosaic.read(path)
        shape, gains = frame.values.shape, balance(frame)
        pixels = raw.render(path, gains, demosaic=settings.demosaic, upright=False)
        if pixels.shape[:2] != shape:
            sizes = [f"{width}x{height}" for height, width in (pixels.shape[:2], shape)]
            what = f"{path}: LibRaw renders {sizes[0]} pixels of {sizes[1]}"
            raise ImgtoolError(what, "leave it out: its pixels are not square")
        wanted[name]["gains"] = list(gains)
        return lambda: _keep(settings.out, name, path, pixels)

    return {**Pairs(settings.out, wanted).fill(make, watch), "raws": len(sources)}


def _keep(folder: Path, name: str, source: Path, pixels: npt.NDArray[np.uint16]) -> None:
    images.write(folder / RGB / f"{name}.png", images.Photo(pixels))
    _link(source, folder / RAW / f"{name}{source.suffix}")


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it; what a broken-off call left there is replaced."""
    with files.atomic(target) as temporary:
        temporary.unlink()
        try:
            os.link(source.resolve(), temporary)
        except OSError:
            shutil.copyfile(source, temporary)


ACTIONS: Mapping[str, Callable[..., Mapping[str, object]]] = {
    "inspect": inspect,
    "synth": synth,
    "render": render,
    "check": check.check,
    "stats": check.stats,
}
