"""The verb ``data``: what an engine offers to make, check and show data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from imgtool import compute
from imgtool.engine import Engine, Watch
from imgtool.errors import DONE, FAILED
from imgtool.settings import Data

if TYPE_CHECKING:
    from imgtool.console import Console


def plan(engine: Engine, action: str, settings: Data) -> Mapping[str, object]:
    """Return what ``--dry-run`` tells."""
    out = getattr(settings, "out", None)
    return {"action": f"{action} {engine.name}"} | ({"output": str(out)} if out else {})


def run(engine: Engine, action: str, settings: Data, console: Console) -> int:
    """Run one action; its record is the result, and any fault in it means exit code 1."""
    compute.use_threads(settings.threads)
    with console.progress(100, f"data {action} {engine.name}") as bar:
        percent = 0

        def done(finished: int, total: int) -> None:
            nonlocal percent
            now = 100 * finished // total
            bar.advance(now - percent)
            bar.update(f"{finished}/{total}")
            percent = now

        record = engine.actions[action](settings, Watch(done, console.say))
    faults = record.get("faults")
    lines = [f"{name}: {value}" for name, value in record.items() if name != "faults"]
    lines += [f"fault: {fault}" for fault in faults] if isinstance(faults, list) else []
    console.result(record, "\n".join(lines))
    return FAILED if faults else DONE
