"""Exported files as a stranger uses them: by the scripts in ``plain``, which know the file's JSON alone."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import dng
import numpy as np
import pytest
import rawpy
from PIL import Image

from imgtool import header

PLAIN = Path(__file__).parent / "plain"
EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(PLAIN.glob("*.py"))
ALLOWED = {"cv2", "numpy", "onnxruntime", "PIL", "rawpy"}
ENVIRONMENT = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}


def run(*words: object, where: Path, isolated: bool = False) -> str:
    """Run Python in a folder and return what it printed."""
    command = [sys.executable, *(["-I"] if isolated else []), *map(str, words)]
    done = subprocess.run(command, cwd=where, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not isolated or not done.stderr
    return done.stdout


def infer(engine: str, where: Path, *words: object) -> dict[str, Any]:
    """Return the one record of ``imgtool infer``."""
    out = run("-m", "imgtool", "infer", engine, *words, "--json", where=where)
    record: dict[str, Any] = json.loads(out.splitlines()[-1])
    return record


def plain(engine: str, where: Path, source: Path, target: str) -> Path:
    """Run a script on the exported file, and return what it wrote."""
    run(PLAIN / f"{engine}.py", where / "model.onnx", source, where / target, where=where, isolated=True)
    return where / target


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def cut_out(name: str, where: Path, height: int, width: int) -> Path:
    """Write the middle of an example as PNG."""
    photo = Image.open(EXAMPLES / name)
    left, top = (photo.width - width) // 2, (photo.height - height) // 2
    photo.crop((left, top, left + width, top + height)).save(where / "photo.png")
    return where / "photo.png"


def linear_frame(where: Path) -> Path:
    """Write an example as a linear frame of 16 bits, under a light of little blue."""
    photo = cv2.imread(str(EXAMPLES / "sharp.jpg"))[:500] / 255
    linear = np.where(photo <= 0.04045, photo / 12.92, ((photo + 0.055) / 1.055) ** 2.4) * [0.62, 0.9, 0.5]
    cv2.imwrite(str(where / "frame.png"), np.rint(linear * 60000).astype(np.uint16))
    return where / "frame.png"


def other_pattern(where: Path) -> Path:
    """Write an example's mosaic with blue in its first row and column, by its tags upside down and cut."""
    with rawpy.imread(str(EXAMPLES / "night.dng")) as raw:
        values = raw.raw_image_visible[1:202, 1:152].copy()
    noise, upside_down = (51041, 12, [6e-3, 4.8e-5]), (274, 3, [3])
    crop = [(50719, 4, [5, 4]), (50720, 4, [140, 191])]
    return dng.write(where / "other.dng", values, "BGGR", black=256, more=[noise, upside_down, *crop])


def corners(found: dict[str, float], width: int, height: int) -> np.ndarray:
    """Where a photo shows the corners of the straight picture, in half diagonals."""
    x = np.array([-1, 1, -1, 1]) * (width - 1) / math.hypot(width, height)
    y = np.array([-1, -1, 1, 1]) * (height - 1) / math.hypot(width, height)
    k1, k2, p1, p2 = (found[name] for name in ("k1", "k2", "p1", "p2"))
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2 * r2
    return np.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        ]
    )


def check_deblur(where: Path, weights: str) -> None:
    source = cut_out("blurred.jpg", where, 203, 141)
    infer("deblur", where, source, "--weights", weights, "-o", "ours.png")
    assert abs(pixels(plain("deblur", where, source, "theirs.png")) - pixels(where / "ours.png")).max() <= 1


def check_filter(where: Path, weights: str) -> None:
    source = cut_out("sharp.jpg", where, 203, 301)
    infer("filter", where, source, "--weights", weights, "-o", "ours.png")
    ours, theirs = pixels(where / "ours.png"), pixels(plain("filter", where, source, "theirs.png"))
    if weights.endswith("_canny"):  # an edge is there or not
        assert 0.01 < (ours > 0).mean() < 0.5
        assert (ours != theirs).mean() <= 1e-3
    else:
        assert abs(ours - theirs).max() <= 1


def check_isp(where: Path, weights: str) -> None:
    for source in (EXAMPLES / "night.dng", other_pattern(where)):
        infer("isp", where, source, "--weights", weights, "-o", "ours.png", "--force")
        theirs = plain("isp", where, source, "theirs.png")
        assert abs(pixels(theirs) - pixels(where / "ours.png")).max() <= 1


def check_awb(where: Path, weights: str) -> None:
    for source in (EXAMPLES / "chart.kdc", EXAMPLES / "night.dng", linear_frame(where)):
        ours = infer("awb", where, source, "--weights", weights, "--fallback", "none")["facts"]
        theirs = json.loads(plain("awb", where, source, "theirs.json").read_text(encoding="utf-8"))
        assert theirs["red"] == pytest.approx(ours["red_gain"], rel=1e-4)
        assert theirs["blue"] == pytest.approx(ours["blue_gain"], rel=1e-4)
        assert theirs["confidence"] == pytest.approx(ours["confidence"], abs=1e-3)


def check_lens(where: Path, weights: str) -> None:
    source = EXAMPLES / "curved.jpg"
    ours = infer("lens", where, source, "--weights", weights, "-o", "ours.png")
    theirs = json.loads(plain("lens", where, source, "theirs.json").read_text(encoding="utf-8"))
    size = ours["width"], ours["height"]
    apart = corners(theirs, *size) - corners(ours["facts"], *size)
    assert 50 * np.hypot(*apart).max() <= 0.1  # percent of the diagonal
    assert theirs["straighten"]
    assert abs(ours["facts"]["corner_percent"]) > 10


CHECKS = {
    "awb": check_awb,
    "deblur": check_deblur,
    "filter": check_filter,
    "isp": check_isp,
    "lens": check_lens,
}


def test_every_engine_with_shipped_weights_has_a_script() -> None:
    engines = {name.split("-", 1)[0] for name in header.shipped()}
    assert engines == {path.stem for path in SCRIPTS} == set(CHECKS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_scripts_import_only_what_strangers_have(script: Path) -> None:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
        )
    }
    assert "onnxruntime" in names
    assert names <= ALLOWED | sys.stdlib_module_names


@pytest.mark.slow
@pytest.mark.parametrize("weights", header.shipped())
def test_shipped_weights_export_in_one_command_and_the_file_runs_without_the_package(
    weights: str, tmp_path: Path
) -> None:
    engine = weights.split("-", 1)[0]
    run(
        *("-m", "imgtool", "export", engine, "--to", "onnx", "--weights", weights),
        *("--largest", "96x128", "-o", "model.onnx"),
        where=tmp_path,
    )
    CHECKS[engine](tmp_path, weights)
