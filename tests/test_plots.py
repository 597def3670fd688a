"""Pictures for people: what they show, from one pixel to 24 megapixels."""

import io
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from imgtool import plots
from imgtool.errors import ImgtoolError
from imgtool.views import detail_view, fit, regions, shrink, to_bytes

RED, BLUE = (200, 30, 30), (30, 30, 200)


def flat(colour, height=60, width=90):
    return np.full((height, width, 3), colour, np.uint8)


def opened(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def share(sheet, colour):
    """Return the rows and columns at which a colour stands."""
    return np.nonzero((sheet == colour).all(axis=2))


@pytest.fixture
def photo():
    return np.random.default_rng(1).integers(0, 256, (240, 360, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_bytes_round_to_nearest(dtype):
    top = 1.0 if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
    exact = np.linspace(0, 255, 3 * 400).reshape(1, 400, 3)
    pixels = (exact / 255 * top).astype(dtype)
    wanted = np.rint(pixels.astype(np.float64) / top * 255)
    np.testing.assert_array_equal(to_bytes(pixels), wanted)


def test_bytes_take_what_is_not_a_colour_photo():
    strange = np.array([[[np.nan, np.inf, -np.inf], [-1.0, 2.0, 0.5]]], np.float32)
    assert to_bytes(strange).tolist() == [[[0, 255, 0], [0, 255, 128]]]
    grey = np.array([[1, 2]], np.uint8)
    assert to_bytes(grey).tolist() == [[[1, 1, 1], [2, 2, 2]]] == to_bytes(grey[:, :, None]).tolist()
    assert to_bytes(np.full((2, 2, 4), 9, np.uint8)).shape == (2, 2, 3)
    with pytest.raises(TypeError, match="int64"):
        to_bytes(np.zeros((2, 2, 3), np.int64))


def test_shrinking_averages_and_enlarging_repeats():
    checks = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(255)
    assert set(np.unique(shrink(checks.astype(np.uint8), 16, 16))) <= {127, 128}
    small = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    large = fit(small, 9, 7)
    assert large.shape == (6, 6, 3)
    np.testing.assert_array_equal(large[::3, ::3], small)
    assert shrink(flat(RED, 1, 6000), 100, 100).shape == (1, 100, 3)


def test_regions_find_the_change_and_do_not_overlap(photo):
    blurred = photo.copy()
    blurred[150:190, 40:100] = 128
    found = regions(blurred, photo, 4, (70, 45))
    assert len(found) == 4
    first = found[0]
    assert first.x <= 41
    assert first.x + first.width >= 99
    assert first.y <= 151
    assert first.y + first.height >= 189
    covered = np.zeros(photo.shape[:2], int)
    for region in found:
        assert region.cut(photo).shape == (45, 70, 3)
        region.cut(covered)[...] += 1
    assert covered.max() == 1
    assert found == regions(blurred, photo, 4, (70, 45))


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (7, 5), (33, 500)])
def test_regions_of_any_size_stay_inside(size):
    height, width = size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    part = (min(width, 23), min(height, 17))
    found = regions(noise // 2, noise, 50, part)
    covered = np.zeros((height, width), int)
    for region in found:
        assert region.cut(covered).shape == (part[1], part[0])
        region.cut(covered)[...] += 1
    assert found
    assert covered.max() == 1


def test_details_are_at_100_percent_where_the_photo_is_large():
    assert detail_view((6000, 4000), (760, 320), 0.45) == (1, (760, 320))
    assert detail_view((1280, 720), (760, 320), 0.45) == (2, (380, 160))
    factor, (width, height) = detail_view((40, 30), (760, 320), 0.45)
    assert factor == 8
    assert (width, height) == (40, 30)


def test_compare_shows_before_left_and_after_right(tmp_path):
    path = tmp_path / "deep" / "sheet.png"
    plots.compare(flat(RED), flat(BLUE), path, title="$x$ <b>", crops=0)
    sheet = opened(path)
    assert sheet.shape[1] == 1600
    red, blue = share(sheet, RED), share(sheet, BLUE)
    assert len(red[0]) == len(blue[0]) == 60 * 90 * 8**2
    assert red[1].max() < 800 < blue[1].min()
    assert (red[0].min(), red[0].max()) == (blue[0].min(), blue[0].max())
    assert [entry.name for entry in path.parent.iterdir()] == ["sheet.png"]


def test_compare_stacks_wide_photos(tmp_path):
    plots.compare(flat(RED, 20, 400), flat(BLUE, 20, 400), tmp_path / "sheet.png", crops=0)
    sheet = opened(tmp_path / "sheet.png")
    assert share(sheet, RED)[0].max() < share(sheet, BLUE)[0].min()


def test_compare_shows_details_pixel_by_pixel(tmp_path, photo):
    large = np.tile(photo, (5, 6, 1))
    before = large.copy()
    before[400:720, 800:1560] = RED
    plots.compare(before, large, tmp_path / "sheet.png", crops=1)
    sheet = opened(tmp_path / "sheet.png")
    rows, _ = share(sheet[540:], RED)
    assert rows.size > 0.95 * 760 * 320
    top = 540 + rows.min()
    detail = sheet[top + 100 : top + 200, 900:1000]
    places = [
        (y, x) for y in range(400, 720) for x in range(800, 1560) if (large[y, x] == detail[0, 0]).all()
    ]
    assert any((large[y : y + 100, x : x + 100] == detail).all() for y, x in places)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (3, 2), (40, 900), (900, 40), (37, 61)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_compare_takes_any_photo(tmp_path, size, dtype):
    top = 1.0 if dtype == np.float32 else np.iinfo(dtype).max
    after = (np.random.default_rng(0).random((*size, 3)) * top).astype(dtype)
    plots.compare(after // 2, after, tmp_path / "sheet.png", title="a" * 300, width=600)
    sheet = opened(tmp_path / "sheet.png")
    assert sheet.shape[1] == 600
    assert 60 < sheet.shape[0] < 2000


def test_compare_of_equal_grey_or_resized_photos(tmp_path, photo):
    grey = photo[:, :, 0]
    plots.compare(grey, grey, tmp_path / "grey.png")
    plots.compare(photo[::2, ::2], photo, tmp_path / "resized.png", labels=("mosaic", "développé 现像"))
    assert opened(tmp_path / "grey.png").std() > 10
    assert opened(tmp_path / "resized.png").std() > 10


def test_compare_is_deterministic_and_keeps_the_profile(tmp_path, photo):
    profile = bytes(16) + b"RGB " + bytes(108)
    for name, icc in [("a.png", profile), ("b.png", profile), ("c.png", bytes(16) + b"GRAY" + bytes(108))]:
        plots.compare(photo // 2, photo, tmp_path / name, icc=icc)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as kept, Image.open(tmp_path / "c.png") as dropped:
        assert kept.info["icc_profile"] == profile
        assert "icc_profile" not in dropped.info


def test_a_place_that_cannot_be_written_is_the_users_fault(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ImgtoolError):
        plots.compare(flat(RED), flat(BLUE), tmp_path / "file" / "sheet.png")
    assert (tmp_path / "file").read_text() == "no folder"


def test_sheet_has_a_column_for_each_label(tmp_path):
    rows = {
        "blurred": np.stack([flat(RED)] * 3),
        "sharp": np.stack([flat(BLUE)] * 3).astype(np.float32) / 255,
    }
    plots.sheet(rows, tmp_path / "sheet.png", title="step 1", captions=["one", "two", "three"], width=400)
    sheet = opened(tmp_path / "sheet.png")
    red, blue = share(sheet, RED), share(sheet, BLUE)
    assert red[1].max() < blue[1].min()
    assert len(red[0]) == len(blue[0]) == 3 * 60 * 90
    assert np.count_nonzero(np.diff(np.unique(red[0])) > 1) == 2


def test_sheet_refuses_unequal_columns_and_takes_none(tmp_path):
    with pytest.raises(ValueError, match="same number"):
        plots.sheet({"a": np.zeros((2, 4, 4, 3)), "b": np.zeros((3, 4, 4, 3))}, tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="same number"):
        plots.sheet({"a": np.zeros((2, 4, 4, 3))}, tmp_path / "sheet.png", captions=["one"])
    plots.sheet({}, tmp_path / "none.png")
    plots.sheet({"a": np.zeros((0, 4, 4, 3))}, tmp_path / "empty.png", captions=[])
    assert not (tmp_path / "sheet.png").exists()


def epoch(step, **changed):
    row = {"epoch": step // 10, "step": step, "lr": 3e-4, "loss": 1 / (step + 1), "seconds": 1.0}
    row["terms"] = {"charbonnier": 0.5 / (step + 1), r"fft $\frac$": 0.5 / (step + 1)}
    return row | {"scores": {"psnr": 27 + step / 10, "ssim": 0.9}} | changed


ROWS = {
    "none": [],
    "one": [epoch(0)],
    "many": [epoch(10 * number) for number in range(50)],
    "not finite": [
        epoch(0, loss=math.nan),
        epoch(10, loss=math.inf, lr=None),
        epoch(20, scores={"psnr": -math.inf}),
    ],
    "not above zero": [epoch(0, loss=0.0, terms={}), epoch(10, loss=-1.0, terms={})],
    "extreme": [epoch(0, loss=1e-290, lr=1e308), epoch(1, loss=1e99, scores={"psnr": -1e99, "n": 10**400})],
    "parts missing": [{"step": 3}, {"best": {"psnr": 3}}, {"step": 4, "terms": None, "scores": None}],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_curves_of_any_log(tmp_path, rows):
    plots.curves(rows, tmp_path / "curves.png", title=r"deblur $\frac$")
    assert opened(tmp_path / "curves.png").std() > 1


def test_curves_leave_gaps_where_a_score_is_not_finite(tmp_path):
    """A broken epoch must not change how the others are drawn, nor take them away."""
    whole, broken = [epoch(10 * n) for n in range(6)], [epoch(10 * n) for n in range(6)]
    broken[2]["scores"] = {"psnr": math.nan, "ssim": 0.9}
    plots.curves(whole, tmp_path / "whole.png")
    plots.curves(broken, tmp_path / "broken.png")
    a, b = opened(tmp_path / "whole.png").astype(int), opened(tmp_path / "broken.png").astype(int)
    changed = (a != b).any(axis=2)
    assert a.shape == b.shape
    assert 0 < changed.mean() < 0.01


@pytest.mark.slow
def test_curves_take_all_that_is_not_finite_alike(tmp_path):
    drawn = set()
    for number, value in enumerate([math.nan, math.inf, -math.inf, None, "broken"]):
        rows = [epoch(0), epoch(10), epoch(20, lr=value, loss=value, scores={"psnr": value, "ssim": value})]
        plots.curves(rows, tmp_path / f"{number}.png")
        drawn.add((tmp_path / f"{number}.png").read_bytes())
    assert len(drawn) == 1


def test_drawing_leaves_no_state(tmp_path):
    code = f"""
        import sys
        from pathlib import Path
        import imgtool.plots, imgtool.report
        heavy = [name for name in ("matplotlib", "PIL", "cv2", "jinja2", "torch") if name in sys.modules]
        assert not heavy, heavy
        imgtool.plots.bars({{"a": 1.0}}, Path({str(tmp_path / "bars.png")!r}), title="t", xlabel="s")
        assert "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"a": []},
        {"a": [1.0]},
        {r"a$\frac$": [1, 1, 1], "b": [math.nan, 2.0, math.inf]},
        {"名": [0.0, 5.0]},
    ],
)
def test_histograms_of_anything(tmp_path, values):
    plots.histogram(values, tmp_path / "histogram.png", title=r"$\frac$", xlabel=r"PSNR $\frac$")
    assert opened(tmp_path / "histogram.png").std() > 1


def test_longer_bars_for_larger_figures(tmp_path):
    plots.bars(
        {"short": 1.0, "long": 4.0, r"no $\frac$": math.nan}, tmp_path / "bars.png", title="", xlabel="s"
    )
    plots.bars({}, tmp_path / "none.png", title="", xlabel="")
    drawn = opened(tmp_path / "bars.png")
    columns = np.unique(share(drawn, (37, 99, 235))[0], return_counts=True)[1]
    assert sorted(set(columns // 10))[-1] >= 3.8 * (columns.min() // 10)


def test_a_front_leaves_what_has_no_result_at_the_border(tmp_path):
    points = {0: (1.0, 3.0), 1: (4.0, 2.0), 2: (3.0, 5.0)}
    words = {"title": r"$\frac$", "labels": ("ms", r"$\frac$"), "limit": 10.0}
    plots.front(points, [0, 1], tmp_path / "plain.png", **words)
    plots.front(
        points | {3: (1e9, math.nan), 4: (math.inf, math.nan), 5: (math.nan, 1.0)},
        [0, 1], tmp_path / "more.png", **words,
    )  # fmt: skip
    plots.front({7: (12.0, math.nan)}, [], tmp_path / "none.png", **words)
    plain, more = opened(tmp_path / "plain.png"), opened(tmp_path / "more.png")
    blue, again = share(plain[:, :900], (37, 99, 235)), share(more[:, :900], (37, 99, 235))  # no legend
    for one, two in zip(blue, again, strict=True):  # the axes span what they did
        np.testing.assert_allclose([one.min(), one.max()], [two.min(), two.max()], atol=12)
    assert blue[1].max() < 0.5 * plain.shape[1]  # at 1 and 4 of an axis that ends beyond the limit of 10
    assert (plain != more).any()


@pytest.mark.slow
def test_24_megapixels_take_little():
    code = """
        import resource, sys, tempfile, time
        from pathlib import Path
        import numpy as np
        import cv2, PIL.Image, PIL.ImageDraw, PIL.ImageFont
        from imgtool import plots
        after = np.random.default_rng(0).integers(0, 256, (4000, 6000, 3), dtype=np.uint8)
        before = after // 2
        started, held = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory() as folder:
            plots.compare(before, after, Path(folder) / "sheet.png")
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
        print(time.process_time() - started, more / 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    )
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 3
    assert megabytes < 150


NAN = math.nan
BANDS = {
    "none": {"loss": []},
    "one run": {"loss": [(500, 0.5, NAN, NAN)], r"psnr $\frac$": [(500, 30.0, NAN, NAN)]},
    "below zero": {"loss": [(1, 0.5, -0.5, 1.5), (2, 0.2, 0.1, 0.3)]},
    "extreme": {"loss": [(1, 1e-290, 0.0, 1e99), (2, math.inf, NAN, NAN)], "x": [(1, -1e99, 0.0, NAN)]},
}


@pytest.mark.parametrize("panels", BANDS.values(), ids=BANDS.keys())
def test_any_bands_can_be_drawn(tmp_path, panels):
    plots.bands(panels, tmp_path / "runs.png", title=r"$\frac$", logarithmic=("loss",))
    assert opened(tmp_path / "runs.png").shape[2] == 3


def test_a_band_is_as_wide_as_its_interval(tmp_path):
    """Between ends that hold the axis in place, half the interval is half the colour."""
    tinted = {}
    for name, half in (("wide", 1.0), ("narrow", 0.5)):
        rows = [(0, 0, -2, 2), (1, 0, -half, half), (9, 0, -half, half), (10, 0, -2, 2)]
        plots.bands({"psnr": rows}, tmp_path / "runs.png", title="")
        picture = opened(tmp_path / "runs.png").astype(int)
        column = picture[:, picture.shape[1] // 2]
        tinted[name] = (column[:, 2] - column[:, 0] > 30).sum()
    assert tinted["wide"] == pytest.approx(2 * tinted["narrow"], rel=0.1)


def test_png_can_be_read_by_others(tmp_path):
    plots.compare(flat(RED), flat(BLUE), tmp_path / "sheet.png")
    with Image.open(io.BytesIO((tmp_path / "sheet.png").read_bytes())) as picture:
        picture.verify()
        assert picture.format == "PNG"


def test_a_cloud_is_darker_where_it_is_denser(tmp_path):
    rng = np.random.default_rng(0)
    crowd = rng.normal(0, 0.02, (300, 2))
    plots.scatter(
        {"crowd": np.concatenate([crowd, [[1.0, 1.0]]])}, tmp_path / "a.png", title="", labels=("", "")
    )
    picture = opened(tmp_path / "a.png").astype(int)
    blue = picture[..., 2] - picture[..., 0]
    height, width = blue.shape
    crowded, lonely = blue[height // 2 :, : width // 2], blue[: height // 5, width * 7 // 10 :]
    assert crowded.max() > 150
    assert 30 < lonely.max() < 100


@pytest.mark.slow
def test_a_line_has_the_colour_of_its_cloud_and_ends_at_a_gap(tmp_path):
    cloud = np.array([[0.0, 0.0], [1.0, 1.0]])
    gap = [np.nan, np.nan]
    line = np.array([[0.0, 0.0], [0.3, 0.3], gap, [0.7, 0.7], [1.0, 1.0]])
    for name, corners in (("gap", line), ("whole", line[[0, 4]])):
        plots.scatter(
            {"a": cloud}, tmp_path / f"{name}.png", title="", labels=("x", "y"), lines={"a": corners}
        )
    blue = tuple(int(plots.PALETTE[0][at : at + 2], 16) for at in (1, 3, 5))
    count = {name: (opened(tmp_path / f"{name}.png") == blue).all(2).sum() for name in ("gap", "whole")}
    assert 0 < count["gap"] < count["whole"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "points",
    [
        {},
        {"none": np.empty((0, 2))},
        {"one": np.ones((1, 2))},
        {"alike": np.ones((9, 2))},
        {"in a row": np.stack([np.arange(9.0)] * 2, 1)},
        {"$odd_name$": np.array([[np.nan, 1], [np.inf, 2], [1, 2], [3, 4], [5, 5]])},
        {"many": np.random.default_rng(0).normal(size=(2500, 2))},
    ],
)
def test_any_cloud_can_be_drawn(tmp_path, points):
    plots.scatter(points, tmp_path / "a.png", title="A $title", labels=("x $", "y"), lines={})
    assert opened(tmp_path / "a.png").shape[2] == 3
