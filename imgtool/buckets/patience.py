"""Asking again what was interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from imgtool.buckets import Interrupted, Offline

WAITS = (0.2, 1.0, 3.0, 8.0)
"""Seconds between one attempt and the next."""

T = TypeVar("T")


def patiently(work: Callable[[], T]) -> T:
    """Do a work again, after longer and longer waits, while it is interrupted.

    Raises:
        Offline: The last attempt was interrupted too.
    """
    for wait in WAITS:
        try:
            return work()
        except Interrupted:
            time.sleep(wait)
    try:
        return work()
    except Interrupted as fault:
        raise Offline(str(fault), "check the network, then run it again") from None
