"""Camera RAW: synthetic DNGs and broken files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from imgtool import images, raw
from imgtool.errors import ImgtoolError
from imgtool.images import metadata

HEIGHT, WIDTH, BLACK, WHITE = 64, 96, 64, 4095
# XYZ to camera of a camera whose colours are those of sRGB.
MATRIX = (3.2405, -1.5372, -0.4985, -0.9693, 1.8760, 0.0416, 0.0556, -0.2040, 1.0573)


def linear_rgb():
    """A picture without symmetry: grey 0.2, its upper left quarter red."""
    rgb = np.full((HEIGHT, WIDTH, 3), 0.2)
    rgb[: HEIGHT // 2, : WIDTH // 2] = (0.5, 0.1, 0.1)
    return rgb


def dng(
    path: Path, gains=(2.0, 1.0, 1.5), white=WHITE, black=BLACK, orientation=1, neutral=True, light=1.0
) -> Path:
    """Write a Bayer DNG of ``linear_rgb`` under a light that the gains (R, G, B) undo."""
    camera = light * linear_rgb() / np.array(gains)
    mosaic = camera[..., 1].copy()
    mosaic[::2, ::2], mosaic[1::2, 1::2] = camera[::2, ::2, 0], camera[1::2, 1::2, 2]
    values = np.round(BLACK + mosaic * (WHITE - BLACK)).astype(np.uint16)
    matrix = [number for value in MATRIX for number in (round(value * 10000), 10000)]
    shot = [number for gain in gains for number in (1000, round(gain * 1000))]
    tags = [
        (271, "s", 0, "Maker", True),
        (272, "s", 0, "Model", True),
        (274, "H", 1, orientation, True),
        (33421, "H", 2, (2, 2), True),
        (33422, "B", 4, (0, 1, 1, 2), True),
        (50706, "B", 4, (1, 4, 0, 0), True),
        (50708, "s", 0, "Maker Model", True),
        (50714, "H", 1, black, True),
        (50717, "H", 1, white, True),
        (50721, "2i", 9, tuple(matrix), True),
        (50778, "H", 1, 21, True),
    ]
    if neutral:
        tags.append((50728, "2I", 3, tuple(shot), True))
    tifffile.imwrite(path, values, photometric=32803, extratags=tags, metadata=None)
    return path


def srgb(linear):
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def corners(pixels):
    """Mean of the middle of each quarter, as 0..1: (2, 2, 3)."""
    high, wide = pixels.shape[0] // 2, pixels.shape[1] // 2
    parts = [
        [pixels[y : y + high, x : x + wide][8:-8, 8:-8].mean((0, 1)) for x in (0, wide)] for y in (0, high)
    ]
    return np.array(parts) / 65535


def test_camera_white_balance_and_srgb(tmp_path):
    pixels = raw.render(dng(tmp_path / "a.dng"))
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.dtype == np.uint16
    found = corners(pixels)
    assert found[1, 1] == pytest.approx(srgb(np.full(3, 0.2)), abs=0.01)
    assert found[0, 0] == pytest.approx(srgb(np.array([0.5, 0.1, 0.1])), abs=0.02)


@pytest.mark.parametrize("light", [0.3, 1.7])
def test_exposure_is_the_camera_s(tmp_path, light):
    # Automatic brightness would lift the dark one, an adjusted white level the one that nearly clips.
    found = corners(raw.render(dng(tmp_path / "a.dng", gains=(1.0, 1.0, 1.0), light=light)))
    assert found[1, 1] == pytest.approx(srgb(np.full(3, 0.2 * light)), abs=0.01)


def test_rendered_twice_the_same(tmp_path):
    path = dng(tmp_path / "a.dng")
    assert np.array_equal(raw.render(path), raw.render(path))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_upright(tmp_path, orientation):
    photo = images.read(dng(tmp_path / "a.dng", orientation=orientation))
    red = corners(photo.pixels)[..., 0] > 0.6
    expected = images.turn(np.array([[True, False], [False, False]]), orientation)
    assert np.array_equal(red, expected)
    assert metadata.orientation(photo.exif) == 1
    assert photo.format == "raw"
    assert metadata.tag_bytes(photo.exif, 271) == b"Maker\0"
    assert images.size(tmp_path / "a.dng") is None


def test_as_the_sensor_lies(tmp_path):
    turned = raw.render(dng(tmp_path / "a.dng", orientation=6), upright=False)
    assert np.array_equal(turned, raw.render(dng(tmp_path / "b.dng")))


def test_the_algorithm_asked_for(tmp_path):
    path = dng(tmp_path / "a.dng")
    linear, dht = (raw.render(path, demosaic=name) for name in ("linear", "dht"))
    assert np.array_equal(raw.render(path, demosaic="ahd"), raw.render(path))
    assert not np.array_equal(linear, dht)
    assert corners(linear) == pytest.approx(corners(dht), abs=0.01)


def test_no_camera_white_balance(tmp_path):
    pixels = raw.render(dng(tmp_path / "a.dng", gains=(1.0, 1.0, 1.0), neutral=False))
    assert corners(pixels)[1, 1] == pytest.approx(srgb(np.full(3, 0.2)), abs=0.05)


def test_dng_by_content(tmp_path):
    path = dng(tmp_path / "a.dng")
    by_name = images.read(path)
    assert np.array_equal(images.read(path.read_bytes()).pixels, by_name.pixels)
    renamed = path.rename(tmp_path / "a.tif")
    assert np.array_equal(images.read(renamed).pixels, by_name.pixels)


def refused(path: Path) -> ImgtoolError:
    with pytest.raises(ImgtoolError) as caught:
        raw.render(path)
    assert path.name in caught.value.what
    assert "Traceback" not in caught.value.what
    assert caught.value.hint
    return caught.value


def test_truncated(tmp_path):
    whole = dng(tmp_path / "a.dng").read_bytes()
    cut = tmp_path / "cut.dng"
    cut.write_bytes(whole[: len(whole) // 2])
    fault = refused(cut)
    assert fault.code == 1
    assert any(word in fault.what for word in ("truncated", "cut short", "corrupt"))


def test_nonsense_levels(tmp_path):
    assert "corrupt" in refused(dng(tmp_path / "black.dng", black=5000)).what
    assert "corrupt" in refused(dng(tmp_path / "white.dng", white=300)).what


@pytest.mark.parametrize("name", ["text.cr2", "text.nef"])
def test_not_raw(tmp_path, name):
    path = tmp_path / name
    path.write_text("no photo at all " * 100)
    assert refused(path).code == 1
    with pytest.raises(ImgtoolError):
        images.read(path)


def test_headerless(tmp_path):
    path = tmp_path / "scene.raw"
    np.arange(768 * 512, dtype=np.uint16).tofile(path)
    assert "no header" in refused(path).what
    with pytest.raises(ImgtoolError, match="no header"):
        images.read(path)


def test_empty_and_missing(tmp_path):
    (tmp_path / "a.dng").touch()
    assert "empty" in refused(tmp_path / "a.dng").what
    assert refused(tmp_path / "none.dng").code == 2


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_other_gains(tmp_path, scale):
    """Grey under the light that they undo; only their ratios count, and what is white stays white."""
    path = dng(tmp_path / "a.dng", gains=(2.0, 1.0, 1.5))
    found = corners(raw.render(path, [scale * gain for gain in (2.0, 1.0, 1.5)]))
    assert found[1, 1] == pytest.approx(srgb(np.full(3, 0.2)), abs=0.01)
    other = corners(raw.render(path, [scale * gain for gain in (1.0, 1.0, 1.5)]))
    assert other[1, 1, 0] == pytest.approx(srgb(0.1), abs=0.01)
    full = corners(raw.render(dng(tmp_path / "b.dng", light=5), [4 * scale, scale, 3 * scale]))
    assert full[1, 1] == pytest.approx(1, abs=0.002)


def test_name_beyond_ascii(tmp_path):
    assert raw.render(dng(tmp_path / "été 写真.dng")).shape == (HEIGHT, WIDTH, 3)


def test_child_is_light():
    code = (
        "import sys, imgtool.raw, imgtool.mosaic\n"
        "print({'torch', 'cv2', 'PIL', 'typer', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
