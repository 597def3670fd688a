"""An exported file as the runtime opens it, but run by torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from imgtool.port import Port


def filed(port: Port, channels: int, *size: int, about: Mapping[str, Any] | None = None) -> Any:
    """Return the file of a network from RGB to some channels: of fixed size where one is given."""
    shape = (1, 3, *size) if size else (None, 3, None, None)

    @torch.inference_mode()
    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        assert len(arrays) == 1
        assert arrays[0].dtype == np.float32
        assert arrays[0].flags.c_contiguous
        assert all(own in (None, got) for own, got in zip(shape, arrays[0].shape, strict=True))
        return [port.module(torch.from_numpy(arrays[0])).numpy()]

    class Loaded(SimpleNamespace):
        __call__: Callable[..., Any] = staticmethod(run)

    said = {"facts": json.loads(json.dumps(dict(port.facts)))} if about is None else about
    out = (shape[0], channels, *shape[2:])
    ends = {"inputs": (SimpleNamespace(shape=shape),), "outputs": (SimpleNamespace(shape=out),)}
    return Loaded(path=Path("x.onnx"), about=said, **ends)
