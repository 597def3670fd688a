"""The verb ``infer``: photos in, photos or facts out, one after the other or spread by a runner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from imgtool import files, header
from imgtool.engine import Engine
from imgtool.errors import DONE, USAGE, ImgtoolError
from imgtool.infer.batch import Batch
from imgtool.infer.listing import Job, Places, jobs
from imgtool.infer.work import Work, weights_of
from imgtool.settings import Infer

if TYPE_CHECKING:
    from imgtool.buckets.transit import Transit
    from imgtool.console import Console
    from imgtool.runner.shards import Shard

PAGE = "index.html"
ARCHIVE = ".npz"
"""Suffix of exported networks that NumPy alone runs."""


def plan(engine: Engine, settings: Infer) -> Mapping[str, object]:
    """Return what ``--dry-run`` tells: device, network and every output path."""
    from imgtool import runtime

    path = weights_of(engine, settings)
    about: dict[str, object] = {"device": "cpu", "weights": None, "parameters": 0}
    kind = runtime.kind_of(path) if path else ""
    if path and engine.prepare and path.suffix.lower() == ARCHIVE:
        kind = "numpy"
    if path and kind:
        about |= {"weights": path.stem, "parameters": None, "runtime": kind}
    elif engine.prepare is None and path:
        from imgtool import checkpoint, compute

        net = checkpoint.network(engine, checkpoint.read_weights(path, engine.name))
        about |= {"device": str(compute.device(settings.device))}
        about |= {"weights": path.stem, "parameters": sum(p.numel() for p in net.parameters())}
    elif path:
        state = header.read(path, engine.name).state
        about |= {"weights": path.stem, "parameters": sum(array.size for array in state.values())}
    with _travelling(settings) as (settings, transit):
        return about | {"outputs": _outcomes(engine, settings, transit)}


def _outcomes(engine: Engine, settings: Infer, transit: Transit | None) -> list[str]:
    listed = jobs(engine, settings, transit)
    engine.check(settings)
    shard = _spread(engine, settings, listed)
    places = Places(engine, settings, listed)
    places.check()
    outcomes = []
    for job in _part(listed, shard):
        others = [str(path) for path in places.written(job) if path != job.target]
        made = str(job.target) if job.target else "-" if job.stream else "facts"
        outcomes.append(f"{job.item.name} -> {', '.join([made, *others])}")
    return outcomes


def run(engine: Engine, settings: Infer, console: Console) -> int:
    """Process every input; a failure stops only itself, unless ``fail_fast``.

    Returns:
        0, or 1 where any input failed (a single input's own code).

    Raises:
        ImgtoolError: For what concerns all inputs: nothing found, unknown weights or device, a table,
            page or archive that exists.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was done until then is written.
    """
    with _stoppable(), _travelling(settings, console) as (settings, transit):
        listed = jobs(engine, settings, transit)
        engine.check(settings)
        shard = _spread(engine, settings, listed)
        _check_stream(listed, console)
        page = settings.report / PAGE if settings.report else None
        for path in (page, settings.zip):
            if path:
                files.check_new(path, settings.force or settings.skip_existing)
        places = Places(engine, settings, listed)
        work = Work(engine, settings, console, weights_of(engine, settings), len(listed), transit)
        batch = Batch(console, _part(listed, shard), places, work, shard)
        places.check()
        if transit:
            transit.check_writable(path for job in listed for path in places.written(job))
        if not batch.jobs:
            none = "the one photo is not" if len(listed) == 1 else f"none of the {len(listed)} photos is"
            console.say(f"part {shard}: {none} in it")
            return DONE
        try:
            batch.open_books()
            return _run(batch)
        finally:
            batch.close()


def _run(batch: Batch) -> int:
    settings, console = batch.settings, batch.console
    if settings.runner:
        from imgtool import runner

        return runner.run(batch)
    batch.work.load()
    if batch.shard:
        batch.open_manifest()
    try:
        with console.progress(len(batch.jobs), f"infer {batch.engine.name}") as bar:
            batch.go(bar)
    except KeyboardInterrupt:
        if len(batch.jobs) > 1:
            console.say(batch.left())
        raise
    finally:  # a batch that is interrupted has its page too, of what was done
        if settings.report and batch.entries:
            batch.write_page(settings.report / PAGE)
    batch.close()
    if settings.zip and batch.made:
        batch.write_archive(settings.zip)
    return batch.verdict()


@contextmanager
def _stoppable() -> Iterator[None]:
    """Have SIGTERM, by which batch systems end a job, do what Ctrl-C does; further ones change nothing.

    Where somebody else has said what it does, and outside the main thread, it does that.
    """
    import signal
    import threading

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        # Some send it twice: to the process, and to its group.
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _travelling(settings: Infer, console: Console | None = None) -> Iterator[tuple[Infer, Transit | None]]:
    """Give the settings, of which ``out`` is a place of this machine, and what goes between here and URLs."""
    words = [*settings.inputs, *([settings.out] if settings.out else [])]
    if not any(":/" in word for word in words):
        yield settings, None
        return
    from imgtool import names

    if not any(map(names.is_url, words)):
        yield settings, None
        return
    from imgtool.buckets.transit import Transit

    away = settings.out is not None and names.is_url(settings.out)
    if settings.zip and away:
        raise ImgtoolError("--zip holds files of this machine, and -o is a URL", "leave one out", USAGE)
    transit = Transit.begin(
        [names.url(word) for word in settings.inputs if names.is_url(word)],
        names.url(settings.out) if settings.out and away else None,
    )
    try:
        for local, url in [*transit.plan.sources, *([transit.plan.out] if transit.plan.out else [])]:
            names.call(local.rstrip("/"), url)
        if settings.out and away:
            settings = settings.model_copy(update={"out": transit.local(names.url(settings.out))})
        yield settings, transit
    finally:
        left = transit.close()
        if left and console:
            many = "1 file was" if len(left) == 1 else f"{len(left)} files were"
            console.warn(f"{many} not sent: what is left is in {transit.plan.spool}")


def _part(listed: Sequence[Job], shard: Shard | None) -> Sequence[Job]:
    return [job for job in listed if shard.holds(job.item.relative)] if shard else listed


def _spread(engine: Engine, settings: Infer, listed: Sequence[Job]) -> Shard | None:
    """Return the part that is asked for; refuse what needs all photos in one process.

    Raises:
        ImgtoolError: Code 2: such a thing is asked for together with a runner or a part, or the part is none.
    """
    if not settings.runner and settings.shard is None:
        if settings.workers:
            raise ImgtoolError(
                "--workers says how many processes a runner has", "give --runner processes", USAGE
            )
        return None
    from imgtool.runner import shards

    flag = "--runner" if settings.runner else "--shard"
    reasons = {
        "--report": settings.report is not None,
        "--zip": settings.zip is not None,
        "standard input": any(job.item.source is None for job in listed),
        "standard output": any(job.stream for job in listed),
        "what is found from all photos together": engine.wants_survey(settings),
    }
    for reason, given in reasons.items():
        if given:
            what = f"{reason} needs all photos in one process, and {flag} spreads them"
            raise ImgtoolError(what, f"leave out {flag}", USAGE)
    return None if settings.shard is None else shards.shard(settings.shard)


def _check_stream(listed: Sequence[Job], console: Console) -> None:
    """Refuse, before anything is computed, a photo on standard output that nobody could use there."""
    if not any(job.stream for job in listed):
        return
    console.check_binary()
    if console.json:
        raise ImgtoolError(
            "standard output cannot take both the photo and JSON", "give -o FILE, or leave out --json", USAGE
        )
