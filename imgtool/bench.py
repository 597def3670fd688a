"""The verb ``bench``: every subject in processes of its own, in turn, on the same machine and day.

CPU seconds (user and system) are what counts, for machines are shared; memory is the peak resident
set of the whole process (VmHWM). A subject's process loads what it needs, runs once to warm up and
then once more, timed; subjects take turns, so that a disturbance hits all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool import checkpoint, engines, files, images, machine
from imgtool.console import plain
from imgtool.engine import Engine, Subject, Timing, Watch
from imgtool.errors import DONE, FAILED, ImgtoolError
from imgtool.memory import peak_mb
from imgtool.settings import Bench
from imgtool.settings.sources import make

if TYPE_CHECKING:
    from torch import nn

    from imgtool.console import Console


PAGE = "bench.json"


def plan(engine: Engine, settings: Bench) -> Mapping[str, object]:
    """Return what ``--dry-run`` tells."""
    weights = checkpoint.find(engine.chosen(settings), engine.name)
    return {"weights": str(weights), "threads": settings.threads, "runs": settings.runs}


def run(engine: Engine, settings: Bench, console: Console) -> int:
    """Measure, print tables and one JSON object; 1 where a stated limit is missed."""
    page = settings.report / PAGE if settings.report else None
    if page and page.exists():
        raise ImgtoolError(f"{page} exists", "name another folder by --report")
    report = engine.bench(settings, Lab(engine, settings, console))
    record = {
        "engine": engine.name,
        "what": report.what,
        "environment": environment(settings),
        "figures": dict(report.figures),
        "budgets": [asdict(budget) | {"pass": budget.passed} for budget in report.budgets],
    }
    if page:
        files.write(page, json.dumps(plain(record), indent=2).encode())
        console.say(f"report: {page.parent}")
    for table in report.tables:
        console.table(table.title, table.columns, table.rows)
    limits = [
        (b.name, f"{b.sense} {b.limit:g} {b.unit}", f"{b.value:.4g}", "pass" if b.passed else "MISSED")
        for b in report.budgets
    ]
    console.table("Limits", ("what", "limit", "measured", ""), limits)
    console.result(record)
    return DONE if all(budget.passed for budget in report.budgets) else FAILED


def environment(settings: Bench) -> dict[str, object]:
    """Return what the figures depend on besides the code."""
    return {
        **machine.facts(settings.device, settings.threads),
        "omp_wait_policy": "PASSIVE",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


class Lab:
    """What an engine's bench is given: weights, timing in fresh processes, words for the user."""

    def __init__(self, engine: Engine, settings: Bench, console: Console) -> None:
        """Read the weights, so that a wrong name fails before anything is timed."""
        self.engine, self.settings, self.console = engine, settings, console
        self.path = checkpoint.find(engine.chosen(settings), engine.name)
        self.weights = checkpoint.read_weights(self.path, engine.name)
        self.watch = Watch(say=console.say)

    def network(self) -> nn.Module:
        """Return the network under test, in evaluation mode, on the CPU."""
        return checkpoint.network(self.engine, self.weights)

    def measure(self, subjects: Sequence[Subject], runs: int = 0) -> dict[str, Timing]:
        """Time subjects in turn, each round in a fresh process, and keep the best of all rounds.

        Args:
            subjects: What to time.
            runs: Rounds; 0 as many as the settings say.

        Raises:
            ImgtoolError: A subject could not be measured.
        """
        return self._in_turn({subject.name: partial(self._once, subject) for subject in subjects}, runs)

    def measure_by(
        self, module: str, orders: Mapping[str, Mapping[str, Any]], runs: int = 0
    ) -> dict[str, Timing]:
        """Time what another module measures, as ``measure`` does.

        Args:
            module: Run as ``python -m``; it reads an order as JSON from standard input, and its last line
                is a ``Timing`` as JSON, or {"error", "hint"}.
            orders: Name to order; "threads" in it is the number of CPU threads, 0 all cores.
            runs: Rounds; 0 as many as the settings say.

        Raises:
            ImgtoolError: Something could not be measured.
        """
        works = {name: partial(self._ask, name, module, order) for name, order in orders.items()}
        return self._in_turn(works, runs)

    def wall(self, commands: Mapping[str, Sequence[str]], threads: int = 0) -> dict[str, float]:
        """Return the seconds by the clock that commands take, each once, from start to end.

        Args:
            commands: Name to program and arguments.
            threads: CPU threads of torch, OpenMP; 0 all cores.

        Raises:
            RuntimeError: One failed.
        """
        found = {}
        for name, command in commands.items():
            began = time.monotonic()
            child = subprocess.run(
                command, capture_output=True, text=True, env=_surroundings(threads), check=False
            )
            found[name] = time.monotonic() - began
            if child.returncode:
                raise RuntimeError(f"measuring {name} failed:\n{child.stderr}")
        return found

    def _in_turn(self, works: Mapping[str, Callable[[], Timing]], runs: int) -> dict[str, Timing]:
        rounds = runs or self.settings.runs
        found: dict[str, list[Timing]] = {}
        with self.console.progress(len(works) * rounds, "bench") as bar:
            for _ in range(rounds):
                for name, work in works.items():
                    bar.update(name)
                    found.setdefault(name, []).append(work())
                    bar.advance(1)
        return {name: _best(timings) for name, timings in found.items()}

    def _once(self, subject: Subject) -> Timing:
        order = {"engine": self.engine.name, "weights": str(self.path), "device": self.settings.device}
        order |= {"threads": self.settings.threads} | asdict(subject)
        return self._ask(subject.name, "imgtool.bench", order)

    def _ask(self, name: str, module: str, order: Mapping[str, Any]) -> Timing:
        threads = order["threads"] or os.cpu_count() or 1
        child = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps({**order, "threads": threads}),
            capture_output=True,
            text=True,
            env=_surroundings(threads),
            check=False,
        )
        return _outcome(name, child)


def _surroundings(threads: int) -> dict[str, str]:
    count = threads or os.cpu_count() or 1
    return os.environ | {"OMP_NUM_THREADS": str(count), "OMP_WAIT_POLICY": "PASSIVE"}


def _outcome(name: str, child: subprocess.CompletedProcess[str]) -> Timing:
    """Return what the process measured, or raise what stopped it."""
    if child.returncode < 0:
        hint = "a process that needs more memory than there is gets killed: try a smaller picture"
        raise ImgtoolError(f"measuring {name} was killed by signal {-child.returncode}", hint)
    if child.returncode:  # a bug, so all of it is shown
        raise RuntimeError(f"measuring {name} failed:\n{child.stderr}")
    answer = json.loads(child.stdout.splitlines()[-1])
    if "error" in answer:
        raise ImgtoolError(f"measuring {name}: {answer['error']}", answer["hint"])
    return Timing(**answer)


def _best(timings: Sequence[Timing]) -> Timing:
    return Timing(
        min(t.cpu for t in timings),
        min(t.wall for t in timings),
        max(t.peak_mb for t in timings),
        min(t.base_mb for t in timings),
    )


def child(order: Mapping[str, Any]) -> dict[str, float]:
    """Measure one subject in this process, as ``Lab`` ordered."""
    import numpy as np

    from imgtool import compute

    compute.use_threads(order["threads"])
    engine = engines.load(order["engine"])
    image = np.random.default_rng(0).integers(0, 256, (order["height"], order["width"], 3), np.uint8)
    base = peak_mb()
    work = _work(engine, image, order)
    if order["warm"]:
        work()
    cpu, wall = time.process_time(), time.monotonic()
    work()
    spent = {"cpu": time.process_time() - cpu, "wall": time.monotonic() - wall}
    return spent | {"peak_mb": peak_mb(), "base_mb": base}


def _work(engine: Engine, image: Any, order: Mapping[str, Any]) -> Callable[[], object]:
    """Return what is timed: the classical method, or ``apply`` as ``infer`` calls it."""
    from imgtool import compute

    if order["baseline"]:
        return lambda: engine.baseline(image)
    if order["model"]:
        net = engine.build(make(engine.model, order["model"], "bench")).eval()
    else:
        net = checkpoint.network(engine, checkpoint.read_weights(Path(order["weights"]), engine.name))
    net = compute.channels_last(net.to(compute.device(order["device"])))
    infer = make(engines.settings(engine.name).Infer, {"inputs": ("-",), **order["settings"]}, "bench")
    photo = images.Photo(image)
    return lambda: engine.apply(net, photo, infer, Watch())


def answer(order: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured, or the error that the user should read."""
    try:
        return dict(child(order))
    except ImgtoolError as fault:
        return {"error": fault.what, "hint": fault.hint}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.loads(sys.stdin.read()))) + "\n")
