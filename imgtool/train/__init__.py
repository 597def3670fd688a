"""The verb ``train``: one loop for all engines."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from imgtool import compute, dist, names, places, repeat, summary, track
from imgtool.engine import Engine
from imgtool.errors import DONE, USAGE, ImgtoolError
from imgtool.settings import Train
from imgtool.settings.sources import make, table
from imgtool.train import searching
from imgtool.train.crew import CAMPAIGN, DONE_FILE, Crew
from imgtool.train.feeding import Numbers
from imgtool.train.loop import BEST, LOG, SETTINGS, STATE, STATES, Loop, learning_rate, portable
from imgtool.train.phases import Phases

if TYPE_CHECKING:
    from imgtool.console import Console

__all__ = [
    "BEST", "CAMPAIGN", "DONE_FILE", "LOG", "SETTINGS", "STATE", "STATES", "Crew", "Loop", "Numbers",
    "Phases", "learning_rate", "plan", "portable", "resumed", "run", "run_folder",
]  # fmt: skip


SEARCHING = ("space", "sampler", "max_ms", "max_mb", "max_parameters", "parallel")
"""Settings that a search alone reads; ``parallel`` is for repeated runs, too."""


def run_folder(engine: Engine, settings: Train) -> Path:
    """Return the folder that a run writes into."""
    if settings.resume:
        return settings.resume
    return settings.out or Path("runs") / engine.name / datetime.now().strftime("%Y-%m-%dT%H-%M-%S")


def resumed(
    engine: Engine, settings: Train, local: Callable[[Train], Train] = lambda settings: settings
) -> Train:
    """Return the settings of the run to resume, with what was given now laid over them.

    Args:
        engine: The engine.
        settings: What was given now.
        local: Gives the run's own settings with copies on this machine of what they name elsewhere.

    Raises:
        ImgtoolError: Code 2: the folder holds no run of this engine, what was given now cannot go on with
            it, or is for a search where there is none.
    """
    if not settings.resume:
        _check_lone(settings, settings.model_fields_set)
        return settings
    path = settings.resume / SETTINGS
    if not path.is_file():
        raise ImgtoolError(
            f"no run to resume in {settings.resume}", f"{SETTINGS} is missing: name a run's folder", USAGE
        )
    before = table(path, "train", engine.name)
    if not before:
        raise ImgtoolError(
            f"the run in {settings.resume} is not of the {engine.name} engine",
            f"{SETTINGS} there names its engine",
            USAGE,
        )
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    begun = local(make(type(settings), before, str(path)))
    other = track.unlike(begun, settings) if "track" in given else set()
    before = {name: getattr(begun, name) for name in before if name not in other}
    found = make(type(settings), before | given, str(path))
    if begun.space and "space" not in given:
        found = found.changed(space=settings.resume / searching.SPACE)
    _check_lone(found, settings.model_fields_set)
    _check_same_network(engine, begun, found)
    repeat.check_same(begun, found)
    searching.check_same(begun, found)
    return found


def _check_same_network(engine: Engine, begun: Train, wanted: Train) -> None:
    """Refuse to go on with another network or optimiser than those that a run began with."""
    parts = dict.fromkeys(engine.model.model_fields, "network") | {"optimiser": "optimiser"}
    for name, part in parts.items():
        value = getattr(begun, name)
        if getattr(wanted, name) != value:
            flag = f"--{name.replace('_', '-')}"
            what = f"the run was begun with {flag} {value}, and goes on with that {part} alone"
            raise ImgtoolError(what, f"leave out {flag}, or begin anew", USAGE)


def plan(engine: Engine, settings: Train) -> Mapping[str, object]:
    """Return what ``--dry-run`` tells: where it would run, how large, how long, and what it writes."""
    if names.is_url(settings.resume):
        return places.plan(settings)
    settings = resumed(engine, settings)
    track.check(settings)
    _wants_campaign(engine, settings)
    search = searching.plan(engine, settings) if settings.search else {}
    net = engine.build(settings)
    return {
        "device": str(compute.device(settings.device)),
        "parameters": sum(p.numel() for p in net.parameters()),
        **({"runs": settings.runs} if settings.runs > 1 else {}),
        "steps": settings.steps,
        **(places.plan(settings) if places.urls(settings) else _samples(engine, settings)),
        **search,
        "output": names.url(run_folder(engine, settings)),
    }


def _check_lone(settings: Train, given: Collection[str]) -> None:
    """Refuse flags of a search, or of many runs, where there is neither: they would change nothing."""
    fields = type(settings).model_fields
    lone = [name for name in SEARCHING if name in given and getattr(settings, name) != fields[name].default]
    if settings.search or not lone or (lone == ["parallel"] and settings.runs > 1):
        return
    flag = f"--{lone[0].replace('_', '-')}"
    hint = "add --search N" + (", or --runs N" if lone[0] == "parallel" else "")
    if settings.resume:
        hint = f"leave out {flag}, or begin anew"
    raise ImgtoolError(f"{flag} is for a search, and there is none", hint, USAGE)


def _samples(engine: Engine, settings: Train) -> dict[str, object]:
    train, held_out = engine.data(settings)
    return {"samples per epoch": len(train), "held-out samples": len(held_out)}


def _wants_campaign(engine: Engine, settings: Train) -> bool:
    wanted = not settings.search and engine.campaign is not None and engine.wants_campaign(settings)
    if wanted and settings.runs > 1:
        what = "--runs repeats one training, and these settings ask for many different ones"
        raise ImgtoolError(what, "leave out --runs", USAGE)
    return wanted


def run(engine: Engine, settings: Train, console: Console) -> int:
    """Train; the run folder then holds settings, log, weights, pictures and the state to resume.

    Returns:
        1 where one of repeated runs failed, else 0.

    Raises:
        ImgtoolError: For data that cannot be used, memory or a disk that does not do, or a run
            whose loss is not finite any more.
        KeyboardInterrupt: After the state was saved.
    """
    with dist.joined():
        return _run(engine, settings, console)


def _run(engine: Engine, settings: Train, console: Console) -> int:
    folder = run_folder(engine, settings)
    held = any((folder / name).exists() for name in (STATE, CAMPAIGN))  # a search's space is written before
    if settings.search and settings.out and (settings.out / searching.SPACE).exists():
        settings = settings.changed(resume=settings.out, out=None)  # somebody began: help with it
    settings = resumed(engine, settings, partial(places.mirrored, console=console))
    track.check(settings)
    folder = settings.resume or folder
    campaign = _wants_campaign(engine, settings)
    if not settings.resume and held:
        raise ImgtoolError(
            f"{folder} already holds a run",
            f"go on with it by --resume {folder}, or name another folder by -o",
            USAGE,
        )
    if settings.search:
        return searching.run(engine, settings, folder, console)
    if engine.campaign is not None and campaign:
        dist.refuse_many("cross-validation")
        record = engine.campaign(settings, Crew(engine, settings, folder, console))
        console.result(record, "\n".join(summary.lines(record)))
        return DONE
    if settings.runs > 1:
        dist.refuse_many("--runs")
        return repeat.run(engine, settings, Crew(engine, settings, folder, console), console)
    loop = Loop(engine, settings, folder, console)
    loop.go()
    return DONE
