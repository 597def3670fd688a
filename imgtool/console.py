"""The only printer: results on standard output, words and progress on standard error.

Nothing else in the package prints. Rich is imported only where something is drawn.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from imgtool.errors import USAGE, ImgtoolError
from imgtool.names import shown, url

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def plain(value: Any) -> Any:
    """Return a value as JSON knows it: paths as text, arrays as lists, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, tensors
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return shown(value)
    if value is None or isinstance(value, bool | int):
        return value
    return shown(url(str(value)))


def _write(stream: TextIO, text: str) -> None:
    """Write a line at once; what the stream's encoding lacks is written as an escape."""
    encoding = stream.encoding or "utf-8"
    text = shown(text)
    with _told():
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()


@contextmanager
def _told() -> Iterator[None]:
    """Turn a full disk behind a redirection into an error; a closed pipe stays what it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as fault:
        what = f"cannot write the result: {fault.strerror or fault}"
        raise ImgtoolError(what, "make room where it is redirected to") from None


class Bar:
    """One progress bar, or nothing where none is drawn."""

    def __init__(self, progress: Progress | None = None, task: TaskID | None = None) -> None:
        """Take the bar that moves, if there is one."""
        self._progress = progress
        self._task = task

    def advance(self, n: float = 1, **columns: object) -> None:
        """Move on by ``n``; columns such as ``loss="0.012"`` are shown behind the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, n)
        if columns:
            self.update("  ".join(f"{name} {value}" for name, value in columns.items()))

    def update(self, text: str) -> None:
        """Replace the words behind the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, text=text)


class Console:
    """What a command may say, and where it goes.

    Args:
        json: Results are one JSON object a line; human words are left out of standard output.
        quiet: Nothing on standard error but warnings and errors.
        verbose: Details too.
    """

    def __init__(self, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        """Keep the three choices."""
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self._results_to_stderr = False
        self._muted = False

    def muted(self) -> Console:
        """Return a console that says what this one says, but gives no results: one of many runs."""
        console = Console(self.json, self.quiet, self.verbose)
        console._muted = True
        return console

    @property
    def live(self) -> bool:
        """Whether progress bars are drawn; where not, a line per epoch or file should be said."""
        return not self.quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def say(self, text: str) -> None:
        """Say a line on standard error, unless quiet."""
        if not self.quiet:
            _write(sys.stderr, text)

    def detail(self, text: str) -> None:
        """Say a line that only ``--verbose`` shows."""
        if self.verbose:
            self.say(text)

    def warn(self, text: str) -> None:
        """Say what may be wrong, quiet or not."""
        _write(sys.stderr, f"warning: {text}")

    def error(self, fault: ImgtoolError, name: str = "") -> None:
        """Say what went wrong and what to do, one line each.

        Args:
            fault: What went wrong.
            name: The input it went wrong with, in a batch of many.
        """
        _write(sys.stderr, f"error: {name}: {fault.what}" if name else f"error: {fault.what}")
        if fault.hint:
            _write(sys.stderr, f"hint: {fault.hint}")

    def result(self, record: Mapping[str, object], text: str = "") -> None:
        """Give a result: the record as one line of JSON with ``--json``, otherwise the text.

        Args:
            record: Keys of the JSON contract; floats are not rounded.
            text: The same for people; "" prints nothing.
        """
        line = json.dumps(plain(record), allow_nan=False) if self.json else text
        if line and not self._muted:
            _write(sys.stderr if self._results_to_stderr else sys.stdout, line)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Draw a table on standard output; with ``--json`` nothing is drawn."""
        if self.json:
            return
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        drawn = Table(title=Text(title), title_justify="left")
        for number, column in enumerate(columns):
            drawn.add_column(Text(column), justify="right" if number else "left", overflow="fold")
        for row in rows:
            drawn.add_row(*(Text(str(cell)) for cell in row))
        RichConsole(stderr=self._results_to_stderr).print(drawn)

    def check_binary(self) -> None:
        """Raise ``ImgtoolError`` (code 2) where standard output is a terminal, which shows no image."""
        if sys.stdout.isatty():
            raise ImgtoolError(
                "an image cannot be shown on a terminal", "redirect it (> photo.png) or give -o FILE", USAGE
            )

    def binary(self, data: bytes) -> None:
        """Write bytes to standard output; later results go to standard error, not into the bytes.

        Raises:
            ImgtoolError: Code 2, where standard output is a terminal.
        """
        self.check_binary()
        self._results_to_stderr = True
        with _told():
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    @contextmanager
    def progress(self, total: int, label: str) -> Iterator[Bar]:
        """Draw a bar on standard error while the block runs, where it is a terminal and not quiet.

        Args:
            total: Steps, files, ... in all.
            label: Words before the bar.
        """
        if not self.live:
            yield Bar()
            return
        with _progress() as progress:
            yield Bar(progress, progress.add_task(label, total=total, text=""))

    @contextmanager
    def counted(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """Draw a bar as ``progress`` for work that tells how much of how much is finished.

        Yields:
            A function of the number finished and the number in all.
        """
        with self.progress(100, label) as bar:
            percent = 0

            def done(finished: int, total: int) -> None:
                nonlocal percent
                now = 100 * finished // max(total, 1)
                bar.advance(now - percent)
                bar.update(f"{finished}/{total}")
                percent = now

            yield done


def _progress() -> Progress:
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    # A result line sent to a file must stay there; one sent to the same terminal goes above the bar.
    return Progress(*columns, console=RichConsole(stderr=True), redirect_stdout=sys.stdout.isatty())
