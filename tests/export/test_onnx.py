"""ONNX files: what they compute, and that they tell of nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import toys
from torch import nn

from imgtool.errors import ImgtoolError
from imgtool.export import onnx as writer

BATCHES = [
    {"batch": 1, "height": 4, "width": 6},
    {"batch": 3, "height": 22, "width": 10},
    {"batch": 2, "height": 64, "width": 48},
]


def written(path: Path, port, **more) -> tuple[onnxruntime.InferenceSession, dict]:
    facts = writer.write(toys.order(port, **more), path)
    return onnxruntime.InferenceSession(path), facts


def differences(session, port, lengths, seed: int = 5) -> list[float]:
    inputs = toys.made(port.inputs, lengths, seed)
    found = session.run(None, dict(zip([slot.name for slot in port.inputs], inputs, strict=True)))
    assert all(each.dtype == np.float32 for each in found)
    return [float(abs(a - b).max()) for a, b in zip(found, toys.outputs(port, inputs), strict=True)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    """A file of two inputs and outputs, with free sizes."""
    path = tmp_path_factory.mktemp("onnx") / "pair.onnx"
    return path, *written(path, toys.pair())


def test_a_file_equals_the_network_in_every_size(pair) -> None:
    for lengths in BATCHES:
        assert max(differences(pair[1], toys.pair(), lengths)) < 1e-5


def test_inputs_outputs_and_free_lengths_have_the_names_of_the_port(pair) -> None:
    session = pair[1]
    inputs = {each.name: each.shape for each in session.get_inputs()}
    outputs = {each.name: each.shape for each in session.get_outputs()}
    assert inputs == {"photo": ["batch", 3, "height", "width"], "gains": ["batch", 3]}
    assert outputs == {"large": ["batch", 3, "2*height", "2*width"], "shares": ["batch", 2]}


def test_a_file_is_one_and_says_nothing_of_where_it_was_made(pair) -> None:
    path, _, _ = pair
    assert [each.name for each in path.parent.iterdir()] == ["pair.onnx"]
    data = path.read_bytes()
    for word in (b".py", b"/lib/", b"/tests/", b"toys", b"stack_trace", str(Path.cwd()).encode()):
        assert word not in data
    model = onnx.load(path)
    assert not model.doc_string
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    props = {each.key: json.loads(each.value) for each in model.metadata_props}
    assert props == {"imgtool": toys.ABOUT}


def test_the_facts_are_those_of_the_file(pair) -> None:
    path, _, facts = pair
    model = onnx.load(path)
    assert facts["opset"] == model.opset_import[0].version == 18
    assert facts["producer"] == f"pytorch {torch.__version__}"
    assert facts["operators"]["Conv"] == facts["operators"]["ConvTranspose"] == 1
    assert sum(facts["operators"].values()) == len(model.graph.node)


class Strange(nn.Module):
    """Something that ONNX has no operation for."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(maps)


def test_an_operation_without_onnx_is_named_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    port = dataclasses.replace(toys.ends(), module=Strange())
    with pytest.raises(ImgtoolError, match=r"bessel_j0") as fault:
        writer.write(toys.order(port), tmp_path / "x.onnx")
    assert "pt2" in fault.value.hint
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_network_too_large_for_one_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "LARGEST", 1000)
    with pytest.raises(ImgtoolError, match="do not fit"):
        writer.write(toys.order(toys.ends()), tmp_path / "x.onnx")


@pytest.mark.slow
def test_a_version_that_cannot_be_had_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match="version 5"):
        writer.write(toys.order(toys.picture(), fixed=True, opset=5), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 21, 23])
def test_statistics_of_large_pictures_are_right(tmp_path: Path, opset: int) -> None:
    session, facts = written(tmp_path / "x.onnx", toys.picture(), opset=opset)
    assert facts["opset"] == opset
    assert not {name for name in facts["operators"] if "Norm" in name}
    for lengths in (*BATCHES, {"batch": 1, "height": 1080, "width": 1920}):
        assert differences(session, toys.picture(), lengths)[0] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("port", [toys.picture, toys.pair, toys.ends])
def test_half_precision_is_inside_alone(tmp_path: Path, port) -> None:
    session, facts = written(tmp_path / "x.onnx", port(), precision="fp16")
    assert {each.type for each in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float)"}
    model = onnx.load(tmp_path / "x.onnx")
    weights = [each for each in model.graph.initializer if each.name.endswith("weight")]
    assert {each.data_type for each in weights} == {onnx.TensorProto.FLOAT16}
    assert 1e-6 < max(differences(session, port(), BATCHES[1])) < 1 / 255
    assert facts["operators"]["Cast"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("port", [toys.picture, toys.pair, toys.ends])
def test_8_bits_are_of_the_weighted_operations(tmp_path: Path, port) -> None:
    sets = toys.calibration(port())
    session, facts = written(tmp_path / "x.onnx", port(), precision="int8", calibration=sets)
    model = onnx.load(tmp_path / "x.onnx")
    sources = {name: node for node in model.graph.node for name in node.output}
    types = {each.name: each.data_type for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            for name in node.input[:2]:
                assert sources[name].op_type == "DequantizeLinear"
            kernel, scales = sources[node.input[1]].input[:2]
            assert types[kernel] == onnx.TensorProto.INT8
            if node.op_type == "Conv":
                (count,) = (each.dims for each in model.graph.initializer if each.name == scales)
                assert list(count) == [w.dims[0] for w in model.graph.initializer if w.name == kernel]
    lengths = {name: axis.usual for name, axis in port().axes.items()}
    assert 1e-4 < max(differences(session, port(), lengths, seed=0)) < 0.15
    assert facts["opset"] == 18
    again = tmp_path / "y.onnx"
    writer.write(toys.order(port(), precision="int8", calibration=sets), again)
    assert again.read_bytes() == (tmp_path / "x.onnx").read_bytes()


@pytest.mark.slow
def test_the_same_weights_give_the_same_bytes(pair, tmp_path: Path) -> None:
    written(tmp_path / "again.onnx", toys.pair())
    assert (tmp_path / "again.onnx").read_bytes() == pair[0].read_bytes()


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ImgtoolError, match="onnxscript") as fault:
        writer.require()
    assert "imgtool[export]" in fault.value.hint
