"""How much memory this process has, or had at its peak; giving it back. NumPy and torch are not needed."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path


def resident_mb(name: str) -> float | None:
    """Return a figure of /proc/self/status in 10^6 bytes, None where the system does not tell it.

    Args:
        name: "VmRSS", what is resident now, or "VmHWM", the most that ever was.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 / 1e6 if found else None


def peak_mb() -> float:
    """Return the peak resident memory of this process in 10^6 bytes.

    VmHWM where there is /proc: ``ru_maxrss`` counts what the parent had before exec.
    """
    told = resident_mb("VmHWM")
    if told is not None:
        return told
    import resource

    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def give_back() -> None:
    """Give what the C library holds of freed memory back to the system, where it can: glibc's heap."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
