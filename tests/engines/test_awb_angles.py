"""Angular errors and colour temperatures, against values worked out by hand or published."""

from __future__ import annotations

import math

import numpy as np
import pytest

from imgtool.engines.awb import angles, temperature
from imgtool.engines.awb.camera import Camera

MATRIX = np.array([[0.6, -0.1, -0.08], [-0.4, 1.2, 0.2], [-0.05, 0.15, 0.6]])
WARM = np.array([[0.75, -0.15, -0.1], [-0.35, 1.15, 0.25], [0.0, 0.05, 0.5]])
PLAIN = Camera("one", xyz_to_camera=MATRIX)
DUAL = Camera("two", xyz_to_camera=MATRIX, matrices=((2850.0, WARM), (6500.0, MATRIX)))
STANDARD = [
    ("A", 0.44758, 0.40745, 2856, 0.0),
    ("D50", 0.34567, 0.35851, 5003, 0.0032),
    ("D65", 0.31272, 0.32903, 6504, 0.0032),
    ("D75", 0.29902, 0.31485, 7504, 0.0032),
    ("E", 1 / 3, 1 / 3, 5455, -0.0044),
    ("F11", 0.38052, 0.37713, 4000, 0.0002),
    ("C", 0.31006, 0.31616, 6774, -0.0022),
]
"""Illuminants: CIE 1931 x and y, correlated colour temperature, Duv."""


def seen(matrix: np.ndarray, x: float, y: float) -> tuple[float, float]:
    """White points: R/G and B/G of a light of these chromaticities."""
    red, green, blue = matrix @ np.array([x, y, 1 - x - y])
    return red / green, blue / green


def test_recovery_is_the_angle_between_two_colours() -> None:
    found = angles.recovery(
        np.array([[1, 0, 0], [1, 1, 0], [2, 2, 2]]), np.array([[0, 1, 0], [1, 0, 0], [1, 1, 1]])
    )
    np.testing.assert_allclose(found, [90, 45, 0], atol=1e-12)


def test_two_numbers_are_red_and_blue_over_green() -> None:
    pairs, colours = np.array([[0.4, 0.7], [0.5, 0.5]]), np.array([[0.4, 1, 0.7], [1, 2, 1]])
    truth = np.array([[0.45, 0.6], [0.3, 0.8]])
    np.testing.assert_allclose(angles.recovery(pairs, truth), angles.recovery(colours, truth))
    assert angles.recovery(np.array([0.4, 0.7]), np.array([0.4, 0.7])) == pytest.approx([0])
    assert (angles.recovery(pairs, truth) > 1).all()


def test_small_angles_are_exact() -> None:
    tiny = 1e-7
    found = angles.recovery(np.array([[1, 1, 1 + tiny]]), np.array([[1.0, 1, 1]]))
    assert found[0] == pytest.approx(math.degrees(tiny * math.sqrt(2) / 3), rel=1e-5)


def test_reproduction_is_of_truth_over_estimate() -> None:
    estimated, truth = np.array([[0.5, 1, 1]]), np.array([[1.0, 1, 1]])
    expected = math.degrees(math.acos(4 / (math.sqrt(6) * math.sqrt(3))))
    assert angles.reproduction(estimated, truth)[0] == pytest.approx(expected)
    swapped = math.degrees(math.acos(2.5 / (math.sqrt(2.25) * math.sqrt(3))))
    assert angles.reproduction(truth, estimated)[0] == pytest.approx(swapped)
    assert expected != pytest.approx(swapped, abs=0.1)


def test_reproduction_does_not_depend_on_the_light_but_recovery_does() -> None:
    estimated, truth, light = np.array([[0.9, 1, 1.2]]), np.array([[1.0, 1, 1]]), np.array([[0.4, 1, 0.6]])
    one, two = angles.reproduction(estimated, truth), angles.reproduction(estimated * light, truth * light)
    np.testing.assert_allclose(one, two)
    one, two = angles.recovery(estimated, truth), angles.recovery(estimated * light, truth * light)
    assert abs(one - two)[0] > 0.5


def test_the_summary_of_known_errors() -> None:
    errors = np.array([12.0, 1, 2, 3, 4, 5, 6, 7])
    found = angles.summary(errors)
    assert found["count"] == 8
    assert found["mean"] == 5
    assert found["median"] == 4.5
    assert found["trimean"] == pytest.approx((2.75 + 9 + 6.25) / 4)
    assert (found["best25"], found["worst25"], found["max"]) == (1.5, 9.5, 12)
    assert (found["over3"], found["over5"], found["over10"]) == (5 / 8, 3 / 8, 1 / 8)
    assert found["p95"] == pytest.approx(7 + 0.65 * 5)
    assert found["p99"] == pytest.approx(7 + 0.93 * 5)


def test_the_interval_of_the_mean_is_that_of_normal_theory_and_repeats() -> None:
    errors = np.random.default_rng(3).normal(5, 1, 400)
    low, high = angles.summary(errors)["mean_ci"]  # type: ignore[misc]
    half = 1.96 * errors.std() / 20
    assert low == pytest.approx(errors.mean() - half, abs=0.015)
    assert high == pytest.approx(errors.mean() + half, abs=0.015)
    assert angles.summary(errors)["mean_ci"] == [low, high]


def test_one_error_has_a_summary() -> None:
    found = angles.summary(np.array([2.5]))
    assert found["mean"] == found["worst25"] == found["best25"] == found["trimean"] == 2.5
    assert found["mean_ci"] == [2.5, 2.5]


@pytest.mark.parametrize(("name", "x", "y", "ct", "duv"), STANDARD)
def test_standard_illuminants_have_their_published_temperature(
    name: str, x: float, y: float, ct: float, duv: float
) -> None:
    share = float(np.clip((1e6 / ct - 1e6 / 6500) / (1e6 / 2850 - 1e6 / 6500), 0, 1))
    between = share * WARM + (1 - share) * MATRIX  # linear in mired, and no farther than the two lights
    for found in (
        temperature.of_xy(x, y),
        temperature.of_white(*seen(MATRIX, x, y), PLAIN),
        temperature.of_white(*seen(between, x, y), DUAL),
    ):
        assert found is not None, name
        assert found.ct == pytest.approx(ct, abs=4), name
        assert found.duv == pytest.approx(duv, abs=2.5e-4)
        assert found.tint == pytest.approx(3000 * duv, abs=0.8)


def test_the_warm_matrix_matters_in_warm_light() -> None:
    r, b = seen(WARM, *STANDARD[0][1:3])
    plain = temperature.of_white(r, b, PLAIN)
    assert plain is not None
    assert abs(plain.ct - 2856) > 150


def test_matrices_that_call_for_each_other_have_a_light_all_the_same() -> None:
    # Under the matrix for lamps this white is daylight, under that for daylight it is a lamp's.
    swap = Camera("c", matrices=((2850.0, np.diag([0.5, 1, 2.0]) @ MATRIX), (6500.0, MATRIX)))
    for ct, matrix in swap.matrices:
        for _, x, y, _, _ in STANDARD:
            found = temperature.of_white(*seen(matrix, x, y), swap)
            assert found is None or np.isfinite(found).all(), ct


def test_greener_light_has_a_larger_tint_and_duv() -> None:
    r, b = seen(MATRIX, 0.34567, 0.35851)
    found = temperature.of_white(r * 0.95, b * 0.95, PLAIN)
    assert found is not None
    assert found.tint > 15
    assert found.duv > 0.005


def test_a_matrix_is_needed_that_sees_a_light() -> None:
    for matrix in (None, np.zeros((3, 3)), -MATRIX):
        assert temperature.of_white(0.5, 0.6, Camera("c", xyz_to_camera=matrix)) is None
    opposed = ((2850.0, -MATRIX), (6500.0, MATRIX))  # somewhere between them there is nothing
    found = temperature.of_white(0.5, 0.6, Camera("c", matrices=opposed))
    assert found is None or np.isfinite(found).all()


def test_colours_far_off_still_have_a_number() -> None:
    for r, b in ((16, 1 / 16), (1 / 16, 16), (1 / 16, 1 / 16), (16, 16)):
        for camera in (PLAIN, DUAL):
            found = temperature.of_white(r, b, camera)
            assert found is None or np.isfinite(found).all()
