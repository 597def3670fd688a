"""Data of the lens engine: exact geometry, no cue but bends, fixed samples, no photo on both sides."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from imgtool import samples
from imgtool.engines.lens import data, geometry, prior, synthesis
from imgtool.engines.lens.geometry import BrownConrady
from imgtool.engines.lens.settings import Synth, Train
from imgtool.errors import FAILED, USAGE, ImgtoolError

Array = npt.NDArray[Any]

BARREL = BrownConrady(-0.2, 0.05, 0.002, -0.001)
PINCUSHION = BrownConrady(0.12, -0.03, -0.001, 0.002)
ACTION = BrownConrady(-0.41, 0.127)


@pytest.fixture(autouse=True)
def _opencv_threads() -> Iterator[None]:
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(before)


def smooth(height: int = 300, width: int = 400, seed: int = 0) -> Array:
    tones = np.random.default_rng(seed).uniform(0, 255, (height // 30, width // 30, 3))
    return np.clip(cv2.resize(tones, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


def put(path: Path, pixels: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def photos(folder: Path, names: Sequence[str] = tuple("abcdef")) -> Path:
    for seed, name in enumerate(names):
        put(folder / f"{name}.png", smooth(120, 150, seed))
    return folder


def named(folder: Path, names: Sequence[str]) -> Path:
    """Files that are never read."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.png").touch()
    return folder


def settings(**values: Any) -> Train:
    common = {
        "arch": "efficientnet-b0",
        "input": 64,
        "batch": 2,
        "epoch_steps": 5,
        "held_out": 6,
        "workers": 0,
    }
    return Train(**(common | values))


def straightened(picture: Array, model: BrownConrady) -> Array:
    """What cv2.undistort makes of a photo, with the model's coefficients for f of half the diagonal."""
    height, width = picture.shape[:2]
    unit = np.hypot(width, height) / 2
    matrix = np.array([[unit, 0, (width - 1) / 2], [0, unit, (height - 1) / 2], [0, 0, 1]])
    return cv2.undistort(picture, matrix, np.array([model.k1, model.k2, model.p1, model.p2]))


def psnr(first: Array, second: Array) -> float:
    return float(10 * np.log10(255**2 / np.square(first.astype(float) - second).mean()))


# --- synthesis ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1200, 800), (257, 400)])
def test_the_inverse_map_is_exact(size: tuple[int, int]) -> None:
    """Straight, then distorted again by the closed formula: back within 0.02 pixels."""
    width, height = size
    rng = np.random.default_rng(0)
    models = [
        BARREL,
        PINCUSHION,
        ACTION,
        BrownConrady(),
        *(prior.draw(rng, "mixed", 0.003) for _ in range(6)),
    ]
    columns, rows = np.meshgrid(np.arange(width, dtype=float), np.arange(height, dtype=float))
    x, y = geometry.normalise(columns, rows, width, height)
    for model in models:
        back = model.distort(
            *(each.astype(np.float64) for each in synthesis.inverse_map(model, width, height))
        )
        away = np.hypot(back[0] - x, back[1] - y) * np.hypot(width, height) / 2
        assert away.max() < 0.02


@pytest.mark.parametrize("model", [BARREL, PINCUSHION, ACTION, BrownConrady()])
def test_no_border_ever_shows(model: BrownConrady) -> None:
    """A clean photo with a coloured rim that no sample may show, were it one pixel further out."""
    clean = np.full((240, 360, 3), 120, np.uint8)
    for number in range(8):
        view = synthesis.draw_view(model, 360, 240, np.random.default_rng(number))
        for x, y in (synthesis.inverse_map(model, 360, 240), synthesis.straight_map(360, 240)):
            columns, rows = geometry.pixels(view.scale * x + view.right, view.scale * y + view.down, 360, 240)
            assert columns.min() >= -1e-3
            assert rows.min() >= -1e-3
            assert columns.max() <= 359 + 1e-3
            assert rows.max() <= 239 + 1e-3
            assert (synthesis.look(clean, x, y, view) == 120).all()


def test_the_zoom_is_the_largest() -> None:
    for model in (BARREL, ACTION):
        scale = synthesis.zoom(model, 360, 240)
        x, y = synthesis.inverse_map(model, 360, 240)
        half_width, half_height = 359 / np.hypot(360, 240), 239 / np.hypot(360, 240)
        reached = max(np.abs(scale * x).max() / half_width, np.abs(scale * y).max() / half_height)
        assert reached == pytest.approx(1, abs=2e-3)
    assert synthesis.zoom(PINCUSHION, 360, 240) == 1  # its straight partner fills the frame


def test_a_model_that_folds_is_refused() -> None:
    with pytest.raises(ValueError, match="folds"):
        synthesis.distorted(smooth(), BrownConrady(-0.6), np.random.default_rng(0), 200)


@pytest.mark.parametrize("model", [BARREL, PINCUSHION, BrownConrady(-0.1, 0.03)])
def test_a_distorted_photo_straightened_by_opencv_is_its_partner(model: BrownConrady) -> None:
    for seed in range(2):
        made = synthesis.distorted(smooth(600, 800), model, np.random.default_rng(seed), 400)
        again = straightened(made.distorted, model)
        covered = straightened(np.full_like(made.distorted, 255), model).min(2) > 254
        covered = cv2.erode(covered.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        assert covered.mean() > 0.8
        assert psnr(again[covered], made.straight[covered]) > 42
        assert psnr(made.distorted[covered], made.straight[covered]) < 35
        assert made.model is model


def test_an_undistorted_sample_is_resampled_like_any_other() -> None:
    """Both halves are equal, but no crop of the photo: it is zoomed and shifted as all are."""
    noise = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    sharpness = []
    for model in (BrownConrady(), BrownConrady(0.02), BrownConrady(-0.02)):
        made = [synthesis.distorted(noise, model, np.random.default_rng(seed), 2000) for seed in range(8)]
        sharpness.append(np.mean([np.abs(np.diff(m.distorted.astype(int), axis=1)).mean() for m in made]))
        if model.straight:
            assert all(cv2.absdiff(each.distorted, each.straight).max() <= 1 for each in made)
    assert max(sharpness) < 1.03 * min(sharpness)
    assert max(sharpness) < 0.8 * np.abs(np.diff(noise.astype(int), axis=1)).mean()


def test_samples_have_all_aspects_and_no_pixels_that_are_not_there() -> None:
    usual = {"1:1": 1.0, "4:3": 4 / 3, "3:2": 1.5, "16:9": 16 / 9, "3:4": 0.75, "2:3": 2 / 3}
    aspects = set()
    for seed in range(40):
        made = synthesis.distorted(smooth(120, 160), BARREL, np.random.default_rng(seed), 5000)
        height, width = made.distorted.shape[:2]
        assert made.straight.shape == made.distorted.shape
        assert max(height, width) <= 160
        aspects.add(min(usual, key=lambda name: abs(usual[name] - width / height)))
    assert len(aspects) == 6


def test_half_of_the_photos_are_mirrored() -> None:
    ramp = np.repeat(np.linspace(0, 255, 150).astype(np.uint8)[None, :, None], 100, 0).repeat(3, 2)
    falling = []
    for seed in range(40):
        made = synthesis.distorted(ramp, BARREL, np.random.default_rng(seed), 50)
        falling.append(float(made.distorted[:, -1].mean()) < float(made.distorted[:, 0].mean()))
        both = [np.diff(each[15].astype(int).mean(-1)).mean() for each in made[:2]]
        assert both[0] * both[1] > 0
    assert 10 < sum(falling) < 30


def test_only_the_distorted_half_is_degraded() -> None:
    changed = []
    for seed in range(24):
        clean = synthesis.distorted(smooth(120, 150), BARREL, np.random.default_rng(seed), 90, 0.0)
        noisy = synthesis.distorted(smooth(120, 150), BARREL, np.random.default_rng(seed), 90, 0.5)
        assert np.array_equal(clean.straight, noisy.straight)
        changed.append(not np.array_equal(clean.distorted, noisy.distorted))
        assert not changed[-1] or psnr(clean.distorted, noisy.distorted) > 18
    assert 5 < sum(changed) < 19


def test_the_partner_is_left_out_where_it_is_not_needed() -> None:
    with_it, without = (
        synthesis.distorted(smooth(), BARREL, np.random.default_rng(3), 100, 1.0, partner)
        for partner in (True, False)
    )
    assert np.array_equal(with_it.distorted, without.distorted)
    assert without.straight.shape == (0, 0, 3)


# --- samples ------------------------------------------------------------------------------------


def test_a_letterboxed_photo_lies_in_the_middle_on_grey() -> None:
    picture = np.full((60, 100, 3), 200, np.uint8)
    square = data.letterbox(picture, 50)
    assert square.shape == (50, 50, 3)
    assert (square[10:40] == 200).all()
    assert (square[:10] == data.PADDING).all()
    assert (square[40:] == data.PADDING).all()
    assert data.frame_of(100, 60) == (1.0, 0.6)
    assert data.frame_of(60, 120) == (0.5, 1.0)


def test_a_sample_of_photographs(tmp_path: Path) -> None:
    train, held = data.load_images(settings(photos=(photos(tmp_path),), untouched=0.5))
    assert (len(train), len(held)) == (10, 6)
    untouched = 0
    for number in range(24):
        sample = train[number]
        assert sample.image.shape == (3, 64, 64)
        assert sample.image.dtype == torch.uint8
        assert sample.target.shape == sample.source.shape == (3, 0, 0)
        assert sample.frame.max() == 1
        assert sample.frame.dtype == sample.coefficients.dtype == torch.float32
        assert bool(sample.known)
        assert torch.isfinite(sample.coefficients).all()
        untouched += not sample.coefficients.any()
        rows = (sample.image != torch.tensor(data.PADDING, dtype=torch.uint8)[:, None, None]).any(0)
        width, height = (int(rows.any(axis).sum()) for axis in (0, 1))
        assert width == pytest.approx(64 * float(sample.frame[0]), abs=1.01)
        assert height == pytest.approx(64 * float(sample.frame[1]), abs=1.01)
    assert 5 < untouched < 19


@pytest.mark.parametrize("loss", ["photo", "both"])
def test_losses_of_photos_get_the_pair(loss: str, tmp_path: Path) -> None:
    chosen = settings(photos=(photos(tmp_path),), loss=loss, photo_size=96, noisy=0.0, untouched=1.0)
    sample = data.load_images(chosen)[0][3]
    assert sample.target.shape == sample.source.shape == (3, 96, 96)
    assert torch.equal(sample.target, sample.source)  # nothing is distorted
    half = cv2.resize(sample.source.permute(1, 2, 0).numpy(), (64, 64), interpolation=cv2.INTER_AREA)
    assert np.abs(half.astype(int) - sample.image.permute(1, 2, 0).numpy()).mean() < 6


def test_batches_are_made_of_samples(tmp_path: Path) -> None:
    train, _ = data.load_images(settings(photos=(photos(tmp_path),)))
    batch = default_collate([train[number] for number in range(3)])
    assert isinstance(batch, data.Sample)
    assert batch.image.shape == (3, 3, 64, 64)
    assert batch.coefficients.shape == (3, 4)
    assert batch.known.dtype == torch.bool


def same(first: data.Sample, second: data.Sample) -> bool:
    return all(torch.equal(a, b) or bool(a.isnan().all()) for a, b in zip(first, second, strict=True))


def test_a_sample_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    folder = photos(tmp_path)
    train, held = data.load_images(settings(photos=(folder,)))
    again, held_again = data.load_images(settings(photos=(folder,), seed=0))
    other, held_other = data.load_images(settings(photos=(folder,), seed=1))
    backwards = [again[number] for number in reversed(range(5))][::-1]
    assert all(same(train[number], backwards[number]) for number in range(5))
    assert not any(same(train[number], other[number]) for number in range(5))
    for number in range(len(held)):
        assert same(held[number], held_again[number])
        assert same(held[number], held_other[number])
    assert not same(train[0], train[len(train)])  # the next epoch brings new ones


def _in_a_worker(train: data.Images) -> data.Sample:
    return train[5]


def test_samples_survive_the_way_to_a_worker(tmp_path: Path) -> None:
    train, _ = data.load_images(settings(photos=(photos(tmp_path),)))
    expected = train[5]
    assert same(pickle.loads(pickle.dumps(train))[5], expected)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert same(pool.apply(_in_a_worker, (train,)), expected)


def test_every_photo_serves_once_per_turn(tmp_path: Path) -> None:
    """The orders of data sets of two engines are one and the same."""
    folder = photos(tmp_path)
    order = samples.Order([["a", "b"], [], ["c", "d", "e"]], seed=3)
    drawn = [order.chosen(number) for number in range(10)]
    names = [source[index] for source, index, _ in drawn]
    assert sorted(names[:5]) == sorted(names[5:]) == list("abcde")
    assert names[:5] != names[5:]
    assert drawn[0][2].random() == np.random.default_rng([3, 0, 0]).random()
    assert folder.is_dir()


# --- the split ----------------------------------------------------------------------------------


def test_views_of_a_photograph_stay_together(tmp_path: Path) -> None:
    names = [
        f"{scene}{join}{view}"
        for scene in "abcdefghijklmnopqrstuvwxyz"
        for join, view in (("-", 1), ("_", 12))
    ]
    kept, held = data.photographs(settings(photos=(named(tmp_path, names),)))
    assert len(kept) + len(held) == 52
    assert not {path.stem[0] for path in kept} & {path.stem[0] for path in held}
    assert 0 < len(held) < 26


def test_the_index_says_which_views_belong_together(tmp_path: Path) -> None:
    names = [f"{number:03d}x" for number in range(40)]
    named(tmp_path, names)
    lines = [
        "file\tfrom\tview",
        *(f"{name}.png\tscene {number // 4}\t{number % 4}" for number, name in enumerate(names)),
    ]
    (tmp_path / "index.tsv").write_text("\n".join(lines))
    kept, held = data.photographs(settings(photos=(tmp_path,)))
    scenes = [{int(path.stem[:3]) // 4 for path in part} for part in (kept, held)]
    assert not scenes[0] & scenes[1]
    assert len(held) % 4 == 0
    assert held


def test_numbers_of_a_camera_are_no_views(tmp_path: Path) -> None:
    kept, held = data.photographs(settings(photos=(named(tmp_path, [f"IMG_{n:04d}" for n in range(60)]),)))
    assert 0 < len(held) < 12
    assert len(kept) + len(held) == 60


def test_a_photo_is_held_out_by_its_name_alone(tmp_path: Path) -> None:
    names = [f"photo{n:03d}x" for n in range(60)]
    held = data.photographs(settings(photos=(named(tmp_path / "a", names),)))[1]
    more = data.photographs(
        settings(photos=(named(tmp_path / "b", [*names, "another", "onemore"]),), seed=9)
    )[1]
    assert {path.name for path in held} <= {path.name for path in more}
    assert all(samples.held(path.stem) for path in held)


def test_photos_to_validate_on_are_not_trained_on(tmp_path: Path) -> None:
    folder, apart = photos(tmp_path / "all"), tmp_path / "all" / "b.png"
    kept, held = data.photographs(settings(photos=(folder,), validate_on=(apart,)))
    assert held == [apart]
    assert [path.stem for path in kept] == list("acdef")
    train, fixed = data.load_images(settings(photos=(folder,), validate_on=(apart,)))
    assert all(isinstance(source, data.Photographs) for source in (*train.sources, *fixed.sources))
    assert fixed.sources[0].paths == [apart]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no training data named"),
        ({"photos": ("empty",)}, "fewer than two photographs"),
        ({"photos": ("nowhere",)}, "no such folder"),
        ({"pairs": ("empty",)}, "fewer than two pairs"),
        ({"photos": ("some",), "validate_on": ("empty",)}, "no photos to validate on"),
    ],
)
def test_data_that_is_not_there(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    photos(tmp_path / "some")
    given = {name: tuple(tmp_path / folder for folder in folders) for name, folders in values.items()}
    with pytest.raises(ImgtoolError, match=message) as caught:
        data.load_images(settings(**given))
    assert caught.value.code == USAGE


def test_a_tiny_photo_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "tiny.png", smooth(60, 60)[:20, :50])
    with pytest.raises(ImgtoolError, match="only 50x20 pixels") as caught:
        data.read_small(tmp_path / "tiny.png", 200)
    assert caught.value.code == FAILED


def test_a_large_photo_is_held_small(tmp_path: Path) -> None:
    path = put(tmp_path / "large.png", smooth(600, 900))
    small = data.read_small(path, 200)
    assert small.shape == (200, 300, 3)
    assert np.array_equal(small, cv2.resize(smooth(600, 900), (300, 200), interpolation=cv2.INTER_AREA))
    assert data.read_small(path, 700).shape == (600, 900, 3)


# --- pairs --------------------------------------------------------------------------------------


def pairs(folder: Path, count: int = 4, labels: bool = True) -> Path:
    rows = []
    for number in range(count):
        made = synthesis.distorted(smooth(seed=number), BARREL, np.random.default_rng(number), 128)
        put(folder / f"x{number:03d}_original.png", made.distorted)
        put(folder / f"x{number:03d}_generated.png", made.straight)
        rows.append(
            {"file": f"x{number:03d}_original.png", "k1": -0.2, "k2": 0.05, "p1": 0.002, "p2": -0.001}
        )
    if labels:
        (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_pairs_are_found_by_their_names(tmp_path: Path) -> None:
    pairs(tmp_path / "deep" / "er", 2)
    put(tmp_path / "preview.png", smooth())
    put(tmp_path / "alone_original.jpg", smooth())
    put(tmp_path / "lost_generated.jpg", smooth())
    found, lonely = data.find_pairs(tmp_path)
    assert [(one.name, two.name) for one, two in found] == [
        (f"x00{n}_original.png", f"x00{n}_generated.png") for n in range(2)
    ]
    assert [path.name for path in lonely] == ["alone_original.jpg", "lost_generated.jpg"]


def test_a_sample_of_pairs(tmp_path: Path) -> None:
    train, held = data.load_images(settings(pairs=(pairs(tmp_path),), photo_size=96))
    mirrored = set()
    for number in range(16):
        sample = train[number]
        assert sample.target.shape == sample.source.shape == (3, 96, 96)
        assert bool(sample.known)
        expected = torch.tensor([-0.2, 0.05, 0.002, 0.001 if sample.coefficients[3] > 0 else -0.001])
        assert torch.allclose(sample.coefficients, expected)
        mirrored.add(bool(sample.coefficients[3] > 0))
    assert mirrored == {True, False}
    assert all(
        torch.allclose(held[n].coefficients, torch.tensor([-0.2, 0.05, 0.002, -0.001])) for n in range(6)
    )


def test_a_mirrored_pair_still_fits_its_coefficients(tmp_path: Path) -> None:
    source = data.Pairs(
        data._labelled(data.find_pairs(pairs(tmp_path, 1))[0]), samples.Decoded(data.read_small), 128
    )
    for seed in range(6):
        drawn = source.draw(0, np.random.default_rng(seed))
        assert drawn.model is not None
        again = straightened(np.ascontiguousarray(drawn.distorted), drawn.model)
        assert psnr(again[12:-12, 12:-12], drawn.straight[12:-12, 12:-12]) > 38


def test_pairs_without_labels_are_not_known(tmp_path: Path) -> None:
    train, _ = data.load_images(settings(pairs=(pairs(tmp_path, labels=False),)))
    sample = train[0]
    assert not bool(sample.known)
    assert sample.coefficients.isnan().all()
    assert sample.target.shape == (3, 384, 384)


def test_pairs_of_one_source_stay_together(tmp_path: Path) -> None:
    folder = pairs(tmp_path, 6)
    rows = [json.loads(line) | {"source": f"s{n // 3}.jpg"} for n, line in
            enumerate((folder / "labels.jsonl").read_text().splitlines())]  # fmt: skip
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held = data.load_images(settings(pairs=(folder,)))
    kept, out = ({pair.group for pair in part.sources[0].pairs} for part in (train, held))  # type: ignore[attr-defined]
    assert kept == {"s0.jpg"}
    assert out == {"s1.jpg"}


def test_photos_and_pairs_together(tmp_path: Path) -> None:
    train, _ = data.load_images(settings(photos=(photos(tmp_path / "p"),), pairs=(pairs(tmp_path / "q"),)))
    batch = default_collate([train[number] for number in range(8)])
    assert batch.target.shape == (8, 3, 384, 384)


@pytest.mark.parametrize("row", [{"k1": "x"}, {"k1": None}, {"k2": float("nan")}])
def test_a_label_that_is_none(row: dict[str, Any], tmp_path: Path) -> None:
    folder = pairs(tmp_path)
    rows = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    rows[1] |= row
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ImgtoolError, match="x001_original") as caught:
        data.load_images(settings(pairs=(folder,)))
    assert "data check lens" in caught.value.hint


def test_halves_of_different_sizes_are_refused(tmp_path: Path) -> None:
    folder = pairs(tmp_path)
    put(folder / "x001_generated.png", smooth(100, 90))
    train, _ = data.load_images(settings(pairs=(folder,)))
    with pytest.raises(ImgtoolError, match="sizes differ"):
        [train[number] for number in range(4)]


# --- the shared parts ---------------------------------------------------------------------------


def test_decoded_pictures_are_kept_within_a_budget() -> None:
    reads: list[tuple[str, int]] = []

    def read(path: Path, least: int) -> Array:
        reads.append((path.name, least))
        return np.zeros((10, 10, 3), np.uint8)

    decoded = samples.Decoded(read, 700)
    for name in ("a", "b", "a", "c", "a", "b"):
        decoded(Path(name), 5)
    assert [name for name, _ in reads] == ["a", "b", "c", "b"]
    decoded(Path("b"), 6)
    assert reads[-1] == ("b", 6)


@pytest.mark.parametrize("chosen", [True, False])
def test_the_split_is_never_empty_on_one_side(chosen: bool) -> None:
    def decide(name: str, share: float) -> bool:
        return chosen

    def first(name: str) -> str:
        return name[0]

    assert samples.split(["a1", "a2", "b1", "b2"], first, decide) == (["a1", "a2"], ["b1", "b2"])
    assert samples.split(["a1", "a2"], first, decide) == (["a1"], ["a2"])
    assert samples.split([], first, decide) == ([], [])


def test_a_share_of_names_is_held_out() -> None:
    share = np.mean([samples.held(f"photo {number}") for number in range(4000)])
    assert share == pytest.approx(0.05, abs=0.015)


def test_the_share_of_straight_samples_is_that_of_the_settings(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    chosen = Synth(photos=(tmp_path,), out=tmp_path, untouched=0.3)
    straight = [data.draw_model(chosen, rng).straight for _ in range(600)]
    assert np.mean(straight) == pytest.approx(0.3, abs=0.06)
