"""The networks of the lens engine, and what the training loop asks of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from imgtool.engine import Examples, Terms, TileFacts
from imgtool.engines.lens import data, estimate, evidence, lines, network, objective, plumb, posterior
from imgtool.engines.lens.geometry import BrownConrady
from imgtool.engines.lens.settings import RISK, Model
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.engines.lens.settings import Train

WHOLE = "the distortion of a lens is one for the whole photo"
_SHEET = 256
"""Pixels of the longer side of the sample sheet's pictures."""


def build(settings: Model) -> nn.Module:
    """Build the network that ``settings.arch`` names."""
    if settings.arch == "lines":
        return plumb.LinesNet()
    return network.ImageEstimator(settings)


def tile_facts(net: nn.Module) -> TileFacts:
    """Return that nothing is cut: the estimate is one for the whole photo, and strips are exact."""
    return TileFacts(local=False, reason=WHOLE)


def load(settings: Train) -> tuple[Examples, Examples]:
    """Return the training and the held-out set that the network needs.

    Raises:
        ImgtoolError: Code 2, for settings that do not go together, and as ``data``.
    """
    if settings.arch != "lines":
        return data.load_images(settings)
    if settings.loss != "field":
        raise ImgtoolError(
            f"--loss {settings.loss} compares pixels, and the network lines sees only edges",
            "take --loss field or --arch efficientnet-b0",
            USAGE,
        )
    if settings.pairs:
        raise ImgtoolError(
            "the network lines learns from straight photos, not from pairs",
            "name them by --photos, or take --arch efficientnet-b0",
            USAGE,
        )
    kept, held = data.photographs(settings)
    return evidence.Bent(kept, settings), evidence.Held(held, settings)


def loss(net: nn.Module, batch: Any, settings: Train) -> Terms:
    """Return the terms of the loss: of "lines" the negative log-posterior of the truth, in nats."""
    if isinstance(batch, evidence.Sample):
        return {"surprise": plumb.loss(net, batch, settings.untouched).mean()}
    return objective.loss(net, batch, settings)


def score(net: nn.Module, batch: Any) -> Terms:
    """Return per photo, in % of the diagonal, the errors of the estimate, none and the gate's choice."""
    if not isinstance(batch, evidence.Sample):
        return objective.score(net, batch)
    rows = []
    for number, found in enumerate(_lines(batch)):
        width, height = batch.frame[number].tolist()
        guess = posterior.estimate(estimate.edge_likelihood(net, found), width, height)
        truth = batch.coefficients[number].double().cpu().numpy()
        bent = posterior.field(width, height)
        model = guess.model
        apart = np.array([model.k1, model.k2, model.p1, model.p2]) - truth
        after, none = (float(posterior.errors(each[None], bent)[0]) for each in (apart, truth))
        chosen = none if estimate.decide(guess, "net", RISK).model.straight else after
        rows.append((after, none, chosen, abs(apart[0] + apart[1]) * 50))
    columns = torch.tensor(rows).T
    return dict(zip(("ade", "untouched", "gated", "corner"), columns, strict=True))


def _lines(batch: evidence.Sample) -> list[lines.Lines]:
    """Return the edges of each photo of a batch, without those that fill up."""
    found = []
    for points, facts, half in zip(batch.points, batch.facts, batch.half_diagonal, strict=True):
        real = facts[:, 0] > 0
        kept, told = (part[real].double().cpu().numpy() for part in (points, facts))
        found.append(lines.Lines(kept, told, float(half)))
    return found


def samples(net: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Return the columns of the sample sheet; of "lines" the edges, before and after."""
    if not isinstance(batch, evidence.Sample):
        return objective.samples(net, batch)
    columns: dict[str, list[Tensor]] = {"edges": [], "straightened": [], "truth": []}
    for number, found in enumerate(_lines(batch)[:6]):
        width, height = batch.frame[number].tolist()
        guess = posterior.estimate(estimate.edge_likelihood(net, found), width, height).model
        truth = BrownConrady(*batch.coefficients[number].tolist())
        for column, model in zip(columns.values(), (BrownConrady(), guess, truth), strict=True):
            column.append(_drawn(found, model))
    return {name: torch.stack(pictures) for name, pictures in columns.items()}


def _drawn(found: lines.Lines, model: BrownConrady) -> Tensor:
    """Draw edges as white lines on black, straightened by a model: ``(3, S, S)`` in 0..1."""
    picture = np.zeros((_SHEET, _SHEET, 3), np.uint8)
    x, y = model.undistort(found.points[..., 0], found.points[..., 1])
    places = np.clip((np.stack([x, y], -1) + 1) * _SHEET / 2, -99, _SHEET + 99)
    for curve in np.rint(places * 16).astype(np.int32):
        cv2.polylines(picture, [curve], False, (255, 255, 255), 1, cv2.LINE_AA, 4)
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255
