"""The verb ``data``: what an engine offers to make, check and show data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from imgtool import summary
from imgtool.engine import Engine, Watch, later
from imgtool.errors import DONE, FAILED
from imgtool.settings import Data, Settings

if TYPE_CHECKING:
    from imgtool.console import Console

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
    lines = [text] if isinstance(text, str) else list(summary.lines(shown))
    lines += [f"fault: {fault}" for fault in faults] if isinstance(faults, list) else []
    console.result(record, "\n".join(lines))
    for warning in warnings:
        console.warn(warning)
    return FAILED if faults else DONE
