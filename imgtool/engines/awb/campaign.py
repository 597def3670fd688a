"""Trainings that are many: grouped cross-validation."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgtool import checkpoint, files
from imgtool.engines.awb import angles, data, estimate
from imgtool.engines.awb.settings import Model, Train
from imgtool.engines.awb.stats import AwbStats
from imgtool.settings.sources import make

if TYPE_CHECKING:
    from imgtool.engine import Crew

Array = npt.NDArray[Any]


def wanted(settings: Train) -> bool:
    """Tell whether the settings ask for more than one training."""
    return settings.folds > 0 and settings.fold < 0


def run(settings: Train, crew: Crew) -> Mapping[str, Any]:
    """Train once without each fold and measure on it, then train on everything.

    The weights measured are those of the last step, so that nothing is chosen by what is measured on. The
    scores in the header of the weights trained on everything are those of the cross-validation.
    The folder gets ``errors.csv`` (a row for each frame), ``errors.png`` and ``folds.json``.

    Returns:
        Summaries of the held-out errors, and the weights of the training on everything.
    """
    last = settings.changed(epoch_steps=settings.steps, patience=0)
    every = data.frames(settings)
    names = data.groups(every, settings.group)
    dealt = data.fold_of(names, settings.folds)
    rows: list[dict[str, object]] = []
    for fold in range(settings.folds):
        found = crew.train(last.changed(fold=fold), f"fold-{fold}")
        out = [stats for stats, name in zip(every, names, strict=True) if dealt[name] == fold]
        rows += [row | {"fold": fold} for row in measured(str(found["weights"]), out)]
        errors = [float(str(row["recovery"])) for row in rows if row["fold"] == fold]
        crew.say(f"fold {fold}: {len(out)} frames, recovery error {np.mean(errors):.3f} degrees")
    final = crew.train(last.changed(folds=0, train_on_all=True), "all")
    summary: dict[str, Any] = {
        name: angles.summary(np.array([row[name] for row in rows], float))
        for name in ("recovery", "reproduction")
    }
    scores = {
        "recovery": summary["recovery"]["mean"],
        "recovery_worst25": summary["recovery"]["worst25"],
        "reproduction": summary["reproduction"]["mean"],
    }
    how = f"{settings.folds} folds by {settings.group}"
    checkpoint.relabel(Path(str(final["weights"])), {"scores": scores, "crossvalidation": how})
    record = {
        "frames": len(rows),
        "folds": settings.folds,
        "group": settings.group,
        "groups": sorted(dealt),
        **summary,
        "per_fold": {str(fold): _mean(rows, fold) for fold in range(settings.folds)},
        "folder": str(crew.folder),
        "weights": final["weights"],
    }
    _write(rows, crew)
    files.write(crew.folder / "folds.json", json.dumps(record, indent=2).encode())
    return record


def _mean(rows: Sequence[Mapping[str, object]], fold: int) -> float:
    return float(np.mean([float(str(row["recovery"])) for row in rows if row["fold"] == fold]))


def measured(weights: str, frames: Sequence[AwbStats]) -> list[dict[str, object]]:
    """Return, for each frame, its name, its group, the estimate and its errors in degrees."""
    read = checkpoint.read_weights(checkpoint.find(weights), "awb")
    shape = make(Model, read.model, f"weights {read.name}")
    net = estimate.of_state(shape, {name: value.numpy() for name, value in read.state.items()})
    rows: list[dict[str, object]] = []
    for stats in frames:
        white = estimate.white(net, stats)
        one, two = np.array([[white.r, white.b]]), np.array([stats.truth])
        rows.append(
            {
                "name": stats.name,
                "group": stats.group,
                "camera": stats.camera.name,
                "r": white.r,
                "b": white.b,
                "confidence": white.confidence,
                "recovery": float(angles.recovery(one, two)[0]),
                "reproduction": float(angles.reproduction(one, two)[0]),
            }
        )
    return rows


def _write(rows: Sequence[Mapping[str, object]], crew: Crew) -> None:
    from imgtool import plots

    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    files.write(crew.folder / "errors.csv", text.getvalue().encode())
    by_fold = {
        f"fold {fold}": [float(str(row["recovery"])) for row in rows if row["fold"] == fold]
        for fold in sorted({int(str(row["fold"])) for row in rows})
    }
    plots.histogram(
        by_fold,
        crew.folder / "errors.png",
        title="Held-out frames",
        xlabel="recovery angular error in degrees",
    )
