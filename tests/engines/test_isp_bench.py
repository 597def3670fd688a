"""What ``bench isp`` measures: the work of networks, their latency in every form, files, limits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import rawpy
import torch
from torch import nn

from imgtool import bench as verb
from imgtool import checkpoint
from imgtool.console import Console
from imgtool.engine import Timing
from imgtool.engines.isp import bench, latency, worker
from imgtool.engines.isp.engine import ENGINE
from imgtool.engines.isp.settings import Bench, Model
from imgtool.errors import ImgtoolError

XS = Model(size="xs")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write weights of a small network as it is before training."""
    path = tmp_path_factory.mktemp("weights") / "start.safetensors"
    checkpoint.save_weights(path, ENGINE, XS, ENGINE.build(XS).state_dict(), {})
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- work --------------------------------------------------------------------------------------------


def test_the_work_of_the_original_network() -> None:
    net = ENGINE.build(Model(**bench.ORIGINAL_MODEL))
    work = latency.work(net, (1088, 1920))
    assert work.parameters == 5_725_199
    assert work.macs / 1e9 == pytest.approx(39.3, abs=0.05)
    assert work.least == 4 * 544 * 960 + 3 * 1088 * 1920 + work.parameters
    assert next(net.parameters()).device == CPU


def test_work_is_counted_by_the_shapes_of_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2, 2))
    work = latency.work(net, (20, 28))
    pixels = 10 * 14
    assert work.parameters == 6 * 8 * 9 + 6 + 6 * 3 * 4 + 3
    assert work.macs == pixels * 6 * 8 * 9 + pixels * 6 * 3 * 4
    assert work.elements == pixels * (8 + 6) + pixels * (6 + 3 * 4)
    assert work.least == pixels * (8 + 12) + work.parameters


def test_floors() -> None:
    work = latency.Work(parameters=0, macs=10**9, elements=3 * 10**6, least=10**6)
    floors = latency.Ceiling(flops=4e12, bandwidth=1e9).floors(work, 2)
    assert floors == pytest.approx({"arithmetic": 0.5, "traffic": 6, "least": 2})


# --- the ladder --------------------------------------------------------------------------------------


def test_the_ladder_goes_on_where_a_form_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA there are no graphs, and the compiler is broken."""

    def broken(*_: object, **words: Any) -> None:
        raise RuntimeError(f"no compiler for {words['mode']}\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    if torch.cuda.is_available():
        pytest.skip("graphs work here")
    net = ENGINE.build(XS).eval()
    before = torch.backends.cudnn.benchmark
    found = latency.ladder(net, (32, 32), CPU, 5)
    assert torch.backends.cudnn.benchmark is before
    assert list(found) == [form.name for form in latency.FORMS]
    eager, tf32, half, graph, reduced, tuned, whole_graph, whole = found.values()
    assert eager["p10"] <= eager["median"] <= eager["p90"] <= eager["p99"]
    assert half["median"] > 0
    assert tf32["median"] > 0
    assert set(graph) == set(whole_graph) == {"failed"}
    assert reduced == {"failed": "RuntimeError: no compiler for reduce-overhead"}
    assert tuned == {"failed": "RuntimeError: no compiler for max-autotune"}
    assert np.isnan(bench.fastest_whole(found))
    assert bench.fastest_whole({**found, latency.FORMS[-1].name: {"median": 1.5}}) == 1.5
    assert next(net.parameters()).dtype == torch.float32
    assert whole == reduced


def test_float32_is_timed_without_rounding_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def times(*_: object) -> list[float]:
        seen.append((torch.backends.cudnn.allow_tf32, torch.is_grad_enabled()))
        return [1.0]

    monkeypatch.setattr(latency, "times", times)
    before = torch.backends.cudnn.allow_tf32
    latency.ladder(ENGINE.build(XS), (32, 32), CPU, 5, latency.FORMS[:2])
    assert seen == [(False, False), (True, False)]
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize(
    ("model", "black", "white"),
    [
        (XS, 64, 1023),
        (Model(size="xs", packing="mai21", scaling="mai21"), 0, 1020),
        (Model(**bench.ORIGINAL_MODEL), 0, 1020),
    ],
)
def test_from_raw_integers_to_bytes_a_network_gives_what_infer_gives(
    model: Model, black: float, white: float
) -> None:
    torch.manual_seed(0)
    net = ENGINE.build(model.model_copy(update={"width": "8"})).eval()
    (raw,) = latency.frames(net, (64, 64), 1, CPU)
    assert (raw.shape, raw.dtype) == ((1, 4, 32, 32), torch.int16)
    packed = (raw.double() - black) / (white - black)
    own = packed if model.packing == "rggb" else packed[:, [2, 1, 3, 0]]  # the frame has the network's order
    with torch.inference_mode():
        gains, noise = torch.tensor([[1.9, 1.0, 1.6]]).double(), torch.tensor([[1e-3, 1e-6]]).double()
        fed = latency.model.feed(net, own, gains, noise).float()
        matrix = torch.tensor([[1.6, -0.5, -0.1], [-0.2, 1.5, -0.3], [0.0, -0.6, 1.6]])
        expected = latency.model.photo(net, fed, matrix).clamp(0, 1) * 255
        step = latency.prepared(latency.Form("whole", whole=True), net, [raw])
        found: Any = step(0)
    assert found.dtype == torch.uint8
    assert (found - expected).abs().max() < 0.51
    assert found.float().std() > 0.5


def test_inputs_take_turns_and_warming_up_is_not_timed() -> None:
    seen: list[int] = []
    step = latency.prepared(latency.Form("eager", half=False), lambda fed: seen.append(int(fed)), range(3))  # type: ignore[arg-type]
    assert len(latency.times(step, 4, CPU, warm_ups=2)) == 4
    assert seen == [0, 1, 0, 1, 2, 0]
    found = latency.inputs(ENGINE.build(XS), (8, 12), 3, torch.empty(0, dtype=torch.float16))
    assert [each.shape for each in found] == [(1, 8, 4, 6)] * 3
    assert not torch.equal(found[0], found[1])
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_percentiles() -> None:
    found = latency.spread([float(n) for n in range(101)])
    assert found == pytest.approx({"median": 50, "p10": 10, "p90": 90, "p99": 99})


# --- processes ---------------------------------------------------------------------------------------


def order(task: str, weights: Path, **more: Any) -> dict[str, Any]:
    common = {"task": task, "threads": 1, "size": [64, 64], "type": "fp32", "model": {}}
    return {**common, "weights": str(weights), "path": "frame.dng", "target": "photo.jpg", **more}


@pytest.mark.parametrize("task", sorted(worker.TASKS))
def test_every_task(task: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "WHILE", 0.0)
    monkeypatch.setattr(worker, "EDGE", 64)
    monkeypatch.setattr(worker, "COPIED", 4096)
    monkeypatch.setattr(worker, "PIXELS", 4)
    threads = torch.get_num_threads()
    bench.write_scene(Path("frame.dng"), 64, 96)
    try:
        found = worker.answer(order(task, weights, type="bf16"))
    finally:
        torch.set_num_threads(threads)
    assert set(found) == {"cpu", "wall", "peak_mb", "base_mb"}
    assert found["peak_mb"] >= found["base_mb"] > 10
    if "file" in task:
        assert cv2.imread("photo.jpg").shape == (64, 96, 3)


def test_what_a_child_costs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is decoded in a process of its own, which starts with the first one."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    program = (
        "import sys, time\nkept = bytearray(150_000_000)\ndel kept\n"
        "for line in sys.stdin:\n"
        "    end = time.process_time() + 0.1\n    while time.process_time() < end: pass\n"
        "    print('done', flush=True)\n"
    )
    command = [sys.executable, "-S", "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin
        assert child.stdout

        def ask() -> None:
            child.stdin.write("now\n")  # type: ignore[union-attr]
            child.stdin.flush()  # type: ignore[union-attr]
            child.stdout.readline()  # type: ignore[union-attr]

        monkeypatch.setattr(worker, "WHILE", 0.0)
        monkeypatch.setattr(worker, "TASKS", {"rival": lambda order: ask})
        found = worker.answer({"task": "rival", "threads": 1})
        assert child.pid in worker.children()
        child.stdin.close()
    assert 0.07 <= found["cpu"] <= 0.5
    assert found["peak_mb"] > verb.peak_mb() + 140


def test_libraw_is_measured_without_torch() -> None:
    bench.write_scene(Path("frame.dng"), 64, 96)
    program = f"""
import sys
from {worker.MODULE} import answer
for task in ("rival", "file by LibRaw"):
    found = answer(dict(task=task, threads=1, path="frame.dng", target="photo.jpg"))
    assert found["cpu"] > 0
print("torch" in sys.modules, "rawpy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_an_error_of_a_task_is_told(weights: Path) -> None:
    missing = weights.with_name("nowhere.safetensors")
    assert set(worker.answer(order("forward", missing))) == {"error", "hint"}


def test_the_timed_frame_is_a_raw_file_like_a_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SCENE", (64, 96))
    bench.write_scene(Path("large.dng"), 100, 154)
    with rawpy.imread("large.dng") as opened:
        values = opened.raw_image_visible.copy()
        assert (opened.white_level, opened.black_level_per_channel) == (4095, [256] * 4)
    assert values.shape == (100, 154)
    assert 300 < np.percentile(values, 5) < np.percentile(values, 95) < 4000
    part = bench.scene(64, 96)
    assert np.array_equal(part, bench.scene(64, 96))
    assert part.reshape(-1, 3).std(0).min() > 20


def test_what_another_module_measures_takes_turns(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def answer(command: list[str], **words: Any) -> Any:
        told = json.loads(words["input"])
        asked.append((command[-1], told["threads"]))
        assert words["env"]["OMP_NUM_THREADS"] == str(told["threads"])
        line = json.dumps({"cpu": told["cost"] / len(asked), "wall": 1, "peak_mb": 2, "base_mb": 1})
        return subprocess.CompletedProcess(command, 0, line + "\n", "")

    monkeypatch.setattr(subprocess, "run", answer)
    lab = verb.Lab(ENGINE, Bench(weights=str(weights), runs=2), Console(quiet=True))
    orders = {"a": {"threads": 1, "cost": 4}, "b": {"threads": 2, "cost": 8}}
    found = lab.measure_by("some.module", orders)
    assert asked == [("some.module", 1), ("some.module", 2)] * 2
    assert {name: timing.cpu for name, timing in found.items()} == {"a": 4 / 3, "b": 2}


def test_commands_are_timed_from_start_to_end(weights: Path) -> None:
    lab = verb.Lab(ENGINE, Bench(weights=str(weights)), Console(quiet=True))
    python = [sys.executable, "-S", "-c"]
    began = time.monotonic()
    check = "import os, time; assert os.environ['OMP_NUM_THREADS'] == '3'; time.sleep(0.1)"
    found = lab.wall({"a": [*python, check]}, 3)
    assert 0.1 < found["a"] < time.monotonic() - began
    with pytest.raises(RuntimeError, match="measuring b failed"):
        lab.wall({"b": [*python, "1 / 0"]})


@pytest.mark.slow
def test_cold_commands_make_jpeg_files(weights: Path) -> None:
    lab = verb.Lab(ENGINE, Bench(weights=str(weights)), Console(quiet=True))
    bench.write_scene(Path("frame.dng"), 64, 96)
    found = lab.wall(bench.commands(weights, Path("frame.dng"), Path()))
    assert found["ours"] > 0 < found["LibRaw AHD"]
    for name in ("cold.jpg", "cold-libraw.jpg"):
        assert cv2.imread(name).shape == (64, 96, 3)


@pytest.mark.slow
def test_a_process_of_its_own(weights: Path) -> None:
    lab = verb.Lab(ENGINE, Bench(weights=str(weights), runs=1), Console(quiet=True))
    bench.write_scene(Path("frame.dng"), 64, 96)
    found = lab.measure_by(
        worker.MODULE, {task: order(task, weights) for task in ("forward", "rival", "file")}
    )
    assert all(timing.cpu > 0 and 50 < timing.peak_mb < 2000 for timing in found.values())
    with pytest.raises(ImgtoolError, match="measuring x: "):
        lab.measure_by(worker.MODULE, {"x": order("forward", weights.with_name("nowhere"))})


# --- the report --------------------------------------------------------------------------------------

COST = {
    "forward": 0.1, "whole": 0.15, "rival": 0.2, "product": 0.05, "convolution": 0.1, "copying": 0.1,
    "file": 5.0, "file by LibRaw": 2.0,
}  # fmt: skip


@pytest.fixture
def run(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs the verb with invented timings."""

    def measure(lab: Any, module: str, orders: Mapping[str, Any], runs: int = 0) -> dict[str, Timing]:
        assert module == worker.MODULE
        return {
            name: Timing(2 * cost, cost, 1400.0, 300.0)
            for name, cost in (
                (name, COST[each["task"]] * (4 if "punet" in name else 1)) for name, each in orders.items()
            )
        }

    monkeypatch.setattr(verb.Lab, "measure_by", measure)
    monkeypatch.setattr(verb.Lab, "wall", lambda lab, commands, threads: dict.fromkeys(commands, 7.0))
    records: list[Any] = []
    console = Console(quiet=True)
    monkeypatch.setattr(console, "result", records.append)

    def call(**settings: Any) -> SimpleNamespace:
        code = verb.run(ENGINE, Bench(weights=str(weights), **settings), console)
        return SimpleNamespace(code=code, record=records[-1])

    return call


def test_the_object(run: Any) -> None:
    done = run(height=64, width=96, report=Path("page"), max_ms=100, megapixels=1)
    assert done.code == 0
    figures = done.record["figures"]
    assert figures["size"] == [96, 64]
    assert figures["network_ms"] == pytest.approx({"ours": 100, "xs": 100, "punet-16": 400})
    assert figures["whole_ms"] == pytest.approx({"ours": 150, "xs": 150, "punet-16": 600})
    assert figures["networks"]["punet-16"]["parameters"] == 5_725_199
    assert figures["network_cost_ms"] == pytest.approx({"ours": 200, "xs": 200, "punet-16": 800})
    assert figures["whole_cost_ms"] == pytest.approx({"ours": 300, "xs": 300, "punet-16": 1200})
    assert "ours, raw to display bytes, fp32, 1 thread" in figures["latency"]
    work = figures["networks"]["ours"]
    flops = 2 * 1536**3 / 0.1  # the product is faster than the convolution, per CPU second
    floors = figures["floors_ms"]["ours, network alone, fp32, 1 thread"]
    assert floors["arithmetic"] == pytest.approx(2e3 * work["macs"] / flops)
    assert floors["traffic"] == pytest.approx(4e3 * work["elements"] / (2 * 2**27 / 0.2))
    assert "LibRaw AHD, 1 thread" in figures["libraw_ms"]
    width, height = figures["file"]["size"]
    assert width * height == pytest.approx(1e6, rel=0.01)
    assert figures["file"]["wall_ratio_to_libraw"] == 2.5
    assert figures["file"]["cold_wall_seconds"] == {"ours": 7, "LibRaw AHD": 7}
    limits = {limit["name"]: (limit["limit"], limit["value"]) for limit in done.record["budgets"]}
    assert limits == {
        "latency, network alone, fastest form on the CPU": (100, pytest.approx(100)),
        "RAW file of 1 MP to JPEG, wall time over that of LibRaw AHD": (3, 2.5),
        "RAW file of 1 MP to JPEG, peak memory": (1500, 1400),
    }
    assert json.loads(Path("page/bench.json").read_text())["engine"] == "isp"
    assert Path("page/latency.png").exists()


def test_a_latency_that_is_missed(run: Any) -> None:
    done = run(height=50, width=96, max_ms=99.9, megapixels=0)
    assert done.code == 1
    assert done.record["figures"]["size"] == [96, 64]  # a multiple of 32
    assert "file" not in done.record["figures"]
    assert [limit["limit"] for limit in done.record["budgets"]] == [99.9]


def test_at_full_hd_the_network_must_be_faster_than_the_original(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "write_scene", lambda *_: None)
    limits = {limit["name"]: limit["value"] for limit in run(megapixels=0).record["budgets"]}
    assert limits == {"raw to display bytes, over punet-16": 0.25, "network alone, over punet-16": 0.25}


def test_on_cuda_every_network_climbs_the_ladder(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that only seems to be there."""
    rung = {"median": 2.0, "p10": 1.0, "p90": 3.0, "p99": 4.0, "peak_mb": 50.0}

    def ladder(net: Any, size: Any, where: Any, iterations: int) -> dict[str, Any]:
        assert (size, iterations) == ((64, 96), 20)
        speed = 1.0 if isinstance(net, latency.model.Punet) else 0.5
        found = {form.name: rung | {"median": (3.0 + form.whole) * speed} for form in latency.FORMS}
        found[latency.GRAPH.name]["median"] = 2.0 * speed
        return found | {latency.FORMS[-1].name: {"failed": "no compiler"}}

    cuda = SimpleNamespace(type="cuda")
    monkeypatch.setattr(bench.compute, "device", lambda name: cuda)
    monkeypatch.setattr(verb, "environment", lambda settings: {})
    monkeypatch.setattr(latency, "ladder", ladder)
    monkeypatch.setattr(latency, "ceiling", lambda where: latency.Ceiling(1e14, 1e12))
    monkeypatch.setattr(latency, "transfers", lambda *_: {"to the device": 0.1, "from the device": 0.2})
    record = run(height=64, width=96, megapixels=0, iterations=20, max_ms=1.5).record
    (limit,) = record["budgets"]
    assert (limit["name"], limit["value"]) == ("latency, network alone, fp16, CUDA graph", 1.0)
    figures = record["figures"]
    assert figures["network_ms"] == figures["network_cost_ms"] == {"ours": 1.0, "xs": 1.0, "punet-16": 2.0}
    assert figures["whole_ms"] == figures["whole_cost_ms"] == {"ours": 2.0, "xs": 2.0, "punet-16": 4.0}
    assert figures["latency"]["ours"][latency.FORMS[-1].name] == {"failed": "no compiler"}
    assert figures["transfers_ms"]["from the device"] == 0.2


def test_only_arithmetic_of_fp16_is_a_share_of_its_peak() -> None:
    rung = {"median": 2.0, "p10": 1.0, "p90": 3.0, "p99": 4.0, "peak_mb": 50.0}
    shares = {form.name: bench._rung_row("ours", form.name, rung, 0.5)[-1] for form in latency.FORMS}
    assert {name for name, share in shares.items() if share == "25 %"} == {
        form.name for form in latency.FORMS if "network alone, fp16" in form.name
    }
    assert {share for share in shares.values() if share != "25 %"} == {""}


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [XS, Model(**bench.ORIGINAL_MODEL)])
def test_the_ladder_on_a_gpu(settings: Model) -> None:
    where = torch.device("cuda")
    forms = [form for form in latency.FORMS if not form.compiled]
    found = latency.ladder(ENGINE.build(settings).eval(), (256, 256), where, 20, forms)
    assert all("median" in rung for rung in found.values()), found
    assert latency.ceiling(where).flops > 1e12
    assert all(ms > 0 for ms in latency.transfers((256, 256), 20, where).values())


def test_python_runs_the_worker_as_a_module() -> None:
    assert sys.modules[worker.MODULE] is worker
