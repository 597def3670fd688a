"""What ``bench filter`` measures and says: error, time, grades, verdicts, limits, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from imgtool import bench as verb
from imgtool import checkpoint, metrics
from imgtool.console import Console
from imgtool.engine import Timing
from imgtool.engines.filter import bench, quality, targets, worker
from imgtool.engines.filter.bench import Point
from imgtool.engines.filter.engine import ENGINE
from imgtool.engines.filter.quality import CLASSICAL, HALF, LEARNED, NOTHING, QUARTER, Measured, Result
from imgtool.engines.filter.settings import Bench, Model
from imgtool.errors import ImgtoolError

FILTERS = ("bilateral", "sobel_3", "sobel_5_canny")


# --- how near --------------------------------------------------------------------------------


def mask(*rows: str) -> npt.NDArray[np.bool_]:
    return np.array([[letter == "#" for letter in row] for row in rows])


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        (mask("....", ".#..", "...."), mask("....", ".#..", "...."), 1.0),
        (mask("....", ".#..", "...."), mask("#...", "....", "...."), 1.0),  # a diagonal away
        (mask("....", ".#..", "...."), mask("...#", "....", "...."), 0.0),
        (mask("####", "....", "...."), mask("#...", "....", "...."), 2 / 3),  # half of them too far
        (mask("#...", "....", "...."), mask("####", "....", "...."), 2 / 3),  # half of them not found
        (mask("...."), mask("...."), 1.0),
        (mask("...."), mask("#..."), 0.0),
        (mask("#..."), mask("...."), 0.0),
    ],
)
def test_f1_of_edges(found: Any, wanted: Any, expected: float) -> None:
    assert quality.f1(found, wanted) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(24, 31, 3), (11, 11, 3), (40, 17, 1)])
def test_ssim_is_that_of_metrics(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, shape) / 255
    second = np.clip(first + rng.normal(0, 0.1, shape), 0, 1)
    one, two = (torch.from_numpy(each).permute(2, 0, 1)[None] for each in (first, second))
    assert quality.ssim(first.squeeze(), second.squeeze()) == pytest.approx(float(metrics.ssim(one, two)))


def test_measured_against_the_filter_in_float() -> None:
    target = targets.parse("tv")
    wanted = np.full((10, 10, 3), 100.25 / 255, np.float32)
    found = np.full((10, 10, 3), 100, np.uint8)
    found[0, 0] = 108
    got = quality.measured(target, Result(found, found), Result(wanted, wanted))
    error = (99 * 0.25**2 + 7.75**2) / 100 / 255**2
    assert got.psnr == pytest.approx(-10 * math.log10(error), abs=1e-3)
    assert 0.25 < got.p999 <= 7.75
    assert math.isnan(got.ssim)
    assert math.isnan(got.f1)
    exact = found / np.float32(255)
    same = quality.measured(target, Result(found, found), Result(exact, exact))
    assert (same.psnr, same.p999) == (100, 0)


def test_of_thin_edges_the_map_is_measured_before() -> None:
    target = targets.parse("sobel_5_canny")
    edges = np.eye(6, dtype=np.float32)
    ours = Result(np.full((6, 6), 51, np.uint8), (255 * edges).astype(np.uint8))
    got = quality.measured(target, ours, Result(np.zeros((6, 6), np.float32), edges))
    assert got.psnr == pytest.approx(-10 * math.log10(0.2**2))
    assert got.p999 == 51
    assert got.f1 == 1


def test_eight_levels_are_eight_levels() -> None:
    wanted = (np.arange(200, dtype=np.uint8).reshape(20, 10) / np.float32(255)).astype(np.float32)
    found = np.arange(200, dtype=np.uint8).reshape(20, 10) + np.uint8(8)
    got = quality.measured(targets.parse("sobel_3"), Result(found, found), Result(wanted, wanted))
    assert got.p999 == 8


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([(59.0, 1), (58.8, 1)], "A"),
        ([(58.8, 8), (50.0, 1)], "B"),
        ([(58.8, 8.1), (50.0, 1)], "C"),
        ([(45.0, 8)], "B"),
        ([(55.0, 8), (39.9, 8)], "C"),
        ([(44.9, 1)], "C"),
        ([(40.0, 30)], "C"),
        ([(39.9, 1)], "-"),
    ],
)
def test_grades(values: list[tuple[float, float]], expected: str) -> None:
    assert quality.grade([Measured(psnr, 1, p999) for psnr, p999 in values])[0] == expected


# --- verdicts and limits ---------------------------------------------------------------------


def points(values: tuple[float, ...], learned: float = 20) -> dict[str, Point]:
    """Nothing, quarter, half, learned, and the network's ms; the others take 0, 10, 40; the filter 100."""
    ms = {NOTHING: 0, QUARTER: 10, HALF: 40, LEARNED: learned}
    found = {method: Point(ms[method], value) for method, value in zip(ms, values, strict=True)}
    return found | {CLASSICAL: Point(100, math.inf)}


@pytest.mark.parametrize(
    ("values", "learned", "expected"),
    [
        (
            (30, 36, 40, 45),
            120,
            "does not pay on this CPU: the filter itself takes 100 ms/MP, the network 120 ms/MP",
        ),
        ((math.nan,) * 4, 20, "5.0 times as fast as the filter; how near it comes, photos tell (--photos)"),
        (
            (41, 36, 40, 40.5),
            20,
            "does not pay: doing nothing is as near to the filter (41.0 dB against 40.5 dB)",
        ),
        (
            (30, 36, 40, 39),
            50,
            "does not pay: the filter at half size is better and faster "
            "(40.0 dB in 40 ms/MP, the network 39.0 dB in 50 ms/MP)",
        ),
        (
            (30, 36, 40, 35),
            20,
            "does not pay: the filter at quarter size is better and faster "
            "(36.0 dB in 10 ms/MP, the network 35.0 dB in 20 ms/MP)",
        ),
        (
            (30, 36, 40, 37.9),  # twice 10 ms is half way to 40, on a scale of logarithms
            20,
            "does not pay: the filter at a size between, in the same time, has 38.0 dB, the network 37.9 dB",
        ),
        (
            (30, 36, 40, 39),
            20,
            "pays: 5.0 times as fast as the filter, and 1.0 dB better than the filter at a size between, "
            "in the same time",
        ),
        (
            (30, 36, 40, 42.5),
            50,
            "pays: 2.0 times as fast as the filter, and 2.5 dB better than the filter at half size "
            "(40 ms/MP)",
        ),
        (
            (30, 41, 40, 42.5),
            50,
            "pays: 2.0 times as fast as the filter, and 1.5 dB better than the filter at quarter size "
            "(10 ms/MP)",
        ),
        (
            (30, 36, 40, 35),
            5,
            "pays: 20.0 times as fast as the filter, and 5.0 dB better than doing nothing "
            "(the filter at quarter size takes longer)",
        ),
        ((38, 36, 37, 39), 20, "pays: 5.0 times as fast as the filter, and 1.0 dB better than doing nothing"),
    ],
)
def test_verdicts(values: tuple[float, ...], learned: float, expected: str) -> None:
    assert bench.verdict(points(values, learned)) == expected


def test_verdicts_on_edges_and_other_devices() -> None:
    told = bench.verdict(points((0, 0.6, 0.7, 0.9)), "f1")
    assert told.startswith("pays: 5.0 times as fast as the filter, and F1 0.250 better than")
    told = bench.verdict(points((30, 36, 40, 45), 120), "psnr", "this device")
    assert told.startswith("does not pay on this device")


def figures(
    target: str, psnr: float | None = None, faster: float = 1, ms: float = 1, **more: Any
) -> dict[str, Any]:
    found = {
        "target": target,
        "parameters": 2003,
        "times_as_fast": faster,
        "ms_per_megapixel": {LEARNED: ms},
        **more,
    }
    return found if psnr is None else found | {"quality": {LEARNED: {"psnr": psnr}}}


def passed(*some: dict[str, Any]) -> dict[str, bool]:
    return {limit.name: limit.passed for limit in bench.limits({str(n): each for n, each in enumerate(some)})}


def test_limits() -> None:
    assert passed(figures("sobel_3", 49.0)) == {"sobel_3: parameters": True, "sobel_3: mean PSNR": True}
    assert passed(figures("sobel_3", 48.9) | {"parameters": 2506}) == {
        "sobel_3: parameters": False,
        "sobel_3: mean PSNR": False,
    }
    assert passed(figures("l0", 35, ms=201)) == {"l0: mean PSNR": True, "l0: time per megapixel": False}
    assert passed(figures("bilateral:d=5", 30), figures("gaussian", 30)) == {}
    assert passed(figures("bilateral", 48.4, tiled_apart=1), figures("gaussian", 30, tiled_apart=0)) == {
        "bilateral: mean PSNR": False,
        "tiles of 256 against the whole photo, largest difference": False,
    }
    fast = "nlm: times as fast as the filter, at 39.5 dB"
    assert passed(figures("nlm", faster=5)) == {fast: True}
    assert passed(figures("nlm", faster=4.9)) == {fast: False}
    assert passed(figures("nlm", 41, faster=9)) == {"nlm: mean PSNR": True, fast: True}


def test_of_several_networks_of_a_filter_one_may_be_near_and_another_fast() -> None:
    fast = "tv: times as fast as the filter, at 39.5 dB"
    near = figures("tv", 43.5, faster=2)
    assert passed(near, figures("tv", 39.6, faster=6)) == {"tv: mean PSNR": True, fast: True}
    assert passed(near, figures("tv", 39.4, faster=6)) == {"tv: mean PSNR": True, fast: False}


# --- pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("megapixels", [0.02, 0.1])
def test_the_timed_picture_is_the_middle_of_a_photo_or_drawn(megapixels: float, tmp_path: Path) -> None:
    drawn = bench.timed_picture(megapixels, [])
    assert drawn.shape[0] * drawn.shape[1] == pytest.approx(1e6 * megapixels, rel=0.01)
    assert np.array_equal(drawn, bench.timed_picture(megapixels, []))
    assert 20 < drawn.std() < 100
    photo = np.random.default_rng(0).integers(0, 256, (301, 251, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), photo[..., ::-1])
    got = bench.timed_picture(megapixels, [tmp_path / "photo.png"])
    assert got.shape == drawn.shape
    top, left = (301 - got.shape[0]) // 2, (251 - got.shape[1]) // 2
    inner = got[max(-top, 0) :, max(-left, 0) :][:301, :251]
    assert np.array_equal(inner, photo[max(top, 0) :, max(left, 0) :][: len(inner), : inner.shape[1]])


# --- the whole -------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of "shipped" weights: networks that change the photo a little, at random."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for number, spec in enumerate(FILTERS):
        write(folder / f"filter-{spec}.safetensors", Model(target=spec, width=2, depth=1), number)
    monkeypatch.setattr("imgtool.header.SHIPPED", folder)
    monkeypatch.setattr(checkpoint, "SHIPPED", folder)
    monkeypatch.chdir(tmp_path)
    return folder


def write(path: Path, model: Model, seed: int = 0) -> None:
    torch.manual_seed(seed)
    net: Any = ENGINE.build(model)
    nn.init.normal_(net.head.weight, 0, 0.02)
    checkpoint.save_weights(path, ENGINE, model, net.state_dict(), {})


@pytest.fixture
def call(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call the verb; what is timed runs in this process."""
    orders: list[Mapping[str, Any]] = []

    def measure(lab: verb.Lab, module: str, given: Mapping[str, Any]) -> dict[str, Timing]:
        assert module == worker.MODULE
        orders.extend(given.values())
        found = {name: worker.answer(order) for name, order in given.items()}
        return {name: Timing(**each) for name, each in found.items()}

    monkeypatch.setattr(verb.Lab, "measure_by", measure)
    monkeypatch.setattr(worker, "WHILE", 0.0)
    console = Console(quiet=True)
    records: list[Any] = []
    monkeypatch.setattr(console, "result", records.append)

    def run(**settings: Any) -> SimpleNamespace:
        threads = torch.get_num_threads()
        try:
            code = verb.run(ENGINE, Bench(megapixels=0.011, device="cpu", **settings), console)
        finally:
            torch.set_num_threads(threads)
        return SimpleNamespace(code=code, record=records[-1], orders=orders)

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        picture = bench.drawn(70 + number, 61)
        cv2.imwrite(str(folder / f"{number}.png"), np.roll(picture, 11 * number, 1)[..., ::-1])
    return folder


@pytest.mark.slow
def test_all_shipped_networks_on_photos(call: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    done = call(photos=photos, report=tmp_path / "report", variants=True)
    assert done.code == 1  # untrained networks
    told = done.record["figures"]
    assert (told["photos"], told["clock"]) == (2, "cpu")
    assert list(told["filters"]) == list(FILTERS)
    names = {path.name for path in (tmp_path / "report").iterdir()}
    sheets = {f"{name}{end}.png" for name in FILTERS for end in ("", "-photos")}
    assert names == sheets | {"overview.png", "bench.json"}
    assert all(cv2.imread(str(tmp_path / "report" / name)).std() > 5 for name in sheets)
    assert [order.get("target", "network") for order in done.orders] == [
        name for spec in FILTERS for name in (spec, spec, spec, "network")
    ]
    for spec, each in told["filters"].items():
        assert set(each["quality"]) == {NOTHING, HALF, QUARTER, LEARNED}
        assert each["ms_per_megapixel"][CLASSICAL] > 0
        assert each["tiled_apart"] == 0
        assert set(each["variants"]) == {"float16 weights", "int8, calibrated"}
        assert set(each["photos"]) == {"0.png", "1.png"}
        assert ("f1" in each["quality"][LEARNED]) == (spec == "sobel_5_canny")
    check(told["filters"], photos)


def check(filters: Mapping[str, Any], photos: Path) -> None:
    """Compute some of the figures again, straightforwardly."""
    pictures = [cv2.imread(str(path))[..., ::-1] for path in sorted(photos.iterdir())]
    smooth = [cv2.bilateralFilter(np.ascontiguousarray(each), 9, 25.5, 3.0) for each in pictures]
    same = [cv2.PSNR(np.ascontiguousarray(a), b) for a, b in zip(pictures, smooth, strict=True)]
    bilateral = filters["bilateral"]["quality"]
    assert bilateral[NOTHING]["psnr"] == pytest.approx(np.mean(same), abs=1e-6)
    assert bilateral[NOTHING]["psnr_worst"] == pytest.approx(min(same), abs=1e-6)
    maps = [targets.parse("sobel_3").map(each) for each in pictures]
    black = [-10 * math.log10(np.square(each.astype(np.float64)).mean()) for each in maps]
    assert filters["sobel_3"]["quality"][NOTHING]["psnr"] == pytest.approx(np.mean(black))
    edges = filters["sobel_5_canny"]["quality"]
    assert edges[NOTHING]["f1"] == 0
    assert edges[HALF]["f1"] > 0.2


def test_without_photos_the_time_alone_and_only_what_was_named(call: Callable[..., Any]) -> None:
    done = call(target=("sobel_3",))
    (only,) = done.record["figures"]["filters"].values()
    assert "quality" not in only
    assert only["verdict"].startswith("does not pay on this CPU: the filter itself takes")
    assert [limit["name"] for limit in done.record["budgets"]] == ["sobel_3: parameters"]
    assert done.code == 0


def test_weights_of_ones_own_and_two_of_one_filter(call: Callable[..., Any], shipped: Path) -> None:
    write(shipped.parent / "mine.safetensors", Model(target="bilateral:d=5", width=2, depth=1))
    done = call(weights=str(shipped.parent / "mine.safetensors"))
    assert list(done.record["figures"]["filters"]) == ["bilateral:d=5"]
    write(shipped / "filter-bilateral-fast.safetensors", Model(target="bilateral", width=2, depth=1))
    done = call(target=("bilateral",))
    labels = ["bilateral (filter-bilateral-fast)", "bilateral (filter-bilateral)"]
    assert list(done.record["figures"]["filters"]) == labels


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": ("tv",)}, "no shipped weights imitate tv"),
        ({"target": ("nonsense",)}, "no filter named nonsense"),
        ({"target": ("sobel_3",), "weights": "filter-sobel_3"}, "both name weights"),
        ({"weights": "pairs.safetensors"}, "imitates pairs"),
        ({"photos": Path("weights")}, "no photos in weights"),
    ],
)
def test_faults(call: Callable[..., Any], settings: dict[str, Any], words: str) -> None:
    write(Path("pairs.safetensors"), Model(target="pairs:somewhere", width=2, depth=1))
    with pytest.raises(ImgtoolError, match=words) as caught:
        call(**settings)
    assert caught.value.code == 2


@pytest.mark.slow
def test_in_processes_of_their_own(shipped: Path, tmp_path: Path) -> None:
    path = shipped / "filter-bilateral.safetensors"
    settings = Bench(megapixels=0.1, runs=1, weights=str(path), device="cpu")
    lab = verb.Lab(ENGINE, settings, Console(quiet=True))
    report = bench.run(settings, lab, ENGINE)
    (only,) = report.figures["filters"].values()  # type: ignore[attr-defined]
    times = only["ms_per_megapixel"]
    assert times[CLASSICAL] > times[QUARTER] > 0
    assert times[LEARNED] > 0
