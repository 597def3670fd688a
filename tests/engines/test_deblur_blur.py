"""Synthetic blur: physical, centred, as described in its recipe, the same for the same numbers."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from imgtool.engines.deblur import blur

Array = npt.NDArray[Any]

STILL = blur.Severity(untouched=0.0, noisy=0.0)
"""Blurs everything, and adds neither noise nor JPEG."""


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture(edge: int = 160, seed: int = 0) -> Array:
    tones = cv2.resize(
        random(seed).uniform(20, 235, (12, 12, 3)), (edge, edge), interpolation=cv2.INTER_CUBIC
    )
    return np.clip(tones, 0, 255).astype(np.uint8)


def centroid(light: Array) -> tuple[float, float]:
    """Return (x, y) of the light's centre."""
    y, x = np.mgrid[: light.shape[0], : light.shape[1]]
    total = light.sum(dtype=np.float64)
    return float((light * x).sum(dtype=np.float64) / total), float((light * y).sum(dtype=np.float64) / total)


# --- colours ------------------------------------------------------------------------------------


def test_srgb_goes_there_and_back() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    linear = blur.to_linear(codes)
    assert linear.dtype == np.float32
    assert linear.min() == 0
    assert linear.max() == 1
    assert float(linear[128 // 16, 128 % 16]) == pytest.approx(((128 / 255 + 0.055) / 1.055) ** 2.4, rel=1e-6)
    assert float(linear[0, 5]) == pytest.approx(5 / 255 / 12.92, rel=1e-6)
    assert np.array_equal(np.rint(blur.to_srgb(linear) * 255), codes)
    assert blur.to_srgb(np.array([[-1.0, 3.0]], np.float32))[0].tolist() == pytest.approx([0, 1], abs=1e-6)


# --- kernels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shake", "steps", "linear", "defocus"])
@pytest.mark.parametrize("length", [1.0, 7.3, 26.0, 60.0])
def test_kernels_keep_the_light_and_its_place(kind: str, length: float) -> None:
    for seed in range(20):
        kernel = blur.draw_kernel(random(seed), kind, length)
        edge = kernel.shape[0]
        assert kernel.shape == (edge, edge)
        assert edge % 2 == 1
        assert edge // 2 <= blur.MARGIN
        assert kernel.min() >= 0
        assert float(kernel.sum(dtype=np.float64)) == pytest.approx(1, abs=1e-6)
        assert centroid(kernel) == pytest.approx((edge // 2, edge // 2), abs=1e-4)


def test_a_path_that_leaves_the_kernel_is_kept_inside() -> None:
    kernel = blur.rasterise(np.array([[0.0, 0.0], [500.0, 0.0]]))
    assert kernel.shape[0] // 2 < blur.MARGIN
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-6)


def test_weights_are_the_time_spent() -> None:
    kernel = blur.rasterise(np.array([[0.0, 0.0], [4.0, 0.0]]), np.array([3.0, 1.0]))
    middle = kernel.shape[0] // 2
    assert kernel[middle, middle - 1] == pytest.approx(0.75)
    assert kernel[middle, middle + 3] == pytest.approx(0.25)


@pytest.mark.parametrize("length", [2.0, 10.0, 26.0])
def test_a_trajectory_has_its_length(length: float) -> None:
    for seed in range(5):
        steps = np.diff(blur.trajectory(random(seed), length), axis=0)
        assert np.hypot(*steps.T).sum() == pytest.approx(length)


def test_trajectories_bend() -> None:
    """A camera that only moved straight would give lines: extent equals length."""
    extents = [np.ptp(blur.trajectory(random(seed), 20.0), axis=0).max() for seed in range(30)]
    assert np.median(extents) < 17
    assert max(extents) - min(extents) > 3


def test_a_line_has_its_length_and_angle() -> None:
    ends = blur.line(10.0, np.pi / 6)[[0, -1]]
    assert (ends[1] - ends[0]).tolist() == pytest.approx([10 * np.cos(np.pi / 6), 5.0])


def test_a_defocused_point_is_a_disc() -> None:
    disc = blur.defocus(4.0)
    y, x = np.mgrid[-5:6, -5:6]
    distance = np.hypot(x, y)
    assert np.allclose(disc[distance < 3.4], disc[5, 5])
    assert disc[distance > 4.6].max() == 0


def test_convolution_is_no_correlation() -> None:
    """A kernel with its weight on the right moves light to the right."""
    kernel = np.zeros((3, 3), np.float32)
    kernel[1, 2] = 1
    dot = np.zeros((9, 9), np.float32)
    dot[4, 4] = 1
    assert blur.convolve(dot, kernel)[4, 5] == 1


# --- a picture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", blur.KINDS)
def test_no_blur_moves_a_dot(kind: str) -> None:
    """A roll draws a dot a little towards its centre; an object's edge covers a part of its light."""
    dot = np.zeros((161, 161, 3), np.float32)
    dot[80, 80] = 1
    places = [centroid(blur.blur_light(dot, random(seed), kind, 20.0)[..., 1]) for seed in range(12)]
    apart = [np.hypot(x - 80, y - 80) for x, y in places]
    assert max(apart) < (0.5 if kind in ("rotation", "object") else 0.01)
    assert np.mean(apart) < 0.06


def shift(before: Array, after: Array) -> Array:
    """Return the (x, y) that, in the least squares sense, a picture was moved by (Lucas and Kanade)."""
    first, second = (
        cv2.GaussianBlur(each.astype(np.float64).mean(2), (0, 0), 8)[40:-40, 40:-40]
        for each in (before, after)
    )
    slopes = np.stack([np.gradient(first, axis=axis).ravel() for axis in (1, 0)], axis=1)
    return -np.linalg.lstsq(slopes, (second - first).ravel(), rcond=None)[0]


def test_no_blur_moves_a_picture() -> None:
    """The whole recipe, noise and JPEG included."""
    sharp = picture(256, seed=3)
    moved = np.roll(sharp, (1, 2), (0, 1))
    assert shift(sharp, moved).tolist() == pytest.approx([2, 1], abs=0.1)
    shifts = [
        shift(sharp, blur.degrade(sharp, random(seed), blur.Severity(untouched=0.0))[0]) for seed in range(40)
    ]
    assert np.hypot(*np.transpose(shifts)).max() < 0.5
    assert np.hypot(*np.mean(shifts, axis=0)) < 0.05


@pytest.mark.parametrize("kind", blur.KINDS)
def test_a_flat_picture_keeps_its_brightness(kind: str) -> None:
    flat = np.full((96, 96, 3), 0.4, np.float32)
    for seed in range(4):
        assert np.allclose(blur.blur_light(flat, random(seed), kind, 20.0), 0.4, atol=1e-5)


def test_a_flat_picture_comes_out_of_the_recipe_as_it_was() -> None:
    flat = np.full((128, 128, 3), (30, 120, 200), np.uint8)
    for seed in range(30):
        out, recipe = blur.degrade(flat, random(seed), STILL)
        assert recipe.jpeg == 0
        assert np.abs(out.astype(int) - flat).max() <= 1
        out, _ = blur.degrade(flat, random(seed), blur.Severity(untouched=0.0))
        assert out.reshape(-1, 3).mean(0).tolist() == pytest.approx([30, 120, 200], abs=2)


@pytest.mark.parametrize("kind", blur.KINDS)
def test_every_kind_blurs(kind: str) -> None:
    def edges(light: Array) -> float:
        return float(sum(np.square(np.diff(light, axis=axis)).sum() for axis in (0, 1)))

    sharp = blur.to_linear(picture(128) // 128 * 255)
    for seed in range(4):
        assert edges(blur.blur_light(sharp, random(seed), kind, 15.0)) < 0.75 * edges(sharp)


def test_a_longer_blur_blurs_more() -> None:
    sharp = picture(192, seed=5)

    def lost(shortest: float, longest: float) -> float:
        severity = blur.Severity(0.0, shortest, longest, 0.0)
        pictures = [blur.degrade(sharp, random(seed), severity)[0] for seed in range(20)]
        return float(np.mean([np.square(each - 1.0 * sharp).mean() for each in pictures]))

    assert lost(2, 4) < lost(8, 12) < lost(20, 26)


def test_lights_are_brighter_than_white() -> None:
    """A saturated lamp leaves a whiter trace than its clipped pixels could."""
    dark = np.zeros((128, 128, 3), np.uint8)
    dark[62:66, 62:66] = 255
    for seed in range(200):
        out, recipe = blur.degrade(dark, random(seed), STILL)
        if recipe.saturation > 1 and recipe.linear:
            light = blur.to_linear(out).sum() / blur.to_linear(dark).sum()
            if out.max() < 255:  # nothing was clipped again
                assert light == pytest.approx(1 + recipe.saturation, rel=0.1)
                return
    pytest.fail("no lamp drawn")


# --- noise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 0.2, 0.8])
def test_noise_has_the_variance_that_is_stated(level: float) -> None:
    """Shot times signal plus read; where it is smoothed, its deviation is 1.3 times lower."""
    shot, read = 2e-3, 4e-6
    flat = np.full((256, 256, 3), level, np.float32)
    found = sorted(
        {
            round(float(blur.noisy(flat, random(seed), shot, read).var()) / (shot * level + read), 2)
            for seed in range(12)
        }
    )
    smoothed = [value for value in found if value < 0.8]
    plain = [value for value in found if value >= 0.8]
    assert smoothed == pytest.approx([1 / 1.69] * len(smoothed), rel=0.03)
    assert plain == pytest.approx([1] * len(plain), rel=0.03)
    assert smoothed
    assert plain


def test_noise_grows_with_the_signal_and_keeps_the_mean() -> None:
    half = np.zeros((256, 256, 3), np.float32)
    half[:, 128:] = 0.9
    out = blur.noisy(half, random(1), 1e-3, 1e-8)
    assert out[:, 128:].std() > 20 * out[:, :120].std()
    assert float(out[:, 128:].mean()) == pytest.approx(0.9, abs=1e-3)


def test_jpeg_keeps_the_order_of_the_channels() -> None:
    """JPEG halves the resolution of colour, and weighs green most: swapped channels would show."""
    red = np.zeros((64, 64, 3), np.uint8)
    red[:, ::2, 0] = 255
    mirrored = np.ascontiguousarray(red[..., ::-1])
    error = np.abs(blur._jpeg(red, 90).astype(int) - red).mean()
    expected = cv2.imdecode(
        cv2.imencode(".jpg", mirrored, [cv2.IMWRITE_JPEG_QUALITY, 90])[1], cv2.IMREAD_COLOR
    )[..., ::-1]
    assert np.array_equal(blur._jpeg(red, 90), expected)
    assert 0 < error < 60


# --- the recipe ---------------------------------------------------------------------------------


def test_the_same_numbers_give_the_same_picture() -> None:
    sharp = picture(128)
    for seed in range(15):
        first, recipe = blur.degrade(sharp, random(seed))
        second, again = blur.degrade(sharp.copy(), random(seed))
        assert np.array_equal(first, second)
        assert recipe == again
    different = {blur.degrade(sharp, random(seed), STILL)[0].tobytes() for seed in range(15)}
    assert len(different) == 15


def test_degrading_leaves_the_sharp_picture_alone() -> None:
    sharp = picture(128)
    before = sharp.copy()
    for seed in range(15):
        out, _ = blur.degrade(sharp, random(seed))
        assert out.shape == sharp.shape
        assert out.dtype == np.uint8
        assert np.array_equal(sharp, before)


def test_the_share_of_the_untouched() -> None:
    small = picture(96)
    recipes = [blur.degrade(small, random(seed), blur.Severity(untouched=0.3)) for seed in range(300)]
    untouched = [out for out, recipe in recipes if recipe.kind == "none"]
    assert 65 <= len(untouched) <= 115
    assert all(np.array_equal(out, small) for out in untouched)
    for seed in range(10):
        assert blur.degrade(small, random(seed), blur.Severity(untouched=1.0))[1] == blur.Recipe("none")
        assert blur.degrade(small, random(seed), blur.Severity(untouched=0.0))[1].kind != "none"


@pytest.mark.slow
def test_every_kind_comes_in_its_share() -> None:
    small = picture(96)
    severity = blur.Severity(untouched=0.0)
    recipes = [blur.degrade(small, random(seed), severity)[1] for seed in range(1000, 1800)]
    counts = Counter(recipe.kind for recipe in recipes)
    assert counts.keys() == blur.KINDS.keys()
    for kind, share in blur.KINDS.items():
        assert counts[kind] / len(recipes) == pytest.approx(share, abs=0.05)
    assert sum(blur.KINDS.values()) == pytest.approx(1)
    for found in (
        {recipe.linear for recipe in recipes},
        {recipe.jpeg > 0 for recipe in recipes},
        {recipe.shot > 0 for recipe in recipes},
        {recipe.saturation > 0 for recipe in recipes},
    ):
        assert found == {True, False}
    lengths = [recipe.length for recipe in recipes]
    assert min(lengths) >= 2
    assert max(lengths) <= 26


def test_severity_is_obeyed() -> None:
    small = picture(96)
    severity = blur.Severity(untouched=0.0, shortest=5.0, longest=6.0, noisy=1.0)
    recipes = [blur.degrade(small, random(seed), severity)[1] for seed in range(60)]
    assert all(5 <= recipe.length <= 6 for recipe in recipes)
    assert all(recipe.shot > 0 for recipe in recipes)
    assert 20 <= sum(recipe.jpeg > 0 for recipe in recipes) <= 52


def test_a_recipe_is_written_as_json() -> None:
    _, recipe = blur.degrade(picture(96), random(4), blur.Severity(untouched=0.0))
    assert blur.Recipe(**json.loads(json.dumps(recipe.record()))) == recipe
