"""What is written into a folder of this machine, sent to a folder elsewhere while the work goes on."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType

from imgtool import buckets, files, names
from imgtool.buckets import Place, manifest
from imgtool.buckets.patience import patiently
from imgtool.buckets.pool import each
from imgtool.errors import USAGE, ImgtoolError

EVERY = 30.0
"""Seconds between one look at the folder and the next."""
LAST = ("last.pt", "done.json", manifest.NAME)
"""Names of files that speak of others: each is sent when all that it may speak of is there, in this order."""

Known = dict[str, tuple[int, int]]
"""Path below the folder, with slashes, to size in bytes and time of the last change in ns."""


def listed(folder: Path) -> Known:
    """Return the files of a folder, but for hidden ones and those in hidden folders."""
    found: Known = {}
    for parent, folders, inside in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in inside:
            path = Path(parent, name)
            if name.startswith("."):
                continue
            with suppress(FileNotFoundError):  # it was temporary
                found[path.relative_to(folder).as_posix()] = _about(path)
    return found


def writable(url: str) -> None:
    """Refuse what can only be read from.

    Raises:
        ImgtoolError: Code 2.
    """
    if not url.startswith(("s3://", "gs://")):
        raise ImgtoolError(
            f"cannot write to {names.public(url)}: it is to read from", "write to s3:// or gs://", USAGE
        )


def send(
    folder: Path, url: str, known: Known, jobs: int = 8, say: Callable[[str], None] = lambda text: None
) -> Known:
    """Send what is new or has changed in a folder; nothing is removed elsewhere.

    A training writes what its state refers to before the state. So the states are kept as they are when this
    begins, and are sent after everything else: what arrives never refers to a file that has not.

    Args:
        folder: The folder of this machine.
        url: The folder elsewhere, ``s3://`` or ``gs://``.
        known: What has been sent; it is brought up to date, also where this fails.
        jobs: Files that are sent at a time.
        say: Takes a line for each file that could not be sent.

    Returns:
        ``known``.

    Raises:
        ImgtoolError: Files could not be sent, all others were; states are sent only after all others.
    """
    writable(url)
    place = buckets.open(url)
    failed: list[ImgtoolError] = []

    def one(path: str, source: Path, about: tuple[int, int]) -> None:
        try:
            put(place, source, path)
        except ImgtoolError as fault:
            if source.exists():  # no file that was temporary
                failed.append(fault)
                say(f"not sent: {fault.what}")
        else:
            known[path] = about

    with _kept(folder) as states:
        now = {path: about for path, about in listed(folder).items() if not _rank(path)}
        new = sorted(path for path, about in now.items() if known.get(path) != about)
        _apart([partial(one, path, folder / path, now[path]) for path in new], jobs)
        for path in sorted(states, key=_rank):
            about = _about(states[path])
            if not failed and known.get(path) != about:
                _apart([partial(one, path, states[path], about)], 1)
    if failed:
        what = failed[0].what if len(failed) == 1 else f"{len(failed)} files were not sent; {failed[0].what}"
        raise ImgtoolError(what, failed[0].hint, failed[0].code)
    return known


def _apart(tasks: Sequence[Callable[[], None]], threads: int) -> None:
    """Do tasks in threads that nobody waits for once this is interrupted."""
    with closing(each(iter(tasks), min(threads, len(tasks)), threading.Event())) as ended:
        for _ in ended:
            pass


def put(place: Place, source: Path, path: str) -> None:
    """Send one file, again where it is interrupted; raises ``ImgtoolError``."""
    try:
        patiently(lambda: place.write(source, path))
    except OSError as fault:
        raise files.unreadable(source, fault) from None


def _rank(path: str) -> int:
    name = path.rpartition("/")[2]
    return LAST.index(name) + 1 if name in LAST else 0


def _about(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


@contextmanager
def _kept(folder: Path) -> Iterator[dict[str, Path]]:
    """Give the states as they are now: links, for what replaces a file leaves its content alone."""
    aside = folder / f".imgtool-{os.urandom(8).hex()}"
    copies: dict[str, Path] = {}
    try:
        # What speaks of all others first: no other is older than what is said of it.
        for path in sorted(filter(_rank, listed(folder)), key=_rank, reverse=True):
            aside.mkdir(exist_ok=True)
            copy = aside / str(len(copies))
            with suppress(FileNotFoundError):  # it was removed since it was listed
                try:
                    os.link(folder / path, copy)
                except OSError:  # a file system without links
                    shutil.copy2(folder / path, copy)
                copies[path] = copy
        yield copies
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class Sender:
    """Sends a folder while a block works in it, and when the block ends, however it ends.

    What cannot be sent is tried again the next time, and said once. What is left at the end raises, unless
    the block itself did; the folder stays as it is.
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        say: Callable[[str], None],
        every: float = EVERY,
        known: Known | None = None,
        again: str = "",
    ) -> None:
        """Send nothing yet.

        Args:
            folder: The folder of this machine; it may not be there yet.
            url: The folder elsewhere.
            say: Takes lines for the user.
            every: Seconds between one look at the folder and the next.
            known: What is there already, as ``listed`` tells it.
            again: What sends the rest of what could not be sent, if not the same command.

        Raises:
            ImgtoolError: Code 2: nothing can be written there.
        """
        writable(url)
        self._folder, self._url, self._say, self._every = folder, url, say, every
        self._known: Known = {} if known is None else known
        self._said, self._again = False, again
        self.unsent = True
        """Whether something is left that did not arrive."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="imgtool-sender", daemon=True)

    def __enter__(self) -> Sender:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send what is left.

        Raises:
            ImgtoolError: It could not be sent; not where the block itself failed.
        """
        self._end.set()
        self._thread.join()
        try:
            self._send()
        except ImgtoolError as failure:
            hint = f"{self._again or failure.hint}; everything is in {self._folder}".removeprefix("; ")
            if kind is not None:
                self._say(f"{failure.what}; {hint}")
                return
            raise ImgtoolError(failure.what, hint, failure.code) from None

    def _work(self) -> None:
        while not self._end.wait(self._every):
            try:
                self._send()
            except ImgtoolError as fault:
                if not self._said:
                    self._say(f"{fault.what}; it is tried again")
                self._said = True

    def _send(self) -> None:
        self.unsent = True
        try:
            if self._folder.is_dir():
                send(self._folder, self._url, self._known)
        except OSError as fault:
            what = f"cannot send {self._folder}: {(fault.strerror or str(fault)).lower()}"
            raise ImgtoolError(what, "check the disk and the permissions") from None
        self.unsent = False
