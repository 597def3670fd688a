"""The graphs that files are made of: rewritten operations equal torch's own."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn

from imgtool.export import trace
from imgtool.export.trace import Rewritten, Spelling

PLAIN = Spelling()
EVERY = Spelling(shuffle=True, unshuffle=True)


class Does(nn.Module):
    """Any function as a network."""

    def __init__(self, does) -> None:
        super().__init__()
        self.does = does

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.does(*inputs)


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3 + 1


def largest_difference(does, *inputs: Tensor, spelling: Spelling = PLAIN) -> float:
    return float((Rewritten(Does(does), spelling)(*inputs) - does(*inputs)).abs().max())


def operations(program) -> Counter[str]:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 6, 9), (3, 6, 2, 3, 4)])
def test_group_norm_axis_by_axis_is_group_norm(groups: int, shape: tuple[int, ...]) -> None:
    weight, bias = random(6), random(6) - 2
    assert largest_difference(lambda x: F.group_norm(x, groups, weight, bias, 1e-3), random(*shape)) < 1e-12
    assert largest_difference(lambda x: F.group_norm(x, groups), random(*shape)) < 1e-12


@pytest.mark.parametrize("keep", [True, False])
def test_a_mean_axis_by_axis_is_the_mean(keep: bool) -> None:
    for dims in ((2, 3), (-1, 0), [1]):
        assert largest_difference(lambda x, d=dims: x.mean(d, keepdim=keep), random(2, 3, 4, 5)) < 1e-12
    assert largest_difference(lambda x: x.mean() + torch.mean(x, 1), random(2, 3)) < 1e-12


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_sub_pixel_layers_as_convolutions_are_exact(factor: int) -> None:
    deep, wide = random(2, 5 * factor**2, 3, 4), random(2, 5, 3 * factor, 2 * factor)
    assert largest_difference(lambda x: F.pixel_shuffle(x, factor), deep, spelling=EVERY) == 0
    assert largest_difference(lambda x: F.pixel_unshuffle(x, factor), wide, spelling=EVERY) == 0
    assert largest_difference(nn.PixelShuffle(factor), deep, spelling=EVERY) == 0


def test_a_free_graph_takes_every_size_that_its_axes_allow() -> None:
    port = toys.picture()
    program = trace.traced(toys.order(port))
    assert not any("norm" in name for name in operations(program))
    run = program.module()
    for batch, height, width in ((1, 4, 4), (1, 10, 22), (3, 64, 50)):
        inputs = toys.made(port.inputs, {"batch": batch, "height": height, "width": width})
        found = run(*map(torch.from_numpy, inputs))
        assert abs(found.detach().numpy() - toys.outputs(port, inputs)[0]).max() < 1e-5
    with pytest.raises(Exception, match=r"Guard failed|Expected input"):
        run(torch.zeros(1, 3, 5, 6))


def test_a_fixed_graph_takes_one_size() -> None:
    port = toys.picture()
    for program in (trace.traced(toys.order(port, fixed=True)), trace.traced(toys.order(port), free=False)):
        assert program.module()(torch.zeros(1, 3, 16, 24)).shape == (1, 3, 16, 24)
        with pytest.raises(Exception, match=r"Guard failed|Expected input"):
            program.module()(torch.zeros(2, 3, 16, 24))


def test_graphs_for_phones_have_convolutions_alone() -> None:
    port = toys.picture()
    safe = trace.traced(toys.order(port, fixed=True), gpu_safe=True)
    half_way = operations(trace.traced(toys.order(port, fixed=True), unshuffle=True))
    assert not any("shuffle" in name for name in operations(safe))
    assert "aten.pixel_shuffle.default" in half_way
    assert "aten.pixel_unshuffle.default" not in half_way
    inputs = toys.made(port.inputs, {"batch": 1, "height": 16, "width": 24})
    found = safe.module()(*map(torch.from_numpy, inputs))
    assert abs(found.detach().numpy() - toys.outputs(port, inputs)[0]).max() < 1e-5


def test_half_precision_is_of_parameters_and_convolutions() -> None:
    port = toys.pair()
    kept = {name: value.clone() for name, value in port.module.state_dict().items()}
    program = trace.traced(toys.order(port), half=True)
    assert {value.dtype for value in program.state_dict.values()} == {torch.float16}
    results = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "call_function"}
    assert results["conv2d"].dtype == torch.float16
    assert results["linear"].dtype == torch.float16
    assert results["pow_1"].dtype == results["softmax"].dtype == torch.float32
    inputs = toys.made(port.inputs, {"batch": 2, "height": 9, "width": 7})
    found = program.module()(*map(torch.from_numpy, inputs))
    for got, right in zip(found, toys.outputs(port, inputs), strict=True):
        assert got.dtype == torch.float32
        assert 1e-7 < abs(got.detach().numpy() - right).max() < 1 / 255
    assert all(torch.equal(value, kept[name]) for name, value in port.module.state_dict().items())


@pytest.mark.slow
def test_axes_that_a_port_names_twice_are_one() -> None:
    port = toys.pair()
    run = trace.traced(toys.order(port)).module()
    with pytest.raises(Exception, match=r"Guard failed|Expected input"):
        run(torch.zeros(2, 3, 8, 8), torch.zeros(3, 3))


def test_the_network_of_the_port_stays_what_it_was() -> None:
    port = toys.picture()
    names = list(port.module.state_dict())
    trace.traced(toys.order(dataclasses.replace(port), fixed=True), gpu_safe=True, half=True)
    assert list(port.module.state_dict()) == names
