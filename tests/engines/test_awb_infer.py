"""``imgtool infer awb``: the gains that are told, the pictures and files that are written, every fault."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import dng
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from imgtool import checkpoint, cli, images, sheets
from imgtool.engine import Watch
from imgtool.engines.awb import apply, estimate, picture
from imgtool.engines.awb.engine import ENGINE
from imgtool.engines.awb.settings import Infer, Model
from imgtool.errors import ImgtoolError
from imgtool.images import Photo, metadata

Array = npt.NDArray[Any]
Run = Callable[..., SimpleNamespace]

WHITE = (0.5, 0.8)
"""R/G and B/G of the light of the frames here: gains of 2 and 1.25."""

CRS = "http://ns.adobe.com/camera-raw-settings/1.0/"


def greys(height: int = 48, width: int = 72, most: float = 0.8) -> Array:
    """Steps of grey with some texture, linear, in 0..1; blocks of 2x2 pixels are alike."""
    texture = np.random.default_rng(0).uniform(0.9, 1, (height // 2, width // 2))
    steps = (
        np.linspace(0.05, most, width // 8).repeat(4) * np.linspace(0.5, 1, height // 8).repeat(4)[:, None]
    )
    return (texture * steps).repeat(2, 0).repeat(2, 1)[..., None].repeat(3, 2)


def lit(linear: Array, white: tuple[float, float] = WHITE) -> Array:
    return linear * np.array([white[0], 1.0, white[1]])


def srgb(linear: Array) -> Array:
    return np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055
    )


def put_frame(name: str, linear: Array | None = None) -> Path:
    """Write a linear 16-bit PNG whose black is 0 and white 65535."""
    values = np.rint(lit(greys()) * 65535 if linear is None else linear * 65535).astype(np.uint16)
    values[0, 0] = 65535  # tells how many bits there are
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(name, values[..., ::-1])
    return Path(name)


def put_raw(name: str = "a.dng", linear: Array | None = None, **options: Any) -> Path:
    """Write a RAW file with black at 64 and white at 4095."""
    linear = lit(greys()) if linear is None else linear
    values = np.rint(64 + dng.mosaic(linear) * (4095 - 64)).astype(np.uint16)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    return dng.write(Path(name), values, **options)


def put_photo(name: str, linear: Array, dtype: str = "uint8") -> Path:
    images.write(Path(name), Photo(images.to_type(srgb(linear), dtype)))
    return Path(name)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network that has learnt nothing."""
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    checkpoint.save_weights(path, ENGINE, Model(), ENGINE.build(Model()).state_dict(), {})
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


@pytest.fixture
def infer(weights: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Return a function that runs ``imgtool infer awb``, grey-world unless it says otherwise."""

    def call(*words: str) -> SimpleNamespace:
        capfdbinary.readouterr()
        method = [] if "--method" in words else ["--method", "grey-world"]
        code = cli.run(["infer", "awb", *words, *method, "--weights", str(weights)])
        out, err = capfdbinary.readouterr()
        lines = [json.loads(line) for line in out.splitlines()] if "--json" in words else []
        facts = lines[0].get("facts", {}) if lines else {}
        return SimpleNamespace(code=code, raw=out, out=out.decode(errors="replace"), err=err.decode(),
                               lines=lines, facts=facts)  # fmt: skip

    return call


def sure(monkeypatch: pytest.MonkeyPatch, confidence: float, white: tuple[float, float] = (0.6, 0.7)) -> None:
    """Let the network find a white with a confidence."""
    monkeypatch.setattr(estimate, "white", lambda net, stats: estimate.White(*white, confidence))


def listing() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


# --- gains ------------------------------------------------------------------------------------


@pytest.mark.parametrize("put", [put_frame, put_raw])
def test_gains_are_what_makes_grey_of_grey(infer: Run, put: Callable[..., Path]) -> None:
    path = put("a.png" if put is put_frame else "a.dng")
    done = infer(str(path), "--json")
    assert (done.code, listing()) == (0, [path.name])
    assert (done.lines[0]["output"], done.lines[0]["model"]) == (None, None)
    facts = done.facts
    assert [facts["red_gain"], facts["blue_gain"]] == pytest.approx([2, 1.25], rel=0.01)
    assert facts["gains_libcamera"] == [facts["red_gain"], facts["blue_gain"]]
    assert facts["illuminant"] == pytest.approx([0.5, 1, 0.8], rel=0.01)
    assert (facts["method"], facts["fallback"], facts["confidence"]) == ("grey-world", None, None)
    assert (facts["domain"], facts["bounded"], facts["lux"]) == ("raw", False, None)
    if path.suffix == ".dng":
        assert (facts["camera"], facts["black"], facts["white"]) == ("Maker Model 1", 64, 4095)
        assert facts["camera_gains"] == pytest.approx([2, 1 / 0.7], rel=0.01)
    else:
        assert (facts["camera"], facts["cct"], facts["tint"], facts["duv"]) == (None, None, None, None)


def test_the_line_for_people(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    put_frame("a.png")
    assert infer("a.png").out == "a.png  red 2.00  blue 1.25  (grey-world)\n"
    sure(monkeypatch, 0.873)
    alone = infer("a.png", "--method", "net", "--fallback", "none")
    assert alone.out == "a.png  red 1.67  blue 1.43  (net, confidence 0.87)\n"


def test_of_an_unknown_camera_the_mean_of_both_is_taken(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    put_frame("a.png")
    sure(monkeypatch, 0.873)
    both = infer("a.png", "--method", "net", "--fallback", "grey-world")
    red, blue = math.sqrt(2 / 0.6), math.sqrt(1.25 / 0.7)
    assert both.out == f"a.png  red {red:.2f}  blue {blue:.2f}  (net with grey-world, confidence 0.87)\n"
    put_raw("b.dng")
    known = infer("b.dng", "--json", "--method", "net", "--fallback", "grey-world").facts
    assert (known["blended"], known["fallback"]) == (None, None)
    assert known["red_gain"] == pytest.approx(1 / 0.6)


@pytest.mark.parametrize("method", apply.FREE)
def test_every_method_finds_the_light_of_greys(infer: Run, method: str) -> None:
    linear = lit(greys() * np.random.default_rng(1).uniform(0.6, 1, (48, 72, 1)), (0.44, 0.62))
    facts = infer(str(put_frame("a.png", linear)), "--json", "--method", method).facts
    assert [facts["red_gain"], facts["blue_gain"]] == pytest.approx([1 / 0.44, 1 / 0.62], rel=0.05)


def test_an_untrained_network_is_asked_on_every_runtime_alike(infer: Run) -> None:
    put_frame("a.png")
    one, two = (
        infer("a.png", "--json", "--method", "net", "--sure", "0", "--runtime", runtime)
        for runtime in ("numpy", "torch")
    )
    assert one.facts["illuminant"] == pytest.approx(two.facts["illuminant"], abs=1e-4)
    assert 0 < one.facts["confidence"] <= 1
    assert (one.lines[0]["model"], one.facts["method"]) == ("random", "net")


def test_an_unsure_network_gives_way_and_says_so(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    put_frame("a.png")
    sure(monkeypatch, 0.1)
    done = infer("a.png", "--json", "--method", "net", "--fallback", "grey-world")
    assert [done.facts["red_gain"], done.facts["blue_gain"]] == pytest.approx([2, 1.25], rel=0.01)
    assert (done.facts["method"], done.facts["fallback"]) == ("net", "grey-world")
    assert done.facts["confidence"] == 0.1
    assert "confidence 0.10 is below 0.2; grey-world answers" in done.err
    told = infer("a.png", "--method", "net", "--fallback", "grey-world").out
    assert "(grey-world, net unsure, 0.10)" in told
    facts = infer("a.png", "--json", "--method", "net", "--fallback", "none").facts
    assert (facts["red_gain"], facts["fallback"]) == (pytest.approx(1 / 0.6), None)
    facts = infer("a.png", "--json", "--method", "net", "--sure", "0.05").facts
    assert (facts["blended"], facts["fallback"]) == ("shades-of-grey", None)


def test_a_network_that_cannot_tell_how_sure_it_is_is_believed(
    infer: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_frame("a.png")
    sure(monkeypatch, float("nan"))
    facts = infer("a.png", "--json", "--method", "net").facts
    assert (facts["confidence"], facts["fallback"]) == (None, None)
    assert facts["red_gain"] == pytest.approx(1 / 0.6)


def test_the_fallback_knowing_no_better_leaves_the_network_s_answer(
    infer: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_frame("a.png")
    sure(monkeypatch, 0.1)

    def no(*_: Any) -> tuple[float, float]:
        raise ImgtoolError("nothing is grey")

    monkeypatch.setattr(apply, "by_method", no)
    done = infer("a.png", "--json", "--method", "net")
    assert (done.facts["red_gain"], done.facts["fallback"]) == (pytest.approx(1 / 0.6), None)
    assert "knows no better: nothing is grey" in done.err


@pytest.mark.parametrize(
    ("level", "words", "what"),
    [
        (0.0, ["--mask", "none"], "a.png is black"),
        (1.0, [], "a.png is saturated"),
        (0.0, [], "nothing to measure"),
        (0.5, ["--mask", "0,0,72,48"], "nothing to measure"),
    ],
)
def test_a_frame_with_nothing_to_measure_is_one_error(
    infer: Run, monkeypatch: pytest.MonkeyPatch, level: float, words: list[str], what: str
) -> None:
    sure(monkeypatch, 1.0)
    values = np.full((48, 72, 3), round(level * 65535), np.uint16)
    cv2.imwrite("a.png", values)
    for method in ("net", "grey-world"):
        done = infer("a.png", "--json", "--method", method, *words, "--white", "65535")
        assert (done.code, done.err.count("error: ")) == (1, 1)
        assert what in done.lines[0]["error"]
        assert "--white" in done.lines[0]["hint"] or "--black" in done.lines[0]["hint"]


def test_a_frame_of_one_colour_is_not_called_black(infer: Run) -> None:
    values = np.zeros((48, 72, 3), np.uint16)
    values[..., 2] = 30000  # OpenCV's red
    cv2.imwrite("a.png", values)
    done = infer("a.png", "--json")
    assert (done.code, "a.png has no cell with all three colours" in done.lines[0]["error"]) == (1, True)


def test_standard_input(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    data = put_frame("a.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert infer("-", "--json").facts["red_gain"] == pytest.approx(2, rel=0.01)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    done = infer("-", "-o", "-")
    assert np.asarray(Image.open(io.BytesIO(done.raw))).shape == (48, 72, 3)
    assert "red 2.00" in done.err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--export json,yaml", "--export yaml: unknown"),
        ("--mask lower", "--mask lower is not understood"),
        ("--mask 1,2,3,0", "--mask 1,2,3,0 is not understood"),
        ("--ct-range 5000", "no range of colour temperatures: '5000'"),
        ("--ct-range 5000,3000", "5000,3000 is no range"),
        ("--mask 72,0,5,5 --domain srgb", "lies outside of a.png, which has 72×48 pixels"),
    ],
)
def test_asked_wrongly(infer: Run, words: str, what: str) -> None:
    put_frame("a.png")
    done = infer("a.png", *words.split())
    assert (done.code, what in done.err, listing()) == (2, True, ["a.png"])


def test_a_bare_deep_png_is_said_to_be_taken_for_raw_by_name_where_there_are_several(infer: Run) -> None:
    put_frame("in/a.png")
    put_photo("in/b.jpg", greys(most=0.5))
    told = "taken as linear camera data; --domain srgb if it is a photo"
    assert f"\n{told}\n" in infer("in/a.png").err
    several = infer("in", "--black", "0", "--domain", "auto").err
    assert told not in several  # with a level of black it is no guess
    assert "\nin/b.jpg: --black and --white are not used" in several
    assert f"\nin/a.png: {told}\n" in infer("in").err


# --- pictures ---------------------------------------------------------------------------------


def test_a_linear_frame_becomes_a_picture(infer: Run) -> None:
    linear = greys()
    put_frame("a.png", lit(linear))
    assert infer("a.png", "-o", "b.png").code == 0
    after = images.read(Path("b.png")).pixels
    assert after.dtype == np.uint16
    inner = after[2:, 2:].astype(float) / 65535
    assert inner == pytest.approx(srgb(linear)[2:, 2:], abs=0.005)
    assert infer("b.png", "--json").facts["domain"] == "srgb"  # what was written says what it is
    assert infer("b.png", "-o", "c.png", "--domain", "raw", "--json").facts["domain"] == "raw"
    assert infer("c.png", "--json").facts["domain"] == "srgb"


def test_a_page_shows_what_was_there_already(infer: Run) -> None:
    put_frame("in/a.png")
    put_frame("in/b.png", lit(greys(), (0.4, 0.5)))
    assert infer("in", "-o", "out").code == 0
    Path("out/b.png").unlink()
    assert infer("in", "-o", "out", "--skip-existing", "--report", "page").code == 0
    page = Path("page/index.html").read_text()
    assert ("left out" in page, "not done" in page) == (True, False)
    assert all(f"in/{name}" in page for name in ("a.png", "b.png"))


def test_saturated_highlights_are_white(infer: Run) -> None:
    linear = np.minimum(lit(greys(most=1.6)), 1)
    put_frame("a.png", linear)
    infer("a.png", "-o", "b.png")
    after = images.read(Path("b.png")).pixels[linear[..., 1] >= 1]
    assert len(after) > 100
    assert after[:, 1].min() == 65535
    assert after[:, [0, 2]].min() > 64000  # green stopped first; nothing is magenta, nothing green


def test_a_raw_file_becomes_a_picture(infer: Run) -> None:
    put_raw(linear=lit(greys(96, 144)))
    assert infer("a.dng", "-o", "b.tif", "--side-by-side", "--json").facts["before"] == "gains of 5500 K"
    after = images.read(Path("b.tif"))
    assert after.pixels.shape == (96, 144, 3)
    inner = after.pixels[8:-8, 8:-8].astype(float) / 65535
    assert inner == pytest.approx(srgb(greys(96, 144))[8:-8, 8:-8], abs=0.03)
    assert np.abs(inner[..., [0, 2]] - inner[..., 1:2]).mean() < 0.003
    assert metadata.tag_bytes(after.exif, 271) == b"Maker\0"
    with Image.open("b-side-by-side.jpg") as both:
        pixels = np.asarray(both).astype(float)
    before, corrected = pixels[:, :144].mean((0, 1)), pixels[:, 144:].mean((0, 1))
    assert np.ptp(corrected) < 2
    assert np.ptp(before) > 20  # for daylight this light has a cast


CAST = (1.3, 0.8)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_photo_loses_its_cast_in_its_own_type(dtype: str) -> None:
    linear = lit(greys(most=0.4), CAST)
    photo = Photo(images.to_type(srgb(linear), dtype))
    result = apply.apply(None, photo, Infer(inputs=("-",), method="grey-world"), Watch())
    assert result.image is not None
    assert result.image.dtype == photo.pixels.dtype
    kept = 0.2126 * CAST[0] + 0.7152 + 0.0722 * CAST[1]
    wanted = srgb(greys(most=0.4) * kept)
    assert images.to_float(result.image) == pytest.approx(wanted, abs=0.012)
    assert (result.facts["domain"], result.facts["cct"]) == ("srgb", None)


def test_a_photo_s_gains_are_bounded_and_said_to_be_a_correction(infer: Run) -> None:
    put_photo("a.jpg", lit(greys(most=0.4), (2.0, 0.25)))
    done = infer("a.jpg", "--json")
    assert (done.facts["domain"], done.facts["bounded"]) == ("srgb", True)
    assert done.facts["red_gain"] == pytest.approx(0.5, abs=0.02)
    assert done.facts["blue_gain"] == 2
    assert done.facts["illuminant"] == pytest.approx([1 / done.facts["red_gain"], 1, 0.5])
    assert "a rendered photo: the gains are a correction" in done.err


def test_white_stays_white_in_a_photo() -> None:
    pixels = np.full((4, 4, 3), 255, np.uint8)
    assert np.array_equal(picture.correct(pixels, (1.5, 0.6)), pixels)


def test_a_photo_without_a_cast_is_left_as_it_is(infer: Run) -> None:
    path = put_photo("a.png", greys(most=0.5))
    done = infer("a.png", "-o", "b.png", "--json")
    assert done.lines[0]["untouched"] is True
    assert Path("b.png").read_bytes() == path.read_bytes()


def test_a_folder_of_pictures_has_a_table_of_gains(infer: Run) -> None:
    put_frame("in/a.png")
    put_frame("in/b.png", lit(greys(), (0.4, 0.5)))
    Path("in/stats").mkdir()
    for name in ("gains.png", "gains-histogram.png", "ct.png"):
        Path("in/stats", name).touch()  # what data stats draws is no input
    assert infer("in", "-o", "out").code == 0
    assert [name for name in listing() if name.startswith("out")] == [
        "out/a.png",
        "out/b.png",
        "out/gains.csv",
    ]
    head, *rows = [line.split(",") for line in Path("out/gains.csv").read_text().splitlines()]
    assert head[:3] == ["file", "red_gain", "blue_gain"]
    assert [row[0] for row in rows] == ["a.png", "b.png"]
    assert float(rows[1][1]) == pytest.approx(2.5, rel=0.01)


@pytest.mark.parametrize("name", ["a.png", "a.dng", "a.jpg"])
def test_all_methods_on_a_sheet(infer: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    light = (0.5, 0.8) if name != "a.jpg" else (1.1, 0.9)
    linear = lit(greys(96, 144, 0.6) * np.random.default_rng(0).uniform(0.7, 1, (96, 144, 1)), light)
    {"a.png": put_frame, "a.dng": put_raw, "a.jpg": put_photo}[name](name, linear)
    sure(monkeypatch, 0.1, (light[0] * 1.4, light[1]))
    seen: dict[str, Array] = {}
    grid = sheets.grid
    monkeypatch.setattr(sheets, "grid", lambda tiles, **more: seen.update(tiles) or grid(tiles, **more))
    done = infer(name, "--compare-methods", "--method", "net", "--fallback", "grey-world")
    assert done.code == 0
    assert listing() == ["a-methods.png", name]
    assert images.read(Path("a-methods.png")).pixels.shape[1] == 1600
    words = [label.partition(":")[0] for label in seen]
    assert words[:2] == ["before", "net"]
    assert {"grey-world", "white-patch", "shades-of-grey", "grey-edge", "chosen (grey-world for net)"} <= set(
        words
    )
    casts = {
        label.partition(":")[0]: np.ptp(images.to_float(tile)[10:-10, 10:-10].mean((0, 1)))
        for label, tile in seen.items()
    }
    assert casts["grey-world"] < 0.01
    assert casts["net"] > 0.04
    assert casts["before"] > 0.01
    assert f"red {1 / light[0]:.2f}" in next(label for label in seen if label.startswith("grey-world"))


# --- files for other programs -----------------------------------------------------------------


def test_facts_and_gains_as_files(infer: Run) -> None:
    put_frame("a.png")
    done = infer("a.png", "--export", "json,libcamera", "--json")
    assert listing() == ["a.awb.json", "a.libcamera.json", "a.png"]
    assert json.loads(Path("a.awb.json").read_text()) == done.facts
    told = json.loads(Path("a.libcamera.json").read_text())
    assert told == {"AwbEnable": False, "ColourGains": done.facts["gains_libcamera"]}
    assert "a.awb.json exists" in infer("a.png", "--export", "json").err
    done = infer("a.png", "--export", "json,libcamera", "--skip-existing", "--json")
    assert done.lines == [{"input": "a.png", "output": None, "skipped": True}]


def test_an_xmp_for_raw_converters(infer: Run) -> None:
    """To a camera whose colours are those of sRGB, D65 is white: 6504 K."""
    put_raw(linear=greys())
    assert infer("a.dng", "--export", "xmp").code == 0
    xmp = Path("a.xmp").read_bytes()
    assert metadata.xmp_property(xmp, CRS, "WhiteBalance") == "Custom"
    assert int(metadata.xmp_property(xmp, CRS, "Temperature") or 0) == pytest.approx(6504, rel=0.01)
    assert abs(int(metadata.xmp_property(xmp, CRS, "Tint") or 99)) < 15


def test_raw_and_jpeg_of_one_stem_have_files_of_their_own(infer: Run) -> None:
    put_raw("in/x.dng", greys())
    put_photo("in/x.jpg", greys(most=0.5))
    words = ("in", "--export", "json,xmp", "--compare-methods")
    planned = infer(*words, "-n", "--json").lines[0]["plan"]["outputs"]
    assert planned == [
        "in/x.dng -> facts, in/x.dng.awb.json, in/x.xmp, in/x.dng-methods.png",
        "in/x.jpg -> facts, in/x.jpg.awb.json, in/x.jpg-methods.png",
    ]
    done = infer(*words)
    assert done.code == 0
    assert "in/x.jpg: no .xmp is written: raw converters read XMP of camera RAW alone" in done.err
    made = ["x.dng-methods.png", "x.dng.awb.json", "x.jpg-methods.png", "x.jpg.awb.json", "x.xmp"]
    assert listing() == sorted(f"in/{name}" for name in [*made, "x.dng", "x.jpg"])
    again = infer(*words, "--skip-existing", "--json").lines
    assert [line.get("skipped") for line in again] == [True, True]


def test_an_xmp_that_exists_keeps_what_else_it_says(infer: Run) -> None:
    put_raw(linear=greys())
    older = metadata.with_xmp_properties(None, CRS, "crs", {"Exposure2012": "+0.50", "Temperature": "3000"})
    Path("a.xmp").write_bytes(older)
    done = infer("a.dng", "--export", "xmp")
    assert (done.code, "a.xmp exists" in done.err, Path("a.xmp").read_bytes()) == (1, True, older)
    assert infer("a.dng", "--export", "xmp", "--force").code == 0
    newer = Path("a.xmp").read_bytes()
    assert metadata.xmp_property(newer, CRS, "Exposure2012") == "+0.50"
    assert int(metadata.xmp_property(newer, CRS, "Temperature") or 0) > 6000
    Path("a.xmp").write_bytes(b"notes of mine")
    done = infer("a.dng", "--export", "xmp", "--force")
    assert (done.code, "is no XMP that could be kept" in done.err) == (1, True)
    assert Path("a.xmp").read_bytes() == b"notes of mine"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a.png", "is no camera RAW"),
        ("a.jpg", "is no camera RAW"),
        ("a.dng", "colour matrix of the camera is not known"),
    ],
)
def test_an_xmp_that_could_not_be_right_is_refused(infer: Run, name: str, what: str) -> None:
    put = {"a.png": put_frame, "a.jpg": lambda path: put_photo(path, greys())}
    if name == "a.dng":
        put_raw(matrix=None)
    else:
        put[name](name)
    done = infer(name, "--export", "json,xmp", "--json")
    assert (done.code, listing()) == (1, [name])
    assert what in done.lines[0]["error"]
    assert "leave xmp out" in done.lines[0]["hint"]


# --- a process of its own ---------------------------------------------------------------------

LEAN = """
import sys
from imgtool import cli, engines
engines.SUMMARY.setdefault("awb", "")
code = cli.run(["infer", "awb", sys.argv[1], "--weights", sys.argv[2], "--sure", "0"])
heavy = {"torch", "cv2", "PIL", "tifffile", "matplotlib", "jinja2"} & set(sys.modules)
memory = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
print(code, memory, *sorted(heavy), file=sys.stderr)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read off /proc")
@pytest.mark.parametrize(("name", "heavy"), [("a.png", ["cv2"]), ("a.dng", [])])
def test_no_torch_and_little_memory(weights: Path, name: str, heavy: list[str]) -> None:
    """For a RAW file nothing is imported that decodes or draws pictures; the whole takes 80 MB at most.

    Later Pythons take more, and so does the NumPy that goes with them: 88 MB on 3.13.
    """
    (put_raw if name == "a.dng" else put_frame)(name, lit(greys(432, 648)))
    done = subprocess.run(
        [sys.executable, "-c", LEAN, name, str(weights)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    code, memory, *imported = done.stderr.splitlines()[-1].split()
    assert (code, imported) == ("0", heavy), done.stderr
    assert int(memory) * 1024 <= (80e6 if sys.version_info < (3, 12) else 95e6)
    kelvin = r", \d+ K" if name == "a.dng" else ""
    how = "net" if name == "a.dng" else "net with shades-of-grey"
    line = rf"{name}  red \d+\.\d\d  blue \d+\.\d\d  \({how}, confidence 0\.\d\d{kelvin}\)\n"
    assert re.fullmatch(line, done.stdout)
