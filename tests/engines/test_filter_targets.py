"""Classical filters: equal to plain re-implementations, of any size, local as far as they say."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from skimage.restoration import denoise_tv_chambolle

from imgtool.engines.filter import targets
from imgtool.errors import USAGE, ImgtoolError

Array = npt.NDArray[Any]

FILTERS = sorted(targets.KINDS)


def photo(height: int = 40, width: int = 56, seed: int = 0) -> Array:
    """Return soft tones with a patch of noise and a hard edge, uint8."""
    rng = np.random.default_rng(seed)
    tones = cv2.resize(rng.uniform(0, 255, (5, 6, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
    picture = np.clip(tones, 0, 255).astype(np.uint8)
    picture[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(
        0, 256, (height // 2 - height // 4, width // 2 - width // 4, 3)
    )
    picture[-height // 5 :] = 255
    return picture


def run(spec: str, image: Array) -> Array:
    return targets.parse(spec)(image)


def grey(image: Array) -> Array:
    return image.astype(np.float64) / 255 @ [0.299, 0.587, 0.114]


def windows(values: Array, function: Callable[[Array], Any], radius: int = 1) -> Array:
    """Apply a function to the mirrored window around each pixel, by direct loops."""
    margins = [(radius, radius)] * 2 + [(0, 0)] * (values.ndim - 2)
    wide = np.pad(values, margins, mode="reflect")
    height, width = values.shape[:2]
    size = 2 * radius + 1
    return np.array(
        [[function(wide[y : y + size, x : x + size]) for x in range(width)] for y in range(height)]
    )


def steepness(smoothing: list[float], slope: list[float], scale: float) -> Callable[[Array], float]:
    across = np.outer(smoothing, slope)
    return lambda w: float(np.hypot((w * across).sum(), (w * across.T).sum()) / scale)


SMALL = photo(9, 11, 1)


# --- edges --------------------------------------------------------------------------------------


def test_sobel_is_the_length_of_both_derivatives_over_four() -> None:
    wanted = windows(grey(SMALL), steepness([1, 2, 1], [-1, 0, 1], 4))
    np.testing.assert_allclose(run("sobel_3", SMALL), wanted, atol=1e-6)
    np.testing.assert_allclose(run("sobel_3:scale=2", SMALL), 2 * wanted, atol=1e-6)


def test_scharr_is_the_length_of_both_derivatives_over_sixteen() -> None:
    wanted = windows(grey(SMALL), steepness([3, 10, 3], [-1, 0, 1], 16))
    np.testing.assert_allclose(run("scharr", SMALL), wanted, atol=1e-6)


def test_laplacian_compares_with_the_four_neighbours() -> None:
    cross = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    np.testing.assert_allclose(
        run("laplacian", SMALL), windows(grey(SMALL), lambda w: abs((w * cross).sum()) / 4), atol=1e-6
    )


@pytest.mark.parametrize("name", ["sobel_3", "scharr"])
def test_a_step_from_black_to_white_gives_one(name: str) -> None:
    step = np.zeros((8, 8, 3), np.uint8)
    step[:, 4:] = 255
    assert run(name, step).max() == pytest.approx(1, abs=1e-6)


def originals(image: Array, size: int, blur: int) -> Array:
    """Return the original's Sobel image, which rounds to 8 bits before each step."""
    levels = cv2.GaussianBlur(np.rint(grey(image) * 255).astype(np.uint8), (blur, blur), 0)
    across, down = (
        cv2.Sobel(levels, cv2.CV_16S, *way, ksize=size).astype(np.float32) for way in ((1, 0), (0, 1))
    )
    length = np.sqrt(across**2 + down**2)
    return (length * 255 / (length.max() + 1e-8)).astype(np.uint8)


def test_sobel_over_the_maximum_is_the_originals_but_for_its_rounding() -> None:
    picture = photo(120, 160)
    found = run("sobel_3_max", picture)
    levels = np.rint(found * 255)
    assert levels.max() == 255
    np.testing.assert_allclose(found * 255, levels, atol=1e-4)
    apart = np.abs(levels - originals(picture, 3, 3))
    assert apart.max() <= 3
    assert apart.mean() < 0.6


def test_canny_of_the_sobel_image_is_opencvs_of_the_same_levels() -> None:
    target = targets.parse("sobel_5_canny:low=40,high=120")
    found = target.map(photo())
    levels = np.floor(found.astype(np.float64) * 255 / found.max() + 1e-5).astype(np.uint8)
    assert target.finish is not None
    edges = target.finish(found)
    assert set(np.unique(edges)) == {0, 1}
    assert np.array_equal(edges, cv2.Canny(levels, 40, 120) / 255)


def test_sobel_of_five_pixels_is_smoothed_and_at_most_one() -> None:
    binomial = np.outer([1, 2, 1], [1, 2, 1]) / 16
    smooth = windows(grey(SMALL), lambda w: (w * binomial).sum(), 1)
    wanted = windows(smooth, steepness([1, 4, 6, 4, 1], [-1, -2, 0, 2, 1], 64), 2)
    np.testing.assert_allclose(targets.parse("sobel_5_canny").map(SMALL), wanted, atol=1e-6)


def test_canny_is_opencvs_within_the_border() -> None:
    picture = photo(90, 120)
    levels = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    target = targets.parse("canny:low=80")
    found = target.map(picture)
    assert found.shape == (90, 120, 2)
    across = cv2.Sobel(levels, cv2.CV_16S, 1, 0)
    down = cv2.Sobel(levels, cv2.CV_16S, 0, 1)
    np.testing.assert_allclose(found * 1020, np.dstack([across, down]), atol=1e-3)
    edges = target(picture)
    assert np.array_equal(edges, cv2.Canny(across, down, 80, 200) / 255)
    assert (edges != cv2.Canny(levels, 80, 200) / 255)[2:-2, 2:-2].mean() < 0.01


@pytest.mark.parametrize("name", ["sobel_3_max", "sobel_5_canny", "canny", "random_sobel"])
def test_a_flat_photo_has_no_edges(name: str) -> None:
    assert run(name, np.full((12, 9, 3), 130, np.uint8)).max() < 1e-6


# --- random -------------------------------------------------------------------------------------


def test_a_random_convolution_has_the_originals_weights() -> None:
    rng = random.Random(7)
    weights = [rng.random() for _ in range(27)]
    rng.shuffle(weights)
    kernel = np.reshape(weights, (3, 3, 3)) / sum(weights)  # by colour, row and column
    wanted = windows(SMALL / 255, lambda w: (w.transpose(2, 0, 1) * kernel).sum())
    np.testing.assert_allclose(run("random_conv:seed=7", SMALL), wanted, atol=1e-6)
    assert np.abs(run("random_conv:seed=8", SMALL) - wanted).max() > 0.01


def test_a_random_sobel_is_the_length_of_two_antisymmetric_ones_over_the_maximum() -> None:
    found = []
    for seed in (3, 15):
        rng = random.Random(seed)
        half = [rng.random() for _ in range(13)]
        weights = [*half, 0.0, *(-each for each in half)]
        rng.shuffle(weights)
        kernel = np.reshape(weights, (3, 3, 3)) / np.abs(weights).sum()
        found.append(windows(SMALL / 255, lambda w, k=kernel: (w.transpose(2, 0, 1) * k).sum()))
    wanted = np.hypot(*found)
    target = targets.parse("random_sobel:seed=3")
    np.testing.assert_allclose(target.map(SMALL), wanted, atol=1e-6)
    np.testing.assert_allclose(target(SMALL), np.floor(wanted / wanted.max() * 255 + 1e-4) / 255, atol=1e-6)


# --- smoothing ----------------------------------------------------------------------------------


def test_a_gaussian_is_cut_off_at_four_sigma() -> None:
    weights = np.exp(-np.square(np.arange(-4, 5)) / 2)
    kernel = (np.outer(weights, weights) / weights.sum() ** 2)[..., None]
    wanted = windows(SMALL / 255, lambda w: (w * kernel).sum((0, 1)), 4)
    np.testing.assert_allclose(run("gaussian:sigma=1", SMALL), wanted, atol=1e-6)
    sharp = SMALL / 255 + 0.5 * (SMALL / 255 - wanted)
    np.testing.assert_allclose(run("unsharp:sigma=1,amount=0.5", SMALL), sharp.clip(0, 1), atol=2e-6)


@pytest.mark.parametrize(("name", "function"), [("median", np.median), ("erode", np.min), ("dilate", np.max)])
def test_order_filters_take_one_value_of_the_window(name: str, function: Callable[..., Array]) -> None:
    wanted = windows(SMALL, lambda w: function(w, axis=(0, 1)), 2) / 255
    np.testing.assert_allclose(run(name, SMALL), wanted, atol=1e-6)


def test_bilateral_weighs_by_distance_and_by_the_sum_of_differences() -> None:
    away = np.hypot(*np.mgrid[-2:3, -2:3])
    inside = away <= 2

    def mean(window: Array) -> Array:
        values = window.astype(np.float64)
        apart = np.abs(values - values[2, 2]).sum(2)
        weights = inside * np.exp(-(away**2) / 18 - apart**2 / (2 * 25.5**2))
        return (weights[..., None] * values).sum((0, 1)) / weights.sum()

    wanted = windows(SMALL, mean, 2)
    assert np.abs(run("bilateral:d=5", SMALL) * 255 - wanted).max() < 0.51


def test_total_variation_is_scikit_images() -> None:
    picture = photo()
    wanted = denoise_tv_chambolle((picture / 255).astype(np.float32), 0.1, channel_axis=2)
    np.testing.assert_allclose(run("tv", picture), wanted, atol=1e-5)


def test_l0_is_the_papers_algorithm() -> None:
    picture = photo() / 255
    axes = (0, 1)
    kernels = np.zeros((2, *picture.shape[:2]))
    kernels[0, 0, 0] = kernels[1, 0, 0] = -1
    kernels[0, 0, -1] = kernels[1, -1, 0] = 1
    transfer = (np.abs(np.fft.fft2(kernels)) ** 2).sum(0)[..., None]
    found, beta = picture, 0.04
    while beta < 1e5:
        right, below = np.roll(found, -1, 1) - found, np.roll(found, -1, 0) - found
        small = (right**2 + below**2).sum(2) < 0.02 / beta
        right[small] = below[small] = 0
        back = np.roll(right, 1, 1) - right + np.roll(below, 1, 0) - below
        sums = np.fft.fft2(picture, axes=axes) + beta * np.fft.fft2(back, axes=axes)
        found = np.fft.ifft2(sums / (1 + beta * transfer), axes=axes).real
        beta *= 2
    apart = np.abs(run("l0", photo()) - found.clip(0, 1))
    assert np.quantile(apart, 0.99) < 1e-3  # at a threshold the last bit decides
    assert apart.mean() < 2e-4


def test_a_weighted_median_halves_the_weights_of_like_greys() -> None:
    levels = cv2.cvtColor(SMALL, cv2.COLOR_RGB2GRAY).astype(np.float64)[..., None]

    def middle(window: Array) -> list[float]:
        weights = np.exp(-np.square(window[..., 3] - window[2, 2, 3]) / (2 * 25.5**2)).ravel()
        found = []
        for values in window[..., :3].reshape(-1, 3).T:
            order = np.argsort(values, kind="stable")
            sums = np.cumsum(weights[order])
            found.append(values[order[np.searchsorted(sums, sums[-1] / 2)]])
        return found

    wanted = windows(np.dstack([SMALL, levels]), middle, 2)
    apart = np.abs(run("weighted_median:radius=2", SMALL) * 255 - wanted)
    assert (apart > 0.01).mean() < 0.01  # where half the weight falls on the bit


def test_non_local_means_and_rolling_guidance_are_opencvs() -> None:
    picture = photo()
    wanted = cv2.fastNlMeansDenoisingColored(picture[..., ::-1].copy(), None, 9, 9, 5, 11)[..., ::-1]
    assert np.array_equal(
        run("nlm:h=9,patch=5,search=11", picture), wanted.astype(np.float32) / np.float32(255)
    )
    rolled = cv2.ximgproc.rollingGuidanceFilter(picture, d=-1, sigmaColor=25.5, sigmaSpace=2, numOfIter=3)
    np.testing.assert_allclose(run("rolling_guidance:ss=2,n=3", picture), rolled / 255, atol=1e-6)


def test_guided_and_wls_are_opencvs() -> None:
    picture = photo()
    values = (picture / 255).astype(np.float32)
    guided = cv2.ximgproc.guidedFilter(values, values, 3, 0.02)[6:-6, 6:-6]
    np.testing.assert_allclose(
        run("guided:radius=3,eps=0.02", picture)[6:-6, 6:-6], guided.clip(0, 1), atol=1e-5
    )
    smooth = cv2.ximgproc.fastGlobalSmootherFilter(
        picture, values, 50, 25.5, lambda_attenuation=0.25, num_iter=2
    )
    np.testing.assert_allclose(run("wls:lam=50,n=2", picture), smooth, atol=1e-6)


def test_clahe_changes_the_lightness_alone() -> None:
    picture = photo(64, 64)
    before = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB)
    before[..., 0] = cv2.createCLAHE(3, (4, 4)).apply(before[..., 0].copy())
    wanted = cv2.cvtColor(before, cv2.COLOR_LAB2RGB)
    np.testing.assert_allclose(run("clahe:clip=3,tiles=4", picture), wanted / 255, atol=1e-6)


def test_anisotropic_diffusion_takes_the_papers_step() -> None:
    values = SMALL / 255
    cross = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])

    def step(window: Array) -> Array:
        slopes = window - window[1, 1]
        weights = cross * np.exp(-np.square(np.abs(slopes).mean(2) / 0.05))
        return window[1, 1] + 0.2 * (weights[..., None] * slopes).sum((0, 1))

    np.testing.assert_allclose(run("anisotropic:n=2", SMALL), windows(windows(values, step), step), atol=1e-6)


def test_relative_total_variation_solves_the_papers_system() -> None:
    """One turn, by a dense matrix."""
    picture = photo(9, 8)
    values = (picture / 255).astype(np.float64)
    height, width = values.shape[:2]
    weights = np.exp(-np.square(np.arange(-2, 3)) / 2)
    kernel = (np.outer(weights, weights) / weights.sum() ** 2)[..., None]
    smooth = windows(values, lambda w: (w * kernel).sum((0, 1)), 2)
    right, below = np.zeros_like(values), np.zeros_like(values)
    right[:, :-1], below[:-1] = np.diff(values, axis=1), np.diff(values, axis=0)
    steep = np.maximum(np.hypot(right, below).mean(2), 0.02)
    matrix = np.eye(height * width)
    for y in range(height):
        for x in range(width):
            for v, u in ((y, x + 1), (y + 1, x)):
                if v < height and u < width:
                    flow = 0.01 / (max(np.abs(smooth[v, u] - smooth[y, x]).mean(), 1e-3) * steep[y, x])
                    a, b = y * width + x, v * width + u
                    matrix[[a, b], [a, b]] += flow
                    matrix[[a, b], [b, a]] -= flow
    wanted = np.linalg.solve(matrix, values.reshape(-1, 3)).reshape(values.shape)
    assert np.abs(wanted - values).mean() > 0.05
    np.testing.assert_allclose(run("rtv:sigma=1,n=1", picture), wanted, atol=4e-3)


def test_a_local_laplacian_adds_or_takes_detail_and_keeps_edges() -> None:
    y, x = np.mgrid[:64, :64]
    picture = np.repeat((64 + 128 * (x > 31) + 8 * ((x + y) % 2))[..., None], 3, axis=2).astype(np.uint8)
    texture = [run(f"local_laplacian:detail={detail}", picture)[16:48, 8:24].std() for detail in (-1, 0, 2)]
    np.testing.assert_allclose(run("local_laplacian:detail=0", picture), picture / 255, atol=1e-5)
    assert texture[0] < 0.5 * texture[1] < 1.3 * texture[1] < texture[2]
    after = run("local_laplacian:detail=-1", picture)
    assert after[:, 40:56].mean() - after[:, 8:24].mean() == pytest.approx(128 / 255, abs=0.02)


# --- all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILTERS)
def test_any_size_and_kind_of_pixels_will_do(name: str) -> None:
    target = targets.parse(name)
    shape = {1: (), 2: (2,), 3: (3,)}[target.channels]
    for size in ((1, 1), (1, 7), (5, 2)):
        whole = photo(20, 20, 3)[: size[0], : size[1]]
        before = whole.copy()
        found = target.map(whole)
        floats = (whole / 255).astype(np.float32)
        assert found.shape == size + shape
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        assert np.isfinite(target(whole)).all()
        np.testing.assert_allclose(target.map(floats), found, atol=1e-5)
        assert np.array_equal(whole, before)
        assert np.array_equal(floats, (whole / 255).astype(np.float32))


@pytest.mark.parametrize("name", FILTERS)
def test_the_same_photo_gives_the_same_result_in_another_process(name: str) -> None:
    target = targets.parse(name)
    picture = photo(24, 32)
    first = target(picture)
    cv2.randu(np.zeros(3), 0, 1)
    assert np.array_equal(first, pickle.loads(pickle.dumps(target))(picture.copy()))


LOCAL = [name for name in FILTERS if targets.parse(name).local is not None]
SMALLER = [
    "bilateral:d=3",
    "gaussian:sigma=0.3",
    "rolling_guidance:ss=0.2,n=2",
    "nlm:search=5,patch=9",
    "guided:radius=1",
]


@pytest.mark.parametrize("spec", [*LOCAL, *SMALLER])
def test_a_local_filter_sees_no_farther_than_it_says(spec: str) -> None:
    target = targets.parse(spec)
    reach = target.local or 0
    picture = photo(2 * reach + 12, 2 * reach + 20, 5)
    inner = target.map(picture)[reach + 2 : reach + 6, reach + 3 : reach + 9]
    crop = target.map(picture[2 : 2 * reach + 6, 3 : 2 * reach + 9])[reach : reach + 4, reach : reach + 6]
    np.testing.assert_allclose(crop, inner, atol=2e-6)


@pytest.mark.parametrize(
    ("spec", "reach"),
    [
        ("bilateral:d=5", 2),
        ("nlm:search=9,patch=3", 5),
        ("gaussian:sigma=1.5", 6),
        ("erode:size=7", 3),
        ("tv", None),
    ],
)
def test_the_reach_follows_the_parameters(spec: str, reach: int | None) -> None:
    assert targets.parse(spec).local == reach


@pytest.mark.parametrize(
    "name", [name for name in FILTERS if targets.KINDS[name].channels == 3 and name != "clahe"]
)
def test_a_flat_photo_stays_flat(name: str) -> None:
    flat = np.full((11, 17, 3), (200, 90, 30), np.uint8)
    assert np.abs(run(name, flat) - flat / 255).max() < 1.6 / 255


# --- specifications -----------------------------------------------------------------------------


def test_a_specification_is_canonical() -> None:
    assert targets.parse("bilateral:ss=3,sr=0.2,d=5").spec == "bilateral:d=5,sr=0.2"
    assert targets.parse("bilateral:d=9").spec == targets.parse("bilateral:").spec == "bilateral"
    assert targets.parse("tv:weight=0.12345678").spec == "tv:weight=0.12345678"
    assert targets.parse("canny:high=90").name == "canny"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("bilatral", ("bilatral", "did you mean bilateral")),
        ("median:sise=3", ("median", "sise", "size")),
        ("sobel_3_max:size=3", ("sobel_3_max", "takes none")),
        ("median:size=4", ("median", "size", "odd")),
        ("median:size=-3", ("median", "size", "odd")),
        ("median:size=3.5", ("median", "size", "whole number")),
        ("gaussian:sigma=-1", ("gaussian", "sigma", "from 0.1")),
        ("gaussian:sigma=nan", ("gaussian", "sigma", "from 0.1")),
        ("gaussian:sigma=wide", ("gaussian", "sigma", "number")),
        ("gaussian:sigma", ("gaussian", "sigma", "number")),
        ("gaussian:sigma=1,sigma=2", ("gaussian", "sigma", "twice")),
        ("sobel_5_canny:low=0", ("sobel_5_canny", "low", "from")),
    ],
)
def test_a_wrong_specification_is_refused_by_name(spec: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ImgtoolError) as caught:
        targets.parse(spec)
    told = f"{caught.value.what} {caught.value.hint}"
    assert caught.value.code == USAGE
    assert all(word in told for word in words)


def test_the_list_tells_each_filter_in_a_sentence() -> None:
    rows = {row.name: row for row in targets.overview()}
    assert rows.keys() == targets.KINDS.keys()
    assert rows["bilateral"].parameters == {"d": 9, "sr": 0.1, "ss": 3.0}
    assert rows["bilateral"].slow
    assert rows["canny"].parameters == {"low": 100.0, "high": 200.0}
    assert rows["canny"].channels == 2
    for row in rows.values():
        assert row.sentence == targets.describe(row.name)
        assert row.sentence[0].isupper()
        assert row.sentence.endswith(".")


@pytest.mark.parametrize("name", FILTERS)
def test_each_default_lies_within_its_limits(name: str) -> None:
    known = targets.parameters(name)
    assert (
        targets.parse(f"{name}:" + ",".join(f"{word}={value}" for word, value in known.items())).spec == name
    )
