"""Long smooth edges of a photo: the evidence from which distortion is estimated.

A straight edge of the world is straight in the straight picture, so each long smooth edge of the
photo says something of the lens (the plumb-line method: Brown, "Close-range camera calibration",
1971; Devernay and Faugeras, "Straight lines have to be straight", 2001). Edges are traced with
OpenCV's EdgeDrawing (Topal and Akinlar, "Edge Drawing", 2012), placed between pixels by a parabola
across the edge, cut where they bend sharply, joined where one goes on as another, and described by
a cubic each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from imgtool.engines.lens.geometry import diagonal, normalise

Floats = npt.NDArray[np.float64]

LONGEST_SIDE = 1024
"""Pixels of the longer side at which edges are traced."""
POINTS = 12
"""Points by which an edge is described, evenly spaced along it."""
MOST = 160
"""Edges kept: the longest."""
SHORTEST = 0.045
"""Least length of an edge, in diagonals of the picture."""
FRAGMENT = 0.017
"""Least length of what may be joined to one: the lines of a chessboard end at every square."""
MOST_BENT = 0.16
"""Largest sagitta of an edge, in lengths of it: more is no straight edge behind any lens."""
ROUGHEST = 0.7
"""Largest root mean square distance of an edge's pixels from their cubic, in pixels."""
SHARPEST_TURN = math.radians(24)
"""An edge is cut where its direction changes by more within ``TURN_SPAN`` pixels."""
TURN_SPAN = 7

_T = np.linspace(-1, 1, POINTS)
_BASIS: Floats = np.linalg.qr(np.vander(_T, 4, increasing=True))[0].T  # (4, POINTS), orthonormal


class Lines(NamedTuple):
    """The edges of a photo.

    Attributes:
        points: ``(N, POINTS, 2)`` normalised coordinates (half-diagonal), evenly spaced along each.
        facts: ``(N, 4)``: edge pixels it rests on, their rms distance from the cubic in pixels, the
            contrast across it (share of the range of grey), and the share of its length that is gaps.
        half_diagonal: Half of the diagonal in the pixels of ``facts``.
    """

    points: Floats
    facts: Floats
    half_diagonal: float


@dataclass(frozen=True, eq=False)
class _Piece:
    """A smooth run of edge pixels ``(n, 2)``, in their order, with its cubic."""

    pixels: Floats
    curve: Floats
    rms: float
    contrast: float
    gap: float = 0.0
    length: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", _chord(self.curve))


def _chord(curve: Floats) -> float:
    return math.dist(curve[0], curve[-1])


def grey(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return a photo ``(H, W, 3)`` as uint8 grey, its longer side at most ``LONGEST_SIDE`` pixels."""
    height, width = pixels.shape[:2]
    shrink = LONGEST_SIDE / max(height, width)
    if shrink < 1:
        size = (max(round(width * shrink), 1), max(round(height * shrink), 1))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    if pixels.dtype != np.uint8:
        scale = 255.0 if pixels.dtype.kind == "f" else 255.0 / np.iinfo(pixels.dtype).max
        pixels = np.rint(np.clip(np.nan_to_num(pixels.astype(np.float32)) * scale, 0, 255)).astype(np.uint8)
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY), np.uint8)


def find(pixels: npt.NDArray[Any]) -> Lines:
    """Find the long smooth edges of a photo.

    Args:
        pixels: ``(H, W, 3)`` RGB, uint8, uint16 (full range) or float32 (0..1).
    """
    picture = grey(pixels)
    height, width = picture.shape
    if min(height, width) < 16:
        return Lines(np.zeros((0, POINTS, 2)), np.zeros((0, 4)), diagonal(width, height) / 2)
    shortest = max(FRAGMENT * diagonal(width, height), 12)
    pieces = [piece for chain in _chains(picture, shortest) for piece in _pieces(*chain, shortest)]
    pieces = [piece for piece in pieces if not _on_frame(piece, width, height)]
    pieces = sorted(_joined(pieces), key=lambda piece: -piece.length)[:MOST]
    pieces = [piece for piece in pieces if piece.length >= SHORTEST * diagonal(width, height)]
    points = np.array([piece.curve for piece in pieces]).reshape(-1, POINTS, 2)
    x, y = normalise(points[..., 0], points[..., 1], width, height)
    facts = [(len(piece.pixels), piece.rms, piece.contrast, piece.gap) for piece in pieces]
    return Lines(
        np.stack([x, y], -1), np.array(facts, np.float64).reshape(-1, 4), diagonal(width, height) / 2
    )


def _on_frame(piece: _Piece, width: int, height: int) -> bool:
    """Tell whether a piece runs along the frame: scans and screenshots have borders that are no edges."""
    margin = 0.012 * diagonal(width, height)
    x, y = piece.curve.T
    sides = (x, width - 1 - x, y, height - 1 - y)
    return any(float(side.max()) < margin for side in sides)


def _chains(picture: npt.NDArray[np.uint8], shortest: float) -> Iterator[tuple[Floats, Floats]]:
    """Yield connected edge pixels ``(n, 2)`` between pixels, and the contrast at each."""
    smooth = cv2.GaussianBlur(picture, (0, 0), 1.0)
    floats = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 1.0)
    gx = cv2.Sobel(floats, cv2.CV_32F, 1, 0, scale=1 / 8)
    gy = cv2.Sobel(floats, cv2.CV_32F, 0, 1, scale=1 / 8)
    strength: npt.NDArray[np.float32] = np.hypot(gx, gy).astype(np.float32)
    tracer = cv2.ximgproc.createEdgeDrawing()
    options = cv2.ximgproc.EdgeDrawing.Params()
    options.GradientThresholdValue, options.AnchorThresholdValue = 14, 0
    options.MinPathLength, options.Sigma = int(shortest), 0.0
    tracer.setParams(options)
    tracer.detectEdges(smooth)
    chains = [np.asarray(chain).reshape(-1, 2) for chain in tracer.getSegments()]
    chains = [chain for chain in chains if len(chain) >= shortest]
    if not chains:
        return
    every = np.concatenate(chains).astype(np.float32)
    column, row = every.T.astype(np.intp)
    size = np.maximum(strength[row, column], 1e-6)
    across = np.stack([gx[row, column] / size, gy[row, column] / size], 1)
    before, here, after = (_sample(strength, every + step * across) for step in (-1, 0, 1))
    bend = before + after - 2 * here
    peak = np.where(bend < -1e-6, 0.5 * (before - after) / np.minimum(bend, -1e-6), 0.0)
    placed = every + np.clip(peak, -0.75, 0.75)[:, None] * across
    ends = np.cumsum([len(chain) for chain in chains])[:-1]
    yield from zip(np.split(placed.astype(np.float64), ends), np.split(here / 255.0, ends), strict=True)


def _sample(image: npt.NDArray[np.float32], places: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Sample an image at ``(n, 2)`` places between pixels."""
    found = []
    for part in np.array_split(places.astype(np.float32), len(places) // 30_000 + 1):  # remap's limit
        sampled = cv2.remap(image, part[:, None, 0], part[:, None, 1], cv2.INTER_LINEAR)
        found.append(np.asarray(sampled)[:, 0])
    return np.concatenate(found)


def _pieces(chain: Floats, contrast: Floats, shortest: float) -> Iterator[_Piece]:
    """Yield the smooth pieces of a chain: cut at corners, then where a cubic does not follow."""
    if len(chain) < 2 * TURN_SPAN:
        return
    kernel = np.ones(5) / 5
    padded = np.pad(chain, ((2, 2), (0, 0)), "edge")
    soft = np.stack([np.convolve(padded[:, axis], kernel, "valid") for axis in (0, 1)], 1)
    step = soft[TURN_SPAN:] - soft[:-TURN_SPAN]
    angle = np.arctan2(step[:, 1], step[:, 0])
    turn = np.abs((angle[TURN_SPAN:] - angle[:-TURN_SPAN] + math.pi) % (2 * math.pi) - math.pi)
    sharp = np.flatnonzero(turn > SHARPEST_TURN) + TURN_SPAN
    cuts = [0, *sharp.tolist(), len(chain)]
    for start, stop in pairwise(cuts):
        if stop - start >= shortest:
            yield from _smooth(chain[start:stop], contrast[start:stop], shortest, 0)


def _smooth(chain: Floats, contrast: Floats, shortest: float, depth: int) -> Iterator[_Piece]:
    fitted = _fit(chain)
    if fitted is None:
        return
    curve, rms, offsets = fitted
    length = _chord(curve)
    if rms <= ROUGHEST and _sagitta(curve) <= MOST_BENT * length:
        if length >= shortest:
            yield _Piece(chain, curve, rms, float(np.median(contrast)))
        return
    if depth >= 5 or len(chain) < 2 * shortest:
        return
    middle = len(chain) // 2
    inner = offsets[len(chain) // 6 : -(len(chain) // 6)]
    worst = len(chain) // 6 + int(np.argmax(np.abs(inner))) if rms > ROUGHEST else middle
    yield from _smooth(chain[:worst], contrast[:worst], shortest, depth + 1)
    yield from _smooth(chain[worst:], contrast[worst:], shortest, depth + 1)


def _sagitta(curve: Floats) -> float:
    """Return how far a curve's middle is from its chord."""
    chord = curve[-1] - curve[0]
    across = np.array([-chord[1], chord[0]]) / max(float(np.hypot(*chord)), 1e-9)
    return float(np.abs((curve - curve[0]) @ across).max())


def _fit(chain: Floats) -> tuple[Floats, float, Floats] | None:
    """Fit a cubic over the chord: ``(POINTS, 2)`` points of it, rms and offsets of the pixels, in pixels."""
    middle, tenth = chain.sum(0) / len(chain), max(len(chain) // 10, 1)
    along = (chain[-tenth:].sum(0) - chain[:tenth].sum(0)) / tenth
    size = math.hypot(*along)
    if size < 1e-6:
        return None
    along = along / size
    across = np.array([-along[1], along[0]])
    t, v = (chain - middle) @ along, (chain - middle) @ across
    low, high = float(t.min()), float(t.max())
    if high - low < 0.8 * np.hypot(*np.diff(chain[:: max(len(chain) // 16, 1)], axis=0).T).sum() * 0.95:
        return None  # it turns back on itself
    u = (2 * t - low - high) / max(high - low, 1e-9)
    powers = np.vander(u, 4, increasing=True)
    keep = np.ones(len(u), bool)
    for _ in range(2):
        kept = powers[keep]
        factors = np.linalg.solve(kept.T @ kept + 1e-9 * np.eye(4), kept.T @ v[keep])
        offsets = v - powers @ factors
        spread = math.sqrt(float(offsets[keep] @ offsets[keep]) / len(kept))
        keep = np.abs(offsets) <= max(2.5 * spread, 0.2)
        if keep.sum() < 8:
            return None
    ends = (_T * (high - low) + low + high) / 2
    curve = middle + ends[:, None] * along + (np.vander(_T, 4, increasing=True) @ factors)[:, None] * across
    return curve, math.sqrt(float(offsets @ offsets) / len(offsets)), offsets


def _joined(pieces: list[_Piece]) -> list[_Piece]:
    """Join pieces where one goes on as another behind a gap; the longest first."""
    pieces = sorted(pieces, key=lambda piece: -piece.length)[: 4 * MOST]
    if not pieces:
        return []
    ends = np.array([(piece.curve[0], piece.curve[-1]) for piece in pieces])
    lengths = np.array([piece.length for piece in pieces])
    free = np.ones(len(pieces), bool)
    done: list[_Piece] = []
    for number, piece in enumerate(pieces):
        if not free[number]:
            continue
        free[number] = False
        grown: _Piece | None = piece
        while grown is not None:
            piece, grown = grown, None
            for other, gap in _ahead(piece, ends, lengths, free):
                grown = _join(piece, pieces[other], gap)
                if grown is not None:
                    free[other] = False
                    break
        done.append(piece)
    return done


def _ahead(
    piece: _Piece, ends: Floats, lengths: Floats, free: npt.NDArray[np.bool_]
) -> list[tuple[int, float]]:
    """Return pieces that may go on a piece, by number, and the gaps before them, the nearest first."""
    found: list[tuple[float, int]] = []
    room = np.minimum(0.6 * (piece.length + lengths), 2.5 * np.minimum(piece.length, lengths))
    for mine, before in ((piece.curve[-1], piece.curve[-2]), (piece.curve[0], piece.curve[1])):
        way = (mine - before) / max(float(np.hypot(*(mine - before))), 1e-9)
        across = np.array([-way[1], way[0]])
        for near in (0, 1):
            gap = ends[:, near] - mine
            ahead, off, size = gap @ way, np.abs(gap @ across), np.hypot(gap[:, 0], gap[:, 1])
            along = (ends[:, 1 - near] - ends[:, near]) @ way
            fits = free & (ahead > -2) & (size < room) & (off < 2 + 0.12 * ahead) & (along > 0.97 * lengths)
            found += [(float(size[number]), int(number)) for number in np.flatnonzero(fits)]
    return [(number, gap) for gap, number in sorted(found)[:4]]


def _join(first: _Piece, second: _Piece, gap: float) -> _Piece | None:
    """Return two pieces as one, where one cubic follows both as closely as each its own."""
    way = first.curve[-1] - first.curve[0]
    pixels = np.concatenate([first.pixels, second.pixels])
    pixels = pixels[np.argsort(pixels @ way)]
    fitted = _fit(pixels)
    if fitted is None:
        return None
    curve, rms, _ = fitted
    own = math.sqrt((len(first.pixels) * first.rms**2 + len(second.pixels) * second.rms**2) / len(pixels))
    length = _chord(curve)
    if rms > min(1.15 * own + 0.05, ROUGHEST) or _sagitta(curve) > MOST_BENT * length:
        return None
    empty = first.gap * first.length + second.gap * second.length + gap
    contrast = (first.contrast * len(first.pixels) + second.contrast * len(second.pixels)) / len(pixels)
    return _Piece(pixels, curve, rms, contrast, min(empty / length, 1.0))


def bows(points: Any) -> tuple[Any, Any]:
    """Return how far curves bend, signed: their quadratic and cubic parts, and their lengths.

    Args:
        points: Arrays ``(..., POINTS, 2)``, evenly spaced along each curve.

    Returns:
        ``(..., 2)``: the orthonormal quadratic and cubic coefficients of the offsets from the chord,
        as root mean square distances in the unit of ``points``; and ``(...)`` chord lengths.
    """
    chord = points[..., -1, :] - points[..., 0, :]
    length = (chord**2).sum(-1) ** 0.5
    offsets = points[..., 1] * chord[..., None, 0] - points[..., 0] * chord[..., None, 1]
    basis = _BASIS[2:].T / math.sqrt(POINTS)
    if not isinstance(points, np.ndarray):
        basis = points.new_tensor(basis)
    return (offsets @ basis) / (length[..., None] + 1e-9), length
