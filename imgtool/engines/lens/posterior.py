"""From likelihood to decision: what is known of the distortion, how surely, and whether to act on it.

The posterior is sampled by importance sampling whose proposals adapt (population Monte Carlo: Cappe,
Guillin, Marin and Robert, 2004), from the distribution of real lenses as prior. A share of all
photos is straight already, so the prior has a point mass there. The estimate is the one of
least expected displacement error; the expected errors of applying it and of leaving the photo alone
are means over the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imgtool.engines.lens import prior
from imgtool.engines.lens.geometry import BrownConrady, grid

Floats = npt.NDArray[np.float64]
Likelihood = Callable[[Floats], Floats]
"""``(K, 4)`` candidates k1, k2, p1, p2 to ``(K,)`` log-likelihoods."""

STRAIGHT = 0.2
"""Prior probability that a photo is not distorted."""
DECENTRED = 0.002
"""Prior standard deviation of p1 and p2."""
FIRST, ROUND = 640, 320
ROUNDS, AT_FULL = 12, 2
"""Most rounds of sampling, and how many of them at least see the whole likelihood."""
EFFECTIVE = 40.0
"""Effective samples that a round rests on: the likelihood is raised to the power that leaves as many."""
HARM = 0.05
"""Percent of the diagonal by which a photo may become worse before it counts as harmed."""


@dataclass(frozen=True)
class Estimate:
    """What was found of a photo's distortion.

    Attributes:
        model: The one of least expected error.
        spread: Standard deviations of k1, k2, p1, p2.
        straight: Probability that the photo is not distorted.
        size: Mean displacement of the estimate itself, in % of the diagonal.
        error: Expected displacement error of the estimate, likewise.
        untouched: Expected error of leaving the photo as it is.
        risk: Probability that applying the estimate makes the photo worse by more than ``HARM``.
        evidence: Log of the likelihood ratio of the estimate to none.
    """

    model: BrownConrady
    spread: tuple[float, float, float, float]
    straight: float
    size: float
    error: float
    untouched: float
    risk: float
    evidence: float

    @property
    def confidence(self) -> float:
        """Return the share of the expected error that the estimate takes away, 0..1."""
        return max(0.0, 1 - self.error / self.untouched) if self.untouched > 0 else 0.0


def field(width: int, height: int) -> npt.NDArray[np.complex128]:
    """Return the displacement fields of unit k1, k2, p1, p2, ``(G, 4)``, similarities projected out.

    The model is linear in its coefficients, so fields of other coefficients are sums of these. A
    similarity of the whole picture, a complex multiple of z plus a constant, bends nothing.
    """
    x, y = grid(width, height)
    z, r2 = x + 1j * y, x * x + y * y
    basis = np.stack([z * r2, z * r2 * r2, 2 * x * y + 1j * (r2 + 2 * y * y), r2 + 2 * x * x + 2j * x * y], 1)
    bent_by_none = np.linalg.qr(np.stack([np.ones_like(z), z], 1))[0]
    rest: npt.NDArray[np.complex128] = basis - bent_by_none @ (bent_by_none.conj().T @ basis)
    return rest


def errors(difference: Floats, bent: npt.NDArray[np.complex128]) -> Floats:
    """Return the mean displacement error in % of the diagonal of ``(S, 4)`` differences of coefficients."""
    found: Floats = 50 * np.abs(difference @ bent.T).mean(-1)
    return found


def _log_prior(candidates: Floats, kind: prior.Kind) -> Floats:
    radial: Floats = prior.log_density(candidates[:, 0], candidates[:, 1], kind)
    tangential = -0.5 * (candidates[:, 2:] ** 2).sum(1) / DECENTRED**2
    density = radial + tangential - 2 * math.log(DECENTRED * math.sqrt(2 * math.pi))
    return np.where(_folds(candidates), -1e6, density)


def _folds(candidates: Floats) -> npt.NDArray[np.bool_]:
    r2 = np.linspace(0, 1, 12)[:, None]
    slope = 1 + r2 * (3 * candidates[:, 0] + r2 * 5 * candidates[:, 1])
    return np.asarray(slope.min(0) < 0.1)


class _Mixture:
    """A mixture of equal normal kernels."""

    def __init__(self, centres: Floats, root: Floats) -> None:
        self.centres, self.root = centres, root
        self._inverse = np.linalg.inv(root)
        self._constant = -float(np.log(np.abs(np.diag(root))).sum()) - 2 * math.log(2 * math.pi)

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        chosen = self.centres[rng.integers(len(self.centres), size=count)]
        drawn: Floats = chosen + rng.standard_normal((count, 4)) @ self.root.T
        return drawn

    def log_density(self, points: Floats) -> Floats:
        apart = (points[:, None] - self.centres[None]) @ self._inverse.T
        each = -0.5 * (apart**2).sum(-1)
        return np.asarray(np.logaddexp.reduce(each, axis=1) + self._constant - math.log(len(self.centres)))


def _adapted(points: Floats, log_weights: Floats, rng: np.random.Generator) -> _Mixture:
    """Return a mixture around resampled points, its kernels a part of their covariance."""
    share = np.exp(log_weights - log_weights.max())
    share /= share.sum()
    mean = share @ points
    spread = (points - mean).T @ ((points - mean) * share[:, None])
    effective = 1 / float((share**2).sum())
    width = 0.6 if effective > 20 else 1.0
    floor = np.diag(np.array([1e-4, 1e-4, 3e-5, 3e-5]) ** 2)
    root = np.linalg.cholesky(width**2 * spread + floor)
    centres = points[rng.choice(len(points), 40, p=share)]
    return _Mixture(centres, root)


def sample(likelihood: Likelihood, kind: prior.Kind = "mixed", seed: int = 0) -> tuple[Floats, Floats, float]:
    """Sample the posterior; the same photo gives the same samples.

    Returns:
        Candidates ``(S, 4)``, their normalised weights ``(S,)``, the last of them the straight
        picture's, and the log-likelihood of the straight picture.
    """
    rng = np.random.default_rng(seed)
    points = prior.draws(rng, kind, DECENTRED, FIRST)
    zero = float(likelihood(np.zeros((1, 4)))[0])
    found, target = [points], [likelihood(points)]
    before = [_log_prior(points, kind)]
    proposals: list[_Mixture] = []
    full = 0
    for _ in range(ROUNDS):
        every, like, log_prior = (np.concatenate(parts) for parts in (found, target, before))
        base = log_prior - _density(every, log_prior, proposals)
        temper = _temper(like, base)
        full += temper == 1
        proposals.append(_adapted(every, temper * like + base, rng))
        points = proposals[-1].draw(ROUND, rng)
        found.append(points)
        target.append(likelihood(points))
        before.append(_log_prior(points, kind))
        if full == AT_FULL:
            break
    every, like, log_prior = (np.concatenate(parts) for parts in (found, target, before))
    log_weights = like + log_prior - _density(every, log_prior, proposals) - math.log(len(every))
    log_weights = np.append(log_weights + math.log(1 - STRAIGHT), zero + math.log(STRAIGHT))
    share = np.exp(log_weights - log_weights.max())
    return np.concatenate([every, np.zeros((1, 4))]), share / share.sum(), zero


def _temper(like: Floats, base: Floats) -> float:
    """Return the largest power of the likelihood, at most 1, that leaves ``EFFECTIVE`` samples."""

    def effective(temper: float) -> float:
        share = np.exp(temper * like + base - (temper * like + base).max())
        return float(share.sum() ** 2 / (share**2).sum())

    if effective(1.0) >= EFFECTIVE:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if effective(middle) >= EFFECTIVE else (low, middle)
    return low


def _density(points: Floats, log_prior: Floats, proposals: list[_Mixture]) -> Floats:
    """Return the log-density of the mixture of the prior and all proposals that points were drawn from."""
    counts = np.array([FIRST, *[ROUND] * len(proposals)], np.float64)
    each = [log_prior, *(proposal.log_density(points) for proposal in proposals)]
    shares = np.log(counts / counts.sum())
    return np.asarray(np.logaddexp.reduce([one + share for one, share in zip(each, shares, strict=True)]))


def centre(points: Floats, share: Floats, bent: npt.NDArray[np.complex128], steps: int = 12) -> Floats:
    """Return the point of least expected displacement error: the weighted geometric median (Weiszfeld).

    The posterior is skewed and has a point mass; its mean would be drawn to rare strong distortions.
    """
    found: Floats = share @ points
    for _ in range(steps):
        pull = share / np.maximum(errors(points - found, bent), 1e-3)
        found = pull @ points / pull.sum()
    return found


def summary(points: Floats, share: Floats, width: int, height: int, evidence: float) -> Estimate:
    """Return the estimate that weighted samples stand for.

    Args:
        points: ``(S, 4)`` samples of k1, k2, p1, p2.
        share: ``(S,)`` their weights, of sum 1.
        width: Of the photo, in any unit.
        height: The same.
        evidence: Log of the likelihood ratio to the straight picture.
    """
    bent = field(width, height)
    mean = share @ points
    model = BrownConrady(*map(float, centre(points, share, bent))).clamped()
    kept = np.array([model.k1, model.k2, model.p1, model.p2])
    after, none = errors(points - kept, bent), errors(points, bent)
    spread = np.sqrt(share @ (points - mean) ** 2)
    return Estimate(
        model,
        (float(spread[0]), float(spread[1]), float(spread[2]), float(spread[3])),
        float(share @ ~points.any(1)),
        float(errors(kept[None], bent)[0]),
        float(share @ after),
        float(share @ none),
        float(share @ (after > none + HARM)),
        evidence,
    )


def estimate(likelihood: Likelihood, width: int, height: int, kind: prior.Kind = "mixed") -> Estimate:
    """Return the estimate of least expected error and what acting on it may do.

    Args:
        likelihood: Log-likelihoods of candidates.
        width: Of the photo, in any unit.
        height: The same.
        kind: The prior.
    """
    points, share, zero = sample(likelihood, kind)
    evidence = float(likelihood((share @ points)[None])[0]) - zero
    return summary(points, share, width, height, evidence)


def around(mean: Floats, spread: Floats, width: int, height: int, seed: int = 0) -> Estimate:
    """Return the estimate of a normal distribution of k1, k2, p1, p2, as a network may state one.

    Args:
        mean: ``(4,)``.
        spread: ``(4, 4)``: a root of the covariance.
        width: Of the photo, in any unit.
        height: The same.
        seed: Of the samples.
    """
    points = mean + np.random.default_rng(seed).standard_normal((1024, 4)) @ spread.T
    lowest = float(np.linalg.norm(np.linalg.lstsq(spread, mean, rcond=None)[0]))
    return summary(points, np.full(len(points), 1 / len(points)), width, height, 0.5 * lowest**2)


def pooled(estimates: Sequence[Estimate], width: int, height: int) -> Estimate:
    """Return the estimate of photos of one lens whose own are normal and independent.

    Args:
        estimates: One for each photo.
        width: Of the photos, in any unit.
        height: The same.
    """
    models = [each.model for each in estimates]
    means = np.array([(model.k1, model.k2, model.p1, model.p2) for model in models])
    inverse = 1 / np.maximum(np.array([each.spread for each in estimates]), 1e-6) ** 2
    mean = (means * inverse).sum(0) / inverse.sum(0)
    return around(mean, np.diag(inverse.sum(0) ** -0.5), width, height)
