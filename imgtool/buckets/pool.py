"""Many tasks at once: the threads that do them, and the room that they share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

from imgtool.buckets.state import Closed

T = TypeVar("T")


def apart(work: Callable[[], T]) -> Future[T]:
    """Do a work in a thread that nobody waits for when the process ends: a request may take long."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as fault:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(fault)

    threading.Thread(target=run, name="imgtool-fetch", daemon=True).start()
    return future


def each(tasks: Iterator[Callable[[], T]], threads: int, stop: threading.Event) -> Generator[T]:
    """Yield what each task came to, as they end; what a task raises ends all.

    Args:
        tasks: What to do, taken one by one.
        threads: How many at once.
        stop: Set when this is closed or a task raises: no further one is begun, none that runs waited for.
    """
    lock = threading.Lock()
    ended: SimpleQueue[tuple[T] | None] = SimpleQueue()

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    task = next(tasks, None)
                if task is None:
                    return
                ended.put((task(),))
        except BaseException:
            stop.set()
            raise
        finally:
            ended.put(None)

    crew = [apart(work) for _ in range(threads)]
    try:
        for _ in crew:
            while (result := ended.get()) is not None:
                yield result[0]
    finally:
        stop.set()
    for one in crew:
        one.result()


class Room:
    """Lets requests begin while what they ask for together is not too much."""

    def __init__(self, size: int, stop: threading.Event) -> None:
        """Hold nothing.

        Args:
            size: Bytes; what alone is more has it alone.
            stop: Ends every wait.
        """
        self._size, self._stop = size, stop
        self._held = 0
        self._less = threading.Condition()

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Hold room for so many bytes, -1 for all of it; raises ``Closed`` when it is too late."""
        size = min(size, self._size) if size >= 0 else self._size
        with self._less:
            while self._held + size > self._size:
                if self._stop.is_set():
                    raise Closed
                self._less.wait(0.2)
            self._held += size
        try:
            yield
        finally:
            with self._less:
                self._held -= size
                self._less.notify_all()
