"""Exported models run without torch: ONNX files by onnxruntime, TFLite files by LiteRT.

Both run on one thread and never wait busily for work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from imgtool import files
from imgtool.errors import USAGE, ImgtoolError

Array = npt.NDArray[Any]
Run = Callable[[Array], Array]
Kind = Literal["onnx", "tflite"]

PACKAGES = {
    "onnx": ("onnxruntime", "onnxruntime"),
    "tflite": ("ai_edge_litert", "'imgtool[tflite-runtime]'"),
}
"""Kind of file to the module that runs it, and to what pip installs it by."""


def installed(kind: str) -> bool:
    """Tell whether what runs files of a kind is installed."""
    return find_spec(PACKAGES[kind][0]) is not None


def require(kind: str) -> None:
    """Refuse a kind of file that nothing installed can run.

    Raises:
        ImgtoolError: Code 2, naming what to install.
    """
    if not installed(kind):
        module, package = PACKAGES[kind]
        raise ImgtoolError(
            f"running {kind} files needs {module}, which is not installed",
            f"pip install {package}",
            USAGE,
        )


def load(path: Path, kind: str) -> Run:
    """Load an exported model of one input and one output.

    Args:
        path: The file.
        kind: "onnx" or "tflite".

    Returns:
        A function from the input to the output; both float32, their shapes the file's.
        It raises ``ImgtoolError`` for an input of another shape.

    Raises:
        ImgtoolError: Code 2: what runs it is not installed, or there is no such file. Code 1: it is no
            such model, or has other than one input and one output.
    """
    require(kind)
    data = files.read(path)
    shape, run = _onnx(path, data) if kind == "onnx" else _tflite(path, data)

    def checked(x: Array) -> Array:
        if x.shape != shape:
            given, wanted = ("×".join(map(str, each)) for each in (x.shape, shape))
            raise ImgtoolError(f"{path} takes an input of {wanted}, not of {given}", _AGAIN)
        return run(np.ascontiguousarray(x, np.float32))

    return checked


_AGAIN = "export the network again, or take --runtime numpy"


def _no_model(path: Path, kind: str) -> ImgtoolError:
    return ImgtoolError(f"{path} is not a model that can be run as {kind}", _AGAIN)


def _one(path: Path, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    if len(inputs) != 1 or len(outputs) != 1:
        what = f"{path} has {len(inputs)} inputs and {len(outputs)} outputs, not one of each"
        raise ImgtoolError(what, _AGAIN)


def _onnx(path: Path, data: bytes) -> tuple[tuple[int, ...], Run]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    for pool in ("intra_op", "inter_op"):
        options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 - onnxruntime's own exceptions have no common base
        raise _no_model(path, "onnx") from None
    _one(path, session.get_inputs(), session.get_outputs())
    name = session.get_inputs()[0].name

    def run(x: Array) -> Array:
        out: Array = session.run(None, {name: x})[0]
        return out

    return tuple(session.get_inputs()[0].shape), run


@contextmanager
def _silence() -> Iterator[None]:
    """Keep from standard error what native code writes there, such as which delegate it has created."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _tflite(path: Path, data: bytes) -> tuple[tuple[int, ...], Run]:
    from ai_edge_litert.interpreter import Interpreter

    try:
        with _silence():
            interpreter = Interpreter(model_content=data, num_threads=1)
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError):
        raise _no_model(path, "tflite") from None
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    _one(path, inputs, outputs)
    place, end = inputs[0]["index"], outputs[0]["index"]

    def run(x: Array) -> Array:
        interpreter.set_tensor(place, x)
        interpreter.invoke()
        out: Array = interpreter.get_tensor(end)
        return out

    return tuple(int(size) for size in inputs[0]["shape"]), run
