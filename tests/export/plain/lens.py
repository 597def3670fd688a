"""Find a photo's distortion with an exported lens file and its JSON alone: lens.py MODEL.onnx PHOTO JSON."""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model, source, target = sys.argv[1:]
stated = json.loads(Path(model + ".json").read_text(encoding="utf-8"))
session = onnxruntime.InferenceSession(model)
photo = np.asarray(ImageOps.exif_transpose(Image.open(source)).convert("RGB"))
ALONG = np.linspace(-1, 1, 12)


# The edges.


def fit(pixels):
    """A cubic over the chord: its 12 points, the rms of all pixels, their offsets; None where none fits."""
    tenth = max(len(pixels) // 10, 1)
    way = pixels[-tenth:].mean(0) - pixels[:tenth].mean(0)
    way /= np.hypot(*way)
    across, middle = np.array([-way[1], way[0]]), pixels.mean(0)
    t, v = (pixels - middle) @ way, (pixels - middle) @ across
    low, high = t.min(), t.max()
    if high - low < 0.76 * np.hypot(*np.diff(pixels[:: max(len(pixels) // 16, 1)], axis=0).T).sum():
        return None
    powers = np.vander((2 * t - low - high) / (high - low), 4)
    factors = np.linalg.lstsq(powers, v)[0]
    off = v - powers @ factors
    kept = abs(off) <= max(2.5 * math.sqrt((off**2).mean()), 0.2)
    if kept.sum() < 8:
        return None
    factors = np.linalg.lstsq(powers[kept], v[kept])[0]
    off = v - powers @ factors
    places = (ALONG * (high - low) + low + high) / 2
    curve = middle + places[:, None] * way + (np.vander(ALONG, 4) @ factors)[:, None] * across
    return curve, math.sqrt((off**2).mean()), off


def length_of(curve):
    """The length of a curve's chord."""
    return float(np.hypot(*(curve[-1] - curve[0])))


def bent(curve):
    """The sagitta's share of the length."""
    way = (curve[-1] - curve[0]) / length_of(curve)
    return abs((curve - curve[0]) @ [-way[1], way[0]]).max() / length_of(curve)


def smooth(pixels, contrast, depth=0):
    """Pieces (pixels, curve, rms, contrast, gap) that a cubic follows."""
    fitted = fit(pixels)
    if fitted is None:
        return []
    curve, rms, off = fitted
    if rms <= 0.7 and bent(curve) <= 0.16:
        return [(pixels, curve, rms, float(np.median(contrast)), 0.0)] if length_of(curve) >= least else []
    if depth == 5 or len(pixels) < 2 * least:
        return []
    sixth = len(pixels) // 6
    worst = sixth + int(abs(off[sixth:-sixth]).argmax()) if rms > 0.7 else len(pixels) // 2
    return smooth(pixels[:worst], contrast[:worst], depth + 1) + smooth(
        pixels[worst:], contrast[worst:], depth + 1
    )


def cut(pixels, contrast):
    """The pieces of a traced edge between its corners."""
    if len(pixels) < 14:
        return []
    padded = np.pad(pixels, ((2, 2), (0, 0)), "edge")
    soft = sum(padded[at : at + len(pixels)] for at in range(5)) / 5
    angle = np.arctan2(*(soft[7:] - soft[:-7]).T[::-1])
    turn = abs((angle[7:] - angle[:-7] + math.pi) % (2 * math.pi) - math.pi)
    cuts = [0, *(np.flatnonzero(turn > math.radians(24)) + 7), len(pixels)]
    return [
        piece
        for first, last in pairwise(cuts)
        if last - first >= least
        for piece in smooth(pixels[first:last], contrast[first:last])
    ]


def trace():
    """All pieces of the edges of the grey picture."""
    blurred = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 1)
    gradient = [cv2.Sobel(blurred, cv2.CV_32F, x, 1 - x, scale=1 / 8) for x in (1, 0)]
    size = np.hypot(*gradient)
    tracer = cv2.ximgproc.createEdgeDrawing()
    options = cv2.ximgproc.EdgeDrawing.Params()
    options.GradientThresholdValue, options.AnchorThresholdValue = 14, 0
    options.MinPathLength, options.Sigma = int(least), 0
    tracer.setParams(options)
    tracer.detectEdges(cv2.GaussianBlur(grey, (0, 0), 1))
    found = []
    for chain in tracer.getSegments():
        at = np.reshape(chain, (-1, 2))
        if len(at) < least:
            continue
        column, row = at.T
        way = np.stack([one[row, column] for one in gradient], 1)
        way /= np.maximum(size[row, column], 1e-6)[:, None]
        places = [(at + step * way).astype(np.float32)[:, None] for step in (-1, 0, 1)]
        before, here, after = (cv2.remap(size, one, None, cv2.INTER_LINEAR)[:, 0] for one in places)
        bend = before + after - 2 * here
        peak = np.where(bend < -1e-6, (before - after) / (2 * np.minimum(bend, -1e-6)), 0).clip(-0.75, 0.75)
        found += cut(at + peak.astype(float)[:, None] * way, here / 255)
    return found


def join(first, second, gap):
    """Two pieces as one, or None."""
    pixels = np.concatenate([first[0], second[0]])
    pixels = pixels[np.argsort(pixels @ (first[1][-1] - first[1][0]))]
    fitted = fit(pixels)
    if fitted is None:
        return None
    curve, rms, _ = fitted
    shares = np.array([len(first[0]), len(second[0])]) / len(pixels)
    if (
        rms > 1.15 * math.sqrt(shares @ [first[2] ** 2, second[2] ** 2]) + 0.05
        or rms > 0.7
        or bent(curve) > 0.16
    ):
        return None
    gaps = first[4] * length_of(first[1]) + second[4] * length_of(second[1]) + gap
    return pixels, curve, rms, float(shares @ [first[3], second[3]]), min(gaps / length_of(curve), 1.0)


def follower(piece, others):
    """The nearest piece that goes on another, joined to it, and which it was."""
    near = []
    for end, before in ((-1, -2), (0, 1)):
        way = piece[1][end] - piece[1][before]
        way /= np.hypot(*way)
        for number, other in enumerate(others):
            for head, tail in ((0, -1), (-1, 0)):
                lengths = length_of(piece[1]), length_of(other[1])
                gap = other[1][head] - piece[1][end]
                ahead, aside, far = gap @ way, abs(gap @ [-way[1], way[0]]), np.hypot(*gap)
                if (
                    ahead > -2
                    and far < min(0.6 * sum(lengths), 2.5 * min(lengths))
                    and aside < 2 + 0.12 * ahead
                    and (other[1][tail] - other[1][head]) @ way > 0.97 * lengths[1]
                ):
                    near.append((float(far), number))
    for far, number in sorted(near)[:4]:
        joined = join(piece, others[number], far)
        if joined:
            return joined, number
    return None


def edges():
    """The points and facts of the longest edges."""
    pieces = []
    for piece in trace():
        x, y = piece[1].T
        if min(side.max() for side in (x, width - 1 - x, y, height - 1 - y)) >= 0.012 * diagonal:
            pieces.append(piece)
    pieces.sort(key=lambda piece: -length_of(piece[1]))
    done = []
    while pieces:
        piece = pieces.pop(0)
        while found := follower(piece, pieces):
            piece = found[0]
            del pieces[found[1]]
        done.append(piece)
    done.sort(key=lambda piece: -length_of(piece[1]))
    done = [piece for piece in done if length_of(piece[1]) >= 0.045 * diagonal][:160]
    points = np.array([piece[1] for piece in done]) - [(width - 1) / 2, (height - 1) / 2]
    return points / (diagonal / 2), np.array([(len(piece[0]), *piece[2:]) for piece in done])


# The prior and Bayes' rule.

PARTS = (  # weight; k1: freedom, mode, scale below, above; k2: offset, slope; the same of its rest; limits
    (0.85, (2.2, 0.003, 0.0375, 0.0285), (0.001, -0.43), (2.4, 0, 0.0125, 0.0115), (-0.3, 0.2, -0.15, 0.18)),
    (0.15, (8, -0.3, 0.085, 0.085), (-0.045, -0.44), (5, 0, 0.025, 0.025), (-0.5, -0.12, -0.05, 0.28)),
)
TANGENTIAL = 0.002
rng = np.random.default_rng(0)


def drawn(freedom, middle, below, above, count):
    """Draws of a Student t of two scales."""
    scales = np.where(rng.random(count) < below / (below + above), -below, above)
    return middle + abs(rng.standard_t(freedom, count)) * scales


def log_t(values, freedom, middle, below, above):
    """Its log density."""
    scaled = (values - middle) / np.where(values < middle, below, above)
    constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    return constant + math.log(2 / (below + above)) - (freedom + 1) / 2 * np.log1p(scaled**2 / freedom)


def log_prior(points):
    """The log density of distorted photos."""
    k1, k2 = points[:, 0], points[:, 1]
    each = [
        math.log(weight) + log_t(k1, *first) + log_t(k2 - offset - slope * k1, *second)
        for weight, first, (offset, slope), second, _ in PARTS
    ]
    normal = -0.5 * (points[:, 2:] ** 2).sum(1) / TANGENTIAL**2 - 2 * math.log(
        TANGENTIAL * math.sqrt(2 * math.pi)
    )
    return np.where(folds(k1, k2), -1e6, np.logaddexp(*each) + normal)


def folds(k1, k2):
    """Whether the radius turns back."""
    r2 = np.linspace(0, 1, 12)[:, None]
    return (1 + 3 * k1 * r2 + 5 * k2 * r2**2).min(0) < 0.1


def from_prior(count):
    """Draws of distorted photos."""
    parts = []
    for weight, first, (offset, slope), second, (least_k1, most_k1, least_k2, most_k2) in PARTS:
        number = round(weight * count)
        k1 = drawn(*first, 4 * number)
        k2 = offset + slope * k1 + drawn(*second, 4 * number)
        kept = (k1 > least_k1) & (k1 < most_k1) & (k2 > least_k2) & (k2 < most_k2) & ~folds(k1, k2)
        k1, k2 = k1[kept][:number], k2[kept][:number]
        parts.append(np.stack([k1, k2, *rng.normal(0, TANGENTIAL, (2, len(k1)))], 1))
    return np.concatenate(parts)


def log_kernels(points, centres, root):
    """The log density of a mixture of normal kernels."""
    apart = (points[:, None] - centres) @ np.linalg.inv(root).T
    constant = np.log(np.diag(root)).sum() + 2 * math.log(2 * math.pi) + math.log(len(centres))
    return np.logaddexp.reduce(-0.5 * (apart**2).sum(2), 1) - constant


def shares_of(logs):
    """Weights of sum 1, and on how many of them they rest."""
    shares = np.exp(logs - logs.max())
    shares /= shares.sum()
    return shares, 1 / (shares**2).sum()


def tempered(like, base):
    """The largest power of the likelihood, up to 1, that leaves 40 effective samples."""
    if shares_of(like + base)[1] >= 40:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if shares_of(middle * like + base)[1] >= 40 else (low, middle)
    return low


def posterior(likelihood):
    """Weighted draws of the posterior; the last is the photo that is not distorted."""
    points = from_prior(640)
    like, kernels, full = likelihood(points), [], 0
    base = np.zeros(len(points))
    while full < 2 and len(kernels) < 12:
        power = tempered(like, base)
        full += power == 1
        shares, _ = shares_of(power * like + base)
        root = np.linalg.cholesky(
            0.36 * np.cov(points.T, aweights=shares, ddof=0) + np.diag([1e-4, 1e-4, 3e-5, 3e-5]) ** 2
        )
        kernels.append((points[rng.choice(len(points), 40, p=shares)], root))
        new = kernels[-1][0][rng.integers(40, size=320)] + rng.standard_normal((320, 4)) @ root.T
        points, like = np.concatenate([points, new]), np.concatenate([like, likelihood(new)])
        counts = np.array([640] + [320] * len(kernels)) / len(points)
        proposed = [log_prior(points), *(log_kernels(points, *one) for one in kernels)]
        mixture = [part + share for part, share in zip(proposed, np.log(counts), strict=True)]
        base = proposed[0] - np.logaddexp.reduce(mixture)
    logs = like + base - math.log(len(points)) + math.log(0.8)
    none = likelihood(np.zeros((2, 4)))[:1] + math.log(0.2)
    return np.concatenate([points, np.zeros((1, 4))]), shares_of(np.concatenate([logs, none]))[0]


def fields():
    """Displacements by unit k1, k2, p1, p2 all over the picture, as complex numbers, without similarities."""
    columns, rows = photo.shape[1], photo.shape[0]
    part = 0.96 / math.hypot(columns, rows)
    x, y = np.meshgrid(np.linspace(-1, 1, 24) * columns * part, np.linspace(-1, 1, 16) * rows * part)
    z = (x + 1j * y).ravel()
    x, y, r2 = z.real, z.imag, abs(z) ** 2
    unit = np.stack([z * r2, z * r2**2, 2 * x * y + 1j * (r2 + 2 * y * y), r2 + 2 * x * x + 2j * x * y], 1)
    same = np.stack([np.ones_like(z), z], 1)
    return unit - same @ np.linalg.lstsq(same, unit)[0]


shrink = min(1024 / max(photo.shape[:2]), 1)
size = [round(edge * shrink) for edge in photo.shape[1::-1]]
grey = cv2.cvtColor(cv2.resize(photo, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
height, width = grey.shape
diagonal = math.hypot(width, height)
least = max(0.017 * diagonal, 12)
points, facts = edges()


def likelihood(candidates):
    """The file's log-likelihoods of candidates (K, 4)."""
    given = {
        "points": points,
        "facts": facts,
        "half_diagonal": np.array(diagonal / 2),
        "candidates": candidates,
    }
    given = {name: value.astype(np.float32)[None] for name, value in given.items()}
    return session.run(None, given)[0][0].astype(float)


candidates, shares = posterior(likelihood)
displaced = fields()
estimate = shares @ candidates
for _ in range(12):
    pull = shares / np.maximum(abs((candidates - estimate) @ displaced.T).mean(1) * 50, 1e-3)
    estimate = pull @ candidates / pull.sum()
after, before = (abs((candidates - one) @ displaced.T).mean(1) * 50 for one in (estimate, np.zeros(4)))
won = 1 - shares @ after / (shares @ before)
harm = shares @ (after > before + 0.05)
size = float(abs(displaced @ estimate).mean() * 50)
kept = size >= 0.02 and won >= 0.2 and harm <= (0.18 if won >= 0.5 else 0.03)
answer = dict(zip(("k1", "k2", "p1", "p2"), map(float, estimate), strict=True))
answer |= {"edges": len(points), "straighten": bool(kept), "expected_error_percent": float(shares @ after)}
Path(target).write_text(json.dumps(answer), encoding="utf-8")
assert "imgtool" not in sys.modules
