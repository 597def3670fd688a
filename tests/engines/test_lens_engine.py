"""The lens engine from photo to photo: what it writes, what it says, and when it leaves a photo alone."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from test_lens_estimate import BARREL, facade, seen_through

from imgtool import checkpoint, images
from imgtool.cli import run
from imgtool.engine import Watch
from imgtool.engines.lens import bench, formats, plumb
from imgtool.engines.lens.engine import ENGINE
from imgtool.engines.lens.geometry import BrownConrady, diagonal, error
from imgtool.engines.lens.settings import Infer, Train
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import Photo, metadata

Array = npt.NDArray[Any]
GIVEN = "-0.08,0.03,0.001,-0.002"


@pytest.fixture
def net() -> plumb.LinesNet:
    torch.manual_seed(0)
    return plumb.LinesNet().eval()


@pytest.fixture
def weights(net: plumb.LinesNet, tmp_path: Path) -> str:
    path = tmp_path / "lens-test.safetensors"
    checkpoint.save_weights(path, ENGINE, Train(), net.state_dict(), {})
    return str(path)


def infer(**values: Any) -> Infer:
    return Infer(inputs=("-",), **values)


def write(path: Path, pixels: Array, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images.write(path, Photo(pixels, **more))
    return path


# --- apply --------------------------------------------------------------------------------------


def test_a_photo_is_straightened_as_opencv_does_it(net: plumb.LinesNet) -> None:
    soft = cv2.GaussianBlur(seen_through(facade(), BARREL), (0, 0), 2)  # cv2.undistort rounds places to 1/32
    photo = Photo(np.asarray(soft))
    settings = infer(coeffs=GIVEN, crop="same", interpolation="linear")
    result = ENGINE.apply(net, photo, settings, Watch())
    matrix = np.array(result.facts["camera_matrix"])
    numbers = np.array([result.facts[name] for name in ("k1", "k2", "p1", "p2")])
    wanted = cv2.undistort(photo.pixels, matrix, numbers)
    inside = (slice(20, -20), slice(20, -20))
    assert np.abs(result.image.astype(int) - wanted)[inside].max() <= 1
    assert result.facts["normalisation"] == "half-diagonal"
    assert matrix[0, 0] == diagonal(720, 480) / 2


@pytest.mark.parametrize("crop", ["fill", "keep", "same"])
def test_crops(net: plumb.LinesNet, crop: str) -> None:
    photo = Photo(np.full((120, 180, 3), 255, np.uint8))
    result = ENGINE.apply(net, photo, infer(coeffs=GIVEN, crop=crop), Watch())
    dark = (result.image < 250).mean()
    assert (dark > 0.01) == (crop == "keep")
    assert (result.facts["zoom"] == 1) == (crop == "same")


def test_strength_is_a_share_of_the_model(net: plumb.LinesNet) -> None:
    photo = Photo(facade(120, 80))
    half = ENGINE.apply(net, photo, infer(coeffs=GIVEN, strength=0.5), Watch())
    assert half.facts["k1"] == pytest.approx(-0.04)
    none = ENGINE.apply(net, photo, infer(coeffs=GIVEN, strength=0), Watch())
    assert none.image is photo.pixels


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_a_transparent_border_has_alpha(net: plumb.LinesNet, kind: str) -> None:
    top = 1.0 if kind == "float32" else np.iinfo(kind).max
    photo = Photo(np.full((60, 90, 3), top, kind))
    result = ENGINE.apply(net, photo, infer(coeffs=GIVEN, crop="keep", border="transparent"), Watch())
    assert result.alpha is not None
    assert result.alpha.dtype == photo.pixels.dtype
    assert result.alpha[0, 45] == 0  # the middle of an edge
    assert result.alpha[30, 45] == top


def test_the_alpha_of_a_photo_moves_with_it(net: plumb.LinesNet) -> None:
    alpha = np.zeros((60, 90), np.uint8)
    alpha[:, :20] = 255
    result = ENGINE.apply(
        net, Photo(facade(90, 60), alpha), infer(coeffs="0.1,0.05,0,0", crop="same"), Watch()
    )
    assert result.alpha is not None
    assert not np.array_equal(result.alpha, alpha)


def test_coefficient_files_come_beside_and_read_back(net: plumb.LinesNet, tmp_path: Path) -> None:
    photo = Photo(facade(300, 200))
    settings = infer(coeffs=GIVEN, export="opencv,lcp, json")
    result = ENGINE.apply(net, photo, settings, Watch())
    assert set(result.files) == set(ENGINE.beside(settings)) == {".yml", ".lcp", ".json"}
    for suffix, content in result.files.items():
        path = tmp_path / f"photo{suffix}"
        path.write_bytes(content)
        assert error(formats.read(path, 300, 200), BARREL, 300, 200) < 1e-3
    with pytest.raises(ImgtoolError, match="unknown") as caught:
        ENGINE.apply(net, photo, infer(export="ptlens"), Watch())
    assert caught.value.code == USAGE


def test_a_crop_that_cannot_be_is_refused(net: plumb.LinesNet) -> None:
    settings = infer(coeffs="-0.2,0,0,0", crop="keep")
    with pytest.raises(ImgtoolError, match="--crop keep") as caught:
        ENGINE.apply(net, Photo(facade(120, 80)), settings, Watch())
    assert caught.value.code == USAGE


# --- the command --------------------------------------------------------------------------------


def test_a_folder_becomes_a_folder_and_a_table(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bent = seen_through(facade(), BARREL)
    write(Path("in/a.png"), bent)
    write(Path("in/sub/flat.jpg"), np.full((90, 120, 3), 77, np.uint8))
    Path("in/b.jpg").write_bytes(Path("in/sub/flat.jpg").read_bytes()[:200])
    words = f"infer lens in -o out --estimator lines --weights {weights} --export opencv --zip all.zip --json"
    assert run(words.split()) == 1
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    facts = next(line["facts"] for line in lines if line["input"].endswith("a.png"))
    found = BrownConrady(*(facts[name] for name in ("k1", "k2", "p1", "p2")))
    assert error(found, BARREL, 720, 480) < 0.1
    assert facts["method"] == "lines"
    assert sum("error" in line for line in lines) == 1
    with Path("out/coefficients.csv").open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"a.png", "sub/flat.jpg"}
    assert float(rows["a.png"]["k1"]) == facts["k1"]
    assert Path("out/sub/flat.jpg").read_bytes() == Path("in/sub/flat.jpg").read_bytes()
    assert Path("out/a.yml").exists()
    with zipfile.ZipFile("all.zip") as archive:
        assert {"outputs/a.png", "coefficients.csv"} <= set(archive.namelist())
    assert run([*words.split(), "--skip-existing"]) == 1
    assert Path("out/coefficients.csv").read_text().count("\n") == 3


def test_a_straightened_photo_is_not_straightened_again(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.png"), seen_through(facade(), BARREL))
    assert run(f"infer lens a.png -o once.png --estimator lines --weights {weights}".split()) == 0
    assert run(f"infer lens once.png -o twice.png --estimator lines --weights {weights} --json".split()) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out.splitlines()[-1])
    assert record["untouched"]
    assert "already" in record["facts"]["reason"]
    assert Path("twice.png").read_bytes() == Path("once.png").read_bytes()


def test_photos_of_a_folder_are_solved_together(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        write(Path(f"in/{seed}.png"), seen_through(facade(seed=seed), BARREL))
    words = f"infer lens in -o out --group folder --estimator lines --weights {weights} --json"
    assert run(words.split()) == 0
    facts = [json.loads(line)["facts"] for line in capsys.readouterr().out.splitlines()]
    assert [fact["together"] for fact in facts] == [2, 2]
    assert facts[0]["k1"] == facts[1]["k1"]


def test_a_table_gives_each_photo_its_own_coefficients(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = {"in/a.png": "-0.05,0.01,0,0", "in/sub/a.png": "0.04,0,0,0"}
    Path("table.csv").write_text(
        "file,k1,k2,p1,p2\n" + "".join(f"{name.removeprefix('in/')},{row}\n" for name, row in rows.items())
    )
    for name in rows:
        write(Path(name), facade(120, 80))
    assert run(f"infer lens in -o out --coeffs table.csv --weights {weights} --json".split()) == 0
    facts = {line["input"]: line["facts"] for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert (facts["in/a.png"]["k1"], facts["in/sub/a.png"]["k1"]) == (-0.05, 0.04)


@pytest.mark.parametrize(
    "words", ["--export ptlens", "--coeffs -0.5,0,0,0", "--coeffs gone.yml", "--coeffs=1,2,3"]
)
def test_what_is_wrong_for_all_photos_is_said_once(
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.png", "in/b.png"):
        write(Path(name), facade(60, 40))
    for more in ("", " -n"):
        assert run(f"infer lens in -o out --weights {weights} {words}{more}".split()) == USAGE
        assert capsys.readouterr().err.count("error: ") == 1


def test_a_lensfun_file_names_no_real_camera(net: plumb.LinesNet) -> None:
    image = Image.new("RGB", (4, 4))
    exif = image.getexif()
    exif[271], exif[272] = "Canon", "Canon EOS 7D"
    photo = Photo(facade(120, 80), exif=exif.tobytes().removeprefix(b"Exif\0\0"))
    files = ENGINE.apply(net, photo, infer(coeffs="-0.05,0.01,0,0", export="lensfun,json"), Watch()).files
    assert b"EOS 7D" not in files[".xml"]
    assert b"EOS 7D" in files[".json"]


def test_given_coefficients_do_not_correct_a_second_time(net: plumb.LinesNet) -> None:
    xmp = metadata.with_xmp_properties(None, *metadata.AUX, {"DistortionCorrectionAlreadyApplied": "True"})
    photo = Photo(facade(120, 80), xmp=xmp)
    result = ENGINE.apply(net, photo, infer(coeffs=GIVEN), Watch())
    assert result.image is photo.pixels
    assert ENGINE.apply(net, photo, infer(coeffs=GIVEN, force=True), Watch()).image is not photo.pixels


# --- bench --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_measures_photos_and_cameras(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "TOGETHER", 2)
    monkeypatch.setattr(bench, "MIRRORED", 1)
    for seed in range(2):
        write(Path(f"straight/{seed}.png"), facade(seed=seed))
        write(Path(f"camera/{seed}.png"), seen_through(facade(seed=seed + 5), BARREL))
    rows = [
        {"file": f"{n}.png", "k1": BARREL.k1, "k2": BARREL.k2, "p1": BARREL.p1, "p2": BARREL.p2}
        for n in range(2)
    ]
    Path("camera/labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "bench lens --photos straight --data camera --count 3 --no-large --report page --json --weights"
    run([*words.split(), weights])
    record = json.loads(capsys.readouterr().out)
    figures = record["figures"]
    camera = figures["cameras"]["camera"]
    assert camera["nothing"]["mean"] == pytest.approx(error(BrownConrady(), BARREL, 720, 480))
    assert camera["ours without gate"]["mean"] < 0.3 * camera["nothing"]["mean"]
    assert camera["together"] < 0.1
    assert figures["distorted"]["photos"] == 3
    assert figures["together"]["ours"]["mean"] <= figures["together"]["nothing"]["mean"]
    assert figures["straight"]["nothing"]["mean"] == figures["straightened"]["nothing"]["mean"] == 0
    assert figures["all_cameras"]["nothing"]["mean"] == camera["nothing"]["mean"]
    assert {budget["unit"] for budget in record["budgets"]} == {"times", "%"}
    assert Path("page/errors.png").exists()


def test_a_bench_without_labels_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match=r"labels\.jsonl") as caught:
        bench.labels(tmp_path)
    assert caught.value.code == USAGE
    (tmp_path / "labels.jsonl").write_text('{"file": "a.png", "k1": 0}\n')
    with pytest.raises(ImgtoolError, match="no finite k1"):
        bench.labels(tmp_path)


def test_cameras_in_folders_of_one_name_stay_apart(tmp_path: Path) -> None:
    for place in ("one/camera", "two/camera"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "labels.jsonl").write_text(
            '{"file": "a.png", "k1": 0, "k2": 0, "p1": 0, "p2": 0}\n'
        )
    assert set(bench.labels(tmp_path)) == {"one/camera", "two/camera"}


def test_photos_seen_through_a_lens_show_no_border() -> None:
    white = np.full((200, 300, 3), 255, np.uint8)
    for model in (BARREL, BrownConrady(0.08, 0.02), BrownConrady(-0.3, 0.2)):
        assert bench.through(white, model).min() == 255


def test_straightening_is_opencvs() -> None:
    assert bench.apart_from_opencv() <= 1
