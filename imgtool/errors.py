"""The one exception that a user meets: what went wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable

DONE = 0
FAILED = 1
USAGE = 2
INTERRUPTED = 130


class ImgtoolError(Exception):
    """A fault that a user can cause or cure; anything else that escapes is a bug.

    Args:
        what: What went wrong, one sentence without a trailing full stop.
        hint: What to do about it, or "" where nothing can be advised.
        code: The exit status: 1 the work failed, 2 it was asked wrongly.
    """

    def __init__(self, what: str, hint: str = "", code: int = FAILED) -> None:
        """Keep one line each of what happened and of the advice."""
        self.what = " ".join(what.split())
        self.hint = " ".join(hint.split())
        self.code = code
        super().__init__(self.what)

    def __reduce__(self) -> tuple[type[ImgtoolError], tuple[str, str, int]]:
        """Survive the way through a pipe from a child process."""
        return type(self), (self.what, self.hint, self.code)


class Fatal(ImgtoolError):
    """What ends a whole batch: the inputs that are left would meet it too."""


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a hint that names the nearest known word, or all of them."""
    import difflib

    words = list(known)
    near = difflib.get_close_matches(word, words, 1)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return "known: " + ", ".join(prefix + each for each in words)
