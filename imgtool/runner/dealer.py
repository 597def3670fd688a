"""Deals photos to workers, a few at a time, and deals again what a worker took with it when it died.

A worker is given photos ahead of their turn, so that it never waits for the dealer and may fetch them; it
answers for one after the other, in the order given.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from imgtool.errors import ImgtoolError
from imgtool.infer.listing import Order
from imgtool.infer.work import Outcome
from imgtool.runner.worker import Reply

DEATHS = 3
"""Workers that a photo, or the start of the batch, may cost."""

AHEAD = 4
"""Photos that a worker has at a time; towards the end half as many, that all end together."""

CALLS = 2
"""Calls that wait at a worker: one is worked on, the next one is there already."""

TICK = 1.0


@dataclass(eq=False)
class Hand:
    """A worker as the dealer knows it.

    Attributes:
        worker: Host and process, "" until it has started.
        orders: What it has, in the order of their turns.
        calls: Of these, how many it was called to process.
    """

    worker: str = ""
    orders: deque[Order] = field(default_factory=deque)
    calls: int = 0


@dataclass(frozen=True)
class Lost:
    """A worker is no more."""

    reason: str = ""


News = tuple[Hand, Reply | Lost]


class Pool(Protocol):
    """Where workers come from."""

    def hire(self) -> Hand:
        """Begin to start a worker; its first news is its ``Worker.start``."""
        ...

    def call(self, hand: Hand, more: Sequence[Order]) -> None:
        """Have a worker take further photos and process its oldest; the answer is among the news."""
        ...

    def news(self, seconds: float) -> list[News]:
        """Return answers, waiting at most so long for the first; each worker's in the order of the calls."""
        ...

    def close(self, at_once: bool) -> None:
        """End all workers: idle ones, or whatever they do."""
        ...


class Books(Protocol):
    """Who is told how it goes."""

    def begun(self, order: Order, worker: str) -> None:
        """A worker may begin with a photo."""
        ...

    def ended(self, order: Order, outcome: Outcome, worker: str) -> None:
        """A photo is done."""
        ...

    def failed(self, order: Order, fault: ImgtoolError, worker: str) -> None:
        """A photo is not done."""
        ...

    def lost(self, worker: str, orders: Sequence[Order], reason: str) -> None:
        """A worker died with these photos."""
        ...

    def words(self, words: Sequence[tuple[str, str]]) -> None:
        """A worker has something to say."""
        ...


@dataclass
class Dealer:
    """The one loop of a batch that is spread.

    Attributes:
        pool: Where workers come from.
        books: Told how it goes.
        workers: How many to hire.
        fail_fast: Begin nothing more once a photo has failed.
        tick: Called at least every second, with the number of photos that have ended.
        finished: Photos that have ended.
        ready_at: When the last of the first workers, or as yet the first one, was ready.
        before: Photos that had ended by then.
    """

    pool: Pool
    books: Books
    workers: int
    fail_fast: bool = False
    tick: Callable[[int], None] = lambda finished: None
    finished: int = 0
    ready_at: float = 0.0
    before: int = 0
    backlog: deque[Order] = field(default_factory=deque)
    hands: list[Hand] = field(default_factory=list)
    deaths: Counter[int] = field(default_factory=Counter)
    _ready: int = 0
    _stillborn: int = 0

    def run(self, orders: Sequence[Order]) -> None:
        """Have every photo processed.

        Raises:
            ImgtoolError: Workers do not start.
            RuntimeError: A worker met a bug.
        """
        self.backlog.extend(orders)
        while self.backlog or any(hand.orders for hand in self.hands):
            while self.backlog and len(self.hands) < min(self.workers, self._open()):
                self.hands.append(self.pool.hire())
            for hand in self.hands:
                self._deal(hand)
            for hand, news in self.pool.news(TICK):
                if isinstance(news, Lost):
                    self._lost(hand, news.reason)
                else:
                    self._answered(hand, news)
            self.tick(self.finished)

    def _open(self) -> int:
        return len(self.backlog) + sum(len(hand.orders) for hand in self.hands)

    def _deal(self, hand: Hand) -> None:
        """Call a worker as often as it may be called, and fill its hand."""
        if not hand.worker:
            return
        ahead = AHEAD if len(self.backlog) > AHEAD * len(self.hands) else CALLS
        while hand.calls < CALLS:
            more = []
            while self.backlog and len(hand.orders) < ahead:
                order = self.backlog.popleft()
                hand.orders.append(order)
                more.append(order)
                self.books.begun(order, hand.worker)
            if len(hand.orders) == hand.calls:
                return
            hand.calls += 1
            self.pool.call(hand, more)

    def _answered(self, hand: Hand, reply: Reply) -> None:
        self.books.words(reply.words)
        if reply.bug:
            raise RuntimeError(f"in the worker {reply.worker}:\n{reply.bug}")
        if not hand.worker:
            self._started(hand, reply)
            return
        order = hand.orders.popleft()
        hand.calls -= 1
        self.finished += 1
        if reply.outcome:
            self.books.ended(order, reply.outcome, reply.worker)
        elif reply.fault:
            self._failed(order, reply.fault, reply.worker)

    def _started(self, hand: Hand, reply: Reply) -> None:
        if reply.fault:
            raise reply.fault
        hand.worker = reply.worker
        self._ready += 1
        self._stillborn = 0
        if self._ready <= self.workers:
            self.ready_at, self.before = time.monotonic(), self.finished

    def _failed(self, order: Order, fault: ImgtoolError, worker: str) -> None:
        self.books.failed(order, fault, worker)
        if self.fail_fast:
            self.backlog.clear()
            for hand in self.hands:  # what it was not called for, it will not do
                while len(hand.orders) > hand.calls:
                    hand.orders.pop()

    def _lost(self, hand: Hand, reason: str) -> None:
        """Deal again what a worker took with it, unless its first photo has cost too many."""
        self.hands.remove(hand)
        self.books.lost(hand.worker, list(hand.orders), reason)
        if not hand.worker:
            self._stillborn += 1
            if self._stillborn >= DEATHS:
                what = f"workers die before they are ready{': ' if reason else ''}{reason}"
                raise ImgtoolError(what, "try fewer --workers: it may be for lack of memory")
        first = hand.orders[0] if hand.calls else None
        if first:
            self.deaths[id(first)] += 1
            if self.deaths[id(first)] >= DEATHS:
                hand.orders.popleft()
                self.finished += 1
        self.backlog.extendleft(reversed(hand.orders))
        if first and self.deaths[id(first)] >= DEATHS:
            what = f"the process that worked on it died {DEATHS} times, perhaps for its memory"
            hint = "try it alone, without --runner, or with fewer --workers"
            self._failed(first, ImgtoolError(what, hint), hand.worker)
