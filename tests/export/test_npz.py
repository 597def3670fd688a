"""NumPy archives of parameters."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from imgtool.export import npz
from imgtool.export.order import Order
from imgtool.port import Port, Slot

ABOUT = {"format": "imgtool-export/1", "engine": "toy", "facts": {"grey": "µ"}}


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).half()
        self.register_buffer("constant", torch.ones(5))


def order() -> Order:
    torch.manual_seed(0)
    slot = Slot("x", (1,), 0, 1, "")
    nothing: Any = lambda *given: ()  # noqa: E731
    port = Port(Wrapped(), (slot,), (slot,), {}, "", "", nothing, nothing)
    return Order(port, {}, frozenset(), ABOUT)


def test_it_holds_the_parameters_of_the_wrapped_network_and_what_it_is(tmp_path: Path) -> None:
    path, given = tmp_path / "w.npz", order()
    npz.require()
    told = npz.write(given, path)
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    assert json.loads(arrays.pop("imgtool").tobytes()) == ABOUT
    state = given.port.module.net.state_dict()  # type: ignore[union-attr]
    assert told["arrays"] == len(arrays) == len(state) == 7
    for name, values in state.items():
        assert arrays[name].dtype == np.float32
        assert np.array_equal(arrays[name], values.float().numpy())


def test_the_same_weights_give_the_same_bytes_uncompressed(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        npz.write(order(), tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        assert {entry.date_time[0] for entry in archive.infolist()} == {1980}
