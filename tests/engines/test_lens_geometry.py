"""The lens model: its formulas beside OpenCV's, inverse, turns, folds and zooms; undistortion in torch."""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imgtool.engines.lens import geometry, undistort
from imgtool.engines.lens.geometry import BrownConrady

Array = npt.NDArray[Any]

BARREL = BrownConrady(-0.11, 0.04, 0.002, -0.003)
PINCUSHION = BrownConrady(0.06, -0.01, -0.001, 0.002, 0.004, 0.01, -0.02)
STRONG = BrownConrady(-0.25, 0.06)
MODELS = [BARREL, PINCUSHION, STRONG]

models = st.builds(
    BrownConrady,
    k1=st.floats(-0.2, 0.15), k2=st.floats(-0.05, 0.08), p1=st.floats(-0.005, 0.005),
    p2=st.floats(-0.005, 0.005), k3=st.floats(-0.01, 0.01), cx=st.floats(-0.05, 0.05),
    cy=st.floats(-0.05, 0.05),
).filter(lambda model: not model.folds())  # fmt: skip


def opencv_maps(model: BrownConrady, width: int, height: int) -> tuple[Array, Array]:
    """Return OpenCV's look-up, with a camera of f = half of the diagonal."""
    unit = math.hypot(width, height) / 2
    centre = (width - 1) / 2 + model.cx * unit, (height - 1) / 2 + model.cy * unit
    matrix = np.array([[unit, 0, centre[0]], [0, unit, centre[1]], [0, 0, 1]])
    values = np.array([model.k1, model.k2, model.p1, model.p2, model.k3])
    return cv2.initUndistortRectifyMap(matrix, values, None, matrix, (width, height), cv2.CV_32FC1)


def picture(width: int, height: int, seed: int = 0) -> Array:
    """Return a smooth colour picture, 0..255 float32."""
    tones = np.random.default_rng(seed).uniform(20, 235, (6, 8, 3))
    return np.clip(cv2.resize(tones, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255).astype(
        np.float32
    )


def tensor(image: Array) -> torch.Tensor:
    return torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1).unsqueeze(0)


def row(model: BrownConrady, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([astuple(model)[:5]], dtype=dtype)


# --- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [(301, 200), (150, 260)])
def test_distort_is_what_opencv_looks_up(model: BrownConrady, size: tuple[int, int]) -> None:
    width, height = size
    x, y = geometry.normalise(*np.meshgrid(np.arange(width), np.arange(height)), width, height)
    found = geometry.pixels(*model.distort(x, y), width, height)
    wanted = opencv_maps(model, width, height)
    assert np.abs(found[0] - wanted[0]).max() < 1e-3
    assert np.abs(found[1] - wanted[1]).max() < 1e-3


@given(models)
def test_undistort_inverts_distort(model: BrownConrady) -> None:
    x, y = geometry.grid(300, 200, part=1.0)
    back = model.undistort(*model.distort(x, y), steps=20)
    assert np.abs(back[0] - x).max() < 1e-7
    assert np.abs(back[1] - y).max() < 1e-7


def test_three_newton_steps_are_enough_for_a_photo() -> None:
    x, y = geometry.grid(6000, 4000, part=1.0)
    back = BARREL.undistort(*BARREL.distort(x, y), steps=3)
    assert np.hypot(back[0] - x, back[1] - y).max() * math.hypot(6000, 4000) / 2 < 0.001


def test_the_inverse_takes_tensors_too() -> None:
    x, y = geometry.grid(300, 200)
    found = BARREL.undistort(torch.from_numpy(x), torch.from_numpy(y))
    wanted = BARREL.undistort(x, y)
    assert np.abs(found[0].numpy() - wanted[0]).max() < 1e-12
    assert np.abs(found[1].numpy() - wanted[1]).max() < 1e-12


@pytest.mark.parametrize("model", MODELS)
def test_the_jacobian_is_the_derivative(model: BrownConrady) -> None:
    x, y = geometry.grid(300, 200)
    step = 1e-6
    right, left = model.distort(x + step, y), model.distort(x - step, y)
    below, above = model.distort(x, y + step), model.distort(x, y - step)
    xx, xy, yy, det = model.jacobian(x, y)
    assert np.abs((right[0] - left[0]) / (2 * step) - xx).max() < 1e-8
    assert np.abs((right[1] - left[1]) / (2 * step) - xy).max() < 1e-8
    assert np.abs((below[0] - above[0]) / (2 * step) - xy).max() < 1e-8
    assert np.abs((below[1] - above[1]) / (2 * step) - yy).max() < 1e-8
    assert np.allclose(det, xx * yy - xy * xy)


def test_the_corner_moves_by_the_sum_of_the_coefficients() -> None:
    half_width, half_height = geometry.half_size(640, 480)
    xd, yd = BrownConrady(-0.1, 0.03, k3=0.01).distort(half_width, half_height)
    assert math.hypot(half_width, half_height) == pytest.approx(1)
    assert math.hypot(xd, yd) == pytest.approx(0.94)
    assert BrownConrady(-0.1, 0.03, k3=0.01).corner == pytest.approx(-0.06)


# --- turns and mirrors ----------------------------------------------------------------------------


def straightened(photo: Array, model: BrownConrady) -> Array:
    height, width = photo.shape[:2]
    return cv2.remap(photo, *opencv_maps(model, width, height), cv2.INTER_LINEAR)


@pytest.mark.parametrize("quarters", [1, 2, 3, -1, 4])
def test_a_turned_photo_is_straightened_by_the_turned_model(quarters: int) -> None:
    photo = picture(121, 80)
    model = BrownConrady(-0.1, 0.03, 0.02, -0.03, 0.0, 0.04, -0.02)
    wanted = np.rot90(straightened(photo, model), quarters)
    found = straightened(np.ascontiguousarray(np.rot90(photo, quarters)), model.turned(quarters))
    assert np.abs(found - wanted).max() < 0.1
    if quarters % 4:
        wrong = straightened(np.ascontiguousarray(np.rot90(photo, quarters)), model)
        assert np.abs(wrong - wanted).max() > 5


def test_a_mirrored_photo_is_straightened_by_the_mirrored_model() -> None:
    photo = picture(121, 80)
    model = BrownConrady(-0.1, 0.03, 0.02, -0.03, 0.0, 0.04, -0.02)
    wanted = straightened(photo, model)[:, ::-1]
    found = straightened(np.ascontiguousarray(photo[:, ::-1]), model.mirrored())
    assert np.abs(found - wanted).max() < 0.1


def test_strength_scales_the_displacement() -> None:
    x, y = geometry.grid(300, 200)
    whole, half = PINCUSHION.distort(x, y), PINCUSHION.scaled(0.5).distort(x, y)
    assert np.allclose(half[0] - x, (whole[0] - x) / 2)
    assert np.allclose(half[1] - y, (whole[1] - y) / 2)


# --- folds ----------------------------------------------------------------------------------------


def test_a_cubic_folds_where_its_slope_ends() -> None:
    # 1 + 3 k1 r^2 = 0.05 at r = sqrt(0.95 / 1.2) for k1 = -0.4
    model = BrownConrady(-0.4)
    assert model.reach() == pytest.approx(math.sqrt(0.95 / 1.2), abs=0.005)
    assert model.folds()
    assert not BrownConrady(-0.3).folds()
    assert BrownConrady().reach() == geometry.FARTHEST


@given(st.floats(-1, 1), st.floats(-0.5, 0.5), st.floats(-0.1, 0.1), st.floats(-0.1, 0.1))
def test_a_clamped_model_has_a_positive_determinant_everywhere(
    k1: float, k2: float, p1: float, p2: float
) -> None:
    model = BrownConrady(k1, k2, p1, p2).clamped()
    x, y = geometry.grid(300, 200, 61, 41, part=1.0)
    assert not model.folds()
    assert model.jacobian(x, y)[3].min() > 0


def test_clamping_keeps_as_much_as_does_not_fold() -> None:
    assert BARREL.clamped() == BARREL
    clamped = BrownConrady(-0.8, 0.1).clamped()
    assert clamped.k2 / clamped.k1 == pytest.approx(-0.125)
    assert clamped.scaled(1.02).folds()


# --- pixels, zooms, errors --------------------------------------------------------------------------


def test_normalised_coordinates_begin_at_the_middle_and_count_half_diagonals() -> None:
    assert geometry.normalise(149.5, 99.5, 300, 200) == (0, 0)
    x, y = geometry.normalise(-0.5, -0.5, 300, 200)
    assert math.hypot(x, y) == pytest.approx(1)
    assert geometry.pixels(x, y, 300, 200) == pytest.approx((-0.5, -0.5))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [(600, 400), (300, 500)])
def test_fill_shows_no_border_and_no_less_than_it_must(model: BrownConrady, size: tuple[int, int]) -> None:
    zoom = geometry.zoom(model, *size, "fill")

    def outside(factor: float) -> float:
        x, y = geometry.normalise(*np.meshgrid(np.arange(size[0]), np.arange(size[1])), *size)
        column, line = geometry.pixels(*model.distort(x / factor, y / factor), *size)
        return max(-column.min(), -line.min(), column.max() - size[0] + 1, line.max() - size[1] + 1)

    assert outside(zoom) < 1e-3
    assert outside(zoom * 0.99) > 0.1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [(600, 400), (300, 500)])
def test_keep_loses_nothing_and_no_more_border_than_it_must(
    model: BrownConrady, size: tuple[int, int]
) -> None:
    zoom = geometry.zoom(model, *size, "keep")
    x, y = geometry.normalise(*np.meshgrid(np.arange(size[0]), np.arange(size[1])), *size)
    straight = model.undistort(x, y, 20)
    column, line = geometry.pixels(straight[0] * zoom, straight[1] * zoom, *size)
    beyond = max(-column.min(), -line.min(), column.max() - size[0] + 1, line.max() - size[1] + 1)
    assert abs(beyond) < 0.02


def test_zooms_of_a_known_barrel() -> None:
    """By hand: along the vertical through the middle nothing moves less than at its ends."""
    model = BrownConrady(-0.1)
    half_height = 399 / math.hypot(600, 400)
    radius = half_height  # keep: the corner decides, fill: the middle of the longer edges
    for _ in range(50):
        radius = half_height / (1 - 0.1 * radius**2)
    assert geometry.zoom(model, 600, 400, "fill") == pytest.approx(half_height / radius, rel=1e-3)
    assert geometry.zoom(model, 600, 400, "same") == 1
    assert geometry.zoom(BrownConrady(cx=0.1), 600, 400, "fill") == 1
    assert geometry.zoom(model, 600, 400, "keep") < geometry.zoom(model, 600, 400, "fill") < 1


def test_keep_refuses_a_model_that_folds_inside_the_photo() -> None:
    with pytest.raises(ValueError, match="folds"):
        geometry.zoom(BrownConrady(-0.6), 600, 400, "keep")


def test_a_similarity_is_no_error() -> None:
    x, y = geometry.grid(300, 200)
    points = x + 1j * y
    moved = (points + 0.1 - 0.3j) * 1.2 * np.exp(0.4j)
    assert geometry.apart(points, moved).max() < 1e-12
    assert geometry.error(BARREL, BARREL, 300, 200) == 0
    assert geometry.error(BrownConrady(), BARREL, 300, 200) > 0.1


def test_error_is_per_cent_of_the_diagonal() -> None:
    """A tangential field alone has the mean distance of its own points, up to a similarity."""
    x, y = geometry.grid(300, 200)
    field = 0.01 * (2 * x * y + 1j * (x * x + 3 * y * y))
    a = np.stack([np.ones_like(x), x + 1j * y], axis=1)
    rest = field - a @ np.linalg.lstsq(a, field, rcond=None)[0]
    # the halves: normalised by half diagonals, told in per cent of whole ones
    assert geometry.error(BrownConrady(), BrownConrady(p1=0.01), 300, 200) == pytest.approx(
        np.abs(rest).mean() * 50, rel=0.02
    )


# --- undistortion in torch --------------------------------------------------------------------------


@pytest.mark.parametrize("model", [BARREL, BrownConrady(0.06, -0.01, -0.001, 0.002, 0.004), STRONG])
@pytest.mark.parametrize("size", [(321, 200), (150, 260)])
def test_undistort_is_what_opencv_remaps(model: BrownConrady, size: tuple[int, int]) -> None:
    photo = picture(*size)
    straight, mask = undistort.undistort(tensor(photo), row(model))
    maps = opencv_maps(model, *size)
    found = straight[0].permute(1, 2, 0).numpy()
    inside = mask[0, 0].numpy() > 0
    wanted = cv2.remap(photo, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    fixed = cv2.remap(
        photo.round().astype(np.uint8), *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    bytewise, _ = undistort.undistort(tensor(photo.round()), row(model))
    assert np.abs(found - wanted)[inside].max() < 0.02
    assert np.abs(bytewise[0].permute(1, 2, 0).numpy().round() - fixed.astype(np.float32))[inside].max() <= 1
    assert (found[~inside] < wanted[~inside] + 0.02).all()


@pytest.mark.parametrize("model", [BARREL, BrownConrady(0.08)])
def test_the_mask_is_one_where_the_look_up_is_inside(model: BrownConrady) -> None:
    x, y = opencv_maps(model, 321, 200)
    _, mask = undistort.undistort(torch.ones(1, 3, 200, 321), row(model))
    margin = np.minimum(np.minimum(x, 320 - x), np.minimum(y, 199 - y))
    assert mask.shape == (1, 1, 200, 321)
    assert (mask[0, 0].numpy()[margin > 0.02] == 1).all()
    assert (mask[0, 0].numpy()[margin < -0.02] == 0).all()
    assert (margin < -0.02).any() == (model.k1 > 0)


def test_nothing_changes_without_distortion() -> None:
    photo = tensor(picture(97, 64))
    straight, mask = undistort.undistort(photo, torch.zeros(1, 4))
    assert (mask == 1).all()
    assert (straight - photo).abs().max() < 0.01


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_thin_pictures_have_finite_coordinates(size: tuple[int, int]) -> None:
    straight, mask = undistort.undistort(torch.ones(1, 3, *size), torch.tensor([[-0.1, 0.02, 0.0, 0.0]]))
    assert straight.isfinite().all()
    assert mask[0, 0, size[0] // 2, size[1] // 2] == 1


def test_zoom_shows_the_straight_picture_larger() -> None:
    grid = undistort.sampling_grid(row(BARREL).repeat(2, 1), 40, 61, torch.tensor([1.0, 1.25]))
    x, y = geometry.normalise(*np.meshgrid(np.arange(61), np.arange(40)), 61, 40)
    for number, zoom in enumerate((1.0, 1.25)):
        column, line = geometry.pixels(*BARREL.distort(x / zoom, y / zoom), 61, 40)
        assert np.abs((grid[number, ..., 0].numpy() + 1) / 2 * 60 - column).max() < 1e-4
        assert np.abs((grid[number, ..., 1].numpy() + 1) / 2 * 39 - line).max() < 1e-4
    assert torch.equal(grid[1], undistort.sampling_grid(row(BARREL), 40, 61, 1.25)[0])


def test_gradients_reach_every_coefficient_and_the_zoom() -> None:
    rng = np.random.default_rng(1)
    coefficients = torch.tensor(rng.uniform(-0.02, 0.02, (2, 5)), dtype=torch.float64, requires_grad=True)
    zoom = torch.tensor([1.0, 1.2], dtype=torch.float64, requires_grad=True)
    points = torch.tensor(rng.uniform(-1, 1, (7, 2)), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c, z: undistort.sampling_grid(c, 5, 6, z), (coefficients, zoom))
    assert torch.autograd.gradcheck(lambda c: undistort.displacement(c, points), (coefficients,))
    images = torch.tensor(rng.uniform(0, 1, (2, 3, 9, 12)), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda i, c: undistort.undistort(i, c, 1.3)[0], (images, coefficients), eps=1e-7
    )


def test_descent_on_pixels_finds_the_coefficients() -> None:
    photo = tensor(picture(96, 64) / 255)
    wanted, _ = undistort.undistort(photo, torch.tensor([[-0.1, 0.03, 0.0, 0.0]]))
    guess = torch.zeros(1, 4, requires_grad=True)
    optimiser = torch.optim.Adam([guess], lr=0.01)
    for _ in range(60):
        straight, mask = undistort.undistort(photo, guess)
        loss = ((straight - wanted).abs() * mask).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert guess[0, :2].sum().item() == pytest.approx(-0.07, abs=0.015)


@pytest.mark.parametrize("value", [1e30, -1e30, float("nan"), float("inf")])
def test_no_coefficient_makes_a_picture_nan(value: float) -> None:
    coefficients = torch.tensor([[value, 0.0, 0.0, 0.0], [0.0, 0.0, value, 0.0]])
    straight, mask = undistort.undistort(torch.ones(2, 3, 8, 12), coefficients)
    assert straight.isfinite().all()
    assert undistort.sampling_grid(coefficients, 8, 12).abs().max() <= undistort.FARTHEST
    assert mask.sum() < mask.numel() / 2


def test_autocast_does_not_coarsen_coordinates() -> None:
    coefficients = row(BARREL)
    wanted = undistort.sampling_grid(coefficients, 300, 400)
    field = undistort.displacement(coefficients, torch.rand(9, 2))
    photo = tensor(picture(400, 300))
    plain, _ = undistort.undistort(photo, coefficients)
    with torch.autocast("cpu", torch.bfloat16):
        # a matrix product comes out in bfloat16 here, as a network's head would
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        found = undistort.sampling_grid(coefficients, 300, 400)
        straight, _ = undistort.undistort(photo, coefficients)
        assert undistort.displacement(coefficients, torch.rand(9, 2)).dtype == field.dtype == torch.float32
        half = undistort.sampling_grid(coefficients.bfloat16(), 300, 400)
    assert torch.equal(found, wanted)
    assert torch.equal(straight, plain)
    assert half.dtype == torch.float32
    exact = undistort.sampling_grid(coefficients.bfloat16().float(), 300, 400)
    assert torch.equal(half, exact)


def test_coordinates_of_a_large_photo_are_exact_to_a_thousandth_of_a_pixel() -> None:
    grid = undistort.sampling_grid(row(BARREL), 90, 6000)
    exact = undistort.sampling_grid(row(BARREL, torch.float64), 90, 6000)
    assert exact.dtype == torch.float64
    assert (grid - exact)[..., 0].abs().max() * 3000 < 1e-3


def test_half_precision_photos_stay_so() -> None:
    straight, mask = undistort.undistort(tensor(picture(60, 40)).half(), row(BARREL))
    assert straight.dtype == mask.dtype == torch.float16


def test_displacement_is_the_models() -> None:
    x, y = geometry.grid(300, 200)
    points = torch.from_numpy(np.stack([x, y], axis=1))
    both = torch.cat([row(BARREL, torch.float64), row(STRONG, torch.float64)])
    found = undistort.displacement(both, points).numpy()
    assert found.shape == (2, len(x), 2)
    for number, model in enumerate((BARREL, STRONG)):
        xd, yd = model.distort(x, y)
        assert np.abs(found[number] - np.stack([xd - x, yd - y], axis=1)).max() < 1e-12


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 6)])
def test_coefficients_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="coefficients are"):
        undistort.sampling_grid(torch.zeros(shape), 4, 4)
