"""One training by many processes, such as ``torchrun`` starts: one for each GPU, or for a share of the cores.

Each takes its part of every batch, and together they compute what one process would with the whole batch:
the gradient (by torch's ``DistributedDataParallel``), statistics of batch normalisation, and random masks.
One process alone is a world of size 1, in which nothing here costs anything.
"""

from __future__ import annotations

import inspect
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from imgtool import compute, names
from imgtool.errors import INTERRUPTED, USAGE, ImgtoolError
from imgtool.runtime import cores

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

MASKS = {"Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "StochasticDepth"}
"""Layers that multiply their input, whose first axis is the batch, by a random mask."""
_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "socket")
"""What torch says, in small letters, where another process has ended."""


@dataclass
class World:
    """The processes of a training, as one of them sees them.

    Attributes:
        rank: Number of this process, 0 for the one that writes and speaks.
        size: How many there are.
        local: Number of this process among those of its machine.
        beside: How many its machine has.
        samples: Samples of the step that is being taken, of all processes.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    beside: int = 1
    samples: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def part(self, count: int) -> range:
        """Return which of ``count`` samples are this process's.

        >>> [[*World(rank, 3).part(8)] for rank in range(3)]
        [[0, 1], [2, 3, 4], [5, 6, 7]]
        """
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def threads(self, asked: int) -> int:
        """Return how many CPU threads this process takes: what was asked, for 0 its share of the cores."""
        return asked or (max(cores() // self.beside, 1) if self.size > 1 else 0)


_world = World()
_all_reduce: Callable[..., Any] = distributed.all_reduce
"""Once the processes have met, out of reach of the compiler: PyTorch 2.13 makes wrong sums of it."""


def world() -> World:
    """Return the processes of the training that is under way."""
    return _world


def _started() -> World:
    """Return the processes that ``torchrun``, or who else sets its variables, has started."""
    if not names.many():
        return World()
    given = {"rank": "RANK", "size": "WORLD_SIZE", "local": "LOCAL_RANK", "beside": "LOCAL_WORLD_SIZE"}
    return World(**{field: int(os.environ[name]) for field, name in given.items() if name in os.environ})


def refuse_many(what: str) -> None:
    """Refuse what is many trainings where many processes share one.

    Args:
        what: The flag that asks for it.

    Raises:
        ImgtoolError: Code 2, in a process of ``torchrun``.
    """
    if names.many():
        words = f"{what} makes many trainings, and the processes of torchrun share one"
        raise ImgtoolError(words, f"leave out {what}, or start it without torchrun", USAGE)


@contextmanager
def joined() -> Iterator[World]:
    """Join the other processes for a training, and leave them however the block ends.

    Of a fault that all meet, one process tells; the others end with the same code and say nothing. Within
    another such block, this one does nothing.

    Raises:
        ImgtoolError: Where the others cannot be met, or where one has ended.
    """
    global _world
    mine = _started()
    if mine.size == 1 or _world.size > 1:
        yield _world
        return
    store = _meet(mine)
    _world = mine
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Grad strides do not match")  # of sides of length 1
            yield mine
    except BaseException as fault:
        alone = _first_to_tell(store)
        if alone:
            _untouched()
        ending = _told(fault, alone)
        if ending is not fault:
            raise ending from None
        raise
    finally:
        _world = World()
        distributed.destroy_process_group()


def _meet(mine: World) -> Any:
    """Form the group of processes; return the store that they share."""
    global _all_reduce
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://"))
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as fault:
        first = (str(fault).splitlines() or [""])[0]
        what = f"process {mine.rank} of {mine.size} does not meet the others: {first}"
        raise ImgtoolError(what, "start all of them by torchrun") from None
    _all_reduce = _uncompiled(distributed.all_reduce)
    return store


def _first_to_tell(store: Any) -> bool:
    """Return whether no other process has told of a fault, as far as can be known: the store may be gone."""
    try:
        return int(store.add("told", 1)) == 1
    except RuntimeError:  # it lived in the process that has ended
        return True


def _untouched() -> None:
    """Pass over the signal by which ``torchrun`` ends all once one has ended: this one has to tell why."""
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _told(fault: BaseException, alone: bool) -> BaseException:
    """Return what ends this process: nothing that is said where another one has said why."""
    if isinstance(fault, RuntimeError) and any(word in str(fault).lower() for word in _LOST):
        fault = ImgtoolError("another process of this training has ended", "go on with --resume")
    if alone or not isinstance(fault, ImgtoolError | KeyboardInterrupt):
        return fault
    return SystemExit(INTERRUPTED if isinstance(fault, KeyboardInterrupt) else fault.code)


def device(name: str) -> torch.device:
    """Return the device of this process: as ``compute.device``, of several GPUs one for each.

    Raises:
        ImgtoolError: Code 2, where there are not enough, or one is named for all.
    """
    if _world.size == 1:
        return compute.device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        what = f"--device {name} is one device, and {_world.size} processes need one each"
        raise ImgtoolError(what, "give --device cuda or cpu", USAGE)
    if name == "cuda" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if _world.beside > count:
            what = f"{_world.beside} processes for {count} GPUs"
            raise ImgtoolError(what, f"start --nproc-per-node {count}, or give --device cpu", USAGE)
        name = f"cuda:{_world.local}"
        torch.cuda.set_device(_world.local)
    return compute.device(name)


# --- what the processes tell each other -------------------------------------------------------------


def gather(value: T) -> list[T]:
    """Return the values of all processes, in their order; all wait for the last."""
    found: list[Any] = [value] * _world.size
    if _world.size > 1:
        distributed.all_gather_object(found, value)
    return found


def wait() -> None:
    """Wait until all processes are here."""
    gather(None)


def total(values: Tensor) -> Tensor:
    """Return the sum over all processes, elementwise and outside of gradients."""
    if _world.size > 1:
        values = values.detach().clone()
        _all_reduce(values)
    return values


def least(values: Tensor) -> Tensor:
    """Return the least values of all processes, elementwise and outside of gradients."""
    if _world.size > 1:
        values = values.detach().clone()
        _all_reduce(values, distributed.ReduceOp.MIN)
    return values


def mean(values: Tensor, known: Tensor) -> Tensor:
    """Return the mean of the values that are known, 0 where none is.

    Where many processes share a batch, it is this one's part of it, scaled so that the mean over the
    processes, weighted by their samples, is that over the whole batch.

    Args:
        values: ``(B,)``, one for each sample.
        known: ``(B,)``, 1 where the value counts, else 0.
    """
    count = known.sum()
    if _world.size > 1:
        counts = total(torch.stack([count, torch.full_like(count, len(known))]))
        count = counts[0].clamp(min=1) * len(known) / counts[1]
        return (values * known).sum() / count
    return (values * known).sum() / count.clamp(min=1)


# --- what one process would compute -----------------------------------------------------------------


class Learner:
    """The loss of a network on this process's part of a batch; its gradients are those of the whole one.

    What is returned is to be multiplied by ``share`` before its gradient is taken.
    """

    def __init__(self, net: nn.Module, loss: Callable[[nn.Module, Any], Mapping[str, Tensor]]) -> None:
        """Take a network, whose layers are changed in place, and its loss on a batch."""
        self._module = _Loss(net, loss)
        self._shared: Callable[[Any], Mapping[str, Tensor]] | None = None
        self._learning: list[bool] = []
        if _world.size > 1:
            _as_one(net)

    def __call__(self, batch: Any) -> Mapping[str, Tensor]:
        """Return the terms of the loss on this process's part of a batch."""
        if _world.size == 1:
            return self._module.forward(batch)
        learning = [parameter.requires_grad for parameter in self._module.parameters()]
        if learning != self._learning:  # what learns is fixed when the gradients are first shared
            self._shared = None  # and lets go of the gradients
            self._shared = _averaged(self._module)
            self._learning = learning
        assert self._shared is not None
        return self._shared(batch)


def _averaged(module: nn.Module) -> nn.Module:
    """Return a module whose gradients are averaged over the processes; buffers are the same in all."""
    kind: Any = nn.parallel.DistributedDataParallel
    known = inspect.signature(kind).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    shared: nn.Module = kind(module, **{buffers: False})  # its name since PyTorch 2.13, and before
    return shared


class _Loss(nn.Module):
    def __init__(self, net: nn.Module, loss: Callable[[nn.Module, Any], Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, batch: Any) -> Mapping[str, Tensor]:
        return self.loss(self.net, batch)


def share() -> float:
    """Return this process's samples of the step over those of a process on average."""
    if _world.size == 1:
        return 1.0
    return len(_world.part(_world.samples)) * _world.size / _world.samples


def whole(terms: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the terms of the loss on the whole batch, from those of all parts."""
    if _world.size == 1:
        return terms
    values = total(torch.stack(list(terms.values())) * share()) / _world.size
    return dict(zip(terms, values.unbind(), strict=True))


def _uncompiled(function: F) -> F:
    """Return a function that stays as it is within a network that is compiled; this imports the compiler."""
    kept: F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return kept


def _as_one(net: nn.Module) -> None:
    """Let layers that look at the whole batch, or draw masks for it, do so across the processes.

    Of a network that is compiled, these layers are not: they wait for the others, and their masks are then
    those of a network that is not compiled.
    """
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = MethodType(_uncompiled(_normalised), module)  # type: ignore[method-assign]
        elif type(module).__name__ in MASKS:
            module.forward = MethodType(_uncompiled(_masked), module)


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return total(gradient)


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """Normalise as ``torch.nn.BatchNorm``, by the statistics of all processes' samples together.

    Each tells its own mean and variance; what they make together is added up in double precision.
    """
    if not norm.training:
        out: Tensor = type(norm).forward(norm, x)
        return out
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    spread, middle = torch.var_mean(exact, [0, *range(2, x.ndim)], correction=0)
    spread, middle = spread.double(), middle.double()
    count = middle.new_full((1,), x.numel() // x.shape[1])
    told = torch.cat([count * middle, count * (spread + middle.square()), count])
    sums: Tensor = _Sum.apply(told)  # type: ignore[no-untyped-call]
    middle, squares = (sums[:-1] / sums[-1]).chunk(2)
    spread = squares - middle.square()
    if norm.track_running_stats:
        _remember(norm, middle.detach(), (spread * sums[-1] / (sums[-1] - 1)).detach())
    shape = (1, -1, *[1] * (x.ndim - 2))
    scale = torch.rsqrt(spread + norm.eps)
    out = (exact - middle.to(exact.dtype).view(shape)) * scale.to(exact.dtype).view(shape)
    if norm.affine:
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
    return out.to(x.dtype)


def _remember(norm: Any, mean: Tensor, variance: Tensor) -> None:
    norm.num_batches_tracked.add_(1)
    part = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), part)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), part)


def _masked(layer: Any, x: Tensor) -> Tensor:
    """Draw the mask of the whole batch, as one process would, and take this one's part of it."""
    if not layer.training:
        return x
    sides = [1] * (x.ndim - 1) if type(layer).__name__ == "StochasticDepth" else x.shape[1:]
    ones = x.new_ones((_world.samples, *sides))
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        ones = ones.contiguous(memory_format=torch.channels_last)  # masks are drawn in the order of memory
    part = _world.part(_world.samples)
    mask: Tensor = type(layer).forward(layer, ones)
    return x * mask[part.start : part.stop]
