"""Weights that describe themselves, and the state of a run that can be taken up again."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

import imgtool
from imgtool import header
from imgtool.engine import Engine
from imgtool.errors import USAGE, ImgtoolError
from imgtool.files import read, write
from imgtool.header import FORMAT, SHIPPED, Weights, find, shipped
from imgtool.settings import Settings
from imgtool.settings.sources import make

__all__ = [
    "SHIPPED",
    "Weights",
    "find",
    "load_state",
    "network",
    "read_state",
    "read_weights",
    "save_state",
    "save_weights",
    "ship",
    "shipped",
]

LONGEST = 160
"""Letters of what torch says that are passed on: it may list every parameter."""


def save_weights(
    path: Path,
    engine: Engine,
    settings: Settings,
    state: Mapping[str, Tensor],
    about: Mapping[str, Any],
    *,
    half: bool = False,
) -> None:
    """Write a safetensors file with a header that is enough to rebuild the network.

    Args:
        path: Where to; written whole or not at all.
        engine: The engine.
        settings: Settings of the run; those of panel "Model" rebuild the network.
        state: ``state_dict`` of the network.
        about: What else the header says: scores, step, training data, licence.
        half: Store float16 instead of float32.
    """
    dtype = torch.float16 if half else torch.float32
    tensors = {name: value.detach().cpu().to(dtype).contiguous() for name, value in state.items()}
    told = {
        "format": FORMAT,
        "engine": engine.name,
        "model": {name: getattr(settings, name) for name in engine.model.model_fields},
        "imgtool": imgtool.__version__,
        **about,
    }
    write(path, serialise(tensors, metadata={"imgtool": json.dumps(told)}))


def relabel(path: Path, about: Mapping[str, Any]) -> None:
    """Lay ``about`` over what a weights file of ours says of itself; the parameters stay as they are.

    Raises:
        ImgtoolError: As ``files.write``.
    """
    with safe_open(path, "pt") as opened:
        header = json.loads((opened.metadata() or {})["imgtool"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    write(path, serialise(tensors, metadata={"imgtool": json.dumps(header | dict(about))}))


def ship(source: Path, target: Path, engine: Engine, about: Mapping[str, Any]) -> None:
    """Make weights ready to be handed on: float16, with ``about`` (data, licence, ...) in the header.

    Args:
        source: Weights of a run.
        target: The file to write.
        engine: The engine they are of.
        about: Laid over what the header says.
    """
    weights = read_weights(source, engine.name)
    fixed = ("format", "engine", "model", "imgtool")
    told = {name: value for name, value in weights.header.items() if name not in fixed}
    settings = make(engine.model, weights.model, f"weights {weights.name}")
    save_weights(target, engine, settings, weights.state, told | dict(about), half=True)


def read_weights(path: Path, engine: str) -> Weights:
    """Read a weights file as tensors; see ``header.read`` for the errors."""
    weights = header.read(path, engine)
    return replace(weights, state={name: torch.from_numpy(array) for name, array in weights.state.items()})


def network(engine: Engine, weights: Weights) -> nn.Module:
    """Build the network that weights belong to and fill it; it comes in evaluation mode.

    Raises:
        ImgtoolError: Code 1, when its settings are unknown here or the parameters do not fit.
    """
    settings = make(engine.model, weights.model, f"weights {weights.name}")
    net = engine.build(settings)
    load_state(net, weights)
    return net.eval()


def load_state(net: nn.Module, weights: Weights) -> None:
    """Fill a network; names and shapes must fit exactly."""
    try:
        net.load_state_dict(dict(weights.state))
    except RuntimeError as fault:
        first = str(fault).splitlines()[1].strip() if "\n" in str(fault) else str(fault)
        first = first if len(first) <= LONGEST else first[:LONGEST] + " ..."
        raise ImgtoolError(
            f"weights {weights.name} do not fit the network: {first}",
            "train again, or use the imgtool version that wrote them",
        ) from None


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run, whole or not at all.

    Raises:
        ImgtoolError: As ``files.write``: the disk is full, ...
    """
    buffer = io.BytesIO()  # writing itself, torch would turn a full disk into a fault without a number
    torch.save(dict(state), buffer)
    write(path, buffer.getvalue())


def read_state(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Read the state of a run without running code from it.

    Args:
        path: The file.
        names: What the state must hold.

    Raises:
        ImgtoolError: Code 2, when there is none; code 1, when it is damaged.
    """
    if not path.is_file():
        raise ImgtoolError(
            f"no run to resume in {path.parent}", f"{path.name} is missing: name the folder of a run", USAGE
        )
    data = read(path)
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        lacking = [name for name in names if name not in state]
    except Exception as fault:  # noqa: BLE001 - torch raises whatever the unpickler met
        raise ImgtoolError(f"{path} is damaged ({type(fault).__name__})", "start the run again") from None
    if lacking:
        raise ImgtoolError(f"{path} is no state of a run: it lacks {lacking[0]}", "start the run again")
    return state
