"""Data sets of the isp engine: fixed, in step with the seed, with LibRaw beside the held-out ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from imgtool import metrics
from imgtool.engines.isp import bayer, colour, data, engine, model, unprocess
from imgtool.engines.isp.sample import Drawn
from imgtool.engines.isp.settings import Model, Train
from imgtool.errors import USAGE, ImgtoolError

G2 = colour.camera_to_srgb(unprocess.xyz_to_camera("Canon PowerShot G2"))


def settings(folder: Path, **values: Any) -> Train:
    return Train(photos=(folder,), crop=32, batch=2, held_out=5, **values)


def test_a_sample_is_a_function_of_seed_and_number(photographs: Path) -> None:
    first, second = (data.load(settings(photographs, seed=3))[0] for _ in range(2))
    second[5]
    for one, other in zip(first[70_000], second[70_000], strict=True):
        assert torch.equal(one, other)
    other = data.load(settings(photographs, seed=4))[0]
    assert not torch.equal(first[0].packed, other[0].packed)


def test_held_out_samples_do_not_follow_the_seed(photographs: Path) -> None:
    first, second = (data.load(settings(photographs, seed=seed))[1] for seed in (1, 2))
    assert torch.equal(first[1].packed, second[1].packed)


def test_no_photograph_is_on_both_sides(photographs: Path) -> None:
    train, held_out = data.load(settings(photographs))
    names = [set(data.describe(each)["trained_on"]) for each in (train, held_out)]
    assert names[0]
    assert names[1]
    assert not names[0] & names[1]


def test_progress_is_told_over_the_whole_training(photographs: Path) -> None:
    train, held_out = data.load(settings(photographs, steps=10))
    assert [float(train[number].progress) for number in (0, 10, 19)] == pytest.approx([0, 0.5, 0.95])
    assert train[0].rival.numel() == 0
    assert held_out[0].rival.shape == held_out[0].target.shape


def test_libraw_is_measured_on_the_same_frame(photographs: Path) -> None:
    """Its rendering is nearer to the truth than linear demosaicing where there is no noise."""
    _, held_out = data.load(settings(photographs))
    batch = default_collate([held_out[number] for number in range(5)])
    quiet = batch.noise[:, 0] == 0
    assert bool(quiet.any())
    with torch.inference_mode():
        found = engine.score(model.build(Model()).eval(), batch)
    assert float(found["libraw"][quiet].mean()) > 25
    assert abs(float((found["libraw"] - found["psnr"])[quiet].mean())) < 8


def test_the_truth_belongs_to_the_frame(photographs: Path) -> None:
    train, _ = data.load(settings(photographs))
    batch = default_collate([train[number] for number in range(16)])
    front = engine.front_end(batch).clamp(0, 1)
    target = batch.target.float() / 255
    assert float(metrics.psnr(front, target).median()) > 15


def test_crops_larger_than_the_photo_are_mirrored() -> None:
    photo = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    source = data.Photographs([Path("x")], (1e-4, 1e-3, 0.0), lambda path: photo)  # type: ignore[arg-type]
    drawn = source.draw(0, np.random.default_rng(1), 48)
    assert drawn.packed.shape == (4, 24, 24)
    assert drawn.target.shape == (3, 48, 48)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"photos": ()}, "no training data"),
        ({"least_shot": 0.05}, "--least-shot 0.05 is above"),
        ({"loss": "charbonnier-msssim"}, "crop"),
        ({"scaling": "mai21", "colour": "learned"}, "for --data alone"),
    ],
)
def test_what_cannot_be_is_refused(photographs: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ImgtoolError, match=words) as caught:
        engine.load(settings(photographs).changed(**values))
    assert caught.value.code == USAGE


def test_structure_counts_late(photographs: Path) -> None:
    chosen = Train(photos=(photographs,), crop=192, batch=1, steps=10, loss="charbonnier-msssim")
    train, _ = engine.load(chosen)
    net = model.build(chosen)
    terms = [set(engine.loss(net, default_collate([train[n]]), chosen)) for n in (6, 7)]
    assert terms == [{"charbonnier"}, {"charbonnier", "ms-ssim"}]


def test_raw_files_are_no_photographs(photographs: Path, tmp_path: Path) -> None:
    for path in photographs.iterdir():
        (tmp_path / path.with_suffix(".dng").name).write_bytes(b"II*\0")
    with pytest.raises(ImgtoolError, match="fewer than two photographs") as caught:
        data.load(settings(tmp_path))
    assert "--raws" in caught.value.hint


@pytest.mark.parametrize("fixed", [True, False])
def test_only_held_out_frames_are_exactly_known(fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = unprocess.Recipe((1.9, 1.0, 1.6), G2, 1e-3, 1e-5, exposure=2.0)
    seen, blacks = [], set()
    monkeypatch.setattr(unprocess, "draw", lambda *_: recipe)
    frame, unit = unprocess.frame, unprocess.unit
    monkeypatch.setattr(
        unprocess, "frame", lambda rgb, made, rng: (seen.append(made), frame(rgb, made, rng))[1]
    )
    monkeypatch.setattr(unprocess, "unit", lambda *given: (blacks.add(float(given[1])), unit(*given))[1])
    photo = np.full((64, 64, 3), 90, np.uint8)
    source = data.Photographs([Path("x")], (1e-4, 1e-3, 0.0), lambda path: photo, fixed)  # type: ignore[arg-type]
    for seed in range(20):
        drawn = source.draw(0, np.random.default_rng(seed), 32)
        assert (drawn.noise == pytest.approx(unprocess.expected(seen[-1]))) == fixed
        assert (seen[-1].exposure == 1) == fixed
    assert (blacks == {256.0}) == fixed
    assert max(abs(black - 256) for black in blacks) <= 0.3


def test_the_frame_that_libraw_gets_is_the_one_that_the_network_gets() -> None:
    packed = np.linspace(-0.04, 1, 256, dtype=np.float32).reshape(4, 8, 8)
    drawn = Drawn(packed, (1.9, 1.0, 1.6), G2, (0.0, 0.0), np.zeros((3, 16, 16), np.uint8))
    found = bayer.pack(bayer.window(data._frame(drawn), (0, 16), (0, 16)))
    assert np.abs(found - packed).max() < 1e-5


def test_most_crops_are_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, square = [], data._square
    monkeypatch.setattr(
        data, "_square", lambda photo, size, rng: (sizes.append(size), square(photo, size, rng))[1]
    )
    photo = np.zeros((300, 300, 3), np.uint8)
    source = data.Photographs([Path("x")], (1e-4, 1e-3, 0.0), lambda path: photo)  # type: ignore[arg-type]
    for seed in range(200):
        source.draw(0, np.random.default_rng(seed), 48)
    shrunk = [size / 48 for size in sizes if size != 48]
    assert 0.75 < len(shrunk) / 200 < 0.95
    assert 1.24 < min(shrunk) < 1.4
    assert 2.3 < max(shrunk) <= 2.51


@pytest.mark.parametrize("loss", ["charbonnier", "relative-mse"])
def test_edges_count_neither_in_losses_nor_in_scores(loss: str, photographs: Path) -> None:
    chosen = Train(photos=(photographs,), crop=48, batch=1, held_out=2, loss=loss)
    batch = default_collate([data.load(chosen)[1][0]])
    other = batch.target.clone()
    other[..., :8, :], other[..., -8:, :], other[..., :8], other[..., -8:] = 0, 255, 255, 0
    changed = batch._replace(target=other)
    net = model.build(chosen).requires_grad_(False)
    one, two = (engine.loss(net, each, chosen) for each in (batch, changed))
    assert {key: float(value) for key, value in one.items()} == {
        key: float(value) for key, value in two.items()
    }
    assert float(engine.score(net, batch)["psnr"]) == float(engine.score(net, changed)["psnr"])


def test_libraws_score_is_against_the_truth(photographs: Path) -> None:
    _, held_out = data.load(settings(photographs))
    batch = default_collate([held_out[0]])
    with torch.inference_mode():
        found = engine.score(model.build(Model()).eval(), batch._replace(rival=batch.target))
    assert float(found["libraw"]) == pytest.approx(100)
