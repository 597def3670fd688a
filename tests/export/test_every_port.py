"""Every network of every engine, as ONNX: free sizes, proved as the command proves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_every_engine import NETWORKS

from imgtool import engines, export
from imgtool.export import onnx, order, parity, sidecar
from imgtool.header import Weights
from imgtool.port import Port

SMALL = {"height": 64, "width": 96, "batch": 1, "edges": 12, "candidates": 20, "lights": 30}
"""Lengths of axes that are long enough to tell a fault."""


def port_of(name: str, model: dict[str, Any]) -> Port:
    engine, settings = engines.load(name), engines.settings(name)
    shaped = {field: value for field, value in model.items() if field in engine.model.model_fields}
    torch.manual_seed(1)
    net = engine.build(engine.model(**shaped))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert engine.port is not None
    port = engine.port(net.eval(), settings.Export(to="onnx"))
    _settle(port)
    return port


def _settle(port: Port) -> None:
    """Let batch normalisation see inputs: untrained, it lets next to nothing of them through."""
    sizes = {axis: SMALL.get(axis, facts.usual) for axis, facts in port.axes.items()} | {"batch": 4}
    norms = [each for each in port.module.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    if not norms:
        return
    given = (port.made(kind, sizes, np.random.default_rng(0)) for kind in parity.MADE * 3)
    port.module.train()
    for norm in norms:
        norm.momentum = None  # the mean of all that is seen
    with torch.no_grad():
        for inputs in given:
            port.module(*map(torch.from_numpy, inputs))
    port.module.eval()


CASES = [pytest.param(name, model, id=f"{name}-{word}") for name, word, model in NETWORKS if word != "int8"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model"), CASES)
def test_a_network_of_any_weights_is_written_and_proved(
    name: str, model: dict[str, Any], tmp_path: Path
) -> None:
    port = port_of(name, model)
    sizes = {
        axis: max(
            SMALL.get(axis, facts.usual) // facts.multiple * facts.multiple, facts.least, facts.multiple
        )
        for axis, facts in port.axes.items()
    }
    free = frozenset(axis for axis, facts in port.axes.items() if facts.free)
    shown = {axis: None if axis in free else size for axis, size in sizes.items()}
    engine = engines.load(name)
    about = sidecar.about(engine, Weights("toy", name, model, {}, {}), port, "fp32", shown, False)
    path = tmp_path / "net.onnx"
    onnx.write(order.Order(port, sizes, free, about), path)
    suffixes = engine.suffixes or {".jpg", ".kdc"}
    photos = [each for each in sorted(export.SPECIMENS.iterdir()) if each.suffix in suffixes]
    cases = parity.cases(port, sizes, free, photos, (96, 128))
    if model.get("arch") == "efficientnet-b0":  # untrained, 49 layers make chaos of black and white noise
        cases = [case for case in cases if case.name != "extreme"]
    record = parity.Proof(port, 1e-5, 1).check(path, cases, tmp_path)
    assert record["max_abs"] <= 1e-5
    assert any(row["real"] for row in record["cases"])


def test_networks_trained_in_8_bits_say_why_they_are_not_written() -> None:
    port = port_of("filter", {"arithmetic": "int8"})
    assert "trained in 8-bit arithmetic" in port.refuse["fp32"]
