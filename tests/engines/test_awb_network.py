"""What the awb networks see, say and learn from."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde
from torch.utils.data import default_collate

from imgtool.engines.awb import data, estimate, features, model, network
from imgtool.engines.awb.camera import GENERIC, Camera, Locus
from imgtool.engines.awb.settings import Model, Train
from imgtool.engines.awb.stats import AwbStats
from imgtool.engines.awb.tuning import Tuning
from imgtool.errors import ImgtoolError

CURVE = Locus(
    np.array([2800.0, 4000.0, 5000.0, 6500.0]),
    np.array([0.80, 0.60, 0.50, 0.42]),
    np.array([0.35, 0.50, 0.58, 0.66]),
)
CAMERA = Camera("one", CURVE, known=True, tuning=Tuning("one", CURVE))


def frame(seed: int = 0, camera: Camera = CAMERA, shape: tuple[int, int] = (12, 16)) -> AwbStats:
    """A scene of random colours under 4000 K."""
    rng = np.random.default_rng(seed)
    cells = rng.uniform(0.1, 0.6, (*shape, 3)) * np.array([0.6, 1.0, 0.5])
    coverage = rng.uniform(0.3, 1, shape)
    return AwbStats(
        cells.astype(np.float32), coverage.astype(np.float32), camera, truth=(0.6, 0.5), lux=300.0
    )


def degrees(one: Any, two: Any) -> float:
    a, b = (np.array([white[0], 1.0, white[1]]) for white in (one, two))
    return math.degrees(math.atan2(float(np.linalg.norm(np.cross(a, b))), float(a @ b)))


def modules() -> dict[str, Any]:
    torch.manual_seed(3)
    small = Model(arch="deepawb", height=48, width=64)
    return {"hist": model.build(Model()).eval(), "deepawb": model.build(small).eval()}


# --- what they see ---


def test_another_light_is_a_shift_of_every_colour_and_edge() -> None:
    space, stats = features.Space.of(CAMERA), frame()
    light = np.array([1.3, 1.0, 0.7], np.float32)
    before, after = (features.points(s, space) for s in (stats, stats.changed(cells=stats.cells * light)))
    shift = np.log(light[[0, 2]]) * space.scale
    assert np.allclose(after.cells - before.cells, shift, atol=1e-5)
    moved = np.isclose(after.edges - before.edges, shift, atol=1e-3).all(1)
    assert moved.mean() > 0.95  # but those at the floor, of which no colour is known


def test_exposure_changes_nothing() -> None:
    space, stats = features.Space.of(CAMERA), frame()
    one, two = (
        features.histograms(features.points(s, space)) for s in (stats, stats.changed(cells=stats.cells / 8))
    )
    assert np.allclose(one, two, atol=1e-4)


def test_a_point_counts_in_the_four_bins_around_it() -> None:
    step = 2 * features.REACH / (features.BINS - 1)
    place = np.array([[-features.REACH + 3.25 * step, -features.REACH + 7.5 * step]], np.float32)
    none = np.zeros((0, 2), np.float32)
    one = np.ones(1, np.float32)
    counted = features.histograms(features.Points(place, one, one, none, np.zeros(0, np.float32)))
    shares = np.square(counted[0]) / 50
    assert shares[3, 7] == pytest.approx(0.75 * 0.5, abs=1e-3)
    assert shares[4, 8] == pytest.approx(0.25 * 0.5, abs=1e-3)
    assert shares.sum() == pytest.approx(1, abs=1e-3)
    assert counted.shape == (features.MAPS, features.BINS, features.BINS)
    assert not counted[2].any()


def test_cells_that_do_not_count_are_not_seen() -> None:
    stats = frame()
    cells, coverage = stats.cells.copy(), stats.coverage.copy()
    cells[0, 0], cells[1, 1], cells[2, 2], coverage[3, 3] = np.nan, 0, np.inf, 0.1
    seen = features.points(stats.changed(cells=cells, coverage=coverage), features.Space.of(CAMERA))
    assert len(seen.cells) == 12 * 16 - 4
    assert all(np.isfinite(part).all() for part in seen)


def test_candidates_lie_on_the_curve_and_across_it() -> None:
    lights = features.candidates(CAMERA)
    offsets = len(features.OFFSETS)
    on = lights.white.reshape(-1, offsets, 2)[:, offsets // 2]
    mired = np.linspace(features.COOLEST, features.WARMEST, features.LIGHTS)
    expected = CURVE.at(np.clip(1e6 / mired, 2800, 6500))
    assert np.allclose(on, expected, rtol=1e-5)
    wide = features.candidates(Camera("two", CURVE, known=False))
    off = wide.place.reshape(-1, offsets, 2)
    assert np.allclose(
        np.linalg.norm(off[20, -1] - off[20, 0], axis=-1), 4 * features.SPREAD["generic"], rtol=1e-3
    )


def test_a_picture_is_stretched_as_opencv_does_it() -> None:
    import cv2

    stats = replace(frame(shape=(6, 9)), coverage=np.ones((6, 9), np.float32))
    ours = features.picture(stats, 24, 40)
    level = np.clip(stats.cells / (4 * stats.cells.mean()), 0, 1) ** (1 / 2.2)
    theirs = (cv2.resize(level, (40, 24), interpolation=cv2.INTER_LINEAR) - 0.45) / 0.25
    assert np.abs(ours - theirs.transpose(2, 0, 1)).max() < 1e-3


# --- what they say ---


def test_sizes() -> None:
    counts = {
        name: sum(p.numel() for p in model.build(Model(arch=name)).parameters())
        for name in ("hist", "deepawb")
    }
    assert counts == {"hist": 6082, "deepawb": 276_865}


@pytest.mark.parametrize("name", ["hist", "deepawb"])
def test_numpy_says_what_torch_says(name: str) -> None:
    module = modules()[name]
    with torch.no_grad():
        for buffer in module.buffers():
            if buffer.dtype.is_floating_point:
                buffer.uniform_(0.5, 1.5)
    frames = [frame(seed, camera) for seed, camera in enumerate([CAMERA, GENERIC])]
    batch = default_collate([data.sample(stats, module.shape, 1.0) for stats in frames])
    with torch.inference_mode():
        expected = module.whites(batch)[0].numpy()
    net = estimate.of_state(module.shape, {k: v.numpy() for k, v in module.state_dict().items()})
    for stats, white in zip(frames, expected, strict=True):
        assert degrees(estimate.white(net, stats), white) < 1e-3
        assert degrees(estimate.white(module, stats), white) < 1e-3


def test_confidence_is_the_probability_of_three_degrees() -> None:
    """With no scores at all the posterior is the prior, which the test sums up by hand."""
    module = modules()["hist"]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    net = estimate.of_state(Model(), {k: v.numpy() for k, v in module.state_dict().items()})
    found = estimate.white(net, frame())
    lights = features.candidates(CAMERA)
    share = np.exp(lights.prior) / np.exp(lights.prior).sum()
    white = np.exp((share[:, None] * np.log(lights.white)).sum(0))
    near = sum(p for p, each in zip(share, lights.white, strict=True) if degrees(each, white) <= 3)
    assert (found.r, found.b) == pytest.approx(tuple(white), rel=1e-4)
    assert found.confidence == pytest.approx(float(near), abs=1e-4)


def test_a_frame_without_a_cell_that_counts_is_refused() -> None:
    black = AwbStats(np.zeros((2, 2, 3), np.float32), np.ones((2, 2), np.float32), CAMERA)
    with pytest.raises(ImgtoolError, match="nothing to measure"):
        estimate.white(modules()["hist"], black)


def test_shapes_that_make_no_network_are_refused() -> None:
    for values, words in (
        ({"kernels": "3,4,5"}, "even"),
        ({"channels": "8,16"}, "not three"),
        ({"neurons": 4, "layers": 6}, "do not fill"),
        ({"height": 16, "strides": "3,3,3"}, "too small"),
    ):
        with pytest.raises(ImgtoolError, match=words):
            network.DeepAwb(Model(arch="deepawb", **values))


# --- what they learn from ---


def test_angles_by_hand() -> None:
    one, two = torch.tensor([[1.0, 1.0], [0.5, 0.5]]), torch.tensor([[1.0, 1.0], [1.0, 0.5]])
    recovery, reproduction = model.angles(one, two)
    assert float(recovery[0]) == pytest.approx(0, abs=1e-3)
    assert float(recovery[1]) == pytest.approx(
        math.degrees(math.acos(1.75 / math.sqrt(1.5 * 2.25))), abs=1e-3
    )
    swapped = model.angles(two, one)[1]
    assert float(reproduction[1]) == pytest.approx(math.degrees(math.acos(4 / math.sqrt(18))), abs=1e-3)
    assert abs(float(swapped[1]) - float(reproduction[1])) > 0.5


def test_density_weights_are_those_of_scipys_kernel_density() -> None:
    whites = np.random.default_rng(0).normal([0.5, 0.6], [0.1, 0.05], (80, 2))
    inverse = 1 / (gaussian_kde(whites.T, bw_method=0.5)(whites.T) + 1e-6)
    assert np.allclose(data.density_weights(whites), np.clip(inverse / inverse.mean(), 0.1, 15), rtol=1e-4)


def test_relit_frames_keep_the_scene_and_forget_lux() -> None:
    stats = frame()
    other = data.relit(stats, np.random.default_rng(1))
    truth, white = np.array([stats.truth, other.truth])
    assert other.lux is None
    assert not np.allclose(truth, white, rtol=0.02)
    one = stats.cells / np.array([truth[0], 1, truth[1]])
    two = other.cells / np.array([white[0], 1, white[1]])
    assert np.allclose(one, two, rtol=1e-4)
    assert data.relit(stats.changed(camera=GENERIC), np.random.default_rng(1)).truth == stats.truth


def test_folds_keep_groups_whole_and_alike_in_size() -> None:
    names = ["a"] * 50 + ["b"] * 30 + ["c"] * 25 + ["d"] * 10
    dealt = data.fold_of(names, 2)
    sizes = [sum(dealt[name] == fold for name in names) for fold in (0, 1)]
    assert sizes == [60, 55]
    with pytest.raises(ImgtoolError, match="4 groups cannot make 5 folds"):
        data.fold_of(names, 5)


def test_a_split_holds_out_whole_groups() -> None:
    every = [frame(n).changed(group=name) for n, name in enumerate("aaabbccccd")]
    for fold in range(2):
        kept, out = data.divided(every, Train(folds=2, fold=fold))
        assert {s.group for s in kept}.isdisjoint(s.group for s in out)
        assert len(kept) + len(out) == len(every)
    kept, out = data.divided(every, Train())
    assert out
    assert {s.group for s in kept}.isdisjoint(s.group for s in out)
    for values in ({"fold": 1}, {"folds": 2, "fold": 2}):
        with pytest.raises(ImgtoolError, match="no fold"):
            data.divided(every, Train(**values))
    both = data.divided(every, Train(train_on_all=True))
    assert len(both[0]) == len(both[1]) == len(every)


def test_weights_remember_the_frames_that_they_were_trained_on() -> None:
    settings = Train()
    every = [frame(n).changed(name=f"some/folder/{n}.png") for n in range(3)]
    real = data.Real(data.Frames(every, [1.0] * 3), settings, disturb=True)
    expected = sorted(hashlib.sha256(f"{n}".encode()).hexdigest()[:8] for n in range(3))
    assert data.describe(real) == {"frames": expected}


def test_the_originals_loss_is_the_weighted_squared_error() -> None:
    module = modules()["deepawb"]
    batch = default_collate([data.sample(frame(n), module.shape, 1.0 + n) for n in range(3)])
    with torch.no_grad():
        found = model.loss(module, batch, Train(loss="mse"))["mse"]
        estimated = module.whites(batch)[0]
    by_hand = [(1 + n) * ((estimated[n] - torch.tensor([0.6, 0.5])) ** 2).mean() for n in range(3)]
    assert float(found) == pytest.approx(float(sum(by_hand)) / 3, rel=1e-5)
