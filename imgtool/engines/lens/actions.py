"""What ``imgtool data`` does for the lens engine: make pairs, check them, show their coefficients.

``synth`` adds a label as soon as a pair is on disk. The same command given again goes on where it was
interrupted; a folder of other pairs is refused.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imgtool import files, images, plots, samples, sheets
from imgtool.engine import Watch
from imgtool.engines.lens import calibrate, data, prior
from imgtool.errors import USAGE, ImgtoolError
from imgtool.samples import Decoded, pictures_in

if TYPE_CHECKING:
    from imgtool.engines.lens.settings import Check, Stats, Synth

Row = dict[str, Any]

SHOWN = 8
"""Pairs on the preview."""
COEFFICIENTS = ("k1", "k2", "p1", "p2")
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
REAL = 5000
"""Draws of real lenses beside a folder's coefficients."""


# --- synth -----------------------------------------------------------------------------------


def _taken_up(folder: Path, wanted: Mapping[str, Row]) -> dict[str, Row]:
    """Return the labels of the pairs that are there already.

    Raises:
        ImgtoolError: The folder holds other pairs, or all of these.
    """
    labels = data.read_labels(folder)
    strange = folder.is_dir() and not labels and any(data.find_pairs(folder))
    if strange or any(not wanted.get(name, {"": 0}).items() <= row.items() for name, row in labels.items()):
        raise ImgtoolError(f"{folder} already holds other pairs", "name another folder by -o")
    there = {name: dict(row) for name, row in labels.items() if _partner(folder / name).exists()}
    there = {name: row for name, row in there.items() if (folder / name).exists()}
    if len(there) == len(wanted):
        raise ImgtoolError(f"{folder} already holds these pairs", "name another folder by -o")
    return there


def _partner(original: Path) -> Path:
    return original.with_name(original.name.replace(data.ORIGINAL, data.GENERATED))


def _save(folder: Path, rows: Mapping[str, Row]) -> None:
    lines = (json.dumps(row) + "\n" for _, row in sorted(rows.items()))
    files.write(folder / data.LABELS, "".join(lines).encode())


def _append(path: Path, row: Row) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as fault:
        raise ImgtoolError(
            f"cannot write {path}: {str(fault.strerror).lower()}", "free some space, then go on"
        ) from None


def synth(settings: Synth, watch: Watch) -> Mapping[str, object]:
    """Write ``count`` pairs of a distorted and a straight photo, their labels, and a preview.

    Pair n is a function of the photos, the seed and n alone, so a greater count goes on. Photos that
    cannot be read are listed under "faults", and their pairs left out.

    Raises:
        ImgtoolError: No photos, or a folder that holds other pairs.
    """
    paths = [path for folder in settings.photos for path in pictures_in(folder)]
    if not paths:
        raise ImgtoolError("no photographs found", "name folders with straight photographs", USAGE)
    source = data.Photographs(paths, settings, Decoded(data.read_small), settings.size)
    names = ("seed", "size", "prior", "untouched", "decentred", "noisy")
    same = {name: getattr(settings, name) for name in names}
    photos = list(samples.turns(settings.count, len(paths), settings.seed))
    wanted: dict[str, Row] = {
        f"{number:06d}{data.ORIGINAL}.jpg": {"source": paths[photo].name, "number": number, **same}
        for number, photo in enumerate(photos)
    }
    rows = _taken_up(settings.out, wanted)
    _save(settings.out, rows)
    missing = [name for name in wanted if name not in rows]
    faults: dict[str, None] = {}
    for done, name in enumerate(missing, 1):
        number = int(wanted[name]["number"])
        try:
            drawn = source.draw(photos[number], np.random.default_rng([settings.seed, 2, number]))
        except ImgtoolError as fault:
            faults[fault.what] = None
        else:
            rows[name] = _write(settings.out / name, drawn) | wanted[name]
            _append(settings.out / data.LABELS, rows[name])
        watch.done(done, len(missing))
    _save(settings.out, rows)
    _preview(settings.out, sorted(rows)[:SHOWN], f"synthetic distortion, seed {settings.seed}")
    return {
        "folder": str(settings.out),
        "pairs": len(rows),
        "new": sum(name in rows for name in missing),
        "untouched": sum(not any(row[name] for name in COEFFICIENTS) for row in rows.values()),
        "photos": len(paths),
        "faults": list(faults),
    }


def _write(original: Path, drawn: data.Drawn) -> Row:
    """Write both halves of a pair and return its label."""
    images.write(original, images.Photo(drawn.distorted))
    images.write(_partner(original), images.Photo(drawn.straight))
    height, width = drawn.distorted.shape[:2]
    values = {name: getattr(drawn.model, name) for name in COEFFICIENTS}
    return {"file": original.name, "width": width, "height": height, **values}


def _preview(folder: Path, names: Sequence[str], title: str) -> None:
    if names:
        columns = {
            "distorted": [data.letterbox(images.read_rgb8(folder / name), 512) for name in names],
            "straight": [data.letterbox(images.read_rgb8(_partner(folder / name)), 512) for name in names],
        }
        stacked = {label: np.stack(pictures) for label, pictures in columns.items()}
        sheets.sheet(stacked, folder / "preview.png", title=title)


# --- check -----------------------------------------------------------------------------------


def _pair_fault(pair: Sequence[Path]) -> str:
    """Return what is wrong with two files, "" where nothing is."""
    try:
        first, second = (images.read_rgb8(path) for path in pair)
    except ImgtoolError as fault:
        return fault.what
    if first.shape == second.shape:
        return ""
    sizes = [f"{picture.shape[1]}x{picture.shape[0]}" for picture in (first, second)]
    return f"{pair[0]}: {sizes[0]}, its partner {sizes[1]}"


def _label_fault(row: Mapping[str, Any]) -> str:
    try:
        model = data.model_of(row)
    except ValueError as fault:
        return str(fault)
    return "the model folds inside the frame" if model.folds() else ""


def _labels(folder: Path) -> dict[Path, Mapping[str, Any]]:
    """Return the labels of a folder and those below it by the path of their file."""
    found = sorted(folder.rglob(data.LABELS))
    return {path.parent / name: row for path in found for name, row in data.read_labels(path.parent).items()}


def check(settings: Check, watch: Watch) -> Mapping[str, object]:
    """Read every pair and every label and list every fault.

    A label is missing where others of its folder are there; a folder without any is one of pairs
    whose coefficients are not known.
    """
    pairs, lonely = data.find_pairs(settings.folder)
    labels = _labels(settings.folder)
    faults = [f"{path}: no partner" for path in lonely]
    usable = 0
    for number, pair in enumerate(pairs, 1):
        fault = _pair_fault(pair)
        faults += [fault] if fault else []
        usable += not fault
        watch.done(number, len(pairs))
    labelled = {path.parent for path in labels}
    faults += [
        f"{pair[0]}: no label" for pair in pairs if pair[0].parent in labelled and pair[0] not in labels
    ]
    for path, row in labels.items():
        wrong = _label_fault(row) if path.is_file() else "a label, but no such file"
        faults += [f"{path}: {wrong}"] if wrong else []
    if not (pairs or labels):
        words = f"expected <id>{data.ORIGINAL}.jpg beside <id>{data.GENERATED}.jpg"
        faults.append(f"{settings.folder}: no pairs; {words}")
    return {
        "folder": str(settings.folder),
        "pairs": len(pairs),
        "usable": usable,
        "labels": len(labels),
        "faults": faults,
    }


# --- stats -----------------------------------------------------------------------------------


def _values(row: Mapping[str, Any]) -> list[float]:
    """Return k1, k2, p1, p2 and the corner's displacement in % of the diagonal; NaN what is no number."""
    numbers = []
    for name in (*COEFFICIENTS, "k3"):
        try:
            numbers.append(float(row.get(name) or 0.0 if name == "k3" else row.get(name, "nan")))
        except (TypeError, ValueError):
            numbers.append(math.nan)
    return [*numbers[:4], 50 * (numbers[0] + numbers[1] + numbers[4])]


def _rows(folder: Path) -> list[Mapping[str, Any]]:
    labels = list(_labels(folder).values()) if folder.is_dir() else []
    table = folder if folder.is_file() else folder / "coefficients.csv"
    if not labels and table.is_file():
        labels = list(csv.DictReader(files.read(table).decode(errors="replace").splitlines()))
    if not labels:
        raise ImgtoolError(
            f"no labels.jsonl or coefficients.csv in {folder}", "imgtool data synth lens writes labels", USAGE
        )
    return labels


def stats(settings: Stats, watch: Watch) -> Mapping[str, object]:
    """Draw the distributions of coefficients beside those of real lenses ("photo", see ``prior``).

    Returns:
        The record: count, the percentiles of each coefficient and of the corner's displacement in % of
        the diagonal, the correlation of k1 and k2, the plots, and rows without finite numbers as faults.

    Raises:
        ImgtoolError: Code 2: neither labels.jsonl nor coefficients.csv.
    """
    rows = _rows(settings.folder)
    out = settings.out or (settings.folder if settings.folder.is_dir() else settings.folder.parent) / "stats"
    values = np.array([_values(row) for row in rows])
    finite = np.isfinite(values).all(1)
    real = prior.draws(np.random.default_rng(0), "photo", 0.002, REAL)
    real = np.concatenate([real, 50 * real[:, :2].sum(1, keepdims=True)], 1)
    named = {
        **{name: "half-diagonal normalisation" for name in COEFFICIENTS},
        "corner": "displacement of a corner in % of the diagonal",
    }
    percentiles: dict[str, dict[str, float]] = {}
    for column, (name, xlabel) in enumerate(named.items()):
        own, others = values[finite, column], real[:, column]
        # about as many of both, so that the heights can be compared
        shown = {settings.folder.name: own, "real lenses": others[: max(len(own), 200)]}
        plots.histogram(shown, out / f"{name}.png", title=name, xlabel=xlabel)
        found = np.percentile(own, PERCENTILES).tolist() if len(own) else []
        percentiles[name] = dict(zip(map(str, PERCENTILES), found, strict=False))
        watch.done(column + 1, len(named))
    varied = finite.sum() > 2 and bool(values[finite, :2].std(0).all())
    return {
        "folder": str(settings.folder),
        "count": len(rows),
        "untouched": int((values[:, :4] == 0).all(1).sum()),
        "percentiles": percentiles,
        "correlation": float(np.corrcoef(values[finite, 0], values[finite, 1])[0, 1]) if varied else None,
        "plots": [str(out / f"{name}.png") for name in named],
        "faults": [
            f"{row.get('file', f'row {number}')}: no finite k1, k2, p1, p2"
            for number, row in enumerate(rows, 1)
            if not finite[number - 1]
        ],
    }


ACTIONS: Mapping[str, Callable[..., Mapping[str, object]]] = {
    "synth": synth,
    "check": check,
    "stats": stats,
    "calibrate": calibrate.calibrate,
}
