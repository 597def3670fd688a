"""A photo filtered, in blocks of one size, so that a photo whole and in tiles is the same arithmetic.

How a convolution adds up may depend on the size of what it is given. Here every block has the same size and
lies at a multiple of it, whether a tile holds one block or all of the photo: results are equal bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from imgtool import header, tiles
from imgtool.engine import Result, TileFacts, Watch
from imgtool.engines.filter import blackbox, targets
from imgtool.engines.filter.edges import Levels, over_maximum
from imgtool.engines.filter.port import Ported
from imgtool.errors import USAGE, ImgtoolError, did_you_mean
from imgtool.images.photo import convert, to_type

if TYPE_CHECKING:
    from imgtool.engine import Pixels
    from imgtool.engines.filter.settings import Infer
    from imgtool.images import Photo

Floats = npt.NDArray[np.float32]

BLOCK = 256
"""Edge of a block in pixels, at most: what a network holds of it stays in the cache of a CPU's core."""
GPU_BLOCK = 1024
"""The same on other devices, which smaller blocks would leave idle."""
FILE_BLOCK = 512
"""The same of exported files, which compute the margin twice."""
LARGE = 32_000_000
"""Pixels of a photo from which its map, in floats, is computed twice rather than held."""
WHOLE = "clapp normalises over the whole image (GroupNorm), so every tile would get tones of its own"
PREFIX = "filter-"


def device(net: Any) -> torch.device:
    """Return where a network is; exported files run on the CPU."""
    return next((each.device for each in net.parameters()), torch.device("cpu"))


def blocks(net: Any) -> tuple[int, int]:
    """Return height and width of a network's blocks in pixels: multiples of its own."""
    if isinstance(net, Ported) and net.window:
        return net.window
    edge = FILE_BLOCK if isinstance(net, Ported) else BLOCK if device(net).type == "cpu" else GPU_BLOCK
    edge = max(edge // int(net.multiple), 1) * int(net.multiple)
    return edge, edge


def tile_facts(net: Any) -> TileFacts:
    """Return what cutting may assume.

    Bytes per pixel of local networks are those of a tile's own pixels and result, for they compute in blocks;
    of ``clapp`` they are what the whole photo takes.
    """
    if not net.local:
        return TileFacts(local=False, bytes_per_pixel=230, reason=WHOLE)
    side = max(blocks(net))
    return TileFacts(
        net.multiple, side, halo=net.reach, border=net.reach, bytes_per_pixel=40, largest=8 * side
    )


STEP = 32
"""Pixels: lengths of the last blocks along a side are multiples of this and of the network's own."""
KEPT = 31 << 20
"""Bytes."""


def keep_memory() -> None:
    """Let the C library keep what tensors of less than ``KEPT`` give back.

    glibc takes fresh pages for what is larger than the largest it was given back so far, at most 32 MB:
    without this, blocks of networks with many channels took 1.8 times the CPU time (measured).
    """
    torch.empty(KEPT, dtype=torch.uint8)  # untouched: it costs address space alone


class Work:
    """A network over one photo."""

    def __init__(self, net: Any, image: Pixels) -> None:
        """Look at the size of the photo, ``(H, W, 3)``, which gives that of the blocks."""
        self.net, self.reach = net, int(net.reach)
        self.device = device(net)
        multiple = int(net.multiple)
        whole = (
            min(edge, -(-length // multiple) * multiple)
            for edge, length in zip(blocks(net), image.shape, strict=False)
        )
        keep_memory()
        self.step = math.lcm(multiple, STEP) if net.local else 1
        self.size: tuple[int, ...] = tuple(whole) if net.local else image.shape[:2]

    def core(self, part: Pixels, tile: tiles.Tile) -> Floats:
        """Return the core of a tile: ``(h, w, 3)``, or ``(h, w)`` of a map; float32, not clipped.

        Args:
            part: What the tile reads: its core, the reach around it, and perhaps more.
            tile: The tile; its core begins at multiples of a block.
        """
        rows, columns = tile.rows, tile.columns
        part = part[
            rows.start - self.reach - rows.read_start :, columns.start - self.reach - columns.read_start :
        ]
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start, self.net.count), np.float32)
        for top in range(0, out.shape[0], self.size[0]):
            for left in range(0, out.shape[1], self.size[1]):
                core = out[top : top + self.size[0], left : left + self.size[1]]
                core[:] = self._block(part[top:, left:], core.shape)[: core.shape[0], : core.shape[1]]
        if part.dtype == np.float32 and self.net.residual:
            own = part[self.reach :, self.reach :][: out.shape[0], : out.shape[1]]
            out += np.where(np.isfinite(own), own - np.clip(own, 0, 1), 0)  # what lies outside 0..1 stays so
        return out if self.net.count > 1 else out[..., 0]

    @torch.inference_mode()
    def _block(self, part: Pixels, wanted: tuple[int, ...]) -> Floats:
        """Return a block; where the photo ends within it, it ends soon after, in black, which is cut off."""
        ends = (-(-length // self.step) * self.step for length in wanted)
        size = [min(*pair) + 2 * self.reach for pair in zip(self.size, ends, strict=False)]
        seen = part[: size[0], : size[1]]
        values = torch.from_numpy(tiles.unit(seen)).to(self.device)
        short = (size[0] - seen.shape[0], size[1] - seen.shape[1])
        if any(short):
            values = nn.functional.pad(values, (0, 0, 0, short[1], 0, short[0]))
        if seen.dtype == np.float32:
            values = torch.nan_to_num(values, nan=0.0).clamp_(0, 1)
        found: Floats = self.net(values.permute(2, 0, 1)[None])[0].permute(1, 2, 0).float().cpu().numpy()
        if not np.isfinite(found).all():
            raise ImgtoolError("the network's output is not finite", "its weights are damaged: take others")
        return found


def apply(net: Any, photo: Photo, settings: Infer, watch: Watch) -> Result:
    """Filter a photo of any size.

    Raises:
        ImgtoolError: For tiles of a network that may not be cut, or when memory runs out; code 2 for a
            comparison with a filter that is known by its pairs alone.
    """
    image, facts = photo.pixels, tile_facts(net)
    _check_target(net, settings)
    reference = None
    if settings.compare:
        reference = to_type(_classical(net, settings)(image), image.dtype)
    height, width = image.shape[:2]
    plan = tiles.Plan(tiles.choose(height, width, settings.tile, 0, settings.memory * 1e9, facts), facts.halo)
    out, count, edge = _filtered(net, image, plan, watch)
    told: dict[str, object] = {"target": net.target, "tiles": count, "tile": edge}
    told["halo"] = facts.halo if count > 1 else 0
    if reference is not None:
        told["psnr"] = _psnr(out, reference)
    return Result(out, told, labels=("photo", "network", f"filter {net.target}")[: 3 - (reference is None)],
                  reference=reference)  # fmt: skip


def _check_target(net: Any, settings: Infer) -> None:
    """Refuse weights of another filter than the one that is named too."""
    wanted = settings.target
    if wanted.partition(":")[0] in targets.KINDS:
        wanted = targets.parse(wanted).spec
    if settings.weights and wanted not in ("", net.target):
        what = f"the weights {settings.weights} imitate {net.target}, not {wanted}"
        raise ImgtoolError(what, "leave out --target or --weights", USAGE)


def _classical(net: Any, settings: Infer) -> targets.Target:
    """Return the filter that a network imitates; code that only a weights file names is not run.

    Raises:
        ImgtoolError: Code 2.
    """
    ours = net.target.partition(":")[0] in (*targets.KINDS, blackbox.PAIRS)
    if not ours and settings.target != net.target:
        what = f"--compare would run {net.target}, which these weights name"
        raise ImgtoolError(what, f"say that you want it: --target {net.target}", USAGE)
    target = blackbox.resolve(net.target)
    if target.channels != net.count:
        what = f"{net.target} gives {target.channels} channel(s), and the network {net.count}"
        raise ImgtoolError(what, "leave out --compare, or train again")
    return target


def _filtered(net: Any, image: Pixels, plan: tiles.Plan, watch: Watch) -> tuple[Pixels, int, int]:
    """Return the result, the number of tiles and the edge of the largest."""
    work, facts = Work(net, image), tile_facts(net)
    target = targets.parse(net.target) if net.target.partition(":")[0] in targets.KINDS else None
    if target is None or target.finish is None:
        out = tiles.canvas(image, net.count, watch.overwrite)
        return out, *tiles.bands(work.core, image, out, plan, facts, watch)
    if target.levels and image.shape[0] * image.shape[1] > LARGE:
        return _by_two_passes(work, image, target.levels, plan, watch)
    found = np.empty((*image.shape[:2], net.count)[: 2 + (net.count > 1)], np.float32)
    count, edge = tiles.bands(work.core, image, found, plan, facts, watch)
    return to_type(target.finish(found), image.dtype), count, edge


def _by_two_passes(
    work: Work, image: Pixels, last: Callable[[Levels], Levels], plan: tiles.Plan, watch: Watch
) -> tuple[Pixels, int, int]:
    """Find the maximum of a map, then divide by it: what is held has 8 bits."""
    most, facts = 0.0, tile_facts(work.net)

    def look(tile: tiles.Tile, core: Floats) -> None:
        nonlocal most
        most = max(most, float(core.max()))

    quiet = Watch(say=watch.say)
    tiles.bands(work.core, image, look, plan, facts, quiet)
    levels = np.empty(image.shape[:2], np.uint8)
    count, edge = tiles.bands(
        lambda part, tile: over_maximum(work.core(part, tile), most), image, levels, plan, facts, watch
    )
    return convert(last(levels), image.dtype), count, edge


def _psnr(out: Pixels, reference: Pixels) -> float:
    """Return the PSNR in dB of two pictures of one type, bounded by that of half a step of 16 bits."""
    error = np.mean(
        [
            np.square(tiles.unit(a) - tiles.unit(b)).mean(dtype=np.float64)
            for a, b in zip(out, reference, strict=True)
        ]
    )
    return float(-10 * np.log10(max(error, 1e-10)))


def baseline(image: Pixels) -> Pixels:
    """Filter classically: the Sobel magnitude in three equal channels, in the photo's type."""
    return to_type(np.repeat(targets.parse("sobel_3")(image)[..., None], 3, axis=2), image.dtype)


def weights(settings: Any) -> str:
    """Return the name of the weights that imitate the filter that the settings name, "" for none named.

    Raises:
        ImgtoolError: Code 2: no shipped weights imitate it, or its parameters are wrong.
    """
    wanted = settings.target
    if not wanted or not isinstance(wanted, str):
        return ""
    if wanted.partition(":")[0] in targets.KINDS:
        wanted = targets.parse(wanted).spec  # parameters that are the default say nothing
    shipped = {name.removeprefix(PREFIX) for name in header.shipped() if name.startswith(PREFIX)}
    if wanted not in shipped:
        hint = f"train your own, or take others: {did_you_mean(wanted, sorted(shipped))}"
        raise ImgtoolError(f"no shipped weights imitate {wanted}", hint, USAGE)
    return PREFIX + wanted
