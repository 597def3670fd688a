"""OpenVINO's files: what they compute, and what they hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toys

from imgtool.errors import ImgtoolError
from imgtool.export import openvino as writer

SIZES = [{"batch": 1, "height": 4, "width": 6}, {"batch": 3, "height": 22, "width": 10}]


def differences(path: Path, port, lengths) -> list[float]:
    openvino = pytest.importorskip("openvino")
    run = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    inputs = toys.made(port.inputs, lengths)
    found = run(dict(zip([slot.name for slot in port.inputs], inputs, strict=True)))
    right = zip((slot.name for slot in port.outputs), toys.outputs(port, inputs), strict=True)
    return [float(abs(found[name] - values).max()) for name, values in right]


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "find_spec", lambda name: None)
    with pytest.raises(ImgtoolError, match="openvino") as fault:
        writer.require()
    assert "imgtool[openvino]" in fault.value.hint


@pytest.mark.slow
def test_a_file_equals_the_network_and_says_what_it_is(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    port, path = toys.ends(), tmp_path / "x.xml"
    facts = writer.write(toys.order(port), path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.bin", "x.xml"]
    assert max(differences(path, port, {})) < 1e-5
    model = openvino.Core().read_model(path)
    assert json.loads(model.get_rt_info(["imgtool"]).value) == toys.ABOUT
    assert facts["operators"]["Convolution"] == 1
    assert "openvino 20" in facts["producer"]
    assert str(Path.cwd()) not in path.read_text()
    first = [each.read_bytes() for each in sorted(tmp_path.iterdir())]
    writer.write(toys.order(port), path)
    assert [each.read_bytes() for each in sorted(tmp_path.iterdir())] == first


@pytest.mark.slow
@pytest.mark.parametrize("port", [toys.picture, toys.pair])
def test_every_size_is_right(tmp_path: Path, port) -> None:
    writer.write(toys.order(port()), tmp_path / "x.xml")
    for lengths in (*SIZES, {"batch": 1, "height": 1080, "width": 1920}):
        assert max(differences(tmp_path / "x.xml", port(), lengths)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "most"), [("fp16", 1 / 255), ("int8", 0.15)])
def test_fewer_bits_make_smaller_and_coarser_files(tmp_path: Path, precision: str, most: float) -> None:
    port = toys.picture()
    writer.write(toys.order(port), tmp_path / "whole.xml")
    few = toys.order(port, precision=precision, calibration=toys.calibration(port))
    writer.write(few, tmp_path / "few.xml")
    assert (tmp_path / "few.bin").stat().st_size < 0.6 * (tmp_path / "whole.bin").stat().st_size
    lengths = {name: axis.usual for name, axis in port.axes.items()}
    assert 1e-5 < differences(tmp_path / "few.xml", port, lengths)[0] < most
