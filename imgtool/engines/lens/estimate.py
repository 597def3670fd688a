"""The estimators: what the distortion of a photo is, how it was found, and whether to act on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from imgtool.engines.lens import formats, lines, plumb, posterior, profiles
from imgtool.engines.lens.geometry import HALF_DIAGONAL, BrownConrady
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import metadata

if TYPE_CHECKING:
    from imgtool.engine import Watch
    from imgtool.engines.lens import network
    from imgtool.engines.lens.settings import Infer
    from imgtool.images import Photo

    Net = nn.Module | plumb.Exported | network.Exported

Floats = npt.NDArray[np.float64]

CORRECTED = "DistortionCorrectionAlreadyApplied"
"""Property of Adobe's aux namespace that says so."""
SMALLEST = 0.02
"""Percent of the diagonal that an estimate must move the mean pixel by: less is not worth resampling."""
DISTINCT = 0.08
"""Expected error of doing nothing, in % of the diagonal, below which a photo is said to be straight."""
LEAST = 0.2
"""Share of the expected error that an estimate must take away."""
SURE, BOLDER = 0.5, 6.0
"""Share of the expected error from which on more risk is taken, and how many times as much."""
AGAINST = -3.0
"""Log-likelihood ratio below which the edges of a photo speak against its lens profile."""


@dataclass(frozen=True)
class Found:
    """The distortion of a photo, as it is going to be taken out.

    Attributes:
        model: The model; straight where the photo is left alone.
        method: "net", "lines", "profile", "given" or "none".
        estimate: What a network or the edges said; None for others.
        reason: Why a photo is left alone, or "".
        together: Photos that were solved together.
    """

    model: BrownConrady
    method: str
    estimate: posterior.Estimate | None = None
    reason: str = ""
    together: int = 1


class Evidence(NamedTuple):
    """What a network or the edges know of one photo: its likelihood, or its own estimate."""

    likelihood: posterior.Likelihood | None
    own: posterior.Estimate | None
    width: int
    height: int


def edge_evidence(
    net: plumb.LinesNet | plumb.Exported | None, pixels: npt.NDArray[Any], found: lines.Lines | None = None
) -> Evidence:
    """Return the likelihood by the edges of a photo.

    Args:
        net: Weighs the edges; None takes fixed weights.
        pixels: ``(H, W, 3)``.
        found: The edges, where they were found before.
    """
    height, width = pixels.shape[:2]
    return Evidence(edge_likelihood(net, found or lines.find(pixels)), None, width, height)


@torch.inference_mode()
def edge_likelihood(net: nn.Module | plumb.Exported | None, found: lines.Lines) -> posterior.Likelihood:
    """Return the likelihood by edges; without any, all candidates are alike."""
    if isinstance(net, plumb.Exported) and len(found.points):
        return net.likelihood(found)
    given = plumb.evidence(found)
    if net is None or isinstance(net, plumb.Exported):
        said = plumb.fixed(given)
    else:
        given = plumb.Evidence(*(part.to(next(net.parameters()).device) for part in given))
        said = net(given)

    @torch.inference_mode()
    def likelihood(candidates: Floats) -> Floats:
        """Return the log-likelihoods ``(K,)`` of candidates ``(K, 4)``: k1, k2, p1, p2."""
        if not len(found.points):
            return np.zeros(len(candidates))
        where = given.points.device
        chosen = torch.from_numpy(np.ascontiguousarray(candidates)).float().to(where)
        left = (plumb.bends(given, part[None]) for part in torch.split(chosen, plumb.PIECE))
        parts = [plumb.log_likelihood(said, each)[0] for each in left]
        return torch.cat(parts).double().cpu().numpy()

    return likelihood


@torch.inference_mode()
def pixel_evidence(net: Net, pixels: npt.NDArray[Any]) -> Evidence:
    """Return what a network that looks at pixels says of a photo ``(H, W, 3)``."""
    from imgtool.engines.lens import network

    height, width = pixels.shape[:2]
    assert isinstance(net, network.ImageEstimator | network.Exported)
    mean, root = network.says(net, pixels)
    return Evidence(None, posterior.around(mean, root, width, height), width, height)


def look(net: Net, pixels: npt.NDArray[Any], settings: Infer) -> Evidence:
    """Return what the estimator of the settings sees in a photo."""
    if settings.estimator == "lines":
        return edge_evidence(None, pixels)
    if isinstance(net, plumb.LinesNet | plumb.Exported):
        return edge_evidence(net, pixels)
    return pixel_evidence(net, pixels)


def together(all_of_them: Sequence[Evidence]) -> posterior.Estimate:
    """Return the one estimate of photos that share a lens: their likelihoods are multiplied."""
    first = all_of_them[0]
    likelihoods = [each.likelihood for each in all_of_them if each.likelihood is not None]
    if likelihoods:
        return posterior.estimate(
            lambda candidates: np.sum([each(candidates) for each in likelihoods], axis=0),
            first.width, first.height,
        )  # fmt: skip
    own = [each.own for each in all_of_them if each.own is not None]
    return own[0] if len(own) == 1 else posterior.pooled(own, first.width, first.height)


def decide(estimate: posterior.Estimate, method: str, risk: float, count: int = 1) -> Found:
    """Take the estimate, or leave the photo alone where it may do harm or nothing.

    Args:
        estimate: What was found.
        method: How.
        risk: Largest probability of harm; ``BOLDER`` times that where the estimate takes away at least
            ``SURE`` of the expected error.
        count: Photos that were solved together.
    """
    small = estimate.size < SMALLEST
    risky = estimate.risk > risk * (BOLDER if estimate.confidence >= SURE else 1)
    idle = estimate.confidence < LEAST and risk < 1
    if not (small or risky or idle):
        return Found(estimate.model, method, estimate, "", count)
    straight = small and not risky and estimate.untouched < DISTINCT
    reason = "no distortion found" if straight else "the photo does not show enough to be sure"
    return Found(BrownConrady(), "none", estimate, reason, count)


def corrected(photo: Photo) -> bool:
    """Tell whether a photo says of itself that its distortion was taken out already."""
    value = metadata.xmp_property(photo.xmp, metadata.AUX[0], CORRECTED) if photo.xmp else None
    return value is not None and value.strip().lower() in ("true", "1")


def numbers(settings: Infer) -> BrownConrady | None:
    """Return the model of four numbers after --coeffs, None where it names a file, or nothing is given.

    Raises:
        ImgtoolError: Code 2 for numbers that are no coefficients or fold the picture, and for no file.
    """
    text = settings.coeffs
    if not text or Path(text).is_file():
        return None
    words = text.split(",")
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise ImgtoolError(f"--coeffs {text}: no such file, nor numbers", "give k1,k2,p1,p2", USAGE) from None
    if len(values) != 4 or not np.isfinite(values).all():
        raise ImgtoolError(f"--coeffs {text}: four finite numbers are needed", "give k1,k2,p1,p2", USAGE)
    model = BrownConrady(*values)
    if settings.normalisation == HALF_DIAGONAL:
        _refuse_folds(model, text)
    return model


def _refuse_folds(model: BrownConrady, text: str) -> None:
    if model.folds():
        raise ImgtoolError(
            f"--coeffs {text}: they fold the picture, two places of it onto one",
            "check their order, sign and normalisation (half of the diagonal is 1)",
            USAGE,
        )


def given(photo: Photo, settings: Infer, watch: Watch, name: str = "") -> BrownConrady:
    """Return the coefficients that the user gave: four numbers, or a file.

    Raises:
        ImgtoolError: Code 2 for what cannot be read as either, or folds the picture.
    """
    height, width = photo.pixels.shape[:2]
    model = numbers(settings)
    if model is None:
        focal = profiles.facts_of(photo.exif).focal_mm or None
        path = Path(settings.coeffs)
        model = formats.read(path, width, height, name, focal_mm=focal, say=watch.say)
    elif settings.normalisation == "original":
        model, rest = formats.from_original(model.k1, model.k2, model.p1, model.p2, width, height)
        watch.say(f"fitted to a round lens: wrong by {rest:.2f} % of the diagonal at most")
    _refuse_folds(model, settings.coeffs)
    return model


def of_profile(net: Net, photo: Photo, settings: Infer) -> Found | None:
    """Return the lens profile of a photo, None where there is none or the photo speaks against it."""
    height, width = photo.pixels.shape[:2]
    profile = profiles.find(photo.exif, width, height)
    if profile is None:
        return None
    if settings.estimator == "auto" and isinstance(net, plumb.LinesNet | plumb.Exported):
        likelihood = edge_evidence(net, photo.pixels).likelihood
        model = profile.model
        if likelihood is not None:
            both = likelihood(np.array([[model.k1, model.k2, model.p1, model.p2], [0, 0, 0, 0]], np.float64))
            if both[0] - both[1] < AGAINST:
                return None
    return Found(profile.model.clamped(), "profile")


def of(net: Net, photo: Photo, settings: Infer, watch: Watch, name: str = "") -> Found:
    """Find the distortion of one photo by the estimator that the settings name.

    Raises:
        ImgtoolError: A profile that was asked for is not there, or coefficients that are of no use.
    """
    if settings.estimator == "none" and not settings.coeffs:
        return Found(BrownConrady(), "none", reason="--estimator none")
    if corrected(photo) and not settings.force:
        return Found(
            BrownConrady(), "none", reason="it says that it is corrected already; --force does it again"
        )
    if settings.coeffs:
        model = given(photo, settings, watch, name)
        return Found(model, "given", reason="" if not model.straight else "the coefficients are 0")
    if settings.estimator == "profile" or (settings.estimator == "auto" and profiles.available()):
        found = of_profile(net, photo, settings)
        if found is not None:
            return found
        if settings.estimator == "profile":
            raise ImgtoolError("no lens profile for this photo", "take --estimator auto, or give --coeffs")
    estimate = together([look(net, photo.pixels, settings)])
    return decide(estimate, "lines" if settings.estimator == "lines" else "net", settings.risk)


# --- groups ----------------------------------------------------------------------------------------


def wants_survey(settings: Infer) -> bool:
    """Tell whether photos are to be solved together."""
    return settings.group != "none" and not settings.coeffs and settings.estimator not in ("none", "profile")


def _key(name: str, photo: Photo, settings: Infer) -> tuple[object, ...] | None:
    height, width = photo.pixels.shape[:2]
    if settings.group == "folder":
        return (str(Path(name).parent), width, height)
    return profiles.group_key(photo.exif, width, height)


def _joins(net: Net, photo: Photo, settings: Infer) -> bool:
    """Tell whether a photo is solved with others: it is not corrected already, and has no profile."""
    if corrected(photo) and not settings.force:
        return False
    known = settings.estimator == "auto" and profiles.available() and of_profile(net, photo, settings)
    return not known


def survey(
    net: Net, photos: Sequence[tuple[str, Callable[[], Photo]]], settings: Infer, watch: Watch
) -> list[Found | None]:
    """Solve photos of one lens together; None for a photo that stays alone or cannot be read."""
    groups: dict[tuple[object, ...], list[int]] = {}
    seen: dict[int, Evidence] = {}
    for number, (name, read) in enumerate(photos):
        try:
            photo = read()
        except ImgtoolError:
            continue  # it is told when its turn comes
        key = _key(name, photo, settings)
        if key is not None and _joins(net, photo, settings):
            groups.setdefault(key, []).append(number)
            seen[number] = look(net, photo.pixels, settings)
        watch.done(number + 1, len(photos))
    found: list[Found | None] = [None] * len(photos)
    method = "lines" if settings.estimator == "lines" else "net"
    sizes = [len(members) for members in groups.values() if len(members) > 1]
    watch.say(f"{sum(sizes)} photos solved in {len(sizes)} groups, {len(photos) - sum(sizes)} alone")
    for members in groups.values():
        if len(members) > 1:
            estimate = together([seen[number] for number in members])
            shared = decide(estimate, method, settings.risk, len(members))
            for number in members:
                found[number] = shared
    return found


def shared(alone: Callable[[], Found], known: Found | None, photo: Photo, settings: Infer) -> Found:
    """Return the group's finding for a photo, or its own where it has none or was corrected already."""
    if known is None or (corrected(photo) and not settings.force):
        return alone()
    return known
