"""What is searched: a space, what its points mean, and how a network of it is measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from imgtool import engines
from imgtool.engine import Engine
from imgtool.search import gauge, space
from imgtool.search.cost import Cost, Limits
from imgtool.settings import Train

Structure = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """What an engine says of its search.

    Attributes:
        space: What is varied.
        structure: Settings of a trial to all that the cost of its network depends on; raises
            ``ImgtoolError`` where there is no such network.
        gauge: ``(structure, limits) -> cost``; raises ``gauge.Unfit`` where the network cannot be built,
            ``cost.Unmeasured`` where this one cannot be measured, and ``ImgtoolError`` where none can.
        measured: What is measured, in words.
        settings: Values of the space to settings of a training; without it they are settings themselves.
        fixed: Settings of all trainings.
        least: Structure to what its network costs at the very least, where that can be computed.
        constraints: Inequalities between names of the space, for samplers that know them.
        sampler: Who proposes where nobody is named.
        selection: By what the best is chosen, in words.
    """

    space: space.Space
    structure: Callable[[Any], Structure]
    gauge: Callable[[Structure, Limits], Cost]
    measured: str
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    fixed: Mapping[str, Any] = field(default_factory=dict)
    least: Callable[[Structure], Cost] = lambda structure: Cost(0.0, 0.0, measured=False)
    constraints: tuple[str, ...] = ()
    sampler: str = "optuna"
    selection: str = "held-out part of the training data"


def usual(engine: Engine, settings: Train) -> Task:
    """Return the search of an engine in the space of ``--space``, or else in the one that ships with it.

    Raises:
        ImgtoolError: Code 2, for a space that the settings do not take.
    """
    name = engine.name
    path = settings.space or space.shipped(name)
    return Task(
        space.read(path, name, engines.settings(name).Train),
        lambda trial: gauge.structure(engine, trial),
        lambda net, limits: gauge.measured(name, net, limits.ms),
        gauge.MEASURED,
    )


def key(structure: Structure) -> str:
    """Return the name of a structure: networks of the same one cost the same."""
    return hashlib.sha256(json.dumps(structure, sort_keys=True).encode()).hexdigest()[:16]
