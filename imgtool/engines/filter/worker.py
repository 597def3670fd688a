"""What ``bench filter`` times, in a process that holds nothing else.

``python -m imgtool.engines.filter.worker`` reads an order from standard input as JSON and writes what was
measured as the last line of standard output. Both sides take 8-bit pixels and give 8-bit pixels. An order has

- "picture": a .npy file, ``(H, W, 3)`` uint8 RGB;
- "threads";
- "target" and "factor": the filter, and the size of the photo that it is run on, 1 for the photo itself;
- or "weights" and "device": a network that does the same.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imgtool import images
from imgtool.engine import Watch
from imgtool.engines.filter import blackbox, targets, upsample
from imgtool.engines.filter.settings import Infer
from imgtool.errors import ImgtoolError
from imgtool.memory import peak_mb

if TYPE_CHECKING:
    from imgtool.engine import Pixels

MODULE = "imgtool.engines.filter.worker"
WHILE = 0.3
"""Seconds in which short work is timed again and again."""

Order = Mapping[str, Any]
Work = Callable[[], object]


def classical(order: Order, picture: Pixels) -> Work:
    """Run the filter, at the size that the order names."""
    target, factor = blackbox.resolve(order["target"]), order["factor"]

    def work() -> Pixels:
        if factor == 1:
            return targets.eight_bit(target(picture))
        found = upsample.reduced(target, picture, factor)
        return targets.eight_bit(target.finish(found) if target.finish else found)

    return work


def learned(order: Order, picture: Pixels) -> Work:
    """Run a network, as ``infer`` does."""
    from imgtool import checkpoint, compute
    from imgtool.engines.filter.engine import ENGINE  # which imports the bench, which imports this module

    net = checkpoint.network(ENGINE, checkpoint.read_weights(Path(order["weights"]), ENGINE.name))
    net = compute.channels_last(net.to(compute.device(order["device"])))
    photo, settings = images.Photo(picture), Infer(inputs=("-",))
    return lambda: ENGINE.apply(net, photo, settings, Watch())


def answer(order: Order) -> dict[str, Any]:
    """Carry out an order once, then again and timed; or return the error that the user should read."""
    from imgtool import compute

    compute.use_threads(order["threads"])
    try:
        picture = np.load(order["picture"])
        base = peak_mb()
        work = (learned if "weights" in order else classical)(order, picture)
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
