"""Cross-validation: groups stay whole, nothing is measured that was trained on, nothing is done twice."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imgtool import checkpoint, train
from imgtool.console import Console
from imgtool.engines.awb import campaign, data, model
from imgtool.engines.awb.camera import GENERIC_LOCUS, Camera
from imgtool.engines.awb.engine import ENGINE
from imgtool.engines.awb.settings import Train
from imgtool.engines.awb.stats import AwbStats
from imgtool.errors import USAGE, ImgtoolError

GROUPS = "aaabbccd"
CAMERA = Camera("toy", GENERIC_LOCUS, known=True)


def frame(number: int, group: str) -> AwbStats:
    rng = np.random.default_rng(number)
    r, b = CAMERA.locus.at(2800.0 + 600 * number)
    cells = rng.uniform(0.1, 0.8, (8, 12, 1)) * rng.uniform(0.7, 1, (8, 12, 3)) * (r, 1, b)
    covered = np.ones((8, 12), np.float32)
    return AwbStats(
        cells.astype(np.float32),
        covered,
        CAMERA,
        name=f"frame-{number}",
        truth=(float(r), float(b)),
        group=group,
    )


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> list[AwbStats]:
    every = [frame(number, group) for number, group in enumerate(GROUPS)]
    monkeypatch.setattr(data, "frames", lambda settings: every)
    return every


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take time, and have tests of their own."""
    for name in ("plots.curves", "plots.histogram", "sheets.sheet"):
        monkeypatch.setattr(f"imgtool.{name}", lambda *args, **named: None)


@dataclass
class Crew:
    """Writes weights without training, and records what it was asked to train on."""

    folder: Path
    asked: dict[str, Train] = field(default_factory=dict)

    def say(self, text: str) -> None:
        pass

    def train(self, settings: Train, name: str) -> Mapping[str, Any]:
        self.asked[name] = settings
        torch.manual_seed(len(self.asked))
        path = self.folder / name / "best.safetensors"
        checkpoint.save_weights(path, ENGINE, settings, model.build(settings).state_dict(), {})
        return {"best": {"scores": {}}, "folder": str(path.parent), "weights": str(path)}


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "errors.csv").read_text().splitlines()))


def test_folds_keep_groups_whole_and_are_of_like_size() -> None:
    rng = np.random.default_rng(0)
    for folds in (2, 3, 7):
        names = [f"group-{number}" for number in rng.integers(0, 20, 200)]
        dealt = data.fold_of(names, folds)
        assert set(dealt) == set(names)
        sizes = Counter(dealt[name] for name in names)
        assert set(sizes) == set(range(folds))
        assert max(sizes.values()) - min(sizes.values()) <= max(Counter(names).values())
        assert data.fold_of(names[::-1], folds) == dealt
    with pytest.raises(ImgtoolError, match="2 groups cannot make 3 folds") as caught:
        data.fold_of(["a", "b", "a"], 3)
    assert caught.value.code == USAGE


@pytest.mark.parametrize("group", ["photographer", "camera", "none"])
def test_splits_divide_by_what_was_asked(frames: list[AwbStats], group: str) -> None:
    cameras = [each.changed(camera=Camera(f"camera-{n % 4}", GENERIC_LOCUS)) for n, each in enumerate(frames)]
    key = {"photographer": lambda e: e.group, "camera": lambda e: e.camera.name, "none": lambda e: e.name}[
        group
    ]
    for fold in (-1, 0, 1, 2):
        kept, out = data.divided(cameras, Train(group=group, folds=3, fold=fold))
        assert sorted(each.name for each in kept + out) == sorted(each.name for each in cameras)
        assert kept
        assert out
        assert not {key(each) for each in kept} & {key(each) for each in out}


def test_every_frame_is_measured_once_by_weights_that_never_saw_its_group(
    frames: list[AwbStats], tmp_path: Path, undrawn: None
) -> None:
    crew = Crew(tmp_path)
    record = campaign.run(Train(folds=3, steps=50, epoch_steps=10, patience=2), crew)
    assert list(crew.asked) == ["fold-0", "fold-1", "fold-2", "all"]
    found = rows(tmp_path)
    assert sorted(row["name"] for row in found) == sorted(each.name for each in frames)
    for fold in range(3):
        asked = crew.asked[f"fold-{fold}"]
        learnt, _ = data.divided(frames, asked)
        measured = {row["group"] for row in found if row["fold"] == str(fold)}
        assert measured
        assert not measured & {each.group for each in learnt}
        # One epoch, at the end: what is measured on chooses no weights, and stops no training.
        assert (asked.epoch_steps, asked.steps, asked.patience) == (50, 50, 0)
    learnt, _ = data.divided(frames, crew.asked["all"])
    assert len(learnt) == len(frames)
    assert record["weights"] == str(tmp_path / "all" / "best.safetensors")
    told = checkpoint.read_weights(Path(record["weights"]), "awb").header
    assert told["scores"]["recovery"] == record["recovery"]["mean"]
    assert told["crossvalidation"] == "3 folds by photographer"


def test_errors_are_those_of_the_estimates_written(frames: list[AwbStats], tmp_path: Path) -> None:
    record = campaign.run(Train(folds=2), Crew(tmp_path))
    truth = {each.name: each.truth for each in frames}
    errors = []
    for row in rows(tmp_path):
        one = np.array([float(row["r"]), 1, float(row["b"])])
        two = np.insert(np.array(truth[row["name"]]), 1, 1.0)
        errors.append(np.degrees(np.arccos(one @ two / np.linalg.norm(one) / np.linalg.norm(two))))
        assert float(row["recovery"]) == pytest.approx(errors[-1], abs=1e-4)
    assert record["recovery"]["mean"] == pytest.approx(np.mean(errors), abs=1e-4)
    assert json.loads((tmp_path / "folds.json").read_text())["frames"] == len(frames)
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_second_call_trains_nothing_again(
    frames: list[AwbStats], tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Train(data=(tmp_path,), folds=2, steps=2, batch=2, workers=0, device="cpu", threads=1)
    console = Console(quiet=True)
    first = campaign.run(settings, train.Crew(ENGINE, settings, tmp_path, console))
    kept = (tmp_path / "errors.csv").read_bytes()
    assert (tmp_path / "fold-1" / "best.safetensors").exists()

    def never(*args: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "Loop", never)
    assert campaign.run(settings, train.Crew(ENGINE, settings, tmp_path, console)) == first
    assert (tmp_path / "errors.csv").read_bytes() == kept


def test_a_campaign_is_what_was_asked_for() -> None:
    assert campaign.wanted(Train(folds=3))
    assert not campaign.wanted(Train())
    assert not campaign.wanted(Train(folds=3, fold=1))


def test_a_folder_of_many_runs_is_not_written_into_by_one(tmp_path: Path) -> None:
    train.Crew(ENGINE, Train(folds=2), tmp_path, Console(quiet=True))
    for settings in (Train(out=tmp_path), Train(out=tmp_path, folds=2)):
        with pytest.raises(ImgtoolError, match="already holds a run"):
            train.run(ENGINE, settings, Console(quiet=True))
