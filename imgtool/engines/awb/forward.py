"""The networks in NumPy: what runs where torch would be too large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

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


def hist(state: State, x: Array, dilations: tuple[int, ...]) -> Array:
    """Return the score map of histograms: ``(3, B, B)`` to ``(B, B)``."""
    for number, dilation in enumerate(dilations):
        name = f"score.{2 * number}"
        x = conv(x, state[f"{name}.weight"], state[f"{name}.bias"], dilation=dilation)
        if number < len(dilations) - 1:
            x = relu(x)
    scores: Array = x[0]
    return scores


def prior(state: State, side: Array) -> Array:
    """Return the learned log prior of candidates: ``(K, 3)`` to ``(K,)``."""
    hidden = relu(linear(side, state["prior.0.weight"], state["prior.0.bias"]))
    last: Array = linear(hidden, state["prior.2.weight"], state["prior.2.bias"])[:, 0]
    return last


def deepawb(state: State, x: Array, strides: tuple[int, ...], layers: int) -> Array:
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
