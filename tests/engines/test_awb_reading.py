"""Frames of every kind, against what was written into them; and folders with known white."""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from imgtool.engines.awb import mosaic, reading, sets
from imgtool.engines.awb.settings import Bench, Model, Train
from imgtool.engines.awb.stats import AwbStats
from imgtool.errors import FAILED, USAGE, ImgtoolError
from imgtool.memory import peak_mb

sys.path.insert(0, str(Path(__file__).parents[1]))
import dng

Array = npt.NDArray[Any]

PLAIN = Bench()
LIGHT = np.array([0.55, 1.0, 0.70])


@pytest.fixture
def forking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork decodes, as in a process without torch: of all tests together that is a large one, and slow."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def angle(found: Array, expected: Array) -> float:
    """Degrees between two colours."""
    return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(found, expected)), np.dot(found, expected))))


def white_of(stats: AwbStats) -> Array:
    return stats.points().mean(0, dtype=np.float64)


def card(height: int = 96, width: int = 128, darkest: float = 0.1, brightest: float = 0.7) -> Array:
    """A grey card, unevenly lit and noisy, under ``LIGHT``: linear, 0..1."""
    rng = np.random.default_rng(0)
    shading = np.linspace(darkest, brightest, width // 2).repeat(2)[
        None, :, None
    ]  # a block of the mosaic is even
    return shading * LIGHT * rng.normal(1, 0.01, (height, width, 3))


def counts(linear: Array, black: float = 64, white: float = 4095) -> Array:
    return np.round(black + linear * (white - black)).clip(0, 65535).astype(np.uint16)


def refused(path: Path, sources: Any = PLAIN) -> ImgtoolError:
    with pytest.raises(ImgtoolError) as caught:
        reading.read(path, str(path), sources)
    assert caught.value.hint
    return caught.value


# Camera RAW.


@pytest.mark.usefixtures("forking")
@pytest.mark.parametrize("pattern", dng.PATTERNS)
@pytest.mark.parametrize("margin", [(0, 0), (1, 1)])
def test_a_grey_card_shows_the_light(tmp_path: Path, pattern: str, margin: tuple[int, int]) -> None:
    top, left = margin
    values = np.zeros((96 + top, 128 + left), np.uint16)
    values[top:, left:] = dng.mosaic(counts(card(darkest=0.4, brightest=0.4)), pattern)
    active = [(50829, 4, [top, left, 96 + top, 128 + left])] if top else []
    found = reading.read(dng.write(tmp_path / "a.dng", values, pattern, more=active), "card", PLAIN)
    assert angle(white_of(found), LIGHT) < 0.05
    assert (found.black, found.white, found.saturated) == (64, 4095, 0)
    assert (found.domain, found.name) == ("raw", "card")
    assert found.about["camera_gains"] == pytest.approx([2, 1 / 0.7], rel=1e-3)
    assert 5 < found.about["peak_mb"] < peak_mb() + 100  # a fork has at first what its parent has
    assert found.about["peak_mb"] >= found.about["shared_mb"]


@pytest.mark.parametrize("pattern", dng.PATTERNS)
def test_each_place_of_the_pattern_has_its_own_black(tmp_path: Path, pattern: str) -> None:
    linear, blacks = card(), (200, 40, 60, 100)
    values = np.empty(linear.shape[:2], np.uint16)
    for place, (letter, black) in enumerate(zip(pattern, blacks, strict=True)):
        part = np.s_[place // 2 :: 2, place % 2 :: 2]
        values[part] = np.round(black + linear[..., "RGB".index(letter)][part] * 3900)
    found = reading.read(dng.write(tmp_path / "a.dng", values, pattern, black=blacks), "a", PLAIN)
    assert angle(white_of(found), LIGHT) < 0.05
    assert found.black == 100


@pytest.mark.parametrize("plateau", [4095, 3700])
def test_saturation_does_not_colour_the_light(tmp_path: Path, plateau: int) -> None:
    linear = card(240, 320) * 2.2  # green stops on the right half, red goes on
    values = np.minimum(dng.mosaic(counts(linear)), plateau)
    found = reading.read(dng.write(tmp_path / "a.dng", values), "a", PLAIN)
    assert angle(white_of(found), LIGHT) < 0.05
    assert found.white == pytest.approx(plateau, rel=0.01)
    assert 0.3 < found.saturated < 0.7


def test_the_camera_is_known_by_its_matrix(tmp_path: Path) -> None:
    found = reading.read(dng.write(tmp_path / "a.dng", dng.mosaic(counts(card()))), "a", PLAIN).camera
    assert (found.name, found.known) == ("Maker Model 1", True)
    assert found.xyz_to_camera is not None
    np.testing.assert_allclose(found.xyz_to_camera.ravel(), dng.SRGB_CAMERA, atol=1e-4)


def test_of_two_matrices_that_for_daylight_is_taken(tmp_path: Path) -> None:
    other = [0.9, 0, 0, 0, 0.8, 0, 0, 0, 0.7]
    balance = [1.1, 1.0, 0.9]
    more = [(50721, 10, other), (50722, 10, dng.SRGB_CAMERA), (50778, 3, [17]), (50779, 3, [21])]
    path = dng.write(tmp_path / "a.dng", dng.mosaic(counts(card())), more=[*more, (50727, 5, balance)])
    matrix = reading.read(path, "a", PLAIN).camera.xyz_to_camera
    assert matrix is not None
    np.testing.assert_allclose(matrix, np.diag(balance) @ np.reshape(dng.SRGB_CAMERA, (3, 3)), atol=1e-4)


@pytest.mark.parametrize(
    "matrix", [None, [0.5] * 9, [-value for value in dng.SRGB_CAMERA[:6]] + [0.1, 0.2, 0.9]]
)
def test_a_camera_without_a_sensible_matrix_is_unknown(tmp_path: Path, matrix: Any) -> None:
    path = dng.write(tmp_path / "a.dng", dng.mosaic(counts(card())), matrix=matrix, neutral=None)
    found = reading.read(path, "a", PLAIN)
    assert not found.camera.known
    assert found.camera.xyz_to_camera is None
    assert "camera_gains" not in found.about


def test_raw_is_known_by_its_content(tmp_path: Path) -> None:
    path = dng.write(tmp_path / "a.dng", dng.mosaic(counts(card())))
    cells = reading.read(path, "a", PLAIN).cells
    assert np.array_equal(reading.read(path.read_bytes(), "-", PLAIN).cells, cells)
    assert np.array_equal(reading.read(path.rename(tmp_path / "a.tif"), "a", PLAIN).cells, cells)


def test_black_frames_and_white_frames_have_an_answer(tmp_path: Path) -> None:
    for value, share in ((64, 0.0), (4095, 1.0)):
        path = dng.write(tmp_path / f"{value}.dng", np.full((96, 128), value, np.uint16))
        found = reading.read(path, "a", PLAIN)
        assert (len(found.points()), found.saturated) == (0, share)
        assert np.isfinite(found.cells).all()


def linear_dng(path: Path, values: Array) -> Path:
    tags = [(50706, "B", 4, (1, 4, 0, 0), True), (50708, "s", 0, "Maker Model", True)]
    tifffile.imwrite(path, values, photometric=34892, planarconfig="contig", extratags=tags, metadata=None)
    return path


def test_what_is_no_bayer_mosaic_is_refused_with_a_reason(tmp_path: Path) -> None:
    values = counts(card())
    flat = values[..., 1]
    trans = "GBGGRGRGRBGBGBGGRGGRGGBGBGBRGRGRGGBG"
    quad = "RRGGRRGGGGBBGGBB"
    reasons = {
        linear_dng(tmp_path / "linear.dng", values): "several values per pixel",
        dng.write(tmp_path / "trans.dng", flat, trans): "6×6 pixels, such as X-Trans",
        dng.write(tmp_path / "quad.dng", flat, quad): "not red, two greens and blue",
        dng.write(tmp_path / "mono.dng", flat, "RRRR"): "monochrome",
    }
    for path, reason in reasons.items():
        fault = refused(path)
        assert reason in fault.what
        assert str(path) in fault.what
        assert fault.code == FAILED


def test_truncated_and_senseless_raw_is_refused(tmp_path: Path) -> None:
    values = dng.mosaic(counts(card()))
    whole = dng.write(tmp_path / "a.dng", values).read_bytes()
    for share in (0.02, 0.1, 0.6):
        cut = tmp_path / "cut.dng"
        cut.write_bytes(whole[: int(len(whole) * share)])
        assert any(word in refused(cut).what for word in ("truncated", "cut short", "corrupt"))
    assert "corrupt" in refused(dng.write(tmp_path / "black.dng", values, black=5000)).what
    assert "corrupt" in refused(dng.write(tmp_path / "white.dng", values, white=300)).what
    (tmp_path / "text.nef").write_text("no photo at all " * 100)
    assert "is not a camera RAW" in refused(tmp_path / "text.nef").what
    values.tofile(tmp_path / "scene.raw")
    assert "no header" in refused(tmp_path / "scene.raw").what
    (tmp_path / "empty.dng").touch()
    assert "empty" in refused(tmp_path / "empty.dng").what
    assert refused(tmp_path / "none.dng").code == USAGE


CRASHES = {
    "segmentation fault": lambda path: faulthandler.disable() or os.kill(os.getpid(), signal.SIGSEGV),
    "killed": lambda path: os.kill(os.getpid(), signal.SIGKILL),
    "end": lambda path: os._exit(0),
    "bug": lambda path: 1 / 0,
}


@pytest.mark.usefixtures("forking")
@pytest.mark.parametrize("crash", CRASHES.values(), ids=CRASHES)
def test_a_crash_of_the_decoder_is_an_error(
    tmp_path: Path, crash: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosaic, "decode", crash)
    path = dng.write(tmp_path / "a.dng", dng.mosaic(counts(card())))
    fault = refused(path)
    assert fault.what == f"cannot decode {path}: decoding crashed"


@pytest.mark.usefixtures("forking")
def test_a_decoder_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[int] = []
    fork = os.fork
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])
    monkeypatch.setattr(mosaic, "decode", lambda path: time.sleep(60))
    path = dng.write(tmp_path / "a.dng", dng.mosaic(counts(card())))
    with pytest.raises(ImgtoolError, match="no end after"):
        mosaic.read(path, timeout=0.2)
    with pytest.raises(ChildProcessError):  # and it is not left behind
        os.waitpid(children[0], os.WNOHANG)


def test_beside_torch_a_new_process_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dng.write(tmp_path / "a.dng", dng.mosaic(counts(card())))
    forked = mosaic.read(path, "a")
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    monkeypatch.delattr(os, "fork")
    fresh = mosaic.read(path, "a")
    assert np.array_equal(fresh.cells, forked.cells)
    assert fresh.camera.name == forked.camera.name
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ImgtoolError, match="b is truncated"):
        mosaic.read(path, "b")


def test_reading_raw_imports_nothing_heavy(tmp_path: Path) -> None:
    path = dng.write(tmp_path / "a.dng", dng.mosaic(counts(card())))
    code = (
        "import sys\nfrom pathlib import Path\nfrom imgtool.engines.awb import mosaic\n"
        "assert mosaic.read(Path(sys.argv[1])).points().size\n"
        "print(sorted({'torch', 'cv2', 'PIL', 'rawpy', 'tifffile', 'rich'} & set(sys.modules)))"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# Linear frames.


def put(path: Path, rgb: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), rgb[..., ::-1] if rgb.ndim == 3 else rgb, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return path


def cube(zeroed: bool = True) -> Array:
    """A frame of Cube++ that saturates at 15303: a grey card, black or a magenta cube at the bottom right."""
    frame = np.minimum(counts(1.6 * card(432, 648), 2048, 16383), 15303)
    frame[-175:, -250:] = 0 if zeroed else (9000, 3000, 9000)
    return frame


def test_simple_cube_is_known_by_its_size_and_corner(tmp_path: Path) -> None:
    found = reading.read(put(tmp_path / "00_0011.png", cube()), "a", PLAIN)
    assert angle(white_of(found), LIGHT) < 0.05
    assert found.black == 2048
    assert not found.coverage[-14:, -20:].any()


@pytest.mark.parametrize("scale", [1, 4])
def test_the_cube_is_masked_where_it_is_not_black(tmp_path: Path, scale: int) -> None:
    frame = cube(zeroed=False).repeat(scale, 0).repeat(scale, 1)
    path = put(tmp_path / "PNG" / "00_0011.png", frame)
    found = reading.read(path, "a", PLAIN)
    assert angle(white_of(found), LIGHT) < 0.05
    assert found.white == pytest.approx(15303, rel=0.01)
    seen = reading.read(path, "a", Bench(mask="none"))
    assert angle(white_of(seen), LIGHT) > 1


def test_levels_and_masks_are_what_one_says(tmp_path: Path) -> None:
    frame = counts(card() * 0.5, 500, 20000)
    frame[10:30, 20:60] = (60, 30, 60000)
    path = put(tmp_path / "a.png", frame)
    found = reading.read(path, "a", Bench(black=500, white=20000, mask="20,10,40,20"))
    assert angle(white_of(found), LIGHT) < 0.05
    assert (found.black, found.white) == (500, 20000)
    assert found.coverage.mean() == pytest.approx(1 - 800 / (96 * 128), abs=0.01)
    with pytest.raises(ImgtoolError, match="--mask lower half is not understood") as caught:
        reading.read(path, "a", Bench(mask="lower half"))
    assert caught.value.code == USAGE


def test_levels_beside_the_frames_are_taken(tmp_path: Path) -> None:
    path = put(tmp_path / "00001.png", counts(card(), 1024, 16383))
    (tmp_path / "levels.json").write_text('{"black": 1024, "white": 16383}')
    found = reading.read(path, "a", PLAIN)
    assert angle(white_of(found), LIGHT) < 0.05
    assert (found.black, found.white) == (1024, 16383)
    (tmp_path / "levels.json").write_text("[]")
    assert "levels.json does not say black and white" in refused(path).what


@pytest.mark.parametrize(("top", "white"), [(1000, 1023), (4095, 4095), (16000, 16383), (40000, 65535)])
def test_the_numbers_tell_the_bits(tmp_path: Path, top: int, white: int) -> None:
    frame = np.random.default_rng(0).integers(1, top // 2, (50, 60, 3)).astype(np.uint16)
    frame[0, 0] = top
    assert reading.read(put(tmp_path / "a.png", frame), "a", PLAIN).white == white


def test_zeros_do_not_count(tmp_path: Path) -> None:
    frame = counts(card(), 0, 16383)
    frame[:48] = 0
    found = reading.read(put(tmp_path / "a.png", frame), "a", PLAIN)
    assert found.coverage.mean() == pytest.approx(0.5, abs=0.02)


def test_linear_tiff_and_alpha(tmp_path: Path) -> None:
    linear = card()
    tifffile.imwrite(tmp_path / "a.tif", linear.astype(np.float32), photometric="rgb")
    found = reading.read(tmp_path / "a.tif", "a", Bench(domain="raw"))
    assert angle(white_of(found), LIGHT) < 0.05
    assert found.white == 1
    clear = np.dstack([counts(linear, 0, 16383), np.full((96, 128), 65535, np.uint16)])
    assert cv2.imwrite(str(tmp_path / "a.png"), clear[..., [2, 1, 0, 3]])
    assert angle(white_of(reading.read(tmp_path / "a.png", "a", PLAIN)), LIGHT) < 0.05


def test_broken_png_is_refused_in_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = put(tmp_path / "a.png", cube()[:60, :90]).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    empty = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    faults = {
        whole[:-20]: "truncated",
        whole[: len(whole) // 2]: "truncated",
        whole[:40]: "truncated",
        bytes(flipped): "check sum",
    }
    for data, words in faults.items():
        (tmp_path / "b.png").write_bytes(data)
        assert words in refused(tmp_path / "b.png").what
    assert capfd.readouterr() == ("", "")
    (tmp_path / "b.png").write_bytes(whole[:33] + empty + whole[-12:])
    assert "do not unpack" in refused(tmp_path / "b.png").what


def test_grey_frames_have_no_white_balance(tmp_path: Path) -> None:
    assert "is grey" in refused(put(tmp_path / "deep.png", counts(card())[..., 0])).what
    assert "is grey" in refused(put(tmp_path / "flat.jpg", counts(card())[..., 0].astype(np.uint8))).what


# Rendered photos.


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "deep.tif"])
def test_rendered_photos_are_made_linear(tmp_path: Path, name: str) -> None:
    linear = np.full((200, 300, 3), 0.3) * LIGHT
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    depth = 65535 if name == "deep.tif" else 255
    pixels = np.round(encoded * depth).astype(np.uint16 if depth > 255 else np.uint8)
    pixels[:100, :100] = depth  # blown out
    pixels[100:, :100] = 0.01 * depth  # and what only noise is left of
    found = reading.read(put(tmp_path / name, pixels), "a", PLAIN)
    assert found.domain == "srgb"
    assert not found.camera.known
    assert angle(white_of(found), LIGHT) < 0.5
    assert found.saturated == pytest.approx(1 / 6, abs=0.03)
    assert found.coverage.mean() == pytest.approx(2 / 3, abs=0.03)


def test_the_domain_is_what_one_says(tmp_path: Path) -> None:
    eight = put(tmp_path / "a.png", np.round(card() * 200).astype(np.uint8))
    found = reading.read(eight, "a", Bench(domain="raw"))
    assert (found.domain, found.white) == ("raw", 255)
    assert angle(white_of(found), LIGHT) < 0.1
    deep = put(tmp_path / "b.png", counts(card()))
    assert reading.read(deep, "b", Bench(domain="srgb")).domain == "srgb"


def chunked(data: bytes, kind: bytes, content: bytes) -> bytes:
    """Put a chunk behind the header of a PNG."""
    whole = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:33] + whole + data[33:]


@pytest.mark.parametrize(
    ("kind", "content", "domain"),
    [
        (b"sRGB", b"\0", "srgb"),
        (b"gAMA", struct.pack(">I", 45455), "srgb"),
        (b"gAMA", struct.pack(">I", 100_000), "raw"),
        (b"iCCP", b"icc\0\0" + zlib.compress(b"profile"), "srgb"),
        (b"cICP", bytes([1, 13, 0, 1]), "srgb"),
        (b"eXIf", b"MM\0*\0\0\0\x08\0\0\0\0\0\0", "srgb"),
        (b"tEXt", b"Title\0frame", "raw"),
    ],
)
def test_a_deep_png_that_says_how_it_is_shown_is_a_photo(
    tmp_path: Path, kind: bytes, content: bytes, domain: str
) -> None:
    data = chunked(put(tmp_path / "a.png", counts(card())).read_bytes(), kind, content)
    (tmp_path / "b.png").write_bytes(data)
    for source in (data, tmp_path / "b.png"):
        assert reading.read(source, "b.png", PLAIN).domain == domain
    assert reading.read(data, "b.png", Bench(domain="raw")).domain == "raw"


def notes(path: Path, **settings: Any) -> str:
    return " ".join(reading.read(path, str(path), Bench(**settings)).about.get("notes", []))


def test_what_is_guessed_and_what_is_not_used_is_told(tmp_path: Path) -> None:
    frame = put(tmp_path / "a.png", counts(card()))
    raw = dng.write(tmp_path / "a.dng", dng.mosaic(counts(card())))
    photo = put(tmp_path / "a.jpg", np.full((60, 90, 3), (90, 130, 100), np.uint8))
    small = put(tmp_path / "s.png", counts(card(32, 32)))
    assert "taken as linear camera data; --domain srgb" in notes(frame)
    assert "looks like statistics of a Raspberry Pi" in notes(small)
    assert [notes(raw), notes(photo), notes(frame, domain="raw"), notes(frame, white=4095)] == [""] * 4
    assert [notes(path, black=3) != "" for path in (frame, raw, photo)] == [False, True, True]
    assert "which sensor the frame is of" in notes(raw, tuning=tmp_path)
    assert "--tuning is not used" in notes(photo, tuning=tmp_path)
    statistic = put(tmp_path / NAME, rendered(np.full((32, 32, 3), 0.2)))
    assert notes(statistic, tuning=tuning(tmp_path / "imxtest.json")) == ""
    assert "the sensor imxtest" in notes(statistic, tuning=tuning(tmp_path / "imxother.json"))
    (tmp_path / "levels.json").write_text('{"black": 64, "white": 4095}')
    assert notes(frame) == ""


def test_a_mask_takes_out_of_raw_files_and_photos_what_it_touches(tmp_path: Path) -> None:
    box = np.s_[102:160, 200:260]
    linear = np.full((240, 320, 3), 0.3) * LIGHT
    linear[box] = (0.1, 0.2, 0.6)
    encoded = 1.055 * linear ** (1 / 2.4) - 0.055
    raw = dng.write(tmp_path / "a.dng", dng.mosaic(counts(linear)))
    photo = put(tmp_path / "a.png", np.round(encoded * 255).astype(np.uint8))
    for path in (raw, photo):
        assert angle(white_of(reading.read(path, "a", PLAIN)), LIGHT) > 2
        found = reading.read(path, "a", Bench(mask="200,102,60,58"))
        assert angle(white_of(found), LIGHT) < 0.5
        assert 0.93 < found.coverage.mean() < 1 - 58 * 60 / (240 * 320) + 0.01
        assert "lies outside of" in refused(path, Bench(mask="320,0,9,9")).what
    statistic = put(tmp_path / NAME, rendered(np.full((32, 32, 3), 0.2)))
    tuned = Bench(tuning=tuning(tmp_path / "imxtest.json"), mask="30,0,2,1")
    assert np.argwhere(reading.read(statistic, NAME, tuned).coverage == 0).tolist() == [[0, 30], [0, 31]]


def test_the_original_s_network_sees_as_many_cells_as_its_input_has(tmp_path: Path) -> None:
    put(tmp_path / "a.png", counts(card(192, 288)))
    table(tmp_path / "gt.csv", "image,r,g,b", ["a.png,1,2,3"])
    shape = {"arch": "deepawb", "height": 96, "width": 144}
    assert reading.cells_for(Model(**shape)) == 96 * 144
    assert reading.cells_for(Model()) == reading.cells_for(None) == 1536
    [entry] = sets.dataset(tmp_path, Train(out=tmp_path, **shape))
    assert entry.read().coverage.shape == (96, 144)
    [usual] = sets.dataset(tmp_path, PLAIN)
    assert usual.read().coverage.shape == (32, 48)


def test_drawings_of_data_sets_are_known(tmp_path: Path) -> None:
    for name in ("preview.png", "gains.png"):
        assert not reading.is_drawn(tmp_path / name)
    for name in ("gt.csv", "levels.json", "gains.png", "gains-histogram.png"):
        (tmp_path / name).touch()
    drawn = {name: reading.is_drawn(tmp_path / name) for name in ("preview.png", "ct.png", "00000.png")}
    assert drawn == {"preview.png": True, "ct.png": True, "00000.png": False}


# Raspberry Pi statistics.

CURVE = [2500.0, 0.75, 0.30, 4000.0, 0.55, 0.50, 6000.0, 0.45, 0.62, 8000.0, 0.38, 0.70]
MATRICES = {
    3000: [2.0, -0.7, -0.3, -0.4, 2.1, -0.7, 0.0, -0.9, 1.9],
    7000: [2.2, -0.9, -0.3, -0.3, 2.2, -0.9, -0.1, -0.5, 1.6],
}
NAME = "anna,imxtest,0007,5200,630,5400.png"


def tuning(path: Path) -> Path:
    algorithms = [
        {"rpi.black_level": {"black_level": 4096}},
        {
            "rpi.awb": {
                "priors": [{"lux": 0, "prior": [2000, 1.0, 13000, 0.0]}],
                "modes": {"auto": {"lo": 2500, "hi": 8000}},
                "bayes": 1,
                "ct_curve": CURVE,
                "sensitivity_r": 1.0,
                "sensitivity_b": 1.0,
                "transverse_pos": 0.02,
                "transverse_neg": 0.02,
            }
        },
        {"rpi.ccm": {"ccms": [{"ct": ct, "ccm": rows} for ct, rows in MATRICES.items()]}},
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": 2.0, "target": "bcm2835", "algorithms": algorithms}))
    return path


def rendered(sensor: Array) -> Array:
    """Render the sensor's colours, 0..1, as the statistics are: gains and matrix of 5000 K."""
    gains = 1 / np.array([0.50, 1.0, 0.56])  # halfway between 4000 and 6000 K
    matrix = (np.reshape(MATRICES[3000], (3, 3)) + np.reshape(MATRICES[7000], (3, 3))) / 2
    return np.round((np.clip(sensor * gains, 0, 1) @ matrix.T).clip(0, 1) * 65535).astype(np.uint16)


@pytest.mark.parametrize("size", [(32, 32), (12, 16)])
@pytest.mark.parametrize("place", ["../tunings", "tunings"])
def test_statistics_are_the_sensor_s_colours_again(tmp_path: Path, size: tuple[int, int], place: str) -> None:
    spread = np.random.default_rng(0).uniform(0.9, 1.1, (*size, 3))
    sensor = 0.4 * np.array([0.50, 1.0, 0.56]) * spread
    sensor[0, :5] = (0.5, 0.2, 0.1)  # so red that the matrix leaves no green
    path = put(tmp_path / "pisp" / NAME, rendered(sensor))
    tuning(tmp_path / "pisp" / place / "imxtest.json")
    found = reading.read(path, str(path), PLAIN)
    whole = found.coverage == 1
    assert np.array_equal(~whole, (rendered(sensor) == 0).any(2) | (rendered(sensor) == 65535).any(2))
    assert (found.coverage[0, :5] == 0.5).all()
    assert whole.mean() > 0.8
    np.testing.assert_allclose(found.cells[whole], sensor[whole], atol=1e-4)
    assert found.truth == pytest.approx((0.49, 0.572), abs=1e-9)
    assert (found.group, found.lux, found.domain) == ("anna", 630, "raw")
    assert found.about == {"camera_ct": 5400, "true_ct": 5200, "sensor": "imxtest"}
    assert found.camera.known
    assert found.camera.tuning is not None


def test_statistics_without_a_tuning_say_what_is_missing(tmp_path: Path) -> None:
    path = put(tmp_path / "pisp" / NAME, rendered(np.full((32, 32, 3), 0.2)))
    fault = refused(path)
    assert "no tuning of the sensor imxtest" in fault.what
    assert "--tuning" in fault.hint
    [entry] = sets.dataset(tmp_path / "pisp", PLAIN)
    assert "no tuning of the sensor imxtest" in entry.fault
    file = tuning(tmp_path / "elsewhere" / "imxtest.json")
    for given in (file, file.parent):
        assert reading.read(path, str(path), Bench(tuning=given)).truth is not None
        assert reading.read(path.read_bytes(), NAME, Bench(tuning=given)).truth is not None
        assert not sets.dataset(tmp_path, Bench(tuning=given))[0].fault


def test_a_tuning_names_the_camera_of_other_frames(tmp_path: Path) -> None:
    file = tuning(tmp_path / "imxtest.json")
    raw = dng.write(tmp_path / "a.dng", dng.mosaic(counts(card())))
    for path in (put(tmp_path / "a.png", counts(card())), raw):
        camera = reading.read(path, "a", Bench(tuning=file)).camera
        assert camera.tuning is not None
        np.testing.assert_allclose(camera.locus.at(5000.0), (0.50, 0.56))
    assert camera.xyz_to_camera is not None  # which the DNG says


@pytest.mark.parametrize("below", ["", "pisp"])
def test_a_folder_of_statistics(tmp_path: Path, below: str) -> None:
    tuning(tmp_path / "tunings" / "imxtest.json")
    names = [NAME, NAME.replace("anna", "bert").replace("5200", "4000")]
    for name in names:
        put(tmp_path / "pisp" / name, rendered(np.full((32, 32, 3), 0.2)))
    entries = sets.dataset(tmp_path / below, PLAIN)
    assert [(entry.path.name, entry.group, entry.fault) for entry in entries] == [
        (names[0], "anna", ""),
        (names[1], "bert", ""),
    ]
    assert entries[1].truth == pytest.approx((0.55, 0.50))
    assert entries[1].read().truth == entries[1].truth


# Folders with gt.csv.


def table(path: Path, heading: str, rows: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([heading, *rows]) + "\n")


@pytest.mark.parametrize(
    "heading", ["image,r,g,b", "image,mean_r,mean_g,mean_b", "image,r,g,b,mean_r,mean_g,mean_b"]
)
@pytest.mark.parametrize("suffix", ["", ".png"])
def test_simple_cube_in_both_headings(tmp_path: Path, heading: str, suffix: str) -> None:
    row = "9,9,9,0.2,0.5,0.3" if heading.endswith("b,mean_r,mean_g,mean_b") else "0.2,0.5,0.3"
    for part, name in (("train", "00_0011"), ("test", "00_0712")):
        put(tmp_path / part / "PNG" / f"{name}.png", cube())
        table(tmp_path / part / "gt.csv", heading, [f"{name}{suffix},{row}"])
    entries = sets.dataset(tmp_path, PLAIN)
    assert [(entry.part, entry.fault, entry.group) for entry in entries] == [
        ("train", "", "00_00"),
        ("test", "", "00_07"),
    ]
    assert entries[0].truth == pytest.approx((0.4, 0.6))
    [alone] = sets.dataset(tmp_path / "train", PLAIN)
    found = pickle.loads(pickle.dumps(alone)).read()
    assert found.truth == pytest.approx((0.4, 0.6))
    assert (found.black, found.group) == (2048, "00_00")
    assert angle(white_of(found), LIGHT) < 0.05


def test_cube_rows_of_several_lights_are_left_out(tmp_path: Path) -> None:
    heading = "image,mean_r,mean_g,mean_b,left_r,left_g,left_b"
    table(tmp_path / "gt.csv", heading, ["00_0001,,,,0.2,0.5,0.3", "00_0002,0.2,0.5,0.3,0.2,0.5,0.3"])
    table(tmp_path / "properties.csv", "image,EXIF:Model", ["00_0002,Canon EOS 550D"])
    for name in ("00_0001", "00_0002"):
        put(tmp_path / "PNG" / f"{name}.png", cube())
    [entry] = sets.dataset(tmp_path, PLAIN)
    assert (entry.path.stem, entry.fault) == ("00_0002", "")
    assert entry.read().camera.name == "Canon EOS 550D"


def test_every_fault_of_a_table_is_told(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d", "e", "extra"):
        put(tmp_path / f"{name}.png", counts(card(16, 16)))
    put(tmp_path / "a.tif", counts(card(16, 16)))
    put(tmp_path / "preview.png", np.zeros((8, 8, 3), np.uint8))
    rows = [
        "a.png,1,2,3",
        "a.tif,1,2,3",
        "b,1,zero,3",
        "c,1,0,3",
        "d,1,2",
        "a.png,1,2,3",
        "gone,1,2,3",
        "e,-1,2,nan",
    ]
    table(tmp_path / "gt.csv", "image,r,g,b", rows)
    entries = sets.dataset(tmp_path, PLAIN)
    assert [(entry.path.stem, entry.fault.partition(": ")[2] or entry.fault) for entry in entries] == [
        ("a", ""),
        ("a", ""),
        ("b", "its white is not three positive numbers: 1, zero, 3"),
        ("c", "its white is not three positive numbers: 1, 0, 3"),
        ("d", "its white is not three positive numbers: 1, 2, nothing"),
        ("a", "a.png has two rows"),
        ("gone", "the row gone has no frame"),
        ("e", "its white is not three positive numbers: -1, 2, nan"),
        ("extra", f"{tmp_path / 'extra.png'} has no row in {tmp_path / 'gt.csv'}"),
    ]
    for entry in entries[2:]:
        assert entry.truth is None
        with pytest.raises(ImgtoolError) as caught:
            entry.read()
        assert caught.value.what == entry.fault


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,r,g\na,1,2\n", "lacks a column: it has image, r, g"),
        ("", "lacks a column: it has none"),
        ("name,r,g,b\na,1,2,3\n", "lacks a column"),
        ("image,r,g,b\n", "has no rows"),
        ("image,r,g,b\n\xff\xfe\x00", "is no table of text"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "gt.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ImgtoolError, match=words) as caught:
        sets.dataset(tmp_path, PLAIN)
    assert "gt.csv" in caught.value.what
    assert caught.value.hint


def test_folders_that_are_no_data_set(tmp_path: Path) -> None:
    for folder, words in ((tmp_path, "no data set with known white"), (tmp_path / "none", "no such folder")):
        with pytest.raises(ImgtoolError, match=words) as caught:
            sets.dataset(folder, PLAIN)
        assert caught.value.code == USAGE


def test_relit_frames_know_their_imagined_cameras(tmp_path: Path) -> None:
    put(tmp_path / "00000.png", counts(card(), 1024, 16383))
    table(
        tmp_path / "gt.csv",
        "image,mean_r,mean_g,mean_b,camera,group,lux",
        ["00000.png,0.55,1,0.7,cam-1,photo-3,800"],
    )
    (tmp_path / "levels.json").write_text('{"black": 1024, "white": 16383}')
    camera = {"ct_curve": CURVE, "xyz_to_camera": list(dng.SRGB_CAMERA)}
    (tmp_path / "cameras.json").write_text(json.dumps({"cam-1": camera}))
    [entry] = sets.dataset(tmp_path, PLAIN)
    found = entry.read()
    assert (found.group, found.lux, found.camera.name, found.camera.known) == ("photo-3", 800, "cam-1", True)
    np.testing.assert_array_equal(found.camera.locus.ct, CURVE[::3])
    np.testing.assert_array_equal(found.camera.locus.b, CURVE[2::3])
    assert found.camera.xyz_to_camera is not None
    assert found.truth == pytest.approx((0.55, 0.7))
    (tmp_path / "cameras.json").write_text('{"cam-1": {"ct_curve": "warm"}}')
    with pytest.raises(ImgtoolError, match=r"cameras\.json does not describe cameras"):
        sets.dataset(tmp_path, PLAIN)


def test_photos_and_raw_files_with_a_table(tmp_path: Path) -> None:
    put(tmp_path / "one.jpg", np.full((60, 90, 3), (90, 130, 100), np.uint8))
    dng.write(tmp_path / "two.dng", dng.mosaic(counts(card())))
    put(tmp_path / "two.jpg", np.full((60, 90, 3), (90, 130, 100), np.uint8))  # the RAW file's preview
    table(tmp_path / "gt.csv", "image,r,g,b,camera", ["one.jpg,0.9,1,1.1,Phone", "two,0.5,1,0.7,Other"])
    entries = sets.dataset(tmp_path, PLAIN)
    assert [(entry.path.name, entry.fault) for entry in entries] == [("one.jpg", ""), ("two.dng", "")]
    photo, raw = (entry.read() for entry in entries)
    assert (photo.domain, raw.domain) == ("srgb", "raw")
    assert (raw.camera.name, raw.camera.known) == ("Maker Model 1", True)
