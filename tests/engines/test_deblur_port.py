"""Exported deblurring networks: a file's network is what infer computes, and infer with it the same photo."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from filed import filed
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from imgtool import checkpoint, header, images, runtime, tiles
from imgtool.engine import TileFacts, Watch
from imgtool.engines.deblur import port
from imgtool.engines.deblur.engine import ENGINE
from imgtool.engines.deblur.settings import Export, Infer, Model
from imgtool.errors import FAILED, USAGE, ImgtoolError
from imgtool.images import Photo
from imgtool.port import Port

ROOT = Path(__file__).parents[2]
Array = npt.NDArray[Any]
SETTINGS = Export(to="onnx")


@cache
def random_net(arch: str = "unet-lite") -> nn.Module:
    """Return a network whose every layer matters, as after training, but which has learnt nothing."""
    net = ENGINE.build(Model.model_validate({"arch": arch})).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return net


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return random_net()


def ported_of(net: nn.Module) -> Port:
    assert ENGINE.port is not None
    return ENGINE.port(net, SETTINGS)


def file_of(net: nn.Module, *size: int, about: Mapping[str, Any] | None = None) -> Any:
    return filed(ported_of(net), 3, *size, about=about)


def picture(height: int, width: int, dtype: str = "float32") -> Array:
    rng = np.random.default_rng(height * 1000 + width)
    if dtype == "float32":
        return rng.random((height, width, 3), np.float32)
    return rng.integers(0, np.iinfo(dtype).max + 1, (height, width, 3), dtype)


def apply(net: Any, image: Array, **given: Any) -> tuple[Array, dict[str, Any]]:
    result = ENGINE.apply(net, Photo(image), Infer(inputs=("-",), **given), Watch())
    return result.pixels, dict(result.facts)


def with_file(loaded: Any, image: Array, **given: Any) -> tuple[Array, dict[str, Any]]:
    assert ENGINE.ported is not None
    return apply(ENGINE.ported(loaded, Infer(inputs=("-",))), image, **given)


# --- what the file holds -----------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["unet-lite", "unet-seed"])
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (33, 17)])
def test_in_float64_the_file_s_network_is_what_infer_computes(arch: str, size: tuple[int, int]) -> None:
    net = random_net(arch)
    image = picture(*size)
    wanted, _ = apply(net, image)
    module = copy.deepcopy(ported_of(net).module).double()
    with torch.inference_mode():
        found = module(torch.from_numpy(image).double().permute(2, 0, 1)[None])
    assert found.dtype == torch.float64
    assert np.abs(found[0].permute(1, 2, 0).numpy() - wanted).max() < 1e-5
    assert np.abs(wanted - image).max() > 20 / 255


def test_a_batch_is_its_pictures_one_by_one(net: nn.Module) -> None:
    module = ported_of(net).module
    pictures = torch.rand(3, 3, 24, 17, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.allclose(
            module(pictures), torch.cat([module(each[None]) for each in pictures]), atol=1e-5
        )


@pytest.mark.parametrize("place", [0, pytest.param(31, marks=pytest.mark.slow)])
def test_the_halo_covers_what_both_stages_reach_and_no_block_more(net: nn.Module, place: int) -> None:
    """Change one pixel: nothing moves that is further away."""
    module, place = copy.deepcopy(ported_of(net).module).double(), 384 + place
    image = torch.full((1, 3, 9, 768), 0.5, dtype=torch.float64)
    touched = image.clone()
    touched[..., 4, place] = 1
    with torch.inference_mode():
        moved = torch.nonzero((module(image) != module(touched)).any(1).any(1)[0]).flatten()
    reach = max(place - int(moved.min()), int(moved.max()) - place)
    assert port.HALO - 2 * port.GRID < reach <= port.HALO


def test_its_words_and_axes_fit_it(net: nn.Module) -> None:
    made = ported_of(net)
    assert [slot.name for slot in (*made.inputs, *made.outputs)] == ["image", "sharp"]
    assert made.inputs[0].shape == made.outputs[0].shape == ("batch", 3, "height", "width")
    assert f"{port.HALO} pixels" in made.after
    assert "ICC profile is not applied" in made.before
    assert "may not be cut" in ported_of(random_net("unet-seed")).after
    assert json.loads(json.dumps(made.facts)) == made.facts


def test_real_inputs_are_the_middle_of_a_photo_mirrored_where_it_is_small(
    net: nn.Module, tmp_path: Path
) -> None:
    image = picture(6, 9, "uint8")
    images.write(tmp_path / "a.png", Photo(image))
    values = ported_of(net).real(tmp_path / "a.png", {"batch": 2, "height": 4, "width": 15})[0]
    assert values.shape == (2, 3, 4, 15)
    assert values.dtype == np.float32
    wanted = np.pad(image / 255, ((0, 0), (3, 3), (0, 0)), mode="reflect")[1:5]
    assert np.allclose(values[0], wanted.transpose(2, 0, 1), atol=1e-6)
    assert not np.allclose(values[0], values[1])


@pytest.mark.parametrize(("kind", "spread"), [("noise", 0.29), ("flat", 0), ("extreme", 0.5)])
def test_made_inputs_are_in_range(net: nn.Module, kind: str, spread: float) -> None:
    sizes = {"batch": 2, "height": 20, "width": 30}
    values = ported_of(net).made(kind, sizes, np.random.default_rng(0))[0]
    assert values.shape == (2, 3, 20, 30)
    assert values.dtype == np.float32
    assert values.min() >= 0
    assert values.max() <= 1
    assert values.std() == pytest.approx(spread, abs=0.02)


# --- a file of free sizes ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (33, 50)])
def test_a_file_gives_what_the_network_gives(net: nn.Module, size: tuple[int, int]) -> None:
    image = picture(*size)
    wanted, facts = apply(net, image)
    found, told = with_file(file_of(net), image)
    assert np.abs(found - wanted).max() < 1e-5
    assert told == facts


def test_tiles_of_a_file_equal_the_whole_photo(net: nn.Module) -> None:
    image = picture(5, 1000, "uint8")
    wanted, _ = apply(net, image)
    found, facts = with_file(file_of(net), image, tile=512)
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert facts["tiles"] == 2
    assert facts["halo"] == port.HALO


def test_memory_and_overlap_set_the_tiles_of_a_file(net: nn.Module) -> None:
    file = ENGINE.ported(file_of(net), None)  # type: ignore[misc]
    image = np.zeros((3000, 3000, 3), np.uint8)
    plan = file.plan(image, Infer(inputs=("-",), overlap=353))
    assert plan.halo == 384
    assert (plan.core + 2 * plan.halo) ** 2 * file.tiles.bytes_per_pixel <= 1e9
    assert file.plan(image, Infer(inputs=("-",), memory=10)).core == 0


def test_strength_and_floats_beyond_white_are_as_without_a_file(net: nn.Module) -> None:
    image = picture(20, 30) * 3 - 1
    image[3, 4] = np.nan
    wanted, _ = apply(net, image, strength=0.5)
    found, _ = with_file(file_of(net), image, strength=0.5)
    assert np.allclose(found, wanted, atol=1e-5, equal_nan=True)
    assert with_file(file_of(net), image, strength=0)[1]["tiles"] == 0


# --- a file of fixed size ----------------------------------------------------------------------


@settings(max_examples=20)
@given(some.integers(1, 2000), some.integers(96, 700), some.sampled_from([0, 32, 64]))
def test_windows_cover_a_side_once_each_with_its_halo(size: int, length: int, halo: int) -> None:
    facts = TileFacts(block=32)
    if size > length and length - 2 * halo < 32:
        with pytest.raises(ImgtoolError):
            tiles.windows(size, length, halo, facts)
        return
    spans = tiles.windows(size, length, halo, facts)
    assert [each for span in spans for each in range(span.start, span.stop)] == list(range(size))
    for span in spans:
        assert span.read_stop - span.read_start == length
        assert span.read_start % 32 == 0
        assert span.start - span.read_start >= halo or span.start == span.read_start == 0
        assert span.read_stop - span.stop >= halo or span is spans[-1]
    beyond = spans[-1].read_stop - size
    assert 0 <= beyond < max(32 + 8, length - size + 1)
    assert beyond == 0 or beyond >= 8 or length - 2 * halo < 32


def test_windows_that_end_with_the_photo_give_what_the_network_gives(net: nn.Module) -> None:
    image = picture(8, 736 + 2 * 32)
    wanted, _ = apply(net, image)
    found, facts = with_file(file_of(net, 8, 736), image)
    assert np.abs(found - wanted).max() < 1e-5
    assert facts["tiles"] == 3


def test_windows_end_with_the_photo_or_a_good_way_beyond_it() -> None:
    """A few mirrored pixels between a photo's end and the file's own mirroring are mended badly."""
    facts = TileFacts(block=32)
    for size, last in ((800, 32), (801, 64), (824, 64), (825, 96), (832, 64), (760, 0), (765, 32), (768, 0)):
        assert tiles.windows(size, 768, 352, facts)[-1].read_start == last, size


def test_a_photo_is_mirrored_up_to_a_file_s_size(net: nn.Module) -> None:
    image = picture(8, 400)
    wanted, _ = apply(net, image)
    found, _ = with_file(file_of(net, 8, 640), image)
    mirrored = np.pad(image, ((0, 0), (0, 240), (0, 0)), mode="reflect")
    assert np.abs(found - apply(net, mirrored)[0][:, :400]).max() < 1e-5
    assert np.abs(found - wanted)[:, : 400 - port.HALO].max() < 1e-5


def test_a_size_that_leaves_nothing_of_a_tile_is_refused_with_one_that_does(net: nn.Module) -> None:
    with pytest.raises(ImgtoolError, match="512") as caught:
        with_file(file_of(net, 512, 512), picture(600, 600))
    assert "736" in caught.value.hint


def test_the_original_s_file_takes_whole_photos_of_its_own_size_alone() -> None:
    net = random_net("unet-seed")
    file, image = file_of(net, 32, 48), picture(32, 48)
    assert np.abs(with_file(file, image)[0] - apply(net, image)[0]).max() < 1e-5
    with pytest.raises(ImgtoolError, match="32x48") as caught:
        with_file(file, picture(32, 40))
    assert "--size 32x40" in caught.value.hint
    with pytest.raises(ImgtoolError, match="tiles") as caught:
        with_file(file_of(net), image, tile=16)
    assert caught.value.code == USAGE


@pytest.mark.parametrize(
    "facts",
    [
        [1], None, 3, {"halo": 64, "grid": 32}, {"halo": -64}, {"grid": 0}, {"grid": 1e9}, {"halo": "far"},
        {"halo": float("nan")}, {"local": None}, {"grid": 2.5},
    ],
)  # fmt: skip
def test_facts_that_cannot_be_are_refused_in_a_line(net: nn.Module, facts: Any) -> None:
    if isinstance(facts, dict) and len(facts) == 1:
        facts = {"local": True, "halo": 352, "grid": 32} | facts
    with pytest.raises(ImgtoolError, match="does not say how it may be used: facts") as caught:
        with_file(file_of(net, about={"facts": facts}), picture(8, 8))
    assert caught.value.code == FAILED


@pytest.mark.parametrize(
    ("key", "shapes", "what"),
    [
        ("inputs", [(3,)], "an input of 3, where the network's is 1×3×height×width"),
        ("inputs", [()], "an input of one number"),
        ("inputs", [(1, 4, None, None)], "an input of 1×4×any×any"),
        ("inputs", [(2, 3, 64, 64)], "an input of 2×3×64×64"),
        ("inputs", [(1, 3, None, None)] * 2, "has 2 inputs, not 1"),
        ("inputs", [], "has 0 inputs"),
        ("outputs", [(1, 3)], "an output of 1×3"),
        ("outputs", [(1, 3, None, None)] * 2, "has 2 outputs"),
    ],
)
def test_a_file_of_something_else_is_refused_in_a_line(
    net: nn.Module, key: str, shapes: list[Any], what: str
) -> None:
    loaded = file_of(net)
    setattr(loaded, key, tuple(SimpleNamespace(shape=shape) for shape in shapes))
    with pytest.raises(ImgtoolError, match=what) as caught:
        with_file(loaded, picture(8, 8))
    assert caught.value.code == FAILED


@pytest.mark.parametrize(
    ("out", "what"),
    [
        (np.zeros((1, 3, 8, 9), np.float32), "gives 1×3×8×9, not 1×3×8×8"),
        (np.full((1, 3, 8, 8), np.inf, np.float32), "not finite"),
    ],
)
def test_an_answer_that_is_no_photo_is_refused_in_a_line(net: nn.Module, out: Array, what: str) -> None:
    loaded = file_of(net)
    type(loaded).__call__ = staticmethod(lambda *given: [out])
    with pytest.raises(ImgtoolError, match=what):
        with_file(loaded, picture(8, 8))


def test_a_file_that_does_not_say_how_far_it_reaches_is_refused(net: nn.Module) -> None:
    with pytest.raises(ImgtoolError, match="does not say"):
        with_file(file_of(net, about={"facts": {"local": True}}), picture(8, 8))


# --- the shipped network, by its runtime -------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", ["", "1024x1024"])
def test_the_shipped_network_s_file_sharpens_as_the_network(tmp_path: Path, size: str) -> None:
    from imgtool.export import onnx
    from imgtool.export.order import Order, lengths

    net = checkpoint.network(ENGINE, checkpoint.read_weights(header.find(ENGINE.weights), "deblur"))
    made = ported_of(net)
    about = {"facts": made.facts, "inputs": [{"name": "image"}], "outputs": [{"name": "sharp"}]}
    onnx.write(Order(made, *lengths(made, size, dynamic=False, free_form=True), about), tmp_path / "x.onnx")
    loaded = runtime.open(tmp_path / "x.onnx")
    image = images.read(ROOT / "examples/blurred.jpg").pixels
    wanted, _ = apply(net, image)
    for tile in (None, 256):
        found, _ = with_file(loaded, image, tile=tile)
        apart = np.abs(found.astype(int) - wanted)
        assert apart[: -port.HALO, : -port.HALO].max() <= 1
        assert apart.max() <= (3 if size else 1)
