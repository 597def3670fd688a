"""Networks of the filter engine: their size, their cost, their reach, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtool.engines.filter import model
from imgtool.engines.filter.settings import Model
from imgtool.errors import USAGE, ImgtoolError

LOCAL = {
    "fold": Model(width=5, depth=3),
    "fold, three colours": Model(width=5, depth=1, target="bilateral"),
    "dilated": Model(arch="dilated", width=4, dilations="1,3,2"),
    "unshuffle": Model(arch="unshuffle", width=7, factor=3, dilations="1,2", target="bilateral"),
    "unshuffle, grey": Model(arch="unshuffle", width=5, factor=2, dilations="1"),
    "pooled": Model(arch="pooled", width=4, depth=3, factor=2, context=6, carried=2, dilations="1,2"),
    "pooled, three colours": Model(
        arch="pooled", width=5, depth=4, factor=4, context=5, carried=3, dilations="1", target="bilateral"
    ),
}


def network(settings: Model, dtype: torch.dtype = torch.float64) -> Any:
    """Build a network none of whose weights is zero."""
    torch.manual_seed(1)
    net = model.build(settings).to(dtype).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def picture(net: Any, height: int = 12, width: int = 12, seed: int = 0) -> Tensor:
    """Return the input for an output of a size."""
    shape = (1, 3, height + 2 * net.reach, width + 2 * net.reach)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- size and cost ---------------------------------------------------------------------------


def test_the_original_has_its_parameters() -> None:
    """In all and part by part, as it was published."""
    net = model.build(Model(arch="clapp", target="sobel_3"))
    assert parameters(net) == 2505
    assert parameters(net.prepare) == 32
    assert [parameters(block) for block in net.blocks] == [616] * 4
    assert parameters(net.finish) == 9


def test_the_default_has_about_two_thousand() -> None:
    assert Model().arch == "fold"
    assert parameters(model.build(Model(target="sobel_3"))) == 1985
    assert parameters(model.build(Model(target="bilateral"))) == 2003


def test_the_others_have_what_their_layers_have() -> None:
    """3x3 convolutions of n to m channels have 9 n m + m parameters, 1x1 ones n m + m."""
    unshuffled = Model(arch="unshuffle", width=24, factor=2, dilations="1,2,4,1", target="bilateral")
    assert parameters(model.build(unshuffled)) == 9 * 12 * 24 + 24 + 3 * (9 * 24 * 24 + 24) + 24 * 12 + 12
    dilated = Model(arch="dilated", width=24, dilations="1,2,4", target="sobel_3")
    assert parameters(model.build(dilated)) == 9 * 3 * 24 + 24 + 2 * (9 * 24 * 24 + 24) + 24 + 1
    pooled = Model(
        arch="pooled", width=8, depth=2, factor=4, context=24, carried=6, dilations="1,1", target="bilateral"
    )
    small = 9 * 48 * 24 + 24 + 9 * 24 * 24 + 24 + 24 * 6 * 16 + 6 * 16
    assert parameters(model.build(pooled)) == small + 9 * 9 * 8 + 8 + 9 * 8 * 8 + 8 + 8 * 3 + 3


def test_the_original_takes_115_million_multiplications() -> None:
    """At 224x224: of each convolution its weights, times the pixels that it makes."""
    net, counted = model.build(Model(arch="clapp")), []

    def count(layer: nn.Conv2d, _: Any, made: Tensor) -> None:
        counted.append(layer.weight.numel() * made.shape[-2] * made.shape[-1])

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        net(torch.zeros(1, 3, 224, 224))
    assert counted == [24 * 224**2, *[576 * 222**2] * 4, 8 * 224**2]
    assert sum(counted) / 1e6 == pytest.approx(115.16, abs=0.005)


# --- the original ----------------------------------------------------------------------------

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "relu": lambda x: x * (x > 0),
    "leaky-relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
}


def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise each picture by the mean and variance of all its values."""
    mean = x.mean((1, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((1, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Sum shifted pictures; with zeros around the result, not around what it is made of."""
    edge = weight.shape[-1]
    height, width = x.shape[-2] - edge + 1, x.shape[-1] - edge + 1
    out = torch.zeros(len(x), len(weight), *x.shape[-2:], dtype=x.dtype)
    middle = out[..., edge // 2 : edge // 2 + height, edge // 2 : edge // 2 + width]
    for i in range(edge):
        for j in range(edge):
            part = x[..., i : i + height, j : j + width]
            middle += torch.einsum("bchw,oc->bohw", part, weight[:, :, i, j])
    middle += bias.view(-1, 1, 1)
    return out


def original(x: Tensor, state: dict[str, Tensor], settings: Model) -> Tensor:
    """Compute what the original does, written anew."""
    x = convolved(x, state["prepare.weight"], state["prepare.bias"])
    for number in range(settings.depth):
        at = f"blocks.{number}."
        norm = state[at + "norm.weight"], state[at + "norm.bias"]
        kernel = state[at + "conv.weight"], state[at + "conv.bias"]
        y = (
            convolved(normalised(x, *norm), *kernel)
            if settings.flip
            else normalised(convolved(x, *kernel), *norm)
        )
        y = FORMULAS[settings.activation](y)
        y = y * state[at + "alpha"] if settings.rezero else y
        x = y + x * state[at + "beta"] if settings.reskip else y
    return convolved(x, state["finish.weight"], state["finish.bias"])


@pytest.mark.parametrize(
    "switches",
    [
        {},
        *({"activation": name} for name in FORMULAS if name != "gelu"),
        {"kernel": 1},
        {"kernel": 5},
        {"flip": False},
        {"rezero": False},
        {"reskip": False},
        {"flip": False, "rezero": False, "reskip": False, "kernel": 5, "width": 5, "depth": 1},
        {"target": "bilateral", "width": 3},
    ],
    ids=str,
)
def test_every_switch_of_the_original_does_what_it_says(switches: dict[str, Any]) -> None:
    """Its parameters, its output beside one written anew, and gradients of all."""
    settings = Model(**{"arch": "clapp", "depth": 3, **switches})
    net = network(settings)
    width, kernel, count = settings.width, settings.kernel, 3 if settings.target == "bilateral" else 1
    gates = settings.rezero + settings.reskip
    block = width * width * kernel**2 + width + 2 * width + gates * width
    assert parameters(net) == 4 * width + settings.depth * block + (width + 1) * count
    x = torch.rand(2, 3, 13, 16, dtype=torch.float64)
    out = net(x)
    assert out.shape == (2, count, 13, 16)
    torch.testing.assert_close(out, original(x, net.state_dict(), settings), atol=1e-10, rtol=1e-10)
    out.square().sum().backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_original_puts_zeros_around_what_it_has_convolved(kernel: int) -> None:
    """Its first blocks have no skip: what leaves them is exactly 0 along the border, and nowhere else."""
    settings = Model(arch="clapp", kernel=kernel)
    torch.manual_seed(0)
    block = model.build(settings).blocks[0]
    out = block(torch.rand(1, 8, 12, 14))
    margin = kernel // 2
    middle = model.inner(out, margin)
    assert (middle != 0).all()
    assert int((out != 0).sum()) == middle.numel()


def test_the_original_begins_without_skip_and_with_whole_branches() -> None:
    block = model.build(Model(arch="clapp")).blocks[2]
    assert torch.equal(block.alpha, torch.ones(1, 8, 1, 1))
    assert torch.equal(block.beta, torch.zeros(1, 8, 1, 1))


def test_the_original_looks_at_the_whole_picture() -> None:
    net = network(Model(arch="clapp"))
    assert not net.local
    x = torch.rand(1, 3, 40, 40, dtype=torch.float64)
    changed = x.clone()
    changed[..., :4, :4] = 0
    assert ((net(changed) - net(x))[..., 30:39, 30:39].abs() > 1e-9).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (4, 9)])
def test_the_original_takes_pictures_smaller_than_its_kernel(size: tuple[int, int]) -> None:
    net = network(Model(arch="clapp", kernel=5), torch.float32)
    out = net(torch.rand(2, 3, *size))
    assert out.shape == (2, 1, *size)
    assert out.isfinite().all()


# --- local networks --------------------------------------------------------------------------


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * x)


def to_depth(x: Tensor, factor: int) -> Tensor:
    """Put the pixels of blocks into channels: colour first, then row, then column."""
    parts = [
        x[:, c, i::factor, j::factor] for c in range(x.shape[1]) for i in range(factor) for j in range(factor)
    ]
    return torch.stack(parts, 1)


def to_space(x: Tensor, factor: int) -> Tensor:
    """Undo ``to_depth``."""
    batch, channels, height, width = x.shape
    out = torch.zeros(batch, channels // factor**2, height * factor, width * factor, dtype=x.dtype)
    for number in range(channels):
        colour, place = divmod(number, factor**2)
        out[:, colour, place // factor :: factor, place % factor :: factor] = x[:, number]
    return out


def layers(x: Tensor, state: dict[str, Tensor], prefix: str, dilations: list[int]) -> Tensor:
    for number, dilation in enumerate(dilations):
        at = f"{prefix}.{2 * number}."
        x = leaky(F.conv2d(x, state[at + "weight"], state[at + "bias"], dilation=dilation))
    return x


def cropped(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the middle of pictures."""
    top, left = ((whole - part) // 2 for whole, part in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]


def expected(x: Tensor, net: Any, settings: Model, size: tuple[int, int]) -> Tensor:
    """Compute what a local network does, written anew."""
    state, ramp = net.state_dict(), [int(each) for each in settings.dilations.split(",") if each]
    head = state["head.weight"], state["head.bias"]
    full = [1] * settings.depth
    if settings.arch == "pooled":
        found = layers(to_depth(x, settings.factor), state, "small", ramp)
        carried = to_space(F.conv2d(found, state["carry.weight"], state["carry.bias"]), settings.factor)
        wanted = size[0] + 2 * settings.depth, size[1] + 2 * settings.depth
        both = torch.cat([cropped(x, wanted), cropped(carried, wanted)], 1)
        out = F.conv2d(layers(both, state, "body", full), *head)
    elif settings.arch == "unshuffle":
        small = layers(to_depth(x, settings.factor), state, "body", ramp)
        out = to_space(F.conv2d(small, *head), settings.factor)
    else:
        out = F.conv2d(layers(x, state, "body", ramp or full), *head)
    return out + cropped(x, size) if out.shape[1] == 3 else out


@pytest.mark.parametrize("kind", LOCAL)
def test_they_compute_what_they_say(kind: str) -> None:
    """Valid sizes, and the values of the same written anew."""
    net = network(LOCAL[kind])
    count = 3 if LOCAL[kind].target == "bilateral" else 1
    assert net.residual == (count == 3)
    x = picture(net, 12, 24)
    assert net(x).shape == (1, count, 12, 24)
    torch.testing.assert_close(net(x), expected(x, net, LOCAL[kind], (12, 24)), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", LOCAL)
def test_nothing_reaches_further_than_the_reach(kind: str) -> None:
    """From the block of ``multiple`` pixels that an output pixel lies in; and something reaches so far."""
    net = network(LOCAL[kind])
    assert net.local
    assert net.reach % net.multiple == 0
    x = picture(net, 12, 12).requires_grad_()
    out = net(x)
    first, last = [], []
    for place in range(6, 6 + net.multiple):
        (gradient,) = torch.autograd.grad(out[0, :, place, place].sum(), x, retain_graph=True)
        block = place // net.multiple * net.multiple + net.reach  # in the coordinates of the input
        for seen in (gradient[0].abs().sum(0) > 0).nonzero().T:
            first.append(block - int(seen.min()))
            last.append(int(seen.max()) - (block + net.multiple - 1))
    assert max(first) == net.reach
    assert max(last) == net.reach


def test_their_reach_is_that_of_their_layers() -> None:
    """The sum of the dilations, times the factor; the full-size layers of pooled on top, rounded up."""
    reaches = {kind: network(settings).reach for kind, settings in LOCAL.items()}
    assert list(reaches.values()) == [3, 1, 6, 9, 2, 10, 8]
    assert network(Model(arch="dilated", width=2)).reach == 32
    assert network(Model(arch="unshuffle", width=2)).reach == 16
    assert network(Model(arch="pooled", width=2)).reach == 20


@pytest.mark.parametrize("kind", LOCAL)
@torch.no_grad()
def test_a_shift_of_the_picture_shifts_the_output(kind: str) -> None:
    """By multiples of ``multiple``; by fewer pixels, the pixels of a block would change places."""
    net = network(LOCAL[kind])
    step = net.multiple
    x = picture(net, 24, 36)
    out = net(x)
    shifted = net(x[..., step : -2 * step, 2 * step : -step])
    torch.testing.assert_close(shifted, out[..., step : -2 * step, 2 * step : -step], atol=1e-13, rtol=0)
    if step > 1:
        by_one = net(x[..., 1 : 1 - step, 1 : 1 - step])
        assert float((by_one - out[..., 1 : 1 - step, 1 : 1 - step]).abs().max()) > 1e-3


@pytest.mark.parametrize("arch", ["fold", "dilated", "unshuffle", "pooled"])
def test_an_untrained_network_changes_no_colour(arch: str) -> None:
    net = model.build(Model(arch=arch, target="bilateral", factor=2))
    x = torch.rand(1, 3, 2 * net.reach + 8, 2 * net.reach + 8)
    assert torch.equal(net(x), x[..., net.reach : -net.reach, net.reach : -net.reach])


@pytest.mark.parametrize("kind", LOCAL)
def test_gradients_reach_every_weight(kind: str) -> None:
    net = network(LOCAL[kind])
    net(picture(net)).square().sum().backward()
    assert all(bool((parameter.grad.abs() > 0).any()) for parameter in net.parameters())


# --- from settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "channels", "count"),
    [
        ("sobel_3", "auto", 1),
        ("sobel_3:scale=2", "auto", 1),
        ("bilateral:d=5", "auto", 3),
        ("pairs:somewhere", "auto", 3),
        ("pairs:somewhere", "1", 1),
        ("module:function", "auto", 3),
        ("module:function", "1", 1),
    ],
)
def test_the_output_has_the_channels_of_the_filter(target: str, channels: Any, count: int) -> None:
    net = model.build(Model(target=target, channels=channels))
    assert net.count == count
    assert net(torch.rand(1, 3, 12, 10)).shape == (1, count, 4, 2)
    assert net.target == target


def test_the_original_takes_odd_kernels() -> None:
    with pytest.raises(ImgtoolError, match="--kernel 4 is even") as caught:
        model.build(Model(arch="clapp", kernel=4))
    assert caught.value.code == USAGE


@pytest.mark.parametrize("dilations", ["0", "1,-2", "one", "1,,2", "1.5", "400,200", "1;2"])
def test_dilations_are_numbers_that_reach_not_too_far(dilations: str) -> None:
    with pytest.raises(ImgtoolError, match="are no dilations that reach at most 512 pixels") as caught:
        model.build(Model(arch="dilated", dilations=dilations))
    assert caught.value.code == USAGE


def test_a_smaller_picture_reaches_further() -> None:
    """100 pixels are 400 where the picture is a quarter of the size, and 800 at an eighth."""
    assert model.build(Model(arch="unshuffle", factor=4, width=2, dilations="100")).reach == 400
    with pytest.raises(ImgtoolError, match="512"):
        model.build(Model(arch="unshuffle", factor=8, width=2, dilations="100"))
