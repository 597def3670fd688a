"""From statistics to white: the network's part, by any runtime; torch only where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


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
        run: From ``inputs`` to its answer, float32: the log probability ``(K,)`` of every candidate light, or
            of ``deepawb`` R/G and B/G ``(2,)``.
        parameters: How many numbers it has learnt; 0 where a file does not tell.
    """

    shape: Model
    run: Callable[..., Array]
    parameters: int = 0


def of_state(shape: Model, state: Mapping[str, Array]) -> Net:
    """Return a network that NumPy runs, of its parameters by name, float32."""
    learnt = (values.size for name, values in state.items() if not name.endswith(_STATISTICS))
    if shape.arch == "hist":
        return Net(shape, partial(forward.hist, state, dilations=DILATIONS), sum(learnt))
    strides = tuple(int(word) for word in shape.strides.split(","))
    run = partial(forward.deepawb, state, strides=strides, layers=shape.layers)
    return Net(shape, run, sum(learnt))


def of_module(module: Any, shape: Model) -> Net:
    """Return a network that torch runs, on whichever device the module is."""
    import torch

    first = next(module.parameters())
    answer = module.log_posterior if shape.arch == "hist" else module

    def run(*given: Array) -> Array:
        with torch.inference_mode():
            out = answer(*(torch.from_numpy(each)[None].to(first.device) for each in given))[0]
        plain: Array = out.float().cpu().numpy()
        return plain

    return Net(shape, run, sum(each.numel() for each in module.parameters()))


def inputs(shape: Model, stats: AwbStats) -> tuple[Array, ...]:
    """Return what a network takes of a frame.

    Returns:
        Of ``hist``: histograms ``(3, BINS, BINS)``, and of the K candidate lights their places ``(K, 2)``,
        what the learned prior sees ``(K, 3)``, and the prior ``(K,)``. Of ``deepawb`` the picture
        ``(3, H, W)``.

    Raises:
        ImgtoolError: No cell of the frame counts.
    """
    seen = features.points(stats, features.Space.of(stats.camera))
    if not len(seen.weight):
        raise ImgtoolError(
            f"{stats.name or 'the frame'} has nothing to measure: every pixel is black, saturated or masked",
            "give a frame with other exposure, or check --black, --white and --mask",
        )
    if shape.arch == "deepawb":
        return (features.picture(stats, shape.height, shape.width),)
    lights = features.candidates(stats.camera)
    return features.histograms(seen), lights.place, features.side(lights, stats.lux), lights.prior


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
    answer = net.run(*inputs(net.shape, stats))
    if net.shape.arch == "deepawb":
        r, b = answer
        return White(max(float(r), 0.02), max(float(b), 0.02), float("nan"))
    whites = features.candidates(stats.camera).white
    posterior = np.exp(answer)
    posterior /= posterior.sum()
    r, b = np.exp(posterior @ np.log(whites))
    near = _apart(whites, float(r), float(b)) <= NEAR
    return White(float(r), float(b), float(posterior[near].sum()))


def _apart(whites: Array, r: float, b: float) -> Array:
    """Return the angles in degrees between white points ``(K, 2)`` and one."""
    cosine = (whites[:, 0] * r + 1 + whites[:, 1] * b) / np.sqrt(
        (np.square(whites).sum(1) + 1) * (r * r + 1 + b * b)
    )
    angles: Array = np.degrees(np.arccos(np.minimum(cosine, 1)))
    return angles
