"""What an exported file says of itself, within it and in the JSON beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imgtool
from imgtool import files, header
from imgtool.loading import EXPORTED
from imgtool.port import axis_of, length

if TYPE_CHECKING:
    from imgtool.engine import Engine
    from imgtool.port import Port, Slot

BESIDE = "imgtool.export/1"
"""Version of the JSON beside a file."""
SUFFIX = ".json"
"""Is put behind the file's whole name."""


def about(
    engine: Engine,
    weights: header.Weights,
    port: Port,
    precision: str,
    sizes: Mapping[str, int | None],
    channels_last: bool,
) -> dict[str, Any]:
    """Return what a file holds of itself: enough to run it as this engine.

    Shapes are those of the network, ``(B, C, H, W)``; where ``layout`` is "NHWC" the file's own tensors have
    their channels last.

    Args:
        engine: The engine.
        weights: What the network was filled with.
        port: What the file holds.
        precision: Of the numbers in it.
        sizes: Length of every axis, None where it is free.
        channels_last: Whether pictures have their channels last in the file.
    """

    def told(slots: Sequence[Slot]) -> list[dict[str, Any]]:
        return [_slot(slot, sizes, channels_last) for slot in slots]

    return {
        "format": EXPORTED,
        "engine": engine.name,
        "model": dict(weights.model),
        "weights": weights.name,
        "weights_sha256": header.digest(weights.state),
        "imgtool": imgtool.__version__,
        "licence": weights.header.get("licence"),
        "trained_on": weights.header.get("data"),
        "precision": precision,
        "inputs": told(port.inputs),
        "outputs": told(port.outputs),
        "facts": dict(port.facts),
    }


def _slot(slot: Slot, sizes: Mapping[str, int | None], channels_last: bool) -> dict[str, Any]:
    fixed = {axis: size for axis, size in sizes.items() if size is not None}
    shape = [length(word, fixed) if axis_of(word) in {"", *fixed} else word for word in slot.shape]
    told: dict[str, Any] = {"name": slot.name, "shape": shape, "dtype": "float32"}
    if slot.picture:
        told["layout"] = "NHWC" if channels_last else "NCHW"
    return told | {"low": slot.low, "high": slot.high, "meaning": slot.meaning}


def beside(
    path: Path, told: Mapping[str, Any], port: Port, written: Mapping[str, Any], parity: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the JSON beside a file says: all of ``about``, steps before and after, and the comparison.

    Args:
        path: The file.
        told: What ``about`` gave.
        port: What the file holds.
        written: What its writer told.
        parity: What the comparison found.
    """
    data = files.read(path)
    axes = {
        name: {"multiple_of": axis.multiple, "least": axis.least}
        for name, axis in port.axes.items()
        if any(name in str(word) for slot in told["inputs"] for word in slot["shape"])
    }
    return {
        **told,
        "schema": BESIDE,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "axes": axes,
        "before": port.before,
        "after": port.after,
        **written,
        "parity": dict(parity),
    }


def text(record: Mapping[str, Any]) -> bytes:
    """Return a record as JSON for people."""
    from imgtool.console import plain

    return (json.dumps(plain(record), indent=2, ensure_ascii=False) + "\n").encode()
