"""From statistics to white: the network's part, by any runtime; torch only where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
KERNELS = (5, 3, 3, 3)
"""Likewise."""
NEAR = 3.0
"""Degrees within which an estimate is called right: confidence is the probability of that."""

BLOCKS = 3
"""Of convolutions in ``deepawb``."""
MOST = 1 << 12
"""What numbers of a network's shape lie below."""

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


def of_state(shape: Model, state: Mapping[str, Array], name: str = "the weights file") -> Net:
    """Return a network that NumPy runs.

    Args:
        shape: Its settings.
        state: Its parameters by name, float32.
        name: What messages call where they are from.

    Raises:
        ImgtoolError: Parameters are missing, or have other shapes than those of such a network.
    """
    for key, wanted in _parameters(shape, state, name):
        found = np.shape(state[key]) if key in state else None
        if found is None or not _fits(found, wanted):
            told = "no" if found is None else "another"
            what = f"{name} is damaged: {told} {key}, or of another network"
            raise ImgtoolError(what, "take another copy of it")
    learnt = (values.size for key, values in state.items() if not key.endswith(_STATISTICS))
    if shape.arch == "hist":
        return Net(shape, partial(forward.hist, state, dilations=DILATIONS), sum(learnt))
    run = partial(forward.deepawb, state, strides=_numbers(shape.strides, name), layers=shape.layers)
    return Net(shape, run, sum(learnt))


def _fits(found: Sequence[int], wanted: Sequence[int | None]) -> bool:
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(own == each or (each is None and own) for own, each in pairs)


def _numbers(words: str, name: str) -> tuple[int, ...]:
    """Return the numbers of a setting such as "1,2,2"."""
    parts = [word.strip() for word in words.split(",")]
    if len(parts) != BLOCKS or not all(part.isdecimal() and 0 < int(part) < MOST for part in parts):
        raise ImgtoolError(f"{name} is damaged: {words!r} is not {BLOCKS} numbers", "take another copy of it")
    return tuple(map(int, parts))


def _parameters(
    shape: Model, state: Mapping[str, Array], name: str
) -> Iterator[tuple[str, tuple[int | None, ...]]]:
    """Yield the parameters of a network and their shapes; None is any length.

    Each layer takes as many channels as the one before it gives, so whoever asks checks one before the next.
    """
    if shape.arch == "hist":
        kernels = [(size, size) for size in KERNELS]
        yield from _chain(state, [f"score.{2 * number}" for number in range(len(KERNELS))], (3, 1), kernels)
        yield from _chain(state, ["prior.0", "prior.2"], (3, 1), [(), ()])
        return
    wide = 3
    channels, sizes = (_numbers(each, name) for each in (shape.channels, shape.kernels))
    for number, (size, out) in enumerate(zip(sizes, channels, strict=True)):
        yield f"blocks.{number}.conv.weight", (out, wide, size, size)
        for key in ("weight", "bias", "running_mean", "running_var"):
            yield f"blocks.{number}.norm.{key}", (out,)
        wide = out
    layers = [f"mlp.{2 * number}" for number in range(shape.layers + 1)]
    yield from _chain(state, layers, (wide, 2), [()] * len(layers))


def _chain(
    state: Mapping[str, Array],
    names: Sequence[str],
    ends: tuple[int, int],
    kernels: Sequence[tuple[int, ...]],
) -> Iterator[tuple[str, tuple[int | None, ...]]]:
    """Yield weight and bias of layers one after another, from and to so many channels."""
    wide = ends[0]
    for key, kernel in zip(names, kernels, strict=True):
        yield f"{key}.weight", (ends[1] if key == names[-1] else None, wide, *kernel)
        wide = len(state[f"{key}.weight"])
        yield f"{key}.bias", (wide,)


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
        ImgtoolError: No cell of the frame counts, or the network gives NaN or infinity.
    """
    if not isinstance(net, Net):
        net = of_module(net, net.shape)  # type: ignore[arg-type]
    answer = net.run(*inputs(net.shape, stats))
    if not np.isfinite(answer).all():
        raise ImgtoolError("the network's output is not finite", "its weights are damaged: take others")
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
