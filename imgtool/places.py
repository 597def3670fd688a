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
from imgtool.settings import Data, Fetch, Infer, Settings, Train

if TYPE_CHECKING:
    from imgtool.console import Console

WRITTEN = ("out", "report", "zip")
"""Settings that name what is written; all others name what is read."""

OWN: Mapping[type[Settings], set[str]] = {
    Infer: {"inputs", "out"},
    Fetch: {"url"},
    Train: {"track_to", "stream"},
}
"""Settings that the verb itself goes to."""
LOCK, UNSENT = ".lock", ".unsent"
RUN = ("settings.toml", "last.pt")
"""What a run must have to be resumed."""

T = TypeVar("T")
S = TypeVar("S", bound=Settings)


def urls(settings: Settings) -> dict[str, list[str]]:
    """Return the URLs among settings by name, but for those that the verb itself goes to."""
    own = next((each for kind, each in OWN.items() if isinstance(settings, kind)), set())
    found = {
        name: [names.url(each) for each in _each(getattr(settings, name)) if names.is_url(each)]
        for name in type(settings).model_fields.keys() - own
    }
    return {name: found[name] for name in type(settings).model_fields if found.get(name)}


def _each(value: object) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def mirrored(settings: S, console: Console) -> S:
    """Return settings in which every URL to read from is a copy in the cache, fetched or refreshed now.

    Raises:
        ImgtoolError: What is named is not there, may not be read, or the network is down.
    """
    read = {name for name in urls(settings) if name not in (*WRITTEN, "resume")}
    return _replaced(settings, read, lambda url: mirror(url, console)) if read else settings


def mirror(url: str, console: Console) -> Path:
    """Return the copy of a URL in the cache, fetched or refreshed now."""
    from imgtool.buckets import mirror as copies

    with console.counted(f"fetch {names.public(url)}") as done:
        copy = copies.mirror(url, console.say, done, console.warn)
    names.call(copy, url)
    return copy


def _replaced(settings: S, which: set[str], local: Callable[[str], Path | str]) -> S:
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
def local(settings: S, console: Console) -> Iterator[S]:
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
    _refuse_beside(settings, found)
    with ExitStack() as stack:
        if names.many():
            from imgtool import dist

            stack.enter_context(dist.joined())
        settings = mirrored(settings, console)
        for name in found.keys() & {*WRITTEN, "resume"}:
            given = found[name][0]
            staged = stack.enter_context(_staged(given, settings, name, console))
            settings = _replaced(settings, {name}, lambda url, staged=staged: staged)  # type: ignore[misc]
        yield settings


def _refuse_beside(settings: Settings, found: Mapping[str, object]) -> None:
    """Refuse to write beside a data set that is elsewhere: what is here is a copy."""
    if isinstance(settings, Data) and "folder" in found and getattr(settings, "out", "") is None:
        folder = names.public(str(getattr(settings, "folder", "")))
        raise ImgtoolError(f"nothing is written beside {folder}", "name a folder by -o", USAGE)


@contextmanager
def _staged(url: str, settings: Settings, name: str, console: Console) -> Iterator[Path]:
    """Give a folder or file of this machine that stands for a URL to write to.

    Of many processes, the first looks whether it may be written; one of each machine fetches what is there.
    """
    from imgtool.buckets import send

    above, _, last = url.rstrip("/").rpartition("/")
    if above.endswith("/"):  # a bucket alone
        raise ImgtoolError(f"{url} is a whole bucket", f"name a folder in it, such as {url}/results", USAGE)
    send.writable(url)
    stage = files.cache_folder() / "outgoing" / _name(url)
    staged = stage / last
    names.call(staged, url)
    first_here = not names.many() or os.environ.get("LOCAL_RANK", "0") == "0"
    with ExitStack() as stack:
        _agreed(lambda: _prepare(url, staged, settings, name, (console, stack)) if first_here else None)
        known = send.listed(stage) if name == "resume" and not (stage / UNSENT).exists() else {}
        again = f"--resume {names.public(url)} sends the rest" if isinstance(settings, Train) else ""
        sender = send.Sender(stage, above, console.say, known=known, again=again)
        try:
            if names.rank():
                yield staged
            else:
                with sender:
                    yield staged
        finally:
            if first_here and (names.rank() or not sender.unsent):
                shutil.rmtree(stage, ignore_errors=True)


def _name(url: str) -> str:
    """Return the name of the folder that stands for a URL: a later command finds what was not sent."""
    import hashlib  # which loads a large library

    return hashlib.sha256(url.encode()).hexdigest()[:16]


def _agreed(work: Callable[[], None]) -> None:
    """Do something in every process; where it fails in one, it fails in all."""
    fault = None
    try:
        work()
    except ImgtoolError as found:
        fault = found
    if names.many():
        from imgtool import dist

        fault = next(filter(None, dist.gather(fault)), None)
    if fault:
        raise fault


def _prepare(url: str, staged: Path, settings: Settings, name: str, told: tuple[Console, ExitStack]) -> None:
    """Fetch a run to go on with, or see that nothing is written over; no other command uses it then."""
    console, stack = told
    staged.parent.mkdir(parents=True, exist_ok=True)
    if not stack.enter_context(_alone(staged.parent)):
        raise ImgtoolError(f"another command on this machine writes to {url}", "wait until it has ended")
    if name == "resume":
        _take_up(url, staged, console)
        return
    left = staged.exists()
    if names.rank() == 0 and not _may_overwrite(settings) and _listed(url):
        raise ImgtoolError(f"{url} is not empty", _way_out(settings, url, name), USAGE)
    if left and _resumable(staged) and isinstance(settings, Train):
        what = f"a run that was to be sent to {url} was broken off, and lies on this machine"
        raise ImgtoolError(what, _way_out(settings, url, name), USAGE)
    if left:
        shutil.rmtree(staged)


def _take_up(url: str, staged: Path, console: Console) -> None:
    """Fetch a run, unless what an earlier command left here unsent has come further."""
    from imgtool.buckets import fetch, manifest

    there = staged.with_name(f"{staged.name}.there")
    shutil.rmtree(there, ignore_errors=True)
    left = _resumable(staged)
    if not left or _listed(url):
        fetched: dict[str, Any] = fetch.fetch(url, there, watch=Watch(say=console.say))
        if fetched["faults"]:
            raise ImgtoolError(fetched["faults"][0], "try again")
        for text in fetched["warnings"]:
            console.warn(text)
        (there / manifest.NAME).unlink(missing_ok=True)
    if left and _step(staged) >= _step(there):
        console.say(f"going on with what was not sent to {url}: it lies on this machine")
        shutil.rmtree(there, ignore_errors=True)
        (staged.parent / UNSENT).touch()
        return
    shutil.rmtree(staged, ignore_errors=True)
    there.rename(staged)


def _listed(url: str) -> list[buckets.Found]:
    """Return the files at a URL; nobody waits for the answer once this is interrupted."""
    from imgtool.buckets.pool import apart

    return apart(buckets.open(url).list).result()


def _resumable(folder: Path) -> bool:
    return all((folder / each).exists() for each in RUN)


def _step(folder: Path) -> int:
    """Return how many steps the log of a run tells of, -1 where there is none."""
    log = folder / "log.jsonl"
    rows = files.json_lines(log) if log.exists() else []
    return max((int(row.get("step", 0)) for row in rows), default=0 if rows or log.exists() else -1)


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Tell whether no other command uses a folder, and keep it so for the block."""
    try:
        import fcntl
    except ImportError:  # where there are no such locks
        yield True
        return
    with (folder / LOCK).open("w") as lock:
        try:
            # Of this process alone: workers that load samples inherit any other, and outlive it for seconds.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _may_overwrite(settings: Settings) -> bool:
    return getattr(settings, "force", False) or getattr(settings, "skip_existing", False)


def _way_out(settings: Settings, url: str, name: str) -> str:
    if isinstance(settings, Train):
        return f"go on with what is there by --resume {url}, or name another folder by -o"
    return "name another place by " + ("-o" if name == "out" else f"--{name}")


def shown(settings: S, plan: Mapping[str, object]) -> tuple[S, Mapping[str, object]]:
    """Return settings and a plan with URLs as records have them; the plan tells where something is left out.

    >>> shown(Fetch(url="https://ann:pass@host/photos?key=1", out="photos"), {})[0].url
    'https://host/photos'
    """
    values = {name: [*map(str, _each(getattr(settings, name)))] for name in type(settings).model_fields}
    urls = {each for many in values.values() for each in many if names.is_url(each)}
    secret = {url for url in urls if names.public(url) != names.url(url)}
    if not secret:
        return settings, plan

    def told(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [told(each) for each in value]
        for url in secret if isinstance(value, str) else ():
            value = value.replace(names.url(url), names.public(url)).replace(url, names.public(url))
        return value

    hidden = {name for name, many in values.items() if secret.intersection(many)}
    left_out = f"names, passwords and queries in URLs of {', '.join(sorted(hidden))}"
    plan = {name: told(value) for name, value in plan.items()} | {"left out": left_out}
    return _replaced(settings, hidden, names.public), plan


def plan(settings: Settings) -> Mapping[str, object]:
    """Return what ``--dry-run`` tells of URLs: what would be fetched, and where is written."""
    told: dict[str, object] = {}
    for name, found in urls(settings).items():
        for url in found:
            if name in WRITTEN:
                told[name] = f"sent to {names.public(url)}"
                continue
            listed = _listed(url)
            size = sum(max(each.size, 0) for each in listed)
            told[f"{name} {names.public(url)}"] = (
                f"{len(listed)} files, {size / 1e6:.1f} MB, to be fetched into the cache"
            )
    return told
