"""The curve of white points: evaluated, inverted, made from a matrix, drawn through data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dng
import numpy as np
import numpy.typing as npt
import pytest

from imgtool.engines.awb import mosaic
from imgtool.engines.awb.camera import GENERIC, GENERIC_LOCUS, Camera, Locus, chromaticity
from imgtool.errors import ImgtoolError

Array = npt.NDArray[Any]

POINTS = np.array([[3000, 0.75, 0.32], [4000, 0.58, 0.48], [5000, 0.50, 0.56], [7500, 0.40, 0.68]])
LOCUS = Locus(*POINTS.T)
SRGB = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])


def test_the_curve_goes_straight_between_its_points_and_on_beyond_them() -> None:
    np.testing.assert_allclose(LOCUS.at(POINTS[:, 0]), POINTS[:, 1:])
    np.testing.assert_allclose(LOCUS.at(3500.0), [0.665, 0.40])
    np.testing.assert_allclose(LOCUS.at(2900.0), [0.767, 0.304])
    np.testing.assert_allclose(LOCUS.at(8000.0), [0.38, 0.704])
    assert LOCUS.at(np.full((2, 3), 4000.0)).shape == (2, 3, 2)


def test_the_curve_never_reaches_nothing() -> None:
    assert (LOCUS.at(np.array([100.0, 1000, 30000, 1e6])) > 0).all()


@pytest.mark.parametrize(
    ("ct", "off"), [(2800.0, 0.02), (3456, -0.03), (4200, -1e-9), (5600, 0.02), (7400, -0.03), (8000, -1e-9)]
)
def test_nearest_finds_the_temperature_and_the_signed_distance(ct: float, off: float) -> None:
    low, high = LOCUS.at(ct - 1e-3), LOCUS.at(ct + 1e-3)
    along = (high - low) / np.linalg.norm(high - low)
    r, b = LOCUS.at(ct) + off * np.array([along[1], -along[0]])
    found, distance = LOCUS.nearest(r, b)
    assert found == pytest.approx(ct, rel=2e-3)
    assert distance == pytest.approx(off, rel=1e-3)


def test_nearest_is_the_nearest_of_many_points_on_the_curve() -> None:
    many = np.linspace(2700, 8600, 5901)
    whites = LOCUS.at(many)
    for r, b in np.random.default_rng(0).uniform(0.2, 0.9, (20, 2)):
        distances = np.hypot(*(whites - [r, b]).T)
        ct, distance = LOCUS.nearest(r, b)
        assert abs(distance) <= distances.min() + 1e-6
        if 2700 < ct < 8600:
            assert abs(distance) == pytest.approx(distances.min(), abs=1e-5)
        assert np.hypot(*(LOCUS.at(ct) - [r, b])) == pytest.approx(abs(distance), abs=1e-9)


def test_distance_is_an_angle() -> None:
    assert LOCUS.distance(*LOCUS.at(4321.0)) == pytest.approx(0, abs=1e-9)
    r, b = LOCUS.at(5000.0) * 1.1
    near = np.insert(LOCUS.at(LOCUS.nearest(r, b)[0]), 1, 1)
    point = np.array([r, 1, b])
    cosine = near @ point / np.linalg.norm(near) / np.linalg.norm(point)
    assert LOCUS.distance(r, b) == pytest.approx(np.degrees(np.arccos(cosine)), rel=1e-6)


def test_the_flat_list_is_that_of_libcamera() -> None:
    assert LOCUS.ct_curve() == POINTS.ravel().tolist()


@pytest.mark.parametrize(
    "numbers",
    [
        POINTS[:1],
        POINTS[::-1],
        POINTS * [1, -1, 1],
        POINTS * [1, 1, 0],
        np.where(POINTS == 0.5, np.nan, POINTS),
        POINTS[[0, 0, 1]],
    ],
)
def test_what_is_no_curve_is_refused(numbers: Array) -> None:
    with pytest.raises(ValueError, match="curve of white points"):
        Locus(*numbers.T)


@pytest.mark.parametrize(
    ("ct", "x", "y", "near"),
    [
        (2000, 0.5267, 0.4133, 3e-4),
        (2856, 0.4476, 0.4074, 6e-4),
        (3500, 0.4053, 0.3907, 3e-4),
        (5003, 0.3457, 0.3585, 3e-4),
        (6504, 0.3127, 0.3290, 2e-4),
        (7504, 0.2990, 0.3149, 1e-4),
        (10000, 0.2788, 0.2919, 3e-4),
    ],
)
def test_lights_have_their_published_chromaticities(ct: float, x: float, y: float, near: float) -> None:
    found = chromaticity(ct)
    assert float(found[0]) == pytest.approx(x, abs=near)
    assert float(found[1]) == pytest.approx(y, abs=near)


def test_lights_blend_without_a_step() -> None:
    ct = np.arange(1700.0, 24000.0, 10.0)
    for values in chromaticity(ct):
        assert np.abs(np.diff(values)).max() < 1.5e-3


def test_the_curve_of_a_matrix_has_its_white_at_d65() -> None:
    locus = Locus.of_matrix(SRGB)
    np.testing.assert_allclose(locus.at(6504.0), [1, 1], atol=0.02)
    np.testing.assert_allclose(Locus.of_matrix(SRGB * 7).at(4000.0), locus.at(4000.0))
    # The white of a light is the matrix times its colour, light by light.
    for ct in (3000, 6000, 12000):
        x, y = chromaticity(ct)
        red, green, blue = SRGB @ np.array([x, y, 1 - x - y])
        np.testing.assert_allclose(locus.at(ct), [red / green, blue / green], rtol=5e-3)
    assert (np.diff(locus.r) < 0).all()
    assert (np.diff(locus.b) > 0).all()
    assert (locus.ct[0], locus.ct[-1]) == pytest.approx((2000, 12000))


def test_a_matrix_that_sees_no_blue_in_lamps_has_a_shorter_curve() -> None:
    locus = Locus.of_matrix(SRGB - np.array([[0, 0, 0], [0, 0, 0], [0.1, 0.1, 0]]))
    assert locus.ct[0] > 2000
    assert (locus.b > 0).all()


@pytest.mark.parametrize("matrix", [np.zeros((3, 3)), np.diag([1.0, -1, 1]), np.full((3, 3), np.nan)])
def test_a_matrix_that_sees_no_light_is_a_clear_error(matrix: Array) -> None:
    with pytest.raises(ImgtoolError, match="colour matrix"):
        Locus.of_matrix(matrix)


WARM = SRGB * [[1.1], [1.0], [0.7]] + np.array([[0.05, 0, 0], [0, 0.02, 0], [0, 0, 0.03]])
TWO = ((2850.0, WARM), (6500.0, SRGB))


def between(ct: float, warm: Array = WARM, cool: Array = SRGB) -> Array:
    share = (1 / ct - 1 / 6500) / (1 / 2850 - 1 / 6500)
    return np.asarray(share * warm + (1 - share) * cool)


def white(matrix: Array, ct: float) -> Array:
    x, y = chromaticity(ct)
    red, green, blue = matrix @ np.array([x, y, 1 - x - y])
    return np.array([red / green, blue / green])


def near(found: Array | None, expected: Array, most: float = 1e-4) -> None:
    assert found is not None
    np.testing.assert_allclose(found, expected, atol=most)


def test_between_two_lights_the_matrix_is_linear_in_one_over_the_temperature() -> None:
    for matrices in (TWO, TWO[::-1]):
        camera = Camera("c", xyz_to_camera=SRGB, matrices=matrices)
        for ct, expected in ((2000, WARM), (2850, WARM), (4000, between(4000)), (6500, SRGB), (9000, SRGB)):
            near(camera.matrix(ct), expected, 1e-12)
    assert Camera("c", xyz_to_camera=SRGB).matrix(3000) is SRGB
    assert GENERIC.matrix(3000) is None


def test_the_curve_of_two_matrices_has_each_light_by_its_own() -> None:
    locus = Locus.of_matrices(TWO)
    for ct, matrix in ((2500, WARM), (4000, between(4000)), (9000, SRGB)):
        np.testing.assert_allclose(locus.at(ct), white(matrix, ct), rtol=5e-3)


def dual(path: Path, first: int, second: int, *more: tuple[int, int, Any]) -> Path:
    """A DNG with ``WARM`` for one light, and half of ``SRGB`` for another."""
    warm, cool = WARM.ravel().tolist(), (SRGB / 2).ravel().tolist()
    tags = [(50721, 10, warm), (50722, 10, cool), (50778, 3, [first]), (50779, 3, [second]), *more]
    return dng.write(path, np.full((32, 48), 900, np.uint16), more=tags)


def test_a_dng_for_two_lights_has_a_matrix_between_them(tmp_path: Path) -> None:
    found = mosaic.read(dual(tmp_path / "a.dng", 17, 21, (50727, 5, [1.1, 1.0, 0.9])))
    assert found.about["size"] == [32, 48]
    camera, gains = found.camera, np.diag([1.1, 1.0, 0.9])
    near(camera.xyz_to_camera, gains @ SRGB / 2)
    # Each has its own scale in the file: their largest part of white under D50 is made 1.
    scaled = [gains @ matrix / (matrix @ [0.96422, 1, 0.82521]).max() for matrix in (WARM, SRGB)]
    near(camera.matrix(4000), between(4000, *scaled), 2e-4)
    for ct, matrix in ((2500, scaled[0]), (4000, between(4000, *scaled)), (9000, scaled[1])):
        np.testing.assert_allclose(camera.locus.at(ct), white(matrix, ct), rtol=5e-3)


def test_without_two_known_lights_one_matrix_serves(tmp_path: Path) -> None:
    for first, second in ((17, 0), (255, 21), (21, 21)):
        camera = mosaic.decode(dual(tmp_path / "a.dng", first, second)).camera
        near(camera.xyz_to_camera, SRGB / 2)
        assert camera.matrices == ()
    camera = mosaic.decode(dual(tmp_path / "a.dng", 21, 255)).camera
    near(camera.xyz_to_camera, WARM)


def test_the_lights_of_a_dng_may_come_in_any_order(tmp_path: Path) -> None:
    camera = mosaic.decode(dual(tmp_path / "a.dng", 20, 17)).camera
    near(camera.xyz_to_camera, WARM)
    assert sorted(kelvin for kelvin, _ in camera.matrices) == [2850, 5500]


@pytest.mark.parametrize("absurd", [np.zeros((3, 3)), -SRGB, np.full((3, 3), np.nan), np.diag([1.0, -1, 1])])
def test_an_absurd_matrix_leaves_what_else_is_known(absurd: Array) -> None:
    one = mosaic.camera_of("c", SRGB, ((2850.0, absurd), (6500.0, absurd)))
    assert (one.known, one.matrices) == (True, ())
    np.testing.assert_allclose(one.locus.at(4000.0), Locus.of_matrix(SRGB).at(4000.0))
    none = mosaic.camera_of("c", absurd, ((2850.0, absurd), (6500.0, absurd)))
    assert (none.name, none.known, none.xyz_to_camera, none.matrices) == ("c", False, None, ())


def lights(count: int, noise: float, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    ct = 1e6 / rng.uniform(1e6 / 7500, 1e6 / 3000, count)
    return np.asarray(GENERIC_LOCUS.at(ct) * np.exp(rng.normal(0, noise, (count, 2))))


def apart(locus: Locus, low: float = 3300, high: float = 7000) -> float:
    return max(abs(locus.nearest(*GENERIC_LOCUS.at(ct))[1]) for ct in np.linspace(low, high, 30))


def test_a_curve_is_drawn_through_white_points_despite_outliers() -> None:
    points = lights(300, 0.02)
    points[::12] *= [1.8, 1.7]
    locus = Locus.fit(points, GENERIC_LOCUS)
    assert apart(locus) < 0.006
    assert (np.diff(locus.r) < 0).all()
    assert (np.diff(locus.b) > 0).all()
    for ct in (3500, 5000, 6500):
        np.testing.assert_allclose(locus.at(ct), GENERIC_LOCUS.at(ct), rtol=0.02)


def test_without_a_reference_temperatures_are_nominal_but_in_order() -> None:
    points = lights(300, 0.01) * [0.7, 1.3]
    locus = Locus.fit(points)
    assert 3000 < locus.ct[len(locus.ct) // 2] < 5500
    for ct in np.linspace(3300, 7000, 9):
        assert abs(locus.nearest(*(GENERIC_LOCUS.at(ct) * [0.7, 1.3]))[1]) < 0.006


def test_few_or_wild_points_still_make_a_curve() -> None:
    for points in (
        lights(2, 0.0),
        lights(9, 0.1),
        np.random.default_rng(0).uniform(0.1, 2, (200, 2)),
        np.concatenate([lights(40, 0.02), [[np.nan, 1], [0, 1], [-1, 2]]]),
    ):
        locus = Locus.fit(points)
        assert (np.diff(locus.r) < 0).all()
        assert (np.diff(locus.b) > 0).all()


@pytest.mark.parametrize("points", [np.zeros((0, 2)), np.ones((9, 2)), [[0.5, 0.6]], np.full((5, 2), np.nan)])
def test_a_curve_through_one_light_is_a_clear_error(points: Array) -> None:
    with pytest.raises(ImgtoolError, match="one colour"):
        Locus.fit(points)


def test_the_generic_camera_is_not_known() -> None:
    assert not GENERIC.known
    assert GENERIC.locus is GENERIC_LOCUS
    assert (np.diff(GENERIC_LOCUS.r) < 0).all()
    assert (np.diff(GENERIC_LOCUS.b) > 0).all()
