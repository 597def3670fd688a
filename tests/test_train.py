"""Training: killed and resumed it ends at the same bits; what goes wrong is said in one line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toy import (
    TOY,
    Batch,
    Numbers,
    ToyModel,
    ToyTrain,
    assert_same,
    assert_same_run,
    build,
    go,
    rows,
    state,
    toy,
)

from imgtool import checkpoint, cli, files, plots, sheets, train
from imgtool.console import Console
from imgtool.engine import Engine
from imgtool.errors import DONE, FAILED, INTERRUPTED, USAGE, ImgtoolError
from imgtool.settings import Train
from imgtool.settings.sources import table
from imgtool.train import learning_rate


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "curves", lambda *_, **__: None)
    monkeypatch.setattr(sheets, "sheet", lambda *_, **__: None)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch waits five seconds for a worker to end by itself before it ends it."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)


# --- killed and resumed, on the command line --------------------------------------------------

SIGNALLED = """
import os, subprocess
from imgtool import cli, train
learn = train.Loop._learn
def until(loop, batch):
    if loop.step == {step}:
        subprocess.call(["kill", "-{number}", "--", f"-{{os.getpgid(0)}}"])
    learn(loop, batch)
train.Loop._learn = until
cli.main()
"""
"""The command line, in which all processes of a run get a signal at a step, as a terminal sends it.

It comes from another process: workers pass over what their own parent sends.
"""


def words(photographs: Path, folder: Path, workers: int = 0) -> list[str]:
    return (
        f"train deblur --photos {photographs} -o {folder} --steps 15 --epoch-steps 5 --save-every 2"
        f" --warmup 3 --crop 32 --batch 2 --held-out 2 --threads 1 --device cpu --workers {workers} --json"
    ).split()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False, start_new_session=True)


@pytest.fixture(scope="module")
def unbroken(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    done = command("-m", "imgtool", *words(photographs, folder))
    assert done.returncode == DONE, done.stderr
    return folder


@pytest.mark.slow
def test_a_run_killed_within_an_epoch_ends_at_the_same_bits(
    photographs: Path, unbroken: Path, tmp_path: Path
) -> None:
    """Killed at step 9: the last state is of step 8, the first epoch ended at 5.

    The data comes from another process here, and from the main one in the unbroken run.
    """
    folder = tmp_path / "run"
    program = SIGNALLED.format(step=9, number=int(signal.SIGKILL))
    killed = command("-c", program, *words(photographs, folder, workers=1))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert state(folder)["step"] == 8
    assert len(rows(folder)) == 1
    done = command("-m", "imgtool", "train", "deblur", "--resume", str(folder), "--json")
    assert done.returncode == DONE, done.stderr
    assert_same_run(folder, unbroken)
    assert not list(folder.glob(".imgtool-*"))


def _stopped_and_resumed(photographs: Path, unbroken: Path, folder: Path, number: int) -> None:
    program = SIGNALLED.format(step=6, number=int(number))
    stopped = command("-c", program, *words(photographs, folder, workers=1))
    assert stopped.returncode == INTERRUPTED, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert f"stopped at step 7; go on with --resume {folder}" in stopped.stderr
    assert state(folder)["step"] == 7
    done = command("-m", "imgtool", "train", "deblur", "--resume", str(folder), "--workers", "0")
    assert done.returncode == DONE, done.stderr
    assert_same_run(folder, unbroken)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_resumed_run_ends_at_the_same_bits(
    photographs: Path, unbroken: Path, tmp_path: Path
) -> None:
    _stopped_and_resumed(photographs, unbroken, tmp_path / "run", signal.SIGINT)


@pytest.mark.slow
def test_terminating_all_processes_saves_as_well(photographs: Path, unbroken: Path, tmp_path: Path) -> None:
    _stopped_and_resumed(photographs, unbroken, tmp_path / "run", signal.SIGTERM)


@pytest.mark.slow
def test_the_run_folder_and_the_json_lines(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in unbroken.iterdir()} == {
        "settings.toml", "log.jsonl", "last.pt", "best.safetensors", "curves.png", "samples"
    }  # fmt: skip
    names = [f"epoch-{number:04d}.png" for number in (1, 2, 3)]
    assert sorted(path.name for path in (unbroken / "samples").iterdir()) == names
    for picture in [unbroken / "curves.png", *(unbroken / "samples").iterdir()]:
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert [(row["epoch"], row["step"]) for row in rows(unbroken)] == [(1, 5), (2, 10), (3, 15)]
    for row in rows(unbroken):
        assert {"epoch", "step", "lr", "loss", "terms", "scores", "seconds"} <= row.keys()
        assert row["loss"] == pytest.approx(sum(row["terms"].values()))
        assert {"psnr", "gain", "ssim", "sharp"} <= row["scores"].keys()


# --- resuming ---------------------------------------------------------------------------------


class _Kill(Exception):
    pass


def _killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    learn = train.Loop._learn

    def until(loop: train.Loop, batch: Any) -> None:
        if loop.step == step:
            monkeypatch.setattr(train.Loop, "_learn", learn)
            raise _Kill
        learn(loop, batch)

    monkeypatch.setattr(train.Loop, "_learn", until)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("step", [4, 5, 7])
def test_resuming_restores_random_numbers_too(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(TOY, toy(tmp_path / "whole"))
    _killed_at(monkeypatch, step)
    with pytest.raises(_Kill):
        go(TOY, toy(tmp_path / "broken"))
    torch.rand(7)
    go(TOY, toy(tmp_path / "broken", resume=tmp_path / "broken"))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.usefixtures("undrawn")
def test_the_log_holds_no_row_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between writing the log of an epoch and saving its state."""
    save = train.Loop._save

    def save_until(loop: train.Loop) -> None:
        if loop.step == 4:
            raise _Kill
        save(loop)

    monkeypatch.setattr(train.Loop, "_save", save_until)
    with pytest.raises(_Kill):
        go(TOY, toy(tmp_path))
    assert [row["step"] for row in rows(tmp_path)] == [4]
    assert state(tmp_path)["step"] == 3
    monkeypatch.setattr(train.Loop, "_save", save)
    go(TOY, toy(tmp_path, resume=tmp_path))
    assert [row["step"] for row in rows(tmp_path)] == [4, 8]


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_never_saved_may_be_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _killed_at(monkeypatch, 1)
    with pytest.raises(_Kill):
        go(TOY, toy(tmp_path))
    (tmp_path / "log.jsonl").write_text('{"step": 4, "from": "another life"}\n')
    go(TOY, toy(tmp_path))
    assert [row["step"] for row in rows(tmp_path)] == [4, 8]
    assert all("from" not in row for row in rows(tmp_path))


@pytest.mark.usefixtures("undrawn")
def test_more_steps_go_on_from_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(TOY, toy(tmp_path))
    go(TOY, toy(tmp_path, resume=tmp_path, steps=14))
    found = rows(tmp_path)
    assert [(row["epoch"], row["step"]) for row in found] == [(1, 4), (2, 8), (3, 12), (4, 14)]
    assert found[0]["seconds"] < found[1]["seconds"] < found[2]["seconds"]
    assert table(tmp_path / "settings.toml", "train", "deblur")["steps"] == 14
    before = state(tmp_path)
    go(TOY, toy(tmp_path, resume=tmp_path))  # nothing is left to do: nothing changes
    assert_same(state(tmp_path), before)


@pytest.mark.usefixtures("undrawn")
def test_the_record_of_a_resumed_run_repeats_it_from_the_start(tmp_path: Path) -> None:
    go(TOY, toy(tmp_path / "first", steps=4))
    go(TOY, toy(tmp_path, resume=tmp_path / "first", steps=8))
    record = table(tmp_path / "first" / "settings.toml", "train", "deblur")
    assert "resume" not in record
    go(TOY, ToyTrain(**(record | {"out": tmp_path / "second"})))
    assert [row["step"] for row in rows(tmp_path / "second")] == [4, 8]


def test_resuming_where_no_run_is_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "deblur", "--resume", str(tmp_path)]) == USAGE
    assert f"error: no run to resume in {tmp_path}" in capsys.readouterr().err
    (tmp_path / "settings.toml").write_text("[train.deblur]\nphotos = ['x']\n")
    with pytest.raises(ImgtoolError, match="no run to resume") as caught:
        checkpoint.read_state(tmp_path / "last.pt", train.STATES)
    assert caught.value.code == USAGE


def test_a_run_of_another_engine_and_a_broken_record_are_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("[train]\n")
    with pytest.raises(ImgtoolError, match="not of the deblur engine") as caught:
        go(TOY, toy(tmp_path, resume=tmp_path))
    assert caught.value.code == USAGE
    (tmp_path / "settings.toml").write_text("[train.deblur]\nsteps = -1\n")
    with pytest.raises(ImgtoolError, match="steps"):
        go(TOY, toy(tmp_path, resume=tmp_path))


@pytest.mark.usefixtures("undrawn")
def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    go(TOY, toy(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ImgtoolError, match="already holds a run") as caught:
        go(TOY, toy(tmp_path))
    assert "--resume" in caught.value.hint
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_a_search_that_somebody_began_meanwhile_is_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(_: object) -> None:
        (tmp_path / train.CAMPAIGN).write_text("{}")

    monkeypatch.setattr(train.track, "check", begun)
    monkeypatch.setattr(train.searching, "run", lambda *_: 7)
    assert train.run(TOY, toy(tmp_path, search=2), Console()) == 7


# --- the learning rate ------------------------------------------------------------------------


def test_the_rate_rises_then_falls_to_its_end() -> None:
    settings = Train(steps=100, warmup=10, lr=2.0, final_lr=0.1)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert all(after < before for before, after in pairwise(rates[10:]))
    assert learning_rate(100, settings) == pytest.approx(0.2)
    assert learning_rate(130, settings) == pytest.approx(0.2)


@pytest.mark.usefixtures("undrawn")
def test_the_rate_that_is_used_is_that_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[float] = []
    step = torch.optim.AdamW.step

    def noted(optimiser: torch.optim.AdamW, *rest: Any) -> Any:
        used.append(optimiser.param_groups[0]["lr"])
        return step(optimiser, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    _killed_at(monkeypatch, 7)
    with pytest.raises(_Kill):
        go(TOY, toy(tmp_path))
    del used[6:]  # the state is of step 6
    go(TOY, toy(tmp_path, resume=tmp_path))
    settings = toy(tmp_path)
    assert used == [learning_rate(number, settings) for number in range(8)]
    assert rows(tmp_path)[-1]["lr"] == used[-1]


# --- freezing ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_frozen_weights_stay_until_their_epoch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = {name: value.clone() for name, value in build(ToyModel()).state_dict().items()}
    frozen = toy(tmp_path, freeze="0.", steps=12, unfreeze_epoch=3, weight_decay=0.5)
    loop = train.Loop(TOY, frozen, tmp_path, Console(quiet=True))
    changed: list[bool] = []
    learn = loop._learn

    def noted(batch: Any) -> None:
        learn(batch)
        changed.append(not torch.equal(loop.net.state_dict()["0.weight"], start["0.weight"]))
        assert not torch.equal(loop.net.state_dict()["3.weight"], start["3.weight"])

    loop._learn = noted  # type: ignore[method-assign]
    loop.go()
    assert changed == [False] * 8 + [True] * 4


def test_a_prefix_that_freezes_nothing_is_a_typing_error(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match=r"--freeze encoder\. fits no parameter") as caught:
        go(TOY, toy(tmp_path, freeze="encoder."))
    assert caught.value.code == USAGE
    assert "0, 3" in caught.value.hint


def test_freezing_everything_is_refused(tmp_path: Path) -> None:
    engine = dataclasses.replace(TOY, build=lambda settings: nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(ImgtoolError, match="--freeze 0 fits every parameter"):
        go(engine, toy(tmp_path, freeze="0"))


class Deep(nn.Module):
    """A part to freeze, of two convolutions with batch normalisation, and a head."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (3, 4):
            layers += [nn.Conv2d(inputs, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(drop), nn.Conv2d(4, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


DEEP: Engine = dataclasses.replace(TOY, build=lambda settings: Deep(settings.drop))
PHASES: dict[str, Any] = {"freeze": "body", "unfreeze_epoch": 2, "steps": 12, "weight_decay": 0.5}


def changes(engine: Engine, settings: Train, folder: Path) -> list[set[str]]:
    """Train; return the names of what each step changed."""
    loop = train.Loop(engine, settings, folder, Console(quiet=True))
    changed: list[set[str]] = []
    learn = loop._learn

    def noted(batch: Any) -> None:
        before = {name: value.clone() for name, value in loop.net.state_dict().items()}
        learn(batch)
        after = loop.net.state_dict()
        changed.append({name for name in before if not torch.equal(before[name], after[name])})

    loop._learn = noted  # type: ignore[method-assign]
    loop.go()
    return changed


HEAD = {"head.1.weight", "head.1.bias"}
LAST = {"body.3.weight", "body.3.bias"}
FIRST = {"body.0.weight", "body.0.bias"}
STATISTICS = {
    f"body.{layer}.{name}"
    for layer in (1, 4)
    for name in ("running_mean", "running_var", "num_batches_tracked")
}
NORMS = {f"body.{layer}.{name}" for layer in (1, 4) for name in ("weight", "bias")}


@pytest.mark.usefixtures("undrawn")
def test_the_second_phase_opens_the_last_layers_and_leaves_their_normalisation(tmp_path: Path) -> None:
    """Eight tensors are frozen; the last four are a convolution and its normalisation."""
    changed = changes(DEEP, toy(tmp_path, **PHASES, unfreeze_share=0.5), tmp_path)
    assert changed == [HEAD] * 4 + [HEAD | LAST] * 8


@pytest.mark.usefixtures("undrawn")
def test_the_second_phase_may_open_everything_or_never_come(tmp_path: Path) -> None:
    changed = changes(DEEP, toy(tmp_path, **PHASES), tmp_path)
    assert changed == [HEAD] * 4 + [HEAD | LAST | FIRST] * 8
    never = toy(tmp_path, **(PHASES | {"unfreeze_epoch": 0, "steps": 8}))
    assert changes(DEEP, never, tmp_path) == [HEAD] * 8


@pytest.mark.usefixtures("undrawn")
def test_normalisation_of_the_frozen_part_may_learn(tmp_path: Path) -> None:
    changed = changes(DEEP, toy(tmp_path, **PHASES, frozen_norm=False), tmp_path)
    assert changed[:4] == [HEAD | STATISTICS] * 4
    assert changed[4:] == [HEAD | LAST | FIRST | NORMS | STATISTICS] * 8


@pytest.mark.usefixtures("undrawn")
def test_without_freezing_normalisation_learns_as_ever(tmp_path: Path) -> None:
    changed = changes(DEEP, toy(tmp_path), tmp_path)
    assert changed[0] == HEAD | LAST | FIRST | NORMS | STATISTICS


@pytest.mark.usefixtures("undrawn")
def test_what_was_opened_learns_at_a_rate_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[list[float]] = []
    step = torch.optim.AdamW.step

    def noted(optimiser: torch.optim.AdamW, *rest: Any) -> Any:
        used.append([group["lr"] for group in optimiser.param_groups])
        return step(optimiser, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    settings = toy(tmp_path, **PHASES, unfreeze_lr=0.25)
    _killed_at(monkeypatch, 7)
    with pytest.raises(_Kill):
        go(DEEP, settings)
    del used[6:]  # the state is of step 6
    go(DEEP, toy(tmp_path, resume=tmp_path, unfreeze_lr=0.5))
    rates = [learning_rate(number, settings) for number in range(12)]
    shares = [0.25] * 6 + [0.5] * 6
    assert used == [[rate, rate * share] for rate, share in zip(rates, shares, strict=True)]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("step", [3, 4, 5, 7])
def test_resuming_near_the_second_phase_ends_at_the_same_bits(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second phase begins at step 4; states are of step 3, 4 and 6."""
    go(DEEP, toy(tmp_path / "whole", **PHASES, unfreeze_share=0.5))
    _killed_at(monkeypatch, step)
    with pytest.raises(_Kill):
        go(DEEP, toy(tmp_path / "broken", **PHASES, unfreeze_share=0.5))
    go(DEEP, toy(tmp_path, resume=tmp_path / "broken"))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.usefixtures("undrawn")
def test_a_run_does_not_go_on_with_another_part_frozen(tmp_path: Path) -> None:
    go(DEEP, toy(tmp_path, **PHASES))
    with pytest.raises(ImgtoolError, match="cannot go on with another --freeze") as caught:
        go(DEEP, toy(tmp_path, resume=tmp_path, freeze="", steps=16))
    assert caught.value.code == USAGE


def test_a_share_that_opens_only_normalisation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match=r"--unfreeze-share 0\.1 opens nothing") as caught:
        go(DEEP, toy(tmp_path, **PHASES, unfreeze_share=0.1))
    assert caught.value.code == USAGE


# --- what an engine begins with ---------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_an_engine_fills_a_new_network_but_not_a_resumed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[float] = []

    def begin(net: nn.Module, settings: ToyTrain) -> str:
        begun.append(settings.drop)
        for parameter in net.parameters():
            nn.init.constant_(parameter, 0.25)
        return "begun with quarters"

    engine = dataclasses.replace(TOY, begin=begin)
    loop = train.Loop(engine, toy(tmp_path), tmp_path, Console())
    for net in (loop.net, loop.ema):
        assert all(bool((parameter == 0.25).all()) for parameter in net.parameters())
    assert "begun with quarters" in capsys.readouterr().err
    go(engine, toy(tmp_path, drop=0.1))
    go(engine, toy(tmp_path, resume=tmp_path, steps=12))
    assert begun == [0.2, 0.1]


@pytest.mark.usefixtures("undrawn")
def test_weights_that_were_named_come_after_what_an_engine_begins_with(tmp_path: Path) -> None:
    go(TOY, toy(tmp_path / "first"))
    weights = tmp_path / "first" / "best.safetensors"

    def begin(net: nn.Module, settings: ToyTrain) -> str:
        nn.init.constant_(next(net.parameters()), 0.25)
        return ""

    engine = dataclasses.replace(TOY, begin=begin)
    loop = train.Loop(engine, toy(tmp_path / "second", weights=str(weights)), tmp_path, Console())
    assert_same(dict(loop.net.state_dict()), load_file(weights))


def test_weights_of_another_network_are_refused_by_what_differs(tmp_path: Path) -> None:
    go(TOY, toy(tmp_path / "first"))
    weights = tmp_path / "first" / "best.safetensors"

    def wider(settings: ToyTrain) -> nn.Module:
        return nn.Sequential(nn.Linear(7, 7))

    engine = dataclasses.replace(TOY, build=wider)
    other = toy(tmp_path / "second", weights=str(weights), drop=0.1)
    with pytest.raises(ImgtoolError, match="another network") as caught:
        train.Loop(engine, other, tmp_path, Console())
    assert caught.value.code == USAGE
    assert caught.value.hint == "they were trained with --drop 0.2"


# --- compiling --------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_compiling_changes_no_name_and_where_it_does_not_work_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda what, **_: compiled.append(what) or what)
    go(TOY, toy(tmp_path / "compiled", compile=True))
    assert len(compiled) == 2  # the trial and the network, which is not the averaged one
    names = build(ToyModel()).state_dict().keys()
    assert state(tmp_path / "compiled")["net"].keys() == names
    assert load_file(tmp_path / "compiled" / "best.safetensors").keys() == names

    def broken(what: object, **_: object) -> object:
        raise RuntimeError("no working C++ compiler\nmore of it")

    monkeypatch.setattr(torch, "compile", broken)
    go(TOY, toy(tmp_path / "plain", compile=True))
    told = capsys.readouterr().err
    assert "--compile does not work here (RuntimeError: no working C++ compiler): going on without" in told
    assert_same(state(tmp_path / "plain")["net"], state(tmp_path / "compiled")["net"])


# --- what is not finite -----------------------------------------------------------------------


def _bad_at(*numbers: int) -> Engine:
    """The toy whose loss is NaN at some of its calls."""
    calls = iter(range(10**6))

    def loss(net: nn.Module, batch: Batch, settings: Train) -> dict[str, Tensor]:
        terms = dict(TOY.loss(net, batch, settings))
        return terms | {"mse": terms["mse"] * (math.nan if next(calls) in numbers else 1)}

    return dataclasses.replace(TOY, loss=loss)


@pytest.mark.usefixtures("undrawn")
def test_steps_that_are_not_finite_are_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(_bad_at(1, 2, 6), toy(tmp_path, max_bad_steps=3)) == DONE
    assert [row["skipped"] for row in rows(tmp_path)] == [2, 3]
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path))
    assert all(value.isfinite().all() for value in state(tmp_path)["net"].values())
    assert len(state(tmp_path)["optimiser"]["state"]) == 4
    assert int(state(tmp_path)["optimiser"]["state"][0]["step"]) == 5
    assert "warning: 3 steps were skipped" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path: Path) -> None:
    engine = dataclasses.replace(
        TOY,
        loss=lambda net, batch, settings: {"root": (net(batch.x) * 0).square().sum().sqrt()},
    )
    with pytest.raises(ImgtoolError, match="not finite for 3 steps in a row, up to step 2"):
        go(engine, toy(tmp_path, max_bad_steps=3))
    assert all(value.isfinite().all() for value in state(tmp_path)["net"].values())


@pytest.mark.usefixtures("undrawn")
def test_going_on_badly_ends_the_run_and_it_can_be_taken_up(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match="not finite for 2 steps in a row, up to step 5") as caught:
        go(_bad_at(4, 5, 6, 7), toy(tmp_path, max_bad_steps=2, save_every=100))
    assert caught.value.code == FAILED
    assert "--lr" in caught.value.hint
    assert state(tmp_path)["step"] == 5
    assert all(value.isfinite().all() for value in state(tmp_path)["net"].values())
    go(TOY, toy(tmp_path, resume=tmp_path))
    assert [row["step"] for row in rows(tmp_path)] == [4, 8]


@pytest.mark.usefixtures("undrawn")
def test_an_epoch_without_a_good_step_is_logged_as_json(tmp_path: Path) -> None:
    go(_bad_at(0, 1, 2, 3), toy(tmp_path))
    assert rows(tmp_path)[0]["loss"] is None
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


# --- best, last, averaged, early ---------------------------------------------------------------


def _scored(*values: float) -> Engine:
    epochs = iter(values)
    return dataclasses.replace(
        TOY, score=lambda net, batch: {"psnr": torch.full((len(batch.x),), next(epochs))}
    )


@pytest.mark.usefixtures("undrawn")
def test_the_best_epoch_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(_scored(1.0, 3.0, 2.0), toy(tmp_path, steps=12))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["epoch"] for line in lines[:-1]] == [1, 2, 3]
    assert lines[-1] == {
        "best": {"epoch": 2, "step": 8, "scores": {"psnr": 3.0}},
        "folder": str(tmp_path),
        "weights": str(tmp_path / "best.safetensors"),
    }
    kept = checkpoint.read_weights(tmp_path / "best.safetensors", "deblur")
    assert kept.header["step"] == 8
    assert kept.header["scores"] == {"psnr": 3.0}
    assert kept.header["train"]["steps"] == 12
    assert kept.model == {"drop": 0.2}


@pytest.mark.usefixtures("undrawn")
def test_lower_may_be_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = dataclasses.replace(_scored(2.0, 1.0, 3.0), higher_is_better=False)
    go(engine, toy(tmp_path, steps=12))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["best"]["epoch"] == 2


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("scores", [(5.0, 4.0, 5.0, 9.0), (math.nan, math.nan, math.nan, 9.0)])
def test_patience_ends_the_run(scores: tuple[float, ...], tmp_path: Path) -> None:
    finite = scores[0] == 5.0
    settings = toy(tmp_path, steps=16, patience=2 if finite else 3)
    if finite:
        go(_scored(*scores), settings)
    else:
        with pytest.raises(ImgtoolError, match="no finite"):
            go(_scored(*scores), settings)
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 2, 3]
    assert state(tmp_path)["step"] == 12


@pytest.mark.usefixtures("undrawn")
def test_patience_counts_once_nothing_is_left_to_unfreeze(tmp_path: Path) -> None:
    """The first epoch is the best; the part opens in the fourth, so two more without gain end at five."""
    scores = (9.0, 8.0, 7.0, 6.0, 5.0, 4.0)
    go(_scored(*scores), toy(tmp_path, steps=24, patience=2, freeze="0.", unfreeze_epoch=4))
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert state(tmp_path)["best"]["epoch"] == 1


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("higher", [True, False])
def test_where_held_out_data_does_not_tell_the_metric_another_chooses(higher: bool, tmp_path: Path) -> None:
    others = iter((2.0, 3.0, 1.0))
    engine = dataclasses.replace(
        TOY,
        score=lambda net, batch: {"psnr": torch.empty(0), "other": torch.full((2,), next(others))},
        otherwise="other",
        higher_is_better=higher,
    )
    go(engine, toy(tmp_path, steps=12))
    assert state(tmp_path)["best"]["epoch"] == (2 if higher else 3)
    assert rows(tmp_path)[0]["scores"] == {"psnr": None, "other": 2.0}


@pytest.mark.usefixtures("undrawn")
def test_without_a_finite_score_there_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match="no weights"):
        go(_scored(math.nan, math.nan), toy(tmp_path))
    assert not (tmp_path / "best.safetensors").exists()


@pytest.mark.usefixtures("undrawn")
def test_averaged_weights_are_those_kept(tmp_path: Path) -> None:
    """The decay rises from 0.1, (1 + n) / (10 + n) at step n, to what the settings say."""
    settings = toy(tmp_path, steps=4, ema=0.2, drop=0.0)
    scored: list[nn.Module] = []
    engine = dataclasses.replace(
        TOY,
        score=lambda net, batch: scored.append(net) or TOY.score(net, batch),  # type: ignore[func-returns-value]
    )
    loop = train.Loop(engine, settings, tmp_path, Console(quiet=True))
    mean = loop.net.state_dict()["0.weight"].clone()
    average = loop._average

    def noted() -> None:
        nonlocal mean
        decay = min(0.2, (1 + loop.step) / (10 + loop.step))
        mean = decay * mean + (1 - decay) * loop.net.state_dict()["0.weight"]
        average()

    loop._average = noted  # type: ignore[method-assign]
    loop.go()
    kept = load_file(tmp_path / "best.safetensors")["0.weight"]
    torch.testing.assert_close(kept, mean)
    torch.testing.assert_close(state(tmp_path)["ema"]["0.weight"], mean)
    assert not torch.equal(kept, state(tmp_path)["net"]["0.weight"])
    assert scored == [loop.ema]


@pytest.mark.usefixtures("undrawn")
def test_training_starts_from_given_weights(tmp_path: Path) -> None:
    go(TOY, toy(tmp_path / "first"))
    weights = tmp_path / "first" / "best.safetensors"
    loop = train.Loop(TOY, toy(tmp_path / "second", weights=str(weights)), tmp_path, Console())
    assert_same(dict(loop.net.state_dict()), load_file(weights))
    assert_same(dict(loop.ema.state_dict()), load_file(weights))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes(precision: str, tmp_path: Path) -> None:
    go(TOY, toy(tmp_path, precision=precision))
    assert state(tmp_path)["net"]["0.weight"].dtype == torch.float32
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path))
    assert go(TOY, toy(tmp_path, resume=tmp_path, steps=12)) == DONE


# --- what a user can break --------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_the_data_comes_out_as_it_is(workers: int, tmp_path: Path) -> None:
    engine = dataclasses.replace(TOY, data=lambda settings: (Numbers(fault_at=7), Numbers(2)))
    with pytest.raises(ImgtoolError) as caught:
        go(engine, toy(tmp_path, workers=workers))
    saved = f"the state of step 3 is saved: go on with --resume {tmp_path}"
    assert (caught.value.what, caught.value.code) == ("photo 7 is torn", USAGE)
    assert caught.value.hint == f"glue it; {saved}"


@pytest.mark.usefixtures("undrawn")
def test_a_fault_of_the_held_out_data_as_well(tmp_path: Path) -> None:
    engine = dataclasses.replace(TOY, data=lambda settings: (Numbers(), Numbers(2, fault_at=1)))
    with pytest.raises(ImgtoolError, match="photo 7 is torn"):
        go(engine, toy(tmp_path))


class _Suicidal(Numbers):
    def __getitem__(self, number: int) -> Batch:
        if number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_data_process_that_is_killed_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    engine = dataclasses.replace(TOY, data=lambda settings: (_Suicidal(), Numbers(2)))
    with pytest.raises(ImgtoolError, match="a process that prepares data was killed") as caught:
        go(engine, toy(tmp_path, workers=1))
    assert "--workers" in caught.value.hint


class _Buggy(Numbers):
    def __getitem__(self, number: int) -> Batch:
        raise RuntimeError("a bug of the data set")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_of_the_data_is_not_taken_for_that(workers: int, tmp_path: Path) -> None:
    engine = dataclasses.replace(TOY, data=lambda settings: (_Buggy(), Numbers(2)))
    with pytest.raises(RuntimeError, match="a bug of the data set"):
        go(engine, toy(tmp_path, workers=workers))


@pytest.mark.usefixtures("undrawn")
def test_running_out_of_memory_is_one_error(tmp_path: Path) -> None:
    def loss(net: nn.Module, batch: Batch, settings: Train) -> dict[str, Tensor]:
        return {"large": torch.empty(1 << 60).sum()}

    with pytest.raises(ImgtoolError, match="out of memory while training") as caught:
        go(dataclasses.replace(TOY, loss=loss), toy(tmp_path))
    assert "--batch" in caught.value.hint


@pytest.mark.usefixtures("undrawn")
def test_other_faults_stay_what_they_are(tmp_path: Path) -> None:
    def loss(net: nn.Module, batch: Batch, settings: Train) -> dict[str, Tensor]:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        go(dataclasses.replace(TOY, loss=loss), toy(tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
def test_photos_that_vanish_are_one_error(
    workers: int, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The folder is listed at the start; its photos go before they are read."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in photographs.iterdir():
        (folder / path.name).symlink_to(path)
    go_on = train.Loop.go

    def vanish(loop: train.Loop) -> None:
        for path in folder.iterdir():
            path.unlink()
        go_on(loop)

    monkeypatch.setattr(train.Loop, "go", vanish)
    assert cli.run(words(folder, tmp_path / "run", workers)) == USAGE
    told = capsys.readouterr()
    assert told.err.count("error: no such file: ") == 1
    assert "Traceback" not in told.err
    assert set(json.loads(told.out)) == {"error", "hint"}


def test_a_photo_that_does_not_unpack_is_one_error(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in photographs.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:300])
    assert cli.run(words(tmp_path, tmp_path / "run", 1)) == FAILED
    told = capsys.readouterr().err
    assert "is truncated or corrupt" in told
    assert "Traceback" not in told
    assert "hint: copy the file again" in told


def test_crops_too_small_for_the_loss_are_refused_at_the_start(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = f"train deblur --photos {photographs} --loss msssim-charbonnier --crop 128 -o {tmp_path / 'run'}"
    assert cli.run(asked.split()) == USAGE
    assert "at least 161 pixels, not 128" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_and_writes_nothing(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*words(photographs, tmp_path / "run"), "--dry-run"]) == DONE
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["steps"] == 15
    assert plan["samples per epoch"] == 10
    assert plan["held-out samples"] == 2
    assert plan["parameters"] > 1_000_000
    assert plan["output"] == str(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_disk_that_fills_up_leaves_the_last_state(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the state of step 6 does not fit."""
    go(TOY, toy(tmp_path, steps=4))
    before = (tmp_path / "last.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(ImgtoolError, match=r"cannot write .*last\.pt: file too large"):
            go(TOY, toy(tmp_path, resume=tmp_path, steps=7, save_every=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".imgtool-*"))
    go(TOY, toy(tmp_path, resume=tmp_path, steps=8))
    assert [row["step"] for row in rows(tmp_path)] == [4, 8]


@pytest.mark.usefixtures("undrawn")
def test_a_log_that_cannot_be_written_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = files.write

    def full(target: Path, data: bytes) -> None:
        if target.name == "log.jsonl" and data:
            raise ImgtoolError(f"cannot write {target}: no space left on device")
        write(target, data)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(ImgtoolError, match="no space left"):
        go(TOY, toy(tmp_path))
    assert (tmp_path / "log.jsonl").read_bytes() == b""


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("begun", "wanted"), [("adamw", "soap"), ("soap", "adamw")])
def test_a_run_goes_on_with_its_own_optimiser(begun: str, wanted: str, tmp_path: Path) -> None:
    go(TOY, toy(tmp_path / "run", steps=4, optimiser=begun))
    with pytest.raises(ImgtoolError, match=f"begun with --optimiser {begun}, and goes on with that opt"):
        go(TOY, toy(tmp_path, resume=tmp_path / "run", steps=8, optimiser=wanted))


@pytest.mark.usefixtures("undrawn")
def test_a_run_goes_on_with_its_own_network_alone(tmp_path: Path) -> None:
    go(TOY, toy(tmp_path))
    with pytest.raises(ImgtoolError, match=r"begun with --drop 0\.2") as caught:
        go(TOY, toy(tmp_path, resume=tmp_path, drop=0.4, steps=20))
    assert caught.value.code == USAGE


@pytest.mark.usefixtures("undrawn")
def test_weights_that_fit_but_were_trained_otherwise_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(TOY, toy(tmp_path / "first"))
    weights = tmp_path / "first" / "best.safetensors"
    train.Loop(TOY, toy(tmp_path / "second", weights=str(weights), drop=0.4), tmp_path, Console())
    assert "the weights best were trained with --drop 0.2" in capsys.readouterr().err
