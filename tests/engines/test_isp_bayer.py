"""Bayer geometry: every pattern and size is the same RGGB scene."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from imgtool.engines.isp import bayer
from imgtool.errors import ImgtoolError
from imgtool.mosaic import PATTERNS, Mosaic

patterns = pytest.mark.parametrize("pattern", PATTERNS)
BLACK = {"R": 60.0, "G": 64.0, "B": 70.0}


def colours(pattern: str, height: int, width: int) -> np.ndarray:
    """The letter at every pixel."""
    block = np.array(list(pattern)).reshape(2, 2)
    return np.tile(block, (height // 2 + 1, width // 2 + 1))[:height, :width]


def flat(pattern: str, height: int, width: int) -> Mosaic:
    """A frame of one colour: red 160, green 264, blue 470, above its own black."""
    letters = colours(pattern, height, width)
    values = np.select([letters == "R", letters == "G"], [160, 264], 470).astype(np.uint16)
    return Mosaic(values, pattern, tuple(BLACK[letter] for letter in pattern), 1000.0)  # type: ignore[arg-type]


@patterns
@pytest.mark.parametrize("size", [(6, 8), (7, 8), (6, 9), (5, 5), (2, 2), (3, 2)])
def test_every_plane_has_one_colour_mirrored_or_not(pattern: str, size: tuple[int, int]) -> None:
    frame = flat(pattern, *size)
    height, width = bayer.aligned_size(frame)
    planes = bayer.pack(bayer.window(frame, (-4, height + 4), (-6, width + 6)))
    wanted = [100 / 940, 200 / 936, 200 / 936, 400 / 930]
    assert np.abs(planes - np.array(wanted, np.float32)[:, None, None]).max() < 1e-6


@patterns
def test_a_pixel_lies_where_it_lay(pattern: str) -> None:
    values = np.arange(35, dtype=np.uint16).reshape(5, 7)
    frame = Mosaic(values, pattern, white=1.0)
    down, right = bayer.phase(pattern)
    height, width = bayer.aligned_size(frame)
    window = bayer.window(frame, (0, height), (0, width))
    assert np.array_equal(window[down : down + 5, right : right + 7], values)
    assert height % 2 == width % 2 == 0


@patterns
def test_a_part_is_a_part_of_the_whole(pattern: str) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (15, 18)).astype(np.uint16)
    frame = Mosaic(values, pattern, (1.0, 2.0, 3.0, 4.0), 4095.0)
    whole = bayer.window(frame, (-8, 24), (-8, 26))
    assert np.array_equal(bayer.window(frame, (2, 10), (-4, 6)), whole[10:18, 4:14])


def test_a_single_row_is_refused() -> None:
    with pytest.raises(ImgtoolError, match="less than one of each colour"):
        bayer.aligned_size(Mosaic(np.zeros((1, 8), np.uint16)))


def test_noise_below_black_is_that_of_black() -> None:
    fed = bayer.prepare(torch.full((1, 4, 1, 1), -0.01), torch.ones(1, 3), torch.tensor([[1e-2, 1e-6]]))
    assert fed[0, 4:].flatten().tolist() == pytest.approx([1e-3] * 4)


def test_the_row_after_the_last_of_an_odd_number_is_a_mirrored_one() -> None:
    values = np.arange(20, dtype=np.uint16).reshape(5, 4)
    found = bayer.window(Mosaic(values, white=1.0), (0, 6), (0, 4))
    assert np.array_equal(found, values[[0, 1, 2, 3, 4, 3]])
