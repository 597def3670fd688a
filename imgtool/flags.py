"""The commands and their flags, read off the settings: what the command line and its reference show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from imgtool import engines
from imgtool.settings import ACTIONS, PANELS, VERBS, Settings, declared
from imgtool.settings.sources import presets

GENERAL = "General"
CONFIG_HELP = "Settings file; --no-SWITCH turns off a switch that it turns on. Its table is"
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: ""}
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}


@dataclass(frozen=True)
class Command:
    """The words of one command and the settings that it takes.

    Attributes:
        verb: "train", "infer", ...
        engine: "deblur", ...; "" for an action that belongs to none.
        action: The word between them, which only ``data`` has.
        settings: Class of its settings. One whose ``alone`` is true makes the action a command by itself,
            and the engine's name is not typed.
    """

    verb: str
    engine: str
    action: str
    settings: type[Settings]

    @property
    def words(self) -> str:
        """The words as they are typed after ``imgtool``."""
        engine = "" if alone(self.settings) else self.engine
        return " ".join(word for word in (self.verb, self.action, engine) if word)

    @property
    def table(self) -> str:
        """Name of the settings' TOML table within that of the verb."""
        return ".".join(word for word in (self.action, self.engine) if word)


@dataclass(frozen=True)
class Flag:
    """One option or positional argument, as help and the reference show it.

    Attributes:
        name: Name of the setting.
        kind: Type of one value: int, float, str, bool, Path or a Literal.
        help: What it does, one sentence.
        panel: Heading in help.
        short: "-o", "", or the word of the flag where it is not the name.
        many: Whether it may be given more than once.
        argument: Whether it is positional.
        notes: Default, limits and whether it is required.
    """

    name: str
    kind: Any
    help: str
    panel: str = GENERAL
    short: str = ""
    many: bool = False
    argument: bool = False
    notes: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """What is typed: "--long", and "-s" where there is a short form."""
        if self.short.startswith("--"):
            return [self.short]
        return ["--" + self.name.replace("_", "-")] + [self.short] * bool(self.short)

    @property
    def metavar(self) -> str:
        """What help shows for its value: a placeholder such as TEXT, or the choices with bars between."""
        if self.argument:
            return self.name.upper()
        if get_origin(self.kind) is Literal:
            return "|".join(get_args(self.kind))
        return METAVARS[self.kind]


def alone(cls: type[Settings] | None) -> bool:
    """Return whether an action of ``data`` is a command by itself, typed without an engine's name."""
    return bool(getattr(cls, "alone", False))


def commands(words: Sequence[str] = ()) -> Iterator[Command]:
    """Yield every command: each verb with each engine that has settings for it, then what needs no engine.

    Args:
        words: Where they begin with the words of one command, that one alone is yielded.
    """
    verbs, names = _named(words)
    for verb in verbs:
        for engine in names:
            module = engines.settings(engine)
            if verb == "data":
                for action, cls in module.ACTIONS.items():
                    yield Command(verb, engine, action, cls)
            elif hasattr(module, verb.capitalize()):
                yield Command(verb, engine, "", getattr(module, verb.capitalize()))
    if "data" in verbs and (len(names) != 1):
        yield from (Command("data", "", action, cls) for action, cls in ACTIONS.items())


def _named(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Return the verbs and the engines that what was typed names, all of them where it names no command."""
    verb = words[0] if words and words[0] in VERBS else ""
    if verb == "data" and words[1:2] and words[1] in ACTIONS:
        return [verb], []
    if verb == "data":
        engine = _acting(*words[1:3])
    else:
        engine = words[1] if len(words) > 1 and words[1] in engines.SUMMARY else ""
    return ([verb], [engine]) if verb and engine else (list(VERBS), list(engines.SUMMARY))


def _acting(action: str = "", word: str = "") -> str:
    """Return the engine that an action belongs to: the next word, or the one whose action needs no word."""
    if word in engines.SUMMARY and action in engines.settings(word).ACTIONS:
        return word
    lone = (name for name in engines.SUMMARY if alone(engines.settings(name).ACTIONS.get(action)))
    return next(lone, "")


def _kind(annotation: Any) -> tuple[Any, bool]:
    """Return the type of one value and whether there may be many: ``X | None`` and tuples opened."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(each for each in get_args(annotation) if each is not type(None))
    many = get_origin(annotation) is tuple
    if many:
        annotation = get_args(annotation)[0]
    if hasattr(annotation, "__metadata__"):  # Annotated
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        annotation = Literal[tuple(each for each in get_args(annotation) if each != "")]
    return annotation, many


def _limits(metadata: Sequence[Any]) -> Iterator[str]:
    """Yield the limits of a number in words."""
    found = {name: getattr(each, name) for each in metadata for name in LIMITS if hasattr(each, name)}
    if "ge" in found and "le" in found:
        yield f"{found.pop('ge'):g} to {found.pop('le'):g}"
    yield from (f"{LIMITS[name]} {limit:g}" for name, limit in found.items())


def _default(default: Any, told: str) -> Iterator[str]:
    """Yield what happens without the flag, where that says anything."""
    if told:
        yield f"default: {told}"
    elif default not in (None, "", (), False):
        yield f"default: {'on' if default is True else default}"
    elif default == 0 and default is not False:
        yield f"default: {default}"


def _sentence(description: str) -> tuple[str, str]:
    """Part "Sentence [default: told]." into the sentence, with its full stop, and what is told."""
    text, _, told = description.removesuffix(".").partition(" [default: ")
    return text + ".", told.removesuffix("]")


def flags(cls: type[Settings]) -> list[Flag]:
    """Return the flags of a settings class: arguments first, then by panel."""
    found = []
    for name, info in cls.model_fields.items():
        kind, many = _kind(info.annotation)
        extra = {key: value for key, value in declared(info).items() if key in Flag.__dataclass_fields__}
        text, told = _sentence(info.description or "")
        notes = ["required"] if info.is_required() else [*_default(info.default, told)]
        notes += [*_limits(info.metadata)] if kind in (int, float) else []
        notes += ["repeatable"] if many and not extra["argument"] else []
        found.append(Flag(name, kind, text, many=many, notes=tuple(notes), **extra))
    order = {panel: number for number, panel in enumerate(PANELS)}
    return sorted(found, key=lambda flag: (not flag.argument, order.get(flag.panel, len(order))))


def general(command: Command) -> list[Flag]:
    """Return the flags that every command has, and ``--preset`` where a preset speaks of it."""
    named = [name for name, tables in presets().items() if command.engine in tables.get(command.verb, {})]
    found = [
        Flag("config", Path, f"{CONFIG_HELP} [{command.verb}.{command.table}].", short="-c"),
        Flag("preset", Literal[tuple(named)] if named else str, "Settings for a kind of machine."),
        Flag("json", bool, "Print results as JSON, one object a line."),
        Flag("dry_run", bool, "Print the settings as TOML and what would be done; do nothing.", short="-n"),
        Flag("quiet", bool, "Say only warnings and errors.", short="-q"),
        Flag("verbose", bool, "Say more.", short="-v"),
    ]
    return [flag for flag in found if flag.name != "preset" or named]
