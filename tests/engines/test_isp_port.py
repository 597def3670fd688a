"""What isp files hold, and frames developed by such a file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from imgtool import runtime
from imgtool.engine import Watch
from imgtool.engines.isp import apply, bayer, model, port
from imgtool.engines.isp.settings import Export, Infer, Model
from imgtool.errors import FAILED, USAGE, ImgtoolError
from imgtool.export import onnx
from imgtool.export.order import Order
from imgtool.mosaic import Mosaic
from imgtool.port import Port

Array = npt.NDArray[Any]

CHART = Path(__file__).parents[2] / "imgtool" / "specimens" / "chart.kdc"
MATRIX = np.array([[1.6, -0.5, -0.1], [-0.2, 1.5, -0.3], [0.0, -0.6, 1.6]])
GAINS = (2.0, 1.0, 1.5)


def network(**settings: Any) -> Any:
    """Return a small network that does more than Malvar's demosaicing."""
    torch.manual_seed(0)
    net = model.build(Model.model_validate({"size": "xs", **settings}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return net.eval()


def made(net: Any, **settings: Any) -> Port:
    return port.port(net, Export.model_validate({"to": "onnx", **settings}))


def run(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Callable[..., list[Array]]:
    """Return a module as a runtime would run it, checked for shapes it could not take."""

    def call(*arrays: Array) -> list[Array]:
        with torch.inference_mode():
            return [module(*(torch.from_numpy(each).to(dtype) for each in arrays)).numpy()]

    return call


def loaded(given: Port, size: tuple[int, int] | None = None) -> Any:
    """Return a port as an opened file, free or fixed to rows and columns of the photo."""
    inside = run(given.module)
    planes = (1, 4, size[0] // 2, size[1] // 2) if size else (None, 4, None, None)

    class File:
        path, about = Path("x.onnx"), {"facts": dict(given.facts)}
        inputs = (
            SimpleNamespace(shape=planes),
            *(SimpleNamespace(shape=(None, *slot.shape[1:])) for slot in given.inputs[1:]),
        )
        outputs = (SimpleNamespace(shape=(None, 3, None, None)),)

        def __call__(self, *arrays: Array) -> list[Array]:
            assert size is None or arrays[0].shape == planes
            assert all(each.dtype == np.float32 for each in arrays)
            return inside(*arrays)

    return File()


def frame(height: int = 76, width: int = 92, **more: Any) -> Mosaic:
    values = np.random.default_rng(0).integers(40, 4000, (height, width), np.uint16)
    values[height // 3 : height // 2] //= 20
    known: dict[str, Any] = {"gains": GAINS, "matrix": MATRIX, "matrix_source": "file", "noise": (1e-3, 1e-6)}
    return Mosaic(values, **{"white": 4095.0, "black": (64.0,) * 4, **known, **more})


def developed(net: Any, shot: Mosaic, watch: Watch | None = None, **settings: Any) -> tuple[Array, Any]:
    asked = Infer.model_validate({"inputs": ("x.dng",), "device": "cpu", **settings})
    result = apply.apply(net, shot, asked, watch or Watch())
    return result.pixels.astype(int), result.facts


# --- what a file computes --------------------------------------------------------------------


def test_planes_continue_as_the_mirrored_mosaic_does() -> None:
    mosaic = np.random.default_rng(0).random((12, 16), np.float32)
    wide = np.pad(mosaic, 6, mode="reflect")
    got = port.mirrored(torch.from_numpy(bayer.pack(mosaic))[None], 3)[0].numpy()
    np.testing.assert_array_equal(got, bayer.pack(wide))


def test_a_mosaic_of_another_pattern_that_is_mirrored_as_its_words_say_gives_the_photo_of_infer() -> None:
    net = network()
    given = made(net)
    halo = int(str(given.facts["halo"]))
    assert f"both sides: {halo} (facts.halo, in pixels of the mosaic), and {halo + 1} where" in " ".join(
        given.before.split()
    )
    shot = frame(41, 54, pattern="BGGR")
    mosaic = np.pad(
        (shot.values - 64.0) / (4095 - 64), ((halo + 1, halo), (halo + 1, halo + 1)), mode="reflect"
    )
    planes = np.stack([mosaic[row::2, column::2] for row in (0, 1) for column in (0, 1)])
    told = (shot.gains, shot.noise, shot.matrix)
    (photo,) = run(given.module)(*(np.array(part, np.float32)[None] for part in (planes, *told)))
    theirs = np.rint(255 * photo[0].transpose(1, 2, 0))[halo + 1 :, halo + 1 :][:41, :54]
    assert np.abs(theirs - developed(net, shot)[0]).max() <= 1


@pytest.mark.parametrize("packing", ["rggb", "mai21"])
@pytest.mark.parametrize("own", ["rggb", "mai21"])
def test_a_file_makes_the_photo_that_infer_makes(own: str, packing: str) -> None:
    net = network(packing=own)
    given = made(net, packing=packing)
    assert [slot.name for slot in given.inputs] == ["planes", "gains", "noise", "matrix"]
    shot = frame()
    planes = bayer.pack(bayer.window(shot, (0, 76), (0, 92)))[None]
    if packing == "mai21":  # B, green beside red, R, green beside blue
        planes = planes[:, [3, 1, 0, 2]]
    rest = (np.array([part], np.float32) for part in (GAINS, shot.noise, MATRIX))
    (photo,) = run(given.module)(planes, *rest)
    expected, _ = developed(net, shot)
    assert np.abs(np.rint(photo[0].transpose(1, 2, 0) * 255) - expected).max() <= 1


@pytest.mark.parametrize(
    ("settings", "inputs"),
    [
        ({}, "planes gains noise matrix"),
        ({"colour": "learned"}, "planes gains noise"),
        ({"colour": "learned", "scaling": "mai21"}, "planes"),
        ({"arch": "punet", "width": "8"}, "planes gains matrix"),
    ],
)
def test_inputs_are_those_that_the_network_looks_at(settings: Any, inputs: str) -> None:
    given = made(network(**settings))
    assert " ".join(slot.name for slot in given.inputs) == inputs
    size = {"batch": 2, "height": 64, "width": 96}
    arrays = given.made("noise", size, np.random.default_rng(0))
    assert arrays[0].shape == (2, 4, 32, 48)
    (single,), (double,) = (
        run(each, kind)(*arrays)
        for each, kind in (
            (given.module, torch.float32),
            (copy.deepcopy(given.module).double(), torch.float64),
        )
    )
    assert single.shape == (2, 3, 64, 96)
    assert double.dtype == np.float64
    assert single.min() >= 0
    assert single.max() <= 1
    assert np.abs(single - double).max() < 1e-5


def test_every_input_counts() -> None:
    given = made(network())
    arrays = list(given.made("flat", {"batch": 1, "height": 24, "width": 24}, np.random.default_rng(0)))
    before = run(given.module)(*arrays)[0]
    for number in range(4):
        changed = [each * (1.2 if at == number else 1) for at, each in enumerate(arrays)]
        assert (
            np.abs(run(given.module)(*(each.astype(np.float32) for each in changed))[0] - before).max() > 1e-5
        )


@pytest.mark.parametrize("size", [(512, 768), (64, 96), (600, 900)])
def test_real_inputs_are_the_middle_of_the_frame_or_more(size: tuple[int, int]) -> None:
    given = made(network())
    sizes = {"batch": 2, "height": size[0], "width": size[1]}
    planes, gains, noise, matrix = given.real(CHART, sizes)
    assert planes.shape == (2, 4, size[0] // 2, size[1] // 2)
    assert planes.std() > 0.01
    assert gains.shape == (2, 3)
    assert gains.min() == 1
    assert noise.shape == (2, 2)
    np.testing.assert_allclose(matrix.sum(2), 1, atol=1e-4)


def test_extreme_inputs_give_finite_photos() -> None:
    given = made(network())
    for kind in ("flat", "extreme"):
        (photo,) = run(given.module)(
            *given.made(kind, {"batch": 1, "height": 48, "width": 64}, np.random.default_rng(0))
        )
        assert np.isfinite(photo).all()
        assert photo.min() >= 0
        assert photo.max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_onnx_file_of_any_size_is_as_exact_as_its_numbers(precision: Any, tmp_path: Path) -> None:
    given = made(network())
    sizes = {name: axis.usual for name, axis in given.axes.items()}
    onnx.write(Order(given, sizes, frozenset(sizes), {}, precision), tmp_path / "x.onnx")
    file = runtime.open(tmp_path / "x.onnx")
    exact = run(copy.deepcopy(given.module).double(), torch.float64)
    limit = 1e-5 if precision == "fp32" else 1 / 255
    for batch, height, width in ((1, 18, 20), (3, 204, 302)):
        here = {"batch": batch, "height": height, "width": width}
        for arrays in (given.real(CHART, here), given.made("noise", here, np.random.default_rng(0))):
            assert np.abs(file(*arrays)[0] - exact(*arrays)[0]).max() < limit


# --- a camera that is fixed ------------------------------------------------------------------


def test_planes_alone_are_balanced_and_of_srgb() -> None:
    net = network()
    given = made(net, to="tflite")
    planes = np.random.default_rng(0).random((1, 4, 20, 24), np.float32)
    (photo,) = run(given.module)(planes)
    rest = (np.array([part], np.float32) for part in ((1, 1, 1), given.facts["noise"], np.eye(3)))
    (same,) = run(made(net).module)(planes, *rest)
    np.testing.assert_allclose(photo, same, atol=1e-6)


def test_a_camera_can_be_fixed_in_the_file() -> None:
    net = network()
    given = made(net, inputs="planes", camera=CHART)
    assert [slot.name for slot in given.inputs] == ["planes"]
    assert given.facts["camera"] == "chart.kdc"
    assert "chart.kdc" in given.before
    sizes = {"batch": 1, "height": 64, "width": 64}
    (planes,) = given.real(CHART, sizes)
    (photo,) = run(given.module)(planes)
    (same,) = run(made(net).module)(*made(net).real(CHART, sizes))
    np.testing.assert_allclose(photo, same, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"scaling": "mai21", "colour": "learned"}])
def test_a_camera_without_use_is_refused(settings: Any) -> None:
    with pytest.raises(ImgtoolError) as fault:
        made(network(**settings), camera=CHART)
    assert fault.value.code == USAGE


# --- infer with a file -----------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["RGGB", "GBRG"])
@pytest.mark.parametrize("size", [None, (48, 64), (76, 92), (128, 160)])
def test_a_file_develops_as_the_weights_do(pattern: str, size: tuple[int, int] | None) -> None:
    net = network()
    shot = frame(pattern=pattern, height=76 if pattern == "RGGB" else 75)
    file = port.ported(loaded(made(net, packing="mai21"), size), Infer.model_validate({"inputs": ("x",)}))
    expected, facts = developed(net, shot, ev=0.5)
    got, told = developed(file, shot, ev=0.5)
    assert np.abs(got - expected).max() <= 1
    assert told["wb"] == facts["wb"]
    assert told["matrix_source"] == "file"
    assert size != (76, 92) or pattern != "RGGB" or told["tiles"] == 1


def test_a_file_too_small_for_its_context_is_refused() -> None:
    file = port.ported(loaded(made(network()), (16, 64)), Infer.model_validate({"inputs": ("x",)}))
    with pytest.raises(ImgtoolError, match="16 pixels"):
        developed(file, frame())


def test_a_file_of_one_camera_says_so_and_keeps_to_it() -> None:
    said: list[str] = []
    file = port.ported(
        loaded(made(network(), inputs="planes", camera=CHART)), Infer.model_validate({"inputs": ("x",)})
    )
    _, facts = developed(file, frame(), Watch(say=said.append))
    assert {facts[name] for name in ("wb_source", "noise_source", "matrix_source")} == {"weights"}
    assert facts["wb"] == [1.0, 1.0, 1.0]
    assert sum("camera" in text for text in said) == 1


def test_a_file_of_planes_alone_gets_them_balanced() -> None:
    net, said = network(), list[str]()
    file = port.ported(loaded(made(net, inputs="planes")), Infer.model_validate({"inputs": ("x",)}))
    shot = frame(noise=tuple(made(net, inputs="planes").facts["noise"]))  # type: ignore[arg-type]
    got, facts = developed(file, shot, Watch(say=said.append), ev=-0.5)
    assert facts["wb_source"] == "camera"
    assert facts["matrix_source"] == "weights"
    assert len(said) == 1
    assert got.mean() > 10


@pytest.mark.parametrize(
    "wrong",
    [
        {"halo": -2}, {"halo": 7}, {"multiple": 0}, {"multiple": 3}, {"gains": [1, 1]}, {"gains": [1, 0, 1]},
        {"noise": [-1e-3, 0]}, {"matrix": [[1, 0, 0]]}, {"matrix": [[1, 0, "x"]] * 3}, {"packing": "bggr"},
        {"inputs": []}, {"inputs": ["gains"]}, {"inputs": ["planes", "planes"]}, {"camera": 3},
        {"bytes_per_pixel": 0}, {"largest": 0}, {"halo": 16, "multiple": 32},
    ],
)  # fmt: skip
def test_facts_that_cannot_be_are_refused_in_a_line(wrong: dict[str, Any]) -> None:
    file = loaded(made(network()))
    type(file).about = {"facts": {**file.about["facts"], **wrong}}
    with pytest.raises(ImgtoolError, match="does not say how it may be used: facts") as fault:
        port.ported(file, Infer.model_validate({"inputs": ("x",)}))
    assert fault.value.code == FAILED


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        ([(1, 4, 8)], "has 1 inputs, not 4"),
        ([(1, 3, 8, 8), (1, 3), (1, 2), (1, 3, 3)], "an input of 1×3×8×8"),
    ],
)
def test_a_file_of_something_else_is_refused_in_a_line(shapes: list[Any], what: str) -> None:
    file = loaded(made(network()))
    type(file).inputs = tuple(SimpleNamespace(shape=shape) for shape in shapes)
    with pytest.raises(ImgtoolError, match=what):
        port.ported(file, Infer.model_validate({"inputs": ("x",)}))


def test_a_file_that_says_nothing_is_refused() -> None:
    file: Any = SimpleNamespace(path=Path("x.onnx"), about={"facts": {}}, inputs=())
    with pytest.raises(ImgtoolError, match="does not say"):
        port.ported(file, Infer.model_validate({"inputs": ("x",)}))
