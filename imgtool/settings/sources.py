"""Where settings come from, and what they look like on paper.

Sources in rising order: defaults, a preset, ``./imgtool.toml``, ``--config FILE``, the environment,
flags. TOML tables mirror the words typed: ``[train.deblur]``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli
from pydantic import ValidationError

from imgtool import engines, names
from imgtool.errors import USAGE, ImgtoolError, did_you_mean
from imgtool.settings import ACTIONS, VERBS, Settings, declared, flag

ENVIRONMENT = {"device": "IMGTOOL_DEVICE", "threads": "IMGTOOL_THREADS"}
"""Settings that the environment may give: only where one runs, never what is done."""

T = TypeVar("T", bound=Settings)


def _tables(path: Path) -> dict[str, Any]:
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ImgtoolError(
            f"no such settings file: {path}", "check the path given to --config or IMGTOOL_CONFIG", USAGE
        ) from None
    except (OSError, UnicodeDecodeError) as fault:
        raise ImgtoolError(f"cannot read {path}: {fault}", "give a readable TOML file", USAGE) from None
    except tomli.TOMLDecodeError as fault:
        raise ImgtoolError(
            f"{path} is not valid TOML: {fault}", "--dry-run prints settings as valid TOML", USAGE
        ) from None


def _known(verb: str) -> set[str]:
    """Return the words that may follow a verb in the name of a table."""
    if verb == "data":
        return {action for name in engines.SUMMARY for action in engines.settings(name).ACTIONS} | {*ACTIONS}
    return set(engines.SUMMARY)


def _check_words(found: Any, known: Iterable[str], path: Path, before: str = "") -> None:
    """Refuse names of tables that no command reads: a typing error would else change nothing."""
    if not isinstance(found, dict):
        words = before.rstrip(".")
        raise ImgtoolError(f"[{words}] in {path} is not a table", f"write [{words}.<engine>]", USAGE)
    names = sorted(known)
    for word in found:
        if word not in names:
            raise ImgtoolError(
                f"unknown table [{before}{word}] in {path}", did_you_mean(word, names, before), USAGE
            )


def _pick(tables: Any, words: Iterable[str]) -> Any:
    for word in words:
        tables = tables.get(word, {}) if isinstance(tables, dict) else None
    return tables


def table(path: Path, verb: str, engine: str) -> dict[str, Any]:
    """Return ``[verb.engine]`` of a TOML file as a dict, {} where there is none.

    A file may hold tables for other commands; a table that belongs to no command is refused.

    Raises:
        ImgtoolError: Code 2, for a file that cannot be read or holds unknown tables.
    """
    tables = _tables(path)
    _check_words(tables, VERBS, path)
    for word, found in tables.items():
        _check_words(found, _known(word), path, f"{word}.")
        for action in found.keys() - ACTIONS if word == "data" else ():
            _check_words(found[action], engines.SUMMARY, path, f"{word}.{action}.")
    picked = _pick(tables, (verb, *engine.split(".")))
    if not isinstance(picked, dict):
        raise ImgtoolError(f"{verb}.{engine} in {path} is not a table", f"write [{verb}.{engine}]", USAGE)
    return picked


def presets() -> dict[str, Any]:
    """Return the named presets that ship with the package: ``{name: {verb: {engine: {…}}}}``."""
    return _tables(Path(__file__).with_name("presets.toml"))


def _fault(cls: type[Settings], error: Mapping[str, Any], where: str, flags: bool) -> ImgtoolError:
    """Put one of pydantic's errors into the words of the command line or of the file."""
    name = str(error["loc"][0]) if error["loc"] else ""
    info = cls.model_fields.get(name)
    if info is None:
        return ImgtoolError(f"unknown setting {name} in {where}", did_you_mean(name, cls.model_fields), USAGE)
    shown = name
    if flags:
        shown = name.upper() if declared(info)["argument"] else flag(name, info)
    help_text = (info.description or "").partition(" [default:")[0]
    if error["type"] == "missing":
        return ImgtoolError(f"{where} needs {shown}", f"{shown}: {help_text}", USAGE)
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    source = "" if flags else f"{where}: "
    return ImgtoolError(f"{source}{shown}: {message}, not {error['input']!r}", f"{shown}: {help_text}", USAGE)


def make(cls: type[T], values: Mapping[str, Any], where: str, *, flags: bool = False) -> T:
    """Validate values into settings; a fault becomes a usage error that names the setting.

    Args:
        cls: The settings class.
        values: Name to value.
        where: What the values came from, for the message.
        flags: Name the settings as flags in messages.

    Raises:
        ImgtoolError: Code 2, for the first fault found.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as fault:
        raise _fault(cls, dict(fault.errors()[0]), where, flags) from None


def check(cls: type[Settings], values: Mapping[str, Any], where: str) -> None:
    """Check values that are only part of the settings, so that a fault names its own source."""
    try:
        cls.model_validate(dict(values))
    except ValidationError as fault:
        for error in fault.errors():
            if error["type"] != "missing":
                raise _fault(cls, dict(error), where, flags=False) from None


def _preset(name: str, verb: str, engine: str) -> dict[str, Any]:
    known = presets()
    if name not in known:
        raise ImgtoolError(f"no preset named {name}", did_you_mean(name, known), USAGE)
    found: dict[str, Any] = _pick(known[name], (verb, *engine.split(".")))
    return found


def _files(config: Path | None) -> list[Path]:
    local = Path("imgtool.toml")
    named = str(config) if config else os.environ.get("IMGTOOL_CONFIG", "")
    return [local] * local.is_file() + [Path(os.path.expanduser(named))] * bool(named)


def resolve(
    cls: type[T],
    verb: str,
    engine: str,
    flags: Mapping[str, Any],
    config: Path | None = None,
    preset: str = "",
) -> T:
    """Merge all sources into settings (see the module's first lines for their order).

    Args:
        cls: The settings class of the command.
        verb: "train", "infer", ...
        engine: "deblur", or "synth.deblur" for the actions of ``data``.
        flags: What was given on the command line, and only that.
        config: File named by ``--config``; without it ``IMGTOOL_CONFIG`` is read.
        preset: Name of a shipped preset; one without a table for this command changes nothing.

    Raises:
        ImgtoolError: Code 2, for anything unknown or out of range, naming its source.
    """
    values: dict[str, Any] = {}
    sources = [(f"preset {preset}", _preset(preset, verb, engine))] if preset else []
    sources += [(str(path), table(path, verb, engine)) for path in _files(config)]
    sources += [
        (key, {name: os.environ[key]})
        for name, key in ENVIRONMENT.items()
        if os.environ.get(key) and name in cls.model_fields
    ]
    for where, given in sources:
        check(cls, given, where)
        values |= given
    return make(cls, values | dict(flags), " ".join([verb, *engine.split(".")]), flags=True)


def to_toml(settings: Settings, verb: str, engine: str) -> str:
    """Write settings as a TOML table that ``--config`` reads back; unset ones are left out.

    What stands for a folder elsewhere is written as its URL.
    """
    import tomli_w

    nested: dict[str, Any] = {
        name: _elsewhere(value)
        for name, value in settings.model_dump(mode="json").items()
        if value is not None
    }
    for word in reversed([verb, *engine.split(".")]):
        nested = {word: nested}
    return tomli_w.dumps(nested)


def _elsewhere(value: Any) -> Any:
    if isinstance(value, list):
        return [_elsewhere(each) for each in value]
    if names.is_url(value):  # as a path, it has lost a slash
        return names.url(value)
    return names.shown(value) if isinstance(value, str) else value
