"""The deblur engine on photos: tiles equal the whole, memory keeps its budget, types are kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from imgtool import tiles
from imgtool.engine import Watch
from imgtool.engines.deblur.engine import ENGINE, tile_facts
from imgtool.engines.deblur.settings import Infer, Model
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import Photo

ROOT = Path(__file__).parents[2]
Array = npt.NDArray[Any]
SIZES = [(1, 1), (1, 70), (17, 15), (257, 255), (200, 300)]
TOLERANCE = 0.05 / 255


def random_net(arch: str = "unet-lite") -> nn.Module:
    """Return a network whose every layer matters, as after training, but which has learnt nothing."""
    net = ENGINE.build(Model.model_validate({"arch": arch})).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter += torch.randn(parameter.shape, generator=generator) * scale
    return net


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return random_net()


def picture(height: int, width: int, dtype: str = "float32") -> Array:
    rng = np.random.default_rng(height * 1000 + width)
    if dtype == "float32":
        return rng.random((height, width, 3), np.float32)
    return rng.integers(0, np.iinfo(dtype).max + 1, (height, width, 3), dtype)


def apply(net: nn.Module, image: Array, **settings: Any) -> tuple[Array, dict[str, Any]]:
    result = ENGINE.apply(net, Photo(image), Infer(inputs=("-",), **settings), Watch())
    return result.image, dict(result.facts)


@pytest.mark.parametrize("size", [*SIZES, pytest.param((359, 641), marks=pytest.mark.slow)])
@pytest.mark.parametrize("tile", [64, 256])
def test_tiles_equal_the_whole_photo(net: nn.Module, size: tuple[int, int], tile: int) -> None:
    image = picture(*size)
    whole, _ = apply(net, image, tile=0)
    tiled, facts = apply(net, image, tile=tile)
    assert np.abs(whole - image).max() > 20 / 255  # the network does something
    assert np.abs(whole - tiled).max() <= TOLERANCE
    assert facts["tiles"] == max(-(-size[0] // tile), 1) * max(-(-size[1] // tile), 1)


def test_without_overlap_the_difference_is_seen(net: nn.Module) -> None:
    image = picture(200, 300)
    whole, _ = apply(net, image, tile=0)
    tiled, facts = apply(net, image, tile=64, overlap=0)
    assert np.abs(whole - tiled).max() > TOLERANCE
    assert facts["halo"] == 0


@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_the_halo_covers_the_reach(net: nn.Module, stage: str) -> None:
    """Change one pixel: nothing moves that is further away than the halo."""
    facts, part = tile_facts(net), getattr(net, stage)
    image = np.full((193, 193, 3), 0.5, np.float32)
    touched = image.copy()
    touched[96, 96] = 1.0
    out = [tiles.run(part, each, tiles.Plan(0, 0), facts)[0] for each in (touched, image)]
    moved = (out[0] != out[1]).any(axis=2)
    rows, columns = np.flatnonzero(moved.any(axis=1)), np.flatnonzero(moved.any(axis=0))
    reach = max(96 - rows[0], rows[-1] - 96, 96 - columns[0], columns[-1] - 96)
    assert 8 < reach <= facts.halo


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_types_and_sizes_are_kept(net: nn.Module, dtype: str) -> None:
    image = picture(33, 50, dtype)
    before = image.copy()
    out, facts = apply(net, image)
    assert (out.dtype, out.shape) == (image.dtype, image.shape)
    assert np.array_equal(image, before)
    assert facts == {"tiles": 1, "tile": 50, "halo": 0, "strength": 1.0}
    assert not np.array_equal(out, image)


def test_8_and_16_bit_agree_with_floats(net: nn.Module) -> None:
    eight = picture(40, 40, "uint8")
    as_float, _ = apply(net, eight.astype(np.float32) / 255)
    assert np.abs(apply(net, eight)[0] - np.clip(as_float, 0, 1) * 255).max() <= 0.501
    sixteen = apply(net, eight.astype(np.uint16) * 257)[0]
    assert np.abs(sixteen - np.clip(as_float, 0, 1) * 65535).max() <= 0.52


def test_strength(net: nn.Module) -> None:
    image = picture(40, 40)
    full, half = apply(net, image)[0], apply(net, image, strength=0.5)[0]
    assert np.allclose(half - image, (full - image) / 2, atol=1e-6)
    out, facts = apply(net, image, strength=0)
    assert out.tobytes() == image.tobytes()
    assert facts["tiles"] == 0


def test_an_untrained_network_is_the_identity() -> None:
    net = ENGINE.build(Model()).eval()
    for dtype in ("uint8", "uint16", "float32"):
        image = picture(65, 47, dtype)
        assert np.array_equal(apply(net, image, tile=32)[0], image)


def test_memory_sets_the_tile(net: nn.Module) -> None:
    _, facts = apply(net, picture(300, 300), memory=0.03)
    assert facts["tiles"] > 1
    assert (facts["tile"] + 128) ** 2 * tile_facts(net).bytes_per_pixel <= 0.03e9 or facts["tile"] <= 64
    assert apply(net, picture(300, 300), memory=1)[1]["tiles"] == 1


def test_the_original_network_is_taken_whole_or_refused() -> None:
    seed = random_net("unet-seed")
    image = picture(70, 50)
    with pytest.raises(ImgtoolError, match="GroupNorm") as caught:
        apply(seed, image, tile=32)
    assert caught.value.code == USAGE
    out, facts = apply(seed, image, memory=1e-6)
    assert facts["tiles"] == 1
    assert np.array_equal(out, apply(seed, image, tile=0)[0])


def test_tiles_really_would_change_the_original_network() -> None:
    from dataclasses import replace

    seed = random_net("unet-seed")
    facts = replace(tile_facts(seed), local=True)
    image = picture(96, 320)
    image[:, :160] *= 0.1
    whole = tiles.run(seed, image, tiles.Plan(0, 96), facts)[0]
    cut = tiles.run(seed, image, tiles.Plan(160, 96), facts)[0]
    assert np.abs(whole - cut).max() > 1 / 255


CHILD = """
import sys, numpy as np, torch
torch.set_num_threads(1)
from imgtool import compute, tiles
from imgtool.bench import peak_mb
from imgtool.engine import Watch
from imgtool.engines.deblur.engine import ENGINE, tile_facts
from imgtool.engines.deblur.settings import Infer, Model
from imgtool.images import Photo
net = compute.channels_last(ENGINE.build(Model(arch={arch!r})).eval())
image = np.random.default_rng(0).integers(0, 256, ({height}, {width}, 3), np.uint8)
ENGINE.apply(net, Photo(image[:64, :64]), Infer(inputs=("-",)), Watch())
base = peak_mb()
result = ENGINE.apply(net, Photo(image), Infer(inputs=("-",), memory={memory}), Watch())
print(base, peak_mb(), result.facts["tiles"], result.image.nbytes / 1e6)
"""


def child(arch: str, height: int, width: int, memory: float) -> list[float]:
    code = CHILD.format(arch=arch, height=height, width=width, memory=memory)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert not done.returncode, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("memory", [0.25, 0.5, 1.0])
def test_the_budget_holds(memory: float) -> None:
    base, peak, count, output = child("unet-lite", 2000, 3000, memory)
    assert count > 1
    assert peak - base - output <= 1000 * memory


@pytest.mark.slow
def test_a_photo_of_6000x4000_within_2_gb() -> None:
    _, peak, count, _ = child("unet-lite", 4000, 6000, 1.0)
    assert count > 1
    assert peak < 2000


@pytest.mark.slow
def test_the_original_network_takes_what_is_stated() -> None:
    base, peak, count, output = child("unet-seed", 1000, 1200, 1.0)
    assert count == 1
    stated = tile_facts(ENGINE.build(Model(arch="unet-seed"))).bytes_per_pixel
    assert 0.8 * stated < (peak - base - output) / 1.2 < 1.1 * stated
