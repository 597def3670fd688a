"""A network ready to be applied: weights by torch, or an exported file by its runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from imgtool.engine import Engine
from imgtool.errors import USAGE, ImgtoolError
from imgtool.settings import Infer

EXPORTED = "imgtool-export/1"
"""What an exported file says that it is."""


def network(engine: Engine, path: Path, settings: Infer, say: Callable[[str], None]) -> Any:
    """Return what ``engine.apply`` takes.

    Args:
        engine: The engine.
        path: Weights, or a file that ``imgtool export`` wrote.
        settings: Of ``infer``.
        say: Told what a user should know.

    Raises:
        ImgtoolError: Code 2: the file is of another engine, the engine takes none, the device or what runs
            it is not there. Code 1: it is damaged, or imgtool did not write it.
    """
    if engine.prepare:
        return engine.prepare(path, settings)
    from imgtool import checkpoint, compute, runtime

    threads = compute.use_threads(settings.threads)
    if not runtime.kind_of(path):
        net = checkpoint.network(engine, checkpoint.read_weights(path, engine.name))
        return compute.channels_last(net.to(compute.device(settings.device)))
    if engine.ported is None:
        what = f"infer {engine.name} takes no exported files"
        raise ImgtoolError(what, "give a .safetensors file made by imgtool train", USAGE)
    loaded = runtime.open(path, threads)
    check_exported(path, loaded.about, engine.name)
    if settings.device not in ("auto", "cpu"):
        say(f"{path.name} runs on the CPU: --device {settings.device} is of no account")
    return engine.ported(loaded, settings)


def check_exported(path: Path, about: Mapping[str, Any], engine: str) -> None:
    """Refuse an exported file that is none of imgtool's, or not of this engine.

    Args:
        path: The file.
        about: What it says of itself.
        engine: Name of the engine.

    Raises:
        ImgtoolError: Code 1, or 2 for another engine's.
    """
    if about.get("format") != EXPORTED or not isinstance(about.get("engine"), str):
        raise ImgtoolError(f"{path} was not written by imgtool", f"export it with: imgtool export {engine}")
    if about["engine"] != engine:
        raise ImgtoolError(
            f"{path} holds weights of the {about['engine']} engine, not of {engine}",
            f"use it with: imgtool infer {about['engine']} --weights {path}",
            USAGE,
        )
