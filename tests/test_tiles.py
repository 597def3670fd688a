"""Tiles: every pixel once, nothing lost at the edges, equal to the whole photo, calm when memory ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from imgtool import compute, tiles
from imgtool.engine import TileFacts, Watch
from imgtool.errors import FAILED, USAGE, ImgtoolError
from imgtool.tiles import Plan

ROOT = Path(__file__).parents[1]
Array = npt.NDArray[Any]

SIZES = st.integers(1, 300)
MULTIPLES = st.sampled_from([1, 2, 4, 8, 16, 32, 100])
TYPES = ("uint8", "uint16", "float32")


class Same(nn.Module):
    """Returns what it sees, and notes the sizes that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append((image.shape[-2], image.shape[-1]))
        return image


class Plus(Same):
    """Adds a constant."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) + self.value


class Blocks(nn.Module):
    """Feels where the grid of ``multiple`` lies: each block becomes the mean of itself and around.

    Sums run in float64 in one order, so that equal inputs give equal bits whatever the tile.
    """

    def __init__(self, multiple: int, dilation: int = 0) -> None:
        super().__init__()
        self.multiple, self.dilation = multiple, dilation

    def forward(self, image: Tensor) -> Tensor:
        assert image.dtype == torch.float32
        assert not image.shape[-1] % self.multiple
        assert not image.shape[-2] % self.multiple
        x = image.double()
        places = [(i, j) for i in range(self.multiple) for j in range(self.multiple)]
        mean = sum(x[..., i :: self.multiple, j :: self.multiple] for i, j in places) / len(places)
        out = mean.repeat_interleave(self.multiple, -1).repeat_interleave(self.multiple, -2)  # type: ignore[union-attr]
        return (box(out, self.dilation) if self.dilation else out).float()


def box(x: Tensor, dilation: int) -> Tensor:
    """Return the 5x5 mean with a dilation; beyond the edges there is zero."""
    height, width = x.shape[-2:]
    padded = nn.functional.pad(x, [2 * dilation] * 4)
    steps = range(0, 4 * dilation + 1, dilation)
    return sum(padded[..., i : i + height, j : j + width] for i in steps for j in steps) / 25  # type: ignore[return-value]


def reference(image: Array, facts: TileFacts, net: nn.Module) -> Array:
    """Compute the whole float photo without any of the code under test."""
    height, width = image.shape[:2]
    pads = [(facts.border, facts.border + -(n + 2 * facts.border) % facts.multiple) for n in (height, width)]
    mirrored = np.pad(image, [*pads, (0, 0)], mode="reflect")
    out = net(torch.from_numpy(mirrored.transpose(2, 0, 1).copy())[None])[0].numpy().transpose(1, 2, 0)
    top, left = facts.border, facts.border
    return np.asarray(out[top : top + height, left : left + width])


def picture(height: int, width: int, dtype: str = "float32", seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.random((height, width, 3), np.float32)
    return rng.integers(0, np.iinfo(dtype).max + 1, (height, width, 3), dtype)


# --- plans -----------------------------------------------------------------------------------


@given(SIZES, SIZES, st.integers(0, 320), st.integers(0, 80), MULTIPLES, st.integers(0, 2))
@example(1, 1, 8, 0, 8, 2)
@example(300, 7, 100, 64, 100, 0)
def test_cores_cover_every_pixel_once_and_lie_on_the_grid(
    height: int, width: int, core: int, halo: int, multiple: int, border: int
) -> None:
    facts = TileFacts(multiple, border=border * multiple)
    count = np.zeros((height, width), int)
    for tile in tiles.cut(height, width, Plan(core, halo), facts):
        count[tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop] += 1
        for span, size in ((tile.rows, height), (tile.columns, width)):
            low, high = -facts.border, size + facts.border + multiple
            assert span.read_start % multiple == 0
            assert (span.read_stop - span.read_start) % multiple == 0
            assert low <= span.read_start <= span.start < span.stop <= span.read_stop < high
            assert span.read_start == low or span.start - span.read_start >= halo
            assert span.read_stop >= size + facts.border or span.read_stop - span.stop >= halo
            assert not core or span.stop - span.start <= max(-(-core // multiple) * multiple, multiple)
    assert (count == 1).all()


def test_a_border_off_the_grid_is_widened_onto_it() -> None:
    facts = TileFacts(multiple=8, border=5)
    net = Blocks(8)
    image = picture(50, 70)
    whole = tiles.run(net, image, Plan(0, 8), facts)[0]
    assert np.array_equal(tiles.run(net, image, Plan(16, 8), facts)[0], whole)


def test_cores_are_even() -> None:
    cut = tiles.spans(1000, 900, 0, TileFacts(multiple=8))
    assert [span.stop - span.start for span in cut] == [504, 496]


@given(st.integers(1, 40), st.integers(-100, 0), st.integers(1, 140))
def test_mirrored_is_numpys_reflection(size: int, start: int, stop: int) -> None:
    row = np.arange(size)
    wide = np.pad(row, (-start, max(stop - size, 0)), mode="reflect")
    assert row[tiles.mirrored(start, stop, size)].tolist() == wide[: stop - start].tolist()


LITE = TileFacts(8, halo=64, border=16, bytes_per_pixel=400)


@pytest.mark.parametrize(
    ("size", "tile", "memory", "core"),
    [
        ((1080, 1920), None, 1e9, 0),  # fits whole
        ((4000, 6000), None, 1e9, 1024),  # more memory makes no larger tile than is fast
        ((4000, 6000), None, 1e10, 0),
        ((4000, 6000), None, 1e8, 368),  # the root of 1e8 / 400 is 500, less two halos, on the grid
        ((4000, 6000), None, 1, 64),  # whatever the budget, some tile
        ((4000, 6000), 0, 1, 0),
        ((4000, 6000), 100, 1e9, 104),
        ((4000, 6000), 6000, 1, 0),
        ((4000, 6000), 5999, 1, 6000),
    ],
)
def test_choice_of_the_core(size: tuple[int, int], tile: int | None, memory: float, core: int) -> None:
    assert tiles.choose(*size, tile, 64, memory, LITE) == core


@given(SIZES, SIZES, st.floats(1e5, 1e8), MULTIPLES)
@example(300, 300, 1e6, 100)  # the grid is coarser than what fits
def test_a_chosen_tile_respects_the_budget(height: int, width: int, memory: float, multiple: int) -> None:
    facts = TileFacts(multiple, bytes_per_pixel=400)
    core = tiles.choose(height, width, None, 16, memory, facts)
    assert core % multiple == 0
    smallest = core <= max(tiles.SMALLEST, multiple)
    largest = (core + 32) ** 2 if core else height * width
    assert largest * 400 <= memory or (core and smallest)


# --- equal to the whole photo ----------------------------------------------------------------


@given(SIZES, SIZES, st.integers(0, 200), st.integers(0, 40), MULTIPLES, st.sampled_from(TYPES))
@example(1, 1, 0, 0, 8, "uint8")
@example(15, 17, 8, 64, 8, "uint16")
@example(255, 257, 64, 64, 16, "float32")
def test_a_net_that_changes_nothing_changes_nothing(
    height: int, width: int, core: int, halo: int, multiple: int, dtype: str
) -> None:
    image = picture(height, width, dtype)
    facts = TileFacts(multiple, border=multiple)
    out, count, edge = tiles.run(Same(), image, Plan(core, halo), facts)
    assert out.dtype == image.dtype
    assert np.array_equal(out, image)
    assert count == len(tiles.cut(height, width, Plan(core, halo), facts))
    assert edge <= max(height, width)


@given(
    SIZES,
    SIZES,
    st.integers(24, 160),
    st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 1), (8, 1), (8, 4)]),
    st.integers(0, 3),
)
@example(1, 1, 8, (8, 1), 1)
@example(1, 300, 40, (8, 1), 0)
@example(255, 257, 64, (8, 4), 2)
def test_tiles_are_the_whole_photo_where_the_halo_covers_the_reach(
    height: int, width: int, core: int, kind: tuple[int, int], border: int
) -> None:
    multiple, dilation = kind
    facts = TileFacts(multiple, border=border * multiple)
    net = Blocks(multiple, dilation)
    reach = 2 * dilation + multiple - 1
    image = picture(height, width, seed=height * width)
    tiled = tiles.run(net, image, Plan(core, reach), facts)[0]
    whole = tiles.run(net, image, Plan(0, reach), facts)[0]
    assert np.array_equal(tiled, whole)
    # The change is added to the photo in float32, hence the last bit.
    assert np.allclose(whole, reference(image, facts, net), rtol=0, atol=2e-7)


def test_a_halo_that_is_too_small_is_seen() -> None:
    net, facts = Blocks(1, 4), TileFacts(1, border=0)
    image = picture(64, 64)
    whole = tiles.run(net, image, Plan(0, 8), facts)[0]
    apart = np.abs(tiles.run(net, image, Plan(16, 7), facts)[0] - whole)
    assert apart.max() > 1e-3
    assert not apart[:8, :8].any()  # no core is wrong where the photo's own edge is near


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_integers_are_rounded_to_nearest_and_clipped(dtype: str) -> None:
    top = np.iinfo(dtype).max
    image = np.array([[[0, 1, 100], [top - 1, top, 7]]], dtype)
    for part, wanted in ((0.49, [0, 1, 100, top - 1, top, 7]), (0.51, [1, 2, 101, top, top, 8])):
        out = tiles.run(Plus(part / top), image, Plan(0, 0), TileFacts())[0]
        assert out.ravel().tolist() == wanted
    assert tiles.run(Plus(-1.5 / top), image, Plan(0, 0), TileFacts())[0].ravel()[0] == 0


def test_every_8_bit_value_rounds_as_exact_arithmetic_says() -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    out = tiles.run(Plus(0.3), image, Plan(0, 0, 0.5), TileFacts())[0]
    assert np.array_equal(out, np.clip(np.rint(image + 0.15 * 255), 0, 255))


def test_strength_is_a_share_of_the_change() -> None:
    image = picture(9, 9)
    out = tiles.run(Plus(0.5), image, Plan(0, 0, 0.25), TileFacts())[0]
    assert np.allclose(out, image + 0.125, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", TYPES)
def test_strength_0_is_the_photo_bit_for_bit(dtype: str) -> None:
    image = picture(40, 30, dtype)
    if dtype == "float32":
        image[0, 0] = (-0.0, np.nan, 1e30)
    net = Plus(np.nan)
    out, count, edge = tiles.run(net, image, Plan(8, 8, 0.0), TileFacts())
    assert out.tobytes() == image.tobytes()
    assert out is not image
    assert (count, edge, net.seen) == (0, 0, [])


def test_values_that_no_screen_shows_survive() -> None:
    image = picture(4, 4)
    odd = np.array([-0.5, 7.25, np.nan, np.inf, -np.inf], np.float32)
    image[0, :, 0] = odd[:4]
    image[1, 0, 0] = odd[4]

    class Watched(Plus):
        def forward(self, seen: Tensor) -> Tensor:
            assert torch.isfinite(seen).all()
            assert seen.min() >= 0
            assert seen.max() <= 1
            return super().forward(seen)

    out = tiles.run(Watched(0.25), image, Plan(0, 0), TileFacts())[0]
    assert np.array_equal([*out[0, :, 0], out[1, 0, 0]], odd + np.float32(0.25), equal_nan=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_net_that_gives_no_numbers_is_an_error(value: float) -> None:
    with pytest.raises(ImgtoolError, match="not finite") as caught:
        tiles.run(Plus(value), picture(4, 4, "uint8"), Plan(0, 0), TileFacts())
    assert caught.value.code == FAILED


def test_strange_strides_and_read_only_pixels_do_no_harm() -> None:
    image = picture(30, 20, "uint8")[::-1, ::-1].transpose(1, 0, 2)
    image.flags.writeable = False
    out = tiles.run(Plus(1 / 255), image, Plan(8, 8), TileFacts(8, border=8))[0]
    assert np.array_equal(out, np.minimum(image.astype(int) + 1, 255))


def test_the_watch_is_told_of_every_tile() -> None:
    told: list[tuple[int, int]] = []
    watch = Watch(lambda done, total: told.append((done, total)))
    tiles.run(Same(), picture(32, 20), Plan(16, 0), TileFacts(), watch)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


# --- a start from the shrunk photo -----------------------------------------------------------


@given(SIZES, SIZES, st.sampled_from([1, 2, 4, 8]), st.sampled_from(TYPES))
@example(1, 1, 4, "uint8")
@example(2, 300, 8, "float32")
def test_shrinking_is_the_mean_of_blocks(height: int, width: int, factor: int, dtype: str) -> None:
    image = picture(height, width, dtype)
    top = 1 if dtype == "float32" else np.iinfo(dtype).max
    pads = [(0, -height % factor), (0, -width % factor), (0, 0)]
    full = np.pad(image.astype(np.float64) / top, pads, mode="reflect")
    blocks = full.reshape(full.shape[0] // factor, factor, full.shape[1] // factor, factor, 3)
    small = tiles.shrink(image, factor)
    assert small.dtype == np.float32
    assert np.allclose(small, blocks.mean((1, 3)), rtol=0, atol=1e-6)


def test_shrinking_reads_what_no_screen_shows_as_the_network_does() -> None:
    image = np.array([[[np.nan] * 3, [7.0] * 3], [[-1.0] * 3, [0.5] * 3]], np.float32)
    assert tiles.shrink(image, 2).ravel().tolist() == [0.375] * 3  # 0, 1, 0 and 0.5


@given(SIZES, SIZES, st.sampled_from([1, 2, 4]), st.integers(24, 160))
@example(1, 1, 4, 24)
@example(5, 3, 4, 24)
def test_a_start_is_read_bilinearly_and_tiles_agree(height: int, width: int, factor: int, core: int) -> None:
    image = picture(height, width)
    change = picture(-(-height // factor), -(-width // factor), seed=9) - np.float32(0.5)
    start = tiles.Enlarged(change, factor)
    facts = TileFacts(8, border=16)
    whole = tiles.run(Same(), image, Plan(0, 8), facts, start=start)[0]
    large = nn.functional.interpolate(
        torch.from_numpy(change.transpose(2, 0, 1).copy())[None], scale_factor=factor, mode="bilinear"
    )[0].permute(1, 2, 0)
    assert np.allclose(whole - image, large.numpy()[:height, :width], rtol=0, atol=1e-6)
    net = Blocks(8, 1)
    whole, cut = (tiles.run(net, image, Plan(edge, 16), facts, start=start)[0] for edge in (0, core))
    assert np.array_equal(whole, cut)


# --- out of memory ---------------------------------------------------------------------------

FAULTS: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    lambda: RuntimeError("std::bad_alloc"),
    MemoryError,
]


class Limited(Blocks):
    """Fails above a number of pixels."""

    def __init__(self, most: int, fault: Callable[[], BaseException], multiple: int = 8) -> None:
        super().__init__(multiple, 2)
        self.most, self.fault, self.failed = most, fault, 0

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-1] * image.shape[-2] > self.most:
            self.failed += 1
            raise self.fault()
        return super().forward(image)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("core", [0, 200])
def test_tiles_are_quartered_when_memory_ends(fault: Callable[[], BaseException], core: int) -> None:
    facts = TileFacts(8, border=16)
    image = picture(411, 299)
    said: list[str] = []
    net = Limited(200 * 200, fault)
    out, count, edge = tiles.run(net, image, Plan(core, 16), facts, Watch(say=said.append))
    whole = tiles.run(Blocks(8, 2), image, Plan(0, 16), facts)[0]
    assert np.array_equal(out, whole)
    assert net.failed == len(said) <= 2  # the tiles that follow are made small without another try
    assert all("out of memory" in line and "tiles of" in line for line in said)
    assert count > 4
    assert edge <= 168


@pytest.mark.parametrize("shape", [(61, 47), (61, 47, 3)])
def test_any_array_can_be_filled_tile_by_tile(shape: tuple[int, ...]) -> None:
    image = picture(*shape[:2], "uint16")[..., 0] if len(shape) == 2 else picture(*shape[:2], "uint16")
    told: list[tuple[int, int]] = []

    def make(tile: tiles.Tile) -> Array:
        rows, columns = tile.rows, tile.columns
        if rows.stop - rows.start > 30:
            raise MemoryError
        return image[rows.start : rows.stop, columns.start : columns.stop]

    out = np.empty(shape, np.uint16)
    watch = Watch(done=lambda finished, total: told.append((finished, total)))
    with pytest.raises(ImgtoolError, match="even for a tile of 61 pixels"):
        tiles.walk(make, out, Plan(0, 4), TileFacts(), watch)
    count, edge = tiles.walk(make, out, Plan(25, 4), TileFacts(), watch)
    assert np.array_equal(out, image)
    assert (count, edge, told[-1]) == (6, 24, (6, 6))


def test_the_largest_core_is_the_networks() -> None:
    assert tiles.choose(9000, 9000, None, 16, 1e12, TileFacts(2)) == 0
    assert tiles.choose(9000, 9000, None, 16, 1e10, TileFacts(2)) == 1024
    assert tiles.choose(9000, 9000, None, 16, 1e10, TileFacts(2, largest=513)) == 512


@given(SIZES, SIZES, st.integers(110, 300), st.sampled_from([1, 8, 16]))
@pytest.mark.slow
def test_quartered_tiles_are_the_whole_photo(height: int, width: int, edge: int, multiple: int) -> None:
    facts = TileFacts(multiple, border=multiple)
    image = picture(height, width)
    net = Limited((edge + 2 * 8) ** 2, FAULTS[0], multiple)
    reach = 4 + multiple - 1
    out = tiles.run(net, image, Plan(0, reach), facts)[0]
    assert np.array_equal(out, tiles.run(Blocks(multiple, 2), image, Plan(0, reach), facts)[0])


@pytest.mark.parametrize(("size", "multiple"), [(300, 8), (65, 128), (130, 128), (1, 1)])
def test_the_smallest_tile_that_does_not_fit_is_an_error(size: int, multiple: int) -> None:
    net = Limited(0, FAULTS[1], multiple)
    with pytest.raises(ImgtoolError, match="out of memory, even for a tile") as caught:
        tiles.run(net, picture(size, size), Plan(0, 8), TileFacts(multiple))
    assert caught.value.code == FAILED
    assert caught.value.hint
    assert net.failed < 5


@pytest.mark.parametrize("fault", [RuntimeError("shapes do not fit"), ValueError("no"), KeyboardInterrupt()])
def test_other_faults_are_passed_on(fault: BaseException) -> None:
    net = Limited(0, lambda: fault)
    with pytest.raises(type(fault)) as caught:
        tiles.run(net, picture(99, 99), Plan(0, 8), TileFacts(8))
    assert caught.value is fault
    assert net.failed == 1


def test_what_counts_as_out_of_memory() -> None:
    assert all(compute.out_of_memory(fault()) for fault in FAULTS)
    assert not compute.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not compute.out_of_memory(ValueError("can't allocate memory"))


REFUSING = TileFacts(16, local=False, reason="it looks at the whole photo")


def test_a_net_that_is_not_local_is_never_cut() -> None:
    with pytest.raises(ImgtoolError, match="it looks at the whole photo") as caught:
        tiles.choose(300, 200, 128, 64, 1e9, REFUSING)
    assert caught.value.code == USAGE
    assert tiles.choose(300, 200, 0, 64, 1, REFUSING) == 0
    assert tiles.choose(300, 200, 300, 64, 1, REFUSING) == 0  # one tile is the whole
    assert tiles.choose(300, 200, None, 64, 1, REFUSING) == 0  # whatever the budget


def test_a_net_that_is_not_local_says_why_it_needs_so_much_memory() -> None:
    net = Limited(0, FAULTS[0], 16)
    with pytest.raises(ImgtoolError, match="it looks at the whole photo") as caught:
        tiles.run(net, picture(300, 200), Plan(0, 0), REFUSING)
    assert (caught.value.code, net.failed) == (FAILED, 1)


# --- memory ----------------------------------------------------------------------------------

CHILD = """
import sys, numpy as np, torch
from imgtool import tiles
from imgtool.bench import peak_mb
from imgtool.engine import TileFacts, Watch
import resource

class Cheap(torch.nn.Module):
    def forward(self, image):
        return image + 1 / 255

net = Cheap()
{setup}
image = np.random.default_rng(0).integers(0, 255, ({height}, {width}, 3), np.uint8)
base = peak_mb()
said = []
watch = Watch(say=said.append)
out, count, edge = tiles.run(net, image, tiles.Plan({core}, 64), TileFacts(8, border=16), watch)
peak = peak_mb()
assert (out == image + 1).all()
print(base, peak, count, len(said))
"""


def child(height: int, width: int, core: int, setup: str = "") -> list[float]:
    code = CHILD.format(height=height, width=width, core=core, setup=setup)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert not done.returncode, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.slow
def test_memory_beyond_the_tile_is_one_input_and_one_output() -> None:
    base, peak, count, _ = child(4000, 6000, 1024)
    assert count == 24
    assert peak < 2000
    # MB: the output and copies of a tile (up to 230 seen); a float copy of the photo would add 288 to that.
    assert peak - base < 72 + 270


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_memory_that_really_ends() -> None:
    setup = (
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 700_000_000, resource.RLIM_INFINITY))"
    )
    _, _, count, said = child(4000, 6000, 0, setup)
    assert said >= 1
    assert count >= 4
