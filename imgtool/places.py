"""URLs where a command takes a file or a folder: read from a copy in the cache, written to one that is sent.

The photos and outputs of ``infer`` are another matter: they pass through, a few at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from imgtool import buckets, files, names
from imgtool.engine import Watch
from imgtool.errors import USAGE, ImgtoolError
from imgtool.settings import Fetch, Infer, Settings, Train

if TYPE_CHECKING:
    from imgtool.console import Console

WRITTEN = ("out", "report", "zip")
"""Settings that name what is written; all others name what is read."""

T = TypeVar("T", bound=Settings)


def urls(settings: Settings) -> dict[str, list[str]]:
    """Return the URLs among settings by name, but for those that the verb itself goes to."""
    own = (
        {"inputs", "out"}
        if isinstance(settings, Infer)
        else {"url"}
        if isinstance(settings, Fetch)
        else set()
    )
    found = {
        name: [names.url(each) for each in _each(getattr(settings, name)) if names.is_url(each)]
        for name in type(settings).model_fields.keys() - own
    }
    return {name: found[name] for name in type(settings).model_fields if found.get(name)}


def _each(value: object) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def mirrored(settings: T, console: Console) -> T:
    """Return settings in which every URL to read from is a copy in the cache, fetched or refreshed now.

    Raises:
        ImgtoolError: What is named is not there, may not be read, or the network is down.
    """
    read = {name for name in urls(settings) if name not in (*WRITTEN, "resume")}
    return _replaced(settings, read, lambda url: mirror(url, console)) if read else settings


def mirror(url: str, console: Console) -> Path:
    """Return the copy of a URL in the cache, fetched or refreshed now."""
    from imgtool.buckets import fetch

    with console.progress(100, f"fetch {url}") as bar:
        percent = 0

        def done(finished: int, total: int) -> None:
            nonlocal percent
            now = 100 * finished // max(total, 1)
            bar.advance(now - percent)
            bar.update(f"{finished}/{total}")
            percent = now

        copy = fetch.mirror(url, console.say, done)
    names.call(copy, url)
    return copy


def _replaced(settings: T, which: set[str], local: Callable[[str], Path]) -> T:
    """Return settings with URLs of the given names replaced."""

    def one(value: Any) -> Any:
        return type(value)(local(names.url(value))) if names.is_url(value) else value

    values: dict[str, Any] = {}
    for name in which:
        value = getattr(settings, name)
        # A path's own class is that of the system; a text stays one.
        values[name] = tuple(map(one, value)) if isinstance(value, tuple) else one(value)
    # What was given stays known as such: a run that is resumed takes up that alone.
    return settings.model_copy(update=values)


@contextmanager
def local(settings: T, console: Console) -> Iterator[T]:
    """Give settings that name folders of this machine alone; send what was written when the block ends.

    What was written is sent while the work goes on, too, and when it fails or is interrupted. Of many
    processes that ``torchrun`` started, the first sends.

    Raises:
        ImgtoolError: A URL cannot be read from or written to, or its folder is not empty.
    """
    found = urls(settings)
    if not found:
        yield settings
        return
    settings = mirrored(settings, console)
    with ExitStack() as stack:
        for name in found.keys() & {*WRITTEN, "resume"}:
            given = found[name][0]
            staged = stack.enter_context(_staged(given, settings, name, console))
            settings = _replaced(settings, {name}, lambda url, staged=staged: staged)  # type: ignore[misc]
        yield settings


@contextmanager
def _staged(url: str, settings: Settings, name: str, console: Console) -> Iterator[Path]:
    """Give a folder or file of this machine that stands for a URL to write to."""
    from imgtool.buckets import fetch, manifest, send

    above, _, last = url.rstrip("/").rpartition("/")
    if above.endswith("/"):  # a bucket alone
        raise ImgtoolError(f"{url} is a whole bucket", f"name a folder in it, such as {url}/results", USAGE)
    send.writable(url)
    if name != "resume" and buckets.open(url).list() and not getattr(settings, "force", False):
        raise ImgtoolError(f"{url} is not empty", _way_out(settings, url), USAGE)
    stage = files.cache_folder() / "outgoing" / _own_name(url)
    staged = stage / last
    names.call(staged, url)
    known: send.Known = {}
    if name == "resume":
        _refuse_faults(fetch.fetch(url, staged, watch=Watch(say=console.say)))
        (staged / manifest.NAME).unlink(missing_ok=True)
        known = send.listed(stage)
    sender = send.Sender(stage, above, console.say, known=known)
    try:
        if names.rank():
            yield staged
        else:
            with sender:
                yield staged
    finally:
        if not sender.unsent if names.rank() == 0 else os.environ.get("LOCAL_RANK") == "0":
            shutil.rmtree(stage, ignore_errors=True)


def _refuse_faults(record: Mapping[str, object]) -> None:
    faults = record["faults"]
    if isinstance(faults, list) and faults:
        raise ImgtoolError(str(faults[0]), "try again: what has arrived is kept")


def _own_name(url: str) -> str:
    """Return a name that no other command takes; of many processes that share a training, one for all."""
    shared = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")]
    if "RANK" in os.environ and any(shared):
        import hashlib  # which loads a large library

        return hashlib.sha256(" ".join([*shared, url]).encode()).hexdigest()[:12]
    return os.urandom(6).hex()


def _way_out(settings: Settings, url: str) -> str:
    if isinstance(settings, Train):
        return f"go on with what is there by --resume {url}, or name another folder by -o"
    return "name another folder by -o"


def plan(settings: Settings) -> Mapping[str, object]:
    """Return what ``--dry-run`` tells of URLs: what would be fetched, and where is written."""
    told: dict[str, object] = {}
    for name, found in urls(settings).items():
        for url in found:
            if name in WRITTEN:
                told[name] = f"sent to {url}"
                continue
            listed = buckets.open(url).list()
            size = sum(max(each.size, 0) for each in listed)
            told[f"{name} {url}"] = f"{len(listed)} files, {size / 1e6:.1f} MB, to be fetched into the cache"
    return told
