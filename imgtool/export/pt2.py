"""PyTorch's own archives of exported programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imgtool.export.order import Order


def require() -> None:
    """Raise nothing: torch, which writes and runs these, is always there."""


def write(order: Order, path: Path) -> Mapping[str, object]:
    """Write a network as an archive of ``torch.export``.

    Such a file is for torch of the same version or a later one, and loading one from elsewhere is as safe as
    running a program. It holds ``order.about`` in the extra file ``imgtool.json``. Half precision is of the
    weights and the convolutions, see ``trace.Spelling``.

    Args:
        order: What to write.
        path: The file.

    Returns:
        {"opset", "producer", "operators"}.
    """
    import torch

    from imgtool.export import trace

    program = trace.traced(order, half=order.precision == "fp16")
    program.example_inputs = None
    _bare(program.graph)
    archive = BytesIO()  # a file's own name would be inside
    with trace.quiet():
        about = json.dumps(order.about, ensure_ascii=False)
        torch.export.save(program, archive, extra_files={"imgtool.json": about})
    path.write_bytes(archive.getvalue())
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return {
        "opset": "aten",
        "producer": f"torch {torch.__version__}",
        "operators": dict(sorted(Counter(str(node.target) for node in calls).items())),
    }


def _bare(graph: Any) -> None:
    """Take out of a graph where it was made, and that it was made for the CPU."""
    for node in list(graph.nodes):
        if str(node.target) == "aten._assert_tensor_metadata.default":
            graph.erase_node(node)
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom"):
            node.meta.pop(key, None)
