"""Photographs turned into raw frames: the truth is exact, the noise is what was asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from imgtool.engines.isp import bayer, colour, model, unprocess

RECIPE = unprocess.Recipe(
    (1.9, 1.0, 1.6), colour.camera_to_srgb(unprocess.xyz_to_camera("Canon PowerShot G2")), 0.0, 0.0
)


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def picture() -> np.ndarray:
    y, x = np.mgrid[:48, :64]
    return np.stack([40 + 2 * x, 200 - 3 * y, 90 + x + y], 2).astype(np.uint8)


def developed(values: np.ndarray, recipe: unprocess.Recipe) -> np.ndarray:
    packed = torch.from_numpy(unprocess.unit(values, recipe.black, recipe.white))[None]
    net = model.Demosaic("linear")
    fed = model.feed(net, packed, torch.tensor([recipe.gains]), torch.zeros(1, 2))
    rgb = model.photo(net, fed, torch.from_numpy(recipe.matrix).float())
    return (rgb[0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", unprocess.CAMERAS)
def test_the_truth_is_the_photograph(name: str) -> None:
    recipe = replace(RECIPE, matrix=colour.camera_to_srgb(unprocess.xyz_to_camera(name)))
    _, truth = unprocess.frame(picture(), recipe, rng())
    assert np.abs(truth.astype(int) - picture()).max() <= 1


def test_the_front_end_undoes_it() -> None:
    values, truth = unprocess.frame(picture(), RECIPE, rng())
    assert np.abs(developed(values, RECIPE) - truth)[2:-2, 2:-2].max() < 2.5  # 12 bits, smooth


def test_overexposed_highlights_are_white_in_frame_and_truth() -> None:
    bright = np.full((16, 16, 3), (250, 240, 230), np.uint8)
    recipe = replace(RECIPE, exposure=4.0)
    values, truth = unprocess.frame(bright, recipe, rng())
    assert truth.min() == 255
    assert developed(values, recipe)[2:-2, 2:-2].min() > 254
    assert values.max() == recipe.white


@pytest.mark.parametrize("shot", [1e-4, 1e-2])
def test_noise_has_the_variance_that_was_asked_for(shot: float) -> None:
    recipe = replace(RECIPE, shot=shot, read=1e-4, bits=14, black=2048)
    values = unprocess.noisy(np.full((400, 400), 0.3, np.float32), recipe, rng())
    signal = (values.astype(float) - recipe.black) / (recipe.white - recipe.black)
    assert signal.mean() == pytest.approx(0.3, abs=1e-3)
    assert signal.var() == pytest.approx(0.3 * shot + 1e-4, rel=0.02)


def test_rounding_is_expected_too() -> None:
    recipe = replace(RECIPE, bits=10, black=64)
    ramp = np.linspace(0.1, 0.9, 100_000, dtype=np.float32).reshape(100, 1000)
    values = unprocess.noisy(ramp, recipe, rng())
    error = (values.astype(float) - recipe.black) / (recipe.white - recipe.black) - ramp
    assert error.var() == pytest.approx(unprocess.expected(recipe)[1], rel=0.02)


def test_black_noise_is_not_cut_off() -> None:
    recipe = replace(RECIPE, read=1e-4)
    values = unprocess.noisy(np.zeros((100, 100), np.float32), recipe, rng())
    packed = unprocess.unit(values, recipe.black, recipe.white)
    assert packed.min() < -0.02
    assert abs(float(packed.mean())) < 1e-3


def test_typical_read_noise_is_that_of_the_published_line() -> None:
    assert unprocess.typical_read(0) == 0
    assert unprocess.typical_read(1e-2) == pytest.approx(1.45e-4, rel=0.02)
    assert unprocess.typical_read(1e-4) == pytest.approx(3.06e-7, rel=0.02)


def test_recipes_are_drawn_over_the_whole_range() -> None:
    source = rng()
    recipes = [unprocess.draw(source, 1e-4, 1e-2, 0.2) for _ in range(300)]
    shots = [recipe.shot for recipe in recipes if recipe.shot]
    assert min(shots) >= 1e-4
    assert max(shots) <= 1e-2
    assert 0.1 < 1 - len(shots) / 300 < 0.3
    assert all(min(recipe.gains) == 1 for recipe in recipes)
    assert {recipe.bits for recipe in recipes} == {10, 12, 14}
    assert all(recipe.matrix.sum(1) == pytest.approx([1, 1, 1]) for recipe in recipes)


def test_mosaic_keeps_each_places_colour() -> None:
    planes = np.stack([np.full((4, 4), value, np.float32) for value in (1, 2, 3)], 2)
    assert bayer.pack(unprocess.mosaic_of(planes))[:, 0, 0].tolist() == [1, 2, 2, 3]


def test_whole_numbers_are_the_nearest() -> None:
    recipe = replace(RECIPE, bits=10, black=64)
    ramp = np.linspace(0.1, 0.9, 100_000, dtype=np.float32).reshape(100, 1000)
    error = unprocess.noisy(ramp, recipe, rng()).astype(float) - 64 - ramp * (1023 - 64)
    assert abs(error.mean()) < 0.02


def test_a_colour_that_clips_in_part_clips_in_the_truth_too() -> None:
    recipe = replace(RECIPE, exposure=4.0)
    values, truth = unprocess.frame(np.full((16, 16, 3), (250, 90, 60), np.uint8), recipe, rng())
    assert np.abs(developed(values, recipe) - truth)[2:-2, 2:-2].max() < 2.5
