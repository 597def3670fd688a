"""Weights and states: what comes back is what was kept; what is not ours is refused in one line."""

from __future__ import annotations

import dataclasses
import io
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

import imgtool
from imgtool import checkpoint, cli, engines, header
from imgtool.checkpoint import Weights, find, load_state, network, read_state, read_weights, save_weights
from imgtool.engine import Engine
from imgtool.errors import FAILED, USAGE, ImgtoolError
from imgtool.settings import Settings, setting


class Model(Settings):
    width: int = setting(2, "Channels.", panel="Model", ge=1)


class Run(Model):
    seed: int = setting(0, "Not of the network's shape.")


def build(settings: Model) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, settings.width, 3), nn.Conv2d(settings.width, 3, 3))


ENGINE: Engine = dataclasses.replace(engines.load("deblur"), name="toy", model=Model, build=build)


def kept(path: Path, *, engine: Engine = ENGINE, half: bool = False, **about: Any) -> nn.Module:
    """Write weights and return the network that they are of."""
    torch.manual_seed(1)
    net = build(Model(width=5))
    save_weights(path, engine, Run(width=5, seed=3), net.state_dict(), about, half=half)
    return net


def test_weights_come_back_as_the_same_network(tmp_path: Path) -> None:
    net = kept(tmp_path / "mine.safetensors", scores={"psnr": 31.5}, licence="CC0")
    weights = read_weights(tmp_path / "mine.safetensors", "toy")
    again = network(ENGINE, weights)
    image = torch.rand(1, 3, 9, 9)
    assert torch.equal(again(image), net(image))
    assert not again.training
    assert (weights.name, weights.engine, weights.model) == ("mine", "toy", {"width": 5})


def test_the_header_is_plain_json_that_says_what_the_file_is(tmp_path: Path) -> None:
    kept(tmp_path / "mine.safetensors", scores={"psnr": 31.5}, step=12, licence="CC0")
    with safe_open(tmp_path / "mine.safetensors", "pt") as opened:
        header = json.loads(opened.metadata()["imgtool"])
    assert header == {
        "format": "imgtool-weights/1",
        "engine": "toy",
        "model": {"width": 5},
        "imgtool": imgtool.__version__,
        "scores": {"psnr": 31.5},
        "step": 12,
        "licence": "CC0",
    }


def test_half_precision_is_half_the_size_and_read_as_float32(tmp_path: Path) -> None:
    net = kept(tmp_path / "half.safetensors", half=True)
    weights = read_weights(tmp_path / "half.safetensors", "toy")
    for name, value in net.state_dict().items():
        assert weights.state[name].dtype == torch.float32
        assert torch.equal(weights.state[name], value.half().float())
    with safe_open(tmp_path / "half.safetensors", "pt") as opened:
        assert all(opened.get_tensor(name).dtype == torch.float16 for name in opened.keys())  # noqa: SIM118


def test_weights_are_read_as_numpy_arrays_without_torch(tmp_path: Path) -> None:
    net = kept(tmp_path / "half.safetensors", half=True, licence="CC0")
    weights = header.read(tmp_path / "half.safetensors", "toy")
    assert (weights.name, weights.model, weights.header["licence"]) == ("half", {"width": 5}, "CC0")
    assert set(weights.state) == set(net.state_dict())
    for name, value in net.state_dict().items():
        assert weights.state[name].dtype == "float32"
        assert (weights.state[name] == value.half().float().numpy()).all()
    code = "import sys; from imgtool import header; header.read(header.Path(sys.argv[1]), 'toy'); "
    code += "print({'torch', 'cv2', 'PIL'} & set(sys.modules))"
    command = [sys.executable, "-c", code, str(tmp_path / "half.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- refused ----------------------------------------------------------------------------------


def test_weights_of_another_engine_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    kept(path)
    with pytest.raises(ImgtoolError, match="weights of the toy engine, not of deblur") as caught:
        read_weights(path, "deblur")
    assert caught.value.code == USAGE
    assert f"imgtool infer toy --weights {path}" in caught.value.hint


def _pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"net": torch.ones(3)}, buffer)
    return buffer.getvalue()


def _header(text: str) -> bytes:
    return save({"a": torch.ones(2)}, metadata={"imgtool": text})


DAMAGED = {
    "empty": b"",
    "text": b"these are no weights but words, and some more of them",
    "zeros": bytes(1000),
    "pt": _pickled(),
    "photo": b"\xff\xd8\xff\xe0" + bytes(200),
    "not JSON": _header("{"),
    "not UTF-8": _header("x").replace(b'"x"', b'"\xff"'),
}
STRANGE = {
    "no header": save({"a": torch.ones(2)}),
    "no mapping": _header("[1, 2]"),
    "no format": _header("{}"),
    "later format": _header('{"format": "imgtool-weights/9", "engine": "toy"}'),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_no_weights_file_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(DAMAGED[case])
    with pytest.raises(ImgtoolError, match="is not a readable weights file") as caught:
        read_weights(path, "toy")
    assert caught.value.code == FAILED
    assert "\n" not in caught.value.what


@pytest.mark.parametrize("case", STRANGE)
def test_weights_that_are_not_ours_are_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(STRANGE[case])
    with pytest.raises(ImgtoolError, match="was not written by imgtool"):
        read_weights(path, "toy")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    kept(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImgtoolError, match="is not a readable weights file"):
        read_weights(path, "toy")


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match=r"cannot read|not a readable"):
        read_weights(tmp_path, "toy")
    with pytest.raises(ImgtoolError, match="no such file") as caught:
        read_weights(tmp_path / "none.safetensors", "toy")
    assert caught.value.code == USAGE


def test_a_text_file_given_as_weights_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not weights")
    assert cli.run(["train", "deblur", "--photos", str(tmp_path), "--weights", str(path)]) == FAILED
    told = capsys.readouterr().err
    assert f"error: {path} is not a readable weights file" in told
    assert "hint: give a .safetensors file made by imgtool train" in told


def _weights(**changes: Any) -> Weights:
    state = dict(build(Model(width=5)).state_dict())
    model = changes.pop("model", {"width": 5})
    for name, value in changes.items():
        key = "0.weight" if name == "shape" else "9.weight"
        state[key] = value
    return Weights("mine", "toy", model, {}, state)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (_weights(shape=torch.ones(5, 3, 3, 2)), "size mismatch for 0.weight"),
        (_weights(model={"width": 4}), "size mismatch"),
        (_weights(unknown=torch.ones(1)), "9.weight"),
        (Weights("mine", "toy", {"width": 5}, {}, {"0.weight": torch.ones(5, 3, 3, 3)}), "0.bias"),
    ],
)
def test_parameters_that_do_not_fit_are_named(weights: Weights, words: str) -> None:
    with pytest.raises(ImgtoolError, match="weights mine do not fit the network") as caught:
        network(ENGINE, weights)
    assert words in caught.value.what
    assert caught.value.code == FAILED


def test_settings_that_are_unknown_here_are_named() -> None:
    with pytest.raises(ImgtoolError, match="unknown setting widht in weights mine") as caught:
        network(ENGINE, _weights(model={"widht": 5}))
    assert caught.value.hint == "did you mean width?"


def test_nothing_changes_in_a_network_that_weights_do_not_fit() -> None:
    net = build(Model(width=5))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ImgtoolError):
        load_state(net, Weights("mine", "toy", {}, {}, {}))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# --- names ------------------------------------------------------------------------------------


def test_shipped_weights_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "SHIPPED", tmp_path)
    with pytest.raises(ImgtoolError, match="named toy-large") as caught:
        find("toy-large")
    assert caught.value.hint == "give the path of a .safetensors file"
    kept(tmp_path / "toy-large.safetensors")
    kept(tmp_path / "toy-small.safetensors")
    (tmp_path / "toy-small.md").write_text("a model card")
    assert checkpoint.shipped() == ["toy-large", "toy-small"]
    assert find("toy-large") == tmp_path / "toy-large.safetensors"
    with pytest.raises(ImgtoolError, match="no weights file or shipped weights named toy-smal") as caught:
        find("toy-smal")
    assert (caught.value.hint, caught.value.code) == ("did you mean toy-small?", USAGE)


def test_a_file_is_found_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "SHIPPED", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    kept(tmp_path / "toy.safetensors")
    (tmp_path / "toy").write_bytes(b"")
    assert find("toy") == Path("toy")
    assert find("~/toy.safetensors") == tmp_path / "toy.safetensors"


def test_every_shipped_file_belongs_to_an_engine_and_loads() -> None:
    for name in checkpoint.shipped():
        engine = engines.load(name.partition("-")[0])
        net = network(engine, read_weights(find(name), engine.name))
        assert any(bool(parameter.abs().sum() > 0) for parameter in net.parameters())


# --- states -----------------------------------------------------------------------------------


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = {"net": {"a": torch.randn(3, 4)}, "step": 7, "best": {"scores": {"psnr": 1.5}}, "random": None}
    checkpoint.save_state(tmp_path / "last.pt", state)
    again = read_state(tmp_path / "last.pt", ["net", "step"])
    assert torch.equal(again.pop("net")["a"], state.pop("net")["a"])  # type: ignore[index,call-overload]
    assert again == state


class _Trap:
    """Pickled, it would write a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "caught")


def test_reading_a_state_runs_no_code(tmp_path: Path) -> None:
    torch.save({"net": _Trap(tmp_path / "trace")}, tmp_path / "last.pt")
    with pytest.raises(ImgtoolError, match="is damaged"):
        read_state(tmp_path / "last.pt", ["net"])
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("data", [b"", b"words", _pickled()[:-30], bytes(500), b"PK\x03\x04"])
def test_a_damaged_state_is_one_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(data)
    with pytest.raises(ImgtoolError, match=r"last\.pt is damaged") as caught:
        read_state(tmp_path / "last.pt", ["net"])
    assert caught.value.code == FAILED


def test_something_else_saved_by_torch_is_no_state(tmp_path: Path) -> None:
    torch.save({"net": torch.ones(1)}, tmp_path / "last.pt")
    with pytest.raises(ImgtoolError, match="no state of a run: it lacks step"):
        read_state(tmp_path / "last.pt", ["net", "step"])
    torch.save(5, tmp_path / "last.pt")
    with pytest.raises(ImgtoolError, match="is damaged"):
        read_state(tmp_path / "last.pt", ["net", "step"])


def test_a_missing_state_is_asked_wrongly(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match=f"no run to resume in {tmp_path}") as caught:
        read_state(tmp_path / "last.pt", [])
    assert caught.value.code == USAGE


@pytest.mark.parametrize("keep", [kept, lambda path: checkpoint.save_state(path, {"net": torch.randn(1000)})])
def test_nothing_is_left_half_written(keep: Callable[[Path], object], tmp_path: Path) -> None:
    """Files may not grow beyond some hundred bytes: as on a full disk, the write fails midway."""
    path = tmp_path / "kept"
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(ImgtoolError, match=f"cannot write {path}: file too large"):
            keep(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
