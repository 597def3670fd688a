"""Photos larger than memory likes: results in the photo's own memory, files written piece by piece."""

from __future__ import annotations

import errno
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageCms

import imgtool.images.photo
from imgtool import checkpoint, files, images, tiles
from imgtool.engine import TileFacts, Watch
from imgtool.engines.filter.engine import ENGINE as FILTER
from imgtool.engines.filter.settings import Infer
from imgtool.errors import ImgtoolError
from imgtool.images import Photo, metadata, streaming, tiff, to_type
from imgtool.tiles import Plan, Tile

Array = npt.NDArray[Any]


def picture(height: int, width: int, dtype: str = "uint8", seed: int = 0) -> Array:
    values = np.random.default_rng(seed).random((height, width, 3), np.float32)
    return values if dtype == "float32" else (values * np.iinfo(dtype).max).astype(dtype)


# --- bands -----------------------------------------------------------------------------------


class Differ:
    """The difference of each value to the one ``reach`` rows up and columns left, and down and right."""

    def __init__(self, reach: int, most: int = 1 << 30) -> None:
        self.reach, self.most, self.failed = reach, most, 0

    def __call__(self, part: Array, tile: Tile) -> Array:
        if part.shape[0] * part.shape[1] > self.most:
            self.failed += 1
            raise MemoryError
        up, here, down = (self.cut(part, tile, n).astype(np.int64) for n in (-self.reach, 0, self.reach))
        return (2 * here + 3 * up + 5 * down) % 251

    @staticmethod
    def cut(part: Array, tile: Tile, shift: int) -> Array:
        top = tile.rows.start - tile.rows.read_start + shift
        left = tile.columns.start - tile.columns.read_start + shift
        height, width = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
        return part[top : top + height, left : left + width]

    def reference(self, image: Array) -> Array:
        reach, (height, width) = self.reach, image.shape[:2]
        wide = np.pad(image, [(reach, reach), (reach, reach), (0, 0)], mode="reflect").astype(np.int64)
        up, down = wide[:height, :width], wide[2 * reach :, 2 * reach :]
        return ((2 * image.astype(np.int64) + 3 * up + 5 * down) % 251).astype(np.uint8)


def exact(make: Differ) -> Any:
    return lambda part, tile: make(part, tile).astype(np.uint8)


@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(0, 160),
    st.integers(0, 40),
    st.sampled_from([1, 4, 16]),
)
@example(70, 9, 4, 40, 1)  # the mirrored end reaches back over many bands
@example(1, 1, 8, 3, 4)
def test_bands_in_the_photos_own_memory_are_the_whole_photo(
    height: int, width: int, core: int, reach: int, multiple: int
) -> None:
    image, make = picture(height, width), Differ(reach)
    facts, wanted = TileFacts(multiple, border=reach), make.reference(image)
    for overwrite in (False, True):
        mine = image.copy()
        out = tiles.canvas(mine, 3, overwrite)
        count, _ = tiles.bands(exact(make), mine, out, Plan(core, reach), facts)
        assert np.array_equal(out, wanted)
        assert np.array_equal(mine, wanted if overwrite else image)
        assert count == len(tiles.cut(height, width, Plan(core, reach), facts))


@pytest.mark.parametrize("overwrite", [False, True])
def test_bands_quarter_tiles_when_memory_ends(overwrite: bool) -> None:
    image, make = picture(300, 211), Differ(9, most=100 * 100)
    wanted, said, told = make.reference(image), list[str](), list[tuple[int, int]]()
    out = tiles.canvas(image, 3, overwrite)
    watch = Watch(lambda done, total: told.append((done, total)), said.append)
    count, edge = tiles.bands(exact(make), image, out, Plan(160, 9), TileFacts(border=9), watch)
    assert np.array_equal(out, wanted)
    assert make.failed == len(said) == 1
    assert told[-1] == (count, count)
    assert edge <= 80


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_channel_fits_into_the_photos_memory_too(overwrite: bool) -> None:
    image, make = picture(90, 80, "uint16"), Differ(5)
    wide = np.pad(image, [(5, 5), (5, 5), (0, 0)], mode="reflect")
    wanted = wide[:90, :80, 0] // 2 + wide[10:, 10:, 1] // 2

    def half(part: Array, tile: Tile) -> Array:
        return make.cut(part, tile, -5)[..., 0] // 2 + make.cut(part, tile, 5)[..., 1] // 2  # type: ignore[no-any-return]

    out = tiles.canvas(image, 1, overwrite)
    tiles.bands(half, image, out, Plan(32, 5), TileFacts(border=5))
    assert out.shape == (90, 80)
    assert np.array_equal(out, wanted)
    assert np.may_share_memory(out, image) == overwrite


def test_a_photo_that_may_not_be_written_is_not() -> None:
    image = picture(9, 9)
    image.flags.writeable = False
    assert not np.may_share_memory(tiles.canvas(image, 3, overwrite=True), image)


def test_cores_can_be_looked_at_and_thrown_away() -> None:
    image, seen = picture(50, 40), list[int]()

    def note(tile: Tile, values: Array) -> None:
        seen.append(int(values.max()))

    count, _ = tiles.bands(exact(Differ(0)), image, note, Plan(16, 0), TileFacts())
    assert len(seen) == count == 12
    assert max(seen) == Differ(0).reference(image).max()


# --- files -----------------------------------------------------------------------------------

DTYPES = ("uint8", "uint16", "float32")
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="1"/></x:xmpmeta>'
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY = SRGB[:16] + b"GRAY" + SRGB[20:]


def exif_of(order: str = "<", orientation: int = 1) -> bytes:
    found = (
        metadata.Entry(271, 2, 6, b"Maker\0"),
        metadata.Entry(274, 3, 1, struct.pack(order + "H", orientation)),
        metadata.Entry(306, 2, 20, b"2024:05:06 07:08:09\0"),
    )
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return header + metadata.directory(found, order, 8)


def photo_of(dtype: str, *, grey: bool = False, alpha: bool = False, **rest: Any) -> Photo:
    """Return a smooth photo with noise, 53 x 67, so that every row filter and kind of block comes up."""
    y, x = np.mgrid[:53, :67] / 67
    smooth = np.stack([x, y, (x + y) / 2], 2) + np.random.default_rng(1).normal(0, 0.02, (53, 67, 3))
    pixels = to_type(smooth, dtype)
    if grey:
        pixels = np.repeat(pixels[..., :1], 3, axis=2)
    return Photo(pixels, picture(53, 67, dtype)[..., 0].copy() if alpha else None, grey, **rest)


def equal(one: Photo, two: Photo) -> bool:
    alphas = [None if each.alpha is None else each.alpha.tolist() for each in (one, two)]
    return (
        np.array_equal(one.pixels, two.pixels)
        and one.pixels.dtype == two.pixels.dtype
        and alphas[0] == alphas[1]
        and [one.grey, one.exif, one.icc, one.xmp, one.format]
        == [two.grey, two.exif, two.icc, two.xmp, two.format]
    )


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imgtool.images.photo, "LARGE", 0)
    monkeypatch.setattr(streaming, "BAND", 2000)
    monkeypatch.setattr(streaming, "_CACHED", 2000)
    monkeypatch.setattr(streaming, "_STRIP", 1000)


KINDS = [
    *((kind, dtype) for kind in ("png", "tif") for dtype in DTYPES if (kind, dtype) != ("png", "float32")),
    ("jpg", "uint8"),
]


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("alpha", [False, True], ids=["opaque", "alpha"])
@pytest.mark.parametrize("grey", [False, True], ids=["rgb", "grey"])
def test_large_files_are_read_as_small_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str, alpha: bool, grey: bool
) -> None:
    told = {"exif": exif_of(orientation=6), "icc": GREY if grey else SRGB, "xmp": XMP}
    path = tmp_path / f"a.{kind}"
    path.write_bytes(images.encode(photo_of(dtype, grey=grey, alpha=alpha, **told), kind))
    small = images.read(path)
    monkeypatch.setattr(imgtool.images.photo, "LARGE", 0)
    monkeypatch.setattr(files, "read", None)  # what is large is not read into memory
    large = images.read(path)
    assert equal(large, small)
    assert large.pixels.flags.c_contiguous
    assert large.pixels.flags.writeable


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def odd_files() -> dict[str, bytes]:
    """Return files that are broken, or of a kind that not every decoder reads alike."""
    png, jpeg = (images.encode(photo_of("uint8"), kind) for kind in ("png", "jpg"))
    plain, clear, inks, progressive, animation = (io.BytesIO() for _ in range(5))
    image = Image.fromarray(photo_of("uint8").pixels)
    image.quantize(7).save(plain, "PNG")
    image.save(clear, "PNG", transparency=tuple(photo_of("uint8").pixels[0, 0].tolist()))
    image.convert("CMYK").save(inks, "JPEG")
    image.save(progressive, "JPEG", progressive=True)
    image.save(animation, "PNG", save_all=True, append_images=[image.rotate(90)])
    header, rows = png[:33], zlib.compress(bytes(20 * (1 + 67 * 3)))
    return {
        "short.png": header + chunk(b"IDAT", rows) + chunk(b"IEND", b""),
        "cut.png": png[: len(png) // 2],
        "flipped.png": png[:3000] + bytes([png[3000] ^ 1]) + png[3001:],
        "palette.png": plain.getvalue(),
        "key.png": clear.getvalue(),
        "animation.png": animation.getvalue(),
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "head.jpg": jpeg[:30],
        "inks.jpg": inks.getvalue(),
        "progressive.jpg": progressive.getvalue(),
        "cut.tif": images.encode(photo_of("uint8"), "tif")[:-3000],
    }


@pytest.mark.parametrize("name", odd_files())
def test_odd_large_files_are_what_odd_small_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(odd_files()[name])

    def outcome() -> Photo | tuple[str, str]:
        try:
            return images.read(path)
        except ImgtoolError as fault:
            return fault.what, fault.hint

    small = outcome()
    monkeypatch.setattr(imgtool.images.photo, "LARGE", 0)
    large = outcome()
    assert equal(large, small) if isinstance(large, Photo) and isinstance(small, Photo) else large == small
    assert name == "short.png" or capfd.readouterr() == ("", "")  # of that one, libpng speaks


@pytest.mark.parametrize(("kind", "dtype"), [*KINDS, ("png", "float32"), ("jpg", "uint16")])
@pytest.mark.parametrize("alpha", [False, True], ids=["opaque", "alpha"])
@pytest.mark.parametrize("grey", [False, True], ids=["rgb", "grey"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_files_written_in_bands_are_those_written_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: str,
    alpha: bool,
    grey: bool,
    order: str,
) -> None:
    photo = photo_of(dtype, grey=grey, alpha=alpha, exif=exif_of(order), icc=GREY if grey else SRGB, xmp=XMP)
    whole = images.read(images.encode(photo, kind))
    monkeypatch.setattr(imgtool.images.photo, "LARGE", 0)
    monkeypatch.setattr(streaming, "BAND", 2000)
    monkeypatch.setattr(streaming, "_CACHED", 2000)
    monkeypatch.setattr(streaming, "_STRIP", 1000)
    images.write(tmp_path / f"a.{kind}", photo)
    data = (tmp_path / f"a.{kind}").read_bytes()
    assert equal(images.read(data), whole)
    assert images.encode(photo, kind) == data


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("grey", [False, True], ids=["rgb", "grey"])
def test_bands_are_read_by_others(grey: bool) -> None:
    photo = photo_of("uint8", grey=grey)
    wanted = photo.pixels[..., 0] if grey else photo.pixels
    png, tif = (images.encode(photo, kind) for kind in ("png", "tif"))
    with Image.open(io.BytesIO(png)) as image:
        assert np.array_equal(np.asarray(image), wanted)
    shown = as_opencv(png)
    assert np.array_equal(shown if grey else shown[..., ::-1], wanted)
    assert np.array_equal(tifffile.imread(io.BytesIO(tif)), wanted)
    with Image.open(io.BytesIO(tif)) as image:
        assert np.array_equal(np.asarray(image), wanted)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("quality", [50, 89, 90, 100])
@pytest.mark.parametrize("grey", [False, True], ids=["rgb", "grey"])
@pytest.mark.parametrize("size", [(53, 67), (16, 16), (1, 1), (17, 200), (200, 17)])
def test_a_jpeg_in_bands_has_the_pixels_of_pillows(quality: int, grey: bool, size: tuple[int, int]) -> None:
    pixels = picture(*size)
    pixels = np.repeat(pixels[..., :1], 3, 2) if grey else pixels
    data, whole = images.encode(Photo(pixels, grey=grey), "jpg", quality), io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    image.save(whole, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    for decode in (lambda raw: np.asarray(Image.open(io.BytesIO(raw))), as_opencv):
        assert np.array_equal(decode(data), decode(whole.getvalue()))
    assert data.count(b"\xff\xdd") == 1


def as_opencv(data: bytes) -> Array:
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("kind", ["png", "tif", "jpg"])
def test_a_disk_that_is_full_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    opened = Path.open

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > 300:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(Path, "open", lambda path, mode: Full() if "w" in mode else opened(path, mode))
    with pytest.raises(ImgtoolError, match="no space left on device") as caught:
        images.write(tmp_path / f"a.{kind}", photo_of("uint8"))
    assert "free some space" in caught.value.hint
    assert not list(tmp_path.iterdir())


# --- grey results ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1 << 40], ids=["large", "small"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["png", "tif", "jpg", "webp"])
def test_one_channel_makes_a_grey_file(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str, size: int
) -> None:
    monkeypatch.setattr(imgtool.images.photo, "LARGE", size)
    before = photo_of(dtype, alpha=True, exif=exif_of(), icc=SRGB, xmp=XMP)
    values = np.ascontiguousarray(before.pixels[::-1, :, 1])
    after = before.with_pixels(values)
    data = images.encode(after, kind, quality=100)
    back = images.read(data)
    assert back.grey == (kind != "webp")
    assert back.icc is None
    assert (back.exif, back.xmp) == (before.exif, XMP)
    assert back.pixels.dtype == (
        dtype if kind == "tif" else "uint8" if kind in ("jpg", "webp") else back.pixels.dtype
    )
    wanted = images.convert(values, back.pixels.dtype)
    assert np.abs(back.pixels[..., 0].astype(float) - wanted).max() <= (2 if kind == "jpg" else 0)
    assert (back.pixels == back.pixels[..., :1]).all()
    if kind == "jpg":
        assert back.alpha is None
    else:
        assert back.alpha is not None
        assert before.alpha is not None
        assert np.array_equal(back.alpha, images.convert(before.alpha, back.pixels.dtype))
    if kind == "tif":
        assert tifffile.imread(io.BytesIO(data)).shape == (53, 67, 2)


def test_a_profile_for_grey_stays() -> None:
    before = photo_of("uint8", grey=True, icc=GREY)
    assert before.with_pixels(before.pixels[..., 0]).icc == GREY
    assert before.with_pixels(before.pixels).icc == GREY


# --- the real thing --------------------------------------------------------------------------

EDGE, FAMILIAR = 16384, 1024
COMMAND = """
import sys
from imgtool import cli
from imgtool.memory import peak_mb
code = cli.run(sys.argv[1:])
print(peak_mb(), file=sys.stderr)
cli.leave(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "target", "form"),
    [("png", "unsharp", "png"), ("tif", "sobel_3", "tif"), ("jpg", "unsharp", "jpg")],
)
def test_a_photo_of_268_megapixels_is_filtered_in_2_gb(
    tmp_path: Path, kind: str, target: str, form: str
) -> None:
    weights, source, out = tmp_path / "net.safetensors", tmp_path / f"big.{kind}", tmp_path / f"out.{form}"
    shape = FILTER.model.model_validate({"target": target, "depth": 2})
    torch.manual_seed(0)
    net = FILTER.build(shape)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    checkpoint.save_weights(weights, FILTER, shape, net.state_dict(), {"scores": {}})
    part = photo_of("uint8").pixels[:, :, ::-1]
    part = np.tile(part, (-(-FAMILIAR // 53), -(-EDGE // 67), 1))[:FAMILIAR, :EDGE]
    whole = Photo(np.broadcast_to(part[:1], (EDGE, EDGE, 3)))
    rows = np.arange(EDGE) % FAMILIAR

    def write(file: BinaryIO) -> None:
        bands = streaming.Bands(whole, lambda first, last: part[rows[first:last]])
        if kind == "png":
            streaming.png(file, bands)
        elif kind == "tif":
            streaming.tiff(file, bands, tiff.options(whole))
        else:
            streaming.jpeg(file, bands, {"quality": 95, "subsampling": 0})

    files.fill(source, write)
    words = ["infer", "filter", str(source), "-o", str(out), "--weights", str(weights), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, check=False
    )
    source.unlink()
    assert not done.returncode, done.stderr
    assert float(done.stderr.split()[-1]) < 2000
    assert images.size(out) == (EDGE, EDGE)
    after = images.read(out)
    out.unlink()
    assert after.grey == (target == "sobel_3")
    small = FILTER.apply(
        net.eval(), Photo(np.tile(part, (2, 1, 1))[:, :FAMILIAR]), Infer(inputs=("-",)), Watch()
    ).pixels
    wanted = np.broadcast_to(small[..., None], (*small.shape, 3)) if small.ndim == 2 else small
    inner = slice(64, FAMILIAR - 64)
    for top in (0, 7 * FAMILIAR, EDGE - FAMILIAR):
        found = after.pixels[top : top + FAMILIAR, :FAMILIAR].astype(int)
        apart = np.abs(found[inner, inner] - wanted[:FAMILIAR][inner, inner])
        assert apart.mean() < 4 if form == "jpg" else apart.max() <= 1
