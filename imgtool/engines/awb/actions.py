"""What ``imgtool data`` does for the awb engine: relight photographs, check data sets, draw their lights.

``synth`` adds a row to ``gt.csv`` as soon as a frame is on disk. The same command given again goes on
where it was interrupted; a folder of other frames is refused.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from imgtool import files, plots, sheets
from imgtool.engine import Watch
from imgtool.engines.awb import angles, reading, sets, synthesis, tuning
from imgtool.engines.awb.camera import Camera, Locus
from imgtool.engines.awb.sets import Entry
from imgtool.engines.awb.stats import AwbStats
from imgtool.engines.awb.synthesis import BLACK, WHITE, Frame, Relit
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.engines.awb.settings import Check, Stats, Synth

Array = npt.NDArray[Any]
Row = dict[str, str]

GT, LEVELS, CAMERAS, MADE, PREVIEW = "gt.csv", "levels.json", "cameras.json", "synth.json", "preview.png"
COLUMNS = (
    "image", "mean_r", "mean_g", "mean_b", "camera", "ct", "duv", "mixed", "source", "group",
)  # fmt: skip
SHOWN = 6
"""Frames on the preview."""
PLAUSIBLE = (0.05, 4.0)
"""R/G and B/G that white may have to a sensor."""
FARTHEST = 15.0
"""Degrees that a white point may be off its camera's curve: more than any lamp's tint."""
FEWEST = 20
"""Frames of a camera from which on a curve is fitted to its white points."""
NAMED = 7
"""Cameras that a plot tells apart; the others share a colour."""


# --- synth -----------------------------------------------------------------------------------


def synth(settings: Synth, watch: Watch) -> Mapping[str, object]:
    """Write ``count`` relit frames, ``gt.csv``, ``levels.json``, ``cameras.json`` and a preview.

    Frame n is a function of the photographs, the seed and n alone, so a greater count goes on. A
    photograph that cannot be read is listed under "faults", and its frames are left out.

    Raises:
        ImgtoolError: No photographs, or a folder that holds other frames, or all of these.
    """
    paths = synthesis.photographs(settings.photos)
    relit = Relit(paths, settings.seed, _cameras(settings.tuning))
    made = {
        "seed": settings.seed,
        "tuning": settings.tuning.name if settings.tuning else "",
        "photos": hashlib.sha256("\n".join(path.name for path in paths).encode()).hexdigest()[:16],
    }
    rows = _taken_up(settings, made)
    missing = [number for number in range(settings.count) if _name(number) not in rows]
    _begin(settings.out, made, rows)
    faults: dict[str, None] = {}
    for done, number in enumerate(missing, 1):
        try:
            frame = relit.frame(number)
        except ImgtoolError as fault:
            faults[fault.what] = None
        else:
            rows[_name(number)] = _put(settings.out / _name(number), frame)
        watch.done(done, len(missing))
    _finish(settings.out, rows, relit, f"photographs relit, seed {settings.seed}")
    return {
        "folder": str(settings.out),
        "frames": len(rows),
        "new": sum(_name(number) in rows for number in missing),
        "mixed": sum(float(row["mixed"]) > 0 for row in rows.values()),
        "photos": len(paths),
        "faults": list(faults),
    }


def _name(number: int) -> str:
    return f"{number:05d}.png"


def _cameras(tuning: Path | None) -> list[Camera] | None:
    if tuning is None:
        return None
    read = reading.load_tuning(tuning)
    return [Camera(read.name, read.locus, known=True, tuning=read)]


def _taken_up(settings: Synth, made: Mapping[str, object]) -> dict[str, Row]:
    """Return the rows of the frames that are there already.

    Raises:
        ImgtoolError: The folder holds other things, or all of these frames.
    """
    folder = settings.out
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return {}
    mark = folder / MADE
    if not mark.is_file() or json.loads(files.read(mark)) != made:
        raise ImgtoolError(f"{folder} already holds other files", "name another folder by -o")
    text = files.read(folder / GT).decode(errors="replace") if (folder / GT).is_file() else ""
    whole = [row for row in csv.DictReader(io.StringIO(text)) if all(row.get(name) for name in COLUMNS)]
    rows = {row["image"]: row for row in whole if (folder / row["image"]).is_file()}
    if all(_name(number) in rows for number in range(settings.count)):
        raise ImgtoolError(
            f"{folder} already holds these frames", "raise --count, or name another folder by -o"
        )
    return rows


def _begin(folder: Path, made: Mapping[str, object], rows: Mapping[str, Row]) -> None:
    files.write(folder / MADE, json.dumps(made).encode())
    files.write(folder / LEVELS, json.dumps({"black": BLACK, "white": WHITE}).encode())
    _table(folder, rows)


def _table(folder: Path, rows: Mapping[str, Row]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(row for _, row in sorted(rows.items()))
    files.write(folder / GT, text.getvalue().encode())


def _put(path: Path, frame: Frame) -> Row:
    """Write a frame, add its row to the table, and return the row."""
    files.write(path, cv2.imencode(".png", frame.pixels[..., ::-1])[1].tobytes())
    white = np.array([frame.truth[0], 1.0, frame.truth[1]])
    red, green, blue = (f"{value:.6f}" for value in white / white.sum())
    about = frame.about
    values = (
        path.name, red, green, blue, frame.camera.name,
        f"{about['ct']:.0f}", f"{about['duv']:.5f}", f"{about['mixed']:.3f}", about["source"], about["group"],
    )  # fmt: skip
    row = dict(zip(COLUMNS, map(str, values), strict=True))
    try:
        with (path.parent / GT).open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
    except OSError as fault:
        what = f"cannot write {path.parent / GT}: {str(fault.strerror).lower()}"
        raise ImgtoolError(what, "free some space, then give the same command again") from None
    return row


def _finish(folder: Path, rows: Mapping[str, Row], relit: Relit, title: str) -> None:
    used = {row["camera"] for row in rows.values()}
    facts = {camera.name: _facts(camera) for camera in relit.every_camera() if camera.name in used}
    files.write(folder / CAMERAS, json.dumps(facts).encode())
    _table(folder, rows)
    chosen = [row for _, row in sorted(rows.items())][:SHOWN]
    if not chosen:
        return
    raw = np.stack([_shown(folder / row["image"]) for row in chosen])
    white = np.array([[float(row[name]) for name in COLUMNS[1:4]] for row in chosen])
    balanced = raw / (white / white[:, 1:2])[:, None, None]
    columns = {"raw": _curve(raw), "divided by its white": _curve(balanced)}
    captions = [f"{row['camera']}, {row['ct']} K, Duv {row['duv']}" for row in chosen]
    sheets.sheet(columns, folder / PREVIEW, title=title, captions=captions)


def _facts(camera: Camera) -> dict[str, object]:
    facts: dict[str, object] = {"ct_curve": camera.locus.ct_curve()}
    if camera.xyz_to_camera is not None:
        facts["xyz_to_camera"] = camera.xyz_to_camera.ravel().tolist()
    return facts


def _shown(path: Path) -> Array:
    """Return a frame at half its size, exposed so that its brighter parts are well seen."""
    pixels = cv2.imdecode(np.frombuffer(files.read(path), np.uint8), cv2.IMREAD_UNCHANGED)
    small = np.asarray(pixels, np.float64)[::2, ::2, ::-1]
    linear = np.maximum((small - BLACK) / (WHITE - BLACK), 0)
    shown: Array = linear * 0.7 / max(float(np.percentile(linear[..., 1], 98)), 1e-3)
    return shown


def _curve(linear: Array) -> Array:
    """Return linear values with the curve of sRGB, 0..1."""
    clipped = np.clip(linear, 0, 1)
    curved: Array = np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)
    return curved


# --- check -----------------------------------------------------------------------------------


def check(settings: Check, watch: Watch) -> Mapping[str, object]:
    """Read every frame of a data set and list every fault.

    Faults are what ``sets.dataset`` finds, frames that cannot be read or have no usable cell, files
    with the same content, and white points that no sensor sees or that are far from their camera's curve.
    """
    entries = sets.dataset(settings.folder, settings)
    faults, content = [entry.fault for entry in entries if entry.fault], _Same()
    cameras: Counter[str] = Counter()
    groups: Counter[str] = Counter()
    sound = [entry for entry in entries if not entry.fault]
    usable = 0
    for done, entry in enumerate(sound, 1):
        found, wrong = _examined(entry, content)
        faults += wrong
        if found:
            cameras[found.camera.name or "unknown"] += 1
            groups[found.group or "none"] += 1
            usable += not wrong
        watch.done(done, len(sound))
    return {
        "folder": str(settings.folder),
        "frames": len(sound),
        "usable": usable,
        "cameras": dict(cameras.most_common()),
        "groups": dict(groups.most_common()),
        "faults": faults,
    }


class _Same:
    """Tells files whose content was there before."""

    def __init__(self) -> None:
        self._first: dict[bytes, Path] = {}

    def __call__(self, path: Path) -> Path | None:
        """Return the first file with the content of this one, None where this is the first."""
        first = self._first.setdefault(hashlib.sha256(files.read(path)).digest(), path)
        return None if first == path else first


def _examined(entry: Entry, content: _Same) -> tuple[AwbStats | None, list[str]]:
    """Read a frame and return it, and what is wrong with it."""
    try:
        twin, found = content(entry.path), entry.read()
    except ImgtoolError as fault:
        return None, [fault.what]
    wrong = [f"the same picture as {twin}"] if twin else []
    if not len(found.points()):
        wrong.append("no usable cell: it is black, saturated or masked all over")
    return found, [f"{entry.name}: {fault}" for fault in wrong + _white_faults(found)]


def _white_faults(found: AwbStats) -> list[str]:
    if found.truth is None:
        return ["its white is not known"]
    r, b = found.truth
    low, high = PLAUSIBLE
    if not (low <= r <= high and low <= b <= high):
        return [f"no sensor sees white as R/G {r:.3g}, B/G {b:.3g}"]
    off = found.camera.locus.distance(r, b) if found.camera.known else 0.0
    return [f"its white is {off:.1f} degrees off the curve of {found.camera.name}"] if off > FARTHEST else []


# --- stats -----------------------------------------------------------------------------------


def stats(settings: Stats, watch: Watch) -> Mapping[str, object]:
    """Draw the white points of a data set, and fit the curve of each camera that has 20 or more.

    Writes ``gains.png`` (R/G and B/G, shaded by density, with the curves), ``gains-histogram.png``,
    ``ct.png``, ``ct_curve.png``, ``ct_curve.json`` as libcamera's tuning files have it (for one
    camera {"ct_curve": [T, r, b, ...]}, for more a mapping of their names to that), and
    ``tunings/CAMERA.json``, which ``--tuning`` takes. All that goes into the folder ``stats`` of the data
    set, or another, where nobody takes it for frames.

    Returns:
        The record: counts by camera, percentiles, and two floors in degrees: of an estimator that always
        says the mean white of a camera (cameras with fewer frames count as one), and of one that knows the
        nearest point of the fitted curve, else of the camera's own.

    Raises:
        ImgtoolError: Code 2: no data set, or the output would lie among its frames. Code 1: no frame
            that can be read.
    """
    entries = [entry for entry in sets.dataset(settings.folder, settings) if not entry.fault]
    out = settings.out or settings.folder / "stats"
    if out.resolve() in {settings.folder.resolve(), *(entry.path.resolve().parent for entry in entries)}:
        raise ImgtoolError(f"{out} holds the frames", "name another folder by -o", USAGE)
    whites, cameras, faults = _whites(entries, watch)
    if not whites:
        raise ImgtoolError(
            f"no frame with known white in {settings.folder}", "imgtool data check awb says why"
        )
    points = {name: np.array(given) for name, given in whites.items()}
    curves = {name: _fitted(given, cameras[name]) for name, given in points.items() if len(given) >= FEWEST}
    loci = {name: curves.get(name, cameras[name].locus) for name in points}
    _draw(points, curves, loci, out)
    _write_curves(curves, len(points), out)
    tunings = {name: out / "tunings" / f"{_file_name(name)}.json" for name in curves}
    for name, path in tunings.items():
        tuning.write_tuning(curves[name], path)
    return {
        "folder": str(settings.folder),
        "frames": sum(map(len, points.values())),
        "cameras": {name: len(given) for name, given in points.items()},
        "red_gain": _percentiles(np.concatenate([1 / given[:, 0] for given in points.values()])),
        "blue_gain": _percentiles(np.concatenate([1 / given[:, 1] for given in points.values()])),
        "constant": _floor([_from_mean(given) for given in _pooled(points)]),
        "on_curve": _floor(
            [_off(points[name], loci[name]) for name in points if name in curves or cameras[name].known]
        ),
        "out": str(out),
        "tunings": [str(path) for path in tunings.values()],
        "faults": faults,
    }


def _whites(
    entries: Sequence[Entry], watch: Watch
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, Camera], list[str]]:
    """Read frames, and return white points and cameras by the camera's name, and what went wrong."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    cameras: dict[str, Camera] = {}
    faults = []
    for done, entry in enumerate(entries, 1):
        try:
            found = entry.read()
        except ImgtoolError as fault:
            faults.append(fault.what)
        else:
            name = found.camera.name or "unknown"
            cameras.setdefault(name, found.camera)
            points[name] += [found.truth] if found.truth else []
        watch.done(done, len(entries))
    return {name: given for name, given in sorted(points.items()) if given}, cameras, faults


def _file_name(camera: str) -> str:
    """Return a camera's name without what no file name may have."""
    return re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", camera).lstrip(".") or "unknown"


def _fitted(points: Array, camera: Camera) -> Locus:
    return Locus.fit(points, camera.locus if camera.known else None)


def _off(points: Array, locus: Locus) -> Array:
    return np.array([locus.distance(r, b) for r, b in points])


def _pooled(points: Mapping[str, Array]) -> list[Array]:
    """Return the white points of each camera that has enough, and those of the others together."""
    rest = [given for given in points.values() if len(given) < FEWEST]
    return [given for given in points.values() if len(given) >= FEWEST] + (
        [np.concatenate(rest)] if rest else []
    )


def _from_mean(points: Array) -> Array:
    """Return the errors of the mean white of all frames, each with the same weight."""
    whites = np.insert(points, 1, 1.0, 1)
    mean = (whites / np.linalg.norm(whites, axis=1, keepdims=True)).mean(0)
    return angles.recovery(np.tile(mean, (len(points), 1)), whites)


def _floor(errors: Sequence[Array]) -> dict[str, object] | None:
    if not errors:
        return None
    found = angles.summary(np.concatenate(errors))
    return {name: found[name] for name in ("count", "mean", "median", "worst25", "max")}


def _percentiles(values: Array) -> dict[str, float]:
    shares = (1, 5, 25, 50, 75, 95, 99)
    return dict(zip(map(str, shares), np.percentile(values, shares).tolist(), strict=True))


def _few(points: Mapping[str, Array]) -> dict[str, Array]:
    """Return the clouds of the cameras with most frames, and those of the others together."""
    order = sorted(points, key=lambda name: -len(points[name]))
    named = {name: points[name] for name in order[:NAMED]}
    rest = [points[name] for name in order[NAMED:]]
    return named | ({f"{len(rest)} other cameras": np.concatenate(rest)} if rest else {})


def _draw(
    points: Mapping[str, Array], curves: Mapping[str, Locus], loci: Mapping[str, Locus], out: Path
) -> None:
    shown = _few(points)
    fitted = {name: curves[name] for name in shown if name in curves}
    lines = {name: np.stack([curve.r, curve.b], 1) for name, curve in fitted.items()}
    title = "White points, and the curves fitted to them"
    plots.scatter(shown, out / "gains.png", title=title, labels=("R/G", "B/G"), lines=lines)
    whites = np.concatenate(list(points.values()))
    gains = {"red": 1 / whites[:, 0], "blue": 1 / whites[:, 1]}
    plots.histogram(gains, out / "gains-histogram.png", title="Gains", xlabel="gain, green at 1")
    kelvin = np.array([loci[name].nearest(r, b)[0] for name, given in points.items() for r, b in given])
    plots.histogram(
        {"frames": kelvin}, out / "ct.png", title="Colour temperatures", xlabel="kelvin on the curve"
    )
    clouds = {name: np.stack([kelvin, whites[:, at]], 1) for at, name in enumerate(("R/G", "B/G"))}
    lines = {
        "R/G": _joined([np.stack([curve.ct, curve.r], 1) for curve in fitted.values()]),
        "B/G": _joined([np.stack([curve.ct, curve.b], 1) for curve in fitted.values()]),
    }
    title, labels = "White by colour temperature", ("kelvin on the curve", "R/G, B/G")
    plots.scatter(clouds, out / "ct_curve.png", title=title, labels=labels, lines=lines)


def _joined(lines: Sequence[Array]) -> Array:
    """Return lines ``(N, 2)`` as one, with gaps between them."""
    gap = np.full((1, 2), np.nan)
    return np.concatenate([part for line in lines for part in (line, gap)] or [gap])


def _write_curves(curves: Mapping[str, Locus], cameras: int, out: Path) -> None:
    told = {name: {"ct_curve": curve.ct_curve()} for name, curve in curves.items()}
    if told:
        content = next(iter(told.values())) if cameras == 1 else told
        text = re.sub(r"(\.\d{4})\d+", r"\1", json.dumps(content, indent=2))
        files.write(out / "ct_curve.json", text.encode())


ACTIONS: Mapping[str, Callable[..., Mapping[str, object]]] = {"synth": synth, "check": check, "stats": stats}
