"""What lens files hold, and photos straightened by such a file."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from imgtool import checkpoint, compute, images, runtime
from imgtool.engines.lens import estimate, lines, model, network, plumb, port, posterior, prior
from imgtool.engines.lens.engine import ENGINE
from imgtool.engines.lens.geometry import BrownConrady
from imgtool.engines.lens.settings import Export, Infer, Model
from imgtool.errors import FAILED, ImgtoolError
from imgtool.export import onnx
from imgtool.export.order import Order
from imgtool.port import Port

Array = npt.NDArray[Any]

CITY = Path(__file__).parents[2] / "imgtool" / "specimens" / "city.jpg"
EXPORT, INFER = Export.model_validate({"to": "onnx"}), Infer.model_validate({"inputs": ("x.jpg",)})


@pytest.fixture(scope="module")
def net() -> Any:
    return checkpoint.network(ENGINE, checkpoint.read_weights(checkpoint.find("lens-lines"), "lens")).eval()


def run(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Callable[..., list[Array]]:
    """Return a module as a runtime would run it."""

    def call(*arrays: Array) -> list[Array]:
        with torch.inference_mode():
            out = module(*(torch.from_numpy(each).to(dtype) for each in arrays))
        return [each.numpy() for each in (out if isinstance(out, tuple) else (out,))]

    return call


def loaded(given: Port, **sizes: int) -> Any:
    """Return a port as an opened file, with some of its axes fixed."""
    inside = run(given.module)
    shapes = [
        tuple(each if isinstance(each, int) else sizes.get(each) for each in slot.shape)
        for slot in given.inputs
    ]

    class File:
        path, about = Path("x.onnx"), {"facts": dict(given.facts)}
        inputs = tuple(SimpleNamespace(shape=shape) for shape in shapes)
        outputs = tuple(
            SimpleNamespace(shape=tuple(each if isinstance(each, int) else None for each in slot.shape))
            for slot in given.outputs
        )

        def __call__(self, *arrays: Array) -> list[Array]:
            for shape, array in zip(shapes, arrays, strict=True):
                assert array.dtype == np.float32
                assert all(wanted in (None, got) for wanted, got in zip(shape, array.shape, strict=True))
            return inside(*arrays)

    return File()


def straight_edges(count: int, bent: BrownConrady) -> lines.Lines:
    """Return straight edges as a lens shows them, with a tenth of a pixel of noise."""
    rng = np.random.default_rng(3)
    ends = rng.uniform(-0.6, 0.6, (count, 2, 2))
    points = ends[:, :1] + np.linspace(0, 1, lines.POINTS)[:, None] * (ends[:, 1:] - ends[:, :1])
    x, y = bent.distort(points[..., 0], points[..., 1])
    photo = np.stack([x, y], -1) + rng.normal(0, 0.1 / 640, points.shape)
    length = 640 * np.hypot(*(ends[:, 1] - ends[:, 0]).T)
    order = np.argsort(-length)
    facts = np.stack([length, np.full(count, 0.1), np.full(count, 0.2), np.zeros(count)], 1)
    return lines.Lines(photo[order], facts[order], 640.0)


# --- edges -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"edges": 40, "candidates": 200}])
def test_a_file_finds_the_coefficients_that_the_weights_find(net: Any, sizes: dict[str, int]) -> None:
    found = straight_edges(30, BrownConrady(-0.06, 0.01))
    file: Any = port.ported(loaded(port.port(net, EXPORT), **sizes), INFER)
    right, got = (posterior.estimate(estimate.edge_likelihood(each, found), 4, 3) for each in (net, file))
    assert abs(right.model.corner + 0.05) < 0.01
    assert abs(right.model.corner - got.model.corner) < 1e-4
    assert abs(right.risk - got.risk) < 1e-3


def test_a_file_of_few_edges_takes_the_longest(net: Any) -> None:
    found = straight_edges(30, BrownConrady(-0.06, 0.01))
    few = lines.Lines(found.points[:12], found.facts[:12], found.half_diagonal)
    file: Any = port.ported(loaded(port.port(net, EXPORT), edges=12), INFER)
    candidates = prior.draws(np.random.default_rng(0), "photo", 0.002, 20)
    got, right = (estimate.edge_likelihood(*each)(candidates) for each in ((file, found), (net, few)))
    np.testing.assert_allclose(got, right, atol=1e-3)


def test_without_edges_all_candidates_are_alike(net: Any) -> None:
    none = lines.Lines(np.zeros((0, lines.POINTS, 2)), np.zeros((0, 4)), 640.0)
    given = port.port(net, EXPORT)
    for opened in (loaded(given), loaded(given, edges=8)):
        file: Any = port.ported(opened, INFER)
        assert not estimate.edge_likelihood(file, none)(np.full((3, 4), 0.01)).any()


def test_what_fills_up_counts_for_nothing_whatever_it_holds(net: Any) -> None:
    given = port.port(net, EXPORT)
    points, facts, half, candidates = given.made(
        "noise", {"edges": 9, "candidates": 6}, np.random.default_rng(0)
    )
    (right,) = run(given.module)(points, facts, half, candidates)
    for filler in (0.0, 0.3):
        more = np.concatenate([points, np.full((1, 5, lines.POINTS, 2), filler, np.float32)], 1)
        (got,) = run(given.module)(more, np.pad(facts, ((0, 0), (0, 5), (0, 0))), half, candidates)
        np.testing.assert_allclose(got, right, atol=2e-4)


def test_its_words_tell_the_prior_that_candidates_are_drawn_from(net: Any) -> None:
    told = " ".join(port.port(net, EXPORT).after.split())
    t = r"t\((\S+); (\S+), (\S+)\)"
    part = rf"with weight (\S+) k1 = (\S+) \+ {t}, k2 = (\S+) - (\S+) k1 \+ {t}"
    found = [tuple(map(float, words)) for words in re.findall(part, told)]
    assert found == [
        (0.85, 0.003, 2.2, 0.0375, 0.0285, 0.001, 0.43, 2.4, 0.0125, 0.0115),
        (0.15, -0.3, 8, 0.085, 0.085, -0.045, 0.44, 5, 0.025, 0.025),
    ]
    k1, k2 = np.array([-0.3, -0.02, 0.0, 0.1]), np.array([0.09, 0.01, 0.0, -0.05])
    density = np.zeros(4)
    for weight, mode, freedom, below, above, offset, slope, rest, low, high in found:
        first = student(k1 - mode, freedom, below, above)
        density += weight * first * student(k2 - offset + slope * k1, rest, low, high)
    np.testing.assert_allclose(np.log(density), prior.log_density(k1, k2, "mixed"), atol=1e-9)


def student(away: Array, freedom: float, below: float, above: float) -> Array:
    """Return the density of Student's t of two scales, each side as often as its scale says."""
    scale = np.where(away < 0, below, above)
    constant = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    one_side = 2 * constant * (1 + (away / scale) ** 2 / freedom) ** (-(freedom + 1) / 2) / scale
    density: Array = one_side * scale / (below + above)
    return density


def test_log_likelihoods_hold_in_float32(net: Any) -> None:
    given = port.port(net, EXPORT)
    double = run(copy.deepcopy(given.module).double(), torch.float64)
    sizes = {"edges": 40, "candidates": 16}
    every = [given.real(CITY, sizes)]
    every += [given.made(kind, sizes, np.random.default_rng(1)) for kind in ("noise", "flat", "extreme")]
    (slot,) = given.outputs
    for arrays in every:
        assert [each.shape[1:2] for each in arrays] == [(40,), (40,), (), (16,)]
        (single,), (exact,) = run(given.module)(*arrays), double(*arrays)
        assert exact.dtype == np.float64
        assert np.abs(single - exact).max() < 1e-5 * (slot.high - slot.low)


@pytest.mark.slow
def test_an_onnx_file_judges_any_number_of_edges_as_exactly(net: Any, tmp_path: Path) -> None:
    given = port.port(net, EXPORT)
    sizes = {name: axis.usual for name, axis in given.axes.items()}
    onnx.write(Order(given, sizes, frozenset(sizes), {}), tmp_path / "x.onnx")
    file = runtime.open(tmp_path / "x.onnx")
    exact = run(copy.deepcopy(given.module).double(), torch.float64)
    for edges, candidates in ((2, 2), (161, 90)):
        here = {"edges": edges, "candidates": candidates}
        for arrays in (given.real(CITY, here), given.made("noise", here, np.random.default_rng(0))):
            assert np.abs(file(*arrays)[0] - exact(*arrays)[0]).max() < 4e-3


def test_half_precision_and_bytes_are_refused_for_edges(net: Any) -> None:
    assert set(port.port(net, EXPORT).refuse) == {"fp16", "int8"}


# --- pictures --------------------------------------------------------------------------------


@pytest.fixture(params=["field", "original"])
def looker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a network whose backbone is one layer."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, network.CHANNELS, network.STRIDE, network.STRIDE))
    known = SimpleNamespace(efficientnet_b0=lambda weights: SimpleNamespace(features=features))
    monkeypatch.setattr(compute, "torchvision", lambda: SimpleNamespace(models=known))
    settings = Model.model_validate({"arch": "efficientnet-b0", "head": request.param, "input": 64})
    return model.build(settings).eval()


def test_a_picture_file_says_what_the_weights_say(looker: Any) -> None:
    given = port.port(looker, EXPORT)
    pixels = images.read(CITY).pixels
    file = port.ported(loaded(given), INFER)
    assert isinstance(file, network.Exported)
    for right, got in zip(network.says(looker, pixels), network.says(file, pixels), strict=True):
        np.testing.assert_allclose(got, right, atol=1e-6)
    arrays = given.real(CITY, {"batch": 2})
    assert arrays[0].shape == (2, 3, 64, 64)
    assert arrays[1].shape == (2, 2)
    for single, exact in zip(
        run(given.module)(*arrays),
        run(copy.deepcopy(given.module).double(), torch.float64)(*arrays),
        strict=True,
    ):
        assert exact.dtype == np.float64
        np.testing.assert_allclose(single, exact, atol=1e-5)


def test_the_loss_is_where_the_corner_lands(looker: Any) -> None:
    loss = port.port(looker, EXPORT).loss
    assert loss is not None
    right, got = np.zeros((1, 4)), np.array([[0.01, 0.02, 0.5, 0.5]])
    assert abs(loss.of([right], [got]) - 1.5) < 1e-9


def test_a_file_that_says_nothing_is_refused() -> None:
    file: Any = SimpleNamespace(
        path=Path("x.onnx"), about={}, inputs=(SimpleNamespace(shape=(1, 3, None, None)),)
    )
    with pytest.raises(ImgtoolError, match="does not say"):
        port.ported(file, INFER)


@pytest.mark.parametrize(
    ("arch", "shapes", "what"),
    [
        ("lines", [(1, None, lines.POINTS, 2)], "has 1 inputs, not 4"),
        ("lines", [(1,), (1, None, 4), (1,), (1, None, 4)], "an input of 1, where"),
        ("lines", [(1, None, 9999, 2), (1, None, 4), (1,), (1, None, 4)], "an input of 1×any×9999×2"),
        ("efficientnet-b0", [(1, 3, 64, 48), (1, 2)], "no squares of one size"),
        ("efficientnet-b0", [(1, 3, None, None), (1, 2)], "no squares of one size"),
        ("efficientnet-b0", [()], "has 1 inputs"),
        ("other", [(1, 3, 64, 64), (1, 2)], "does not say how it may be used: facts.arch"),
    ],
)
def test_a_file_of_something_else_is_refused_in_a_line(arch: str, shapes: list[Any], what: str) -> None:
    ends = {"lines": [(1, None)], "efficientnet-b0": [(1, 4), (1, 4)], "other": []}[arch]
    given, out = ([SimpleNamespace(shape=shape) for shape in each] for each in (shapes, ends))
    file: Any = SimpleNamespace(
        path=Path("x.onnx"), about={"facts": {"arch": arch}}, inputs=given, outputs=out
    )
    with pytest.raises(ImgtoolError, match=what) as fault:
        port.ported(file, INFER)
    assert fault.value.code == FAILED


def test_places_in_the_straight_picture_are_those_of_the_model() -> None:
    bent = BrownConrady(-0.2, 0.05)
    inside = np.random.default_rng(0).uniform(-0.6, 0.6, (50, 2))
    photo = np.stack(bent.distort(inside[:, 0], inside[:, 1]), -1)
    moved = plumb.displaced(
        torch.from_numpy(photo)[None, None], torch.tensor([[[-0.2, 0.05, 0.0, 0.0]]]).double()
    )
    np.testing.assert_allclose(photo + moved[0, 0, 0].numpy(), inside, atol=1e-6)
