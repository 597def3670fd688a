"""The verb ``bench`` and what the deblur engine measures with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from imgtool import bench, checkpoint, cli, images, metrics
from imgtool.console import Console
from imgtool.engine import Budget, Subject, Timing
from imgtool.engines.deblur import bench as deblur
from imgtool.engines.deblur.engine import ENGINE
from imgtool.engines.deblur.settings import Bench, Model
from imgtool.errors import ImgtoolError

ROOT = Path(__file__).parents[1]
Run = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write weights of a network as it is before training, which returns what it sees."""
    path = tmp_path_factory.mktemp("weights") / "start.safetensors"
    net = ENGINE.build(Model())
    checkpoint.save_weights(path, ENGINE, Model(), net.state_dict(), {}, half=True)
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the processes that are measured


def timings(slow: float = 8.0) -> Callable[..., dict[str, Timing]]:
    def measure(lab: bench.Lab, subjects: Sequence[Subject], runs: int = 0) -> dict[str, Timing]:
        cost = {"ours, whole": 1.0, "ours, tiles of 512": 1.5, "unet-seed, whole": slow}
        return {s.name: Timing(cost.get(s.name, 0.5), 2.0, 900.0, 300.0) for s in subjects}

    return measure


@pytest.fixture
def run(weights: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs ``imgtool bench deblur`` with invented timings."""
    monkeypatch.setattr(bench.Lab, "measure", timings())

    def call(*words: str, json_line: bool = True) -> SimpleNamespace:
        capfd.readouterr()
        command = ["bench", "deblur", "--weights", str(weights), *words, *["--json"] * json_line]
        code = cli.run(command)
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, record=json.loads(out) if json_line else None)

    return call


def photo(path: str, seed: int = 0, blur: float = 0.0, size: tuple[int, int] = (90, 70)) -> None:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
        size, Image.Resampling.NEAREST
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.filter(ImageFilter.GaussianBlur(blur)).save(path)


# --- the record ------------------------------------------------------------------------------


def test_the_object(run: Run) -> None:
    done = run("--no-large")
    assert done.code == 0
    record = done.record
    assert set(record) == {"engine", "what", "environment", "figures", "budgets"}
    assert record["engine"] == "deblur"
    assert {"cpu", "cores", "threads", "python", "torch", "system"} <= set(record["environment"])
    for budget in record["budgets"]:
        assert {"name", "limit", "value", "unit", "pass"} <= set(budget)
    figures = record["figures"]
    assert figures["cpu_ratio_to_seed"] == 8
    assert figures["cpu_seconds_per_megapixel"]["ours, whole"] == pytest.approx(1 / 2.0736)
    assert figures["parameters"] == sum(p.numel() for p in ENGINE.build(Model()).parameters())
    assert "large" not in figures


def test_a_limit_that_is_missed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.Lab, "measure", timings(slow=2.9))
    done = run("--no-large")
    assert done.code == 1
    assert [b["name"] for b in done.record["budgets"] if not b["pass"]] == ["CPU time of unet-seed over ours"]
    text = run("--no-large", json_line=False)
    assert text.code == 1
    assert text.out.count("MISSED") == 1


def test_the_large_photo_is_measured_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    fake = timings()

    def measure(lab: Any, subjects: Sequence[Subject], runs: int = 0) -> dict[str, Timing]:
        asked.extend((subject.name, runs) for subject in subjects)
        return fake(lab, subjects, runs)

    monkeypatch.setattr(bench.Lab, "measure", measure)
    record = run().record
    assert asked[-1] == ("6000x4000", 1)
    assert record["figures"]["large"]["peak_mb"] == 900
    assert "peak memory, 6000x4000" in [budget["name"] for budget in record["budgets"]]


@pytest.mark.parametrize(
    ("value", "limit", "sense", "passed"),
    [(5, 5, "<=", True), (5.1, 5, "<=", False), (5, 5, ">=", True), (4.9, 5, ">=", False)],
)
def test_budgets(value: float, limit: float, sense: Any, passed: bool) -> None:
    assert Budget("x", limit, value, "s", sense).passed is passed
    assert not Budget("x", limit, float("nan"), "s", sense).passed


def test_a_report_and_none_over_another(run: Run) -> None:
    done = run("--no-large", "--report", "page")
    assert done.code == 0
    assert json.loads(Path("page/bench.json").read_text()) == done.record
    assert images.read(Path("page/cpu.png")).pixels.shape[1] > 300
    again = run("--no-large", "--report", "page")
    assert again.code == 1
    assert again.record["error"] == "page/bench.json exists"


def test_dry_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.Lab, "measure", lambda *_: pytest.fail("a dry run measured"))
    assert run("-n").record["plan"]["runs"] == 3


# --- quality ---------------------------------------------------------------------------------


def test_quality_on_pairs(run: Run) -> None:
    for number in range(3):
        photo(f"pairs/sharp/{number}.png", number)
        photo(f"pairs/blur/{number}.png", number, blur=2)
    done = run("--no-large", "--data", "pairs", "--report", "page")
    figures = done.record["figures"]
    assert figures["pairs"] == 3
    assert abs(figures["gain"]) < 1e-9  # this network changes nothing ...
    assert figures["psnr"]["unsharp"] > figures["psnr"]["blurred"] + 0.2  # ... and the mask helps
    assert 0 < figures["ssim"]["blurred"] < 1
    assert sorted(figures["gains"]) == ["0.png", "1.png", "2.png"]
    assert done.code == 1  # for the gain is below the limit
    missed = [budget["name"] for budget in done.record["budgets"] if not budget["pass"]]
    assert missed == ["mean PSNR gain over the blurred photos"]
    assert {"bench.json", "cpu.png", "gain.png", "0.png"} <= {path.name for path in Path("page").iterdir()}


def test_sharp_photos_and_tiles(run: Run) -> None:
    photo("sharp/a.png", 1, size=(300, 280))
    photo("sharp/b.jpg", 2)
    figures = run("--no-large", "--photos", "sharp").record["figures"]
    assert (figures["sharp_photos"], figures["sharp_psnr"]) == (2, 100)
    assert figures["tiled_apart_levels"] <= 1e-4


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--data", "nowhere"], 2),
        (["--data", "empty"], 2),
        (["--photos", "empty"], 2),
        (["--weights", "nobody"], 2),
        (["--runs", "0"], 2),
    ],
)
def test_asked_wrongly(run: Run, words: list[str], code: int) -> None:
    Path("empty").mkdir()
    done = run("--no-large", *words)
    assert done.code == code
    assert set(done.record) == {"error", "hint"}
    assert done.err.count("error: ") == 1


def test_the_mask_sharpens_and_keeps_type_and_range() -> None:
    flat = np.full((9, 9, 3), 200, np.uint8)
    assert np.array_equal(ENGINE.baseline(flat), flat)
    edge = flat.copy()
    edge[:, 5:] = 255
    out = ENGINE.baseline(edge)
    assert out.dtype == np.uint8
    assert out[4, 4, 0] < 200
    assert out[4, 5, 0] == 255


def test_the_interval_covers_the_mean() -> None:
    low, high = metrics.interval([1.0, 2.0, 3.0, 4.0])
    assert 1 < low < 2.5 < high < 4
    assert metrics.interval([1.0, 2.0, 3.0, 4.0]) == (low, high)


def test_macs_of_a_known_network() -> None:
    import torch

    net = torch.nn.Conv2d(3, 4, 3, padding=1)
    assert deblur.macs(net, 10, 20) == 10 * 20 * 3 * 4 * 9


# --- processes -------------------------------------------------------------------------------


def lab(weights: Path, **settings: Any) -> bench.Lab:
    return bench.Lab(ENGINE, Bench(weights=str(weights), threads=1, **settings), Console(quiet=True))


@pytest.mark.slow
def test_a_real_measurement(weights: Path) -> None:
    held = np.ones(150_000_000, np.uint8)  # the parent's memory is not the child's
    subjects = [
        Subject("ours", 64, 96, settings={"tile": 0}),
        Subject("mask", 64, 96, baseline=True),
    ]
    found = lab(weights, runs=1).measure(subjects)
    assert list(found) == ["ours", "mask"]
    for timing in found.values():
        assert 0 < timing.cpu < 60
        assert timing.wall > 0
        assert 50 < timing.base_mb <= timing.peak_mb < 1500
    assert bench.peak_mb() > held.nbytes / 1e6


@pytest.mark.slow
def test_the_peak_is_that_of_this_process_alone() -> None:
    code = (
        "from imgtool.bench import peak_mb; import sys\n"
        "base = peak_mb(); held = bytearray(b'x') * 200_000_000; del held; print(base, peak_mb())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    base, peak = map(float, done.stdout.split())
    assert 195 < peak - base < 215


@pytest.mark.slow
def test_a_subject_that_cannot_be_measured(weights: Path) -> None:
    wrong = Subject("seed in tiles", 64, 96, model={"arch": "unet-seed"}, settings={"tile": 32})
    with pytest.raises(
        ImgtoolError, match="measuring seed in tiles: tiles would change the result"
    ) as caught:
        lab(weights, runs=1).measure([wrong])
    assert caught.value.hint


def outcome(code: int, out: str = "", err: str = "") -> Timing:
    return bench._outcome("ours", subprocess.CompletedProcess([], code, out, err))


def test_what_became_of_a_process() -> None:
    answer = '{"cpu": 1, "wall": 2, "peak_mb": 3, "base_mb": 4}\n'
    assert outcome(0, "words before\n" + answer) == Timing(1, 2, 3, 4)
    with pytest.raises(ImgtoolError, match="measuring ours was killed by signal 9") as caught:
        outcome(-9)
    assert "memory" in caught.value.hint
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):  # a bug shows all of itself
        outcome(1, "", "Traceback ...\nZeroDivisionError: division by zero\n")


def test_rounds_take_turns_and_the_best_counts(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def once(self: bench.Lab, subject: Subject) -> Timing:
        order.append(subject.name)
        number = len(order)
        return Timing(10 / number, 10 / number, 100 * number, 50 / number)

    monkeypatch.setattr(bench.Lab, "_once", once)
    found = lab(weights, runs=2).measure([Subject("a", 1, 1), Subject("b", 1, 1)])
    assert order == ["a", "b", "a", "b"]
    assert found["a"] == Timing(10 / 3, 10 / 3, 300, 50 / 3)
    lab(weights, runs=2).measure([Subject("a", 1, 1)], runs=1)
    assert len(order) == 5


@pytest.mark.slow
def test_a_whole_bench(weights: Path) -> None:
    command = [sys.executable, "-m", "imgtool", "bench", "deblur", "--json", "--weights", str(weights)]
    small = ["--height", "480", "--width", "640", "--runs", "1"]
    done = subprocess.run(
        [*command, *small], capture_output=True, text=True, check=False, env=os.environ.copy()
    )
    assert done.returncode in (0, 1), done.stderr
    record = json.loads(done.stdout)
    limits = {budget["name"]: budget["pass"] for budget in record["budgets"]}
    assert limits["peak memory, 6000x4000"]
    assert limits["CPU time of unet-seed over ours"]
