"""Records in lines for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

WIDEST = 60
"""Letters of a list that stays on one line."""


def lines(record: Mapping[str, object], indent: str = "") -> Iterator[str]:
    """Yield a record for people: a line for each value, what is within another indented."""
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}:"
            yield from lines(value, indent + "  ")
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
    yield from lines({name: record[name] for name in others}, indent + "  ")


def _word(value: object) -> str:
    """Return a value in a word, numbers with four digits or all before the point; a list has spaces."""
    if isinstance(value, list | tuple):
        return " ".join(map(_word, value))
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"
    return "none" if value is None or value == {} else str(value)
