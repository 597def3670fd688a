"""NumPy archives: the parameters by name, for engines that compute in NumPy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from imgtool.export.order import Order


def require() -> None:
    """Do nothing: NumPy is always there."""


def write(order: Order, path: Path) -> Mapping[str, object]:
    """Write the parameters of the network that a port's module wraps as its ``net``, as float32.

    The file is a zip archive without compression, of one ``.npy`` for each, and of ``imgtool``: the bytes of
    the JSON that the file says of itself. The same weights give the same bytes.

    Args:
        order: What to write.
        path: Where to, a name that ends in .npz.

    Returns:
        {"producer", "arrays"}: NumPy's version, and how many arrays there are.
    """
    module: Any = order.port.module
    state = sorted(module.net.state_dict().items())
    arrays: dict[str, Any] = {name: value.float().numpy() for name, value in state}
    about = json.dumps(dict(order.about), ensure_ascii=False, sort_keys=True)
    np.savez(path, imgtool=np.frombuffer(about.encode(), np.uint8), **arrays)
    return {"producer": f"numpy {np.__version__}", "arrays": len(arrays)}
