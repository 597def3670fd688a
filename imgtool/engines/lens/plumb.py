"""The network "lines": how much each edge of a photo says of the lens, learnt.

For a candidate distortion every edge is straightened, and what is left of its bend is judged: an
edge that is straight in the world leaves noise, one that is not leaves anything. The network looks
at what an edge is like (length, roughness, contrast, place, direction, neighbours) and says how
probable it is that the edge is straight, how large the noise is, how large bends of others are, and
how much to trust it. The sum of the logarithms over all edges is the log-likelihood of the
candidate: a robust plumb-line method whose weights are learnt, and which knows how sure it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from imgtool.engines.lens import lines

FEATURES = 16
PARAMETERS = 6
KINDS = 4
"""Kinds of scenes that the network tells apart: in a street most long edges are straight, in a wood none."""
NEAR = (0.02, 0.1)
"""Distances in half diagonals within which parallel edges count as neighbours."""
NOISE_FREEDOM, BEND_FREEDOM = 4.0, 2.0
"""Degrees of freedom of Student's t for the noise of straight edges and for the bends of others."""


class Evidence(NamedTuple):
    """The edges of a batch of photos; those that only fill up have 0 edge pixels.

    Attributes:
        points: ``(B, N, POINTS, 2)`` as in ``lines.Lines``.
        facts: ``(B, N, 4)`` likewise.
        half_diagonal: ``(B,)`` pixels.
    """

    points: Tensor
    facts: Tensor
    half_diagonal: Tensor


class Weights(NamedTuple):
    """What the network says, for each of ``H`` kinds of scenes.

    Attributes:
        kind: ``(B, H)`` log-probabilities of the kinds.
        trust: ``(B, H, N)`` power to which the likelihood of an edge is raised, 0..1.
        straight: ``(B, H, N)`` logit of the probability that the edge is straight in the world.
        noise: ``(B, H, N)`` scale of what is left of a straight edge's bend, in pixels.
        noise_cubic: The same for the cubic part.
        bend: ``(B, H, N)`` scale of the bends of other edges, in pixels.
        bend_cubic: The same for the cubic part.
    """

    kind: Tensor
    trust: Tensor
    straight: Tensor
    noise: Tensor
    noise_cubic: Tensor
    bend: Tensor
    bend_cubic: Tensor


def evidence(found: lines.Lines) -> Evidence:
    """Return the edges of one photo as a batch of one, in float32; of none, one that fills up."""
    points, facts = torch.from_numpy(found.points).float(), torch.from_numpy(found.facts).float()
    if not len(points):
        points, facts = points.new_zeros(1, lines.POINTS, 2), facts.new_zeros(1, facts.shape[1])
    return Evidence(points[None], facts[None], torch.tensor([found.half_diagonal], dtype=torch.float32))


def displaced(points: Tensor, candidates: Tensor) -> Tensor:
    """Return by how much points lie elsewhere in the straight picture of each candidate.

    The radial part is inverted by Newton on the radius; the tangential part, small beside it, to
    first order. Not the places themselves: these would be rounded more.

    Args:
        points: ``(B, N, P, 2)`` normalised.
        candidates: ``(B, K, 4)`` k1, k2, p1, p2.

    Returns:
        ``(B, K, N, P, 2)``.
    """
    k1, k2, p1, p2 = (each[:, :, None, None] for each in candidates.unbind(-1))
    x, y = (each[:, None] for each in points.unbind(-1))
    square = x * x + y * y
    wanted = square.sqrt()
    radius = wanted / (1 + (k1 + k2 * square) * square).clamp(min=0.6)
    for _ in range(3):
        r2 = radius * radius
        miss = radius * (1 + r2 * (k1 + r2 * k2)) - wanted
        radius = radius - miss / (1 + r2 * (3 * k1 + r2 * (5 * k2))).clamp(min=0.15)
        radius = torch.minimum(radius.clamp(min=0), 2 * wanted)  # where a candidate folds
    square = radius * radius
    bent = (k1 + k2 * square) * square
    share = -bent / (1 + bent).clamp(min=0.4)
    across, down = x * share, y * share
    x, y = x + across, y + down
    both = 2 * (p1 * y + p2 * x)
    return torch.stack([across - both * x - p2 * square, down - both * y - p1 * square], -1)


def bends(given: Evidence, candidates: Tensor) -> Tensor:
    """Return what is left of every edge's bend: ``(B, K, N, 2)``, quadratic and cubic part.

    The unit is a pixel of the photo: a candidate that shrinks an edge straightens nothing by that.
    """
    moved = displaced(given.points, candidates)
    own = (
        given.points - given.points[..., :1, :]
    )  # seen from an edge's first point: numbers as small as it is
    left, length = lines.bows(own[:, None] + (moved - moved[..., :1, :]))
    _, before = lines.bows(own)
    scale = given.half_diagonal[:, None, None] * before[:, None] / length.clamp(min=1e-6)
    scaled: Tensor = left * scale[..., None]
    return scaled


def _neighbours(middle: Tensor, way: Tensor, length: Tensor, real: Tensor) -> Tensor:
    """Return how many parallel edges lie beside each, ``(B, N, 2)`` for both distances of ``NEAR``."""
    apart = middle[:, None] - middle[:, :, None]
    along = (apart * way[:, :, None]).sum(-1).abs()
    off = (apart[..., 1] * way[:, :, None, 0] - apart[..., 0] * way[:, :, None, 1]).abs()
    parallel = (way[:, None] * way[:, :, None]).sum(-1).abs() > 0.985
    beside = along < 0.5 * (length[:, None] + length[:, :, None])
    both = parallel & beside & real[:, None] & real[:, :, None]
    counts = torch.stack([(both & (off < near)).sum(-1) - 1 for near in NEAR], -1).to(length.dtype)
    return counts.clamp(min=0)


def _alike(way: Tensor, length: Tensor) -> Tensor:
    """Return the share of all edges, by length, that are within a few degrees of each one's direction."""
    sine = way[:, :, None, 0] * way[:, None, :, 1] - way[:, :, None, 1] * way[:, None, :, 0]
    same = (-(sine / 0.05).square()).exp() @ length[..., None]
    return (same[..., 0] - length) / (length.sum(1, keepdim=True) + 1e-3)


def features(given: Evidence) -> tuple[Tensor, Tensor]:
    """Return what an edge is like, ``(B, N, FEATURES)`` of about unit size, and which are real."""
    points, facts, half = given
    real = facts[..., 0] > 0
    bow, length = lines.bows(points - points[..., :1, :])
    middle, chord = points.mean(2), points[:, :, -1] - points[:, :, 0]
    way = chord / length.clamp(min=1e-6)[..., None]
    distance = middle.square().sum(-1).sqrt()
    off = (middle[..., 1] * way[..., 0] - middle[..., 0] * way[..., 1]).abs()
    near = _neighbours(middle, way, length, real)
    pixels, rms, contrast, gap = facts.unbind(-1)
    size = half[:, None].expand_as(length)
    count = real.sum(1, keepdim=True).to(length.dtype).expand_as(length)
    every = [
        (length + 1e-3).log() + 1.2,
        ((pixels + 1) / (length * size + 1)).log(),
        (rms + 0.02).log() + 1.3,
        (contrast + 0.003).log() + 2.5,
        gap * 2,
        distance * 2 - 1,
        off * 2 - 1,
        (off / distance.clamp(min=1e-3)).clamp(max=1) * 2 - 1,
        (2 * way[..., 0].square() - 1).abs() * 2 - 1,
        ((bow[..., 1].abs() * size) + 0.03).log() + 2,
        (size / 400).log() * 2,
        (near[..., 0] + 1).log() - 0.5,
        (near[..., 1] + 1).log() - 1,
        (count + 1).log() - 4,
        (length * size + 1).log() - 4,
        _alike(way, length * real) * 3 - 1,
    ]
    return torch.stack(every, -1) * real[..., None], real


class LinesNet(nn.Module):
    """Weighs the edges of a photo, under each kind of scene that it may be."""

    def __init__(self, width: int = 48, dropout: float = 0.1) -> None:
        """Make the network; fresh, it gives every edge the weights of a robust plumb-line method.

        Args:
            width: Of the layers.
            dropout: Share of what it knows of the whole photo that is hidden in training: there are
                fewer photos than edges, and they must not be recognised.
        """
        super().__init__()
        self.own = nn.Sequential(nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.rest = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * width, width // 2), nn.GELU())
        self.both = nn.Sequential(nn.Linear(width + width // 2, width), nn.GELU())
        self.says = nn.Linear(width, KINDS * PARAMETERS)
        self.kind = nn.Linear(width // 2, KINDS)
        nn.init.zeros_(self.says.weight)
        with torch.no_grad():
            self.says.bias.copy_(torch.linspace(-1, 1, KINDS)[:, None].mul(torch.tensor(_APART)).flatten())

    def forward(self, given: Evidence) -> Weights:
        """Return what each edge says."""
        looks, real = features(given)
        own = self.own(looks) * real[..., None]
        count = real.sum(1, keepdim=True).to(own.dtype).clamp(min=1)
        highest = own.masked_fill(~real[..., None], -1e4).amax(1).clamp(min=-10)
        rest = self.rest(torch.cat([own.sum(1) / count, highest], -1))
        said = self.says(self.both(torch.cat([own, rest[:, None].expand(-1, own.shape[1], -1)], -1)))
        said = said.unflatten(-1, (KINDS, PARAMETERS)).permute(0, 2, 1, 3)
        return weights(self.kind(rest), said, given, real)


_APART = (0.0, 1.5, -0.3, -0.3, 0.0, 0.0)
"""How the parameters of the kinds differ at first: in how many edges are straight, and how well."""


def weights(kind: Tensor, said: Tensor, given: Evidence, real: Tensor) -> Weights:
    """Return the weights that ``(B, H, N, PARAMETERS)`` numbers around 0 stand for.

    Args:
        kind: ``(B, H)`` logits.
        said: The numbers; all 0 is the fixed method.
        given: The edges.
        real: ``(B, N)`` which of them are edges.
    """
    _, length = lines.bows(given.points)
    size = (length * given.half_diagonal[:, None])[:, None]
    trust = torch.sigmoid(said[..., 0]) * real[:, None]
    straight = said[..., 1] - 1
    noise, noise_cubic = (0.12 * said[..., n].clamp(-3.0, 1.2).exp() for n in (2, 3))
    bend, bend_cubic = ((0.2 + 0.012 * size) * said[..., n].clamp(-3.0, 4.0).exp() for n in (4, 5))
    return Weights(kind.log_softmax(-1), trust, straight, noise, noise_cubic, bend, 0.4 * bend_cubic)


def _student(value: Tensor, scale: Tensor, freedom: float) -> Tensor:
    constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    return constant - scale.log() - (freedom + 1) / 2 * torch.log1p((value / scale).square() / freedom)


def log_likelihood(said: Weights, left: Tensor) -> Tensor:
    """Return the log-likelihood of every candidate: the kinds of scenes are summed over.

    Args:
        said: Of the photo and each edge.
        left: ``bends`` of the candidates, ``(B, K, N, 2)``.

    Returns:
        ``(B, K)``.
    """
    trust, straight, noise, noise_cubic, bend, bend_cubic = (each[:, :, None] for each in said[1:])
    quadratic, cubic = left[:, None].unbind(-1)
    good = _student(quadratic, noise, NOISE_FREEDOM) + _student(cubic, noise_cubic, NOISE_FREEDOM)
    other = _student(quadratic, bend, BEND_FREEDOM) + _student(cubic, bend_cubic, BEND_FREEDOM)
    good, other = good - functional.softplus(-straight), other - functional.softplus(straight)
    # Spelt out: exported, functions of torch's may lose their guard against overflow.
    mixed = torch.maximum(good, other) + torch.log1p((-(good - other).abs()).exp())
    each = (trust * mixed).sum(-1) + said.kind[..., None]
    top = each.amax(1, keepdim=True)
    summed: Tensor = top[:, 0] + (each - top).exp().sum(1).log()
    return summed


PIECE = 128
"""Candidates that are judged at once."""


@dataclass(frozen=True)
class Exported:
    """A ``LinesNet`` in a file, run by a runtime.

    Attributes:
        run: Points, facts, half diagonal, candidates to ``[(1, K)]`` log-likelihoods.
        edges: Edges that it takes; None takes any number.
        candidates: The same of candidates.
    """

    run: Callable[..., Sequence[npt.NDArray[Any]]]
    edges: int | None = None
    candidates: int | None = None

    def likelihood(self, found: lines.Lines) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
        """Return the likelihood by edges, by the longest where there are more than the file takes."""
        points, facts, half = (part.numpy() for part in filled(evidence(found), self.edges))
        count = self.candidates or PIECE

        def likelihood(candidates: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            """Return the log-likelihoods ``(K,)`` of candidates ``(K, 4)``: k1, k2, p1, p2."""
            parts = []
            for start in range(0, len(candidates), count):
                part = candidates[start : start + count].astype(np.float32)
                given = np.zeros((1, self.candidates or len(part), 4), np.float32)
                given[0, : len(part)] = part
                (out,) = self.run(points, facts, half, given)
                parts.append(out[0, : len(part)])
            return np.concatenate(parts).astype(np.float64)

        return likelihood


def filled(given: Evidence, count: int | None) -> Evidence:
    """Return so many edges of a photo, at least 2 where None: the longest, or filled up with nothing."""
    count = count or max(2, given.points.shape[1])
    more = max(0, count - given.points.shape[1])
    points = functional.pad(given.points, (0, 0, 0, 0, 0, more))[:, :count]
    return Evidence(points, functional.pad(given.facts, (0, 0, 0, more))[:, :count], given.half_diagonal)


def fixed(given: Evidence) -> Weights:
    """Return weights that ask only for length and roughness: the plumb-line method without learning."""
    real = given.facts[..., 0] > 0
    zeros = given.points.new_zeros((len(real), 1, real.shape[1], PARAMETERS))
    return weights(zeros[:, :, 0, 0], zeros, given, real)


def loss(net: nn.Module, batch: Any, untouched: float) -> Tensor:
    """Return the negative log-posterior of the truth, over that before seeing the photo, ``(B,)``.

    The normaliser is an integral over the prior: a point mass at the straight picture, and the
    weighted mean over the candidates. Coordinates need float32, so autocast is switched off.

    Args:
        net: A ``LinesNet``.
        batch: A batch of ``evidence.Sample``.
        untouched: Probability of the point mass.
    """
    with torch.autocast(batch.points.device.type, enabled=False):
        given = Evidence(batch.points, batch.facts, batch.half_diagonal)
        truth = batch.coefficients[:, None]
        with torch.no_grad():
            left = bends(given, torch.cat([truth, torch.zeros_like(truth), batch.candidates], 1))
        every = log_likelihood(net(given), left)
        bent = torch.logsumexp(every[:, 2:] + batch.log_weights, 1) - math.log(batch.candidates.shape[1])
        masses = torch.tensor([untouched, 1 - untouched]).clamp(1e-6).log().tolist()
        return torch.logaddexp(masses[0] + every[:, 1], masses[1] + bent) - every[:, 0]
