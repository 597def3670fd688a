"""The writer of DNGs: what other programs read of a frame is what was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rawpy
import tifffile

from imgtool import dng
from imgtool.errors import ImgtoolError
from imgtool.mosaic import PATTERNS, Mosaic

MATRIX = np.array([[0.6844, -0.0996, -0.0856], [-0.3876, 1.1761, 0.2396], [-0.0593, 0.1772, 0.6198]])

SRGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def frame(height: int = 40, width: int = 52, **facts: Any) -> Mosaic:
    values = np.random.default_rng(1).integers(500, 3900, (height, width), np.uint16)
    known: dict[str, Any] = {
        "white": 4001.0,
        "black": (64.0, 66.0, 68.0, 65.0),
        "gains": (2.0, 1.0, 1.6),
        "xyz_to_camera": MATRIX,
        "noise": (1.5e-3, 2.5e-6),
        "camera": "Maker Model 7",
    }
    return Mosaic(values, **known | facts)


def tags(path: Path) -> dict[int, Any]:
    with tifffile.TiffFile(path) as file:
        return {tag.code: tag.value for tag in file.pages[0].tags.values()}


def fractions(value: Any) -> npt.NDArray[np.float64]:
    parts = np.array(value, np.float64).reshape(-1, 2)
    return parts[:, 0] / parts[:, 1]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [(40, 52), (37, 45)])
def test_libraw_reads_the_pixels_their_colours_and_levels(
    tmp_path: Path, pattern: str, size: tuple[int, int]
) -> None:
    written = frame(*size, pattern=pattern)
    dng.write(tmp_path / "a.dng", written)
    with rawpy.imread(str(tmp_path / "a.dng")) as read:
        assert np.array_equal(read.raw_image_visible, written.values)
        colours = read.raw_colors_visible[:2, :2].ravel()
        assert "".join(read.color_desc.decode()[index] for index in colours) == pattern
        assert [read.black_level_per_channel[index] for index in colours] == [64, 66, 68, 65]
        assert read.white_level == 4001
        assert read.camera_whitebalance[:3] == pytest.approx([2.0, 1.0, 1.6], rel=1e-5)
        to_camera = MATRIX @ SRGB_TO_XYZ
        to_camera /= to_camera.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(read.color_matrix[:, :3], np.linalg.inv(to_camera), atol=1e-3)
        assert read.sizes.flip == 0


def test_another_reader_of_tiff_finds_every_fact(tmp_path: Path) -> None:
    exif = {"iso": 1600, "exposure": 1 / 125, "aperture": 2.8, "focal": 35.5, "time": "2004:05:06 07:08:09"}
    written = frame(flip=6, crop=(4, 6, 30, 40), exif=exif)
    dng.write(tmp_path / "new" / "a.dng", written)
    found = tags(tmp_path / "new" / "a.dng")
    assert np.array_equal(tifffile.imread(tmp_path / "new" / "a.dng"), written.values)
    assert (found[271], found[272], found[50708]) == ("Maker", "Model 7", "Maker Model 7")
    assert [found[number] for number in (254, 258, 259, 262, 277)] == [0, 16, 1, 32803, 1]
    assert bytes(found[50706]) == bytes([1, 4, 0, 0])
    assert tuple(found[33421]) == (2, 2)
    assert bytes(found[33422]) == bytes([0, 1, 1, 2])
    assert tuple(found[50713]) == (2, 2)
    assert tuple(found[50714]) == (64, 66, 68, 65)
    assert found[50717] == 4001
    assert found[50778] == 21
    np.testing.assert_allclose(fractions(found[50728]), [0.5, 1.0, 0.625], rtol=1e-9)
    np.testing.assert_allclose(fractions(found[50721]), MATRIX.ravel(), atol=1e-9)
    assert found[51041] == (1.5e-3, 2.5e-6) * 3  # exact: they are doubles
    assert found[274] == 6
    assert (tuple(found[50719]), tuple(found[50720])) == ((6, 4), (40, 30))  # across, then down
    inner = found[34665]
    assert (inner["ISOSpeedRatings"], inner["DateTimeOriginal"]) == (1600, "2004:05:06 07:08:09")
    assert inner["ExposureTime"] == (1, 125)
    assert fractions([inner["FNumber"], inner["FocalLength"]]).tolist() == [2.8, 35.5]


@pytest.mark.parametrize("flip", [0, 3, 5, 6])
def test_libraw_turns_the_frame_as_stated(tmp_path: Path, flip: int) -> None:
    dng.write(tmp_path / "a.dng", frame(flip=flip, crop=(4, 6, 30, 40)))
    with rawpy.imread(str(tmp_path / "a.dng")) as read:
        sizes = read.sizes
    assert sizes.flip == flip
    crop = (sizes.crop_top_margin, sizes.crop_left_margin, sizes.crop_height, sizes.crop_width)
    assert crop == (4, 6, 30, 40)


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    bare = Mosaic(frame().values, black=(0.5, 0.5, 0.5, 0.5))
    dng.write(tmp_path / "a.dng", bare)
    found = tags(tmp_path / "a.dng")
    assert not {271, 272, 34665, 50719, 50720, 50721, 50728, 51041} & set(found)
    assert found[50708] == "unknown"
    assert fractions(found[50714]).tolist() == [0.5] * 4


def test_further_tags_replace_others(tmp_path: Path) -> None:
    more = [(50727, dng.RATIONAL, [1.1, 1.0, 0.9]), (305, dng.ASCII, "another"), (274, dng.SHORT, [8])]
    dng.write(tmp_path / "a.dng", frame(), more)
    found = tags(tmp_path / "a.dng")
    assert (found[305], found[274]) == ("another", 8)
    assert fractions(found[50727]).tolist() == [1.1, 1.0, 0.9]


@pytest.mark.parametrize("value", [4321.123457, 98765.4321012, 4.2e9, 1e-6, 1 / 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_fractions_are_near_whatever_their_size(tmp_path: Path, value: float, sign: int) -> None:
    value /= 1 if sign > 0 else 2
    kind = dng.RATIONAL if sign > 0 else dng.SIGNED_RATIONAL
    dng.write(tmp_path / "a.dng", frame(), [(50727, kind, [sign * value, 1.0, 1.0])])
    written = fractions(tags(tmp_path / "a.dng")[50727])
    assert written[0] == pytest.approx(sign * value, rel=1e-9, abs=1e-6)


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.dng"
    dng.write(path, frame())
    before = path.read_bytes()
    with pytest.raises(KeyError):
        dng.write(path, replace(frame(), flip=9))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ImgtoolError, match="cannot write"):
        dng.write(path / "below.dng", frame())
