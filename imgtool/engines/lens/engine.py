"""The lens engine's record, and a photo straightened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from imgtool.engine import Engine, Result, Watch
from imgtool.engines.lens import actions, bench, estimate, formats, model, network, port, profiles, warp
from imgtool.engines.lens.geometry import HALF_DIAGONAL, BrownConrady, diagonal, zoom
from imgtool.engines.lens.settings import Model
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import convert

if TYPE_CHECKING:
    from imgtool.engine import Pixels
    from imgtool.engines.lens.settings import Infer
    from imgtool.images import Photo

SUFFIXES = {"opencv": ".yml", "lensfun": ".xml", "lcp": ".lcp", "json": ".json"}
"""Coefficient files that --export writes, and how their names end."""


def forms(settings: Infer) -> list[str]:
    """Return the coefficient files that the settings ask for.

    Raises:
        ImgtoolError: Code 2, for one that is unknown.
    """
    wanted = [word.strip() for word in settings.export.split(",") if word.strip()]
    for word in wanted:
        if word not in SUFFIXES:
            raise ImgtoolError(f"--export {word}: unknown", "take some of " + ",".join(SUFFIXES), USAGE)
    return wanted


def check(settings: Infer) -> None:
    """Raise what is wrong with the settings whatever the photo: forms, numbers, a file that is not there."""
    forms(settings)
    estimate.numbers(settings)


def apply(
    net: estimate.Net, photo: Photo, settings: Infer, watch: Watch, known: estimate.Found | None = None
) -> Result:
    """Find the distortion of a photo and take it out, or leave the photo as it is.

    Raises:
        ImgtoolError: Coefficients or a profile that cannot be used, or a crop that cannot be.
    """
    wanted = forms(settings)
    found = estimate.shared(
        lambda: estimate.of(net, photo, settings, watch, watch.name), known, photo, settings
    )
    lens = found.model.scaled(settings.strength)
    height, width = photo.pixels.shape[:2]
    if lens.straight or min(height, width) < 2:
        if found.reason:
            watch.say(f"left as it is: {found.reason}")
        lens, larger, image, alpha = BrownConrady(), 1.0, photo.pixels, None
        marks = {}
    else:
        larger = _zoom(lens, width, height, settings)
        image, alpha = _straight(photo, lens, larger, settings, watch)
        marks = {estimate.CORRECTED: "True"}
        watch.say(f"{found.method}: corners {50 * lens.corner:+.2f} % of the diagonal, zoom {larger:.3f}")
    watch.done(1, 1)
    facts = _facts(found, lens, larger, width, height)
    files = dict(formats.write(lens, width, height, form, facts | _camera(photo, form)) for form in wanted)
    for form in wanted:
        if lost := formats.loss(lens, width, height, form):
            watch.say(lost)
    row = {name: facts[name] for name in _ROW}
    return Result(image, facts, alpha=alpha, files=files, row=row, xmp=marks)


def _camera(photo: Photo, form: str) -> dict[str, object]:
    """Return what coefficient files say of the camera.

    A lensfun file that named a real camera would take the place of its entry in lensfun's database.
    """
    taken = profiles.facts_of(photo.exif)
    names: dict[str, object] = {"lens": taken.lens, "focal_mm": taken.focal_mm}
    if form != "lensfun":
        names |= {"maker": taken.make, "camera": taken.model}
    return {name: value for name, value in names.items() if value}


_ROW = (
    "width", "height", "k1", "k2", "p1", "p2", "corner_percent", "confidence", "method", "zoom",
    "expected_error_percent", "risk", "together", "reason",
)  # fmt: skip


def _zoom(lens: BrownConrady, width: int, height: int, settings: Infer) -> float:
    try:
        return zoom(lens, width, height, settings.crop)
    except ValueError as fault:
        raise ImgtoolError(f"--crop {settings.crop}: {fault}", "take --crop same", USAGE) from None


def _straight(
    photo: Photo, lens: BrownConrady, larger: float, settings: Infer, watch: Watch
) -> tuple[Pixels, Pixels | None]:
    """Return the straight photo, and its alpha where it has one or is to get one."""
    border = "replicate" if settings.border == "transparent" else settings.border
    way = settings.interpolation
    image = warp.straighten(photo.pixels, lens, larger, interpolation=way, border=border, done=watch.done)
    if photo.alpha is not None:
        edge = "black" if settings.border == "transparent" else settings.border
        return image, warp.straighten(photo.alpha, lens, larger, interpolation="linear", border=edge)
    if settings.border != "transparent":
        return image, None
    height, width = photo.pixels.shape[:2]
    return image, convert(warp.coverage(lens, larger, width, height), photo.pixels.dtype)


def _facts(
    found: estimate.Found, lens: BrownConrady, larger: float, width: int, height: int
) -> dict[str, Any]:
    """Return the engine's part of the JSON contract."""
    unit = diagonal(width, height) / 2
    guess = found.estimate
    return {
        "k1": lens.k1,
        "k2": lens.k2,
        "p1": lens.p1,
        "p2": lens.p2,
        "normalisation": HALF_DIAGONAL,
        "camera_matrix": [[unit, 0.0, (width - 1) / 2], [0.0, unit, (height - 1) / 2], [0.0, 0.0, 1.0]],
        "width": width,
        "height": height,
        "corner_percent": 50 * lens.corner,
        "method": found.method,
        "reason": found.reason,
        "together": found.together,
        "zoom": larger,
        "confidence": guess.confidence if guess else None,
        "risk": guess.risk if guess else None,
        "expected_error_percent": guess.error if guess else None,
    } | ({"k3": lens.k3, "cx": lens.cx, "cy": lens.cy} if (lens.k3, lens.cx, lens.cy) != (0, 0, 0) else {})


def radial(image: Pixels, k1: float = -0.03) -> Pixels:
    """Straighten classically: one fixed coefficient for every photo, by OpenCV's own ``cv2.undistort``."""
    height, width = image.shape[:2]
    unit = diagonal(width, height) / 2
    matrix = np.array([[unit, 0, (width - 1) / 2], [0, unit, (height - 1) / 2], [0, 0, 1]])
    return np.asarray(cv2.undistort(image, matrix, np.array([k1, 0.0, 0.0, 0.0])))


ENGINE: Engine = Engine(
    name="lens",
    model=Model,
    build=model.build,
    data=model.load,
    loss=model.loss,
    score=model.score,
    apply=apply,
    samples=model.samples,
    tiles=model.tile_facts,
    bench=lambda settings, lab: bench.run(settings, lab, ENGINE),
    actions=actions.ACTIONS,
    reads="rgb",
    best="ade",
    higher_is_better=False,
    scale=1,
    weights="lens-lines",
    baseline=radial,
    begin=network.begin,
    survey=estimate.survey,
    wants_survey=estimate.wants_survey,
    table="coefficients.csv",
    check=check,
    beside=lambda settings: [SUFFIXES[form] for form in forms(settings)],
    otherwise="photo",
    port=port.port,
    ported=port.ported,
)
