"""What ``bench awb`` measures, in a process that holds nothing else.

``python -m imgtool.engines.awb.worker`` reads an order from standard input as JSON and writes the answer
as the last line of standard output. It imports what the order needs, when it needs it: what is
imported is a part of what is measured.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool.errors import ImgtoolError
from imgtool.memory import peak_mb

if TYPE_CHECKING:
    import numpy.typing as npt

    from imgtool.engines.awb.estimate import Net

    Array = npt.NDArray[Any]

FRAME = (432, 648)
"""Rows and columns of a frame in memory: those of SimpleCube++."""
WHITE = 16_383
PATCH = 24
"""Pixels of an edge of the patches that they show."""
DISTINCT = 16
"""Frames that take turns."""
STEPS = 50
"""Ticks of the clock that one timing takes at least."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
LIBRARIES = {"onnx": "onnxruntime", "tflite": "ai_edge_litert.interpreter", "torch": "torch"}
"""What a runtime is, where it is not NumPy."""
PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


# --- in the parent -----------------------------------------------------------------------------------


def ask(order: Mapping[str, Any]) -> dict[str, Any]:
    """Have an order carried out in a fresh process with one thread, and return its answer.

    Args:
        order: {"task": "core", "weights", "runtime", "frames"} or {"task": "command", "words"}:
            see ``core`` and ``command``.

    Raises:
        ImgtoolError: The process was killed, or met an error that the user should read.
        RuntimeError: It met any other.
    """
    one = dict.fromkeys(THREADS, "1") | {"OMP_WAIT_POLICY": "PASSIVE"}
    child = subprocess.run(
        [sys.executable, "-m", "imgtool.engines.awb.worker"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        env=os.environ | one,
        check=False,
    )
    if child.returncode < 0:
        hint = "a process that needs more memory than there is gets killed"
        raise ImgtoolError(f"what was measured was killed by signal {-child.returncode}", hint)
    if child.returncode:  # a bug, so all of it is shown
        raise RuntimeError(f"measuring failed:\n{child.stderr}")
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    if "error" in answer:
        raise ImgtoolError(answer["error"], answer["hint"])
    return answer


# --- in the child ------------------------------------------------------------------------------------


def tick() -> float:
    """Return the shortest time in seconds that the clock of CPU time tells apart."""
    read = time.process_time
    steps = [after - before for before, after in ((read(), read()) for _ in range(1000))]
    rising = [step for step in steps if step > 0]
    return min(rising) if rising else time.get_clock_info("process_time").resolution


def timed(
    work: Callable[[int], object], count: int, prepare: Callable[[int], object] = lambda number: None
) -> dict[str, float]:
    """Time calls by the CPU time of all threads of this process.

    Calls too short for the clock are timed several at a time, and their mean counts.

    Args:
        work: What is called, with the number of the call.
        count: Timings.
        prepare: Called before each timing, untimed, with its number.

    Returns:
        Percentiles and mean in ms, ``timings``, and ``batch``: the calls of each.
    """
    typical, least = _typical(work), STEPS * tick()
    if typical < least:  # so short that what disturbs them once counts
        typical = min(typical, _typical(work), _typical(work))
    batch = min(max(1, round(least / typical)), 10_000)
    found = []
    for first in range(0, count * batch, batch):
        prepare(first // batch)
        began = time.process_time()
        for number in range(first, first + batch):
            work(number)
        found.append(1e3 * (time.process_time() - began) / batch)
    ranked = sorted(found)
    told = {name: ranked[min(count - 1, int(share * count))] for name, share in PERCENTILES.items()}
    return told | {"mean": sum(found) / count, "timings": count, "batch": batch}


def _typical(work: Callable[[int], object]) -> float:
    """Return the CPU seconds of a call, more than 0."""
    began = time.process_time()
    for number in range(DISTINCT):
        work(number)
    return max((time.process_time() - began) / DISTINCT, 1e-9)


def frames(count: int = DISTINCT, size: tuple[int, int] = FRAME) -> list[Array]:
    """Return different linear frames ``(H, W, 3)`` uint16 of 14 bits: patches of colour under a light.

    They are parts of one scene, so that together they take little more memory than one.
    """
    import numpy as np

    rng = np.random.default_rng(7)
    high, wide = size
    patches = rng.uniform(0.02, 0.9, (high // PATCH + 3, wide // PATCH + 3, 3)) ** 2
    coarse = (patches * [0.5, 1.0, 0.65] * 14_000 + 60).astype(np.uint16)
    scene = coarse.repeat(PATCH, 0).repeat(PATCH, 1)
    scene += rng.integers(0, 60, scene.shape, np.uint16)
    places = rng.integers(0, 2 * PATCH, (count, 2))
    return [scene[y : y + high, x : x + wide] for y, x in places]


def network(weights: Path, runtime: str) -> Net:
    """Load a network for a runtime.

    Args:
        weights: Its weights; for "onnx" and "tflite" its exported file.
        runtime: "numpy", "onnx", "tflite" or "torch".
    """
    if runtime in ("onnx", "tflite"):
        from imgtool.engines.awb import exported

        return exported.opened(weights)
    from imgtool import header
    from imgtool.engines.awb import estimate
    from imgtool.engines.awb.settings import Model
    from imgtool.settings.sources import make

    if runtime == "torch":
        import torch

        from imgtool import checkpoint
        from imgtool.engines.awb.engine import ENGINE

        torch.set_num_threads(1)
        module: Any = checkpoint.network(ENGINE, checkpoint.read_weights(weights, "awb"))
        return estimate.of_module(module, module.shape)
    read = header.read(weights, "awb")
    shape = make(Model, read.model, f"weights {read.name}")
    return estimate.of_state(shape, read.state)


class Phases:
    """Peak resident memory after each phase, and the CPU time that it took."""

    def __init__(self) -> None:
        """Begin, with what the interpreter took to start."""
        self.peaks: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._began = 0.0

    def end(self, name: str) -> None:
        """End a phase: peak in MB, CPU time in ms."""
        now = time.process_time()
        self.peaks[name], self.cpu[name] = peak_mb(), 1e3 * (now - self._began)
        self._began = now


def core(order: Mapping[str, Any]) -> dict[str, Any]:
    """Measure a frame in memory to gains: averaging, features, network, answer.

    Args:
        order: ``weights`` (or an exported file), ``runtime``, ``frames`` (timed calls).

    Returns:
        ``core`` and ``network`` as ``timed`` gives them, ``phases_mb`` and ``phases_ms``,
        ``peak_mb`` of the whole process, and ``gains`` of each of the frames.
    """
    phases = Phases()
    import numpy as np

    from imgtool.engines.awb import estimate, stats

    if order["runtime"] != "numpy":
        importlib.import_module(LIBRARIES[order["runtime"]])
    phases.end("import")
    net = network(Path(order["weights"]), order["runtime"])
    phases.end("load")
    seen, frame = frames(), np.empty((*FRAME, 3), np.uint16)
    gains, cells = {}, _cells(net)

    def fill(number: int) -> None:
        frame[...] = seen[number % DISTINCT]

    def work(number: int) -> None:
        r, b, _ = estimate.white(net, stats.of_linear(frame, 0, WHITE, cells=cells))
        gains[number % DISTINCT] = [1 / r, 1 / b]

    fill(0)
    work(0)
    phases.end("first")
    whole = timed(work, order["frames"], fill)
    phases.end("steady")
    inputs = _inputs(net, seen)
    alone = timed(lambda number: net.run(*inputs[number % len(inputs)]), order["frames"])
    return {
        "core": whole, "network": alone, "phases_mb": phases.peaks, "phases_ms": phases.cpu,
        "peak_mb": phases.peaks["steady"], "gains": [gains[number] for number in sorted(gains)],
        "parameters": net.parameters,
    }  # fmt: skip


def _cells(net: Net) -> int:
    """Return how many cells a network sees: the original's as many as its input has pixels."""
    from imgtool.engines.awb import stats

    return net.shape.height * net.shape.width if net.shape.arch == "deepawb" else stats.CELLS


def _inputs(net: Net, seen: Sequence[Array]) -> list[tuple[Array, ...]]:
    """Return what the network sees of the frames; of a large one, of two."""
    from imgtool.engines.awb import estimate, stats

    some, cells = seen if net.shape.arch == "hist" else seen[:2], _cells(net)
    return [estimate.inputs(net.shape, stats.of_linear(each, 0, WHITE, cells=cells)) for each in some]


def command(order: Mapping[str, Any]) -> dict[str, Any]:
    """Run an imgtool command in this process, and measure all of the process: start, imports, work.

    Args:
        order: ``words`` of the command, with ``--json`` among them.

    Returns:
        ``cpu``: seconds of this process and of those that it waited for. ``own_mb``: its peak resident
        memory. ``child_mb``: the largest peak of a process that it waited for, 0 where there was
        none. ``shared_mb``: how much of its memory that process got from this one by a fork.
        ``peak_mb``: the larger of both peaks. ``sum_mb``: both, what they share counted once.
        ``code`` and ``record``: what the command returned and said last.
    """
    import contextlib
    import io
    import resource

    cli = importlib.import_module("imgtool.cli")  # what is measured is a command
    said, shared = io.StringIO(), _shared()
    with contextlib.redirect_stdout(said):
        code = cli.run(order["words"])
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    own, child = peak_mb(), children.ru_maxrss * unit / 1e6
    common = max(shared, default=0.0)
    return {
        "cpu": time.process_time() + children.ru_utime + children.ru_stime,
        "own_mb": own,
        "child_mb": child,
        "shared_mb": common,
        "peak_mb": max(own, child),
        "sum_mb": own + child - common,
        "code": code,
        "record": json.loads((said.getvalue().splitlines() or ["{}"])[-1]),
    }


def _shared() -> list[float]:
    """Return a list that gets the memory in MB that each decoder of camera RAW shares with this process."""
    from imgtool.engines.awb import mosaic

    found: list[float] = []
    read = mosaic.read

    def noted(*args: Any, **values: Any) -> Any:
        stats = read(*args, **values)
        found.append(stats.about.get("shared_mb", 0.0))
        return stats

    mosaic.read = noted
    return found


TASKS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"core": core, "command": command}


def answer(order: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured, or the error that the user should read."""
    try:
        return TASKS[order["task"]](order)
    except ImgtoolError as fault:
        return {"error": fault.what, "hint": fault.hint}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.loads(sys.stdin.read()))) + "\n")
