"""From statistics to white: the network's part, by any runtime; torch only where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imgtool.engines.awb import features, forward
from imgtool.engines.awb.settings import Model
from imgtool.engines.awb.stats import AwbStats
from imgtool.errors import ImgtoolError

if TYPE_CHECKING:
    from torch import nn

Array = npt.NDArray[Any]

DILATIONS = (1, 2, 4, 1)
"""Of the convolutions of ``hist``."""
NEAR = 3.0
"""Degrees within which an estimate is called right: confidence is the probability of that."""


class White(NamedTuple):
    """An estimate: R/G and B/G of white, and how likely it is right, NaN where the network cannot tell."""

    r: float
    b: float
    confidence: float


@dataclass(frozen=True, eq=False)
class Net:
    """A network ready to be run.

    Attributes:
        shape: Its settings.
        state: Its parameters by name, float32.
        core: Its part that runtimes run: ``(C, H, W)`` float32 to what the network makes of it.
    """

    shape: Model
    state: Mapping[str, Array]
    core: Callable[[Array], Array]


def of_state(shape: Model, state: Mapping[str, Array]) -> Net:
    """Return a network that NumPy runs."""
    if shape.arch == "hist":
        return Net(shape, state, partial(forward.hist, state, dilations=DILATIONS))
    strides = tuple(int(word) for word in shape.strides.split(","))
    return Net(shape, state, partial(forward.deepawb, state, strides=strides, layers=shape.layers))


def of_module(module: nn.Module, shape: Model) -> Net:
    """Return a network that torch runs, on whichever device the module is."""
    import torch

    first = next(module.parameters())

    def core(x: Array) -> Array:
        with torch.inference_mode():
            out = module(torch.from_numpy(x)[None].to(first.device))[0]
        plain: Array = (out[0] if out.ndim == 3 else out).float().cpu().numpy()
        return plain

    return Net(
        shape, {name: value.float().cpu().numpy() for name, value in module.state_dict().items()}, core
    )


def of_file(shape: Model, state: Mapping[str, Array], path: Path, kind: str) -> Net:
    """Return a network that onnxruntime or LiteRT runs from an exported file."""
    from imgtool import runtime

    run = runtime.load(path, kind)

    def core(x: Array) -> Array:
        out = run(np.ascontiguousarray(x[None]))[0]
        plain: Array = out[0] if out.ndim == 3 else out
        return plain

    return Net(shape, state, core)


def white(net: Net | nn.Module, stats: AwbStats) -> White:
    """Estimate the white of a frame.

    Args:
        net: The network; a module of torch is run by torch.
        stats: The frame; of a camera whose curve of white points is known, best.

    Raises:
        ImgtoolError: No cell of the frame counts.
    """
    if not isinstance(net, Net):
        net = of_module(net, net.shape)  # type: ignore[arg-type]
    space = features.Space.of(stats.camera)
    seen = features.points(stats, space)
    if not len(seen.weight):
        raise ImgtoolError(
            f"{stats.name or 'the frame'} has nothing to measure: every pixel is black, saturated or masked",
            "give a frame with other exposure, or check --black, --white and --mask",
        )
    if net.shape.arch == "deepawb":
        r, b = net.core(features.picture(stats, net.shape.height, net.shape.width))
        return White(max(float(r), 0.02), max(float(b), 0.02), float("nan"))
    lights = features.candidates(stats.camera)
    scores = net.core(features.histograms(seen))
    logits = _sampled(scores, lights.place) + lights.prior
    logits += forward.prior(net.state, features.side(lights, stats.lux))
    posterior = np.exp(logits - logits.max())
    posterior /= posterior.sum()
    r, b = np.exp(posterior @ np.log(lights.white))
    near = _apart(lights.white, float(r), float(b)) <= NEAR
    return White(float(r), float(b), float(posterior[near].sum()))


def _sampled(scores: Array, place: Array) -> Array:
    """Return a score map's values at places, bilinearly; beyond its border the border's."""
    at = np.clip((place / features.REACH + 1) * ((features.BINS - 1) / 2), 0, features.BINS - 1)
    low = np.minimum(at.astype(np.int64), features.BINS - 2)
    far = (at - low).astype(np.float32)
    (i, j), (u, v) = low.T, far.T
    above = scores[i, j] * (1 - v) + scores[i, j + 1] * v
    below = scores[i + 1, j] * (1 - v) + scores[i + 1, j + 1] * v
    sampled: Array = above * (1 - u) + below * u
    return sampled


def _apart(whites: Array, r: float, b: float) -> Array:
    """Return the angles in degrees between white points ``(K, 2)`` and one."""
    cosine = (whites[:, 0] * r + 1 + whites[:, 1] * b) / np.sqrt(
        (np.square(whites).sum(1) + 1) * (r * r + 1 + b * b)
    )
    angles: Array = np.degrees(np.arccos(np.minimum(cosine, 1)))
    return angles
