"""Who proposes points: Optuna, many processes on one journal file, or Ax, in one process."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from imgtool.errors import USAGE, ImgtoolError
from imgtool.search.cost import Cost, Limits
from imgtool.search.space import Choice, Point, Space, Span

Row = dict[str, Any]

JOURNAL = "search.journal"
"""Optuna's storage in the folder of a search."""
RANDOM = 5
"""Trained candidates before which Ax's proposals are quasi-random."""
NEEDS = {"optuna": ("optuna", "Optuna", "search"), "ax": ("ax", "Ax", "search-ax")}
"""Sampler to its package, its name, and the extra that brings it."""


class Sampler(Protocol):
    """Who proposes candidates, and is told what became of them."""

    def ask(self) -> tuple[int, Point] | None:
        """Return the number of the next trial, and the point to try; None where no other is left."""
        ...

    def tell(self, row: Row) -> None:
        """Take up what is known of a trial that has ended, asked for or not; once more does no harm.

        Args:
            row: "trial", "point", "status" (trained, repeated, rejected or failed); "score", the metric, of
                trained ones; "cpu_ms", "mb", "parameters" and "measured", None where unknown.
        """
        ...


@dataclass(frozen=True)
class Question:
    """What a sampler is asked.

    Attributes:
        space: What is varied.
        constraints: Inequalities between numbers of the space.
        limits: What a network may cost.
        metric: Name of the score.
        higher_is_better: Its direction.
        seed: Seed of all proposals.
    """

    space: Space
    constraints: Sequence[str]
    limits: Limits
    metric: str
    higher_is_better: bool
    seed: int


def check(name: str, parallel: int) -> None:
    """Refuse a sampler that is not installed, and Ax for several processes.

    Raises:
        ImgtoolError: Code 2.
    """
    package, said, extra = NEEDS[name]
    if importlib.util.find_spec(package) is None:
        raise ImgtoolError(f"--search needs {said}", f"pip install 'imgtool[{extra}]'", USAGE)
    if name == "ax" and parallel > 1:
        what = "--parallel: Ax proposes in one process alone"
        raise ImgtoolError(what, "--sampler optuna searches in many", USAGE)


def cost(row: Row) -> Cost | None:
    """Return what a trial's network costs, None where that is not known."""
    if row["cpu_ms"] is None:
        return None
    return Cost(row["cpu_ms"], row["mb"], row["measured"], row["parameters"])


class Ax:
    """Ax: quasi-random points first, then by a Gaussian process where both objectives may be improved.

    Whole numbers are given to Ax as real ones and rounded later: so a proposal takes it a quarter of the
    time.
    """

    def __init__(self, question: Question, known: int = 0) -> None:
        """Describe space and objectives to Ax.

        Args:
            question: What is asked.
            known: Points that were proposed before the search was interrupted: the quasi-random points
                are then others.
        """
        self._asked: dict[str, int] = {}
        self._question, self._next = question, known
        with _quiet():
            client = importlib.import_module("ax.api.client").Client
            self._client = client(random_seed=question.seed + known)
            self._client.configure_experiment(
                [_ax_parameter(name, each) for name, each in question.space.items()],
                parameter_constraints=list(question.constraints),
            )
            metric = question.metric if question.higher_is_better else f"-{question.metric}"
            limits = [f"{name} <= {limit}" for name, limit in question.limits.given().items()]
            self._client.configure_optimization(f"{metric}, -cpu_ms", outcome_constraints=limits)
            self._client.configure_generation_strategy(
                initialization_budget=RANDOM,
                min_observed_initialization_trials=RANDOM,
                allow_exceeding_initialization_budget=True,  # what was not trained does not count
                initialization_random_seed=question.seed + known,
                initialize_with_center=False,
            )

    def ask(self) -> tuple[int, Point] | None:
        """Return the number of the next trial, and the point to try; None where the space is used up.

        Raises:
            ImgtoolError: Ax has no point for another reason.
        """
        with _quiet():
            complete = importlib.import_module("ax.exceptions.core").OptimizationComplete
            try:
                ((index, point),) = self._client.get_next_trials(1).items()
            except complete:
                return None
            except Exception as fault:  # those of Ax, and of what it builds on, have no common base
                hint = "go on by --resume, or begin anew with --sampler optuna"
                raise ImgtoolError(f"Ax proposes no candidate: {fault}", hint) from fault
        self._asked[_as_key(point)] = index
        self._next += 1
        return self._next - 1, dict(point)

    def tell(self, row: Row) -> None:
        """Take up what is known of a trial; see ``Sampler``."""
        at = {
            name: float(row["point"][name]) if isinstance(each, Span) else row["point"][name]
            for name, each in self._question.space.items()
        }
        index = self._asked.pop(_as_key(at), None)
        with _quiet():
            if index is None:
                index = self._client.attach_trial(at)
            costs = {name: row.get(name) for name in {"cpu_ms": 0, **self._question.limits.given()}}
            if row["status"] in ("trained", "repeated"):
                self._client.complete_trial(index, {self._question.metric: row["score"], **costs})
            elif row["cpu_ms"] is not None and row["measured"]:  # Ax learns of costs from these as well
                self._client.attach_data(index, costs)
                self._client.mark_trial_early_stopped(index)
            else:
                self._client.mark_trial_abandoned(index)


def _ax_parameter(name: str, each: Span | Choice) -> Any:
    configs = importlib.import_module("ax.api.configs")
    if isinstance(each, Choice):
        found = {type(value) for value in each.values}
        kind = next(kind for kind in (str, float, int, bool) if kind in found)  # the one that holds all
        return configs.ChoiceParameterConfig(name, [kind(value) for value in each.values], kind.__name__)
    return configs.RangeParameterConfig(name, each.bounds(), "float", scaling="log" if each.log else None)


def _as_key(point: Mapping[str, Any]) -> str:
    return json.dumps(dict(point), sort_keys=True)


class Optuna:
    """Optuna's TPE on a journal file, which any number of processes and machines may write.

    What is over a limit is told by how much, as a constraint that is not met (``Trial.set_constraint``);
    points that others still try count as bad ones, so that two do not try the same (``constant_liar``).
    """

    def __init__(self, question: Question, folder: Path, worker: int = 0) -> None:
        """Open the study in a folder, or begin it.

        Args:
            question: What is asked.
            folder: Of the search.
            worker: Number of this process among those of the search: each draws its own random numbers.
        """
        self._path = folder / JOURNAL
        with _writing(self._path):
            self._optuna: Any = importlib.import_module("optuna")
            journal: Any = importlib.import_module("optuna.storages.journal")
            file = journal.JournalFileBackend(str(self._path), _Lock(self._path))
            self._study = self._optuna.create_study(
                storage=self._optuna.storages.JournalStorage(file),
                sampler=self._optuna.samplers.TPESampler(
                    seed=question.seed + 7919 * worker, multivariate=True, constant_liar=True
                ),
                study_name="search",
                direction="maximize" if question.higher_is_better else "minimize",
                load_if_exists=True,
            )
        self._question = question
        self._space = {name: self._distribution(each) for name, each in question.space.items()}
        self._asked: dict[int, Any] = {}

    def _distribution(self, each: Span | Choice) -> Any:
        kinds = self._optuna.distributions
        if isinstance(each, Choice):
            return kinds.CategoricalDistribution(each.values)
        if each.whole:
            return kinds.IntDistribution(int(each.low), int(each.top), log=each.log, step=int(each.step or 1))
        return kinds.FloatDistribution(each.low, each.top, log=each.log, step=each.step or None)

    def ask(self) -> tuple[int, Point]:
        """Return the number of the next trial, and the point to try."""
        with _writing(self._path):
            trial = self._study.ask(self._space)
        self._asked[trial.number] = trial
        return trial.number, dict(trial.params)

    def tell(self, row: Row) -> None:
        """Take up what is known of a trial; see ``Sampler``."""
        states = self._optuna.trial.TrialState
        known, number = self._asked.pop(row["trial"], None), row["trial"]
        with _writing(self._path):
            if known is None and not self._written(row):
                self._write(row)
                return
            for name, value in self._excess(row).items() if known is not None else ():
                known.set_constraint(name, value)
            if row["status"] in ("trained", "repeated"):
                self._study.tell(number, row["score"], skip_if_finished=True)
            elif row["status"] == "failed" or known is None:
                self._study.tell(number, state=states.FAIL, skip_if_finished=True)
            else:
                self._study.tell(number, state=states.PRUNED, skip_if_finished=True)

    def _written(self, row: Row) -> bool:
        """Tell whether the journal holds a trial by its number: it may have been lost."""
        trials = self._study.get_trials(deepcopy=False)
        return row["trial"] < len(trials) and self._is_of(trials[row["trial"]], row)

    def _is_of(self, trial: Any, row: Row) -> bool:
        """Tell whether a trial is what became of a row: not one that was rejected before it was trained."""
        better = row["status"] in ("trained", "repeated") and trial.state.is_finished()
        states = self._optuna.trial.TrialState
        return bool(trial.params == row["point"]) and not (better and trial.state != states.COMPLETE)

    def _write(self, row: Row) -> None:
        """Add a trial that has ended to a journal that does not know it, by its number where that is free."""
        trials = self._study.get_trials(deepcopy=False)
        if any(self._is_of(each, row) for each in trials):
            return
        states, create = self._optuna.trial.TrialState, self._optuna.trial.create_trial
        for _ in range(len(trials), row["trial"]):
            self._study.add_trial(create(state=states.FAIL))
        ended = {"failed": states.FAIL, "rejected": states.PRUNED}.get(row["status"], states.COMPLETE)
        self._study.add_trial(
            create(
                state=ended,
                value=row["score"] if ended == states.COMPLETE else None,
                params=dict(row["point"]),
                distributions=self._space,
                constraints=self._excess(row),
            )
        )

    def _excess(self, row: Row) -> dict[str, float]:
        found = cost(row)
        if found is None:
            return {"unfit": 1.0} if row["status"] == "rejected" else {}
        return self._question.limits.excess(found)


class _Lock:
    """Optuna's lock of a journal, by which whoever gets it finds whole lines alone.

    A full disk and a killed process leave a part of one, to which the next would be glued.
    """

    def __init__(self, path: Path) -> None:
        """Name the journal; it need not exist."""
        journal: Any = importlib.import_module("optuna.storages.journal")
        self._path = path
        self._lock = journal.JournalFileOpenLock(str(path))  # holds on NFS, and where links need rights

    def acquire(self) -> bool:
        """Wait for the lock, and cut off what follows the last end of a line."""
        self._lock.acquire()
        try:
            self._cut()
        except BaseException:
            self._lock.release()
            raise
        return True

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def _cut(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("r+b") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            if file.read() not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)


def put_aside(folder: Path) -> Path | None:
    """Rename the journal of a search where it has a line that cannot be read; ``tell`` writes it anew.

    Returns:
        What it is called then; None where there is none, or all of it can be read.

    Raises:
        ImgtoolError: The folder cannot be written.
    """
    path, aside = folder / JOURNAL, folder / f"{JOURNAL}.damaged"
    if not path.exists():
        return None
    with _writing(path):
        lock = _Lock(path)
        lock.acquire()
        try:
            with path.open("rb") as lines:
                damaged = not all(map(_readable, lines))
            if damaged:
                path.replace(aside)
        finally:
            lock.release()
    return aside if damaged else None


def _readable(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


@contextmanager
def _writing(journal: Path) -> Iterator[None]:
    """Be quiet, and say in words that a journal cannot be written."""
    try:
        with _quiet():
            yield
    except OSError as fault:
        what = f"cannot write {journal}: {(fault.strerror or str(fault)).lower()}"
        hint = f"make room for it, then go on by --resume {journal.parent}"
        raise ImgtoolError(what, hint) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what samplers log and warn of from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
