"""The fixed colour front end, against the standard's figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import color

from imgtool.engines.isp import colour


def test_the_curve_is_srgbs() -> None:
    rgb = np.linspace(0, 1, 256).reshape(-1, 1, 1).repeat(3, 2)
    xyz = color.rgb2xyz(rgb) @ np.linalg.inv(colour.SRGB_TO_XYZ).T
    found = colour.encode(torch.from_numpy(xyz)).numpy()
    assert np.abs(found - rgb).max() < 2e-4  # skimage's matrix has six digits


@pytest.mark.parametrize("value", [-0.01, 0.0, 0.002, 0.0031308, 0.5, 1.0, 1.7])
def test_decoding_is_the_inverse_of_encoding(value: float) -> None:
    there = torch.tensor(value, dtype=torch.float64)
    assert float(colour.decode(colour.encode(there))) == pytest.approx(value, abs=1e-9)


def test_gradients_are_finite_everywhere() -> None:
    linear = torch.linspace(-0.5, 2, 501).requires_grad_()
    colour.encode(linear).sum().backward()
    assert linear.grad is not None
    assert bool(torch.isfinite(linear.grad).all())


def test_white_stays_white_in_any_camera() -> None:
    matrix = colour.camera_to_srgb(np.array([[0.85, -0.25, -0.09], [-0.69, 1.42, 0.29], [-0.23, 0.28, 0.9]]))
    assert matrix.sum(1) == pytest.approx([1, 1, 1])


def test_each_image_of_a_batch_has_its_matrix() -> None:
    images = torch.rand(2, 3, 4, 5)
    matrices = torch.rand(2, 3, 3)
    mixed = colour.mix(images, matrices)
    assert torch.allclose(mixed[1, :, 2, 3], matrices[1] @ images[1, :, 2, 3])
    assert torch.allclose(colour.mix(images, matrices[0])[1, :, 0, 0], matrices[0] @ images[1, :, 0, 0])
