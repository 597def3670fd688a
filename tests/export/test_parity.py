"""The proof of exported files: what agrees passes, what was changed fails, and nothing passes by chance."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from toys import calibration, order, picture

from imgtool.errors import ImgtoolError
from imgtool.export import onnx as writer
from imgtool.export import parity
from imgtool.port import Loss, Port

PORT = picture()
SIZES = {name: axis.usual for name, axis in PORT.axes.items()}
PHOTOS = [Path("one.jpg"), Path("three.jpg")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "toy.onnx"
    writer.write(order(PORT), path)
    return path


def every(port: Port = PORT, free: str = "batch height width") -> list[parity.Case]:
    return parity.cases(port, SIZES, frozenset(free.split()), PHOTOS, (40, 60))


def proved(
    path: Path, folder: Path, port: Port = PORT, limit: float | None = 1e-5, free: str = ""
) -> dict[str, Any]:
    return parity.Proof(port, limit, 1).check(path, every(port, free), folder)


def test_files_are_run_on_photos_and_made_inputs_at_usual_least_odd_and_large_sizes() -> None:
    cases = every()
    usual = [case for case in cases if case.sizes == SIZES]
    assert [case.name for case in usual] == ["one.jpg", "three.jpg", "noise", "flat", "extreme"]
    sizes = [
        (case.sizes["batch"], case.sizes["height"], case.sizes["width"])
        for case in cases
        if case not in usual
    ]
    assert sizes == [(1, 4, 4)] * 2 + [(3, 204, 302)] * 2 + [(1, 40, 60)] * 2  # multiples of 2
    assert [case.real for case in cases[len(usual) :]] == [True, False] * 3


def test_a_file_of_fixed_sizes_is_run_at_them_alone() -> None:
    assert all(case.sizes == SIZES for case in every(free=""))


def test_a_true_file_passes_with_its_figures(written: Path, tmp_path: Path) -> None:
    record = proved(written, tmp_path, free="batch height width")
    assert 0 < record["max_abs"] < 1e-5
    assert record["mean_abs"] < record["max_abs"]
    assert record["samples"] == len(record["cases"]) == 11
    assert record["peak_mb"] > 10
    assert "one.jpg 16x24 batch 1" in [row["input"] for row in record["cases"]]
    assert [path.name for path in tmp_path.iterdir()] == ["order.json"]


@pytest.mark.parametrize("which", [0, pytest.param(3, marks=pytest.mark.slow), 5])
def test_a_file_with_one_changed_tensor_fails(written: Path, tmp_path: Path, which: int) -> None:
    model = onnx.load(written)
    chosen = [each for each in model.graph.initializer if numpy_helper.to_array(each).size > 7][which]
    values = numpy_helper.to_array(chosen)
    assert values.dtype == np.float32
    chosen.CopyFrom(numpy_helper.from_array((values * np.float32(1.01)), chosen.name))
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    with pytest.raises(
        ImgtoolError, match=r"changed\.onnx differs from torch by .* more than 1e-05"
    ) as fault:
        proved(path, tmp_path)
    assert fault.value.code == 1


def test_infinite_and_missing_numbers_fail(written: Path, tmp_path: Path) -> None:
    model = onnx.load(written)
    bias = next(each for each in model.graph.initializer if numpy_helper.to_array(each).shape == (12,))
    bias.CopyFrom(numpy_helper.from_array(np.full(12, np.nan, np.float32), bias.name))
    onnx.save(model, tmp_path / "nan.onnx")
    with pytest.raises(ImgtoolError, match="is not finite everywhere"):
        proved(tmp_path / "nan.onnx", tmp_path)


class Deaf(nn.Module):
    """Gives the same whatever it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, photo: torch.Tensor) -> torch.Tensor:
        return photo * 0 + self.weight


def test_a_network_that_answers_all_alike_proves_nothing(tmp_path: Path) -> None:
    port = dataclasses.replace(PORT, module=Deaf().eval())
    writer.write(order(port), tmp_path / "deaf.onnx")
    with pytest.raises(ImgtoolError, match="answers every input alike"):
        proved(tmp_path / "deaf.onnx", tmp_path, port)


class Blind(nn.Module):
    """Does not look at its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, photo: torch.Tensor) -> torch.Tensor:
        return photo + self.weight * 0


def test_a_comparison_that_other_weights_would_pass_is_refused(tmp_path: Path) -> None:
    port = dataclasses.replace(PORT, module=Blind().eval())
    writer.write(order(port), tmp_path / "blind.onnx")
    with pytest.raises(ImgtoolError, match="cannot tell these weights from others"):
        proved(tmp_path / "blind.onnx", tmp_path, port)


def test_a_file_of_another_shape_is_refused(written: Path, tmp_path: Path) -> None:
    grey = nn.Sequential(PORT.module, nn.Conv2d(3, 1, 1)).eval()
    with pytest.raises(ImgtoolError, match="sharp is"):
        proved(written, tmp_path, dataclasses.replace(PORT, module=grey))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -SEGV $$", "died of signal 11"),
        ("echo 'Illegal shape' >&2; exit 3", "does not run: Illegal shape"),
        ('echo \'{"error": "no such operator", "hint": ""}\'', "no such operator"),
    ],
)
def test_what_kills_its_process_is_a_verdict(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(parity.sys, "executable", str(python))
    with pytest.raises(ImgtoolError, match=words):
        proved(written, tmp_path)


def largest(right: Any, got: Any) -> float:
    return float(np.abs(right[0] - got[0]).max())


def lossy(limit: float, worst: float | None = None, of: Any = largest) -> Port:
    return dataclasses.replace(
        PORT, loss=Loss("error", "levels", of, limit, higher_is_better=False, worst=worst)
    )


def test_for_8_bits_the_engine_says_what_is_lost(written: Path, tmp_path: Path) -> None:
    record = proved(written, tmp_path, lossy(1e-3), None)
    real = [row["loss"] for row in record["cases"] if row["real"]]
    assert record["loss"]["mean"] == pytest.approx(np.mean(real))
    assert record["loss"]["worst"] == max(real)
    assert record["loss"]["samples"] == len(real) == 2
    assert record["loss"]["disturbed"] > 1e-3  # what weights that are wrong by a tenth would lose
    assert record["loss"]["nothing"] > 1e-2


@pytest.mark.parametrize(
    ("port", "words"),
    [
        (lossy(1e-9), r"error is .* levels on average, the limit is 1e-09"),
        (lossy(1e-3, 1e-9), r"error is .* levels at worst, the limit of the worst is 1e-09"),
        (lossy(1.0, of=lambda right, got: 0.5), r"error is 0\.5 levels, and that of the input as it is 0\.5"),
        (lossy(1.0, of=lambda right, got: float("nan")), r"error is nan levels on average"),
    ],
)
def test_8_bits_keep_their_limits_and_beat_what_knows_nothing(
    written: Path, tmp_path: Path, port: Port, words: str
) -> None:
    with pytest.raises(ImgtoolError, match=words):
        proved(written, tmp_path, port, None)


def test_8_bits_with_wrong_weights_fail(tmp_path: Path) -> None:
    path = tmp_path / "eight.onnx"
    writer.write(order(PORT, precision="int8", calibration=calibration(PORT)), path)
    record = proved(path, tmp_path, lossy(1.0), None)
    assert record["loss"]["mean"] < record["loss"]["disturbed"]
    model = onnx.load(path)
    scales = [each for each in model.graph.initializer if "weight" in each.name and "scale" in each.name]
    for scale in scales:
        values = numpy_helper.to_array(scale)
        scale.CopyFrom(numpy_helper.from_array(np.asarray(values * np.float32(2)), scale.name))
    assert scales
    onnx.save(model, path)
    with pytest.raises(ImgtoolError, match=r"and that of weights that are wrong by 25 %"):
        proved(path, tmp_path, lossy(1.0), None)


def test_differences_are_shares_of_the_range_that_is_meant_or_covered() -> None:
    right = [np.linspace(0.4, 0.6, 48).reshape(1, 3, 4, 4)]
    assert parity.shares(PORT, right, [right[0] + 0.01])[0].max() == pytest.approx(0.01)
    wide = [right[0] * 100]  # covers 20
    assert parity.shares(PORT, wide, [wide[0] + 0.01])[0].max() == pytest.approx(0.0005)


def test_without_a_word_of_the_engine_it_is_psnr_over_the_ranges() -> None:
    loss = parity.default_loss(PORT)
    right, got = np.zeros((1, 3, 4, 4)), np.full((1, 3, 4, 4), 0.1)
    assert loss.of([right], [got]) == pytest.approx(20)
    assert loss.of([right], [right]) == parity.PEAK
    wide = dataclasses.replace(PORT, outputs=(dataclasses.replace(PORT.outputs[0], low=-5.0, high=5.0),))
    assert parity.default_loss(wide).of([right], [got]) == pytest.approx(40)
    assert math.isfinite(loss.limit)
