"""What a file that runs elsewhere holds of a lens network: edges or a picture in, what they say out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from imgtool import images, loading, pictures
from imgtool.engines.lens import data, estimate, lines, network, plumb, posterior, prior
from imgtool.engines.lens.settings import RISK
from imgtool.errors import ImgtoolError
from imgtool.port import Axis, Loss, Port, Slot

if TYPE_CHECKING:
    from imgtool.engines.lens.settings import Export, Infer
    from imgtool.runtime import Loaded

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_HALF = 640.0  # half of the diagonal of 1024x768 pixels, of made edges
_JITTER, _ROUGH = 0.1, 0.7  # standard deviation in pixels of made edges about a line

_MODEL = (
    "x_d = x (1 + k1 r^2 + k2 r^4) + 2 p1 x y + p2 (r^2 + 2 x^2), y_d = y (1 + k1 r^2 + k2 r^4) + p1 (r^2 "
    "+ 2 y^2) + 2 p2 x y, r^2 = x^2 + y^2: (x, y) is a place in the straight picture, (x_d, y_d) where the "
    "photo shows it. Normalised by half of the diagonal: for pixel (column, row) of a photo of W x H, x = "
    "(column - (W - 1) / 2) / (sqrt(W^2 + H^2) / 2), and y so by row and H"
)
_WARP = "The picture is straightened outside: every pixel of the straight one is sampled in the photo, there."
_NARROW = "places on edges need float32: one part in 2,048 is a third of a pixel, and bends are tenths of one"


class Judged(nn.Module):
    """A ``LinesNet`` with all that makes log-likelihoods of edges and candidates."""

    line: Tensor

    def __init__(self, net: plumb.LinesNet) -> None:
        """Wrap a network."""
        super().__init__()
        self.net = net
        self.register_buffer("line", torch.linspace(-0.5, 0.5, lines.POINTS)[:, None].expand(-1, 2).clone())

    def forward(self, points: Tensor, facts: Tensor, half_diagonal: Tensor, candidates: Tensor) -> Tensor:
        """Return ``(B, K)`` log-likelihoods of ``(B, K, 4)`` candidates by the edges of B photos."""
        # Edges without length would be divided by it; converters drop what is added against that.
        real = (facts[..., 0] > 0)[..., None, None]
        given = plumb.Evidence(torch.where(real, points, self.line), facts, half_diagonal)
        return plumb.log_likelihood(self.net(given), plumb.bends(given, candidates))


class Told(nn.Module):
    """An ``ImageEstimator`` that returns plain tensors."""

    def __init__(self, net: network.ImageEstimator) -> None:
        """Wrap a network."""
        super().__init__()
        self.net = net

    def forward(self, image: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``network.Guess`` holds."""
        guess: network.Guess = self.net(image, frame)
        return guess.coefficients, guess.log_spread


def port(net: nn.Module, settings: Export) -> Port:
    """Return what an exported file holds.

    Args:
        net: A network of this engine.
        settings: Of ``export``; nothing of them matters here.
    """
    if isinstance(net, plumb.LinesNet):
        return _of_lines(net)
    assert isinstance(net, network.ImageEstimator)
    return _of_pictures(net)


class Facts(loading.Facts):
    """What is read of a file's facts."""

    arch: Literal["lines", "efficientnet-b0"]


def ported(loaded: Loaded, settings: Infer) -> plumb.Exported | network.Exported:
    """Return an exported file as what ``apply`` takes.

    Args:
        loaded: The file.
        settings: Of ``infer``; nothing of them matters here.

    Raises:
        ImgtoolError: The file does not say what it holds, or holds something else.
    """
    if loading.facts(loaded.path, loaded.about, Facts).arch == "lines":
        run = loading.checked(loaded, _EDGES, [(1, "candidates")])
        return plumb.Exported(run, loaded.inputs[0].shape[1], loaded.inputs[3].shape[1])
    run = loading.checked(loaded, [(1, 3, "edge", "edge"), (1, 2)], [(1, 4), (1, 4)])
    size = pictures.fixed_size(loaded)
    if size is None or size[0] != size[1] or not size[0]:
        raise ImgtoolError(f"{loaded.path} takes no squares of one size", loading.AGAIN)
    return network.Exported(run, size[0])


_EDGES: Sequence[loading.Shape] = (
    (1, "edges", lines.POINTS, 2), (1, "edges", 4), (1,), (1, "candidates", 4)
)  # fmt: skip


# --- edges -----------------------------------------------------------------------------------------


def _of_lines(net: plumb.LinesNet) -> Port:
    return Port(
        module=Judged(net).eval(),
        inputs=(
            Slot(
                "points", (1, "edges", lines.POINTS, 2), -1.0, 1.0,
                f"{lines.POINTS} points evenly along each edge, (x, y), normalised by half of the diagonal; "
                "0 where there is no edge.",
            ),
            Slot(
                "facts", (1, "edges", 4), 0.0, 1000.0,
                "Of each edge: its pixels, their rms distance from its cubic in pixels, the gradient across "
                "it as a share of the range of grey, the share of its length that is gaps; 0 where there is "
                "none.",
            ),
            Slot("half_diagonal", (1,), 0.0, 1000.0, "Half of the diagonal, in pixels, of what was traced."),
            Slot("candidates", (1, "candidates", 4), -0.5, 0.5, "k1, k2, p1, p2 to be judged."),
        ),
        outputs=(
            Slot(
                "log_likelihood", (1, "candidates"), -200.0, 200.0,
                "Natural logarithm of how likely the edges are for each candidate, up to a constant of the "
                "photo.",
            ),
        ),
        axes={"edges": Axis(lines.MOST, least=2), "candidates": Axis(plumb.PIECE, least=2)},
        before=_TRACED,
        after=_JUDGED,
        real=_edges,
        made=_made_edges,
        facts={"arch": "lines"},
        refuse={"fp16": _NARROW, "int8": _NARROW},
    )  # fmt: skip


def _edges(path: Path, sizes: Mapping[str, int]) -> tuple[Floats, ...]:
    """Return the longest edges of a photo, filled up where there are fewer, and lenses drawn at random."""
    found = plumb.filled(plumb.evidence(lines.find(images.read(path).pixels)), sizes["edges"])
    return *(part.numpy() for part in found), _lenses(sizes["candidates"], np.random.default_rng(0))


def _lenses(count: int, rng: Any) -> Floats:
    return prior.draws(rng, "mixed", posterior.DECENTRED, count)[None].astype(np.float32)


def _made_edges(kind: str, sizes: Mapping[str, int], rng: Any) -> tuple[Floats, ...]:
    """Make straight edges with a little noise, or as rough as edges may be; or none at all."""
    count = sizes["edges"]
    ends = rng.uniform(-0.7, 0.7, (count, 2, 2))
    jitter = _ROUGH if kind == "extreme" else _JITTER
    along = np.linspace(0, 1, lines.POINTS)[:, None]
    points = ends[:, :1] + along * (ends[:, 1:] - ends[:, :1])
    points += rng.normal(0, jitter / _HALF, points.shape)
    length = _HALF * np.hypot(*(ends[:, 1] - ends[:, 0]).T)
    facts = np.stack([length, np.full(count, jitter), rng.uniform(0.05, 0.3, count), np.zeros(count)], 1)
    if kind == "flat":
        points, facts = 0 * points, 0 * facts
    given = (points[None], facts[None], np.array([_HALF]), _lenses(sizes["candidates"], rng))
    return tuple(part.astype(np.float32) for part in given)


# --- pictures --------------------------------------------------------------------------------------


def _of_pictures(net: network.ImageEstimator) -> Port:
    edge = net.input
    return Port(
        module=Told(net).eval(),
        inputs=(
            Slot("image", ("batch", 3, edge, edge), 0.0, 1.0, "The photo: sRGB.", picture=True),
            Slot("frame", ("batch", 2), 0.0, 1.0, "Width and height of the photo over the longer of both."),
        ),
        outputs=(
            Slot("coefficients", ("batch", 4), -0.3, 0.3, "k1, k2, p1, p2."),
            Slot(
                "log_spread", ("batch", 4), -10.0, 0.0,
                "Natural logarithms of standard deviations: of k1 + k2; of the displacement at half radius, "
                f"k1 / 4 + k2 / 16, beyond {network.SHARE:g} (k1 + k2); of p1; of p2.",
            ),
        ),
        axes={"batch": Axis(1)},
        before=(
            f"Shrink or enlarge the photo, its aspect kept, until its longer side has {edge} pixels, sizes "
            "rounded (averaging areas where it shrinks, else linear), and put it in the middle of a square "
            f"of {edge} x {edge} whose rest is grey, {data.PADDING}. Divide by 255."
        ),
        after=_DRAWN,
        real=lambda path, sizes: _picture(path, sizes, edge),
        made=lambda kind, sizes, rng: _made_picture(kind, sizes, rng, edge),
        facts={"arch": "efficientnet-b0"},
        loss=Loss("corner", "% of the diagonal", _corner, 0.1, higher_is_better=False, worst=0.3),
    )  # fmt: skip


def _corner(right: Sequence[Array], got: Sequence[Array]) -> float:
    """Return how far apart two answers put the corner of a photo, on average, in % of its diagonal."""
    return float(50 * np.abs((right[0] - got[0])[:, :2].sum(1)).mean())


def _picture(path: Path, sizes: Mapping[str, int], edge: int) -> tuple[Floats, ...]:
    """Return a photo and, for others of a batch, the same with a row and a column less each."""
    pixels = images.read(path).pixels
    given = [network.seen(pixels[number:, number:], edge) for number in range(sizes["batch"])]
    image, frame = (np.concatenate(parts) for parts in zip(*given, strict=True))
    return image, frame


def _made_picture(kind: str, sizes: Mapping[str, int], rng: Any, edge: int) -> tuple[Floats, ...]:
    (image,) = pictures.made(kind, {**sizes, "height": edge, "width": edge}, rng)
    frame = np.tile([1.0, 0.75], (sizes["batch"], 1))
    return image, frame.astype(np.float32)


# --- words -----------------------------------------------------------------------------------------

_ENDS = 2 * lines.TURN_SPAN
_TRACED = f"""\
1. Shrink the photo by averaging areas (OpenCV's INTER_AREA) until its longer side has at most
{lines.LONGEST_SIDE} pixels, sizes rounded; 8-bit grey by BT.601 (OpenCV's COLOR_RGB2GRAY). D is the diagonal
in its pixels; half_diagonal is D / 2; least = max({lines.FRAGMENT} D, 12) pixels.
2. Trace edges in the 8-bit grey blurred (Gaussian, sigma 1) by EdgeDrawing (OpenCV's ximgproc): gradient
threshold 14, anchor threshold 0, its own blur off (Sigma 0), MinPathLength the whole part of least, all else
its defaults. Keep those of at least least pixels and of {_ENDS} or more.
3. Take gradients (Sobel / 8) from the grey blurred likewise in floating point. Every edge pixel moves along
its gradient to the peak of the parabola through the gradient's size one pixel before, at and behind it
(linear between pixels), at most 0.75 pixels away; where the parabola has no peak, the pixel stays.
4. Average places over 5 (the ends repeated). Cut at every pixel where the direction from {lines.TURN_SPAN}
pixels before to it and that from it to {lines.TURN_SPAN} behind differ by more than
{math.degrees(lines.SHARPEST_TURN):g} degrees; keep runs of at least least pixels.
5. Fit a run: the chord has the direction from the mean of its first tenth of pixels to that of its last tenth
(the whole part, at least 1); a cubic over the place along the chord follows the offset across it, again
without pixels farther off than max(2.5 rms, 0.2 pixels). Drop a run where fewer than 8 pixels stay, or that
turns back on itself: its extent along the chord is below 0.76 of its path, through every (n // 16)-th of its
n pixels. Points are {lines.POINTS} of the cubic, evenly along the chord, both ends included. rms is that of
all pixels from the cubic; the length is that from the first point to the last; the sagitta is the points'
largest distance from the line between those.
6. Where rms exceeds {lines.ROUGHEST} pixels or the sagitta {lines.MOST_BENT} of the length, cut: if rms is
too large at the pixel farthest from the cubic among the middle two thirds, else in the middle. Fit both parts
again, at most five times over and only runs of 2 least pixels or more; drop what then does not fit, and
pieces shorter than least.
7. Leave out a piece all of whose points are nearer than 0.012 D to one side of the frame.
8. Join pieces, beginning with the longest: of those that may go on it at either end the nearest 4 are tried
until one fits, and so on until none fits. One may go on it where the gap between the ends is below 0.6 of the
sum of both lengths and 2.5 of the shorter, it begins at most 2 pixels behind the end (along the line through
the last two points), sideways less than 2 pixels + 0.12 of the way ahead, and more than 0.97 of its length
runs the same way. It fits where one cubic over all pixels, in their order along the first one's chord, has an
rms of at most 1.15 of both own ones' (the root of the mean of their squares by pixels) + 0.05, and of
{lines.ROUGHEST} pixels, and a sagitta of at most {lines.MOST_BENT} of the length.
9. Keep pieces of at least {lines.SHORTEST} D, the {lines.MOST} longest. points are normalised as the model
below. facts: the number of pixels; rms; the gradient's size at the edge pixels as traced / 255, of a piece
the median, after joining the mean by pixels; the sum of the gaps over the length, at most 1.
10. Where the file's number of edges is fixed, fill up with 0 or leave out the shortest. Candidates are any
k1, k2, p1, p2; as many as are wanted, in runs of the file's number."""


def _student(part: prior.Student) -> str:
    return f"t({part.freedom:g}; {part.below:g}, {part.above:g})"


def _kind(share: float, part: prior.Lenses) -> str:
    limits = [f"{low:g}..{high:g}" for low, high in zip(part.lowest, part.highest, strict=True)]
    return (
        f"with weight {share:g} k1 = {part.k1.mode:g} + {_student(part.k1)},\nk2 = "
        f"{part.offset + part.rest.mode:g} - {-part.slope:g} k1 + {_student(part.rest)} (drawn within "
        f"{limits[0]} and {limits[1]})"
    )


_KINDS = ";\n".join(_kind(*part) for part in prior.PARTS["mixed"])
_DECIDED = f"""\
Displacements are those of the model at 24 x 16 places over the middle 96 % of the frame, without the
similarity (the complex multiple of x + i y plus a constant) that is nearest by least squares; they are linear
in the coefficients. An error is the mean length of the difference of two, in % of the diagonal. The estimate
is the point of least expected error (the weighted geometric median by Weiszfeld's steps from the mean), or
the largest share of it that does not fold. Leave the photo alone where the error of doing nothing would be
below {estimate.SMALLEST:g} % if the estimate were true; where the estimate does not take away at least
{100 * estimate.LEAST:g} % of the expected error of doing nothing; or where it makes the photo worse by more
than {posterior.HARM:g} % of the diagonal with a probability above {100 * RISK:g} %,
{100 * RISK * estimate.BOLDER:g} % where it takes away at least {100 * estimate.SURE:g} % of the expected
error."""

_JUDGED = f"""\
1. Bayes' rule: posterior ~ exp(log_likelihood) x prior. t(f; a, b) is Student's t of f degrees of freedom,
times a below 0 and times b above; a side is drawn with probability a / (a + b) or b / (a + b), so that the
density is continuous. Prior: with probability {posterior.STRAIGHT:g} all are 0; else
{_KINDS};
p1 and p2 are normal, standard deviation {posterior.DECENTRED:g}. Nothing folds: the density is 0 where
1 + 3 k1 r^2 + 5 k2 r^4 is below 0.1 anywhere in r <= 1.
2. Sample by importance: {posterior.FIRST} draws from the prior without the photos that are not distorted;
then, {posterior.ROUND} at a time, draws from 40 equal normal kernels about samples
redrawn by their weights exp(s log_likelihood) x prior / mixture, their covariance 0.36 of the weighted
samples' + (1e-4, 1e-4, 3e-5, 3e-5)^2. The mixture is that of the prior and all kernels so far, by numbers of
draws; s is the largest power up to 1 that leaves {posterior.EFFECTIVE:g} effective samples (1 / the sum of
squared shares). Stop after {posterior.AT_FULL} rounds at s = 1, or {posterior.ROUNDS}. In the end s is 1, the
mean of the weights times {1 - posterior.STRAIGHT:g} stands for distorted photos, and exp(log_likelihood of 0)
times {posterior.STRAIGHT:g} for the others.
3. {_DECIDED} Without edges nothing is known.
4. {_MODEL}. {_WARP}"""

_DRAWN = f"""\
1. The coefficients never fold a photo. Draw 1,024 times about them, normally: the first standard deviation,
c, moves k1 by {(16 * network.SHARE - 1) / 3:g} c and k2 by {1 - (16 * network.SHARE - 1) / 3:g} c, the
second, h, k1 by 16/3 h and k2 by -16/3 h; the others move p1 and p2.
2. {_DECIDED} Expected is the mean over the draws.
3. {_MODEL}. {_WARP}"""
