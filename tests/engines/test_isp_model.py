"""The networks of the isp engine: sizes, what they begin as, their reach, what they are fed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from imgtool.engines.isp import bayer, colour, model
from imgtool.engines.isp.settings import Model


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def disturbed(settings: Model) -> nn.Module:
    torch.manual_seed(0)
    net = model.build(settings).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def scene(height: int, width: int) -> np.ndarray:
    """Smooth colours, (3, H, W)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([0.2 + 0.02 * x, 0.7 - 0.03 * y, 0.1 + 0.01 * (x + y)])


def packed(planes: np.ndarray) -> torch.Tensor:
    mosaic = np.empty(planes.shape[1:], np.float32)
    for (row, column), channel in zip(bayer.PLACES, (0, 1, 1, 2), strict=True):
        mosaic[row::2, column::2] = planes[channel, row::2, column::2]
    return torch.from_numpy(bayer.pack(mosaic))[None]


def test_punet_has_the_originals_parameters() -> None:
    with torch.device("meta"):
        net = model.NETWORKS["punet"](Model(arch="punet"))
    assert parameters(net) == 5_725_199


def test_sizes_grow() -> None:
    counts = [parameters(model.build(Model(size=size))) for size in model.SIZES]  # type: ignore[arg-type]
    assert counts == sorted(counts)
    assert counts[1] < 40_000


@pytest.mark.parametrize("method", ["malvar", "linear"])
def test_demosaicing_gives_back_a_linear_ramp(method: str) -> None:
    planes = scene(20, 24)
    net = model.Demosaic(method)
    rgb = net(torch.cat([packed(planes), torch.zeros(1, 4, 10, 12)], 1))
    assert np.abs(rgb[0].numpy() - planes)[:, 4:-4, 4:-4].max() < 1e-6


def test_malvar_is_what_its_authors_print() -> None:
    """A single bright green pixel at row 2, column 3: their filters, read at its neighbours."""
    mosaic = np.zeros((8, 8), np.float32)
    mosaic[2, 3] = 8.0
    rgb = model.Demosaic()(
        torch.cat([torch.from_numpy(bayer.pack(mosaic))[None], torch.zeros(1, 4, 4, 4)], 1)
    )
    red, green, blue = rgb[0].numpy()
    assert green[2, 3] == 8
    assert [green[2, 2], green[2, 4], green[1, 3], green[3, 3]] == [2, 2, 2, 2]
    assert [red[2, 3], blue[2, 3]] == [5, 5]
    assert [red[2, 1], red[2, 5], red[0, 3], red[4, 3]] == [-1, -1, 0.5, 0.5]
    assert [blue[2, 1], blue[0, 3]] == [0.5, -1]
    assert [red[1, 2], red[1, 4], red[3, 2], red[3, 4]] == [-1, -1, -1, -1]


def test_an_untrained_network_is_malvars_demosaicing() -> None:
    fed = torch.rand(1, 8, 12, 14)
    whole, plain = model.build(Model())(fed), model.Demosaic()(fed)
    assert torch.allclose(whole, plain, atol=1e-6)


def test_an_untrained_network_of_learned_colours_shows_the_same_in_srgb() -> None:
    fed = torch.rand(1, 8, 12, 14)
    learned = model.build(Model(colour="learned"))(fed)
    assert torch.allclose(learned, colour.encode(model.Demosaic()(fed)), atol=1e-6)


@pytest.mark.parametrize(
    "settings", [Model(size="xs"), Model(), Model(size="m"), Model(arch="punet", width="8")], ids=str
)
def test_nothing_beyond_the_halo_is_seen(settings: Model) -> None:
    net = disturbed(settings)
    reach = net.halo // 2
    rows = 2 * (reach + 16)
    fed = torch.rand(1, 8, rows, 32 if settings.arch == "punet" else 16)
    other = fed.clone()
    other[:, :, rows // 2 + reach :] = torch.rand_like(other[:, :, rows // 2 + reach :])
    with torch.inference_mode():
        before, after = net(fed)[:, :, : rows - 2], net(other)[:, :, : rows - 2]
    assert torch.equal(before, after)


def test_the_halo_of_the_small_network_is_no_larger_than_needed() -> None:
    net = disturbed(Model())
    reach = net.halo // 2
    fed = torch.rand(1, 8, 4 * reach, 8)
    other = fed.clone()
    other[:, :, 2 * reach :] += 1
    with torch.inference_mode():
        changed = (net(fed) != net(other)).any(dim=(0, 1, 3)).nonzero()
    assert int(changed.min()) // 2 == 2 * reach - reach


def test_folding_changes_nothing_but_the_work() -> None:
    net = disturbed(Model(size="m"))
    fed = torch.rand(1, 8, 16, 16)
    with torch.inference_mode():
        assert torch.allclose(net(fed), model.folded(net)(fed), atol=1e-5)
    assert "blocks.0.gain" in net.state_dict()


def test_the_originals_packing_is_its_channel_order() -> None:
    net = model.build(Model(arch="punet", width="8", packing="mai21", scaling="mai21", colour="learned"))
    planes = torch.arange(4.0)[None, :, None, None].expand(1, 4, 2, 2)  # R, Gr, Gb, B
    fed = model.feed(net, planes, torch.ones(1, 3), torch.zeros(1, 2))
    assert fed[0, :4, 0, 0].tolist() == [3, 1, 0, 2]  # rows and columns (1, 1), (0, 1), (0, 0), (1, 0)


def test_packing_alone_does_not_change_an_untrained_network() -> None:
    values, gains, noise = (
        torch.rand(2, 4, 8, 8),
        torch.tensor([[2.0, 1, 1.5]]).expand(2, 3),
        torch.zeros(2, 2),
    )
    usual, other = model.build(Model()), model.build(Model(packing="mai21"))
    assert torch.allclose(
        usual(model.feed(usual, values, gains, noise)),
        other(model.feed(other, values, gains, noise)),
        atol=1e-6,
    )


def test_highlights_are_white_and_noise_is_told() -> None:
    values = torch.tensor([0.9, 0.9, 0.9, 0.9])[None, :, None, None]
    fed = bayer.prepare(values, torch.tensor([[2.0, 1.0, 1.5]]), torch.tensor([[0.01, 0.0001]]))
    assert fed[0, :4, 0, 0].tolist() == pytest.approx([1, 0.9, 0.9, 1])
    deviation = (0.01 * 0.9 + 0.0001) ** 0.5
    assert fed[0, 4:, 0, 0].tolist() == pytest.approx([2 * deviation, deviation, deviation, 1.5 * deviation])


def test_exposure_is_in_stops() -> None:
    net = model.Demosaic()
    fed = torch.full((1, 8, 4, 4), 0.1)
    brighter = model.photo(net, fed, torch.eye(3), ev=1.0)[0, 0, 4, 4]
    assert float(brighter) == pytest.approx(float(colour.encode(torch.tensor(0.2))), abs=1e-6)


def test_exposure_of_learned_colours_is_in_stops_of_light() -> None:
    net = model.build(Model(size="xs", colour="learned")).eval()
    fed = torch.full((1, 8, 4, 4), 0.2)
    with torch.inference_mode():
        as_it_is, brighter = (model.photo(net, fed, torch.eye(3), ev) for ev in (0.0, 1.0))
    assert torch.allclose(colour.decode(brighter), 2 * colour.decode(as_it_is), atol=1e-5)


def test_noise_is_told_in_the_order_of_the_planes() -> None:
    net = SimpleNamespace(packing="mai21", scaling="levels")
    planes = torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(1, 4, 1, 1)
    fed = model.feed(net, planes, torch.ones(1, 3), torch.tensor([[1.0, 0.0]])).flatten()  # type: ignore[arg-type]
    assert torch.allclose(fed[4:], fed[:4].sqrt())


def test_colours_are_computed_in_full_precision_whatever_the_network_is() -> None:
    rgb, matrix = torch.rand(1, 3, 8, 8), torch.tensor([[1.5, -0.4, -0.1], [0, 1.4, -0.4], [0, -0.4, 1.4]])

    class Fixed(nn.Module):
        colour = "camera"

        def forward(self, fed: torch.Tensor) -> torch.Tensor:
            return rgb

    with torch.autocast("cpu", torch.bfloat16):
        found = model.photo(Fixed(), torch.rand(1, 8, 8, 8), matrix)
    assert torch.equal(found, colour.render(rgb, matrix))
