"""Statistics: means of what counts, whatever the size and type of the frame, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from imgtool.engines.awb import stats
from imgtool.errors import ImgtoolError

Array = npt.NDArray[Any]

BLACK, WHITE = 2048, 16383
COLOUR = np.array([0.2, 0.4, 0.3])


def frame_of(linear: Array, black: float = BLACK, white: float = WHITE) -> Array:
    return np.round(black + linear * (white - black)).astype(np.uint16)


def tiles(rows: int = 36, columns: int = 54, edge: int = 12, seed: int = 0) -> tuple[Array, Array]:
    """A frame of squares of one colour each, and their colours."""
    colours = np.random.default_rng(seed).uniform(0.05, 0.9, (rows, columns, 3))
    return colours, colours.repeat(edge, 0).repeat(edge, 1)


def scene(height: int = 216, width: int = 324, seed: int = 0) -> Array:
    """Light of all strengths, brightest in the middle, with texture and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    light = 1.6 * np.exp(-3 * (x**2 + y**2)) + 0.05
    surface = rng.uniform(0.6, 1.0, (height, width, 1)) * np.array([0.6, 1.0, 0.7])
    return light[..., None] * surface + rng.normal(0, 0.003, (height, width, 3))


def angle(found: Array, expected: Array) -> float:
    """Degrees between two colours."""
    cross = np.linalg.norm(np.cross(found, expected))
    return float(np.degrees(np.arctan2(cross, np.dot(found, expected))))


def test_cells_are_the_means_of_squares() -> None:
    colours, linear = tiles()
    found = stats.of_linear(frame_of(linear), BLACK, WHITE)
    assert found.cells.shape == (36, 54, 3)
    assert found.cells.dtype == found.coverage.dtype == np.float32
    np.testing.assert_allclose(found.cells, colours, atol=1e-4)
    assert (found.coverage == 1).all()
    assert (found.black, found.white, found.saturated, found.domain) == (BLACK, WHITE, 0, "raw")


def test_a_frame_smaller_than_the_cells_is_its_own_statistics() -> None:
    linear = np.random.default_rng(0).uniform(0.05, 0.9, (24, 32, 3))
    found = stats.of_linear(frame_of(linear), BLACK, WHITE)
    np.testing.assert_allclose(found.cells, linear, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((1, 1), np.uint8),
        ((1, 7), np.int16),
        ((5000, 1), np.int64),
        ((3, 4000), np.float16),
        ((33, 40), np.float32),
        ((99, 101), np.float64),
        ((431, 647), np.uint16),
        ((99, 101), np.uint8),
    ],
)
def test_any_size_and_type(size: tuple[int, int], dtype: type) -> None:
    levels = np.array([40, 80, 60])
    frame = np.broadcast_to(levels, (*size, 3)).astype(dtype)
    found = stats.of_linear(frame, 0, 200)
    assert found.cells.shape[:2] == found.coverage.shape
    assert min(found.coverage.shape) >= 1
    assert found.coverage.size <= 2 * stats.CELLS
    np.testing.assert_allclose(found.cells, np.broadcast_to(levels / 200, found.cells.shape), rtol=1e-5)
    assert (found.coverage == 1).all()


def test_views_of_other_orders_are_read_as_they_are() -> None:
    colours, linear = tiles()
    bgr = frame_of(linear)[..., ::-1].copy()
    np.testing.assert_allclose(stats.of_linear(bgr[..., ::-1], BLACK, WHITE).cells, colours, atol=1e-4)


def test_each_channel_has_its_own_black() -> None:
    blacks = np.array([100.0, 120.0, 140.0])
    found = stats.of_linear(np.round(blacks + COLOUR * 1000)[None, None], blacks, 1120)
    np.testing.assert_allclose(found.cells[0, 0], COLOUR, atol=1e-6)


def test_what_is_masked_does_not_count() -> None:
    colours, linear = tiles()
    valid = np.random.default_rng(1).random((432, 648)) < 0.5
    linear[~valid] = 0.03
    found = stats.of_linear(frame_of(linear), BLACK, WHITE, valid)
    counts = found.coverage > 0
    np.testing.assert_allclose(found.cells[counts], colours[counts], atol=1e-4)
    assert found.coverage.mean() == pytest.approx(0.5, abs=0.02)


def test_a_masked_corner_has_no_coverage() -> None:
    valid = np.ones((432, 648), bool)
    valid[-175:, -250:] = False
    found = stats.of_linear(frame_of(tiles()[1]), BLACK, WHITE, valid)
    assert (found.coverage[-14:, -20:] == 0).all()
    assert (found.coverage[:21] == 1).all()
    assert len(found.points()) == np.count_nonzero(found.coverage >= stats.COVERED)


def test_saturated_pixels_do_not_count_and_are_told() -> None:
    colours, linear = tiles()
    mixed = linear.copy()
    mixed[::2, :, 1] = 1.0  # in every cell half of the rows: green alone is enough
    found = stats.of_linear(frame_of(mixed), BLACK, WHITE)
    np.testing.assert_allclose(found.cells, colours, atol=1e-4)
    assert found.saturated == pytest.approx(0.5, abs=0.01)
    assert found.coverage.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("plateau", [15303, 13200])
def test_a_plateau_below_white_is_saturation(plateau: int) -> None:
    frame = np.minimum(frame_of(np.clip(scene(), 0, 4)), plateau)
    clipped = (frame == plateau).any(2).mean()
    assert clipped > 0.02
    found = stats.of_linear(frame, BLACK, WHITE)
    assert found.white == pytest.approx(plateau, rel=0.002)
    assert found.saturated == pytest.approx(clipped, abs=0.02)
    error = angle(found.points().mean(0, dtype=np.float64), np.array([0.6, 1.0, 0.7]))
    assert error < 0.05
    believed = stats.of_linear(np.minimum(frame, plateau), BLACK, plateau)
    np.testing.assert_allclose(found.cells, believed.cells, atol=0.01)


def test_a_noisy_plateau_is_saturation() -> None:
    noise = np.random.default_rng(2).normal(0, 8, (216, 324, 3))
    frame = (np.minimum(frame_of(np.clip(scene(), 0, 4)), 15303) + noise).round().astype(np.uint16)
    frame[::40, ::40] = 16000  # and hot pixels above it
    found = stats.of_linear(frame, BLACK, WHITE)
    assert found.white == pytest.approx(15303, rel=0.005)


@pytest.mark.parametrize("level", [0.65, 0.93])
def test_a_bright_surface_is_no_plateau(level: float) -> None:
    linear = np.clip(scene(), 0, 0.3)
    rng = np.random.default_rng(3)
    linear[50:100, 50:150] = level * np.array([0.7, 1.0, 0.8]) * (1 + rng.normal(0, 0.002, (50, 100, 1)))
    found = stats.of_linear(frame_of(linear), BLACK, WHITE)
    assert (found.white, found.saturated) == (WHITE, 0)


@pytest.mark.parametrize("colour", [(0.7, 0.9, 0.8), (0.7, 0.7, 0.7), (0.1, 0.95, 0.1)])
def test_one_colour_is_no_plateau(colour: tuple[float, float, float]) -> None:
    found = stats.of_linear(frame_of(np.full((216, 324, 3), colour)), BLACK, WHITE)
    assert found.white == WHITE
    np.testing.assert_allclose(found.points(), np.broadcast_to(colour, (36 * 54, 3)), atol=1e-4)


def test_no_colour_at_all_is_an_answer() -> None:
    for level in (0, BLACK, WHITE, 65535):
        found = stats.of_linear(np.full((216, 324, 3), level, np.uint16), BLACK, WHITE)
        assert np.isfinite(found.cells).all()
        assert len(found.points()) == 0
        assert found.saturated == (level >= WHITE)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_pixels_that_are_no_numbers_do_not_count(bad: float) -> None:
    colours, linear = tiles()
    linear[::2, :, 2] = bad
    found = stats.of_linear(linear.astype(np.float32))
    np.testing.assert_allclose(found.cells, colours, atol=1e-4)
    assert found.coverage.mean() == pytest.approx(0.5, abs=0.01)
    nothing = stats.of_linear(np.full((50, 60, 3), bad))
    assert len(nothing.points()) == 0
    assert not nothing.coverage.any()


def test_exposure_does_not_change_colours() -> None:
    dim = stats.of_linear(frame_of(scene() / 8), BLACK, WHITE).points().mean(0)
    bright = stats.of_linear(frame_of(np.clip(scene() / 2, 0, None)), BLACK, WHITE).points().mean(0)
    assert angle(dim, bright) < 0.05


def test_black_has_to_be_below_white() -> None:
    with pytest.raises(ImgtoolError, match="black level 300 is not below the white level 255"):
        stats.of_linear(np.zeros((2, 2, 3), np.uint8), 300, 255)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, imgtool.engines.awb.stats, imgtool.engines.awb.reading\n"
        "print(sorted({'torch', 'cv2', 'PIL', 'rawpy', 'tifffile', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
