"""Coefficient files: OpenCV, lensfun, Adobe LCP, CSV and JSON, and the conversions between them.

In every formula u is half of the diagonal in pixels, hypot(w, h) / 2, and k1, k2, k3, p1, p2, cx, cy
are those of ``geometry.BrownConrady``. All the formats describe the same direction, from the straight
picture to the photo, in other units of length; a zoom of the straight picture bends no line, so a
conversion may differ from its source by one.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

import cv2
import numpy as np
import numpy.typing as npt

from imgtool import files
from imgtool.engines.lens import geometry
from imgtool.engines.lens.geometry import HALF_DIAGONAL, BrownConrady, diagonal, normalise
from imgtool.errors import USAGE, ImgtoolError

Floats = npt.NDArray[np.float64]
Say = Callable[[str], None]

FORMS = ("opencv", "lensfun", "lcp", "json")
"""What ``write`` knows."""
COLUMNS = (
    "file",
    "width",
    "height",
    "k1",
    "k2",
    "p1",
    "p2",
    "corner_percent",
    "confidence",
    "method",
    "zoom",
)
"""Header of coefficients.csv; further columns may follow."""
LARGEST_FILE = 16_000_000
"""Bytes of a coefficient file at most."""
DEEPEST = 64
"""Levels of an XML file at most."""
MOST = 50.0
"""Largest coefficient that is believed."""
SHORTEST, LONGEST = 0.01, 1000.0
"""Focal lengths that are believed, in diagonals."""
SAME_ASPECT = 0.01
"""Relative difference of two aspect ratios that are still the same."""
TOLD = 0.0005
"""An approximation that misses by more, in half diagonals, is told: half a pixel of 2000."""

_RADIAL = ("k1", "k2", "k3")
_FIELDS = tuple(field.name for field in fields(BrownConrady))


# --- least squares ---------------------------------------------------------------------------


def fit(
    straight: tuple[Floats, Floats],
    photo: tuple[Floats, Floats],
    free: Sequence[str],
    start: BrownConrady = BrownConrady(),  # noqa: B008 - frozen
) -> tuple[BrownConrady, float]:
    """Fit a model and a zoom of the straight picture to pairs of points.

    Gauss-Newton with halved steps; fields that the points do not determine stay near their start.

    Args:
        straight: x and y of points of the straight picture, normalised.
        photo: x and y of the same points in the photo.
        free: Fields of ``BrownConrady`` to fit; the others are 0.
        start: Values to begin with.

    Returns:
        The model, and the largest distance that it leaves, in half diagonals.
    """
    wanted = np.concatenate(photo)

    def left(values: Floats) -> Floats:
        model = BrownConrady(**dict(zip(free, values[:-1].tolist(), strict=True)))
        return np.concatenate(model.distort(straight[0] * values[-1], straight[1] * values[-1])) - wanted

    values = np.array([getattr(start, name) for name in free] + [1.0])
    rest = left(values)
    for _ in range(50):
        slopes = [(left(values + step) - left(values - step)) / 2e-6 for step in np.eye(len(values)) * 1e-6]
        full = np.linalg.lstsq(np.stack(slopes, axis=1), -rest, rcond=1e-9)[0]
        trials = (values + full / 2**halving for halving in range(12))
        better = next(((trial, now) for trial in trials if (now := left(trial)) @ now < rest @ rest), None)
        if better is None:
            break
        moved = float(np.abs(better[0] - values).max())
        values, rest = better
        if moved < 1e-12:
            break
    model = BrownConrady(**dict(zip(free, values[:-1].tolist(), strict=True)))
    return model, float(np.hypot(*np.split(rest, 2)).max())


def radial_fit(radius: Floats, distorted: Floats) -> tuple[BrownConrady, float]:
    """Fit k1, k2 and k3, or k1 and k2 where the three would fold, to pairs of radii; see ``fit``."""
    for free in (_RADIAL, _RADIAL[:2]):
        model, left = fit((radius, np.zeros_like(radius)), (distorted, np.zeros_like(radius)), free)
        if not model.folds():
            break
    return model, left


def _frame(width: int, height: int) -> tuple[Floats, Floats]:
    """Return normalised points over a whole frame, its corners included."""
    return geometry.grid(width, height, 25, 17, part=1.0)


# --- OpenCV ----------------------------------------------------------------------------------


def to_opencv(
    model: BrownConrady, width: int, height: int, focal_px: float | None = None
) -> tuple[Floats, Floats]:
    """Return OpenCV's camera matrix and distortion coefficients.

    With s = f / u: k1 s^2, k2 s^4, k3 s^6, p1 s, p2 s, and the principal point at
    ((w - 1) / 2 + cx u, (h - 1) / 2 + cy u). Exact; what ``cv2.undistort`` gives does not depend on f.

    Args:
        model: The distortion.
        width: Of the photo, in pixels.
        height: The same.
        focal_px: f in pixels; half of the diagonal if not given, where the coefficients stay as they are.

    Returns:
        ``(3, 3)`` and ``(5,)``: k1, k2, p1, p2, k3; ``(4,)`` where k3 is 0.
    """
    unit = diagonal(width, height) / 2
    focal = focal_px or unit
    s = focal / unit
    centre = geometry.pixels(model.cx, model.cy, width, height)
    matrix = np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]], np.float64)
    values = [model.k1 * s**2, model.k2 * s**4, model.p1 * s, model.p2 * s, model.k3 * s**6]
    return matrix, np.array(values[: 5 if model.k3 else 4], np.float64)


def from_opencv(matrix: npt.ArrayLike, coefficients: npt.ArrayLike, width: int, height: int) -> BrownConrady:
    """Return the model of OpenCV's camera matrix and coefficients; see ``fit_opencv``."""
    return fit_opencv(matrix, coefficients, width, height)[0]


def fit_opencv(
    matrix: npt.ArrayLike, coefficients: npt.ArrayLike, width: int, height: int
) -> tuple[BrownConrady, float]:
    """Return the model of OpenCV's camera matrix and coefficients, and what it misses by.

    The inverse of ``to_opencv``, exact for fx = fy without skew. Other matrices stretch the picture,
    which the model cannot: then all of it and a zoom are fitted over the frame by least squares.

    Args:
        matrix: ``(3, 3)``, for a photo of this size.
        coefficients: k1, k2, p1, p2 [, k3]; longer ones only where the rest is 0.
        width: Of the photo, in pixels.
        height: The same.

    Returns:
        The model, and the largest error over the frame in pixels, up to a zoom.

    Raises:
        ImgtoolError: Values that are missing, not finite or beyond belief; a rational, thin prism or
            tilted model; or a fisheye one.
    """
    camera, values = np.asarray(matrix, np.float64), np.asarray(coefficients, np.float64).ravel()
    if camera.shape != (3, 3) or not np.isfinite(camera).all() or not np.isfinite(values).all():
        raise ImgtoolError(
            "the camera matrix and the distortion coefficients must be finite numbers, 3x3 and 4 or 5"
        )
    if len(values) < 4:
        raise ImgtoolError(f"{len(values)} distortion coefficients, at least k1, k2, p1, p2 are needed")
    if values[5:].any():
        raise ImgtoolError(
            f"OpenCV's rational, thin prism or tilted model ({len(values)} coefficients) is not supported",
            "calibrate with k1, k2, p1, p2, k3 only: cv2.calibrateCamera without CALIB_RATIONAL_MODEL",
        )
    (fx, skew, left), (_, fy, top) = camera[:2].tolist()
    size = diagonal(width, height)
    if not (SHORTEST <= fx / size <= LONGEST and SHORTEST <= fy / size <= LONGEST and abs(skew) <= fx):
        raise ImgtoolError(
            f"the focal lengths {fx:g} and {fy:g} of the camera matrix are none of {width}x{height} pixels",
            "they must be in pixels",
        )
    k1, k2, p1, p2, k3 = (*values.tolist()[:5], 0.0)[:5]
    s = size / 2 / math.sqrt(fx * fy)
    centre = normalise(left, top, width, height)
    near = _believed(BrownConrady(k1 * s**2, k2 * s**4, p1 * s, p2 * s, k3 * s**6, *centre))
    if fx == fy and not skew:
        return near, 0.0
    x, y = _frame(width, height)
    column, row = geometry.pixels(x, y, width, height)
    v = (row - top) / fy
    xd, yd = BrownConrady(k1, k2, p1, p2, k3).distort((column - left - skew * v) / fx, v)
    photo = normalise(fx * xd + skew * yd + left, fy * yd + top, width, height)
    model, missed = fit((x, y), photo, _FIELDS, near)
    return _believed(model), missed * size / 2


def from_original(
    k1: float, k2: float, p1: float, p2: float, width: int, height: int
) -> tuple[BrownConrady, float]:
    """Return the nearest model of coefficients relative to width and height, as the original has them.

    Its camera matrix [[w, 0, w / 2], [0, h, h / 2], [0, 0, 1]] distorts along ellipses, which no lens
    with square pixels does; so this is a least-squares fit, up to a zoom.

    Args:
        k1: Coefficients of the original: x / w and y / h from the middle.
        k2: The same.
        p1: The same.
        p2: The same.
        width: Of the photo, in pixels.
        height: The same.

    Returns:
        The model, and the largest error over the frame in % of the diagonal.

    Raises:
        ImgtoolError: Values that are not finite or beyond belief.
    """
    matrix = np.array([[width, 0, width / 2], [0, height, height / 2], [0, 0, 1]], np.float64)
    model, missed = fit_opencv(matrix, (k1, k2, p1, p2), width, height)
    return model, 100 * missed / diagonal(width, height)


def _write_opencv(model: BrownConrady, width: int, height: int, facts: Mapping[str, object]) -> bytes:
    focal = facts.get("focal_px")
    matrix, coefficients = to_opencv(model, width, height, float(str(focal)) if focal else None)
    store = cv2.FileStorage(".yml", cv2.FILE_STORAGE_WRITE | cv2.FILE_STORAGE_MEMORY)
    store.writeComment("imgtool lens: cv2.undistort(photo, camera_matrix, distortion_coefficients)")
    if not focal:
        store.writeComment("The focal length is nominal, and the coefficients are relative to it.")
    store.write("image_width", width)
    store.write("image_height", height)
    store.write("camera_matrix", matrix)
    store.write("distortion_coefficients", coefficients.reshape(1, -1))
    return str(store.releaseAndGetString()).encode()


_MATRIX = ("camera_matrix", "cameraMatrix", "Camera_Matrix", "K", "M", "mtx", "intrinsic_matrix")
_COEFFICIENTS = (
    "distortion_coefficients",
    "Distortion_Coefficients",
    "distCoeffs",
    "dist_coeffs",
    "D",
    "dist",
)
_WIDTH = ("image_width", "image_Width", "width")
_HEIGHT = ("image_height", "image_Height", "height")
_FISHEYE = ("equidistant", "fisheye", "kannala_brandt")


def _store(text: str) -> Any:
    """Return the root of an OpenCV file: YAML, with or without its first line, or XML."""
    if not text.lstrip().startswith(("%YAML", "<")):
        text = "%YAML:1.0\n---\n" + text.removeprefix("---\n")
    try:
        store = cv2.FileStorage(text, cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY)
    except (cv2.error, SystemError, UnicodeError):
        raise ImgtoolError("damaged: OpenCV cannot read it") from None
    return store, store.root()


def _numbers(root: Any, names: Sequence[str]) -> list[float]:
    """Return the numbers of the first node with one of these names; [] where there is none."""
    found = [name for name in names if name in root.keys()]  # noqa: SIM118 - a node is no mapping
    if not found:
        return []
    node = root.getNode(found[0])
    if node.isMap():
        node = node.getNode("data")
    cells = [node.at(place) for place in range(min(node.size(), 64))] if node.isSeq() else [node]
    if not cells or not all(cell.isReal() or cell.isInt() for cell in cells):
        raise ImgtoolError(f"{found[0]} is not made of numbers")
    return [cell.real() for cell in cells]


def _read_opencv(text: str, frame: _Frame) -> BrownConrady:
    store, root = _store(text)
    if not root.isMap():
        raise ImgtoolError("damaged: it names no values")
    matrix, coefficients = _numbers(root, _MATRIX), _numbers(root, _COEFFICIENTS)
    if len(matrix) != 9 or not coefficients:
        raise ImgtoolError(
            "it has no camera matrix with distortion coefficients",
            "they are called camera_matrix and distortion_coefficients in OpenCV's calibration files",
        )
    if root.getNode("distortion_model").string() in _FISHEYE or any(_numbers(root, ("fisheye_model",))):
        raise ImgtoolError("a fisheye calibration is not supported", "calibrate with k1, k2, p1, p2, k3")
    size = (_numbers(root, _WIDTH), _numbers(root, _HEIGHT))
    width, height = (int(one[0]) if one and math.isfinite(one[0]) else 0 for one in size)
    store.release()
    if min(width, height) < 1:
        width, height = frame.width, frame.height
        frame.say("it does not say for which size it was calibrated: taken for the size of the photo")
    model, missed = fit_opencv(np.reshape(matrix, (3, 3)), coefficients, width, height)
    frame.approximated(missed * 2 / diagonal(width, height), "fx and fy differ")
    return frame.fitted(model, width, height)


# --- lensfun ---------------------------------------------------------------------------------


def _lensfun_unit(width: int, height: int, aspect: float | None = None) -> float:
    """Return lensfun's unit of length in half diagonals.

    It is half of the shorter side, between pixel centres, of a picture with the aspect ratio of the
    calibration and the diagonal of this one.
    """
    long, short = max(width, height) - 1, max(min(width, height) - 1, 1)
    own = max(long / short, 1.0) if aspect is None else aspect
    return math.hypot(long, short) / math.hypot(own, 1) / diagonal(width, height)


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
    unit = _lensfun_unit(width, height)
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
    _believed(BrownConrady(*terms))
    unit = _lensfun_unit(width, height, aspect)
    if len(terms) == 2:
        return _believed(BrownConrady(terms[0] / unit**2, terms[1] / unit**4)), 0.0
    a, b, c = terms if len(terms) == 3 else (0.0, terms[0], 0.0)
    radius = np.linspace(0, 1, 65)
    ru = radius / unit
    model, missed = radial_fit(radius, radius * (a * ru**3 + b * ru**2 + c * ru + 1 - a - b - c))
    return _believed(model), missed


def _write_lensfun(model: BrownConrady, width: int, height: int, facts: Mapping[str, object]) -> bytes:
    told = _told(facts)
    unit = _lensfun_unit(width, height)
    root = ElementTree.Element("lensdatabase", version="1")
    missing = loss(model, width, height, "lensfun")
    if missing:
        root.append(ElementTree.Comment(f" {missing} "))
    mount = told.get("mount", "imgtool")
    if "mount" not in told:  # a mount and a camera of their own, so that the file is complete
        _child(_child(root, "mount"), "name", mount)
        camera = _child(root, "camera")
        _child(camera, "maker", told.get("maker", "imgtool"))
        _child(camera, "model", told.get("camera", "imgtool"))
        _child(camera, "mount", mount)
        _child(camera, "cropfactor", told.get("crop_factor", "1"))
    lens = _child(root, "lens")
    _child(lens, "maker", told.get("lens_maker", told.get("maker", "imgtool")))
    _child(lens, "model", told.get("lens", "imgtool lens"))
    _child(lens, "mount", mount)
    _child(lens, "cropfactor", told.get("crop_factor", "1"))
    _child(lens, "aspect-ratio", repr(max(width - 1, height - 1) / max(min(width, height) - 1, 1)))
    if model.cx or model.cy:
        lens.append(ElementTree.Element("center", x=repr(model.cx / unit), y=repr(model.cy / unit)))
    k1, k2 = to_lensfun(model, width, height)
    _child(lens, "calibration").append(
        ElementTree.Element(
            "distortion", model="poly5", focal=told.get("focal_mm", "50"), k1=f"{k1:.9g}", k2=f"{k2:.9g}"
        )
    )
    return _xml(root)


def _read_lensfun(root: ElementTree.Element, frame: _Frame) -> BrownConrady:
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
    entries = [(_attribute(entry, "focal"), entry) for entry in lens.findall("calibration/distortion")]
    aspect = _aspect((lens.findtext("aspect-ratio") or "3:2").strip())
    centre = lens.find("center")
    unit = _lensfun_unit(frame.width, frame.height, aspect)
    offset = (0.0, 0.0) if centre is None else (_attribute(centre, "x", 0.0), _attribute(centre, "y", 0.0))

    def convert(entry: ElementTree.Element) -> BrownConrady:
        model, missed = from_lensfun(_terms(entry), frame.width, frame.height, aspect)
        frame.approximated(missed, f"lensfun's {entry.get('model')} has other powers of the radius")
        return replace(model, cx=offset[0] * unit, cy=offset[1] * unit)

    return _believed(frame.upright(_at_focal([(focal, convert(entry)) for focal, entry in entries], frame)))


def _terms(entry: ElementTree.Element) -> list[float]:
    """Return the terms of one of lensfun's distortions."""
    kind = entry.get("model", "")
    names = {"poly3": ["k1"], "poly5": ["k1", "k2"], "ptlens": ["a", "b", "c"]}.get(kind)
    if names is None:
        raise ImgtoolError(f"lensfun's model {kind!r} is not supported", "poly5, poly3 and ptlens are")
    return [_attribute(entry, name, 0.0) for name in names]


def _aspect(text: str) -> float:
    above, _, below = text.partition(":")
    sides = _number(above, "aspect-ratio"), _number(below or "1", "aspect-ratio")
    if not 0 < sides[1] <= sides[0] <= 100 * sides[1]:
        raise ImgtoolError(f"its aspect-ratio {text} is none")
    return sides[0] / sides[1]


# --- Adobe LCP -------------------------------------------------------------------------------

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_PHOTOSHOP = "http://ns.adobe.com/photoshop/1.0/"
_CAMERA = "http://ns.adobe.com/photoshop/1.0/camera-profile"
for _prefix, _name in (
    ("x", "adobe:ns:meta/"),
    ("rdf", _RDF),
    ("photoshop", _PHOTOSHOP),
    ("stCamera", _CAMERA),
):
    ElementTree.register_namespace(_prefix, _name)


def to_lcp(model: BrownConrady, width: int, height: int, focal_px: float | None = None) -> dict[str, float]:
    """Return the values of an LCP's perspective model, by their names.

    As OpenCV's, with f, here FocalLengthX and Y, in units of the longer side, and the centre in shares
    of width and height from the outer edge: 1/2 + cx u / w and 1/2 + cy u / h (Adobe, "Lens profile
    creator: technical report", 2010).

    Args:
        model: The distortion.
        width: Of the photo, in pixels.
        height: The same.
        focal_px: f in pixels; half of the diagonal if not given.
    """
    unit = diagonal(width, height) / 2
    matrix, values = to_opencv(model, width, height, focal_px)
    k1, k2, p1, p2, k3 = (*values.tolist(), 0.0)[:5]
    focal = float(matrix[0, 0]) / max(width, height)
    return {
        "FocalLengthX": focal, "FocalLengthY": focal,
        "ImageXCenter": 0.5 + model.cx * unit / width, "ImageYCenter": 0.5 + model.cy * unit / height,
        "RadialDistortParam1": k1, "RadialDistortParam2": k2, "RadialDistortParam3": k3,
        "TangentialDistortParam1": p1, "TangentialDistortParam2": p2,
    }  # fmt: skip


def from_lcp(values: Mapping[str, float], width: int, height: int) -> tuple[BrownConrady, float]:
    """Return the model of an LCP's perspective model: the inverse of ``to_lcp``.

    Args:
        values: By their names; the centre is the middle where it is missing, and coefficients are 0.
        width: Of the photo, in pixels.
        height: The same.

    Returns:
        The model, and the largest error over the frame in pixels: 0, or that of a fit where
        FocalLengthX and Y differ.

    Raises:
        ImgtoolError: No FocalLengthX; see also ``fit_opencv``.
    """
    if "FocalLengthX" not in values:
        raise ImgtoolError("its perspective model has no FocalLengthX")
    side = max(width, height)
    focal = values["FocalLengthX"] * side, values.get("FocalLengthY", values["FocalLengthX"]) * side
    left = values.get("ImageXCenter", 0.5) * width - 0.5
    top = values.get("ImageYCenter", 0.5) * height - 0.5
    names = [f"RadialDistortParam{n}" for n in (1, 2)] + [f"TangentialDistortParam{n}" for n in (1, 2)]
    coefficients = [values.get(name, 0.0) for name in (*names, "RadialDistortParam3")]
    matrix = np.array([[focal[0], 0, left], [0, focal[1], top], [0, 0, 1]])
    return fit_opencv(matrix, coefficients, width, height)


def _write_lcp(model: BrownConrady, width: int, height: int, facts: Mapping[str, object]) -> bytes:
    told = _told(facts)
    root = ElementTree.Element("{adobe:ns:meta/}xmpmeta")
    description = _child(_child(root, f"{{{_RDF}}}RDF"), f"{{{_RDF}}}Description")
    description.set(f"{{{_RDF}}}about", "")
    resource = {f"{{{_RDF}}}parseType": "Resource"}
    profile = _child(
        _child(_child(description, f"{{{_PHOTOSHOP}}}CameraProfiles"), f"{{{_RDF}}}Seq"), f"{{{_RDF}}}li"
    )
    profile.attrib.update(resource)
    lens = told.get("lens", "imgtool lens")
    about = {
        "Author": "imgtool", "ProfileName": f"imgtool ({lens})", "Make": told.get("maker"),
        "Model": told.get("camera"), "Lens": lens, "LensPrettyName": lens, "CameraRawProfile": "False",
        "SensorFormatFactor": told.get("crop_factor", "1"), "ImageWidth": str(width),
        "ImageLength": str(height), "FocalLength": told.get("focal_mm"),
    }  # fmt: skip
    for name, text in about.items():
        if text:
            _child(profile, f"{{{_CAMERA}}}{name}", text)
    perspective = _child(profile, f"{{{_CAMERA}}}PerspectiveModel")
    perspective.attrib.update(resource)
    _child(perspective, f"{{{_CAMERA}}}Version", "2")
    for name, value in to_lcp(model, width, height).items():
        _child(perspective, f"{{{_CAMERA}}}{name}", repr(float(value)))
    return _xml(root)


def _values(element: ElementTree.Element) -> dict[str, str]:
    """Return an RDF resource's simple properties: child elements or attributes, by their bare names."""
    found = {}
    inner = element.find(f"{{{_RDF}}}Description")
    for part in [element] if inner is None else [element, inner]:
        found.update({name.rpartition("}")[2]: text for name, text in part.attrib.items()})
        found.update(
            {child.tag.rpartition("}")[2]: child.text for child in part if child.text and not len(child)}
        )
    return found


def _inside(profile: ElementTree.Element, name: str) -> ElementTree.Element | None:
    return next(profile.iter(f"{{{_CAMERA}}}{name}"), None)


def _read_lcp(root: ElementTree.Element, frame: _Frame) -> BrownConrady:
    profiles = root.findall(f".//{{{_PHOTOSHOP}}}CameraProfiles/*/{{{_RDF}}}li")
    found = [
        (profile, part) for profile in profiles if (part := _inside(profile, "PerspectiveModel")) is not None
    ]
    if not found:
        fisheye = any(_inside(profile, "FisheyeModel") is not None for profile in profiles)
        raise ImgtoolError("it is of a fisheye lens" if fisheye else "it has no perspective model of a lens")
    models = []
    entries = [(_values(profile), part) for profile, part in found]
    for about, part in sorted(entries, key=_focus):  # of one focal length, the farthest focus counts
        values = {name: _number(text, name) for name, text in _values(part).items() if name in _LCP_NAMES}
        if not any(name.startswith("RadialDistort") for name in values):
            continue
        sides = (int(_number(about.get(name, "0"), name)) for name in ("ImageWidth", "ImageLength"))
        width, height = sides
        if min(width, height) < 1:
            width, height = max(frame.width, frame.height), min(frame.width, frame.height)
        model, missed = from_lcp(values, width, height)
        frame.approximated(missed * 2 / diagonal(width, height), "FocalLengthX and FocalLengthY differ")
        models.append(
            (_number(about.get("FocalLength", "0"), "FocalLength"), frame.fitted(model, width, height))
        )
    if not models:
        raise ImgtoolError("its perspective model has no distortion", "RadialDistortParam1 is missing")
    return _believed(_at_focal(models, frame))


def _focus(entry: tuple[Mapping[str, str], ElementTree.Element]) -> float:
    return _number(entry[0].get("FocusDistance", "0"), "FocusDistance")


_LCP_NAMES = frozenset(to_lcp(BrownConrady(), 3, 2))


# --- CSV, JSON -------------------------------------------------------------------------------


def _row_model(row: Mapping[str, Any], frame: _Frame) -> BrownConrady:
    """Return the model of a row of coefficients.csv, of labels.jsonl or of a JSON file."""
    missing = [name for name in ("k1", "k2", "p1", "p2") if row.get(name) in (None, "")]
    if missing:
        raise ImgtoolError(
            f"it has no {', '.join(missing)}", f"coefficients.csv begins with {','.join(COLUMNS)}"
        )
    if row.get("normalisation", HALF_DIAGONAL) != HALF_DIAGONAL:
        raise ImgtoolError(
            f"its normalisation {row['normalisation']!r} is unknown", f"it must be {HALF_DIAGONAL}"
        )
    given = {name: _number(row[name], name) for name in _FIELDS if row.get(name) not in (None, "")}
    sides = [int(_number(row.get(name) or 0, name)) for name in ("width", "height")]
    width, height = sides if min(sides) > 0 else (frame.width, frame.height)
    return frame.fitted(_believed(BrownConrady(**given)), width, height)


def _of_name(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """Return the row of a photo: the one of its path, else of its bare name, else the only one."""
    if not rows:
        raise ImgtoolError("it has no coefficients")
    if len(rows) == 1:
        return rows[0]
    for same in (str, lambda text: Path(text).name):
        found = [row for row in rows if name and same(str(row.get("file") or "")) == same(name)]
        if len({json.dumps([row.get(field) for field in _FIELDS]) for row in found}) == 1:
            return found[0]
    about = f"not one for {name}" if name else "none of them named"
    raise ImgtoolError(f"it has {len(rows)} rows, {about}", "the column file must name the photo")


def _read_csv(text: str, name: str, frame: _Frame) -> BrownConrady:
    try:
        rows = list(csv.DictReader(io.StringIO(text), skipinitialspace=True))
    except csv.Error as fault:
        raise ImgtoolError(f"damaged: {fault}") from None
    return _row_model(_of_name(rows, name), frame)


def _read_json(text: str, name: str, frame: _Frame) -> BrownConrady:
    try:
        found = json.loads(text)
    except ValueError:  # perhaps one object a line
        found = [_object(line) for line in text.splitlines() if line.strip()]
    except RecursionError:
        raise ImgtoolError("damaged: nested too deeply") from None
    rows = found if isinstance(found, list) else [found]
    if not all(isinstance(row, dict) for row in rows):
        raise ImgtoolError("it is not an object with k1, k2, p1, p2")
    return _row_model(_of_name(rows, name), frame)


def _object(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise ImgtoolError("damaged: it is not JSON") from None


def _write_json(model: BrownConrady, width: int, height: int, facts: Mapping[str, object]) -> bytes:
    record = {"normalisation": HALF_DIAGONAL, "width": width, "height": height, **asdict(model)}
    return (json.dumps({**facts, **record}, indent=2, ensure_ascii=False, default=str) + "\n").encode()


# --- reading and writing ---------------------------------------------------------------------


class _Frame(NamedTuple):
    """The photo that coefficients are read for."""

    width: int
    height: int
    focal_mm: float | None
    say: Say

    def approximated(self, missed: float, why: str) -> None:
        """Tell of an approximation that can be seen; ``missed`` in half diagonals."""
        if missed > TOLD:
            wrong = missed * diagonal(self.width, self.height) / 2
            self.say(f"approximated, wrong by {wrong:.1f} pixels at most: {why}")

    def fitted(self, model: BrownConrady, width: int, height: int) -> BrownConrady:
        """Return the model of a picture of another size for the photo.

        Raises:
            ImgtoolError: The pictures differ in their aspect.
        """
        own = self.width / self.height
        if abs(width / height / own - 1) <= SAME_ASPECT:
            return model
        if abs(height / width / own - 1) <= SAME_ASPECT:
            return self.upright(model, turned=True)
        raise ImgtoolError(
            f"its coefficients are for {width}x{height} pixels, the photo has {self.width}x{self.height}",
            "photos of another aspect were cropped: calibrate them apart",
        )

    def upright(self, model: BrownConrady, turned: bool | None = None) -> BrownConrady:
        """Return the radial part where the camera was turned: which way is not known."""
        turned = self.height > self.width if turned is None else turned
        if turned and (model.p1 or model.p2 or model.cx or model.cy):
            self.say("the photo is turned against its calibration: p1, p2 and the centre are left out")
            return replace(model, p1=0.0, p2=0.0, cx=0.0, cy=0.0)
        return model


def read(
    path: Path,
    width: int,
    height: int,
    name: str = "",
    focal_mm: float | None = None,
    say: Say = lambda text: None,
) -> BrownConrady:
    """Read a coefficient file of any form.

    Forms are told apart by content: OpenCV's YAML or XML, lensfun's XML, LCP, JSON (an object, or one
    a line), and CSV. Coefficients of a photo of another size serve where the aspect is the same.

    Args:
        path: The file.
        width: Of the photo that it is read for, in pixels.
        height: The same.
        name: The photo's file: its row is taken where there are many.
        focal_mm: The photo's focal length: lensfun and LCP files may have many.
        say: Told, in one line, of everything that could not be taken over exactly.

    Raises:
        ImgtoolError: Code 2 where there is no such file; else a file that is damaged, that has no
            distortion, or none for this photo.
    """
    data = files.read(path)
    frame = _Frame(width, height, focal_mm, lambda text: say(f"{path}: {text}"))
    try:
        if len(data) > LARGEST_FILE:
            raise ImgtoolError(f"it has {len(data)} bytes, which no coefficient file has")
        return _read(data, path.suffix.lower(), name, frame)
    except ImgtoolError as fault:
        raise ImgtoolError(f"{path}: {fault.what}", fault.hint, fault.code) from None


def _read(data: bytes, suffix: str, name: str, frame: _Frame) -> BrownConrady:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ImgtoolError(
            "it is not a text file in UTF-8", "YAML, XML, LCP, CSV and JSON files are read"
        ) from None
    start = text.lstrip()[:1]
    if start == "<":
        return _read_xml(text, frame)
    if start in ("{", "["):
        return _read_json(text, name, frame)
    if suffix == ".csv" or re.match(r"[^\n:]*\bk1\b[^\n:]*,", text):
        return _read_csv(text, name, frame)
    if not start or "\0" in text:
        raise ImgtoolError("it is empty" if not start else "it is not a text file")
    return _read_opencv(text, frame)


def _read_xml(text: str, frame: _Frame) -> BrownConrady:
    root = _parsed(text)
    if root.tag == "opencv_storage":
        return _read_opencv(text, frame)
    if root.tag == "lensdatabase":
        return _read_lensfun(root, frame)
    if root.find(f".//{{{_PHOTOSHOP}}}CameraProfiles") is not None:
        return _read_lcp(root, frame)
    raise ImgtoolError("its XML is not of OpenCV, lensfun or Adobe LCP")


def _parsed(text: str) -> ElementTree.Element:
    """Parse XML that has no document type, hence no entities, and is not nested deeply."""
    depth = 0

    def refuse(*_: object) -> None:
        raise ImgtoolError(
            "its XML has a document type, which may hold entities", "remove the line <!DOCTYPE ...>"
        )

    def start(*_: object) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise ImgtoolError("its XML is nested too deeply")

    def end(_: object) -> None:
        nonlocal depth
        depth -= 1

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    data = text.encode()
    try:
        parser.Parse(data, True)
        return ElementTree.fromstring(data)
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as fault:
        raise ImgtoolError(f"damaged XML: {fault}") from None


def write(
    model: BrownConrady, width: int, height: int, form: str, facts: Mapping[str, object]
) -> tuple[str, bytes]:
    """Return the suffix and the content of a coefficient file.

    Args:
        model: The distortion.
        width: Of the photo, in pixels.
        height: The same.
        form: One of ``FORMS``.
        facts: What is known beside: "maker", "camera", "lens", "lens_maker", "mount", "focal_mm",
            "crop_factor", "focal_px"; JSON takes all of them, whatever they are called.

    Raises:
        ImgtoolError: Code 2: no such form. ``loss`` says what a form cannot hold.
    """
    writers = {
        "opencv": (".yml", _write_opencv), "lensfun": (".xml", _write_lensfun),
        "lcp": (".lcp", _write_lcp), "json": (".json", _write_json),
    }  # fmt: skip
    if form not in writers:
        raise ImgtoolError(f"no such form of coefficients: {form}", "there are " + ", ".join(FORMS), USAGE)
    suffix, writer = writers[form]
    return suffix, writer(model, width, height, facts)


def loss(model: BrownConrady, width: int, height: int, form: str) -> str:
    """Return what of a model a form cannot hold, one line; "" where it holds everything."""
    if form != "lensfun":
        return ""
    unit = _lensfun_unit(width, height)
    k1, k2 = to_lensfun(model, width, height)
    kept = BrownConrady(k1 / unit**2, k2 / unit**4, cx=model.cx, cy=model.cy)
    if kept.folds():
        return "lensfun has no p1, p2 and k3: the rest folds"
    x, y = _frame(width, height)
    straight = kept.undistort(*model.distort(x, y), 20)
    wrong = geometry.apart(straight[0] + 1j * straight[1], x + 1j * y).max() * diagonal(width, height) / 2
    return f"lensfun has no p1, p2 and k3: wrong by {wrong:.1f} pixels at most" if wrong >= 0.05 else ""


def _at_focal(models: Sequence[tuple[float, BrownConrady]], frame: _Frame) -> BrownConrady:
    """Return the model at the photo's focal length, between two of them linearly."""
    byfocal = dict(sorted(models, key=lambda pair: pair[0]))
    if len(byfocal) == 1:
        return next(iter(byfocal.values()))
    if not frame.focal_mm:
        least, most = min(byfocal), max(byfocal)
        raise ImgtoolError(
            f"it has {len(byfocal)} focal lengths, {least:g} to {most:g} mm, and the photo's is unknown",
            "keep the calibration of the photo's focal length only",
        )
    table = np.array([[getattr(model, field) for field in _FIELDS] for model in byfocal.values()])
    values = [float(np.interp(frame.focal_mm, list(byfocal), column)) for column in table.T]
    return BrownConrady(*values)


def _number(text: object, name: str) -> float:
    try:
        value = float(str(text))
    except ValueError:
        raise ImgtoolError(f"{name} is {str(text)[:40]!r}, not a number") from None
    if not math.isfinite(value):
        raise ImgtoolError(f"{name} is {value}, not a finite number")
    return value


def _attribute(element: ElementTree.Element, name: str, default: float | None = None) -> float:
    text = element.get(name)
    if text is None:
        if default is None:
            raise ImgtoolError(f"{element.tag} has no {name}")
        return default
    return _number(text, name)


def _believed(model: BrownConrady) -> BrownConrady:
    """Return the model where its values are finite and not beyond belief."""
    for name, value in asdict(model).items():
        if not abs(value) <= MOST:
            raise ImgtoolError(
                f"{name} would be {value:.3g} half diagonals, which no lens has", "check the units"
            )
    return model


def _child(parent: ElementTree.Element, tag: str, text: str = "") -> ElementTree.Element:
    child = ElementTree.SubElement(parent, tag)
    child.text = text or None
    return child


def _xml(root: ElementTree.Element) -> bytes:
    ElementTree.indent(root)
    data: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _told(facts: Mapping[str, object]) -> dict[str, str]:
    """Return facts as texts without control characters, which XML cannot hold; empty ones are left out."""
    texts = {
        name: "".join(filter(str.isprintable, str(value)))
        for name, value in facts.items()
        if value is not None
    }
    return {name: text for name, text in texts.items() if text}
