"""Whole photos straightened and distorted, beside OpenCV's own undistortion."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from imgtool.engines.lens import warp
from imgtool.engines.lens.geometry import BrownConrady, zoom

Array = npt.NDArray[Any]

LENS = BrownConrady(-0.11, 0.04, 0.003, -0.002)
ODD = BrownConrady(0.05, -0.03, -0.002, 0.004, k3=0.02, cx=0.03, cy=-0.02)
MODELS = [LENS, ODD]
DTYPES = ["uint8", "uint16", "float32"]


def picture(height: int = 301, width: int = 453, dtype: str = "uint8") -> Array:
    """Smooth tones that differ everywhere, 3 channels."""
    rng = np.random.default_rng(0)
    tones = cv2.resize(rng.uniform(0.1, 0.9, (6, 8, 3)), (width, height), interpolation=cv2.INTER_LINEAR)
    values = tones.reshape(height, width, 3)
    if dtype == "float32":
        return values.astype(np.float32)
    return np.rint(values * np.iinfo(dtype).max).astype(dtype)


def maps(model: BrownConrady, factor: float, width: int, height: int) -> tuple[Array, Array]:
    """Return OpenCV's own look-up, in double precision at the pixel centres."""
    unit = math.hypot(width, height) / 2
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    offset = np.array([model.cx, model.cy]) * unit
    straight, photo = np.eye(3), np.eye(3)
    straight[[0, 1], [0, 1]], straight[:2, 2] = unit * factor, middle + offset * factor
    photo[[0, 1], [0, 1]], photo[:2, 2] = unit, middle + offset
    terms = np.array([model.k1, model.k2, model.p1, model.p2, model.k3])
    return cv2.initUndistortRectifyMap(photo, terms, None, straight, (width, height), cv2.CV_32FC1)


def apart(one: Array, two: Array) -> float:
    return float(np.abs(one.astype(np.float64) - two).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.9, 1.07])
@pytest.mark.parametrize("model", MODELS)
def test_straightening_is_that_of_opencv(model: BrownConrady, factor: float, dtype: str) -> None:
    pixels = picture(dtype=dtype)
    expected = cv2.remap(pixels, *maps(model, factor, 453, 301), cv2.INTER_LINEAR)
    found = warp.straighten(pixels, model, factor)
    assert (found.shape, found.dtype) == (pixels.shape, pixels.dtype)
    steepest = 1 / 255 if dtype == "float32" else np.iinfo(dtype).max / 255
    assert apart(found, expected) <= steepest
    assert apart(found, pixels) > 20 * steepest


def test_opencv_undistort_agrees_within_a_level() -> None:
    pixels = picture()
    unit = math.hypot(453, 301) / 2
    camera = np.array([[unit, 0, 226], [0, unit, 150], [0, 0, 1]])
    expected = cv2.undistort(pixels, camera, np.array([LENS.k1, LENS.k2, LENS.p1, LENS.p2]))
    assert apart(warp.straighten(pixels, LENS), expected) <= 1


@pytest.mark.parametrize("interpolation", ["cubic", "lanczos"])
@pytest.mark.parametrize("border", ["black", "replicate", "reflect"])
def test_interpolations_and_borders(interpolation: Any, border: Any) -> None:
    ways = {"cubic": cv2.INTER_CUBIC, "lanczos": cv2.INTER_LANCZOS4}
    borders = {
        "black": cv2.BORDER_CONSTANT,
        "replicate": cv2.BORDER_REPLICATE,
        "reflect": cv2.BORDER_REFLECT_101,
    }
    pixels = picture()
    look_up = maps(LENS, 0.6, 453, 301)
    expected = cv2.remap(pixels, *look_up, ways[interpolation], borderMode=borders[border])
    if border == "black":
        white = np.ones((301, 453, 1), np.float32)
        share = cv2.remap(white, *look_up, cv2.INTER_LINEAR)[..., None]
        expected = share * cv2.remap(pixels, *look_up, ways[interpolation], borderMode=cv2.BORDER_REPLICATE)
    found = warp.straighten(pixels, LENS, 0.6, interpolation=interpolation, border=border)
    assert apart(found, expected) <= 2
    if border == "black":
        assert (found == 0).all(axis=2).mean() > 0.3


@pytest.mark.parametrize("interpolation", ["linear", "cubic", "lanczos"])
def test_a_zoom_that_fills_leaves_no_dark_rim(interpolation: Any) -> None:
    white = np.full((301, 453, 3), 200, np.uint8)
    factor = zoom(LENS, 453, 301, "fill")
    assert (
        np.abs(warp.straighten(white, LENS, factor, interpolation=interpolation).astype(int) - 200).max() <= 1
    )


def test_blocks_leave_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = picture(dtype="uint16")
    whole = warp.straighten(pixels, ODD, 0.8, interpolation="lanczos", border="reflect")
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(warp, "BLOCK", 453 * 10)
    monkeypatch.setattr(warp, "LONGEST", 100)  # also cut in columns, source and output
    cut = warp.straighten(
        pixels, ODD, 0.8, interpolation="lanczos", border="reflect",
        done=lambda finished, total: told.append((finished, total)),
    )  # fmt: skip
    assert apart(whole, cut) <= 65535 * 1e-3
    assert told[-1][0] == told[-1][1] == len(told) > 20


@pytest.mark.parametrize("size", [(40_000, 9), (9, 40_000)])
def test_panoramas_longer_than_opencv_takes(size: tuple[int, int]) -> None:
    width, height = size
    ramp = np.linspace(0, 1, max(size), dtype=np.float32)
    pixels = np.ascontiguousarray(
        np.broadcast_to(ramp[None] if width > height else ramp[:, None], (height, width))
    )
    found = warp.straighten(pixels, LENS, border="replicate")
    unit = math.hypot(width, height) / 2
    place = np.array([0, 5000, 20_000, 33_000, max(size) - 1])
    across = (place - (width - 1) / 2) / unit if width > height else np.full(5, -4 / unit)
    down = np.full(5, -4 / unit) if width > height else (place - (height - 1) / 2) / unit
    moved = LENS.distort(across, down)[0 if width > height else 1] * unit + (max(size) - 1) / 2
    seen = found[0, place] if width > height else found[place, 0]
    assert np.abs(seen - np.clip(moved, 0, max(size) - 1) / (max(size) - 1)).max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_straight_model_gives_an_equal_picture(dtype: str) -> None:
    pixels = picture(dtype=dtype)
    for call in (warp.straighten, warp.distort):
        found = call(pixels, BrownConrady(cx=0.1))
        assert np.array_equal(found, pixels)
        assert not np.shares_memory(found, pixels)


@pytest.mark.parametrize("interpolation", ["linear", "cubic", "lanczos"])
@pytest.mark.parametrize("border", ["black", "replicate", "reflect"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 1), (3, 2)])
def test_smallest_pictures(interpolation: Any, border: Any, size: tuple[int, int]) -> None:
    pixels = np.full((*size, 3), 200, np.uint8)
    found = warp.straighten(pixels, LENS, 1.5, interpolation=interpolation, border=border)
    assert found.shape == pixels.shape
    assert np.abs(found.astype(int) - 200).max() <= 1  # a zoom shows the inside alone
    assert warp.distort(pixels, LENS, interpolation=interpolation, border=border).shape == pixels.shape


def test_a_model_that_is_absurd_still_ends() -> None:
    wild = BrownConrady(1e30, 1e38)
    for border in ("black", "replicate", "reflect"):
        assert warp.straighten(picture(), wild, border=border).shape == (301, 453, 3)
    assert warp.coverage(wild, 1, 453, 301).mean() < 3


@pytest.mark.parametrize("model", MODELS)
def test_distorting_and_straightening_give_the_picture_back(model: BrownConrady) -> None:
    pixels = picture(dtype="float32")
    factor = zoom(model, 453, 301, "fill")
    back = warp.straighten(warp.distort(pixels, model, factor, border="replicate"), model, factor)
    assert np.abs(back - pixels)[5:-5, 5:-5].max() < 0.006  # the kinks of linear tones, twice interpolated
    assert np.abs(warp.distort(pixels, model, factor) - pixels).max() > 0.05


def test_a_distorted_line_lies_where_the_model_says() -> None:
    pixels = np.zeros((400, 600), np.float32)
    pixels[40] = 1
    pixels = cv2.GaussianBlur(pixels, (0, 0), sigmaX=0.1, sigmaY=3)
    bent = warp.distort(pixels, LENS, border="black", interpolation="linear")
    unit = math.hypot(600, 400) / 2
    for column in (100, 299, 500):
        row = (bent[:, column] * np.arange(400)).sum() / bent[:, column].sum()
        straight = LENS.undistort((column - 299.5) / unit, np.float64((row - 199.5) / unit))
        assert straight[1] * unit + 199.5 == pytest.approx(40, abs=0.05)


@pytest.mark.parametrize("factor", [1.0, 0.8])
def test_coverage_is_what_white_becomes(factor: float) -> None:
    white = np.full((301, 453), 255, np.uint8)
    expected = cv2.remap(white, *maps(ODD, factor, 453, 301), cv2.INTER_LINEAR)
    found = warp.coverage(ODD, factor, 453, 301)
    assert apart(found, expected) <= 3
    assert found.max() == 255
    assert ((found > 0) & (found < 255)).any()


def test_a_plane_is_warped_like_a_photo() -> None:
    pixels = picture()
    plane = np.ascontiguousarray(pixels[..., 1])
    assert np.array_equal(warp.straighten(plane, LENS), warp.straighten(pixels, LENS)[..., 1])


MEMORY = """
import numpy as np
from imgtool.bench import peak_mb
from imgtool.engines.lens import warp
from imgtool.engines.lens.geometry import BrownConrady
lens = BrownConrady(-0.11, 0.04, 0.003, -0.002)
pixels = np.random.default_rng(0).integers(0, 256, (4000, 6000, 3), np.uint8)
warp.straighten(pixels[:64, :64], lens)
base = peak_mb()
warp.straighten(pixels, lens)
print(peak_mb() - base)
"""


@pytest.mark.slow
def test_24_megapixels_take_less_than_100_mb_more() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100
