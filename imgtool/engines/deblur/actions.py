"""What ``imgtool data`` does for the deblur engine: make pairs, average frames, check folders.

``synth`` and ``average`` keep a list of what they wrote and add a row as soon as a pair is on disk.
The same command given again goes on where it was interrupted; a folder of other pairs is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from imgtool import files, images, metrics, samples, sheets
from imgtool.engine import Watch
from imgtool.engines.deblur import data
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.engines.deblur.settings import Average, Check, Synth

Row = dict[str, object]
Made = tuple[data.Picture, data.Picture, Row]

LIST = "samples.jsonl"
SHOWN = 8
"""Pairs on the preview."""


class Pairs:
    """A folder of pairs being written, with the list of those that are there."""

    def __init__(self, folder: Path, wanted: Mapping[str, Row]) -> None:
        """Take up a folder: a new one, or one that the same command left unfinished.

        Args:
            folder: Where ``blur/``, ``sharp/`` and the list go.
            wanted: What the row of each pair must say, by the pair's name.

        Raises:
            ImgtoolError: The folder holds other pairs, or all of these already.
        """
        self.folder, self.list, self.wanted = folder, folder / LIST, wanted
        rows = files.json_lines(self.list) if self.list.exists() else []
        self.rows: dict[str, Row] = {str(row.get("name")): row for row in rows}
        if not self._ours():
            raise ImgtoolError(f"{folder} already holds other pairs", "name another folder by -o")
        if len(self.rows) == len(wanted):
            raise ImgtoolError(f"{folder} already holds these pairs", "name another folder by -o")
        self.save()

    def _ours(self) -> bool:
        if not self.list.exists():
            return not any((self.folder / part).exists() for part in ("blur", "sharp"))
        return all(self.wanted.get(name, {"": 0}).items() <= row.items() for name, row in self.rows.items())

    def save(self) -> None:
        """Write the list whole, sorted by name."""
        lines = (json.dumps(row) + "\n" for _, row in sorted(self.rows.items()))
        files.write(self.list, "".join(lines).encode())

    def add(self, name: str, made: Made) -> None:
        """Write a pair, then its row."""
        blurred, sharp, more = made
        images.write(self.folder / "blur" / name, images.Photo(blurred))
        images.write(self.folder / "sharp" / name, images.Photo(sharp))
        self.rows[name] = {"name": name, **self.wanted[name], **more}
        try:
            with self.list.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[name]) + "\n")
        except OSError as fault:
            raise ImgtoolError(
                f"cannot write {self.list}: {str(fault.strerror).lower()}", "free some space, then go on"
            ) from None

    def fill(self, make: Callable[[str], Made], watch: Watch) -> Mapping[str, object]:
        """Make and write every pair that is not there yet.

        Returns:
            The record: folder, how many pairs are there and how many are new, and the faults of
            photos that could not be read; their pairs are left out.
        """
        missing = [name for name in self.wanted if name not in self.rows]
        faults: dict[str, None] = {}
        for number, name in enumerate(missing, 1):
            try:
                made = make(name)
            except ImgtoolError as fault:
                faults[fault.what] = None
            else:
                self.add(name, made)
            watch.done(number, len(missing))
        self.save()
        new = sum(name in self.rows for name in missing)
        return {"folder": str(self.folder), "pairs": len(self.rows), "new": new, "faults": list(faults)}


def synth(settings: Synth, watch: Watch) -> Mapping[str, object]:
    """Write ``count`` pairs with synthetic blur, a list of what was done to each, and a preview.

    Pair n is a function of the photos, the seed and n alone, so a greater count goes on.

    Raises:
        ImgtoolError: No photos, or a folder that holds other pairs.
    """
    paths = [path for folder in settings.photos for path in data.pictures_in(folder)]
    if not paths:
        raise ImgtoolError("no photographs found", "name folders with sharp photographs", USAGE)
    source = data.Photographs(paths, data.severity(settings), data.Decoded())
    photos = list(samples.turns(settings.count, len(paths), settings.seed))
    same = {"seed": settings.seed, "crop": settings.crop, **asdict(source.severity)}
    wanted: dict[str, Row] = {
        f"{number:06d}.png": {"photo": paths[photo].name, "number": number, **same}
        for number, photo in enumerate(photos)
    }
    pairs = Pairs(settings.out, wanted)

    def make(name: str) -> Made:
        number = int(Path(name).stem)
        rng = np.random.default_rng([settings.seed, 2, number])
        blurred, recipe, sharp = source.draw_with_recipe(photos[number], rng, settings.crop)
        return blurred, sharp, recipe.record()

    record = pairs.fill(make, watch)
    _preview(pairs, f"synthetic blur, seed {settings.seed}")
    kinds = Counter(str(row["kind"]) for row in pairs.rows.values())
    return {**record, "photos": len(paths), "kinds": dict(sorted(kinds.items()))}


def _preview(pairs: Pairs, title: str) -> None:
    names = sorted(pairs.rows)[:SHOWN]
    if names:
        columns = {
            label: np.stack([images.read_rgb8(pairs.folder / part / name) for name in names])
            for label, part in (("blurred", "blur"), ("sharp", "sharp"))
        }
        sheets.sheet(columns, pairs.folder / "preview.png", title=title)


def average(settings: Average, watch: Watch) -> Mapping[str, object]:
    """Write a pair for every run of frames: their mean, and the frame at its centre.

    Raises:
        ImgtoolError: Too few frames, or a folder that holds other pairs.
    """
    if settings.longest < settings.shortest:
        raise ImgtoolError("--longest is less than --shortest", "give --shortest 7 --longest 13", USAGE)
    runs: dict[str, Sequence[Path]] = {}
    folders = data.sequences_in(settings.frames)
    for folder, frames in folders.items():
        runs |= _runs(frames, _label(folder, list(folders)), settings)
    if not runs:
        raise ImgtoolError(
            f"no folder holds as many as {settings.shortest} frames",
            "give more frames, or a lower --shortest",
            USAGE,
        )
    wanted: dict[str, Row] = {
        name: {"frames": len(run), "first": run[0].name, "gamma": settings.gamma}
        for name, run in runs.items()
    }
    decoded = data.Decoded()

    def make(name: str) -> Made:
        pictures = [decoded(path) for path in runs[name]]
        if len({picture.shape for picture in pictures}) > 1:
            raise ImgtoolError(f"frames of different sizes in {runs[name][0].parent}")
        return data.average(pictures, settings.gamma), pictures[len(pictures) // 2], {}

    return Pairs(settings.out, wanted).fill(make, watch)


def _label(folder: Path, folders: Sequence[Path]) -> str:
    """Return the name of a folder, numbered where another has the same."""
    name = folder.resolve().name
    alike = [each for each in folders if each.resolve().name == name]
    return f"{name}-{alike.index(folder) + 1}" if len(alike) > 1 else name


def _runs(frames: Sequence[Path], label: str, settings: Average) -> dict[str, Sequence[Path]]:
    """Return the frames of each pair, by its name; odd counts take turns."""
    lengths = [n for n in range(settings.shortest, settings.longest + 1) if n % 2] or [settings.shortest]
    found: dict[str, Sequence[Path]] = {}
    start = 0
    while start + (length := lengths[len(found) % len(lengths)]) <= len(frames):
        found[f"{label}-{start:06d}-{length}.png"] = frames[start : start + length]
        start += settings.stride
    return found


def check(settings: Check, watch: Watch) -> Mapping[str, object]:
    """Read every pair and list every fault: no partner, unreadable, other size.

    The mean PSNR is of the pairs whose halves differ; "identical" counts the others.
    """
    pairs, lonely = data.find_pairs(settings.folder, settings.blur_folder)
    faults = [f"{path}: no partner" for path in lonely]
    psnr: list[float] = []
    usable, identical = 0, 0
    for number, (blurred, sharp) in enumerate(pairs, 1):
        try:
            first, second = _pair(blurred, sharp)
        except ImgtoolError as fault:
            faults.append(fault.what)
        else:
            usable += 1
            if np.array_equal(first, second):
                identical += 1
            else:
                psnr.append(float(metrics.psnr(metrics.batch_of(first), metrics.batch_of(second))))
        watch.done(number, len(pairs))
    if not pairs:
        faults.append(f"{settings.folder}: no pairs; expected blur/ beside sharp/, or X.png beside X_gt.png")
    return {
        "folder": str(settings.folder),
        "pairs": len(pairs),
        "usable": usable,
        "identical": identical,
        "blurred_psnr": float(np.mean(psnr)) if psnr else None,
        "faults": faults,
    }


def _pair(blurred: Path, sharp: Path) -> tuple[data.Picture, data.Picture]:
    first, second = images.read_rgb8(blurred), images.read_rgb8(sharp)
    if first.shape != second.shape:
        sizes = [f"{picture.shape[1]}x{picture.shape[0]}" for picture in (first, second)]
        raise ImgtoolError(f"{blurred}: {sizes[0]}, its partner {sizes[1]}")
    return first, second


ACTIONS: Mapping[str, Callable[..., Mapping[str, object]]] = {
    "synth": synth,
    "average": average,
    "check": check,
}
