"""Samples of the filter engine: crops that fit their maps, parts of a run, drawn pictures."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from imgtool import images
from imgtool.engines.filter import data, sources, symmetry, synthetic, targets
from imgtool.engines.filter.settings import Train
from imgtool.errors import ImgtoolError
from imgtool.images import Photo
from imgtool.samples import Decoded

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

FUNCTIONS = """
import numpy as np
def same(photo):
    return photo
def grey(photo):
    return photo[..., 0]
def own(photo):
    return photo // np.uint8([1, 2, 1])
def shifted(photo):
    return np.roll(photo, 1, axis=0)
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path / "cache"))
    Path("mine.py").write_text(FUNCTIONS)


def coded(height: int, width: int, tone: int = 0) -> Pixels:
    """A photo whose pixels tell their row and column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, tone)], -1).astype(np.uint8)


def busy(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def put(name: str, pixels: Pixels) -> Path:
    images.write(Path(name), Photo(pixels))
    return Path(name)


def photos(count: int = 4, make: Callable[..., Pixels] = coded, size: tuple[int, int] = (60, 70)) -> None:
    for number in range(count):
        put(f"photos/{number}.png", make(*size, number))


def settings(**given: Any) -> Train:
    plain: dict[str, Any] = {"photos": ("photos",), "target": "mine.py:same", "crop": 16, "batch": 4}
    return Train(**(plain | {"held_out": 6, "steps": 8, "workers": 0} | given))


def arrays(sample: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return sample.seen.permute(1, 2, 0).numpy(), sample.wanted.permute(1, 2, 0).numpy()


# --- samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(60, 70), (16, 16), (9, 40), (1, 1), (3, 17)])
def test_the_map_is_that_of_the_middle_of_what_is_seen(size: tuple[int, int]) -> None:
    photos(3, busy, size)
    train, held = data.load(settings())
    for examples in (train, held):
        for number in range(6):
            seen, wanted = arrays(examples[number])
            assert seen.shape == (24, 24, 3)  # the network's reach is 4
            assert wanted.shape == (16, 16, 3)
            assert np.abs(seen[4:-4, 4:-4] / 255 - wanted).max() < 1 / 2048


def test_beyond_its_border_a_photo_is_mirrored() -> None:
    photos(2, coded, (16, 16))
    seen, _ = arrays(data.load(settings())[1][0])
    assert seen[:, 4, 0].tolist() == [4, 3, 2, 1, *range(16), 14, 13, 12, 11]
    assert seen[4, :, 1].tolist() == [4, 3, 2, 1, *range(16), 14, 13, 12, 11]


def test_a_crop_knows_what_is_around_it() -> None:
    photos(2, busy)
    train = data.load(settings(target="sobel_3", seed=1))[0]
    train.shape = dataclasses.replace(train.shape, symmetries=symmetry.Symmetries())
    held = {path.stem: images.read_rgb8(path) for path in Path("photos").glob("*.png")}
    for number in range(4):
        seen, wanted = arrays(train[number])
        inner = np.ascontiguousarray(seen[4:-4, 4:-4])
        place, photo = next(
            (place, photo) for photo in held.values() if (place := _found(photo, inner)) is not None
        )
        grey = cv2.cvtColor(photo.astype(np.float32) / 255, cv2.COLOR_RGB2GRAY)
        across, down = (cv2.Sobel(grey, cv2.CV_32F, *way, ksize=3) for way in ((1, 0), (0, 1)))
        whole = np.hypot(across, down) / 4
        part = whole[place[0] : place[0] + 16, place[1] : place[1] + 16, None]
        assert np.abs(wanted - part).max() < 2e-3


def _found(photo: Pixels, part: Pixels) -> tuple[int, int] | None:
    scores = cv2.matchTemplate(photo, part, cv2.TM_SQDIFF)
    place = np.unravel_index(int(scores.argmin()), scores.shape)
    top, left = int(place[0]), int(place[1])
    return (top, left) if np.array_equal(photo[top : top + 16, left : left + 16], part) else None


def _ways(target: str) -> set[tuple[int, int]]:
    """How rows and columns run through the samples of a position-coded photo."""
    train = data.load(settings(target=target, batch=40))[0]
    turned = symmetry.Symmetries(train.shape.symmetries.turned)
    train.shape = dataclasses.replace(train.shape, symmetries=turned)
    found = set()
    for number in range(40):
        middle = arrays(train[number])[0][4:-4, 4:-4].astype(int)
        found.add(
            (
                int(np.sign(middle[-1, 0, 0] - middle[0, 0, 0])),
                int(np.sign(middle[0, -1, 1] - middle[0, 0, 1])),
            )
        )
    return found


def test_samples_are_turned_where_that_is_the_filters_own() -> None:
    photos()
    assert len(_ways("mine.py:same")) == 5  # as it is, 3 mirrored ways, and 4 with rows for columns
    assert _ways("mine.py:shifted") == {(1, 1)}


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("sobel_3", (True, False, "same")),
        ("median:size=5", (True, True, "negative")),
        ("bilateral", (True, True, "negative")),
        ("erode", (True, True, "")),
        ("weighted_median", (True, False, "negative")),
        ("random_conv", (False, False, "negative")),
        ("canny", (False, False, "")),
    ],
)
def test_symmetries_are_found_out(spec: str, found: tuple[bool, bool, str]) -> None:
    assert symmetry.symmetries(targets.parse(spec)) == symmetry.Symmetries(*found)


def test_changed_samples_are_what_the_filter_makes_of_changed_photos() -> None:
    photos(2, busy)
    target = targets.parse("median:size=3")
    train = data.load(settings(target="median:size=3", seed=1))[0]
    for number in range(6):
        seen, wanted = arrays(train[number])
        made = target(np.ascontiguousarray(seen))[4:-4, 4:-4]
        assert np.abs(made - wanted).max() < 2e-3
    kinds = {arrays(train[number])[0].tobytes() for number in range(6)}
    assert len(kinds) == 6


def test_a_network_of_other_channels_than_the_filters_is_refused() -> None:
    photos(2, busy)
    for spec, channels, hint in (("sobel_3", "3", "leave out"), ("mine.py:grey", "auto", "--channels 1")):
        with pytest.raises(ImgtoolError, match="channel") as caught:
            data.load(settings(target=spec, channels=channels))
        assert hint in caught.value.hint


def test_samples_are_a_function_of_seed_and_number() -> None:
    photos(4, busy)
    first, second = (
        data.load(settings(seed=3, synthetic=0.4))[0],
        data.load(settings(seed=3, synthetic=0.4))[0],
    )
    second = pickle.loads(pickle.dumps(second))
    for number in (7, 0, 3):
        assert np.array_equal(first[number].seen, second[number].seen)
        assert np.array_equal(first[number].wanted, second[number].wanted)
    other = data.load(settings(seed=4))[0]
    assert any(not np.array_equal(first[number].seen, other[number].seen) for number in range(4))


def test_held_out_photos_are_not_trained_on() -> None:
    photos(30)
    train, held = data.load(settings(target="mine.py:own", batch=200, crop=32))
    tones = [
        {int(examples[n].seen[2, 0, 0]) for n in range(count)}
        for examples, count in ((train, 200), (held, 40))
    ]
    assert tones[0] | tones[1] == set(range(30))
    assert not tones[0] & tones[1]
    assert len(held) == 6


def test_photos_to_validate_on_are_not_trained_on() -> None:
    photos(4)
    put("other/9.png", coded(60, 70, 9))
    train, held = data.load(settings(target="mine.py:own", validate_on=("other", "photos/1.png")))
    assert {int(train[n].seen[2, 0, 0]) for n in range(30)} == {0, 2, 3}
    assert {int(held[n].seen[2, 0, 0]) for n in range(6)} == {1, 9}


def test_held_out_crops_depend_on_no_setting_of_the_run() -> None:
    photos(4, busy)
    plain = data.load(settings())[1]
    other = data.load(settings(seed=5, batch=8, stages=3, synthetic=0.5, workers=2))[1]
    for number in range(6):
        assert np.array_equal(plain[number].seen, other[number].seen)


@pytest.mark.parametrize("kind", ["gone", "empty", "one"])
def test_too_few_photos(kind: str) -> None:
    if kind != "gone":
        Path("photos").mkdir()
    if kind == "one":
        photos(1)
    with pytest.raises(ImgtoolError) as fault:
        data.load(settings())
    assert fault.value.code == 2
    assert fault.value.hint


def test_an_unreadable_photo_is_named() -> None:
    photos(3)
    path = Path("photos/1.png")
    path.write_bytes(path.read_bytes()[:-40])
    train, _ = data.load(settings(validate_on=("photos/2.png",)))
    with pytest.raises(ImgtoolError, match=r"photos/1\.png is truncated or corrupt"):
        [train[number] for number in range(10)]


def test_a_crop_that_the_network_cannot_take_is_refused() -> None:
    photos(2)
    with pytest.raises(ImgtoolError, match="--crop 18 is no multiple of 4") as fault:
        data.load(settings(arch="pooled", crop=18))
    assert (fault.value.code, fault.value.hint) == (2, "take 20")


def test_the_header_names_the_photos() -> None:
    photos(3)
    put("out/a.png", coded(20, 20))
    train, _ = data.load(settings(validate_on=("out",)))
    assert data.describe(train) == {"trained_on": ["0", "1", "2"]}


# --- parts of a run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({}, [(8, 4, 16)]),
        ({"stages": 2}, [(4, 4, 16), (4, 2, 32)]),
        ({"stages": 4, "steps": 10}, [(2, 4, 16), (3, 2, 32), (2, 1, 64), (3, 1, 128)]),
        ({"stages": 3, "steps": 2}, [(1, 2, 32), (1, 1, 64)]),
    ],
)
def test_crops_double_and_batches_halve(given: dict[str, Any], parts: list[tuple[int, int, int]]) -> None:
    found = data.course(settings(**given))
    assert found == parts
    assert data.stages(settings(**given)) == [part[:2] for part in parts]
    assert sum(part.steps for part in found) == settings(**given).steps


def test_a_sample_is_as_large_as_its_part_of_the_run_wants() -> None:
    photos(3)
    train, held = data.load(settings(stages=2))
    sizes = [train[number].wanted.shape[-1] for number in (0, 15, 16, 23, 24, 99)]
    assert sizes == [16, 16, 32, 32, 32, 32]
    assert held[5].wanted.shape[-1] == 16


# --- maps that are kept ----------------------------------------------------------------------


@pytest.fixture
def counted() -> tuple[sources.Reader, list[int]]:
    calls: list[int] = []

    def run(photo: Pixels) -> Any:
        calls.append(1)
        return photo.astype(np.float32) / 255

    return sources.Reader(targets.Target("slow_one", run, 3, slow=True)), calls


def _cached() -> list[Path]:
    return [path for path in Path("cache").rglob("*") if path.is_file()]


def test_a_slow_filter_runs_once(counted: tuple[sources.Reader, list[int]]) -> None:
    reader, calls = counted
    path = put("a.png", busy(20, 30))
    first, second = reader(path), reader(path)
    assert len(calls) == 1
    assert np.array_equal(first.wanted, second.wanted)
    put("a.png", busy(20, 30, 1))  # another photo of the same name
    reader(path)
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "bits", "longer"])
def test_a_damaged_map_is_made_again(counted: tuple[sources.Reader, list[int]], damage: str) -> None:
    reader, calls = counted
    path = put("a.png", busy(20, 30))
    first = reader(path)
    (kept,) = _cached()
    whole = kept.read_bytes()
    middle = bytes([whole[500] ^ 1])
    kept.write_bytes(
        {"cut": whole[:-9], "empty": b"", "bits": whole[:500] + middle + whole[501:], "longer": whole + b"x"}[
            damage
        ]
    )
    assert np.array_equal(reader(path).wanted, first.wanted)
    assert len(calls) == 2
    assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_only_time(
    counted: tuple[sources.Reader, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, calls = counted
    Path("file").write_text("no folder")
    monkeypatch.setenv("IMGTOOL_CACHE", "file")
    path = put("a.png", busy(20, 30))
    assert np.array_equal(reader(path).wanted, reader(path).wanted)
    assert len(calls) == 2


def test_maps_of_fast_filters_are_not_kept() -> None:
    photos(2)
    data.load(settings(target="sobel_3"))[0][0]
    assert not _cached()


def test_of_a_large_photo_a_window_is_taken() -> None:
    photo = coded(100, 40)
    part = sources.window(photo, "name", 30)
    top, left = (int(value) for value in part[0, 0, :2])
    assert part.shape == (30, 30, 3)
    assert np.array_equal(part, photo[top : top + 30, left : left + 30])
    assert np.array_equal(part, sources.window(photo, "name", 30))
    assert sources.window(photo, "name", 100) is photo


# --- pairs -----------------------------------------------------------------------------------


def pairs(folder: str = "pairs", count: int = 3, tone: int = 0) -> None:
    for number in range(count):
        photo = coded(60, 70, tone + number)
        put(f"{folder}/input/{number}.png", photo)
        put(f"{folder}/output/{number}.png", 255 - photo)


def test_pairs_are_cut_at_the_same_place_and_not_turned() -> None:
    pairs()
    train, held = data.load(settings(photos=(), target="pairs:pairs", batch=20))
    for number in range(20):
        seen, wanted = arrays(train[number])
        assert np.allclose(wanted * 255, 255 - seen[4:-4, 4:-4], atol=1e-3)
        assert seen[5, 5, 0] == seen[4, 5, 0] + 1  # rows are rows, downwards
    tones = [{int(each[n].seen[2, 0, 0]) for n in range(20)} for each in (train, held)]
    assert tones[0] | tones[1] == {0, 1, 2}
    assert not tones[0] & tones[1]
    assert set(data.describe(train)["trained_on"]) == {str(tone) for tone in tones[0]}


def test_pairs_for_one_channel() -> None:
    pairs()
    seen, wanted = arrays(data.load(settings(photos=(), target="pairs:pairs", channels="1"))[0][0])
    inner = 255 - seen[4:-4, 4:-4].astype(float)
    assert wanted.shape == (16, 16, 1)
    assert np.abs(wanted[..., 0] * 255 - inner @ [0.299, 0.587, 0.114]).max() < 0.51


def test_pairs_to_validate_on() -> None:
    pairs()
    pairs("apart", 1, 50)
    train, held = data.load(settings(photos=(), target="pairs:pairs", validate_on=("apart",)))
    assert {int(held[n].seen[2, 0, 0]) for n in range(3)} == {50}
    assert {int(train[n].seen[2, 0, 0]) for n in range(12)} == {0, 1, 2}


def test_a_pair_of_two_sizes_is_named() -> None:
    put("a.png", coded(20, 20))
    put("b.png", coded(20, 21))
    source = sources.Pairs([(Path("a.png"), Path("b.png"))], *(Decoded(images.read_rgb8) for _ in range(2)))
    with pytest.raises(ImgtoolError, match=r"a\.png is 20x20, its output 21x20"):
        source.draw(0, np.random.default_rng(0), 16)


@pytest.mark.parametrize("given", [{"photos": ("pairs",)}, {"stream": "x"}, {"synthetic": 0.5}])
def test_pairs_have_no_other_sources(given: dict[str, Any]) -> None:
    pairs()
    with pytest.raises(ImgtoolError, match=f"--{next(iter(given))} cannot be used") as fault:
        data.load(settings(**({"photos": ()} | given), target="pairs:pairs"))
    assert fault.value.code == 2


# --- drawn pictures --------------------------------------------------------------------------


def test_the_share_of_drawn_pictures_is_exact() -> None:
    photos(3)
    train, _ = data.load(settings(synthetic=0.25))
    drawn = [train.chosen(number)[0] is train.drawn for number in range(40)]
    assert drawn == [number % 4 == 3 for number in range(40)]
    assert data.describe(train)["synthetic"] == 0.25


def test_drawn_pictures_alone() -> None:
    train, held = data.load(settings(photos=(), synthetic=1.0, target="sobel_3"))
    assert arrays(train[0])[1].shape == (16, 16, 1)
    crops = [each[number].seen.numpy().tobytes() for each in (train, held) for number in range(6)]
    assert len(set(crops)) == 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"photos": ()}, "no training data named"),
        ({"photos": (), "synthetic": 0.5}, "leaves samples for which no source is named"),
        ({"synthetic": 1.0}, "leaves nothing for --photos"),
        ({"stream": "x", "buffer_min": 9, "buffer_max": 8}, "--buffer-min 9 is above --buffer-max 8"),
    ],
)
def test_sources_that_contradict_each_other(given: dict[str, Any], message: str) -> None:
    photos(2)
    with pytest.raises(ImgtoolError, match=message) as fault:
        data.load(settings(**given))
    assert fault.value.code == 2
    assert fault.value.hint


@pytest.mark.parametrize("kind", synthetic.KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (40, 56)])
def test_kinds_of_drawn_pictures(kind: str, size: tuple[int, int]) -> None:
    draw, _ = synthetic.KINDS[kind]
    found = [draw(np.random.default_rng(seed), *size) for seed in (0, 0, 1)]
    assert found[0].shape == (*size, 3)
    assert found[0].dtype == np.float32
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    assert all(np.isfinite(each).all() for each in found)


def test_drawn_pictures_are_as_varied_as_photographs() -> None:
    rngs = [np.random.default_rng(seed) for seed in range(60)]
    found = np.stack([synthetic.picture(rng, 48, 64) for rng in rngs])
    assert found.shape == (60, 48, 64, 3)
    assert found.dtype == np.uint8
    assert found.min() == 0
    assert found.max() == 255
    steps = np.abs(np.diff(found.astype(int), axis=2)).max((1, 2, 3))
    flat = np.abs(np.diff(found.astype(int), axis=2)).mean((1, 2, 3))
    assert steps.max() > 200  # hard edges
    assert np.median(flat) < 30  # but no mere noise
    assert len(np.unique(found.mean((1, 2, 3)).round())) > 30


def test_leaves_are_of_many_sizes_and_cover_everything() -> None:
    found = synthetic.leaves(np.random.default_rng(5), 128, 128)
    _, labels = np.unique((found * 4000).astype(int) // 400 @ [1, 100, 10000], return_inverse=True)
    areas = np.sort(np.bincount(labels.ravel()))
    assert areas[-1] > 1000
    assert (areas < 60).sum() > 5


def test_the_shares_of_kinds_add_up() -> None:
    assert sum(share for _, share in synthetic.KINDS.values()) == pytest.approx(1)
