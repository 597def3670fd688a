"""The verb: what is written, what it says of itself, and what is refused before or after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from imgtool import cli, engines, files, header
from imgtool import export as verb
from imgtool.errors import ImgtoolError
from imgtool.export import formats, parity
from imgtool.export import onnx as writer

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


class Told:
    """Runs the command line and keeps what it said."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *words: object, code: int = 0) -> SimpleNamespace:
        found = cli.run([str(word) for word in ("export", *words)])
        out, err = self.capfd.readouterr()
        assert found == code, err
        return SimpleNamespace(out=out, err=err)

    def refused(self, *words: object, code: int = 1) -> str:
        """Return the one error line and its hint."""
        err = self(*words, code=code).err
        lines = [line for line in err.splitlines() if line.startswith(("error:", "hint:"))]
        assert [line.split(":")[0] for line in lines] == ["error", "hint"], err
        assert "Traceback" not in err
        return "\n".join(lines)


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str]) -> Told:
    return Told(capfd)


@pytest.fixture(scope="module")
def sobel(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """``sobel_3`` as ONNX, and what the command printed."""
    path = tmp_path_factory.mktemp("sobel") / "deep" / "sobel.onnx"
    settings = engines.settings("filter").Export(
        to="onnx", weights="sobel_3", out=str(path), largest="40x60", threads=1
    )
    records: list[dict[str, Any]] = []
    console = SimpleNamespace(
        say=lambda text: None,
        detail=lambda text: None,
        result=lambda record, text="": records.append({**record, "text": text}),
        progress=_no_bar,
    )
    assert verb.run(engines.load("filter"), settings, console) == 0  # type: ignore[arg-type]
    return SimpleNamespace(
        path=path, record=records[0], about=json.loads(path.with_name("sobel.onnx.json").read_text())
    )


class _no_bar:
    def __init__(self, total: int, label: str) -> None:
        self.left = total

    def __enter__(self) -> _no_bar:
        return self

    def __exit__(self, *fault: object) -> None:
        assert self.left == 0 or fault[0], "progress did not reach its end"

    def advance(self, steps: int) -> None:
        self.left -= steps


# --- what is written -----------------------------------------------------------------------------


def test_the_file_runs_and_equals_torch_at_a_size_that_was_not_compared(sobel: SimpleNamespace) -> None:
    from imgtool import checkpoint

    engine = engines.load("filter")
    net = checkpoint.network(engine, checkpoint.read_weights(header.find("sobel_3", "filter"), "filter"))
    photo = np.random.default_rng(5).random((1, 3, 33, 47), np.float32)
    around = np.pad(photo, ((0, 0), (0, 0), (net.reach, net.reach), (net.reach, net.reach)), mode="reflect")
    with torch.inference_mode():
        right = net(torch.from_numpy(around)).numpy()
    session = onnxruntime.InferenceSession(str(sobel.path))
    (found,) = session.run(None, {"image": photo})
    assert np.abs(found - right).max() < 1e-5


def test_the_record_keeps_the_contract(sobel: SimpleNamespace) -> None:
    record = sobel.record
    assert {"format", "file", "bytes", "inputs", "outputs", "opset", "parity", "pass"} <= set(record)
    assert {"max_abs", "mean_abs", "samples"} <= set(record["parity"])
    assert record["bytes"] == sobel.path.stat().st_size
    assert record["opset"] == 18
    assert record["pass"] is True
    assert f"{record['parity']['max_abs']:.2g} from torch" in record["text"]


def test_the_json_beside_says_all_that_is_needed(sobel: SimpleNamespace) -> None:
    about, data = sobel.about, sobel.path.read_bytes()
    assert about["sha256"] == hashlib.sha256(data).hexdigest()
    assert about["inputs"][0] | {"meaning": ""} == {
        "name": "image", "shape": ["batch", 3, "height", "width"], "dtype": "float32", "layout": "NCHW",
        "low": 0, "high": 1, "meaning": "",
    }  # fmt: skip
    assert about["licence"] == "CC BY-SA 4.0"
    assert about["before"]
    assert about["after"]
    assert about["axes"]["height"]["multiple_of"] == 1
    assert about["axes"]["height"]["least"] <= 8
    assert about["parity"]["samples"] == len(about["parity"]["cases"])
    assert sum(about["operators"].values()) == len(onnx.load(sobel.path).graph.node)


def test_the_file_says_the_same_of_itself(sobel: SimpleNamespace) -> None:
    held = {each.key: each.value for each in onnx.load(sobel.path).metadata_props}
    about = json.loads(held["imgtool"])
    assert about.items() <= {name: sobel.about[name] for name in about}.items()
    assert about["engine"] == "filter"
    assert about["weights_sha256"] == sobel.about["weights_sha256"]


def test_the_file_says_nothing_of_the_machine(sobel: SimpleNamespace) -> None:
    data = sobel.path.read_bytes()
    for word in (str(ROOT), str(Path.home()), "site-packages", "stack_trace", ".py"):
        assert word.encode() not in data


def test_nothing_else_is_left(sobel: SimpleNamespace) -> None:
    assert sorted(path.name for path in sobel.path.parent.iterdir()) == ["sobel.onnx", "sobel.onnx.json"]


# --- what is refused -----------------------------------------------------------------------------


def test_a_file_that_exists_is_kept(export: Told, sobel: SimpleNamespace) -> None:
    before = sobel.path.read_bytes()
    said = export.refused("filter", "--to", "onnx", "-o", sobel.path)
    assert "sobel.onnx exists" in said
    assert "--force" in said
    assert sobel.path.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("filter --to onnx --size 0x5", "--size 0x5 is no size"),
        ("isp --to onnx --size 1081x1920", "a height of 1081 is not possible"),
        ("awb --to onnx --size 64x64", "takes no pictures of a size"),
        ("filter --to onnx --largest big", "--largest big is no size"),
        ("filter --to onnx --largest 1x1", "--largest 1x1: a height of 1 is not possible"),
    ],
)
def test_what_cannot_be_is_one_line_and_no_file(
    export: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(formats.Format, "require", lambda self: None)
    assert what in export.refused(*words.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("filter", "needs --to"),
        ("filter --to coreml", "coreml"),
        ("filter --to onnx -o net.tflite", "is not named like a file of onnx"),
        ("filter --to onnx --weights isp-lrfu-s", "weights of the isp engine"),
        ("filter --to onnx --weights nothing.safetensors", "no weights file"),
        ("filter --to npz", "npz"),
        ("filter --to onnx --limit 0", "--limit"),
        ("filter --to tflite --dynamic", "files of tflite have fixed sizes"),
        ("filter --to pt2 --precision int8", "--to pt2 does not write int8"),
        ("filter --to tflite --opset 20", "--opset is not for --to tflite"),
        ("filter --to onnx --max-mb 3", "--max-mb is not for --to onnx"),
        ("awb --to docker --auth admin", "--auth is not for --to docker"),
        ("awb --to docker --precision int8", "--precision is not for --to docker"),
        ("awb --to onnx --tuning imx477.json", "--tuning is not for --to onnx"),
    ],
)
def test_what_is_asked_wrongly_has_code_2(
    export: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert what in export.refused(*words.split(), code=2)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_kind_say_what_to_do(export: Told, sobel: SimpleNamespace) -> None:
    assert "is an exported file already" in export.refused(
        "filter", "--to", "onnx", "--weights", sobel.path, code=2
    )
    assert "imgtool export isp" in export.refused("filter", "--to", "onnx", "--weights", "isp-lrfu-s", code=2)


def test_a_lack_of_memory_is_one_line(export: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(order: Any, path: Path) -> Any:
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9e9 bytes"
        )

    monkeypatch.chdir(tmp_path)
    assert "out of memory" in export.refused("filter", "--to", "onnx", "--size", "99999x99999")
    monkeypatch.setattr(writer, "write", write)
    assert "out of memory" in export.refused("filter", "--to", "onnx", "--size", "64x64")
    assert not list(tmp_path.iterdir())


def test_a_broken_converter_is_named(export: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(order: Any, path: Path) -> Any:
        raise ImportError("libfoo.so: not found", name="onnxscript")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writer, "write", write)
    assert "onnxscript is installed but cannot be imported" in export.refused("filter", "--to", "onnx")


def test_a_missing_converter_is_named_before_anything_is_computed(
    export: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("imgtool.export.onnx.find_spec", lambda name: None)
    monkeypatch.setattr(verb, "_job", lambda *words: pytest.fail("the network was built"))
    assert "pip install 'imgtool[export]'" in export.refused("filter", "--to", "onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_from_torch_is_not_kept(
    export: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = writer.write

    def spoilt(order: Any, path: Path) -> Any:
        facts = real(order, path)
        model = onnx.load(path)
        weights = max(model.graph.initializer, key=lambda each: len(each.raw_data))
        values = onnx.numpy_helper.to_array(weights) * np.float32(1.001)
        weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
        onnx.save(model, path)
        return facts

    monkeypatch.setattr(writer, "write", spoilt)
    path = tmp_path / "sobel.onnx"
    words = ("filter", "--to", "onnx", "-o", path, "--size", "40x60", "--threads", 1)
    assert "differs from torch" in export.refused(*words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("full", ["net.xml", "net.bin", "net.xml.json"])
def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    made = tmp_path / "temporary" / "net.xml"
    made.parent.mkdir()
    for suffix in (".xml", ".bin"):
        made.with_suffix(suffix).write_bytes(b"new")
    target = tmp_path / "out" / "net.xml"
    targets = [target, target.with_suffix(".bin"), target.with_name("net.xml.json")]
    target.parent.mkdir()
    for path in targets:
        path.write_bytes(b"old")
    job = SimpleNamespace(targets=targets, form=formats.FORMATS["openvino"], port=SimpleNamespace(beside={}))
    real = files.atomic

    @contextmanager
    def atomic(path: Path) -> Iterator[Path]:
        if path.name == full:
            raise ImgtoolError("no space left", "make room")
        with real(path) as temporary:
            yield temporary

    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic", atomic)
        with pytest.raises(ImgtoolError, match="no space left"):
            verb._put(made, job, {})  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in target.parent.iterdir()} == {
        path.name: b"old" for path in targets
    }
    verb._put(made, job, {})  # type: ignore[arg-type]
    assert [path.read_bytes() for path in targets] == [b"new", b"new", b"{}\n"]


def test_a_dry_run_tells_and_writes_nothing(
    export: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = export("filter", "--to", "onnx", "--precision", "fp16", "-n").out
    assert "filter-sobel_3-fp16.onnx" in said
    assert "batch, height, width" in said
    assert not list(tmp_path.iterdir())


# --- what is compared ----------------------------------------------------------------------------


def chosen(name: str, *photos: Path, **settings: Any) -> tuple[list[Path], list[Path], list[str]]:
    """Return what judges, what calibrates, and what was said."""
    engine = engines.load(name)
    asked = engines.settings(name).Export(to="onnx", photos=tuple(map(str, photos)), **settings)
    net = engine.build(engine.model())
    assert engine.port is not None
    port, said = engine.port(net, asked), []
    sizes = {axis: facts.least for axis, facts in port.axes.items()}
    whole = SimpleNamespace(engine=engine, settings=asked, port=port, sizes=sizes)
    whole._readable = lambda most, console: verb.Job._readable(whole, most, console)  # type: ignore[arg-type]
    console = SimpleNamespace(warn=said.append)
    return *verb.Job._photos(whole, console), said  # type: ignore[arg-type]


def test_many_photos_are_parted_into_those_that_calibrate_and_those_that_judge(photographs: Path) -> None:
    judged, ranges, _ = chosen("filter", photographs, precision="int8", calibration=3)
    assert not set(judged) & set(ranges)
    assert (len(judged), len(ranges)) == (3, 3)
    with pytest.raises(ImgtoolError, match="8 bits need two photos or more"):
        chosen("filter", judged[0], precision="int8")


def test_a_photo_that_cannot_be_read_is_left_out(photographs: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.jpg"
    torn.write_bytes(next(photographs.glob("*")).read_bytes()[:300])
    judged, _, said = chosen("filter", torn, photographs)
    assert torn not in judged
    assert len(judged) == verb.ENOUGH
    assert len(said) == 1
    assert "torn.jpg" in said[0]
    with pytest.raises(ImgtoolError, match="none of the photos can be read"):
        chosen("filter", torn)


@pytest.mark.parametrize("name", engines.SUMMARY)
def test_photos_that_ship_are_read_by_every_engine(name: str) -> None:
    judged, ranges, said = chosen(name)
    assert len(judged) >= 2
    assert (ranges, said) == ([], [])


def test_limit_is_of_8_bits_too() -> None:
    from toys import picture

    settings = SimpleNamespace(precision="int8", limit=44.0)
    judged = verb.Job._judged(SimpleNamespace(port=picture(), settings=settings))  # type: ignore[arg-type]
    assert judged.loss is not None
    assert (judged.loss.limit, judged.loss.worst) == (44, None)
    assert parity.default_loss(judged).limit == parity.LEAST_PSNR


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_of_somebody_elses_is_not_replaced(export: Told, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for words in ((), ("--force",)):
        assert "no folder that imgtool export wrote" in export.refused(
            "awb", "--to", "docker", "-o", tmp_path, *words
        )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_working_directory_is_filled_and_filled_again_by_force(
    export: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    export("awb", "--to", "docker", "-o", ".")
    assert (place / "Dockerfile").is_file()
    assert "exists" in export.refused("awb", "--to", "docker", "-o", ".")
    (place / "Dockerfile").write_text("changed")
    export("awb", "--to", "docker", "-o", ".", "--force")
    assert "changed" not in (place / "Dockerfile").read_text()
    (place / "docker-compose.yml").write_text("mine")
    assert "docker-compose.yml is not of this export" in export.refused(
        "awb", "--to", "docker", "-o", ".", "-f"
    )
    assert (place / "docker-compose.yml").read_text() == "mine"
    assert Path.cwd().samefile(place)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_folder_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "app"
    target.mkdir()
    (target / "old.txt").write_text("x")

    def fail() -> None:
        with files.atomic_folder(target) as folder:
            (folder / "new.txt").write_text("y")
            raise ImgtoolError("torn", "glue it")

    with pytest.raises(ImgtoolError, match="torn"):
        fail()
    assert [path.name for path in tmp_path.rglob("*")] == ["app", "old.txt"]
