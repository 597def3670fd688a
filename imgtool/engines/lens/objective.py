"""What the image network of the lens engine is trained for, and how it is judged.

"field" compares where the estimate and the truth move the points of a grid: the coefficients
themselves are so strongly correlated that their squared error says little. "photo", the original's,
compares the straightened photo with its straight partner, here only where both have something.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from imgtool import dist, losses
from imgtool.engine import Terms
from imgtool.engines.lens import posterior
from imgtool.engines.lens.geometry import BrownConrady
from imgtool.engines.lens.network import SHARE, Guess, root
from imgtool.engines.lens.settings import RISK
from imgtool.engines.lens.undistort import undistort

if TYPE_CHECKING:
    from imgtool.engines.lens.data import Sample
    from imgtool.engines.lens.settings import Train

POINTS = 16
"""Points per side at which displacement fields are compared."""
QUADRATIC = 0.1
"""Percent of the diagonal up to which an error counts by its square: what no eye sees."""
RAW = 0.2
"""Weight of the error with zoom, turn and shift left in."""
SPREAD = 0.1
"""Weight of the likelihood that teaches the network how sure it may be."""


def look(net: nn.Module, batch: Sample) -> Guess:
    """Return what the network says of the distorted photos of a batch."""
    guess: Guess = net(_unit(batch.image), batch.frame)
    return guess


def _unit(image: Tensor) -> Tensor:
    return image.to(memory_format=torch.channels_last).float() / 255


def loss(net: nn.Module, batch: Sample, settings: Train) -> Terms:
    """Return the terms of the loss that the settings name, and "spread", which touches no coefficient.

    "field" is in % of the diagonal; "ssim" and "l1" are the original's 0.8 (1 - SSIM) and 0.2 L1.
    """
    guess = look(net, batch)
    with torch.autocast(guess.coefficients.device.type, enabled=False):
        terms: dict[str, Tensor] = {}
        if settings.loss in ("field", "both"):
            terms["field"] = field_loss(guess, batch)
        if settings.loss in ("photo", "both"):
            structure, colour = photo_losses(guess.coefficients, batch)
            terms |= {"ssim": structure.mean(), "l1": colour.mean()}
        return terms | {"spread": SPREAD * surprise(guess, batch)}


def _over_known(values: Tensor, batch: Sample) -> Tensor:
    """Return the mean over the photos whose coefficients are known, 0 where there are none."""
    return dist.mean(values, batch.known.to(values.dtype))


def _truth(batch: Sample) -> Tensor:
    return batch.coefficients.nan_to_num(0.0)


def field_loss(guess: Guess, batch: Sample) -> Tensor:
    """Return the mean error of the displacement field at 16 x 16 points, in % of the diagonal.

    Huber's, smooth everywhere (Charbonnier), of the distances after the best similarity, and ``RAW`` times
    that of those before.
    """
    points = grid(batch.frame, POINTS, POINTS, 1.0)
    found, wanted = moved(guess.coefficients, points), moved(_truth(batch), points)
    aligned, raw = aligned_apart(found, wanted), found - wanted
    return _over_known(_huber(aligned) + RAW * _huber(raw), batch)


def _huber(apart: Tensor) -> Tensor:
    """Return the mean over points of smoothed lengths ``(B, N, 2)``, half diagonals to % of the diagonal."""
    square = (50 * apart).square().sum(-1)
    return (torch.sqrt(square + QUADRATIC**2) - QUADRATIC).mean(1)


def grid(frame: Tensor, columns: int, rows: int, part: float) -> Tensor:
    """Return points spread over the middle ``part`` of each frame, normalised: ``(B, columns * rows, 2)``."""
    half = frame / frame.square().sum(1, keepdim=True).sqrt() * part
    facts: dict[str, Any] = {"device": frame.device, "dtype": frame.dtype}
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, rows, **facts), torch.linspace(-1, 1, columns, **facts), indexing="ij"
    )
    return torch.stack([x.flatten(), y.flatten()], -1) * half[:, None]


def moved(coefficients: Tensor, points: Tensor) -> Tensor:
    """Return where points ``(B, N, 2)`` of straight pictures lie in the photos of lenses ``(B, 4)``."""
    columns: list[Any] = [column[:, None] for column in coefficients.unbind(1)]
    return torch.stack(BrownConrady(*columns).distort(points[..., 0], points[..., 1]), -1)


def aligned_apart(found: Tensor, wanted: Tensor) -> Tensor:
    """Return what is left between point sets ``(B, N, 2)`` after the best similarity of the first.

    The least-squares similarity is a complex multiple and a shift, as in ``geometry.apart``.
    """
    found, wanted = found - found.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True)
    size = found.square().sum((1, 2))
    along = (found * wanted).sum((1, 2)) / size
    across = (found[..., 0] * wanted[..., 1] - found[..., 1] * wanted[..., 0]).sum(1) / size
    turned = torch.stack([-found[..., 1], found[..., 0]], -1)
    return along[:, None, None] * found + across[:, None, None] * turned - wanted


def surprise(guess: Guess, batch: Sample) -> Tensor:
    """Return the mean negative log-likelihood of the truth by the spread that the network states.

    Normal, the coefficients taken as they are: how sure it may be is learnt beside them.
    """
    k1, k2, p1, p2 = (_truth(batch) - guess.coefficients.detach()).unbind(1)
    corner = k1 + k2
    errors = torch.stack([corner, k1 / 4 + k2 / 16 - SHARE * corner, p1, p2], 1)
    each = 0.5 * (errors * torch.exp(-guess.log_spread)).square() + guess.log_spread
    return _over_known(each.mean(1), batch)


# --- photos ------------------------------------------------------------------------------------------


def straightened(photo: Tensor, coefficients: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
    """Straighten photos that lie in the middle of squares.

    The unit of the coefficients is half of the photo's diagonal, not of the square's.

    Args:
        photo: ``(B, 3, S, S)``.
        coefficients: ``(B, 4)``.
        frame: ``(B, 2)`` half the width and half the height of each photo, in any unit.

    Returns:
        The straight photos, 0 where there is nothing; and ``(B, 1, S, S)``, 1 where the photo has
        something to show, else 0.
    """
    unit = frame.square().sum(1).sqrt() / frame.amax(1) / 2**0.5
    powers = torch.stack([unit**-2, unit**-4, 1 / unit, 1 / unit], 1)
    inside = _inside(frame, photo.shape[-1])
    both, _ = undistort(torch.cat([photo, inside], 1), coefficients * powers)
    return both[:, :3], inside * (both[:, 3:].detach() > 0.999)


def _inside(frame: Tensor, size: int) -> Tensor:
    """Return 1 where a pixel of a square lies wholly within its photo, else 0: ``(B, 1, S, S)``."""
    middle = (torch.arange(size, device=frame.device, dtype=frame.dtype) * 2 + 1 - size).abs() / size
    extent = frame / frame.amax(1, keepdim=True) - 0.5 / size
    columns, rows = (middle[None] <= extent[:, each, None] for each in (0, 1))
    return (rows[:, None, :, None] & columns[:, None, None, :]).to(frame.dtype)


def photo_losses(coefficients: Tensor, batch: Sample) -> tuple[Tensor, Tensor]:
    """Return 0.8 (1 - SSIM) and 0.2 L1 of each straightened photo and its straight partner, ``(B,)``."""
    straight, mask = straightened(_unit(batch.source), coefficients, batch.frame)
    target = _unit(batch.target)
    structure = 1 - losses.masked_ssim(straight, target, mask)
    apart = ((straight - target).abs() * mask).mean(1).sum((1, 2))
    return 0.8 * structure, 0.2 * apart / mask.sum((1, 2, 3)).clamp(min=1)


# --- judging -----------------------------------------------------------------------------------------


@torch.no_grad()
def score(net: nn.Module, batch: Sample) -> Terms:
    """Return what the network is judged by, per photo.

    Of photos whose coefficients are known, in % of the diagonal: "ade", the mean displacement error
    of the estimate after the best similarity; "untouched", that of leaving the photo alone; "gated",
    that of what ``infer`` would choose; "corner", the error of the displacement in the corner. Of photos
    with a straight partner: "photo", the original's loss, and "photo-untouched".
    """
    guess = look(net, batch)
    truth, none = _truth(batch), torch.zeros_like(guess.coefficients)
    after, before = (_error(each, truth, batch.frame) for each in (guess.coefficients, none))
    corner = 50 * (guess.coefficients - truth)[:, :2].sum(1).abs()
    gated = torch.where(_risks(guess, batch.frame) > RISK, before, after)
    known = batch.known.bool()
    scores = {"ade": after[known], "untouched": before[known], "gated": gated[known], "corner": corner[known]}
    if batch.source.shape[-1]:
        for name, coefficients in (("photo", guess.coefficients), ("photo-untouched", none)):
            scores[name] = sum(photo_losses(coefficients, batch), torch.zeros((), device=none.device))
    return scores


def _error(found: Tensor, wanted: Tensor, frame: Tensor) -> Tensor:
    """Return ``geometry.error`` of a batch, ``(B,)``."""
    points = grid(frame, 24, 16, 0.96)
    apart = aligned_apart(moved(found, points), moved(wanted, points))
    return 50 * apart.square().sum(-1).sqrt().mean(1)


def _risks(guess: Guess, frame: Tensor) -> Tensor:
    """Return the probability that acting on each estimate does harm, ``(B,)``."""
    risks = []
    for mean, spread, (width, height) in zip(
        guess.coefficients.nan_to_num(0.0).double().cpu().numpy(),
        root(guess.log_spread.nan_to_num(0.0)).double().cpu().numpy(),
        frame.tolist(),
        strict=True,
    ):
        risks.append(posterior.around(mean, spread, width, height).risk)
    return torch.tensor(risks, device=frame.device)


@torch.no_grad()
def samples(net: nn.Module, batch: Sample) -> dict[str, Tensor]:
    """Return the columns of the sample sheet: the photo, as straightened by the network, and the truth."""
    photo, frame = _unit(batch.image)[:6], batch.frame[:6]
    found = look(net, batch).coefficients[:6]
    truth, _ = straightened(photo, _truth(batch)[:6], frame)
    if batch.target.shape[-1]:
        partner = functional.interpolate(_unit(batch.target)[:6], photo.shape[-2:], mode="area")
        truth = torch.where(batch.known[:6].bool()[:, None, None, None], truth, partner)
    return {"photo": photo, "straightened": straightened(photo, found, frame)[0], "truth": truth}
