"""The prior of lens distortions: the percentiles that were measured, a density that is one."""

from __future__ import annotations

from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest

from imgtool.engines.lens import prior
from imgtool.engines.lens.geometry import BrownConrady, zoom

Floats = npt.NDArray[np.float64]

KINDS = get_args(prior.Kind)
PERCENTILES = (0.5, 1, 5, 25, 50, 75, 95, 99, 99.5)
MEASURED = {  # of 6,394 rectilinear focal settings; the corner in % of the diagonal
    "k1": (-0.238, -0.207, -0.113, -0.031, 0, 0.023, 0.077, 0.137, 0.162),
    "k2": (-0.109, -0.087, -0.040, -0.005, 0, 0.017, 0.058, 0.101, 0.120),
    "corner": (-7.7, -6.7, -3.5, -1.0, 0.05, 1.0, 2.4, 4.4, 5.7),
}


def drawn(kind: prior.Kind, count: int = 20_000) -> dict[str, Floats]:
    values = prior.draws(np.random.default_rng(5), kind, 0.002, count)
    named = dict(zip(("k1", "k2", "p1", "p2"), values.T, strict=True))
    return named | {"corner": 50 * (named["k1"] + named["k2"])}


@pytest.mark.parametrize("name", MEASURED)
def test_photo_has_the_percentiles_of_real_lenses(name: str) -> None:
    found = np.percentile(drawn("photo")[name], PERCENTILES)
    measured = np.array(MEASURED[name])
    spread = measured[6] - measured[2]  # 5 to 95 %
    assert np.abs(found - measured).max() < 0.32 * spread
    assert np.abs(found - measured)[2:7].max() < 0.1 * spread


def test_photo_is_as_strong_and_as_correlated_as_real_lenses() -> None:
    photo = drawn("photo", 50_000)
    assert np.abs(photo["corner"]).mean() == pytest.approx(1.38, abs=0.15)
    assert np.corrcoef(photo["k1"], photo["k2"])[0, 1] == pytest.approx(-0.81, abs=0.12)
    for limit, share in ((0.25, 0.86), (0.5, 0.73), (1, 0.50), (2.5, 0.13), (5, 0.03)):
        assert (np.abs(photo["corner"]) > limit).mean() == pytest.approx(share, abs=0.06)


def test_wide_lenses_are_barrels_mostly() -> None:
    corner = drawn("wide")["corner"]
    assert np.abs(corner).mean() == pytest.approx(2.26, abs=0.2)
    assert np.median(corner) == pytest.approx(-1.7, abs=0.2)


def test_a_part_of_mixed_is_strong() -> None:
    mixed = drawn("mixed")
    strong = mixed["k1"] < -0.2
    assert strong.mean() == pytest.approx(prior.STRONG * 0.85, abs=0.03)
    assert 0.05 < np.median(mixed["k2"][strong]) < 0.12
    assert np.corrcoef(mixed["k1"][strong], mixed["k2"][strong])[0, 1] < -0.6
    action = np.exp(prior.log_density([-0.41, -0.471, -0.163], [0.127, 0.179, 0.032], "mixed"))
    photo = np.exp(prior.log_density([-0.41, -0.471, -0.163], [0.127, 0.179, 0.032], "photo"))
    assert (action > 3 * photo).all()


def test_p1_and_p2_have_the_spread_asked_for() -> None:
    values = prior.draws(np.random.default_rng(0), "photo", 0.004, 20_000)[:, 2:]
    assert values.std(0) == pytest.approx(0.004, rel=0.05)
    assert not prior.draws(np.random.default_rng(0), "mixed", 0.0, 50)[:, 2:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_no_draw_folds_and_all_reach_the_corners(kind: prior.Kind) -> None:
    rng = np.random.default_rng(1)
    for number in range(300):
        model = prior.draw(rng, kind, 0.01 if number % 2 else 0.0)
        assert not model.folds()
        assert 0.2 < zoom(model, 400, 300, "keep") < 2  # raises where the corners are not reached


def test_draws_follow_from_the_generator() -> None:
    first, again = (prior.draw(np.random.default_rng(7), "mixed", 0.002) for _ in range(2))
    assert first == again
    assert isinstance(first, BrownConrady)
    assert first != prior.draw(np.random.default_rng(8), "mixed", 0.002)
    row = prior.draws(np.random.default_rng(7), "mixed", 0.002, 1)[0]
    assert row.tolist() == [first.k1, first.k2, first.p1, first.p2]


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_is_one(kind: prior.Kind) -> None:
    edge = np.linspace(-2.0, 2.0, 1601)
    k1, k2 = np.meshgrid(edge, edge)
    density = prior.log_density(k1, k2, kind)
    assert density.shape == k1.shape
    assert np.isfinite(density).all()
    assert np.exp(density).sum() * (edge[1] - edge[0]) ** 2 == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_is_that_of_the_draws(kind: prior.Kind) -> None:
    """Counts in squares agree with the density's integral over them."""
    values = drawn(kind, 40_000)
    edges = np.linspace(-0.12, 0.08, 6)
    counts = np.histogram2d(values["k1"], values["k2"], [edges, edges])[0] / 40_000
    fine = np.linspace(-0.12, 0.08, 500, endpoint=False) + 0.0002
    density = np.exp(prior.log_density(*np.meshgrid(fine, fine, indexing="ij"), kind)) * 0.0004**2
    mass = density.reshape(5, 100, 5, 100).sum((1, 3))
    assert np.abs(counts - mass).max() < 0.02
    assert counts.sum() == pytest.approx(mass.sum(), abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_is_smooth(kind: prior.Kind) -> None:
    line = np.linspace(-0.6, 0.6, 12_001)
    for fixed in (-0.1, 0.0, 0.2):
        for values in (prior.log_density(line, np.full_like(line, fixed), kind),
                       prior.log_density(np.full_like(line, fixed), line, kind)):  # fmt: skip
            slope = np.diff(values) / np.diff(line)
            assert np.abs(slope).max() < 400
            assert np.abs(np.diff(slope)).max() < 10  # no kink
