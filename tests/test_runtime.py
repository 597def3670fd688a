"""Exported models run without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from imgtool import runtime
from imgtool.errors import USAGE, ImgtoolError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def doubling(tmp_path: Path) -> Path:
    """Write an ONNX model that returns twice what it is given, of 2x3."""
    onnx = pytest.importorskip("onnx")
    shape = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3])
    node = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    graph = onnx.helper.make_graph([node], "doubling", [shape], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    path = tmp_path / "doubling.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_a_model_is_run(doubling: Path) -> None:
    pytest.importorskip("onnxruntime")
    x = np.arange(6, dtype=np.float64).reshape(3, 2).T  # neither float32 nor contiguous
    assert np.array_equal(runtime.load(doubling, "onnx")(x), 2 * x)


def test_another_shape_is_refused(doubling: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ImgtoolError, match="takes an input of 2×3, not of 3×2"):
        runtime.load(doubling, "onnx")(np.zeros((3, 2)))


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


@pytest.mark.parametrize("kind", runtime.PACKAGES)
def test_a_file_that_is_not_there(kind: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime.PACKAGES[kind][0])
    with pytest.raises(ImgtoolError, match="no such file") as caught:
        runtime.load(tmp_path / "model", kind)
    assert caught.value.code == USAGE


@pytest.mark.parametrize(("kind", "extra"), [("onnx", "onnxruntime"), ("tflite", "imgtool[tflite-runtime]")])
def test_what_is_not_installed_is_named(kind: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    with pytest.raises(ImgtoolError, match="not installed") as caught:
        runtime.load(Path("model"), kind)
    assert caught.value.code == USAGE
    assert extra in caught.value.hint


def test_nothing_large_is_imported(doubling: Path) -> None:
    pytest.importorskip("onnxruntime")
    code = (
        "import sys\nfrom pathlib import Path\nfrom imgtool import runtime\n"
        f"runtime.load(Path({str(doubling)!r}), 'onnx')\n"
        "print([name for name in ('torch', 'cv2', 'PIL', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
