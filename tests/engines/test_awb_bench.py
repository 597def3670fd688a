"""What ``imgtool bench awb`` measures, and how."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from imgtool import checkpoint, cli, runtime
from imgtool.engines.awb import accuracy, bench, model, worker
from imgtool.engines.awb.camera import Camera, Locus
from imgtool.engines.awb.engine import ENGINE
from imgtool.engines.awb.settings import Bench, Model
from imgtool.engines.awb.stats import AwbStats
from imgtool.errors import ImgtoolError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "start.safetensors"
    checkpoint.save_weights(path, ENGINE, Model(), model.build(Model()).state_dict(), {})
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the processes that are measured


# --- processes ----------------------------------------------------------------------------------------


def test_a_worker_measures_the_core_and_imports_nothing_large(weights: Path) -> None:
    held = np.ones(200_000_000, np.uint8)  # the parent's memory is not the child's
    order = {"task": "core", "weights": str(weights), "runtime": "numpy", "file": "", "frames": 20}
    code = (
        "import json, sys\nfrom imgtool.engines.awb import worker\n"
        f"print(json.dumps(worker.answer({order!r})))\n"
        "large = ('torch', 'cv2', 'PIL', 'rawpy', 'onnxruntime', 'ai_edge_litert', 'matplotlib', 'typer')\n"
        "print([name for name in large if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, large = done.stdout.splitlines()
    answer = json.loads(said)
    assert large == "[]"
    assert answer["parameters"] == sum(p.numel() for p in model.build(Model()).parameters())
    for part in ("core", "network"):
        told = answer[part]
        assert 0 < told["p50"] <= told["p95"] <= told["p99"] <= told["max"] < 1000
        assert told["timings"] == 20
    peaks = [answer["phases_mb"][name] for name in ("import", "load", "first", "steady")]
    assert peaks == sorted(peaks)
    assert 15 < peaks[0] < peaks[-1] == answer["peak_mb"] < 150 < held.nbytes / 1e6
    assert len({tuple(pair) for pair in answer["gains"]}) == worker.DISTINCT


def test_a_worker_runs_the_command_line(weights: Path) -> None:
    pytest.importorskip("rawpy")
    bench.write_dng(Path("frame.dng"), 0.1)
    words = ["infer", "awb", "frame.dng", "--json", "--quiet", "--weights", str(weights)]
    answer = worker.ask({"task": "command", "words": words})
    assert answer["code"] == 0
    assert answer["record"]["facts"]["red_gain"] > 0
    assert 0.05 < answer["cpu"] < 60
    own, child, shared = (answer[name] for name in ("own_mb", "child_mb", "shared_mb"))
    assert 30 < own <= answer["peak_mb"] == max(own, child) < 150
    assert 15 < shared < child  # the decoder is a fork: it has what its parent had, and more
    assert shared <= own
    assert answer["sum_mb"] == pytest.approx(own + child - shared)


def test_what_goes_wrong_in_a_worker(weights: Path) -> None:
    order = {"task": "core", "weights": "nowhere", "runtime": "numpy", "file": "", "frames": 1}
    with pytest.raises(ImgtoolError, match="nowhere"):
        worker.ask(order)
    with pytest.raises(RuntimeError, match="KeyError"):  # a bug shows all of itself
        worker.ask({"task": "nonsense"})


def test_timings_are_of_cpu_time_and_short_calls_go_together() -> None:
    def work(number: int) -> None:
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass

    told = worker.timed(work, 5)
    assert told["batch"] == 1
    assert 1.9 < told["p50"] <= told["max"] < 50
    slept = worker.timed(lambda number: time.sleep(0.02), 5)
    assert slept["p50"] < 10  # waiting is no work
    assert worker.timed(lambda number: None, 5)["batch"] > 10


def test_frames_differ_and_share_their_memory() -> None:
    seen = worker.frames()
    assert len(seen) == worker.DISTINCT >= 16
    assert {frame.shape for frame in seen} == {(432, 648, 3)}
    assert all(frame.dtype == np.uint16 for frame in seen)
    assert len({frame.tobytes() for frame in seen}) == len(seen)
    assert len({id(frame.base) for frame in seen}) == 1


# --- files ------------------------------------------------------------------------------------------


def test_a_dng_that_libraw_reads(tmp_path: Path) -> None:
    rawpy = pytest.importorskip("rawpy")
    path = tmp_path / "frame.dng"
    high, wide = bench.write_dng(path, 1)
    assert 1e6 <= high * wide < 1.03e6
    with rawpy.imread(str(path)) as raw:
        values = raw.raw_image_visible
        assert values.shape == (high, wide)
        assert raw.raw_pattern.tolist() == [[0, 1], [3, 2]]
        assert raw.white_level == worker.WHITE
        assert raw.camera_whitebalance[:3] == pytest.approx([2, 1, 1 / 0.65], rel=1e-3)
        assert 0 < values.min() < values.max() < worker.WHITE
        means = [values[row::2, column::2].mean() for row, column in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert means[1] == pytest.approx(means[2], rel=0.02)
    assert means[0] < 0.7 * means[1]  # red


# --- the command ---------------------------------------------------------------------------------------


CORE: dict[str, Any] = {
    "core": {"p50": 1.0, "p95": 1.5, "p99": 1.7, "max": 3.0, "mean": 1.1, "timings": 300, "batch": 1},
    "network": {"p50": 0.2, "p95": 0.3, "p99": 0.3, "max": 0.4, "mean": 0.2, "timings": 300, "batch": 1},
    "phases_mb": {"import": 40.0, "load": 45.0, "first": 50.0, "steady": 55.0},
    "phases_ms": {"import": 200.0, "load": 7.0, "first": 15.0, "steady": 500.0},
    "peak_mb": 55.0,
    "parameters": 3718,
}


@pytest.fixture
def run(weights: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs ``imgtool bench awb`` with invented measurements of NumPy alone."""

    def call(
        *words: str, p95: float = 1.5, png: float = 70.0, raw: float = 90.0, json_line: bool = True
    ) -> SimpleNamespace:
        def ask(order: dict[str, Any]) -> dict[str, Any]:
            if order["task"] == "core":
                return {**CORE, "core": {**CORE["core"], "p95": p95}, "gains": []}
            peak = raw if "frame.dng" in order["words"][2] else png
            memory = {"own_mb": 50.0, "child_mb": peak, "peak_mb": peak, "shared_mb": 30.0}
            memory["sum_mb"] = peak + 20.0
            return {"cpu": 0.5, **memory, "code": 0, "record": {}}

        monkeypatch.setattr(worker, "ask", ask)
        few = ["--runtimes", "numpy", "--no-original", "--megapixels", "1"]
        command = ["bench", "awb", "--weights", str(weights), *few, *words]
        capfd.readouterr()
        code = cli.run(command + ["--json"] * json_line)
        out, err = capfd.readouterr()
        record = json.loads(out) if json_line else None
        return SimpleNamespace(code=code, out=out, err=err, record=record)

    return call


def test_the_record(run: Any) -> None:
    done = run()
    assert done.code == 0
    figures = done.record["figures"]
    assert figures["parameters"] == 3718
    assert figures["cost"]["start, numpy"]["core"]["core"]["p95"] == 1.5
    assert figures["cost"]["start, numpy"]["raw"]["peak_mb"] == 90
    assert figures["notes"] == []
    limits = {budget["name"]: (budget["limit"], budget["value"]) for budget in done.record["budgets"]}
    assert limits["frame in memory to gains, CPU p95"] == (10, 1.5)
    assert limits["goal: frame in memory to gains, CPU p95"] == (2, 1.5)
    assert limits["largest process, PNG"] == (100, 70)
    assert limits["goal: largest process, RAW of 1 MP"] == (95, 90)


def test_a_limit_that_is_missed(run: Any) -> None:
    done = run(p95=11.0)
    assert done.code == 1
    missed = [budget["name"] for budget in done.record["budgets"] if not budget["pass"]]
    assert missed == ["frame in memory to gains, CPU p95", "goal: frame in memory to gains, CPU p95"]


@pytest.mark.parametrize(
    ("measured", "settings", "names"),
    [
        ({}, {}, []),
        ({"p95": 3.0}, {}, ["goal: frame in memory to gains, CPU p95"]),
        ({"p95": 11.0}, {"max_ms": 20}, []),  # who asks for less gets no goals either
        ({"p95": 1.5}, {"max_ms": 1}, ["frame in memory to gains, CPU p95"]),
        ({"png": 85.0}, {}, ["goal: largest process, PNG"]),
        ({"raw": 101.0}, {}, ["largest process, RAW of 24 MP", "goal: largest process, RAW of 24 MP"]),
        ({"raw": 120.0}, {"max_mb": 130}, []),
        ({"apart": 0.011}, {}, ["largest angle between the gains of runtimes"]),
    ],
)
def test_limits(measured: dict[str, float], settings: dict[str, Any], names: list[str]) -> None:
    given = {"p95": 1.5, "png": 70.0, "raw": 90.0, "apart": 0.0} | measured
    subject = bench.Subject("start", "numpy", Path("start"))
    subject.found = {
        "core": {"core": {"p95": given["p95"]}},
        "png": {"peak_mb": given["png"]},
        "raw": {"peak_mb": given["raw"]},
    }
    limits = bench.budgets(subject, {"start": {"onnx": given["apart"]}}, Bench(**settings))
    assert [limit.name for limit in limits if not limit.passed] == names


def test_a_disturbed_measurement_is_told(run: Any) -> None:
    done = run("--max-ms", "20", p95=3.5)
    assert done.code == 0
    assert "disturbed" in done.record["figures"]["notes"][0]
    assert "disturbed" in done.err


def test_a_runtime_that_is_not_installed_is_told(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    done = run("--runtimes", "onnx", json_line=False)
    assert done.code == 0
    assert "│ not installed │" in " ".join(done.out.split())
    assert "│ start, numpy │ 0.50 │ 70.0 │ 0.50 │ 50.0 │ 90.0 │ 110.0 │" in " ".join(done.out.split())


@pytest.mark.parametrize(
    "words",
    [
        ["--runtimes", "numpi"],
        ["--methods", "net,gray-world"],
        ["--methods", ","],
        ["--data", "nowhere"],
        ["--weights", "nobody"],
        ["--frames", "3"],
    ],
)
def test_asked_wrongly(run: Any, words: list[str]) -> None:
    done = run(*words)
    assert done.code == 2
    assert set(done.record) == {"error", "hint"}


# --- errors ------------------------------------------------------------------------------------------


def data_set(folder: Path, count: int = 6) -> list[tuple[float, float]]:
    """Write grey scenes under different lights, and what their white is."""
    folder.mkdir()
    rng = np.random.default_rng(4)
    whites = [(float(r), float(b)) for r, b in rng.uniform(0.4, 0.8, (count, 2))]
    rows = ["image,mean_r,mean_g,mean_b,camera,group"]
    for number, (r, b) in enumerate(whites):
        grey = rng.uniform(0.05, 0.9, (12, 18, 1)).repeat(4, 0).repeat(4, 1)
        frame = (16_000 * grey * [r, 1, b]).astype(np.uint16)
        cv2.imwrite(str(folder / f"{number}.png"), frame[..., ::-1])
        rows.append(f"{number}.png,{r},1,{b},camera {number % 2},person {number // 2}")
    (folder / "gt.csv").write_text("\n".join(rows) + "\n")
    return whites


def test_errors_on_frames_with_known_white(run: Any) -> None:
    whites = data_set(Path("data"))
    with Path("data/gt.csv").open("a") as file:
        file.write("lost.png,1,1,1,camera 0,person 9\n")
    done = run("--data", "data", "--methods", "grey-world,net,default", "--report", "page")
    assert done.code == 0, done.err
    told = done.record["figures"]["accuracy"]
    assert (told["frames"], told["left_out"]) == (6, 1)
    assert "do not tell what they were trained on" in done.err
    assert not any("default above" in budget["name"] for budget in done.record["budgets"])
    assert told["methods"]["grey-world"]["recovery"]["max"] < 0.05  # of what is grey, grey-world is right
    assert set(told["methods"]) == {"grey-world", "net", "default"}
    assert {name: part["net"]["count"] for name, part in told["cameras"].items()} == {
        "camera 0": 3,
        "camera 1": 3,
    }
    assert len(told["groups"]) == 3
    with Path("page/errors.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "net"]
    for row, (r, b) in zip(rows, whites, strict=True):
        one, two = (float(row["r"]), 1, float(row["b"])), (r, 1, b)
        cosine = sum(x * y for x, y in zip(one, two, strict=True)) / math.hypot(*one) / math.hypot(*two)
        assert float(row["recovery"]) == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-3)
    mean = told["methods"]["net"]["recovery"]["mean"]
    assert mean == pytest.approx(np.mean([float(row["recovery"]) for row in rows]))
    pictures = {path.name for path in Path("page").iterdir()}
    assert pictures == {"bench.json", "errors.csv", "errors.png", "distribution.png", "worst.png"}


def with_frames(weights: Path, numbers: Sequence[int]) -> str:
    """Write weights whose header says that they were trained on frames of these numbers."""
    read = checkpoint.read_weights(weights, "awb")
    frames = [hashlib.sha256(str(number).encode()).hexdigest()[:8] for number in numbers]
    about = {"frames": frames, "scores": {"recovery": 1.5}}
    checkpoint.save_weights(Path("own.safetensors"), ENGINE, Model(), read.state, about)
    return "own.safetensors"


def test_frames_that_were_trained_on_are_no_test(
    run: Any, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "FEWEST", 10)
    data_set(Path("data"), 13)
    words = ["--data", "data", "--methods", "net,default,grey-world"]
    whole = run(*words, "--weights", with_frames(weights, []))
    part = run(*words, "--weights", with_frames(weights, [0, 1, 5, 99]))
    told = part.record["figures"]["accuracy"]
    assert (told["frames"], told["trained_on"]) == (13, 3)
    counts = {name: errors["recovery"]["count"] for name, errors in told["methods"].items()}
    learned = {"default": 10, "net": 10, "default, trained on": 3, "net, trained on": 3}
    assert counts == learned | {"grey-world": 13}
    assert list(counts) == ["net", "default", "net, trained on", "default, trained on", "grey-world"]
    assert told["methods"]["net, trained on"]["trained_on"] == 3
    assert "trained_on" not in told["methods"]["net"]
    both = [told["methods"][name]["recovery"]["mean"] for name in ("net", "net, trained on")]
    all_of_it = whole.record["figures"]["accuracy"]["methods"]["net"]["recovery"]["mean"]
    assert (10 * both[0] + 3 * both[1]) / 13 == pytest.approx(all_of_it)
    assert "3 of 13 frames were trained on" in part.err
    # the scenes are grey, so that grey-world cannot be beaten
    limit = next(each for each in part.record["budgets"] if "default above grey-world" in each["name"])
    assert limit["limit"] == 0.2
    assert limit["value"] == pytest.approx(told["methods"]["default"]["recovery"]["mean"], abs=0.05)
    assert part.code == (limit["value"] > 0.2)


def test_frames_that_were_all_trained_on_say_nothing_of_methods(run: Any, weights: Path) -> None:
    data_set(Path("data"), 12)
    words = ["--data", "data", "--methods", "net,default,grey-world", "--weights"]
    done = run(*words, with_frames(weights, range(12)))
    told = done.record["figures"]["accuracy"]
    assert {"net (trained on these)", "default (trained on these)"} < set(told["methods"])
    assert not {"net", "default"} & set(told["methods"])
    assert "default_above_best_training_free" not in told
    assert "surest_80_over_all" not in told
    assert told["header_scores"] == {"recovery": 1.5}
    assert "12 of 12 frames were trained on" in done.err
    assert "recovery 1.50" in done.err
    assert not any("default above" in budget["name"] for budget in done.record["budgets"])


def test_tables_of_80_columns_break_no_words(
    run: Any, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set(Path("data"), 3)
    monkeypatch.setenv("COLUMNS", "80")
    words = ["--data", "data", "--weights", with_frames(weights, [0, 1])]
    done = run(*words, "--methods", "net,default,shades-of-grey,grayness-index", json_line=False)
    cells = [re.split("[│┃]", line) for line in done.out.splitlines() if line.startswith(("│", "┃"))]
    whole = {word for row in cells for cell in row for word in cell.split()}
    assert {"default,", "trained", "shades-of-grey", "grayness-index", "process", "network", "worst"} <= whole
    assert max(map(len, done.out.splitlines())) <= 80


def test_the_cameras_own_estimate() -> None:
    known = Camera(
        "one", Locus(np.array([3000.0, 6000]), np.array([0.8, 0.4]), np.array([0.3, 0.7])), known=True
    )
    cells = np.ones((2, 2, 3), np.float32)
    stats = AwbStats(cells, np.ones((2, 2), np.float32), known, about={"camera_ct": 4500.0})
    assert accuracy.of_camera(stats) == pytest.approx((0.6, 0.5))
    gains = stats.changed(camera=Camera(), about={"camera_gains": [2.0, 1.6]})
    assert accuracy.of_camera(gains) == pytest.approx((0.5, 0.625))
    assert accuracy.of_camera(stats.changed(about={})) is None


# --- all of it --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_whole_bench(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path / "cache"))
    words = ["--weights", str(weights), "--frames", "20", "--runs", "1", "--megapixels", "1"]
    command = [sys.executable, "-m", "imgtool", "bench", "awb", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    record = json.loads(done.stdout)
    cost = record["figures"]["cost"]
    assert len(cost) == 2 * len(bench.RUNTIMES)
    small, original = cost["start, numpy"], cost["original (deepawb, 288x432), numpy"]
    assert small["core"]["parameters"] < 10_000 < original["core"]["parameters"] == 276_865
    assert small["core"]["core"]["p50"] < original["core"]["core"]["p50"]
    assert small["core"]["peak_mb"] < 100 < cost["start, torch"]["core"]["peak_mb"]
    limits = {budget["name"]: budget for budget in record["budgets"]}
    assert limits["largest angle between the gains of runtimes"]["pass"]
    assert limits["largest process, PNG"]["pass"]
    missing = worker.ask({"task": "command", "words": ["infer", "awb", "nowhere.png", "--json"]})
    assert missing["code"] == 2
    assert "nowhere.png" in missing["record"]["error"]


def test_the_settings_are_those_of_the_command() -> None:
    assert accuracy.wanted(Bench()) == list(accuracy.METHODS)
