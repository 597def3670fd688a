"""Metrics: equal to scikit-image's, one value per image, float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from imgtool import metrics


def pictures(height: int, width: int, count: int = 3) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(height)
    first = torch.rand(count, 3, height, width, generator=noise)
    strength = torch.linspace(0.02, 0.4, count)[:, None, None, None]
    return first, (first + strength * torch.randn(first.shape, generator=noise)).clamp(0, 1)


def arrays(batch: Tensor) -> list[np.ndarray]:
    return [image.permute(1, 2, 0).double().numpy() for image in batch]


def test_psnr_is_that_of_scikit_image() -> None:
    first, second = pictures(40, 30)
    expected = [
        peak_signal_noise_ratio(one, two, data_range=1.0)
        for one, two in zip(arrays(first), arrays(second), strict=True)
    ]
    found = metrics.psnr(first, second)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert metrics.psnr(first * 255, second * 255, peak=255).tolist() == pytest.approx(expected, abs=1e-4)


def test_psnr_of_equal_images_is_finite() -> None:
    first = torch.rand(2, 3, 4, 4)
    assert metrics.psnr(first, first).tolist() == pytest.approx([100, 100])
    assert metrics.psnr(first * 255, first * 255, peak=255).tolist() == pytest.approx([100, 100])


@pytest.mark.parametrize("size", [(11, 11), (40, 31), (64, 80)])
def test_ssim_is_that_of_scikit_image(size: tuple[int, int]) -> None:
    """Scikit-image pads, and then leaves the padded pixels out of its mean: the valid area."""
    first, second = pictures(*size)
    expected = [
        structural_similarity(
            one,
            two,
            data_range=1.0,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for one, two in zip(arrays(first), arrays(second), strict=True)
    ]
    found = metrics.ssim(first, second)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert metrics.ssim(first * 255, second * 255, peak=255).tolist() == pytest.approx(expected, abs=1e-5)


def test_ssim_of_equal_images_is_one() -> None:
    first = torch.rand(2, 3, 16, 16)
    assert metrics.ssim(first, first).tolist() == pytest.approx([1, 1])


def test_rounding_to_8_bit_is_that_of_a_file() -> None:
    values = torch.tensor([-0.2, 0.0, 0.4 / 255, 0.6 / 255, 100.49 / 255, 1.0, 1.7])
    assert (metrics.to_8_bit(values) * 255).tolist() == pytest.approx([0, 0, 0, 1, 100, 255, 255])


def test_a_picture_becomes_a_batch() -> None:
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    batch = metrics.batch_of(picture)
    assert batch.shape == (1, 3, 2, 4)
    assert batch.dtype == torch.float64
    assert float(batch[0, 2, 1, 3]) == 23 / 255
