"""Pairs of mosaics and photographs: found in their folders, read, cut and turned without moving a colour."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from imgtool import mosaic, raw
from imgtool.engines.isp import data, layouts, pairs
from imgtool.engines.isp.settings import Train
from imgtool.errors import USAGE, ImgtoolError
from imgtool.mosaic import PATTERNS, Mosaic
from tests import dng

Picture = npt.NDArray[Any]

BLACK = (58, 60, 61, 62)
TURNS = [pairs.Turn(mirror, quarters) for mirror in (False, True) for quarters in range(4)]


def photograph(height: int = 20, width: int = 26, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def frame_of(photo: npt.NDArray[np.uint8], pattern: str = "RGGB") -> pairs.Frame:
    """A mosaic of a photo: its values above black levels that differ from place to place."""
    values = dng.mosaic(photo, pattern).astype(np.uint16)
    black = (10.0, 20.0, 30.0, 40.0)
    for place, level in enumerate(black):
        part = values[place // 2 :: 2, place % 2 :: 2]
        part[:] = np.rint(level + part * (1000 - level) / 255)
    return pairs.Frame(Mosaic(values, pattern, black, 1000.0), photo)


def put(path: Path, pixels: Picture) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    return path


def mai21(folder: Path, split: str, count: int, photos: bool = True, edge: int = 24) -> None:
    for number in range(count):
        photo = photograph(edge, edge, number)
        values = (60 + dng.mosaic(photo).astype(np.uint16) * 3).astype(np.uint16)
        put(folder / split / "mediatek_raw" / f"{number}.png", values)
        if photos:
            put(folder / split / "fujifilm" / f"{number}.png", photo)


def settings(**values: Any) -> Train:
    return Train(crop=32, **values)


def load(given: Train) -> tuple[list[pairs.Pairs], list[pairs.Pairs]]:
    return pairs.load(given, (1e-3, 1e-2, 0.0), 10_000_000)


# --- crops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [(20, 26), (13, 15), (8, 8)])
def test_every_plane_holds_the_photographs_own_samples_in_all_symmetries(
    pattern: str, size: tuple[int, int]
) -> None:
    frame = frame_of(photograph(*size), pattern)
    for turn in TURNS:
        for seed in range(4):
            square, target = pairs.cut(frame, 8, turn, np.random.default_rng(seed))
            assert square.values.shape == (8, 8)
            assert target.shape == (8, 8, 3)
            for place, channel in enumerate((0, 1, 1, 2)):
                part = np.s_[place // 2 :: 2, place % 2 :: 2]
                level = square.black[place]
                values = (square.values[part] - level) / (1000 - level)
                np.testing.assert_allclose(values * 255, target[part][..., channel], atol=0.15)


@pytest.mark.parametrize("turn", TURNS)
def test_a_crop_is_turned_as_stated_and_lies_within_the_frame(turn: pairs.Turn) -> None:
    rows, columns = np.mgrid[:40, :50].astype(np.uint8)
    frame = frame_of(np.stack([rows, columns, rows + columns], 2), "GRBG")
    starts = set()
    for seed in range(60):
        _, target = pairs.cut(frame, 16, turn, np.random.default_rng(seed))
        back = np.rot90(target, -turn.quarters)
        back = back[:, ::-1] if turn.mirror else back
        top, left = (int(value) for value in back[0, 0, :2])
        np.testing.assert_array_equal(back, frame.target[top : top + 16, left : left + 16])
        starts.add((top, left))
    assert len(starts) > 40
    assert len({(top % 2, left % 2) for top, left in starts}) == 1


def test_a_turned_crop_of_a_whole_frame_is_mirrored_by_one_pixel() -> None:
    frame = frame_of(photograph(8, 8))
    _, target = pairs.cut(frame, 8, pairs.Turn(mirror=True), np.random.default_rng(0))
    np.testing.assert_array_equal(target[:, ::-1], frame.target[:, [1, 0, 1, 2, 3, 4, 5, 6]])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (3, 5)])
def test_a_part_keeps_the_colours_and_the_black_of_its_pixels(pattern: str, corner: tuple[int, int]) -> None:
    frame = frame_of(photograph(), pattern).mosaic
    part = layouts.within(frame, (*corner, 9, 11))
    assert part.values.shape == (9, 11)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        place = 2 * ((row + corner[0]) % 2) + (column + corner[1]) % 2
        assert part.pattern[2 * row + column] == pattern[place]
        assert part.black[2 * row + column] == frame.black[place]
        assert part.values[row, column] == frame.values[row + corner[0], column + corner[1]]


# --- folders ---------------------------------------------------------------------------------


def test_the_folders_of_the_challenge_are_found_at_any_depth(tmp_path: Path) -> None:
    mai21(tmp_path / "raw_images", "train", 2)
    mai21(tmp_path / "raw_images", "val", 1)
    mai21(tmp_path / "raw_images", "test", 1, photos=False)
    found = layouts.files_of(tmp_path)
    assert [(each.facts.split, each.raw.name, each.rgb is not None) for each in found] == [
        ("test", "0.png", False), ("train", "0.png", True), ("train", "1.png", True), ("val", "0.png", True),
    ]  # fmt: skip
    assert {each.facts.layout.name for each in found} == {"mai21"}


def test_zurichs_unaligned_photographs_are_left_out(tmp_path: Path) -> None:
    for split in ("train", "test", "full_resolution"):
        put(tmp_path / split / "huawei_raw" / "7.png", np.full((8, 8), 100, np.uint16))
        put(tmp_path / split / "canon" / "7.jpg", photograph(8, 8))
    found = layouts.files_of(tmp_path)
    assert [(each.facts.split, each.facts.layout.name) for each in found] == [
        ("test", "zurich"), ("train", "zurich"),
    ]  # fmt: skip
    assert found[0].rgb == tmp_path / "test" / "canon" / "7.jpg"


def test_the_list_says_noise_and_source_of_frames_that_were_made(tmp_path: Path) -> None:
    for name in ("lake-shot0.001", "lake-shot0.01"):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / f"{name}.dng").touch()
        put(tmp_path / "rgb" / f"{name}.png", photograph(4, 4))
    rows = [{"name": "lake-shot0.01", "photo": "a lake", "shot": 0.01, "read": 2e-5, "gains": [4, 2, 3]}]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = layouts.files_of(tmp_path)
    assert (first.facts.noise, first.facts.source) == (None, "lake-shot0.001")
    assert (second.facts.noise, second.facts.source) == ((0.01, 2e-5), "a lake")
    assert (first.facts.gains, second.facts.gains) == (None, (2.0, 1.0, 1.5))
    assert second.rgb == tmp_path / "rgb" / "lake-shot0.01.png"


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_a_folder_without_pairs_is_refused(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ImgtoolError) as refused:
        layouts.files_of(tmp_path / folder)
    assert refused.value.code == USAGE


# --- reading ---------------------------------------------------------------------------------


def test_the_levels_of_the_challenges_are_those_of_their_sensors(tmp_path: Path) -> None:
    mai21(tmp_path, "train", 1)
    put(tmp_path / "z" / "train" / "huawei_raw" / "7.png", np.full((8, 8), 100, np.uint16))
    put(tmp_path / "z" / "train" / "canon" / "7.jpg", photograph(8, 8))
    frames = [layouts.read_pair(each)[0] for each in layouts.files_of(tmp_path)]
    assert [(frame.pattern, frame.black, frame.white) for frame in frames] == [
        ("RGGB", BLACK, 1023), ("RGGB", (63,) * 4, 1023),
    ]  # fmt: skip


def test_sixteen_bits_of_a_photograph_are_kept(tmp_path: Path) -> None:
    photo = photograph().astype(np.uint16) * 257
    put(tmp_path / "raw" / "a.png", dng.mosaic(photo) >> 4)
    put(tmp_path / "rgb" / "a.png", photo)
    _, target = layouts.read_pair(layouts.files_of(tmp_path)[0])
    np.testing.assert_array_equal(target, photo)


def test_a_photograph_of_the_cameras_crop_is_laid_upon_its_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = frame_of(photograph(), "GRBG")
    put(tmp_path / "raw" / "a.png", whole.mosaic.values)
    put(tmp_path / "rgb" / "a.png", whole.target[3:15, 5:21])
    cropped = Mosaic(whole.mosaic.values, "GRBG", whole.mosaic.black, 1000.0, crop=(3, 5, 12, 16))
    monkeypatch.setattr("imgtool.mosaic.read", lambda path, *stated: cropped)
    frame, target = layouts.read_pair(layouts.files_of(tmp_path)[0])
    assert target is not None
    np.testing.assert_array_equal(frame.values, whole.mosaic.values[3:15, 5:21])
    square, same = pairs.cut(pairs.Frame(frame, target), 8, pairs.Turn(), np.random.default_rng(0))
    red = (square.values[::2, ::2] - square.black[0]) / (1000 - square.black[0])
    np.testing.assert_allclose(red * 255, same[::2, ::2, 0], atol=0.15)


@pytest.mark.parametrize("size", [(8, 8), (26, 20)])
def test_photographs_of_another_size_are_refused_with_both_paths(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    first = put(tmp_path / "raw" / "a.png", frame_of(photograph()).mosaic.values)
    second = put(tmp_path / "rgb" / "a.png", photograph(*size))
    with pytest.raises(ImgtoolError, match="sizes differ") as refused:
        layouts.read_pair(layouts.files_of(tmp_path)[0])
    assert str(first) in refused.value.what
    assert str(second) in refused.value.what
    assert ("turned" in refused.value.hint) == (size == (26, 20))


# --- training --------------------------------------------------------------------------------


def test_the_validation_split_is_held_out_and_the_test_split_left_alone(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        mai21(tmp_path, split, count)
    kept, held = load(settings(data=(tmp_path,)))
    assert [len(source) for source in kept] == [3, 0]
    assert [len(source) for source in held] == [2, 0]
    assert {path.parent.parent.name for path in held[0].paths} == {"val"}


def test_without_one_the_test_split_is_held_out_where_it_has_photographs(tmp_path: Path) -> None:
    mai21(tmp_path, "train", 3)
    mai21(tmp_path, "test", 1)
    assert {path.parent.parent.name for path in load(settings(data=(tmp_path,)))[1][0].paths} == {"test"}
    mai21(tmp_path / "other", "train", 3)
    mai21(tmp_path / "other", "test", 1, photos=False)
    (held, _) = load(settings(data=(tmp_path / "other",)))[1]
    assert {path.parent.parent.name for path in held.paths} == {"train"}


def test_frames_of_one_photograph_stay_on_one_side(tmp_path: Path) -> None:
    rows = []
    for number in range(8):
        for shot in ("1", "2"):
            name = f"{number}-{shot}"
            put(tmp_path / "raw" / f"{name}.png", np.zeros((8, 8), np.uint16))
            put(tmp_path / "rgb" / f"{name}.png", photograph(8, 8))
            rows.append({"name": name, "photo": f"{number}"})
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept, held = pairs.split(tmp_path)
    assert held
    assert {each.facts.source for each in kept}.isdisjoint(each.facts.source for each in held)
    assert len(kept) + len(held) == 16


def test_a_folder_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    mai21(tmp_path, "train", 3)
    mai21(tmp_path, "val", 1)
    kept, _ = load(settings(data=(tmp_path, tmp_path / "train" / "..")))
    assert len(kept[0]) == 3


def test_what_one_folder_holds_out_another_does_not_train_on(tmp_path: Path) -> None:
    mai21(tmp_path, "train", 3)
    mai21(tmp_path, "val", 4)
    (kept, _), (held, _) = load(settings(data=(tmp_path / "val", tmp_path)))
    assert {path.parent.parent.name for path in kept.paths} == {"train"}
    assert len(held) == 4


def test_a_mosaic_without_its_photograph_stops_the_training_by_name(tmp_path: Path) -> None:
    mai21(tmp_path, "train", 3)
    (tmp_path / "train" / "fujifilm" / "1.png").unlink()
    with pytest.raises(ImgtoolError, match=r"no partner of .*mediatek_raw.1\.png"):
        load(settings(data=(tmp_path,)))


def test_one_pair_is_too_few(tmp_path: Path) -> None:
    mai21(tmp_path, "train", 1)
    with pytest.raises(ImgtoolError, match="fewer than two pairs"):
        load(settings(data=(tmp_path,)))


def test_a_sample_has_black_at_0_and_white_at_1(tmp_path: Path) -> None:
    mai21(tmp_path, "train", 2, edge=32)
    mai21(tmp_path, "val", 1, edge=32)
    _, (held, _) = load(settings(data=(tmp_path,)))
    drawn = held.draw(0, np.random.default_rng(0), 32)
    values = cv2.imread(str(held.paths[0]), cv2.IMREAD_UNCHANGED).astype(np.float64)
    planes = [values[::2, ::2], values[::2, 1::2], values[1::2, ::2], values[1::2, 1::2]]
    wanted = [(plane - black) / (1023 - black) for plane, black in zip(planes, BLACK, strict=True)]
    np.testing.assert_allclose(drawn.packed, wanted, atol=1e-6)
    assert drawn.packed.dtype == np.float32
    assert tuple(drawn.gains) == (1, 1, 1)
    np.testing.assert_array_equal(drawn.matrix, np.eye(3))
    np.testing.assert_array_equal(drawn.target.transpose(1, 2, 0), photograph(32, 32))


@pytest.mark.parametrize("listed", [False, True])
def test_noise_is_what_the_list_says_else_measured(tmp_path: Path, listed: bool) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        put(tmp_path / "raw" / f"{name}.png", rng.normal(2000, 41, (160, 160)).round().astype(np.uint16))
        put(tmp_path / "rgb" / f"{name}.png", photograph(160, 160))
    rows = [{"name": name, "shot": 0.25, "read": 0.125} for name in "ab"]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows if listed else [])))
    (kept, _), _ = load(settings(data=(tmp_path,)))
    shot, read = kept.draw(0, rng, 32).noise
    if listed:
        assert (shot, read) == (0.25, 0.125)
    else:
        assert (shot * 2000 / 4095 + read) ** 0.5 * 4095 == pytest.approx(41, rel=0.1)


def test_the_originals_scaling_is_value_by_1020_with_nothing_subtracted(tmp_path: Path) -> None:
    mai21(tmp_path, "train", 2, edge=32)
    mai21(tmp_path, "val", 1, edge=32)
    _, (held, _) = load(settings(data=(tmp_path,), scaling="mai21", packing="mai21"))
    drawn = held.draw(0, np.random.default_rng(0), 32)
    values = cv2.imread(str(held.paths[0]), cv2.IMREAD_UNCHANGED)
    np.testing.assert_allclose(drawn.packed[3], values[1::2, 1::2] / 1020, rtol=1e-6)
    assert drawn.noise == (0, 0)


def test_libraw_is_given_the_same_frame_whatever_the_scaling(tmp_path: Path) -> None:
    mai21(tmp_path, "train", 2, edge=40)
    mai21(tmp_path, "val", 1, edge=40)
    found = []
    for scaling in ("levels", "mai21"):
        _, (held, _) = load(settings(data=(tmp_path,), scaling=scaling))
        found.append(held.draw(0, np.random.default_rng(3), 32))
    frames = [drawn.rival for drawn in found if drawn.rival is not None]
    values = cv2.imread(str(held.paths[0]), cv2.IMREAD_UNCHANGED)
    for frame in frames:
        assert (frame.pattern, frame.black, frame.white, frame.values.dtype) == (
            "RGGB",
            BLACK,
            1023,
            np.uint16,
        )
        assert any(
            np.array_equal(frame.values, values[top : top + 32, left : left + 32])
            for top in range(0, 10, 2) for left in range(0, 10, 2)
        )  # fmt: skip
    first, second = (data.rendered(drawn) for drawn in found)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("added", [None, (5e-3, 1e-2, 0.0)])
def test_the_rival_is_the_very_crop_in_all_symmetries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, added: pairs.Added | None
) -> None:
    kept, _ = load(raws(tmp_path, monkeypatch))
    kept[1].added = added
    for seed in range(16):
        drawn = kept[1].draw(0, np.random.default_rng(seed), 32)
        frame = drawn.rival
        assert frame is not None
        assert sorted(frame.black) == [10, 20, 30, 40]
        for place, (plane, black) in enumerate(zip(drawn.packed, frame.black, strict=True)):
            values = frame.values[place // 2 :: 2, place % 2 :: 2]
            np.testing.assert_allclose((values - black) / (1000 - black), plane, atol=1e-6)
        assert (frame.gains, frame.noise) == ((1, 2, 4), drawn.noise)


def test_added_noise_leaves_white_alone_and_is_told_with_that_of_whole_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.full((64, 64), 900, np.uint16)
    values[:, ::4], values[:, 1::4] = 1000, 1010
    bare = Mosaic(values, "RGGB", (0.0,) * 4, 1000.0, noise=(0.0, 0.0))
    given = raws(tmp_path, monkeypatch)
    monkeypatch.setattr("imgtool.mosaic.read", lambda path: bare)
    monkeypatch.setattr(raw, "render", lambda path, gains, **how: np.full((64, 64, 3), 128, np.uint8))
    (_, source), _ = load(given)
    source.augment, source.added = False, (1e-2, 1e-2, 0.0)
    drawn = source.draw(0, np.random.default_rng(0), 64)
    assert (drawn.packed[0, :, ::2] == 1).all()
    np.testing.assert_allclose(drawn.packed[1, :, ::2], 1.01)
    other = drawn.packed[0, :, 1::2]
    assert other.std() > 0.02
    assert other.max() == 1
    assert drawn.noise[0] == pytest.approx(1e-2)
    assert drawn.noise[1] > 2 / 12e6
    source.added = None
    assert source.draw(0, np.random.default_rng(0), 64).noise == (0, pytest.approx(1 / 12e6))


def test_a_sample_depends_on_its_randomness_alone_and_survives_the_way_to_a_worker(tmp_path: Path) -> None:
    mai21(tmp_path, "train", 3, edge=40)
    mai21(tmp_path, "val", 1)
    (kept, _), _ = load(settings(data=(tmp_path,)))
    there = pickle.loads(pickle.dumps(kept))
    crops = set()
    for seed in range(8):
        first, second = (source.draw(1, np.random.default_rng(seed), 32) for source in (kept, there))
        np.testing.assert_array_equal(first.packed, second.packed)
        np.testing.assert_array_equal(first.target, second.target)
        crops.add(first.target.tobytes())
    assert len(crops) > 4


def raws(folder: Path, monkeypatch: pytest.MonkeyPatch, iso: int = 100) -> Train:
    """RAW files whose rendering is their own photograph, all of one grey."""
    photo = np.full((64, 64, 3), 128, np.uint8)
    made = frame_of(photo)
    known = Mosaic(
        made.mosaic.values, "RGGB", made.mosaic.black, 1000.0,
        gains=(1.0, 2.0, 4.0), noise=(1e-5, 1e-7), exif={"iso": iso},
    )  # fmt: skip
    monkeypatch.setattr("imgtool.mosaic.read", lambda path: known)

    def render(path: Path, gains: tuple[float, ...], **how: Any) -> Picture:
        assert gains == (1, 2, 4)
        assert how == {"demosaic": "ahd", "upright": False}
        return photo.astype(np.uint16) * 257

    monkeypatch.setattr(raw, "render", render)
    for name in ("a.dng", "b.CR2", "c.nef"):
        (folder / name).write_bytes(name.encode())
    put(folder / "no-raw.png", photo)
    return settings(raws=(folder,), demosaic="ahd")


def test_raw_files_are_rendered_by_libraw_and_their_mosaics_get_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, held = load(raws(tmp_path, monkeypatch))
    assert len(kept[1]) + len(held[1]) == 3
    drawn = [kept[1].draw(0, np.random.default_rng(seed), 64) for seed in range(3)]
    for each in drawn:
        assert (each.target == 128).all()
        shot, read = each.noise
        assert 1e-3 < shot < 1.1e-2
        expected = np.sqrt((shot - 1e-5) * 128 / 255 + read - 1e-7)
        assert each.packed.std() == pytest.approx(expected, rel=0.1)
        assert each.packed.mean() == pytest.approx(128 / 255, abs=0.01)
        assert tuple(each.gains) == (1, 2, 4)


@pytest.mark.parametrize(("iso", "words"), [(800, ""), (801, "3 of 3")])
def test_sensitive_raw_files_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iso: int, words: str
) -> None:
    said = pairs.warning(raws(tmp_path, monkeypatch, iso))
    assert said.startswith(words)
    assert bool(said) == bool(words)


def test_raw_files_that_cannot_be_used_are_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = raws(tmp_path, monkeypatch)
    known, looks = mosaic.read(tmp_path), []

    def read(path: Path) -> Mosaic:
        looks.append(path.name)
        if path.suffix == ".nef":
            raise ImgtoolError(f"{path} is truncated", "copy it again")
        return replace(known, gains=None) if path.suffix == ".CR2" else known

    monkeypatch.setattr("imgtool.mosaic.read", read)
    (_, kept), (_, held) = load(given)
    assert {path.name for source in (kept, held) for path in source.paths} == {"a.dng", "b.CR2"}
    first, second = pairs.warning(given).split("; ")
    assert first.startswith("1 of 3 RAW files cannot be used and are left out: ")
    assert "c.nef is truncated (imgtool data inspect tells of each)" in first
    assert second.startswith("1 of 3 RAW files say no white balance")
    assert sorted(looks) == ["a.dng", "b.CR2", "c.nef"]  # each once
    (tmp_path / "a.dng").unlink()
    with pytest.raises(ImgtoolError, match=r"fewer than two RAW files that can be read.*c\.nef is truncated"):
        load(given)


@pytest.mark.parametrize("neutral", [(0.4, 1.0, 0.7), (1.0, 1.0, 1.0), None])
def test_target_and_sample_have_one_white_balance(tmp_path: Path, neutral: tuple[float, ...] | None) -> None:
    grey = np.full((90, 120, 3), 0.25) * (0.4, 1.0, 0.7)
    for name in ("a", "b"):
        values = np.rint(64 + dng.mosaic(grey) * 4031).astype(np.uint16)
        dng.write(tmp_path / f"{name}.dng", values, neutral=neutral)
    kept, _ = load(settings(raws=(tmp_path,)))
    drawn = kept[1].draw(0, np.random.default_rng(0), 32)
    balanced = np.clip(drawn.packed.mean((1, 2))[[0, 1, 3]] * drawn.gains, 0, 1)
    shown = 255 * (1.055 * balanced ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(drawn.target.mean((1, 2)), shown, atol=4)


def test_libraws_rendering_lies_upon_the_mosaic_of_the_file(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:90, :120].astype(np.float64)
    linear = np.stack([0.2 + rows / 200, 0.2 + columns / 300, 0.5 + 0 * rows], 2)
    for name in ("a", "b"):
        values = np.rint(64 + dng.mosaic(linear, "GBRG") * 4031).astype(np.uint16)
        dng.write(tmp_path / f"{name}.dng", values, "GBRG", neutral=(1.0, 1.0, 1.0))
    kept, _ = load(settings(raws=(tmp_path,), demosaic="ahd"))
    drawn = kept[1].draw(0, np.random.default_rng(0), 32)
    for place, channel in enumerate((0, 1, 1, 2)):
        shown = drawn.target[channel, place // 2 :: 2, place % 2 :: 2] / 255
        linear = np.clip(drawn.packed[place], 0.0031308, 1)
        assert abs(float((1.055 * linear ** (1 / 2.4) - 0.055 - shown).mean())) < 0.02
