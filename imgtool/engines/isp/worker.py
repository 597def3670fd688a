"""What ``bench isp`` times on the CPU, in a process that holds nothing else.

``python -m imgtool.engines.isp.worker`` reads an order from standard input as JSON and writes what was
measured as the last line of standard output. An order has "task", "threads" and what the task wants.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from imgtool import checkpoint, compute, files, images
from imgtool.engine import Watch
from imgtool.engines.isp import latency, libraw, model
from imgtool.engines.isp.settings import Infer, Model
from imgtool.errors import ImgtoolError
from imgtool.memory import peak_mb
from imgtool.settings import make

if TYPE_CHECKING:
    from torch import nn

    from imgtool.engine import Engine

MODULE = "imgtool.engines.isp.worker"
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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
    if order["model"]:
        return engine.build(make(Model, order["model"], "bench")).eval()
    return checkpoint.network(engine, checkpoint.read_weights(Path(order["weights"]), engine.name))


def _engine() -> Engine:
    from imgtool.engines.isp.engine import ENGINE  # which imports the bench, which imports this module

    return ENGINE


def forward(order: Order) -> Work:
    """Run a network alone: "model" or "weights", "type" of ``TYPES``, "size" of the mosaic."""
    net = model.folded(network(_engine(), order)).to(TYPES[order["type"]])
    net = compute.channels_last(net)
    like = torch.empty(0, dtype=TYPES[order["type"]])
    fed = latency.inputs(net, (order["size"][0], order["size"][1]), 1, like)[0]
    return lambda: net(fed)


def product(order: Order) -> Work:
    """Multiply matrices of the "type"."""
    step, _ = latency.product(TYPES[order["type"]], torch.device("cpu"), EDGE)
    return lambda: step(0)


def convolution(order: Order) -> Work:
    """Convolve an image of many channels, of the "type"."""
    step, _ = latency.convolution(TYPES[order["type"]], torch.device("cpu"), PIXELS)
    return lambda: step(0)


def copying(order: Order) -> Work:
    """Copy memory."""
    step, _ = latency.copying(torch.device("cpu"), COPIED)
    return lambda: step(0)


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
    "forward": forward, "rival": rival, "product": product, "convolution": convolution,
    "copying": copying, "file": file, "file by LibRaw": file_by_libraw,
}  # fmt: skip


def answer(order: Order) -> dict[str, Any]:
    """Carry out an order once, then again and timed; or return the error that the user should read."""
    compute.use_threads(order["threads"])
    try:
        base = peak_mb()
        with torch.inference_mode():
            work = TASKS[order["task"]](order)
            work()
            cpu, wall = _best(work)
    except ImgtoolError as fault:
        return {"error": fault.what, "hint": fault.hint}
    return {"cpu": cpu, "wall": wall, "peak_mb": peak_mb(), "base_mb": base}


def _best(work: Work) -> tuple[float, float]:
    """Return the least CPU time and the least wall time of the calls of a while, at least one."""
    found: list[tuple[float, float]] = []
    began = time.monotonic()
    while not found or time.monotonic() - began < WHILE:
        cpu, wall = time.process_time(), time.monotonic()
        work()
        found.append((time.process_time() - cpu, time.monotonic() - wall))
    return min(cpu for cpu, _ in found), min(wall for _, wall in found)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.loads(sys.stdin.read()))) + "\n")
