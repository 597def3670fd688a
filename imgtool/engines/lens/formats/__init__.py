"""Coefficient files: OpenCV, lensfun, Adobe LCP, CSV and JSON, and the conversions between them.

In every formula u is half of the diagonal in pixels, hypot(w, h) / 2, and k1, k2, k3, p1, p2, cx, cy
are those of ``geometry.BrownConrady``. All the formats describe the same direction, from the straight
picture to the photo, in other units of length; a zoom of the straight picture bends no line, so a
conversion may differ from its source by one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from imgtool import files
from imgtool.engines.lens.formats import lcp, lensfun, opencv, table, xml
from imgtool.engines.lens.formats.fits import fit
from imgtool.engines.lens.formats.frame import Frame, Say
from imgtool.engines.lens.formats.lcp import from_lcp, to_lcp
from imgtool.engines.lens.formats.lensfun import from_lensfun, to_lensfun
from imgtool.engines.lens.formats.opencv import fit_opencv, from_opencv, from_original, to_opencv
from imgtool.engines.lens.formats.table import COLUMNS
from imgtool.engines.lens.geometry import BrownConrady
from imgtool.errors import USAGE, ImgtoolError

__all__ = [
    "COLUMNS",
    "FORMS",
    "LARGEST_FILE",
    "fit",
    "fit_opencv",
    "from_lcp",
    "from_lensfun",
    "from_opencv",
    "from_original",
    "loss",
    "read",
    "to_lcp",
    "to_lensfun",
    "to_opencv",
    "write",
]

FORMS = ("opencv", "lensfun", "lcp", "json")
"""What ``write`` knows."""
LARGEST_FILE = 16_000_000
"""Bytes of a coefficient file at most."""


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
    frame = Frame(width, height, focal_mm, lambda text: say(f"{path}: {text}"))
    try:
        if len(data) > LARGEST_FILE:
            raise ImgtoolError(f"it has {len(data)} bytes, which no coefficient file has")
        return _read(data, path.suffix.lower(), name, frame)
    except ImgtoolError as fault:
        raise ImgtoolError(f"{path}: {fault.what}", fault.hint, fault.code) from None


def _read(data: bytes, suffix: str, name: str, frame: Frame) -> BrownConrady:
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
        return table.read_json(text, name, frame)
    if suffix == ".csv" or re.match(r"[^\n:]*\bk1\b[^\n:]*,", text):
        return table.read_csv(text, name, frame)
    if not start or "\0" in text:
        raise ImgtoolError("it is empty" if not start else "it is not a text file")
    return opencv.read(text, frame)


def _read_xml(text: str, frame: Frame) -> BrownConrady:
    root = xml.parsed(text)
    if root.tag == "opencv_storage":
        return opencv.read(text, frame)
    if root.tag == "lensdatabase":
        return lensfun.read(root, frame)
    if lcp.recognised(root):
        return lcp.read(root, frame)
    raise ImgtoolError("its XML is not of OpenCV, lensfun or Adobe LCP")


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
        "opencv": (".yml", opencv.write), "lensfun": (".xml", lensfun.write),
        "lcp": (".lcp", lcp.write), "json": (".json", table.write_json),
    }  # fmt: skip
    if form not in writers:
        raise ImgtoolError(f"no such form of coefficients: {form}", "there are " + ", ".join(FORMS), USAGE)
    suffix, writer = writers[form]
    return suffix, writer(model, width, height, facts)


def loss(model: BrownConrady, width: int, height: int, form: str) -> str:
    """Return what of a model a form cannot hold, one line; "" where it holds everything."""
    return lensfun.loss(model, width, height) if form == "lensfun" else ""
