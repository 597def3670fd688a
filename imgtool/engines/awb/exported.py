"""Exported files as networks, run by their runtimes or by NumPy, never by torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgtool import files, header, runtime
from imgtool.engines.awb import estimate, features
from imgtool.engines.awb.settings import Model
from imgtool.errors import DONE, ImgtoolError
from imgtool.loading import Shape, check_exported, checked
from imgtool.settings.sources import make

if TYPE_CHECKING:
    from imgtool.engines.awb.estimate import Net

Array = npt.NDArray[Any]

INPUTS = {"hist": ("histograms", "place", "side", "log_prior"), "deepawb": ("picture",)}
"""Names of a network's inputs."""

_AGAIN = "export it with imgtool export awb"


def opened(path: Path) -> Net:
    """Open an exported file as a network.

    Raises:
        ImgtoolError: As ``runtime.open`` and ``ported``.
    """
    return _archive(path) if path.suffix.lower() == ".npz" else ported(runtime.open(path))


def _shapes(shape: Model) -> tuple[list[Shape], list[Shape]]:
    """Return the shapes of a network's inputs and outputs."""
    if shape.arch == "deepawb":
        return [(1, 3, shape.height, shape.width)], [(1, 2)]
    maps = (1, features.MAPS, features.BINS, features.BINS)
    return [maps, (1, "lights", 2), (1, "lights", 3), (1, "lights")], [(1, "lights")]


def ported(model: runtime.Loaded, settings: Any = None) -> Net:
    """Return an exported file that a runtime runs as a network.

    Raises:
        ImgtoolError: Code 2 where it is of another engine. Code 1 where imgtool did not export it, or it
            takes or gives something else, such as the model for libcamera.
    """
    shape = _shape(model.path, model.about)
    if tuple(value.name for value in model.inputs) != INPUTS[shape.arch]:
        what = f"{model.path} is a model for libcamera, which computes colour temperatures alone"
        raise ImgtoolError(what, "libcamera loads it by the tuning beside it; infer takes --to tflite")

    whole = checked(model, *_shapes(shape))

    def run(*given: Array) -> Array:
        out: Array = whole(*(each[None] for each in given))[0][0]
        return out

    return estimate.Net(shape, run)


def archived(about: Mapping[str, Any], arrays: Mapping[str, Array]) -> Callable[..., list[Array]]:
    """Return what runs an archive's parameters on batches.

    Args:
        about: What the archive says of itself.
        arrays: Its parameters by name.
    """
    net = estimate.of_state(make(Model, about["model"], "the archive"), arrays)

    def run(*given: Array) -> list[Array]:
        return [np.stack([net.run(*one) for one in zip(*given, strict=True)])]

    return run


_DAMAGED = (
    ValueError, OSError, EOFError, TypeError, KeyError, NotImplementedError, RecursionError, MemoryError
)  # fmt: skip
"""What NumPy, zipfile and json raise of archives that are none."""


def _archive(path: Path) -> Net:
    import io
    import zipfile

    try:
        with np.load(io.BytesIO(files.read(path)), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        about = json.loads(arrays.pop("imgtool", np.zeros(0, np.uint8)).tobytes() or b"{}")
        state = {name: values.astype(np.float32, casting="same_kind") for name, values in arrays.items()}
    except (*_DAMAGED, zipfile.BadZipFile):
        raise ImgtoolError(f"{path} is not a readable archive", _AGAIN) from None
    return estimate.of_state(_shape(path, about if isinstance(about, dict) else {}), state, str(path))


def _shape(path: Path, about: Mapping[str, Any]) -> Model:
    """Return the settings of the network that a file says it holds."""
    check_exported(path, about, "awb")
    model = about.get("model")
    if not isinstance(model, dict):
        raise ImgtoolError(f"{path} is damaged: it does not say what network it holds", _AGAIN)
    return make(Model, model, str(path))


def of_weights(path: Path, kind: str) -> runtime.Loaded:
    """Open the exported file of weights: the one beside them, or else one in the cache, made where it lacks.

    Args:
        path: The weights.
        kind: "onnx" or "tflite".

    Raises:
        ImgtoolError: Code 2: what runs it is not installed. Code 1: the file beside the weights is of other
            weights, or it cannot be made.
    """
    runtime.require(kind)
    weights = header.read(path, "awb")
    beside = path.with_suffix(f".{kind}")
    if beside.is_file():
        found = runtime.open(beside)
        if not _is_of(found, weights):
            what = f"{beside} was not made from the weights {path}"
            raise ImgtoolError(what, "remove it: it is then made again where it is needed")
        return found
    cached = files.cache_folder() / "awb" / f"{header.digest(weights.state)[:24]}.{kind}"
    if not (cached.is_file() and _is_of(runtime.open(cached), weights)):
        _export(path, kind, cached)
    return runtime.open(cached)


def _is_of(found: runtime.Loaded, weights: header.Weights) -> bool:
    """Tell whether a file was made from weights."""
    shape = make(Model, weights.model, f"weights {weights.name}")
    same = found.about.get("weights_sha256") == header.digest(weights.state)
    return same and _shape(found.path, found.about) == shape


def _export(path: Path, kind: str, target: Path) -> None:
    """Export weights in a process of its own: what does it is large, and talks."""
    import subprocess
    import sys

    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "imgtool", "export", "awb", "--to", kind, "--weights", str(path)]
    command += ["-o", str(target), "--force", "--json", "--quiet"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode == DONE:
        return
    try:
        said = json.loads(child.stdout.splitlines()[-1])
        fault = ImgtoolError(said["error"], said["hint"], child.returncode)
    except (IndexError, ValueError, KeyError):  # a bug, so all of it is shown
        raise RuntimeError(f"exporting {path} to {kind} failed:\n{child.stderr}") from None
    raise fault
