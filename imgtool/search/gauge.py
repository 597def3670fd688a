"""What an untrained network costs, measured in a process of its own.

``python -m imgtool.search.gauge`` reads an order and writes an answer, both JSON, by standard input and
output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from imgtool import engines
from imgtool.engine import Engine, Watch
from imgtool.errors import ImgtoolError
from imgtool.memory import peak_mb
from imgtool.search.cost import Cost, Unmeasured, cpu_times
from imgtool.settings import Settings
from imgtool.settings.sources import make

SIDE = 512
"""Rows and columns of the picture that is measured on."""
MEASURED = f"infer on {SIDE}x{SIDE} random pixels: median CPU time, 1 thread; memory of the whole process"
PATIENCE = 600
"""Seconds after which a measurement is given up."""

_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
ONE_THREAD = {**dict.fromkeys(_COUNTS, "1"), "OMP_WAIT_POLICY": "PASSIVE"}


class Unfit(ImgtoolError):
    """There is no such network: its settings contradict each other."""


def structure(engine: Engine, settings: Settings) -> dict[str, Any]:
    """Return what shapes the network that settings of a training make."""
    return {name: getattr(settings, name) for name in engine.model.model_fields}


def measured(engine: str, net: Mapping[str, Any], max_ms: float) -> Cost:
    """Measure a network with random weights in a fresh process: from a picture in memory to the result.

    Args:
        engine: Name of the engine.
        net: Settings that shape the network.
        max_ms: Limit in ms, 0 for none; what misses it by far is measured less exactly.

    Raises:
        Unfit: There is no such network.
        Unmeasured: The process ended without an answer.
    """
    order = json.dumps({"engine": engine, "net": net, "max_ms": max_ms})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "imgtool.search.gauge"],
            input=order, capture_output=True, text=True, timeout=PATIENCE, env=os.environ | ONE_THREAD,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        what, hint = f"measuring took more than {PATIENCE} s", "a --max-ms ends sooner what is too slow"
        raise Unmeasured(what, hint) from None
    if done.returncode:
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        what = f"measuring ended with code {done.returncode}" + f": {said}" * bool(said)
        raise Unmeasured(what, "a killed process lacked memory: begin anew with a smaller --space")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise Unfit(answer["error"], answer["hint"])
    return Cost(answer["cpu_ms"], answer["mb"], parameters=answer["parameters"])


def measure(order: Mapping[str, Any]) -> dict[str, Any]:
    """Measure in this process; see ``measured`` for the order.

    Returns:
        "cpu_ms" (the median), "mb" and "parameters".
    """
    import numpy as np

    from imgtool import compute, images

    compute.use_threads(1)
    engine = engines.load(order["engine"])
    infer = make(
        engines.settings(engine.name).Infer, {"inputs": ("-",), "device": "cpu", "threads": 1}, "search"
    )
    net = compute.channels_last(engine.build(make(engine.model, order["net"], "search")).eval())
    if engine.specimen is not None:
        picture: Any = engine.specimen(SIDE, SIDE, 0)
    else:
        picture = images.Photo(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    parameters = sum(each.numel() for each in net.parameters())
    times = cpu_times(lambda: engine.apply(net, picture, infer, Watch()), order["max_ms"], rounds=1)
    return {"cpu_ms": float(np.median(times)), "mb": peak_mb(), "parameters": parameters}


def answer(order: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured, or the error that the user should read."""
    try:
        return measure(order)
    except ImgtoolError as fault:
        return {"error": fault.what, "hint": fault.hint}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.loads(sys.stdin.read()))) + "\n")
