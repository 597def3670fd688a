"""Exported filter networks: a file's network is what infer computes, and infer with it the same photo."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from filed import filed

from imgtool import images
from imgtool.engine import Watch
from imgtool.engines.filter import apply, model, quantise, targets
from imgtool.engines.filter.engine import ENGINE
from imgtool.engines.filter.settings import Export, Infer, Model
from imgtool.errors import FAILED, ImgtoolError
from imgtool.images import Photo
from imgtool.port import Port

Array = npt.NDArray[Any]
NETWORKS = {
    "fold": Model(width=3, depth=2),
    "three colours": Model(width=3, depth=2, target="bilateral"),
    "dilated": Model(arch="dilated", width=3, dilations="1,2", target="bilateral"),
    "unshuffle": Model(arch="unshuffle", width=4, factor=3, dilations="1", target="bilateral"),
    "pooled": Model(arch="pooled", width=3, depth=2, factor=4, context=4, carried=2, dilations="1"),
    "original": Model(arch="clapp", width=4, depth=2),
    "maximum": Model(width=3, depth=2, target="sobel_3_max"),
    "thin edges": Model(width=3, depth=2, target="sobel_5_canny"),
    "slopes": Model(width=3, depth=2, target="canny"),
}
FINISHED = ("maximum", "thin edges", "slopes")
PLAIN = [name for name in NETWORKS if name not in FINISHED]
SIZES = [(1, 1), (2, 40), (17, 15), (48, 37)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "BLOCK", 16)
    monkeypatch.setattr(apply, "FILE_BLOCK", 24)


def network(settings: Model) -> Any:
    """Build a network that does something to every pixel, and has learnt nothing."""
    torch.manual_seed(5)
    net = model.build(settings)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return net.eval()


NETS = {name: network(settings) for name, settings in NETWORKS.items()}


def ported_of(net: Any) -> Port:
    assert ENGINE.port is not None
    return ENGINE.port(net, Export(to="onnx"))


def file_of(net: Any, *size: int, about: Mapping[str, Any] | None = None) -> Any:
    return filed(ported_of(net), net.count, *size, about=about)


def picture(height: int, width: int, dtype: Any = np.float32) -> Array:
    values = np.random.default_rng(100 * height + width).random((height, width, 3), np.float32)
    return values if dtype == np.float32 else (values * np.iinfo(dtype).max).astype(dtype)


def applied(net: Any, image: Array, **settings: Any) -> Array:
    return ENGINE.apply(net, Photo(image), Infer(inputs=("-",), **settings), Watch()).pixels


def with_file(loaded: Any, image: Array, **given: Any) -> Array:
    assert ENGINE.ported is not None
    return applied(ENGINE.ported(loaded, Infer(inputs=("-",))), image, **given)


# --- what the file holds -----------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("size", SIZES)
def test_in_float64_the_file_s_network_is_what_infer_computes(name: str, size: tuple[int, int]) -> None:
    net, image = NETS[name], picture(*size)
    module = copy.deepcopy(ported_of(net).module).double()
    with torch.inference_mode():
        found = module(torch.from_numpy(image).double().permute(2, 0, 1)[None])
    assert found.dtype == torch.float64
    assert found.shape == (1, net.count, *size)
    wanted = applied(net, image)
    assert np.abs(found[0].permute(1, 2, 0).numpy().reshape(wanted.shape) - wanted).max() < 1e-5


@pytest.mark.parametrize("name", FINISHED)
def test_what_its_words_say_of_the_last_steps_is_what_infer_does(name: str) -> None:
    net, image = NETS[name], picture(30, 41, np.uint8)
    made = ported_of(net)
    seen = torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        found = made.module(seen)[0].numpy()
    if name == "slopes":
        assert "Multiply by 1020" in made.after
        assert "cv2.Canny of both derivatives, thresholds 100 and 200" in made.after
        assert made.outputs[0].low == -1
        right, down = np.clip(np.rint(found * 1020), -1020, 1020).astype(np.int16)
        wanted = np.asarray(cv2.Canny(right, down, 100, 200), np.uint8)
    else:
        assert "by its maximum, multiply by 255 and round down" in made.after
        wanted = np.clip(np.floor(found[0] / found.max() * 255), 0, 255).astype(np.uint8)
        wanted[found[0] == found.max()] = 255
    if name == "thin edges":
        assert "cv2.Canny of the levels, thresholds 50 and 150" in made.after
        wanted = np.asarray(cv2.Canny(wanted, 50, 150), np.uint8)
    apart = np.abs(wanted.astype(int) - applied(net, image)) > (1 if name == "maximum" else 0)
    assert apart.mean() < 0.01


def test_thresholds_are_those_of_the_target() -> None:
    net = network(Model(width=3, depth=2, target="canny:low=30,high=70"))
    assert "thresholds 30 and 70" in ported_of(net).after


@pytest.mark.parametrize("name", NETWORKS)
def test_it_says_what_it_is(name: str) -> None:
    made, net = ported_of(NETS[name]), NETS[name]
    assert (made.inputs[0].name, made.outputs[0].name) == ("image", "filtered")
    assert made.outputs[0].shape == ("batch", net.count, "height", "width")
    assert net.target in made.outputs[0].meaning
    assert ("may not be cut" in made.after) is (name == "original")
    assert not made.refuse
    assert json.loads(json.dumps(made.facts)) == made.facts


@pytest.mark.parametrize("name", ["dilated", "unshuffle", "pooled"])
def test_a_photo_that_is_cut_as_its_words_say_is_the_photo_whole(name: str) -> None:
    net = NETS[name]
    made, reach, multiple = ported_of(net), int(net.reach), int(net.multiple)
    assert f"begin at multiples of {multiple}; of each, {reach} pixels are thrown away" in made.after
    second = 3 * multiple
    image = torch.from_numpy(picture(2 * reach + second + 9, 11)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        whole = made.module(image)
        first, last = made.module(image[:, :, : 2 * reach + second]), made.module(image[:, :, second:])
    cut = torch.cat([first[:, :, : reach + second], last[:, :, reach:]], 2)
    assert float((cut - whole).abs().max()) < 1e-5


def test_a_photo_smaller_than_the_kernel_of_a_network_that_sees_it_whole_is_filled_up_as_its_words_say() -> (
    None
):
    made = ported_of(NETS["original"])
    assert f"fewer than {made.facts['filled_to']} rows or columns is filled up" in made.after
    assert "filled_to" not in ported_of(NETS["dilated"]).facts
    assert "least" not in made.facts


def test_networks_that_round_between_layers_are_written_in_no_precision() -> None:
    net = network(Model(width=3, depth=2, arithmetic="int8"))
    assert quantise.is_quantised(net)
    refused = ported_of(net).refuse
    assert set(refused) == {"fp32", "fp16", "int8"}
    assert all("--precision int8" in reason for reason in refused.values())


def test_code_that_only_the_weights_name_is_named_and_not_run() -> None:
    net = copy.copy(NETS["fold"])
    net.target = "mine.py:blur"
    assert "mine.py:blur" in ported_of(net).outputs[0].meaning
    assert "mine.py" not in targets.KINDS


def test_inputs_are_real_or_made(tmp_path: Path) -> None:
    made = ported_of(NETS["fold"])
    images.write(tmp_path / "a.png", Photo(picture(6, 9, np.uint8)))
    sizes = {"batch": 2, "height": 4, "width": 15}
    values = made.real(tmp_path / "a.png", sizes)[0]
    wanted = np.pad(picture(6, 9, np.uint8) / 255, ((0, 0), (3, 3), (0, 0)), mode="reflect")[1:5]
    assert np.allclose(values[0], wanted.transpose(2, 0, 1), atol=1e-6)
    for kind in ("noise", "flat", "extreme"):
        values = made.made(kind, sizes, np.random.default_rng(0))[0]
        assert values.shape == (2, 3, 4, 15)
        assert values.dtype == np.float32
        assert values.min() >= 0
        assert values.max() <= 1


# --- a file as the network ---------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("size", SIZES)
def test_a_file_gives_what_the_network_gives(name: str, size: tuple[int, int]) -> None:
    image = picture(*size)
    wanted = applied(NETS[name], image)
    assert np.abs(with_file(file_of(NETS[name]), image) - wanted).max() < 1e-5


@pytest.mark.parametrize("name", PLAIN[:-1])
@pytest.mark.parametrize("size", [(17, 15), (48, 37), (60, 90)])
@pytest.mark.parametrize("tile", [None, 16])
def test_a_file_of_fixed_size_gives_what_the_network_gives(
    name: str, size: tuple[int, int], tile: int | None
) -> None:
    image = picture(*size)
    wanted = applied(NETS[name], image)
    assert np.abs(with_file(file_of(NETS[name], 33, 50), image, tile=tile) - wanted).max() < 1e-5


@pytest.mark.parametrize("name", FINISHED)
def test_a_file_s_map_is_finished_as_the_network_s(name: str) -> None:
    image = picture(48, 37, np.uint8)
    apart = np.abs(with_file(file_of(NETS[name]), image).astype(int) - applied(NETS[name], image))
    assert (apart > (1 if name == "maximum" else 0)).mean() < 0.01


def test_tiles_of_a_file_equal_the_whole_photo() -> None:
    image, file = picture(70, 90, np.uint8), file_of(NETS["pooled"])
    assert np.array_equal(with_file(file, image, tile=24), with_file(file, image, tile=0))


def test_the_original_s_file_takes_whole_photos_of_its_own_size_alone() -> None:
    net, file = NETS["original"], file_of(NETS["original"], 20, 30)
    image = picture(20, 30)
    assert np.abs(with_file(file, image) - applied(net, image)).max() < 1e-5
    with pytest.raises(ImgtoolError, match="20x30") as caught:
        with_file(file, picture(20, 31))
    assert "--size 20x31" in caught.value.hint


def test_a_size_that_the_reach_eats_up_is_refused() -> None:
    with pytest.raises(ImgtoolError, match="takes 8 pixels") as caught:
        with_file(file_of(NETS["pooled"], 8, 40), picture(8, 40))
    assert "free sizes" in caught.value.hint


@pytest.mark.parametrize("about", [{}, {"facts": {}}, {"facts": {"target": "tv", "reach": "far"}}])
def test_a_file_that_does_not_say_how_it_is_used_is_refused(about: dict[str, Any]) -> None:
    with pytest.raises(ImgtoolError, match="does not say"):
        with_file(file_of(NETS["fold"], about=about), picture(8, 8))


@pytest.mark.parametrize(
    "wrong",
    [
        {"reach": -1}, {"multiple": 0}, {"count": 4}, {"count": 0}, {"reach": 1e12}, {"target": 3},
        {"count": 1, "residual": True}, {"local": False}, {"local": False, "filled_to": 0},
        {"target": "sobel_3"}, {"target": "canny:high=none"}, {"multiple": None},
    ],
)  # fmt: skip
def test_facts_that_cannot_be_are_refused_in_a_line(wrong: dict[str, Any]) -> None:
    facts = {"target": "bilateral", "reach": 2, "multiple": 1, "count": 3, "residual": True, "local": True}
    with pytest.raises(ImgtoolError, match="does not say how it may be used: facts") as caught:
        with_file(file_of(NETS["three colours"], about={"facts": facts | wrong}), picture(8, 8))
    assert caught.value.code == FAILED


def test_a_file_with_other_channels_than_it_says_is_refused() -> None:
    loaded = file_of(NETS["three colours"])
    loaded.outputs = (SimpleNamespace(shape=(1, 1, None, None)),)
    with pytest.raises(ImgtoolError, match="an output of 1×1×any×any, where the network's is 1×3"):
        with_file(loaded, picture(8, 8))


def test_a_file_of_another_filter_than_the_one_named_is_refused() -> None:
    with pytest.raises(ImgtoolError, match="imitate bilateral"):
        with_file(file_of(NETS["dilated"]), picture(8, 8), target="tv", weights="x.onnx")


# --- by its runtime ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS])
@pytest.mark.parametrize("size", ["", "64x80"])
def test_a_written_file_gives_what_the_network_gives(tmp_path: Path, name: str, size: str) -> None:
    from imgtool import runtime
    from imgtool.export import onnx
    from imgtool.export.order import Order, lengths

    if name == "original" and size:
        pytest.skip("takes photos of one size")
    made, image = ported_of(NETS[name]), picture(70, 90, np.uint8)
    about = {"facts": made.facts, "inputs": [{"name": "image"}], "outputs": [{"name": "filtered"}]}
    onnx.write(Order(made, *lengths(made, size, dynamic=False, free_form=True), about), tmp_path / "x.onnx")
    found = with_file(runtime.open(tmp_path / "x.onnx"), image)
    apart = np.abs(found.astype(int) - applied(NETS[name], image))
    assert (apart > (0 if name in FINISHED[1:] else 1)).mean() <= (0.01 if name in FINISHED else 0)
