"""Coefficient files: OpenCV's and lensfun's own look-ups, round trips, hostile files; profiles."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from imgtool.engines.lens import formats, geometry, profiles
from imgtool.engines.lens.geometry import BrownConrady
from imgtool.errors import ImgtoolError

Array = npt.NDArray[Any]

FULL = BrownConrady(-0.11, 0.04, 0.002, -0.003, 0.006, 0.02, -0.01)
RADIAL = BrownConrady(-0.11, 0.04)
SIZE = (1500, 1000)

models = st.builds(
    BrownConrady,
    k1=st.floats(-0.3, 0.3), k2=st.floats(-0.2, 0.2), p1=st.floats(-0.01, 0.01),
    p2=st.floats(-0.01, 0.01), k3=st.floats(-0.1, 0.1), cx=st.floats(-0.1, 0.1), cy=st.floats(-0.1, 0.1),
)  # fmt: skip
sizes = st.tuples(st.integers(16, 9000), st.integers(16, 9000))


def look_up(model: BrownConrady, width: int, height: int) -> Array:
    """Return where every pixel of the straight picture lies in the photo, (H, W, 2)."""
    x, y = geometry.normalise(*np.meshgrid(np.arange(width), np.arange(height)), width, height)
    return np.stack(geometry.pixels(*model.distort(x, y), width, height), axis=-1)


def bent(model: BrownConrady, look_up: Array) -> float:
    """Return by how many pixels a model leaves the straight picture of a look-up bent at most.

    The places of the photo are straightened, and should be where they were up to a similarity.
    """
    height, width = look_up.shape[:2]
    rows, columns = np.mgrid[0:height:9, 0:width:9]
    photo = look_up[::9, ::9].astype(np.float64)
    straight = model.undistort(*geometry.normalise(photo[..., 0], photo[..., 1], width, height), 20)
    column, row = geometry.pixels(*straight, width, height)
    return float(geometry.apart((column + 1j * row).ravel(), (columns + 1j * rows).ravel()).max())


def off(first: BrownConrady, second: BrownConrady, size: tuple[int, int] = SIZE) -> float:
    """Return the largest distance between two models over a frame, in pixels."""
    x, y = geometry.grid(*size, 21, 21, part=1.0)
    one, two = first.distort(x, y), second.distort(x, y)
    return float(np.hypot(one[0] - two[0], one[1] - two[1]).max()) * math.hypot(*size) / 2


def saved(folder: Path, content: str | bytes, name: str = "file.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def written(
    folder: Path, model: BrownConrady, form: str, size: tuple[int, int] = SIZE, **facts: object
) -> Path:
    suffix, data = formats.write(model, *size, form, facts)
    return saved(folder, data, f"lens{suffix}")


def opencv_map(matrix: Array, values: Array, width: int, height: int) -> Array:
    maps = cv2.initUndistortRectifyMap(matrix, values, None, matrix, (width, height), cv2.CV_32FC1)
    return np.stack(maps, axis=-1)


# --- OpenCV -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("focal", [None, 700.0, 3000.0])
def test_opencv_reads_its_file_and_looks_up_the_same(tmp_path: Path, focal: float | None) -> None:
    path = written(tmp_path, FULL, "opencv", (600, 400), focal_px=focal)
    store = cv2.FileStorage(str(path), cv2.FILE_STORAGE_READ)
    matrix, values = store.getNode("camera_matrix").mat(), store.getNode("distortion_coefficients").mat()
    assert (store.getNode("image_width").real(), store.getNode("image_height").real()) == (600, 400)
    assert matrix[0, 0] == pytest.approx(focal or math.hypot(600, 400) / 2)
    assert np.abs(opencv_map(matrix, values, 600, 400) - look_up(FULL, 600, 400)).max() < 0.01
    assert path.suffix == ".yml"


@given(models, sizes, st.floats(0.3, 8))
def test_opencv_and_back(model: BrownConrady, size: tuple[int, int], focal: float) -> None:
    matrix, values = formats.to_opencv(model, *size, focal * max(size))
    assert off(formats.from_opencv(matrix, values, *size), model, size) < 1e-6
    assert off(formats.from_opencv(*formats.to_opencv(model, *size), *size), model, size) < 1e-6


def test_a_calibration_of_another_size_serves_where_the_aspect_is_the_same(tmp_path: Path) -> None:
    path = written(tmp_path, FULL, "opencv", (600, 400))
    assert off(formats.read(path, 3000, 2000), FULL) < 1e-6
    with pytest.raises(ImgtoolError, match="600x400 pixels, the photo has 640x480"):
        formats.read(path, 640, 480)


def test_a_turned_photo_takes_the_radial_part_and_hears_of_it(tmp_path: Path) -> None:
    told: list[str] = []
    found = formats.read(written(tmp_path, FULL, "opencv", (600, 400)), 400, 600, say=told.append)
    assert off(found, BrownConrady(FULL.k1, FULL.k2, k3=FULL.k3)) < 1e-6
    assert "left out" in told[0]
    assert (
        off(formats.read(written(tmp_path, RADIAL, "opencv", (600, 400)), 400, 600, say=told.append), RADIAL)
        < 1e-6
    )
    assert len(told) == 1


def test_unequal_focal_lengths_are_fitted_and_the_rest_is_told(tmp_path: Path) -> None:
    matrix = np.array([[1160.0, 0, 664], [0, 1152, 390], [0, 0, 1]])
    values = np.array([-0.249, -0.006, 0.0005, -0.0002])
    model, missed = formats.fit_opencv(matrix, values, 1280, 720)
    wanted = opencv_map(matrix, values, 1280, 720)
    assert bent(model, wanted) < 1
    assert bent(model, wanted) <= 2 * missed
    assert missed < 1
    stretched = ROS.replace("0, 700, 190", "0, 500, 190")
    told: list[str] = []
    formats.read(saved(tmp_path, stretched), 600, 400, say=told.append)
    assert "approximated, wrong by" in told[0]


def test_a_skewed_matrix_is_fitted_too() -> None:
    matrix = np.array([[700.0, 0.7, 300], [0, 700, 200], [0, 0, 1]])
    model, missed = formats.fit_opencv(matrix, [-0.2, 0.05, 0, 0], 600, 400)
    straight = formats.from_opencv(
        np.array([[700.0, 0, 300], [0, 700, 200], [0, 0, 1]]), [-0.2, 0.05, 0, 0], 600, 400
    )
    assert 0 < missed < 0.1
    assert off(model, straight, (600, 400)) < 0.5


@pytest.mark.parametrize("size", [(600, 400), (640, 480), (400, 600)])
def test_the_originals_ellipses_leave_what_is_said(size: tuple[int, int]) -> None:
    width, height = size
    matrix = np.array([[width, 0, width / 2], [0, height, height / 2], [0, 0, 1.0]])
    values = np.array([-0.2, 0.1, 0.01, -0.005])
    model, per_cent = formats.from_original(*values, width, height)
    wanted = opencv_map(matrix, values, width, height)
    largest = per_cent / 100 * math.hypot(width, height)
    assert 0.5 * largest < bent(model, wanted) < 1.5 * largest
    nothing = bent(BrownConrady(), wanted)
    assert largest < nothing / 2


def test_the_originals_circles_are_exact_on_square_pictures() -> None:
    values = (-0.2, 0.1, 0.01, -0.005)
    model, per_cent = formats.from_original(*values, 500, 500)
    matrix = np.array([[500, 0, 250], [0, 500, 250], [0, 0, 1.0]])
    assert per_cent == 0
    assert np.abs(look_up(model, 500, 500) - opencv_map(matrix, np.array(values), 500, 500)).max() < 1e-3


ROS = """image_width: 600
image_height: 400
camera_name: head
camera_matrix:
  rows: 3
  cols: 3
  data: [700, 0, 310, 0, 700, 190, 0, 0, 1]
distortion_model: plumb_bob
distortion_coefficients:
  rows: 1
  cols: 5
  data: [-0.3, 0.1, 0.001, 0.002, 0.01]
"""


def test_other_writers_of_opencv_calibrations_are_read(tmp_path: Path) -> None:
    wanted = opencv_map(
        np.array([[700.0, 0, 310], [0, 700, 190], [0, 0, 1]]),
        np.array([-0.3, 0.1, 0.001, 0.002, 0.01]),
        600,
        400,
    )
    assert np.abs(look_up(formats.read(saved(tmp_path, ROS), 600, 400), 600, 400) - wanted).max() < 1e-3
    xml = (
        "<?xml version='1.0'?><opencv_storage><image_Width>600</image_Width><image_Height>400</image_Height>"
        "<Camera_Matrix type_id='opencv-matrix'><rows>3</rows><cols>3</cols><dt>d</dt>"
        "<data>700 0 310 0 700 190 0 0 1</data></Camera_Matrix>"
        "<Distortion_Coefficients type_id='opencv-matrix'><rows>5</rows><cols>1</cols><dt>d</dt>"
        "<data>-0.3 0.1 0.001 0.002 0.01</data></Distortion_Coefficients></opencv_storage>"
    )
    assert np.abs(look_up(formats.read(saved(tmp_path, xml), 600, 400), 600, 400) - wanted).max() < 1e-3


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("plumb_bob", "equidistant", "fisheye"),
        ("[-0.3, 0.1, 0.001, 0.002, 0.01]", "[-0.3, 0.1, 0, 0, 0, 0.2, 0, 0]", "rational"),
        ("[-0.3, 0.1, 0.001, 0.002, 0.01]", "[-0.3, 0.1]", "2 distortion coefficients"),
        ("[-0.3, 0.1, 0.001, 0.002, 0.01]", "[-0.3, .nan, 0, 0]", "finite"),
        ("[-0.3, 0.1, 0.001, 0.002, 0.01]", "[-0.3, abc, 0, 0]", "not made of numbers"),
        ("[-0.3, 0.1, 0.001, 0.002, 0.01]", "[1e300, 0, 0, 0]", "no lens has"),
        ("data: [700,", "data: [0,", "focal lengths"),
        ("data: [700,", "data: [3.5,", "in pixels"),
        ("data: [700, 0, 310,", "data: [", "no camera matrix"),
        ("distortion_coefficients", "other", "no camera matrix with distortion"),
    ],
)
def test_calibrations_that_cannot_serve_say_why(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(ImgtoolError) as fault:
        formats.read(saved(tmp_path, ROS.replace(old, new), "camera.yml"), 600, 400)
    assert says in f"{fault.value.what} {fault.value.hint}"
    assert "camera.yml" in fault.value.what


def test_zeros_of_the_rational_model_are_no_hindrance() -> None:
    matrix = np.array([[700.0, 0, 300], [0, 700, 200], [0, 0, 1]])
    short = formats.from_opencv(matrix, [-0.2, 0.05, 0, 0, 0.01], 600, 400)
    assert formats.from_opencv(matrix, [-0.2, 0.05, 0, 0, 0.01, 0, 0, 0], 600, 400) == short


# --- lensfun ----------------------------------------------------------------------------------------


def lensfun_map(xml: str, width: int, height: int) -> Array:
    """Return lensfun's own look-up for the only lens of a database."""
    lensfunpy = pytest.importorskip("lensfunpy")
    lens = lensfunpy.Database(xml=xml, load_common=False, load_bundled=False).lenses[0]
    modifier = lensfunpy.Modifier(lens, lens.crop_factor, width, height)
    modifier.initialize(
        lens.calib_distortion[0].focal, 8.0, scale=1.0, flags=lensfunpy.ModifyFlags.DISTORTION
    )
    found: Array = modifier.apply_geometry_distortion()
    return found


@pytest.mark.parametrize("model", [RADIAL, BrownConrady(0.08, -0.02, cx=0.05, cy=-0.03)])
@pytest.mark.parametrize("size", [SIZE, (1000, 1500), (1333, 1000)])
def test_lensfun_loads_its_file_and_looks_up_the_same(
    tmp_path: Path, model: BrownConrady, size: tuple[int, int]
) -> None:
    path = written(tmp_path, model, "lensfun", size, lens="A & B <35>", maker="M", focal_mm=35)
    assert np.abs(lensfun_map(path.read_text(), *size) - look_up(model, *size)).max() < 0.1
    assert off(formats.read(path, *size), model, size) < 0.1 or size[0] < size[1]


def test_k3_is_spread_over_lensfuns_two_terms(tmp_path: Path) -> None:
    model = BrownConrady(-0.11, 0.04, k3=0.006)
    path = written(tmp_path, model, "lensfun")
    assert bent(model, lensfun_map(path.read_text(), *SIZE)) < 0.5


def test_what_lensfun_cannot_hold_is_told(tmp_path: Path) -> None:
    assert formats.loss(RADIAL, *SIZE, "lensfun") == ""
    assert formats.loss(FULL, *SIZE, "opencv") == ""
    lost = formats.loss(FULL, *SIZE, "lensfun")
    assert "no p1, p2" in lost
    path = written(tmp_path, FULL, "lensfun")
    assert lost in path.read_text()
    wrong = bent(FULL, lensfun_map(path.read_text(), *SIZE))
    assert float(lost.split("by ")[1].split()[0]) == pytest.approx(wrong, abs=0.15)


LENSFUN = """<lensdatabase version="1"><mount><name>m</name></mount><lens><maker>A</maker><model>B</model>
<mount>m</mount><cropfactor>1.5</cropfactor><aspect-ratio>{aspect}</aspect-ratio><calibration>{entries}</calibration>
</lens></lensdatabase>"""


@pytest.mark.parametrize(
    ("entry", "limit"),
    [
        ('<distortion model="poly3" focal="18" k1="-0.03"/>', 0.6),  # lensfun's own is as coarse
        ('<distortion model="poly5" focal="18" k1="-0.03" k2="0.004"/>', 0.1),
        ('<distortion model="ptlens" focal="18" a="0.012" b="-0.04" c="0.01"/>', 0.3),
    ],
)
@pytest.mark.parametrize("aspect", ["3:2", "4:3", "1.7777"])
def test_all_models_of_lensfun_are_read(tmp_path: Path, entry: str, limit: float, aspect: str) -> None:
    xml = LENSFUN.format(aspect=aspect, entries=entry)
    model = formats.read(saved(tmp_path, xml), *SIZE)
    assert bent(model, lensfun_map(xml, *SIZE)) < limit


def test_the_photos_focal_length_chooses_among_lensfuns(tmp_path: Path) -> None:
    entries = (
        '<distortion model="poly5" focal="30" k1="0.02"/><distortion model="poly5" focal="20" k1="-0.04"/>'
    )
    path = saved(tmp_path, LENSFUN.format(aspect="3:2", entries=entries))
    ends = [formats.read(path, *SIZE, focal_mm=focal).k1 for focal in (10, 20, 25, 30, 99)]
    assert ends[0] == ends[1] == -2 * ends[3] == -2 * ends[4]
    assert ends[2] == pytest.approx((ends[1] + ends[3]) / 2)
    with pytest.raises(ImgtoolError, match="2 focal lengths, 20 to 30 mm"):
        formats.read(path, *SIZE)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('model="poly5"', 'model="acm"', "'acm' is not supported"),
        ('focal="18"', "", "no focal"),
        ('k1="-0.03"', 'k1="much"', "k1 is 'much', not a number"),
        ('k1="-0.03"', 'k1="inf"', "not a finite number"),
        ('k1="-0.03"', 'k1="1e200"', "no lens has"),
        ("<mount>m</mount>", "<mount>m</mount><type>fisheye</type>", "is fisheye"),
        ("3:2", "3:0", "aspect-ratio 3:0"),
        ("<calibration>", "<calibration></calibration><other>", "damaged XML"),
        ("</lens>", "</lens><lens><calibration><distortion/></calibration></lens>", "2 lenses"),
        ("distortion model", "tca model", "no distortion"),
    ],
)
def test_lensfun_files_that_cannot_serve_say_why(tmp_path: Path, old: str, new: str, says: str) -> None:
    whole = LENSFUN.format(
        aspect="3:2", entries='<distortion model="poly5" focal="18" k1="-0.03" k2="0.004"/>'
    )
    with pytest.raises(ImgtoolError) as fault:
        formats.read(saved(tmp_path, whole.replace(old, new)), *SIZE)
    assert says in f"{fault.value.what} {fault.value.hint}"


# --- LCP --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE, (1000, 1500), (641, 480)])
@pytest.mark.parametrize("focal", [None, 2000.0])
def test_lcp_and_back(tmp_path: Path, size: tuple[int, int], focal: float | None) -> None:
    path = written(tmp_path, FULL, "lcp", size, lens="A & B", focal_mm=24)
    assert off(formats.read(path, *size), FULL, size) < 1e-6
    model, missed = formats.from_lcp(formats.to_lcp(FULL, *size, focal), *size)
    assert off(model, FULL, size) < 1e-6
    assert missed == 0


def test_an_lcp_holds_adobes_formula(tmp_path: Path) -> None:
    """By hand: x and y from the centre in units of FocalLengthX times the longer side."""
    root = ElementTree.fromstring(written(tmp_path, FULL, "lcp").read_bytes())
    space = "{http://ns.adobe.com/photoshop/1.0/camera-profile}"
    part = next(root.iter(f"{space}PerspectiveModel"))

    def value(name: str) -> float:
        return float(part.findtext(space + name) or "")

    width, height = SIZE
    focal = value("FocalLengthX") * width
    left, top = value("ImageXCenter") * width, value("ImageYCenter") * height
    x, y = (1100.5 - left) / focal, (900.5 - top) / focal  # the centre of pixel (1100, 900)
    r2 = x * x + y * y
    factor = 1 + sum(value(f"RadialDistortParam{n}") * r2**n for n in (1, 2, 3))
    a, b = value("TangentialDistortParam1"), value("TangentialDistortParam2")
    factor += 2 * (a * y + b * x)
    found = (x * factor + b * r2) * focal + left - 0.5, (y * factor + a * r2) * focal + top - 0.5
    assert found == pytest.approx(look_up(FULL, width, height)[900, 1100], abs=1e-6)


LCP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"
 xmlns:stCamera="http://ns.adobe.com/photoshop/1.0/camera-profile"><photoshop:CameraProfiles><rdf:Seq>
<rdf:li><rdf:Description stCamera:FocalLength="20" stCamera:FocusDistance="1" stCamera:ImageWidth="1500"
 stCamera:ImageLength="1000"><stCamera:PerspectiveModel><rdf:Description stCamera:Version="2"
 stCamera:FocalLengthX="0.6" stCamera:FocalLengthY="0.6" stCamera:RadialDistortParam1="-0.1">
<stCamera:VignetteModel><rdf:Description stCamera:FocalLengthX="9" stCamera:VignetteModelParam1="7"/>
</stCamera:VignetteModel></rdf:Description></stCamera:PerspectiveModel></rdf:Description></rdf:li>{more}
</rdf:Seq></photoshop:CameraProfiles></rdf:Description></rdf:RDF></x:xmpmeta>"""


def test_an_lcp_made_of_attributes_is_read(tmp_path: Path) -> None:
    model = formats.read(saved(tmp_path, LCP.format(more="")), *SIZE)
    s = math.hypot(*SIZE) / 2 / (0.6 * 1500)
    assert model.k1 == pytest.approx(-0.1 * s**2)
    assert astuple_but_k1(model) == pytest.approx((0, 0, 0, 0, 0, 0))


def astuple_but_k1(model: BrownConrady) -> tuple[float, ...]:
    return model.k2, model.p1, model.p2, model.k3, model.cx, model.cy


def test_of_an_lcps_distances_the_farthest_counts(tmp_path: Path) -> None:
    whole = LCP.format(more="")
    entry = whole[whole.index("<rdf:li>") : whole.index("</rdf:li>") + len("</rdf:li>")]
    far = entry.replace('FocusDistance="1"', 'FocusDistance="100"').replace('Param1="-0.1"', 'Param1="-0.2"')
    near = formats.read(saved(tmp_path, whole), *SIZE).k1
    for both in (entry + far, far + entry):
        path = saved(tmp_path, whole.replace(entry, both))
        assert formats.read(path, *SIZE).k1 == pytest.approx(2 * near)
    longer = entry.replace('FocalLength="20"', 'FocalLength="30"').replace('Param1="-0.1"', 'Param1="0.1"')
    path = saved(tmp_path, LCP.format(more=longer))
    assert formats.read(path, *SIZE, focal_mm=25).k1 == pytest.approx(0)
    with pytest.raises(ImgtoolError, match="2 focal lengths"):
        formats.read(path, *SIZE)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("PerspectiveModel", "FisheyeModel", "fisheye"),
        ("PerspectiveModel", "OtherModel", "no perspective model"),
        ('stCamera:FocalLengthX="0.6"', "", "no FocalLengthX"),
        ("RadialDistortParam1", "Other", "no distortion"),
        ('"-0.1"', '"nan"', "not a finite number"),
        ('ImageLength="1000"', 'ImageLength="1500"', "1500x1500 pixels"),
    ],
)
def test_lcps_that_cannot_serve_say_why(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(ImgtoolError) as fault:
        formats.read(saved(tmp_path, LCP.format(more="").replace(old, new)), *SIZE)
    assert says in f"{fault.value.what} {fault.value.hint}"


# --- CSV and JSON -----------------------------------------------------------------------------------


def test_a_row_is_found_by_the_name_of_the_photo(tmp_path: Path) -> None:
    header = ",".join(formats.COLUMNS)
    rows = [
        f"{name},1500,1000,{k1},0.01,0,0,1,0.9,net,1" for name, k1 in (("a.jpg", -0.1), ("b/c.jpg", -0.2))
    ]
    path = saved(tmp_path, "\n".join([header, *rows]), "coefficients.csv")
    assert formats.read(path, *SIZE, name="a.jpg") == BrownConrady(-0.1, 0.01)
    assert formats.read(path, *SIZE, name="/photos/a.jpg") == BrownConrady(-0.1, 0.01)
    assert formats.read(path, *SIZE, name="c.jpg") == BrownConrady(-0.2, 0.01)
    with pytest.raises(ImgtoolError, match="2 rows, not one for d"):
        formats.read(path, *SIZE, name="d.jpg")
    with pytest.raises(ImgtoolError, match="the photo has 640x480"):
        formats.read(path, 640, 480, name="a.jpg")
    only = saved(tmp_path, "\n".join([header, rows[0]]))
    assert formats.read(only, *SIZE, name="other.jpg").k1 == -0.1


def test_labels_of_pairs_are_read(tmp_path: Path) -> None:
    rows = [
        {
            "file": f"{n}_original.jpg",
            "width": 300,
            "height": 200,
            "k1": n / 100,
            "k2": 0,
            "p1": 0,
            "p2": 0,
            "cx": 0.1,
        }
        for n in (1, 2)
    ]
    path = saved(tmp_path, "\n".join(map(json.dumps, rows)), "labels.jsonl")
    assert formats.read(path, *SIZE, name="2_original.jpg") == BrownConrady(0.02, cx=0.1)


@given(model=models, size=sizes)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@pytest.mark.parametrize("form", ["json", "opencv", "lcp"])
def test_files_hold_the_whole_model(
    tmp_path: Path, form: str, model: BrownConrady, size: tuple[int, int]
) -> None:
    path = written(tmp_path, model, form, size, camera="Ä \0 <&>", lens=None, confidence=0.5)
    assert off(formats.read(path, *size), model, size) < 1e-5


def test_json_keeps_the_facts_and_names_the_normalisation() -> None:
    record = json.loads(formats.write(FULL, *SIZE, "json", {"method": "net", "source": Path("a")})[1])
    assert record["normalisation"] == "half-diagonal"
    assert (record["method"], record["source"], record["width"], record["k3"]) == ("net", "a", 1500, FULL.k3)


def test_a_form_that_does_not_exist_is_a_usage_error() -> None:
    with pytest.raises(ImgtoolError, match="no such form of coefficients: exif") as fault:
        formats.write(FULL, *SIZE, "exif", {})
    assert fault.value.code == 2


# --- hostile files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"   \n", "empty"),
        (b"\xff\xd8\xff\xe0", "not a text file"),
        (b"a\0b", "not a text file"),
        (b"hello world", "OpenCV cannot read it|names no values|no camera matrix"),
        (b"%YAML:1.0\n---\na: [", "OpenCV cannot read it"),
        (b"{", "not JSON"),
        (b"[]", "no coefficients"),
        (b"[1, 2]", "not an object"),
        (b'{"k1": 1}', "no k2, p1, p2"),
        (b'{"k1": "x", "k2": 0, "p1": 0, "p2": 0}', "not a number"),
        (b'{"k1": NaN, "k2": 0, "p1": 0, "p2": 0}', "not a finite number"),
        (b'{"k1": 1e9, "k2": 0, "p1": 0, "p2": 0}', "no lens has"),
        (b'{"k1": 0, "k2": 0, "p1": 0, "p2": 0, "normalisation": "diagonal"}', "normalisation"),
        (b"[" * 100_000, "nested|not JSON"),
        (b"file,k1,k2,p1,p2\n", "no coefficients"),
        (b"file,k1,k2,p1\na.jpg,1,2,3\n", "no p2"),
        (b"<html></html>", "not of OpenCV, lensfun or Adobe LCP"),
        (b"<lensdatabase>", "damaged XML"),
        (b"<lensdatabase/>", "no distortion"),
        (b"<opencv_storage></opencv_storage>", "names no values|no camera matrix|cannot read"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><lensdatabase>&b;</lensdatabase>', "document type"),
        (b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><lensdatabase/>', "document type"),
        (b"<a>" * 1000 + b"</a>" * 1000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("suffix", [".xml", ".yml", ".txt"])
def test_damaged_files_are_refused_in_a_line(tmp_path: Path, content: bytes, says: str, suffix: str) -> None:
    with pytest.raises(ImgtoolError, match=says) as fault:
        formats.read(saved(tmp_path, content, "broken" + suffix), *SIZE)
    assert "broken" in fault.value.what


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match="which no coefficient file has"):
        formats.read(saved(tmp_path, b" " * (formats.LARGEST_FILE + 1)), *SIZE)
    with pytest.raises(ImgtoolError, match="no such file"):
        formats.read(tmp_path / "none.yml", *SIZE)


@pytest.mark.parametrize("whole", [ROS, LCP.format(more=""), '{"k1": 0.1, "k2": 0, "p1": 0, "p2": 0}'])
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_a_bitten_file_is_read_or_refused_but_never_crashes(
    tmp_path: Path, whole: str, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, 40))
    bitten = whole[:start] + data.draw(st.text(max_size=8)) + whole[start + length :]
    path = saved(tmp_path, bitten.encode("utf-8", "replace"))
    try:
        model = formats.read(path, *SIZE)
    except ImgtoolError:
        return
    assert all(math.isfinite(value) for value in (*astuple_but_k1(model), model.k1))


# --- profiles ---------------------------------------------------------------------------------------

CANON = {"make": "Canon", "model": "Canon EOS 5D Mark III", "lens": "EF24-70mm f/2.8L II USM", "focal": 24.0}


def exif(make: str = "", model: str = "", lens: str = "", focal: float = 0, **more: object) -> bytes:
    block = Image.Exif()
    inner = block.get_ifd(ExifTags.IFD.Exif)
    block.update({ExifTags.Base.Make: make, ExifTags.Base.Model: model})
    if lens:
        inner[ExifTags.Base.LensModel] = lens
    if focal:
        inner[ExifTags.Base.FocalLength] = focal
    inner.update({getattr(ExifTags.Base, name): value for name, value in more.items()})
    return bytes(block.tobytes())


@pytest.fixture
def lensfun() -> Any:
    """Lensfun with its bundled profiles only, whatever the machine has."""
    lensfunpy = pytest.importorskip("lensfunpy")
    database = lensfunpy.Database(load_common=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles, "_database", lambda: database)
        yield lensfunpy


@pytest.mark.parametrize(
    ("make", "model", "lens", "focal", "entry", "limit"),
    [
        ("Canon", "Canon EOS 5D Mark III", "EF50mm f/1.4 USM", 50.0, "Canon EF 50mm f/1.4 USM", 0.3),
        ("SONY", "ILCE-7M3", "FE 24-70mm F2.8 GM", 24.0, "FE 24-70mm f/2.8 GM", 0.4),
        ("NIKON CORPORATION", "NIKON D750", "AF-S NIKKOR 14-24mm f/2.8G ED", 14.0,
         "Nikon AF-S Zoom-Nikkor 14-24mm f/2.8G ED 146", 0.3),
        ("Canon", "Canon PowerShot G12", "", 6.1, "Canon PowerShot G12 & compatibles (Standard)", 0.3),
        # Two terms are not enough for this one, and three lenses have names much like it.
        ("Canon", "Canon EOS REBEL T1i", "EF-S18-55mm f/3.5-5.6 IS", 18.0,
         "Canon EF-S 18-55mm f/3.5-5.6 IS", 2.5),
    ],
)  # fmt: skip
def test_a_profile_looks_up_what_lensfun_does(
    lensfun: Any, make: str, model: str, lens: str, focal: float, entry: str, limit: float
) -> None:
    for size in (SIZE, (1000, 1500)):
        found = profiles.find(exif(make, model, lens, focal), *size)
        assert found is not None
        assert (found.lens, found.focal_mm) == (entry, focal)
        database = lensfun.Database(load_common=False)
        camera = database.find_cameras(make, model)[0]
        theirs = next(one for one in database.find_lenses(camera, None, lens or None) if one.model == entry)
        modifier = lensfun.Modifier(theirs, camera.crop_factor, *size)
        modifier.initialize(focal, 4.0, scale=1.0, flags=lensfun.ModifyFlags.DISTORTION)
        wanted = modifier.apply_geometry_distortion()
        assert bent(found.model, wanted) < limit
        assert found.residual_px < limit
        assert bent(BrownConrady(), wanted) > 1.5
        assert not found.model.folds()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "Nobody's Camera"},
        {"lens": "Nobody's Lens 33mm f/3.3"},
        {"lens": ""},
        {"focal": 0},
        {"focal": 50000.0},
        {"model": ""},
        {"lens": "EF8-15mm f/4L FISHEYE USM", "focal": 15.0},
        {"DigitalZoomRatio": 2.0},
        {"ExifImageWidth": 2000, "ExifImageHeight": 1000},
    ],
)
@pytest.mark.usefixtures("lensfun")
def test_no_profile_without_camera_lens_and_whole_exposure(change: dict[str, Any]) -> None:
    assert profiles.find(exif(**{**CANON, **change}), *SIZE) is None


@pytest.mark.usefixtures("lensfun")
def test_a_photo_of_the_exposures_aspect_in_any_size_has_its_profile() -> None:
    block = exif(**CANON, ExifImageWidth=6000, ExifImageHeight=4000, DigitalZoomRatio=1.0)
    assert profiles.find(block, *SIZE) is not None
    assert profiles.find(b"Exif\0\0" + block, 1000, 1500) is not None


@pytest.mark.parametrize(
    "block", [None, b"", b"Exif\0\0", b"garbage", exif(**CANON)[:40], b"II*\0" + b"\xff" * 60]
)
@pytest.mark.usefixtures("lensfun")
def test_missing_and_damaged_exif_has_no_profile(block: bytes | None) -> None:
    assert profiles.find(block, *SIZE) is None
    assert profiles.group_key(block, *SIZE) is None


@given(st.data())
def test_bitten_exif_never_crashes(data: st.DataObject) -> None:
    whole = bytearray(exif(**CANON))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=6)):
        whole[place] = data.draw(st.integers(0, 255))
    taken = profiles.facts_of(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    assert taken.focal_mm >= 0
    assert math.isfinite(taken.focal_mm)


def test_facts_of_exif() -> None:
    taken = profiles.facts_of(exif(" Canon\0junk", "EOS  5D", "EF 24mm", 24.0, DigitalZoomRatio=1.5))
    assert taken[:5] == ("Canon", "EOS 5D", "EF 24mm", 24.0, True)
    assert profiles.facts_of(None) == profiles.Taken()


def test_groups_are_of_one_camera_lens_focal_length_and_size() -> None:
    key = profiles.group_key(exif(**CANON), *SIZE)
    assert key is not None
    assert key == profiles.group_key(exif(**CANON, ExifImageWidth=6000, ExifImageHeight=4000), *SIZE)
    for change in ({"model": "Other"}, {"lens": "Other"}, {"focal": 25.0}):
        assert key != profiles.group_key(exif(**{**CANON, **change}), *SIZE)
    assert key != profiles.group_key(exif(**CANON), 1000, 1500)
    assert profiles.group_key(exif(**{**CANON, "focal": 0}), *SIZE) is None


def test_profiles_without_lensfunpy_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    profiles._database.cache_clear()
    assert not profiles.available()
    with pytest.raises(ImgtoolError, match="lensfunpy") as fault:
        profiles.find(exif(**CANON), *SIZE)
    assert fault.value.hint == "pip install 'imgtool[lensfun]'"
