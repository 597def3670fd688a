"""The noise of a frame, measured in the frame itself."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from imgtool.engines.isp import noise
from imgtool.mosaic import Mosaic

Floats = npt.NDArray[np.float32]


def signal(height: int = 480, width: int = 640, texture: float = 0.0) -> Floats:
    """Soft tones from dark to bright, edges, and over half of the frame texture that is no noise."""
    rng = np.random.default_rng(1)
    tones = cv2.resize(rng.uniform(0.01, 0.8, (5, 6)).astype(np.float32), (width, height))
    for _ in range(40):
        top, left = int(rng.integers(height)), int(rng.integers(width))
        tones[top : top + 30, left : left + 20] = rng.uniform(0.01, 0.8)
    grain = cv2.GaussianBlur(rng.standard_normal((height, width)).astype(np.float32), (0, 0), 1)
    tones[:, : width // 2] *= 1 + texture * grain[:, : width // 2]
    return np.clip(tones, 0, 1)


def frame(
    values: Floats, shot: float, read: float, bits: int = 12, black: float = 256.0, pattern: str = "RGGB"
) -> Mosaic:
    rng = np.random.default_rng(2)
    white = 2.0**bits - 1
    noisy = values + np.sqrt(shot * values + read) * rng.standard_normal(values.shape)
    raw = np.clip(np.rint(black + noisy * (white - black)), 0, white).astype(np.uint16)
    return Mosaic(raw, pattern, (black,) * 4, white)


@pytest.mark.parametrize("texture", [0.0, 0.3])
@pytest.mark.parametrize("shot", [1e-4, 1e-3, 1e-2])
def test_shot_noise_is_found_with_and_without_texture(shot: float, texture: float) -> None:
    found, _ = noise.estimate(frame(signal(texture=texture), shot, shot**2))
    assert shot / 1.3 < found < shot * 1.3


def test_read_noise_is_found() -> None:
    shot, read = noise.estimate(frame(signal(), 1e-5, 2e-5))
    assert 2e-5 / 1.3 < read < 2e-5 * 1.3
    assert shot < 5e-5


@pytest.mark.parametrize("bits", [10, 14])
def test_a_frame_without_noise_has_that_of_rounding(bits: int) -> None:
    black = 16.0
    shot, read = noise.estimate(frame(signal(), 0, 0, bits, black))
    levels = 2.0**bits - 1 - black
    assert shot < 1e-5
    assert 1 / (12 * levels**2) <= read < 3 / (12 * levels**2)


def test_what_is_clipped_does_not_count() -> None:
    values = signal()
    values[:, 400:] = 3.0  # saturated: no noise there
    values[:200] = 0.0  # black at level 0: half of the noise is cut off
    found, _ = noise.estimate(frame(values, 4e-3, 2e-5, black=0.0))
    assert 4e-3 / 1.3 < found < 4e-3 * 1.3


def test_black_levels_of_the_four_places_do_not_count_as_noise() -> None:
    plain = frame(signal(), 1e-3, 1e-6, black=64.0)
    lifts = np.tile(np.array([[0, 20], [40, 60]], np.uint16), (240, 320))
    levels = (64.0, 84.0, 104.0, 124.0)
    lifted = Mosaic(plain.values + lifts, "RGGB", levels, 4095.0 + 60)
    assert noise.estimate(lifted)[0] == pytest.approx(noise.estimate(plain)[0], rel=0.1)


@pytest.mark.parametrize("shape", [(2, 2), (7, 300), (19, 19), (20, 20)])
def test_frames_that_are_too_small_have_that_of_rounding(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 4095, shape, np.uint16)
    shot, read = noise.estimate(Mosaic(values, "GBRG", (0.0,) * 4, 4095.0))
    if shape != (20, 20):
        assert (shot, read) == (0.0, 1 / (12 * 4095**2))
    assert np.isfinite([shot, read]).all()


def test_black_and_white_frames_do_no_harm() -> None:
    for level in (0, 64, 4095):
        values = np.full((100, 100), level, np.uint16)
        shot, read = noise.estimate(Mosaic(values, "RGGB", (64.0,) * 4, 4095.0))
        assert shot == 0
        assert read == 1 / (12 * (4095 - 64) ** 2)


def test_texture_at_some_brightnesses_lifts_nothing() -> None:
    """Half of the points in the bright half are five times what the noise is."""
    means = np.linspace(0.05, 0.9, 24)
    variances = 1e-3 * means + 1e-6
    variances[12::2] *= 5
    shot, _ = noise._line(np.stack([means, variances, np.full(24, 100.0)], 1), 1e-9)
    assert shot < 1.3e-3
