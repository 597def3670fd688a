"""Between the loop and a tracker: numbers are gathered on their device, and sent by a thread of its own."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool import files
from imgtool.engine import Engine
from imgtool.errors import ImgtoolError
from imgtool.settings import Train
from imgtool.track import TITLES, facts
from imgtool.track.sink import About, Row, Sink, Status

if TYPE_CHECKING:
    from torch import Tensor

    Waiting = tuple[int, float, Mapping[str, Tensor | float]]

MEMORY = "track.json"
"""Of a run folder: tracker to what it calls the run, and how far it was told."""
EVERY = 100
"""Steps whose numbers are sent together."""
TRIES = 5
"""How often a thing is offered to a tracker."""
FAULTS, LAST_FAULTS = 12, 3
"""Faults in a row with which a tracker is given up; the same when the run has ended."""
LONGEST_PAUSE = 30.0
"""Seconds between two tries at most; the first pause is 1 s, each next one twice as long."""
LONGEST_LINE = 200
"""Letters of a fault that are told."""
ENDING_FILES = ("settings.toml", "log.jsonl")


# --- what is told -------------------------------------------------------------------------------------


def about(engine: Engine, settings: Train, folder: Path) -> About:
    """Return what a tracker is told of a run as it begins."""
    from imgtool.train.crew import CAMPAIGN

    place = folder.resolve()
    group = place.parent.name if (place.parent / CAMPAIGN).exists() else ""
    before = remembered(folder).get(settings.track, {}) if settings.resume else {}
    if settings.track_to != before.get("given", settings.track_to):
        before = {}
    given = settings.model_dump(mode="json", exclude={"resume", "out", "track_to"})
    return About(
        engine,
        settings,
        folder,
        f"{group}/{place.name}" if group else place.name,
        group,
        settings.experiment or f"imgtool-{engine.name}",
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()},
        {"engine": engine.name, **facts.environment(settings)},
        facts.packages(),
        before,
    )


def remembered(folder: Path) -> dict[str, Any]:
    """Return what ``track.json`` says; {} where there is none, or it is damaged."""
    try:
        found = json.loads((folder / MEMORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def numbers(waiting: Sequence[Waiting], prefix: str) -> list[Row]:
    """Return rows of plain numbers; tensors come from their device in one go.

    Args:
        waiting: Step, time, and name to scalar, with the tensors on one device.
        prefix: Put before the names.
    """
    import torch

    on_device = [
        each for _, _, values in waiting for each in values.values() if isinstance(each, torch.Tensor)
    ]
    stacked = torch.stack([each.float().reshape(()) for each in on_device]).tolist() if on_device else []
    found = iter(stacked)

    def plain(values: Mapping[str, Tensor | float]) -> dict[str, float]:
        return {
            name: next(found) if isinstance(value, torch.Tensor) else value for name, value in values.items()
        }

    return [Row(step, when, finite(plain(values), prefix)) for step, when, values in waiting]


def finite(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Return the numbers that a curve can be drawn through, by names that every tracker takes.

    What is not finite is left out: one infinity would flatten the curve, and servers differ in what they
    make of it. ``log.jsonl`` says null there.
    """
    return {
        prefix + re.sub(r"[^\w.\-/ ]", "_", name): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def of_epoch(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of ``log.jsonl``: "epoch/loss", "epoch/<term>", "score/<name>", ..."""
    own = {name: row[name] for name in ("epoch", "loss", "seconds", "skipped") if name in row}
    return {
        **finite(row.get("terms", {}), "epoch/"),
        **finite({"number" if name == "epoch" else name: value for name, value in own.items()}, "epoch/"),
        **finite(row.get("scores", {}), "score/"),
    }


# --- who sends it -------------------------------------------------------------------------------------


class Post:
    """Does jobs in a thread of its own, in order; one that fails goes behind the others, and is tried again.

    Attributes:
        fault: What last went wrong, in a line; "" while nothing did.
        lost: Jobs that were given up.
    """

    def __init__(self, second: float = 1.0) -> None:
        """Begin, with nothing to do.

        Args:
            second: What pauses are counted in, in seconds.
        """
        self.fault, self.lost = "", 0
        self._second = second
        self._jobs: deque[tuple[Callable[[], object], int]] = deque()
        self._news, self._ending, self._dead = threading.Condition(), threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="imgtool-track", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], object]) -> None:
        """Have a job done, some time."""
        with self._news:
            if self._dead:
                self.lost += 1
                return
            self._jobs.append((job, 0))
            self._news.notify()

    def end(self) -> None:
        """Wait until all is done or given up."""
        self._ending.set()
        with self._news:
            self._news.notify()
        self._thread.join()

    def _work(self) -> None:
        row = 0
        while (next_one := self._next()) is not None:
            job, tries = next_one
            try:
                job()
            except Exception as fault:  # noqa: BLE001 - servers and their clients raise what they like
                row += 1
                self._failed(job, tries + 1, fault)
                if row >= (LAST_FAULTS if self._ending.is_set() else FAULTS):
                    self._give_up()
                    return
                self._pause(row)
            else:
                row = 0

    def _next(self) -> tuple[Callable[[], object], int] | None:
        with self._news:
            while not self._jobs and not self._ending.is_set():
                self._news.wait()
            return self._jobs.popleft() if self._jobs else None

    def _failed(self, job: Callable[[], object], tries: int, fault: Exception) -> None:
        with self._news:
            self.fault = line(fault)
            if tries < TRIES:
                self._jobs.append((job, tries))
            else:
                self.lost += 1

    def _pause(self, row: int) -> None:
        """Wait before the next try: longer from fault to fault, but not much once the run has ended."""
        if self._ending.is_set():
            time.sleep(self._second)
        else:
            self._ending.wait(self._second * min(2.0 ** (row - 1), LONGEST_PAUSE))

    def _give_up(self) -> None:
        with self._news:
            self.lost += len(self._jobs)
            self._jobs.clear()
            self._dead = True


def line(fault: BaseException) -> str:
    """Return what a fault says, in one line that is not too long: where the system refused, its words."""
    inner: BaseException | None = fault
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    words = " ".join(str(fault).split()) or type(fault).__name__
    return words if len(words) <= LONGEST_LINE else words[:LONGEST_LINE] + " ..."


class Recorder:
    """A ``Tracker`` that tells a ``Sink``."""

    def __init__(
        self, sink: Sink, about: About, say: Callable[[str], None], post: Post | None = None
    ) -> None:
        """Begin, or go on.

        Args:
            sink: The record.
            about: The run.
            say: Told where to look, and what a tracker did not take.
            post: Who sends.
        """
        self._sink, self._about, self._say = sink, about, say
        self._title = TITLES[about.settings.track]
        self._post = post or Post()
        self._waiting: list[Waiting] = []
        before = about.before if about.before.get("run") == sink.memory["run"] else {}
        self._memory: dict[str, Any] = {**before, **sink.memory, "given": about.settings.track_to}
        self._told = {name: int(before.get(name, 0)) for name in ("step", "epoch")}
        self._resumed, self._warned, self._words = bool(self._told["step"]), False, ""
        self._best: tuple[Path, Mapping[str, Any]] | None = None
        self._remember({})
        say(f"{self._title}: {sink.where}")

    # --- Tracker ---

    def step(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Keep the values of a step until some are sent together."""
        kept = {
            name: value if isinstance(value, float | int) else value.detach()
            for name, value in values.items()
        }
        self._waiting.append((step, time.time(), kept))
        if len(self._waiting) >= EVERY:
            self._flush()

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Send a row, and what waits."""
        self._flush()
        self._send([Row(int(row["step"]), time.time(), of_epoch(row))], "epoch")

    def picture(self, path: Path, step: int) -> None:
        """Send a picture; of one that is written again and again, the newest may be what arrives."""
        tag = path.relative_to(self._about.folder).as_posix()
        self._post.put(lambda: self._sink.picture(path, tag, step))

    def model(self, weights: Path, best: Mapping[str, Any]) -> None:
        """Keep in mind what to send in the end."""
        self._best = (weights, best)

    # --- the end ---

    def end(self, status: Status) -> None:
        """Send what waits, the files and the best weights, and end the record."""
        self._flush()
        for name in ENDING_FILES:
            path = self._about.folder / name
            if path.exists():
                self._post.put(lambda path=path: self._sink.file(path))  # type: ignore[misc]
        if self._best is not None:
            self._send_model(*self._best)
        self._post.end()
        try:
            self._sink.close(status)
        except Exception as fault:  # noqa: BLE001 - the training has ended: it must not fail for this
            self._post.fault, self._post.lost = line(fault), self._post.lost + 1
        if self._words:
            self._say(f"{self._title}: {self._words}")
        if self._post.lost:
            self._say(
                f"warning: {self._title} lacks a part of this run ({self._post.fault}); "
                f"all of it is in {self._about.folder}"
            )

    def _send_model(self, weights: Path, best: Mapping[str, Any]) -> None:
        """Send the best weights, unless this very record has them already under that name."""
        from imgtool.track.package import Package

        wanted = {"step": best.get("step"), "as": self._about.settings.register_as}
        if self._memory.get("model") == wanted:
            return
        scores = finite(best.get("scores", {}), "best/")
        self._post.put(lambda: self._sink.numbers([Row(int(best.get("step", 0)), time.time(), scores)]))
        try:
            package = Package.of(self._about, weights, best, graph=self._sink.graphs)
        except ImgtoolError as fault:
            self._say(f"warning: {self._title} gets no model: {fault.what}")
            return

        def job() -> None:
            self._words = self._sink.model(package)
            self._remember({"model": wanted})

        self._post.put(job)

    # --- sending ---

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._send(numbers(waiting, "train/"), "step")
        if self._post.fault and not self._warned:
            self._warned = True
            self._say(f"warning: {self._title} takes no record ({self._post.fault}); training goes on")

    def _send(self, rows: Iterable[Row], kind: str) -> None:
        fresh = [row for row in rows if self._sink.rewinds or row.step > self._told[kind]]
        if not fresh:
            return
        rewind, self._resumed = self._resumed and self._sink.rewinds, False

        def job() -> None:
            nonlocal rewind
            if rewind:
                self._sink.rewind(fresh[0].step)
                rewind = False
            self._sink.numbers(fresh)
            self._remember({kind: max(fresh[-1].step, self._memory.get(kind, 0))})

        self._post.put(job)

    def _remember(self, values: Mapping[str, Any]) -> None:
        self._memory |= {**self._sink.memory, **values}
        told = remembered(self._about.folder) | {self._about.settings.track: self._memory}
        files.write(self._about.folder / MEMORY, json.dumps(told, indent=2).encode())
