"""``imgtool infer --weights FILE`` with exported files: what runs them, and every fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from imgtool import cli, engines, images, runtime
from imgtool.errors import FAILED, USAGE
from imgtool.images import Photo

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

Array = npt.NDArray[Any]
Run = Callable[..., SimpleNamespace]
FACTS = {
    "target": "mine", "reach": 0, "multiple": 1, "count": 3, "residual": False, "local": True, "least": 1
}  # fmt: skip


def save_negative(path: Path, about: dict[str, Any] | None) -> Path:
    """Write by hand an ONNX file of a filter that turns black into white."""
    shape = [1, 3, "height", "width"]
    image, filtered = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name in ("image", "filtered")
    )
    one = onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [], [1.0])
    node = onnx.helper.make_node("Sub", ["one", "image"], ["filtered"])
    graph = onnx.helper.make_graph([node], "negative", [image], [filtered], [one])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    if about is not None:
        onnx.helper.set_model_props(model, {"imgtool": json.dumps(about)})
    path.write_bytes(model.SerializeToString())
    return path


def about(**other: Any) -> dict[str, Any]:
    said = {"format": "imgtool-export/1", "engine": "filter", "facts": FACTS}
    return said | {"inputs": [{"name": "image"}], "outputs": [{"name": "filtered"}]} | other


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


@pytest.fixture
def photo() -> Array:
    pixels = np.random.default_rng(1).integers(0, 256, (21, 33, 3), np.uint8)
    images.write(Path("a.png"), Photo(pixels))
    return pixels


@pytest.fixture
def infer(photo: Array, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs ``imgtool infer filter a.png`` and tells how it ended."""

    def call(weights: Path, *words: str, engine: str = "filter") -> SimpleNamespace:
        capfd.readouterr()
        code = cli.run(["infer", engine, "a.png", "--weights", str(weights), "-o", "b.png", *words])
        out, err = capfd.readouterr()
        lines = [json.loads(line) for line in out.splitlines()] if "--json" in words else []
        return SimpleNamespace(code=code, out=out, err=err, lines=lines)

    return call


def test_a_file_makes_the_photo(infer: Run, photo: Array) -> None:
    run = infer(save_negative(Path("negative.onnx"), about()), "--json")
    assert run.code == 0, run.err
    assert np.array_equal(images.read(Path("b.png")).pixels, 255 - photo)
    assert run.lines[0]["model"] == "negative"
    assert run.lines[0]["facts"]["target"] == "mine"


def test_a_dry_run_tells_the_runtime(infer: Run) -> None:
    run = infer(save_negative(Path("negative.onnx"), about()), "--dry-run", "--json")
    plan = run.lines[0]["plan"]
    assert (plan["weights"], plan["runtime"], plan["parameters"]) == ("negative", "onnx", None)
    assert plan["outputs"] == ["a.png -> b.png"]
    assert not Path("b.png").exists()


def test_threads_reach_the_runtime(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    opened = runtime.open

    def noted(path: Path, threads: int = 1, trusted: bool = False) -> runtime.Loaded:
        taken.append(threads)
        assert not trusted
        return opened(path, threads, trusted)

    monkeypatch.setattr(runtime, "open", noted)
    assert infer(save_negative(Path("negative.onnx"), about()), "--threads", "2").code == 0
    assert taken == [2]


def test_another_device_is_said_to_be_of_no_account(infer: Run) -> None:
    run = infer(save_negative(Path("negative.onnx"), about()), "--device", "cuda")
    assert run.code == 0
    assert "runs on the CPU" in run.err


def test_a_file_of_another_engine_is_refused(infer: Run) -> None:
    run = infer(save_negative(Path("x.onnx"), about(engine="deblur")))
    assert run.code == USAGE
    assert "x.onnx holds weights of the deblur engine, not of filter" in run.err
    assert "imgtool infer deblur --weights" in run.err


@pytest.mark.parametrize("said", [None, {}, {"format": "imgtool-export/9", "engine": "filter"}])
def test_a_file_that_imgtool_did_not_write_is_refused(infer: Run, said: dict[str, Any] | None) -> None:
    run = infer(save_negative(Path("x.onnx"), said))
    assert run.code == FAILED
    assert "not written by imgtool" in run.err
    assert "imgtool export filter" in run.err


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_file_that_is_cut_short_is_refused_in_a_line(infer: Run, share: float) -> None:
    path = save_negative(Path("x.onnx"), about())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    run = infer(path)
    assert run.code == FAILED
    assert "x.onnx" in run.err
    assert "Traceback" not in run.err
    assert not Path("b.png").exists()


def test_an_archive_of_torch_is_not_opened(infer: Run) -> None:
    Path("x.pt2").write_bytes(b"PK\x03\x04 and code")
    run = infer(Path("x.pt2"))
    assert run.code == USAGE
    assert "can run code" in run.err


def test_a_runtime_that_is_not_installed_is_named(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "installed", lambda kind: False)
    run = infer(save_negative(Path("x.onnx"), about()))
    assert run.code == USAGE
    assert "pip install onnxruntime" in run.err


def test_an_engine_that_takes_no_files_says_so(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = replace(engines.load("filter"), ported=None)
    monkeypatch.setattr(engines, "load", lambda name: engine)
    run = infer(save_negative(Path("x.onnx"), about()))
    assert run.code == USAGE
    assert "takes no exported files" in run.err
