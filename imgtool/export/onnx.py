"""ONNX files: one file, with nothing in it of where it was made."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool.errors import ImgtoolError

if TYPE_CHECKING:
    from imgtool.export.order import Arrays, Order

LARGEST = 1_500_000_000
"""Bytes of weights that are written: one ONNX file can hold no 2^31 bytes."""

WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
"""Operations that are done in 8 bits."""


def require() -> None:
    """Raise ``ImgtoolError`` where what writes ONNX is not installed."""
    lacking = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if lacking:
        what = f"writing ONNX needs {' and '.join(lacking)}"
        raise ImgtoolError(what, "pip install 'imgtool[export]'")


def write(order: Order, path: Path) -> Mapping[str, object]:
    """Write a network as an ONNX file whose inputs, outputs and free axes have the port's names.

    The weights are inside. ``metadata_props["imgtool"]`` is ``order.about`` as JSON. Half precision is of
    the weights and the convolutions, see ``trace.Spelling``; 8 bits are QDQ, static: weights per channel,
    activations signed, in the ranges from the least to the largest value met in ``order.calibration``.

    Args:
        order: What to write.
        path: The file.

    Returns:
        {"opset", "producer", "operators"}.

    Raises:
        ImgtoolError: The exporter knows no ONNX for an operation, the operators' version cannot be had, or
            the network is too large for one file.
    """
    import onnx

    model = built(order)
    onnx.helper.set_model_props(model, {"imgtool": json.dumps(order.about, ensure_ascii=False)})
    path.write_bytes(model.SerializeToString(deterministic=True))
    return {
        "opset": _opset(model),
        "producer": f"{model.producer_name} {model.producer_version}",
        "operators": dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
    }


def built(order: Order) -> Any:
    """Return the ``onnx.ModelProto``, checked, with no metadata at all; see ``write``."""
    import onnx

    model = _quantised(order) if order.precision == "int8" else _converted(order)
    _named(model, order)
    _bare(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def _converted(order: Order) -> Any:
    """Return the model as torch's exporter makes it."""
    import torch

    from imgtool.export import trace

    size = sum(value.nbytes for value in order.port.module.state_dict().values())
    if size > LARGEST:
        what = f"the network's {size / 1e9:.1f} GB of weights do not fit into one ONNX file"
        raise ImgtoolError(what, "export it with --to pt2")
    program = trace.traced(order, half=order.precision == "fp16")
    try:
        with trace.quiet():
            found = torch.onnx.export(
                program,
                input_names=[slot.name for slot in order.port.inputs],
                output_names=[slot.name for slot in order.port.outputs],
                opset_version=order.opset,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            assert found is not None
            model: Any = found.model_proto
    except torch.onnx.OnnxExporterError as fault:
        raise ImgtoolError(_words(str(fault)), "export it with --to pt2") from None
    if _opset(model) != order.opset:
        what = f"the network cannot be written in version {order.opset} of the ONNX operators"
        raise ImgtoolError(what, f"take --opset {_opset(model)}")
    return model


def _words(fault: str) -> str:
    """Return what an exporter's fault says in a line."""
    operation = re.search(r"op='([\w.]+)'|target=torch\.ops\.([\w.]+)", fault)
    if operation is None:
        return "torch's exporter cannot write the network as ONNX"
    return f"there is no ONNX for the operation {operation[1] or operation[2]}"


def _opset(model: Any) -> int:
    """Return the version of the standard operators."""
    return int(next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx")))


def _named(model: Any, order: Order) -> None:
    """Give the free axes of inputs and outputs the port's words."""
    ends = [*zip(model.graph.input, order.port.inputs, strict=True)]
    ends += zip(model.graph.output, order.port.outputs, strict=True)
    for value, slot in ends:
        for length, word in zip(value.type.tensor_type.shape.dim, slot.shape, strict=True):
            if length.dim_param:
                length.dim_param = str(word)


def _bare(model: Any) -> None:
    """Take out of a model what says where it was made, and what can be inferred."""
    graph = model.graph
    del graph.value_info[:]
    parts = (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output)
    for part in (*parts, *model.functions):
        del part.metadata_props[:]
        part.doc_string = ""


class _Inputs:
    """Hands out real inputs, one set after another."""

    def __init__(self, names: Sequence[str], sets: Sequence[Arrays]) -> None:
        self.sets: Iterator[Any] = (dict(zip(names, each, strict=True)) for each in sets)

    def get_next(self) -> Any:
        """Return the next set by name, None after the last."""
        return next(self.sets, None)


def _exact(model: Any, order: Order) -> list[str]:
    """Return the names of operations whose weights are buffers: they stay in single precision."""
    buffers = tuple(name for name, _ in order.port.module.named_buffers())
    return [
        node.name
        for node in model.graph.node
        if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1].endswith(buffers or ("\0",))
    ]


def _quantised(order: Order) -> Any:
    """Return the model with its weighted operations in 8 bits."""
    import onnx
    import onnxruntime
    from onnxruntime import quantization

    from imgtool.export import trace

    model = _converted(order)
    names = [slot.name for slot in order.port.inputs]
    onnxruntime.set_default_logger_severity(4)
    with trace.quiet(), tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
        target = Path(folder, "int8.onnx")
        quantization.quantize_static(
            model,
            target,
            _Inputs(names, order.calibration),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(WEIGHTED),
            nodes_to_exclude=_exact(model, order),
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )
        return onnx.load(target)
