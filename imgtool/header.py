"""Weights files as NumPy arrays, and what they say of themselves: all of a checkpoint that needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgtool import files
from imgtool.errors import USAGE, ImgtoolError, did_you_mean

SHIPPED = Path(__file__).with_name("weights")
FORMAT = "imgtool-weights/1"


@dataclass(frozen=True)
class Weights:
    """A weights file, read.

    Attributes:
        name: Stem of the file, for messages and results.
        engine: Engine that it belongs to.
        model: Settings that shape the network.
        header: Everything the file says of itself: scores, training, licence, version.
        state: Parameters by name, float32: arrays here, tensors from ``checkpoint``.
    """

    name: str
    engine: str
    model: Mapping[str, Any]
    header: Mapping[str, Any]
    state: Mapping[str, Any]


def shipped() -> list[str]:
    """Return the names of the weights that ship with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def find(name: str, engine: str = "") -> Path:
    """Return the path of a weights file: a file as it is named, or the name of shipped weights.

    Args:
        name: The path, or the name; "sobel_3" does for "filter-sobel_3".
        engine: Where given, names of its shipped weights may leave it out.

    Raises:
        ImgtoolError: Code 2, where there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    for full in (name, f"{engine}-{name}"):
        if (SHIPPED / f"{full}.safetensors").is_file():
            return SHIPPED / f"{full}.safetensors"
    hint = did_you_mean(name, shipped()) if shipped() else "give the path of a .safetensors file"
    raise ImgtoolError(f"no weights file or shipped weights named {name}", hint, USAGE)


def _content(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return the header and the parameters of a safetensors file.

    The format is eight bytes of length, that much JSON, and the numbers. It is read here and not by its
    library: that would add 1.6 MB to a process whose memory is counted.
    """
    data = files.read(path)
    try:
        length = int.from_bytes(data[:8], "little")
        if length > len(data) - 8:
            raise ValueError("its header is cut short")
        told = json.loads(data[8 : 8 + length])
        header = json.loads(told.pop("__metadata__", {}).get("imgtool", "{}"))
        body = memoryview(data)[8 + length :]
        return header, {name: _array(body, **each) for name, each in told.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ImgtoolError(
            f"{path} is not a readable weights file: {fault}",
            "give a .safetensors file made by imgtool train",
        ) from None


def _array(body: memoryview, dtype: str, shape: Sequence[int], data_offsets: Sequence[int]) -> Any:
    import numpy as np

    kinds = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I64": np.int64}
    if dtype not in kinds:
        raise ValueError(f"numbers of the kind {dtype}")
    begin, end = data_offsets
    if not 0 <= begin <= end <= len(body):
        raise ValueError("it is cut short")
    return np.frombuffer(body[begin:end], kinds[dtype]).reshape(shape).astype(np.float32)


def digest(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of parameters: their names and float32 values, by name."""
    import hashlib

    import numpy as np

    found = hashlib.sha256()
    for name, values in sorted(state.items()):
        found.update(name.encode() + np.ascontiguousarray(values, np.float32).tobytes())
    return found.hexdigest()


def read(path: Path, engine: str) -> Weights:
    """Read a weights file without running code from it.

    Raises:
        ImgtoolError: Code 1, when it is damaged or not ours; code 2, when it is another engine's.
    """
    header, state = _content(path)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ImgtoolError(
            f"{path} was not written by imgtool", "give a .safetensors file made by imgtool train"
        )
    if not isinstance(header.get("engine"), str) or not isinstance(header.get("model"), dict):
        raise ImgtoolError(f"{path} is damaged: its header is incomplete", "take another copy of it")
    if header["engine"] != engine:
        raise ImgtoolError(
            f"{path} holds weights of the {header['engine']} engine, not of {engine}",
            f"use it with: imgtool infer {header['engine']} --weights {path}",
            USAGE,
        )
    return Weights(path.stem, header["engine"], header["model"], header, state)
