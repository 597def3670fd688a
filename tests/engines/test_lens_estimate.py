"""The lens engine's eyes: edges are found where they are, and what they say of the lens is right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch

from imgtool.engine import Watch
from imgtool.engines.lens import estimate, evidence, lines, plumb, posterior, prior, synthesis
from imgtool.engines.lens.geometry import BrownConrady, error, half_size, pixels
from imgtool.engines.lens.settings import Infer, Train
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import Photo

Array = npt.NDArray[Any]
BARREL = BrownConrady(-0.08, 0.03, 0.001, -0.002)
PINCUSHION = BrownConrady(0.06, -0.02)
MODELS = pytest.mark.parametrize("model", [BARREL, PINCUSHION, BrownConrady(0.01, 0.04)], ids=str)


def facade(width: int = 720, height: int = 480, seed: int = 0) -> Array:
    """Draw straight lines of every direction, smooth-edged, on two tones."""
    rng = np.random.default_rng(seed)
    picture = np.full((2 * height, 2 * width), 150, np.uint8)
    for _ in range(26):
        ends = rng.uniform(-0.1, 1.1, (2, 2)) * [2 * width, 2 * height]
        tone, thick = int(rng.integers(0, 110)), int(rng.integers(8, 22))
        first, last = (tuple(int(v * 16) for v in end) for end in ends)
        cv2.line(picture, first, last, tone, thick, cv2.LINE_AA, 4)
    small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return np.repeat(small[..., None], 3, 2)


def seen_through(picture: Array, model: BrownConrady) -> Array:
    height, width = picture.shape[:2]
    view = synthesis.View(0.99 * synthesis.zoom(model, width, height))
    return synthesis.look(picture, *synthesis.inverse_map(model, width, height), view)


def infer(**values: Any) -> Infer:
    return Infer(inputs=("-",), **values)


# --- edges --------------------------------------------------------------------------------------


def test_edges_lie_on_the_lines_of_the_picture() -> None:
    picture = np.full((300, 400, 3), 40, np.uint8)
    picture[:, 171:] = 200  # the edge is at x = 170.5
    found = lines.find(picture)
    x, y = pixels(found.points[..., 0], found.points[..., 1], 400, 300)
    assert len(x) >= 1
    assert np.abs(x[0] - 170.5).max() < 0.05
    assert y[0].max() - y[0].min() > 270


def test_straight_lines_are_found_straight_and_bent_ones_bent() -> None:
    straight = lines.find(facade())
    bow, length = lines.bows(straight.points)
    long = length > 0.5
    assert long.sum() > 15
    assert np.median(np.abs(bow[long, 0])) * straight.half_diagonal < 0.06
    bent = lines.find(seen_through(facade(), BrownConrady(-0.15, 0.05)))
    bow, length = lines.bows(bent.points)
    assert np.median(np.abs(bow[length > 0.5, 0])) * bent.half_diagonal > 0.5


def test_the_squares_of_a_chessboard_are_joined_to_lines() -> None:
    board = np.kron(np.indices((7, 9)).sum(0) % 2, np.ones((50, 50)))
    picture = np.full((500, 640), 255, np.uint8)
    picture[70:420, 90:540] = (40 + 200 * board).astype(np.uint8)
    turned = cv2.warpAffine(
        picture, cv2.getRotationMatrix2D((320, 250), 13, 1), (640, 500), borderValue=255, flags=cv2.INTER_AREA
    )
    found = lines.find(np.repeat(turned[..., None], 3, 2))
    length = np.hypot(*(found.points[:, -1] - found.points[:, 0]).T) * found.half_diagonal
    assert (length > 280).sum() >= 12
    assert found.facts[:, 3].max() > 0


def test_a_frame_around_the_photo_is_no_edge() -> None:
    picture = np.full((200, 300, 3), 120, np.uint8)
    picture[:2], picture[-2:], picture[:, :2], picture[:, -2:] = 0, 0, 0, 0
    assert not len(lines.find(picture).points)


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (16, 16), (40, 57)])
def test_small_and_empty_pictures_have_no_edges(size: tuple[int, int]) -> None:
    assert not len(lines.find(np.zeros((*size, 3), np.uint8)).points)


def test_depth_does_not_matter() -> None:
    eight = facade(360, 240)
    deep = lines.find(eight.astype(np.uint16) * 257)
    floating = lines.find(eight.astype(np.float32) / 255)
    for other in (deep, floating):
        assert np.allclose(lines.find(eight).points, other.points, atol=1e-6)


# --- likelihood ---------------------------------------------------------------------------------


@MODELS
def test_straightening_points_inverts_the_model(model: BrownConrady) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.uniform(-0.7, 0.7, (2, 5, lines.POINTS))
    photo = np.stack(model.distort(x, y), -1)
    candidates = torch.tensor([[[model.k1, model.k2, model.p1, model.p2]]])
    back = photo + plumb.displaced(torch.from_numpy(photo).float()[None], candidates)[0, 0].numpy()
    assert np.abs(back - np.stack([x, y], -1)).max() < 5e-4


@MODELS
def test_the_true_model_leaves_straight_edges_straight(model: BrownConrady) -> None:
    found = lines.find(seen_through(facade(), model))
    given = plumb.evidence(found)
    candidates = torch.tensor([[[model.k1, model.k2, model.p1, model.p2], [0, 0, 0, 0]]])
    left = plumb.bends(given, candidates)[0, :, :, 0].abs()
    long = np.hypot(*(found.points[:, -1] - found.points[:, 0]).T) > 0.5
    assert float(left[0, long].median()) < 0.1 < 0.2 < float(left[1, long].median())


def test_edges_that_fill_up_say_nothing() -> None:
    found = lines.find(facade())
    given = plumb.evidence(found)
    padded = plumb.Evidence(
        torch.cat([given.points, torch.zeros(1, 7, lines.POINTS, 2)], 1),
        torch.cat([given.facts, torch.zeros(1, 7, 4)], 1),
        given.half_diagonal,
    )
    torch.manual_seed(0)
    net = plumb.LinesNet().eval()
    with torch.no_grad():
        net.says.weight.normal_(0, 0.2)
        some = torch.tensor([[[0.02, -0.01, 0.0, 0.0], [-0.05, 0.0, 0.001, 0.0]]])
        one = plumb.log_likelihood(net(given), plumb.bends(given, some))
        two = plumb.log_likelihood(net(padded), plumb.bends(padded, some))
    assert torch.allclose(one, two, atol=1e-3)


def test_weights_of_candidates_turn_sums_into_integrals_over_the_prior() -> None:
    settings = Train(photos=(Path("x"),), prior="photo")
    rng = np.random.default_rng(0)
    sums, firsts = [], []
    for _ in range(300):
        model = prior.draw(rng, "photo", settings.decentred)
        drawn, log_weights = evidence.candidates(
            np.array([model.k1, model.k2, model.p1, model.p2]), settings, rng
        )
        sums.append(np.exp(log_weights).mean())
        firsts.append((np.exp(log_weights) * (drawn[:, 0] < 0)).mean())
    assert np.mean(sums) == pytest.approx(1, abs=0.04)
    below = (prior.draws(rng, "photo", 0.002, 4000)[:, 0] < 0).mean()
    assert np.mean(firsts) == pytest.approx(below, abs=0.05)


@pytest.mark.slow
def test_a_photo_without_edges_is_no_surprise() -> None:
    settings = Train(photos=(Path("x"),))
    rng = np.random.default_rng(0)
    empty = lines.Lines(np.zeros((0, lines.POINTS, 2)), np.zeros((0, 4)), 300.0)
    samples = [
        evidence.sample(evidence.Traced(empty, 400, 300), prior.draw(rng, "mixed", 0.002), settings, rng)
        for _ in range(80)
    ]
    batch = evidence.Sample(*(torch.stack(parts) for parts in zip(*samples, strict=True)))
    with torch.no_grad():
        assert float(plumb.loss(plumb.LinesNet(), batch, 0.2).mean()) == pytest.approx(0, abs=0.08)


@MODELS
def test_bending_edges_is_bending_pixels(model: BrownConrady) -> None:
    """The training set bends the edges of a straight picture; here they are traced in the bent one."""
    picture = facade(seed=4)
    straight = evidence.Traced(lines.find(picture), 720, 480)
    bent = evidence.bent(straight, model, [False, False, False]).found
    candidates = torch.tensor([[[model.k1, model.k2, model.p1, model.p2]]])
    left = plumb.bends(plumb.evidence(bent), candidates)[0, 0, :, 0].abs()
    long = np.hypot(*(bent.points[:, -1] - bent.points[:, 0]).T) > 0.5
    assert float(left[long].median()) < 0.1
    half_width = half_size(720, 480)[0]
    assert (np.abs(bent.points[..., 0]) <= half_width).mean() > 0.9


# --- posterior ----------------------------------------------------------------------------------


def test_errors_are_those_of_the_geometry() -> None:
    bent = posterior.field(720, 480)
    for model in (BARREL, PINCUSHION):
        numbers = np.array([[model.k1, model.k2, model.p1, model.p2]])
        wanted = error(model, BrownConrady(), 720, 480)
        assert posterior.errors(numbers, bent)[0] == pytest.approx(wanted, rel=0.12)


@pytest.mark.parametrize("spread", [0.008, 0.002, 0.0005])
def test_a_normal_likelihood_gives_its_own_posterior(spread: float) -> None:
    truth, scale = np.array([-0.05, 0.02, 0.001, -0.001]), np.array([spread, spread, 3e-4, 3e-4])

    def likelihood(candidates: Array) -> Array:
        return np.asarray(-0.5 * (((candidates - truth) / scale) ** 2).sum(1))

    found = posterior.estimate(likelihood, 3, 2)
    model = found.model
    assert [model.k1, model.k2] == pytest.approx(truth[:2], abs=0.7 * spread)
    assert found.spread[0] == pytest.approx(spread, rel=0.35)
    assert found.evidence > 3
    assert posterior.estimate(likelihood, 3, 2) == found


def test_without_evidence_the_prior_remains() -> None:
    found = posterior.estimate(lambda candidates: np.zeros(len(candidates)), 3, 2, "photo")
    assert found.straight == pytest.approx(posterior.STRAIGHT, abs=0.02)
    assert abs(found.model.corner) < 0.01
    assert found.error == pytest.approx(found.untouched, rel=0.1)


@pytest.mark.slow
def test_photos_of_one_lens_are_surer_together() -> None:
    one = estimate.edge_evidence(None, seen_through(facade(seed=1), BARREL))
    two = estimate.edge_evidence(None, seen_through(facade(seed=2), BARREL))
    alone, both = estimate.together([one]), estimate.together([one, two])
    assert both.error < alone.error
    assert both.evidence > alone.evidence


def test_normal_estimates_are_pooled_by_their_precision() -> None:
    narrow = posterior.around(np.array([0.02, 0, 0, 0]), np.diag([0.002, 0.002, 1e-4, 1e-4]), 3, 2)
    wide = posterior.around(np.array([-0.02, 0, 0, 0]), np.diag([0.02, 0.02, 1e-4, 1e-4]), 3, 2)
    found = posterior.pooled([narrow, wide], 3, 2)
    assert found.model.k1 == pytest.approx(0.0196, abs=0.001)
    assert found.spread[0] < 0.0022


# --- estimators ---------------------------------------------------------------------------------


@MODELS
def test_fixed_weights_find_the_lens_of_a_facade(model: BrownConrady) -> None:
    found = estimate.together([estimate.edge_evidence(None, seen_through(facade(), model))])
    assert error(found.model, model, 720, 480) < 0.3 * error(BrownConrady(), model, 720, 480)
    assert found.risk < 0.1


def test_a_photo_that_shows_nothing_is_left_alone() -> None:
    photo = Photo(np.full((200, 300, 3), 90, np.uint8))
    found = estimate.of(plumb.LinesNet(), photo, infer(), Watch())
    assert found.model.straight
    assert found.method == "none"
    assert found.reason


def test_a_photo_that_was_corrected_already_is_left_alone() -> None:
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description rdf:about="" xmlns:aux="http://ns.adobe.com/exif/1.0/aux/" '
        b'aux:DistortionCorrectionAlreadyApplied="True"/></rdf:RDF></x:xmpmeta>'
    )
    photo = Photo(seen_through(facade(), BARREL), xmp=xmp)
    net = plumb.LinesNet()
    found = estimate.of(net, photo, infer(estimator="lines"), Watch())
    assert found.model.straight
    assert "already" in found.reason
    again = estimate.of(net, photo, infer(estimator="lines", force=True), Watch())
    assert not again.model.straight


def test_given_coefficients_are_taken_as_they_are() -> None:
    photo = Photo(facade(120, 80))
    found = estimate.of(plumb.LinesNet(), photo, infer(coeffs="-0.08, 0.03,0.001,-0.002"), Watch())
    assert found.model == BARREL
    assert found.method == "given"


@pytest.mark.parametrize("text", ["-0.5,0,0,0", "1,2,3", "a,b,c,d", "nan,0,0,0", "inf,0,0,0", "gone.yml"])
def test_coefficients_that_are_of_no_use(text: str) -> None:
    with pytest.raises(ImgtoolError) as caught:
        estimate.of(plumb.LinesNet(), Photo(facade(120, 80)), infer(coeffs=text), Watch())
    assert caught.value.code == USAGE
    assert caught.value.hint


def test_the_originals_coefficients_are_fitted() -> None:
    told: list[str] = []
    watch = Watch(say=told.append)
    photo = Photo(facade(120, 80))
    found = estimate.of(plumb.LinesNet(), photo, infer(coeffs="0.1,0,0,0", normalisation="original"), watch)
    assert found.model.k1 > 0
    assert any("wrong by" in line for line in told)


def test_a_group_is_solved_together_and_others_alone(tmp_path: Path) -> None:
    photos = [
        (str(tmp_path / f"{n}.png"), lambda n=n: Photo(seen_through(facade(seed=n), BARREL))) for n in (1, 2)
    ]

    def broken() -> Photo:
        raise ImgtoolError("unreadable")

    other = ("elsewhere/3.png", lambda: Photo(facade(seed=3)))
    settings = infer(estimator="lines", group="folder")
    found = estimate.survey(
        plumb.LinesNet(), [*photos, (str(tmp_path / "x.png"), broken), other], settings, Watch()
    )
    assert found[0] is not None
    assert found[0] is found[1]
    assert found[0].together == 2
    assert error(found[0].model, BARREL, 720, 480) < 0.1
    assert found[2] is None
    assert found[3] is None
    assert estimate.wants_survey(settings)
    assert not estimate.wants_survey(infer())


def test_a_photo_with_a_profile_does_not_join_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate.profiles, "available", lambda: True)
    monkeypatch.setattr(estimate, "of_profile", lambda *_: estimate.Found(BARREL, "profile"))
    photos = [(str(tmp_path / f"{n}.png"), lambda: Photo(facade(120, 80))) for n in (1, 2)]
    assert estimate.survey(plumb.LinesNet(), photos, infer(group="folder"), Watch()) == [None, None]
    assert not estimate.wants_survey(infer(group="folder", estimator="profile"))
    alone = estimate.of(plumb.LinesNet(), Photo(facade(120, 80)), infer(group="folder"), Watch())
    assert alone.method == "profile"


def test_the_gate_weighs_risk() -> None:
    calm = posterior.Estimate(BARREL, (0, 0, 0, 0), 0.0, 0.4, 0.05, 0.4, 0.02, 9.0)
    bold = posterior.Estimate(BARREL, (0, 0, 0, 0), 0.0, 0.4, 0.1, 0.4, 0.25, 5.0)
    assert estimate.decide(bold, "net", 0.05).model == BARREL
    assert estimate.decide(bold, "net", 0.04).model.straight
    idle = posterior.Estimate(BARREL, (0, 0, 0, 0), 0.0, 0.4, 0.38, 0.4, 0.0, 1.0)
    assert estimate.decide(idle, "net", 0.05).model.straight
    assert estimate.decide(idle, "net", 1.0).model == BARREL
    risky = posterior.Estimate(BARREL, (0, 0, 0, 0), 0.0, 0.4, 0.3, 0.4, 0.3, 1.0)
    tiny = posterior.Estimate(BARREL, (0, 0, 0, 0), 0.9, 0.01, 0.001, 0.01, 0.0, 0.0)
    assert estimate.decide(calm, "net", 0.1).model == BARREL
    assert estimate.decide(risky, "net", 0.1).model.straight
    assert estimate.decide(risky, "net", 1.0).model == BARREL
    assert estimate.decide(tiny, "net", 1.0).model.straight
    assert calm.confidence == pytest.approx(0.875)
    assert math.isfinite(risky.confidence)
