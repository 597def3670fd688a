"""OpenVINO files: a model in XML, with its weights in a file beside."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool.errors import ImgtoolError
from imgtool.export import onnx

if TYPE_CHECKING:
    from imgtool.export.order import Order


def require() -> None:
    """Raise ``ImgtoolError`` where what writes OpenVINO's files is not installed."""
    onnx.require()
    if find_spec("openvino") is None:
        raise ImgtoolError("writing OpenVINO files needs openvino", "pip install 'imgtool[openvino]'")


def write(order: Order, path: Path) -> Mapping[str, object]:
    """Write a network as OpenVINO's XML, with its weights in the ``.bin`` beside it.

    It is made of the ONNX file. Half precision is of the stored weights alone: the runtime chooses what it
    computes in, which on some processors is bfloat16 unless INFERENCE_PRECISION_HINT says f32. 8 bits are
    those of ``onnx.write``. ``rt_info["imgtool"]`` is ``order.about`` as JSON.

    Args:
        order: What to write.
        path: The ``.xml`` file.

    Returns:
        {"opset", "producer", "operators"}; OpenVINO has sets of operators of its own.

    Raises:
        ImgtoolError: As ``onnx.write``, or OpenVINO cannot read what that gives.
    """
    import openvino

    from imgtool.export import trace

    half = order.precision == "fp16"
    with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
        between = Path(folder, "model.onnx")
        between.write_bytes(
            onnx.built(replace(order, precision="fp32") if half else order).SerializeToString()
        )
        try:
            with trace.quiet():
                model: Any = openvino.convert_model(between)
        except Exception as fault:  # noqa: BLE001 - those of OpenVINO have no common base
            what = f"OpenVINO cannot take the network: {str(fault).strip().splitlines()[-1]}"
            raise ImgtoolError(what, "export it with --to onnx") from None
    for number, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() not in ("Parameter", "Result"):  # else names are counted through the process
            node.set_friendly_name(f"{node.get_type_name()}_{number}")
    model.set_rt_info(json.dumps(order.about, ensure_ascii=False), ["imgtool"])
    with trace.quiet():
        openvino.save_model(model, path, compress_to_fp16=half)
    operators = Counter(node.get_type_name() for node in model.get_ops())
    return {
        "opset": "+".join(sorted({node.get_type_info().version_id for node in model.get_ops()})),
        "producer": f"openvino {openvino.__version__.partition('-')[0]}",
        "operators": dict(sorted(operators.items())),
    }
