"""``data`` of the lens engine: pairs that a seed decides, calls that go on, every fault found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from imgtool import images
from imgtool.engine import Watch
from imgtool.engines.lens import actions
from imgtool.engines.lens.settings import ACTIONS, Check, Stats, Synth
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import Photo

Row = dict[str, Any]
Run = Callable[..., Row]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put(name: str, height: int = 90, width: int = 120, seed: int = 0) -> Path:
    tones = np.random.default_rng(seed).uniform(0, 255, (9, 12, 3))
    picture = np.clip(cv2.resize(tones, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255)
    images.write(Path(name), Photo(picture.astype(np.uint8)))
    return Path(name)


def synth(count: int = 5, out: str = "out", **values: Any) -> Row:
    chosen = {"photos": (Path("photos"),), "untouched": 0.3, "size": 80} | values
    return dict(actions.synth(Synth(out=Path(out), count=count, **chosen), Watch()))


def photos(count: int = 3) -> None:
    for number in range(count):
        put(f"photos/{number}.png", seed=number)


def content(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def rows(folder: str = "out") -> list[Row]:
    return [json.loads(line) for line in Path(folder, "labels.jsonl").read_text().splitlines()]


def rewrite(found: list[Row], folder: str = "out") -> None:
    Path(folder, "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def check(folder: str = "out") -> Row:
    return dict(actions.check(Check(folder=Path(folder)), Watch()))


def test_there_is_a_function_for_every_action_of_the_settings() -> None:
    assert set(actions.ACTIONS) == set(ACTIONS)


# --- synth -----------------------------------------------------------------------------------


def test_synth_writes_pairs_labels_and_a_preview() -> None:
    photos()
    done: list[int] = []
    settings = Synth(photos=(Path("photos"),), out=Path("out"), count=5, untouched=0.3, size=80)
    record = actions.synth(settings, Watch(done=lambda finished, _: done.append(finished)))
    assert (record["pairs"], record["new"], record["photos"], record["faults"]) == (5, 5, 3, [])
    assert done == [1, 2, 3, 4, 5]
    names = [f"00000{number}_{half}.jpg" for number in range(5) for half in ("generated", "original")]
    assert sorted(content("out")) == sorted([*names, "labels.jsonl", "preview.png"])
    for row in rows():
        picture = images.read_rgb8(Path("out", row["file"]))
        assert picture.shape == (row["height"], row["width"], 3)
        assert max(picture.shape) <= 80
        assert row["source"] in ("0.png", "1.png", "2.png")
        assert all(isinstance(row[name], float) for name in ("k1", "k2", "p1", "p2"))
    untouched = sum(not row["k1"] for row in rows())
    assert record["untouched"] == untouched
    assert {row["source"] for row in rows()[:3]} == {"0.png", "1.png", "2.png"}
    assert cv2.imread("out/preview.png").shape[0] > 400


def test_the_label_is_what_leads_from_one_half_to_the_other() -> None:
    photos()
    synth(untouched=0.0, noisy=0.0, prior="wide")
    for row in rows():
        distorted, straight = (
            images.read_rgb8(Path("out", row["file"].replace("original", half)))
            for half in ("original", "generated")
        )
        width, height = row["width"], row["height"]
        unit = np.hypot(width, height) / 2
        matrix = np.array([[unit, 0, (width - 1) / 2], [0, unit, (height - 1) / 2], [0, 0, 1]])
        again = cv2.undistort(distorted, matrix, np.array([row[name] for name in ("k1", "k2", "p1", "p2")]))
        inner = (slice(height // 6, -height // 6), slice(width // 6, -width // 6))
        after, before = (
            np.square(each[inner].astype(float) - straight[inner]).mean() for each in (again, distorted)
        )
        assert after < 12
        assert after <= before + 1


def test_the_seed_decides_and_a_greater_count_goes_on() -> None:
    photos()
    synth(3)
    synth(3, "again")
    assert content("out") == content("again")
    synth(1, "other", seed=1)
    assert rows("other")[0]["k1"] != rows()[0]["k1"] or rows("other")[0]["source"] != rows()[0]["source"]
    record = synth(5)
    assert (record["pairs"], record["new"]) == (5, 2)
    synth(5, "whole")
    assert content("out") == content("whole")


@pytest.mark.slow
def test_an_interrupted_call_goes_on() -> None:
    photos()
    synth(out="whole")
    synth()
    rewrite([rows()[3], rows()[0]])
    Path("out/000000_generated.jpg").unlink()
    torn = Path("out/labels.jsonl").read_text() + '{"file": "00'
    Path("out/labels.jsonl").write_text(torn)
    untouched = Path("out/000003_original.jpg").stat().st_mtime_ns
    record = synth()
    assert (record["pairs"], record["new"]) == (5, 4)
    assert content("out") == content("whole")
    assert Path("out/000003_original.jpg").stat().st_mtime_ns == untouched


@pytest.mark.parametrize("values", [{"seed": 1}, {"prior": "photo"}, {"noisy": 0.1}, {"size": 90}])
def test_pairs_of_another_call_are_not_mixed(values: Row) -> None:
    photos()
    synth(2)
    before = content("out")
    with pytest.raises(ImgtoolError, match="other pairs"):
        synth(4, **values)
    assert content("out") == before


def test_what_is_there_already_is_told() -> None:
    photos()
    synth(2)
    with pytest.raises(ImgtoolError, match="already holds these pairs"):
        synth(2)
    put("strange/1_original.png")
    with pytest.raises(ImgtoolError, match="other pairs"):
        synth(out="strange")


def test_an_unreadable_photo_is_left_out_and_told() -> None:
    photos(2)
    Path("photos/broken.png").write_bytes(b"no picture")
    put("photos/tiny.png", 20, 20)
    record = synth(8)
    assert (record["pairs"], record["new"]) == (4, 4)
    assert len(record["faults"]) == 2
    assert any("broken.png" in fault for fault in record["faults"])
    assert any("tiny.png is only 20x20" in fault for fault in record["faults"])


def test_no_photographs() -> None:
    Path("photos").mkdir()
    with pytest.raises(ImgtoolError, match="no photographs") as caught:
        synth()
    assert caught.value.code == USAGE


# --- check -----------------------------------------------------------------------------------


def test_what_synth_wrote_passes() -> None:
    photos()
    synth()
    assert check() == {"folder": "out", "pairs": 5, "usable": 5, "labels": 5, "faults": []}


def test_every_fault_of_a_folder_of_pairs() -> None:
    photos()
    synth(8)
    Path("out/000000_generated.jpg").unlink()
    put("out/lonely_generated.png")
    Path("out/000001_original.jpg").write_bytes(b"")
    put("out/000002_generated.jpg", 40, 50)
    found = rows()
    found[3]["k1"] = None
    del found[4]["p2"]
    found[5] |= {"k1": -0.9, "k2": 0.0}
    found[6]["k2"] = float("inf")
    found[7]["file"] = "gone_original.jpg"
    rewrite(found)
    record = check()
    faults = sorted(fault.removeprefix("out/") for fault in record["faults"])
    assert (record["pairs"], record["usable"], record["labels"]) == (7, 5, 8)
    assert [fault.split(":")[0] for fault in faults if "empty" not in fault] == [
        "000000_original.jpg", "000002_original.jpg", "000003_original.jpg", "000004_original.jpg",
        "000005_original.jpg", "000006_original.jpg", "000007_original.jpg", "gone_original.jpg",
        "lonely_generated.png",
    ]  # fmt: skip
    text = "\n".join(faults)
    for words in (
        "000000_original.jpg: no partner",
        "its partner 50x40",
        "000003_original.jpg: no finite k1, k2, p1, p2",
        "000004_original.jpg: no finite",
        "000005_original.jpg: the model folds",
        "000006_original.jpg: no finite",
        "000007_original.jpg: no label",
        "gone_original.jpg: a label, but no such file",
        "lonely_generated.png: no partner",
    ):
        assert words in text
    assert len(faults) == 10


def test_pairs_without_any_label_are_whole() -> None:
    put("p/a_original.jpg")
    put("p/a_generated.jpg")
    assert check("p") == {"folder": "p", "pairs": 1, "usable": 1, "labels": 0, "faults": []}


def test_labels_of_single_photos_are_checked_too() -> None:
    put("p/board.jpg")
    rewrite([{"file": "board.jpg", "k1": -0.1, "k2": 0.0, "p1": 0.0, "p2": 0.0}], "p")
    assert check("p") == {"folder": "p", "pairs": 0, "usable": 0, "labels": 1, "faults": []}


def test_a_folder_without_pairs() -> None:
    put("plain/a.jpg")
    assert "no pairs" in check("plain")["faults"][0]
    with pytest.raises(ImgtoolError, match="no such folder"):
        check("nowhere")


# --- stats -----------------------------------------------------------------------------------


def stats(folder: str, **values: Any) -> Row:
    return dict(actions.stats(Stats(folder=Path(folder), **values), Watch()))


def test_the_percentiles_of_labels() -> None:
    Path("labelled").mkdir()
    found = [{"file": f"{n}.jpg", "k1": n / 100, "k2": -n / 200, "p1": 0.0, "p2": 0.001} for n in range(101)]
    rewrite(found, "labelled")
    record = stats("labelled")
    assert (record["count"], record["untouched"], record["faults"]) == (101, 0, [])
    assert record["percentiles"]["k1"]["25"] == pytest.approx(0.25)
    assert record["percentiles"]["k2"]["95"] == pytest.approx(-0.025)
    assert record["percentiles"]["corner"]["50"] == pytest.approx(50 * 0.25)
    assert record["correlation"] == pytest.approx(-1)
    assert sorted(path.name for path in Path("labelled/stats").iterdir()) == [
        "corner.png", "k1.png", "k2.png", "p1.png", "p2.png",
    ]  # fmt: skip
    assert all(cv2.imread(path) is not None for path in record["plots"])


@pytest.mark.slow
def test_the_percentiles_of_a_table() -> None:
    Path("made").mkdir()
    lines = [
        "file,width,height,k1,k2,p1,p2,k3",
        "a.jpg,9,9,0.1,0.02,0,0,-0.01",
        "b.jpg,9,9,0,0,0,0,",
        "c.jpg,9,9,,0,0,0,",
    ]
    Path("made/coefficients.csv").write_text("\n".join(lines))
    for given in ("made", "made/coefficients.csv"):
        record = stats(given, out=Path("plots"))
        assert (record["count"], record["untouched"]) == (3, 1)
        assert record["percentiles"]["corner"]["50"] == pytest.approx(50 * 0.11 / 2)
        assert record["faults"] == ["c.jpg: no finite k1, k2, p1, p2"]
    assert Path("plots/k1.png").exists()
    assert not Path("made/stats").exists()


def test_nothing_to_draw() -> None:
    Path("empty").mkdir()
    with pytest.raises(ImgtoolError, match=r"no labels.jsonl or coefficients.csv") as caught:
        stats("empty")
    assert caught.value.code == USAGE
