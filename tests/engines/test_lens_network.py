"""The image network: it never folds a photo, learns what it is told to, and begins with what is there."""

from __future__ import annotations

import math
import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import pytorch_msssim
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from imgtool import compute, train
from imgtool.engines.lens import data, geometry, network, objective
from imgtool.engines.lens.data import Sample
from imgtool.engines.lens.geometry import BrownConrady
from imgtool.engines.lens.network import Guess, ImageEstimator
from imgtool.engines.lens.settings import Model, Train
from imgtool.errors import FAILED, USAGE, ImgtoolError
from imgtool.settings.sources import presets, resolve

EDGE = 64
FRAMES = torch.tensor([[1.0, 2 / 3], [0.75, 1.0]])
LENSES = (BrownConrady(-0.11, 0.03, 0.002, -0.001), BrownConrady(0.05, -0.02, -0.001, 0.003))
HEADS = ("field", "original")


def build(head: str = "field", seed: int = 0) -> ImageEstimator:
    torch.manual_seed(seed)
    return ImageEstimator(Model(arch="efficientnet-b0", head=head, input=EDGE))  # type: ignore[arg-type]


def settings(**values: Any) -> Train:
    return Train(photos=("x",), arch="efficientnet-b0", input=EDGE, **values)


def tensor(*lenses: BrownConrady) -> Tensor:
    return torch.tensor([[lens.k1, lens.k2, lens.p1, lens.p2] for lens in lenses])


def lenses(coefficients: Tensor) -> list[BrownConrady]:
    return [BrownConrady(*row) for row in coefficients.double().tolist()]


def smooth(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Return a photo of soft colours with a few hard edges."""
    rng = np.random.default_rng(seed)
    photo = cv2.resize(
        rng.integers(30, 220, (7, 9, 3)).astype(np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )
    cv2.rectangle(photo, (width // 5, height // 5), (width // 2, height // 2), (250, 240, 10), 2)
    return np.asarray(photo, np.uint8)


def matrix(width: int, height: int) -> npt.NDArray[np.float64]:
    unit = math.hypot(width, height) / 2
    return np.array([[unit, 0, (width - 1) / 2], [0, unit, (height - 1) / 2], [0, 0, 1]])


def undistorted(photo: npt.NDArray[Any], lens: BrownConrady) -> npt.NDArray[Any]:
    """Straighten with OpenCV, black where there is nothing."""
    coefficients = np.array([lens.k1, lens.k2, lens.p1, lens.p2])
    height, width = photo.shape[:2]
    maps = cv2.initUndistortRectifyMap(
        matrix(width, height), coefficients, None, matrix(width, height), (width, height), cv2.CV_32FC1
    )
    return np.asarray(cv2.remap(photo, *maps, cv2.INTER_LINEAR))


def sample(lens: BrownConrady | None, width: int, height: int, whole: int = EDGE) -> Sample:
    """Return a sample whose straight partner OpenCV made; without a lens its coefficients are not told."""
    photo = smooth(height, width, width)
    straight = undistorted(photo, lens or LENSES[0])
    told = tensor(lens)[0] if lens else torch.full((4,), math.nan)

    def squared(picture: npt.NDArray[Any], edge: int) -> Tensor:
        return torch.from_numpy(data.letterbox(picture, edge).transpose(2, 0, 1).copy())

    pair = [
        squared(each, whole) if whole else torch.empty((3, 0, 0), dtype=torch.uint8)
        for each in (straight, photo)
    ]
    frame = torch.tensor(data.frame_of(width, height))
    return Sample(squared(photo, EDGE), frame, *pair, told, torch.tensor(lens is not None))


@pytest.fixture(scope="module")
def batch() -> Sample:
    made: Sample = default_collate([sample(LENSES[0], 96, 64), sample(LENSES[1], 72, 96)])
    return made


@pytest.fixture(scope="module")
def half_known() -> Sample:
    made: Sample = default_collate([sample(LENSES[0], 96, 64), sample(None, 72, 96)])
    return made


class Told(nn.Module):
    """A network that says what it is told."""

    def __init__(self, coefficients: Tensor, spread: float = 0.001) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(coefficients.clone())
        self.log_spread = nn.Parameter(torch.full_like(coefficients, math.log(spread)))

    def forward(self, image: Tensor, frame: Tensor) -> Guess:
        return Guess(self.coefficients, self.log_spread)


# --- what it says -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_it_says_finite_numbers_in_float32_also_in_half_precision(head: str) -> None:
    net = build(head).eval()
    with torch.autocast("cpu", torch.bfloat16):
        guess = net(torch.rand(2, 3, EDGE, EDGE), FRAMES)
    assert [each.shape for each in guess] == [(2, 4), (2, 4)]
    assert all(each.dtype == torch.float32 and each.isfinite().all() for each in guess)
    assert sum(p.numel() for p in net.features.parameters()) == 4_007_548  # torchvision's B0


def test_a_new_network_says_almost_nothing_and_that_it_is_not_sure() -> None:
    guess = build().eval()(torch.rand(2, 3, EDGE, EDGE), FRAMES)
    assert guess.coefficients.abs().max() < 0.02
    assert (guess.log_spread.exp()[:, 0] > 0.01).all()


@pytest.mark.parametrize("head", HEADS)
def test_the_backbone_sees_what_imagenet_looked_like(head: str) -> None:
    seen: list[Tensor] = []

    class Noted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return torch.zeros(len(x), network.CHANNELS, 2, 2)

    net = build(head)
    net.features = Noted()
    image = torch.stack([torch.tensor([0.485, 0.456, 0.406]), torch.tensor([1.0, 0.0, 1.0])])
    net(image[:, :, None, None].expand(-1, -1, EDGE, EDGE), FRAMES)
    torch.testing.assert_close(seen[0][0], torch.zeros(3, EDGE, EDGE))
    white = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(seen[0][1, :, 5, 7], white)


def test_the_places_are_those_of_the_photo_in_its_square() -> None:
    """A photo of 96 x 64 in a square of 96: cells of 24 pixels, 16 of grey above the photo."""
    x, y, r2 = network.places(torch.zeros(2, 5, 4, 4), FRAMES)[0]
    column, row = np.meshgrid(np.arange(4) * 24 + 11.5, np.arange(4) * 24 + 11.5 - 16)
    wanted_x, wanted_y = geometry.normalise(column, row, 96, 64)
    np.testing.assert_allclose(x, wanted_x, atol=1e-6)
    np.testing.assert_allclose(y, wanted_y, atol=1e-6)
    np.testing.assert_allclose(r2, wanted_x**2 + wanted_y**2, atol=1e-6)


def test_displacements_at_half_and_full_radius_give_the_coefficients() -> None:
    k1, k2 = network.from_displacements(torch.tensor([-0.07, 0.02]), torch.tensor([-0.02, 0.004]))
    torch.testing.assert_close(k1 + k2, torch.tensor([-0.07, 0.02]))
    torch.testing.assert_close(k1 / 4 + k2 / 16, torch.tensor([-0.02, 0.004]))


def test_the_original_heads_box_is_the_originals_on_a_square_photo() -> None:
    """The original: coordinates from the middle in edges of the photo, k1, k2, p1, p2 of 1, 0.5, 0.1, 0.1."""
    k1, k2, p1, p2 = 1.0, 0.5, 0.1, 0.1
    x, y = 0.31, -0.22
    r2 = x * x + y * y
    theirs = (
        x * (1 + k1 * r2 + k2 * r2 * r2) + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
        y * (1 + k1 * r2 + k2 * r2 * r2) + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
    )
    head = network.OriginalHead().eval()
    nn.init.zeros_(head.out.weight)
    nn.init.constant_(head.out.bias, 50.0)
    box, _ = head(torch.zeros(1, network.CHANNELS, 2, 2), FRAMES[:1])
    ours = lenses(box.detach())[0].distort(x * math.sqrt(2), y * math.sqrt(2))
    np.testing.assert_allclose(np.array(ours) / math.sqrt(2), theirs, rtol=1e-6)


# --- it never folds ----------------------------------------------------------------------------------


def assert_unfolded(coefficients: Tensor) -> None:
    """The Jacobian is positive all over the widest frame, the square, and geometry says so too."""
    x, y = geometry.grid(1, 1, 41, 41, 1.0)
    for lens in lenses(coefficients):
        assert not lens.folds()
        assert lens.jacobian(x, y)[3].min() > 0


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("strength", [1.0, 30.0, 1e4])
def test_whatever_the_head_sees_nothing_folds(head: str, strength: float) -> None:
    torch.manual_seed(1)
    net = build(head).eval()
    net.features = nn.Identity()  # type: ignore[assignment]
    net.mean, net.deviation = torch.zeros(()), torch.ones(())
    nn.init.normal_(net.head.out.weight, std=strength)  # type: ignore[union-attr, arg-type]
    with torch.inference_mode():
        guess = net(strength * torch.randn(60, network.CHANNELS, 2, 2), FRAMES[:1].expand(60, -1))
    assert guess.coefficients.isfinite().all()
    assert guess.coefficients.abs().amax() > 0.01
    assert_unfolded(guess.coefficients)
    assert guess.log_spread.isfinite().all()


def test_the_corners_of_the_fields_box_are_shrunk_until_they_do_not_fold() -> None:
    extremes = torch.tensor([-0.3, 0.0, 0.15])
    corner, half = (each.flatten() for each in torch.meshgrid(extremes, extremes, indexing="ij"))
    p = torch.full_like(corner, 0.02)
    raw = torch.stack([*network.from_displacements(corner, half), p, -p], 1)
    assert sum(lens.folds() for lens in lenses(raw)) >= 3
    found = network.unfolded(raw)
    assert_unfolded(found)
    for before, after in zip(lenses(raw), lenses(found), strict=True):
        if before.folds():
            assert after.scaled(1.04).folds()  # no more than it must
        else:
            assert abs(after.k1) >= abs(before.k1) / 1.04


def test_real_lenses_are_not_shrunk() -> None:
    real = tensor(*LENSES, BrownConrady(-0.24, 0.1), BrownConrady(0.16, -0.05), BrownConrady())
    assert torch.equal(network.unfolded(real), real)


def test_shrinking_is_differentiable() -> None:
    raw = torch.tensor(
        [[-0.9, 0.2, 0.01, 0.004], [-0.1, 0.02, 0.0, 0.0]], dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(network.unfolded, (raw,))


# --- how sure it is ----------------------------------------------------------------------------------


def test_the_root_is_that_of_the_covariance_of_the_coefficients() -> None:
    """Drawn: the corner, half radius beyond 0.4 of it, p1, p2; then solved for k1 and k2."""
    spread = torch.tensor([0.03, 0.004, 0.002, 0.001])
    drawn = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0)) * spread
    corner, half = drawn[:, 0], 0.4 * drawn[:, 0] + drawn[:, 1]
    k1, k2 = network.from_displacements(corner, half)
    wanted = torch.cov(torch.stack([k1, k2, drawn[:, 2], drawn[:, 3]]))
    root = network.root(spread.log()[None])[0]
    torch.testing.assert_close(root @ root.T, wanted, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_learning_how_sure_it_is_touches_nothing_else(head: str) -> None:
    net = build(head)
    net(torch.rand(2, 3, EDGE, EDGE), FRAMES).log_spread.sum().backward()
    learnt = {name for name, p in net.named_parameters() if p.grad is not None}
    assert learnt == {"head.spread.weight", "head.spread.bias"}


def test_the_surprise_is_a_normal_negative_log_likelihood(batch: Sample) -> None:
    guess = Guess(torch.zeros(2, 4), torch.tensor([[-3.0, -5.0, -6.0, -5.5], [-4.0, -5.0, -5.0, -6.0]]))
    k1, k2, p1, p2 = batch.coefficients.unbind(1)
    errors = torch.stack([k1 + k2, k1 / 4 + k2 / 16 - 0.4 * (k1 + k2), p1, p2], 1)
    normal = torch.distributions.Normal(0.0, guess.log_spread.exp())
    wanted = -normal.log_prob(errors).mean() - 0.5 * math.log(2 * math.pi)
    assert float(objective.surprise(guess, batch)) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_it_says_the_same_of_a_photo_of_any_type(kind: str) -> None:
    net = build().eval()
    photo = cv2.resize(smooth(40, 60), (240, 160))
    given: Any = {
        "uint8": photo,
        "uint16": photo.astype(np.uint16) * 257,
        "float32": (photo / 255).astype(np.float32),
    }
    mean, root = network.says(net, given[kind])
    square = torch.from_numpy(data.letterbox(photo, EDGE).transpose(2, 0, 1).copy())[None].float() / 255
    with torch.inference_mode():
        guess = net(square, torch.tensor([[1.0, 2 / 3]]))
    np.testing.assert_allclose(mean, guess.coefficients[0], atol=2e-5)
    np.testing.assert_allclose(root, network.root(guess.log_spread)[0], rtol=1e-2, atol=1e-7)
    assert (mean.dtype, root.dtype) == (np.float64, np.float64)


@pytest.mark.slow
def test_it_can_be_exported() -> None:
    net = build().eval()
    net.features = nn.Conv2d(3, network.CHANNELS, 32, 32)
    given = (torch.rand(2, 3, EDGE, EDGE), FRAMES)
    exported = torch.export.export(net, given).module()
    torch.testing.assert_close(exported(*given).coefficients, net(*given).coefficients)


# --- the losses ----------------------------------------------------------------------------------------


def test_the_field_loss_is_least_at_the_truth_and_rises_with_the_error(batch: Sample) -> None:
    steps = [
        float(objective.field_loss(Guess(batch.coefficients + shift, torch.zeros(2, 4)), batch))
        for shift in (0.0, 0.005, 0.02, 0.08)
    ]
    assert steps[0] == pytest.approx(0, abs=1e-6)
    assert steps == sorted(steps)
    assert steps[3] / steps[2] == pytest.approx(4, rel=0.15)  # beyond what no eye sees it is linear


def test_a_zoom_counts_little_in_the_field(batch: Sample) -> None:
    """k1 of half a photo's radius is mostly zoom: what stays after the best similarity is what is bent."""
    points = objective.grid(batch.frame, 16, 16, 1.0)
    zoomed, straight = 1.03 * points + 0.01, points
    assert objective.aligned_apart(zoomed, straight).abs().max() < 1e-6
    bent = objective.moved(batch.coefficients, points)
    turned = torch.stack([-bent[..., 1], bent[..., 0]], -1) * 0.97
    assert objective.aligned_apart(turned, bent).abs().max() < 1e-6


def test_a_photo_in_a_square_is_straightened_as_opencv_does_it() -> None:
    """Unit and mask are those of the photo, not of the square."""
    edge = 96
    for lens, (width, height) in zip(LENSES, [(96, 64), (64, 96)], strict=True):
        photo = smooth(height, width)
        wanted = undistorted(photo, lens).astype(float)
        ones = undistorted(np.ones((height, width), np.float32), lens)
        square = torch.from_numpy(data.letterbox(photo, edge).transpose(2, 0, 1).copy())[None].float()
        frame = torch.tensor([data.frame_of(width, height)])
        straight, mask = objective.straightened(square, tensor(lens), frame)
        top, left = (edge - height) // 2, (edge - width) // 2
        part = (slice(top, top + height), slice(left, left + width))
        inside = mask[0, 0][part].numpy() > 0
        assert int(mask.sum()) == inside.sum()
        assert not inside[ones < 0.95].any()
        assert inside[cv2.erode(ones, np.ones((3, 3))) > 0.999].all()
        apart = np.abs(straight[0].permute(1, 2, 0).numpy()[part] - wanted)[inside]
        assert apart.max() < 6  # OpenCV's weights have 5 bits
        assert apart.mean() < 0.7


def test_the_photo_loss_is_the_originals(batch: Sample) -> None:
    """With nothing to straighten, the mask is the photo: SSIM and L1 of the photos without their squares."""
    structure, colour = objective.photo_losses(torch.zeros(2, 4), batch._replace(frame=torch.ones(2, 2)))
    source, target = batch.source.float() / 255, batch.target.float() / 255
    ssim = pytorch_msssim.ssim(source, target, data_range=1.0, size_average=False)
    torch.testing.assert_close(structure, 0.8 * (1 - ssim))
    torch.testing.assert_close(colour, 0.2 * (source - target).abs().mean((1, 2, 3)))


def test_the_photo_loss_looks_only_where_both_have_something(batch: Sample) -> None:
    found = objective.photo_losses(batch.coefficients, batch)
    spoilt = batch.source.clone()
    spoilt[0, :, :10] = 255  # above the photo of 3:2
    spoilt[1, :, :, :7] = 0  # beside that of 3:4
    for before, after in zip(
        found, objective.photo_losses(batch.coefficients, batch._replace(source=spoilt)), strict=True
    ):
        assert torch.equal(before, after)
    for right, none in zip(found, objective.photo_losses(torch.zeros(2, 4), batch), strict=True):
        assert (right < 0.6 * none).all()


def test_the_loss_has_the_terms_that_were_asked_for(batch: Sample) -> None:
    net = Told(torch.zeros(2, 4))
    terms = {
        kind: set(objective.loss(net, batch, settings(loss=kind))) for kind in ("field", "photo", "both")
    }
    assert terms == {
        "field": {"field", "spread"},
        "photo": {"ssim", "l1", "spread"},
        "both": {"field", "ssim", "l1", "spread"},
    }


@pytest.mark.parametrize("kind", ["field", "photo", "both"])
def test_every_loss_leads_to_the_truth(kind: str, batch: Sample) -> None:
    net = Told(0.6 * batch.coefficients)
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    before = float(objective.score(net, batch)["ade"].mean())
    for _ in range(25):
        optimiser.zero_grad()
        sum(objective.loss(net, batch, settings(loss=kind)).values(), torch.zeros(())).backward()
        optimiser.step()
    assert float(objective.score(net, batch)["ade"].mean()) < 0.75 * before


@pytest.mark.parametrize("kind", ["field", "both"])
def test_photos_of_unknown_lenses_are_no_nan(kind: str, half_known: Sample) -> None:
    net = Told(torch.full((2, 4), 0.01))
    terms = objective.loss(net, half_known, settings(loss=kind))
    sum(terms.values(), torch.zeros(())).backward()
    assert all(term.isfinite() for term in terms.values())
    assert net.coefficients.grad is not None
    assert net.coefficients.grad.isfinite().all()
    assert bool(net.coefficients.grad[1].any()) is (kind == "both")
    alone: Sample = default_collate([sample(LENSES[0], 96, 64)])
    first = objective.loss(Told(torch.full((1, 4), 0.01)), alone, settings())
    assert float(terms["field"].detach()) == pytest.approx(float(first["field"].detach()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_the_loss_reaches_every_weight_and_falls(head: str, batch: Sample) -> None:
    net = build(head)
    optimiser = torch.optim.AdamW(net.parameters(), 1e-3)
    values = []
    for _ in range(4):
        terms = objective.loss(net, batch, settings(loss="both"))
        optimiser.zero_grad()
        sum(terms.values(), torch.zeros(())).backward()
        optimiser.step()
        values.append(float(terms["field"].detach()))
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert min(values[1:]) < values[0]


# --- the scores ------------------------------------------------------------------------------------------


def test_the_score_is_the_error_of_geometry(batch: Sample) -> None:
    guesses = (BrownConrady(-0.09, 0.03), BrownConrady(0.03, 0.01, 0.002))
    scores = objective.score(Told(tensor(*guesses)), batch)
    sizes = ((96, 64), (72, 96))
    for name, lenses_said in (("ade", guesses), ("untouched", (BrownConrady(), BrownConrady()))):
        wanted = [
            geometry.error(*both, *size) for *both, size in zip(lenses_said, LENSES, sizes, strict=True)
        ]
        assert scores[name].tolist() == pytest.approx(wanted, rel=1e-3)
    apart = [abs(a.corner - b.corner) * 50 for a, b in zip(guesses, LENSES, strict=True)]
    assert scores["corner"].tolist() == pytest.approx(apart, rel=1e-4)
    assert (scores["photo"] < scores["photo-untouched"]).all()


def test_the_gated_score_is_that_of_doing_nothing_where_the_network_is_not_sure(batch: Sample) -> None:
    sure = objective.score(Told(tensor(*LENSES), spread=1e-5), batch)
    unsure = objective.score(Told(tensor(*LENSES), spread=0.3), batch)
    assert torch.equal(sure["gated"], sure["ade"])
    assert torch.equal(unsure["gated"], unsure["untouched"])


def test_unknown_lenses_and_missing_partners_have_no_scores(half_known: Sample) -> None:
    scores = objective.score(Told(torch.zeros(2, 4)), half_known)
    assert {name: len(values) for name, values in scores.items()} == {
        "ade": 1, "untouched": 1, "gated": 1, "corner": 1, "photo": 2, "photo-untouched": 2
    }  # fmt: skip
    alone: Sample = default_collate([sample(LENSES[0], 96, 64, whole=0)])
    assert set(objective.score(Told(torch.zeros(1, 4)), alone)) == {"ade", "untouched", "gated", "corner"}


def test_the_sheet_shows_the_truth_or_the_partner(half_known: Sample) -> None:
    columns = objective.samples(Told(batch_truth := tensor(*LENSES)), half_known)
    assert list(columns) == ["photo", "straightened", "truth"]
    assert {each.shape for each in columns.values()} == {(2, 3, EDGE, EDGE)}
    torch.testing.assert_close(columns["truth"][0], columns["straightened"][0])
    torch.testing.assert_close(columns["truth"][1], half_known.target[1].float() / 255)
    assert batch_truth.shape == (2, 4)


# --- the two phases -----------------------------------------------------------------------------------


def test_the_second_phase_opens_the_end_of_the_backbone() -> None:
    net = build("original")
    given = settings(freeze="features", unfreeze_epoch=6, unfreeze_share=0.3, epoch_steps=10)
    phases = train.Phases(net, given)
    counts = []
    for step in (0, 49, 50):
        net.train()
        phases.enter(step)
        learning = [name for name, p in net.named_parameters() if p.requires_grad]
        counts.append(sum(name.startswith("features") for name in learning))
        assert sum(name.startswith("head") for name in learning) == 8
        norms = [m for m in net.features.modules() if isinstance(m, nn.BatchNorm2d)]
        assert not any(norm.training for norm in norms)
        assert not any(p.requires_grad for norm in norms for p in norm.parameters())
    assert counts[:2] == [0, 0]
    assert 25 < counts[2] < 64  # of the last 64 tensors those that are not of normalisation
    assert net.get_parameter("features.8.0.weight").requires_grad
    assert not net.get_parameter("features.5.0.block.0.0.weight").requires_grad


def test_every_preset_is_valid_and_the_originals_has_its_two_phases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = {name: resolve(Train, "train", "lens", {"pairs": ["x"]}, preset=name) for name in presets()}
    original = found["original"].changed(input=EDGE)
    phases = train.Phases(ImageEstimator(original), original)
    epochs = original.steps / original.epoch_steps
    assert (phases.opens, epochs) == (5 * original.epoch_steps, 15)
    assert len({train.learning_rate(step, original) for step in (0, 500, original.steps - 1)}) == 1


# --- weights of the backbone ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchvisions() -> dict[str, Tensor]:
    torch.manual_seed(7)
    models: Any = compute.torchvision().models
    state: dict[str, Tensor] = models.efficientnet_b0(weights=None).state_dict()
    return state


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def assert_filled(net: ImageEstimator, state: Mapping[str, Tensor]) -> None:
    for name, value in net.features.state_dict().items():
        assert torch.equal(value, state[f"features.{name}"])


@pytest.mark.parametrize("part", ["whole", "without a classifier", "features alone"])
def test_the_backbone_is_filled_from_torchvisions_file(
    part: str, torchvisions: dict[str, Tensor], tmp_path: Path
) -> None:
    state = {k: v for k, v in torchvisions.items() if part == "whole" or not k.startswith("classifier")}
    if part == "features alone":
        state = {name.removeprefix("features."): value for name, value in state.items()}
    torch.save(state, tmp_path / "b0.pth")
    net = build()
    head = {name: value.clone() for name, value in net.head.state_dict().items()}
    assert (
        network.begin(net, settings(backbone=str(tmp_path / "b0.pth"))) == f"backbone: {tmp_path / 'b0.pth'}"
    )
    assert_filled(net, torchvisions)
    for name, value in net.head.state_dict().items():
        assert torch.equal(value, head[name])


def test_auto_takes_the_file_that_is_there_and_downloads_nothing(
    checkpoints: Path, torchvisions: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.hub, "download_url_to_file")
    net = build()
    before = net.features.state_dict()["0.0.weight"].clone()
    assert "random weights" in network.begin(net, settings())
    assert torch.equal(net.features.state_dict()["0.0.weight"], before)
    checkpoints.mkdir(parents=True)
    torch.save(torchvisions, checkpoints / "efficientnet_b0_rwightman-3dd342df.pth")
    assert "random weights" in network.begin(net, settings(backbone="none"))
    for backbone in ("auto", "imagenet"):
        net = build()
        assert "3dd342df" in network.begin(net, settings(backbone=backbone))
        assert_filled(net, torchvisions)


def test_imagenet_downloads_once(
    checkpoints: Path, torchvisions: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def download(url: str, target: str, prefix: str, progress: bool) -> None:
        asked.append((url, prefix))
        torch.save(torchvisions, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        network.begin(net := build(), settings(backbone="imagenet"))
        assert_filled(net, torchvisions)
    [(url, prefix)] = asked
    assert url.startswith("https://download.pytorch.org/models/efficientnet_b0")
    assert url.endswith(f"-{prefix}.pth")
    assert len(prefix) == 8


@pytest.mark.parametrize("fault", [urllib.error.URLError("no network"), RuntimeError("invalid hash value")])
def test_a_download_that_fails_is_one_error(
    fault: Exception, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ImgtoolError, match=r"cannot download https://download\.pytorch\.org") as caught:
        network.begin(build(), settings(backbone="imagenet"))
    assert str(checkpoints) in caught.value.hint
    assert "--backbone none" in caught.value.hint
    assert caught.value.code == FAILED


def test_files_that_are_no_weights_of_b0_are_refused(torchvisions: dict[str, Tensor], tmp_path: Path) -> None:
    path, net = tmp_path / "b0.pth", build()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    features = {k: v for k, v in torchvisions.items() if k.startswith("features.")}
    foreign: list[tuple[object, str]] = [
        ([1, 2], "holds something else"),
        ({"features.0.0.weight": 3}, "holds something else"),
        ({"layer1.weight": torch.zeros(3)}, "is not of EfficientNet-B0"),
        (features | {"features.0.0.weight": torch.zeros(2)}, "is not of EfficientNet-B0"),
        ({k: v for k, v in features.items() if k != "features.8.0.weight"}, "is not of EfficientNet-B0"),
        (features | {"features.0.0.weight": torch.full((32, 3, 3, 3), math.nan)}, "not finite"),
        (Path("/a/picture"), "no readable file"),
    ]
    for held, words in foreign:
        torch.save(held, path)
        with pytest.raises(ImgtoolError, match=words) as caught:
            network.begin(net, settings(backbone=str(path)))
        assert "efficientnet_b0" in caught.value.hint
    torch.save(features, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ImgtoolError, match="no readable file"):
        network.begin(net, settings(backbone=str(path)))
    with pytest.raises(ImgtoolError, match="no weights file") as caught:
        network.begin(net, settings(backbone=str(tmp_path / "none.pth")))
    assert caught.value.code == USAGE
    kept = net.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in before.items() if name.startswith("head"))


@pytest.mark.parametrize("freeze", ["features", "features.", "features.0"])
def test_random_weights_are_not_frozen(freeze: str) -> None:
    with pytest.raises(ImgtoolError, match=f"--freeze {freeze} would keep random weights") as caught:
        network.begin(build(), settings(backbone="none", freeze=freeze))
    assert caught.value.code == USAGE
    assert "--backbone imagenet" in caught.value.hint
    assert network.begin(build(), settings(backbone="none", freeze="head"))


def test_weights_that_were_named_and_other_networks_need_no_backbone(tmp_path: Path) -> None:
    given = settings(backbone=str(tmp_path / "none.pth"), weights="mine.safetensors", freeze="features")
    assert network.begin(build(), given) == ""
    assert network.begin(nn.Linear(1, 1), settings(backbone=str(tmp_path / "none.pth"))) == ""
