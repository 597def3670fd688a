"""What a file that runs elsewhere holds of a lens network: edges or a picture in, what they say out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from imgtool import images
from imgtool.engine import Axis, Loss, Port, Slot
from imgtool.engines.lens import data, lines, network, plumb, posterior, prior
from imgtool.errors import ImgtoolError

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


def ported(loaded: Loaded, settings: Infer) -> plumb.Exported | network.Exported:
    """Return an exported file as what ``apply`` takes.

    Args:
        loaded: The file.
        settings: Of ``infer``; nothing of them matters here.

    Raises:
        ImgtoolError: The file does not say what it holds.
    """
    facts = loaded.about.get("facts")
    arch = facts.get("arch") if isinstance(facts, Mapping) else None
    if arch == "lines" and len(loaded.inputs) == 4:
        return plumb.Exported(loaded, loaded.inputs[0].shape[1], loaded.inputs[3].shape[1])
    edge = loaded.inputs[0].shape[-1]
    if arch == "efficientnet-b0" and edge:
        return network.Exported(loaded, edge)
    raise ImgtoolError(f"{loaded.path} does not say how it is run", "export the network again")


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
                "Of each edge: its pixels, their rms distance from its cubic in pixels, the contrast "
                "across it as a share of the range of grey, the share of its length that is gaps; 0 where "
                "there is none.",
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
            f"Shrink or enlarge the photo, its aspect kept, until its longer side has {edge} pixels "
            f"(averaging areas where it shrinks), and put it in the middle of a square of {edge} x {edge} "
            f"whose rest is grey, {data.PADDING}. Divide by 255."
        ),
        after=(
            f"The coefficients never fold a photo. {_MODEL}. {_WARP} imgtool leaves a photo alone where, "
            "over 1,024 normal draws about the coefficients, the displacement field of the estimate does "
            "not take away a fifth of the expected error, or too often makes it worse."
        ),
        real=lambda path, sizes: _picture(path, sizes, edge),
        made=lambda kind, sizes, rng: _made_picture(kind, sizes, rng, edge),
        facts={"arch": "efficientnet-b0"},
        loss=Loss("corner", "% of the diagonal", _corner, 0.1, higher_is_better=False),
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
    shape = (sizes["batch"], 3, edge, edge)
    if kind == "noise":
        image = rng.random(shape, np.float32)
    elif kind == "flat":
        image = np.broadcast_to(rng.random((len(rng.random(shape[0])), 1, 1, 1)), shape)
    else:
        image = rng.integers(0, 2, shape)
    frame = np.tile([1.0, 0.75], (sizes["batch"], 1))
    return np.ascontiguousarray(image, np.float32), frame.astype(np.float32)


# --- words -----------------------------------------------------------------------------------------

_TRACED = (
    f"Shrink the photo by averaging until its longer side has at most {lines.LONGEST_SIDE} pixels; 8-bit "
    "grey. Blur it (Gaussian, sigma 1) and trace edges by EdgeDrawing (OpenCV's ximgproc: gradient "
    f"threshold 14, anchor threshold 0) of at least max({lines.FRAGMENT} diagonals, 12 pixels). Place every "
    "edge pixel along its gradient (Sobel / 8) at the peak of the parabola through the gradient's size one "
    "pixel before, at and behind it, at most 0.75 pixels away. Cut where the direction over 7 pixels "
    "(places averaged over 5) turns by more than 24 degrees within 7. Fit each piece's offset from its "
    "chord by a cubic, again without pixels farther off than max(2.5 rms, 0.2 pixels); where rms exceeds "
    f"{lines.ROUGHEST} pixels or the sagitta {lines.MOST_BENT} of the length, cut at the farthest pixel, at "
    "most five times over. Leave out what stays within 0.012 diagonals of one side of the frame. Join "
    "pieces that go on one another (gap at most 0.6 of both lengths and 2.5 of the shorter, sideways at "
    "most 2 pixels + 0.12 of the gap) where one cubic fits both: rms at most 1.15 of theirs + 0.05. Keep "
    f"those of at least {lines.SHORTEST} diagonals, the {lines.MOST} longest. Points are {lines.POINTS} of "
    "the cubic, evenly along the chord, both ends included, normalised as the model below; facts are of "
    "all pixels. Where the file's number of edges is fixed, fill up with 0 or leave out the shortest. "
    "Candidates are any k1, k2, p1, p2; as many as are wanted, in runs of the file's number."
)
_JUDGED = (
    f"Bayes' rule: posterior ~ exp(log_likelihood) x prior. Prior: with probability {posterior.STRAIGHT:g} "
    "all are 0; else k1 is 0.003 + a Student t of 2.2 degrees (scale 0.0375 below, 0.0285 above) and k2 is "
    "0.001 - 0.43 k1 + t of 2.4 degrees (0.0125, 0.0115) with weight 0.85, and -0.30 + t of 8 degrees "
    "(0.085) and -0.045 - 0.44 k1 + t of 5 degrees (0.025) with weight 0.15; p1 and p2 are normal, "
    f"standard deviation {posterior.DECENTRED:g}; nothing that folds. Draw candidates from it, weigh them "
    f"by exp(log_likelihood) and draw again around the heavy ones (importance sampling, {posterior.FIRST} "
    f"and then {posterior.ROUND} at a time) until the weights rest on enough of them. The estimate is the "
    "point of least expected displacement, the weighted geometric median over the picture's displacement "
    f"fields without their similarity; the weighted mean comes close. {_MODEL}. {_WARP} Leave the photo "
    "alone where the estimate does not take away a fifth of the expected displacement, or with more than 3 "
    "% probability makes it worse."
)
