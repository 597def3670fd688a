"""What a network costs. Nothing that has to be installed: measurements on other machines carry this file."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from imgtool.errors import ImgtoolError

CALLS, FEWEST = 40, 5
"""Timed calls in a round at most, and at least."""
ENOUGH = 0.5
"""CPU seconds after which a round ends."""
HOPELESS = 20.0
"""A first call that takes so many times the limit is the last."""


class Unmeasured(ImgtoolError):
    """This one network could not be measured: it took too long, or its process was killed."""


class Cost(NamedTuple):
    """What running a network costs.

    Attributes:
        cpu_ms: CPU time of a picture, in ms.
        mb: Peak resident memory of the whole process, in 10^6 bytes.
        measured: False where these are lower bounds that were computed: the network is far too large.
        parameters: Of the network, 0 where they were not counted.
    """

    cpu_ms: float
    mb: float
    measured: bool = True
    parameters: int = 0


class Limits(NamedTuple):
    """What a network may cost; 0 is any."""

    ms: float = 0.0
    mb: float = 0.0
    parameters: int = 0

    def given(self) -> dict[str, float]:
        """Return the limits that are set, by the names of what ``Cost`` has."""
        limits = {"cpu_ms": self.ms, "mb": self.mb, "parameters": self.parameters}
        return {name: limit for name, limit in limits.items() if limit}

    def excess(self, cost: Cost) -> dict[str, float]:
        """Return by how much a cost is over each limit that is set; what is within is zero or below."""
        return {name: getattr(cost, name) - limit for name, limit in self.given().items()}

    def missed(self, cost: Cost) -> str:
        """Return which limit a cost misses, in words; "" where it meets all."""
        least = "" if cost.measured else "at least "
        if 0 < self.ms < cost.cpu_ms:
            return f"{least}{cost.cpu_ms:.3g} ms, over {self.ms:g} ms"
        if 0 < self.mb < cost.mb:
            return f"{least}{cost.mb:.3g} MB, over {self.mb:g} MB"
        if 0 < self.parameters < cost.parameters:
            return f"{cost.parameters:,} parameters, over {self.parameters:,}"
        return ""

    def __str__(self) -> str:
        """Return the limits that are set, in words."""
        said = [f"{self.ms:g} ms"] * bool(self.ms) + [f"{self.mb:g} MB"] * bool(self.mb)
        said += [f"{self.parameters:,} parameters"] * bool(self.parameters)
        return ", ".join(said) or "none"


def cpu_times(work: Callable[[], object], max_ms: float, rounds: int) -> list[float]:
    """Return the CPU times in ms of the calls of the fastest of some rounds, after a first call.

    Other processes disturb a round or two, rarely all.

    Args:
        work: What is timed.
        max_ms: Limit in ms, 0 for none; what misses it by far is called once.
        rounds: How many.
    """
    first = _spent(work)
    if 0 < HOPELESS * max_ms < first:
        return [first]
    found = []
    for _ in range(rounds):
        times: list[float] = []
        while len(times) < FEWEST or (len(times) < CALLS and sum(times) < 1e3 * ENOUGH):
            times.append(_spent(work))
        found.append(times)
    return min(found, key=lambda times: sorted(times)[int(0.95 * (len(times) - 1))])


def _spent(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return 1e3 * (time.process_time() - begun)
