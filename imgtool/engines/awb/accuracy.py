"""Angular errors of all methods on frames whose white is known."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imgtool import files
from imgtool.engine import Table
from imgtool.engines.awb import angles, apply, classical, reading
from imgtool.engines.awb.settings import Infer
from imgtool.errors import USAGE, ImgtoolError
from imgtool.settings import did_you_mean

if TYPE_CHECKING:
    from imgtool.engines.awb.estimate import Net
    from imgtool.engines.awb.settings import Bench
    from imgtool.engines.awb.stats import AwbStats

Array = npt.NDArray[Any]
White = tuple[float, float]

METHODS = ("net", "default", *apply.FREE)
SNAPPED = ", on the curve"
"""Marks a method's white moved to the nearest point on the camera's curve."""
CAMERA = "camera"
"""The camera's own estimate, where the data tells it."""
SHOWN = 8
_COLUMNS = ("mean", "median", "trimean", "best25", "worst25", "p95", "max")
_MANY = 40


class Row(NamedTuple):
    """What a method finds on a frame; errors in degrees."""

    name: str
    camera: str
    group: str
    method: str
    r: float
    b: float
    truth_r: float
    truth_b: float
    recovery: float
    reproduction: float
    confidence: float | None


def wanted(settings: Bench) -> list[str]:
    """Return the methods that the settings name.

    Raises:
        ImgtoolError: Code 2, for one that is unknown, or none.
    """
    names = [word.strip() for word in settings.methods.split(",") if word.strip()]
    for name in names or [""]:
        if name not in METHODS:
            raise ImgtoolError(f"--methods: {name or 'none given'}", did_you_mean(name, METHODS), USAGE)
    return names


def estimates(
    net: Net, stats: AwbStats, methods: Sequence[str], say: Callable[[str], None]
) -> Iterator[tuple[str, White, float | None]]:
    """Yield the method, the white and the confidence of every method that finds a white."""
    infer = Infer(inputs=("-",))
    for method in methods:
        own = infer.changed(method="net" if method == "default" else method)
        own = own.changed(fallback="none") if method == "net" else own
        try:
            found = apply.decided(net, stats, own, lambda text: None)
        except ImgtoolError as fault:
            say(f"{method} is left out: {fault.what}")
            continue
        yield method, found.white, found.confidence
        if method in classical.METHODS and stats.camera.known:
            yield method + SNAPPED, classical.snapped(found.white, stats.camera), None
    own_white = of_camera(stats)
    if own_white:
        yield CAMERA, own_white, None


def of_camera(stats: AwbStats) -> White | None:
    """Return the camera's own estimate, None where the frame does not tell it."""
    if "camera_ct" in stats.about and stats.camera.known:
        r, b = stats.camera.locus.at(stats.about["camera_ct"])
        return float(r), float(b)
    if "camera_gains" in stats.about:
        red, blue = stats.about["camera_gains"]
        return 1 / red, 1 / blue
    return None


def measure(
    net: Net, entries: Sequence[reading.Entry], methods: Sequence[str], lab: Any
) -> tuple[list[Row], int]:
    """Measure every method on every frame.

    Args:
        net: The network.
        entries: Of a data set.
        methods: Some of ``METHODS``.
        lab: Of ``bench``: told how it goes.

    Returns:
        The rows, and how many frames could not be used.

    Raises:
        ImgtoolError: No frame could be used.
    """
    rows: list[Row] = []
    unusable = 0
    with lab.console.progress(len(entries), "errors") as bar:
        for entry in entries:
            try:
                stats = entry.read()
                apply.refuse_empty(stats)
            except ImgtoolError as fault:
                unusable += 1
                lab.watch.say(f"left out: {fault.what}")
            else:
                rows += _rows(net, entry, stats, methods, lab)
            bar.advance(1)
    if not rows:
        raise ImgtoolError("no frame of the data could be used", "imgtool data check awb says why")
    return rows, unusable


def _rows(net: Net, entry: reading.Entry, stats: AwbStats, methods: Sequence[str], lab: Any) -> Iterator[Row]:
    assert stats.truth is not None
    truth = np.array(stats.truth)
    for method, white, confidence in estimates(net, stats, methods, lab.watch.say):
        found = np.array(white)
        recovery, reproduction = angles.recovery(found, truth), angles.reproduction(found, truth)
        errors = float(recovery[0]), float(reproduction[0])
        camera = stats.camera.name or "unknown"
        yield Row(entry.name, camera, stats.group, method, *white, *stats.truth, *errors, confidence)


def _by(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _summary(rows: Sequence[Row]) -> dict[str, object]:
    return {
        "recovery": angles.summary(np.array([row.recovery for row in rows])),
        "reproduction": angles.summary(np.array([row.reproduction for row in rows])),
    }


def _brief(rows: Sequence[Row]) -> dict[str, float]:
    errors = np.sort([row.recovery for row in rows])
    worst = errors[-max(1, round(len(errors) / 4)) :]
    return {"count": len(errors), "mean": float(errors.mean()), "worst25": float(worst.mean())}


def _parts(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, dict[str, dict[str, float]]]:
    """Return part to method to its recovery errors."""
    return {
        part: {method: _brief(some) for method, some in _by(group, lambda row: row.method).items()}
        for part, group in sorted(_by(rows, key).items())
    }


def figures(rows: Sequence[Row], unusable: int) -> dict[str, Any]:
    """Return the errors by method, camera and group, and what confidence is worth."""
    methods = _by(rows, lambda row: row.method)
    found: dict[str, Any] = {
        "frames": len({row.name for row in rows}),
        "left_out": unusable,
        "methods": {name: _summary(some) for name, some in methods.items()},
        "cameras": _parts(rows, lambda row: row.camera),
        "groups": _parts(rows, lambda row: row.group),
    }
    sure = sorted(
        (row for row in methods.get("net", []) if row.confidence is not None),
        key=lambda row: -float(row.confidence or 0),
    )
    if sure:
        most = sure[: max(1, round(0.8 * len(sure)))]
        found["surest_80_over_all"] = _brief(most)["mean"] / max(_brief(sure)["mean"], 1e-9)
    free = {name: _brief(some)["mean"] for name, some in methods.items() if name in apply.FREE}
    if free and "default" in methods:
        found["best_training_free"] = min(free, key=lambda name: free[name])
        found["default_above_best_training_free"] = _brief(methods["default"])["mean"] - min(free.values())
    return found


def tables(told: Mapping[str, Any]) -> list[Table]:
    """Return tables of ``figures``: all methods, by camera, by group."""
    rows: list[tuple[object, ...]] = []
    for method, errors in told["methods"].items():
        own, other = errors["recovery"], errors["reproduction"]
        low, high = own["mean_ci"]
        values = [f"{own[name]:.2f}" for name in _COLUMNS]
        beside = (f"{other['mean']:.2f}", f"{other['worst25']:.2f}")
        rows.append((method, own["count"], values[0], f"{low:.2f}-{high:.2f}", *values[1:], *beside))
    columns = ("method", "frames", "mean", "95 %", *_COLUMNS[1:], "reproduction", "its worst25")
    title = f"angular errors in degrees, {told['frames']} frames; recovery where nothing else is said"
    found = [Table(title, columns, rows)]
    shown = [name for name in told["methods"] if not name.endswith(SNAPPED)]
    for part, heading in (("cameras", "camera"), ("groups", "group")):
        if 1 < len(told[part]) <= _MANY:
            found.append(_part_table(told[part], heading, shown))
    return found


def _part_table(parts: Mapping[str, Any], heading: str, methods: Sequence[str]) -> Table:
    rows: list[tuple[object, ...]] = []
    for part, errors in parts.items():
        means = (f"{errors[name]['mean']:.2f}" if name in errors else "-" for name in methods)
        rows.append((part, max(brief["count"] for brief in errors.values()), *means))
    return Table(f"mean recovery error by {heading}", (heading, "frames", *methods), rows)


# --- the report ---------------------------------------------------------------------------------------


def write(rows: Sequence[Row], entries: Sequence[reading.Entry], folder: Path) -> None:
    """Write ``errors.csv``, ``errors.png`` (means), ``distribution.png`` and ``worst.png`` into a folder."""
    from imgtool import plots

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(Row._fields)
    table.writerows(rows)
    files.write(folder / "errors.csv", text.getvalue().encode())
    methods = {
        name: [row.recovery for row in some] for name, some in _by(rows, lambda row: row.method).items()
    }
    best = "default" if "default" in methods else next(iter(methods))
    unit = "recovery angular error in degrees"
    means = {name: float(np.mean(errors)) for name, errors in methods.items()}
    plots.bars(means, folder / "errors.png", title="Mean error by method", xlabel=unit, highlight=best)
    few = {name: methods[name] for name in (best, "bayes", CAMERA) if name in methods}
    plots.histogram(few, folder / "distribution.png", title="Errors", xlabel=unit)
    worst = sorted((row for row in rows if row.method == best), key=lambda row: -row.recovery)[:SHOWN]
    _contact_sheet(worst, {entry.name: entry for entry in entries}, folder / "worst.png")


def _contact_sheet(worst: Sequence[Row], entries: Mapping[str, reading.Entry], path: Path) -> None:
    from imgtool import sheets

    seen = [entries[row.name].read() for row in worst]
    whites = {
        "white at 5000 K": [tuple(stats.camera.locus.at(5000.0)) for stats in seen],
        worst[0].method: [(row.r, row.b) for row in worst],
        "truth": [(row.truth_r, row.truth_b) for row in worst],
    }
    columns: dict[str, Any] = {
        label: [_shown(stats, white) for stats, white in zip(seen, some, strict=True)]
        for label, some in whites.items()
    }
    captions = [f"{row.recovery:.1f}°  {Path(row.name).name}  {row.camera}  {row.group}" for row in worst]
    sheets.sheet(columns, path, title=f"Worst frames of {worst[0].method}", captions=captions, width=1200)


def _shown(stats: AwbStats, white: White) -> Array:
    """Return a frame's cells balanced, enlarged, as ``(H, W, 3)`` in 0..1, without a colour matrix."""
    balanced = np.nan_to_num(stats.cells) / np.array([white[0], 1.0, white[1]])
    level = max(float(np.quantile(balanced[..., 1], 0.98)), 1e-6)
    factor = max(1, 360 // stats.cells.shape[1])
    shown: Array = np.clip(balanced / level, 0, 1) ** (1 / 2.2)
    return shown.repeat(factor, 0).repeat(factor, 1)
