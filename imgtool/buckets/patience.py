"""Asking again what was interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from imgtool.buckets import Interrupted, Offline

WAITS = (0.2, 1.0, 3.0, 8.0)
"""Seconds between one attempt and the next."""

T = TypeVar("T")
_NEVER = threading.Event()


def patiently(work: Callable[[], T], stop: threading.Event = _NEVER) -> T:
    """Do a work again, after longer and longer waits, while it is interrupted.

    Args:
        work: What is done.
        stop: Once it is set, there is no further attempt.

    Raises:
        Offline: The last attempt was interrupted too.
    """
    waits = iter(WAITS)
    while True:
        try:
            return work()
        except Interrupted as fault:
            wait = next(waits, None)
            if wait is None or stop.wait(wait):
                raise Offline(str(fault), "check the network, then run it again") from None
