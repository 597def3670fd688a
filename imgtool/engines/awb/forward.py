"""The networks in NumPy: what runs where torch would be too large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from imgtool.engines.awb.features import BINS, REACH

Array = npt.NDArray[Any]
State = Mapping[str, Array]


def conv(x: Array, weight: Array, bias: Array | None, *, stride: int = 1, dilation: int = 1) -> Array:
    """Convolve ``(C, H, W)`` by ``(O, C, k, k)`` with zero padding that keeps the size at stride 1.

    Returns:
        ``(O, ceil(H / stride), ceil(W / stride))`` for odd k.
    """
    kernel = weight.shape[-1]
    pad = dilation * (kernel - 1) // 2
    channels, height, width = x.shape
    padded = np.zeros((channels, height + 2 * pad, width + 2 * pad), np.float32)
    padded[:, pad : pad + height, pad : pad + width] = x
    reach = dilation * (kernel - 1)
    rows, columns = (height + 2 * pad - reach - 1) // stride + 1, (width + 2 * pad - reach - 1) // stride + 1
    taken = np.empty((channels, kernel, kernel, rows, columns), np.float32)
    for i in range(kernel):
        for j in range(kernel):
            top, left = i * dilation, j * dilation
            taken[:, i, j] = padded[
                :,
                top : top + stride * (rows - 1) + 1 : stride,
                left : left + stride * (columns - 1) + 1 : stride,
            ]
    out: Array = weight.reshape(len(weight), -1) @ taken.reshape(-1, rows * columns)
    if bias is not None:
        out += bias[:, None]
    return out.reshape(-1, rows, columns)


def relu(x: Array) -> Array:
    """Return x where it is positive, else 0; in place."""
    return np.maximum(x, 0, out=x)


def pool(x: Array) -> Array:
    """Return the largest of every 2x2 block of ``(C, H, W)``; a last odd row or column is left out."""
    rows, columns = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    wide = np.maximum(x[:, 0:rows:2, :columns], x[:, 1:rows:2, :columns])
    return np.maximum(wide[..., ::2], wide[..., 1::2])


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """Return ``x @ weight.T + bias`` for ``(..., N)``."""
    out: Array = x @ weight.T + bias
    return out


def hist(
    state: State, x: Array, place: Array, side: Array, log_prior: Array, *, dilations: tuple[int, ...]
) -> Array:
    """Return the log probability of candidate lights, ``(K,)``.

    Args:
        state: Parameters by name.
        x: ``(3, BINS, BINS)`` histograms.
        place: ``(K, 2)`` candidates in aligned log-chroma.
        side: ``(K, 3)`` what the learned prior sees of them.
        log_prior: ``(K,)`` how likely lights lie off the curve.
        dilations: Of the convolutions.
    """
    for number, dilation in enumerate(dilations):
        name = f"score.{2 * number}"
        x = conv(x, state[f"{name}.weight"], state[f"{name}.bias"], dilation=dilation)
        if number < len(dilations) - 1:
            x = relu(x)
    hidden = relu(linear(side, state["prior.0.weight"], state["prior.0.bias"]))
    known = linear(hidden, state["prior.2.weight"], state["prior.2.bias"])[:, 0]
    scores: Array = sampled(x[0], place) + log_prior + known
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    return scores


def sampled(scores: Array, place: Array) -> Array:
    """Return a score map's values at places, bilinearly; beyond its border the border's."""
    at = np.clip((place / REACH + 1) * ((BINS - 1) / 2), 0, BINS - 1)
    low = np.minimum(at.astype(np.int64), BINS - 2)
    far = (at - low).astype(np.float32)
    (i, j), (u, v) = low.T, far.T
    above = scores[i, j] * (1 - v) + scores[i, j + 1] * v
    below = scores[i + 1, j] * (1 - v) + scores[i + 1, j + 1] * v
    found: Array = above * (1 - u) + below * u
    return found


def deepawb(state: State, x: Array, *, strides: tuple[int, ...], layers: int) -> Array:
    """Return R/G and B/G, ``(2,)``, of a picture ``(3, H, W)`` by the original's network."""
    for block, stride in enumerate(strides):
        x = conv(x, state[f"blocks.{block}.conv.weight"], None, stride=stride)
        norm = f"blocks.{block}.norm"
        gain = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + 1e-5)
        shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * gain
        x = pool(relu(x * gain[:, None, None] + shift[:, None, None]))
    features = x.mean((1, 2))
    for layer in range(layers):
        features = relu(linear(features, state[f"mlp.{2 * layer}.weight"], state[f"mlp.{2 * layer}.bias"]))
    last = linear(features, state[f"mlp.{2 * layers}.weight"], state[f"mlp.{2 * layers}.bias"])
    scaled: Array = np.tanh(last) * 0.6 + 0.6
    return scaled
