"""The space of a search: what settings may be, from TOML, checked against the settings themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli
from pydantic.fields import FieldInfo

from imgtool import engines
from imgtool.errors import USAGE, ImgtoolError, did_you_mean
from imgtool.settings import DATA, MODEL, TRAINING, Settings, declared
from imgtool.settings.sources import check

Value = int | float | str | bool
Point = Mapping[str, Value]
"""Where in a space a candidate lies, as it was proposed: a value for each name."""

WORDS = ("low", "high", "log", "step")
"""What says how a number ranges."""
PANELS = (MODEL, TRAINING, DATA)
"""Headings of the settings that can be searched: they make a training what it is."""


@dataclass(frozen=True)
class Span:
    """What a number may be.

    Attributes:
        low: The least.
        high: The largest.
        whole: Whole numbers alone.
        log: Drawn by its logarithm.
        step: Only ``low`` and what lies so many steps above it; 0: all between.
    """

    low: float
    high: float
    whole: bool = False
    log: bool = False
    step: float = 0.0

    def bounds(self) -> tuple[float, float]:
        """Return the bounds of a real number which, by ``nearest``, takes all values alike."""
        margin = 0.499 * (self.step or float(self.whole))
        return self.low - margin, self.top + margin

    @property
    def top(self) -> float:
        """The largest number that the steps lead to."""
        return (
            self.low + self.step * math.floor((self.high - self.low) / self.step + 1e-9)
            if self.step
            else self.high
        )

    def nearest(self, value: float) -> int | float:
        """Return the number of the span that is nearest to another, to four digits where it is real."""
        if self.step:
            value = self.low + self.step * round((value - self.low) / self.step)
        value = min(max(value if self.whole else float(f"{value:.4g}"), self.low), self.top)
        return round(value) if self.whole else float(value)


@dataclass(frozen=True)
class Choice:
    """Values one of which is taken."""

    values: tuple[Value, ...]


Space = Mapping[str, Span | Choice]


def taken(space: Space, point: Point) -> dict[str, Value]:
    """Return the values that a point stands for: numbers are rounded to what their spans hold."""
    return {
        name: each.nearest(float(point[name])) if isinstance(each, Span) else point[name]
        for name, each in space.items()
    }


def shipped(engine: str) -> Path:
    """Return the file of the space that comes with an engine."""
    return Path(engines.__file__).parent / engine / "space.toml"


def read(path: Path, engine: str, settings: type[Settings]) -> dict[str, Span | Choice]:
    """Read ``[search.<engine>]``: name of a setting to {low, high, log, step}, or to a list of choices.

    Args:
        path: TOML file; it may hold the spaces of other engines too.
        engine: Name of the engine.
        settings: Settings of its training, of which the space is a part.

    Raises:
        ImgtoolError: Code 2: the file cannot be read, or names or holds what these settings do not take.
    """
    tables = _tables(path)
    table = tables.get(engine)
    if not isinstance(table, dict) or not table:
        raise ImgtoolError(f"{path} has no space for {engine}", f"write [search.{engine}]", USAGE)
    return {
        name: _dimension(settings, name, given, f"{path}: search.{engine}") for name, given in table.items()
    }


def _tables(path: Path) -> dict[str, Any]:
    found = _parsed(path)
    for name in found:
        if name != "search":
            raise ImgtoolError(f"unknown table [{name}] in {path}", did_you_mean(name, ["search"]), USAGE)
    tables = found.get("search", {})
    if not isinstance(tables, dict):
        raise ImgtoolError(f"search in {path} is not a table", "write [search.<engine>]", USAGE)
    for name in tables:
        if name not in engines.SUMMARY:
            hint = did_you_mean(name, engines.SUMMARY, "search.")
            raise ImgtoolError(f"unknown table [search.{name}] in {path}", hint, USAGE)
    return tables


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ImgtoolError(f"no such search space: {path}", "check --space", USAGE) from None
    except (OSError, UnicodeDecodeError) as fault:
        raise ImgtoolError(f"cannot read {path}: {fault}", "give a readable TOML file", USAGE) from None
    except tomli.TOMLDecodeError as fault:
        raise ImgtoolError(f"{path} is not valid TOML: {fault}", "write [search.<engine>]", USAGE) from None


def _dimension(cls: type[Settings], name: str, given: Any, where: str) -> Span | Choice:
    fields = {key: info for key, info in cls.model_fields.items() if declared(info)["panel"] in PANELS}
    if name not in fields:
        if name in cls.model_fields:
            hint = "a search varies settings of the network, its data and its training"
            raise ImgtoolError(f"{where}: {name} is no setting to search", hint, USAGE)
        raise ImgtoolError(f"{where}: unknown setting {name}", did_you_mean(name, fields), USAGE)
    if isinstance(given, dict):
        return _span(cls, name, given, where)
    return _choice(cls, name, given, where)


def _choice(cls: type[Settings], name: str, given: Any, where: str) -> Choice:
    if not isinstance(given, list) or not all(isinstance(each, int | float | str) for each in given):
        what = f"{where}: {name} is neither a list of choices nor a range"
        raise ImgtoolError(what, f"write {name} = [..., ...] or {name} = {{low = ..., high = ...}}", USAGE)
    if len(given) < 2 or any(each in given[:place] for place, each in enumerate(given)):
        hint = "what is not searched is given as a flag"
        raise ImgtoolError(f"{where}: {name} needs two different choices at least", hint, USAGE)
    for each in given:
        check(cls, {name: each}, where)
    return Choice(tuple(given))


def _span(cls: type[Settings], name: str, given: Mapping[str, Any], where: str) -> Span:
    def refuse(what: str, hint: str) -> ImgtoolError:
        return ImgtoolError(f"{where}: {name}: {what}", hint, USAGE)

    kind: Any = cls.model_fields[name].annotation
    if kind not in (int, float):
        raise refuse("is no number, so it has no range", f"write {name} = [..., ...]")
    _check_words(given, kind, refuse)
    span = Span(given["low"], given["high"], kind is int, given.get("log", False), given.get("step", 0))
    _check_order(span, "step" in given, refuse)
    _check_multiples(span, cls.model_fields[name], refuse)
    for value in (span.low, span.high):
        check(cls, {name: value}, where)
    return span


def _check_words(given: Mapping[str, Any], kind: type, refuse: Any) -> None:
    for word in given:
        if word not in WORDS:
            raise refuse(f"unknown key {word}", did_you_mean(word, WORDS))
    for word in ("low", "high"):
        if word not in given:
            raise refuse(f"{word} is missing", "write {low = ..., high = ...}")
    for word in ("low", "high", "step"):
        _check_number(given.get(word, 1), kind, refuse, word)
    if not isinstance(given.get("log", False), bool):
        raise refuse("log is true or false", "true draws the number by its logarithm")


def _check_number(value: Any, kind: type, refuse: Any, word: str) -> None:
    numbers = int if kind is int else int | float
    if isinstance(value, bool) or not isinstance(value, numbers) or not math.isfinite(value):
        raise refuse(f"{word} is {value!r}", f"give a {'whole ' * (kind is int)}number")


def _check_order(span: Span, stepped: bool, refuse: Any) -> None:
    if span.low >= span.high:
        raise refuse(f"low {span.low:g} is not below high {span.high:g}", "a range has two ends")
    if stepped and not 0 < span.step <= span.high - span.low:
        raise refuse(f"step {span.step:g} does not fit between low and high", "give a smaller step above 0")
    if span.log and span.low <= 0:
        raise refuse(f"log needs a low above 0, not {span.low:g}", "leave out log, or raise low")
    if span.log and stepped:
        raise refuse("log and step exclude each other", "leave out one of them, or give a list of choices")


def _check_multiples(span: Span, info: FieldInfo, refuse: Any) -> None:
    """Refuse ranges that hold what the setting's own multiple leaves out."""
    for each in info.metadata:
        of = getattr(each, "multiple_of", None)
        if of and (not span.step or span.step % of or span.low % of):
            raise refuse(f"must be a multiple of {of}", f"give step = {of} and a low that is one")


def to_toml(space: Space, engine: str) -> str:
    """Write a space as ``read`` takes it."""
    import tomli_w

    table = {
        name: list(each.values) if isinstance(each, Choice) else _written(each)
        for name, each in space.items()
    }
    return tomli_w.dumps({"search": {engine: table}})


def _written(span: Span) -> dict[str, Any]:
    kind = int if span.whole else float
    found: dict[str, Any] = {"low": kind(span.low), "high": kind(span.high)}
    return found | ({"log": True} if span.log else {}) | ({"step": kind(span.step)} if span.step else {})


def in_words(space: Space) -> dict[str, str]:
    """Return each name's values in words."""
    return {
        name: ", ".join(map(str, each.values))
        if isinstance(each, Choice)
        else f"{each.low:g} to {each.high:g}"
        + " by its logarithm" * each.log
        + (f" in steps of {each.step:g}" if each.step else "")
        for name, each in space.items()
    }
