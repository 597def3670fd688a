"""The networks give the same answer by whichever runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imgtool import checkpoint, header, runtime
from imgtool.engines.awb import convert, estimate, forward, model, worker
from imgtool.engines.awb.engine import ENGINE
from imgtool.engines.awb.settings import Model
from imgtool.engines.awb.stats import of_linear
from imgtool.errors import ImgtoolError

HIST = Model()
SMALL = Model(arch="deepawb", channels="4,6,8", neurons=40, layers=2, height=61, width=90)
MARK = "awb0123456789ab"


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


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the small network as ONNX."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("core") / "core.onnx"
    convert.to_onnx(network(SMALL), SMALL, path, MARK)
    return path


def check_file(shape: Model, path: Path, kind: str) -> None:
    net = network(shape)
    one, two = gains(estimate.of_file(shape, state(net), path, kind)), gains(estimate.of_module(net, shape))
    assert angle(one, two) < 1e-4
    data = path.read_bytes()
    for secret in (b"/work", b"/tmp", b"/home", b"site-packages", b".py", str(Path.cwd()).encode()):
        assert secret not in data
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # weights are inside


@pytest.mark.slow
def test_an_onnx_file_is_torch(core: Path) -> None:
    check_file(SMALL, core, "onnx")
    assert MARK.encode() in core.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["onnx", "tflite"])
@pytest.mark.parametrize("shape", [HIST, SMALL, Model(arch="deepawb")], ids=["hist", "small", "deepawb"])
def test_every_file_of_every_network_is_torch(shape: Model, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("litert_torch" if kind == "tflite" else "onnxscript")
    path = tmp_path / f"core.{kind}"
    {"onnx": convert.to_onnx, "tflite": convert.to_tflite}[kind](network(shape), shape, path, MARK)
    check_file(shape, path, kind)
    assert MARK.encode() in path.read_bytes()
    if shape is HIST:
        assert len(path.read_bytes()) < 60_000


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_the_files_that_ship_are_those_of_the_weights(kind: str) -> None:
    pytest.importorskip(runtime.PACKAGES[kind][0])
    weights = header.SHIPPED / "awb-hist.safetensors"
    if not weights.is_file():
        pytest.skip("these weights do not ship yet")
    path = convert.core_file(weights, kind)
    assert path == weights.with_suffix("." + kind)
    net: Any = checkpoint.network(ENGINE, checkpoint.read_weights(weights, "awb"))
    assert convert.difference(net, net.shape, path, kind) < 1e-5
    ours, theirs = worker.network(weights, "numpy"), worker.network(weights, kind, str(path))
    assert angle(gains(ours), gains(theirs)) < 1e-3


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


def test_the_file_beside_the_weights_is_taken_where_it_is_theirs(weights: Path) -> None:
    pytest.importorskip("onnxruntime")
    beside = weights.with_suffix(".onnx")
    beside.write_bytes(b"a file that says " + convert.mark(header.read(weights, "awb")).encode())
    assert convert.core_file(weights, "onnx") == beside
    net = network(SMALL)
    net.mlp[0].bias.data += 1e-3
    checkpoint.save_weights(weights, ENGINE, SMALL, net.state_dict(), {})
    with pytest.raises(ImgtoolError, match="was not made from the weights"):
        convert.core_file(weights, "onnx")


def test_what_was_converted_once_is_taken_from_the_cache(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    made: list[str] = []

    def convert_(path: Path, kind: str, target: Path) -> None:
        made.append(kind)
        target.parent.mkdir(parents=True)
        target.write_bytes(b"converted")

    monkeypatch.setattr(convert, "_convert", convert_)
    first = convert.core_file(weights, "onnx")
    assert first == convert.core_file(weights, "onnx")
    assert first.is_relative_to(tmp_path / "cache")
    assert made == ["onnx"]


def test_without_a_converter_the_extra_is_named(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    with pytest.raises(ImgtoolError, match="making one needs onnx and onnxscript") as caught:
        convert.core_file(weights, "onnx")
    assert "imgtool[export]" in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_a_missing_file_is_converted(weights: Path, kind: str) -> None:
    pytest.importorskip("litert_torch" if kind == "tflite" else "onnxscript")
    path = convert.core_file(weights, kind)
    assert convert.mark(header.read(weights, "awb")).encode() in path.read_bytes()
    assert convert.difference(network(SMALL), SMALL, path, kind) < 1e-5


@pytest.mark.slow
def test_a_file_of_another_network_differs(core: Path) -> None:
    net = network(SMALL)
    assert convert.difference(net, SMALL, core, "onnx") < 1e-6
    net.blocks[1].norm.running_mean += 1e-3
    assert convert.difference(net, SMALL, core, "onnx") > convert.CLOSE


@pytest.mark.slow
def test_a_network_that_answers_everything_alike_proves_nothing(core: Path) -> None:
    net = network(SMALL)
    torch.nn.init.zeros_(net.mlp[-1].weight)
    assert convert.difference(net, SMALL, core, "onnx") == float("inf")


@pytest.mark.slow
def test_a_file_that_differs_from_torch_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    real = runtime.load
    monkeypatch.setattr(runtime, "load", lambda path, kind: lambda x: real(path, kind)(x) + 1e-3)
    with pytest.raises(ImgtoolError, match="differ from torch's"):
        convert.to_onnx(network(SMALL), SMALL, tmp_path / "core.onnx")
    assert not list(tmp_path.iterdir())
