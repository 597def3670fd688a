"""The search for architectures: Ax proposes, budgets refuse, what is left is trained and compared.

The space is the original's, 16 numbers. What a candidate costs is measured before it is trained, so a
budget is a limit, and not a wish that a good score may outweigh. What is compared is the error on the
held-out part of the training data, and the CPU time; test data is never read.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import importlib.util
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from imgtool import files
from imgtool.engines.awb import measure, network, sets
from imgtool.engines.awb.measure import Cost, Structure
from imgtool.engines.awb.settings import Train
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.engine import Crew

Point = Mapping[str, float]
"""Where in the space a candidate lies: a number for each name in ``SPACE``."""
Row = dict[str, Any]

TRIALS = "search.jsonl"
"""One line for each candidate: all that the search knows."""
PROPOSALS = 20
"""Candidates proposed at most, for each that is to be trained."""
RANDOM = 5
"""Trained candidates before which proposals are quasi-random."""
FAILURES = 3
"""Trainings failed in a row, with which the search gives up."""

HEIGHT, WIDTH = 432, 648
BLOCKS = (1, 2, 3)


class Range(NamedTuple):
    """What a number of the space may be.

    Attributes:
        low: The least.
        high: The largest.
        kind: "whole", "real", or "log", a real number that is drawn by its logarithm.
    """

    low: float
    high: float
    kind: str

    def bounds(self) -> tuple[float, float]:
        """Return the bounds of a real number which, rounded where it is whole, takes all values alike."""
        margin = 0.499 if self.kind == "whole" else 0.0
        return self.low - margin, self.high + margin


SPACE: Mapping[str, Range] = {
    "neurons": Range(40, 250, "whole"),
    "decay": Range(0, 1.5, "real"),
    "layers": Range(2, 5, "whole"),
    "lr": Range(1e-4, 1e-2, "log"),
    "final_rate": Range(1e-6, 1e-4, "log"),
    "weight_decay": Range(1e-6, 1e-4, "log"),
    "halves": Range(2, 6, "whole"),  # of the scale: 1, 1.5, 2, 2.5, 3
    **{f"channels{block}": Range(16, 256, "whole") for block in BLOCKS},
    **{f"reach{block}": Range(1, 3, "whole") for block in BLOCKS},  # of the kernel, which is 2 reach + 1
    **{f"stride{block}": Range(1, 5, "whole") for block in BLOCKS},
}
CONSTRAINTS = (
    "channels1 <= channels2",
    "channels2 <= channels3",
    *(f"stride{block} <= 2 * reach{block} + 1" for block in BLOCKS),
)


def parameters(point: Point) -> dict[str, Any]:
    """Return the settings of ``train`` that a point stands for; no stride is larger than its kernel."""
    whole = {name: round(value) for name, value in point.items()}
    kernels = [2 * whole[f"reach{block}"] + 1 for block in BLOCKS]
    strides = [min(whole[f"stride{block}"], kernel) for block, kernel in zip(BLOCKS, kernels, strict=True)]
    rate = float(f"{point['lr']:.4g}")
    scale = whole["halves"] / 2
    return {
        "channels": _joined([whole[f"channels{block}"] for block in BLOCKS]),
        "kernels": _joined(kernels),
        "strides": _joined(strides),
        "neurons": whole["neurons"],
        "decay": float(f"{point['decay']:.4g}"),
        "layers": whole["layers"],
        "height": round(HEIGHT / scale),
        "width": round(WIDTH / scale),
        "lr": rate,
        "final_lr": float(f"{min(point['final_rate'] / rate, 1):.4g}"),
        "weight_decay": float(f"{point['weight_decay']:.4g}"),
    }


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def structure(chosen: Mapping[str, Any]) -> Structure:
    """Return the shape of a network, all that its cost depends on.

    Raises:
        ImgtoolError: The neurons do not fill the layers.
    """
    blocks = {name: list(network.triple(chosen[name], name)) for name in ("channels", "kernels", "strides")}
    return blocks | {
        "widths": network.widths(chosen["neurons"], chosen["decay"], chosen["layers"]),
        "height": chosen["height"],
        "width": chosen["width"],
    }


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


# --- who proposes ---


class Sampler(Protocol):
    """Who proposes candidates, and is told what became of them."""

    def ask(self) -> Point:
        """Return the next point to try."""
        ...

    def tell(self, point: Point, scores: Mapping[str, float] | None) -> None:
        """Take up what is known of a point, asked for or not.

        Args:
            point: The point.
            scores: "recovery" in degrees and "cpu_ms"; None where it is not to be proposed again.
        """
        ...


class AxSampler:
    """Ax: quasi-random points first, then by a Gaussian process where both objectives may be improved.

    Whole numbers are given to Ax as real ones and rounded here: so a proposal takes it a quarter of the
    time.
    """

    def __init__(self, settings: Train, known: int = 0) -> None:
        """Describe space and objectives to Ax.

        Args:
            settings: Seed and budget.
            known: Points that were proposed before the search was interrupted: the quasi-random points
                are then others.
        """
        self._asked: dict[str, int] = {}
        with _quiet():
            client = importlib.import_module("ax.api.client").Client
            ranges = importlib.import_module("ax.api.configs").RangeParameterConfig
            self._client = client(random_seed=settings.seed + known)
            self._client.configure_experiment(
                [
                    ranges(name, each.bounds(), "float", scaling="log" if each.kind == "log" else None)
                    for name, each in SPACE.items()
                ],
                parameter_constraints=list(CONSTRAINTS),
            )
            self._client.configure_optimization(
                "-recovery, -cpu_ms", outcome_constraints=[f"cpu_ms <= {settings.max_ms}"]
            )
            self._client.configure_generation_strategy(
                initialization_budget=RANDOM,
                initialization_random_seed=settings.seed + known,
                initialize_with_center=False,
            )

    def ask(self) -> Point:
        """Return the next point to try."""
        with _quiet():
            ((index, point),) = self._client.get_next_trials(1).items()
        self._asked[json.dumps(point, sort_keys=True)] = index
        return dict(point)

    def tell(self, point: Point, scores: Mapping[str, float] | None) -> None:
        """Take up what is known of a point, asked for or not; see ``Sampler``."""
        at = {name: float(value) for name, value in point.items()}
        index = self._asked.pop(json.dumps(at, sort_keys=True), None)
        with _quiet():
            if index is None:
                index = self._client.attach_trial(at)
            if scores is None:
                self._client.mark_trial_abandoned(index)
            else:
                self._client.complete_trial(index, dict(scores))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Ax logs and warns of from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- the search ---


def run(settings: Train, crew: Crew) -> Mapping[str, Any]:
    """Search ``settings.search`` architectures within the budgets; ``Search.go`` says more.

    Raises:
        ImgtoolError: Code 2, where Ax is not installed, or the data has a test part; and as ``Search.go``.
    """
    if importlib.util.find_spec("ax") is None:
        raise ImgtoolError("--search needs Ax", "pip install 'imgtool[search]'", USAGE)
    for folder in settings.data:
        if any(entry.part == "test" for entry in sets.dataset(folder, settings)):
            what = f"{folder} holds test data, by which nothing may be chosen"
            raise ImgtoolError(what, f"give its training part: --data {folder / 'train'}", USAGE)
    search = Search(settings, crew, _gauge(settings))
    crew.say("starting Ax, which takes some seconds")
    return search.go(AxSampler(settings, len(search.rows)))


def _gauge(settings: Train) -> Callable[[Structure], Cost]:
    def gauge(net: Structure) -> Cost:
        if settings.remote:
            return measure.there(net, settings.max_ms, settings.remote)
        return measure.here(net, settings.max_ms)

    return gauge


@dataclass
class Search:
    """A search, as far as it has come.

    Attributes:
        settings: Budgets, data, and the length of each training.
        crew: Trains.
        gauge: Measures what a network costs.
    """

    settings: Train
    crew: Crew
    gauge: Callable[[Structure], Cost]

    def __post_init__(self) -> None:
        """Read what an interrupted search had found.

        Raises:
            ImgtoolError: Code 2, where it had measured on another machine.
        """
        path = self.crew.folder / TRIALS
        self.rows: list[Row] = files.json_lines(path) if path.exists() else []
        for row in self.rows:
            if row["remote"] != self.settings.remote:
                raise ImgtoolError(
                    f"this search measured on {row['remote'] or 'the machine that it ran on'}",
                    "go on with the same --remote, or begin another search",
                    USAGE,
                )
        self._costs = {row["structure"]: _known(row) for row in self.rows if row["cpu_ms"] is not None}

    def go(self, sampler: Sampler) -> dict[str, Any]:
        """Propose, measure and train until as many were trained as the settings say, or none is found.

        The folder holds ``search.jsonl`` (a line for each candidate), ``pareto.csv``, ``pareto.json`` and
        ``pareto.png``, after every training.

        Returns:
            "trials", "rejected", "failed", "trained": counts; "front": for each network on it "trial",
            "recovery", "reproduction" (degrees), "cpu_ms", "mb", "parameters" and "weights"; "best", the
            one of the least recovery error; "selection", what it was chosen by; "folder".

        Raises:
            ImgtoolError: Nothing within the budgets; no training succeeds; a machine to measure on that
                does not answer.
        """
        for row in self.rows:
            if row["status"] == "training":
                self._train(row)
            sampler.tell(row["point"], _objectives(row))
        while self._count("trained", "failed") < self.settings.search and len(self.rows) < self._most():
            point = sampler.ask()
            row = self._measured(point)
            if row["status"] == "training":
                self._train(row)
            sampler.tell(point, _objectives(row))
        return self._record()

    def _most(self) -> int:
        return PROPOSALS * self.settings.search

    def _count(self, *states: str) -> int:
        return sum(row["status"] in states for row in self.rows)

    # --- one candidate ---

    def _measured(self, point: Point) -> Row:
        """Add a candidate: rejected, or about to be trained."""
        row: Row = {
            "trial": len(self.rows),
            "status": "rejected",
            "why": "",
            "structure": "",
            "cpu_ms": None,
            "mb": None,
            "measured": False,
            "remote": self.settings.remote,
            "parameters": parameters(point),
            "point": dict(point),
        }
        try:
            net = structure(row["parameters"])
            least = measure.least(net)
        except ImgtoolError as fault:
            row["why"] = fault.what
        else:
            row["structure"] = hashlib.sha256(json.dumps(net, sort_keys=True).encode()).hexdigest()[:16]
            cost = self._cost(row["structure"], net, least)
            row |= cost._asdict()
            row["why"] = self._missed(cost)
            row["status"] = "rejected" if row["why"] else "training"
        self.rows.append(row)
        self._save()
        self.crew.say(f"{_name(row)}: " + (f"rejected: {row['why']}" if row["why"] else _costs(row)))
        return row

    def _cost(self, key: str, net: Structure, least: Cost) -> Cost:
        if key not in self._costs:
            self._costs[key] = least if self._missed(least) else self.gauge(net)
        return self._costs[key]

    def _missed(self, cost: Cost) -> str:
        """Return which budget a cost misses, "" where it meets both."""
        least = "" if cost.measured else "at least "
        if cost.cpu_ms > self.settings.max_ms:
            return f"{least}{cost.cpu_ms:.3g} ms, over {self.settings.max_ms:g} ms"
        if cost.mb > self.settings.max_mb:
            return f"{least}{cost.mb:.3g} MB, over {self.settings.max_mb:g} MB"
        return ""

    def _train(self, row: Row) -> None:
        """Train a candidate, or go on where its training was interrupted."""
        try:
            found = self.crew.train(self._trial(row), _name(row))
        except ImgtoolError as fault:
            row |= {"status": "failed", "why": fault.what}
            if fault.code == USAGE or self._failing():  # other candidates will do no better
                row |= {"status": "training"}
                raise
            self.crew.say(f"{_name(row)}: failed: {fault.what}")
        else:
            row |= {"status": "trained", "scores": found["best"]["scores"], "weights": found["weights"]}
            self.crew.say(
                f"{_name(row)}: recovery error {row['scores']['recovery']:.3f} degrees, {_costs(row)}"
            )
        self._save()
        if row["status"] == "trained":
            self._report()

    def _failing(self) -> bool:
        tried = [row["status"] for row in self.rows if row["status"] in ("trained", "failed")]
        return tried[-FAILURES:] == ["failed"] * FAILURES

    def _trial(self, row: Row) -> Train:
        fold = 0 if self.settings.folds else -1
        alone = {"arch": "deepawb", "search": 0, "remote": "", "fold": fold, "train_on_all": False}
        return self.settings.changed(**alone | row["parameters"])

    def _save(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        files.write(self.crew.folder / TRIALS, text.encode())

    # --- all of them ---

    def _record(self) -> dict[str, Any]:
        if not self._count("trained"):
            raise self._nothing()
        if self._count("trained", "failed") < self.settings.search:
            self.crew.say(f"stopped after {len(self.rows)} candidates: too few are within the budgets")
        record = self._report()
        for each in record["front"]:
            about = "  ".join(f"{name} {value}" for name, value in each["parameters"].items())
            self.crew.say(f"{_name(each)}: {each['recovery']:.3f} degrees, {_costs(each)}  {about}")
        return record

    def _nothing(self) -> ImgtoolError:
        if failed := [row["why"] for row in self.rows if row["status"] == "failed"]:
            return ImgtoolError(
                f"no candidate could be trained: {failed[-1]}", "try a lower --batch, or more data"
            )
        known = [row for row in self.rows if row["measured"]]
        seen = "none of them could be measured"
        if known:
            fastest, smallest = (min(row[name] for row in known) for name in ("cpu_ms", "mb"))
            seen = f"the fastest takes {fastest:.3g} ms, the smallest {smallest:.3g} MB"
        budget = f"{self.settings.max_ms:g} ms and {self.settings.max_mb:g} MB"
        return ImgtoolError(
            f"none of {len(self.rows)} candidates is within {budget}: {seen}", "raise --max-ms or --max-mb"
        )

    def _report(self) -> dict[str, Any]:
        """Write the front and its picture, and return the record."""
        trained = [row for row in self.rows if row["status"] == "trained" and not self._missed(_known(row))]
        if not trained:
            raise ImgtoolError("no trained network is within the budgets", "raise --max-ms or --max-mb")
        objectives = [(row["cpu_ms"], row["scores"]["recovery"]) for row in trained]
        best = [trained[index] for index in front(objectives)]
        shown = [
            {
                "trial": row["trial"],
                "recovery": row["scores"]["recovery"],
                "reproduction": row["scores"].get("reproduction"),
                "cpu_ms": row["cpu_ms"],
                "mb": row["mb"],
                "parameters": row["parameters"],
                "weights": row["weights"],
            }
            for row in best
        ]
        record = {
            "trials": len(self.rows),
            "rejected": self._count("rejected"),
            "failed": self._count("failed"),
            "trained": self._count("trained"),
            "selection": "held-out part of the training data; test data was not read",
            "front": shown,
            "best": shown[-1],
            "folder": str(self.crew.folder),
        }
        files.write(self.crew.folder / "pareto.json", json.dumps(record, indent=2).encode())
        files.write(self.crew.folder / "pareto.csv", _table(shown).encode())
        self._draw([row["trial"] for row in best])
        return record

    def _draw(self, best: Sequence[int]) -> None:
        from imgtool import plots

        points = {
            row["trial"]: (
                math.inf if row["cpu_ms"] is None else row["cpu_ms"],
                row.get("scores", {}).get("recovery", math.nan),
            )
            for row in self.rows
        }
        plots.front(
            points,
            best,
            self.crew.folder / "pareto.png",
            title="Error and cost of networks",
            labels=("CPU time of a frame, p95, in ms", "held-out recovery error in degrees"),
            limit=self.settings.max_ms,
        )


def _known(row: Row) -> Cost:
    return Cost(row["cpu_ms"], row["mb"], row["measured"])


def _name(row: Row) -> str:
    return f"trial-{row['trial']:03}"


def _costs(row: Row) -> str:
    return f"{row['cpu_ms']:.3g} ms, {row['mb']:.3g} MB"


def _objectives(row: Row) -> dict[str, float] | None:
    if row["status"] != "trained":
        return None
    return {"recovery": row["scores"]["recovery"], "cpu_ms": row["cpu_ms"]}


def _table(shown: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    rows = [{**each, **each["parameters"]} for each in shown]
    columns = [name for name in rows[0] if name != "parameters"]
    table = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
