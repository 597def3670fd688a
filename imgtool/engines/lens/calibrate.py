"""Calibration of a camera from photos of a chessboard, with OpenCV.

Corners are found by sectors (Duda and Frese, "Accurate detection and localization of checkerboard
corners", BMVC 2018), where that fails by the classic detector, and the camera follows from all boards
together (Zhang, "A flexible new technique for camera calibration", PAMI 2000) with square pixels.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from imgtool import files, images
from imgtool.engine import Watch
from imgtool.engines.lens import formats
from imgtool.engines.lens.geometry import HALF_DIAGONAL, BrownConrady, diagonal
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.engines.lens.settings import Calibrate

Floats = npt.NDArray[np.float64]
Size = tuple[int, int]

FEWEST = 3
"""Boards needed."""
OUTLIER = 3.0
"""A board whose error is above so many medians is left out."""
CLEARLY = 0.9
"""k3 is kept where it lowers the error to this share or below."""
LARGE_ERROR = 1.0
"""Pixels of error above which a calibration deserves distrust."""
MAGNIFIED = 20
_BASE = cv2.CALIB_FIX_ASPECT_RATIO
_STOP = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 60, 1e-6)


@dataclass(frozen=True)
class Board:
    """A photo of the board: its file and the corners in pixels, ``(N, 2)`` float32."""

    path: Path
    corners: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Camera:
    """A calibration.

    Attributes:
        matrix: OpenCV's camera matrix ``(3, 3)``.
        coefficients: k1, k2, p1, p2, k3, relative to the focal length.
        deviations: Standard deviations of f, cx, cy (pixels), k1, k2, p1, p2, k3.
        rms: Root mean square distance of corners from where they should be, in pixels.
        boards: The boards used.
        errors: The same as ``rms`` of each.
        residuals: ``(N, 2)`` of each: found less expected, in pixels.
        size: Width and height of the photos.
    """

    matrix: Floats
    coefficients: Floats
    deviations: Floats
    rms: float
    boards: Sequence[Board]
    errors: Sequence[float]
    residuals: Sequence[Floats]
    size: Size

    @property
    def model(self) -> BrownConrady:
        """Return the distortion in the half-diagonal normalisation."""
        return formats.from_opencv(self.matrix, self.coefficients, *self.size)

    @property
    def spread(self) -> dict[str, float]:
        """Return the standard deviations of the model's coefficients, with the focal length as it is."""
        unit = diagonal(*self.size) / 2
        s = unit / self.matrix[0, 0]
        _, cx, cy, k1, k2, p1, p2, k3 = self.deviations.tolist()
        return {
            "k1": k1 * s**2, "k2": k2 * s**4, "p1": p1 * s, "p2": p2 * s, "k3": k3 * s**6,
            "cx": cx / unit, "cy": cy / unit,
        }  # fmt: skip


def pattern_of(text: str) -> Size:
    """Return inner corners per row and column of "9x6".

    Raises:
        ImgtoolError: Code 2: not of that form, or fewer than 3 either way.
    """
    found = re.fullmatch(r"(\d+)\s*[xX×]\s*(\d+)", text.strip())
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if min(size) < 3 or max(size) > 100:
        raise ImgtoolError(
            f"--pattern {text} is not COLUMNSxROWS of inner corners", "for example --pattern 9x6", USAGE
        )
    return size


def find_corners(picture: npt.NDArray[Any], pattern: Size) -> npt.NDArray[np.float32] | None:
    """Find the inner corners of a chessboard, row by row, to a part of a pixel.

    Args:
        picture: ``(H, W, 3)`` or ``(H, W)`` uint8.
        pattern: Inner corners per row and per column.

    Returns:
        ``(N, 2)``, x and y of pixel centres, or None where no whole board is seen.
    """
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) if picture.ndim == 3 else picture
    flags = cv2.CALIB_CB_NORMALIZE_IMAGE | cv2.CALIB_CB_EXHAUSTIVE | cv2.CALIB_CB_ACCURACY
    found, corners = cv2.findChessboardCornersSB(grey, pattern, flags=flags)
    if not found:
        flags = cv2.CALIB_CB_NORMALIZE_IMAGE | cv2.CALIB_CB_ADAPTIVE_THRESH
        found, corners = cv2.findChessboardCorners(grey, pattern, flags=flags)
        if not found:
            return None
        corners = cv2.cornerSubPix(grey, corners, _window(corners, pattern), (-1, -1), _STOP)
    return np.asarray(corners, np.float32).reshape(-1, 2)


def refined(
    picture: npt.NDArray[Any], corners: npt.NDArray[np.float32], pattern: Size
) -> npt.NDArray[np.float32]:
    """Return corners placed again by the gradients around each (Foerstner), ``(N, 2)``.

    Which of the two is better depends on the photos: on sharp small ones this, on soft ones the other.
    """
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) if picture.ndim == 3 else picture
    moved = cv2.cornerSubPix(grey, corners[:, None].copy(), _window(corners, pattern), (-1, -1), _STOP)
    return np.asarray(moved, np.float32).reshape(-1, 2)


def _window(corners: npt.NDArray[Any], pattern: Size) -> Size:
    """Return the half window of the search around a corner, which no other corner may enter."""
    grid = corners.reshape(pattern[1], pattern[0], 2)
    steps = [np.linalg.norm(np.diff(grid, axis=axis), axis=-1).min() for axis in (0, 1)]
    half = int(np.clip(min(steps) / 3, 2, 11))
    return half, half


def _solved(boards: Sequence[Board], pattern: Size, square: float, size: Size, flags: int) -> Camera:
    across, down = pattern
    flat = np.zeros((across * down, 3), np.float32)
    flat[:, :2] = np.mgrid[0:across, 0:down].T.reshape(-1, 2) * square
    seen = [board.corners.reshape(-1, 1, 2) for board in boards]
    rms, matrix, coefficients, turns, shifts, deviations, _, errors = cv2.calibrateCameraExtended(
        [flat] * len(boards), seen, size, np.eye(3), np.zeros(5), flags=flags
    )
    residuals = []
    for board, turn, shift in zip(boards, turns, shifts, strict=True):
        expected = cv2.projectPoints(flat, turn, shift, matrix, coefficients)[0].reshape(-1, 2)
        residuals.append(np.asarray(board.corners - expected, np.float64))
    wanted = np.asarray(deviations, np.float64).ravel()[[1, 2, 3, 4, 5, 6, 7, 8]]  # fx follows fy
    return Camera(
        np.asarray(matrix, np.float64), np.asarray(coefficients, np.float64).ravel()[:5], wanted, float(rms),
        boards, np.asarray(errors).ravel().tolist(), residuals, size,
    )  # fmt: skip


def _folds(camera: Camera) -> bool:
    try:
        return camera.model.folds()
    except ImgtoolError:  # coefficients beyond belief
        return True


def _best(boards: Sequence[Board], pattern: Size, square: float, size: Size) -> Camera:
    """Return the calibration without k3, or with it where that is clearly better and does not fold."""
    plain = _solved(boards, pattern, square, size, _BASE | cv2.CALIB_FIX_K3)
    more = _solved(boards, pattern, square, size, _BASE)
    return more if more.rms <= CLEARLY * plain.rms and not _folds(more) else plain


def solve(boards: Sequence[Board], pattern: Size, square: float, size: Size) -> tuple[Camera, dict[str, str]]:
    """Calibrate a camera; boards that fit the others badly are left out.

    Args:
        boards: At least ``FEWEST``.
        pattern: Inner corners per row and column.
        square: Edge of a square; only the unit of the boards' positions depends on it.
        size: Width and height of the photos.

    Returns:
        The calibration, and the reason why each board left out was.

    Raises:
        ImgtoolError: Too few boards, views that do not determine the camera, or a model that folds.
    """
    left_out: dict[str, str] = {}
    used = list(boards)
    camera = None
    while len(used) >= FEWEST:
        try:
            camera = _best(used, pattern, square, size)
        except cv2.error:
            raise ImgtoolError("the boards do not determine the camera", _ADVICE) from None
        limit = OUTLIER * float(np.median(camera.errors))
        bad = {board.path for board, error in zip(used, camera.errors, strict=True) if error > limit}
        for board, error in zip(used, camera.errors, strict=True):
            if board.path in bad:
                left_out[str(board.path)] = (
                    f"off by {error:.2f} px, {OUTLIER:g} times the median is {limit:.2f}"
                )
        used = [board for board in used if board.path not in bad]
        if not bad:
            break
        camera = None
    if camera is None:
        raise ImgtoolError(f"{len(used)} usable boards, at least {FEWEST} are needed", _ADVICE)
    if not np.isfinite(camera.rms) or _folds(camera):
        raise ImgtoolError(
            f"the calibration folds inside the frame (rms {camera.rms:.2f} px): it is wrong", _ADVICE
        )
    return camera, left_out


_ADVICE = (
    "take ten or more sharp photos of a flat board, tilted differently, also in the corners of the frame"
)


# --- the action ------------------------------------------------------------------------------------


def _found(
    paths: Sequence[Path], pattern: Size, watch: Watch
) -> tuple[list[tuple[Board, Board]], list[Path], Size, dict[str, str]]:
    """Return the boards of the commonest size, all photos of that size, the size, and reasons.

    A board comes twice: as it was found, and ``refined``.
    """
    sizes: dict[Path, Size] = {}
    corners: dict[Path, tuple[npt.NDArray[np.float32], ...] | None] = {}
    left_out: dict[str, str] = {}
    for number, path in enumerate(paths, 1):
        try:
            picture = images.read_rgb8(path)
        except ImgtoolError as fault:
            left_out[str(path)] = fault.what
        else:
            sizes[path] = (picture.shape[1], picture.shape[0])
            seen = find_corners(picture, pattern)
            corners[path] = None if seen is None else (seen, refined(picture, seen, pattern))
        watch.done(number, len(paths))
    if not sizes:
        raise ImgtoolError("no photo could be read", "; ".join(left_out.values()))
    size = Counter(sizes.values()).most_common(1)[0][0]
    boards = []
    for path, own in sizes.items():
        both = corners[path]
        if own != size:
            left_out[str(path)] = f"{own[0]}x{own[1]} pixels, most are {size[0]}x{size[1]}"
        elif both is None:
            left_out[str(path)] = "no whole board of {}x{} inner corners found".format(*pattern)
        else:
            boards.append((Board(path, both[0]), Board(path, both[1])))
    return boards, [path for path, own in sizes.items() if own == size], size, left_out


def _yaml(camera: Camera) -> bytes:
    store = cv2.FileStorage(".yml", cv2.FILE_STORAGE_WRITE | cv2.FILE_STORAGE_MEMORY)
    store.write("image_width", camera.size[0])
    store.write("image_height", camera.size[1])
    store.write("camera_matrix", camera.matrix)
    store.write("distortion_coefficients", camera.coefficients.reshape(1, -1))
    store.write("avg_reprojection_error", camera.rms)
    return str(store.releaseAndGetString()).encode()


def _labels(camera: Camera, photos: Sequence[Path], folder: Path) -> bytes:
    """Return a label of every photo; paths outside the folder are absolute."""
    width, height = camera.size
    lines = []
    for path in photos:
        real, home = path.resolve(), folder.resolve()
        file = real.relative_to(home).as_posix() if real.is_relative_to(home) else str(real)
        row = {"file": file, "width": width, "height": height, **asdict(camera.model), "rms": camera.rms}
        lines.append(json.dumps(row) + "\n")
    return "".join(lines).encode()


def _drawing(camera: Camera) -> bytes:
    """Draw all corners on white and, from each, its residual ``MAGNIFIED`` times longer, as PNG."""
    width, height = camera.size
    sheet = np.full((height, width, 3), 255, np.uint8)
    thick = max(round(diagonal(width, height) / 900), 1)
    for board, residuals in zip(camera.boards, camera.residuals, strict=True):
        for place, residual in zip(board.corners, residuals, strict=True):
            start, end = np.rint(place).astype(int), np.rint(place + MAGNIFIED * residual).astype(int)
            cv2.line(sheet, start.tolist(), end.tolist(), (38, 38, 220), thick, cv2.LINE_AA)
            cv2.circle(sheet, start.tolist(), 2 * thick, (235, 99, 37), -1, cv2.LINE_AA)
    words = f"{len(camera.boards)} boards, rms {camera.rms:.2f} px, residuals x{MAGNIFIED}"
    size = max(width, 400) / 1600
    cv2.putText(
        sheet, words, (4 * thick, round(36 * size)), cv2.FONT_HERSHEY_SIMPLEX, size, (60, 60, 60), thick
    )
    return cv2.imencode(".png", sheet)[1].tobytes()


def _facts(camera: Camera) -> dict[str, object]:
    model = camera.model
    return {
        "width": camera.size[0],
        "height": camera.size[1],
        "rms": camera.rms,
        "camera_matrix": camera.matrix.tolist(),
        "distortion_coefficients": camera.coefficients.tolist(),
        "normalisation": HALF_DIAGONAL,
        **asdict(model),
        "deviations": {name: float(value) for name, value in camera.spread.items()},
        "focal_deviation": float(camera.deviations[0]),
        "corner_percent": 50 * model.corner,
    }


def calibrate(settings: Calibrate, watch: Watch) -> Mapping[str, object]:
    """Calibrate a camera and write ``camera.yml``, ``camera.json``, ``labels.jsonl`` and ``corners.png``.

    Returns:
        The record: the calibration in OpenCV's and in the half-diagonal normalisation with standard
        deviations, the boards used with the error of each in pixels, and why others were left out.

    Raises:
        ImgtoolError: Code 2: a pattern that is none, no such files, outputs that exist. Code 1: fewer
            than three boards, or a calibration that folds.
    """
    pattern = pattern_of(settings.pattern)
    names = ("camera.yml", "camera.json", "labels.jsonl", "corners.png")
    for name in names:
        if os.path.lexists(settings.out / name):
            raise ImgtoolError(f"{settings.out / name} exists", "name another folder by -o", USAGE)
    items = files.expand([str(board) for board in settings.boards], images.READABLE)
    paths = [item.source for item in items if item.source is not None]
    boards, photos, size, left_out = _found(paths, pattern, watch)
    if len(boards) < FEWEST:
        raise ImgtoolError(
            f"{len(boards)} of {len(paths)} photos show a board of {pattern[0]}x{pattern[1]} inner corners, "
            f"at least {FEWEST} are needed",
            "count the inner corners, not the squares: --pattern COLUMNSxROWS",
        )
    ways = [solve(way, pattern, settings.square, size) for way in zip(*boards, strict=True)]
    camera, outliers = min(ways, key=lambda way: way[0].rms)
    left_out |= outliers
    for name, reason in left_out.items():
        watch.say(f"left out {name}: {reason}")
    if camera.rms > LARGE_ERROR:
        watch.say(f"the error of {camera.rms:.2f} px is large: the board may be bent or the photos blurred")
    facts = _facts(camera)
    used = {str(board.path): error for board, error in zip(camera.boards, camera.errors, strict=True)}
    contents = (
        _yaml(camera), (json.dumps(facts, indent=2) + "\n").encode(),
        _labels(camera, photos, settings.out), _drawing(camera),
    )  # fmt: skip
    for name, content in zip(names, contents, strict=True):
        files.write(settings.out / name, content)
    return {"folder": str(settings.out), **facts, "boards": len(used), "errors": used, "left_out": left_out}
