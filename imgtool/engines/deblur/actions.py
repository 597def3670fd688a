"""What ``imgtool data`` does for the deblur engine: make pairs, average frames, check folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from imgtool import files, images, metrics, sheets
from imgtool.engine import Watch
from imgtool.engines.deblur import data
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.engines.deblur.settings import Average, Check, Synth

LIST = "samples.jsonl"


def _fresh(folder: Path) -> None:
    """Refuse a folder that already holds pairs: nothing is overwritten or mixed."""
    if (folder / LIST).exists():
        raise ImgtoolError(f"{folder} already holds pairs", "name another folder by -o, or remove this one")


def _put(folder: Path, name: str, blurred: data.Picture, sharp: data.Picture) -> None:
    for part, picture in (("blur", blurred), ("sharp", sharp)):
        target = folder / part / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        images.write(target, images.Photo(picture))


def _finish(folder: Path, rows: list[dict[str, object]]) -> None:
    files.write(folder / LIST, "".join(json.dumps(row) + "\n" for row in rows).encode())


def synth(settings: Synth, watch: Watch) -> Mapping[str, object]:
    """Write ``count`` pairs with synthetic blur, a list of what was done to each, and a preview.

    Pair n is a function of the seed and n alone.
    """
    _fresh(settings.out)
    paths = [path for folder in settings.photos for path in data.pictures_in(folder)]
    if not paths:
        raise ImgtoolError("no photographs found", "name folders with sharp photographs", USAGE)
    source = data.Photographs(paths, settings.untouched, data.Decoded())
    rows: list[dict[str, object]] = []
    shown: list[tuple[data.Picture, data.Picture]] = []
    for number in range(settings.count):
        rng = np.random.default_rng([settings.seed, 2, number])
        index = int(
            np.random.default_rng([settings.seed, 3, number // len(paths)]).permutation(len(paths))[
                number % len(paths)
            ]
        )
        blurred, recipe, sharp = source.draw_with_recipe(index, rng, settings.crop)
        _put(settings.out, f"{number:06d}", blurred, sharp)
        rows.append(
            {
                "name": f"{number:06d}.png",
                "photo": paths[index].name,
                "number": number,
                "seed": settings.seed,
                **recipe.record(),
            }
        )
        shown += [(blurred, sharp)] * (len(shown) < 8)
        watch.done(number + 1, settings.count)
    _finish(settings.out, rows)
    columns = {
        "blurred": np.stack([pair[0] for pair in shown]),
        "sharp": np.stack([pair[1] for pair in shown]),
    }
    sheets.sheet(columns, settings.out / "preview.png", title=f"synthetic blur, seed {settings.seed}")
    kinds = {
        kind: sum(row["kind"] == kind for row in rows) for kind in sorted({str(row["kind"]) for row in rows})
    }
    return {
        "folder": str(settings.out),
        "pairs": len(rows),
        "photos": len(paths),
        "kinds": kinds,
        "faults": [],
    }


def average(settings: Average, watch: Watch) -> Mapping[str, object]:
    """Write a pair for every run of frames: their mean, and the frame at its centre."""
    _fresh(settings.out)
    if settings.longest < settings.shortest:
        raise ImgtoolError("--longest is less than --shortest", "give --shortest 7 --longest 13", USAGE)
    jobs = [job for folder in settings.frames for job in _runs(folder, settings)]
    rows: list[dict[str, object]] = []
    decoded = data.Decoded()
    for number, (name, run) in enumerate(jobs):
        pictures = [decoded(path) for path in run]
        if len({picture.shape for picture in pictures}) > 1:
            raise ImgtoolError(
                f"frames of different sizes in {run[0].parent}", "give frames of one recording"
            )
        _put(settings.out, name, data.average(pictures, settings.gamma), pictures[len(run) // 2])
        rows.append(
            {"name": f"{name}.png", "frames": len(run), "first": run[0].name, "gamma": settings.gamma}
        )
        watch.done(number + 1, len(jobs))
    _finish(settings.out, rows)
    return {"folder": str(settings.out), "pairs": len(rows), "faults": []}


def _runs(folder: Path, settings: Average) -> list[tuple[str, list[Path]]]:
    frames = data.pictures_in(folder)
    lengths = [n for n in range(settings.shortest, settings.longest + 1) if n % 2] or [settings.shortest]
    jobs: list[tuple[str, list[Path]]] = []
    start = 0
    while start + lengths[len(jobs) % len(lengths)] <= len(frames):
        length = lengths[len(jobs) % len(lengths)]
        jobs.append((f"{folder.name}-{start:06d}-{length}", frames[start : start + length]))
        start += settings.stride
    if not jobs:
        raise ImgtoolError(
            f"{len(frames)} frames in {folder}, fewer than a run of {lengths[0]}",
            "give more frames, or a lower --shortest",
            USAGE,
        )
    return jobs


def check(settings: Check, watch: Watch) -> Mapping[str, object]:
    """Read every pair and list every fault: no partner, unreadable, other size, not blurred."""
    pairs, lonely = data.find_pairs(settings.folder, settings.blur_folder)
    faults = [f"{path}: no partner" for path in lonely]
    psnr: list[float] = []
    for number, (blurred, sharp) in enumerate(pairs):
        try:
            first, second = images.read_rgb8(blurred), images.read_rgb8(sharp)
        except ImgtoolError as fault:
            faults.append(fault.what)
            continue
        if first.shape != second.shape:
            sizes = [f"{picture.shape[1]}x{picture.shape[0]}" for picture in (first, second)]
            faults.append(f"{blurred}: {sizes[0]}, its partner {sizes[1]}")
            continue
        psnr.append(float(metrics.psnr(metrics.batch_of(first), metrics.batch_of(second))))
        watch.done(number + 1, len(pairs))
    if not pairs:
        faults.append(f"{settings.folder}: no pairs; expected blur/ beside sharp/, or X.png beside X_gt.png")
    mean = float(np.mean(psnr)) if psnr else None
    return {
        "folder": str(settings.folder),
        "pairs": len(pairs),
        "usable": len(psnr),
        "blurred_psnr": mean,
        "faults": faults,
    }


ACTIONS: Mapping[str, Callable[..., Mapping[str, object]]] = {
    "synth": synth,
    "average": average,
    "check": check,
}
