"""What LibRaw makes of a mosaic, by way of a DNG: the rival in every comparison.

``noise_thr`` of rawpy 0.28 ends the process; it has no place here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imgtool import dng, raw
from imgtool.mosaic import SRGB_TO_XYZ

if TYPE_CHECKING:
    from imgtool.mosaic import Mosaic

Picture = npt.NDArray[Any]

MARGIN = 8
"""Pixels at the edges that no comparison counts: some of the algorithms leave the outermost half done."""


class Way(NamedTuple):
    """One way to use LibRaw.

    Attributes:
        demosaic: Its algorithm.
        fbdd: Reduce noise before demosaicing, in full.
        median: Passes of the median filter on the differences of colours.
    """

    demosaic: str
    fbdd: bool = False
    median: int = 0


DEFAULT = "AHD"
"""LibRaw's own choice."""

WAYS: Mapping[str, Way] = {
    "LINEAR": Way("LINEAR"),
    "AHD": Way("AHD"),
    "DHT": Way("DHT"),
    "AAHD": Way("AAHD"),
    "AHD+fbdd": Way("AHD", fbdd=True),
    "AHD+med2": Way("AHD", median=2),
}


def develop(path: Path, way: Way = WAYS[DEFAULT], bits: int = 8) -> Picture:
    """Render a camera RAW file in this process: the camera's balance, no automatic brightness.

    Args:
        path: The file; one that is broken may end the process.
        way: How.
        bits: Of the result, 8 or 16.

    Returns:
        ``(H, W, 3)`` sRGB, upright.

    Raises:
        ImgtoolError: It cannot be decoded.
    """
    import rawpy

    with raw.faults(str(path)), rawpy.imread(str(path)) as opened:
        return finish(opened, way, bits)


def finish(opened: Any, way: Way = WAYS[DEFAULT], bits: int = 8) -> Picture:
    """Render an open ``rawpy.RawPy``; see ``develop``."""
    import rawpy

    noise = rawpy.FBDDNoiseReductionMode
    picture: Picture = opened.postprocess(
        demosaic_algorithm=rawpy.DemosaicAlgorithm[way.demosaic],
        fbdd_noise_reduction=noise.Full if way.fbdd else noise.Off,
        median_filter_passes=way.median,
        use_camera_wb=True,
        no_auto_bright=True,
        adjust_maximum_thr=0.0,
        gamma=(2.4, 12.92),
        output_color=rawpy.ColorSpace.sRGB,
        output_bps=bits,
    )
    return picture


def plain(mosaic: Mosaic) -> Mosaic:
    """Return a mosaic of a camera that LibRaw does not know: it keeps to what the file says.

    It is not turned, whole, and has a balance and a matrix, which change nothing where it had none.
    """
    gains = mosaic.gains or mosaic.daylight or (1.0, 1.0, 1.0)
    return replace(
        mosaic, gains=gains, xyz_to_camera=_matrix(mosaic), crop=None, flip=0, camera="", noise=None, exif={}
    )


def _matrix(mosaic: Mosaic) -> npt.NDArray[np.float64]:
    """Return CIE XYZ to camera, up to a factor of each row, which LibRaw takes out."""
    if mosaic.xyz_to_camera is not None:
        return mosaic.xyz_to_camera
    matrix = np.eye(3) if mosaic.matrix is None else mosaic.matrix
    return np.asarray(np.linalg.inv(matrix) @ np.linalg.inv(SRGB_TO_XYZ), np.float64)


def of_mosaic(mosaic: Mosaic, names: Iterable[str] = (DEFAULT,), bits: int = 8) -> dict[str, Picture]:
    """Return what LibRaw makes of a mosaic.

    Args:
        mosaic: The frame.
        names: Some of ``WAYS``.
        bits: Of the results.

    Returns:
        Name to ``(H, W, 3)`` sRGB of the whole frame, not turned.
    """
    with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
        path = Path(folder, "frame.dng")
        dng.write(path, plain(mosaic))
        return {name: develop(path, WAYS[name], bits) for name in names}
