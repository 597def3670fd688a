"""Searches on the command line: what may be asked, what is shown before, and processes beside each other."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool import dist, files, repeat
from imgtool.engine import Engine
from imgtool.errors import DONE, FAILED, USAGE, ImgtoolError
from imgtool.search import samplers, space
from imgtool.search.board import Board
from imgtool.search.campaign import Search, limits, question
from imgtool.search.task import Task, usual
from imgtool.settings import Train
from imgtool.settings.sources import make, table
from imgtool.train.crew import Crew
from imgtool.train.loop import SETTINGS

if TYPE_CHECKING:
    from imgtool.console import Bar, Console

TRIED = ("trained", "failed")
"""States of trials that were let into training, and have ended."""
SPACE = "space.toml"
"""The space of a search, in its folder."""
FREE = repeat.FREE | {"search", "space", "max_ms", "max_mb", "max_parameters"}
"""Settings that may change while a search goes on; the space is compared by what it holds."""
EXTENT = ("search", "max_ms", "max_mb", "max_parameters")
"""Settings by which a search is extended: whoever joins it later takes the latest."""
CONTROLLER = "controller"
"""What Ax's one process claims."""
BEGINNING = "beginning"
"""What the process claims that begins a search."""
MOMENT = 0.1
"""Seconds between two looks whether it has."""


def check_same(begun: Train, wanted: Train) -> None:
    """Refuse to go on with a search as something else, or with a single run as a search.

    Raises:
        ImgtoolError: Code 2.
    """
    if bool(begun.search) != bool(wanted.search):
        what = f"the folder holds {'a search' if begun.search else 'no search'}"
        raise ImgtoolError(what, f"go on with --search {begun.search}, or begin anew", USAGE)
    if not begun.search:
        return
    for name in type(begun).model_fields.keys() - FREE:
        if getattr(begun, name) != getattr(wanted, name):
            flag = f"--{name.replace('_', '-')}"
            what = f"a search goes on as it began, with {flag} {getattr(begun, name) or 'unset'}"
            raise ImgtoolError(what, f"leave out {flag}, or begin anew", USAGE)


def task(engine: Engine, settings: Train) -> Task:
    """Return what is searched: the engine's own, or ``--space``, or the space that ships with the engine.

    Raises:
        ImgtoolError: Code 2: settings that exclude each other, a space that does not fit, a sampler that is
            not installed.
    """
    dist.refuse_many("--search")
    if settings.runs > 1:
        what = "--runs repeats one training, and these settings ask for many different ones"
        raise ImgtoolError(what, "leave out --runs", USAGE)
    if settings.register_as:
        hint = "train the best with it: --config FOLDER/best.toml"
        raise ImgtoolError("--register is for one training, not for a search", hint, USAGE)
    found = engine.search(settings) if engine.search else usual(engine, settings)
    samplers.check(settings.sampler or found.sampler, settings.parallel)
    return found


def plan(engine: Engine, settings: Train) -> dict[str, object]:
    """Return what ``--dry-run`` tells of a search."""
    found = task(engine, settings)
    return {
        "search": settings.search,
        "sampler": settings.sampler or found.sampler,
        "limits": str(limits(settings)),
        "measured": found.measured,
        **{f"space of {name}": words for name, words in space.in_words(found.space).items()},
    }


def run(engine: Engine, settings: Train, folder: Path, console: Console) -> int:
    """Search, or help those who search in the folder already.

    Returns:
        1 where a process of the search failed, else 0.

    Raises:
        ImgtoolError: As ``task`` and ``Search.go``; a folder of another space, or one in which Ax's one
            process runs.
        KeyboardInterrupt: After the states were saved.
    """
    found = task(engine, settings)
    crew = _begun(engine, settings, folder, found, console)
    if crew is None:  # another process began it meanwhile: join in
        from imgtool import train

        return train.run(engine, settings.changed(out=folder), console)
    search = Search(engine, settings, crew, found)
    if settings.parallel > 1:
        every = {f"worker-{number}": settings for number in range(settings.parallel)}
        _, failed = Workers(engine.name, every, settings, crew, console).go()
        record = search.record()
        if failed and record["trained"] + record["failed"] >= settings.search:
            console.warn(f"{', '.join(failed)} failed; the others did the work")
            failed = {}
    else:
        failed, record = {}, search.go(lambda: _sampler(engine, settings, found, search))
    console.result(record, _text(record))
    if failed:
        console.warn(f"failed: {', '.join(failed)}; go on with the search by --resume {folder}")
    return FAILED if failed else DONE


def _begun(engine: Engine, settings: Train, folder: Path, found: Task, console: Console) -> Crew | None:
    """Begin a search, or go on with it; None where another process has begun it at the same time.

    The space is written last but for the mark of a campaign: where it is, others may join.
    """
    path, text = folder / SPACE, space.to_toml(found.space, engine.name).encode()
    if settings.resume:
        return _resumed(engine, settings, path, text, console)
    board = Board(folder)
    with board:
        while not (path.exists() or board.claim(BEGINNING)):
            time.sleep(MOMENT)
        if path.exists():
            return None
        return Crew(engine, settings, folder, console, first={SPACE: text})


def _resumed(engine: Engine, settings: Train, path: Path, text: bytes, console: Console) -> Crew:
    """Go on with a search, whose record then has the latest extent of it."""
    folder = path.parent
    if path.exists() and files.read(path) != text:
        what = f"the search in {folder} was begun with another space"
        raise ImgtoolError(what, f"{path} holds it: leave out --space, or begin anew", USAGE)
    record = folder / SETTINGS
    begun = make(type(settings), table(record, "train", engine.name), str(record))
    now = begun.changed(**{name: getattr(settings, name) for name in EXTENT})
    if limits(begun) != limits(now):
        console.say(f"limits: {limits(now)}, before: {limits(begun)}; what they allow is rejected no longer")
    return Crew(engine, now, folder, console, joined=now == begun and path.exists(), first={SPACE: text})


def _sampler(engine: Engine, settings: Train, found: Task, search: Search) -> samplers.Sampler:
    asked = question(engine, settings, found)
    if (settings.sampler or found.sampler) == "optuna":
        return samplers.Optuna(asked, search.crew.folder, search.board.worker())
    if not search.board.claim(CONTROLLER):
        what = f"another process searches in {search.crew.folder}, and Ax proposes in one alone"
        raise ImgtoolError(what, "wait for it, or begin another search with --sampler optuna", USAGE)
    search.crew.say("starting Ax, which takes some seconds")
    return samplers.Ax(asked, 1 + max((row["trial"] for row in search.board.rows()), default=-1))


def _text(record: Mapping[str, Any]) -> str:
    """Return a record in lines for people."""
    best = record["best"]
    counts = ", ".join(f"{record[name]} {name}" for name in ("trained", "rejected", "repeated", "failed"))
    if best is None:
        return f"trials: {counts}\nfolder: {record['folder']}"
    return "\n".join(
        [
            *(_corner(each, record["metric"]) for each in record["front"]),
            f"trials: {counts}",
            f"best: trial-{best['trial']:03}",
            f"{record['metric']}: {best['score']:.4g}",
            f"cost: {best['cpu_ms']:.3g} ms, {best['mb']:.3g} MB, {best['parameters']:,} parameters",
            f"settings: {record['config']}",
            f"weights: {best['weights']}",
            f"folder: {record['folder']}",
        ]
    )


def _corner(each: Mapping[str, Any], metric: str) -> str:
    about = "  ".join(f"{name} {value}" for name, value in each["settings"].items())
    return f"trial-{each['trial']:03}: {metric} {each['score']:.4g}, {each['cpu_ms']:.3g} ms  {about}"


class Workers(repeat.Processes):
    """Processes that search in one folder; the bar counts trials."""

    _tried = 0

    def flags(self, name: str, settings: Train) -> dict[str, Any]:
        """Return the flags that let a process join the search."""
        return {"resume": self.crew.folder}

    def about(self, settings: Train) -> str:
        """Return what is said when a process begins."""
        return "searches"

    def ended(self, name: str) -> repeat.Found | None:
        """Return None: a process that has ended before is begun again."""
        return None

    def keep(self, name: str, found: repeat.Found) -> None:
        """Take down nothing: trials are kept by themselves."""

    def hear(self, name: str, line: str, bar: Bar) -> None:
        """Take a line of a process, and count the trials that have ended."""
        super().hear(name, line, bar)
        now = sum(row["status"] in TRIED for row in self._board.rows())
        bar.advance(now - self._tried)
        self._tried = now

    @cached_property
    def _board(self) -> Board:
        return Board(self.crew.folder)

    @property
    def steps(self) -> int:
        """Return what the end of a process is for the bar: nothing."""
        return 0

    @property
    def total(self) -> int:
        """Return how many trials there are to be."""
        return self.settings.search
