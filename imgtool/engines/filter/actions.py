"""What ``imgtool data`` does for the filter engine: make pairs, check folders of them, list the filters.

``synth`` keeps a list of what it wrote and adds a row as soon as a pair is on disk. The same command given
again goes on where it was interrupted; a folder of other pairs is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from imgtool import files, images, metrics, sheets
from imgtool.engine import Watch
from imgtool.engines.filter import blackbox, targets
from imgtool.errors import USAGE, ImgtoolError
from imgtool.samples import distinct

if TYPE_CHECKING:
    from imgtool.engines.filter.settings import Check, Synth, Targets
    from imgtool.engines.filter.targets import Target

LIST = "samples.jsonl"
SIDES = ("input", "output")
SHOWN = 8
"""Pairs on the preview."""
SHOWN_EDGE = 256
"""Edge of the squares that it shows of them."""


def synth(settings: Synth, watch: Watch) -> Mapping[str, object]:
    """Write photographs and what a filter makes of them, whole, as PNG of 8 bits; a list, and a preview.

    Returns:
        The record: folder, how many pairs are there and how many are new, and the faults of photos that
        could not be read; their pairs are left out.

    Raises:
        ImgtoolError: Code 2: no photos, fewer than ``count``, no such filter. Code 1: a folder that holds
            other pairs, or all of these already; a place that cannot be written.
    """
    target = blackbox.resolve(settings.target)
    paths = list(distinct(settings.photos).values())
    if not paths:
        raise ImgtoolError("no photographs found", "name folders of photographs", USAGE)
    if settings.count > len(paths):
        what = f"--count {settings.count} is more than the {len(paths)} photographs found"
        raise ImgtoolError(what, "a photograph makes one pair: leave out --count", USAGE)
    chosen = dict(enumerate(paths[: settings.count or None]))
    wanted = {f"{number:06d}.png": path for number, path in chosen.items()}
    rows = _taken_up(settings, target, wanted)
    missing = [name for name in wanted if name not in rows]
    faults: list[str] = []
    for number, name in enumerate(missing, 1):
        try:
            photo = images.read_rgb8(wanted[name])
            found = images.to_type(target(photo), np.uint8)
        except ImgtoolError as fault:
            faults.append(fault.what)
        else:
            _write(settings.out, name, (photo, found))
            _add(settings.out / LIST, _row(name, wanted[name], target))
            rows.add(name)
        watch.done(number, len(missing))
    _preview(settings.out, sorted(rows), target)
    new = sum(name in rows for name in missing)
    return {
        "folder": str(settings.out), "target": target.spec, "pairs": len(rows), "new": new, "faults": faults,
    }  # fmt: skip


def _row(name: str, photo: Path, target: Target) -> dict[str, object]:
    return {"name": name, "photo": photo.name, "target": target.spec}


def _taken_up(settings: Synth, target: Target, wanted: Mapping[str, Path]) -> set[str]:
    """Return the pairs that the same command has left in the folder."""
    folder, place = settings.out, settings.out / LIST
    there = files.json_lines(place) if place.exists() else []
    rows = {str(row.get("name")): row for row in there}
    ours = [name in wanted and row == _row(name, wanted[name], target) for name, row in rows.items()]
    foreign = any((folder / side).exists() for side in SIDES) and not place.exists()
    if foreign or not all(ours):
        raise ImgtoolError(f"{folder} already holds other pairs", "name another folder by -o")
    if len(rows) == len(wanted):
        raise ImgtoolError(f"{folder} already holds these pairs", "name another folder by -o")
    # A process that was killed may have left half a row.
    files.write(place, "".join(json.dumps(row) + "\n" for row in rows.values()).encode())
    return set(rows)


def _write(folder: Path, name: str, pair: tuple[Any, Any]) -> None:
    for side, pixels in zip(SIDES, pair, strict=True):
        grey = pixels.ndim == 2
        colours = np.repeat(pixels[..., None], 3, 2) if grey else pixels
        images.write(folder / side / name, images.Photo(colours, grey=grey))


def _add(place: Path, row: Mapping[str, object]) -> None:
    try:
        with place.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as fault:
        what = f"cannot write {place}: {str(fault.strerror).lower()}"
        raise ImgtoolError(what, "free some space, then go on") from None


def _preview(folder: Path, names: list[str], target: Target) -> None:
    """Draw the first pairs, the middle of each in the same square."""
    columns: dict[str, list[Any]] = {side: [] for side in SIDES}
    for name in names[:SHOWN]:
        for side in SIDES:
            columns[side].append(_square(images.read_rgb8(folder / side / name)))
    if names:
        labels = {"photo": np.stack(columns["input"]), target.spec: np.stack(columns["output"])}
        sheets.sheet(labels, folder / "preview.png", title=f"{target.spec}, {len(names)} pairs")


def _square(pixels: Any) -> Any:
    """Cut the middle out of a picture, each of its pixels as it is; a smaller one is enlarged."""
    edge = min(*pixels.shape[:2], SHOWN_EDGE)
    top, left = ((size - edge) // 2 for size in pixels.shape[:2])
    part = np.ascontiguousarray(pixels[top : top + edge, left : left + edge])
    return cv2.resize(part, (SHOWN_EDGE, SHOWN_EDGE), interpolation=cv2.INTER_NEAREST)


def check(settings: Check, watch: Watch) -> Mapping[str, object]:
    """Read every pair and list every fault: no partner, several, unreadable, other size.

    Returns:
        The record: counts of pairs and of those that can be used, sizes, the mean PSNR (dB) of outputs
        against their inputs where they differ, and how many are identical.

    Raises:
        ImgtoolError: Code 2: no such folder, or no pair in it.
    """
    pairs, faults = blackbox.check_pairs(settings.folder)
    sizes: Counter[str] = Counter()
    psnr: list[float] = []
    identical = 0
    for number, (before, after) in enumerate(pairs, 1):
        try:
            first, second = _both(before, after)
        except ImgtoolError as fault:
            faults.append(fault.what)
        else:
            sizes[f"{first.shape[1]}x{first.shape[0]}"] += 1
            if np.array_equal(first, second):
                identical += 1
            else:
                psnr.append(float(metrics.psnr(metrics.batch_of(first), metrics.batch_of(second))))
        watch.done(number, len(pairs))
    return {
        "folder": str(settings.folder),
        "pairs": len(pairs),
        "usable": sum(sizes.values()),
        "identical": identical,
        "psnr": float(np.mean(psnr)) if psnr else None,
        "sizes": dict(sizes.most_common()),
        "faults": faults,
    }


def _both(before: Path, after: Path) -> tuple[Any, Any]:
    first, second = images.read_rgb8(before), images.read_rgb8(after)
    if first.shape != second.shape:  # which the headers of RAW files do not tell
        sizes = [f"{each.shape[1]}x{each.shape[0]}" for each in (first, second)]
        raise ImgtoolError(f"{before} is {sizes[0]}, its output {sizes[1]}")
    return first, second


def list_targets(settings: Targets, watch: Watch) -> Mapping[str, object]:
    """Return the filters that can be imitated: what each does, its parameters, channels, and cost.

    The record's text is the same for people.
    """
    rows = [row._replace(sentence=row.sentence.replace("``", "")) for row in targets.overview()]
    return {
        "targets": [
            {
                "name": row.name,
                "does": row.sentence,
                "parameters": dict(row.parameters),
                "channels": row.channels,
                "slow": row.slow,
            }
            for row in rows
        ],
        "text": "\n".join(f"{_spec(row)}  {_output(row)}\n    {row.sentence}" for row in rows),
    }


def _spec(row: targets.Row) -> str:
    """Return a filter as the command line takes it, with all parameters."""
    given = ",".join(f"{name}={value:g}" for name, value in row.parameters.items())
    return f"{row.name}:{given}" if given else row.name


def _output(row: targets.Row) -> str:
    return ("colour" if row.channels == 3 else "grey") + (", slow" if row.slow else "")


ACTIONS: Mapping[str, Callable[..., Mapping[str, object]]] = {
    "synth": synth,
    "check": check,
    "targets": list_targets,
}
"""The actions of ``imgtool data`` by name."""
