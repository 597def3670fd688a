"""Networks of the deblur engine: their size, their cost, their reach, any picture."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imgtool import engines
from imgtool.engines.deblur import bench, model
from imgtool.engines.deblur.settings import Model

DEBLUR = engines.load("deblur")
ARCHITECTURES = ("unet-lite", "unet-seed")


def network(arch: str) -> nn.Module:
    """Build a network none of whose weights is zero."""
    torch.manual_seed(1)
    net = DEBLUR.build(Model(arch=arch)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_the_original_has_its_parameters() -> None:
    """In all and part by part, as the published network has them."""
    net = network("unet-seed")
    assert parameters(net) == 8_636_451
    assert isinstance(net, model.UNetSeed)
    assert [parameters(each) for each in net.encoders] == [10_272, 55_680, 221_952, 886_272]
    assert parameters(net.bottleneck) == 3_542_016
    ups = zip(net.ups, net.decoders, strict=True)
    assert [parameters(up) + parameters(decoder) for up, decoder in ups] == [
        46_304,
        184_768,
        738_176,
        2_950_912,
    ]
    assert parameters(net.final) == 99


def test_the_default_keeps_its_budget() -> None:
    assert Model().arch == "unet-lite"
    net = network("unet-lite")
    assert parameters(net) <= 5_000_000
    assert bench.macs(copy.deepcopy(net), 1200, 1920) <= 150e9


def test_multiplications_are_counted_right() -> None:
    """A 3x3 convolution from 3 to 4 channels: 27 products for each of 4 values of each pixel."""
    assert bench.macs(nn.Conv2d(3, 4, 3, padding=1), 10, 20) == 27 * 4 * 200
    assert bench.macs(network("unet-seed"), 256, 256) == pytest.approx(16.37e9, rel=0.002)


def test_an_untrained_default_changes_nothing() -> None:
    image = torch.rand(1, 3, 33, 18)
    assert torch.equal(DEBLUR.build(Model())(image), image)


def stages(net: nn.Module) -> list[model.LocalUNet]:
    """Return the parts of a network that are cut into tiles, each by itself."""
    return [part for part in net.modules() if isinstance(part, model.LocalUNet)]


@pytest.mark.slow
def test_nothing_reaches_further_than_the_halo() -> None:
    """The gradient of one pixel of a stage, for every place that it can have in the grid of 8."""
    net = network("unet-lite")
    halo, multiple = DEBLUR.tiles(net).halo, model.LocalUNet.multiple
    assert halo <= 64
    assert stages(net)
    edge = 2 * halo + 6 * multiple
    reached = []
    for phase in range(multiple):
        image = torch.rand(1, 3, edge, edge, requires_grad=True)
        at = edge // 2 // multiple * multiple + phase
        stages(net)[0](image)[0, :, at, at].sum().backward()
        assert image.grad is not None
        rows, columns = (image.grad[0].abs().sum(0) > 0).nonzero().T
        for seen in (rows, columns):
            reached += [at - int(seen.min()), int(seen.max()) - at]
    assert max(reached) <= halo
    assert max(reached) > halo // 2  # it does look around


@pytest.mark.slow
def test_the_original_reaches_everything() -> None:
    """Its normalisation does: why it is never cut into tiles."""
    net = network("unet-seed")
    image = torch.rand(1, 3, 320, 320, requires_grad=True)
    net(image)[0, :, 0, 0].sum().backward()
    assert image.grad is not None
    assert float((image.grad[0, :, 300:, 300:] != 0).float().mean()) > 0.99
    facts = DEBLUR.tiles(net)
    assert not facts.local
    assert "GroupNorm" in facts.reason


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (2, 3), (15, 17), (8, 16), (33, 64)])
def test_any_size(arch: str, size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *size)
    with torch.inference_mode():
        out = network(arch)(image)
    assert out.shape == image.shape
    assert out.isfinite().all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_padding_is_on_the_right_and_below(arch: str) -> None:
    """A picture whose mirror image is put there by hand gives the same."""
    net = network(arch)
    part = stages(net)[0] if stages(net) else net
    multiple, image = DEBLUR.tiles(net).multiple, torch.rand(1, 3, 37, 42)
    padded = nn.functional.pad(image, (0, -42 % multiple, 0, -37 % multiple), mode="reflect")
    with torch.inference_mode():
        torch.testing.assert_close(part(padded)[..., :37, :42], part(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("margins", [(0, 5, 3, 0), (20, 20, 20, 20), (0, 0, 0, 1), (4, 0, 0, 0)])
def test_mirroring_is_that_of_numpy(size: int, margins: tuple[int, int, int, int]) -> None:
    left, right, top, bottom = margins
    image = np.random.default_rng(0).random((3, size, size + 1))
    around = ((0, 0), (top, bottom), (left, right))
    expected = np.pad(image, around, mode="reflect")  # a row of one pixel is repeated
    assert np.array_equal(model.reflect(torch.from_numpy(image), left, right, top, bottom).numpy(), expected)


def test_a_pixel_is_normalised_by_itself() -> None:
    norm = model.ChannelNorm(8)
    x = torch.randn(2, 8, 5, 6)
    out = norm(x)
    torch.testing.assert_close(out.mean(1), torch.zeros(2, 5, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(1, unbiased=False), torch.ones(2, 5, 6), atol=1e-3, rtol=0)
    changed = x.clone()
    changed[0, :, 2, 3] += torch.randn(8)
    assert int((norm(changed) != out).any(1).sum()) == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_picture_is_not_changed_by_its_neighbours_in_a_batch(arch: str) -> None:
    net = network(arch)
    batch = torch.rand(3, 3, 24, 24)
    with torch.inference_mode():
        together: Tensor = net(batch)
        alone = torch.cat([net(image[None]) for image in batch])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
