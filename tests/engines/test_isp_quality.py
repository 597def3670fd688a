"""Quality of the isp engine beside LibRaw: on frames made of photos, and on pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from imgtool import dng, images
from imgtool.console import Console
from imgtool.engine import Watch
from imgtool.engines.isp import libraw, quality, unprocess
from imgtool.engines.isp.engine import ENGINE
from imgtool.engines.isp.settings import Bench, Model
from imgtool.errors import ImgtoolError

NET = ENGINE.build(Model(size="xs")).eval()
TWO = {name: libraw.WAYS[name] for name in ("LINEAR", "AHD")}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lab(header: Mapping[str, Any]) -> Any:
    said: list[str] = []
    return SimpleNamespace(
        console=Console(quiet=True),
        weights=SimpleNamespace(header=header),
        watch=Watch(say=said.append),
        said=said,
    )


def smooth(height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    """Return soft colours, which every demosaicing gets right."""
    tones = np.random.default_rng(seed).uniform(40, 220, (3, 3, 3))
    return np.clip(cv2.resize(tones, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    inside = np.s_[libraw.MARGIN : -libraw.MARGIN, libraw.MARGIN : -libraw.MARGIN]
    return float(cv2.PSNR(one[inside], two[inside]))


# --- LibRaw ------------------------------------------------------------------------------------------


def test_libraw_renders_soft_colours_as_they_were() -> None:
    made = quality.recipe(0.0)
    values, truth = unprocess.frame(smooth(), made, np.random.default_rng(0))
    found = libraw.of_mosaic(quality.mosaic(values, made), libraw.WAYS)
    assert list(found) == ["LINEAR", "AHD", "DHT", "AAHD", "AHD+fbdd", "AHD+med2"]
    for name, picture in found.items():
        assert picture.shape == truth.shape, name
        assert psnr(picture, truth) > 42, name


def test_a_frame_of_another_pattern_turned_and_without_a_known_camera() -> None:
    made = quality.recipe(0.0)
    values, truth = unprocess.frame(smooth(66, 68), made, np.random.default_rng(0))
    frame = quality.mosaic(np.ascontiguousarray(values[1:, 1:]), made)
    frame = replace(
        frame, pattern="BGGR", flip=6, crop=(2, 2, 20, 30), xyz_to_camera=None, camera="Canon EOS 7D"
    )
    found = libraw.of_mosaic(frame, bits=16)["AHD"]
    assert found.dtype == np.uint16
    assert psnr(np.rint(found / 257).astype(np.uint8), truth[1:, 1:]) > 42


def test_reducing_noise_helps() -> None:
    made = quality.recipe(1e-2)
    values, truth = unprocess.frame(smooth(), made, np.random.default_rng(0))
    found = libraw.of_mosaic(quality.mosaic(values, made), ("AHD", "AHD+fbdd", "AHD+med2"))
    plain = psnr(found["AHD"], truth)
    assert psnr(found["AHD+fbdd"], truth) > plain + 1
    assert psnr(found["AHD+med2"], truth) > plain + 1


# --- measures ----------------------------------------------------------------------------------------


def test_edges_do_not_count() -> None:
    truth = smooth()
    wrong = truth.copy()
    wrong[: libraw.MARGIN], wrong[:, -libraw.MARGIN :] = 0, 255
    assert quality.measured(wrong, truth) == (100, 1, 0)
    wrong[libraw.MARGIN] ^= 128
    found = quality.measured(wrong, truth)
    assert found.psnr == pytest.approx(psnr(wrong, truth))
    inside = np.s_[8:-8, 8:-8]
    one, two = (each[inside] / 255 for each in (wrong, truth))
    options: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    assert found.ssim == pytest.approx(
        structural_similarity(one, two, data_range=1.0, channel_axis=2, **options)
    )
    assert found.de00 > 0.3


def test_noise_levels() -> None:
    assert quality.levels("1e-2, 0,1e-3") == [0, 1e-3, 1e-2]
    for text in ("", "x", "0,-1", "0.5", "nan"):
        with pytest.raises(ImgtoolError, match="--shot") as caught:
            quality.levels(text)
        assert caught.value.code == 2


# --- photos ------------------------------------------------------------------------------------------


def photos(count: int = 2) -> Path:
    folder = Path("photos")
    folder.mkdir(exist_ok=True)
    for number in range(count):
        picture = smooth(65, 64, number)
        picture[20:40, 10 + number :: 3] //= 2
        cv2.imwrite(str(folder / f"{number}.png"), picture)
    return folder


def test_quality_on_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraw, "WAYS", TWO)
    settings = Bench(photos=photos(1), shot="0,1e-2", report=Path("page"))
    part = quality.on_photos(NET, ENGINE, settings, lab({"trained_on": ["another"]}))
    levels = part.figures["photos"]["levels"]
    assert list(levels) == ["0", "0.01"]
    for text, level in levels.items():
        made = quality.recipe(float(text))
        rgb = np.ascontiguousarray(images.read_rgb8(Path("photos/0.png"))[:64])
        values, truth = unprocess.frame(rgb, made, np.random.default_rng([quality.SEED, 0]))
        for name, picture in libraw.of_mosaic(quality.mosaic(values, made), TWO).items():
            assert level["psnr"][name] == pytest.approx(psnr(picture, truth))
        best = max(level["psnr"][name] for name in TWO)
        assert level["psnr"][level["best_libraw"]] == best
        assert level["above_best_libraw"] == pytest.approx(level["psnr"]["ours"] - best)
        told = level["above_best_libraw_noise_measured"]
        assert told == pytest.approx(level["psnr"]["ours, noise measured"] - best)
        # this network is the front end still
        assert level["psnr"]["ours"] == pytest.approx(level["psnr"]["front end (Malvar)"], abs=0.02)
        assert level["de00"]["ours"] > 0
        assert level["ssim"]["AHD"] < 1
    limits = {limit.name: limit.limit for limit in part.budgets}
    assert limits == {"PSNR above LibRaw's best at shot 0": -1, "PSNR above LibRaw's best at shot 0.01": 4}
    assert {path.name for path in Path("page").iterdir()} == {"shot-0.png", "shot-0.01.png", "noise.png"}
    assert part.tables[0].columns == ("method", "0", "0.01")


def test_photos_that_were_trained_on_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraw, "WAYS", TWO)
    monkeypatch.setattr(quality, "_renderings", lambda net, engine, rgb, shot, number: (
        {name: rgb for name in ("ours", "ours, noise measured", "AHD", "LINEAR")}, rgb
    ))  # fmt: skip
    settings = Bench(photos=photos(), shot="0")
    known = lab({"trained_on": ["1"]})
    part = quality.on_photos(NET, ENGINE, settings, known)
    assert part.figures["photos"]["count"] == 1
    assert known.said == ["1 of 2 photos are left out: the weights were trained on them"]
    with pytest.raises(ImgtoolError, match="trained on all of these photos") as caught:
        quality.on_photos(NET, ENGINE, settings, lab({"trained_on": ["0", "1"]}))
    assert caught.value.code == 2
    with pytest.raises(ImgtoolError, match="trained on all of these photos"):  # and on views of them
        quality.on_photos(NET, ENGINE, settings, lab({"trained_on": ["free/0.jpg", "1.tif"]}))
    views = Path("photos").rename("views").absolute()
    (views / "index.tsv").write_text("file\tfrom\n0.png\tsets/tower.v2.jpg\n")
    viewed = lab({"trained_on": ["tower.v2"], "trained_on_left_out": 12})
    settings = Bench(photos=views, shot="0")
    assert quality.on_photos(NET, ENGINE, settings, viewed).figures["photos"]["count"] == 1
    assert viewed.said[0].startswith("12 pictures that the weights were trained on have mere numbers")
    unknown = lab({})
    assert quality.on_photos(NET, ENGINE, settings, unknown).figures["photos"]["count"] == 2
    assert "do not tell what they were trained on" in unknown.said[0]


def test_what_is_wrong_is_said_before_anything_is_measured() -> None:
    Path("empty").mkdir()
    for wrong in (
        {"photos": "empty"},
        {"photos": "nowhere"},
        {"data": "empty"},
        {"photos": ".", "shot": "x"},
    ):
        with pytest.raises(ImgtoolError) as caught:
            quality.check(Bench.model_validate(wrong))
        assert caught.value.code == 2
    quality.check(Bench())


# --- pairs -------------------------------------------------------------------------------------------


def pairs() -> dict[str, float]:
    """Write two pairs as ``data synth`` does; return the PSNR of LibRaw's AHD by file."""
    found = {}
    lines = []
    for name, shot in (("a", 0.0), ("b", 1e-2)):
        made = quality.recipe(shot)
        values, truth = unprocess.frame(smooth(seed=3), made, np.random.default_rng(1))
        for folder in ("raw", "rgb"):
            Path("pairs", folder).mkdir(parents=True, exist_ok=True)
        frame = quality.mosaic(values, made)
        dng.write(Path("pairs/raw", f"{name}.dng"), libraw.plain(frame))
        cv2.imwrite(f"pairs/rgb/{name}.png", truth[..., ::-1])
        found[f"{name}.dng"] = psnr(libraw.of_mosaic(frame)["AHD"], truth)
        lines.append(json.dumps({"name": name, "photo": f"{name}.jpg", "shot": shot, "read": made.read}))
    Path("pairs/samples.jsonl").write_text("\n".join(lines) + "\n")
    return found


def test_the_network_is_also_shown_frames_that_do_not_tell_their_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = []

    def developed(net: Any, engine: Any, frame: Any) -> np.ndarray:
        told.append((net is not None, frame.noise))
        return np.zeros((*frame.values.shape, 3), np.uint8)

    monkeypatch.setattr(libraw, "WAYS", TWO)
    monkeypatch.setattr(quality, "developed", developed)
    quality.on_photos(NET, ENGINE, Bench(photos=photos(1), shot="1e-2"), lab({"trained_on": []}))
    known = unprocess.expected(quality.recipe(1e-2))
    assert told == [(True, known), (True, None), (False, known)]


def test_quality_on_pairs() -> None:
    expected = pairs()
    settings = Bench(data=Path("pairs"), report=Path("page"))
    part = quality.on_pairs(NET, ENGINE, settings, lab({"trained_on": []}))
    told = part.figures["pairs"]
    assert {name: each["libraw"]["psnr"] for name, each in told["files"].items()} == pytest.approx(expected)
    assert told["psnr"]["AHD"] == pytest.approx(np.mean(list(expected.values())))
    assert told["noise"]["shot 0.01"]["psnr"]["AHD"] == pytest.approx(expected["b.dng"])
    low, high = told["psnr_95"]
    assert low <= told["psnr"]["ours"] <= high
    assert {path.name for path in Path("page").iterdir()} == {"pairs-shot-0.png", "pairs-shot-0.01.png"}
    assert [row[0] for row in part.tables[0].rows] == [
        "a.dng", "b.dng", "mean, shot 0", "mean, shot 0.01", "mean", "95 %",
    ]  # fmt: skip
    with pytest.raises(ImgtoolError, match="trained on all of these pairs"):
        quality.on_pairs(NET, ENGINE, settings, lab({"trained_on": ["a", "b"]}))
    for names in (["a", "views/b.png"], ["first", "second"]):  # their own names, those of their photos
        lines = [json.loads(line) for line in Path("pairs/samples.jsonl").read_text().splitlines()]
        photos_of = dict(zip(("a", "b"), ("first.jpg", "second.jpg"), strict=True))
        renamed = [json.dumps(line | {"photo": photos_of[line["name"]]}) for line in lines]
        Path("pairs/samples.jsonl").write_text("\n".join(renamed) + "\n")
        with pytest.raises(ImgtoolError, match="trained on all of these pairs"):
            quality.on_pairs(NET, ENGINE, settings, lab({"trained_on": names}))


def test_libraw_is_given_the_whole_frame_as_it_lies() -> None:
    values = np.random.default_rng(0).integers(300, 4000, (64, 80)).astype(np.uint16)
    frame = replace(quality.mosaic(values, quality.recipe(0)), crop=(8, 8, 40, 48), flip=6)
    assert libraw.plain(frame).crop is None
    assert libraw.of_mosaic(frame)["AHD"].shape == (64, 80, 3)
