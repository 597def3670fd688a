"""A network ready to be applied: weights by torch, or an exported file by its runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from imgtool.engine import Engine
from imgtool.errors import USAGE, ImgtoolError
from imgtool.port import length
from imgtool.settings import Infer

if TYPE_CHECKING:
    from imgtool.engine import Pixels
    from imgtool.runtime import Loaded, Value

Shape = tuple[int | str, ...]

EXPORTED = "imgtool-export/1"
"""What an exported file says that it is."""
AGAIN = "export the network again"


class Facts(BaseModel):
    """Base of what an engine reads of ``Port.facts`` in a file, which may say anything."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, defer_build=True)


F = TypeVar("F", bound=Facts)


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


def facts(path: Path, about: Mapping[str, Any], kind: type[F]) -> F:
    """Return what a file says of the network in it.

    Args:
        path: The file.
        about: All that it says of itself.
        kind: What the engine reads of it.

    Raises:
        ImgtoolError: It says too little, or what cannot be.
    """
    try:
        return kind.model_validate(about.get("facts"))
    except ValidationError as found:
        fault = found.errors()[0]
        name = ".".join(["facts", *map(str, fault["loc"])])
        what = f"{path} does not say how it may be used: {name}: {fault['msg']}"
        raise ImgtoolError(what, AGAIN) from None


def checked(
    loaded: Loaded, inputs: Sequence[Shape], outputs: Sequence[Shape]
) -> Callable[..., Sequence[Pixels]]:
    """Return what runs a file, if its inputs and outputs are those of an engine.

    Args:
        loaded: The file.
        inputs: Shapes of what the engine gives it: lengths, and words for those that differ.
        outputs: Shapes of what the engine takes of it: words are those of the inputs, also as "2*height".

    Returns:
        A function like the file, whose outputs have the lengths that the inputs ask for, and are finite.
        It raises ``ImgtoolError`` where they have not.

    Raises:
        ImgtoolError: The file has others.
    """
    for key, wanted, found in (("input", inputs, loaded.inputs), ("output", outputs, loaded.outputs)):
        if len(wanted) != len(found):
            raise ImgtoolError(f"{loaded.path} has {len(found)} {key}s, not {len(wanted)}", AGAIN)
        for shape, value in zip(wanted, found, strict=True):
            _check_shape(loaded.path, key, shape, value)

    def run(*arrays: Pixels) -> Sequence[Pixels]:
        """Return the file's outputs; see ``checked``."""
        known = {
            word: size
            for shape, array in zip(inputs, arrays, strict=True)
            for word, size in zip(shape, array.shape, strict=True)
            if isinstance(word, str)
        }
        found = loaded(*arrays)
        for shape, out in zip(outputs, found, strict=True):
            _check_output(loaded.path, tuple(length(word, known) for word in shape), out)
        return found

    return run


def _check_shape(path: Path, key: str, wanted: Shape, value: Value) -> None:
    """Refuse an input or output of another number of axes, or of another length where that is fixed."""
    pairs = zip(wanted, value.shape, strict=False)
    fits = all(isinstance(own, str) or given in (None, own) for own, given in pairs)
    if len(wanted) == len(value.shape) and fits:
        return
    given = "×".join("any" if each is None else str(each) for each in value.shape) or "one number"
    what = f"{path} has an {key} of {given}, where the network's is {'×'.join(map(str, wanted))}"
    raise ImgtoolError(what, AGAIN)


def _check_output(path: Path, wanted: tuple[int, ...], out: Pixels) -> None:
    import numpy as np

    if out.shape != wanted:
        shapes = ("×".join(map(str, each)) for each in (out.shape, wanted))
        raise ImgtoolError("{} gives {}, not {}".format(path, *shapes), AGAIN)
    if not np.isfinite(out).all():
        raise ImgtoolError(
            f"{path}: the network's output is not finite", "its weights are damaged: take others"
        )
