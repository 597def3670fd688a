"""Metrics: equal to scikit-image's, one value per image, float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.color import deltaE_ciede2000, rgb2lab
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


def test_lab_is_that_of_scikit_image() -> None:
    first, _ = pictures(20, 30)
    expected = np.stack([rgb2lab(image) for image in arrays(first)])
    assert metrics.lab(first.double()).movedim(1, -1).numpy() == pytest.approx(expected, abs=1e-9)


SHARMA = (
    ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
    ((50.0, 3.1571, -77.2803), (50.0, 0.0, -82.7485), 2.8615),
    ((50.0, 2.8361, -74.0200), (50.0, 0.0, -82.7485), 3.4412),
    ((50.0, -1.3802, -84.2814), (50.0, 0.0, -82.7485), 1.0000),
    ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
    ((50.0, 2.4900, -0.0010), (50.0, -2.4900, 0.0009), 7.1792),
    ((50.0, 2.4900, -0.0010), (50.0, -2.4900, 0.0011), 7.2195),
    ((50.0, -0.0010, 2.4900), (50.0, 0.0009, -2.4900), 4.8045),
    ((50.0, -0.0010, 2.4900), (50.0, 0.0011, -2.4900), 4.7461),
    ((50.0, 2.5, 0.0), (50.0, 0.0, -2.5), 4.3065),
    ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
    ((50.0, 2.5, 0.0), (56.0, -27.0, -3.0), 31.9030),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
    ((90.8027, -2.0831, 1.4410), (91.1528, -1.6435, 0.0447), 1.4441),
    ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
)
"""Of the test data that Sharma, Wu and Dalal publish: the pairs at which implementations go wrong."""


def test_colour_differences_are_those_that_the_formulas_authors_publish() -> None:
    first, second, expected = (torch.tensor(part, dtype=torch.float64) for part in zip(*SHARMA, strict=True))
    for one, two in ((first, second), (second, first)):
        assert metrics.ciede2000(one, two).tolist() == pytest.approx(expected.tolist(), abs=5e-5)


def test_colour_differences_are_those_of_scikit_image() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.uniform((0, -100, -100), (100, 100, 100), (2, 2000, 3))
    second[:1000] = first[:1000] + rng.normal(0, 3, (1000, 3))
    expected = deltaE_ciede2000(first, second)
    found = metrics.ciede2000(torch.from_numpy(first), torch.from_numpy(second))
    assert found.numpy() == pytest.approx(expected, abs=1e-9)
    assert found.dtype == torch.float64


def test_the_colour_difference_of_pictures_is_the_mean_of_their_pixels() -> None:
    first, second = pictures(12, 17)
    expected = [
        deltaE_ciede2000(rgb2lab(one), rgb2lab(two)).mean()
        for one, two in zip(arrays(first), arrays(second), strict=True)
    ]
    assert metrics.colour_difference(first, second).tolist() == pytest.approx(expected, abs=1e-9)
    assert metrics.colour_difference(first, first).tolist() == [0, 0, 0]
