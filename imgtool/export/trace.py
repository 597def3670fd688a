"""Networks as graphs, in operations that runtimes compute exactly."""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from imgtool.port import axis_of, length

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from imgtool.export.order import Order

NARROW = frozenset({"conv1d", "conv2d", "conv_transpose2d", "linear"})
"""Operations that are done in half precision: all of the weights, and nearly all of the time."""
EXACT = frozenset({
    "group_norm", "layer_norm", "instance_norm", "batch_norm", "normalize", "mean", "sum", "var", "std",
    "prod", "cumsum", "norm", "softmax", "log_softmax", "pow", "rpow", "exp", "expm1", "log", "log1p", "log2",
    "sqrt", "rsqrt", "reciprocal", "matmul", "rmatmul", "mm", "bmm", "einsum", "grid_sample",
    "adaptive_avg_pool2d",
})  # fmt: skip
"""Operations that lose too much in half precision; all others take what they are given."""


@dataclass(frozen=True)
class Spelling:
    """How a network's operations are put.

    Attributes:
        shuffle: Sub-pixel layers as transposed convolutions: phones' GPUs refuse tensors of six axes.
        unshuffle: Their inverse as convolutions.
        half: Weights and convolutions in half precision, statistics and powers in single; inputs and outputs
            are float32.
    """

    shuffle: bool = False
    unshuffle: bool = False
    half: bool = False


class Rewritten(nn.Module):
    """A network that computes the same in other operations.

    Means over several axes, and those of GroupNorm, are taken axis by axis: onnxruntime and others add up
    plainly in float32, which is wrong by 1e-3 over the pixels of a photo of 2 megapixels, and axis by axis by
    1e-6. The variance is the mean of the squared deviations.
    """

    def __init__(self, module: nn.Module, spelling: Spelling) -> None:
        """Wrap a network; for half precision a copy of it, whose parameters are rounded."""
        super().__init__()
        self.module, self.spelling = module, spelling
        if spelling.half:
            self.module = copy.deepcopy(module)
            for parameter in self.module.parameters():
                parameter.data = parameter.data.half()

    def forward(self, *inputs: Tensor) -> Any:
        """Return what the network does."""
        with _Respelt(self):
            found = self.module(*inputs)
        return _cast(found, torch.half, torch.float32) if self.spelling.half else found

    def one_hot(self, channels: int, factor: int) -> Tensor:
        """Return the kernel ``(C f^2, C, f, f)`` that carries each pixel of a block to its channel.

        It is made when it is first asked for: outside of a trace, to become a constant.
        """
        name = f"one_hot_{channels}_{factor}"
        if name not in self._buffers:
            count = channels * factor * factor
            self.register_buffer(name, torch.eye(count).view(count, channels, factor, factor))
        return self.get_buffer(name)


class _Respelt(TorchFunctionMode):
    """Catches what is to be computed otherwise; within it, functions are the original ones."""

    def __init__(self, net: Rewritten) -> None:
        super().__init__()
        self.net, spelling = net, net.spelling
        self.half = spelling.half
        self.rules: dict[str, Callable[..., Tensor]] = {"group_norm": group_norm, "mean": _mean}
        if spelling.shuffle:
            self.rules["pixel_shuffle"] = self._shuffle
        if spelling.unshuffle:
            self.rules["pixel_unshuffle"] = self._unshuffle

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute it."""
        name, kwargs = getattr(function, "__name__", "").strip("_"), kwargs or {}
        if self.half and name in NARROW:
            args, kwargs = _cast((args, kwargs), torch.float32, torch.half)
        elif self.half and name in EXACT:
            args, kwargs = _cast((args, kwargs), torch.half, torch.float32)
        return self.rules.get(name, function)(*args, **kwargs)

    def _shuffle(self, x: Tensor, upscale_factor: int) -> Tensor:
        kernel = self.net.one_hot(x.shape[1] // upscale_factor**2, upscale_factor)
        return F.conv_transpose2d(x, kernel.to(x.dtype), stride=upscale_factor)

    def _unshuffle(self, x: Tensor, downscale_factor: int) -> Tensor:
        kernel = self.net.one_hot(x.shape[1], downscale_factor)
        return F.conv2d(x, kernel.to(x.dtype), stride=downscale_factor)


def _cast(values: Any, before: torch.dtype, after: torch.dtype) -> Any:
    """Return nested values whose tensors of one type have another."""
    from torch.utils import _pytree as pytree

    return pytree.tree_map_only(Tensor, lambda x: x.to(after) if x.dtype == before else x, values)


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, **more: Any) -> Tensor:
    if not isinstance(dim, tuple | list):
        return torch.mean(x, **more) if dim is None else torch.mean(x, dim, keepdim, **more)
    axes = tuple(sorted((each % x.ndim for each in dim), reverse=True))
    for number, axis in enumerate(axes):  # see group_norm
        x = torch.mean(x, axis, True, **more) if number % 2 else torch.mean(x, axis, **more).unsqueeze(axis)
    return x if keepdim else x.squeeze(axes)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Return what ``torch.nn.functional.group_norm`` does, of ``(B, C, ...)``, with means axis by axis.

    The picture itself is never reshaped.
    """
    channels, ones = x.shape[1], (1,) * (x.ndim - 2)
    each = channels // num_groups

    def grouped(values: Tensor) -> Tensor:
        """Return the means over each group, for every channel of it: ``(B, C, 1, ...)``."""
        for axis in range(x.ndim - 1, 1, -1):
            # OpenVINO would join means that all keep their axes, or all drop them, into a single one.
            values = values.mean(axis, keepdim=axis % 2 == 1)
        of_groups = values.reshape(-1, num_groups, each).mean(2, keepdim=True)
        return of_groups.expand(-1, -1, each).reshape(-1, channels, *ones)

    deviation = x - grouped(x)
    scale = torch.rsqrt(grouped(deviation * deviation) + eps)
    if weight is not None:
        scale = scale * weight.view(1, channels, *ones)
    found = deviation * scale
    return found if bias is None else found + bias.view(1, channels, *ones)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep from the terminal what converters write there, in Python or not, and their warnings."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept, nowhere, level = (
        [os.dup(1), os.dup(2)],
        os.open(os.devnull, os.O_WRONLY),
        logging.root.manager.disable,
    )
    logging.disable(logging.CRITICAL)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        for number, copy_of in enumerate(kept, 1):
            os.dup2(copy_of, number)
            os.close(copy_of)
        os.close(nowhere)


def _free(order: Order) -> tuple[dict[int, Any], ...]:
    """Return the free lengths of every input, as torch's exporter takes them."""
    axes = {name: order.port.axes[name] for name in sorted(order.free)}
    multiples = {name: axis.multiple for name, axis in axes.items()}
    dims: dict[str, Any] = {
        name: torch.export.Dim(name, min=-(-axis.least // axis.multiple)) for name, axis in axes.items()
    }

    def dim(word: int | str) -> Any:
        times = length(word, multiples)
        return dims[axis_of(word)] if times == 1 else times * dims[axis_of(word)]

    return tuple(
        {place: dim(word) for place, word in enumerate(slot.shape) if axis_of(word) in dims}
        for slot in order.port.inputs
    )


def example(order: Order, *, free: bool = True) -> tuple[Tensor, ...]:
    """Return inputs of zeros in the shapes that an order names; a batch that is free is of 2."""
    lengths = {**order.sizes, **({"batch": 2} if free and "batch" in order.free else {})}
    return tuple(torch.zeros(*(length(word, lengths) for word in slot.shape)) for slot in order.port.inputs)


def traced(
    order: Order,
    *,
    gpu_safe: bool = False,
    free: bool = True,
    unshuffle: bool = False,
    half: bool = False,
) -> ExportedProgram:
    """Return the graph of a port's network.

    Args:
        order: Whose axes are free or fixed.
        gpu_safe: Spell sub-pixel layers and their inverse as convolutions with kernels of ones and zeros.
        free: Leave the axes free that the order leaves free; else all are fixed at ``order.sizes``.
        unshuffle: Spell the inverse of sub-pixel layers so.
        half: Convolutions and parameters in half precision; inputs and outputs stay float32.

    Returns:
        The program, for the CPU. It knows no more of where it was made than stack traces.
    """
    net = Rewritten(order.port.module, Spelling(gpu_safe, gpu_safe or unshuffle, half)).eval()
    inputs = example(order, free=free)
    with torch.no_grad(), quiet():
        if gpu_safe or unshuffle:
            net(*inputs)
        return torch.export.export(net, inputs, dynamic_shapes=(_free(order),) if free else None)
