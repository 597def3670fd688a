"""The search itself: propose, measure, refuse or train, tell; alone or beside other processes.

What a candidate costs is measured before it is trained, so a limit is a limit, and not a wish that a good
score may outweigh. All that is known stands in the folder: a search is gone on with by whoever opens it.

Where a search goes on with higher limits, what costs no more than they allow is rejected no longer.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imgtool import files, track
from imgtool.errors import USAGE, ImgtoolError
from imgtool.search import gauge
from imgtool.search.board import ENDED, Board
from imgtool.search.cost import Cost, Limits, Unmeasured
from imgtool.search.samplers import Question, Row, Sampler, cost, put_aside
from imgtool.search.space import Point, taken
from imgtool.search.task import Structure, Task, key
from imgtool.settings import Train
from imgtool.settings.sources import make, to_toml

if TYPE_CHECKING:
    from imgtool.engine import Crew, Engine

PROPOSALS = 20
"""Candidates proposed at most, for each that is to be trained."""
FAILURES = 3
"""Trainings failed in a row, or candidates that could not be measured, with which the search gives up."""
BEST = "best.toml"
"""Settings of the best trial, for ``--config``."""
ALONE = ("search", "space", "sampler", "parallel", "runs", "max_ms", "max_mb", "max_parameters")
"""Settings that a trial does not have from the search."""


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points no other point is better than: the Pareto front, both numbers being minimised.

    Returns:
        Indices, by the first number, then the second. Equal points are on it together.
    """
    found: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if not found or points[index][1] < points[found[-1]][1] or points[index] == points[found[-1]]:
            found.append(index)
    return found


def limits(settings: Train) -> Limits:
    """Return what a network may cost."""
    return Limits(settings.max_ms, settings.max_mb, settings.max_parameters)


def question(engine: Engine, settings: Train, task: Task) -> Question:
    """Return what a sampler is asked."""
    return Question(
        task.space, task.constraints, limits(settings), engine.best, engine.higher_is_better, settings.seed
    )


@dataclass
class Search:
    """A search, as far as it has come.

    Attributes:
        engine: Whose networks are trained; its metric chooses.
        settings: Limits, data, and the length of each training.
        crew: Trains.
        task: What is varied and how it is measured.
    """

    engine: Engine
    settings: Train
    crew: Crew
    task: Task

    def __post_init__(self) -> None:
        """Open the folder that the processes of a search share."""
        self.board = Board(self.crew.folder)
        self.limits = limits(self.settings)
        self._unmeasured = self._failures = 0

    def go(self, open_sampler: Callable[[], Sampler]) -> dict[str, Any]:
        """Propose, measure and train until as many were trained as the settings say, or none is found.

        The folder holds ``search.jsonl`` (a line for each candidate), ``pareto.csv``, ``pareto.json``,
        ``pareto.png`` and ``best.toml``, after every training.

        Args:
            open_sampler: Returns who proposes; what it claims is held as trials are.

        Returns:
            As ``record``.

        Raises:
            ImgtoolError: Nothing within the limits; no training succeeds; nothing can be measured; the disk
                is full; no tracker can be reached.
        """
        with self.board:
            if aside := put_aside(self.crew.folder):
                self.crew.say(f"the sampler's journal was damaged, and is written anew; it is now {aside}")
            sampler = open_sampler()
            for row in self.board.rows():
                if not self._is_open(row):
                    sampler.tell(row)
            for row in self._trials(sampler):
                if row["status"] != "training":
                    self._measure(row)
                if row["status"] == "training":
                    self._train(row)
                if row["status"] in ENDED:
                    sampler.tell(row)
                self.board.release(_name(row))
        return self.record()

    def _trials(self, sampler: Sampler) -> Iterator[Row]:
        """Yield what is left to do, claimed for this process: what dead ones left, then new proposals."""
        while self._failures < FAILURES:
            full = self.board.started() >= self.settings.search
            rows = self.board.rows()
            left = self._left(rows, full)
            if left is not None:
                yield left
            elif full or self._enough(rows) or (asked := sampler.ask()) is None:
                return
            else:
                number, point = asked
                if all(row["trial"] != number for row in rows) and self.board.claim(f"trial-{number:03}"):
                    yield self._proposed(number, point)
                else:
                    sampler.tell({"trial": number, "point": point, "status": "failed", "cpu_ms": None})

    def _left(self, rows: Sequence[Row], full: bool) -> Row | None:
        """Return a trial that was begun and that nobody works on, None where there is none."""
        for row in self._open(rows, full):
            if self.board.claim(_name(row)):
                now = next(each for each in self.board.rows() if each["trial"] == row["trial"])
                if self._is_open(now):
                    return now
                self.board.release(_name(row))
        return None

    def _open(self, rows: Sequence[Row], full: bool) -> list[Row]:
        """Return the trials for which something is left to do, by this process or another."""
        left = [row for row in rows if self._is_open(row)]
        return [row for row in left if self.board.admitted(row["trial"])] if full else left

    def _is_open(self, row: Row) -> bool:
        """Tell whether a trial has not ended, or was rejected by limits that were lower."""
        if row["status"] != "rejected":
            return row["status"] not in ENDED
        found = cost(row)
        return found is not None and not self.limits.missed(found)

    def _enough(self, rows: Sequence[Row]) -> bool:
        """Tell whether no more is to be proposed; what other limits rejected does not count."""
        rejected = [(row["why"], cost(row)) for row in rows if row["status"] == "rejected"]
        others = [why for why, found in rejected if found and why != self.limits.missed(found)]
        return bool(len(rows) - len(others) >= PROPOSALS * self.settings.search)

    # --- one candidate ---

    def _proposed(self, number: int, point: Point) -> Row:
        row: Row = {
            "trial": number,
            "status": "measuring",
            "why": "",
            "point": dict(point),
            "settings": self.task.settings(taken(self.task.space, point)),
            "structure": "",
            **Cost(0, 0)._asdict(),
            "cpu_ms": None,
            "mb": None,
            "measured": False,
            "scores": {},
            "metric": self.engine.best,
            "score": None,
            "weights": "",
            "seconds": 0.0,
        }
        self.board.save(row)
        return row

    def _measure(self, row: Row) -> None:
        """Reject a candidate, let it into training, or let it wait for a longer search where all began.

        Raises:
            ImgtoolError: Nothing can be measured, or several in a row could not.
        """
        rows, hopeless = self.board.rows(), None
        try:
            net = self._structure(row)
            row["structure"] = key(net)
            found = self._cost(row["structure"], net, rows)
        except (gauge.Unfit, Unmeasured) as fault:
            row |= {"status": "rejected", "why": fault.what, "cpu_ms": None, "mb": None}
            self._unmeasured += isinstance(fault, Unmeasured)
            hopeless = fault if self._unmeasured >= FAILURES else None
        else:
            row |= found._asdict()
            row["why"] = self.limits.missed(found)
            if row["why"]:
                row["status"] = "rejected"
            elif not self._repeats(row, rows):
                admitted = self.board.admit(row["trial"], self.settings.search)
                row["status"] = "training" if admitted else "waiting"
        self.board.save(row)
        self.crew.say(f"{_name(row)}: " + (f"{row['status']}: {row['why']}" if row["why"] else _costs(row)))
        if hopeless:
            raise hopeless

    def _structure(self, row: Row) -> Structure:
        """Return the shape of a candidate's network.

        Raises:
            gauge.Unfit: There is none: its settings contradict each other.
        """
        try:
            return self.task.structure(self._trial(row))
        except ImgtoolError as fault:
            raise gauge.Unfit(fault.what, fault.hint) from None

    def _cost(self, name: str, net: Structure, rows: Sequence[Row]) -> Cost:
        """Return what a network costs, measured once for all trials of the same structure."""
        known = _known(rows, name)
        if known is not None:
            return known
        least = self.task.least(net)
        if self.limits.missed(least):
            return least
        found = self.task.gauge(net, self.limits)
        self._unmeasured = 0
        return _known(self.board.rows(), name) or found  # another process may have been first

    def _repeats(self, row: Row, rows: Sequence[Row]) -> bool:
        """Take over what was found with the very settings before; tell whether there was any."""
        for each in rows:
            if each["status"] == "trained" and each["settings"] == row["settings"]:
                same = {name: each[name] for name in ("scores", "metric", "score", "weights")}
                row |= same | {"status": "repeated", "why": f"as {_name(each)}"}
                return True
        return False

    def _train(self, row: Row) -> None:
        """Train a candidate, or go on where its training was interrupted.

        Raises:
            ImgtoolError: As ``_fail``; or a tracker cannot be reached, for which no candidate can help.
        """
        began = time.monotonic()
        try:
            found = self._trained(row)
        except track.Unreachable:
            raise
        except ImgtoolError as fault:
            row["seconds"] += time.monotonic() - began
            self._fail(row, fault)
            return
        if found is None:
            self.crew.say(f"{_name(row)}: another process took it over")
            return
        self._failures = 0
        row["seconds"] += time.monotonic() - began
        scores = dict(found["best"]["scores"])
        row["metric"], row["score"] = self._score(scores)
        row |= {"status": "trained", "why": "", "scores": scores, "weights": found["weights"]}
        self.crew.say(f"{_name(row)}: {row['metric']} {row['score']:.4g}, {_costs(row)}")
        self.board.save(row)
        self.report()

    def _trained(self, row: Row) -> Mapping[str, Any] | None:
        """Return what the training of a candidate found, None where another process has taken it over."""
        try:
            found = self.crew.train(self._trial(row), _name(row))
        except ImgtoolError:
            if self.board.holds(_name(row)):
                raise
            return None
        return found if self.board.holds(_name(row)) else None

    def _score(self, scores: Mapping[str, Any]) -> tuple[str, float]:
        """Return the metric that tells, and its value."""
        names = [self.engine.best, self.engine.otherwise]
        values = ((name, scores.get(name)) for name in names)
        known = ((name, value) for name, value in values if value is not None and math.isfinite(value))
        return next(known)

    def _fail(self, row: Row, fault: ImgtoolError) -> None:
        """Take down that a training failed.

        Raises:
            ImgtoolError: It was asked wrongly, and no training has shown that others would do better: the
                trial is tried once more at the next go. Or several failed in a row, and none was trained.
        """
        trained = _count(self.board.rows(), "trained")
        again, row["why"] = row["why"] == fault.what, fault.what
        if fault.code == USAGE and not trained and not again:
            self.board.save(row)
            raise fault
        row["status"] = "failed"
        self.board.save(row)
        self.crew.say(f"{_name(row)}: failed: {fault.what}")
        self._failures += 1
        if self._failures >= FAILURES and not trained:
            what = f"{FAILURES} trainings failed in a row, the last one: {fault.what}"
            raise ImgtoolError(what, f"begin anew with a narrower --space, or {self._others()}")

    def _others(self) -> str:
        return f"try other candidates by --resume {self.crew.folder}"

    def _trial(self, row: Row) -> Train:
        """Return the settings of a training."""
        cls = type(self.settings)
        alone = {name: cls.model_fields[name].default for name in ALONE}
        given = {**self.settings.model_dump(), **alone, **self.task.fixed, **row["settings"]}
        return make(cls, given, _name(row))

    # --- all of them ---

    def record(self) -> dict[str, Any]:
        """Write all that was found into the folder, say what is missing, and return the record.

        Returns:
            "trials", "rejected", "repeated", "failed", "trained": counts; "metric", what is compared;
            "measured", what costs are of; "limits"; "front": for each network on it "trial", "score",
            "scores", "cpu_ms", "mb", "parameters", "settings" and "weights", by CPU time; "best", the one of
            the best score; "selection", what it was chosen by; "config", its settings as a file; "folder".
            Where others still train and nothing has ended, "front" is empty, "best" and "config" are None.

        Raises:
            ImgtoolError: Nothing was trained that is within the limits, and nobody trains.
        """
        self.board.write_table()
        rows = self.board.rows()
        found = self.report()
        if left := self._open(rows, self.board.started() >= self.settings.search):
            how = f"others work on them, or go on with them by --resume {self.crew.folder}"
            self.crew.say(f"not ended: {', '.join(map(_name, left))}; {how}")
        elif not found["front"]:
            raise self._nothing(rows)
        elif _count(rows, "trained", "failed") < self.settings.search:
            gave_up = _count(rows, "failed") >= FAILURES and not self._enough(rows)
            why = f"too many fail; {self._others()}" if gave_up else "too few are within the limits, or new"
            self.crew.say(f"stopped after {len(rows)} candidates: {why}")
        return found

    def _nothing(self, rows: Sequence[Row]) -> ImgtoolError:
        if _count(rows, "trained"):
            return ImgtoolError("no trained network is within the limits", "raise --max-ms or --max-mb")
        if failed := [row["why"] for row in rows if row["status"] == "failed"]:
            return ImgtoolError(
                f"no candidate could be trained: {failed[-1]}",
                "a higher --search tries others; or begin anew with a narrower --space or a lower --batch",
            )
        known = [row for row in rows if row["measured"]]
        seen = f"none of them could be measured: {rows[-1]['why']}" if rows else "there are none"
        if known:
            least = {name: min(row[name] for row in known) for name in ("cpu_ms", "mb", "parameters")}
            seen = f"the least that they cost is {_costs(least)}"
        what = f"none of {len(rows)} candidates is within the limits ({self.limits}): {seen}"
        return ImgtoolError(what, "raise --max-ms, --max-mb or --max-parameters")

    def report(self) -> dict[str, Any]:
        """Write the front, its picture and the best settings, where there are any, and return the record."""
        rows = self.board.rows()
        within = [row for row in rows if row["status"] == "trained" and not self._missed(row)]
        sign = -1 if self.engine.higher_is_better else 1
        best = [within[index] for index in front([(row["cpu_ms"], sign * row["score"]) for row in within])]
        names = ("trial", "score", "scores", "cpu_ms", "mb", "parameters", "settings", "weights")
        shown = [{name: row[name] for name in names} for row in best]
        record = {
            "trials": len(rows),
            **{state: _count(rows, state) for state in ("rejected", "repeated", "failed", "trained")},
            "metric": best[-1]["metric"] if best else self.engine.best,
            "measured": self.task.measured,
            "limits": self.limits._asdict(),
            "selection": self.task.selection,
            "front": shown,
            "best": shown[-1] if best else None,
            "config": str(self.crew.folder / BEST) if best else None,
            "folder": str(self.crew.folder),
        }
        if not best:
            return record
        files.write(self.crew.folder / "pareto.json", json.dumps(record, indent=2).encode())
        files.write(self.crew.folder / "pareto.csv", _table(shown).encode())
        chosen = self._trial(best[-1]).changed(resume=None, out=None)
        files.write(self.crew.folder / BEST, to_toml(chosen, "train", self.engine.name).encode())
        self._draw(rows, [row["trial"] for row in best])
        return record

    def _missed(self, row: Row) -> bool:
        found = cost(row)
        return found is None or not found.measured or bool(self.limits.missed(found))

    def _draw(self, rows: Sequence[Row], best: Sequence[int]) -> None:
        from imgtool import plots

        def number(value: float | None, otherwise: float) -> float:
            return otherwise if value is None else value

        points = {
            row["trial"]: (number(row["cpu_ms"], math.inf), number(row["score"], math.nan)) for row in rows
        }
        plots.front(
            points,
            best,
            self.crew.folder / "pareto.png",
            title=f"{self.engine.name}: held-out {self.engine.best} and cost of networks",
            labels=("CPU time in ms", f"held-out {self.engine.best}"),
            limit=self.limits.ms,
        )


def _known(rows: Sequence[Row], structure: str) -> Cost | None:
    """Return what was measured of a structure; a bound that was computed says nothing of other limits."""
    costs = (cost(row) for row in rows if row["structure"] == structure and row["measured"])
    return next((each for each in costs if each is not None), None)


def _count(rows: Sequence[Row], *states: str) -> int:
    return sum(row["status"] in states for row in rows)


def _name(row: Mapping[str, Any]) -> str:
    return f"trial-{row['trial']:03}"


def _costs(row: Mapping[str, Any]) -> str:
    counted = f", {row['parameters']:,} parameters" if row["parameters"] else ""
    return f"{row['cpu_ms']:.3g} ms, {row['mb']:.3g} MB{counted}"


def _table(shown: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    rows = [{**each, **each["scores"], **each["settings"]} for each in shown]
    columns = [name for name in rows[0] if name not in ("scores", "settings")]
    table = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
