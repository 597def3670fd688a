"""Workers that are processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import NoReturn

from imgtool.runner.dealer import Hand, Lost, News
from imgtool.runner.worker import Brief, Dealt, Reply, Worker

GRACE = 5.0
"""Seconds that a process has to end by itself."""


@dataclass
class Processes:
    """Starts them anew, not as copies of this one: torch's threads do not survive in copies."""

    brief: Brief
    running: dict[Hand, tuple[SpawnProcess, Connection]] = field(default_factory=dict)

    def hire(self) -> Hand:
        """Begin to start a process."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self.brief, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        hand = Hand()
        self.running[hand] = process, ours
        return hand

    def call(self, hand: Hand, more: Sequence[Dealt], most: int) -> None:
        """Send a call; that a process has died is among the news."""
        with suppress(OSError):
            self.running[hand][1].send((more, most))

    def news(self, seconds: float) -> list[News]:
        """Return an answer, or the end, of each process that has one."""
        hands: dict[object, Hand] = {pipe: hand for hand, (_, pipe) in self.running.items()}
        pipes = [pipe for _, pipe in self.running.values()]
        return [(hands[pipe], self._heard(hands[pipe])) for pipe in wait(pipes, seconds)]

    def _heard(self, hand: Hand) -> Sequence[Reply] | Lost:
        process, pipe = self.running[hand]
        try:
            replies: Sequence[Reply] = pipe.recv()
            return replies
        except (EOFError, OSError):  # nobody holds the other end
            del self.running[hand]
            pipe.close()
            process.join(GRACE)
            code = process.exitcode or 0
            process.close()
            return Lost(signal.Signals(-code).name if code < 0 else f"exit status {code}")

    def close(self, at_once: bool) -> None:
        """End the processes; what one writes just now is not left behind half."""
        for process, pipe in self.running.values():
            pipe.close()
            if at_once:
                process.terminate()
        for process, _ in self.running.values():
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self.running.clear()


def _end(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def serve(pipe: Connection, brief: Brief, parent: int) -> None:
    """Answer calls until the pipe is closed or the process at its other end is gone.

    Args:
        pipe: What ``Worker.do`` takes comes in, its replies go out.
        brief: What is to be done.
        parent: The process at the other end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: one decides
    signal.signal(signal.SIGTERM, _end)
    worker = Worker(brief)
    try:
        pipe.send(worker.start())
        while True:
            more, most = pipe.recv()
            if os.getppid() != parent:
                return
            pipe.send(worker.do(more, most))
    except (EOFError, OSError):
        return
    finally:
        worker.close()
