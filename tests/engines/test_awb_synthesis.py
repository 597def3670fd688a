"""Relit photographs: the truth is what a grey card shows, and nothing else in them tells it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from imgtool.engines.awb import imagined, synthesis
from imgtool.engines.awb.camera import GENERIC_LOCUS, Camera, Locus
from imgtool.engines.awb.stats import AwbStats
from imgtool.engines.awb.synthesis import BLACK, WHITE, Relit
from imgtool.errors import USAGE, ImgtoolError

Array = npt.NDArray[Any]


def put(path: Path, pixels: Array) -> Path:
    """Write RGB."""
    assert cv2.imwrite(str(path), np.ascontiguousarray(pixels[..., ::-1]))
    return path


def card(path: Path, colour: tuple[int, int, int] = (140, 140, 140)) -> Path:
    return put(path, np.full((135, 200, 3), colour, np.uint8))


def degrees(one: Array, two: Array) -> float:
    """Return the angle between two colours, by the cosine."""
    cosine = one @ two / np.sqrt((one @ one) * (two @ two))
    return float(np.degrees(np.arccos(min(cosine, 1.0))))


def white(truth: tuple[float, float] | None) -> Array:
    assert truth is not None
    return np.array([truth[0], 1.0, truth[1]])


@pytest.fixture
def grey(tmp_path: Path) -> Relit:
    return Relit([card(tmp_path / "card.png")], 0)


# --- imagined cameras ---


def test_the_matching_functions_give_the_whites_of_the_standards() -> None:
    def xy(spectrum: Array) -> Array:
        xyz = imagined.matching() @ spectrum
        return np.asarray(xyz[:2] / xyz.sum())

    np.testing.assert_allclose(xy(np.ones(imagined.WAVELENGTHS.size)), [1 / 3, 1 / 3], atol=0.004)
    np.testing.assert_allclose(xy(imagined.planck(2856)), [0.44758, 0.40745], atol=0.004)  # illuminant A
    np.testing.assert_allclose(xy(imagined.planck(6500)), [0.3135, 0.3237], atol=0.004)
    assert imagined.WAVELENGTHS[imagined.matching()[1].argmax()] in (550, 555, 560)


def test_a_black_body_is_brightest_where_wien_says() -> None:
    for ct in (4500, 5000, 6000):
        brightest = imagined.WAVELENGTHS[imagined.planck(ct).argmax()]
        assert brightest == pytest.approx(2.897771955e6 / ct, abs=3)


def test_the_matrix_of_an_eye_is_the_identity() -> None:
    matrix = imagined.colour_matrix(imagined.matching())
    np.testing.assert_allclose(matrix, np.eye(3), atol=1e-8)


def test_imagined_cameras_see_white_as_real_ones_do() -> None:
    cameras = [imagined.imagine(np.random.default_rng(number)) for number in range(60)]
    assert len({camera.name for camera in cameras}) == 60
    at = np.array([camera.locus.at(np.array([2900.0, 5000.0, 7500.0])) for camera in cameras])
    (r, b), logs = at[:, 1].T, np.log(at)
    assert 0.25 < r.min() < 0.32
    assert 0.72 < r.max() < 0.85
    assert 0.37 < b.min() < 0.45
    assert 0.8 < b.max() < 0.95
    fall, rise = logs[:, 0, 0] - logs[:, 2, 0], logs[:, 2, 1] - logs[:, 0, 1]
    # sensors of the Raspberry Pi: 0.47 to 0.69 and 0.55 to 0.80
    assert 0.4 < fall.min() < 0.55 < np.median(fall) < 0.7 < fall.max() < 1.0
    assert 0.4 < rise.min() < 0.65 < np.median(rise) < 0.85 < rise.max() < 1.1


def test_an_imagined_camera_is_a_function_of_the_generator() -> None:
    one, two = (imagined.imagine(np.random.default_rng(5)) for _ in range(2))
    assert one.name == two.name
    np.testing.assert_array_equal(one.xyz_to_camera, two.xyz_to_camera)


# --- lights ---


def test_lights_are_spread_evenly_in_mired_and_stay_near_the_curve_of_a_measured_camera() -> None:
    rng, camera = np.random.default_rng(0), imagined.imagine(np.random.default_rng(1))
    mired = 1e6 / np.array([synthesis.draw_light(camera, rng).ct for _ in range(2000)])
    assert 115 <= mired.min() < 120
    assert np.percentile(mired, [25, 50, 75]) == pytest.approx([194, 272, 351], abs=20)
    curve = Locus(np.array([2500.0, 7600]), np.array([0.9, 0.385]), np.array([0.25, 0.692]))
    measured = Camera("measured", curve, known=True)
    ct = np.array([synthesis.draw_light(measured, rng).ct for _ in range(300)])
    assert 2500 / 1.1 <= ct.min() < ct.max() <= 7600 * 1.1 + 1e-6


def test_a_light_is_off_the_curve_by_its_duv_and_green_lights_have_less_red_and_blue() -> None:
    rng, ratios = np.random.default_rng(3), []
    for number in range(150):
        camera = imagined.imagine(np.random.default_rng(number))
        light = synthesis.draw_light(camera, rng)
        on_curve = camera.locus.at(light.ct)
        assert np.all(np.sign(on_curve - light.white) == np.sign(light.duv))
        if 2800 < light.ct < 8000:
            assert camera.xyz_to_camera is not None
            both = np.array([[w[0], 1, w[1]] for w in (light.white, on_curve)])
            x, y, z = np.linalg.solve(camera.xyz_to_camera, both.T)
            u, v = 4 * x / (x + 15 * y + 3 * z), 6 * y / (x + 15 * y + 3 * z)  # CIE 1960
            ratios.append(np.hypot(u[0] - u[1], v[0] - v[1]) / abs(light.duv))
            assert np.sign(v[0] - v[1]) == np.sign(light.duv)
    assert 0.85 < np.median(ratios) < 1.2
    assert np.percentile(ratios, 5) > 0.6
    assert np.percentile(ratios, 95) < 1.6


# --- colours ---


def test_a_camera_whose_colours_are_those_of_srgb_sees_a_photo_as_it_is() -> None:
    camera = Camera("sRGB", GENERIC_LOCUS, xyz_to_camera=np.linalg.inv(synthesis.SRGB_TO_XYZ))
    np.testing.assert_allclose(synthesis.srgb_to_balanced(camera), np.eye(3), atol=1e-9)
    np.testing.assert_allclose(synthesis.srgb_to_balanced(Camera()), np.eye(3))


def test_every_camera_sees_white_as_white_and_other_colours_its_own_way() -> None:
    camera = imagined.imagine(np.random.default_rng(0))
    matrix = synthesis.srgb_to_balanced(camera)
    np.testing.assert_allclose(matrix @ np.ones(3), 1)
    assert camera.xyz_to_camera is not None
    red = np.array([1.0, 0, 0])
    seen = camera.xyz_to_camera @ (synthesis.SRGB_TO_XYZ @ red)
    as_white = camera.xyz_to_camera @ (synthesis.SRGB_TO_XYZ @ np.ones(3))
    np.testing.assert_allclose(matrix @ red, seen / as_white)


# --- samples ---


def test_a_grey_card_relit_gives_the_truth(grey: Relit) -> None:
    checked = 0
    for number in range(25):
        stats = grey.sample(number)
        colour = stats.points().mean(0).astype(float)
        assert stats.domain == "raw"
        assert stats.camera.known
        if not stats.about["mixed"]:
            assert degrees(colour, white(stats.truth)) < 0.3
            checked += 1
    assert checked > 12


def patches(seed: int) -> Array:
    """Return a linear scene of flat patches, ``(96, 144, 3)`` float32."""
    colours = np.random.default_rng(seed).uniform(0.1, 0.5, (4, 6, 3))
    return np.kron(colours, np.ones((24, 24, 1))).astype(np.float32)


def test_frames_of_one_scene_in_two_lights_agree_once_divided_by_their_truth() -> None:
    camera, scene, seen = imagined.imagine(np.random.default_rng(2)), patches(0), []
    for seed in range(12):
        shot = synthesis.relight(scene, camera, np.random.default_rng(seed))
        if shot.about["mixed"] or shot.planes.max() > 0.9:
            continue
        means = shot.planes.reshape(3, 4, 24, 6, 24).mean((2, 4)) / white(shot.truth)[:, None, None]
        seen.append(means / means[1].mean())
    assert len(seen) > 3
    for one in seen[1:]:
        np.testing.assert_allclose(one, seen[0], rtol=0.03, atol=0.005)


def test_what_is_too_bright_for_the_sensor_is_clipped_after_relighting_and_does_not_count(
    tmp_path: Path,
) -> None:
    ramp = np.repeat(np.linspace(60, 235, 300).astype(np.uint8)[None, :, None], 200, 0).repeat(3, 2)
    relit, clipped = Relit([put(tmp_path / "ramp.png", ramp)], 1), 0
    for number in range(30):
        stats = relit.sample(number)
        counted = stats.cells[stats.coverage > 0]
        assert counted.max() < 0.98
        if stats.saturated > 0.1:
            clipped += 1
            assert (stats.coverage == 0).mean() > 0.05
            if not stats.about["mixed"]:
                bright = counted[counted.max(1) > 0.5].mean(0).astype(float)
                assert degrees(bright, white(stats.truth)) < 0.5
    assert clipped > 2


def test_highlights_and_shadows_that_the_photo_had_lost_are_masked(tmp_path: Path) -> None:
    pixels = np.full((160, 240, 3), (170, 60, 50), np.uint8)
    pixels[:, ::40], pixels[20:90, 60:140], pixels[110:140, 100:200] = 255, 255, 2
    relit = Relit([put(tmp_path / "lost.png", pixels)], 0)
    for number in range(10):
        stats = relit.sample(number)
        assert 0 < (stats.coverage == 0).mean() < 0.5
        if not stats.about["mixed"]:
            own = np.linalg.norm(stats.points(), axis=1)[:, None]
            middle = np.median(stats.points() / own, 0).astype(float)
            assert degrees(middle, white(stats.truth)) > 4
            # not one cell is nearer to white than the red that was all else there was
            away = [degrees(point.astype(float), white(stats.truth)) for point in stats.points()]
            assert min(away) > 0.6 * degrees(middle, white(stats.truth))
    frame = relit.frame(0, 160, 240)
    assert 0.1 < (frame.pixels == 0).all(2).mean() < 0.5
    assert frame.pixels[(frame.pixels != 0).any(2)].min() > 0


def test_a_second_light_is_told_as_its_share_and_lights_a_part(grey: Relit) -> None:
    spread: dict[bool, list[float]] = {True: [], False: []}
    for number in range(60):
        stats = grey.sample(number)
        mixed = float(stats.about["mixed"])
        assert 0 <= mixed <= 0.5
        ratio = np.log(stats.points()[:, 0] / stats.points()[:, 2])
        away = np.abs(ratio - np.log(white(stats.truth)[0] / white(stats.truth)[2]))
        spread[mixed > 0.1].append(float(away.max()))
        if mixed > 0.1:
            # most of the card is nearer to the light that is told than to the other
            assert np.mean(away < 0.75 * away.max() + 0.05) > 0.35
    assert len(spread[True]) > 3
    assert np.median(spread[True]) > 3 * np.median(spread[False])


def same(one: AwbStats, two: AwbStats) -> bool:
    alike = np.array_equal(one.cells, two.cells) and np.array_equal(one.coverage, two.coverage)
    return alike and (one.truth, one.lux, one.camera.name) == (two.truth, two.lux, two.camera.name)


def test_a_sample_is_a_function_of_photographs_seed_and_number_alone(photographs: Path) -> None:
    paths = sorted(photographs.iterdir())
    one, two = Relit(paths, 7), Relit(paths, 7)
    backwards = [two.sample(number) for number in (9, 8, 1, 0)][::-1]
    for number, expected in zip((0, 1, 8, 9), backwards, strict=True):
        assert same(one.sample(number), expected)
    assert same(pickle.loads(pickle.dumps(one)).sample(8), backwards[2])
    assert not same(Relit(paths, 8).sample(8), backwards[2])
    assert len({one.sample(number).about["source"] for number in range(8)}) == 8


def test_views_of_one_photograph_share_its_group(tmp_path: Path) -> None:
    assert synthesis.source_of(tmp_path / "holiday-1.jpg") != synthesis.source_of(tmp_path / "holiday-2.jpg")
    assert (
        synthesis.source_of(tmp_path / "IMG_1.jpg") == synthesis.source_of(tmp_path / "IMG_1.png") == "IMG_1"
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "index.tsv").write_text("file\tfrom\na.jpg\tbridge\nb.jpg\tbridge\n")
    assert synthesis.source_of(other / "a.jpg") == synthesis.source_of(other / "b.jpg") == "bridge"
    assert Relit([card(other / "a.jpg")], 0).sample(0).group == "bridge"


def test_cameras_that_are_given_are_the_ones_that_see(tmp_path: Path) -> None:
    locus = Locus(np.array([3000.0, 6000.0]), np.array([0.9, 0.5]), np.array([0.4, 0.8]))
    relit = Relit([card(tmp_path / "card.png")], 0, [Camera("own", locus, known=True)])
    found = [relit.sample(number) for number in range(8)]
    assert {stats.camera.name for stats in found} == {"own"} == {c.name for c in relit.every_camera()}
    assert all(stats.truth and 0.3 < stats.truth[0] < 1.2 for stats in found)


# --- frames ---


@pytest.mark.parametrize("shape", [(216, 324), (60, 40)])
def test_a_frame_has_its_levels_and_the_truth_of_a_grey_card(grey: Relit, shape: tuple[int, int]) -> None:
    frames = [grey.frame(number, *shape) for number in range(4)]
    for frame in frames:
        assert frame.pixels.shape == (*shape, 3)
        assert frame.pixels.dtype == np.uint16
        assert frame.pixels.max() <= WHITE
        assert frame.about["source"] == "card.png"
        if not frame.about["mixed"]:
            unclipped = frame.pixels[frame.pixels.max(2) < 0.97 * WHITE].astype(float) - BLACK
            assert degrees(unclipped.mean(0), white(frame.truth)) < 0.5
    np.testing.assert_array_equal(frames[1].pixels, grey.frame(1, *shape).pixels)


# --- panoramas ---


def panorama(path: Path, pixels: Array) -> Path:
    return put(path, pixels.astype(np.float32))


def test_a_panorama_is_seen_upright_in_any_direction(tmp_path: Path) -> None:
    height = np.linspace(1, 0, 64)[:, None, None]
    sky = np.broadcast_to(height, (64, 128, 3))
    scene = synthesis.linear(panorama(tmp_path / "sky.hdr", sky), 128)
    for seed in range(6):
        seen = synthesis.view(scene, 48, 72, np.random.default_rng(seed))
        assert seen.shape == (48, 72, 3)
        assert np.all(np.diff(seen[:, 36, 1]) <= 1e-6)
        np.testing.assert_allclose(seen, seen[:, ::-1], atol=0.02)


def test_a_panorama_shows_all_its_directions(tmp_path: Path) -> None:
    quarters = np.repeat(np.array([0.1, 0.4, 0.7, 1.0]), 32)
    around = np.broadcast_to(quarters[None, :, None], (64, 128, 3))
    scene = synthesis.linear(panorama(tmp_path / "around.hdr", around), 128)
    ratios = [float(np.ptp(synthesis.view(scene, 32, 48, np.random.default_rng(seed)))) for seed in range(20)]
    assert max(ratios) > 0.5


def test_a_neutral_panorama_gives_the_truth(tmp_path: Path) -> None:
    bright = np.broadcast_to(np.linspace(5, 60, 128)[None, :, None], (64, 128, 3))
    relit = Relit(synthesis.photographs([panorama(tmp_path / "bright.hdr", bright).parent]), 0)
    for number in range(8):
        stats = relit.sample(number)
        if not stats.about["mixed"]:
            assert degrees(stats.points().mean(0).astype(float), white(stats.truth)) < 0.5


# --- faults ---


def test_photographs_are_found_once_in_folders_that_overlap(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    one, two = card(tmp_path / "in" / "a.png"), panorama(tmp_path / "in" / "b.hdr", np.ones((4, 8, 3)))
    (tmp_path / "in" / "notes.txt").write_text("no photo")
    assert synthesis.photographs([tmp_path, tmp_path / "in", two]) == [one, two]
    with pytest.raises(ImgtoolError, match="no such folder") as fault:
        synthesis.photographs([tmp_path / "nowhere"])
    assert fault.value.code == USAGE


def test_what_cannot_be_relit_is_said(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match="no photographs") as fault:
        Relit([], 0)
    assert fault.value.code == USAGE
    with pytest.raises(ImgtoolError, match=r"white\.png"):
        Relit([card(tmp_path / "white.png", (255, 255, 255))], 0).sample(0)
    for name in ("broken.hdr", "broken.png"):
        (tmp_path / name).write_bytes(b"#?RADIANCE\n\nnothing")
        with pytest.raises(ImgtoolError, match=name):
            Relit([tmp_path / name], 0).sample(0)


def test_a_photo_that_shows_nothing_gives_way_to_another(tmp_path: Path) -> None:
    paths = [card(tmp_path / "black.png", (0, 0, 0)), card(tmp_path / "grey.png")]
    assert {Relit(paths, 0).sample(number).group for number in range(6)} == {"grey"}
