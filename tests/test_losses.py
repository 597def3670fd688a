"""Losses: the arithmetic that is named, gradients that are right, nothing swallowed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import pytorch_msssim
import torch
from torch import Tensor, nn

from imgtool import engines, losses
from imgtool.engines.deblur.data import Pair
from imgtool.engines.deblur.settings import Train
from imgtool.errors import USAGE, ImgtoolError

DEBLUR = engines.load("deblur")
EDGE = losses.MS_SSIM_SMALLEST


def pictures(edge: int = EDGE, count: int = 2) -> tuple[Tensor, Tensor]:
    """Return smooth pictures and the same a little disturbed, both inside 0..1."""
    noise = torch.Generator().manual_seed(5)
    small = torch.rand(count, 3, 12, 12, generator=noise)
    target = nn.functional.interpolate(small, (edge, edge), mode="bicubic").clamp(0.1, 0.9)
    output = (target + 0.03 * torch.randn(target.shape, generator=noise)).clamp(0.01, 0.99)
    return output, target


class Fixed(nn.Module):
    """A network whose output is given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, image: Tensor) -> Tensor:
        return self.output


def batch(target: Tensor) -> Pair:
    sharp = (target * 255).round().to(torch.uint8)
    return Pair(sharp.roll(1, -1), sharp)


def terms(kind: str, output: Tensor, target: Tensor) -> dict[str, Tensor]:
    return dict(DEBLUR.loss(Fixed(output), batch(target), Train(photos=("x",), loss=kind)))


# --- the original's loss ------------------------------------------------------------------------


def test_the_originals_loss_is_that_of_pytorch_msssim() -> None:
    """The original computes in -1..1 with a range of 2: MS-SSIM of both pictures plus one."""
    output, target = pictures()
    sharp = batch(target).sharp.float() / 255
    found = terms("msssim-charbonnier", output, target)
    theirs = pytorch_msssim.ms_ssim(output * 2, sharp * 2, data_range=2.0)
    assert float(found["ms-ssim"].detach()) == pytest.approx(0.84 * (1 - float(theirs)), abs=1e-6)
    apart = (output.double() - sharp.double()).numpy()
    assert float(found["charbonnier"].detach()) == pytest.approx(
        0.16 * np.sqrt(apart**2 + 1e-6).mean(), rel=1e-5
    )
    assert set(found) == {"ms-ssim", "charbonnier"}


def test_one_pixel_out_of_range_does_not_switch_the_loss() -> None:
    output, target = pictures()
    before = sum(float(term.detach()) for term in terms("msssim-charbonnier", output, target).values())
    for value in (1.02, -0.02, 50.0):
        beyond = output.clone()
        beyond[0, 0, 80, 80] = value
        found = terms("msssim-charbonnier", beyond, target)
        assert float(found["ms-ssim"].detach()) > 0
        assert sum(float(each.detach()) for each in found.values()) == pytest.approx(before, rel=0.15)


@pytest.mark.parametrize("value", [-0.3, 1.3])
def test_the_gradient_passes_the_clamp(value: float) -> None:
    output = torch.full((1, 3, EDGE, EDGE), value, requires_grad=True)
    target = pictures(count=1)[1]
    losses.ms_ssim_loss(output * target, target).backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()
    assert output.grad.abs().sum() > 0


def test_the_clamp_clamps_and_its_gradient_is_one() -> None:
    x = torch.tensor([-2.0, 0.0, 0.5, 1.0, 7.0], requires_grad=True)
    y = losses.clamp_straight_through(x)
    assert y.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("shape", [(EDGE - 1, 300), (300, EDGE - 1), (1, 1)])
def test_small_crops_are_refused_by_ms_ssim(shape: tuple[int, int]) -> None:
    picture = torch.rand(1, 3, *shape)
    with pytest.raises(ImgtoolError, match=f"at least 161 pixels, not {min(shape)}") as caught:
        losses.ms_ssim_loss(picture, picture)
    assert caught.value.code == USAGE


def test_the_smallest_crop_does() -> None:
    picture = torch.rand(1, 3, EDGE, EDGE)
    assert float(losses.ms_ssim_loss(picture, picture)) == pytest.approx(0, abs=1e-6)


def test_ms_ssim_is_float32_whatever_autocast_says() -> None:
    output, target = pictures(count=1)
    exact = 1 - pytorch_msssim.ms_ssim(output, target, data_range=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.ms_ssim_loss(output, target), exact)
    assert exact.dtype == torch.float32


# --- SSIM within a mask -------------------------------------------------------------------------


def test_with_nothing_masked_it_is_the_ssim_of_others() -> None:
    output, target = pictures(40)
    found = losses.masked_ssim(output, target, torch.ones(2, 1, 40, 40))
    theirs = pytorch_msssim.ssim(output, target, data_range=1.0, size_average=False, nonnegative_ssim=False)
    torch.testing.assert_close(found, theirs)


def test_what_is_masked_does_not_count() -> None:
    """The mask is a rectangle, so the result is that of the images cut to it; outside is rubbish."""
    output, target = pictures(48)
    mask = torch.zeros(2, 1, 48, 48)
    mask[:, :, 7:40, 5:33] = 1
    cut = pytorch_msssim.ssim(
        output[:, :, 7:40, 5:33], target[:, :, 7:40, 5:33], data_range=1.0, size_average=False
    )
    torch.testing.assert_close(losses.masked_ssim(output * mask, target, mask), cut)
    spoilt = (output + 0.5 * (1 - mask)).requires_grad_()
    losses.masked_ssim(spoilt, target, mask).sum().backward()
    assert spoilt.grad is not None
    assert not (spoilt.grad * (1 - mask)).any()
    assert (spoilt.grad * mask).any()


def test_an_image_without_a_whole_window_counts_as_equal() -> None:
    output, target = pictures(32)
    mask = torch.ones(2, 1, 32, 32)
    mask[0, :, :, ::10] = 0
    found = losses.masked_ssim(output.requires_grad_(), target, mask)
    assert float(found[0].detach()) == 1
    assert float(found[1].detach()) < 1
    found.sum().backward()
    assert output.grad is not None
    assert not output.grad[0].any()


def test_ssim_is_float32_whatever_autocast_says() -> None:
    output, target = pictures(32)
    mask = torch.ones(2, 1, 32, 32)
    exact = losses.masked_ssim(output, target, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.masked_ssim(output, target, mask), exact)
    assert losses.masked_ssim(output.double(), target.double(), mask).dtype == torch.float64


# --- the others -------------------------------------------------------------------------------


def test_charbonnier_is_l1_that_is_smooth_at_zero() -> None:
    output, target = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    assert float(losses.charbonnier(output, target, eps=1e-9)) == pytest.approx(
        float((output - target).abs().mean())
    )
    assert float(losses.charbonnier(target, target)) == pytest.approx(1e-3)
    at_zero = target.clone().requires_grad_()
    losses.charbonnier(at_zero, target).backward()
    assert at_zero.grad is not None
    assert at_zero.grad.abs().max() == 0


def test_frequency_is_the_mean_magnitude_of_the_spectrum() -> None:
    output, target = torch.rand(2, 3, 8, 10), torch.rand(2, 3, 8, 10)
    spectrum = np.fft.rfft2((output - target).double().numpy(), norm="ortho")
    expected = (np.abs(spectrum.real) + np.abs(spectrum.imag)).mean() / 2
    assert float(losses.frequency(output, target)) == pytest.approx(expected, rel=1e-5)


def test_frequency_does_not_grow_with_the_crop() -> None:
    noise = torch.Generator().manual_seed(0)
    small, large = (torch.randn(1, 3, edge, edge, generator=noise) for edge in (32, 128))
    zero = torch.zeros(1)
    assert float(losses.frequency(small, zero)) == pytest.approx(
        float(losses.frequency(large, zero)), rel=0.05
    )


def test_relative_mse_is_one_where_nothing_was_gained() -> None:
    target = torch.rand(2, 3, 8, 8)
    given = target + torch.tensor([0.2, 0.02])[:, None, None, None]
    nothing = losses.relative_mse(given, target, given, floor=0.0)
    assert float(nothing) == pytest.approx(1, rel=1e-4)
    halfway = losses.relative_mse((given + target) / 2, target, given, floor=0.0)
    assert -10 * math.log10(float(halfway)) == pytest.approx(6.02, abs=0.01)
    untouched = losses.relative_mse(target + 0.01, target, target)
    assert float(untouched) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    "loss",
    [
        losses.charbonnier,
        losses.frequency,
        lambda output, target: losses.relative_mse(output, target, target * 0.7),
    ],
)
def test_gradients_are_those_of_finite_differences(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    noise = torch.Generator().manual_seed(3)
    output = torch.rand(2, 1, 4, 6, dtype=torch.float64, generator=noise, requires_grad=True)
    target = torch.rand(2, 1, 4, 6, dtype=torch.float64, generator=noise)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), (output,))


@pytest.mark.parametrize("kind", ["relative-mse", "charbonnier-fft", "msssim-charbonnier"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_never_swallowed(kind: str, value: float) -> None:
    output, target = pictures(count=1)
    output[0, 1, 30, 40] = value
    assert not sum(terms(kind, output, target).values(), torch.zeros(())).isfinite()


@pytest.mark.parametrize("kind", ["relative-mse", "charbonnier-fft", "msssim-charbonnier"])
def test_every_loss_is_least_at_the_target(kind: str) -> None:
    output, target = pictures(count=1)
    sharp = batch(target).sharp.float() / 255

    def total(picture: Tensor) -> float:
        return sum(float(term.detach()) for term in terms(kind, picture, target).values())

    assert total(sharp) < total((output + sharp) / 2) < total(output)
