"""The verb ``data``: what an engine offers to make, check and show data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from imgtool.engine import Engine, Watch, later
from imgtool.errors import DONE, FAILED
from imgtool.settings import Data, Settings

if TYPE_CHECKING:
    from imgtool.console import Console

WIDEST = 60
"""Letters of a list that stays on one line."""
ACTIONS: Mapping[str, Callable[..., Mapping[str, object]]] = {
    "fetch": later("imgtool.buckets.fetch", "action")
}
"""What belongs to no engine."""


def plan(engine: Engine | None, action: str, settings: Settings) -> Mapping[str, object]:
    """Return what ``--dry-run`` tells."""
    out = getattr(settings, "out", None)
    return {"action": _words(engine, action, settings)} | ({"output": str(out)} if out else {})


def _words(engine: Engine | None, action: str, settings: Settings) -> str:
    """Return the words that were typed: an action that stands alone needs no engine's name."""
    return f"{action} {engine.name}" if engine and not getattr(settings, "alone", False) else action


def run(engine: Engine | None, action: str, settings: Settings, console: Console) -> int:
    """Run one action; its record is the result, its warnings are said, any fault means exit code 1."""
    if isinstance(settings, Data):
        from imgtool import compute

        compute.use_threads(settings.threads)
    work: Any = engine.actions[action] if engine else ACTIONS[action]
    with console.counted(f"data {_words(engine, action, settings)}") as done:
        record = work(settings, Watch(done, console.say))
    faults, warnings = record.get("faults"), record.get("warnings", ())
    text = record.get("text")  # the same, as people like to read it
    record = {name: value for name, value in record.items() if name != "text"}
    shown = {name: value for name, value in record.items() if name not in ("faults", "warnings")}
    lines = [text] if isinstance(text, str) else list(_lines(shown))
    lines += [f"fault: {fault}" for fault in faults] if isinstance(faults, list) else []
    console.result(record, "\n".join(lines))
    for warning in warnings:
        console.warn(warning)
    return FAILED if faults else DONE


def _lines(record: Mapping[str, object], indent: str = "") -> Iterator[str]:
    """Yield a record for people: a line for each value, what is within another indented."""
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
            yield f"{indent}{name}:"
            for each in value:
                yield from _entry(each, indent + "  ")
        elif isinstance(value, list | tuple):
            words = [_word(each) for each in value]
            long = len(", ".join(words)) > WIDEST
            yield f"{indent}{name}:" if long else f"{indent}{name}: {', '.join(words) or 'none'}"
            yield from (f"{indent}  {word}" for word in words if long)
        else:
            yield f"{indent}{name}: {_word(value)}"


def _entry(record: Mapping[str, object], indent: str) -> Iterator[str]:
    """Yield a record of a list: its first value, and the others below it."""
    first, *others = record
    yield f"{indent}{_word(record[first])}:"
    yield from _lines({name: record[name] for name in others}, indent + "  ")


def _word(value: object) -> str:
    """Return a value in a word, numbers with four digits or all before the point; a list has spaces."""
    if isinstance(value, list | tuple):
        return " ".join(map(_word, value))
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"
    return "none" if value is None or value == {} else str(value)
