"""Calibration: the camera that the boards were rendered with comes back, and what is wrong is said."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from imgtool.engine import Watch
from imgtool.engines.lens import calibrate
from imgtool.engines.lens.geometry import BrownConrady, error
from imgtool.engines.lens.settings import Calibrate
from imgtool.errors import FAILED, USAGE, ImgtoolError

Array = npt.NDArray[Any]

WIDTH, HEIGHT, PATTERN = 480, 360, (7, 5)
UNIT = math.hypot(WIDTH, HEIGHT) / 2
FOCAL = 420.0
MATRIX = np.array([[FOCAL, 0, 246.0], [0, FOCAL, 174.0], [0, 0, 1]])
DISTORTION = np.array([-0.28, 0.09, 0.002, -0.0015])
TRUTH = BrownConrady(
    -0.28 * (UNIT / FOCAL) ** 2,
    0.09 * (UNIT / FOCAL) ** 4,
    0.002 * UNIT / FOCAL,
    -0.0015 * UNIT / FOCAL,
    0.0,
    (246.0 - 239.5) / UNIT,
    (174.0 - 179.5) / UNIT,
)
POSES = (
    ((0.35, 0.1, 0.02), (-3.4, -2.6, 10.0)),
    ((-0.4, 0.2, 0.1), (-4.6, -2.0, 10.5)),
    ((0.1, 0.45, -0.05), (-2.4, -2.0, 11.0)),
    ((0.1, -0.5, 0.05), (-4.4, -1.4, 9.5)),
    ((-0.3, -0.35, 0.2), (-2.0, -1.2, 10.0)),
    ((0.45, -0.2, -0.15), (-3.0, -2.2, 9.0)),
)


def render(turn: Sequence[float], shift: Sequence[float], scale: int = 2) -> Array:
    """Look at a board of 8x6 squares on grey."""
    rows, columns = np.mgrid[0 : HEIGHT * scale, 0 : WIDTH * scale].astype(np.float64)
    k1, k2, p1, p2 = DISTORTION
    xd = ((columns + 0.5) / scale - 0.5 - MATRIX[0, 2]) / FOCAL
    yd = ((rows + 0.5) / scale - 0.5 - MATRIX[1, 2]) / FOCAL
    x, y = xd, yd
    for _ in range(25):  # the fixed-point iteration of cv2.undistortPoints
        r2 = x * x + y * y
        radial = 1 + r2 * (k1 + r2 * k2)
        along, down = 2 * p1 * x * y + p2 * (r2 + 2 * x * x), p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
        x, y = (xd - along) / radial, (yd - down) / radial
    rays = np.column_stack([x.ravel(), y.ravel(), np.ones(x.size)])
    rotation = cv2.Rodrigues(np.array(turn))[0]
    homography = np.column_stack([rotation[:, 0], rotation[:, 1], np.array(shift)])
    board = np.linalg.solve(homography, rays.T)
    x, y = board[0] / board[2], board[1] / board[2]
    black = (np.floor(x) + np.floor(y)) % 2 == 0
    on = (x > -1) & (x < PATTERN[0]) & (y > -1) & (y < PATTERN[1])
    near = (x > -1.6) & (x < PATTERN[0] + 0.6) & (y > -1.6) & (y < PATTERN[1] + 0.6)
    light = np.where(on, np.where(black, 30, 225), np.where(near, 225, 120)).astype(np.uint8)
    fine = light.reshape(HEIGHT * scale, WIDTH * scale)
    return np.repeat(cv2.resize(fine, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)[..., None], 3, 2)


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boards")
    for number, pose in enumerate(POSES):
        cv2.imwrite(str(folder / f"{number}.png"), render(*pose))
    cv2.imwrite(str(folder / "empty.png"), np.full((HEIGHT, WIDTH, 3), 99, np.uint8))
    cv2.imwrite(str(folder / "larger.png"), np.full((HEIGHT + 1, WIDTH + 1, 3), 99, np.uint8))
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def done(boards: Path) -> tuple[dict[str, Any], Path, list[str]]:
    said: list[str] = []
    out = boards / "camera"
    settings = Calibrate(boards=(str(boards),), out=out, pattern="7x5", square=25.0)
    return dict(calibrate.calibrate(settings, Watch(say=said.append))), out, said


@pytest.mark.slow
def test_the_camera_of_rendered_boards_comes_back(done: tuple[dict[str, Any], Path, list[str]]) -> None:
    record = done[0]
    assert record["boards"] == len(POSES)
    assert record["rms"] < 0.1
    found = BrownConrady(*(record[name] for name in ("k1", "k2", "p1", "p2", "k3", "cx", "cy")))
    assert error(found, TRUTH, WIDTH, HEIGHT) < 0.03  # % of the diagonal: 0.2 pixels
    assert record["k1"] == pytest.approx(TRUTH.k1, abs=0.01)
    assert record["camera_matrix"][0][0] == record["camera_matrix"][1][1] == pytest.approx(FOCAL, rel=0.01)
    deviations = record["deviations"]
    for name in ("k1", "p1", "cx", "cy"):
        off = abs(record[name] - getattr(TRUTH, name))
        assert 0 < deviations[name] < 0.05
        assert off < 6 * deviations[name] + 0.002
    assert record["focal_deviation"] > 0
    assert record["corner_percent"] == pytest.approx(50 * TRUTH.corner, abs=0.5)


def test_what_was_left_out_is_told_with_its_reason(done: tuple[dict[str, Any], Path, list[str]]) -> None:
    left_out = {Path(name).name: reason for name, reason in done[0]["left_out"].items()}
    assert set(left_out) == {"empty.png", "larger.png", "broken.png"}
    assert "no whole board of 7x5" in left_out["empty.png"]
    assert left_out["larger.png"] == "481x361 pixels, most are 480x360"
    assert len(done[2]) == 3


def test_opencv_reads_the_yaml(done: tuple[dict[str, Any], Path, list[str]]) -> None:
    store = cv2.FileStorage(str(done[1] / "camera.yml"), cv2.FILE_STORAGE_READ)
    assert (store.getNode("image_width").real(), store.getNode("image_height").real()) == (WIDTH, HEIGHT)
    assert store.getNode("avg_reprojection_error").real() == pytest.approx(done[0]["rms"])
    matrix = store.getNode("camera_matrix").mat()
    coefficients = store.getNode("distortion_coefficients").mat()
    points = np.array([[[10.0, 20.0]], [[470.0, 340.0]], [[240.0, 10.0]]])
    ours = cv2.undistortPoints(points, matrix, coefficients, P=matrix)
    theirs = cv2.undistortPoints(points, MATRIX, DISTORTION, P=MATRIX)
    assert np.abs((ours - ours.mean(0)) - (theirs - theirs.mean(0))).max() < 3


def test_every_photo_of_the_size_gets_the_label(
    done: tuple[dict[str, Any], Path, list[str]], boards: Path
) -> None:
    rows = [json.loads(line) for line in (done[1] / "labels.jsonl").read_text().splitlines()]
    assert [Path(row["file"]) for row in rows] == [
        (boards / name).resolve() for name in [*(f"{n}.png" for n in range(6)), "empty.png"]
    ]
    for row in rows:
        assert (row["width"], row["height"]) == (WIDTH, HEIGHT)
        assert row["k1"] == done[0]["k1"]
        assert row["cx"] == done[0]["cx"]
    assert json.loads((done[1] / "camera.json").read_text())["normalisation"] == "half-diagonal"


def test_labels_of_photos_below_are_relative(boards: Path, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.png").write_bytes((boards / f"{number}.png").read_bytes())
    settings = Calibrate(boards=(str(tmp_path / "in"),), out=tmp_path, pattern="7x5")
    calibrate.calibrate(settings, Watch())
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["in/0.png", "in/1.png", "in/2.png"]


def test_the_corners_are_drawn(done: tuple[dict[str, Any], Path, list[str]]) -> None:
    drawn = cv2.imread(str(done[1] / "corners.png"))
    assert drawn.shape == (HEIGHT, WIDTH, 3)
    flat = np.zeros((35, 3))
    flat[:, :2] = np.mgrid[0:7, 0:5].T.reshape(-1, 2)
    place = cv2.projectPoints(flat, *map(np.array, POSES[0]), MATRIX, DISTORTION)[0].reshape(-1, 2)
    assert all((drawn[round(y), round(x)] != 255).any() for x, y in place)


def test_calibrating_again_does_not_overwrite(
    done: tuple[dict[str, Any], Path, list[str]], boards: Path
) -> None:
    with pytest.raises(ImgtoolError, match="exists") as caught:
        calibrate.calibrate(Calibrate(boards=(str(boards),), out=done[1], pattern="7x5"), Watch())
    assert caught.value.code == USAGE


@pytest.mark.parametrize("pattern", ["9", "9x", "2x6", "axb", "9x6x3", "-9x6"])
def test_a_pattern_that_is_none(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match="COLUMNSxROWS") as caught:
        calibrate.calibrate(Calibrate(boards=(str(tmp_path),), out=tmp_path, pattern=pattern), Watch())
    assert caught.value.code == USAGE


def test_too_few_boards(boards: Path, tmp_path: Path) -> None:
    two = tuple(str(boards / name) for name in ("0.png", "1.png", "empty.png"))
    with pytest.raises(ImgtoolError, match="2 of 3 photos show a board of 7x5") as caught:
        calibrate.calibrate(Calibrate(boards=two, out=tmp_path / "out", pattern="7x5"), Watch())
    assert caught.value.code == FAILED
    assert not (tmp_path / "out").exists()


# --- solving, from exact corners ------------------------------------------------------------------


def seen(distortion: Sequence[float], noise: float = 0.02) -> list[calibrate.Board]:
    """Corners of boards that a camera without any edge of its frame would see."""
    flat = np.zeros((35, 3))
    flat[:, :2] = np.mgrid[0:7, 0:5].T.reshape(-1, 2)
    rng = np.random.default_rng(0)
    found = []
    for number, pose in enumerate(POSES):
        places = cv2.projectPoints(flat, *map(np.array, pose), MATRIX, np.array(distortion))[0].reshape(-1, 2)
        corners = (places + rng.normal(0, noise, places.shape)).astype(np.float32)
        found.append(calibrate.Board(Path(f"{number}.png"), corners))
    return found


def test_a_board_that_does_not_fit_is_left_out() -> None:
    boards = seen(DISTORTION)
    bad = boards[2].corners + np.random.default_rng(1).normal(0, 4, (35, 2)).astype(np.float32)
    boards[2] = calibrate.Board(Path("bad.png"), bad)
    camera, left_out = calibrate.solve(boards, PATTERN, 1.0, (WIDTH, HEIGHT))
    assert list(left_out) == ["bad.png"]
    assert "times the median" in left_out["bad.png"]
    assert len(camera.boards) == 5
    assert camera.rms < 0.05
    assert error(camera.model, TRUTH, WIDTH, HEIGHT) < 0.05


def test_k3_is_used_only_where_it_helps() -> None:
    plain, _ = calibrate.solve(seen(DISTORTION), PATTERN, 1.0, (WIDTH, HEIGHT))
    assert plain.model.k3 == 0
    distortion = (-0.4, 0.35, 0.0, 0.0, -0.25)
    camera, _ = calibrate.solve(seen(distortion), PATTERN, 1.0, (WIDTH, HEIGHT))
    s = UNIT / FOCAL
    truth = BrownConrady(-0.4 * s**2, 0.35 * s**4, 0.0, 0.0, -0.25 * s**6, TRUTH.cx, TRUTH.cy)
    assert camera.model.k3 < -0.005
    assert error(camera.model, truth, WIDTH, HEIGHT) < 0.05


def test_a_model_that_folds_is_refused() -> None:
    with pytest.raises(ImgtoolError, match="folds") as caught:
        calibrate.solve(seen((-1.1, 0.0, 0.0, 0.0)), PATTERN, 1.0, (WIDTH, HEIGHT))
    assert "tilted" in caught.value.hint


def test_the_classic_detector_takes_over(boards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = cv2.imread(str(boards / "0.png"))
    first = calibrate.find_corners(picture, PATTERN)
    monkeypatch.setattr(cv2, "findChessboardCornersSB", lambda *_, **__: (False, None))
    second = calibrate.find_corners(picture, PATTERN)
    assert first is not None
    assert second is not None
    flat = np.zeros((35, 3))
    flat[:, :2] = np.mgrid[0:7, 0:5].T.reshape(-1, 2)
    exact = cv2.projectPoints(flat, *map(np.array, POSES[0]), MATRIX, DISTORTION)[0].reshape(-1, 2)
    for corners in (first, second):
        away = min(np.abs(corners - exact).max(), np.abs(corners[::-1] - exact).max())
        assert away < 0.4
