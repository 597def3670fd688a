"""The best network of a run as a folder that MLflow loads, and as what else is told of it.

The folder is a model of MLflow's format, written without MLflow, whose own writers need pandas:
``mlflow.pytorch.load_model`` gives the network, ``mlflow.pyfunc.load_model`` takes and gives arrays by
name, and neither needs imgtool: the graph is an archive of ``torch.export``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool import checkpoint, engines
from imgtool.errors import ImgtoolError
from imgtool.header import Weights
from imgtool.port import axis_of, length
from imgtool.settings.sources import make
from imgtool.track import facts
from imgtool.track.sink import About

if TYPE_CHECKING:
    from imgtool.export.order import Order
    from imgtool.port import Port, Slot

PREDICTOR = Path(__file__).with_name("predictor.py")
LOADER = "imgtool_predictor"
"""What the predictor is called within a model."""
GRAPH = "model.pt2"
EXAMPLE, REQUEST = "input_example.json", "serving_input_example.json"
MOST = 20_000
"""Numbers of an example of inputs, at most: it is text."""


@dataclass(frozen=True)
class Package:
    """The best weights of a run.

    Attributes:
        weights: The file.
        card: What they are: engine, network, scores, step, commit; with a graph also its inputs and outputs.
        order: What the graph was written of; None where there is none.
        graph: An archive of ``torch.export``.
        why: Why there is none, "" where none was wanted.
    """

    weights: Path
    card: Mapping[str, Any]
    order: Order | None = None
    graph: bytes = b""
    why: str = ""

    @classmethod
    def of(cls, about: About, path: Path, best: Mapping[str, Any], *, graph: bool) -> Package:
        """Return the package of a run's best weights.

        Args:
            about: The run.
            path: The weights.
            best: "epoch", "step", "scores".
            graph: Whether the network shall go with them.

        Raises:
            ImgtoolError: The weights cannot be read.
        """
        weights = checkpoint.read_weights(path, about.engine.name)
        card = {name: value for name, value in weights.header.items() if name != "train"}
        card |= {"epoch": best.get("epoch"), "run": about.name}
        card |= {name: about.facts[name] for name in (facts.COMMIT, facts.DIRTY) if name in about.facts}
        if not graph:
            return cls(path, card)
        try:
            order = _order(about, weights)
            archive = _graph(order)
        except Exception as fault:  # noqa: BLE001 - whatever keeps a network from being exported
            return cls(path, card, why=" ".join(str(fault).split())[:200] or type(fault).__name__)
        return cls(
            path, card | {"inputs": order.about["inputs"], "outputs": order.about["outputs"]}, order, archive
        )

    def write(self, folder: Path, names: Mapping[str, Any]) -> dict[str, Any]:
        """Fill an empty folder with the model.

        Args:
            folder: The folder.
            names: What MLflow calls it: "model_id", "run_id", "artifact_path", ...

        Returns:
            What ``MLmodel`` shall say.
        """
        shutil.copyfile(self.weights, folder / "best.safetensors")
        about: dict[str, Any] = {**names, "metadata": {"imgtool": dict(self.card)}}
        about["flavors"] = {"imgtool": {"weights": "best.safetensors", "version": self.card["imgtool"]}}
        if self.order is not None:
            about |= self._write_graph(folder, self.order)
            about["flavors"] |= _flavours(folder)
        about["model_size_bytes"] = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
        return about

    def _write_graph(self, folder: Path, order: Order) -> dict[str, Any]:
        data, code = folder / "data", folder / "code"
        data.mkdir()
        code.mkdir()
        (data / GRAPH).write_bytes(self.graph)
        slots = {"inputs": order.port.inputs, "outputs": order.port.outputs}
        told = {kind: [slot.name for slot in every] for kind, every in slots.items()}
        (data / "names.json").write_text(json.dumps(told))
        shutil.copyfile(PREDICTOR, code / f"{LOADER}.py")
        signature = {kind: _schema(every, order) for kind, every in slots.items()}
        return {"signature": {**signature, "params": None}, **_example(folder, order)}


def _order(about: About, weights: Weights) -> Order:
    """Return what is to be written of a network: all that may stay free is free.

    Raises:
        ImgtoolError: The engine has no such network, or refuses to write it.
    """
    from imgtool.export import sidecar
    from imgtool.export.order import Order, lengths

    engine = about.engine
    if engine.port is None:
        raise ImgtoolError(f"the engine {engine.name} cannot be exported")
    wanted = make(engines.settings(engine.name).Export, {"to": "pt2"}, "export")
    port: Port = engine.port(checkpoint.network(engine, weights), wanted)
    for word in ("pt2", "fp32"):
        if word in port.refuse:
            raise ImgtoolError(port.refuse[word])
    sizes, free = lengths(port, "", False, True)
    shown = {axis: None if axis in free else size for axis, size in sizes.items()}
    return Order(port, sizes, free, sidecar.about(engine, weights, port, "fp32", shown, False))


def _graph(order: Order) -> bytes:
    import tempfile

    from imgtool.export import pt2

    with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
        path = Path(folder, GRAPH)
        pt2.write(order, path)
        return path.read_bytes()


def _schema(slots: Sequence[Slot], order: Order) -> str:
    """Return named tensors as MLflow's signatures have them; -1 is a free length."""

    def size(word: int | str) -> int:
        return -1 if axis_of(word) in order.free else length(word, order.sizes)

    told = [
        {
            "name": slot.name,
            "type": "tensor",
            "tensor-spec": {"dtype": "float32", "shape": [size(word) for word in slot.shape]},
        }
        for slot in slots
    ]
    return json.dumps(told)


def _example(folder: Path, order: Order) -> dict[str, Any]:
    """Write an example of inputs as small as the network takes, unless that is large; tell where it is."""
    import numpy as np

    port = order.port
    least = {
        name: -(-axis.least // axis.multiple) * axis.multiple if name in order.free else order.sizes[name]
        for name, axis in port.axes.items()
    }
    inputs = port.made("noise", least, np.random.default_rng(0))
    if sum(each.size for each in inputs) > MOST:
        return {}
    told = {slot.name: value.round(3).tolist() for slot, value in zip(port.inputs, inputs, strict=True)}
    (folder / EXAMPLE).write_text(json.dumps(told))
    (folder / REQUEST).write_text(json.dumps({"inputs": told}))
    return {
        "saved_input_example_info": {
            "artifact_path": EXAMPLE,
            "serving_input_path": REQUEST,
            "type": "ndarray",
        }
    }


def _flavours(folder: Path) -> dict[str, Any]:
    """Write what the model needs installed; return how it is loaded."""
    import platform

    import numpy
    import torch

    python = platform.python_version()
    needed = ["mlflow", f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={numpy.__version__}"]
    (folder / "requirements.txt").write_text("".join(f"{each}\n" for each in needed))
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": needed}],
    }
    virtual = {"python": python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    # JSON is YAML
    (folder / "conda.yaml").write_text(json.dumps(conda, indent=2))
    (folder / "python_env.yaml").write_text(json.dumps(virtual, indent=2))
    return {
        "pytorch": {"model_data": "data", "pytorch_version": str(torch.__version__), "code": None},
        "python_function": {
            "loader_module": LOADER,
            "python_version": python,
            "data": "data",
            "code": "code",
            "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
        },
    }
