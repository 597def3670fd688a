"""What a worker process does: the network once, then one photo after the other, as the plain run does it."""

from __future__ import annotations

import os
import socket
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from imgtool import engines
from imgtool.console import Bar
from imgtool.errors import USAGE, ImgtoolError
from imgtool.infer.listing import Order

if TYPE_CHECKING:
    from imgtool.buckets.transit import Plan
    from imgtool.infer.work import Outcome, Work


@dataclass(frozen=True)
class Brief:
    """What a worker is told at first.

    Attributes:
        engine: Name of the engine.
        settings: Of ``infer``; ``threads`` is the worker's own number.
        total: Inputs of the whole batch.
        folder: Working directory of the command, which paths are relative to.
        plan: How URLs are fetched and sent.
    """

    engine: str
    settings: Any
    total: int
    folder: str
    plan: Plan | None = None


@dataclass
class Words:
    """What a worker has to say, in order: the dealer says it."""

    said: list[tuple[str, str]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Keep a line."""
        self.said.append(("say", text))

    def warn(self, text: str) -> None:
        """Keep a warning."""
        self.said.append(("warn", text))

    def binary(self, data: bytes) -> None:
        """Refuse: a worker has no standard output."""
        raise TypeError("a worker writes files alone")

    def taken(self) -> list[tuple[str, str]]:
        """Return what was kept, and keep it no longer."""
        taken, self.said = self.said, []
        return taken


@dataclass(frozen=True)
class Reply:
    """What a worker answers to a call.

    Attributes:
        worker: Its host and process.
        outcome: What was made of the oldest photo that it had; None where it has just started, or failed.
        fault: What was wrong with it.
        bug: Where the program itself failed: how, and where.
        words: What is to be said.
    """

    worker: str
    outcome: Outcome | None = None
    fault: ImgtoolError | None = None
    bug: str = ""
    words: Sequence[tuple[str, str]] = ()


class Worker:
    """A network in a process of its own. Every method returns a ``Reply`` and raises nothing."""

    def __init__(self, brief: Brief) -> None:
        """Keep what is to be done."""
        self.brief = brief
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.words = Words()
        self.orders: deque[Order] = deque()
        self.work: Work | None = None

    def start(self) -> Reply:
        """Build the network."""
        try:
            self._start()
        except ImgtoolError as fault:
            return self._reply(fault=fault)
        except Exception:  # noqa: BLE001 - the dealer raises it
            return self._reply(bug=traceback.format_exc())
        return self._reply()

    def _start(self) -> None:
        brief = self.brief
        # OpenMP listens only before torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ["OMP_NUM_THREADS"] = str(brief.settings.threads)
        try:
            os.chdir(brief.folder)
        except OSError as fault:
            what = f"the folder {brief.folder} is not on {socket.gethostname()}: {fault.strerror}"
            raise ImgtoolError(what, "share it among the machines, or name URLs", USAGE) from None
        from imgtool.infer.work import Work, weights_of

        engine = engines.load(brief.engine)
        transit = None
        if brief.plan:
            from imgtool.buckets.transit import Transit

            transit = Transit(brief.plan)
        weights = weights_of(engine, brief.settings)
        self.work = Work(engine, brief.settings, self.words, weights, brief.total, transit)
        self.work.load()

    def do(self, more: Sequence[Order]) -> Reply:
        """Take further photos, and process the oldest one.

        Args:
            more: Photos whose turn comes later, if it is not their turn now.
        """
        if self.work is None:
            return self._reply(bug="a worker was called that has not started")
        self.orders.extend(more)
        order = self.orders.popleft()
        if self.work.transit:
            self.work.transit.ahead([each.job.item for each in more])
        try:
            return self._reply(self.work.do(order, (), Bar(), lambda row: None))
        except ImgtoolError as fault:
            return self._reply(fault=fault)
        except Exception:  # noqa: BLE001 - the dealer raises it
            return self._reply(bug=traceback.format_exc())

    def close(self) -> None:
        """End what is fetched ahead."""
        if self.work and self.work.transit:
            self.work.transit.close()

    def _reply(
        self, outcome: Outcome | None = None, fault: ImgtoolError | None = None, bug: str = ""
    ) -> Reply:
        return Reply(self.name, outcome, fault, bug, self.words.taken())
