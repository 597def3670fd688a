"""TFLite files, by litert-torch: every length fixed, pictures with their channels last.

``python -m imgtool.export.tflite FOLDER`` converts, in a process of its own: what does it is large, talks,
and may end the process that it runs in.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool.errors import DONE, FAILED, ImgtoolError

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor, fx, nn

    from imgtool.export.order import Order

    Array = npt.NDArray[Any]

WITHIN = "imgtool.json"
"""What the file says of itself: the only member of a zip archive that is appended to it."""

NARROW = (
    "CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED", "ADD", "RELU", "CONCATENATION",
    "SLICE", "STRIDED_SLICE", "SPLIT", "RESHAPE", "TRANSPOSE", "PAD", "MIRROR_PAD", "MAX_POOL_2D",
    "AVERAGE_POOL_2D", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR",
)  # fmt: skip
"""Operators that are done in 8 bits: nearly all of the time, and what lies between them.

Statistics, curves and products of two pictures lose too much, and a product of matrices with a constant comes
out wrong: of a photo of the isp engine, 8 dB are left with it, 50 dB without.
"""

_FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # of all that an archive can tell
_PROGRAM, _TASK, _MODEL, _TOLD = "program.pt2", "task.json", "model.tflite", "told.json"
_SMALL = 1 << 16  # numbers of a tensor that is stored rather than computed in every run
_FEW = 64  # stretches that rows are put together from
_OPERATORS = (  # how converter and runtime name what they cannot do
    r"Lowering not found: (\S+)",
    r"'((?:tfl|stablehlo|mhlo|chlo)\.\w+)'",
    r"\((\w+)\) failed to prepare",
    r"torch\.ops\.([\w.]+)",
)


def require() -> None:
    """Raise ``ImgtoolError`` (code 1) where the converter or the runtime is not installed."""
    lacking = [name for name in ("litert_torch", "ai_edge_litert") if find_spec(name) is None]
    if lacking:
        what = f"writing TFLite files needs {' and '.join(lacking)}, which is not installed"
        raise ImgtoolError(what, "pip install 'imgtool[tflite]'")


def write(order: Order, path: Path) -> Mapping[str, object]:
    """Write a network as a TFLite file.

    Its inputs and outputs are float32 and have the names of the port in the file's signature; those that
    are pictures are ``(B, H, W, C)``. In "fp16" the weights are stored in half precision. In "int8" the
    layers of ``NARROW`` and their weights are integers, each layer's range from the least to the largest
    value that the calibration inputs gave it. Sub-pixel layers become transposed convolutions where the
    order is ``gpu_safe``.

    Args:
        order: What to write.
        path: The file.

    Returns:
        "producer", "operators" (name to count), and for "int8" "quantiser" and "calibration", the number
        of inputs.

    Raises:
        ImgtoolError: The converter is not installed, an axis is free, or the converter or the runtime
            cannot do an operator of the network.
    """
    require()
    if order.free:
        what = f"a TFLite file has fixed sizes, but {', '.join(sorted(order.free))} would be free"
        raise ImgtoolError(what, "give a size: --size HxW")
    if order.precision == "int8" and not order.calibration:
        raise ImgtoolError("8 bits need real inputs to find their ranges with", "give photos by --photos")
    with tempfile.TemporaryDirectory(prefix="imgtool-") as name:
        folder = Path(name)
        _lay_out(order, folder)
        facts = _converted(folder)
        path.write_bytes((folder / _MODEL).read_bytes())
    _say(path, order.about)
    return facts


def _lay_out(order: Order, folder: Path) -> None:
    """Put what the converting process needs into its folder."""
    import numpy as np
    import torch

    from imgtool.export import trace

    program = trace.traced(order, gpu_safe=order.gpu_safe, free=False, unshuffle=True)
    with trace.quiet():
        torch.export.save(program, folder / _PROGRAM)
    for number, inputs in enumerate(order.calibration):
        np.savez(folder / f"{number:04}.npz", *inputs)
    slots = enumerate(order.port.inputs)
    task = {
        "inputs": [(slot.name, order.shape(number), slot.picture) for number, slot in slots],
        "outputs": [(slot.name, slot.picture) for slot in order.port.outputs],
        "precision": order.precision,
    }
    (folder / _TASK).write_text(json.dumps(task))


def _converted(folder: Path) -> dict[str, Any]:
    """Convert in a process of its own, and return what it told."""
    command = [sys.executable, "-m", "imgtool.export.tflite", str(folder)]
    child = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if child.returncode < 0:
        what = f"the TFLite converter was ended by signal {-child.returncode}"
        raise ImgtoolError(what, "give a smaller --size, or free some memory")
    if not (folder / _TOLD).is_file():  # a bug, so all of it is shown
        raise RuntimeError(f"converting to TFLite failed:\n{child.stderr}")
    told: dict[str, Any] = json.loads((folder / _TOLD).read_text())
    if child.returncode != DONE:
        raise ImgtoolError(told["what"], "take another format, such as --to onnx")
    return told


def _say(path: Path, about: Mapping[str, Any]) -> None:
    """Append what the file says of itself, the same bytes on any day and any system."""
    member = zipfile.ZipInfo(WITHIN, _FIRST_DAY)
    member.create_system = 3
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(member, json.dumps(dict(about), ensure_ascii=False, sort_keys=True).encode())


def _phone(module: fx.GraphModule, inputs: Sequence[Any], outputs: Sequence[Any]) -> nn.Module:
    """Return a module that takes and gives tensors by name, pictures with their channels last."""
    from torch import nn

    runner = _runner()

    class Phone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module
            self.training = False  # what is a program already cannot be told so by eval()

        def forward(self, **given: Tensor) -> dict[str, Tensor]:
            """Map inputs by name to outputs by name; pictures are ``(B, H, W, C)``."""
            taken = [
                given[name].permute(0, 3, 1, 2) if picture else given[name] for name, _, picture in inputs
            ]
            found = runner(self.module).run(*taken)
            found = found if isinstance(found, (tuple, list)) else (found,)
            pairs = zip(outputs, found, strict=True)
            return {name: out.permute(0, 2, 3, 1) if picture else out for (name, picture), out in pairs}

    return Phone()


def _runner() -> type[fx.Interpreter]:
    """Return what runs a graph, sub-pixel layers and fixed colour matrices so that channels stay last.

    As they are, the converter transposes the whole picture around them, at the size of the output.
    """
    import torch
    import torch.nn.functional as F
    from torch import fx

    def sub_pixels(x: Tensor, factor: int) -> Tensor:
        """Put channels in the order (row, column, colour) of their pixels; the rest is joining rows."""
        batch, channels, height, width = x.shape
        colours, row = channels // factor**2, channels // factor
        order = [channel * factor**2 + pixel for pixel in range(factor**2) for channel in range(colours)]
        kernel = torch.tensor([[[[float(place == each)]] for place in range(channels)] for each in order])
        x = F.conv2d(x, kernel).permute(0, 2, 3, 1)
        rows = [x[..., row * each : row * (each + 1)] for each in range(factor)]
        joint = torch.cat([each.reshape(batch, height, 1, width * row) for each in rows], 2)
        return joint.reshape(batch, height * factor, width * factor, colours).permute(0, 3, 1, 2)

    class Runner(fx.Interpreter):
        def run_node(self, node: Any) -> Any:
            """Compute one node of the graph."""
            if node.target == torch.ops.aten.pixel_shuffle.default:
                return sub_pixels(*self.fetch_args_kwargs_from_env(node)[0])
            if node.target == torch.ops.aten.einsum.default and node.args[0] == "bij,bjhw->bihw":
                matrix, picture = self.fetch_args_kwargs_from_env(node)[0][1]
                if node.args[1][0].op == "get_attr" and len(matrix) == 1:
                    return F.conv2d(picture, matrix[0][:, :, None, None])
            return super().run_node(node)

    return Runner


def _stored(shape: Sequence[int], picture: bool) -> tuple[int, ...]:
    batch, *rest = shape
    return (batch, *rest[1:], rest[0]) if picture else tuple(shape)


def _evaluated(graph: fx.Graph, owner: nn.Module) -> dict[fx.Node, Tensor]:
    """Return the tensors of a graph that do not depend on its inputs, but for large ones that it makes."""
    import torch
    from torch import Tensor

    known: dict[fx.Node, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            value = owner
            for name in node.target.split("."):
                value = getattr(value, name)
        elif node.op == "call_function" and all(each in known for each in node.all_input_nodes):
            arguments = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
            value = node.target(*arguments[0], **arguments[1])
        else:
            continue
        if isinstance(value, Tensor) and (node.op == "get_attr" or value.numel() <= _SMALL):
            known[node] = value
    return known


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Return the stretches ``(first, behind the last)`` of places that follow one another."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1] = runs[-1][0], place + 1
        else:
            runs.append((place, place + 1))
    return runs


def _simplified(module: fx.GraphModule) -> fx.GraphModule:
    """Do beforehand what does not depend on the inputs, and mirror borders by slices.

    The converter would compute the former anew in every run, and gather the latter row by row, between
    transpositions of the whole picture.
    """
    import torch

    graph, slices = module.graph, torch.ops.aten.slice.Tensor
    known = _evaluated(graph, module)
    for number, (node, value) in enumerate(known.items()):
        if node.op != "get_attr" and any(user not in known for user in node.users):
            module.register_buffer(f"known_{number}", value.detach().clone())
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(f"known_{number}"))
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.index_select.default):
        source, axis, index = node.args
        if index.op != "get_attr" or not index.target.startswith("known_"):
            continue
        runs = _runs(getattr(module, index.target).tolist())
        if len(runs) <= _FEW:
            with graph.inserting_before(node):
                parts = [graph.call_function(slices, (source, axis, *run)) for run in runs]
                node.replace_all_uses_with(graph.call_function(torch.ops.aten.cat.default, (parts, axis)))
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _convert(folder: Path, task: Mapping[str, Any]) -> bytes:
    import litert_torch
    import torch

    program = torch.export.load(folder / _PROGRAM)
    module = _phone(_simplified(program.module(check_guards=False)), task["inputs"], task["outputs"])
    samples = {name: torch.zeros(_stored(shape, picture)) for name, shape, picture in task["inputs"]}
    edge = litert_torch.convert(module, sample_kwargs=samples)
    edge.export(str(folder / _MODEL))
    return (folder / _MODEL).read_bytes()


def _halved(data: bytes) -> bytes:
    """Return a file with its weights in half precision; it computes in single precision."""
    from ai_edge_quantizer import qtyping, quantizer

    weights = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    work = quantizer.Quantizer(bytearray(data))
    work.update_quantization_recipe(
        ".*",
        qtyping.TFLOperationName.ALL_SUPPORTED,
        qtyping.OpQuantizationConfig(
            weight_tensor_config=weights,
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        ),
        algorithm_key=quantizer.AlgorithmName.FLOAT_CASTING,
    )
    return bytes(work.quantize(enable_progress_report=False).quantized_model)


def _in_8_bits(data: bytes, examples: Iterator[dict[str, Array]]) -> bytes:
    """Return a file whose layers of ``NARROW`` compute in integers of 8 bits, all others in float32."""
    from ai_edge_quantizer import calibrator, qtyping, quantizer, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    plan = recipe_manager.RecipeManager()
    for name in NARROW:
        plan.add_static_config(".*", qtyping.TFLOperationName[name], 8, 8)
    # Unless told otherwise it takes a moving average of ranges, which cuts off what few inputs reach.
    ranges = calibrator.Calibrator(bytearray(data), qsv_update_func=qsv_utils.min_max_update)
    for example in examples:  # one at a time, for it would hold them all
        ranges.calibrate({"serving_default": [example]}, plan)
    work = quantizer.Quantizer(bytearray(data), plan.get_quantization_recipe())
    return bytes(work.quantize(ranges.get_model_qsvs(), enable_progress_report=False).quantized_model)


def _examples(folder: Path, inputs: Sequence[Any]) -> Iterator[dict[str, Array]]:
    import numpy as np

    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as given:
            arrays = [given[name] for name in given.files]
        yield {
            name: np.ascontiguousarray(array.transpose(0, 2, 3, 1) if picture else array)
            for (name, _, picture), array in zip(inputs, arrays, strict=True)
        }


def _operators(data: bytes) -> dict[str, int]:
    """Count the operators of a file by name."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(data, 0)
    known = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    counts: Counter[str] = Counter()
    for graph in (model.Subgraphs(number) for number in range(model.SubgraphsLength())):
        for number in range(graph.OperatorsLength()):
            code = model.OperatorCodes(graph.Operators(number).OpcodeIndex())
            # Old files keep the number in the field of one byte.
            counts[known[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]] += 1
    return dict(sorted(counts.items()))


def _work(folder: Path) -> dict[str, object]:
    from importlib.metadata import version

    from ai_edge_litert.interpreter import Interpreter

    task = json.loads((folder / _TASK).read_text())
    data, more = _convert(folder, task), {}
    if task["precision"] == "fp16":
        data = _halved(data)
    if task["precision"] == "int8":
        data = _in_8_bits(data, _examples(folder, task["inputs"]))
        count = len(list(folder.glob("*.npz")))
        more = {"quantiser": f"ai-edge-quantizer {version('ai-edge-quantizer')}", "calibration": count}
    Interpreter(model_content=data, num_threads=1).allocate_tensors()
    (folder / _MODEL).write_bytes(data)
    return {"producer": f"litert-torch {version('litert-torch')}", "operators": _operators(data), **more}


def _fault(error: Exception) -> str:
    """Return the line that tells what cannot be converted, "" for what is no known fault of a converter."""
    if isinstance(error, MemoryError):
        return "memory does not do to convert this network to TFLite"
    found = (re.search(pattern, str(error)) for pattern in _OPERATORS)
    name = next((match[1] for match in found if match), "")
    return f"TFLite cannot hold the operator {name} of this network" if name else ""


def main(folder: Path) -> int:
    """Convert what the folder holds, and leave the file, or the line that tells why not, in it."""
    import warnings

    warnings.simplefilter("ignore")
    try:
        told, code = _work(folder), DONE
    except Exception as error:
        told, code = {"what": _fault(error)}, FAILED
        if not told["what"]:
            raise
    (folder / _TOLD).write_text(json.dumps(told))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
