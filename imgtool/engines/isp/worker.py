"""What ``bench isp`` times on the CPU, in a process that holds nothing else.

``python -m imgtool.engines.isp.worker`` reads an order from standard input as JSON and writes what was
measured as the last line of standard output. An order has "task", "threads" and what the task wants.
CPU time and memory are those of this process and of the children that it started, such as the one that
decodes RAW files. What LibRaw does is done without torch: each task imports what it needs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool import files, images
from imgtool.engine import Watch
from imgtool.engines.isp import libraw
from imgtool.engines.isp.settings import Infer, Model
from imgtool.errors import ImgtoolError
from imgtool.memory import peak_mb
from imgtool.settings.sources import make

if TYPE_CHECKING:
    from torch import nn

    from imgtool.engine import Engine

MODULE = "imgtool.engines.isp.worker"
EDGE, PIXELS, COPIED = 1536, 64, 1 << 27
"""Edges of the matrices and of the convolved image, and bytes that are copied, for the ceilings of a CPU."""
WHILE = 0.3
"""Seconds in which short work is timed again and again."""
QUALITY = 95
"""Of the JPEG files that are written."""

Order = Mapping[str, Any]
Work = Callable[[], object]


def network(engine: Engine, order: Order) -> nn.Module:
    """Return the network of an order: by its "model" settings, untrained, or of its "weights"."""
    from imgtool import checkpoint

    if order["model"]:
        return engine.build(make(Model, order["model"], "bench")).eval()
    return checkpoint.network(engine, checkpoint.read_weights(Path(order["weights"]), engine.name))


def _engine() -> Engine:
    from imgtool.engines.isp.engine import ENGINE  # which imports the bench, which imports this module

    return ENGINE


def forward(order: Order) -> Work:
    """Run a network alone: "model" or "weights", "type" of ``latency.TYPES``, "size" of the mosaic."""
    import torch

    from imgtool.engines.isp import latency

    net = _shaped(order)
    like = torch.empty(0, dtype=latency.TYPES[order["type"]])
    fed = latency.inputs(net, (order["size"][0], order["size"][1]), 1, like)[0]
    return _unrecorded(lambda: net(fed))


def whole(order: Order) -> Work:
    """Run a network with all that lies between raw integers and display bytes; see ``forward``."""
    import torch

    from imgtool.engines.isp import latency

    net = latency.Camera(_shaped(order))
    raw = latency.frames(net.net, (order["size"][0], order["size"][1]), 1, torch.device("cpu"))[0]
    return _unrecorded(lambda: net(raw))


def _shaped(order: Order) -> nn.Module:
    """Return the network of an order, in its type."""
    from imgtool import compute
    from imgtool.engines.isp import latency, model

    return compute.channels_last(model.folded(network(_engine(), order)).to(latency.TYPES[order["type"]]))


def _unrecorded(work: Work) -> Work:
    """Return work for which torch keeps no gradients."""
    import torch

    decorated: Work = torch.inference_mode()(work)
    return decorated


def product(order: Order) -> Work:
    """Multiply matrices of the "type"."""
    import torch

    from imgtool.engines.isp import latency

    step, _ = latency.product(latency.TYPES[order["type"]], torch.device("cpu"), EDGE)
    return _unrecorded(lambda: step(0))


def convolution(order: Order) -> Work:
    """Convolve an image of many channels, of the "type"."""
    import torch

    from imgtool.engines.isp import latency

    step, _ = latency.convolution(latency.TYPES[order["type"]], torch.device("cpu"), PIXELS)
    return _unrecorded(lambda: step(0))


def copying(order: Order) -> Work:
    """Copy memory."""
    import torch

    from imgtool.engines.isp import latency

    step, _ = latency.copying(torch.device("cpu"), COPIED)
    return _unrecorded(lambda: step(0))


def rival(order: Order) -> Work:
    """Have LibRaw finish the DNG at "path", which is open already."""
    import rawpy

    opened = rawpy.imread(order["path"])
    return lambda: libraw.finish(opened)


def file_by_libraw(order: Order) -> Work:
    """Have LibRaw make a JPEG, "target", of the DNG at "path"."""

    def develop() -> None:
        _written(Path(order["target"]), libraw.develop(Path(order["path"])))

    return develop


def file(order: Order) -> Work:
    """Make a JPEG, "target", of the DNG at "path", as ``infer`` does with the "weights"."""
    from imgtool import compute

    engine = _engine()
    net = compute.channels_last(network(engine, order))
    settings = Infer(inputs=("-",), depth="8")
    opens: Callable[..., Any] = engine.open or images.read

    def develop() -> None:
        photo = opens(Path(order["path"]), order["path"], settings, net)
        _written(Path(order["target"]), engine.apply(net, photo, settings, Watch()).pixels)

    return develop


def _written(target: Path, pixels: Any) -> None:
    files.write(target, images.encode(images.Photo(pixels), "jpg", QUALITY))


TASKS: Mapping[str, Callable[[Order], Work]] = {
    "forward": forward, "whole": whole, "rival": rival, "product": product, "convolution": convolution,
    "copying": copying, "file": file, "file by LibRaw": file_by_libraw,
}  # fmt: skip
LIBRAW = frozenset({"rival", "file by LibRaw"})
"""Tasks for which torch is not there."""


def answer(order: Order) -> dict[str, Any]:
    """Carry out an order once, then again and timed; or return the error that the user should read."""
    if order["task"] in LIBRAW:
        import cv2

        cv2.setNumThreads(order["threads"])
    else:
        from imgtool import compute

        compute.use_threads(order["threads"])
    try:
        base = peak_mb()
        work = TASKS[order["task"]](order)
        work()
        started = children()
        cpu, wall = _best(work, started)
    except ImgtoolError as fault:
        return {"error": fault.what, "hint": fault.hint}
    peak = peak_mb() + sum(_peak_of(child) for child in started)
    return {"cpu": cpu, "wall": wall, "peak_mb": peak, "base_mb": base}


def _best(work: Work, started: Sequence[int]) -> tuple[float, float]:
    """Return the least CPU time and the least wall time of the calls of a while, at least one."""
    found: list[tuple[float, float]] = []
    began = time.monotonic()
    while not found or time.monotonic() - began < WHILE:
        cpu, wall = _cpu(started), time.monotonic()
        work()
        found.append((_cpu(started) - cpu, time.monotonic() - wall))
    return min(cpu for cpu, _ in found), min(wall for _, wall in found)


# --- children -----------------------------------------------------------------------------------------


def children() -> list[int]:
    """Return the processes that this one started and that still run, [] where there is no /proc."""
    numbers = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [number for number in numbers if _fields(number)[1:2] == [str(os.getpid())]]


def _fields(number: int) -> list[str]:
    """Return the fields of /proc/NUMBER/stat after the name: state, parent and so on; [] without one."""
    return "".join(_lines(number, "stat")).rpartition(")")[2].split()


def _lines(number: int, name: str) -> Iterator[str]:
    try:
        yield from Path("/proc", str(number), name).read_text(errors="replace").splitlines()
    except OSError:
        return


def _cpu(started: Sequence[int]) -> float:
    """Return CPU seconds of this process and of those; theirs are told in ticks, mostly of 10 ms."""
    ticks = sum(int(user) + int(system) for user, system in (_fields(child)[11:13] for child in started))
    return time.process_time() + (ticks / os.sysconf("SC_CLK_TCK") if started else 0.0)


def _peak_of(number: int) -> float:
    """Return a process's VmHWM in 10^6 bytes."""
    told = [line.split()[1] for line in _lines(number, "status") if line.startswith("VmHWM:")]
    return int(told[0]) * 1024 / 1e6 if told else 0.0


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.loads(sys.stdin.read()))) + "\n")
