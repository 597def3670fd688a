"""The course of a training: stages, cycles, when it is enough, samples on the way, data that fails."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import TOY, Batch, Numbers, assert_same, assert_same_run, go, rows, state, toy

from imgtool import checkpoint, plots, sheets, train
from imgtool.engine import Engine
from imgtool.errors import DONE, USAGE, ImgtoolError
from imgtool.samples import smoothed, stage_of
from imgtool.settings import Train
from imgtool.train import learning_rate


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plots, "curves", lambda *_, **__: None)
    monkeypatch.setattr(sheets, "sheet", lambda *_, **__: None)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class _Kill(Exception):
    pass


def killed_at(step: int, engine: Engine) -> Engine:
    """The same engine, whose loss does not survive a step."""
    calls = iter(range(10**6))

    def loss(*arguments: Any) -> Any:
        if next(calls) == step:
            raise _Kill
        return engine.loss(*arguments)

    return dataclasses.replace(engine, loss=loss)


# --- stages -----------------------------------------------------------------------------------

STAGES = ((2, 4), (3, 2), (3, 1))
SAMPLES = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11], [12, 13], [14], [15], [16]]
"""The sample numbers of each of the eight steps, counted by hand."""


class Noted(Numbers):
    """Notes the numbers that it is asked for; what is asked of a later stage is smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def __getitem__(self, number: int) -> Batch:
        self.asked.append(number)
        size = 16 >> stage_of(STAGES, number)
        return Batch(*(part[:, :size, :size] for part in super().__getitem__(number)))


def staged(**fields: Any) -> tuple[Engine, Noted, list[tuple[int, ...]]]:
    """An engine of three stages, its data, and the shapes of the batches that it was given."""
    noted, shapes = Noted(), []

    def loss(net: Any, batch: Batch, settings: Train) -> Any:
        shapes.append(tuple(batch.x.shape))
        return TOY.loss(net, batch, settings)

    engine = dataclasses.replace(
        TOY, data=lambda settings: (noted, Numbers(2)), stages=lambda settings: STAGES, loss=loss, **fields
    )
    return engine, noted, shapes


def test_batches_change_from_stage_to_stage_and_sample_numbers_follow_each_other(tmp_path: Path) -> None:
    engine, noted, shapes = staged()
    go(engine, toy(tmp_path))
    assert noted.asked == list(range(17))
    assert shapes == [(4, 3, 16, 16)] * 2 + [(2, 3, 8, 8)] * 3 + [(1, 3, 4, 4)] * 3


@pytest.mark.parametrize("step", [2, 4, 5, 7])
def test_resuming_within_and_between_stages_ends_at_the_same_bits(step: int, tmp_path: Path) -> None:
    engine, noted, _ = staged()
    go(engine, toy(tmp_path / "whole", save_every=1))
    with pytest.raises(_Kill):
        go(killed_at(step, engine), toy(tmp_path / "broken", save_every=1))
    noted.asked.clear()
    go(engine, toy(tmp_path, resume=tmp_path / "broken"))
    assert noted.asked == list(range(SAMPLES[step][0], 17))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_the_stage_of_a_sample_is_that_of_its_step() -> None:
    for number, stage in enumerate([0] * 8 + [1] * 6 + [2] * 3 + [2] * 5):
        assert stage_of(STAGES, number) == stage


@pytest.mark.parametrize("start", range(10))
def test_the_number_of_batches_is_known_before(start: int) -> None:
    numbers = train.Numbers(STAGES, start)
    assert list(numbers) == SAMPLES[start:]
    assert len(numbers) == len(SAMPLES[start:])


def test_stages_of_another_number_of_steps_are_a_bug(tmp_path: Path) -> None:
    engine, _, _ = staged()
    with pytest.raises(ValueError, match="not those of 9 steps"):
        go(engine, toy(tmp_path, steps=9))


def test_patience_counts_in_the_last_stage_alone(tmp_path: Path) -> None:
    """The first epoch is the best; the last stage begins with the fourth, so two more end at five."""
    scores = iter((9.0, 8.0, 7.0, 6.0, 5.0, 4.0))
    engine = dataclasses.replace(
        TOY,
        score=lambda net, batch: {"psnr": torch.full((len(batch.x),), next(scores))},
        stages=lambda settings: ((12, 2), (12, 1)),
    )
    go(engine, toy(tmp_path, steps=24, patience=2))
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


# --- cycles of the learning rate ---------------------------------------------------------------


def test_cycles_of_the_rate_begin_at_the_peak_and_double() -> None:
    """After 10 steps of warm-up, cycles of 20, 40 and 80 steps begin at 10, 30, 70 and 150."""
    settings = Train(steps=200, warmup=10, lr=2.0, final_lr=0.1, cycle=20)
    rates = [learning_rate(step, settings) for step in range(200)]
    assert rates[0] == pytest.approx(0.2)
    starts = [10, 30, 70, 150]
    peaks = [step for step in range(10, 200) if step == 10 or rates[step] > rates[step - 1]]
    assert peaks == starts
    for start, length in zip(starts, (20, 40, 80, 160), strict=True):
        assert rates[start] == 2.0
        for done in range(min(length, 200 - start)):
            expected = 0.2 + (2.0 - 0.2) * (1 + math.cos(math.pi * done / length)) / 2
            assert rates[start + done] == pytest.approx(expected)


def test_a_run_with_cycles_resumes_at_the_same_bits(tmp_path: Path) -> None:
    go(TOY, toy(tmp_path / "whole", cycle=2))
    with pytest.raises(_Kill):
        go(killed_at(5, TOY), toy(tmp_path / "broken", cycle=2))
    go(TOY, toy(tmp_path, resume=tmp_path / "broken"))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    go(TOY, toy(tmp_path / "plain"))
    assert not torch.equal(
        state(tmp_path / "plain")["net"]["0.bias"], state(tmp_path / "whole")["net"]["0.bias"]
    )


# --- enough -----------------------------------------------------------------------------------


def stops_at(epoch: int) -> Engine:
    def enough(logged: Sequence[Mapping[str, Any]], settings: Train) -> str:
        assert [row["epoch"] for row in logged] == list(range(1, len(logged) + 1))
        assert all(math.isfinite(row["scores"]["psnr"]) for row in logged)
        return f"good enough after {len(logged)} epochs" if len(logged) >= epoch else ""

    return dataclasses.replace(TOY, enough=enough)


def test_a_run_ends_when_its_engine_has_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(stops_at(2), toy(tmp_path, steps=20)) == DONE
    told = capsys.readouterr()
    assert "good enough after 2 epochs" in told.err
    assert json.loads(told.out.splitlines()[-1])["weights"] == str(tmp_path / "best.safetensors")
    assert [row["step"] for row in rows(tmp_path)] == [4, 8]
    assert state(tmp_path)["step"] == 8


def test_what_was_enough_is_enough_when_resumed(tmp_path: Path) -> None:
    go(stops_at(2), toy(tmp_path, steps=20))
    before = state(tmp_path)
    go(stops_at(2), toy(tmp_path, resume=tmp_path))
    assert_same(state(tmp_path), before)
    go(stops_at(4), toy(tmp_path, resume=tmp_path))
    assert [row["step"] for row in rows(tmp_path)] == [4, 8, 12, 16]


def test_smoothing_begins_at_the_first_value() -> None:
    assert smoothed([4.0], 0.9) == 4.0
    assert smoothed([4.0, 2.0, 1.0], 0.75) == pytest.approx(0.75 * (0.75 * 4 + 0.25 * 2) + 0.25 * 1)
    assert math.isnan(smoothed([], 0.5))


# --- samples on the way -------------------------------------------------------------------------


def test_samples_are_drawn_on_the_way_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, list[str], str]] = []
    monkeypatch.setattr(
        sheets,
        "sheet",
        lambda images, path, title: drawn.append((path.name, [*images], title)),
    )
    go(TOY, toy(tmp_path / "plain"))
    drawn.clear()
    go(TOY, toy(tmp_path / "sampled", sample_every=3))
    labels = ["x", "output"]
    assert drawn == [
        ("step-000003.png", labels, "step 3"),
        ("epoch-0001.png", labels, "epoch 1"),
        ("step-000006.png", labels, "step 6"),
        ("epoch-0002.png", labels, "epoch 2"),
    ]
    assert_same_run(tmp_path / "plain", tmp_path / "sampled")


# --- data that fails in the middle --------------------------------------------------------------


def failing(number: int, held_out: Numbers | None = None) -> Engine:
    return dataclasses.replace(TOY, data=lambda settings: (Numbers(fault_at=number), held_out or Numbers(2)))


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (3, 1), (4, 0), (5, 0)])
def test_after_data_that_failed_a_run_goes_on_and_ends_at_the_same_bits(
    step: int, workers: int, tmp_path: Path
) -> None:
    """The first epoch ends after step 4: until then there are no weights but those of the failure."""
    go(TOY, toy(tmp_path / "whole", save_every=100))
    folder = tmp_path / "broken"
    with pytest.raises(ImgtoolError, match="photo 7 is torn") as caught:
        go(failing(2 * step + 1), toy(folder, save_every=100, workers=workers))
    assert f"--resume {folder}" in caught.value.hint
    assert state(folder)["step"] == step
    kept = checkpoint.read_weights(folder / "best.safetensors", "deblur")
    assert kept.header["step"] == (4 if step >= 4 else step)
    assert math.isfinite(kept.header["scores"]["psnr"])
    if step < 4:
        assert_same(load_file(folder / "best.safetensors"), dict(state(folder)["ema"]))
    go(TOY, toy(tmp_path, resume=folder))
    assert_same_run(tmp_path / "whole", folder)


def test_where_the_held_out_data_fails_too_the_weights_are_kept_without_a_score(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match="photo 7 is torn"):
        go(failing(5, Numbers(2, fault_at=0)), toy(tmp_path))
    kept = checkpoint.read_weights(tmp_path / "best.safetensors", "deblur")
    assert kept.header["scores"] == {}
    assert_same(dict(kept.state), dict(state(tmp_path)["ema"]))


def test_a_fault_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError) as caught:
        go(failing(1), toy(tmp_path))
    assert (caught.value.hint, caught.value.code) == ("glue it", USAGE)
    assert not (tmp_path / "last.pt").exists()
    assert not (tmp_path / "best.safetensors").exists()


class Dying(Numbers):
    """Ends the process that asks for a sample that is made, ahead of time, after the first steps."""

    def __getitem__(self, number: int) -> Batch:
        if number == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


def test_a_run_whose_data_process_is_killed_goes_on(tmp_path: Path) -> None:
    engine = dataclasses.replace(TOY, data=lambda settings: (Dying(), Numbers(2)))
    with pytest.raises(ImgtoolError, match="a process that prepares data was killed") as caught:
        go(engine, toy(tmp_path / "run", workers=1))
    assert f"--resume {tmp_path / 'run'}" in caught.value.hint
    go(TOY, toy(tmp_path, resume=tmp_path / "run", workers=0))
    go(TOY, toy(tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")
