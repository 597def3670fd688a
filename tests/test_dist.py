"""Training by many processes: what they compute together is what one computes alone."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from test_every_engine import MATERIAL, NETWORKS
from test_train import DEEP, PHASES
from torch import Tensor, nn
from toy import TOY, rows, state, timeless, toy

from imgtool import cli, dist, engines, plots, sheets, track, train
from imgtool.console import Console
from imgtool.dist import World
from imgtool.errors import DONE, FAILED, INTERRUPTED, USAGE, ImgtoolError
from imgtool.train.feeding import size_at

LONG = 900
"""Seconds in which whatever is waited for has come on the slowest machine."""

# --- one process, and the shares of many ------------------------------------------------------------

STAGES = ((2, 5), (1, 3))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_the_processes_together_ask_for_the_samples_of_one(size: int, start: int) -> None:
    every = [list(train.Numbers(STAGES, start, World(rank, size))) for rank in range(size)]
    together = [sorted(chain(*parts)) for parts in zip(*every, strict=True)]
    assert together == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12]][start:]
    assert all(part for parts in every for part in parts)


def test_the_samples_of_a_step_are_those_of_its_stage() -> None:
    assert [size_at(STAGES, step) for step in range(5)] == [5, 5, 3, 0, 0]


def test_parts_of_a_batch_count_by_their_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        monkeypatch.setattr(dist, "_world", World(rank, 3, samples=8))
        shares.append(dist.share())
    assert shares == [2 * 3 / 8, 3 * 3 / 8, 3 * 3 / 8]
    assert sum(shares) / 3 == 1


def test_alone_there_is_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with dist.joined() as world:
        assert (world.rank, world.size, world.first, world.threads(0)) == (0, 1, True, 0)
        assert not torch.distributed.is_initialized()
        assert dist.gather("x") == ["x"]
        assert dist.share() == 1
    dist.refuse_many("--runs")


def test_many_trainings_are_refused_where_processes_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    dist.refuse_many("--search")  # what numbers the tasks of a cluster, each by itself
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(ImgtoolError, match="--search makes many trainings") as caught:
        dist.refuse_many("--search")
    assert caught.value.code == USAGE


def test_processes_of_a_machine_share_its_cores_and_not_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "cores", lambda: 7)
    world = World(3, 4, local=1, beside=2)
    assert (world.threads(0), world.threads(5)) == (3, 5)
    assert World(0, 9, beside=9).threads(0) == 1
    monkeypatch.setattr(dist, "_world", world)
    assert dist.device("cpu") == torch.device("cpu")
    with pytest.raises(ImgtoolError, match="--device cuda:1 is one device, and 4 processes need one each"):
        dist.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ImgtoolError, match="2 processes for 1 GPUs") as caught:
        dist.device("auto")
    assert caught.value.code == USAGE


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(dist, "_world", World(3, 4, local=1, beside=2))
    monkeypatch.setattr(dist.compute, "device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert dist.device("auto") == dist.device("cuda") == torch.device("cuda:1")
    assert chosen == [1, 1]


def test_a_batch_has_a_sample_for_each_process() -> None:
    assert train.loop._checked(STAGES, 3, 3) == STAGES
    with pytest.raises(ImgtoolError, match="a batch of 3 has no sample for each of 4 processes") as caught:
        train.loop._checked(STAGES, 3, 4)
    assert caught.value.code == USAGE


def test_one_process_alone_writes_and_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "begin", lambda *_: nullcontext("a tracker"))
    loop = train.Loop(TOY, toy(tmp_path), tmp_path / "run", Console(quiet=True))
    loop.world = World(1, 2)
    loop._save()
    loop._keep({})
    loop._write_log([])
    loop._write_settings()
    with loop._tracked() as tracker:
        assert isinstance(tracker, track.Silent)
    assert not (tmp_path / "run").exists()


def test_a_plan_is_told_by_the_first_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], photographs: Path
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        command = ["train", "deblur", "--photos", str(photographs), "--dry-run", "--json"]
        assert cli.run(command) == DONE
        assert len(capsys.readouterr().out.splitlines()) == lines


# --- two processes: the same training ----------------------------------------------------------------

WORDS = "unet-lite lines efficientnet-b0 original hist deepawb lrfu punet fold unshuffle clapp int8".split()
DEEPLY_NORMALISED = {"efficientnet-b0": 5e-3, "original": 5e-3}
"""Where 49 batch normalisations follow each other, another number of threads does as much."""
TOYS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "dropout": (TOY, {"batch": 5}),
    "phases": (DEEP, {"batch": 5, "frozen_norm": False, **PHASES}),
    "statistics": (DEEP, {"batch": 3, "drop": 0.5}),
    "clipped": (TOY, {"batch": 4, "clip": 1e-3}),
    "soap": (TOY, {"steps": 1, "epoch_steps": 1, "optimiser": "soap"}),
    "fp16": (TOY, {"batch": 5, "precision": "fp16"}),
}
"""Trainings of the toy; batches of 5 and 3 make unequal parts."""


class Descent(torch.optim.SGD):
    """In AdamW's place: there, a gradient that is nothing but rounding moves a weight as far as any."""

    def __init__(self, groups: Any, lr: float, weight_decay: float) -> None:
        super().__init__(groups, lr, momentum=0.9, weight_decay=weight_decay)


def train_all(photographs: Path, folder: Path) -> None:
    """Train every network and the toys for a few steps, and try the pieces."""
    with pytest.MonkeyPatch.context() as patch, dist.joined() as world:
        patch.setattr(plots, "curves", lambda *_, **__: None)
        patch.setattr(sheets, "sheet", lambda *_, **__: None)
        patch.setattr(torch.optim, "AdamW", Descent)
        for name, word, model in NETWORKS:
            if word in WORDS:
                quick = {"steps": 3, "epoch_steps": 2, "batch": 8, "warmup": 0, "workers": 0, "seed": 1}
                here = {"threads": 1, "device": "cpu", "held_out": 9, "optimiser": "adamw"}
                values = MATERIAL[name](photographs) | model | quick | here
                settings = engines.settings(name).Train(**values)
                train.Loop(engines.load(name), settings, folder / word, Console(quiet=True)).go()
        for word, (engine, values) in TOYS.items():
            train.Loop(engine, toy(folder, **values), folder / word, Console(quiet=True)).go()
        torch.save(pieces(), folder / f"pieces-{world.rank}-{world.size}.pt")


def pieces() -> dict[str, Tensor]:
    """What layers and means give for this process's part of five samples."""
    torch.manual_seed(3)
    x = torch.randn(5, 4, 6, 6).contiguous(memory_format=torch.channels_last) * 3 + 100
    known, values = torch.tensor([1.0, 0, 0, 1, 1]), torch.arange(5.0)
    wanted = torch.randn(5, 4, 6, 6)
    net = nn.Sequential(
        nn.BatchNorm2d(4), nn.Dropout(0.4), nn.Dropout2d(0.5), nn.BatchNorm2d(4, momentum=None)
    )
    world = dist.world()
    world.samples = 5
    part = slice(world.part(5).start, world.part(5).stop)
    mine = x[part].requires_grad_()

    def loss(net: nn.Module, batch: Tensor) -> Mapping[str, Tensor]:
        out = net(batch)
        found.update({f"out {world.rank}": out.detach()})
        return {"product": (out * wanted[part]).mean()}

    found: dict[str, Tensor] = {}
    terms = dist.Learner(net, loss)(mine)
    (terms["product"] * dist.share()).backward()
    found |= {f"gradient {world.rank}": mine.grad / world.size if mine.grad is not None else mine}
    found |= {name: value.clone() for name, value in net.state_dict().items()}
    found |= {f"{name} grad": p.grad for name, p in net.named_parameters() if p.grad is not None}
    found |= {"product": dist.whole(terms)["product"].detach()}
    found |= dict(dist.whole({"mean": dist.mean(values[part], known[part])}))
    found |= dict(dist.whole({"none": dist.mean(values[part], torch.zeros(5)[part])}))
    found |= {"least": dist.least(values[part].min()), "random": torch.get_rng_state()}
    return found


def torchrun(*words: object) -> subprocess.Popen[str]:
    """Start two processes; where one fails, the other is ended at once."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 --no-python".split()
    return started([*launch, sys.executable, *words])


def both_started(*words: object) -> list[subprocess.Popen[str]]:
    """Start two processes that nobody ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": 2}
    return [started(words, RANK=rank, **there) for rank in range(2)]


def started(words: Sequence[object], **variables: object) -> subprocess.Popen[str]:
    env = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


CHILD = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_dist
from imgtool import cli
test_dist.train_all(*map(Path, sys.argv[1:]))
cli.leave(0)
"""

COMPILED = CHILD.replace("train_all", "train_both_ways")


def train_both_ways(folder: Path) -> None:
    """Train a network as it is, and compiled."""
    with pytest.MonkeyPatch.context() as patch, dist.joined():
        patch.setattr(plots, "curves", lambda *_, **__: None)
        patch.setattr(sheets, "sheet", lambda *_, **__: None)
        patch.setattr(torch.optim, "AdamW", Descent)
        for word in ("plain", "compiled"):
            settings = toy(folder, steps=4, batch=3, drop=0.5, compile=word == "compiled")
            train.Loop(DEEP, settings, folder / word, Console()).go()


@pytest.fixture(scope="module")
def both(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The trainings by one process and by two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    running = torchrun("-c", CHILD, photographs, two)
    before = torch.get_num_threads()
    train_all(photographs, one)
    torch.set_num_threads(before)
    _, told = running.communicate(timeout=LONG)
    assert running.returncode == DONE, told
    assert "Warning" not in told
    return one, two


def apart(one: Mapping[str, Tensor], two: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Return how far two sets of weights are apart, as a share of how far they moved."""
    far, moved = (
        math.sqrt(sum(float((this[name] - that[name]).double().square().sum()) for name in start))
        for this, that in ((one, two), (one, start))
    )
    return far / moved


def assert_alike(one: Path, two: Path, start: nn.Module, most: float = 1e-4) -> None:
    """Two runs are the same within what rounding may do."""
    first, second = state(one), state(two)
    weights = {name: value.detach() for name, value in start.named_parameters()}
    for name in ("net", "ema"):
        assert apart(first[name], second[name], weights) < most
        for key, value in first[name].items():
            if key not in weights:
                torch.testing.assert_close(second[name][key], value, rtol=most, atol=most)
    assert torch.equal(first["random"], second["random"])
    for name in ("step", "skipped", "stale", "bad"):
        assert first[name] == second[name]
    for row, other in zip(timeless(one), timeless(two), strict=True):
        assert flat(other) == pytest.approx(flat(row), rel=most, abs=most / 100)


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, **row["terms"], **row["scores"], "terms": 0, "scores": 0}


@pytest.mark.slow
@pytest.mark.parametrize("word", WORDS)
def test_every_network_learns_the_same_by_one_and_by_two(word: str, both: tuple[Path, Path]) -> None:
    one, two = (folder / word for folder in both)
    ((name, _, model),) = [each for each in NETWORKS if each[1] == word]
    torch.manual_seed(1)
    start = engines.load(name).build(engines.settings(name).Train(**sizes(name) | model))
    assert_alike(one, two, start, DEEPLY_NORMALISED.get(word, 1e-4))


def sizes(name: str) -> dict[str, Any]:
    """Settings that shape a network as it was trained."""
    given = MATERIAL[name](Path())
    return {key: given[key] for key in engines.load(name).model.model_fields if key in given}


@pytest.mark.slow
@pytest.mark.parametrize("word", [word for word in TOYS if word != "soap"])
def test_masks_phases_and_unequal_parts_change_nothing(word: str, both: tuple[Path, Path]) -> None:
    engine, values = TOYS[word]
    torch.manual_seed(0)
    start = engine.build(toy(Path(), **values))
    assert_alike(both[0] / word, both[1] / word, start, 2e-2 if word == "fp16" else 1e-4)


@pytest.mark.slow
def test_soap_begins_with_the_same_averages(both: tuple[Path, Path]) -> None:
    """Its second step divides what is nothing but rounding by itself, as with another number of threads."""
    one, two = (state(folder / "soap")["optimiser"]["state"] for folder in both)
    for number in one:
        for name in ("mean", "square"):
            largest = float(one[number][name].abs().max())
            torch.testing.assert_close(two[number][name], one[number][name], rtol=1e-3, atol=1e-3 * largest)


@pytest.mark.slow
def test_layers_see_the_whole_batch_and_means_are_over_all_of_it(both: tuple[Path, Path]) -> None:
    alone = torch.load(both[0] / "pieces-0-1.pt")
    parts = [torch.load(both[1] / f"pieces-{rank}-2.pt") for rank in range(2)]
    assert float(alone["mean"]) == pytest.approx((0 + 3 + 4) / 3)
    assert (float(alone["none"]), float(alone["least"])) == (0, 0)
    for name in ("out", "gradient"):
        together = torch.cat([parts[rank].pop(f"{name} {rank}") for rank in range(2)])
        torch.testing.assert_close(together, alone.pop(f"{name} 0"), rtol=1e-4, atol=1e-5)
    for part in parts:
        assert part.keys() == alone.keys()
        shared = {name: value for name, value in part.items() if not name.endswith(" grad")}
        torch.testing.assert_close(shared, {name: alone[name] for name in shared}, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_learn_the_same_when_compiled(tmp_path: Path) -> None:
    code, _, told = finished(torchrun("-c", COMPILED, tmp_path))
    if "--compile does not work here" in told:
        pytest.skip("there is no compiler")
    assert code == DONE, told
    assert "Warning" not in told
    torch.manual_seed(0)
    assert_alike(tmp_path / "plain", tmp_path / "compiled", DEEP.build(toy(Path(), drop=0.5)))


# --- two processes, on the command line --------------------------------------------------------------

STOPPED = """
import os, signal, sys
from imgtool import cli, train
learn = train.Loop._learn
def until(loop, batch):
    if loop.step == 3 and loop.world.rank == 1:
        os.kill(os.getpid(), signal.SIGINT)
    learn(loop, batch)
train.Loop._learn = until
cli.main()
"""
"""The command line, of which the second process alone is interrupted at a step."""

LATE = """
import time
from imgtool import dist
told = dist._told
def late(fault, alone):
    time.sleep(alone and 3)
    return told(fault, alone)
dist._told = late
"""
"""What lets the process that is to tell of a fault do so when the other one has ended."""

TORN = """
import sys
from imgtool import cli
from imgtool.engines.deblur import data
from imgtool.errors import ImgtoolError
get = data.Samples.__getitem__
def torn(self, number):
    if number == 15:
        raise ImgtoolError("photo 15 is torn", "glue it")
    return get(self, number)
data.Samples.__getitem__ = torn
cli.main()
"""
"""The command line, of which the second process alone meets a sample that cannot be had at step 3."""


def words(photographs: Path, folder: Path, workers: int = 0) -> list[str]:
    return (
        f"train deblur --photos {photographs} -o {folder} --steps 6 --epoch-steps 2 --save-every 100"
        f" --warmup 1 --crop 32 --batch 4 --held-out 5 --threads 1 --device cpu --workers {workers} --json"
    ).split()


def finished(running: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, told = running.communicate(timeout=LONG)
    return running.returncode, out, told


def assert_no_traceback(told: str) -> None:
    """There is none but that of torchrun, which ends its own report."""
    assert told.count("Traceback") == told.count("ChildFailedError:") == 1


@pytest.fixture(scope="module")
def unbroken(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    before = torch.get_num_threads()
    assert cli.run([*words(photographs, folder), "--quiet"]) == DONE
    torch.set_num_threads(before)
    return folder


def assert_same_training(folder: Path, unbroken: Path) -> None:
    torch.manual_seed(0)
    assert_alike(unbroken, folder, engines.load("deblur").build(engines.settings("deblur").Train()), 1e-3)


@pytest.mark.slow
def test_two_processes_write_and_speak_once(photographs: Path, unbroken: Path, tmp_path: Path) -> None:
    code, out, told = finished(torchrun("-m", "imgtool", *words(photographs, tmp_path / "run")))
    assert code == DONE, told
    assert_same_training(tmp_path / "run", unbroken)
    names = {path.relative_to(unbroken) for path in unbroken.rglob("*")}
    assert {path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*")} == names
    assert [json.loads(line).get("epoch") for line in out.splitlines()] == [1, 2, 3, None]
    for said in ("parameters on cpu", "epoch 3  step 6"):
        assert told.count(said) == 1
    assert "Warning" not in told
    code, _, told = finished(torchrun("-m", "imgtool", *words(photographs, tmp_path / "run")))
    assert code != DONE
    assert told.count("already holds a run") == told.count("error: ") == 1
    assert_no_traceback(told)


@pytest.mark.slow
def test_one_that_is_interrupted_stops_both_and_one_process_goes_on(
    photographs: Path, unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    code, _, told = finished(torchrun("-c", STOPPED, *words(photographs, folder, workers=1)))
    assert code != DONE
    assert told.count(f"stopped at step 4; go on with --resume {folder}") == 1
    assert told.count("\ninterrupted\n") == 1
    assert f"exitcode  : {INTERRUPTED}" in told
    assert "error: " not in told
    assert_no_traceback(told)
    assert state(folder)["step"] == 4
    before = torch.get_num_threads()
    assert cli.run(["train", "deblur", "--resume", str(folder), "--quiet"]) == DONE
    torch.set_num_threads(before)
    assert_same_training(folder, unbroken)


class _Kill(Exception):
    pass


def stopped_at(step: int) -> Callable[[train.Loop, Any], None]:
    learn = train.Loop._learn

    def until(loop: train.Loop, batch: Any) -> None:
        if loop.step == step:
            raise _Kill
        learn(loop, batch)

    return until


@pytest.mark.slow
def test_two_processes_go_on_with_the_run_of_one(
    photographs: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = tmp_path / "run", torch.get_num_threads()
    monkeypatch.setattr(train.Loop, "_learn", stopped_at(4))
    with pytest.raises(_Kill):
        cli.run([*words(photographs, folder), "--save-every", "3"])
    torch.set_num_threads(before)
    assert state(folder)["step"] == 4
    code, _, told = finished(torchrun("-m", "imgtool", "train", "deblur", "--resume", folder))
    assert code == DONE, told
    assert_same_training(folder, unbroken)


@pytest.mark.slow
def test_data_that_fails_in_one_process_is_one_error(
    photographs: Path, unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    code, out, told = finished(torchrun("-c", LATE + TORN, *words(photographs, folder)))
    assert code != DONE
    assert told.count("error: photo 15 is torn") == told.count("error: ") == 1
    assert told.count("hint: glue it; the state of step 3 is saved: go on with --resume") == 1
    assert_no_traceback(told)
    assert json.loads(out.splitlines()[-1])["error"] == "photo 15 is torn"
    assert state(folder)["step"] == 3
    assert [row["step"] for row in rows(folder)] == [2]
    code, _, told = finished(torchrun("-m", "imgtool", "train", "deblur", "--resume", folder))
    assert code == DONE, told
    assert_same_training(folder, unbroken)


@pytest.mark.slow
def test_a_batch_that_is_too_small_is_one_error(photographs: Path, tmp_path: Path) -> None:
    small = [*words(photographs, tmp_path / "small"), "--batch", "1"]
    code, _, told = finished(torchrun("-c", LATE + "from imgtool import cli\ncli.main()", *small))
    assert code != DONE
    assert told.count("error: a batch of 1 has no sample for each of 2 processes") == 1
    assert told.count("error: ") == 1
    assert_no_traceback(told)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_end_of_another_process_and_of_the_one_that_they_meet_at_is_one_error(
    photographs: Path, tmp_path: Path, rank: int
) -> None:
    killed = STOPPED.replace("SIGINT", "SIGKILL").replace("rank == 1", f"rank == {rank}")
    both = both_started("-c", killed, *words(photographs, tmp_path / "run"))
    assert finished(both[rank])[0] == -signal.SIGKILL
    code, _, told = finished(both[1 - rank])
    assert code == FAILED
    assert told.count("error: ") == told.count("error: another process of this training has ended") == 1
    assert "Traceback" not in told
