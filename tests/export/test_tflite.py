"""Networks as TFLite files."""

from __future__ import annotations

import json
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import ABOUT, calibration, ends, made, order, outputs, pair, picture

from imgtool import runtime
from imgtool.errors import FAILED, ImgtoolError
from imgtool.export import tflite
from imgtool.port import Port, Slot

ROOT = Path(__file__).parents[2]

Write = Callable[..., tuple[Path, dict[str, Any]]]


def told(port: Port) -> dict[str, Any]:
    """Return what a file says of itself."""
    slots = {
        key: [{"name": slot.name, "layout": "NHWC" if slot.picture else None} for slot in getattr(port, key)]
        for key in ("inputs", "outputs")
    }
    return {**ABOUT, **slots}


def given(port: Port, seed: int = 7) -> tuple[np.ndarray, ...]:
    """Return inputs of noise."""
    return made(port.inputs, {name: axis.usual for name, axis in port.axes.items()}, seed)


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes a file of a port, and gives it with what its writer told; each only once."""
    pytest.importorskip("litert_torch")
    folder = tmp_path_factory.mktemp("tflite")
    known: dict[str, tuple[Path, dict[str, Any]]] = {}

    def made_once(name: str, port: Port, **more: Any) -> tuple[Path, dict[str, Any]]:
        if name not in known:
            path = folder / f"{name}.tflite"
            wanted = replace(order(port, fixed=True, **more), about=told(port))
            known[name] = path, dict(tflite.write(wanted, path))
        return known[name]

    return made_once


def tensors(path: Path) -> list[dict[str, Any]]:
    """Return what LiteRT tells of all tensors of a file."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(str(path), experimental_op_resolver_type=plain, num_threads=1)
    interpreter.allocate_tensors()
    found: list[dict[str, Any]] = interpreter.get_tensor_details()
    return found


def apart(path: Path, port: Port, inputs: tuple[np.ndarray, ...]) -> float:
    """Return by how much a file is off torch at most, as a share of the outputs' ranges."""
    pairs = zip(runtime.open(path)(*inputs), outputs(port, inputs), port.outputs, strict=True)
    return max(float(np.abs(found - right).max()) / (slot.high - slot.low) for found, right, slot in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("port", [pair, picture, ends])
def test_a_file_computes_what_the_network_does(port: Callable[[], Port], write: Write) -> None:
    path, facts = write(port.__name__, port())
    assert apart(path, port(), given(port())) <= 1e-6
    assert facts["producer"].startswith("litert-torch 0.")
    assert facts["operators"]["CONV_2D"] >= 1


@pytest.mark.slow
def test_pictures_have_their_channels_last_and_names_are_the_ports(write: Write) -> None:
    from ai_edge_litert.interpreter import Interpreter

    path, _ = write("pair", pair())
    runner = Interpreter(str(path), num_threads=1).get_signature_runner()
    shapes = {
        name: tuple(detail["shape"])
        for details in (runner.get_input_details(), runner.get_output_details())
        for name, detail in details.items()
    }
    assert shapes == {"photo": (1, 10, 12, 3), "gains": (1, 3), "large": (1, 20, 24, 3), "shares": (1, 2)}
    photo, gains = given(pair())
    found = runner(photo=np.ascontiguousarray(photo.transpose(0, 2, 3, 1)), gains=gains)
    right, _ = outputs(pair(), (photo, gains))
    np.testing.assert_allclose(found["large"].transpose(0, 3, 1, 2), right, atol=1e-5)


@pytest.mark.slow
def test_a_file_says_what_it_is_in_an_archive_at_its_end(write: Write) -> None:
    path, _ = write("pair", pair())
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["imgtool.json"]
        assert json.loads(archive.read("imgtool.json")) == told(pair())
    assert runtime.open(path).about == told(pair())


@pytest.mark.slow
def test_the_same_network_gives_the_same_bytes_without_a_path(write: Write) -> None:
    data = write("ends", ends())[0].read_bytes()
    assert data == write("ends-again", ends())[0].read_bytes()
    for word in (str(ROOT), "site-packages", ".py", "/tmp"):
        assert word.encode() not in data


@pytest.mark.slow
@pytest.mark.parametrize("safe", [False, True])
def test_sub_pixel_layers_need_no_tensor_of_six_axes(safe: bool, write: Write) -> None:
    """The inverse of such a layer is a convolution; so is the order of its channels where it is joined."""
    path, facts = write(f"picture-{safe}", picture(), gpu_safe=safe)
    assert apart(path, picture(), given(picture())) <= 1e-6
    assert facts["operators"].get("TRANSPOSE_CONV", 0) == int(safe)
    assert facts["operators"]["CONV_2D"] == (3 if safe else 4)
    assert max(len(each["shape"]) for each in tensors(path)) <= 4


@pytest.mark.slow
def test_half_precision_halves_the_weights(write: Write) -> None:
    path, _ = write("picture-fp16", picture(), precision="fp16")
    halves = [each for each in tensors(path) if each["dtype"] == np.float16]
    assert len(halves) >= 2
    assert 1e-6 < apart(path, picture(), given(picture())) <= 1 / 255
    assert all(value.dtype == "float32" for value in runtime.open(path).inputs)


@pytest.mark.slow
def test_eight_bits_lie_between_inputs_and_outputs_of_32(write: Write) -> None:
    path, facts = write("pair-int8", pair(), precision="int8", calibration=calibration(pair()))
    assert facts["calibration"] == 4
    assert facts["quantiser"].startswith("ai-edge-quantizer ")
    assert sum(each["dtype"] == np.int8 for each in tensors(path)) >= 8
    model = runtime.open(path)
    assert {value.dtype for value in model.inputs + model.outputs} == {"float32"}
    assert 1e-4 < apart(path, pair(), given(pair())) < 0.04


class Plain(nn.Module):
    """``(1, 4)`` to as much, by some operation."""

    def __init__(self, operation: Callable[..., Any]) -> None:
        super().__init__()
        self.operation = operation
        self.layer = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.layer.weight)

    def forward(self, x: Any) -> Any:
        return self.operation(self.layer(x))


def plain(operation: Callable[..., Any]) -> Port:
    """Return the port of ``Plain``."""
    inputs, out = (Slot(name, (1, 4), 0.0, 1.0, "Numbers.") for name in ("x", "y"))
    return replace(ends(), module=Plain(operation).eval(), inputs=(inputs,), outputs=(out,))


@pytest.mark.slow
def test_ranges_of_eight_bits_hold_what_a_single_input_reached(write: Write) -> None:
    """A moving average of the ranges would end at 0.15, and cut off all above."""
    few = [(np.full((1, 4), value, np.float32),) for value in (0.1,) * 8 + (1.0,)]
    path, _ = write("ranges", plain(torch.relu), precision="int8", calibration=few)
    (found,) = runtime.open(path)(np.array([[0.0, 0.25, 0.5, 1.0]]))
    np.testing.assert_allclose(found, [[0.0, 0.25, 0.5, 1.0]], atol=0.015)


@pytest.mark.slow
def test_an_operator_that_cannot_be_converted_is_named(
    write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.tflite"
    with pytest.raises(ImgtoolError, match=r"^TFLite cannot hold the operator aten\.lgamma") as caught:
        tflite.write(order(plain(torch.lgamma), fixed=True), path)
    assert caught.value.code == FAILED
    assert caught.value.hint
    assert not path.exists()
    assert capfd.readouterr() == ("", "")


def test_lengths_that_would_be_free_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tflite, "find_spec", lambda name: object())
    with pytest.raises(ImgtoolError, match="fixed sizes, but batch, height, width would be free") as caught:
        tflite.write(order(picture()), tmp_path / "m.tflite")
    assert "--size" in caught.value.hint


def test_eight_bits_need_real_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tflite, "find_spec", lambda name: object())
    with pytest.raises(ImgtoolError, match="8 bits need real inputs") as caught:
        tflite.write(order(ends(), fixed=True, precision="int8"), tmp_path / "m.tflite")
    assert "--photos" in caught.value.hint


class Child:
    """The converting process, in whose stead something is done with its folder."""

    def __init__(self, told: object = None, stderr: str = "") -> None:
        self.told, self.stderr = told, stderr

    def __call__(self, command: list[str], **values: Any) -> subprocess.CompletedProcess[str]:
        if self.told is not None:
            Path(command[-1], "told.json").write_text(json.dumps(self.told))
        return subprocess.CompletedProcess(command, 1, "", self.stderr)


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the converting process does."""
    monkeypatch.setattr(tflite, "find_spec", lambda name: object())
    return lambda *given: monkeypatch.setattr(subprocess, "run", Child(*given))


def test_a_bug_in_the_converting_process_shows_its_traceback(
    child: Callable[..., None], tmp_path: Path
) -> None:
    child(None, "Traceback: a bug")
    with pytest.raises(RuntimeError, match="Traceback: a bug"):
        tflite.write(order(ends(), fixed=True), tmp_path / "m.tflite")


def test_torch_says_nothing_of_weights_that_share_memory(
    child: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It warns of parts of a tensor that is nowhere whole, as the network for libcamera has."""
    child({"what": "no"})
    port = plain(torch.relu)
    weight: Any = nn.Parameter(torch.eye(6)[1:5, 1:5])
    port.module.layer.weight = weight  # type: ignore[union-attr]
    with pytest.raises(ImgtoolError, match="no"):
        tflite.write(order(port, fixed=True), tmp_path / "m.tflite")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (RuntimeError("Lowering not found: aten.lgamma.default"), "the operator aten.lgamma.default"),
        (RuntimeError("Node number 3 (EXP) failed to prepare."), "the operator EXP"),
        (MemoryError(), "memory does not do"),
        (KeyError("inputs"), ""),
        (TypeError("write() takes 2 positional arguments"), ""),
    ],
)
def test_only_what_a_converter_cannot_do_is_said_to_be_its_fault(
    fault: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(folder: Path) -> None:
        raise fault

    monkeypatch.setattr(tflite, "_work", work)
    with warnings.catch_warnings():
        if said:
            assert tflite.main(tmp_path) == FAILED
            assert said in json.loads((tmp_path / "told.json").read_text())["what"]
            return
        with pytest.raises(type(fault)):
            tflite.main(tmp_path)
    assert not (tmp_path / "told.json").exists()


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tflite, "find_spec", lambda name: None)
    with pytest.raises(ImgtoolError, match="needs litert_torch and ai_edge_litert") as caught:
        tflite.require()
    assert caught.value.code == FAILED
    assert "imgtool[tflite]" in caught.value.hint
