"""Photos filtered: tiles are the whole photo to the last bit, borders, types, memory that is used again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch

from imgtool import compute
from imgtool.engine import Result, Watch
from imgtool.engines.filter import apply, model, quantise, targets
from imgtool.engines.filter.engine import ENGINE
from imgtool.engines.filter.settings import Bench, Infer, Model
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import Photo

Array = npt.NDArray[Any]

BLOCK = 16
NETWORKS = {
    "fold": Model(width=3, depth=2),
    "fold, three colours": Model(width=3, depth=2, target="bilateral"),
    "dilated": Model(arch="dilated", width=3, dilations="1,2", target="bilateral"),
    "unshuffle": Model(arch="unshuffle", width=4, factor=3, dilations="1", target="bilateral"),
    "pooled": Model(arch="pooled", width=3, depth=2, factor=4, context=4, carried=2, dilations="1"),
    "pooled by 3": Model(
        arch="pooled", width=3, depth=1, factor=3, context=4, carried=2, dilations="1", target="bilateral"
    ),
    "int8": Model(width=3, depth=2, arithmetic="int8"),
    "maximum": Model(width=3, depth=2, target="sobel_3_max"),
    "thin edges": Model(width=3, depth=2, target="sobel_5_canny"),
    "slopes": Model(width=3, depth=2, target="canny"),
}
TWO_PASSES = ("maximum", "thin edges")
SIZES = [(1, 1), (1, 40), (33, 2), (15, 17), (48, 37)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "BLOCK", BLOCK)


def network(settings: Model) -> Any:
    """Build a network that does something to every pixel, and has learnt nothing."""
    torch.manual_seed(5)
    net = model.build(settings)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    if quantise.is_quantised(net):
        net.train()(torch.rand(2, 3, 20, 20))
    return compute.channels_last(net.eval())


NETS = {name: network(settings) for name, settings in NETWORKS.items()}


def picture(height: int, width: int, dtype: Any = np.uint8) -> Array:
    values = np.random.default_rng(100 * height + width).random((height, width, 3), np.float32)
    return values if dtype == np.float32 else (values * np.iinfo(dtype).max).astype(dtype)


def applied(net: Any, image: Array, watch: Watch | None = None, **settings: Any) -> Result:
    return ENGINE.apply(net, Photo(image), Infer(inputs=("-",), **settings), watch or Watch())


def direct(net: Any, image: Array) -> Array:
    """What the network makes of a photo in one piece, mirrored by NumPy; float32, not clipped."""
    values = image.astype(np.float32)
    if image.dtype.kind == "u":
        values /= np.iinfo(image.dtype).max
    height, width = image.shape[:2]
    more = (-height % net.multiple, -width % net.multiple)
    sides = [(net.reach, net.reach + each) for each in more]
    seen = torch.from_numpy(np.pad(values, (*sides, (0, 0)), mode="reflect")).permute(2, 0, 1)[None]
    with torch.inference_mode():
        found = net(seen)[0, :, :height, :width].permute(1, 2, 0).numpy()
    return found if net.count > 1 else found[..., 0]


# --- the whole photo --------------------------------------------------------------------------

LOCAL = [name for name in NETS if name not in (*TWO_PASSES, "slopes")]


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("size", [(15, 17), (48, 37)])
def test_a_photo_is_mirrored_once_by_the_reach_and_given_to_the_network(
    name: str, size: tuple[int, int]
) -> None:
    image = picture(*size, np.float32)
    found = applied(NETS[name], image).pixels
    assert np.abs(found - direct(NETS[name], image)).max() < 1e-5
    assert found.std() > 0.01


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_whole_numbers_are_rounded_to_nearest(dtype: Any) -> None:
    image, most = picture(33, 20, dtype), np.iinfo(dtype).max
    found = applied(NETS["fold, three colours"], image).pixels
    assert found.dtype == dtype
    wanted = np.clip(direct(NETS["fold, three colours"], image), 0, 1) * most
    assert np.abs(found - wanted).max() < 0.5 + most * 1e-6


def test_what_a_float_photo_holds_beyond_0_to_1_stays() -> None:
    """Of a residual network: what it sees is clipped, and its change added to the photo. NaN counts as 0."""
    net, image = NETS["fold, three colours"], picture(20, 40, np.float32)
    image[3, 5], image[9, 30], image[12, 20] = 4.0, -2.0, np.nan
    seen = np.clip(np.nan_to_num(image, nan=0.0), 0, 1)
    wanted = direct(net, seen) + np.nan_to_num(image, nan=0.0) - seen
    assert np.abs(applied(net, image).pixels - wanted).max() < 1e-5


def test_a_network_that_is_not_local_takes_the_photo_whole() -> None:
    net, image = network(Model(arch="clapp", width=4, depth=2)), picture(40, 37)
    found = applied(net, image)
    wanted = np.clip(direct(net, image), 0, 1) * 255
    assert np.abs(found.pixels - wanted).max() < 0.501
    assert found.facts == {"target": "sobel_3", "tiles": 1, "tile": 40, "halo": 0}
    with pytest.raises(ImgtoolError, match="GroupNorm") as caught:
        applied(net, image, tile=BLOCK)
    assert caught.value.code == USAGE


def test_a_network_that_gives_nan_is_refused() -> None:
    net = network(NETWORKS["fold"])
    torch.nn.init.constant_(net.head.bias, torch.nan)
    with pytest.raises(ImgtoolError, match="not finite"):
        applied(net, picture(5, 5))


# --- tiles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NETS)
def test_tiles_are_the_whole_photo_bit_by_bit(name: str, size: tuple[int, int], dtype: Any) -> None:
    net, image = NETS[name], picture(*size, dtype)
    before = image.copy()
    whole, tiled = applied(net, image, tile=0), applied(net, image, tile=1)
    assert np.array_equal(whole.pixels, tiled.pixels)
    assert whole.pixels.dtype == dtype
    assert np.array_equal(image, before)
    edge = BLOCK // net.multiple * net.multiple
    assert tiled.facts["tiles"] == -(-size[0] // edge) * -(-size[1] // edge)
    assert whole.facts["tiles"] == 1


def test_what_fits_into_memory_is_a_tile() -> None:
    """40 bytes per pixel, of tiles that hold whole blocks."""
    facts = applied(NETS["fold"], picture(150, 150), memory=40 * 100**2 / 1e9).facts
    assert facts == {"target": "sobel_3", "tiles": 4, "tile": 80, "halo": 2}


def test_out_of_memory_tiles_are_made_smaller_down_to_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    net, image, said = NETS["fold"], picture(70, 90), []
    whole, core = applied(net, image).pixels, apply.Work.core

    def short_of_memory(work: apply.Work, part: Array, tile: Any) -> Array:
        if tile.columns.stop - tile.columns.start > 64:
            raise MemoryError
        return core(work, part, tile)

    monkeypatch.setattr(apply.Work, "core", short_of_memory)
    found = applied(net, image, Watch(say=said.append), tile=0)
    assert np.array_equal(found.pixels, whole)
    assert found.facts["tile"] == 48
    assert said == ["out of memory: going on with tiles of 48 pixels"]


# --- in the photo's own memory ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("tile", [0, BLOCK])
@pytest.mark.parametrize("name", NETS)
def test_a_photo_that_may_be_overwritten_gives_the_same(name: str, tile: int, dtype: Any) -> None:
    image = picture(53, 37, dtype)
    wanted = applied(NETS[name], image.copy(), tile=tile).pixels
    found = applied(NETS[name], image, Watch(overwrite=True), tile=tile).pixels
    assert found is not image
    assert np.array_equal(found, wanted)
    last = targets.parse(NETS[name].target).finish
    assert np.shares_memory(found, image) == (last is None)


def test_a_grey_photo_in_one_channel_of_memory_is_left_as_it_is() -> None:
    grey = picture(40, 40)[..., 0].copy()
    three = np.broadcast_to(grey[..., None], (40, 40, 3))
    wanted = applied(NETS["fold, three colours"], np.ascontiguousarray(three)).pixels
    before = grey.copy()
    found = applied(NETS["fold, three colours"], three, Watch(overwrite=True), tile=BLOCK).pixels
    assert np.array_equal(found, wanted)
    assert np.array_equal(grey, before)


# --- filters of two passes --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("name", TWO_PASSES)
def test_a_map_divided_by_its_maximum(name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held in floats or, where a photo is large, computed twice: the result is the same."""
    net, image = NETS[name], picture(48, 37, dtype)
    small = applied(net, image)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(apply, "LARGE", 100)
    large = applied(net, image.copy(), Watch(lambda *count: told.append(count), overwrite=True), tile=BLOCK)
    assert np.array_equal(small.pixels, large.pixels)
    assert small.pixels.dtype == large.pixels.dtype == dtype
    assert told[-1] == (9, 9) == (large.facts["tiles"],) * 2
    assert len(told) == 9

    found = direct(net, image)
    levels = np.clip(np.floor(found * np.float32(255 / found.max())), 0, 255).astype(np.uint8)
    wanted = levels if name == "maximum" else cv2.Canny(levels, 50, 150)
    full = 1 if dtype == np.float32 else np.iinfo(dtype).max
    away = np.abs(small.pixels.astype(float) / full - wanted / 255.0)
    assert away.max() < 1.001 / 255 if name == "maximum" else (away > 0).mean() < 0.01


def test_slopes_become_edges() -> None:
    """Canny's filter of the map of both derivatives, as OpenCV makes it of whole numbers."""
    image = picture(48, 37)
    slopes = np.rint(np.clip(direct(NETS["slopes"], image), -1, 1) * 1020).astype(np.int16)
    wanted = cv2.Canny(*(np.ascontiguousarray(slopes[..., way]) for way in (0, 1)), 100, 200)
    found = applied(NETS["slopes"], image).pixels
    assert found.shape == (48, 37)
    assert (found != wanted).mean() < 0.01


# --- beside the filter ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("name", ["fold", "fold, three colours", "thin edges"])
def test_comparison_with_the_filter_itself(name: str, dtype: Any) -> None:
    net, image = NETS[name], picture(48, 37, dtype)
    filtered, full = targets.parse(net.target)(image), 1 if dtype == np.float32 else np.iinfo(dtype).max
    result = applied(net, image, compare=True)
    assert result.reference is not None
    assert result.reference.dtype == dtype
    assert (
        np.abs(result.reference.astype(float) - np.clip(filtered, 0, 1) * full).max()
        < 0.51 * (full > 1) + 1e-6
    )
    error = np.square((result.pixels.astype(float) - result.reference) / full).mean()
    assert result.facts["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    assert result.labels == ("photo", "network", f"filter {net.target}")
    alone = applied(net, image)
    assert np.array_equal(alone.pixels, result.pixels)
    assert (alone.reference, alone.labels, "psnr" in alone.facts) == (None, ("photo", "network"), False)


def test_what_is_the_same_is_100_db() -> None:
    net = network(Model(width=3, depth=2, target="gaussian:sigma=0.1"))
    torch.nn.init.zeros_(net.head.weight)
    torch.nn.init.zeros_(net.head.bias)
    assert applied(net, picture(20, 20), compare=True).facts["psnr"] == pytest.approx(100)


def test_pairs_hold_no_filter_to_compare_with() -> None:
    net = network(Model(width=3, depth=1, target="pairs:somewhere"))
    assert applied(net, picture(9, 9)).pixels.shape == (9, 9, 3)
    with pytest.raises(ImgtoolError, match="pairs:somewhere is no function") as caught:
        applied(net, picture(9, 9), compare=True)
    assert caught.value.code == USAGE


def test_code_that_only_weights_name_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("open('ran', 'w').close()\ndef same(photo):\n    return photo\n")
    net, image = network(Model(width=3, depth=1, target="mine.py:same")), picture(9, 9)
    with pytest.raises(ImgtoolError, match=r"--compare would run mine\.py:same") as caught:
        applied(net, image, compare=True)
    assert "--target mine.py:same" in caught.value.hint
    assert not Path("ran").exists()
    found = applied(net, image, compare=True, weights="mine", target="mine.py:same")
    assert np.array_equal(found.reference, image)


def test_the_classical_way_is_the_sobel_filter_in_three_channels() -> None:
    image = picture(20, 30, np.uint16)
    found = apply.baseline(image)
    assert found.dtype == np.uint16
    grey = image.astype(np.float64) @ (0.299, 0.587, 0.114) / 65535
    slopes = [cv2.Sobel(grey, cv2.CV_64F, *way, ksize=3) for way in ((1, 0), (0, 1))]
    wanted = np.clip(np.hypot(*slopes) / 4, 0, 1) * 65535
    assert np.abs(found - wanted[..., None]).max() < 0.6


# --- which weights ----------------------------------------------------------------------------


def test_a_filters_name_is_that_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = ["deblur-tv", "filter-bilateral", "filter-sobel_3"]
    monkeypatch.setattr(apply.header, "shipped", lambda: shipped)
    given = {"bilateral": "filter-bilateral", "bilateral:d=9": "filter-bilateral", "": ""}
    for target, name in given.items():
        assert apply.weights(Infer(inputs=("-",), target=target)) == name
    assert apply.weights(Bench(target=("bilateral",))) == ""
    for target, words in (
        ("bilaterl", "bilateral"),
        ("tv", "train your own"),
        ("bilateral:d=5", "train your own"),
    ):
        with pytest.raises(ImgtoolError, match=f"no shipped weights imitate {target}") as caught:
            apply.weights(Infer(inputs=("-",), target=target))
        assert caught.value.code == USAGE
        assert words in caught.value.hint
    with pytest.raises(ImgtoolError, match="no parameter e"):
        apply.weights(Infer(inputs=("-",), target="bilateral:e=5"))


def test_weights_of_another_filter_than_the_named_one_are_refused() -> None:
    net, image = NETS["fold"], picture(9, 9)
    wanted = net.target
    assert applied(net, image, weights="mine", target=wanted).pixels.shape == (9, 9)
    with pytest.raises(ImgtoolError, match=f"the weights mine imitate {wanted}, not tv") as caught:
        applied(net, image, weights="mine", target="tv:weight=0.1")
    assert caught.value.code == USAGE


def test_facts_of_cutting() -> None:
    """Tiles hold whole blocks of the network's own multiple; the halo is the reach."""
    facts = apply.tile_facts(NETS["pooled by 3"])
    assert (facts.multiple, facts.grid, facts.local) == (3, 15, True)
    assert facts.halo == facts.border == NETS["pooled by 3"].reach
