"""Exported files run without the code that made them.

ONNX files are run by onnxruntime, TFLite files by LiteRT, OpenVINO's by OpenVINO; the archives of
torch.export need torch and are meant for checks. Nothing is imported before a file asks for it. Nothing
waits busily for work where its runtime lets that be chosen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imgtool import files
from imgtool.errors import USAGE, ImgtoolError

Array = npt.NDArray[Any]
Run = Callable[[Array], Array]
Opener = Callable[[Path, bytes], "_Parts"]

KINDS = {".onnx": "onnx", ".tflite": "tflite", ".xml": "openvino", ".pt2": "pt2"}
"""Suffix of a file that can be run to its kind."""

PACKAGES = {
    "onnx": ("onnxruntime", "onnxruntime"),
    "tflite": ("ai_edge_litert", "'imgtool[tflite-runtime]'"),
    "openvino": ("openvino", "'imgtool[openvino]'"),
    "pt2": ("torch", "torch"),
}
"""Kind of file to the module that runs it, and to what pip installs it by."""

ABOUT = "imgtool"
"""Under which name a file keeps what it says of itself; archives add ".json"."""

_AGAIN = "export the network again"
_LONGEST = 1 << 24  # bytes of what a file says of itself
_TO_FILE, _FROM_FILE = (0, 2, 3, 1), (0, 3, 1, 2)  # (B, C, H, W) to (B, H, W, C), and back


@dataclass(frozen=True)
class Value:
    """An input or an output of a file.

    Attributes:
        name: Its name: what the file says of itself, else the runtime's.
        shape: Its lengths, None where one is free; pictures are (B, C, H, W) whatever the file stores.
        dtype: NumPy's name of the numbers that the file takes or gives.
        last: Whether the file stores the channels last.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    last: bool = False

    def fits(self, shape: Sequence[int]) -> bool:
        """Tell whether an array of this shape is one."""
        pairs = zip(self.shape, shape, strict=False)
        return len(self.shape) == len(shape) and all(own in (None, given) for own, given in pairs)


@dataclass(frozen=True)
class _Parts:
    """What a runtime tells of a file, in the file's own order and layout."""

    inputs: list[Value]
    outputs: list[Value]
    run: Callable[[list[Array]], Sequence[Array]]
    about: str | bytes | None = None


class Loaded:
    """A model file, run by its runtime.

    Attributes:
        path: The file.
        kind: "onnx", "tflite", "openvino" or "pt2".
        about: What it says of itself; empty where imgtool did not write it.
        inputs: What it takes, in the order of ``about["inputs"]``.
        outputs: What it gives, in the order of ``about["outputs"]``.
    """

    path: Path
    kind: str
    about: Mapping[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    def __init__(self, path: Path, kind: str, parts: _Parts) -> None:
        """Bring what the runtime tells into the order and the layout of what the file says of itself."""
        self.path, self.kind = path, kind
        self.about = _understood(parts.about)
        self._run = parts.run
        self.inputs, self._places = self._ordered("inputs", parts.inputs)
        self.outputs, self._ends = self._ordered("outputs", parts.outputs)

    def _ordered(self, key: str, found: list[Value]) -> tuple[tuple[Value, ...], list[int]]:
        """Return the inputs or outputs, and the place of each among those of the file."""
        known = [value.name for value in found]
        said = self.about.get(key) or [{"name": name} for name in known]
        try:
            names = [str(slot["name"]) for slot in said]
            last = [slot.get("layout") == "NHWC" for slot in said]
        except (TypeError, KeyError, AttributeError):
            raise _no_model(self.path, self.kind) from None
        if len(names) != len(found):
            what = f"{self.path} has {len(found)} {key}, but says that it has {len(names)}"
            raise ImgtoolError(what, _AGAIN)
        places = [known.index(name) for name in names] if set(names) == set(known) else [*range(len(found))]
        return tuple(map(_named, names, [found[place] for place in places], last)), places

    def __call__(self, *arrays: Array) -> list[Array]:
        """Run it.

        Args:
            *arrays: One for each of ``inputs``, in their order and shapes; taken as float32.

        Returns:
            One float32 array for each of ``outputs``.

        Raises:
            ImgtoolError: There are more or fewer arrays, one has a shape that the file does not take, or
                the runtime fails.
        """
        if len(arrays) != len(self.inputs):
            what = f"{self.path} takes {len(self.inputs)} inputs, not {len(arrays)}"
            raise ImgtoolError(what, _AGAIN)
        given: list[Array] = [*arrays]
        for value, place, array in zip(self.inputs, self._places, arrays, strict=True):
            given[place] = self._stored(value, array)
        try:
            out = self._run(given)
        except MemoryError:
            raise
        except Exception as fault:  # noqa: BLE001 - runtimes' exceptions have no common base
            shapes = ", ".join(_words(array.shape) for array in arrays)
            what = f"{self.path} fails on an input of {shapes}: {_first_line(fault)}"
            raise ImgtoolError(what, "try another size, or export the network again") from None
        pairs = zip(self.outputs, self._ends, strict=True)
        return [_plain(value, np.asarray(out[end])) for value, end in pairs]

    def _stored(self, value: Value, array: Array) -> Array:
        if not value.fits(array.shape):
            name = f"the input {value.name}" if len(self.inputs) > 1 else "an input"
            what = f"{self.path} takes {name} of {_words(value.shape)}, not of {_words(array.shape)}"
            raise ImgtoolError(what, _AGAIN)
        return np.ascontiguousarray(array.transpose(_TO_FILE) if value.last else array, value.dtype)


def kind_of(path: Path) -> str:
    """Return the kind of a file that can be run, by its name; "" is any other, such as weights."""
    return KINDS.get(path.suffix.lower(), "")


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


def open(path: Path, threads: int = 1, trusted: bool = False) -> Loaded:
    """Open an exported file.

    Args:
        path: The file; its suffix tells the kind.
        threads: How many its runtime may take; 0 or less is all cores that this process may use.
        trusted: Whether it may run code of its own, as .pt2 files can.

    Raises:
        ImgtoolError: Code 2: it is of no kind that can be run, or may not be run, or what runs it is not
            installed, or there is no such file. Code 1: it cannot be read, or is damaged, or takes
            other than floating-point numbers.
    """
    kind = kind_of(path)
    if not kind:
        raise ImgtoolError(f"{path} is no file that can be run", f"known: {' '.join(KINDS)}", USAGE)
    if kind == "pt2" and not trusted:
        hint = "export the network to .onnx, .tflite or .xml"
        raise ImgtoolError(f"{path} is not opened, for opening a .pt2 file can run code in it", hint, USAGE)
    return _open(path, kind, threads)


def load(path: Path, kind: str) -> Run:
    """Load an exported model of one input and one output.

    Args:
        path: The file.
        kind: One of ``PACKAGES``.

    Returns:
        A function from the input to the output; both float32, their shapes the file's.
        It raises ``ImgtoolError`` for an input of another shape.

    Raises:
        ImgtoolError: As ``open``, or it has other than one input and one output.
    """
    model = _open(path, kind, 1)
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        what = f"{path} has {len(model.inputs)} inputs and {len(model.outputs)} outputs, not one of each"
        raise ImgtoolError(what, _AGAIN)
    return lambda x: model(x)[0]


def _open(path: Path, kind: str, threads: int) -> Loaded:
    require(kind)
    data = files.read(path)
    prepared = {"onnx": _onnx, "tflite": _tflite, "openvino": _openvino, "pt2": _pt2}[kind]
    with _silence():
        opener = prepared(threads if threads > 0 else cores())  # its faults are not the file's
        try:
            parts = opener(path, data)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - nor have those for damaged files
            raise _no_model(path, kind, data) from None
    for value in parts.inputs:
        if value.dtype not in ("float32", "float16", "float64"):
            what = f"{path} takes numbers of the type {value.dtype}, not floating-point numbers"
            raise ImgtoolError(what, _AGAIN)
    return Loaded(path, kind, parts)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _no_model(path: Path, kind: str, data: bytes = b"") -> ImgtoolError:
    weights = path.with_suffix(".bin")
    if kind == "openvino" and b"<net" in data and not weights.is_file():
        what = f"{path} lacks {weights.name} beside it, which holds its weights"
        return ImgtoolError(what, "put it there: an OpenVINO model is both files")
    return ImgtoolError(f"{path} is not a model that can be run as {kind}", _AGAIN)


def _words(shape: Sequence[int | None]) -> str:
    return "×".join("any" if length is None else str(length) for length in shape) or "one number"


def _first_line(fault: BaseException) -> str:
    lines = str(fault).strip().splitlines()
    return lines[0][:200] if lines else type(fault).__name__


def _understood(about: str | bytes | None) -> dict[str, Any]:
    """Return what a file says of itself, {} where that is nothing of imgtool's."""
    try:
        said = json.loads(about or "{}")
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _named(name: str, value: Value, last: bool) -> Value:
    """Return a value of the file under its name, in the layout of the network."""
    last = last and len(value.shape) == 4
    shape = tuple(value.shape[axis] for axis in _FROM_FILE) if last else value.shape
    return Value(name, shape, value.dtype, last)


def _plain(value: Value, array: Array) -> Array:
    return np.ascontiguousarray(array.transpose(_FROM_FILE) if value.last else array, np.float32)


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


def _onnx(threads: int) -> Opener:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    for pool in ("intra_op", "inter_op"):
        options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")

    def opened(path: Path, data: bytes) -> _Parts:
        return _of_session(onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]))

    return opened


def _of_session(session: Any) -> _Parts:
    def value(found: Any) -> Value:
        shape = tuple(length if isinstance(length, int) else None for length in found.shape)
        dtype = found.type.removeprefix("tensor(").removesuffix(")")
        return Value(found.name, shape, {"float": "float32", "double": "float64"}.get(dtype, dtype))

    inputs, outputs = ([*map(value, each)] for each in (session.get_inputs(), session.get_outputs()))
    names = [each.name for each in inputs]

    def run(arrays: list[Array]) -> Sequence[Array]:
        out: list[Array] = session.run(None, dict(zip(names, arrays, strict=True)))
        return out

    return _Parts(inputs, outputs, run, session.get_modelmeta().custom_metadata_map.get(ABOUT))


def _appended(data: bytes) -> bytes | None:
    """Return what a TFLite file says of itself in the archive that follows it."""
    if b"PK\x05\x06" not in data[-(1 << 16) - 22 :]:  # the end of an archive; most files have none
        return None
    import io
    import zipfile

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive, archive.open(f"{ABOUT}.json") as member:
            return member.read(_LONGEST)
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, NotImplementedError, RuntimeError):
        return None


def _tflite(threads: int) -> Opener:
    from ai_edge_litert.interpreter import Interpreter

    def opened(path: Path, data: bytes) -> _Parts:
        interpreter = Interpreter(model_content=data, num_threads=threads)
        interpreter.allocate_tensors()
        return _of_interpreter(interpreter, data)

    return opened


def _of_interpreter(interpreter: Any, data: bytes) -> _Parts:
    names: dict[int, str] = {}
    for key in [*interpreter.get_signature_list()][:1]:
        runner = interpreter.get_signature_runner(key)
        for details in (runner.get_input_details(), runner.get_output_details()):
            names |= {detail["index"]: name for name, detail in details.items()}

    def value(found: Any) -> Value:
        name = names.get(found["index"], found["name"])
        return Value(name, tuple(int(length) for length in found["shape"]), np.dtype(found["dtype"]).name)

    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def run(arrays: list[Array]) -> Sequence[Array]:
        for found, array in zip(inputs, arrays, strict=True):
            interpreter.set_tensor(found["index"], array)
        interpreter.invoke()
        return [interpreter.get_tensor(found["index"]) for found in outputs]

    return _Parts([*map(value, inputs)], [*map(value, outputs)], run, _appended(data))


def _openvino(threads: int) -> Opener:
    import openvino

    core = openvino.Core()
    # Without the first of these, some processors compute in bfloat16.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    core.set_property("CPU", settings)

    def opened(path: Path, data: bytes) -> _Parts:
        model = core.read_model(path)
        about = model.get_rt_info([ABOUT]).astype(str) if model.has_rt_info([ABOUT]) else None
        return _of_compiled(core.compile_model(model, "CPU"), about)

    return opened


def _of_compiled(compiled: Any, about: str | None) -> _Parts:
    def value(found: Any) -> Value:
        lengths = tuple(each.get_length() if each.is_static else None for each in found.get_partial_shape())
        name = found.get_any_name() if found.get_names() else ""
        return Value(name, lengths, np.dtype(found.get_element_type().to_dtype()).name)

    def run(arrays: list[Array]) -> Sequence[Array]:
        out: Sequence[Array] = compiled(arrays).to_tuple()
        return out

    return _Parts([*map(value, compiled.inputs)], [*map(value, compiled.outputs)], run, about)


def _pt2(threads: int) -> Opener:
    import io
    import logging

    import torch

    logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # it shows tracebacks of damaged files
    torch.set_num_threads(threads)

    def opened(path: Path, data: bytes) -> _Parts:
        extra: dict[str, Any] = {f"{ABOUT}.json": ""}
        return _of_program(torch.export.load(io.BytesIO(data), extra_files=extra), extra[f"{ABOUT}.json"])

    return opened


def _of_program(program: Any, about: str) -> _Parts:
    import torch

    module = program.module()
    nodes = {node.name: node for node in program.graph.nodes}

    def value(name: Any) -> Value:
        found = nodes[str(name)].meta["val"]
        shape = tuple(length if isinstance(length, int) else None for length in found.shape)
        return Value(str(name), shape, str(found.dtype).removeprefix("torch."))

    def run(arrays: list[Array]) -> Sequence[Array]:
        with torch.inference_mode():
            out = module(*map(torch.from_numpy, arrays))
        return [each.numpy() for each in (out if isinstance(out, (tuple, list)) else (out,))]

    signature = program.graph_signature
    inputs, outputs = ([*map(value, each)] for each in (signature.user_inputs, signature.user_outputs))
    return _Parts(inputs, outputs, run, about)
