"""The filter engine's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtool import losses, metrics, samples
from imgtool.engine import Engine, Terms
from imgtool.engines.filter import actions, apply, bench, data, model, port, prune
from imgtool.engines.filter.sample import Sample
from imgtool.engines.filter.settings import Model

if TYPE_CHECKING:
    from imgtool.engines.filter.settings import Train

DECAY = 0.5
"""Of the held-out l2 from one validation to the next, where it decides when to stop."""
SLOPES = 2
"""Channels of a map that is no picture but two derivatives, -1..1."""


def _seen(batch: Sample) -> Tensor:
    return batch.seen.to(memory_format=torch.channels_last).float() / 255


def nothing(net: Any, batch: Sample) -> Tensor:
    """Return what doing nothing gives: the photo, or black where the output is one channel."""
    if batch.wanted.shape[1] != 3:
        return torch.zeros_like(batch.wanted)
    return model.inner(_seen(batch), net.reach)


def loss(net: nn.Module, batch: Sample, settings: Train) -> Terms:
    """Return the terms of the loss on a batch.

    ``l1``: mean absolute error; ``l2``: mean squared error; ``log-cosh``: mean log cosh; ``all``: all three.
    ``relative-mse``: squared error as a share of what doing nothing leaves.
    """
    output = net(_seen(batch))
    with torch.autocast(output.device.type, enabled=False):
        output = output.float()
        if settings.loss == "relative-mse":
            return {"relative-mse": losses.relative_mse(output, batch.wanted, nothing(net, batch))}
        terms = {
            "l1": lambda: F.l1_loss(output, batch.wanted),
            "l2": lambda: F.mse_loss(output, batch.wanted),
            "log-cosh": lambda: losses.log_cosh(output, batch.wanted),
        }
        names = list(terms) if settings.loss == "all" else [settings.loss]
        return {name: terms[name]() for name in names}


def score(net: nn.Module, batch: Sample) -> Terms:
    """Return per crop: PSNR (dB), its gain over doing nothing, and the mean squared error ``l2``.

    Of what an 8-bit file would hold; maps of slopes, which have both signs, are taken as they are.
    """
    output = net(_seen(batch)).float()
    if output.shape[1] != SLOPES:
        output = metrics.to_8_bit(output)
    psnr = metrics.psnr(output, batch.wanted)
    return {
        "psnr": psnr,
        "gain": psnr - metrics.psnr(nothing(net, batch), batch.wanted),
        "l2": (output - batch.wanted).square().mean((1, 2, 3)),
    }


def enough(rows: Sequence[Mapping[str, Any]], settings: Train) -> str:
    """Return why a run may end now, "" where it goes on: the smoothed l2 is below the limit.

    It is smoothed anew in the last of the stages, and a run ends in no earlier one.
    """
    earlier = sum(part.steps for part in data.course(settings)[:-1])
    found = [row["scores"]["l2"] for row in rows if row["step"] > earlier]
    if not settings.stop_below or not found or found[-1] is None:
        return ""
    value = samples.smoothed([each for each in found if each is not None], DECAY)
    if value >= settings.stop_below:
        return ""
    return f"the smoothed held-out l2, {value:.3g}, is below {settings.stop_below:g}"


def sheet(net: Any, batch: Sample) -> dict[str, Tensor]:
    """Return the columns of the sample sheet; two derivatives are shown in red and green."""
    first = Sample(*(part[:6] for part in batch))
    pictures = {
        "photo": model.inner(_seen(first), net.reach),
        "network": net(_seen(first)),
        "filter": first.wanted,
    }
    return {name: _coloured(each) for name, each in pictures.items()}


def _coloured(maps: Tensor) -> Tensor:
    if maps.shape[1] == SLOPES:
        return F.pad(maps.abs(), (0, 0, 0, 0, 0, 1))
    return maps.expand(-1, 3, -1, -1)


ENGINE: Engine = Engine(
    name="filter",
    model=Model,
    build=model.build,
    data=data.load,
    loss=loss,
    score=score,
    apply=apply.apply,
    samples=sheet,
    tiles=apply.tile_facts,
    bench=lambda settings, lab: bench.run(settings, lab, ENGINE),
    actions=actions.ACTIONS,
    reads="rgb",
    best="psnr",
    higher_is_better=True,
    scale=1,
    weights="filter-sobel_3",
    baseline=apply.baseline,
    begin=prune.begin,
    choose=apply.weights,
    stages=data.stages,
    describe=data.describe,
    enough=enough,
    port=port.port,
    ported=port.ported,
)
