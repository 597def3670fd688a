"""The one loader of mosaics: patterns, levels, colours and facts of DNGs; PNG; no header; what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import cv2
import dng
import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from imgtool import mosaic, raw, tags
from imgtool.errors import ImgtoolError
from imgtool.mosaic import Stated

Array = npt.NDArray[Any]

HEIGHT, WIDTH = 36, 50
BLACK = (64, 70, 76, 82)
MATRIX = (0.9, -0.3, -0.1, -0.5, 1.3, 0.2, -0.1, 0.3, 0.6)
SRGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
DOUBLE = 12


def noise(height: int = HEIGHT, width: int = WIDTH, top: int = 4096) -> npt.NDArray[np.uint16]:
    return np.random.default_rng(0).integers(64, top, (height, width)).astype(np.uint16)


def balanced(xyz_to_camera: Any) -> Array:
    """Camera RGB of which white is (1, 1, 1) to linear sRGB: that white stays white says all."""
    camera = np.reshape(xyz_to_camera, (3, 3)) @ SRGB_TO_XYZ
    return np.linalg.inv(np.diag(1 / camera.sum(1)) @ camera)


@pytest.mark.parametrize("flip", [(1, 0), (3, 3), (6, 6), (8, 5)])
@pytest.mark.parametrize("pattern", mosaic.PATTERNS)
def test_the_frame_lies_as_the_sensor_does(tmp_path: Path, pattern: str, flip: tuple[int, int]) -> None:
    values = noise()
    path = dng.write(tmp_path / "a.dng", values, pattern, black=BLACK, more=[(274, 3, [flip[0]])])
    found = mosaic.read(path)
    assert found.values.dtype == np.uint16
    assert np.array_equal(found.values, values)
    assert (found.pattern, found.black, found.white, found.flip) == (pattern, BLACK, 4095, flip[1])
    assert (found.name, found.warnings) == (str(path), ())


def test_odd_sizes_keep_every_pixel(tmp_path: Path) -> None:
    values = noise(35, 49)
    assert np.array_equal(mosaic.read(dng.write(tmp_path / "a.dng", values)).values, values)


def test_the_values_can_be_written_to(tmp_path: Path) -> None:
    assert mosaic.read(dng.write(tmp_path / "a.dng", noise())).values.flags.writeable


def test_balance_is_of_green(tmp_path: Path) -> None:
    found = mosaic.read(dng.write(tmp_path / "a.dng", noise(), neutral=(0.5, 0.8, 0.64), matrix=MATRIX))
    assert found.gains == pytest.approx((1.6, 1, 1.25), rel=1e-4)
    white = np.reshape(MATRIX, (3, 3)) @ SRGB_TO_XYZ.sum(1)  # of daylight, D65
    assert found.daylight == pytest.approx(white[1] / white, rel=1e-3)


def test_an_even_balance_that_the_file_states_counts(tmp_path: Path) -> None:
    assert mosaic.read(dng.write(tmp_path / "a.dng", noise(), neutral=(1, 1, 1))).gains == (1, 1, 1)


def test_what_is_unknown_is_none(tmp_path: Path) -> None:
    found = mosaic.read(dng.write(tmp_path / "a.dng", noise(), neutral=None, matrix=None))
    assert (found.gains, found.daylight, found.matrix, found.matrix_source) == (None, None, None, "")
    assert (found.xyz_to_camera, found.noise, found.crop) == (None, None, None)
    found = mosaic.read(dng.write(tmp_path / "a.dng", noise(), neutral=None))
    assert found.gains is None
    assert found.matrix is not None


@pytest.mark.parametrize(
    "model", [b"Maker Model 1\0", b"Canon EOS 5D\0"], ids=["unknown", "in LibRaw's table"]
)
def test_a_dng_s_own_matrix_is_taken(tmp_path: Path, model: bytes) -> None:
    more = [(271, 2, model.split()[0] + b"\0"), (272, 2, model), (50708, 2, model)]
    found = mosaic.read(dng.write(tmp_path / "a.dng", noise(), matrix=MATRIX, more=more))
    assert found.matrix == pytest.approx(balanced(MATRIX), abs=2e-3)
    assert found.matrix_source == "file"
    assert found.matrix.sum(1) == pytest.approx(1)
    scale = found.xyz_to_camera / np.reshape(MATRIX, (3, 3))  # but for the scale of its rows
    assert scale == pytest.approx(np.repeat(scale[:, :1], 3, 1), rel=5e-3)


def test_the_matrix_is_that_of_libraw_s_rendering(tmp_path: Path) -> None:
    """A flat frame of three colours; rendered values are linear again by the inverse curve of sRGB."""
    patch = np.array([0.5, 0.3, 0.4])
    flat = dng.mosaic(np.full((HEIGHT, WIDTH, 3), np.round(64 + 4031 * patch)))
    path = dng.write(tmp_path / "a.dng", flat.astype(np.uint16), neutral=(0.8, 1, 0.9), matrix=MATRIX)
    found = mosaic.read(path)
    assert found.matrix is not None
    assert found.gains is not None
    shown = raw.render(path)[HEIGHT // 2, WIDTH // 2] / 65535
    linear = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
    assert found.matrix @ (patch * found.gains) == pytest.approx(linear, abs=1e-3)


def test_the_table_s_matrix_is_taken_where_the_file_has_none(tmp_path: Path) -> None:
    more = [(271, 2, b"Canon\0"), (272, 2, b"Canon EOS 5D\0"), (50708, 2, b"Canon EOS 5D\0")]
    found = mosaic.read(dng.write(tmp_path / "a.dng", noise(), matrix=None, more=more))
    assert found.matrix_source == "library"
    assert found.xyz_to_camera is not None
    assert found.xyz_to_camera[0] == pytest.approx(
        (0.6347, -0.0479, -0.0972), abs=1e-4
    )  # Adobe's, in dcraw.c
    assert found.matrix == pytest.approx(balanced(found.xyz_to_camera), abs=2e-3)


def test_facts_of_the_shot(tmp_path: Path) -> None:
    path = dng.write(tmp_path / "a.dng", noise(), more=[(306, 2, b"2004:05:06 07:08:09\0")])
    found = mosaic.read(path, name="the photo")
    assert found.exif == {"time": "2004:05:06 07:08:09"}
    assert (found.camera, found.name) == ("Maker Model 1", "the photo")


def test_the_active_area_and_the_camera_s_crop(tmp_path: Path) -> None:
    values = noise(60, 80)
    area, origin, size = (50829, 4, [2, 4, 58, 76]), (50719, 4, [6, 8]), (50720, 4, [60, 40])
    found = mosaic.read(dng.write(tmp_path / "a.dng", values, more=[area, origin, size]))
    assert np.array_equal(found.values, values[2:58, 4:76])
    assert found.crop == (8, 6, 40, 60)
    found = mosaic.read(dng.write(tmp_path / "a.dng", values, more=[area, origin, (50720, 4, [12, 8])]))
    assert found.crop is None  # of what is no photo


def test_doubtful_levels_and_orientations_are_said(tmp_path: Path) -> None:
    values, odd = noise(60, 80), (50829, 4, [3, 5, 58, 76])
    found = mosaic.read(dng.write(tmp_path / "a.dng", values, black=BLACK, more=[odd]))
    assert len(found.warnings) == 1
    assert "odd pixel" in found.warnings[0]
    assert mosaic.read(dng.write(tmp_path / "a.dng", values, more=[odd])).warnings == ()
    found = mosaic.read(dng.write(tmp_path / "a.dng", values, more=[(274, 3, [2])]))
    assert ("mirrored" in found.warnings[0], found.flip) == (True, 0)


def test_the_file_s_noise(tmp_path: Path) -> None:
    profile = [1e-4, 1e-6, 2e-4, 2e-6, 6e-4, 3e-6]
    path = dng.write(tmp_path / "a.dng", noise(), more=[(tags.NOISE_PROFILE, DOUBLE, profile)])
    assert mosaic.read(path).noise == pytest.approx((3e-4, 2e-6))


def test_a_frame_behind_a_preview(tmp_path: Path) -> None:
    """As cameras write it: the first directory holds a preview, one below it the frame and its noise."""
    path, values = tmp_path / "a.dng", noise()
    matrix = tuple(part for value in MATRIX for part in (round(value * 10000), 10000))
    first = [
        (50706, "B", 4, (1, 4, 0, 0), True),
        (50708, "s", 0, "Maker Model", True),
        (50721, "2i", 9, matrix, True),
        (50728, "2I", 3, (1, 2, 1, 1, 2, 3), True),
    ]
    below = [
        (33421, "H", 2, (2, 2), True),
        (33422, "B", 4, (1, 0, 2, 1), True),
        (50714, "H", 1, 64, True),
        (50717, "H", 1, 4095, True),
        (tags.NOISE_PROFILE, "d", 2, (1e-4, 1e-6), True),
    ]
    with tifffile.TiffWriter(path) as file:
        preview = np.zeros((8, 8, 3), np.uint8)
        file.write(preview, photometric="rgb", subfiletype=1, subifds=1, extratags=first, metadata=None)
        file.write(values, photometric=32803, subfiletype=0, extratags=below, metadata=None)
    found = mosaic.read(path)
    assert np.array_equal(found.values, values)
    assert (found.pattern, found.gains, found.camera) == ("GRBG", pytest.approx((2, 1, 1.5)), "Maker Model")
    assert found.noise == pytest.approx((1e-4, 1e-6))


@pytest.mark.parametrize("profile", [[0.0, 0.0], [-1e-4, 1e-6], [float("nan"), 1e-6], [1e-4]])
def test_a_noise_that_cannot_be_is_unknown(tmp_path: Path, profile: list[float]) -> None:
    more = [(tags.NOISE_PROFILE, DOUBLE, profile)]
    assert mosaic.read(dng.write(tmp_path / "a.dng", noise(), more=more)).noise is None


@pytest.mark.parametrize("order", "<>")
def test_tags_of_directories_below_the_first(tmp_path: Path, order: str) -> None:
    def directory(*entries: tuple[int, int, int, int]) -> bytes:
        body = b"".join(struct.pack(order + "HHII", *entry) for entry in entries)
        return struct.pack(order + "H", len(entries)) + body + bytes(4)

    profile = struct.pack(order + "2d", 1e-4, 1e-6)
    first = directory((254, 4, 1, 1), (330, 4, 1, 38 + len(profile)))
    below = directory((254, 4, 1, 0), (tags.NOISE_PROFILE, DOUBLE, 2, 38))
    path = tmp_path / "a.tif"
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8)
    path.write_bytes(head + first + profile + below)
    wanted = {254, tags.NOISE_PROFILE}
    assert tags.of_file(path, wanted, below=True) == {254: (1.0,), tags.NOISE_PROFILE: (1e-4, 1e-6)}
    assert tags.of_file(path, wanted) == {254: (1.0,)}
    path.write_bytes(head + first)  # cut short: what is left is read
    assert tags.of_file(path, wanted, below=True) == {254: (1.0,)}


def test_content_is_read_as_a_file_is(tmp_path: Path) -> None:
    path = dng.write(tmp_path / "a.dng", noise())
    found = mosaic.read(path.read_bytes())
    assert np.array_equal(found.values, noise())
    assert found.name == "-"
    with pytest.raises(ImgtoolError, match="- is a photograph"):
        mosaic.read(b"\xff\xd8" + bytes(99))


# What is refused.


def refused(path: Path, stated: Stated = mosaic.Stated()) -> ImgtoolError:  # noqa: B008
    with pytest.raises(ImgtoolError) as caught:
        mosaic.read(path, stated, "a photo")
    assert caught.value.hint
    assert str(path.parent) not in caught.value.what
    return caught.value


def linear(path: Path) -> Path:
    """A DNG that is demosaicked already."""
    extra = [
        (50706, "B", 4, (1, 4, 0, 0), True),
        (50708, "s", 0, "Maker Model", True),
        (50721, "2i", 9, tuple(part for value in MATRIX for part in (round(value * 10000), 10000)), True),
    ]
    tifffile.imwrite(
        path,
        np.zeros((64, 64, 3), np.uint16),
        photometric=34892,
        planarconfig="contig",
        extratags=extra,
        metadata=None,
    )
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def text(path: Path) -> Path:
    path.write_text("no photo at all " * 100)
    return path


REFUSED = {
    "X-Trans": (lambda path: dng.write(path, noise(), "GBGGRGRGRBGBGBGGRGGRGGBGBGBRGRGRGGBG"), "6×6 pixels"),
    "quad-Bayer": (lambda path: dng.write(path, noise(), "RRGGRRGGGGBBGGBB"), "quad-Bayer"),
    "two reds": (lambda path: dng.write(path, noise(), "RRGB"), "not red, two greens and blue"),
    "monochrome": (lambda path: dng.write(path, noise(), "RRRR"), "monochrome"),
    "linear": (linear, "several values per pixel"),
    "oblong pixels": (
        lambda path: dng.write(path, noise(), more=[(50718, 5, [1.5, 1.0])]),
        "not square, 1.5 to 1",
    ),
    "cut short": (lambda path: cut(dng.write(path, noise(200, 300))), "truncated"),
    "black above white": (lambda path: dng.write(path, noise(), black=5000), "corrupt: black level 5000"),
    "values beyond white": (lambda path: dng.write(path, noise(), white=300), "values to 40"),
    "text": (text, "not a camera RAW"),
    "empty": (lambda path: path.touch() or path, "is empty"),
    "folder": (lambda path: path.mkdir() or path, "is a directory"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_bayer_mosaic_is_refused(tmp_path: Path, make: Any, words: str) -> None:
    fault = refused(make(tmp_path / "a.dng"))
    assert words in fault.what
    assert fault.what.startswith(("a photo ", "cannot read a photo"))
    assert fault.code == 1


def test_no_such_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.dng").code == 2


# Without a header.


@pytest.mark.parametrize("kind", ["<u2", "u1"])
def test_without_a_header(tmp_path: Path, kind: str) -> None:
    values = (noise() >> (0 if kind == "<u2" else 4)).astype(kind)
    path = tmp_path / "a.RAW"
    values.tofile(path)
    found = mosaic.read(path, Stated(f"{WIDTH}x{HEIGHT}", "GBRG", 12, (16.0,), 4000.0))
    assert found.values.dtype == np.uint16
    assert np.array_equal(found.values, values)
    assert (found.pattern, found.black, found.white) == ("GBRG", (16, 16, 16, 16), 4000)
    assert (found.gains, found.matrix, found.flip) == (None, None, 0)
    path = path.rename(tmp_path / "a.bin")
    assert np.array_equal(mosaic.read(path, Stated(f"{WIDTH}x{HEIGHT}")).values, values)


@pytest.mark.parametrize(("top", "bits"), [(255, 8), (1020, 10), (1024, 12), (16383, 14), (16384, 16)])
def test_bits_are_those_of_the_largest_value(tmp_path: Path, top: int, bits: int) -> None:
    values = np.minimum(noise(top=min(top, 4096)), top)
    values[3, 5] = top
    values.astype("<u2").tofile(tmp_path / "a.raw")
    found = mosaic.read(tmp_path / "a.raw", Stated(f"{WIDTH}x{HEIGHT}"))
    assert (found.white, found.black) == (2**bits - 1, (0, 0, 0, 0))
    told = [
        word
        for word in found.warnings
        if word.startswith(f"{bits} bits are taken from the largest value, {top}")
    ]
    assert len(told) == 1
    assert not mosaic.read(tmp_path / "a.raw", Stated(f"{WIDTH}x{HEIGHT}", bits=16)).warnings


def test_a_size_that_does_not_fit_names_some_that_do(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    np.zeros((60, 80), np.uint16).tofile(path)
    fault = refused(path)
    assert (fault.what, fault.code) == ("a photo has no header: its size, pattern and levels are unknown", 1)
    assert "80x60 at 16 bit" in fault.hint
    fault = refused(path, Stated("80x61"))
    assert ("holds 9600 bytes" in fault.what, "80x60 at 16 bit" in fault.hint) == (True, True)
    for size in ("80", "80x", "0x60", "-8x60", "a"):
        assert refused(path, Stated(size)).code == 2


def test_levels_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    noise().tofile(path)
    assert refused(path, Stated(f"{WIDTH}x{HEIGHT}", black=(4095.0,))).code == 2
    assert refused(path, Stated(f"{WIDTH}x{HEIGHT}", black=(0.0, 0.0, 4095.0, 0.0))).code == 2
    assert "beyond the white level 255" in refused(path, Stated(f"{WIDTH}x{HEIGHT}", bits=8)).what


@pytest.mark.parametrize(
    "text", ["58,60", "58,60,61,62,63", "-1", "nan", "inf", "dark", "1,,2,3", "1,2,3,4,"]
)
def test_levels_of_black_that_make_no_sense(text: str) -> None:
    with pytest.raises(ImgtoolError, match=r"--black .* makes no sense") as caught:
        mosaic.blacks(text)
    assert caught.value.code == 2


# PNG.


@pytest.mark.parametrize("depth", [8, 16])
def test_png_of_one_channel(tmp_path: Path, depth: int) -> None:
    values = noise() if depth == 16 else (noise() >> 4).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), values)
    found = mosaic.read(tmp_path / "a.png", Stated(pattern="BGGR", black=(58.0, 60.0, 61.0, 62.0)))
    assert found.values.dtype == np.uint16
    assert np.array_equal(found.values, values)
    assert (found.pattern, found.black, found.white) == (
        "BGGR",
        (58, 60, 61, 62),
        4095 if depth == 16 else 255,
    )
    assert any("bits are taken" in word for word in found.warnings) == (depth == 16)


def test_a_photograph_is_no_mosaic(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.bmp"):
        cv2.imwrite(str(tmp_path / name), np.zeros((8, 8, 3), np.uint8))
        assert refused(tmp_path / name).what == "a photo is a photograph, not a mosaic"


def test_a_broken_png(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), noise())
    whole = path.read_bytes()
    for length in (12, 40, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:length])
        assert "truncated or corrupt" in refused(path).what
    assert capfd.readouterr() == ("", "")


def test_a_text_is_no_raw_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ImgtoolError, match=r"notes\.txt is not a camera RAW"):
        mosaic.read(tmp_path / "notes.txt")


def test_a_frame_of_one_value_is_damaged(tmp_path: Path) -> None:
    path = dng.write(tmp_path / "a.dng", np.full((40, 60), 700, np.uint16))
    with pytest.raises(ImgtoolError, match=r"every pixel is 700"):
        mosaic.read(path)


def test_a_matrix_that_libraw_does_not_tell_is_found_from_its_rendering() -> None:
    linear = np.random.default_rng(0).uniform(2000, 20_000, (40, 50, 3))
    matrix = np.array([[1.8, -0.3, -0.5], [-0.4, 1.8, -0.4], [-0.7, -1.4, 3.1]])

    class File:
        def postprocess(self, *, output_color: Any, **how: Any) -> Any:
            import rawpy

            mixed = linear if output_color == rawpy.ColorSpace.raw else linear @ matrix.T
            return np.clip(np.rint(mixed), 0, 65535).astype(np.uint16)

    found = mosaic._shown(File())  # type: ignore[arg-type]
    assert np.array(found) == pytest.approx(matrix, abs=1e-3)
