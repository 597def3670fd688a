"""OpenCV: camera matrix and distortion coefficients, in YAML or XML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from imgtool.engines.lens import geometry
from imgtool.engines.lens.formats.fits import Floats, fit, points
from imgtool.engines.lens.formats.frame import FIELDS, Frame, believed
from imgtool.engines.lens.geometry import BrownConrady, diagonal, normalise
from imgtool.errors import ImgtoolError

SHORTEST, LONGEST = 0.01, 1000.0
"""Focal lengths that are believed, in diagonals."""

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
    near = believed(BrownConrady(k1 * s**2, k2 * s**4, p1 * s, p2 * s, k3 * s**6, *centre))
    if fx == fy and not skew:
        return near, 0.0
    x, y = points(width, height)
    column, row = geometry.pixels(x, y, width, height)
    v = (row - top) / fy
    xd, yd = BrownConrady(k1, k2, p1, p2, k3).distort((column - left - skew * v) / fx, v)
    photo = normalise(fx * xd + skew * yd + left, fy * yd + top, width, height)
    model, missed = fit((x, y), photo, FIELDS, near)
    return believed(model), missed * size / 2


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


def write(model: BrownConrady, width: int, height: int, facts: Mapping[str, object]) -> bytes:
    """Return OpenCV's YAML; with a nominal focal length where facts have no "focal_px"."""
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


def read(text: str, frame: Frame) -> BrownConrady:
    """Return the model of OpenCV's YAML or XML."""
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
