"""Rows of CSV, of JSON and of one JSON object a line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imgtool.engines.lens.formats.frame import FIELDS, Frame, believed, number
from imgtool.engines.lens.geometry import HALF_DIAGONAL, BrownConrady
from imgtool.errors import ImgtoolError

COLUMNS = (
    "file",
    "width",
    "height",
    "k1",
    "k2",
    "p1",
    "p2",
    "corner_percent",
    "confidence",
    "method",
    "zoom",
)
"""Header of coefficients.csv; further columns may follow."""


def read_csv(text: str, name: str, frame: Frame) -> BrownConrady:
    """Return the model of a photo's row of a CSV file."""
    try:
        rows = list(csv.DictReader(io.StringIO(text), skipinitialspace=True))
    except csv.Error as fault:
        raise ImgtoolError(f"damaged: {fault}") from None
    return _row_model(_of_name(rows, name), frame)


def read_json(text: str, name: str, frame: Frame) -> BrownConrady:
    """Return the model of JSON: an object, or a photo's of a list or of one object a line."""
    try:
        found = json.loads(text)
    except ValueError:  # perhaps one object a line
        found = [_object(line) for line in text.splitlines() if line.strip()]
    except RecursionError:
        raise ImgtoolError("damaged: nested too deeply") from None
    rows = found if isinstance(found, list) else [found]
    if not all(isinstance(row, dict) for row in rows):
        raise ImgtoolError("it is not an object with k1, k2, p1, p2")
    return _row_model(_of_name(rows, name), frame)


def write_json(model: BrownConrady, width: int, height: int, facts: Mapping[str, object]) -> bytes:
    """Return a JSON object of the model, the size and all facts."""
    record = {"normalisation": HALF_DIAGONAL, "width": width, "height": height, **asdict(model)}
    return (json.dumps({**facts, **record}, indent=2, ensure_ascii=False, default=str) + "\n").encode()


def _object(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise ImgtoolError("damaged: it is not JSON") from None


def _of_name(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """Return the row of a photo: the one of its path, else of its bare name, else the only one."""
    if not rows:
        raise ImgtoolError("it has no coefficients")
    if len(rows) == 1:
        return rows[0]
    for same in (str, lambda text: Path(text).name):
        found = [row for row in rows if name and same(str(row.get("file") or "")) == same(name)]
        if len({json.dumps([row.get(field) for field in FIELDS]) for row in found}) == 1:
            return found[0]
    about = f"not one for {name}" if name else "none of them named"
    raise ImgtoolError(f"it has {len(rows)} rows, {about}", "the column file must name the photo")


def _row_model(row: Mapping[str, Any], frame: Frame) -> BrownConrady:
    """Return the model of a row of coefficients.csv, of labels.jsonl or of a JSON file."""
    missing = [name for name in ("k1", "k2", "p1", "p2") if row.get(name) in (None, "")]
    if missing:
        raise ImgtoolError(
            f"it has no {', '.join(missing)}", f"coefficients.csv begins with {','.join(COLUMNS)}"
        )
    if row.get("normalisation", HALF_DIAGONAL) != HALF_DIAGONAL:
        raise ImgtoolError(
            f"its normalisation {row['normalisation']!r} is unknown", f"it must be {HALF_DIAGONAL}"
        )
    given = {name: number(row[name], name) for name in FIELDS if row.get(name) not in (None, "")}
    sides = [int(number(row.get(name) or 0, name)) for name in ("width", "height")]
    width, height = sides if min(sides) > 0 else (frame.width, frame.height)
    return frame.fitted(believed(BrownConrady(**given)), width, height)
