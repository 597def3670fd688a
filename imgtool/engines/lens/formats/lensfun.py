"""lensfun: poly5, and poly3 and ptlens read, in a database of one lens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np

from imgtool.engines.lens import geometry
from imgtool.engines.lens.formats.fits import fit, points, radial_fit
from imgtool.engines.lens.formats.frame import Frame, at_focal, believed, number
from imgtool.engines.lens.formats.xml import as_texts, attribute, child, encoded
from imgtool.engines.lens.geometry import BrownConrady, diagonal
from imgtool.errors import ImgtoolError


def to_lensfun(model: BrownConrady, width: int, height: int) -> tuple[float, float]:
    """Return k1 and k2 of lensfun's poly5, rd = ru (1 + k1 ru^2 + k2 ru^4).

    With n the half of the shorter side in half diagonals: k1 n^2 and k2 n^4; lensfun's origin is the
    centre of distortion, its unit is n. It has no p1 and p2 (see ``loss``); with k3 it is a fit.

    Args:
        model: The distortion.
        width: Of the photo, in pixels.
        height: The same.
    """
    if model.k3:
        radius = np.linspace(0, 1 + math.hypot(model.cx, model.cy), 65)
        distorted, zero = replace(model, p1=0.0, p2=0.0, cx=0.0, cy=0.0).distort(radius, 0 * radius)
        model, _ = fit((radius, zero), (distorted, zero), ("k1", "k2"))
    unit = _unit(width, height)
    return model.k1 * unit**2, model.k2 * unit**4


def from_lensfun(
    terms: Sequence[float], width: int, height: int, aspect: float | None = None
) -> tuple[BrownConrady, float]:
    """Return the model of lensfun's terms.

    poly5 (k1, k2) is exact, see ``to_lensfun``. poly3 (k1), rd = ru (1 - k1 + k1 ru^2), and ptlens
    (a, b, c), rd = ru (a ru^3 + b ru^2 + c ru + 1 - a - b - c), are fitted up to a zoom.

    Args:
        terms: Of poly3, poly5 or ptlens, told apart by their number.
        width: Of the photo, in pixels.
        height: The same.
        aspect: Aspect ratio of the calibration, at least 1; the photo's if not given.

    Returns:
        The model, and the largest error over the frame in half diagonals.
    """
    believed(BrownConrady(*terms))
    unit = _unit(width, height, aspect)
    if len(terms) == 2:
        return believed(BrownConrady(terms[0] / unit**2, terms[1] / unit**4)), 0.0
    a, b, c = terms if len(terms) == 3 else (0.0, terms[0], 0.0)
    radius = np.linspace(0, 1, 65)
    ru = radius / unit
    model, missed = radial_fit(radius, radius * (a * ru**3 + b * ru**2 + c * ru + 1 - a - b - c))
    return believed(model), missed


def loss(model: BrownConrady, width: int, height: int) -> str:
    """Return what of a model lensfun cannot hold, one line; "" where it holds everything."""
    unit = _unit(width, height)
    k1, k2 = to_lensfun(model, width, height)
    kept = BrownConrady(k1 / unit**2, k2 / unit**4, cx=model.cx, cy=model.cy)
    if kept.folds():
        return "lensfun has no p1, p2 and k3: the rest folds"
    x, y = points(width, height)
    straight = kept.undistort(*model.distort(x, y), 20)
    wrong = geometry.apart(straight[0] + 1j * straight[1], x + 1j * y).max() * diagonal(width, height) / 2
    return f"lensfun has no p1, p2 and k3: wrong by {wrong:.1f} pixels at most" if wrong >= 0.05 else ""


def write(model: BrownConrady, width: int, height: int, facts: Mapping[str, object]) -> bytes:
    """Return a database of one lens; of a camera and a mount too where facts name no mount."""
    told = as_texts(facts)
    unit = _unit(width, height)
    root = ElementTree.Element("lensdatabase", version="1")
    missing = loss(model, width, height)
    if missing:
        root.append(ElementTree.Comment(f" {missing} "))
    mount = told.get("mount", "imgtool")
    if "mount" not in told:  # a mount and a camera of their own, so that the file is complete
        child(child(root, "mount"), "name", mount)
        camera = child(root, "camera")
        child(camera, "maker", told.get("maker", "imgtool"))
        child(camera, "model", told.get("camera", "imgtool"))
        child(camera, "mount", mount)
        child(camera, "cropfactor", told.get("crop_factor", "1"))
    lens = child(root, "lens")
    child(lens, "maker", told.get("lens_maker", told.get("maker", "imgtool")))
    child(lens, "model", told.get("lens", "imgtool lens"))
    child(lens, "mount", mount)
    child(lens, "cropfactor", told.get("crop_factor", "1"))
    child(lens, "aspect-ratio", repr(max(width - 1, height - 1) / max(min(width, height) - 1, 1)))
    if model.cx or model.cy:
        lens.append(ElementTree.Element("center", x=repr(model.cx / unit), y=repr(model.cy / unit)))
    k1, k2 = to_lensfun(model, width, height)
    child(lens, "calibration").append(
        ElementTree.Element(
            "distortion", model="poly5", focal=told.get("focal_mm", "50"), k1=f"{k1:.9g}", k2=f"{k2:.9g}"
        )
    )
    return encoded(root)


def read(root: ElementTree.Element, frame: Frame) -> BrownConrady:
    """Return the model of the only lens of a database."""
    lenses = [lens for lens in root.iter("lens") if lens.find("calibration/distortion") is not None]
    if not lenses:
        raise ImgtoolError("it has no distortion of a lens", "a lensfun file has lens/calibration/distortion")
    if len(lenses) > 1:
        raise ImgtoolError(f"it has the distortion of {len(lenses)} lenses", "keep the one of the photo")
    lens = lenses[0]
    kind = (lens.findtext("type") or "rectilinear").strip().lower()
    if kind != "rectilinear":
        raise ImgtoolError(f"its lens is {kind}", "only rectilinear lenses make lines straight")
    crop = {element.get("cropfactor") for element in lens.findall("calibration")} - {None}
    if len(crop) > 1:
        raise ImgtoolError("its lens is calibrated for several crop factors", "keep the one of the camera")
    entries = [(attribute(entry, "focal"), entry) for entry in lens.findall("calibration/distortion")]
    aspect = _aspect((lens.findtext("aspect-ratio") or "3:2").strip())
    centre = lens.find("center")
    unit = _unit(frame.width, frame.height, aspect)
    offset = (0.0, 0.0) if centre is None else (attribute(centre, "x", 0.0), attribute(centre, "y", 0.0))

    def convert(entry: ElementTree.Element) -> BrownConrady:
        model, missed = from_lensfun(_terms(entry), frame.width, frame.height, aspect)
        frame.approximated(missed, f"lensfun's {entry.get('model')} has other powers of the radius")
        return replace(model, cx=offset[0] * unit, cy=offset[1] * unit)

    return believed(frame.upright(at_focal([(focal, convert(entry)) for focal, entry in entries], frame)))


def _unit(width: int, height: int, aspect: float | None = None) -> float:
    """Return lensfun's unit of length in half diagonals.

    It is half of the shorter side, between pixel centres, of a picture with the aspect ratio of the
    calibration and the diagonal of this one.
    """
    long, short = max(width, height) - 1, max(min(width, height) - 1, 1)
    own = max(long / short, 1.0) if aspect is None else aspect
    return math.hypot(long, short) / math.hypot(own, 1) / diagonal(width, height)


def _terms(entry: ElementTree.Element) -> list[float]:
    """Return the terms of one of lensfun's distortions."""
    kind = entry.get("model", "")
    names = {"poly3": ["k1"], "poly5": ["k1", "k2"], "ptlens": ["a", "b", "c"]}.get(kind)
    if names is None:
        raise ImgtoolError(f"lensfun's model {kind!r} is not supported", "poly5, poly3 and ptlens are")
    return [attribute(entry, name, 0.0) for name in names]


def _aspect(text: str) -> float:
    above, _, below = text.partition(":")
    sides = number(above, "aspect-ratio"), number(below or "1", "aspect-ratio")
    if not 0 < sides[1] <= sides[0] <= 100 * sides[1]:
        raise ImgtoolError(f"its aspect-ratio {text} is none")
    return sides[0] / sides[1]
