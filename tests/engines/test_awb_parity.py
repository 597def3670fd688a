"""The networks give the same answer by whichever runtime."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imgtool import checkpoint, header, runtime
from imgtool.engines.awb import estimate, exported, forward, model, port, worker
from imgtool.engines.awb.engine import ENGINE
from imgtool.engines.awb.settings import Export, Model
from imgtool.engines.awb.stats import of_linear
from imgtool.errors import FAILED, ImgtoolError
from imgtool.export import formats, sidecar
from imgtool.export.order import Order

HIST = Model()
SMALL = Model(arch="deepawb", channels="4,6,8", neurons=40, layers=2, height=61, width=90)


def network(shape: Model) -> Any:
    """Return a network whose answers differ from frame to frame, with any statistics of its batches."""
    torch.manual_seed(5)
    net = model.build(shape).eval()
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.3, 2)
            torch.nn.init.normal_(part.weight, 1, 0.3)
            torch.nn.init.normal_(part.bias, 0, 0.3)
        elif isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(part.weight)
    return net


def state(net: Any) -> Mapping[str, np.ndarray]:
    return {name: value.numpy() for name, value in net.state_dict().items()}


def gains(net: estimate.Net) -> np.ndarray:
    """Return the gains of 8 frames under different lights."""
    rng = np.random.default_rng(11)
    found = []
    for _ in range(8):
        patches = rng.uniform(0.05, 0.8, (18, 27, 3)) * rng.uniform(0.3, 1, 3)
        frame = (16_000 * patches.repeat(8, 0).repeat(8, 1)).astype(np.uint16)
        r, b, _ = estimate.white(net, of_linear(frame, 0, 16_383))
        found.append([1 / r, 1, 1 / b])
    return np.array(found)


def angle(one: np.ndarray, two: np.ndarray) -> float:
    cross = np.linalg.norm(np.cross(one, two), axis=1)
    return float(np.degrees(np.arctan2(cross, (one * two).sum(1))).max())


@pytest.mark.parametrize("shape", [HIST, SMALL], ids=["hist", "deepawb"])
def test_numpy_is_torch(shape: Model) -> None:
    net = network(shape)
    one, two = gains(estimate.of_state(shape, state(net))), gains(estimate.of_module(net, shape))
    assert angle(one, two) < 1e-4
    assert np.ptp(one, axis=0).max() > 0.01  # the answers depend on the frames


def file_of(shape: Model, kind: str, folder: Path) -> Path:
    """Export the network of a shape."""
    told = port.port(network(shape), Export(to=kind))
    about = {"format": "imgtool-export/1", "engine": "awb", "model": shape.model_dump(), "facts": told.facts}
    for key, slots in (("inputs", told.inputs), ("outputs", told.outputs)):
        last = {"layout": "NHWC"} if kind == "tflite" else {}
        about[key] = [{"name": slot.name, **(last if slot.picture else {})} for slot in slots]
    sizes = {name: axis.usual for name, axis in told.axes.items()}
    free = frozenset(told.axes) if kind == "onnx" else frozenset()
    path = folder / f"net.{kind}"
    formats.FORMATS[kind].write(Order(told, sizes, free, about), path)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["onnx", "tflite"])
@pytest.mark.parametrize("shape", [HIST, SMALL, Model(arch="deepawb")], ids=["hist", "small", "deepawb"])
def test_every_file_of_every_network_is_torch(shape: Model, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("litert_torch" if kind == "tflite" else "onnxscript")
    path = file_of(shape, kind, tmp_path)
    one, two = gains(exported.opened(path)), gains(estimate.of_module(network(shape), shape))
    assert angle(one, two) < 1e-3
    data = path.read_bytes()
    for secret in (b"/work", b"/tmp", b"/home", b"site-packages", b".py", str(Path.cwd()).encode()):
        assert secret not in data
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # weights are inside
    if shape is HIST:
        assert len(data) < 70_000


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_the_files_that_ship_are_those_of_the_weights(kind: str) -> None:
    pytest.importorskip(runtime.PACKAGES[kind][0])
    weights = header.SHIPPED / "awb-hist.safetensors"
    if not weights.is_file():
        pytest.skip("these weights do not ship yet")
    found = exported.of_weights(weights, kind)
    assert found.path == weights.with_suffix("." + kind)
    ours, theirs = worker.network(weights, "numpy"), worker.network(found.path, kind)
    assert angle(gains(ours), gains(theirs)) < 1e-3
    net: Any = checkpoint.network(ENGINE, checkpoint.read_weights(weights, "awb"))
    net.score[0].bias.data += 1e-2
    assert angle(gains(estimate.of_module(net, HIST)), gains(theirs)) > 1e-3  # the comparison can tell


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize(
    ("kernel", "high", "wide"), [(1, 5, 4), (3, 8, 8), (3, 9, 7), (5, 13, 6), (7, 6, 15)]
)
def test_convolution_is_that_of_torch(stride: int, dilation: int, kernel: int, high: int, wide: int) -> None:
    rng = np.random.default_rng(kernel)
    x, weight = rng.normal(size=(3, high, wide)), rng.normal(size=(4, 3, kernel, kernel))
    bias = rng.normal(size=4)
    right = F.conv2d(
        *map(torch.from_numpy, (x[None], weight, bias)), stride, dilation * (kernel - 1) // 2, dilation
    )[0].numpy()
    low = [each.astype(np.float32) for each in (x, weight, bias)]
    ours = forward.conv(*low, stride=stride, dilation=dilation)
    assert ours.shape == right.shape
    assert np.abs(ours - right).max() < 1e-4


@pytest.mark.parametrize(("high", "wide"), [(2, 2), (5, 6), (7, 9), (3, 2)])
def test_pooling_is_that_of_torch(high: int, wide: int) -> None:
    x = np.random.default_rng(0).normal(size=(3, high, wide)).astype(np.float32)
    assert np.array_equal(forward.pool(x), F.max_pool2d(torch.from_numpy(x), 2).numpy())


# --- files --------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "w.safetensors"
    checkpoint.save_weights(path, ENGINE, SMALL, network(SMALL).state_dict(), {})
    return path


class Opened:
    """An exported file of which only what it says is looked at."""

    def __init__(self, path: Path) -> None:
        self.path, self.about = path, json.loads(path.read_text())


def said(weights: Path, **other: Any) -> str:
    """Return what a file of weights says of itself."""
    found = checkpoint.read_weights(weights, "awb")
    told = port.port(network(SMALL), Export(to="onnx"))
    return json.dumps(sidecar.about(ENGINE, found, told, "fp32", {}, False) | other)


def test_the_file_beside_the_weights_is_taken_where_it_is_theirs(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(runtime, "open", Opened)
    beside = weights.with_suffix(".onnx")
    beside.write_text(said(weights))
    assert exported.of_weights(weights, "onnx").path == beside
    for other in ({"weights_sha256": None}, {"model": HIST.model_dump()}):
        beside.write_text(said(weights, **other))
        with pytest.raises(ImgtoolError, match="was not made from the weights"):
            exported.of_weights(weights, "onnx")
    beside.write_text(said(weights, facts=[1], format="another"))
    with pytest.raises(ImgtoolError, match="not written by imgtool"):
        exported.of_weights(weights, "onnx")
    beside.write_text(said(weights))
    net = network(SMALL)
    net.mlp[0].bias.data += 1e-3
    checkpoint.save_weights(weights, ENGINE, SMALL, net.state_dict(), {})
    with pytest.raises(ImgtoolError, match="was not made from the weights"):
        exported.of_weights(weights, "onnx")


def test_what_was_exported_once_is_taken_from_the_cache(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    made: list[list[str]] = []

    def run(command: list[str], **values: Any) -> Any:
        made.append(command)
        Path(command[command.index("-o") + 1]).write_text(said(weights))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(runtime, "open", Opened)
    first = exported.of_weights(weights, "onnx").path
    assert first == exported.of_weights(weights, "onnx").path
    assert first.is_relative_to(tmp_path / "cache")
    assert len(made) == 1
    assert made[0][1:8] == ["-m", "imgtool", "export", "awb", "--to", "onnx", "--weights"]


def test_what_keeps_a_file_from_being_made_is_told(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    said = json.dumps({"error": "no converter", "hint": "install it"})
    answers = iter(
        [
            subprocess.CompletedProcess([], 1, f"\n{said}\n", ""),
            subprocess.CompletedProcess([], 1, "", "a bug"),
        ]
    )
    monkeypatch.setattr(subprocess, "run", lambda *given, **values: next(answers))
    with pytest.raises(ImgtoolError, match="no converter") as caught:
        exported.of_weights(weights, "onnx")
    assert (caught.value.hint, caught.value.code) == ("install it", FAILED)
    with pytest.raises(RuntimeError, match="a bug"):
        exported.of_weights(weights, "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_a_missing_file_is_exported(weights: Path, kind: str) -> None:
    pytest.importorskip("litert_torch" if kind == "tflite" else "onnxscript")
    found = exported.of_weights(weights, kind)
    assert found.about["weights_sha256"] == json.loads(said(weights))["weights_sha256"]
    assert angle(gains(exported.ported(found)), gains(estimate.of_module(network(SMALL), SMALL))) < 1e-3
