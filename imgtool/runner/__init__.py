"""Many photos: ``--runner`` spreads them over processes or a Ray cluster, ``--shard`` over an array of jobs.

One process, the driver, knows the names of all files, deals the photos, prints, and keeps the books; workers
do to one photo after the other what the plain run does.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from imgtool import names, places, runtime
from imgtool.console import Bar
from imgtool.errors import ImgtoolError
from imgtool.infer.batch import Batch
from imgtool.infer.listing import Order, many
from imgtool.infer.work import Outcome
from imgtool.runner import cluster, processes
from imgtool.runner.dealer import Dealer, Pool
from imgtool.runner.worker import Brief
from imgtool.settings import Infer

EVERY = 10.0
"""Seconds between lines that tell how far it is, where no bar is drawn."""

STALE = 600.0
"""Age in seconds at which a temporary file in a folder that others write to as well is nobody's."""


def run(batch: Batch) -> int:
    """Process a batch by workers.

    Returns:
        The exit code.

    Raises:
        ImgtoolError: Workers do not start, or cannot: no Ray, a device that is not there, weights that do not
            fit.
    """
    settings, console = batch.settings, batch.console
    if settings.runner == "ray":
        cluster.check()
    batch.open_manifest()
    books = Books(batch)
    try:
        with _interrupted_once():
            _go(books)
    finally:
        batch.close()
    console.say(books.told())
    if console.json:
        console.result({"summary": books.summary()})
    return batch.verdict()


def _go(books: Books) -> None:
    batch = books.batch
    try:
        with batch.console.progress(len(batch.jobs), f"infer {batch.engine.name}") as books.bar:
            orders = [order for order in map(batch.places.order, batch.jobs) if books.admitted(order)]
            if orders and not batch.stopped:
                _deal(books, orders)
    except KeyboardInterrupt:
        batch.console.say(batch.left())
        raise
    finally:
        books.sweep()


@contextmanager
def _interrupted_once() -> Iterator[None]:
    """Have Ctrl-C or SIGTERM interrupt the block once: what comes after does not keep it from ending workers.

    Outside the main thread there is nothing to be interrupted.
    """
    heard = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if not heard:
            try:
                handlers[number](number, frame)
            except KeyboardInterrupt:
                heard = True
                raise

    found = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    here = threading.current_thread() is threading.main_thread()
    handlers = {int(number): each for number, each in found.items() if here and callable(each)}
    for number in handlers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, each in handlers.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, each)


def _deal(books: Books, orders: Sequence[Order]) -> None:
    """Hire workers, and have them do all."""
    settings = books.batch.settings
    pool, workers, threads = _pool(books, min(settings.workers, len(orders)), settings.threads)
    workers = min(workers, len(orders))
    books.batch.console.say(
        f"{many(len(orders), 'photo')}, {many(workers, 'worker')} of {many(threads, 'thread')}"
    )
    dealer = Dealer(pool, books, workers, settings.fail_fast, books.tick)
    books.dealer = dealer
    at_once = True
    try:
        dealer.run(orders)
        at_once = False
    finally:
        books.ended_at = time.monotonic()
        for hand in dealer.hands:
            books.gone(hand.worker, [dealt.order for dealt in hand.orders])
        pool.close(at_once)


def _pool(books: Books, workers: int, threads: int) -> tuple[Pool, int, int]:
    batch = books.batch

    def brief() -> Brief:
        plan = batch.work.transit.plan if batch.work.transit else None
        settings = batch.settings.model_copy(update={"threads": threads})
        return Brief(
            batch.engine.name, settings, batch.work.total, os.getcwd(), plan, copies=copies_of(settings)
        )

    if batch.settings.runner == "ray":
        cuda = batch.settings.device.startswith("cuda")
        ours, workers, threads = cluster.connect(workers, threads, cuda, batch.console.warn)
        return cluster.Cluster(brief(), ours, batch.console.say), workers, threads
    cores = runtime.cores()
    workers, threads = cluster.sizes(workers, threads, cores, cores)
    return processes.Processes(brief()), workers, threads


def copies_of(settings: Infer) -> dict[str, str]:
    """Return the settings that name copies of URLs in the cache of this machine, and the URLs."""
    read = type(settings).model_fields.keys() - {*places.WRITTEN, "inputs"}
    values = {name: getattr(settings, name) for name in read}
    found = {
        name: names.shown(os.path.abspath(value))
        for name, value in values.items()
        if value and isinstance(value, str | Path)
    }
    return {name: url for name, url in found.items() if names.is_url(url)}


@dataclass
class Books:
    """Tells the batch what workers did, and the user how far it is.

    Attributes:
        batch: The batch.
        bar: Moves with each photo.
        dealer: Who deals, once there is something to deal.
        counts: How many photos ended how.
    """

    batch: Batch
    bar: Bar = field(default_factory=Bar)
    dealer: Dealer | None = None
    counts: Counter[str] = field(default_factory=Counter)
    began: float = field(default_factory=time.monotonic)
    ended_at: float = 0.0
    _told_at: float = field(default_factory=time.monotonic)
    _told: str = ""
    _gone: set[tuple[Path, str]] = field(default_factory=set)

    def admitted(self, order: Order) -> bool:
        """Tell whether a photo is to be done; count it where it is not."""
        failures = len(self.batch.failures)
        if self.batch.stopped or self.batch.admitted(order, self.bar):
            return not self.batch.stopped
        self.counts["failed" if len(self.batch.failures) > failures else "left out"] += 1
        self.bar.advance(1)
        return False

    def begun(self, order: Order, worker: str) -> None:
        """Note that a worker may begin with a photo."""
        self.batch.begun(order, worker)

    def ended(self, order: Order, outcome: Outcome, worker: str) -> None:
        """Note and say what was made of a photo."""
        self.counts["done"] += 1
        self.batch.keep(order.job, outcome.row)
        self.batch.done(order, outcome, worker)
        self.bar.advance(1)

    def failed(self, order: Order, fault: ImgtoolError, worker: str) -> None:
        """Note and say what went wrong with a photo."""
        self.counts["failed"] += 1
        self.batch.failed(order, fault, worker)
        self.bar.advance(1)

    def lost(self, worker: str, orders: Sequence[Order], reason: str) -> None:
        """Say that a worker died; remember where it may have left something half written."""
        self.gone(worker, orders)
        verb = "is" if len(orders) == 1 else "are"
        told = f": {many(len(orders), 'photo')} {verb} dealt again"
        again = told if orders and not self.batch.stopped else ""
        self.batch.console.say(f"the worker {worker or '(as it started)'} died ({reason}){again}")

    def words(self, words: Sequence[tuple[str, str]]) -> None:
        """Say what a worker has to say."""
        for kind, text in words:
            (self.batch.console.warn if kind == "warn" else self.batch.console.say)(text)

    def tick(self, finished: int) -> None:
        """Show how fast it goes; where no bar is drawn, say it every so often."""
        now = time.monotonic()
        speed = f"{self._speed(now):.1f} images/s" if finished else "workers start"
        self.bar.update(speed)
        if now - self._told_at >= EVERY and not self.batch.console.live:
            self._told_at = now
            told, self._told = self._told, f"{self.counts.total()} of {len(self.batch.jobs)}: {speed}"
            if told != self._told:
                self.batch.console.say(self._told)

    def _speed(self, now: float) -> float:
        """Return photos per second since all workers were ready."""
        dealer = self.dealer
        if dealer is None or not dealer.ready_at:
            return 0.0
        return (dealer.finished - dealer.before) / max(now - dealer.ready_at, 1e-9)

    def summary(self) -> dict[str, object]:
        """Return the figures of the batch."""
        dealer = self.dealer
        ready = dealer.ready_at if dealer and dealer.ready_at else self.ended_at
        return {
            "photos": len(self.batch.jobs),
            **{name.replace(" ", "_"): self.counts[name] for name in ("done", "failed", "left out")},
            "start_up_seconds": ready - self.began if dealer else 0.0,
            "seconds": self.ended_at - ready if dealer else 0.0,
            "images_per_second": self._speed(self.ended_at),
        }

    def told(self) -> str:
        """Return the figures in words."""
        found = self.summary()
        if self.dealer is None:
            return f"{many(len(self.batch.jobs), 'photo')}: nothing to do"
        return (
            f"{many(self.dealer.finished, 'photo')} in {found['seconds']:.1f} s after "
            f"{found['start_up_seconds']:.1f} s of start-up: {found['images_per_second']:.1f} images/s"
        )

    def gone(self, worker: str, orders: Sequence[Order]) -> None:
        """Note that a worker, known by host and process, ended before these photos did."""
        process = worker.rpartition(":")[2]
        self._gone |= {(path.parent, process) for order in orders for path in order.written}

    def sweep(self) -> None:
        """Remove what workers that are gone left half written; their process is part of its name.

        Into the folder of a part of a batch other parts write as well, perhaps on other machines, whose
        processes may have the same numbers: there only what is old goes.
        """
        left = (path for folder, process in self._gone for path in folder.glob(f".imgtool-{process}-*"))
        for path in left:
            with suppress(OSError):
                if not self.batch.shard or time.time() - path.stat().st_mtime > STALE:
                    path.unlink()
