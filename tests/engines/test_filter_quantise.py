"""Networks in 8-bit arithmetic: the integers, the ranges, the training, the loss of accuracy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtool import checkpoint
from imgtool.engines.filter import model, quantise
from imgtool.engines.filter.settings import Model
from imgtool.engines.filter.variants import seen_by, variants
from imgtool.header import Weights

KINDS = {
    "fold": Model(),
    "pooled": Model(arch="pooled", width=6, depth=2, factor=2, context=8, carried=3, dilations="1,2"),
    "unshuffle": Model(arch="unshuffle", width=9, factor=2, dilations="1,2", target="bilateral"),
    "dilated": Model(arch="dilated", width=5, dilations="1,2"),
    "clapp": Model(arch="clapp"),
}


def network(settings: Model) -> nn.Module:
    """Build a network none of whose weights is zero, and whose layers keep the size of the numbers."""
    torch.manual_seed(3)
    net: nn.Module = model.build(settings)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.7).add_(0.05 * torch.randn_like(parameter))
    return net.eval()


def photo(seed: int = 0, height: int = 48, width: int = 56) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    tones = rng.uniform(0, 255, (height // 8, width // 8, 3)).repeat(8, 0).repeat(8, 1)
    return np.clip(tones + rng.normal(0, 10, tones.shape), 0, 255).astype(np.uint8)


def error(net: nn.Module, other: nn.Module, seen: Tensor) -> float:
    with torch.no_grad():
        return float((net(seen) - other(seen)).square().mean().sqrt())


# --- the arithmetic --------------------------------------------------------------------------


def test_a_convolution_is_what_integers_give() -> None:
    """The layer beside the same written with NumPy's integers, bit by bit but for the last float steps."""
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 4, 3, dilation=2)
    layer = quantise.Convolution(plain, fixed=False).eval()
    layer.low.fill_(-0.7)
    layer.high.fill_(1.9)
    x = 1.5 * torch.randn(2, 5, 9, 8)
    step = np.float32(np.float32(1.9) + np.float32(0.7)) / np.float32(255)
    zero = int(np.rint(np.float32(0.7) / step))
    assert zero == 69
    levels = np.clip(np.rint(x.numpy() / step).astype(np.int64) + zero, 0, 255)
    assert levels.min() == 0
    assert levels.max() == 255
    weight = plain.weight.detach().numpy()
    steps = np.abs(weight).max((1, 2, 3)) / np.float32(127)
    whole = np.rint(weight / steps[:, None, None, None]).astype(np.int64)
    assert [int(np.abs(each).max()) for each in whole] == [127] * 4
    sums = np.zeros((2, 4, 5, 4), np.int64)
    for i in range(3):
        for j in range(3):
            part = levels[:, :, 2 * i : 2 * i + 5, 2 * j : 2 * j + 4] - zero
            sums += np.einsum("bchw,oc->bohw", part, whole[:, :, i, j])
    bias = plain.bias.detach().numpy()[:, None, None]  # type: ignore[union-attr]
    expected = sums * (step * steps)[:, None, None] + bias
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=2e-6, atol=1e-6)


def test_the_sums_are_exact_whatever_their_order() -> None:
    """In the same range, pictures give bit for bit the same in any block, from any machine's convolution."""
    layer = quantise.Convolution(nn.Conv2d(24, 8, 3), fixed=True).eval()
    x = torch.rand(1, 24, 40, 40)
    with torch.no_grad():
        whole = layer(x)
        assert torch.equal(layer(x[..., 7:29, 3:18]), whole[..., 7:27, 3:16])
        inverted = torch.arange(24).flip(0)
        layer.weight.copy_(layer.weight[:, inverted])
        assert torch.equal(layer(x[:, inverted]), whole)


def test_photos_of_8_bits_lose_nothing() -> None:
    levels = torch.arange(256.0) / 255
    whole, step = quantise.whole_numbers(levels, torch.tensor(0.0), torch.tensor(1.0))
    assert torch.equal(whole, torch.arange(256.0))
    assert float(step) == pytest.approx(1 / 255, rel=1e-6)


def test_zero_stays_zero() -> None:
    for low, high in ((-0.331, 0.77), (-3.0, 0.0), (0.0, 0.1), (0.0, 0.0)):
        ends = torch.tensor(low), torch.tensor(high)
        whole, step = quantise.whole_numbers(torch.tensor([0.0, -9.0, 9.0]), *ends)
        assert float(whole[0]) == 0
        assert step > 0
        assert float(whole[2] - whole[1]) == 255  # the ends are 255 steps apart


def test_gradients_pass_through_and_end_where_the_range_does() -> None:
    x = torch.tensor([-2.0, -0.3, 0.2, 0.7, 3.0], requires_grad=True)
    whole, step = quantise.whole_numbers(x, torch.tensor(-1.0), torch.tensor(1.0))
    (whole * step).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 1, 1, 1, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_weight(kind: str) -> None:
    net = quantise.quantised(network(KINDS[kind])).train()
    edge = 2 * net.reach + 8
    net(torch.rand(2, 3, edge, edge)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


# --- the ranges ------------------------------------------------------------------------------


def test_ranges_are_learnt_in_training_alone() -> None:
    layer = quantise.Convolution(nn.Conv2d(1, 1, 1), fixed=False).train()
    layer(torch.tensor([-2.0, 4.0]).view(1, 1, 1, 2))
    assert [float(layer.low), float(layer.high)] == [-2, 4]  # the first batch sets them
    layer(torch.tensor([1.0, 8.0]).view(1, 1, 1, 2))  # a range holds 0
    assert [float(layer.low), float(layer.high)] == [-1, 6]
    layer(torch.tensor([-10.0, 0.0]).view(1, 1, 1, 2))
    assert [float(layer.low), float(layer.high)] == pytest.approx([-4, 4])
    for _ in range(300):
        layer(torch.tensor([-1.0, 0.5]).view(1, 1, 1, 2))
    assert [float(layer.low), float(layer.high)] == pytest.approx([-1, 0.5], abs=0.03)
    before = layer.high.clone()
    layer.eval()(torch.tensor([-90.0, 90.0]).view(1, 1, 1, 2))
    assert torch.equal(layer.high, before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_layer_sees_a_photo(kind: str) -> None:
    """Its range is that of photos, from the first to the last batch."""
    net = quantise.quantised(network(KINDS[kind])).train()
    net(0.2 + 0.3 * torch.rand(1, 3, 2 * net.reach + 8, 2 * net.reach + 8))
    layers = [layer for layer in net.modules() if isinstance(layer, quantise.Convolution)]
    assert [float(layers[0].low), float(layers[0].high)] == [0, 1]
    assert all(float(layer.batches) == 1 for layer in layers[1:])
    assert layers[0].in_channels % 3 == 0


@pytest.mark.parametrize("kind", KINDS)
def test_only_convolutions_change(kind: str) -> None:
    plain = network(KINDS[kind])
    net = model.build(KINDS[kind].changed(arithmetic="int8")).eval()
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for name in ("reach", "multiple", "local", "residual", "target", "count"):
        assert getattr(net, name) == getattr(plain, name)
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert all(isinstance(layer, quantise.Convolution) for layer in convolutions)
    assert quantise.is_quantised(net)
    assert not quantise.is_quantised(plain)


def test_float_weights_fit_and_other_lacks_are_told() -> None:
    """The ranges begin anew then; what else is missing is an error as ever."""
    plain = network(Model())
    net = model.build(Model(arithmetic="int8"))
    net.train()(torch.rand(1, 3, 20, 20))
    checkpoint.load_state(net, Weights("w", "filter", {}, {}, plain.state_dict()))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert float(net.state_dict()["head.batches"]) == 0
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        net.load_state_dict(
            {name: value for name, value in plain.state_dict().items() if name != "head.bias"}
        )


@pytest.mark.parametrize("half", [False, True])
def test_saved_and_read_it_computes_the_same(tmp_path: Path, half: bool) -> None:
    engine: Any = SimpleNamespace(name="filter", model=Model, build=model.build)
    settings = Model(target="bilateral", arithmetic="int8")
    net = quantise.quantised(network(settings.changed(arithmetic="float"))).train()
    seen = torch.rand(2, 3, 40, 40)
    for _ in range(3):
        net(seen)
    file = tmp_path / "w.safetensors"
    checkpoint.save_weights(file, engine, settings, net.state_dict(), {}, half=half)
    again = checkpoint.network(engine, checkpoint.read_weights(file, "filter"))
    assert error(net.eval(), again, seen) <= (0.02 if half else 0)
    assert float(again.state_dict()["head.batches"]) == 3


# --- accuracy --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_comes_near(kind: str) -> None:
    """To the float network, on another photo than it has seen: much nearer than with ranges at random."""
    plain = network(KINDS[kind])
    net = quantise.calibrated(plain, [seen_by(plain, photo(seed)) for seed in range(2)])
    seen = seen_by(plain, photo(9))
    assert not net.training
    with torch.no_grad():
        spread = float(plain(seen).std())
    assert error(plain, net, seen) < 0.08 * spread
    assert error(plain, net, seen) < 0.3 * error(plain, quantise.quantised(plain).eval(), seen)


def test_the_best_range_cuts_off_what_is_rare() -> None:
    """Beside the error of every end that could be taken, reckoned one by one."""
    torch.manual_seed(0)
    values = torch.cat([torch.randn(20_000).abs(), torch.tensor([9.0])])
    low, high = quantise.best_range(values)

    def lost(end: float) -> float:
        step = end / 255
        return float(((values / step).round().clamp(0, 255) * step - values).square().mean())

    assert float(low) == 0
    assert 4 < float(high) < 9
    assert lost(float(high)) <= 1.001 * min(lost(9 * share) for share in np.linspace(0.3, 1, 36))


def test_a_bias_makes_up_for_what_rounding_shifts() -> None:
    """The mean of each channel is that of the float network on the pictures of calibration."""
    plain = network(KINDS["unshuffle"])
    seen = seen_by(plain, photo())
    net = quantise.calibrated(plain, [seen])
    with torch.no_grad():
        torch.testing.assert_close(net(seen).mean((2, 3)), plain(seen).mean((2, 3)), atol=1e-6, rtol=0)


def test_calibration_leaves_the_network_alone_and_needs_pictures() -> None:
    plain = network(Model())
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    quantise.calibrated(plain, [torch.rand(1, 3, 24, 24)])
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert not quantise.is_quantised(plain)
    with pytest.raises(ValueError, match="no pictures"):
        quantise.calibrated(plain, [])


def test_it_learns() -> None:
    """In a few steps, from float weights, what another network makes."""
    net = quantise.quantised(network(Model(width=4, depth=2))).train()
    other = network(Model(width=4, depth=2))
    with torch.no_grad():
        other.head.weight.mul_(-0.5)
    seen = seen_by(net, photo())
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    losses = []
    for _ in range(30):
        loss = F.l1_loss(net(seen), other(seen).detach())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.25 * losses[0]
    assert error(other, net.eval(), seen) < 0.3 * error(other, network(Model(width=4, depth=2)), seen)


# --- variants --------------------------------------------------------------------------------


def test_variants_are_named_and_near() -> None:
    plain = network(Model(target="bilateral"))
    found = variants(plain, [photo(1), photo(2)])
    assert set(found) == {"float16 weights", "int8, calibrated"}
    seen = seen_by(plain, photo(5))
    assert 0 < error(plain, found["float16 weights"], seen) < 1e-3
    assert 0 < error(plain, found["int8, calibrated"], seen) < 0.02
    assert quantise.is_quantised(found["int8, calibrated"])
    state = found["float16 weights"].state_dict().values()
    assert all(torch.equal(value, value.half().float()) for value in state)


def test_no_8_bits_of_8_bits_or_without_photos() -> None:
    plain = network(Model())
    assert set(variants(quantise.quantised(plain), [photo()])) == {"float16 weights"}
    assert set(variants(plain, [])) == {"float16 weights"}


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (37, 40), (300, 280)])
@pytest.mark.parametrize("factor", [2, 3])
def test_a_network_sees_the_middle_of_a_photo(size: tuple[int, int], factor: int) -> None:
    net = network(Model(arch="unshuffle", width=3, factor=factor, dilations="1"))
    image = photo(0, 304, 304)[: size[0], : size[1]]
    seen = seen_by(net, image)
    inside = model.inner(seen, net.reach)
    height, width = inside.shape[-2:]
    assert height == min(-(-size[0] // factor), 256 // factor) * factor
    assert width == min(-(-size[1] // factor), 256 // factor) * factor
    top, left = max(size[0] - height, 0) // 2, max(size[1] - width, 0) // 2
    part = torch.from_numpy(image[top : top + height, left : left + width] / np.float32(255))
    assert torch.equal(inside[0].permute(1, 2, 0)[: part.shape[0], : part.shape[1]], part)
    mirrored = np.pad(image, ((net.reach,) * 2, (net.reach,) * 2, (0, 0)), mode="reflect")
    if top == 0 and left == 0:
        corner = seen[0, :, : net.reach, : net.reach].permute(1, 2, 0) * 255
        np.testing.assert_allclose(corner.numpy(), mirrored[: net.reach, : net.reach], atol=1e-4)
    net(seen)
