"""``imgtool data ... filter``: pairs that go on where they stopped, every fault, the list of filters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from imgtool import images
from imgtool.engine import Watch
from imgtool.engines.filter import actions, blackbox, targets
from imgtool.engines.filter.settings import Check, Synth, Targets
from imgtool.errors import ImgtoolError
from imgtool.images import Photo


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put(name: str, height: int = 40, width: int = 50, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    images.write(Path(name), Photo(pixels))
    return Path(name)


def photos(count: int = 3) -> None:
    for number in range(count):
        put(f"photos/{number}.png", 40 + number, 50, number)


def synth(**given: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"photos": ("photos",), "out": "out", "target": "median:size=3"}
    return dict(actions.synth(Synth(**(plain | given)), Watch()))


def check(folder: str = "out") -> dict[str, Any]:
    return dict(actions.check(Check(folder=folder), Watch()))


def content(folder: str = "out") -> dict[str, bytes]:
    found = Path(folder).rglob("*")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.is_file()}


# --- synth -----------------------------------------------------------------------------------


def test_synth_writes_photos_and_results_whole() -> None:
    photos()
    assert synth() == {"folder": "out", "target": "median:size=3", "pairs": 3, "new": 3, "faults": []}
    for number in range(3):
        photo = images.read_rgb8(Path(f"photos/{number}.png"))
        assert np.array_equal(images.read_rgb8(Path(f"out/input/{number:06d}.png")), photo)
        found = images.read_rgb8(Path(f"out/output/{number:06d}.png"))
        assert found.shape == photo.shape
        assert np.array_equal(found[1:-1, 1:-1], cv2.medianBlur(photo, 3)[1:-1, 1:-1])
    assert images.read_rgb8(Path("out/preview.png")).shape[0] > 3 * actions.SHOWN_EDGE / 2
    assert len(blackbox.pairs_in(Path("out"))) == 3


def test_grey_results_are_grey_files_and_those_of_whole_photos() -> None:
    photos(1)
    synth(target="sobel_3_max")
    found = images.read(Path("out/output/000000.png"))
    assert found.grey
    assert found.pixels.max() == 255  # divided by the photo's own maximum


def test_a_number_of_pairs() -> None:
    photos()
    assert synth(count=2)["pairs"] == 2
    assert synth()["new"] == 1
    with pytest.raises(ImgtoolError, match="--count 4 is more than the 3 photographs") as fault:
        synth(count=4)
    assert fault.value.code == 2


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_call_goes_on(monkeypatch: pytest.MonkeyPatch, torn: bool) -> None:
    photos()
    synth(out="whole")
    write, calls = images.write, []

    def interrupted(path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 4:  # between the halves of the second pair
            raise KeyboardInterrupt
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(actions.images, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            synth()
    if torn:  # as a process that is killed leaves it
        with Path("out/samples.jsonl").open("a") as file:
            file.write('{"name": "000001.png", "pho')
    before = Path("out/input/000000.png").stat().st_mtime_ns
    assert synth()["new"] == 2
    assert Path("out/input/000000.png").stat().st_mtime_ns == before
    assert content() == content("whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "already holds these pairs"),
        ({"target": "median:size=5"}, "already holds other pairs"),
        ({"count": 2}, "already holds other pairs"),
        ({"photos": ("other",)}, "already holds other pairs"),
    ],
)
def test_pairs_that_are_there_are_not_touched(change: dict[str, Any], message: str) -> None:
    photos()
    put("other/x.png")
    put("other/y.png")
    put("other/z.png")
    synth()
    before = content()
    with pytest.raises(ImgtoolError, match=message) as fault:
        synth(**change)
    assert (fault.value.code, bool(fault.value.hint)) == (1, True)
    assert content() == before


@pytest.mark.parametrize("name", ["out/input/mine.png", "out/output/mine.png"])
def test_somebody_elses_pairs_are_not_touched(name: str) -> None:
    photos()
    put(name)
    with pytest.raises(ImgtoolError, match="other pairs"):
        synth()
    assert list(content()) == [name.removeprefix("out/")]


def test_a_broken_photo_is_a_fault_and_the_others_are_used() -> None:
    photos(2)
    whole = put("photos/broken.png").read_bytes()
    Path("photos/broken.png").write_bytes(whole[: len(whole) // 2])
    found = synth()
    assert found["pairs"] == 2
    assert len(found["faults"]) == 1
    assert "photos/broken.png is truncated or corrupt" in found["faults"][0]
    Path("photos/broken.png").write_bytes(whole)  # mended: the missing pair comes
    assert synth()["new"] == 1
    assert not check()["faults"]


@pytest.mark.parametrize(
    "given", [{"photos": ("empty",)}, {"photos": ("nowhere",)}, {"target": "nothing"}, {"target": "pairs:x"}]
)
def test_what_cannot_be_made(given: dict[str, Any]) -> None:
    photos(1)
    Path("empty").mkdir()
    with pytest.raises(ImgtoolError) as fault:
        synth(**given)
    assert fault.value.code == 2
    assert not Path("out").exists()


# --- check -----------------------------------------------------------------------------------


def test_check_of_sound_pairs() -> None:
    photos(2)
    synth()
    put("out/input/same.png", seed=9)
    put("out/output/same.png", seed=9)
    found = check()
    errors = []
    for number in range(2):
        first, second = (images.read_rgb8(Path(f"out/{side}/{number:06d}.png")) for side in actions.SIDES)
        errors.append(-10 * np.log10(np.mean((first / 255 - second / 255) ** 2)))
    assert found.pop("psnr") == pytest.approx(np.mean(errors), abs=1e-3)
    sizes = {"50x40": 2, "50x41": 1}
    counts = {"pairs": 3, "usable": 3, "identical": 1}
    assert found == {"folder": "out", **counts, "sizes": sizes, "faults": []}


def test_check_finds_every_fault() -> None:
    photos(4)
    synth()
    Path("out/input/000000.png").unlink()
    put("out/output/000001.png", 20, 20)
    broken = Path("out/output/000002.png")
    broken.write_bytes(broken.read_bytes()[:-300])
    found = check()
    assert found["usable"] == 1
    assert len(found["faults"]) == 3
    for number, words in enumerate(("has no input", "20x20", "truncated or corrupt")):
        assert any(f"00000{number}.png" in fault and words in fault for fault in found["faults"])


def test_check_of_no_pairs() -> None:
    Path("out").mkdir()
    with pytest.raises(ImgtoolError, match="no pair in out"):
        check()


# --- targets ---------------------------------------------------------------------------------


def test_the_list_of_filters_can_be_typed() -> None:
    rows = actions.list_targets(Targets(), Watch())["targets"]
    assert isinstance(rows, list)
    assert [row["name"] for row in rows] == list(targets.KINDS)
    for row in rows:
        given = ",".join(f"{name}={value}" for name, value in row["parameters"].items())
        assert targets.parse(f"{row['name']}:{given}").spec == row["name"]
        assert row["does"].endswith(".")
        assert "`" not in row["does"]
    assert json.loads(json.dumps(rows)) == rows
