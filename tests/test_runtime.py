"""Exported models run without what made them."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from imgtool import runtime
from imgtool.errors import USAGE, ImgtoolError

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "imgtool" / "weights" / "awb-hist.tflite"


@pytest.fixture(scope="module")
def onnx() -> ModuleType:
    """The package, where it and what runs its files are installed."""
    pytest.importorskip("onnxruntime")
    package: ModuleType = pytest.importorskip("onnx")
    return package


def written(
    onnx: Any, path: Path, nodes: list[tuple[str, str, str]], about: object = None, **shapes: Any
) -> Path:
    """Write a model of nodes ``(operator, inputs, output)``; "x..." is an input, "y..." an output."""
    h, kind = onnx.helper, onnx.TensorProto.FLOAT
    values = {name: h.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()}
    graph = h.make_graph(
        [h.make_node(operator, inputs.split(), [output]) for operator, inputs, output in nodes],
        "graph",
        [value for name, value in values.items() if name.startswith("x")],
        [value for name, value in values.items() if name.startswith("y")],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=8)
    if about is not None:
        text = about if isinstance(about, str) else json.dumps(about)
        model.metadata_props.add(key="imgtool", value=text)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def doubling(onnx: ModuleType, tmp_path: Path) -> Path:
    """A model that returns twice what it is given, of 2x3."""
    return written(onnx, tmp_path / "doubling.onnx", [("Add", "x x", "y")], x=[2, 3], y=[2, 3])


def told(**slots: Any) -> dict[str, Any]:
    """Return what a file says of its inputs and outputs: name to layout, in order."""

    def of(first: str) -> list[dict[str, Any]]:
        return [{"name": name, "layout": layout} for name, layout in slots.items() if name[0] == first]

    return {"engine": "toy", "inputs": of("x"), "outputs": of("y")}


def test_a_model_is_run(doubling: Path) -> None:
    x = np.arange(6, dtype=np.float64).reshape(3, 2).T  # neither float32 nor contiguous
    (y,) = runtime.open(doubling)(x)
    assert np.array_equal(y, 2 * x)
    assert y.dtype == np.float32
    assert np.array_equal(runtime.load(doubling, "onnx")(x), 2 * x)


def test_another_shape_is_refused(doubling: Path) -> None:
    with pytest.raises(ImgtoolError, match="takes an input of 2×3, not of 3×2"):
        runtime.open(doubling)(np.zeros((3, 2)))
    with pytest.raises(ImgtoolError, match="takes 1 inputs, not 2"):
        runtime.open(doubling)(np.zeros((2, 3)), np.zeros((2, 3)))


def test_a_file_that_says_nothing_is_run_by_its_own_names(doubling: Path) -> None:
    model = runtime.open(doubling)
    assert (model.about, model.kind, model.path) == ({}, "onnx", doubling)
    assert model.inputs == (runtime.Value("x", (2, 3), "float32"),)
    assert model.outputs == (runtime.Value("y", (2, 3), "float32"),)


@pytest.mark.parametrize("about", ["no JSON", "[1]", "[" * 100_000, "null"])
def test_what_is_nothing_of_ours_is_taken_for_nothing(onnx: ModuleType, about: str, tmp_path: Path) -> None:
    path = written(onnx, tmp_path / "m.onnx", [("Neg", "x", "y")], about, x=[1], y=[1])
    assert runtime.open(path).about == {}


@pytest.mark.parametrize("inputs", [[{"name": "x"}, {"name": "x2"}], 3, ["x"], [{}]])
def test_a_file_that_contradicts_itself_is_refused(onnx: ModuleType, inputs: object, tmp_path: Path) -> None:
    about = {"inputs": inputs}
    path = written(onnx, tmp_path / "m.onnx", [("Neg", "x", "y")], about, x=[1], y=[1])
    with pytest.raises(ImgtoolError, match=r"but says that it has 2|is not a model"):
        runtime.open(path)


def test_free_lengths_take_any_length(onnx: ModuleType, tmp_path: Path) -> None:
    shape = [1, "height", 3]
    model = runtime.open(written(onnx, tmp_path / "m.ONNX", [("Neg", "x", "y")], x=shape, y=shape))
    assert model.inputs[0].shape == (1, None, 3)
    assert model(np.ones((1, 7, 3)))[0].shape == (1, 7, 3)
    with pytest.raises(ImgtoolError, match="of 1×any×3, not of 1×7×2"):
        model(np.ones((1, 7, 2)))
    with pytest.raises(ImgtoolError, match="of 1×any×3, not of 7×3"):
        model(np.ones((7, 3)))


def test_inputs_and_outputs_have_the_order_that_the_file_says(onnx: ModuleType, tmp_path: Path) -> None:
    """The graph has them the other way round."""
    nodes = [("Sub", "xa xb", "ya"), ("Neg", "xb", "yb")]
    shapes = {"xb": [1], "xa": [1], "yb": [1], "ya": [1]}
    about = told(xa=None, xb=None, ya=None, yb=None)
    model = runtime.open(written(onnx, tmp_path / "m.onnx", nodes, about, **shapes))
    assert [value.name for value in model.inputs + model.outputs] == ["xa", "xb", "ya", "yb"]
    assert [float(y[0]) for y in model(np.array([5]), np.array([3]))] == [2, -3]
    with pytest.raises(ImgtoolError, match="takes the input xb of 1, not of 2"):
        model(np.zeros(1), np.zeros(2))


def test_names_of_our_own_are_taken_in_order(onnx: ModuleType, tmp_path: Path) -> None:
    about = told(xa=None, xb=None, ya=None)
    nodes = [("Sub", "x1 x2", "y")]
    path = written(onnx, tmp_path / "m.onnx", nodes, about, x1=[1], x2=[1], y=[1])
    assert float(runtime.open(path)(np.array([5]), np.array([3]))[0][0]) == 2


def test_channels_that_the_file_stores_last_are_moved(onnx: ModuleType, tmp_path: Path) -> None:
    """The file adds (1, 2, 3, 4) to an array whose last axis holds its 4 channels."""
    about = told(x="NHWC", x2=None, y="NHWC")
    shapes = {"x": [1, "h", 3, 4], "x2": [4], "y": [1, "h", 3, 4]}
    model = runtime.open(written(onnx, tmp_path / "m.onnx", [("Add", "x x2", "y")], about, **shapes))
    assert [value.shape for value in model.inputs + model.outputs] == [(1, 4, None, 3), (4,), (1, 4, None, 3)]
    x, more = np.random.default_rng(0).random((1, 4, 2, 3)), np.arange(1.0, 5.0)
    (y,) = model(x, more)
    assert y.flags.c_contiguous
    np.testing.assert_allclose(y, x + more[None, :, None, None], rtol=1e-6)


def test_a_runtime_that_fails_says_so_in_a_line(onnx: ModuleType, tmp_path: Path, capfd: Any) -> None:
    shapes = {"x": ["a"], "x2": ["b"], "y": ["a"]}
    model = runtime.open(written(onnx, tmp_path / "m.onnx", [("Add", "x x2", "y")], **shapes))
    with pytest.raises(ImgtoolError, match=r"m\.onnx fails on an input of 2, 3: ") as caught:
        model(np.zeros(2), np.zeros(3))
    assert caught.value.hint
    assert capfd.readouterr() == ("", "")


def test_what_takes_whole_numbers_is_refused(onnx: ModuleType, tmp_path: Path) -> None:
    h, kind = onnx.helper, onnx.TensorProto.INT64
    ends = [h.make_tensor_value_info(name, kind, [1]) for name in "xy"]
    graph = h.make_graph([h.make_node("Neg", ["x"], ["y"])], "graph", ends[:1], ends[1:])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=8)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ImgtoolError, match="numbers of the type int64"):
        runtime.open(path)


@pytest.mark.parametrize("threads", [0, -1])
def test_no_number_of_threads_is_all_cores(
    threads: int, doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ai_edge_litert")
    from ai_edge_litert import interpreter

    taken: list[int] = []
    real = interpreter.Interpreter

    def noted(**given: Any) -> Any:
        taken.append(given["num_threads"])
        return real(**given)

    monkeypatch.setattr(interpreter, "Interpreter", noted)
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda process: {0, 1, 5}, raising=False)
    assert runtime.open(SHIPPED, threads)(*noise(runtime.open(SHIPPED)))[0].size > 0
    assert taken == [3, 1]
    assert runtime.open(doubling, threads)(np.ones((2, 3)))[0].sum() == 12


def test_what_is_wrong_with_the_runtime_is_not_said_of_the_file(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("no such option")

    import onnxruntime

    monkeypatch.setattr(onnxruntime, "SessionOptions", broken)
    with pytest.raises(RuntimeError, match="no such option"):
        runtime.open(doubling)


@pytest.mark.parametrize("kind", runtime.PACKAGES)
@pytest.mark.parametrize("content", [b"", b"no model at all, but some words", bytes(4096)])
def test_what_is_no_model(
    kind: str, content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(runtime.PACKAGES[kind][0])
    path = tmp_path / "model"
    path.write_bytes(content)
    with pytest.raises(ImgtoolError, match=f"{path} is not a model that can be run as {kind}") as caught:
        runtime.load(path, kind)
    assert caught.value.hint
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("suffix", "kind"), runtime.KINDS.items())
def test_a_file_that_is_not_there(suffix: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime.PACKAGES[kind][0])
    with pytest.raises(ImgtoolError, match="no such file") as caught:
        runtime.open(tmp_path / f"model{suffix}", trusted=True)
    assert caught.value.code == USAGE


@pytest.mark.parametrize(
    ("name", "extra"),
    [("m.onnx", "onnxruntime"), ("m.tflite", "imgtool[tflite-runtime]"), ("m.xml", "imgtool[openvino]")],
)
def test_what_is_not_installed_is_named(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    with pytest.raises(ImgtoolError, match="not installed") as caught:
        runtime.open(Path(name))
    assert caught.value.code == USAGE
    assert extra in caught.value.hint


def test_the_kind_is_told_by_the_name() -> None:
    names = ["a.onnx", "a.TFLITE", "a.xml", "a.pt2", "a.safetensors", "onnx", "a.onnx.json"]
    assert [runtime.kind_of(Path(name)) for name in names] == [
        "onnx",
        "tflite",
        "openvino",
        "pt2",
        "",
        "",
        "",
    ]
    with pytest.raises(ImgtoolError, match="no file that can be run") as caught:
        runtime.open(Path("a.safetensors"))
    assert caught.value.code == USAGE


def noise(model: runtime.Loaded) -> list[np.ndarray]:
    """Return inputs of random numbers."""
    rng = np.random.default_rng(1)
    return [rng.random(value.shape, np.float32) for value in model.inputs]


def test_the_shipped_tflite_file_is_run() -> None:
    """What it gives is what LiteRT itself gives."""
    pytest.importorskip("ai_edge_litert")
    from ai_edge_litert.interpreter import Interpreter

    model = runtime.open(SHIPPED)
    given = noise(model)
    runner = Interpreter(str(SHIPPED), num_threads=1).get_signature_runner()
    names = [value.name for value in model.inputs]
    right = runner(**dict(zip(names, given, strict=True)))
    for value, found in zip(model.outputs, model(*given), strict=True):
        assert np.array_equal(found, right[value.name])
        assert np.ptp(found) > 0


def archived(path: Path, content: bytes, name: str = "imgtool.json") -> Path:
    """Append an archive to a copy of the shipped TFLite file, in the place of its own."""
    path.write_bytes(SHIPPED.read_bytes().split(b"PK\x03\x04")[0])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


def test_the_archive_that_follows_a_tflite_file_is_read(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    plain = runtime.open(SHIPPED)
    slots = [{"name": value.name} for value in plain.inputs]
    about = {"engine": "ä", "inputs": [slots[0] | {"layout": "NHWC"}, *slots[1:]]}
    model = runtime.open(archived(tmp_path / "m.tflite", json.dumps(about, ensure_ascii=False).encode()))
    assert model.about == about
    first, *rest = noise(plain)
    moved = first.transpose(0, 3, 1, 2)
    assert model.inputs[0] == runtime.Value(plain.inputs[0].name, moved.shape, "float32", True)
    assert np.array_equal(model(moved, *rest)[0], plain(first, *rest)[0])


def test_an_archive_of_somebody_else_says_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    assert runtime.open(archived(tmp_path / "m.tflite", b"{}", "labels.txt")).about == {}
    broken = archived(tmp_path / "n.tflite", b'{"engine": "toy"}' * 9)
    data = bytearray(broken.read_bytes())
    start = data.rindex(b"PK\x03\x04")
    data[start : start + 60] = bytes(60)
    broken.write_bytes(data)
    assert runtime.open(broken).about == {}


def test_openvino_computes_in_single_precision(onnx: ModuleType, tmp_path: Path) -> None:
    """In bfloat16, which some processors prefer, 1 + 2^-12 is 1."""
    openvino = pytest.importorskip("openvino")
    shape = ["batch", 2]
    source = written(onnx, tmp_path / "m.onnx", [("Mul", "x x", "y")], x=shape, y=shape)
    model, path = openvino.Core().read_model(source), tmp_path / "m.xml"
    model.set_rt_info(json.dumps(told(x=None, y=None)), ["imgtool"])
    openvino.save_model(model, path, compress_to_fp16=False)
    loaded = runtime.open(path)
    assert loaded.about["engine"] == "toy"
    assert loaded.inputs == (runtime.Value("x", (None, 2), "float32"),)
    x = 1 + np.array([[1, 2], [3, 4], [5, 6]]) / 4096
    np.testing.assert_allclose(loaded(x)[0], x**2, rtol=1e-7)
    with pytest.raises(ImgtoolError, match="of any×2, not of 3×3"):
        loaded(np.zeros((3, 3)))
    whole = path.read_text()
    path.write_text(whole[:-300])
    with pytest.raises(ImgtoolError, match="is not a model that can be run as openvino"):
        runtime.open(path)
    path.with_suffix(".bin").unlink()
    with pytest.raises(ImgtoolError, match=r"m\.xml lacks m\.bin beside it"):
        runtime.open(path)


def test_archives_of_torch_are_opened_where_they_are_trusted(tmp_path: Path) -> None:
    import torch

    class Sum(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return a - b, a.sum(1)

    rows = torch.export.Dim("rows", min=1)
    given = (torch.zeros(2, 3), torch.zeros(2, 3))
    program = torch.export.export(Sum(), given, dynamic_shapes=({0: rows}, {0: rows}))
    path = tmp_path / "m.pt2"
    text = json.dumps(told(xa=None, xb=None, ydifference=None, ysum=None))
    torch.export.save(program, path, extra_files={"imgtool.json": text})
    with pytest.raises(ImgtoolError, match="can run code") as caught:
        runtime.open(path)
    assert caught.value.code == USAGE
    threads = torch.get_num_threads()
    try:
        model = runtime.open(path, threads, trusted=True)
    finally:
        torch.set_num_threads(threads)
    assert [value.name for value in model.inputs + model.outputs] == ["xa", "xb", "ydifference", "ysum"]
    assert [value.shape for value in model.inputs + model.outputs] == [
        (None, 3),
        (None, 3),
        (None, 3),
        (None,),
    ]
    first, second = model(np.full((5, 3), 4), np.ones((5, 3)))
    assert np.array_equal(first, np.full((5, 3), 3))
    assert np.array_equal(second, np.full(5, 12))


def test_nothing_large_is_imported(doubling: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom imgtool import runtime\n"
        f"runtime.open(Path({str(doubling)!r}))\n"
        "large = ('torch', 'cv2', 'PIL', 'matplotlib', 'onnx', 'openvino', 'zipfile')\n"
        "print([name for name in large if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
