"""Angular errors of all methods on frames whose white is known.

Frames that the network was trained on are told apart, by the marks of frames in the weights' header: the
errors of "net" and "default" on them are no test.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imgtool import files
from imgtool.engine import Budget, Table
from imgtool.engines.awb import angles, apply, classical, data, sets
from imgtool.engines.awb.settings import Infer
from imgtool.errors import USAGE, ImgtoolError, did_you_mean

if TYPE_CHECKING:
    from imgtool.engines.awb.estimate import Net
    from imgtool.engines.awb.settings import Bench
    from imgtool.engines.awb.stats import AwbStats

Array = npt.NDArray[Any]
White = tuple[float, float]

LEARNED = ("net", "default")
"""The methods that frames to train on have shaped."""
METHODS = (*LEARNED, *apply.FREE)
TRAINED, ALL_TRAINED = ", trained on", " (trained on these)"
"""Mark a method on the frames that the network was trained on: some of them, or all."""
SNAPPED = ", on the curve"
"""Marks a method's white moved to the nearest point on the camera's curve."""
CAMERA = "camera (as shot)"
"""The camera's own estimate, where the data tells it."""
ABOVE = 0.2
"""Degrees that the mean error of "default" may be above the best training-free method's."""
FEWEST = 100
"""Frames never trained on from which on that is judged."""
SHOWN = 8
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


def of_camera(stats: AwbStats) -> White | None:
    """Return the camera's own estimate, None where the frame does not tell it."""
    if "camera_ct" in stats.about and stats.camera.known:
        r, b = stats.camera.locus.at(stats.about["camera_ct"])
        return float(r), float(b)
    if "camera_gains" in stats.about:
        red, blue = stats.about["camera_gains"]
        return 1 / red, 1 / blue
    return None


def run(
    net: Net, entries: Sequence[sets.Entry], methods: Sequence[str], settings: Bench, lab: Any
) -> dict[str, Any]:
    """Measure every method on every frame, and write the report where the settings name one.

    Args:
        net: The network.
        entries: Of the data set that the settings name.
        methods: Some of ``METHODS``.
        settings: Of ``bench``.
        lab: Of ``bench``: knows the weights, and is told how it goes.

    Returns:
        What ``figures`` gives; "header_scores" too, where some of the frames were trained on.

    Raises:
        ImgtoolError: No frame could be used.
    """
    header = lab.weights.header
    rows, unusable = measure(net, entries, methods, lab, _as_seen(net, settings))
    rows, trained = labelled(rows, header.get("frames", ()))
    told = figures(rows, unusable, len(trained))
    if "frames" not in header:
        lab.watch.say("the weights do not tell what they were trained on: errors on that would be no test")
        told.pop("judged_frames", None)
    elif trained:
        told["header_scores"] = header.get("scores", {})
        scores = ", ".join(f"{name} {value:.2f}" for name, value in told["header_scores"].items())
        lab.watch.say(
            f"{len(trained)} of {told['frames']} frames were trained on: errors on them are no test; "
            f"by grouped cross-validation the weights' header has {scores or 'no scores'}"
        )
    if settings.report:
        write(rows, entries, settings.report)
    return told


def _as_seen(net: Net, settings: Bench) -> Sequence[sets.Entry] | None:
    """Return the entries as fine as the original's network sees them; None for others."""
    if net.shape.arch != "deepawb" or settings.data is None:
        return None
    sources: Any = SimpleNamespace(**settings.model_dump() | net.shape.model_dump())
    return sets.dataset(settings.data, sources)


def measure(
    net: Net,
    entries: Sequence[sets.Entry],
    methods: Sequence[str],
    lab: Any,
    fine: Sequence[sets.Entry] | None = None,
) -> tuple[list[Row], int]:
    """Measure every method on every frame.

    Args:
        net: The network.
        entries: Of a data set.
        methods: Some of ``METHODS``.
        lab: Of ``bench``: told how it goes.
        fine: The same as the network sees them, where that is otherwise.

    Returns:
        The rows, and how many frames could not be used.

    Raises:
        ImgtoolError: No frame could be used.
    """
    rows: list[Row] = []
    unusable = 0
    learned = [method for method in methods if method in LEARNED]
    others = [method for method in methods if method not in LEARNED]
    with lab.console.progress(len(entries), "errors") as bar:
        for entry, own in zip(entries, fine or entries, strict=True):
            try:
                stats = entry.read()
                seen = stats if own is entry else own.read()
                apply.refuse_empty(stats)
            except ImgtoolError as fault:
                unusable += 1
                lab.watch.say(f"left out: {fault.what}")
            else:
                rows += _rows(net, entry.name, seen, learned, lab)
                rows += _rows(net, entry.name, stats, others, lab)
                rows += _row_of_camera(entry.name, stats)
            bar.advance(1)
    if not rows:
        raise ImgtoolError("no frame of the data could be used", "imgtool data check awb says why")
    return rows, unusable


def _rows(net: Net, name: str, stats: AwbStats, methods: Sequence[str], lab: Any) -> Iterator[Row]:
    for method, white, confidence in estimates(net, stats, methods, lab.watch.say):
        yield _row(name, stats, method, white, confidence)


def _row_of_camera(name: str, stats: AwbStats) -> list[Row]:
    white = of_camera(stats)
    return [_row(name, stats, CAMERA, white)] if white else []


def _row(name: str, stats: AwbStats, method: str, white: White, confidence: float | None = None) -> Row:
    assert stats.truth is not None
    found, truth = np.array(white), np.array(stats.truth)
    errors = float(angles.recovery(found, truth)[0]), float(angles.reproduction(found, truth)[0])
    camera = stats.camera.name or "unknown"
    return Row(name, camera, stats.group, method, *white, *stats.truth, *errors, confidence)


def labelled(rows: Sequence[Row], frames: Collection[str]) -> tuple[list[Row], set[str]]:
    """Mark the rows of "net" and "default" on frames that the network was trained on.

    Args:
        rows: Of all frames.
        frames: The weights' marks of frames (``data.mark``): of their stems, so that a frame of that name
            in another folder is taken for trained on too.

    Returns:
        The rows, and the names of the frames that were trained on.
    """
    names, marks = {row.name for row in rows}, set(frames)
    trained = {name for name in names if data.mark(name) in marks}
    mark = ALL_TRAINED if trained == names else TRAINED
    found = [
        row._replace(method=row.method + mark) if row.method in LEARNED and row.name in trained else row
        for row in rows
    ]
    return found, trained


def _by(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _methods(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows by method: what tests the network first, then what it was trained on."""
    found = _by(rows, lambda row: row.method)
    return dict(
        sorted(found.items(), key=lambda each: (each[0] not in LEARNED, not each[0].startswith(LEARNED)))
    )


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


def figures(rows: Sequence[Row], unusable: int, trained: int = 0) -> dict[str, Any]:
    """Return the errors by method, camera and group, what confidence is worth, and how "default" compares.

    Confidence and that comparison are of frames only that were not trained on.

    Args:
        rows: As ``labelled`` gives them.
        unusable: Frames that could not be used.
        trained: Frames that were trained on.
    """
    methods = _methods(rows)
    found: dict[str, Any] = {
        "frames": len({row.name for row in rows}),
        "trained_on": trained,
        "left_out": unusable,
        "methods": {name: _summary(some) | _trained(name, some) for name, some in methods.items()},
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
    return found | _against_free(methods)


def _trained(method: str, rows: Sequence[Row]) -> dict[str, int]:
    return {"trained_on": len(rows)} if method.endswith((TRAINED, ALL_TRAINED)) else {}


def _against_free(methods: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Compare "default" with the training-free method of the least error on the same frames."""
    own = {row.name: row.recovery for row in methods.get("default", ())}
    above: dict[str, tuple[float, int]] = {}
    for name in apply.FREE:
        apart = [own[row.name] - row.recovery for row in methods.get(name, ()) if row.name in own]
        if apart:
            above[name] = float(np.mean(apart)), len(apart)
    if not above:
        return {}
    best = max(above, key=lambda name: above[name])
    return {
        "best_training_free": best,
        "default_above_best_training_free": above[best][0],
        "judged_frames": above[best][1],
    }


def budgets(told: Mapping[str, Any]) -> list[Budget]:
    """Return how far "default" may be above the best training-free method, where 10 untrained frames tell."""
    if told.get("judged_frames", 0) < FEWEST:
        return []
    name = f"default above {told['best_training_free']}, mean recovery error on frames never trained on"
    return [Budget(name, ABOVE, told["default_above_best_training_free"], "degrees")]


def tables(told: Mapping[str, Any]) -> list[Table]:
    """Return tables of ``figures``: all methods, by camera, by group."""
    rows: list[tuple[object, ...]] = []
    for method, errors in told["methods"].items():
        own = errors["recovery"]
        low, high = own["mean_ci"]
        values = [f"{own[name]:.2f}" for name in ("median", "worst25")]
        reproduction = f"{errors['reproduction']['mean']:.2f}"
        rows.append(
            (method, own["count"], f"{own['mean']:.2f}", f"{low:.2f}-{high:.2f}", *values, reproduction)
        )
    columns = ("method", "n", "mean", "95 %", "median", "worst 25 %", "repr. mean")
    of_trained = f", {told['trained_on']} of them trained on" if told["trained_on"] else ""
    title = f"angular errors in degrees, {told['frames']} frames{of_trained}: recovery, and mean reproduction"
    found = [Table(title, columns, rows)]
    shown = [name for name in told["methods"] if name.startswith("default")] or [next(iter(told["methods"]))]
    shown += [name for name in (told.get("best_training_free", "bayes"), CAMERA) if name in told["methods"]]
    for part, heading in (("cameras", "camera"), ("groups", "group")):
        if 1 < len(told[part]) <= _MANY:
            found.append(_part_table(told[part], heading, list(dict.fromkeys(shown))))
    return found


def _part_table(parts: Mapping[str, Any], heading: str, methods: Sequence[str]) -> Table:
    rows: list[tuple[object, ...]] = []
    for part, errors in parts.items():
        means = (f"{errors[name]['mean']:.2f}" if name in errors else "-" for name in methods)
        rows.append((part, max(brief["count"] for brief in errors.values()), *means))
    return Table(f"mean recovery error by {heading}", (heading, "frames", *methods), rows)


# --- the report ---------------------------------------------------------------------------------------


def write(rows: Sequence[Row], entries: Sequence[sets.Entry], folder: Path) -> None:
    """Write ``errors.csv``, ``errors.png`` (means), ``distribution.png`` and ``worst.png`` into a folder."""
    from imgtool import plots

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(Row._fields)
    table.writerows(rows)
    files.write(folder / "errors.csv", text.getvalue().encode())
    methods = {name: [row.recovery for row in some] for name, some in _methods(rows).items()}
    best = next((name for name in methods if name.startswith("default")), next(iter(methods)))
    unit = "recovery angular error in degrees"
    means = {name: float(np.mean(errors)) for name, errors in methods.items()}
    plots.bars(means, folder / "errors.png", title="Mean error by method", xlabel=unit, highlight=best)
    few = {
        name: some
        for name, some in methods.items()
        if name == best or name in ("bayes", CAMERA) or name == "default" + TRAINED
    }
    plots.histogram(few, folder / "distribution.png", title="Errors", xlabel=unit)
    worst = sorted((row for row in rows if row.method == best), key=lambda row: -row.recovery)[:SHOWN]
    _contact_sheet(worst, {entry.name: entry for entry in entries}, folder / "worst.png")


def _contact_sheet(worst: Sequence[Row], entries: Mapping[str, sets.Entry], path: Path) -> None:
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
