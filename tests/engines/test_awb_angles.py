"""Angular errors and colour temperatures, against values worked out by hand or published."""

from __future__ import annotations

import math

import numpy as np
import pytest

from imgtool.engines.awb import angles, temperature

MATRIX = np.array([[0.6, -0.1, -0.08], [-0.4, 1.2, 0.2], [-0.05, 0.15, 0.6]])


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


@pytest.mark.parametrize(
    ("name", "x", "y", "ct", "duv"),
    [
        ("A", 0.44758, 0.40745, 2856, 0.0),
        ("D50", 0.34567, 0.35851, 5003, 0.0032),
        ("D65", 0.31272, 0.32903, 6504, 0.0032),
        ("D75", 0.29902, 0.31485, 7504, 0.0032),
        ("E", 1 / 3, 1 / 3, 5455, -0.0044),
        ("F11", 0.38052, 0.37713, 4000, 0.0002),
        ("C", 0.31006, 0.31616, 6774, -0.0022),
    ],
)
def test_standard_illuminants_have_their_published_temperature(
    name: str, x: float, y: float, ct: float, duv: float
) -> None:
    found = temperature.of_xy(x, y)
    assert found.ct == pytest.approx(ct, abs=4), name
    assert found.duv == pytest.approx(duv, abs=2.5e-4)
    assert found.tint == pytest.approx(3000 * duv, abs=0.8)


@pytest.mark.parametrize("ct", [1800, 2856, 4321, 6504, 15000])
@pytest.mark.parametrize("tint", [-60, 0, 35])
def test_the_white_of_a_light_has_that_light(ct: float, tint: float) -> None:
    r, b = temperature.white_of(ct, tint, MATRIX)
    found = temperature.of_white(r, b, MATRIX)
    assert found is not None
    assert found.ct == pytest.approx(ct, rel=1e-5)
    assert found.tint == pytest.approx(tint, abs=1e-3)


def test_greener_light_has_a_larger_tint_and_duv() -> None:
    r, b = temperature.white_of(5000, 0, MATRIX)
    found = temperature.of_white(r * 0.95, b * 0.95, MATRIX)
    assert found is not None
    assert found.tint > 5
    assert found.duv > 0


def test_a_matrix_is_needed_that_sees_a_light() -> None:
    assert temperature.of_white(0.5, 0.6, None) is None
    assert temperature.of_white(0.5, 0.6, np.zeros((3, 3))) is None
    assert temperature.of_white(0.5, 0.6, -MATRIX) is None


def test_colours_far_off_still_have_a_number() -> None:
    for r, b in ((16, 1 / 16), (1 / 16, 16), (1 / 16, 1 / 16), (16, 16)):
        found = temperature.of_white(r, b, MATRIX)
        assert found is None or np.isfinite(found).all()
