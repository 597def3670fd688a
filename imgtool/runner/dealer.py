"""Deals photos to workers, a few at a time, and deals again what a worker took with it when it died.

A worker is given photos ahead of their turn, so that it never waits for the dealer and may fetch them; it
works on one after the other, in the order given. A call and its answer cost milliseconds: one call is for
as many photos as the worker does in ``PORTION`` seconds, and for one where that is slow.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from imgtool.errors import Fatal, ImgtoolError
from imgtool.infer.listing import Order
from imgtool.infer.work import Outcome
from imgtool.runner.worker import Dealt, Reply

DEATHS = 3
"""Workers that a photo, or the start of the batch, may cost."""

AHEAD = 4
"""Photos that a worker has at a time, at least; towards the end fewer, that all end together."""

CALLS = 2
"""Calls that wait at a worker: one is worked on, the next one is there already."""

PORTION = 0.2
"""Seconds that the photos of one call should take."""

MOST = 64
"""Photos of one call, at most."""

TICK = 1.0


@dataclass(eq=False)
class Hand:
    """A worker as the dealer knows it.

    Attributes:
        worker: Host and process, "" until it has started.
        orders: What it has, in the order of their turns.
        calls: How many of these each call is for, at most, that it has not answered.
        portion: For how many the next call is.
        since: When it began with the oldest call.
    """

    worker: str = ""
    orders: deque[Dealt] = field(default_factory=deque)
    calls: deque[int] = field(default_factory=deque)
    portion: int = 1
    since: float = 0.0

    def paced(self, ended: int, now: float) -> None:
        """Note that a call for so many photos was answered, and go on from there."""
        speed = ended / max(now - self.since, 1e-9)
        self.portion = max(1, min(int(PORTION * speed), 2 * self.portion, MOST))
        self.since = now


@dataclass(frozen=True)
class Lost:
    """A worker is no more."""

    reason: str = ""


News = tuple[Hand, Sequence[Reply] | Lost]


class Pool(Protocol):
    """Where workers come from."""

    def hire(self) -> Hand:
        """Begin to start a worker; its first news is its ``Worker.start``."""
        ...

    def call(self, hand: Hand, more: Sequence[Dealt], most: int) -> None:
        """Have a worker take further photos and process its oldest; the answer is among the news.

        It is for one photo at least, and for ``most`` at most.
        """
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
        """A worker died with these photos; it may have begun with any of them."""
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
        fail_fast: Deal and call for nothing more once a photo has failed; a fatal fault always ends it so.
        tick: Called at least every second, with the number of photos that have ended.
        finished: Photos that have ended.
        ready_at: When the last of the first workers, or as yet the first one, was ready.
        before: Photos that had ended by then.
        backlog: Photos that no worker has.
        hands: The workers that live.
        clock: Tells the time in seconds.
        deaths: Of a photo by its number, the workers that died of it: it was alone in its call.
        suspects: The numbers of photos of which a worker may have died: until they have ended, a call is for
            one.
        stopped: Whether that has come to pass.
    """

    pool: Pool
    books: Books
    workers: int
    fail_fast: bool = False
    tick: Callable[[int], None] = lambda finished: None
    finished: int = 0
    ready_at: float = 0.0
    before: int = 0
    backlog: deque[Dealt] = field(default_factory=deque)
    hands: list[Hand] = field(default_factory=list)
    clock: Callable[[], float] = time.monotonic
    deaths: Counter[int] = field(default_factory=Counter)
    suspects: set[int] = field(default_factory=set)
    stopped: bool = False
    _ready: int = 0
    _stillborn: int = 0

    def run(self, orders: Sequence[Order]) -> None:
        """Have every photo processed.

        Raises:
            ImgtoolError: Workers do not start.
            RuntimeError: A worker met a bug, or answered for another photo than that whose turn it was.
        """
        self.backlog.extend(Dealt(number, order) for number, order in enumerate(orders))
        while self._goes_on():
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

    def _goes_on(self) -> bool:
        """Tell whether there is something to be waited for; once stopped, for the answers to calls alone."""
        return any(hand.calls if self.stopped else hand.orders for hand in self.hands) or bool(self.backlog)

    def _open(self) -> int:
        return len(self.backlog) + sum(len(hand.orders) for hand in self.hands)

    def _deal(self, hand: Hand) -> None:
        """Call a worker as often as it may be called, and fill its hand."""
        if not hand.worker or self.stopped:
            return
        alone = self.fail_fast or self.suspects
        while len(hand.calls) < CALLS:
            share = max(1, self._open() // (CALLS * CALLS * len(self.hands)))
            portion = 1 if alone else min(hand.portion, share)
            ahead = AHEAD if share >= AHEAD else CALLS
            more = []
            while self.backlog and len(hand.orders) < max(ahead, CALLS * portion):
                dealt = self.backlog.popleft()
                hand.orders.append(dealt)
                more.append(dealt)
                self.books.begun(dealt.order, hand.worker)
            most = min(portion, len(hand.orders) - sum(hand.calls))
            if not most:
                return
            if not hand.calls:
                hand.since = self.clock()
            hand.calls.append(most)
            self.pool.call(hand, more, most)

    def _answered(self, hand: Hand, replies: Sequence[Reply]) -> None:
        """Note what was made of the photos of a call; what it was not made of, another call is for."""
        if hand.worker:
            hand.calls.popleft()
            hand.paced(len(replies), self.clock())
        for reply in replies:
            self.books.words(reply.words)
            if reply.bug:
                raise RuntimeError(f"in the worker {reply.worker}:\n{reply.bug}")
            if hand.worker:
                self._ended(hand, reply)
            else:
                self._started(hand, reply)

    def _ended(self, hand: Hand, reply: Reply) -> None:
        dealt = hand.orders.popleft()
        if reply.number != dealt.number:
            wanted = f"{dealt.number}, {dealt.order.job.item.name}"
            raise RuntimeError(f"the worker {reply.worker} answered for photo {reply.number}, not {wanted}")
        self.suspects.discard(dealt.number)
        self.finished += 1
        if reply.outcome:
            self.books.ended(dealt.order, reply.outcome, reply.worker)
        elif reply.fault:
            self._failed(dealt.order, reply.fault, reply.worker)

    def _started(self, hand: Hand, reply: Reply) -> None:
        if reply.fault:
            raise reply.fault
        hand.worker = reply.worker
        self._ready += 1
        self._stillborn = 0
        if self._ready <= self.workers:
            self.ready_at, self.before = self.clock(), self.finished

    def _failed(self, order: Order, fault: ImgtoolError, worker: str) -> None:
        self.books.failed(order, fault, worker)
        if self.fail_fast or isinstance(fault, Fatal):
            # What a worker has it keeps; what it was not called for, it will not do.
            self.stopped = True
            self.backlog.clear()

    def _lost(self, hand: Hand, reason: str) -> None:
        """Deal again what a worker took with it, unless the photo that it worked on has cost too many.

        Of several photos in one call, any may have been that one.
        """
        self.hands.remove(hand)
        self.books.lost(hand.worker, [dealt.order for dealt in hand.orders], reason)
        if not hand.worker:
            self._stillbirth(reason)
        worked_on = [dealt.number for dealt in hand.orders][: hand.calls[0] if hand.calls else 0]
        self.suspects.update(worked_on)
        self.deaths.update(worked_on if len(worked_on) == 1 else ())
        given_up = hand.orders.popleft() if worked_on and self.deaths[worked_on[0]] >= DEATHS else None
        if not self.stopped:
            self.backlog.extendleft(reversed(hand.orders))
        if given_up:
            self.suspects.discard(given_up.number)
            self.finished += 1
            what = f"the process that worked on it died {DEATHS} times, perhaps for its memory"
            hint = "try it alone, without --runner, or with fewer --workers"
            self._failed(given_up.order, ImgtoolError(what, hint), hand.worker)

    def _stillbirth(self, reason: str) -> None:
        """Go on with the workers that there are, once too many in a row have died as they started."""
        self._stillborn += 1
        if self._stillborn < DEATHS:
            return
        if not self.hands:
            what = f"workers die before they are ready{': ' if reason else ''}{reason}"
            raise ImgtoolError(what, "try fewer --workers: it may be for lack of memory")
        self.workers = len(self.hands)
        text = f"workers die before they are ready: the batch goes on with {self.workers} and no more"
        self.books.words([("warn", text)])
