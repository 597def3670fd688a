"""The command line: one builder turns a verb and an engine's settings into a command.

Nothing here computes. Verbs and engines are imported inside functions, after the first word is
said, so that help and completion never wait for torch.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import typer
import typer.main

from imgtool import __version__, engines, names
from imgtool.console import Console
from imgtool.errors import DONE, FAILED, INTERRUPTED, USAGE, ImgtoolError
from imgtool.flags import Command, Flag, commands, flags, general
from imgtool.settings import VERBS, Settings, Train
from imgtool.settings.sources import resolve, to_toml

UNDO = "no_"
KEYWORD = inspect.Parameter.KEYWORD_ONLY
HELP = {"help_option_names": ["-h", "--help"]}


def parameter(flag: Flag) -> inspect.Parameter:
    """Return the parameter from which Typer makes the option; None means that it was not given."""
    notes = f" [dim]\\[{'; '.join(flag.notes)}][/dim]" if flag.notes else ""
    shown: dict[str, Any] = {
        "help": flag.help.replace("[", "\\[") + notes,
        "metavar": flag.metavar,
        "show_default": False,
    }
    if flag.argument:
        default = typer.Argument(None, **shown)
    else:
        default = typer.Option(None, *flag.words, rich_help_panel=flag.panel, **shown)
    # Numbers pass as text: the settings, not Typer, say what is wrong with them.
    one = str if flag.kind in (int, float) else flag.kind
    kind: Any = list[one] if flag.many else one  # type: ignore[valid-type]
    return inspect.Parameter(flag.name, KEYWORD, default=default, annotation=kind | None)


def undoing(flag: Flag) -> list[inspect.Parameter]:
    """Return, for a switch, ``--no-SWITCH``: what a settings file turns on can be turned off."""
    if flag.kind is not bool:
        return []
    default = typer.Option(None, "--no-" + flag.name.replace("_", "-"), hidden=True, metavar="")
    return [inspect.Parameter(UNDO + flag.name, KEYWORD, default=default, annotation=bool | None)]


def build(command: Command) -> Callable[..., int]:
    """Return the function that Typer turns into a command."""

    def call(**given: Any) -> int:
        return perform(command, given)

    own = flags(command.settings)
    parameters = [parameter(flag) for flag in [*own, *general(command)]]
    parameters += [each for flag in own for each in undoing(flag)]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    return call


def perform(command: Command, given: Mapping[str, Any]) -> int:
    """Run a command.

    Args:
        command: What to run.
        given: Value of every flag; None, or an empty list, for those that were not given.

    Returns:
        The exit code.
    """
    # Of many processes that train, the first speaks.
    quiet = bool(given["quiet"]) or (command.verb == "train" and names.rank() > 0)
    console = Console(json=bool(given["json"]), quiet=quiet, verbose=bool(given["verbose"]))
    preset = given.get("preset") or ""
    flagged = _given(command.settings, given)
    config = _config(given["config"], console)
    settings = resolve(command.settings, command.verb, command.table, flagged, config, preset)
    _limit_threads(settings)
    console.say(f"imgtool {command.words}: starting")
    verb = importlib.import_module(f"imgtool.{command.verb}")
    engine = engines.load(command.engine) if command.engine else None
    subject = (engine, command.action) if command.action else (engine,)
    if names.many() and command.verb != "train":
        what = f"torchrun is for imgtool train: each of its processes would {command.verb} all"
        raise ImgtoolError(
            what, "start it without torchrun; --shard and --runner of infer spread photos", USAGE
        )
    if given["dry_run"]:
        if names.rank():
            return DONE
        return _show(command, settings, _plan(verb, subject, settings), console)
    with _local(settings, console) as settings:
        code: int = verb.run(*subject, settings, console)
    return code


def _config(named: Path | None, console: Console) -> Path | None:
    """Return the settings file to read: a copy, where ``--config`` or ``IMGTOOL_CONFIG`` names a URL."""
    found = named or os.environ.get("IMGTOOL_CONFIG", "")
    if not names.is_url(found):
        return named
    from imgtool import places

    return places.mirror(names.url(found), console)


def _plan(verb: Any, subject: Sequence[Any], settings: Settings) -> Mapping[str, object]:
    """Return what would be done; what a URL names is looked at, and not fetched."""
    if settings.elsewhere:
        from imgtool import places

        if places.urls(settings) and not isinstance(settings, Train):
            return places.plan(settings)
    plan: Mapping[str, object] = verb.plan(*subject, settings)
    return plan


@contextmanager
def _local(settings: Settings, console: Console) -> Iterator[Settings]:
    """Give settings that name files of this machine alone."""
    if not settings.elsewhere:
        yield settings
        return
    from imgtool import places

    with places.local(settings, console) as settings:
        yield settings


def _given(cls: type[Settings], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were given as flags, and no others."""
    found = {name: given[name] for name in cls.model_fields if given[name] not in (None, [])}
    return found | {name: False for name in cls.model_fields if given.get(UNDO + name)}


def _limit_threads(settings: Settings) -> None:
    """Tell OpenMP about ``--threads``: it listens only before torch is imported."""
    threads = getattr(settings, "threads", 0)
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _show(command: Command, settings: Settings, plan: Mapping[str, object], console: Console) -> int:
    """Print what ``--dry-run`` found: TOML that ``--config`` reads, the plan as its comments.

    URLs are printed as records have them.
    """
    if settings.elsewhere:
        from imgtool import places

        settings, plan = places.shown(settings, plan)
    record = {
        "verb": command.verb,
        "engine": command.engine,
        "settings": settings.model_dump(),
        "plan": plan,
    }
    comments = [f"# {name}: {each}" for name, value in plan.items() for each in _lines(value)]
    toml = to_toml(settings, command.verb, command.table)
    console.result(record, "\n".join([*comments, "", toml.rstrip()]))
    return DONE


def _lines(value: object) -> list[str]:
    """Return the lines of a value: a list has one for each entry, and a file name never breaks one."""
    many = value if isinstance(value, list | tuple) else [value]
    return [" ".join(str(each).splitlines()) for each in many]


def _version(wanted: bool) -> None:
    if wanted:
        Console().result({}, f"imgtool {__version__}")
        raise typer.Exit(DONE)


def _root(
    version: bool = typer.Option(
        False, "--version", metavar="", help="Print the version.", callback=_version, is_eager=True
    ),
) -> None:
    """Example: imgtool infer deblur photo.jpg -o sharp.jpg

    Learned processing of camera images. Two words say what happens: a verb and an engine.
    """  # noqa: D415 - help leads with an example


def _help(command: Command) -> str:
    text = inspect.cleandoc(command.settings.__doc__ or "")
    return f"Example: {command.settings.example}\n\n{text}".replace("[", "\\[")


def _group(parent: typer.Typer, name: str, text: str) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True, context_settings=HELP, help=text)
    parent.add_typer(group, name=name)
    return group


def application(words: Sequence[str] = ()) -> typer.Typer:
    """Build the tree of commands.

    Args:
        words: What was typed. Where they begin with a whole command, the tree has that one alone: the
            settings of all others need not be imported, which saves start-up time and memory.
    """
    app = typer.Typer(
        no_args_is_help=True,
        context_settings=HELP,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    groups = {verb: _group(app, verb, text) for verb, text in VERBS.items()}
    for command in commands(words):
        *above, name = command.words.split()
        path = " ".join(above)
        summary = _summary(command.settings)
        if path not in groups:
            groups[path] = _group(groups[command.verb], command.action, summary)
        groups[path].command(name, help=_help(command), short_help=summary)(build(command))
    return app


def _summary(cls: type[Settings]) -> str:
    return inspect.cleandoc(cls.__doc__ or "").splitlines()[0]


def _usage_fault(fault: Any) -> ImgtoolError:
    """Put a fault of the command line into our own two lines."""
    what, _, near = fault.format_message().partition(" Did you mean ")
    what = re.sub(r" \(Possible options: .*\)$|Value error, ", "", what).strip().rstrip(".")
    near = near.rstrip("?") or ", ".join(getattr(fault, "possibilities", None) or ())
    context = getattr(fault, "ctx", None)
    path = context.command_path if context else "imgtool"
    return ImgtoolError(
        what[:1].lower() + what[1:], f"did you mean {near}?" if near else f"see {path} --help", USAGE
    )


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: The words after ``imgtool``.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # 3 times faster on a busy machine
    report = partial(_report, json="--json" in arguments)
    try:
        command = typer.main.get_command(application(arguments))
        code = command.main(list(arguments), prog_name="imgtool", standalone_mode=False)
    except ImgtoolError as fault:
        return report(fault)
    except typer.TyperException as fault:
        if type(fault).__name__ == "NoArgsIsHelpError":  # the help has been printed
            return USAGE
        return report(_usage_fault(fault))
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        Console().say("interrupted")
    return int(code or DONE)


def _report(fault: ImgtoolError, json: bool) -> int:
    console = Console(json=json)
    console.error(fault)
    if json:
        console.result({"error": fault.what, "hint": fault.hint})
    return fault.code


def main() -> NoReturn:
    """Run the command line of this process, and end the process."""
    _open_streams()
    try:
        code: object = run(sys.argv[1:])
    except SystemExit as ending:
        code = ending.code
    except KeyboardInterrupt:  # a second one, while the first was told
        Console().say("interrupted")
        code = INTERRUPTED
    leave(code if isinstance(code, int) else DONE)


def _open_streams() -> None:
    """Have standard streams that were closed lead to nowhere; else the next file would take their place."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(opened, True)
    os.close(opened)
    for number, name in enumerate(("stdout", "stderr"), 1):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w"))  # noqa: SIM115 - open to the end


def leave(code: int) -> NoReturn:
    """End this process as Python does, but for its taking itself apart.

    That aborts the process where a thread of a library comes back to Python meanwhile, such as one of Arrow
    or Gloo ("PyGILState_Release: thread state must be current when releasing", "terminate called without an
    active exception"; see https://github.com/python/cpython/issues/87135).

    Args:
        code: The exit code; 0 becomes 1 where what was printed last cannot be written.
    """
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one ends it at once, in silence
    threading._shutdown()  # type: ignore[attr-defined] # in the order of Py_FinalizeEx
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or FAILED
    os._exit(code)
