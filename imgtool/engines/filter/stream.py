"""Pictures of a stream, and a buffer between them and the network that is drawn from again and again.

A thread reads pictures into the buffer; samples are drawn from it with replacement, as often as the
network asks: data echoing (Choi, Passos, Shallue and Dahl, "Faster neural network training with data
echoing", 2019). So the network never waits for a picture once the buffer has its least number.

Whatever ends the stream, the next draw raises it. A stream that comes to its end begins again, its shards
in another order.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from imgtool import images
from imgtool.engines.filter import shards
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.engines.filter.settings import Stream

PATIENCE = 120.0
"""Seconds without a picture after which a source is given up."""
RETRIES, PAUSE = 3, 2
"""How often a lost connection is tried again, and the seconds between."""
UNREADABLE = 20
"""Pictures one after another that cannot be read before that is the stream's fault."""
CLOSING = 5.0
"""Seconds that a thread is waited for when its buffer is closed: it may be reading."""

_filling = threading.local()


class Item(Protocol):
    """What a buffer can hold."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        ...


Held = TypeVar("Held", bound=Item)


@dataclass(frozen=True)
class Limits:
    """Limits of a buffer.

    Attributes:
        least: Items before the first is drawn.
        most: Items that it holds; then the oldest goes for each that comes.
        delay: Seconds between two items once it is full.
        budget: Bytes that it holds, whatever the other limits; one item always stays.
    """

    least: int
    most: int
    delay: float = 0.0
    budget: int = 1 << 62


class _State(Generic[Held]):
    """What the buffer and its thread share: the thread must not keep the buffer alive."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.changed = threading.Condition()
        self.held: deque[Held] = deque()
        self.bytes, self.came, self.drawn = 0, 0, 0
        self.began = self.ended = self.stopped = False
        self.asked: float | None = None
        self.fault: Exception | None = None

    def full(self) -> bool:
        return len(self.held) >= self.limits.most or self.bytes >= self.limits.budget

    def put(self, item: Held) -> None:
        """Take an item in, and let the oldest go; full, not faster than items are drawn."""
        with self.changed:
            self.asked = None
            self.held.append(item)
            self.bytes += item.nbytes
            self.came += 1
            full = self.full()
            self.began = self.began or full or len(self.held) >= self.limits.least
            while len(self.held) > 1 and (
                len(self.held) > self.limits.most or self.bytes > self.limits.budget
            ):
                self.bytes -= self.held.popleft().nbytes
            self.changed.notify_all()
            if full:
                self.changed.wait_for(lambda: self.stopped, self.limits.delay)
                self.changed.wait_for(lambda: self.stopped or self.drawn >= self.came)

    def fill(self, items: Callable[[], Iterator[Held]]) -> None:
        """Read items until they end, one fails, or the buffer is closed: what the thread does."""
        _filling.state = self
        try:
            self.asked = time.monotonic()
            for item in items():
                self.put(item)
                if self.stopped:
                    break
                self.asked = time.monotonic()
        except Exception as fault:  # noqa: BLE001 - it belongs to whoever draws next
            self.fault = fault
        with self.changed:
            self.asked, self.ended = None, True
            self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def wait(self) -> None:
        """Return when there is something to draw.

        Raises:
            ImgtoolError: Nothing has come for too long.
            Exception: What ended the thread.
        """
        with self.changed:
            while True:
                if self.fault is not None:
                    raise self.fault
                if self.asked is not None and time.monotonic() - self.asked > PATIENCE:
                    what = f"the stream has given no picture for {PATIENCE:g} seconds"
                    raise ImgtoolError(what, "see whether its source still answers")
                if self.began or self.ended:
                    return
                self.changed.wait(min(PATIENCE / 4, 1.0))


class Buffer(Generic[Held]):
    """Holds the latest items of a stream, which a thread of its own reads."""

    def __init__(self, items: Callable[[], Iterator[Held]], limits: Limits) -> None:
        """Start to read.

        The thread ends with the buffer or the process, whichever ends first.

        Args:
            items: Called in the thread; gives the items.
            limits: How many are held.
        """
        self._state: _State[Held] = _State(limits)
        self._end = weakref.finalize(self, self._state.stop)
        self._thread = threading.Thread(target=self._state.fill, args=(items,), name="stream", daemon=True)
        self._thread.start()

    def draw(self, rng: np.random.Generator) -> Held:
        """Draw one of the items that are held; wait for the least number of them at first.

        Raises:
            ImgtoolError: The source failed, gave nothing for ``PATIENCE`` seconds, or held nothing at all.
        """
        self._state.wait()
        with self._state.changed:
            held = self._state.held
            if not held:
                raise ImgtoolError("the stream holds no pictures", "name another by --stream")
            self._state.drawn += 1
            self._state.changed.notify_all()
            return held[int(rng.integers(len(held)))]

    def all(self) -> list[Held]:
        """Return what is held as soon as the least number is there; raises as ``draw`` does."""
        self._state.wait()
        return list(self._state.held)

    @property
    def came(self) -> int:
        """How many items have come."""
        return self._state.came

    @property
    def drawn(self) -> int:
        """How many draws were made; over ``came`` it is the echo factor."""
        return self._state.drawn

    def close(self) -> None:
        """End the thread, and wait a little for it."""
        self._end()
        self._thread.join(CLOSING)


# --- the source ------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A picture of a stream.

    Attributes:
        name: What it is called.
        pixels: ``(H, W, 3)`` uint8 RGB.
        digest: What tells it from others: that of its bytes as they are stored.
    """

    name: str
    pixels: npt.NDArray[np.uint8]
    digest: bytes

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return int(self.pixels.nbytes)


@dataclass(frozen=True)
class Place:
    """Where a stream comes from.

    Attributes:
        text: Name of a Hugging Face data set, with its configuration as in name:configuration; or shards,
            see ``shards.listed``.
        split: The part of a data set.
        column: The column of the pictures, "" for the first that holds any.
        shards: The shards, where they are known already.
    """

    text: str
    split: str = "train"
    column: str = ""
    shards: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Stream) -> Place:
        """Return the place that settings name, its shards listed: a fork cannot ask for them."""
        found = tuple(shards.listed(settings.stream))
        return cls(settings.stream, settings.stream_split, settings.stream_column, found)


def once(place: Place, seed: int | None = None, apart: Collection[bytes] = ()) -> Iterator[Picture]:
    """Yield the pictures of a stream, one pass.

    Single pictures that cannot be read are left out, but not ``UNREADABLE`` one after another.

    Args:
        place: Where they come from.
        seed: Of the order of the shards; None takes them as they are listed.
        apart: Digests of pictures that are left out.

    Raises:
        ImgtoolError: Whatever goes wrong with the source; the library is not installed.
    """
    missed = 0
    for name, data in encoded(place, seed):
        digest = hashlib.sha256(data).digest()
        if digest in apart:
            continue
        try:
            pixels = images.convert(images.read(data, name).pixels, np.uint8)
        except ImgtoolError as fault:
            missed += 1
            if missed == UNREADABLE:
                what = f"{UNREADABLE} pictures of the stream in a row cannot be read: {fault.what}"
                raise ImgtoolError(what, "name the column of the pictures by --stream-column") from None
            continue
        missed = 0
        yield Picture(name, pixels, digest)


def first(place: Place, most: int) -> list[Picture]:
    """Return the first pictures of a stream, as they are listed; raises as ``once`` and ``Buffer.draw``."""
    buffer = Buffer(lambda: islice(once(place), most), Limits(most, most))
    try:
        return buffer.all()
    finally:
        buffer.close()


def endless(place: Place, seed: int, apart: Collection[bytes] = ()) -> Iterator[Picture]:
    """Yield the pictures of a stream, pass after pass; see ``once``.

    Raises:
        ImgtoolError: As ``once``; or a pass gives none.
    """
    for turn in count():
        empty = True
        for picture in once(place, seed + turn, apart):
            empty = False
            yield picture
        if empty:
            hint = "take one of more pictures, or validate on others by --validate-on"
            raise ImgtoolError(f"the stream {place.text} holds no pictures to train on", hint)


def encoded(place: Place, seed: int | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield the pictures of a stream as they are stored, each with its name; see ``once``."""
    found = [*place.shards] or shards.listed(place.text)
    if seed is not None:
        found = [found[number] for number in np.random.default_rng(seed).permutation(len(found))]
    numbers = count()
    try:
        for here in shards.arriving(found, _moved):
            rows, column = _rows(place, here, seed)
            for batch in rows.iter(batch_size=1):  # which is not dealt out to worker processes
                yield _stored(batch[column][0], next(numbers))
    except ImgtoolError:
        raise
    except Exception as fault:  # noqa: BLE001 - the library hands on what each of its own raises
        raise _explained(place, fault, bool(found)) from None


def _moved() -> None:
    """Have the buffer that this thread fills wait on."""
    state = getattr(_filling, "state", None)
    if state is not None:
        state.asked = time.monotonic()


def _library() -> Any:
    """Return the library, which is not to try lost connections for minutes, nor to print."""
    try:
        import datasets
    except ImportError:
        what = "a stream needs the package datasets, which is not installed"
        raise ImgtoolError(what, "pip install 'imgtool[hf]'") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for kind in ("READ", "OPEN"):
        setattr(datasets.config, f"STREAMING_{kind}_MAX_RETRIES", RETRIES)
        setattr(datasets.config, f"STREAMING_{kind}_RETRY_INTERVAL", PAUSE)
    return datasets


def _rows(place: Place, found: list[str], seed: int | None) -> tuple[Any, str]:
    """Return the rows of a stream, which hold one column, and its name."""
    datasets = _library()
    if found:
        what: dict[str, Any] = {
            "path": shards.KINDS[shards.suffix(found[0])],
            "data_files": found,
            "split": "train",
        }
    else:
        name, _, configuration = place.text.partition(":")
        what = {"path": name, "name": configuration or None, "split": place.split}
    with tempfile.TemporaryDirectory(
        prefix="imgtool-"
    ) as folder:  # it leaves a lock for each order of shards
        rows = datasets.load_dataset(**what, streaming=True, cache_dir=folder)
    if not found and seed is not None:
        # From one shard at a time: the threads that mix several outlive what they read.
        rows = rows.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)
    column = _column(datasets, place, rows)
    rows = rows.select_columns([column])
    if rows.features is not None and isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows, column


def _column(datasets: Any, place: Place, rows: Any) -> str:
    """Return the column of the pictures: one of the kind, else one that holds bytes."""
    features = dict(rows.features or next(iter(rows.take(1)), {}))
    if place.column:
        if place.column in features:
            return place.column
        known = ", ".join(features) or "none"
        raise ImgtoolError(f"{place.text} has no column {place.column}", f"it has: {known}", USAGE)

    def likely(value: Any) -> int:
        if isinstance(value, datasets.Image):
            return 2
        binary = getattr(value, "dtype", "") == "binary"
        return int(binary or isinstance(value, bytes) or (isinstance(value, dict) and "bytes" in value))

    best = max(features, key=lambda name: likely(features[name]), default="")
    if not best or not likely(features[best]):
        known = ", ".join(features) or "none"
        raise ImgtoolError(f"{place.text} has no column of pictures", f"name one by --stream-column: {known}")
    return best


def _stored(value: Any, number: int) -> tuple[str, bytes]:
    """Return name and bytes of what a column holds; b"" for what is no picture."""
    if not isinstance(value, dict):
        return f"picture {number}", value if isinstance(value, bytes) else b""
    path, data = value.get("path"), value.get("bytes")
    if data is None and path:
        import fsspec

        with fsspec.open(path, "rb") as file:
            data = file.read()
    return str(path or f"picture {number}").rpartition("/")[2], data or b""


def _explained(place: Place, fault: Exception, local: bool) -> ImgtoolError:
    """Put what the library raised into words."""
    words = str(fault).strip().split("\n")[0] or type(fault).__name__
    what = f"the stream {place.text} failed: {words}"
    told = " ".join(kind.__name__ for kind in type(fault).__mro__)
    if isinstance(fault, ImportError):
        return ImgtoolError(what, "pip install 'imgtool[hf]'")
    if "DatasetNotFound" in told and not local:
        hint = "check the name; where access must be granted, ask for it on its page and run: hf auth login"
        return ImgtoolError(what, hint)
    if re.search("Connect|Client|Timeout|HTTP|Http|Offline|FileNotFound", told):
        return ImgtoolError(what, "see whether its source answers")
    return ImgtoolError(what, "see whether its shards are whole")
