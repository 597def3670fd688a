"""Data of the deblur engine: the right pixels, the same for the same numbers, none seen twice."""

from __future__ import annotations

import io
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from imgtool import cli, images
from imgtool.engines.deblur import blur, data
from imgtool.engines.deblur.settings import Train
from imgtool.errors import FAILED, USAGE, ImgtoolError

Array = npt.NDArray[Any]
SHARP = blur.Severity(untouched=1.0)


@pytest.fixture(autouse=True)
def _opencv_threads() -> Iterator[None]:
    before = cv2.getNumThreads()
    yield
    cv2.setNumThreads(before)


def picture(height: int = 60, width: int = 80, seed: int = 0) -> Array:
    """Every place in it differs from every other."""
    noise = np.random.default_rng(seed)
    return noise.integers(0, 256, (height, width, 3), dtype=np.uint8)


def put(path: Path, pixels: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def photos(folder: Path, count: int = 6, **size: int) -> Path:
    for number in range(count):
        put(folder / f"photo-{number}.png", picture(seed=number, **size))
    return folder


def gopro(folder: Path, sequences: int = 3, frames: int = 4) -> Path:
    """The layout of GoPro's data, with a second folder of blurred frames."""
    for sequence in range(sequences):
        for frame in range(frames):
            for part, offset in (("blur", 100), ("blur_gamma", 200), ("sharp", 0)):
                seed = offset + 10 * sequence + frame
                put(folder / "train" / f"GOPR{sequence}" / part / f"{frame:06d}.png", picture(seed=seed))
    return folder / "train"


def settings(**values: Any) -> Train:
    return Train(**({"crop": 32, "batch": 2, "epoch_steps": 5, "held_out": 6} | values))


def drawn(samples: data.Samples, count: int) -> list[bytes]:
    return [b"".join(part.numpy().tobytes() for part in samples[number]) for number in range(count)]


def found_in(crop: Array, whole: Array) -> tuple[int, int] | None:
    """Return where (top, left) a crop lies in a picture, None where it does not."""
    difference = cv2.matchTemplate(whole, np.ascontiguousarray(crop), cv2.TM_SQDIFF)
    left, top = cv2.minMaxLoc(difference)[2]
    part = whole[top : top + crop.shape[0], left : left + crop.shape[1]]
    return (top, left) if np.array_equal(part, crop) else None


def pixels(tensor: torch.Tensor) -> Array:
    return tensor.permute(1, 2, 0).numpy()


# --- pairs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["blur", "blur_gamma"])
def test_the_layout_of_gopro(part: str, tmp_path: Path) -> None:
    train = gopro(tmp_path)
    put(train / "GOPR0" / part / "000099.png", picture())
    pairs, lonely = data.find_pairs(train, part)
    assert len(pairs) == 12
    for blurred, sharp in pairs:
        assert blurred.name == sharp.name
        assert blurred.parent == sharp.parent.with_name(part)
        assert sharp.parent.name == "sharp"
    assert pairs == sorted(pairs)
    assert lonely == [train / "GOPR0" / part / "000099.png"]


def test_pairs_in_one_folder(tmp_path: Path) -> None:
    for name in ("a.png", "a_gt.png", "b.jpg", "b_gt.jpg", "c.png", "d_gt.png"):
        put(tmp_path / name, picture())
    (tmp_path / "notes.txt").write_text("no picture")
    pairs, lonely = data.find_pairs(tmp_path)
    assert [(one.name, two.name) for one, two in pairs] == [("a.png", "a_gt.png"), ("b.jpg", "b_gt.jpg")]
    assert sorted(path.name for path in lonely) == ["c.png", "d_gt.png"]


def test_both_halves_of_a_pair_are_cut_at_the_same_place(tmp_path: Path) -> None:
    """They are mirrored and turned in the same way: a constant apart before, a constant apart after."""
    sharp = picture(50, 70) // 2
    put(tmp_path / "sharp" / "a.png", sharp)
    put(tmp_path / "blur" / "a.png", sharp + 100)
    pair = (tmp_path / "blur" / "a.png", tmp_path / "sharp" / "a.png")
    samples = data.Samples([data.Pairs([pair], data.Decoded())], 32, seed=0, length=10)
    ways = set()
    for number in range(40):
        sample = samples[number]
        assert sample.blurred.shape == sample.sharp.shape == (3, 32, 32)
        assert sample.blurred.dtype == sample.sharp.dtype == torch.uint8
        assert torch.equal(sample.blurred, sample.sharp + 100)
        crop = pixels(sample.sharp)
        for way in range(8):
            turned = np.rot90(crop, -(way % 4))
            if found_in(turned[:, ::-1] if way > 3 else turned, sharp):
                ways.add(way)
    assert ways == set(range(8))


def test_crops_lie_everywhere(tmp_path: Path) -> None:
    whole = picture(36, 40)
    pair = (put(tmp_path / "a.png", whole), put(tmp_path / "a_gt.png", whole))
    samples = data.Samples([data.Pairs([pair], data.Decoded())], 32, seed=0, length=1, augment=False)
    places = {found_in(pixels(samples[number].sharp), whole) for number in range(400)}
    assert places == {(top, left) for top in range(5) for left in range(9)}


def test_halves_of_different_sizes_are_refused(tmp_path: Path) -> None:
    pair = (put(tmp_path / "a.png", picture(40, 40)), put(tmp_path / "a_gt.png", picture(40, 41)))
    samples = data.Samples([data.Pairs([pair], data.Decoded())], 32, seed=0, length=1)
    with pytest.raises(ImgtoolError, match="sizes differ") as caught:
        samples[0]
    assert caught.value.code == FAILED
    assert str(pair[0]) in caught.value.what
    assert "data check deblur" in caught.value.hint


# --- photographs --------------------------------------------------------------------------------


def test_untouched_photographs_stay_as_they_are(tmp_path: Path) -> None:
    paths = [put(tmp_path / "a.png", picture(90, 100))]
    samples = data.Samples([data.Photographs(paths, SHARP, data.Decoded())], 32, seed=0, length=1)
    for number in range(20):
        assert torch.equal(samples[number].blurred, samples[number].sharp)


def test_blurred_photographs_are_blurred_and_in_place(photographs: Path) -> None:
    severity = blur.Severity(untouched=0.0)
    source = data.Photographs(sorted(photographs.iterdir()), severity, data.Decoded())
    samples = data.Samples([source], 48, seed=0, length=1)
    for number in range(20):
        blurred, sharp = (part.float() for part in samples[number])
        assert not torch.equal(blurred, sharp)
        apart = float((blurred - sharp).square().mean())
        turned = float((blurred.flip(2) - sharp).square().mean())
        assert apart < turned


def test_crops_of_a_large_photo_are_shrunk_at_times(tmp_path: Path) -> None:
    """Then a crop shows more of the photo: the squares of 12 equal pixels become smaller."""
    paths = [put(tmp_path / "a.png", np.kron(picture(64, 64), np.ones((12, 12, 1), np.uint8)))]
    source = data.Photographs(paths, SHARP, data.Decoded())
    detail = []
    for number in range(30):
        _, sharp = source.draw(0, np.random.default_rng(number), 64)
        assert sharp.shape == (64, 64, 3)
        detail.append(float((np.diff(sharp.astype(int), axis=1) != 0).mean()))
    assert min(detail) < 0.12  # 12 equal pixels side by side
    assert max(detail) > 0.2


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3), (31, 200), (100, 33)])
def test_photos_smaller_than_the_crop_are_mirrored(size: tuple[int, int], tmp_path: Path) -> None:
    paths = [put(tmp_path / "a.png", picture(*size))]
    for severity in (SHARP, blur.Severity(untouched=0.0)):
        samples = data.Samples([data.Photographs(paths, severity, data.Decoded())], 48, seed=0, length=1)
        for number in range(4):
            assert samples[number].blurred.shape == samples[number].sharp.shape == (3, 48, 48)
    pair = [(paths[0], paths[0])]
    samples = data.Samples([data.Pairs(pair, data.Decoded())], 48, seed=0, length=1)
    assert samples[0].sharp.shape == (3, 48, 48)


def test_a_cut_beyond_the_edge_mirrors() -> None:
    small = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(data.cut(small, 0, 0, 4), np.pad(small, ((0, 2), (0, 2), (0, 0)), mode="reflect"))


# --- large photos are not decoded whole ---------------------------------------------------------


def smooth(height: int, width: int) -> Array:
    tones = np.random.default_rng(0).uniform(0, 255, (height // 60, width // 60, 3))
    return np.clip(cv2.resize(tones, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG of 4000 pixels."""
    path = tmp_path_factory.mktemp("large") / "large.jpg"
    Image.fromarray(smooth(3000, 4000)).save(path, quality=95)
    return path


@pytest.mark.parametrize(
    ("least", "scale"), [(375, 8), (376, 4), (700, 4), (1344, 2), (1501, 1), (0, 1), (9999, 1)]
)
def test_a_large_jpeg_is_decoded_no_larger_than_asked(least: int, scale: int, large: Path) -> None:
    small = images.read_rgb8(large, least)
    assert small.shape == (3000 // scale, 4000 // scale, 3)
    assert min(small.shape[:2]) >= min(least, 3000)
    if scale > 1:
        size = (small.shape[1], small.shape[0])
        area = cv2.resize(images.read_rgb8(large), size, interpolation=cv2.INTER_AREA)
        assert np.abs(small.astype(int) - area).mean() < 1.0
        assert np.abs(small.astype(int) - area).max() < 24


def test_a_turned_jpeg_comes_smaller_and_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = smooth(600, 480)
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.jpg", quality=95, exif=exif)
    small = images.read_rgb8(tmp_path / "a.jpg", 200)
    area = cv2.resize(upright, (240, 300), interpolation=cv2.INTER_AREA)
    assert small.shape == area.shape
    assert np.abs(small.astype(int) - area).mean() < 3


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpegs_come_smaller_too(mode: str, tmp_path: Path) -> None:
    Image.fromarray(smooth(480, 600)).convert(mode).save(tmp_path / "a.jpg", quality=95)
    small = images.read_rgb8(tmp_path / "a.jpg", 200)
    area = cv2.resize(images.read_rgb8(tmp_path / "a.jpg"), (300, 240), interpolation=cv2.INTER_AREA)
    assert small.shape == area.shape
    assert np.abs(small.astype(int) - area).mean() < 3


def test_other_formats_come_whole(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(400, 300))
    assert np.array_equal(images.read_rgb8(tmp_path / "a.png", 32), picture(400, 300))


def test_photographs_ask_for_what_their_crops_can_show(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    read = data.read_rgb8

    def noted(path: Path, least: int = 0) -> Array:
        asked.append(least)
        return read(path, least)

    monkeypatch.setattr(data, "read_rgb8", noted)
    source = data.Photographs([large], SHARP, data.Decoded())
    _, sharp = source.draw(0, np.random.default_rng(0), 32)
    assert asked == [4 * (32 + 2 * blur.MARGIN)]
    assert sharp.shape == (32, 32, 3)


# --- decoded pictures ---------------------------------------------------------------------------


def test_decoded_pictures_are_kept_within_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()

    def read(path: Path, least: int = 0) -> Array:
        reads[path.name] += 1
        return np.zeros((10, 10, 3), np.uint8)

    monkeypatch.setattr(data, "read_rgb8", read)
    decoded = data.Decoded(budget=700)
    for name in ("a", "b", "a", "c", "a", "b"):
        decoded(Path(name))
    assert reads == {"a": 1, "b": 2, "c": 1}
    data.Decoded(budget=1)(Path("larger than the budget"))
    decoded(Path("a"), 5)
    assert reads["a"] == 2  # another size of it is another picture


# --- frames -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 2.2])
@pytest.mark.parametrize("count", [1, 3, 7, 13])
def test_the_mean_of_frames_is_that_of_their_light(gamma: float, count: int) -> None:
    frames = [picture(seed=seed) for seed in range(count)]
    light = np.mean([(frame.astype(np.float64) / 255) ** gamma for frame in frames], axis=0)
    exact = light ** (1 / gamma) * 255
    found = data.average(frames, gamma)
    assert found.dtype == np.uint8
    assert np.abs(found - exact).max() <= 0.5001


def frames(folder: Path, count: int) -> list[Path]:
    return [put(folder / f"{number:04d}.png", picture(40, 44, seed=number)) for number in range(count)]


def test_a_run_of_frames_is_averaged_around_its_centre(tmp_path: Path) -> None:
    paths = frames(tmp_path, 15)
    source = data.Frames(data.windows(paths, data.LONGEST), data.Decoded())
    halves = set()
    for index in range(len(source)):
        blurred, sharp = source.draw(index, np.random.default_rng(index), 32)
        centres = [n for n in range(15) if found_in(sharp, picture(40, 44, seed=n))]
        assert len(centres) == 1
        top, left = found_in(sharp, picture(40, 44, seed=centres[0])) or (0, 0)
        for half in range(1, 7):
            run = range(max(centres[0] - half, 0), min(centres[0] + half, 14) + 1)
            parts = [picture(40, 44, seed=n)[top : top + 32, left : left + 32] for n in run]
            if any(np.array_equal(blurred, data.average(parts, gamma)) for gamma in (1.0, 2.2)):
                halves.add((centres[0], half))
    assert halves == {(centre, half) for centre in (6, 7, 8) for half in data.HALVES}


def test_frames_of_different_sizes_are_refused(tmp_path: Path) -> None:
    paths = frames(tmp_path, 13)
    put(paths[5], picture(41, 44))
    source = data.Frames([paths], data.Decoded())
    with pytest.raises(ImgtoolError, match="frames of different sizes"):
        source.draw(0, np.random.default_rng(0), 32)


def test_runs_do_not_go_from_one_recording_into_the_next(tmp_path: Path) -> None:
    frames(tmp_path / "first", 30)
    frames(tmp_path / "second", 28)
    for part in data.load(settings(frames=(tmp_path,))):
        for source in part.sources:
            assert isinstance(source, data.Frames)
            assert {path.parent.name for run in source.windows for path in run} == {"first", "second"}
            assert all(len({path.parent for path in run}) == 1 for run in source.windows)


# --- order and repetition -----------------------------------------------------------------------


def test_every_turn_is_another_order_of_everything(tmp_path: Path) -> None:
    class Counted:
        def __init__(self, count: int, first: int) -> None:
            self.count, self.first = count, first

        def __len__(self) -> int:
            return self.count

        def draw(self, index: int, rng: np.random.Generator, crop: int) -> tuple[Array, Array]:
            value = np.full((crop, crop, 3), self.first + index, np.uint8)
            return value, value

    sources = [Counted(5, 0), Counted(0, 50), Counted(8, 100)]
    samples = data.Samples(sources, 32, seed=3, length=4)
    everything = sorted([*range(5), *range(100, 108)])
    turns = [[int(samples[13 * turn + n].sharp[0, 0, 0]) for n in range(13)] for turn in range(4)]
    assert all(sorted(turn) == everything for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 4
    assert len(samples) == 4
    other = data.Samples(sources, 32, seed=4, length=4)
    assert [int(other[n].sharp[0, 0, 0]) for n in range(13)] != turns[0]


def test_a_sample_is_a_function_of_its_number(tmp_path: Path) -> None:
    named = settings(photos=(photos(tmp_path),), seed=5)
    first = drawn(data.load(named)[0], 12)
    again = data.load(named)[0]
    backwards = [b"".join(part.numpy().tobytes() for part in again[n]) for n in reversed(range(12))]
    assert first == backwards[::-1]
    assert len(set(first)) == 12
    assert drawn(data.load(settings(photos=(tmp_path,), seed=6))[0], 12) != first
    beyond = data.load(named)[0][10**9]
    assert beyond.sharp.shape == (3, 32, 32)


def test_held_out_samples_are_the_same_for_every_seed(tmp_path: Path) -> None:
    photos(tmp_path)
    first = data.load(settings(photos=(tmp_path,), seed=1, untouched=0.9))[1]
    second = data.load(settings(photos=(tmp_path,), seed=2, noisy=0.0, longest_blur=3.0))[1]
    assert len(first) == 6
    assert drawn(first, 6) == drawn(second, 6)
    assert not any(torch.equal(first[n].blurred, first[n].sharp) for n in range(6))


def _far_away(samples: data.Samples, numbers: Sequence[int]) -> list[bytes]:
    return [b"".join(part.numpy().tobytes() for part in samples[number]) for number in numbers]


@pytest.mark.slow
def test_a_spawned_process_makes_the_same_samples(tmp_path: Path) -> None:
    samples = data.load(settings(photos=(photos(tmp_path),)))[0]
    here = drawn(samples, 3)  # and its pictures are decoded now
    assert len(pickle.dumps(samples)) < 5000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_far_away, (samples, range(3))) == here


# --- held out -----------------------------------------------------------------------------------


def used(samples: data.Samples) -> set[Path]:
    """Return every file that a data set may read."""
    files: set[Path] = set()
    for source in samples.sources:
        if isinstance(source, data.Photographs):
            files |= set(source.paths)
        elif isinstance(source, data.Pairs):
            files |= {path for pair in source.paths for path in pair}
        else:
            assert isinstance(source, data.Frames)
            files |= {path for run in source.windows for path in run}
    return files


@pytest.mark.parametrize("count", [2, 3, 40])
def test_held_out_photos_are_not_trained_on(count: int, tmp_path: Path) -> None:
    """Not even where folders overlap."""
    photos(tmp_path / "all" / "part", count, height=4, width=4)
    named = settings(photos=(tmp_path / "all", tmp_path / "all" / "part"))
    train, held = data.load(named)
    assert used(train).isdisjoint(used(held))
    assert len(used(train) | used(held)) == count
    assert sum(len(source) for source in train.sources + held.sources) == count
    assert used(train)
    assert used(held)


@pytest.mark.parametrize("chosen", [True, False])
def test_there_is_always_something_on_either_side(
    chosen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few the photos, and whatever their names decide."""
    monkeypatch.setattr(data, "_held", lambda name, share: chosen)
    train, held = data.load(settings(photos=(photos(tmp_path, 3),)))
    assert (len(used(train)), len(used(held))) == (2, 1)


def test_a_name_decides_which_photo_is_held_out(tmp_path: Path) -> None:
    """More photos in the folder do not move one from one side to the other."""
    photos(tmp_path, 60, height=4, width=4)
    before = {path.name for path in used(data.load(settings(photos=(tmp_path,)))[1])}
    for number in range(60, 80):
        put(tmp_path / f"photo-{number}.png", picture(4, 4))
    after = {path.name for path in used(data.load(settings(photos=(tmp_path,)))[1])}
    assert before < after or before == after


@pytest.mark.parametrize("sequences", [1, 3])
def test_held_out_pairs_are_not_trained_on(sequences: int, tmp_path: Path) -> None:
    folder = gopro(tmp_path, sequences)
    train, held = data.load(settings(pairs=(folder, folder / "GOPR0")))
    assert used(train).isdisjoint(used(held))
    assert len(used(train) | used(held)) == 2 * 4 * sequences
    held_sequences = {path.parent.parent for path in used(held)}
    assert len(held_sequences) == 1
    if sequences > 1:
        assert held_sequences.isdisjoint({path.parent.parent for path in used(train)})


def test_held_out_frames_are_not_trained_on(tmp_path: Path) -> None:
    frames(tmp_path / "a", 40)
    train, held = data.load(settings(frames=(tmp_path / "a",)))
    assert used(train).isdisjoint(used(held))
    assert max(used(train)) < min(used(held))
    assert len(used(held)) == data.LONGEST


@pytest.mark.parametrize("kind", ["photos", "pairs", "frames"])
def test_what_is_validated_on_is_not_trained_on(kind: str, tmp_path: Path) -> None:
    """Even where it lies within what is trained on."""
    whole = tmp_path / kind
    part = whole / "part"
    if kind == "photos":
        photos(whole, 5)
        photos(part, 2)
    elif kind == "pairs":
        gopro(whole)
        part = whole / "train" / "GOPR1"
    else:
        frames(whole / "a", 20)
        part = frames(whole / "a", 20)[17]
    train, held = data.load(settings(validate_on=(part,), **{kind: (whole,)}))
    assert used(held)
    assert used(train)
    assert used(train).isdisjoint(used(held))
    assert all(part in path.parents or path == part for path in used(held))


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["photos", "pairs", "frames"])
def test_folders_without_data_are_asked_wrongly(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError) as caught:
        data.load(settings(**{kind: (tmp_path,)}))
    assert caught.value.code == USAGE
    assert caught.value.hint
    with pytest.raises(ImgtoolError, match="no such folder") as caught:
        data.load(settings(**{kind: (tmp_path / "none",)}))
    assert caught.value.code == USAGE


def test_nothing_named_nothing_to_validate_on_and_too_few_frames(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match="no training data named") as caught:
        data.load(settings())
    assert caught.value.code == USAGE
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImgtoolError, match="no photos or pairs in"):
        data.load(settings(photos=(photos(tmp_path / "a"),), validate_on=(tmp_path / "empty",)))
    frames(tmp_path / "b", 25)
    with pytest.raises(ImgtoolError, match="25 frames in") as caught:
        data.load(settings(frames=(tmp_path / "b",)))
    assert "26" in caught.value.hint
    assert data.load(settings(frames=(tmp_path / "b",), validate_on=(tmp_path / "a",)))[1].sources


def test_blur_of_no_extent_is_asked_wrongly(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match="--shortest-blur 9 is above --longest-blur 5") as caught:
        data.load(settings(photos=(photos(tmp_path),), shortest_blur=9.0, longest_blur=5.0))
    assert caught.value.code == USAGE


def test_an_empty_folder_is_one_error_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    asked = ["train", "deblur", "--photos", str(tmp_path / "empty"), "-o", str(tmp_path / "run")]
    assert cli.run(asked) == USAGE
    assert "error: fewer than two photographs found" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    photos(tmp_path, 3)
    for path in tmp_path.iterdir():
        path.write_bytes(b"words")
    with pytest.raises(ImgtoolError, match=r"photo-\d\.png is not an image"):
        data.load(settings(photos=(tmp_path,)))[0][0]


def test_other_files_in_the_folder_are_passed_over(tmp_path: Path) -> None:
    photos(tmp_path, 3)
    (tmp_path / "readme.txt").write_text("words")
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "JPEG")
    (tmp_path / "UPPER.JPG").write_bytes(buffer.getvalue())
    assert len(data.pictures_in(tmp_path)) == 4
