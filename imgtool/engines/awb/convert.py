"""Networks as files that onnxruntime and LiteRT run.

``python -m imgtool.engines.awb.convert WEIGHTS KIND TARGET`` converts in a process of its own: what does
it is large, and talks.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgtool import files, header, runtime
from imgtool.engines.awb.features import BINS, MAPS
from imgtool.engines.awb.settings import Model
from imgtool.errors import DONE, USAGE, ImgtoolError

if TYPE_CHECKING:
    from torch import nn

Array = npt.NDArray[Any]

OPSET = 18
"""Version of the ONNX operators: the oldest that the exporter of torch writes of itself."""
CLOSE = 1e-5
"""Largest difference to torch, as a share of the largest output."""
NEEDS = {"onnx": ("onnx", "onnxscript"), "tflite": ("litert_torch",)}
"""What converts, by kind of file."""
EXTRAS = {"onnx": "export", "tflite": "tflite"}
"""The extras of imgtool that bring it."""

_UNMARKED = b"MLIR Converted."


def input_shape(shape: Model) -> tuple[int, ...]:
    """Return the shape of a network's input: histograms, or a picture."""
    return (1, MAPS, BINS, BINS) if shape.arch == "hist" else (1, 3, shape.height, shape.width)


def mark(weights: header.Weights) -> str:
    """Return 15 letters that stand for a network's shape and parameters; its files hold them."""
    digest = hashlib.sha256(json.dumps(dict(weights.model), sort_keys=True).encode())
    for name, values in sorted(weights.state.items()):
        digest.update(name.encode() + np.ascontiguousarray(values, np.float32).tobytes())
    return "awb" + digest.hexdigest()[:12]


def core_file(path: Path, kind: str) -> Path:
    """Return the exported core of a network: the file beside its weights, or else one in the cache.

    What is not there is converted into the cache.

    Args:
        path: The weights.
        kind: "onnx" or "tflite".

    Raises:
        ImgtoolError: Code 2: what runs or converts it is not installed. Code 1: the file beside the
            weights is of other weights, or as ``header.read``.
    """
    runtime.require(kind)
    weights = header.read(path, "awb")
    beside = path.with_suffix("." + kind)
    if beside.is_file():
        if mark(weights).encode() not in files.read(beside):
            what = f"{beside} was not made from the weights {path}"
            raise ImgtoolError(what, "remove it: it is then made again where it is needed")
        return beside
    cached = files.cache_folder() / "awb" / f"{mark(weights)}.{kind}"
    if not cached.is_file():
        _convert(path, kind, cached)
    return cached


def _require(kind: str) -> None:
    lacking = [name for name in NEEDS[kind] if find_spec(name) is None]
    if lacking:
        raise ImgtoolError(
            f"there is no {kind} file of the network, and making one needs {' and '.join(lacking)}",
            f"pip install 'imgtool[{EXTRAS[kind]}]', or take --runtime numpy",
            USAGE,
        )


def _convert(path: Path, kind: str, target: Path) -> None:
    """Convert in a process of its own."""
    _require(kind)
    command = [sys.executable, "-m", "imgtool.engines.awb.convert", str(path), kind, str(target)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode == DONE:
        return
    try:
        fault = json.loads(child.stdout.splitlines()[-1])
        raise ImgtoolError(fault["what"], fault["hint"], child.returncode)
    except (IndexError, ValueError, KeyError):  # a bug, so all of it is shown
        raise RuntimeError(f"converting {path} to {kind} failed:\n{child.stderr}") from None


def to_onnx(module: nn.Module, shape: Model, path: Path, words: str = "") -> None:
    """Write a network's core as ONNX, its weights inside, without a word of where it was made.

    Args:
        module: The network.
        shape: Its settings.
        path: The file; written whole or not at all, and only where onnxruntime agrees with torch.
        words: What the file says of itself, such as ``mark`` gives.

    Raises:
        ImgtoolError: A package is not installed, the file differs from torch, or cannot be written.
    """
    _require("onnx")
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            (torch.zeros(input_shape(shape)),),
            input_names=["input"],
            output_names=["output"],
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model: Any = program.model_proto
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    for part in (*model.graph.input, *model.graph.output):
        del part.metadata_props[:]
    model.doc_string = words
    _keep(model.SerializeToString(deterministic=True), module, shape, path, "onnx")


def to_tflite(module: nn.Module, shape: Model, path: Path, words: str = _UNMARKED.decode()) -> None:
    """Write a network's core as TFLite; see ``to_onnx``.

    Args:
        module: The network.
        shape: Its settings.
        path: The file.
        words: The same, 15 letters.

    Raises:
        ImgtoolError: As ``to_onnx``.
    """
    _require("tflite")
    import tempfile

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import litert_torch

        edge = litert_torch.convert(module.eval(), (torch.zeros(input_shape(shape)),))
        with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
            edge.export(str(Path(folder, "core.tflite")))
            data = Path(folder, "core.tflite").read_bytes()
    if data.count(_UNMARKED) != 1 or len(words) != len(_UNMARKED):
        raise ImgtoolError("litert-torch wrote a file of an unknown form", "install litert-torch 0.10")
    _keep(data.replace(_UNMARKED, words.encode()), module, shape, path, "tflite")


def _keep(data: bytes, module: nn.Module, shape: Model, path: Path, kind: str) -> None:
    """Write a file where what runs it agrees with torch."""
    with files.atomic(path) as temporary:
        temporary.write_bytes(data)
        apart = difference(module, shape, temporary, kind)
        if not apart <= CLOSE:
            what = f"as {kind}, the network's answers differ from torch's by {apart:.2g} of the largest"
            raise ImgtoolError(what, "take --runtime numpy")


def difference(module: nn.Module, shape: Model, path: Path, kind: str) -> float:
    """Return how far an exported file is off torch at most, as a share of the largest output.

    Inputs of four kinds are tried, from all alike to noise. A network that answers all of them alike
    differs by infinity: it would agree with anything.
    """
    import torch

    run, rng = runtime.load(path, kind), np.random.default_rng(0)
    inputs = [np.full(input_shape(shape), 0.3, np.float32)]
    inputs += [
        (scale * rng.random(input_shape(shape)) ** power).astype(np.float32)
        for scale, power in ((1, 1), (3, 8), (0.2, 2))
    ]
    with torch.inference_mode():
        right = np.stack([module.eval()(torch.from_numpy(x)).numpy() for x in inputs])
    largest, apart = (
        float(np.abs(right).max()),
        float(np.abs(right - np.stack([run(x) for x in inputs])).max()),
    )
    spread = float(np.ptp(right, axis=0).max())
    return apart / largest if spread > 10 * apart else float("inf")


def main(words: Mapping[str, str]) -> int:
    """Convert weights, as ``_convert`` ordered; say what is wrong as a line of JSON."""
    from imgtool import checkpoint
    from imgtool.engines.awb.engine import ENGINE

    try:
        path = Path(words["weights"])
        net: Any = checkpoint.network(ENGINE, checkpoint.read_weights(path, "awb"))
        write = {"onnx": to_onnx, "tflite": to_tflite}[words["kind"]]
        write(net, net.shape, Path(words["target"]), mark(header.read(path, "awb")))
    except ImgtoolError as fault:
        sys.stdout.write("\n" + json.dumps({"what": fault.what, "hint": fault.hint}) + "\n")
        return fault.code
    return DONE


if __name__ == "__main__":
    sys.exit(main(dict(zip(("weights", "kind", "target"), sys.argv[1:], strict=True))))
