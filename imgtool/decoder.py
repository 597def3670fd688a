"""One child process in which LibRaw decodes, for it can crash on broken files: a crash is an error here.

The child, ``python -m imgtool.decoder``, starts with the first file and decodes file after file: an
interpreter and its libraries take longer to start than a photo to unpack. Pixels come through its pipe; no
file is written. After a crash, or where it does not end, the next file gets a new child. It ends with this
process; one that is forked off gets a child of its own.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from imgtool.errors import FAILED, ImgtoolError

TIMEOUT = 300.0
"""Seconds after which a decoding that does not end is given up: far more than 100 MP take."""

COMMAND = (sys.executable, "-m", "imgtool.decoder")

_CRASHED = "convert it to DNG or TIFF with the camera maker's software"
_PIPE = 1 << 20
_PATIENCE = 1.0


class Decoder:
    """A child that decodes; threads take turns.

    Args:
        command: What starts the child.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        """Start nothing yet."""
        self._command = command
        self._turn = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def warm(self) -> None:
        """Start the child now, where none runs; it gets ready while this process goes on."""
        with self._turn:
            self._ready()

    def ask(
        self, task: str, path: Path, name: str, timeout: float = TIMEOUT, **options: Any
    ) -> tuple[dict[str, Any], bytearray]:
        """Have a file decoded.

        Args:
            task: "module:function", called in the child as ``function(path, name, **options)``; returns
                facts that JSON can hold, and a contiguous buffer.
            path: The file.
            name: What messages call it.
            timeout: Seconds until the child is killed.
            options: What JSON can hold.

        Returns:
            The facts and the buffer's bytes.

        Raises:
            ImgtoolError: The fault that the task raised, or that the child crashed or did not end.
            RuntimeError: The task raised something else: its traceback.
        """
        request: dict[str, Any] = {"task": task, "path": str(path.absolute()), "name": name}
        request |= {"options": options, "timeout": timeout}
        with self._turn:
            child, late = self._ready(), threading.Event()
            clock = threading.Timer(timeout, _give_up, (child, late))
            clock.daemon = True
            try:
                clock.start()
                answer = _exchange(child, request)
            except BaseException:  # interrupted: what it still writes belongs to no question
                self._stop()
                raise
            finally:
                clock.cancel()
                if clock.ident is not None:
                    clock.join()
            if late.is_set() or answer is None:
                self._stop()
                reason = f"no end after {timeout:g} s" if late.is_set() else "decoding crashed"
                raise ImgtoolError(f"cannot decode {name}: {reason}", _CRASHED)
        facts, data = answer
        if "what" in facts:
            raise ImgtoolError(facts["what"], facts["hint"])
        if "traceback" in facts:
            raise RuntimeError(facts["traceback"])
        return facts, data

    def close(self) -> None:
        """End the child, whoever still waits for its answer; another question starts a new one."""
        if self._turn.acquire(timeout=_PATIENCE):
            try:
                self._stop()
            finally:
                self._turn.release()
        elif (child := self._child) is not None:
            child.kill()  # the thread whose turn it is then clears up

    def disown(self) -> None:
        """In a fork: let go of the child, which is the parent's."""
        if self._child is not None:
            _hang_up(self._child)
            self._child.returncode = 0  # neither waited for nor warned of
            self._child = None

    def _ready(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is not None:
            self._stop()
        if self._child is None:
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for this process, which then ends the child
            )
            _widen(self._child)
        return self._child

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            _hang_up(self._child)
            self._child = None


def _give_up(child: subprocess.Popen[bytes], late: threading.Event) -> None:
    late.set()
    child.kill()


def _widen(child: subprocess.Popen[bytes]) -> None:
    """Let the pipe hold more, which is faster; beyond what a user may hold in all it stays as it is."""
    if sys.platform == "linux":
        import fcntl

        assert child.stdout is not None
        with suppress(OSError):
            fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, _PIPE)


def _hang_up(child: subprocess.Popen[bytes]) -> None:
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            stream.close()


def _environment() -> dict[str, str]:
    """Return the child's: it finds this package, its arithmetic starts no threads, its clock has no zone."""
    package = str(Path(__file__).resolve().parent.parent)
    search = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    # LibRaw takes a camera's time of day for local time, or not: in UTC both are what the camera said.
    return os.environ | {"PYTHONPATH": search, "OPENBLAS_NUM_THREADS": "1", "TZ": "UTC"}


def _exchange(
    child: subprocess.Popen[bytes], request: dict[str, Any]
) -> tuple[dict[str, Any], bytearray] | None:
    """Ask and read the answer, None where the child does not give one."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(request).encode() + b"\n")
        head = json.loads(child.stdout.readline(_PIPE))
        facts, data = dict(head["facts"]), bytearray(head["bytes"])
    except (OSError, ValueError, TypeError, LookupError):
        return None
    left = memoryview(data)
    while left:
        count = child.stdout.readinto(left)  # type: ignore[attr-defined]
        if not count:
            return None
        left = left[count:]
    return facts, data


_DECODER = Decoder()


def close() -> None:
    """End this process's child; another question starts a new one."""
    _DECODER.close()


atexit.register(close)


def _after_fork() -> None:
    global _DECODER
    _DECODER.disown()
    _DECODER = Decoder()  # the old one's lock may be held by a thread that the fork does not have


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def warm() -> None:
    """Start this process's child early, while torch is imported, say."""
    _DECODER.warm()


def ask(
    task: str, path: Path, name: str, timeout: float = TIMEOUT, **options: Any
) -> tuple[dict[str, Any], bytearray]:
    """Have a file decoded by this process's child; see ``Decoder.ask``."""
    return _DECODER.ask(task, path, name, timeout, **options)


# What follows runs in the child.


def _answer(task: str, path: str, name: str, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    module, function = task.split(":")
    try:
        facts, data = getattr(import_module(module), function)(Path(path), name, **options)
    except ImgtoolError as fault:
        return {"what": fault.what, "hint": fault.hint}, b""
    except MemoryError:
        return {"what": f"not enough memory to decode {name}", "hint": "close other programs"}, b""
    except Exception:  # noqa: BLE001 - a bug, which is the asking process's to show
        return {"traceback": traceback.format_exc()}, b""
    return facts, data


@contextmanager
def limited(timeout: float) -> Iterator[None]:
    """End this process where something takes a second longer than the one that asked waits.

    It does so for one that is no longer there to end it; where the platform has no clock for it, not.
    """
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout + 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> int:
    """Answer the questions on standard input, one a line, until it ends."""
    speech = os.dup(sys.stdout.fileno())
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # LibRaw speaks of its own accord
    import rawpy  # noqa: F401  # before it is needed

    with suppress(BrokenPipeError), os.fdopen(speech, "wb", 0) as out:
        for line in sys.stdin.buffer:
            question = json.loads(line)
            with limited(question.pop("timeout")):
                facts, data = _answer(**question)
            left = memoryview(data).cast("B")
            out.write(json.dumps({"facts": facts, "bytes": len(left)}).encode() + b"\n")
            while left:
                left = left[out.write(left) :]
        return 0
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
