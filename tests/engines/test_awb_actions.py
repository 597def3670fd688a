"""``data`` of the awb engine: frames that a seed decides, every fault of a data set, its lights drawn."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from imgtool import plots
from imgtool.engine import Watch
from imgtool.engines.awb import actions, reading, sets, synthesis
from imgtool.engines.awb.settings import ACTIONS, Check, Stats, Synth
from imgtool.errors import FAILED, USAGE, ImgtoolError

Array = npt.NDArray[Any]
Row = dict[str, Any]

CURVE = [2800.0, 0.9, 0.35, 4000.0, 0.65, 0.5, 7500.0, 0.4, 0.75]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put(path: Path, pixels: Array) -> Path:
    """Write RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.ascontiguousarray(pixels[..., ::-1]))
    return path


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(synthesis.Relit.frame, "__defaults__", (108, 162))
    for number, grey in enumerate((90, 140, 190)):
        put(Path("photos", f"card{number}.png"), np.full((90, 135, 3), grey, np.uint8))
    return Path("photos")


def synth(count: int = 2, out: str = "out", **values: Any) -> Row:
    chosen = {"photos": (Path("photos"),)} | values
    return dict(actions.synth(Synth(out=Path(out), count=count, **chosen), Watch()))


def check(folder: str = "out") -> Row:
    return dict(actions.check(Check(folder=Path(folder)), Watch()))


def content(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def table(folder: str = "out") -> list[dict[str, str]]:
    return list(csv.DictReader(Path(folder, "gt.csv").read_text().splitlines()))


def made(
    whites: Sequence[tuple[float, float]], folder: str = "set", cameras: Sequence[str] = ("own",)
) -> list[Path]:
    """Write frames of grey cards in lights of these whites, in turn by cameras that share one curve."""
    lines = ["image,mean_r,mean_g,mean_b,camera"]
    paths = []
    for number, (r, b) in enumerate(whites):
        level = (9000 + 10 * number) / max(r, b, 1)
        path = put(
            Path(folder, f"{number:03d}.png"),
            np.full((40, 60, 3), np.array([r, 1, b]) * level + 1024, np.uint16),
        )
        lines.append(f"{path.name},{r},1,{b},{cameras[number % len(cameras)]}")
        paths.append(path)
    Path(folder, "gt.csv").write_text("\n".join(lines) + "\n")
    Path(folder, "levels.json").write_text('{"black": 1024, "white": 16383}')
    told = {name: {"ct_curve": CURVE} for name in cameras}
    Path(folder, "cameras.json").write_text(json.dumps(told))
    return paths


def degrees(one: Array, two: Array) -> float:
    """Return the angle between two colours, by the cosine."""
    cosine = one @ two / np.sqrt((one @ one) * (two @ two))
    return float(np.degrees(np.arccos(min(cosine, 1.0))))


def test_every_action_of_the_settings_is_there() -> None:
    assert set(actions.ACTIONS) == set(ACTIONS)


# --- synth ---


def test_what_synth_writes_is_a_data_set_without_faults(cards: Path) -> None:
    record = synth(4)
    assert (record["frames"], record["new"], record["faults"]) == (4, 4, [])
    entries = sets.dataset(Path("out"), Check(folder=Path("out")))
    assert [entry.path.name for entry in entries] == [f"{number:05d}.png" for number in range(4)]
    seen = 0
    for entry, row in zip(entries, table(), strict=True):
        stats = entry.read()
        assert stats.truth is not None
        assert stats.camera.known
        assert stats.camera.name == row["camera"]
        assert stats.group == Path(row["source"]).stem == row["group"]
        own = [float(row[f"mean_{channel}"]) for channel in "rgb"]
        assert sum(own) == pytest.approx(1, abs=1e-5)
        assert stats.truth == pytest.approx((own[0] / own[1], own[2] / own[1]))
        if float(row["mixed"]) == 0:
            seen += 1
            assert degrees(stats.points().mean(0).astype(float), np.array(own)) < 0.5
    assert seen > 1
    found = check()
    assert (found["frames"], found["usable"], found["faults"]) == (4, 4, [])
    preview = cv2.imread("out/preview.png")
    assert preview is not None
    assert preview.shape[0] > 100


@pytest.mark.slow
def test_the_same_seed_writes_the_same_files_and_a_greater_count_goes_on(cards: Path) -> None:
    synth(2, "whole", seed=5)
    synth(1, "grown", seed=5)
    first = content("grown")["00000.png"]
    assert synth(2, "grown", seed=5)["new"] == 1
    assert content("grown") == content("whole")
    assert content("grown")["00000.png"] == first
    synth(1, "other", seed=6)
    assert content("other")["00000.png"] != first


def test_a_call_that_was_killed_is_taken_up(cards: Path) -> None:
    synth(2)
    whole = content("out")
    text = Path("out/gt.csv").read_text()
    Path("out/gt.csv").write_text("".join(text.splitlines(keepends=True)[:2]) + "00001.png,0.3")
    for name in ("cameras.json", "preview.png"):
        Path("out", name).unlink()
    assert synth(2)["new"] == 1
    assert content("out") == whole


def test_synth_overwrites_nothing(cards: Path) -> None:
    synth(1)
    before = content("out")
    with pytest.raises(ImgtoolError, match="already holds these frames"):
        synth(1)
    with pytest.raises(ImgtoolError, match="already holds other files"):
        synth(2, seed=1)
    assert content("out") == before
    put(Path("mine/00000.png"), np.zeros((4, 4, 3), np.uint16))
    with pytest.raises(ImgtoolError, match="already holds other files") as fault:
        synth(1, "mine")
    assert fault.value.code == FAILED
    assert len(content("mine")) == 1


def test_photos_that_cannot_be_read_are_faults_and_none_at_all_a_wrong_call(cards: Path) -> None:
    for number in range(3):
        Path("photos", f"card{number}.png").write_bytes(b"no picture")
    ramp = np.linspace(20, 220, 135)[None, :, None]
    put(Path("photos/good.png"), np.broadcast_to(ramp, (90, 135, 3)).astype(np.uint8))
    record = synth(4)
    assert record["frames"] == 1
    assert len(record["faults"]) == 3
    Path("none").mkdir()
    with pytest.raises(ImgtoolError, match="no photographs") as fault:
        synth(1, "fresh", photos=(Path("none"),))
    assert fault.value.code == USAGE
    assert not Path("fresh").exists()


# --- check ---


def faults_of(record: Mapping[str, Any], name: str) -> list[str]:
    return [fault for fault in record["faults"] if name in fault]


def test_check_finds_every_fault_of_a_data_set() -> None:
    whites = [(0.65, 0.5)] * 10
    whites[5] = (9.0, 0.5)
    whites[6] = (0.35, 0.25)
    paths = made(whites)
    paths[0].write_bytes(paths[0].read_bytes()[:60])
    paths[1].unlink()
    put(Path("set/extra.png"), np.full((40, 60, 3), 5000, np.uint16))
    paths[2].write_bytes(paths[3].read_bytes())
    put(paths[4], np.full((40, 60, 3), 16383, np.uint16))
    put(paths[7], np.full((40, 60, 3), 0, np.uint16))
    record = check("set")
    assert faults_of(record, "000.png")
    assert "no frame" in faults_of(record, "001.png")[0]
    assert "no row" in faults_of(record, "extra.png")[0]
    assert "same picture" in faults_of(record, "003.png")[0]
    assert "no usable cell" in faults_of(record, "004.png")[0]
    assert "no sensor" in faults_of(record, "005.png")[0]
    assert "off the curve of own" in faults_of(record, "006.png")[0]
    assert "no usable cell" in faults_of(record, "007.png")[0]
    assert len(record["faults"]) == 8
    assert record["usable"] == 3  # 002, 008 and 009
    assert record["cameras"] == {"own": 8}


def test_check_counts_cameras_and_groups() -> None:
    made([(0.65, 0.5), (0.6, 0.55), (0.7, 0.47)], cameras=("one", "two"))
    record = check("set")
    assert record["faults"] == []
    assert record["cameras"] == {"one": 2, "two": 1}
    assert sum(record["groups"].values()) == 3


def test_a_folder_that_is_no_data_set_is_refused() -> None:
    Path("empty").mkdir()
    for run in (check, stats):
        with pytest.raises(ImgtoolError) as fault:
            run("empty")
        assert fault.value.code == USAGE


# --- stats ---


def on_curve(count: int) -> list[tuple[float, float]]:
    curve = np.reshape(CURVE, (3, 3))
    ct = np.linspace(2900, 7400, count)
    r, b = (np.interp(ct, curve[:, 0], curve[:, column]) for column in (1, 2))
    return list(zip(r.round(6).tolist(), b.round(6).tolist(), strict=True))


def stats(folder: str = "set", out: str | None = None) -> Row:
    return dict(actions.stats(Stats(folder=Path(folder), out=Path(out) if out else None), Watch()))


def test_stats_draws_the_lights_writes_their_curve_and_finds_the_floors() -> None:
    whites = on_curve(30)
    made(whites)
    record = stats(out="drawn")
    assert record["frames"] == 30
    assert record["cameras"] == {"own": 30}
    for name in ("gains.png", "gains-histogram.png", "ct.png", "ct_curve.png"):
        picture = cv2.imread(f"drawn/{name}")
        assert picture is not None
        assert picture.std() > 5
    curve = np.reshape(json.loads(Path("drawn/ct_curve.json").read_text())["ct_curve"], (-1, 3))
    assert np.all(np.diff(curve[:, 0]) > 0)
    told = np.reshape(CURVE, (3, 3))
    for ct, r, b in curve:
        assert r == pytest.approx(np.interp(ct, told[:, 0], told[:, 1]), abs=0.02)
        assert b == pytest.approx(np.interp(ct, told[:, 0], told[:, 2]), abs=0.02)
    assert record["red_gain"]["50"] == pytest.approx(np.median(1 / np.array(whites)[:, 0]), rel=1e-4)
    assert record["blue_gain"]["50"] == pytest.approx(np.median(1 / np.array(whites)[:, 1]), rel=1e-4)

    assert_floors(record, whites)
    assert record["tunings"] == ["drawn/tunings/own.json"]
    locus = reading.load_tuning(Path("drawn/tunings/own.json")).locus
    for ct, r, b in curve:
        assert locus.at(ct) == pytest.approx([r, b], abs=2e-4)


def assert_floors(record: Row, whites: Sequence[tuple[float, float]]) -> None:
    """Compare the floors with the errors of the mean direction, and with what a cubic may be off."""
    colours = [np.array([r, 1, b]) for r, b in whites]
    mean = np.mean([colour / np.sqrt(colour @ colour) for colour in colours], axis=0)
    errors = [degrees(mean, colour) for colour in colours]
    assert record["constant"]["mean"] == pytest.approx(np.mean(errors), rel=1e-3)
    assert record["constant"]["max"] == pytest.approx(np.max(errors), rel=1e-3)
    assert record["on_curve"]["max"] < 1.5
    assert record["on_curve"]["mean"] < 0.5 < record["constant"]["mean"]


def test_cameras_are_told_apart_and_few_frames_get_no_curve_and_broken_ones_are_faults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("scatter", "histogram"):  # seen in the test above
        monkeypatch.setattr(plots, name, lambda *given, **named: None)
    paths = made([*on_curve(22), *on_curve(22), (0.65, 0.5), (0.6, 0.55)], cameras=("one", "two"))
    paths[0].write_bytes(paths[0].read_bytes()[:60])
    text = Path("set/gt.csv").read_text().splitlines()
    text[-1] = text[-1].replace("two", "rare")
    Path("set/gt.csv").write_text("\n".join(text))
    record = stats()
    assert record["cameras"] == {"one": 22, "rare": 1, "two": 22}
    assert len(record["faults"]) == 1
    assert set(json.loads(Path("set/stats/ct_curve.json").read_text())) == {"one", "two"}
    assert {path.name for path in Path("set/stats/tunings").iterdir()} == {"one.json", "two.json"}
    assert stats() == record  # what was written there is no part of the data set
    with pytest.raises(ImgtoolError, match="holds the frames"):
        stats(out="set")


def test_a_data_set_without_one_whole_frame_has_no_stats() -> None:
    for path in made(on_curve(3)):
        path.write_bytes(b"")
    with pytest.raises(ImgtoolError, match="no frame"):
        stats()
