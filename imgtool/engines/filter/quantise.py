"""Networks in 8-bit arithmetic: int8 weights, uint8 activations.

Scheme and training after Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", CVPR 2018. Convolutions alone are in integers; what lies between them
(activation, bias, the original's normalisation and gates) is in float, as is the last addition of the change
to the photo: a result need not have the coarse steps of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtool import dist

LEVELS = 255
"""Steps of an activation's range."""
MOST = 127
"""Largest weight in steps; -128 is not used, so that zero is in the middle."""
MEMORY = 99
"""Batches over which the range of an activation is averaged."""
LEAST = 1e-8
"""Smallest step, where all weights of a channel, or all that was seen, are zero."""
SHARES = torch.linspace(0.3, 1.0, 36)
"""Of the range seen that calibration tries."""
THINNED = 7
"""One of so many values of an activation is looked at in calibration."""
BUFFERS: Mapping[str, float] = {"low": 0.0, "high": 1.0, "batches": 0.0}
"""What a layer keeps of what it saw, and with what it begins."""


class Convolution(nn.Conv2d):
    """A convolution of 8-bit numbers, computed in float as an integer kernel does in integers.

    The input, per tensor, is ``(q - zero) * step`` with q in 0..255; zero is a whole number, so 0 is exact.
    The weights are ``w * step`` with w in -127..127 and a step for each output channel. Sums of products of
    whole numbers are exact in float32 up to 2^24, so their order does not matter; they are multiplied by both
    steps, and the bias is added in float, as oneDNN does. Rounding is to the nearest, ties to even; its
    gradient is that of the identity within the range, and zero beyond.

    Attributes:
        low: Least value of the input, at most 0.
        high: Largest value of the input, at least 0.
        batches: Number of batches that ``low`` and ``high`` are averaged over.
        fixed: Whether the range stays as it is in training: that of a photo is 0..1.
    """

    low: Tensor
    high: Tensor
    batches: Tensor

    def __init__(self, layer: nn.Conv2d, *, fixed: bool) -> None:
        """Take over a convolution without padding, with its weights."""
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            bias=layer.bias is not None,
        )
        self.fixed = fixed
        for name, value in BUFFERS.items():
            self.register_buffer(name, torch.tensor(value))
        self.to(layer.weight.device).load_state_dict(layer.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, C', H', W')`` float32; in training, learn the range of the input."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.training and not self.fixed:
                self._watch(x.detach())
            whole, step = whole_numbers(x, self.low, self.high)
            steps = (self.weight.detach().abs().amax((1, 2, 3), keepdim=True) / MOST).clamp_min(LEAST)
            weights = _rounded(self.weight / steps)
            sums = F.conv2d(whole, weights, dilation=self.dilation)
            out = sums * (steps.view(-1, 1, 1) * step)
            return out if self.bias is None else out + self.bias.view(-1, 1, 1)

    @torch.no_grad()
    def _watch(self, x: Tensor) -> None:
        """Average the range; the first batch sets it."""
        share = 1 / (self.batches + 1)
        low, high = dist.least(torch.stack([x.amin(), -x.amax()])).unbind()
        self.low.lerp_(low.clamp_max(0.0), share)
        self.high.lerp_((-high).clamp_min(0.0), share)
        self.batches.add_(1).clamp_max_(MEMORY)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Let weights of a float network fit: the ranges that they lack are as before any batch."""
        for name, value in BUFFERS.items():
            state_dict.setdefault(prefix + name, torch.tensor(value))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _rounded(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def whole_numbers(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return activations in steps, whole numbers from -zero to 255 - zero, and the step.

    Args:
        x: The activations.
        low: Least value that the range holds, at most 0.
        high: Largest value, at least 0.
    """
    step = ((high - low) / LEVELS).clamp_min(LEAST)
    zero = (-low / step).round()
    return torch.clamp(_rounded(x / step), -zero, LEVELS - zero), step


def quantised(net: nn.Module) -> nn.Module:
    """Return a network that computes its convolutions in 8 bits, with the weights and attributes of ``net``.

    Ranges of the activations are averaged over the batches in training mode, and fixed in evaluation mode.
    The first convolution sees the photo, whose range is 0..1. Weights of the float network can be loaded.
    """
    net = copy.deepcopy(net)
    fixed = True
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Conv2d):
            net.set_submodule(name, Convolution(layer, fixed=fixed).train(layer.training))
            fixed = False
    return net


def is_quantised(net: nn.Module) -> bool:
    """Tell whether a network computes in 8 bits."""
    return any(isinstance(layer, Convolution) for layer in net.modules())


@torch.no_grad()
def calibrated(net: nn.Module, pictures: Sequence[Tensor]) -> nn.Module:
    """Return a float network in 8 bits without training it, in evaluation mode.

    The range of each layer's input is the share of the range seen at which the mean squared error of rounding
    and clipping is least. Then each bias is moved by what the 8 bits change the mean of its channel (Nagel et
    al., "Data-free quantization through weight equalization and bias correction", ICCV 2019).

    Args:
        net: The float network.
        pictures: Inputs of the network, ``(B, 3, H, W)`` in 0..1: a few photos with their margins.

    Raises:
        ValueError: There are no pictures.
    """
    if not pictures:
        raise ValueError("no pictures to calibrate with")
    net = copy.deepcopy(net).eval()
    found = quantised(net)
    for name, layer in found.named_modules():
        if not isinstance(layer, Convolution):
            continue
        original = net.get_submodule(name)
        if not layer.fixed:
            layer.low, layer.high = best_range(torch.cat(passing(net, original, pictures, _some)))
            layer.batches.fill_(MEMORY)
        if layer.bias is not None:
            wanted, got = (
                torch.stack(passing(whole, part, pictures, _means)).mean(0)
                for whole, part in ((net, original), (found, layer))
            )
            layer.bias += wanted - got
    return found


def _some(given: Tensor, made: Tensor) -> Tensor:
    return given.flatten()[::THINNED]


def _means(given: Tensor, made: Tensor) -> Tensor:
    return made.mean((0, 2, 3))


def passing(
    net: nn.Module, layer: nn.Module, pictures: Sequence[Tensor], take: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Return what ``take`` takes of a layer's input and output, picture by picture."""
    taken: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, given, made: taken.append(take(given[0], made).clone()))
    for picture in pictures:
        net(picture)
    handle.remove()
    return taken


def best_range(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the range of 256 steps, with 0 in it, that loses least of some values in the mean square."""
    low, high = values.amin().clamp_max(0.0), values.amax().clamp_min(0.0)
    losses = []
    for share in SHARES:
        whole, step = whole_numbers(values, low * share, high * share)
        losses.append((whole * step - values).square().mean())
    best = SHARES[int(torch.stack(losses).argmin())]
    return low * best, high * best
