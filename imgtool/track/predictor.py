"""Runs a network that imgtool trained, within a model of MLflow, of which this file is a part.

It needs torch and NumPy, and not imgtool.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Predictor:
    """The network, with its inputs and outputs by name."""

    def __init__(self, folder: Path) -> None:
        """Load the graph and the names."""
        import torch

        self.names = json.loads((folder / "names.json").read_text())
        self.net = torch.export.load(folder / "model.pt2").module()

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return arrays of float32 by the names of the outputs.

        Args:
            data: Name to array of float32; of a network with one input, the array alone does.
            params: None are known.
        """
        import numpy as np
        import torch

        names = self.names["inputs"]
        given = data if isinstance(data, Mapping) else {names[0]: data}
        arrays = [np.ascontiguousarray(given[name], np.float32) for name in names]
        with torch.no_grad():
            found = self.net(*(torch.from_numpy(each) for each in arrays))
        every = found if isinstance(found, tuple | list) else (found,)
        return {name: each.numpy() for name, each in zip(self.names["outputs"], every, strict=True)}


def _load_pyfunc(path: str) -> Predictor:
    """Return what ``mlflow.pyfunc.load_model`` wraps; ``path`` is the model's folder "data"."""
    return Predictor(Path(path))
