"""What a worker process does: the network once, then one photo after the other, as the plain run does it."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from imgtool import engines
from imgtool.console import Bar
from imgtool.errors import USAGE, Fatal, ImgtoolError
from imgtool.infer.listing import Order

if TYPE_CHECKING:
    from imgtool.buckets.transit import Plan
    from imgtool.infer.work import Outcome, Work

SPELL = 0.3
"""Seconds after which a worker that has several photos to do answers for those that it has done."""


@dataclass(frozen=True)
class Brief:
    """What a worker is told at first.

    Attributes:
        engine: Name of the engine.
        settings: Of ``infer``; ``threads`` is the worker's own number.
        total: Inputs of the whole batch.
        folder: Working directory of the command, which paths are relative to.
        plan: How URLs are fetched and sent.
        host: The machine of the command.
        copies: Settings that name copies of URLs in the cache of that machine, and the URLs.
    """

    engine: str
    settings: Any
    total: int
    folder: str
    plan: Plan | None = None
    host: str = field(default_factory=socket.gethostname)
    copies: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dealt:
    """A photo as a worker has it.

    Attributes:
        number: Its number in the batch, which the reply repeats.
        order: What is to be done.
    """

    number: int
    order: Order


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
    """What a worker answers for a photo, or as it has started.

    Attributes:
        worker: Its host and process.
        number: Of the photo; -1 where the worker has just started.
        outcome: What was made of the photo; None where the worker has just started, or failed.
        fault: What was wrong with it.
        bug: Where the program itself failed: how, and where.
        words: What is to be said.
    """

    worker: str
    number: int = -1
    outcome: Outcome | None = None
    fault: ImgtoolError | None = None
    bug: str = ""
    words: Sequence[tuple[str, str]] = ()

    @property
    def ends(self) -> bool:
        """Whether nothing is to be done after it."""
        return bool(self.bug) or isinstance(self.fault, Fatal)


class Worker:
    """A network in a process of its own. Methods that are called from outside raise nothing."""

    def __init__(self, brief: Brief) -> None:
        """Keep what is to be done."""
        self.brief = brief
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.words = Words()
        self.orders: deque[Dealt] = deque()
        self.work: Work | None = None

    def start(self) -> Sequence[Reply]:
        """Build the network; return how that went, a single reply."""
        return [self._replied(self._start)]

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

            transit = Transit(brief.plan, warn=self.words.warn)
        settings = self._settings()
        weights = weights_of(engine, settings)
        self.work = Work(engine, settings, self.words, weights, brief.total, transit)
        self.work.load()

    def _settings(self) -> Any:
        """Return the settings; on another machine, with copies of its own of what was fetched for them."""
        settings = self.brief.settings
        if self.brief.host == socket.gethostname() or not self.brief.copies:
            return settings
        from imgtool import names
        from imgtool.buckets.mirror import mirror

        values = {}
        for name, url in self.brief.copies.items():
            copy = mirror(url, self.words.say, warn=self.words.warn)
            names.call(copy, url)
            values[name] = type(getattr(settings, name))(copy)
        return settings.model_copy(update=values)

    def do(self, more: Sequence[Dealt], most: int) -> Sequence[Reply]:
        """Take further photos, and process the oldest ones: one at least, others while ``SPELL`` lasts.

        Args:
            more: Photos whose turn comes later, if it is not their turn now.
            most: How many to process at most, of those that it has.

        Returns:
            A reply for each that was processed, in their order; after a bug, or a fault that is fatal to
            the batch, none is.
        """
        began = time.monotonic()
        self.orders.extend(more)
        if self.work and self.work.transit:
            self.work.transit.ahead([each.order.job.item for each in more])
        replies = [self._next()]
        while len(replies) < most and not replies[-1].ends and time.monotonic() - began < SPELL:
            replies.append(self._next())
        return replies

    def _next(self) -> Reply:
        dealt = self.orders.popleft()
        return self._replied(partial(self._done, dealt.order), dealt.number)

    def _done(self, order: Order) -> Outcome:
        if self.work is None:
            raise RuntimeError("a worker was called that has not started")
        return self.work.do(order, (), Bar(), lambda row: None)

    def close(self) -> None:
        """End what is fetched ahead."""
        if self.work and self.work.transit:
            self.work.transit.close()

    def _replied(self, made: Callable[[], Outcome | None], number: int = -1) -> Reply:
        outcome, fault, bug = None, None, ""
        try:
            outcome = made()
        except ImgtoolError as caught:
            fault = caught
        except Exception:  # noqa: BLE001 - the dealer raises it
            bug = traceback.format_exc()
        return Reply(self.name, number, outcome, fault, bug, self.words.taken())
