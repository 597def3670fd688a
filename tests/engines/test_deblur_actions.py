"""``imgtool data ... deblur``: pairs that a seed decides, calls that go on, every fault found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from imgtool import cli, images
from imgtool.engines.deblur import actions
from imgtool.images import Photo

Run = Callable[..., SimpleNamespace]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


@pytest.fixture
def data(capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs ``imgtool data ACTION deblur --json`` and tells how it ended."""

    def call(action: str, *words: str, json_lines: bool = True) -> SimpleNamespace:
        capfd.readouterr()
        code = cli.run(["data", action, "deblur", *words, *["--json"] * json_lines])
        out, err = capfd.readouterr()
        record = json.loads(out) if json_lines else {}
        return SimpleNamespace(code=code, out=out, err=err, record=record)

    return call


def picture(height: int, width: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Blocks of random colours: edges everywhere."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.kron(blocks, np.ones((8, 8, 1), np.uint8))[:height, :width]


def put(name: str, height: int = 150, width: int = 170, seed: int = 0) -> Path:
    path = Path(name)
    images.write(path, Photo(picture(height, width, seed)))
    return path


def photos(count: int = 3) -> None:
    for number in range(count):
        put(f"photos/{number}.png", seed=number)


def content(folder: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def rows(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


SYNTH = ("photos", "--crop", "48", "--count", "7", "--untouched", "0.4")


# --- synth -----------------------------------------------------------------------------------


def test_synth_writes_pairs_a_list_and_a_preview(data: Run) -> None:
    photos()
    done = data("synth", *SYNTH, "-o", "out")
    assert done.code == 0
    assert done.record == {
        "folder": "out",
        "pairs": 7,
        "new": 7,
        "faults": [],
        "photos": 3,
        "kinds": done.record["kinds"],
    }
    assert sum(done.record["kinds"].values()) == 7
    names = [f"{number:06d}.png" for number in range(7)]
    assert set(content("out")) == {"samples.jsonl", "preview.png"} | {
        f"{part}/{name}" for part in ("blur", "sharp") for name in names
    }
    listed = rows("out")
    assert [row["name"] for row in listed] == names
    assert {row["photo"] for row in listed[:3]} == {"0.png", "1.png", "2.png"}  # each once, then again
    for row in listed:
        blurred, sharp = (images.read(Path("out", part, row["name"])).pixels for part in ("blur", "sharp"))
        assert blurred.shape == sharp.shape == (48, 48, 3)
        assert np.array_equal(blurred, sharp) == (row["kind"] == "none")
    assert images.read(Path("out/preview.png")).pixels.shape[0] > 7 * 48


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(data: Run) -> None:
    photos()
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert data("synth", *SYNTH, "--seed", seed, "-o", name).code == 0
    assert content("a") == content("b")
    assert content("a")["blur/000000.png"] != content("c")["blur/000000.png"]


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_call_goes_on(data: Run, monkeypatch: pytest.MonkeyPatch, torn: bool) -> None:
    photos()
    data("synth", *SYNTH, "-o", "whole")
    write, calls = images.write, []

    def interrupted(path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 8:  # between the halves of the fourth pair
            raise KeyboardInterrupt
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(actions.images, "write", interrupted)
        assert cli.run(["data", "synth", "deblur", *SYNTH, "-o", "out"]) == 130
    assert len(rows("out")) == 3
    if torn:  # as a process that is killed leaves it
        with Path("out/samples.jsonl").open("a") as file:
            file.write('{"name": "000003.png", "pho')
    before = Path("out/blur/000000.png").stat().st_mtime_ns
    done = data("synth", *SYNTH, "-o", "out")
    assert done.code == 0
    assert (done.record["pairs"], done.record["new"]) == (7, 4)
    assert Path("out/blur/000000.png").stat().st_mtime_ns == before
    assert content("out") == content("whole")


def test_a_greater_count_goes_on(data: Run) -> None:
    photos()
    data("synth", *SYNTH, "-o", "whole")
    assert data("synth", *SYNTH, "--count", "3", "-o", "out").record["pairs"] == 3
    assert data("synth", *SYNTH, "-o", "out").record["new"] == 4
    assert content("out") == content("whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "already holds these pairs"),
        (["--seed", "1"], "already holds other pairs"),
        (["--crop", "64"], "already holds other pairs"),
        (["--untouched", "0.5"], "already holds other pairs"),
        (["--count", "3"], "already holds other pairs"),
    ],
)
def test_pairs_that_are_there_are_not_touched(data: Run, change: list[str], message: str) -> None:
    photos()
    data("synth", *SYNTH, "-o", "out")
    before = content("out")
    done = data("synth", *SYNTH, *change, "-o", "out")
    assert done.code == 1
    assert message in done.record["error"]
    assert done.record["hint"]
    assert content("out") == before


def test_other_photos_do_not_go_on(data: Run) -> None:
    photos()
    data("synth", *SYNTH, "--count", "3", "-o", "out")
    put("photos/00-first.png")
    assert "other pairs" in data("synth", *SYNTH, "-o", "out").record["error"]


@pytest.mark.parametrize("name", ["out/blur/mine.png", "out/sharp/mine.png"])
def test_a_folder_with_somebody_elses_pairs_is_not_touched(data: Run, name: str) -> None:
    photos()
    put(name)
    done = data("synth", *SYNTH, "-o", "out")
    assert (done.code, list(content("out"))) == (1, [name.removeprefix("out/")])


@pytest.mark.parametrize("text", ['{"id": 3}\n', "[1, 2]\n{}\n", '{"name": "x.png"}\n'])
def test_somebody_elses_list_is_not_touched(data: Run, text: str) -> None:
    photos()
    put("out/blur/mine.png")
    Path("out/samples.jsonl").write_text(text)
    before = content("out")
    done = data("synth", *SYNTH, "-o", "out")
    assert done.code == 1
    assert "other pairs" in done.record["error"]
    assert content("out") == before


def test_a_broken_photo_is_a_fault_and_the_others_are_used(data: Run) -> None:
    photos(2)
    whole = put("photos/broken.png").read_bytes()
    Path("photos/broken.png").write_bytes(whole[: len(whole) // 2])
    done = data("synth", *SYNTH, "-o", "out")
    assert done.code == 1
    assert len(done.record["faults"]) == 1
    assert "photos/broken.png is truncated or corrupt" in done.record["faults"][0]
    assert done.record["pairs"] == len(rows("out")) < 7
    Path("photos/broken.png").write_bytes(whole)  # mended: the missing pairs come
    done = data("synth", *SYNTH, "-o", "out")
    assert (done.code, done.record["pairs"]) == (0, 7)
    assert [row["number"] for row in rows("out")] == list(range(7))


def test_nothing_but_broken_photos(data: Run) -> None:
    Path("photos").mkdir()
    Path("photos/a.jpg").write_bytes(b"\xff\xd8")
    done = data("synth", *SYNTH, "-o", "out")
    assert (done.code, done.record["pairs"], len(done.record["faults"])) == (1, 0, 1)
    assert not Path("out/preview.png").exists()


def test_photos_smaller_than_the_crop(data: Run) -> None:
    put("photos/small.png", 20, 30)
    put("photos/dot.png", 1, 1)
    done = data("synth", *SYNTH, "-o", "out")
    assert (done.code, done.record["pairs"]) == (0, 7)


@pytest.mark.parametrize("words", [["empty"], ["nowhere"]])
def test_no_photos(data: Run, words: list[str]) -> None:
    Path("empty").mkdir()
    done = data("synth", *words, "-o", "out")
    assert (done.code, Path("out").exists()) == (2, False)
    assert done.err.count("error: ") == 1


def test_a_full_disk_while_the_list_grows(data: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    photos()
    opened = Path.open

    def full(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if mode == "a":
            raise OSError(28, "No space left on device")
        return opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", full)
    done = data("synth", *SYNTH, "-o", "out")
    assert done.code == 1
    assert done.record["error"] == "cannot write out/samples.jsonl: no space left on device"


def test_what_people_read(data: Run) -> None:
    photos()
    done = data("synth", *SYNTH, "-o", "out", json_lines=False)
    assert done.code == 0
    assert "pairs: 7" in done.out
    assert "fault" not in done.out


def test_dry_run(data: Run) -> None:
    photos()
    done = data("synth", *SYNTH, "-o", "out", "-n")
    assert done.code == 0
    assert done.record["plan"]["output"] == "out"
    assert not Path("out").exists()


# --- average ---------------------------------------------------------------------------------


def frames(folder: str, count: int) -> None:
    """A square that moves by two pixels a frame."""
    for number in range(count):
        frame = np.full((40, 90, 3), 30, np.uint8)
        frame[10:30, 10 + 2 * number : 30 + 2 * number] = 220
        images.write(Path(folder, f"{number:03d}.png"), Photo(frame))


def test_average(data: Run) -> None:
    frames("frames", 20)
    done = data("average", "frames", "-o", "out", "--gamma", "1", "--longest", "9")
    assert done.code == 0
    assert done.record == {"folder": "out", "pairs": 2, "new": 2, "faults": []}
    listed = rows("out")
    assert [(row["name"], row["frames"], row["first"]) for row in listed] == [
        ("frames-000000-7.png", 7, "000.png"),
        ("frames-000007-9.png", 9, "007.png"),
    ]
    run = [images.read(Path("frames", f"{number:03d}.png")).pixels for number in range(7, 16)]
    blurred, sharp = (images.read(Path("out", part, listed[1]["name"])).pixels for part in ("blur", "sharp"))
    assert np.array_equal(sharp, run[4])
    assert np.abs(blurred - np.mean(run, axis=0)).max() <= 0.51


def test_linear_light_makes_blur_brighter(data: Run) -> None:
    frames("frames", 7)
    data("average", "frames", "-o", "linear", "--gamma", "2.2")
    data("average", "frames", "-o", "plain", "--gamma", "1")
    linear, plain = (
        images.read(Path(name, "blur/frames-000000-7.png")).pixels.astype(int) for name in ("linear", "plain")
    )
    assert (linear - plain).max() > 20
    assert (linear - plain).min() >= -1


def test_folders_of_the_same_name_do_not_mix(data: Run) -> None:
    frames("a/frames", 7)
    frames("b/frames", 7)
    done = data("average", "a/frames", "b/frames", "-o", "out")
    assert done.record["pairs"] == 2
    assert len(list(Path("out/blur").iterdir())) == 2


def test_a_run_does_not_go_from_one_folder_into_the_next(data: Run) -> None:
    frames("deep/a", 7)
    frames("deep/b", 10)
    frames("deep/c", 3)
    done = data("average", "deep", "-o", "out")
    assert [row["name"] for row in rows("out")] == ["a-000000-7.png", "b-000000-7.png"]
    assert done.code == 0


def test_average_goes_on_and_is_not_mixed(data: Run) -> None:
    frames("frames", 20)
    data("average", "frames", "-o", "whole", "--longest", "7")
    shorter = data("average", "frames", "-o", "out", "--longest", "7")
    assert shorter.record["pairs"] == 2
    path = Path("out/samples.jsonl")
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    Path("out/blur/frames-000007-7.png").unlink()
    done = data("average", "frames", "-o", "out", "--longest", "7")
    assert (done.record["new"], done.record["pairs"]) == (1, 2)
    assert content("out") == content("whole")
    assert "other pairs" in data("average", "frames", "-o", "out", "--gamma", "1").record["error"]
    assert "these pairs" in data("average", "frames", "-o", "out", "--longest", "7").record["error"]


def test_faults_of_frames(data: Run) -> None:
    frames("frames", 21)
    put("frames/008.png", 30, 30)
    Path("frames/015.png").write_bytes(b"")
    done = data("average", "frames", "-o", "out", "--longest", "7")
    assert (done.code, done.record["pairs"]) == (1, 1)
    assert len(done.record["faults"]) == 2
    assert "frames of different sizes in frames" in done.record["faults"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shortest", "9", "--longest", "7"], "--longest is less than --shortest"),
        (["--shortest", "25", "--longest", "27"], "no folder holds as many as 25 frames"),
    ],
)
def test_average_asked_wrongly(data: Run, words: list[str], message: str) -> None:
    frames("frames", 20)
    done = data("average", "frames", "-o", "out", *words)
    assert (done.code, Path("out").exists()) == (2, False)
    assert message in done.record["error"]


# --- check -----------------------------------------------------------------------------------


def test_what_synth_wrote_passes(data: Run) -> None:
    photos()
    made = data("synth", *SYNTH, "-o", "out").record
    done = data("check", "out")
    assert done.code == 0
    record = done.record
    assert (record["pairs"], record["usable"], record["faults"]) == (7, 7, [])
    assert record["identical"] == made["kinds"].get("none", 0) > 0
    assert 10 < record["blurred_psnr"] < 60


def test_every_fault_of_a_folder_of_pairs(data: Run) -> None:
    for number in range(5):
        put(f"train/G1/blur/{number}.png", seed=number)
        put(f"train/G1/sharp/{number}.png", seed=number + 1)
    put("train/G2/blur/9.png", seed=1)
    put("train/G2/sharp/9.png", seed=2)
    put("train/G1/blur/lonely.png")
    put("train/G2/sharp/alone.png")
    put("train/G1/sharp/1.png", 100, 90)
    broken = Path("train/G1/blur/2.png")
    broken.write_bytes(broken.read_bytes()[:900])
    Path("train/G1/sharp/3.png").write_bytes(b"")
    done = data("check", "train")
    assert done.code == 1
    faults = "\n".join(done.record["faults"])
    assert (done.record["pairs"], done.record["usable"]) == (6, 3)
    assert len(done.record["faults"]) == 5
    for words in (
        "train/G1/blur/lonely.png: no partner",
        "train/G2/sharp/alone.png: no partner",
        "train/G1/blur/1.png: 170x150, its partner 90x100",
        "train/G1/blur/2.png is truncated",
        "train/G1/sharp/3.png is empty",
    ):
        assert words in faults
    text = data("check", "train", json_lines=False)
    assert text.out.count("fault: ") == 5


def test_the_measured_blur_is_right(data: Run) -> None:
    images.write(Path("p/blur/a.png"), Photo(np.full((20, 20, 3), 100, np.uint8)))
    images.write(Path("p/sharp/a.png"), Photo(np.full((20, 20, 3), 110, np.uint8)))
    images.write(Path("p/blur/b.png"), Photo(np.full((20, 20, 3), 7, np.uint8)))
    images.write(Path("p/sharp/b.png"), Photo(np.full((20, 20, 3), 7, np.uint8)))
    record = data("check", "p").record
    assert record["blurred_psnr"] == pytest.approx(20 * np.log10(25.5))
    assert record["identical"] == 1


def test_a_folder_without_pairs(data: Run) -> None:
    put("plain/a.png")
    done = data("check", "plain")
    assert done.code == 1
    assert "no pairs" in done.record["faults"][-1]
    assert done.record["blurred_psnr"] is None
    assert data("check", "nowhere").code == 2


def test_the_layout_with_gt(data: Run) -> None:
    put("p/x.png", seed=1)
    put("p/x_gt.png", seed=2)
    put("p/y.png", seed=1)
    record = data("check", "p").record
    assert (record["pairs"], record["faults"]) == (1, ["p/y.png: no partner"])
