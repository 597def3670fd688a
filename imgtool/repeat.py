"""The same training with several seeds: one after another or side by side, and what all say together."""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from imgtool import files, plots
from imgtool.console import plain
from imgtool.engine import Engine
from imgtool.errors import DONE, FAILED, USAGE, ImgtoolError
from imgtool.settings import Train

if TYPE_CHECKING:
    from types import FrameType

    from imgtool.console import Bar, Console
    from imgtool.train import Crew

RUNS = "runs.json"
PICTURE = "runs.png"
CONFIDENCE = 0.95
FREE = {
    *("runs", "parallel", "threads", "workers", "device", "out", "resume"),
    *("track", "track_to", "experiment", "register_as"),
}
"""Settings that may change while repeated runs go on: the others make the runs what they are."""

Found = Mapping[str, Any]


# --- statistics -----------------------------------------------------------------------------------


def student(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return t such that Student's t lies in -t..t with the given probability.

    The distribution by its finite series (Abramowitz and Stegun, "Handbook of Mathematical Functions",
    26.7.3 and 26.7.4), turned round by bisection.

    Args:
        freedom: Degrees of freedom, at least 1.
        confidence: Probability, 0 to 1, both excluded.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _inside(angle: float, freedom: int) -> float:
    """Return the probability of abs(t) < sqrt(freedom) * tan(angle)."""
    odd = freedom % 2
    cosine = math.cos(angle)
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (power - 1) / power
        total += term
    return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return what several runs say of a figure.

    Returns:
        mean, sd (of the sample: n - 1), low and high (the 95 % confidence interval of the mean by Student's
        t, which takes the values of runs for normally distributed) and runs, their number. What too few
        values do not tell is NaN.
    """
    count = len(values)
    mean = fmean(values) if values else math.nan
    sd = stdev(values) if count > 1 else math.nan
    half = student(count - 1) * sd / math.sqrt(count) if count > 1 else math.nan
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half, "runs": count}


def band(logs: Sequence[Mapping[float, float]]) -> list[tuple[float, float, float, float]]:
    """Return step, mean, low and high of a figure at each step, over the runs that got there.

    Args:
        logs: Step to value, for each run.
    """
    steps = sorted({step for log in logs for step in log})
    told = [(step, spread([log[step] for log in logs if step in log])) for step in steps]
    return [(step, each["mean"], each["low"], each["high"]) for step, each in told]


# --- the runs -------------------------------------------------------------------------------------


def check_same(begun: Train, wanted: Train) -> None:
    """Refuse to go on with repeated runs as something else, or with a single run as repeated ones.

    Raises:
        ImgtoolError: Code 2.
    """
    if (begun.runs > 1) != (wanted.runs > 1):
        what = f"the folder holds {'repeated runs' if begun.runs > 1 else 'a single run'}"
        raise ImgtoolError(what, f"go on with --runs {begun.runs}, or begin anew", USAGE)
    if begun.runs == 1:
        return
    for name in type(begun).model_fields.keys() - FREE:
        if getattr(begun, name) != getattr(wanted, name):
            flag = f"--{name.replace('_', '-')}"
            what = f"repeated runs go on as they began, with {flag} {getattr(begun, name)}"
            raise ImgtoolError(what, f"leave out {flag}, or begin anew", USAGE)


def run(engine: Engine, settings: Train, crew: Crew, console: Console) -> int:
    """Train ``settings.runs`` times, into ``run-00``, ... of the crew's folder; go on where that was begun.

    The folder gets ``runs.json`` and ``runs.png``: the loss and the chosen metric over the steps.

    Returns:
        1 where a run failed: the others go on all the same.

    Raises:
        ImgtoolError: What was asked wrongly, as every run would find.
        KeyboardInterrupt: After the states were saved.
    """
    every = {
        f"run-{number:02d}": settings.changed(
            seed=settings.seed + number, runs=1, parallel=1, resume=None, out=None
        )
        for number in range(settings.runs)
    }
    if settings.parallel > 1:
        found, failed = Processes(engine.name, every, settings, crew, console).go()
    else:
        found, failed = _in_turn(every, crew, console)
    best = {name: dict(found[name]["best"].get("scores", {})) for name in every if name in found}
    scores = {name: spread(values) for name, values in _by_name(best.values()).items()}
    record = {
        "runs": [
            {
                "name": name,
                "seed": every[name].seed,
                "best": found[name]["best"],
                "weights": found[name]["weights"],
            }
            for name in best
        ],
        "failed": failed,
        "scores": scores,
        "confidence": CONFIDENCE,
        "folder": str(crew.folder),
    }
    files.write(crew.folder / RUNS, json.dumps(plain(record), indent=2).encode())
    if found:
        _draw(engine, [crew.log(name) for name in best], crew.folder)
    lines = [_line(name, each) for name, each in scores.items()]
    console.result(record, "\n".join([*lines, f"runs: {len(found)} of {len(every)}, in {crew.folder}"]))
    if failed:
        console.warn(f"failed: {', '.join(failed)}; go on with them by --resume {crew.folder}")
    return FAILED if failed else DONE


def _in_turn(
    every: Mapping[str, Train], crew: Crew, console: Console
) -> tuple[dict[str, Found], dict[str, str]]:
    found: dict[str, Found] = {}
    failed: dict[str, str] = {}
    for name, settings in every.items():
        console.say(f"{name}: seed {settings.seed}")
        try:
            found[name] = crew.train(settings, name)
        except ImgtoolError as fault:
            failed[name] = _failed(name, fault, crew, console)
    return found, failed


def _failed(name: str, fault: ImgtoolError, crew: Crew, console: Console) -> str:
    """Say that a run failed; what was asked wrongly before it even began ends all of them."""
    if fault.code == USAGE and not crew.begun(name):
        raise fault
    console.error(fault, name)
    return fault.what


def _by_name(scores: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return score to its finite values in all runs."""
    every = list(scores)
    names = dict.fromkeys(name for each in every for name in each)
    return {name: [float(each[name]) for each in every if _finite(each.get(name))] for name in names}


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _line(name: str, told: Mapping[str, float]) -> str:
    interval = (
        f"{told['low']:.4g} to {told['high']:.4g}, sd {told['sd']:.2g}" if told["runs"] > 1 else "unknown"
    )
    return f"{name}: mean {told['mean']:.4g}, 95 % interval {interval}"


def _draw(engine: Engine, logs: Sequence[Sequence[Mapping[str, Any]]], folder: Path) -> None:
    figures = {"loss": [{row["step"]: row["loss"] for row in rows if _finite(row["loss"])} for rows in logs]}
    for name in filter(None, (engine.best, engine.otherwise)):
        figures[name] = [
            {row["step"]: row["scores"][name] for row in rows if _finite(row["scores"].get(name))}
            for rows in logs
        ]
    bands = {name: band(values) for name, values in figures.items() if any(values)}
    title = f"{engine.name} {folder.name}: mean of {len(logs)} runs, 95 % confidence interval"
    plots.bands(bands, folder / PICTURE, title=title, logarithmic=("loss",))


class Processes:
    """Runs in processes of their own, some at a time; what they say is said with their names.

    The first SIGINT or SIGTERM is handed on, and waits until they have saved their states; the second ends
    them at once.
    """

    def __init__(
        self, engine: str, every: Mapping[str, Train], settings: Train, crew: Crew, console: Console
    ) -> None:
        """Take what has ended before from the crew's folder."""
        self.engine, self.settings, self.crew, self.console = engine, settings, crew, console
        before = {name: self.ended(name) for name in every}
        self.found: dict[str, Found] = {name: ended for name, ended in before.items() if ended is not None}
        self.failed: dict[str, str] = {}
        self._waiting = deque((name, each) for name, each in every.items() if name not in self.found)
        self._at_once = max(min(settings.parallel, len(self._waiting)), 1)
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._lines: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
        self._last: dict[str, str] = {}
        self._faults: dict[str, tuple[str, str]] = {}
        self._steps: dict[str, int] = {}
        self._results: dict[str, Found] = {}
        self._interrupted = False
        self._asked: set[str] = set()

    def go(self) -> tuple[dict[str, Found], dict[str, str]]:
        """Run all that is left.

        Returns:
            What the runs that ended found, and the words of those that failed, by name.

        Raises:
            ImgtoolError: What was asked wrongly, as every run would find.
            KeyboardInterrupt: After the states were saved.
        """
        with self._signals(), self.console.progress(self.total, "train") as bar:
            bar.advance(self.steps * len(self.found))
            try:
                self._fill()
                while self._running:
                    name, line = self._lines.get()
                    if line is None:
                        self._end(name, bar)
                        self._fill()
                    else:
                        self.hear(name, line, bar)
            finally:
                for process in self._running.values():
                    process.kill()
                    process.wait()
        if self._interrupted:
            self.console.say(f"stopped; go on with --resume {self.crew.folder}")
            raise KeyboardInterrupt
        return self.found, self.failed

    def command(self, name: str, settings: Train) -> list[str]:
        """Return the words that begin a run, or go on with it."""
        # Flags, where the environment or another file of settings would win over this one.
        flags = self.flags(name, settings) | {
            "threads": self.threads,
            "device": settings.device,
            "runs": 1,
            "parallel": 1,
        }
        words = [sys.executable, "-m", "imgtool", "train", self.engine, "--json"]
        words += ["--quiet"] * self.console.quiet
        return words + [f"--{flag}={value}" for flag, value in flags.items()]

    def flags(self, name: str, settings: Train) -> dict[str, Any]:
        """Return what tells a run from the others."""
        where = "resume" if self.crew.begun(name) else "out"
        return {"config": self.crew.config, "seed": settings.seed, where: self.crew.folder / name}

    def about(self, settings: Train) -> str:
        """Return what is said when a run begins."""
        return f"seed {settings.seed}"

    def ended(self, name: str) -> Found | None:
        """Return what a run had found before, None where it has not ended."""
        return self.crew.ended(name)

    def keep(self, name: str, found: Found) -> None:
        """Take down that a run has ended."""
        self.crew.keep(name, found)

    @property
    def steps(self) -> int:
        """Steps of a run, for the bar."""
        return self.settings.steps

    @property
    def total(self) -> int:
        """Steps of all runs, for the bar."""
        return self.steps * (len(self._waiting) + len(self.found))

    @property
    def threads(self) -> int:
        """Each run's share of the threads."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max((self.settings.threads or cores) // self._at_once, 1)

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._at_once:
            name, settings = self._waiting.popleft()
            self.console.say(f"{name}: {self.about(settings)}")
            process = subprocess.Popen(
                self.command(name, settings),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # a terminal's Ctrl-C comes from here, once
            )
            self._running[name] = process
            threading.Thread(target=self._listen, args=(name, process), daemon=True).start()
            if self._interrupted:  # while it was begun
                self._ask_to_end(name)

    def _listen(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._lines.put((name, line.rstrip()))
        self._lines.put((name, None))

    def hear(self, name: str, line: str, bar: Bar) -> None:
        """Take a line of a run for its record, or for words."""
        record = _record(line)
        if "step" in record:
            bar.advance(record["step"] - self._steps.get(name, 0))
            self._steps[name] = record["step"]
        elif "error" in record:
            self._faults[name] = record["error"], record["hint"]
        elif record:
            self._results[name] = record
        elif line.startswith("warning: "):
            self.console.warn(f"{name}: {line.removeprefix('warning: ')}")
        elif not line.startswith(("error: ", "hint: ")):
            self._last[name] = line
            self.console.say(f"{name}: {line}")

    def _end(self, name: str, bar: Bar) -> None:
        """Take down what a run whose process has ended found, or what went wrong."""
        process = self._running.pop(name)
        code = process.wait()
        bar.advance(self.steps - self._steps.get(name, 0))
        if code == DONE and name in self._results:
            self.found[name] = self._results[name]
            self.keep(name, self.found[name])
        elif not self._interrupted:
            words = (
                f"its process was ended by signal {-code}"
                if code < 0
                else f"its process ended with code {code}"
            )
            what, hint = self._faults.get(name, (words, self._last.get(name, "")))
            self.failed[name] = _failed(name, ImgtoolError(what, hint, code), self.crew, self.console)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self._stop) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        self._waiting.clear()
        for name in list(self._running):
            self._ask_to_end(name)

    def _ask_to_end(self, name: str) -> None:
        """Ask a run to save and end, once: it would take a second time for haste."""
        if name not in self._asked:
            self._asked.add(name)
            self._running[name].terminate()


def _record(line: str) -> dict[str, Any]:
    """Return the object that a line of JSON holds; {} for words."""
    try:
        found = json.loads(line) if line.startswith("{") else {}
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
