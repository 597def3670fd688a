"""Between the loop and a tracker: numbers are gathered on their device, and sent by a thread of its own."""

from __future__ import annotations

import json
import math
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool import files
from imgtool.engine import Engine
from imgtool.errors import ImgtoolError
from imgtool.settings import Train
from imgtool.track import TITLES, facts
from imgtool.track.address import redacted
from imgtool.track.sink import About, Row, Sink, Status

if TYPE_CHECKING:
    from torch import Tensor

    Waiting = tuple[int, float, Mapping[str, Tensor | float]]

Job = Callable[[], object]

MEMORY = "track.json"
"""Of a run folder: tracker to what it calls the run, and how far it was told."""
MANY = "campaign.json"
"""Marks a folder of many runs."""
EVERY = 100
"""Steps whose numbers are sent together."""
TRIES = 5
"""How often a thing is offered to a tracker."""
FAULTS, LAST_FAULTS = 12, 3
"""Faults in a row with which a tracker is given up; the same when the run has ended."""
LONGEST_PAUSE = 30.0
"""Seconds between two tries at most; the first pause is 1 s, each next one twice as long."""
PATIENCE = 60.0
"""Seconds that a run which has ended waits at most, and one more for each 10^6 bytes of a model."""
LOOK, SOON = 0.1, 2.0
"""Seconds from look to look while it waits, and after which it says so."""
LONGEST_LINE = 200
"""Letters of a fault that are told."""
ENDING_FILES = ("settings.toml", "log.jsonl")


# --- what is told -------------------------------------------------------------------------------------


def about(engine: Engine, settings: Train, folder: Path) -> About:
    """Return what a tracker is told of a run as it begins."""
    place = folder.resolve()
    group = place.parent.name if (place.parent / MANY).exists() else ""
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
    """Does jobs in a thread of its own, in order; one that fails is tried again.

    Attributes:
        fault: What last went wrong, in a line; "" while nothing did.
        lost: Jobs that were given up.
        dead: Whether all were, and all to come.
    """

    def __init__(self, second: float = 1.0, *, in_order: bool = False) -> None:
        """Begin, with nothing to do.

        Args:
            second: What pauses are counted in, in seconds.
            in_order: Whether the others wait for a job that failed; else it goes behind them.
        """
        self.fault, self.lost, self.dead = "", 0, False
        self._second, self._in_order = second, in_order
        self._jobs: deque[tuple[Job, int]] = deque()
        self._last: Job | None = None
        self._news, self._ending = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="imgtool-track", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Have a job done, some time."""
        with self._news:
            if self.dead:
                self.lost += 1
                return
            self._jobs.append((job, 0))
            self._news.notify()

    def end(self, last: Job | None = None) -> None:
        """Have all come to an end.

        Args:
            last: A job to do once when all others are done, unless all were given up.
        """
        self._last = last
        self._ending.set()
        with self._news:
            self._news.notify()

    def ended(self, seconds: float) -> bool:
        """Wait for the end, at most so long; tell whether it has come."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def leave(self, why: str) -> None:
        """Give up all that is not done; what is being done is left to itself."""
        self.fault = self.fault or why
        self._give_up()
        self.lost += 1

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
        self._end()

    def _next(self) -> tuple[Job, int] | None:
        with self._news:
            while not self._jobs and not self._ending.is_set():
                self._news.wait()
            return self._jobs.popleft() if self._jobs else None

    def _failed(self, job: Job, tries: int, fault: Exception) -> None:
        with self._news:
            self.fault = line(fault)
            if tries >= TRIES or self.dead:
                self.lost += 1
            elif self._in_order:
                self._jobs.appendleft((job, tries))
            else:
                self._jobs.append((job, tries))

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
            self.dead = True

    def _end(self) -> None:
        if self._last is None or self.dead:
            return
        try:
            self._last()
        except Exception as fault:  # noqa: BLE001 - as above
            self.fault, self.lost = line(fault), self.lost + 1


def line(fault: BaseException) -> str:
    """Return what a fault says, in one line that is not too long: where the system refused, its words.

    Addresses in it have no user and no password.
    """
    inner: BaseException | None = fault
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return redacted(inner.strerror)
        inner = inner.__cause__ or inner.__context__
    words = redacted(" ".join(str(fault).split())) or type(fault).__name__
    return words if len(words) <= LONGEST_LINE else words[:LONGEST_LINE] + " ..."


@contextmanager
def hearing() -> Iterator[list[int]]:
    """Gather SIGINT and SIGTERM while the block runs; the first then goes to who heard them before.

    Yields:
        Those that came; [] for ever where this is not the main thread.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {
        number: signal.signal(number, lambda which, _: came.append(which))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    for which in came[:1]:
        signal.raise_signal(which)


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
        self._post = post or Post(in_order=sink.rewinds)
        self._waiting: list[Waiting] = []
        before = about.before if about.before.get("run") == sink.memory["run"] else {}
        self._memory: dict[str, Any] = {**before, **sink.memory, "given": about.settings.track_to}
        self._told = {name: int(before.get(name, 0)) for name in ("step", "epoch")}
        self._sent = dict(self._told)
        self._open: dict[str, list[int]] = {name: [] for name in self._told}
        self._resumed, self._back = bool(before) and sink.rewinds, 0
        self._warned, self._words = False, ""
        self._patience = PATIENCE
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
        self._begin_at(step)
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

        def job() -> None:
            self._sink.picture(path, tag, step)
            self._remember({})

        self._put(job)

    def model(self, weights: Path, best: Mapping[str, Any]) -> None:
        """Keep in mind what to send in the end."""
        self._best = (weights, best)

    # --- the end ---

    def end(self, status: Status) -> None:
        """Send what waits, the files and the best weights, and end the record.

        This takes about a minute at most; SIGINT and SIGTERM end it at once.
        """
        with hearing() as came:
            self._flush()
            for name in ENDING_FILES:
                path = self._about.folder / name
                if path.exists():
                    self._put(lambda path=path: self._sink.file(path))  # type: ignore[misc]
            if self._best is not None and not self._post.dead:
                self._send_model(*self._best)
            self._post.end(lambda: self._close(status))
            self._wait(came)
        if self._words:
            self._say(f"{self._title}: {self._words}")
        if self._post.lost:
            self._say(
                f"warning: {self._title} lacks a part of this run ({self._post.fault}); "
                f"all of it is in {self._about.folder}"
            )

    def _close(self, status: Status) -> None:
        self._sink.close(status)
        self._remember({})

    def _wait(self, came: Sequence[int]) -> None:
        """Wait for the post, but not for ever, nor once a signal came."""
        began, said = time.monotonic(), False
        while not self._post.ended(LOOK):
            spent = time.monotonic() - began
            if came or spent > self._patience:
                self._post.leave("interrupted" if came else f"it did not answer for {spent:.0f} s")
                return
            if spent > SOON and not said:
                said = True
                self._say(f"waiting for {self._title}, {self._patience:.0f} s at most; Ctrl-C ends that")

    def _send_model(self, weights: Path, best: Mapping[str, Any]) -> None:
        """Send the best weights, unless this very record has them already under that name."""
        from imgtool.track.package import Package

        wanted = {"step": best.get("step"), "as": self._about.settings.register_as}
        if self._memory.get("model") == wanted:
            return
        scores = finite(best.get("scores", {}), "best/")
        self._put(lambda: self._sink.numbers([Row(int(best.get("step", 0)), time.time(), scores)]))
        try:
            package = Package.of(self._about, weights, best, graph=self._sink.graphs)
        except ImgtoolError as fault:
            self._say(f"warning: {self._title} gets no model: {fault.what}")
            return

        def job() -> None:
            self._words = self._sink.model(package)
            self._remember({"model": wanted})

        self._patience += weights.stat().st_size / 1e6
        self._put(job)

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
        first = fresh[0].step
        self._open[kind].append(first)
        self._sent[kind] = fresh[-1].step

        def job() -> None:
            self._sink.numbers(fresh)
            self._open[kind].remove(first)
            self._remember({kind: self._reached(kind)})

        self._put(job)

    def _reached(self, kind: str) -> int:
        """Return the step up to which all numbers of a kind have arrived."""
        sent = self._sent[kind]  # before the others are looked at: the loop may add some
        return min(self._open[kind], default=sent + 1) - 1

    def _begin_at(self, step: int) -> None:
        """Have a resumed run's record go back to here before it is told anything else."""
        if self._resumed:
            self._resumed, self._back = False, step

    def _put(self, work: Job) -> None:
        def job() -> None:
            if self._back:
                self._sink.rewind(self._back)
                self._back = 0
            work()

        self._post.put(job)

    def _remember(self, values: Mapping[str, Any]) -> None:
        self._memory |= {**self._sink.memory, **values}
        told = remembered(self._about.folder) | {self._about.settings.track: self._memory}
        with suppress(ImgtoolError):  # a full disk: the next time writes this as well
            files.write(self._about.folder / MEMORY, json.dumps(told, indent=2).encode())
