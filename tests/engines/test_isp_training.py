"""Training the isp engine from its command line's functions: resumed runs, LibRaw in the log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from imgtool import train
from imgtool.console import Console
from imgtool.engines.isp.engine import ENGINE
from imgtool.engines.isp.settings import Train


class Killed(Exception):
    """In the middle of a step."""


def settings(photos: Path, folder: Path, resume: Path | None = None) -> Train:
    return Train(
        photos=(photos,), crop=32, batch=2, held_out=2, steps=4, epoch_steps=4, save_every=2, workers=0,
        warmup=1, size="xs", threads=1, out=folder, resume=resume,
    )  # fmt: skip


def test_a_resumed_run_ends_at_the_same_bits(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(quiet=True)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train.run(ENGINE, settings(photographs, whole), console)
    learn = train.Loop._learn

    def until(loop: train.Loop, batch: object) -> None:
        if loop.step == 3:
            raise Killed
        learn(loop, batch)

    monkeypatch.setattr(train.Loop, "_learn", until)
    with pytest.raises(Killed):
        train.run(ENGINE, settings(photographs, broken), console)
    monkeypatch.setattr(train.Loop, "_learn", learn)
    torch.rand(3)
    train.run(ENGINE, settings(photographs, broken, broken), console)
    one, two = (torch.load(folder / train.STATE, weights_only=True) for folder in (whole, broken))
    for part in ("net", "ema"):
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])
    assert not torch.equal(one["net"]["head.weight"], torch.zeros_like(one["net"]["head.weight"]))
    logs = [json.loads((folder / train.LOG).read_text().splitlines()[-1]) for folder in (whole, broken)]
    assert logs[0]["scores"] == logs[1]["scores"]
    assert set(logs[0]["scores"]) == {"psnr", "ssim", "libraw"}
    assert logs[0]["scores"]["libraw"] > 10
