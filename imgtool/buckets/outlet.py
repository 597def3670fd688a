"""Where outputs go: whether it is of use to send anything there, and how long one waits for an answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from typing import TypeVar

from imgtool import buckets
from imgtool.buckets import Denied, Offline, spool
from imgtool.buckets.pool import apart
from imgtool.errors import USAGE, Fatal, ImgtoolError

STOP_AFTER = 3
"""Outputs in a row that could not be sent, for the network or the permission, after which none is tried."""

HURRY = 10.0
"""Seconds that a request has while the process is being stopped."""

T = TypeVar("T")


class Outlet:
    """Whether it is of use to send anything, or to make what is to be sent."""

    def __init__(self) -> None:
        """Know nothing against it."""
        self._closed: ImgtoolError | None = None
        self._sent, self._row = False, 0

    def check(self) -> None:
        """Raise ``Fatal`` where nothing is to be tried any more."""
        if self._closed:
            raise Fatal(self._closed.what, self._closed.hint, self._closed.code)

    def listed(self, work: Callable[[], T]) -> T:
        """List what is there; raises ``Fatal`` where that fails, now and from then on."""
        self.check()
        try:
            return work()
        except ImgtoolError as fault:
            self._closed = fault
        raise Fatal(self._closed.what, self._closed.hint, self._closed.code)

    def sent(self, work: Callable[[], None]) -> None:
        """Send something; raises what that raises, and ``Fatal`` where no other would pass either."""
        self.check()
        try:
            work()
        except ImgtoolError as fault:
            if self._ends(fault):
                self._closed = fault
            self.check()
            raise
        self._sent, self._row = True, 0

    def _ends(self, fault: ImgtoolError) -> bool:
        if not isinstance(fault, Offline | Denied):
            return fault.code == USAGE  # no such bucket: all else is of that output alone
        self._row += 1
        return self._row == STOP_AFTER or (isinstance(fault, Denied) and not self._sent)


def awaited(work: Callable[[], T]) -> T:
    """Do a work in a thread that is left alone when somebody stops the process.

    Raises:
        Offline: It is being stopped, and the work takes too long for that.
    """
    stopping = isinstance(sys.exc_info()[1], KeyboardInterrupt)
    task = apart(work)
    done, _ = wait([task], HURRY if stopping else None)
    if not done:
        raise Offline(f"no answer within {HURRY:.0f} s, and nothing more is waited for")
    return task.result()


def check_bucket(url: str) -> None:
    """Refuse a bucket that is not there, or that nobody answers for, before anything is made for it."""
    with suppress(Denied):  # who may write need not be allowed to list
        awaited(buckets.open(spool.address(url, f".imgtool-{os.urandom(8).hex()}/")).list)
