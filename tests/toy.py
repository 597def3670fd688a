"""An engine small enough to train in milliseconds, and what its runs are compared by."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from imgtool import checkpoint, engines, train
from imgtool.console import Console
from imgtool.engine import Engine
from imgtool.errors import USAGE, ImgtoolError
from imgtool.settings import Settings, Train, setting

DEBLUR = engines.load("deblur")


class Batch(NamedTuple):
    x: Tensor
    y: Tensor


class Numbers:
    """Sample n is a function of n alone; pictures of 16 x 16 pixels and the same, halved."""

    def __init__(self, length: int = 4, fault_at: int = -1) -> None:
        self.length, self.fault_at = length, fault_at

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Batch:
        if number == self.fault_at:
            raise ImgtoolError("photo 7 is torn", "glue it", USAGE)
        x = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(number))
        return Batch(x, x / 2)


class ToyModel(Settings):
    drop: float = setting(0.2, "Dropout.", panel="Model")


class ToyTrain(ToyModel, Train):
    pass


def build(settings: ToyModel) -> nn.Module:
    """Dropout makes the result depend on torch's random numbers as well."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Dropout(settings.drop), nn.Conv2d(4, 3, 3, padding=1)
    )


TOY: Engine = dataclasses.replace(
    DEBLUR,
    name="deblur",
    model=ToyModel,
    build=build,
    data=lambda settings: (Numbers(), Numbers(2)),
    loss=lambda net, batch, settings: {
        "mse": (net(batch.x) - batch.y).square().mean(),
        "l1": 0.1 * (net(batch.x) - batch.y).abs().mean(),
    },
    score=lambda net, batch: {"psnr": -10 * (net(batch.x) - batch.y).square().mean((1, 2, 3)).log10()},
    samples=lambda net, batch: {"x": batch.x, "output": net(batch.x).clamp(0, 1)},
)


def toy(folder: Path, **values: Any) -> ToyTrain:
    quick: dict[str, Any] = {
        "out": folder, "steps": 8, "epoch_steps": 4, "batch": 2, "workers": 0, "threads": 1,
        "warmup": 2, "lr": 1e-2, "save_every": 3, "device": "cpu",
    }  # fmt: skip
    if "resume" in values:
        return ToyTrain(**values)  # the rest comes from the run's own record
    return ToyTrain(**(quick | values))


def go(engine: Engine, settings: Train) -> int:
    return train.run(engine, settings, Console(json=True))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows(folder)]


def state(folder: Path) -> dict[str, Any]:
    return checkpoint.read_state(folder / "last.pt", train.STATES)


def assert_same(first: Any, second: Any) -> None:
    """Two nested values are equal bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, list):
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def assert_same_run(first: Path, second: Path) -> None:
    for name in ("net", "ema", "optimiser", "random", "step", "best", "stale", "skipped", "sums"):
        assert_same(state(first)[name], state(second)[name])
    assert_same(load_file(first / "best.safetensors"), load_file(second / "best.safetensors"))
    assert timeless(first) == timeless(second)
