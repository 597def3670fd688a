"""What exported files hold: the whole of a network, in operators that every runtime knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtool.engines.awb import estimate, features, reading
from imgtool.engines.awb.camera import GENERIC, LEAST
from imgtool.engines.awb.camera import HIGHEST as COLDEST
from imgtool.engines.awb.camera import LOWEST as WARMEST
from imgtool.engines.awb.mosaic import SAMPLES
from imgtool.engines.awb.network import DeepAwb, Hist
from imgtool.engines.awb.settings import SURE, Model, Sources
from imgtool.engines.awb.stats import CELLS, COVERED, DULLEST, SATURATED, AwbStats
from imgtool.errors import USAGE, ImgtoolError
from imgtool.port import Axis, Loss, Port, Slot

if TYPE_CHECKING:
    from imgtool.engines.awb.camera import Locus
    from imgtool.engines.awb.settings import Export

_BINS, _REACH = features.BINS, features.REACH

Array = npt.NDArray[Any]
Arrays = tuple[Array, ...]

FULL = float(np.sqrt(50))
"""Largest value of a histogram: that of all points in one bin."""
LOWEST = -20.0
"""Log probability below which a light does not come into question."""
MOST_DEGREES, WORST_DEGREES = 0.15, 2.0
"""What arithmetic in 8 bits may cost, on average and at worst."""
DEFAULT_PRIOR = np.tile(-0.5 * features.OFFSETS**2, features.LIGHTS)
SINGLE_BINS = (0, 10, 31)
"""Bins, along both axes, that alone are filled in inputs of extreme values."""


def hats(place: Tensor, bins: Tensor) -> Tensor:
    """Return the shares that places ``(..., N)`` in bins have in each of the ``(BINS,)`` bins around them.

    These are the weights of linear interpolation, as sums and maxima.
    """
    return F.relu(1 - (place[..., None] - bins).abs())


def in_bins(place: Tensor, last: float = _BINS - 1) -> Tensor:
    """Return aligned log-chroma in bins, kept in 0..last."""
    return ((place + _REACH) * ((_BINS - 1) / (2 * _REACH))).clamp(0, last)


class Whole(nn.Module):
    """All of ``hist``: from histograms and candidate lights to the log probability of each."""

    bins: Tensor

    def __init__(self, net: Hist) -> None:
        """Wrap a network."""
        super().__init__()
        self.net = net
        self.register_buffer("bins", torch.arange(_BINS, dtype=torch.float32), persistent=False)

    def forward(self, histograms: Tensor, place: Tensor, side: Tensor, log_prior: Tensor) -> Tensor:
        """Return ``(B, K)`` for ``(B, 3, BINS, BINS)``, ``(B, K, 2)``, ``(B, K, 3)`` and ``(B, K)``."""
        scores = self.net(histograms)[:, 0]
        rows, columns = (hats(in_bins(place[..., axis]), self.bins) for axis in (0, 1))
        seen = (torch.matmul(rows, scores) * columns).sum(-1)
        return F.log_softmax(seen + self.net.prior(side)[..., 0] + log_prior, -1)


class Seen(nn.Module):
    """The original's network: from a picture to R/G and B/G of white."""

    def __init__(self, net: DeepAwb) -> None:
        """Wrap a network."""
        super().__init__()
        self.net = net

    def forward(self, picture: Tensor) -> Tensor:
        """Return ``(B, 2)`` for ``(B, 3, H, W)``."""
        white: Tensor = self.net(picture)
        return white


def port(net: nn.Module, settings: Export) -> Port:
    """Return what an exported file holds.

    Raises:
        ImgtoolError: Code 2: ``--to libcamera`` without a tuning, or of weights that it cannot be made of;
            or as ``tuning.Tuning.load``.
    """
    shape: Model = net.shape  # type: ignore[assignment]
    if settings.to == "libcamera":
        from imgtool.engines.awb import libcamera

        if not isinstance(net, Hist):
            hint = "take weights of --arch hist, such as the shipped ones"
            raise ImgtoolError(f"--to libcamera: {shape.arch} sees no zones", hint, USAGE)
        return libcamera.port(net, settings)
    if isinstance(net, Hist):
        return _hist(net, shape)
    assert isinstance(net, DeepAwb)
    return _deepawb(net, shape)


def _hist(net: Hist, shape: Model) -> Port:
    maps = (features.MAPS, _BINS, _BINS)
    return Port(
        Whole(net),
        inputs=(
            Slot(
                "histograms", ("batch", *maps), 0, FULL,
                "Histograms of log-chroma: of cells, of cells by brightness, of edges; rows along log(R/G), "
                "columns along log(B/G).",
            ),
            Slot("place", ("batch", "lights", 2), -_REACH, _REACH, "Candidate lights in aligned log-chroma."),
            Slot(
                "side", ("batch", "lights", 3), -1.3, 1.5,
                "Of each candidate: mired / 200 - 1.3, mired that of its light on the curve; log(1 + lux) / "
                "10 and 1, or 0 and 0 without lux.",
            ),
            Slot(
                "log_prior", ("batch", "lights"), -2, 0,
                "Log of how likely lights lie as far off the camera's curve as each candidate.",
            ),
        ),
        outputs=(
            Slot("log_posterior", ("batch", "lights"), LOWEST, 0, "Log probability of each candidate light."),
        ),
        axes={"batch": Axis(1), "lights": Axis(features.LIGHTS * len(features.OFFSETS), least=2)},
        before=_BEFORE,
        after=_AFTER,
        real=lambda path, sizes: _real(shape, path, sizes),
        made=_made,
        facts={"generic_curve": _points(GENERIC.locus)},
        loss=_angle(_of_posteriors),
    )  # fmt: skip


def _points(locus: Locus) -> list[list[float]]:
    """Return temperature, R/G and B/G of each point of a curve."""
    return [[float(each) for each in point] for point in zip(locus.ct, locus.r, locus.b, strict=True)]


def _pictured(shape: Model) -> str:
    """Return in words how the picture is made."""
    count = shape.height * shape.width
    mosaic = f"{_MOSAIC[:-1]}, and {CELLS} for {count}."
    return _PICTURED.format(cells=count, mosaic=mosaic, height=shape.height, width=shape.width)


def _deepawb(net: DeepAwb, shape: Model) -> Port:
    return Port(
        Seen(net),
        inputs=(
            Slot(
                "picture", ("batch", 3, shape.height, shape.width), -1.8, 2.2,
                "The frame, linear RGB under a gamma of 2.2, less 0.45, divided by 0.25.",
                picture=True,
            ),
        ),
        outputs=(Slot("white", ("batch", 2), 0, 1.2, "R/G and B/G of white in the camera's own colours."),),
        axes={"batch": Axis(1)},
        before=_pictured(shape),
        after="Keep both at 0.02 or more. Gains are 1 / (R/G) for red, 1 for green, 1 / (B/G) for blue.",
        real=lambda path, sizes: _real(shape, path, sizes),
        made=lambda kind, sizes, rng: _pictures(shape, kind, sizes, rng),
        loss=_angle(_of_whites),
    )  # fmt: skip


_CELLS = f"""\
1. Pixels: those of the linear frame as the sensor lies; of a Bayer mosaic its squares of 2x2 from the first
visible pixel on, G the mean of both greens. Subtract each channel's black and divide by white - black (from
here on the mean of the blacks). White is the lowest above 0 that the file names (rawpy: white_level,
camera_white_level_per_channel), of a PNG 2^bits - 1 for the first of 8, 10, 12, 14, 16 bits that hold its
largest value. Pixels whose R, G, B are all 0 are masked (linear PNG only).
2. edge = sqrt(H x W / {{cells}}), at least 1, for H x W pixels; stride = max(1, round(edge / 4)); side =
max(1, round(edge / stride)). {{mosaic}}
A cell is side x side samples, every stride-th pixel. Whole cells lie in the middle: covered = length - length
mod (stride x side), first sample at (length - covered) // 2 + stride // 2; a shorter length is one cell, of
min(side, length) samples. A cell is the mean of its samples that count, 0 without any; coverage is their
share. Samples count that are neither masked nor saturated.
3. A sample is saturated where its peak, the largest of its channels (and of both greens) as the file has
them, reaches black + {SATURATED:g} (white - black); where the frame's own plateau lies lower than white, it
stands for white. Of n samples, few = max(8, n // 2048) and n >= 32 few, top is the few-th largest peak, which
must lie from {DULLEST:g} to below {SATURATED:g} of the way from black to white; band = 0.005 (top - black),
of whole numbers at least 1; the crowd are the peaks of top - band or more, below are those from top - 3 band
to that. top is a plateau where 4 x below + few <= crowd <= n / 2, and of the crowd's least channels (of R, B
and the larger green) the median is at least top - 2 band, or the standard deviation above both 4 times that
of the crowd's peaks and 0.01 (top - black)."""
_MOSAIC = f"Of a mosaic pixels are its squares, and edge / {SAMPLES} stands for edge / 4."

_BEFORE = f"""\
{_CELLS.format(cells=CELLS, mosaic=_MOSAIC)}
4. Cells of a coverage of {COVERED:g} or more whose R, G and B are above 0 count; of those, only cells whose G
is above {features.DARK:g} of their mean G.
5. The camera's curve of white points gives R/G and B/G by colour temperature, linear in kelvin between its
points and beyond them (at least {LEAST:g}). It is that of a calibration (ct_curve of a libcamera tuning), or
made from the camera's colour matrix, or, where both are unknown, facts.generic_curve: [kelvin, R/G, B/G] of
each point. From a matrix: 26 lights evenly in mired from {WARMEST:g} to {COLDEST:g} K, Planckian below 4000 K
(x, y by Kang et al., 2002), CIE daylight from 5000 K on, between both x and y blended by s^2 (3 - 2 s), s =
(T - 4000) / 1000; XYZ of each (Y = 1) times the matrix from XYZ to the camera gives R/G and B/G; keep those
whose R, G, B are above 0 and both ratios above {LEAST:g}. The matrix is AnalogBalance x CameraCalibration x
ColorMatrix of a DNG, else rawpy's rgb_xyz_matrix[:3]. Of two for different lights, each ColorMatrix is
divided by the largest part of it times D50's white, and they are interpolated in mired between their lights.
6. origin = log of (R/G, B/G) at 5000 K; scale = 0.65 / max(|log at 7500 K - log at 3000 K|, 0.1), for each of
both. The aligned log-chroma of R/G, B/G is (log - origin) * scale.
7. Divide R and B of every cell by R/G and B/G at 5000 K. light = R + G + B; mean = mean of light / 3 over the
cells that count. Colours: R, G, B at least {features.FLAT:g} * mean, then log(R) - log(G) and log(B) -
log(G), times scale. weight = coverage; bright = coverage * min(light / (3 * mean), {features.BRIGHTEST:g}).
8. Edges: absolute differences of neighbours, down and across; colours as those of cells; weight = the smaller
of both coverages (0 where one does not count) * min((R + G + B) / mean, {features.BRIGHTEST:g}).
9. histograms[0] counts the cells by weight, [1] by bright, [2] the edges. at = (colour + {_REACH:g}) *
{_BINS - 1} / {2 * _REACH:g}, kept in 0..{_BINS - 1.001:g}; each point is shared linearly by the four bins
around it (row from log(R/G)). Each histogram h becomes sqrt(50 * h / (sum(h) + 1e-6)).
10. Lights: {features.LIGHTS} evenly spaced in mired from 1e6/{1e6 / features.COOLEST:.0f} to
1e6/{1e6 / features.WARMEST:.0f}. Of each: the curve's white there (kept within a calibrated curve) in aligned
log-chroma; the curve's direction there, between the neighbouring lights, at both ends the one-sided
difference; at right angles to it (-second, first), of unit length in aligned log-chroma,
{len(features.OFFSETS)} places at offsets of -2, -1.5, ..., 2 times s: s is {features.SPREAD["tuning"]:g} for
a calibrated curve, {features.SPREAD["matrix"]:g} for one from a colour matrix, {features.SPREAD["generic"]:g}
for the generic one. mired in side is that of the light on the curve, the same for its places. log_prior =
-0.5 * offset^2."""

_AFTER = f"""\
p = exp(log_posterior), divided by its sum. A light has R/G, B/G = exp(place / scale + origin). White is exp
of the mean of log(R/G), log(B/G) weighted by p. Gains are 1 / (R/G) for red, 1 for green, 1 / (B/G) for blue.
Confidence is the sum of p over lights within {estimate.NEAR:g} degrees of white, as vectors (R/G, 1, B/G).
imgtool itself takes shades-of-grey instead below a confidence of {SURE:g} and for rendered photos, and where
the curve is the generic one the geometric mean of both whites; --fallback none leaves the answer as it is."""

_PICTURED = f"""\
{_CELLS}
4. Cells of a coverage of less than {COVERED:g} are 0. Divide by 4 times the mean of all channels of the
others, keep in 0..1, raise to 1 / 2.2, interpolate linearly between centres to {{height}}x{{width}} (borders
are repeated), subtract 0.45, divide by 0.25."""


# --- inputs ------------------------------------------------------------------------------------------


def frame(path: Path) -> AwbStats:
    """Read any file as a frame of the generic camera, to which its own white of 5000 K is that one's."""
    stats = reading.read(path, path.name, Sources())
    own, generic = (camera.locus.at(reading.RENDERED_AT) for camera in (stats.camera, GENERIC))
    cells = stats.cells * np.insert(generic / own, 1, 1).astype(np.float32)
    return stats.changed(cells=cells, camera=GENERIC)


def shifted(stats: AwbStats, number: int) -> AwbStats:
    """Return another view of a frame: moved by some cells, under another light."""
    light = np.array([1.1**number, 1, 0.9**number], np.float32)
    cells = np.roll(stats.cells * light, (2 * number, 3 * number), (0, 1))
    return stats.changed(cells=cells, coverage=np.roll(stats.coverage, (2 * number, 3 * number), (0, 1)))


def _real(shape: Model, path: Path, sizes: Mapping[str, int]) -> Arrays:
    stats = frame(path)
    views = [estimate.inputs(shape, shifted(stats, number)) for number in range(sizes["batch"])]
    stacked = tuple(np.stack(parts) for parts in zip(*views, strict=True))
    if shape.arch == "deepawb":
        return stacked
    chosen = np.arange(sizes["lights"]) % stacked[1].shape[1]
    return stacked[0], *(each[:, chosen] for each in stacked[1:])


def _made(kind: str, sizes: Mapping[str, int], rng: np.random.Generator) -> Arrays:
    """Make histograms and lights: of noise, all alike, or with everything in one bin and at the borders."""
    count, lights, bins = sizes["batch"], sizes["lights"], features.BINS
    counted = rng.random((count, features.MAPS, bins, bins)) ** 4
    if kind == "flat":
        counted[:] = 1
    if kind == "extreme":
        single = np.array(SINGLE_BINS)
        counted[:] = 0
        counted[:, np.arange(3), single, single[::-1]] = 1
    histograms = np.sqrt(50 * counted / counted.sum((2, 3), keepdims=True))
    place = rng.uniform(-1, 1, (count, lights, 2)) * (2 if kind == "extreme" else 1.2)
    side = np.stack([rng.uniform(-0.8, 0.8, (count, lights)), *_lux(kind, count, lights)], -1)
    prior = np.broadcast_to(DEFAULT_PRIOR[np.arange(lights) % len(DEFAULT_PRIOR)], (count, lights))
    return tuple(np.ascontiguousarray(each, np.float32) for each in (histograms, place, side, prior))


def _lux(kind: str, count: int, lights: int) -> Arrays:
    lux = {"noise": 300.0, "flat": 0.0, "extreme": 1e5}[kind]
    shown = np.full((count, lights), np.log1p(lux) / 10)
    return shown, np.full((count, lights), float(kind != "flat"))


def _pictures(shape: Model, kind: str, sizes: Mapping[str, int], rng: np.random.Generator) -> Arrays:
    seen = rng.random((sizes["batch"], 3, shape.height, shape.width))
    if kind == "flat":
        seen[:] = 0.4
    if kind == "extreme":
        seen = np.round(seen)
    return (((seen - 0.45) / 0.25).astype(np.float32),)


# --- what 8 bits cost --------------------------------------------------------------------------------


def _angle(of: Callable[[Sequence[Array], Sequence[Array]], float]) -> Loss:
    return Loss("angle between the gains", "degrees", of, MOST_DEGREES, False, WORST_DEGREES)


def _of_posteriors(right: Sequence[Array], got: Sequence[Array]) -> float:
    """Return the largest angle between the gains that two posteriors of the generic camera tell."""
    whites = features.candidates(GENERIC).white
    logs = np.log(whites[np.arange(right[0].shape[1]) % len(whites)].astype(np.float64))

    def white(posterior: Array) -> Array:
        share = np.exp(np.minimum(posterior, 0))
        found: Array = np.exp(share @ logs / np.maximum(share.sum(1, keepdims=True), 1e-30))
        return found

    return _apart(white(right[0]), white(got[0]))


def _of_whites(right: Sequence[Array], got: Sequence[Array]) -> float:
    return _apart(*(np.maximum(each[0], 0.02) for each in (right, got)))


def _apart(one: Array, two: Array) -> float:
    """Return the largest angle in degrees between the gains of white points ``(B, 2)``."""
    a, b = (np.stack([1 / each[:, 0], np.ones(len(each)), 1 / each[:, 1]], 1) for each in (one, two))
    return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b), axis=1), (a * b).sum(1))).max())
