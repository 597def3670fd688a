"""``imgtool data ... isp``: what RAW files hold, pairs that a seed decides, LibRaw's renderings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import dng as fixtures
import numpy as np
import numpy.typing as npt
import pytest
import rawpy
import tifffile

from imgtool import cli, dng, images
from imgtool.engines.isp import actions, layouts, unprocess
from imgtool.images import Photo
from imgtool.mosaic import PATTERNS, Mosaic

Run = Callable[..., SimpleNamespace]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


@pytest.fixture
def data(capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs ``imgtool data ...`` and tells how it ended."""

    def call(*words: str, json_lines: bool = True) -> SimpleNamespace:
        capfd.readouterr()
        code = cli.run(["data", *words, *["--json"] * json_lines])
        out, err = capfd.readouterr()
        record = json.loads(out) if json_lines else {}
        return SimpleNamespace(code=code, out=out, err=err, record=record)

    return call


def content(folder: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def rows(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def libraw(path: str, demosaic: str) -> npt.NDArray[np.uint16]:
    with rawpy.imread(path) as frame:
        pixels: npt.NDArray[np.uint16] = frame.postprocess(
            use_camera_wb=True, no_auto_bright=True, adjust_maximum_thr=0.0, gamma=(2.4, 12.92),
            output_color=rawpy.ColorSpace.sRGB, output_bps=16, user_flip=0,
            demosaic_algorithm=rawpy.DemosaicAlgorithm[demosaic],
        )  # fmt: skip
    return pixels


# --- inspect ---------------------------------------------------------------------------------


def known(path: str = "a.dng", **facts: Any) -> Path:
    """A GRBG frame of 48 x 64: half of its red pixels at white, green from 1000 to 1479, blue at 500."""
    values = np.full((48, 64), 500, np.uint16)
    ramp = 1000 + 10 * np.arange(48, dtype=np.uint16)[:, None]
    values[::2, ::2], values[1::2, 1::2] = ramp[::2], ramp[1::2]
    values[::2, 1::2] = 700
    values[:24:2, 1::2] = 4000
    told: dict[str, Any] = {
        "pattern": "GRBG",
        "black": (64.0, 66.0, 68.0, 65.0),
        "white": 4000.0,
        "gains": (2.0, 1.0, 1.6),
        "xyz_to_camera": np.reshape(fixtures.SRGB_CAMERA, (3, 3)),
        "noise": (1.5e-3, 2.5e-6),
        "camera": "Maker Model 7",
        "flip": 6,
        "exif": {"iso": 800, "exposure": 0.02},
    }
    dng.write(Path(path), Mosaic(values, **told | facts))
    return Path(path)


def test_inspect_says_what_a_file_holds(data: Run) -> None:
    known()
    done = data("inspect", "a.dng")
    assert done.code == 0
    assert (done.record["inputs"], done.record["readable"], done.record["faults"]) == (1, 1, [])
    (entry,) = done.record["files"]
    same = ("input", "camera", "width", "height", "flip", "pattern", "white", "bits")
    assert [entry[name] for name in same] == ["a.dng", "Maker Model 7", 64, 48, 6, "GRBG", 4000, 12]
    assert entry["black"] == [64, 66, 68, 65]
    assert entry["gains"] == pytest.approx([2, 1, 1.6], rel=1e-5)
    assert len(entry["daylight"]) == 3
    np.testing.assert_allclose(entry["matrix"], np.eye(3), atol=2e-3)
    assert entry["matrix_source"] == "file"
    assert entry["noise"] == {"shot": pytest.approx(1.5e-3), "read": pytest.approx(2.5e-6), "source": "file"}
    assert (entry["exif"]["iso"], entry["exif"]["exposure"]) == (800, pytest.approx(0.02))
    assert entry["percentiles"] == {
        "1": [700, 1000, 500],
        "50": [700, 1230, 500],
        "99": [4000, 1470, 500],
        "99.9": [4000, 1470, 500],
    }
    assert entry["saturated"] == [0.5, 0, 0]


def test_inspect_measures_noise_that_no_file_tells(data: Run) -> None:
    rng = np.random.default_rng(0)
    signal = np.broadcast_to(np.linspace(0.05, 0.6, 320), (256, 320))
    noisy = signal + np.sqrt(4e-3 * signal + 2e-5) * rng.standard_normal(signal.shape)
    values = np.clip(np.rint(64 + noisy * (4095 - 64)), 0, 4095).astype(np.uint16)
    fixtures.write(Path("a.dng"), values)
    told = data("inspect", "a.dng").record["files"][0]["noise"]
    assert told["source"] == "measured"
    assert told["shot"] == pytest.approx(4e-3, rel=0.3)


def test_inspect_goes_on_after_a_file_that_it_cannot_read(data: Run) -> None:
    known("in/b.dng")
    Path("in/a.dng").write_text("no raw file at all " * 90)
    done = data("inspect", "in")
    assert done.code == 1
    assert (done.record["inputs"], done.record["readable"]) == (2, 1)
    broken, whole = done.record["files"]
    assert set(broken) == {"input", "error", "hint"}
    assert broken["input"] == "in/a.dng"
    assert done.record["faults"] == [broken["error"]]
    assert whole["camera"] == "Maker Model 7"
    told = data("inspect", "in", json_lines=False)
    assert told.code == 1
    lines = told.out.splitlines()
    assert {"inputs: 2", "  in/b.dng:", "    pattern: GRBG", "    black: 64, 66, 68, 65"} <= set(lines)
    assert f"fault: {broken['error']}" in lines


def test_inspect_takes_the_levels_of_a_bare_mosaic_from_the_flags(data: Run) -> None:
    cv2.imwrite("a.png", np.full((30, 40), 900, np.uint16))
    done = data("inspect", "a.png", "--pattern", "BGGR", "--bits", "10", "--black", "58,60,61,62")
    (entry,) = done.record["files"]
    assert (entry["pattern"], entry["black"], entry["white"]) == ("BGGR", [58, 60, 61, 62], 1023)
    assert (entry["width"], entry["height"], entry["gains"], entry["matrix"]) == (40, 30, None, None)


def test_inspect_of_no_file_is_asked_wrongly(data: Run) -> None:
    for words in (["nowhere.dng"], ["-"]):
        assert data("inspect", *words).code == 2


# --- synth -----------------------------------------------------------------------------------


def photo(name: str, seed: int = 0, height: int = 72, width: int = 96) -> Path:
    """Soft tones, in which any demosaicing finds every colour."""
    tones = np.random.default_rng(seed).uniform(30, 220, (3, 4, 3))
    picture = np.clip(cv2.resize(tones, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255)
    images.write(Path(name), Photo(picture.astype(np.uint8)))
    return Path(name)


def psnr(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    return float(-10 * np.log10(np.mean((one.astype(float) - other) ** 2) / 255**2))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_libraw_renders_a_frame_without_noise_as_its_truth(data: Run, pattern: str) -> None:
    photo("photos/a.png")
    done = data("synth", "isp", "photos", "-o", "out", "--shot", "0", "--pattern", pattern)
    assert done.code == 0
    assert done.record == {"folder": "out", "pairs": 1, "new": 1, "photos": 1, "faults": []}
    truth = images.read(Path("out/rgb/a-shot0.png")).pixels
    assert truth.dtype == np.uint8
    with rawpy.imread("out/raw/a-shot0.dng") as frame:
        colours = frame.raw_colors_visible[:2, :2].ravel()
        assert "".join(frame.color_desc.decode()[index] for index in colours) == pattern
        assert frame.raw_image_visible.shape == truth.shape[:2]
    rendered = libraw("out/raw/a-shot0.dng", "DHT") / 257
    inside = np.s_[4:-4, 4:-4]
    assert psnr(rendered[inside], truth[inside]) > 36


def test_the_preview_shows_the_frame_in_the_colours_of_its_truth(
    data: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, npt.NDArray[Any]] = {}
    monkeypatch.setattr(actions.sheets, "sheet", lambda columns, *_, **__: shown.update(columns))
    photo("photos/a.png", 1)
    photo("photos/b.png", 2, 60, 70)
    data("synth", "isp", "photos", "-o", "out", "--shot", "0", "--pattern", "GBRG")
    assert shown["mosaic"].shape == shown["truth"].shape == (2, 58, 58, 3)
    assert np.abs(shown["mosaic"].astype(int) - shown["truth"]).mean() < 6


def test_synth_writes_every_photo_at_every_level(data: Run) -> None:
    photo("photos/a.png", 1)
    photo("photos/deep/a.png", 2, 60, 70)
    Path("photos/broken.jpg").write_text("no photo")
    camera = "Canon EOS 20D"
    done = data(
        *("synth", "isp", "photos", "-o", "out", "--shot", "1e-3,1e-2", "--bits", "14", "--camera", camera)
    )
    assert done.code == 1
    assert (done.record["pairs"], done.record["new"], done.record["photos"]) == (4, 4, 3)
    assert len(done.record["faults"]) == 1
    assert "broken.jpg" in done.record["faults"][0]
    names = ["a-2-shot0.001", "a-2-shot0.01", "a-shot0.001", "a-shot0.01"]
    files = {f"raw/{name}.dng" for name in names} | {f"rgb/{name}.png" for name in names}
    assert set(content("out")) == files | {"samples.jsonl", "preview.png"}
    listed = rows("out")
    assert [row["name"] for row in listed] == names
    for row, shot in zip(listed, [1e-3, 1e-2] * 2, strict=True):
        with tifffile.TiffFile(f"out/raw/{row['name']}.dng") as file:
            tags = {tag.code: tag.value for tag in file.pages[0].tags.values()}
        white = 2**14 - 1
        read = unprocess.typical_read(shot) + 1 / (12 * (white - row["black"]) ** 2)
        assert tags[51041] == pytest.approx([shot, read] * 3)
        assert (row["shot"], row["bits"], tags[50717]) == (shot, 14, white)
        neutral = np.divide(*np.reshape(tags[50728], (-1, 2)).T)
        np.testing.assert_allclose(neutral, 1 / np.array(row["gains"]), rtol=1e-4)
        # White of daylight, seen through the file's matrix, is the file's white.
        matrix = np.divide(*np.reshape(tags[50721], (-1, 2)).T).reshape(3, 3)
        np.testing.assert_allclose(matrix @ [0.95047, 1.0, 1.08883], neutral, atol=1e-3)
        # It is the camera's own but for the scale of its rows.
        own = np.reshape(unprocess.CAMERAS[camera], (3, 3)) / 1e4
        ratio = matrix / own
        np.testing.assert_allclose(ratio, ratio.mean(axis=1, keepdims=True) @ np.ones((1, 3)), rtol=0.02)
    one, two = (images.read(Path(f"out/rgb/{name}.png")).pixels for name in names[:2])
    assert np.array_equal(one, two)  # the noise alone is another
    assert one.shape == (60, 70, 3)


def test_pairs_are_known_by_the_photograph_that_their_photo_is_a_view_of(data: Run) -> None:
    photo("views/a.png", 1)
    photo("views/b.png", 2)
    Path("views/index.tsv").write_text("file\tfrom\na.png\tlake.jpg\n")
    assert data("synth", "isp", "views", "-o", "out", "--shot", "0").code == 0
    assert [(row["photo"], row["file"]) for row in rows("out")] == [("lake.jpg", "a.png"), ("b", "b.png")]
    assert [each.facts.source for each in layouts.files_of(Path("out"))] == ["lake.jpg", "b"]


def test_photos_are_shrunk_by_averaging(data: Run) -> None:
    photo("photos/a.png", 3, 144, 180)
    assert data("synth", "isp", "photos", "-o", "out", "--shot", "0", "--shrink", "2").code == 0
    with rawpy.imread("out/raw/a-shot0.dng") as frame:
        assert frame.raw_image_visible.shape == (72, 90)


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(data: Run) -> None:
    for number in range(2):
        photo(f"photos/{number}.png", number)
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert data("synth", "isp", "photos", "-o", name, "--seed", seed, "--count", "1").code == 0
    assert content("a") == content("b")
    assert [len(rows(name)) for name in "ac"] == [1, 1]
    assert rows("a") != rows("c")


def test_an_interrupted_call_goes_on(data: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        photo(f"photos/{number}.png", number)
    words = ("synth", "isp", "photos", "-o")
    data(*words, "whole")
    write, calls = dng.write, []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(actions.dng, "write", interrupted)
        assert cli.run(["data", *words, "out"]) == 130
    assert len(rows("out")) == 1
    assert data(*words, "out").record["new"] == 1
    assert content("out") == content("whole")


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        ([], "already holds these pairs", 1),
        (["--seed", "5"], "already holds other pairs", 1),
        (["-o", "taken"], "already holds other pairs", 1),
        (["--camera", "Canon EOS 20"], "no known camera named Canon EOS 20", 2),
        (["--shot", "1e-3,much"], "--shot 1e-3,much makes no sense", 2),
        (["--shot", "0.5"], "--shot 0.5 makes no sense", 2),
        (["--least-shot", "0.01", "--most-shot", "0.001"], "--least-shot 0.01 is above", 2),
    ],
)
def test_what_synth_refuses(data: Run, words: list[str], message: str, code: int) -> None:
    photo("photos/a.png")
    Path("taken/rgb").mkdir(parents=True)
    Path("out").mkdir()
    row = {"name": "a", "photo": "a.png"}
    Path("out/samples.jsonl").write_text(json.dumps(row) + "\n")
    if not words:
        data("synth", "isp", "photos", "-o", "new")
        Path("out/samples.jsonl").write_bytes(Path("new/samples.jsonl").read_bytes())
    before = content(".")
    done = data("synth", "isp", "photos", "-o", "out", *words)
    assert done.code == code
    assert message in done.record["error"]
    assert content(".") == before


# --- render ----------------------------------------------------------------------------------


def test_render_writes_what_libraw_makes_of_a_frame_as_it_lies(data: Run) -> None:
    known("raws/a.dng")
    fixtures.write(
        Path("raws/trans.dng"), np.full((48, 48), 900, np.uint16), "GBGGRGRGRBGBGBGGRGGRGGBGBGBRGRGRGGBG"
    )
    done = data("render", "isp", "raws", "-o", "out", "--demosaic", "ahd")
    assert done.code == 1
    assert len(done.record["faults"]) == 1
    assert "trans.dng" in done.record["faults"][0]
    assert {name: done.record[name] for name in ("folder", "pairs", "new", "raws")} == {
        "folder": "out", "pairs": 1, "new": 1, "raws": 2,
    }  # fmt: skip
    assert set(content("out")) == {"raw/a.dng", "rgb/a.png", "samples.jsonl"}
    assert Path("out/raw/a.dng").samefile("raws/a.dng")
    written = images.read(Path("out/rgb/a.png")).pixels
    assert (written.dtype, written.shape) == (np.uint16, (48, 64, 3))  # the file says to turn it
    assert np.array_equal(written, libraw("raws/a.dng", "AHD"))
    (row,) = rows("out")
    with rawpy.imread("raws/a.dng") as frame:
        gains = np.array(frame.camera_whitebalance[:3])
    assert row == {
        "name": "a",
        "raw": "a.dng",
        "demosaic": "ahd",
        "gains": pytest.approx(gains / gains.min()),
    }
    again = data("render", "isp", "raws/a.dng", "-o", "out", "--demosaic", "ahd")
    assert (again.code, "already holds these pairs" in again.record["error"]) == (1, True)


def test_a_file_on_another_disk_is_copied(data: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(actions.os, "link", refuse)
    whole = known().read_bytes()
    assert data("render", "isp", "a.dng", "-o", "out").code == 0
    assert Path("out/raw/a.dng").read_bytes() == whole
    assert not Path("out/raw/a.dng").samefile("a.dng")
