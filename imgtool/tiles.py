"""Tiled inference that equals the whole image.

The photo is mirrored ``border`` pixels beyond its edges once. A tile is a core, which is kept, and
a halo around it, which is computed and thrown away; both are aligned to the network's multiple, and
tiles are clipped where the mirrored photo ends, so that its border is met as in the whole photo.
Nothing is blended. Where the halo covers the network's reach the result is that of the whole photo
up to the rounding of float32. Pixels are converted tile by tile, so memory beyond the tile is one
input and one output in the photo's own type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from imgtool import compute
from imgtool.engine import TileFacts, Watch
from imgtool.errors import USAGE, ImgtoolError
from imgtool.memory import give_back

if TYPE_CHECKING:
    from imgtool.engine import Pixels

SMALLEST = 64
"""Core edge below which running out of memory is an error."""


@dataclass(frozen=True)
class Span:
    """One axis of a tile: photo coordinates of what is kept and of what is read (may lie outside)."""

    start: int
    stop: int
    read_start: int
    read_stop: int


@dataclass(frozen=True)
class Tile:
    """A core and what is read for it, by rows and columns."""

    rows: Span
    columns: Span


@dataclass(frozen=True)
class Plan:
    """How a photo is cut.

    Attributes:
        core: Largest edge of a core in pixels; 0 takes the photo whole.
        halo: Context on each side, a multiple of the network's multiple.
        strength: Share of the network's change that is applied.
        window: Height and width that every tile reads, where the network takes no others; ``core`` is then
            of no account.
    """

    core: int
    halo: int
    strength: float = 1.0
    window: tuple[int, int] | None = None


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _ends(size: int, facts: TileFacts) -> tuple[int, int]:
    """Return where the mirrored photo begins and ends along one axis, aligned like the tiles."""
    border = _up(facts.border, facts.multiple)
    return -border, _up(size + 2 * border, facts.multiple) - border


def spans(size: int, core: int, halo: int, facts: TileFacts) -> list[Span]:
    """Cut one axis evenly into cores of at most ``core`` pixels, aligned to the network's multiple.

    >>> [(s.start, s.stop) for s in spans(20, 8, 8, TileFacts(multiple=4))]
    [(0, 8), (8, 16), (16, 20)]
    >>> spans(1, 0, 8, TileFacts(multiple=8, border=16))
    [Span(start=0, stop=1, read_start=-16, read_stop=24)]
    """
    low, high = _ends(size, facts)
    count = math.ceil(size / core) if core else 1
    if count == 1:
        return [Span(0, size, low, high)]
    step = _up(math.ceil(size / count), facts.grid)
    cores = [(start, min(start + step, size)) for start in range(0, size, step)]
    return [Span(a, b, max(a - halo, low), min(_up(b, facts.multiple) + halo, high)) for a, b in cores]


def windows(size: int, length: int, halo: int, facts: TileFacts) -> list[Span]:
    """Cut one axis into cores of which each is read with exactly ``length`` pixels.

    A window begins at a multiple of the network's grid: the first where the photo begins, the last so that it
    ends with the photo or, where it cannot, a quarter of a grid beyond it at least, which is mirrored: the
    file mirrors again at the window's end, and a few mirrored pixels between both would be mended badly. A
    photo that is smaller than a window is mirrored up to its end.

    >>> [(s.start, s.stop, s.read_start) for s in windows(21, 12, 4, TileFacts(multiple=2))]
    [(0, 8, 0), (8, 12, 4), (12, 14, 8), (14, 21, 10)]

    Raises:
        ImgtoolError: Nothing of a window is left without its halo.
    """
    step = (length - 2 * halo) // facts.grid * facts.grid
    last = max(_up(size - length, facts.grid), 0)
    if 0 < last + length - size < facts.grid // 4 and step >= facts.grid:
        last += facts.grid
    if not last:
        return [Span(0, size, 0, length)]
    if step < facts.grid:
        raise ImgtoolError(
            f"a file for {length} pixels leaves nothing of a tile but its context of {halo} on each side",
            f"export it for free sizes, for the photo's, or for sides of {2 * halo + facts.grid} or more",
        )
    begins = [*range(0, last, step), last]
    ends = [0, *(begin + halo for begin in begins[1:]), size]
    return [Span(ends[i], ends[i + 1], begin, begin + length) for i, begin in enumerate(begins)]


def cut(height: int, width: int, plan: Plan, facts: TileFacts) -> list[Tile]:
    """Return the tiles of a photo, row by row; their cores cover it exactly once."""
    halo = _up(plan.halo, facts.multiple)
    if plan.window:
        rows, columns = (
            windows(*each, halo, facts) for each in zip((height, width), plan.window, strict=True)
        )
    else:
        rows, columns = (spans(size, plan.core, halo, facts) for size in (height, width))
    return [Tile(row, column) for row in rows for column in columns]


def choose(height: int, width: int, tile: int | None, overlap: int, memory: float, facts: TileFacts) -> int:
    """Return the core edge for a photo, 0 for whole.

    Args:
        height: Rows of the photo.
        width: Columns of the photo.
        tile: Edge asked for, 0 for whole, None for what fits into ``memory``.
        overlap: Halo in pixels.
        memory: Budget of the forward pass in bytes.
        facts: The network's.

    Raises:
        ImgtoolError: Code 2, when tiles are asked of a network that tiling would change.
    """
    if tile is not None and tile >= max(height, width):
        tile = 0
    if not facts.local:
        if tile:
            raise ImgtoolError(
                f"tiles would change the result: {facts.reason}", "take --tile 0, or a local network", USAGE
            )
        return 0
    if tile is not None:
        return _up(tile, facts.grid)
    edge = math.isqrt(int(memory / facts.bytes_per_pixel))
    if height * width <= edge * edge:
        return 0
    core = min(max(edge - 2 * overlap, SMALLEST), facts.largest) // facts.grid * facts.grid
    return max(core, facts.grid)


def mirrored(start: int, stop: int, size: int) -> npt.NDArray[np.int64]:
    """Return the indices of ``start..stop`` in an endlessly mirrored row of ``size`` pixels.

    >>> mirrored(-2, 5, 3).tolist()
    [2, 1, 0, 1, 2, 1, 0]
    """
    period = max(2 * (size - 1), 1)
    position = np.arange(start, stop) % period
    return np.minimum(position, period - position) if size > 1 else np.zeros(stop - start, np.int64)


@dataclass(frozen=True)
class Source:
    """Rows of a photo.

    Attributes:
        rows: ``(h, W, 3)``, in the photo's own type.
        height: Of the photo.
        first: Which of the photo's rows is the first of ``rows``.
    """

    rows: Pixels
    height: int
    first: int = 0

    def part(self, tile: Tile) -> Pixels:
        """Return what a tile reads, ``(h, w, 3)`` in the photo's own type; not to be written to."""
        down = mirrored(tile.rows.read_start, tile.rows.read_stop, self.height) - self.first
        across = mirrored(tile.columns.read_start, tile.columns.read_stop, self.rows.shape[1])
        if len(down) == down[-1] - down[0] + 1 and len(across) == across[-1] - across[0] + 1:
            return self.rows[down[0] : down[-1] + 1, across[0] : across[-1] + 1]
        return self.rows[np.ix_(down, across)]


def middle(image: Pixels, height: int, width: int, shift: int = 0) -> npt.NDArray[np.float32]:
    """Return the middle of ``(H, W, 3)`` in exactly this size, ``(height, width, 3)`` float32.

    Integers are scaled to 0..1; what is smaller is mirrored.

    Args:
        image: The photo.
        height: Rows wanted.
        width: Columns wanted.
        shift: Pixels to the right and down.
    """
    starts = [(have - want) // 2 + shift for have, want in zip(image.shape, (height, width), strict=False)]
    rows = mirrored(starts[0], starts[0] + height, image.shape[0])
    return unit(image[np.ix_(rows, mirrored(starts[1], starts[1] + width, image.shape[1]))])


def unit(part: Pixels) -> npt.NDArray[np.float32]:
    """Return pixels as a float32 copy; integers are scaled to 0..1."""
    values: npt.NDArray[np.float32] = part.astype(np.float32)
    if np.issubdtype(part.dtype, np.integer):
        values /= np.float32(np.iinfo(part.dtype).max)
    return values


def read(image: Pixels, tile: Tile) -> npt.NDArray[np.float32]:
    """Return what a tile reads of ``(H, W, 3)`` as float32; integers are scaled to 0..1."""
    return unit(Source(image, len(image)).part(tile))


def write(out: Pixels, tile: Tile, values: npt.NDArray[Any]) -> None:
    """Put a tile's core into the output; floats are clipped and rounded to nearest for integers."""
    if values.dtype != out.dtype and np.issubdtype(out.dtype, np.integer):
        values = np.clip(values, 0, 1)
        values *= np.float32(np.iinfo(out.dtype).max)
        np.rint(values, out=values)
    out[tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop] = values


def shrink(image: Pixels, factor: int) -> npt.NDArray[np.float32]:
    """Return ``(H, W, 3)`` shrunk by a whole factor: means of blocks, float32, integers as 0..1.

    The last blocks are filled up by mirroring; NaN counts as 0 and floats are clipped to 0..1.
    """
    height, width = image.shape[:2]
    columns = mirrored(0, _up(width, factor), width)
    out = np.empty((-(-height // factor), len(columns) // factor, 3), np.float32)
    whole = Span(0, width, 0, width)
    for row in range(len(out)):
        rows = Span(row * factor, (row + 1) * factor, row * factor, (row + 1) * factor)
        strip = np.clip(np.nan_to_num(read(image, Tile(rows, whole)), nan=0.0), 0, 1)[:, columns]
        out[row] = strip.reshape(factor, -1, factor, 3).mean((0, 2))
    return out


@dataclass(frozen=True)
class Enlarged:
    """A change found on the shrunk photo, to be read at the photo's own size.

    Attributes:
        change: ``(ceil(H / factor), ceil(W / factor), 3)`` float32.
        factor: By how much the photo was shrunk.
    """

    change: npt.NDArray[np.float32]
    factor: int

    def read(self, tile: Tile, height: int, width: int) -> npt.NDArray[np.float32]:
        """Return the change where a tile reads: bilinear, constant beyond the outer centres."""
        rows = self._between(mirrored(tile.rows.read_start, tile.rows.read_stop, height), 0)
        columns = self._between(mirrored(tile.columns.read_start, tile.columns.read_stop, width), 1)
        low, high, share = rows
        band = self.change[low] * (1 - share)[:, None, None] + self.change[high] * share[:, None, None]
        low, high, share = columns
        values: npt.NDArray[np.float32] = band[:, low] * (1 - share)[:, None] + band[:, high] * share[:, None]
        return values

    def _between(self, position: npt.NDArray[np.int64], axis: int) -> tuple[npt.NDArray[Any], ...]:
        last = self.change.shape[axis] - 1
        place = np.clip((position + 0.5) / self.factor - 0.5, 0, last)
        low = np.minimum(place.astype(np.int64), max(last - 1, 0))
        return low, np.minimum(low + 1, last), (place - low).astype(np.float32)


@torch.inference_mode()
def compute_tile(
    net: nn.Module, image: Pixels, tile: Tile, strength: float, start: Enlarged | None = None
) -> npt.NDArray[np.float32]:
    """Run the network over one tile and return its core, ``(h, w, 3)`` float32, not clipped.

    The network sees values clipped to 0..1 (and 0 for NaN), with the change of ``start`` added; all
    change is added to the original, so that what lies outside 0..1 in a float photo survives.
    """
    where = next((each.device for each in net.parameters()), torch.device("cpu"))
    values = read(image, tile)
    rows = slice(tile.rows.start - tile.rows.read_start, tile.rows.stop - tile.rows.read_start)
    columns = slice(tile.columns.start - tile.columns.read_start, tile.columns.stop - tile.columns.read_start)
    seen = torch.from_numpy(values).to(where).permute(2, 0, 1)[None]  # channels-last as it is
    seen = torch.nan_to_num(seen, nan=0.0).clamp_(0, 1) if image.dtype == np.float32 else seen
    begin = seen
    if start is not None:
        first = torch.from_numpy(start.read(tile, image.shape[0], image.shape[1])).to(where)
        begin = seen + first.permute(2, 0, 1)[None]
    change = (net(begin) - seen)[0].permute(1, 2, 0)[rows, columns].float().cpu().numpy()
    if not np.isfinite(change).all():
        raise ImgtoolError("the network's output is not finite", "its weights are damaged: take others")
    core: npt.NDArray[np.float32] = values[rows, columns] + np.float32(strength) * change
    return core


def _halves(span: Span, halo: int, facts: TileFacts, size: int) -> Iterator[Span]:
    core = max((span.stop - span.start) // 2, facts.grid)
    low, high = _ends(size, facts)
    for part in spans(span.stop - span.start, core, halo, facts):
        start, stop = span.start + part.start, span.start + part.stop
        yield Span(start, stop, max(start - halo, low), min(_up(stop, facts.multiple) + halo, high))


def quarter(tile: Tile, shape: tuple[int, ...], plan: Plan, facts: TileFacts) -> list[Tile]:
    """Cut a tile that did not fit into memory into four (or two) smaller ones."""
    halo = _up(plan.halo, facts.multiple)
    rows = list(_halves(tile.rows, halo, facts, shape[0]))
    columns = list(_halves(tile.columns, halo, facts, shape[1]))
    return [Tile(row, column) for row in rows for column in columns]


def run(
    net: nn.Module,
    image: Pixels,
    plan: Plan,
    facts: TileFacts,
    watch: Watch = Watch(),  # noqa: B008 - frozen
    start: Enlarged | None = None,
) -> tuple[Pixels, int, int]:
    """Run a network over a photo, tile by tile, as ``walk`` does.

    Strength 0 gives a copy of the photo without computing anything.

    Args:
        net: Maps ``(1, 3, h, w)`` float32 in 0..1 to the same shape; in evaluation mode.
        image: ``(H, W, 3)`` uint8, uint16 or float32.
        plan: How to cut it.
        facts: What the network allows.
        watch: Told after each tile, and when tiles are made smaller.
        start: A change, found on the shrunk photo, that the network's input begins with.

    Returns:
        The result in the photo's shape and type, the number of tiles, and the largest core's edge.

    Raises:
        ImgtoolError: Memory does not do for the smallest tile, or for a network that may not be
            cut; or the network gives NaN or infinity.
    """
    if plan.strength == 0:
        return image.copy(), 0, 0
    out = np.empty_like(image)

    def made(tile: Tile) -> npt.NDArray[np.float32]:
        core = compute_tile(net, image, tile, plan.strength, start)
        give_back()  # or the heap grows from tile to tile, by as much as half of what one takes
        return core

    return out, *walk(made, out, plan, facts, watch)


def walk(
    make: Callable[[Tile], npt.NDArray[Any]], out: Pixels, plan: Plan, facts: TileFacts, watch: Watch
) -> tuple[int, int]:
    """Fill an output tile by tile.

    When a tile does not fit into memory it is quartered, and so are those that follow.

    Args:
        make: Tile to its core, ``(h, w, ...)``; of the output's type, or float32 for 0..1.
        out: ``(H, W, ...)``: what is cut, and filled.
        plan: How to cut it.
        facts: What the network allows.
        watch: Told after each tile, and when tiles are made smaller.

    Returns:
        The number of tiles, and the largest core's edge.

    Raises:
        ImgtoolError: Memory does not do for the smallest tile, or for a network that may not be cut.
    """
    return _visit(make, lambda tile, values: write(out, tile, values), out.shape, plan, facts, watch)


def canvas(image: Pixels, channels: int, overwrite: bool) -> Pixels:
    """Return what ``bands`` is to fill: new, or where that is allowed the memory of the photo itself.

    Args:
        image: ``(H, W, 3)``.
        channels: 3, or 1 for ``(H, W)``.
        overwrite: Whether the photo's pixels are not needed afterwards, as ``Watch.overwrite`` tells.
    """
    if overwrite and image.flags.writeable:
        return image[...] if channels == 3 else image[..., 0]
    return np.empty(image.shape if channels == 3 else image.shape[:2], image.dtype)


def bands(
    make: Callable[[Pixels, Tile], npt.NDArray[Any]],
    image: Pixels,
    out: Pixels | Callable[[Tile, npt.NDArray[Any]], None],
    plan: Plan,
    facts: TileFacts,
    watch: Watch = Watch(),  # noqa: B008 - frozen
) -> tuple[int, int]:
    """Fill an output of a photo from top to bottom, a band of tiles at a time, as ``walk`` does.

    The output may lie in the photo's own memory: the rows that a band reads are copied before they
    are overwritten, and with them what later bands read of them.

    Args:
        make: ``(part, tile) -> core``: what the tile reads, ``(h, w, 3)`` in the photo's own type
            (``unit`` makes floats of it), to its core ``(h, w, ...)``; of the output's type, or
            float32 for 0..1. The part is not to be written to.
        image: ``(H, W, 3)`` uint8, uint16 or float32.
        out: ``(H, W, ...)``, such as ``canvas`` gives; or what is told of every core, where nothing is
            to be kept.
        plan: How to cut it.
        facts: What the network allows.
        watch: Told after each tile, and when tiles are made smaller.

    Returns:
        The number of tiles, and the largest core's edge.

    Raises:
        ImgtoolError: As ``walk``.
    """
    height = len(image)
    inplace = isinstance(out, np.ndarray) and np.may_share_memory(image, out)
    keeper = _Keeper(image, spans(height, plan.core, _up(plan.halo, facts.multiple), facts))
    whole = Source(image, height)

    def made(tile: Tile) -> npt.NDArray[Any]:
        return make((keeper.source(tile) if inplace else whole).part(tile), tile)

    take = (lambda tile, values: write(out, tile, values)) if isinstance(out, np.ndarray) else out
    return _visit(made, take, image.shape, plan, facts, watch)


class _Keeper:
    """The rows of a photo as they were, while it is overwritten band by band."""

    def __init__(self, image: Pixels, rows: list[Span]) -> None:
        """Note which rows each band reads, and from where on later ones read."""
        self._image, self._rows = image, rows
        seen = [mirrored(span.read_start, span.read_stop, len(image)) for span in rows]
        lowest = [int(each.min()) for each in seen]
        self._ends = [(min(lowest[i:]), int(each.max()) + 1) for i, each in enumerate(seen)]
        self._band, self._source = -1, Source(image[:0], len(image))

    def source(self, tile: Tile) -> Source:
        """Return the rows that the band of a tile reads; the tiles come in the order of their bands."""
        while self._band < 0 or self._rows[self._band].stop <= tile.rows.start:
            self._band += 1
            low, high = self._ends[self._band]
            start, old = self._rows[self._band].start, self._source
            kept = old.rows[low - old.first : start - old.first]
            self._source = Source(np.concatenate([kept, self._image[start:high]]), old.height, low)
        return self._source


def _visit(
    make: Callable[[Tile], npt.NDArray[Any]],
    take: Callable[[Tile, npt.NDArray[Any]], None],
    shape: tuple[int, ...],
    plan: Plan,
    facts: TileFacts,
    watch: Watch,
) -> tuple[int, int]:
    """Make and hand on the core of every tile, row by row."""
    waiting = cut(shape[0], shape[1], plan, facts)[::-1]
    finished, edge, limit = 0, 0, max(shape[:2])
    while waiting:
        tile = waiting.pop()
        size = max(tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start)
        if size > limit:
            waiting += quarter(tile, shape, plan, facts)[::-1]
            continue
        try:
            values = make(tile)
        except (RuntimeError, MemoryError) as fault:
            limit = _smaller(fault, size, facts, watch)
            waiting.append(tile)
            continue
        take(tile, values)
        finished, edge = finished + 1, max(edge, size)
        watch.done(finished, finished + len(waiting))
    return finished, edge


def _smaller(fault: BaseException, size: int, facts: TileFacts, watch: Watch) -> int:
    """Return and say the limit to go on with after a fault, or raise what the user should read."""
    if not compute.out_of_memory(fault):
        raise fault
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not facts.local:
        raise ImgtoolError(
            f"out of memory, and this network takes the photo whole: {facts.reason}",
            "use a local network, or a smaller photo",
        ) from None
    if size <= max(SMALLEST, facts.grid):
        raise ImgtoolError(
            f"out of memory, even for a tile of {size} pixels", "close other programs, or take --device cpu"
        ) from None
    limit = _up(size // 2, facts.grid)
    watch.say(f"out of memory: going on with tiles of {limit} pixels")
    return limit
