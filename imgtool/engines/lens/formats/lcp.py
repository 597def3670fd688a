"""Adobe LCP: the perspective model of a lens profile."""

from __future__ import annotations

from collections.abc import Mapping
from xml.etree import ElementTree

import numpy as np

from imgtool.engines.lens.formats.frame import Frame, at_focal, believed, number
from imgtool.engines.lens.formats.opencv import fit_opencv, to_opencv
from imgtool.engines.lens.formats.xml import as_texts, child, encoded
from imgtool.engines.lens.geometry import BrownConrady, diagonal
from imgtool.errors import ImgtoolError

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


def write(model: BrownConrady, width: int, height: int, facts: Mapping[str, object]) -> bytes:
    """Return a lens profile of one focal length."""
    told = as_texts(facts)
    root = ElementTree.Element("{adobe:ns:meta/}xmpmeta")
    description = child(child(root, f"{{{_RDF}}}RDF"), f"{{{_RDF}}}Description")
    description.set(f"{{{_RDF}}}about", "")
    resource = {f"{{{_RDF}}}parseType": "Resource"}
    profile = child(
        child(child(description, f"{{{_PHOTOSHOP}}}CameraProfiles"), f"{{{_RDF}}}Seq"), f"{{{_RDF}}}li"
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
            child(profile, f"{{{_CAMERA}}}{name}", text)
    perspective = child(profile, f"{{{_CAMERA}}}PerspectiveModel")
    perspective.attrib.update(resource)
    child(perspective, f"{{{_CAMERA}}}Version", "2")
    for name, value in to_lcp(model, width, height).items():
        child(perspective, f"{{{_CAMERA}}}{name}", repr(float(value)))
    return encoded(root)


def recognised(root: ElementTree.Element) -> bool:
    """Tell whether XML holds lens profiles."""
    return root.find(f".//{{{_PHOTOSHOP}}}CameraProfiles") is not None


def read(root: ElementTree.Element, frame: Frame) -> BrownConrady:
    """Return the model of lens profiles, at the photo's focal length."""
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
        values = {name: number(text, name) for name, text in _values(part).items() if name in _NAMES}
        if not any(name.startswith("RadialDistort") for name in values):
            continue
        sides = (int(number(about.get(name, "0"), name)) for name in ("ImageWidth", "ImageLength"))
        width, height = sides
        if min(width, height) < 1:
            width, height = max(frame.width, frame.height), min(frame.width, frame.height)
        model, missed = from_lcp(values, width, height)
        frame.approximated(missed * 2 / diagonal(width, height), "FocalLengthX and FocalLengthY differ")
        models.append(
            (number(about.get("FocalLength", "0"), "FocalLength"), frame.fitted(model, width, height))
        )
    if not models:
        raise ImgtoolError("its perspective model has no distortion", "RadialDistortParam1 is missing")
    return believed(at_focal(models, frame))


def _values(element: ElementTree.Element) -> dict[str, str]:
    """Return an RDF resource's simple properties: child elements or attributes, by their bare names."""
    found = {}
    inner = element.find(f"{{{_RDF}}}Description")
    for part in [element] if inner is None else [element, inner]:
        found.update({name.rpartition("}")[2]: text for name, text in part.attrib.items()})
        found.update(
            {field.tag.rpartition("}")[2]: field.text for field in part if field.text and not len(field)}
        )
    return found


def _inside(profile: ElementTree.Element, name: str) -> ElementTree.Element | None:
    return next(profile.iter(f"{{{_CAMERA}}}{name}"), None)


def _focus(entry: tuple[Mapping[str, str], ElementTree.Element]) -> float:
    return number(entry[0].get("FocusDistance", "0"), "FocusDistance")


_NAMES = frozenset(to_lcp(BrownConrady(), 3, 2))
