"""The networks: scores of lights from histograms, and the original's convolutions and MLP."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtool.engines.awb.features import MAPS, REACH
from imgtool.engines.awb.settings import Model
from imgtool.errors import USAGE, ImgtoolError

CHANNELS = 16
DILATIONS = (1, 2, 4, 1)


class Sample(NamedTuple):
    """A frame as the networks and the losses see it; in a batch each part has a first axis B.

    Attributes:
        x: Input of the network: histograms ``(3, BINS, BINS)``, or a picture ``(3, H, W)``.
        place: ``(K, 2)`` candidate lights in aligned log-chroma.
        white: ``(K, 2)`` their R/G and B/G.
        log_prior: ``(K,)`` how likely lights lie off the curve.
        side: ``(K, 3)`` what the learned prior sees.
        truth: ``(2,)`` R/G and B/G of white.
        truth_place: ``(2,)`` the same in aligned log-chroma.
        importance: ``()`` factor of the loss.
        picture: ``(3, 32, 32)`` the frame to look at, linear, white at 5000 K grey.
        origin: ``(2,)`` R/G and B/G that the picture was divided by.
    """

    x: Tensor
    place: Tensor
    white: Tensor
    log_prior: Tensor
    side: Tensor
    truth: Tensor
    truth_place: Tensor
    importance: Tensor
    picture: Tensor
    origin: Tensor


class Hist(nn.Module):
    """Scores every light by the histograms around it, as far as they shift with the light.

    Convolutions do the same everywhere, so a frame under another light has the same scores, shifted;
    only ``prior`` knows which lights are common, and how bright scenes under them are.
    """

    def __init__(self) -> None:
        """Build it, randomly initialised."""
        super().__init__()
        sizes = (5, 3, 3, 3)
        ends = (MAPS, *[CHANNELS] * (len(sizes) - 1), 1)
        layers: list[nn.Module] = []
        for number, (size, dilation) in enumerate(zip(sizes, DILATIONS, strict=True)):
            pad = dilation * (size - 1) // 2
            layers += [
                nn.Conv2d(ends[number], ends[number + 1], size, padding=pad, dilation=dilation),
                nn.ReLU(),
            ]
        self.score = nn.Sequential(*layers[:-1])
        self.prior = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the score map ``(B, 1, BINS, BINS)`` of histograms ``(B, 3, BINS, BINS)``."""
        scores: Tensor = self.score(x)
        return scores

    def log_posterior(self, x: Tensor, place: Tensor, side: Tensor, log_prior: Tensor) -> Tensor:
        """Return the log probability of every candidate, ``(B, K)``; see ``Sample`` for the arguments."""
        scores = self(x).float()
        grid = (place / REACH).flip(-1)[:, None]
        seen = F.grid_sample(scores, grid, padding_mode="border", align_corners=True)[:, 0, 0]
        known: Tensor = self.prior(side)[..., 0]
        return F.log_softmax(seen + known.float() + log_prior, -1)

    def whites(self, batch: Sample) -> tuple[Tensor, Tensor | None]:
        """Return the estimate R/G, B/G ``(B, 2)``: the posterior's geometric mean, and the posterior."""
        posterior = self.log_posterior(batch.x, batch.place, batch.side, batch.log_prior)
        mean = (posterior.exp()[..., None] * batch.white.log()).sum(1)
        return mean.exp(), posterior


def widths(neurons: int, decay: float, layers: int) -> list[int]:
    """Return the sizes of an MLP's hidden layers that narrow by exp(-decay); their sum is ``neurons``.

    >>> widths(200, 0.5, 4)
    [92, 55, 33, 20]

    Raises:
        ImgtoolError: Code 2, for fewer neurons than a layer needs.
    """
    shares = [math.exp(-decay * layer) for layer in range(layers)]
    sizes = [int(neurons * share / sum(shares)) for share in shares]
    sizes[0] += neurons - sum(sizes)
    if min(sizes) < 1:
        raise ImgtoolError(
            f"{neurons} neurons do not fill {layers} layers at a decay of {decay:g}",
            "give more neurons",
            USAGE,
        )
    return sizes


def triple(text: str, name: str) -> tuple[int, int, int]:
    """Return the three whole numbers of a setting such as "32,64,128".

    Raises:
        ImgtoolError: Code 2, where there are not three, or one is below 1.
    """
    words = text.split(",")
    if len(words) != 3 or not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise ImgtoolError(f"--{name} {text}: not three whole numbers", f"such as --{name} 32,64,128", USAGE)
    first, second, third = map(int, words)
    return first, second, third


class _Block(nn.Module):
    def __init__(self, wide_in: int, wide_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(wide_in, wide_out, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(wide_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)


class DeepAwb(nn.Module):
    """The original: three blocks of convolution, batch normalisation, ReLU and pooling, then an MLP.

    Its output is R/G and B/G of white, a tanh scaled to 0..1.2. At the default settings it has the
    276,865 parameters of the original's trained model.
    """

    def __init__(self, settings: Model) -> None:
        """Build it in the shape of the settings, randomly initialised.

        Raises:
            ImgtoolError: Code 2, for channels, kernels or strides that make no network, or an input
                that the blocks shrink to nothing.
        """
        super().__init__()
        channels = triple(settings.channels, "channels")
        kernels, strides = triple(settings.kernels, "kernels"), triple(settings.strides, "strides")
        if any(kernel % 2 == 0 for kernel in kernels):
            raise ImgtoolError(f"--kernels {settings.kernels}: even", "take odd kernel sizes", USAGE)
        for edge in (settings.height, settings.width):
            for stride in strides:
                edge = -(-edge // stride) // 2
            if edge < 1:
                raise ImgtoolError(
                    f"{settings.width}x{settings.height} is too small for strides {settings.strides}",
                    "give a larger --height and --width",
                    USAGE,
                )
        ends = (3, *channels)
        self.blocks = nn.Sequential(*(_Block(ends[i], ends[i + 1], kernels[i], strides[i]) for i in range(3)))
        sizes = [channels[-1], *widths(settings.neurons, settings.decay, settings.layers)]
        layers: list[nn.Module] = []
        for wide_in, wide_out in pairwise(sizes):
            layers += [nn.Linear(wide_in, wide_out), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(sizes[-1], 2))

    def forward(self, x: Tensor) -> Tensor:
        """Return R/G and B/G, ``(B, 2)``, of pictures ``(B, 3, H, W)``."""
        features = self.blocks(x).mean((2, 3))
        return torch.tanh(self.mlp(features)) * 0.6 + 0.6

    def whites(self, batch: Sample) -> tuple[Tensor, Tensor | None]:
        """Return the estimate R/G, B/G ``(B, 2)``; it knows no posterior."""
        return self(batch.x).float().clamp_min(0.02), None
