"""The rival of learned filters: the filter on a smaller photo, enlarged with the photo as guide."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from imgtool.engines.filter import targets, upsample

Array = npt.NDArray[Any]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def mirror(position: int, size: int) -> int:
    while not 0 <= position < size:
        position = -position if position < 0 else 2 * (size - 1) - position
    return position


def mean(values: Array, radius: int) -> Array:
    """Average over windows that mirror the border, pixel by pixel."""
    height, width = values.shape
    out = np.empty((height, width))
    around = range(-radius, radius + 1)
    for y in range(height):
        for x in range(width):
            near = [values[mirror(y + dy, height), mirror(x + dx, width)] for dy in around for dx in around]
            out[y, x] = np.mean(near, dtype=np.float64)
    return out


def enlarged(values: Array, height: int, width: int) -> Array:
    """Enlarge bilinearly, pixel by pixel; centres of pixels are at halves."""
    out = np.empty((height, width))
    for y in range(height):
        for x in range(width):
            places = []
            for at, length, size in ((y, height, values.shape[0]), (x, width, values.shape[1])):
                exact = min(max((at + 0.5) * size / length - 0.5, 0), size - 1)
                first = min(int(exact), max(size - 2, 0))
                places.append((first, min(first + 1, size - 1), exact - first))
            (top, bottom, down), (left, right, across) = places
            upper = values[top, left] * (1 - across) + values[top, right] * across
            lower = values[bottom, left] * (1 - across) + values[bottom, right] * across
            out[y, x] = upper * (1 - down) + lower * down
    return out


def test_enlarging_is_the_fast_guided_filter() -> None:
    photo, found = random(8, 12, 3), random(4, 6, 3, seed=1)
    small = random(4, 6, 3, seed=2)
    got = upsample.guided(small, found, photo, radius=1, eps=0.01)
    assert (got.shape, got.dtype) == ((8, 12, 3), np.float32)
    for colour in range(3):
        guide, wanted = small[..., colour].astype(float), found[..., colour].astype(float)
        variance = mean(guide * guide, 1) - mean(guide, 1) ** 2
        slope = (mean(guide * wanted, 1) - mean(guide, 1) * mean(wanted, 1)) / (variance + 0.01)
        offset = mean(wanted, 1) - slope * mean(guide, 1)
        expected = enlarged(mean(slope, 1), 8, 12) * photo[..., colour] + enlarged(mean(offset, 1), 8, 12)
        assert got[..., colour] == pytest.approx(expected, abs=1e-5)


def test_what_is_linear_in_the_photo_comes_back_exactly() -> None:
    photo, small = random(13, 21, 3), random(7, 11, 3, seed=1)
    got = upsample.guided(small, 0.25 + 0.5 * small, photo, eps=1e-9)
    assert got == pytest.approx(0.25 + 0.5 * photo, abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 3), (16, 24)])
@pytest.mark.parametrize("spec", ["bilateral", "tv", "weighted_median", "sobel_3"])
@pytest.mark.parametrize("factor", [0.5, 0.25])
def test_a_photo_of_one_colour(shape: tuple[int, int], spec: str, factor: float) -> None:
    target = targets.parse(spec)
    photo = np.full((*shape, 3), (200, 100, 50), np.uint8)
    got = upsample.reduced(target, photo, factor)
    assert got.shape == target.map(photo).shape
    assert got == pytest.approx(target.map(photo), abs=1e-5)


def test_edges_stay_where_they_are_in_the_photo() -> None:
    """An edge between two pixels of the small photo: enlarged without its guide it would be soft."""
    photo = np.full((32, 32, 3), 40, np.uint8)
    photo[:, 17:] = 200
    got = upsample.reduced(targets.parse("bilateral"), photo, 0.25)
    assert np.abs(255 * got - photo).max() < 6
    small = cv2.resize(photo, (8, 8), interpolation=cv2.INTER_AREA)
    assert np.abs(cv2.resize(small, (32, 32)).astype(int) - photo).max() > 30


@pytest.mark.parametrize(
    ("spec", "half", "quarter"),
    [
        ("bilateral", "bilateral:d=5,ss=1.5", "bilateral:d=3,ss=0.75"),
        ("bilateral:d=5,sr=0.2", "bilateral:d=3,sr=0.2,ss=1.5", "bilateral:d=3,sr=0.2,ss=0.75"),
        ("tv", "tv:weight=0.05", "tv:weight=0.025"),
        ("weighted_median", "weighted_median:radius=3", "weighted_median:radius=1"),
        ("rolling_guidance:n=2", "rolling_guidance:ss=1.5,n=2", "rolling_guidance:ss=0.75,n=2"),
        ("wls:lam=100", "wls:lam=25", "wls:lam=6.25"),
        ("anisotropic", "anisotropic:n=3", "anisotropic:n=1"),
        ("l0", "l0", "l0"),
        ("sobel_5_canny", "sobel_5_canny", "sobel_5_canny"),
    ],
)
def test_parameters_go_with_the_size(spec: str, half: str, quarter: str) -> None:
    target = targets.parse(spec)
    assert upsample.at_size(target, 0.5).spec == targets.parse(half).spec
    assert upsample.at_size(target, 0.25).spec == targets.parse(quarter).spec
    assert upsample.at_size(target, 1).spec == target.spec


def test_the_windows_of_nlm_go_with_the_size_and_its_strength_falls() -> None:
    small = upsample.at_size(targets.parse("nlm"), 0.25).spec.split(",")
    assert small[1:] == ["patch=3", "search=7"]
    assert 3 < float(small[0].partition("=")[2]) < 6


@pytest.mark.parametrize("factor", [0.5, 0.25, 0.01])
def test_what_every_filter_becomes_is_allowed(factor: float) -> None:
    assert [upsample.at_size(targets.parse(name), factor).name for name in targets.KINDS] == [*targets.KINDS]
