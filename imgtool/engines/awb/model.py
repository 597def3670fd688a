"""What the training loop asks of the awb engine: networks, losses, scores, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtool.engine import TileFacts
from imgtool.engines.awb.network import DeepAwb, Hist, Sample
from imgtool.engines.awb.settings import Model

WIDE = 0.05
"""Width of the target that the likelihood learns, in aligned log-chroma: about 12 mired."""
LIKELIHOOD = 0.2
ANGLE = 0.175


def build(settings: Model) -> nn.Module:
    """Return the network of the settings, randomly initialised."""
    net: nn.Module = Hist() if settings.arch == "hist" else DeepAwb(settings)
    net.shape = Model(**{name: getattr(settings, name) for name in Model.model_fields})  # type: ignore[assignment]
    return net


def angles(estimate: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return the recovery and the reproduction error in degrees, ``(B,)`` each.

    Reproduction: the angle between truth / estimate and grey (Finlayson and Zakizadeh, BMVC 2014).

    Args:
        estimate: ``(B, 2)`` R/G and B/G.
        truth: The same.
    """
    ones = torch.ones_like(truth[:, :1])
    one = torch.cat([estimate[:, :1], ones, estimate[:, 1:]], 1)
    two = torch.cat([truth[:, :1], ones, truth[:, 1:]], 1)
    return _between(one, two), _between(two / one, torch.ones_like(one))


def _between(one: Tensor, two: Tensor) -> Tensor:
    across = torch.linalg.cross(one, two).square().sum(1)
    along = (one * two).sum(1)
    return torch.rad2deg(torch.atan2((across + 1e-12).sqrt(), along))


def loss(net: Any, batch: Sample, settings: Any) -> Mapping[str, Tensor]:
    """Return the terms of the loss: angles and, where the network has a posterior, its likelihood.

    Each sample counts by its ``importance``. ``mse`` is the original's: the mean squared error of R/G
    and B/G.
    """
    estimate, posterior = net.whites(batch)
    weight = batch.importance
    if settings.loss == "mse":
        errors = F.mse_loss(estimate, batch.truth, reduction="none").mean(1)
        return {"mse": (weight * errors).mean()}
    recovery, reproduction = angles(estimate, batch.truth)
    terms = {"angle": ANGLE * (weight * (recovery + reproduction)).mean()}
    if posterior is not None:
        far = (batch.place - batch.truth_place[:, None]).square().sum(2)
        target = F.softmax(-far / (2 * WIDE**2) + batch.log_prior, -1)
        terms["likelihood"] = LIKELIHOOD * (weight * -(target * posterior).sum(1)).mean()
    return terms


def score(net: Any, batch: Sample) -> Mapping[str, Tensor]:
    """Return recovery and reproduction errors in degrees of each frame."""
    recovery, reproduction = angles(net.whites(batch)[0], batch.truth)
    return {"recovery": recovery, "reproduction": reproduction}


def samples(net: Any, batch: Sample) -> Mapping[str, Tensor]:
    """Return the frames as their cameras saw them at 5000 K, with the estimate, and with the truth."""
    estimate, _ = net.whites(batch)
    return {
        "frame": _shown(batch.picture),
        "estimate": _shown(_balanced(batch, estimate)),
        "truth": _shown(_balanced(batch, batch.truth)),
    }


def _balanced(batch: Sample, white: Tensor) -> Tensor:
    gains = batch.origin / white
    return (
        batch.picture
        * torch.stack([gains[:, 0], torch.ones_like(gains[:, 0]), gains[:, 1]], 1)[..., None, None]
    )


def _shown(linear: Tensor) -> Tensor:
    return linear.clamp(0, 1) ** (1 / 2.2)


def tile_facts(net: nn.Module) -> TileFacts:
    """Return that a frame is never cut: white is a property of all of it."""
    return TileFacts(local=False, reason="white is a property of the whole frame")
