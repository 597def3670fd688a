"""Repeated runs: what several seeds say together, and that nothing is done twice or lost."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy import TOY, Batch, Numbers, assert_same_run, go, rows, toy

from imgtool import cli, plots, repeat, sheets, train
from imgtool.console import Console
from imgtool.engine import Engine
from imgtool.errors import DONE, FAILED, INTERRUPTED, USAGE, ImgtoolError
from imgtool.settings import Train


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Path, Any]]:
    """What would be drawn of repeated runs, by path."""
    found: dict[Path, Any] = {}
    monkeypatch.setattr(plots, "curves", lambda *_, **__: None)
    monkeypatch.setattr(sheets, "sheet", lambda *_, **__: None)
    monkeypatch.setattr(plots, "bands", lambda panels, path, **_: found.update({path: panels}))
    before = torch.get_num_threads()
    yield found
    torch.set_num_threads(before)


# --- statistics -------------------------------------------------------------------------------

PUBLISHED = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}
"""Two-sided 95 % points of Student's t by degrees of freedom (NIST/SEMATECH handbook, 1.3.6.7.2)."""


@pytest.mark.parametrize(("freedom", "value"), PUBLISHED.items())
def test_student_is_that_of_the_tables(freedom: int, value: float) -> None:
    assert repeat.student(freedom) == pytest.approx(value, abs=6e-4)


def test_student_knows_other_probabilities() -> None:
    assert repeat.student(4, 0.99) == pytest.approx(4.604, abs=6e-4)
    assert repeat.student(7, 0.8) == pytest.approx(1.415, abs=6e-4)


def test_the_interval_of_a_mean() -> None:
    """Mean 4, squared deviations 4 + 0 + 4, sd 2: half the interval is 4.303 times 2 / sqrt(3)."""
    told = repeat.spread([2.0, 4.0, 6.0])
    assert (told["mean"], told["sd"], told["runs"]) == (4.0, 2.0, 3)
    half = 4.3027 * 2 / math.sqrt(3)
    assert (told["low"], told["high"]) == pytest.approx((4 - half, 4 + half), rel=1e-4)
    alone = repeat.spread([2.0])
    assert alone["mean"] == 2.0
    assert all(math.isnan(alone[name]) for name in ("sd", "low", "high"))
    assert math.isnan(repeat.spread([])["mean"])


def test_a_band_is_over_the_runs_that_got_there() -> None:
    first, second, third = repeat.band([{4: 1.0, 8: 2.0}, {4: 3.0, 8: 4.0, 12: 7.0}])
    assert [row[0] for row in (first, second, third)] == [4, 8, 12]
    assert [row[1] for row in (first, second, third)] == [2.0, 3.0, 7.0]
    assert first[3] - 2 == pytest.approx(12.706, rel=1e-4)
    assert math.isnan(third[2])
    assert math.isnan(third[3])


# --- one after another --------------------------------------------------------------------------


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs.json").read_text())
    return found


def failing(*seeds: int) -> Engine:
    """The toy, whose data is torn from the fifth step on where the run has one of these seeds."""
    return dataclasses.replace(
        TOY, data=lambda settings: (Numbers(fault_at=9 if settings.seed in seeds else -1), Numbers(2))
    )


def test_repeated_runs_are_single_runs_with_seeds_that_follow_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], drawn: dict[Path, Any]
) -> None:
    assert go(TOY, toy(tmp_path / "all", runs=3, seed=5)) == DONE
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    go(TOY, toy(tmp_path / "single", seed=6))
    assert_same_run(tmp_path / "single", tmp_path / "all" / "run-01")
    assert len(told) == 1
    assert told[0] == record(tmp_path / "all")
    assert [(each["name"], each["seed"]) for each in told[0]["runs"]] == [
        ("run-00", 5), ("run-01", 6), ("run-02", 7)
    ]  # fmt: skip
    best = [max(row["scores"]["psnr"] for row in rows(tmp_path / "all" / f"run-0{n}")) for n in range(3)]
    mean = sum(best) / 3
    sd = math.sqrt(sum((value - mean) ** 2 for value in best) / 2)
    psnr = told[0]["scores"]["psnr"]
    assert psnr["mean"] == pytest.approx(mean)
    assert psnr["sd"] == pytest.approx(sd)
    assert psnr["high"] == pytest.approx(mean + 4.302653 * sd / math.sqrt(3))
    logs = [rows(tmp_path / "all" / f"run-0{n}") for n in range(3)]
    panels = drawn[tmp_path / "all" / "runs.png"]
    assert [row[:2] for row in panels["loss"]] == [
        (step, pytest.approx(sum(log[epoch]["loss"] for log in logs) / 3))
        for epoch, step in enumerate((4, 8))
    ]
    assert panels["psnr"][0][1] == pytest.approx(sum(log[0]["scores"]["psnr"] for log in logs) / 3)


def test_a_run_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(failing(1), toy(tmp_path, runs=3)) == FAILED
    told = capsys.readouterr().err
    assert "error: run-01: photo 7 is torn" in told
    assert f"warning: failed: run-01; go on with them by --resume {tmp_path}" in told
    assert [each["name"] for each in record(tmp_path)["runs"]] == ["run-00", "run-02"]
    assert record(tmp_path)["failed"] == {"run-01": "photo 7 is torn"}
    ended = (tmp_path / "run-00" / "last.pt").stat().st_mtime_ns
    assert go(TOY, toy(tmp_path, resume=tmp_path)) == DONE
    assert (tmp_path / "run-00" / "last.pt").stat().st_mtime_ns == ended
    assert len(record(tmp_path)["runs"]) == 3
    go(TOY, toy(tmp_path / "single", seed=1))
    assert_same_run(tmp_path / "single", tmp_path / "run-01")


def test_what_was_asked_wrongly_ends_all_runs(tmp_path: Path) -> None:
    engine = dataclasses.replace(TOY, data=lambda settings: (Numbers(fault_at=1), Numbers(2)))
    with pytest.raises(ImgtoolError, match="photo 7 is torn") as caught:
        go(engine, toy(tmp_path, runs=3))
    assert caught.value.code == USAGE


def test_repeated_runs_are_interrupted_and_go_on(tmp_path: Path) -> None:
    """Interrupted in the sixth step of the second run; the first does not run again."""
    steps = iter(range(100))

    def loss(net: nn.Module, batch: Batch, settings: Train) -> Any:
        if next(steps) == 8 + 5:
            os.kill(os.getpid(), signal.SIGINT)
        return TOY.loss(net, batch, settings)

    with pytest.raises(KeyboardInterrupt):
        go(dataclasses.replace(TOY, loss=loss), toy(tmp_path / "all", runs=2))
    assert not (tmp_path / "all" / "runs.json").exists()
    go(dataclasses.replace(TOY, loss=loss), toy(tmp_path, resume=tmp_path / "all"))
    assert next(steps) == 16
    go(TOY, toy(tmp_path / "single", seed=1))
    assert_same_run(tmp_path / "single", tmp_path / "all" / "run-01")


def test_more_runs_may_follow_but_no_others(tmp_path: Path) -> None:
    go(TOY, toy(tmp_path, runs=2))
    go(TOY, toy(tmp_path, resume=tmp_path, runs=3, track="none"))
    assert len(record(tmp_path)["runs"]) == 3
    for changed in ({"steps": 9}, {"seed": 3}, {"lr": 0.5}):
        with pytest.raises(ImgtoolError, match=f"go on as they began, with --{next(iter(changed))}"):
            go(TOY, toy(tmp_path, resume=tmp_path, **changed))
    with pytest.raises(ImgtoolError, match="holds repeated runs"):
        go(TOY, toy(tmp_path, resume=tmp_path, runs=1))
    with pytest.raises(ImgtoolError, match="holds a single run"):
        go(TOY, toy(tmp_path, resume=tmp_path / "run-00", runs=2))
    with pytest.raises(ImgtoolError, match="already holds a run"):
        go(TOY, toy(tmp_path, runs=3))


def test_a_campaign_is_not_repeated(tmp_path: Path) -> None:
    engine = dataclasses.replace(
        TOY, campaign=lambda settings, crew: {}, wants_campaign=lambda settings: True
    )
    with pytest.raises(ImgtoolError, match="--runs repeats one training") as caught:
        go(engine, toy(tmp_path, runs=2))
    assert caught.value.code == USAGE
    assert not (tmp_path / "settings.toml").exists()


# --- side by side -------------------------------------------------------------------------------

CHILD = """
import json, os, signal, sys, time
from pathlib import Path
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
seed, folder = int(flags["seed"]), Path(flags.get("out") or flags["resume"])
def stop(*_):
    (folder / "last.pt").write_text("saved")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
assert flags["runs"] == flags["parallel"] == "1"
folder.mkdir(exist_ok=True)
with open(folder / "begun", "a") as note:
    note.write("resume " if "resume" in flags else "out ")
print("imgtool says", folder.name, flags["threads"], file=sys.stderr, flush=True)
{odd}
row = {{"epoch": 1, "step": 8, "loss": 0.5 + seed, "scores": {{"psnr": 30.0 + seed}}}}
(folder / "log.jsonl").write_text(json.dumps(row) + "\\n")
print(json.dumps(row))
print(json.dumps({{"best": {{"scores": row["scores"]}}, "folder": str(folder), "weights": "w"}}))
"""
"""Behaves as a training does, as far as the one who starts it can see; without torch's start-up time."""

WAIT = "if 'resume' not in flags: (folder / 'waits').touch(); time.sleep(60)"


def side_by_side(
    monkeypatch: pytest.MonkeyPatch, settings: Train, odd: str = "", console: Console | None = None
) -> int:
    """Repeat runs as processes of the program above."""
    words = repeat.Processes.command

    def command(self: repeat.Processes, name: str, each: Train) -> list[str]:
        return [sys.executable, "-c", CHILD.format(odd=odd), *words(self, name, each)[5:]]

    monkeypatch.setattr(repeat.Processes, "command", command)
    return train.run(TOY, settings, console or Console(json=True))


def begun(folder: Path) -> list[str]:
    return [(folder / f"run-0{n}" / "begun").read_text() for n in range(3)]


def test_runs_side_by_side_share_the_threads_and_say_who_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = toy(tmp_path, runs=3, parallel=2, threads=5, seed=2)
    assert side_by_side(monkeypatch, settings) == DONE
    told = capsys.readouterr()
    for number in range(3):
        assert f"run-0{number}: imgtool says run-0{number} 2" in told.err
    assert json.loads(told.out)["scores"]["psnr"]["mean"] == pytest.approx(33)
    assert [each["seed"] for each in record(tmp_path)["runs"]] == [2, 3, 4]
    assert side_by_side(monkeypatch, toy(tmp_path, resume=tmp_path)) == DONE
    assert begun(tmp_path) == ["out "] * 3


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ("if seed == 1: os.kill(os.getpid(), 9)", "its process was ended by signal 9"),
        ("if seed == 1: sys.exit('a bug')", "its process ended with code 1"),
        (
            "if seed == 1: print(json.dumps({'error': 'no disk', 'hint': 'buy one'})); sys.exit(1)",
            "no disk",
        ),
    ],
)
def test_a_process_that_fails_is_named_and_the_others_go_on(
    odd: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert side_by_side(monkeypatch, toy(tmp_path, runs=3, parallel=3), odd) == FAILED
    assert f"error: run-01: {words}" in capsys.readouterr().err
    assert record(tmp_path)["failed"] == {"run-01": words}
    assert record(tmp_path)["scores"]["psnr"]["runs"] == 2


def test_a_process_that_was_asked_wrongly_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "print(json.dumps({'error': 'no photos', 'hint': 'take some'}))"
    odd = f"if seed: time.sleep(60)\n{said}; sys.exit(2)"
    with pytest.raises(ImgtoolError, match="no photos") as caught:
        side_by_side(monkeypatch, toy(tmp_path, runs=3, parallel=2), odd)
    assert (caught.value.hint, caught.value.code) == ("take some", USAGE)
    assert not (tmp_path / "run-02").exists()


def test_processes_save_when_interrupted_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        while not all((tmp_path / f"run-0{n}" / "waits").exists() for n in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        side_by_side(monkeypatch, toy(tmp_path, runs=3, parallel=2), WAIT)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert f"stopped; go on with --resume {tmp_path}" in capsys.readouterr().err
    assert [path.exists() for path in (tmp_path / f"run-0{n}" / "last.pt" for n in range(3))] == [
        True, True, False
    ]  # fmt: skip
    assert side_by_side(monkeypatch, toy(tmp_path, resume=tmp_path), WAIT.replace("60", "0")) == DONE
    assert begun(tmp_path) == ["out resume ", "out resume ", "out "]


HELD = """
import time
from imgtool import cli, train
learn = train.Loop._learn
def held(loop, batch):
    while loop.step == 3 and not loop.interrupted:
        time.sleep(0.01)
    learn(loop, batch)
train.Loop._learn = held
cli.main()
"""
"""The command line, on which a run does not go on after a step until it is interrupted."""

PARENT = f"""
import sys
from imgtool import cli, repeat
words = repeat.Processes.command
repeat.Processes.command = lambda *given: [sys.executable, "-c", {HELD!r}, *words(*given)[3:]]
cli.main()
"""


@pytest.mark.slow
def test_processes_on_the_command_line(photographs: Path, tmp_path: Path) -> None:
    """Two real runs, interrupted once, are the same as one by itself."""
    words = (
        f"train deblur --photos {photographs} --steps 6 --epoch-steps 3 --warmup 3 --crop 32 --batch 2"
        " --held-out 2 --device cpu --workers 0 --json"
    ).split()
    folder = tmp_path / "all"
    asked = [*words, "-o", str(folder), "--runs", "2", "--parallel", "2", "--threads", "2"]
    begun = subprocess.Popen([sys.executable, "-c", PARENT, *asked], stderr=subprocess.PIPE, text=True)
    running = {"run-00", "run-01"}
    for line in begun.stderr or ():
        running -= {line[:6]} if "step 3" in line else set()
        if not running:
            begun.terminate()
            break
    rest = begun.communicate()[1]
    assert begun.returncode == INTERRUPTED, rest
    assert cli.run(["train", "deblur", "--resume", str(folder)]) == DONE
    assert cli.run([*words, "-o", str(tmp_path / "single"), "--seed", "1", "--threads", "1"]) == DONE
    assert_same_run(tmp_path / "single", folder / "run-01")
