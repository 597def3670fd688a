"""White without training: known answers, and an answer or a clear error for every frame."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from imgtool.engines.awb.camera import GENERIC, GENERIC_LOCUS, Camera
from imgtool.engines.awb.classical import METHODS, snapped
from imgtool.engines.awb.stats import AwbStats
from imgtool.errors import ImgtoolError

Array = npt.NDArray[Any]
LIGHT = np.array([0.45, 1.0, 0.62])


def stats_of(cells: Array, coverage: Array | float = 1.0) -> AwbStats:
    shape = cells.shape[:2]
    return AwbStats(cells.astype(np.float32), np.broadcast_to(np.asarray(coverage, np.float32), shape).copy())


def scene(seed: int = 0, rows: int = 32, columns: int = 48) -> Array:
    """Grey and coloured surfaces in patches of some cells, unevenly lit."""
    rng = np.random.default_rng(seed)
    surfaces = rng.uniform(0.1, 0.9, (rows // 4, columns // 4, 1)) * np.ones(3)
    colour = rng.uniform(0.2, 1, surfaces.shape) / 0.6
    surfaces = np.where(rng.uniform(size=(*surfaces.shape[:2], 1)) < 0.4, surfaces * colour, surfaces)
    patches = surfaces.repeat(4, 0).repeat(4, 1)
    shading = np.linspace(0.5, 1, columns)[None, :, None] * rng.uniform(0.97, 1.03, (rows, columns, 1))
    return np.asarray(patches * shading * LIGHT)


@pytest.mark.parametrize("name", METHODS)
def test_a_grey_scene_has_the_colour_of_its_light(name: str) -> None:
    level = np.random.default_rng(1).uniform(0.05, 0.9, (32, 48, 1))
    assert METHODS[name](stats_of(level * LIGHT)) == pytest.approx((0.45, 0.62), rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_one_colour_is_taken_for_white(name: str) -> None:
    assert METHODS[name](stats_of(np.ones((8, 9, 1)) * LIGHT)) == pytest.approx((0.45, 0.62), rel=1e-4)
    assert METHODS[name](stats_of(LIGHT[None, None])) == pytest.approx((0.45, 0.62), rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_exposure_and_mirroring_change_nothing(name: str) -> None:
    cells = scene()
    found = METHODS[name](stats_of(cells))
    assert METHODS[name](stats_of(cells * 0.07)) == pytest.approx(found, rel=2e-3)
    assert METHODS[name](stats_of(cells[::-1, ::-1])) == pytest.approx(found, rel=2e-3)


@pytest.mark.parametrize("name", METHODS)
def test_another_light_changes_the_white_by_as_much(name: str) -> None:
    cells = scene(2)
    r, b = METHODS[name](stats_of(cells))
    found = METHODS[name](stats_of(cells * [1.6, 1, 0.7]))
    assert found == pytest.approx((1.6 * r, 0.7 * b), rel=0.02)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"white-patch"}))
def test_a_scene_with_grey_in_it_is_nearly_right(name: str) -> None:
    found = np.array(METHODS[name](stats_of(scene(3))))
    assert np.abs(found / LIGHT[::2] - 1).max() < 0.12


def test_the_grayness_index_finds_the_grey_among_colours() -> None:
    cells = scene(4)
    cells[:, :30] *= [1.5, 1.0, 0.5]
    cells[:, :30] *= np.random.default_rng(0).uniform(0.6, 1.4, (32, 30, 3))
    found = np.array(METHODS["grayness-index"](stats_of(cells)))
    assert np.abs(found / LIGHT[::2] - 1).max() < 0.03
    assert np.abs(np.array(METHODS["grey-world"](stats_of(cells))) / LIGHT[::2] - 1).max() > 0.1


def test_the_means_are_those_of_their_formulas() -> None:
    cells = scene(5)
    coverage = np.random.default_rng(0).uniform(0.3, 1, cells.shape[:2]).astype(np.float32)
    stats = stats_of(cells, coverage)
    points, weights = stats.points().astype(np.float64), coverage.ravel()[:, None]
    mean = (points * weights).sum(0)
    assert METHODS["grey-world"](stats) == pytest.approx(tuple(mean[::2] / mean[1]), rel=1e-6)
    power = (points**6 * weights).sum(0) ** (1 / 6)
    assert METHODS["shades-of-grey"](stats) == pytest.approx(tuple(power[::2] / power[1]), rel=1e-6)
    white = np.percentile(points, 99, axis=0)
    assert METHODS["white-patch"](stats) == pytest.approx(tuple(white[::2] / white[1]), rel=1e-6)


def test_grey_edge_is_the_sum_of_steps_after_smoothing() -> None:
    import cv2

    cells = scene(6)
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    weight = cv2.filter2D(np.ones((32, 48)), -1, kernel, borderType=cv2.BORDER_CONSTANT)[..., None]
    smooth = cv2.filter2D(
        cells.astype(np.float32).astype(np.float64), -1, kernel, borderType=cv2.BORDER_CONSTANT
    )
    smooth /= weight
    steps = np.abs(smooth[1:] - smooth[:-1]).sum((0, 1)) + np.abs(smooth[:, 1:] - smooth[:, :-1]).sum((0, 1))
    assert METHODS["grey-edge"](stats_of(cells)) == pytest.approx(tuple(steps[::2] / steps[1]), rel=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_cells_that_do_not_count_change_nothing(name: str) -> None:
    cells = scene(7)
    coverage = np.ones(cells.shape[:2], np.float32)
    coverage[5:9, 7:20] = 0.2
    coverage[20:] = 0
    found = METHODS[name](stats_of(cells, coverage))
    spoilt = cells.copy()
    spoilt[5:9, 7:20] = [0.9, 0.1, 0.1]
    spoilt[20:] = np.nan
    assert METHODS[name](stats_of(spoilt, coverage)) == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_frame_with_a_usable_cell_has_gains_within_bounds(name: str) -> None:
    rng = np.random.default_rng(8)
    frames = [
        np.array([[[1e-9, 1, 1e-9]]]),
        np.array([[[1, 1e-9, 1]], [[1, 1e-9, 1]]]),
        rng.uniform(1e-30, 1e-20, (5, 5, 3)),
        rng.uniform(1e-3, 1e3, (1, 7, 3)) ** 3,
        np.where(rng.uniform(size=(9, 9, 3)) < 0.5, 0, rng.uniform(0, 1, (9, 9, 3))),
    ]
    for cells in frames:
        found = METHODS[name](stats_of(cells))
        assert all(1 / 16 <= ratio <= 16 for ratio in found)


@pytest.mark.parametrize("name", METHODS)
def test_a_frame_without_a_usable_cell_is_a_clear_error(name: str) -> None:
    cells = scene(9)
    for stats in (
        stats_of(cells * 0),
        stats_of(cells, 0.0),
        stats_of(cells * np.nan),
        stats_of(cells * [1, 0, 1]),
        stats_of(-cells),
    ):
        with pytest.raises(ImgtoolError, match="nothing to measure") as caught:
            METHODS[name](stats)
        assert caught.value.hint


def test_snapping_puts_a_point_on_the_curve_of_a_known_camera() -> None:
    known = Camera("c", GENERIC_LOCUS, known=True)
    r, b = GENERIC_LOCUS.at(5000.0)
    assert snapped((r * 1.05, b * 1.05), known) != (r * 1.05, b * 1.05)
    assert abs(GENERIC_LOCUS.nearest(*snapped((r * 1.05, b * 1.05), known))[1]) < 1e-9
    assert snapped((float(r), float(b)), known) == pytest.approx((r, b), rel=1e-9)
    assert snapped((5.0, 0.1), known) == pytest.approx(tuple(GENERIC_LOCUS.at(2000.0)))
    assert snapped((5.0, 0.1), GENERIC) == (5.0, 0.1)


@pytest.mark.parametrize("name", METHODS)
def test_a_call_takes_less_than_a_millisecond(name: str) -> None:
    stats = stats_of(scene(10))
    spent = []
    for _ in range(5):
        start = time.process_time_ns()
        METHODS[name](stats)
        spent.append(time.process_time_ns() - start)
    assert min(spent) < 1e6
