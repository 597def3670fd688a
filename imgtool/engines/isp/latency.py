"""Latency of networks in this process, in one form after the other, and what limits it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from imgtool import compute
from imgtool.engines.isp import bayer, model
from imgtool.memory import peak_mb

WARM_UPS = 50
BUFFERS = 16
"""Inputs that take turns, so that none of them waits in a cache."""
LONGEST = 200
"""Letters that are passed on of what a compiler says."""
SQUARE = 8192
"""Edge of the matrices whose product tells the peak of the arithmetic."""
WIDE = 256
"""Channels of the convolution that does."""
COPIED = 1 << 30
"""Bytes whose copying tells the bandwidth of the memory."""
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What networks are timed in on a CPU."""
LEVELS = (64.0, 1023.0)
"""Black and white of the 10-bit raw integers that whole forms begin with."""


# --- what is timed ------------------------------------------------------------------------------------


def planes(net: nn.Module) -> int:
    """Return how many planes a network looks at."""
    return 4 if isinstance(net, model.Punet) else model.FED


def inputs(net: nn.Module, size: tuple[int, int], count: int, like: Tensor) -> list[Tensor]:
    """Return random inputs of a network, channels last.

    Args:
        net: The network.
        size: Rows and columns of the mosaic.
        count: How many.
        like: Device and type that they shall have.
    """
    random = torch.Generator(like.device).manual_seed(0)
    return [
        torch.rand(_shape(net, size), generator=random, device=like.device)
        .to(like.dtype)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(count)
    ]


def frames(net: nn.Module, size: tuple[int, int], count: int, where: torch.device) -> list[Tensor]:
    """Return random packed raw integers of 10 bits, int16, channels last, of the shape of ``Camera``'s input.

    Args:
        net: The network.
        size: Rows and columns of the mosaic.
        count: How many.
        where: The device.
    """
    random = torch.Generator(where).manual_seed(0)
    shape = (1, 4, *_shape(net, size)[2:])
    return [
        torch.randint(0, 1024, shape, generator=random, device=where, dtype=torch.int16).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(count)
    ]


def _shape(net: nn.Module, size: tuple[int, int]) -> tuple[int, int, int, int]:
    return 1, planes(net), size[0] // 2, size[1] // 2


@dataclass(frozen=True)
class Work:
    """What a forward pass has to do.

    Attributes:
        parameters: Of the network.
        macs: Multiply-accumulate operations of its convolutions.
        elements: Numbers that the convolutions read and write, weights aside, where nothing is fused.
        least: Numbers that must pass the memory in any case: input, output, weights.
    """

    parameters: int
    macs: int
    elements: int
    least: int


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what the convolutions do that run under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            source, weight, transposed = args[0], args[1], args[6]
            self.macs += (source if transposed else out).numel() * weight[0].numel()
            self.elements += source.numel() + out.numel()
        return out


def work(net: nn.Module, size: tuple[int, int]) -> Work:
    """Count what a forward pass has to do.

    Args:
        net: The network, which stays as it is.
        size: Rows and columns of the mosaic.
    """
    still = model.folded(net).to("meta")
    parameters = sum(p.numel() for p in net.parameters())
    fed = torch.empty(_shape(still, size), device="meta")
    with _Counter() as counter, torch.no_grad():
        out = still(fed)
    weights = sum(p.numel() for p in still.parameters())
    return Work(parameters, counter.macs, counter.elements, fed.numel() + out.numel() + weights)


# --- the ladder ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How a network is run.

    Attributes:
        name: What tables call it.
        half: float16 and channels last.
        tf32: Convolutions of float32 numbers round them to 10 bits of mantissa, as torch does by itself.
        graph: Recorded once as a CUDA graph and replayed.
        compiled: Mode of ``torch.compile``, "" where it is not.
        whole: From raw integers to display bytes, as ``Camera`` does.
    """

    name: str
    half: bool = True
    tf32: bool = False
    graph: bool = False
    compiled: str = ""
    whole: bool = False


GRAPH = Form("network alone, fp16, CUDA graph", graph=True)
FORMS = (
    Form("network alone, eager, fp32", half=False),
    Form("network alone, eager, tf32", half=False, tf32=True),
    Form("network alone, fp16, channels last"),
    GRAPH,
    Form("network alone, fp16, compiled (reduce-overhead)", compiled="reduce-overhead"),
    Form("network alone, fp16, compiled (max-autotune)", compiled="max-autotune"),
    Form("raw to display bytes, fp16, CUDA graph", graph=True, whole=True),
    Form("raw to display bytes, fp16, compiled", compiled="reduce-overhead", whole=True),
)
"""A network alone is timed from what it is fed to what it gives, which is not the same for all: ours gives
camera colours, the original's display colours. From raw integers to display bytes all do the same."""

Step = Callable[[int], object]


class Camera(nn.Module):
    """From raw integers to display bytes: levels, balance, noise to expect, network, colours, rounding.

    It does what ``model.feed`` and ``model.photo`` do, in a way that can be recorded as a CUDA graph. A
    network of the original's scaling gets raw integers over ``bayer.MAI21_WHITE`` alone.
    """

    gains: Tensor
    matrix: Tensor

    def __init__(self, net: nn.Module) -> None:
        """Wrap a network, which keeps its type and place, for a camera with ordinary gains and noise."""
        super().__init__()
        like = next(net.parameters())
        self.net, self.dtype, self.planes = net, like.dtype, planes(net)
        self.given = net.scaling == "mai21"
        black, white = (0.0, bayer.MAI21_WHITE) if self.given else LEVELS
        self.black, self.scale = black, 1 / (white - black)
        self.shot, self.read = 1e-3, 1e-6
        order = bayer.MAI21 if net.packing == "mai21" else range(4)
        gains = bayer.four(torch.tensor([[1.9, 1.0, 1.6]]))[:, list(order)]
        matrix = torch.tensor([[1.6, -0.5, -0.1], [-0.2, 1.5, -0.3], [0.0, -0.6, 1.6]])
        self.register_buffer("gains", gains.to(like.device))
        self.register_buffer("matrix", matrix.to(like.device))

    def forward(self, raw: Tensor) -> Tensor:
        """Return ``(1, 3, 2h, 2w)`` uint8 sRGB.

        Args:
            raw: ``(1, 4, h, w)`` integers, in the order of planes that the network takes.
        """
        display = model.photo(self.net, self._fed(raw).to(self.dtype), self.matrix)
        return (display.clamp(0, 1) * 255).round().to(torch.uint8)

    def _fed(self, raw: Tensor) -> Tensor:
        packed = (raw.float() - self.black) * self.scale
        scaled = packed if self.given else (packed * self.gains).clamp_max(1)
        if self.planes == 4:
            return scaled
        if self.given:
            return torch.cat([scaled, torch.zeros_like(scaled)], 1)
        return torch.cat([scaled, self.gains * (self.shot * packed.clamp_min(0) + self.read).sqrt()], 1)


def prepared(form: Form, net: nn.Module, fed: Sequence[Tensor]) -> Step:
    """Return a function that runs a network on input ``number``, modulo their count.

    Args:
        form: How it is run.
        net: The network, in the type of the inputs and where they are.
        fed: What takes turns, raw integers for a whole form; a graph gets it copied into an input of its own,
            which is timed too.
    """
    called: Any = Camera(net) if form.whole else net
    if form.graph:
        return _recorded(called, fed)
    if form.compiled:
        called = torch.compile(called, mode=form.compiled)
    return lambda number: called(fed[number % len(fed)])


def _recorded(net: nn.Module, fed: Sequence[Tensor]) -> Step:
    """Record a network as a CUDA graph, after running it on a stream of its own."""
    static = torch.empty_like(fed[0]).copy_(fed[0])
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            net(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        kept: Tensor = net(static)

    def step(number: int) -> Tensor:
        static.copy_(fed[number % len(fed)])
        graph.replay()
        return kept

    return step


def times(step: Step, iterations: int, where: torch.device, warm_ups: int = WARM_UPS) -> list[float]:
    """Time single iterations, each ended before the next one begins.

    Args:
        step: Called with the number of the iteration.
        iterations: How many are timed.
        where: By the events of CUDA, or by the clock on another device.
        warm_ups: Iterations before that are not.

    Returns:
        Milliseconds.
    """
    for number in range(warm_ups):
        step(number)
    if where.type != "cuda":
        return [_clocked(step, number) for number in range(iterations)]
    torch.cuda.synchronize()
    found = []
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for number in range(iterations):
        begun.record()
        step(number)
        ended.record()
        ended.synchronize()
        found.append(begun.elapsed_time(ended))
    return found


def _clocked(step: Step, number: int) -> float:
    begun = time.perf_counter()
    step(number)
    return 1e3 * (time.perf_counter() - begun)


def spread(found: Sequence[float]) -> dict[str, float]:
    """Return the median and the percentiles 10, 90 and 99 of times.

    >>> spread([1.0, 2.0, 3.0])["median"]
    2.0
    """
    low, median, high, worst = np.percentile(found, [10, 50, 90, 99])
    return {"median": float(median), "p10": float(low), "p90": float(high), "p99": float(worst)}


def ladder(
    net: nn.Module, size: tuple[int, int], where: torch.device, iterations: int, forms: Sequence[Form] = FORMS
) -> dict[str, dict[str, Any]]:
    """Time a network in every form.

    Args:
        net: The network, on any device; it stays as it is.
        size: Rows and columns of the mosaic.
        where: The device.
        iterations: Timed iterations of each form.
        forms: Which.

    Returns:
        Name of the form to "median", "p10", "p90", "p99" in ms and "peak_mb" of the device's memory; or
        to "failed" with what was said, where a form does not work here.
    """
    return {form.name: _rung(form, net, size, where, iterations) for form in forms}


def _rung(
    form: Form, net: nn.Module, size: tuple[int, int], where: torch.device, iterations: int
) -> dict[str, Any]:
    with _measuring(where, form.tf32):
        try:
            own = _shaped(form, net, where)
            step = prepared(form, own, _inputs_of(form, own, size, where))
            with torch.no_grad():
                found = spread(times(step, iterations, where))
        except Exception as fault:  # noqa: BLE001 - whatever drivers and compilers of a platform raise
            first = (str(fault).strip().splitlines() or [""])[0]
            return {"failed": f"{type(fault).__name__}: {first}"[:LONGEST]}
        return found | {"peak_mb": _peak(where)}


def _shaped(form: Form, net: nn.Module, where: torch.device) -> nn.Module:
    own = model.folded(net).to(where)
    return compute.channels_last(own.half()) if form.half else own


def _inputs_of(form: Form, net: nn.Module, size: tuple[int, int], where: torch.device) -> list[Tensor]:
    if form.whole:
        return frames(net, size, BUFFERS, where)
    fed = inputs(net, size, BUFFERS, torch.empty(0, device=where, dtype=next(net.parameters()).dtype))
    return fed if form.half else [each.contiguous() for each in fed]


@contextmanager
def _measuring(where: torch.device, tf32: bool) -> Iterator[None]:
    """Begin with nothing kept of what was measured before; cuDNN chooses by measuring, TF32 is as asked."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32 = True, tf32
    torch.compiler.reset()
    with _on(where):
        if where.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.allow_tf32 = before


def _on(where: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the one that streams and events belong to."""
    return torch.cuda.device(where) if where.type == "cuda" else nullcontext()


def _peak(where: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 1e6 if where.type == "cuda" else peak_mb()


def transfers(size: tuple[int, int], iterations: int, where: torch.device) -> dict[str, float]:
    """Return the median ms of a mosaic's way to a CUDA device, 16 bits, and of a photograph's back, 8 bits.

    Both are in page-locked memory.
    """
    with _on(where):
        mosaic = torch.zeros(size, dtype=torch.int16).pin_memory()
        photo = torch.zeros((*size, 3), dtype=torch.uint8).pin_memory()
        there, back = mosaic.to(where), photo.to(where)
        ways: dict[str, Step] = {
            "to the device": lambda number: there.copy_(mosaic, non_blocking=True),
            "from the device": lambda number: photo.copy_(back, non_blocking=True),
        }
        return {name: spread(times(way, iterations, where))["median"] for name, way in ways.items()}


# --- what limits --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceiling:
    """What a device reached in this run.

    Attributes:
        flops: Of a large product of matrices (on a CPU, or a large convolution), per second.
        bandwidth: Bytes per second that copying reads and writes.
    """

    flops: float
    bandwidth: float

    def floors(self, work: Work, width: int) -> dict[str, float]:
        """Return the ms that arithmetic alone, unfused traffic and unavoidable traffic would take.

        Args:
            work: Of the network.
            width: Bytes of a number.
        """
        return {
            "arithmetic": 2e3 * work.macs / self.flops,
            "traffic": 1e3 * width * work.elements / self.bandwidth,
            "least": 1e3 * width * work.least / self.bandwidth,
        }


def product(dtype: torch.dtype, where: torch.device, edge: int) -> tuple[Step, float]:
    """Return a product of random matrices, and its floating-point operations."""
    random = torch.Generator(where).manual_seed(0)
    one, two = (torch.randn(edge, edge, generator=random, device=where).to(dtype) for _ in range(2))
    out = torch.empty_like(one)
    return (lambda number: torch.mm(one, two, out=out)), 2.0 * edge**3


def convolution(dtype: torch.dtype, where: torch.device, edge: int) -> tuple[Step, float]:
    """Return a convolution of as many channels as can hide the traffic, and its floating-point operations."""
    random = torch.Generator(where).manual_seed(0)
    image = torch.randn(1, WIDE, edge, edge, generator=random, device=where).to(dtype)
    image = image.contiguous(memory_format=torch.channels_last)
    layer = nn.Conv2d(WIDE, WIDE, 3, padding=1, bias=False, device=where, dtype=dtype)
    layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return (lambda number: layer(image)), 2.0 * 9 * (WIDE * edge) ** 2


def copying(where: torch.device, size: int) -> tuple[Step, float]:
    """Return a copy of ``size`` bytes, and the bytes that it moves."""
    source = torch.ones(size // 4, device=where)
    target = torch.empty_like(source)
    return (lambda number: target.copy_(source)), 2.0 * size


def ceiling(where: torch.device) -> Ceiling:
    """Measure a CUDA device in float16."""
    with _on(where), torch.inference_mode():
        multiply, operations = product(torch.float16, where, SQUARE)
        copy, moved = copying(where, COPIED)
        spent = [1e-3 * min(times(step, 20, where, 5)) for step in (multiply, copy)]
    return Ceiling(operations / spent[0], moved / spent[1])
