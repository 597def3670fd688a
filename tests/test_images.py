"""Photos read and written: depth, metadata, orientation, and everything that can be broken."""

import io
import os
import struct
import tracemalloc
import warnings
import zlib
from dataclasses import replace

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from imgtool import files, images
from imgtool.errors import ImgtoolError
from imgtool.images import Photo, metadata

DTYPES = {"uint8": np.uint8, "uint16": np.uint16, "float32": np.float32}
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'


def pixels_of(dtype, height=13, width=17, seed=0):
    """Random pixels over the whole range; uint16 ones are dark, so that only the type tells the depth."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.uniform(-0.5, 2.0, (height, width, 3)).astype(dtype)
    return rng.integers(0, 256, (height, width, 3)).astype(dtype)


def photo_of(dtype=np.uint8, alpha=False, grey=False, **rest) -> Photo:
    pixels = pixels_of(dtype)
    if grey:
        pixels = np.repeat(pixels[..., :1], 3, axis=2)
    return Photo(pixels, pixels_of(dtype, seed=1)[..., 0].copy() if alpha else None, grey, **rest)


def exif_of(orientation=1, order="<", maker_note=b"NOTE" * 20) -> bytes:
    """An EXIF block: maker, date, maker note, sizes, GPS and a thumbnail directory."""
    entry = metadata.Entry

    def short(value):
        return struct.pack(order + "H", value)

    inner = (
        entry(0x829A, 5, 1, struct.pack(order + "II", 1, 250)),
        entry(0x9003, 2, 20, b"2024:05:06 07:08:09\0"),
        entry(0x927C, 7, len(maker_note), maker_note),
        entry(0xA002, 4, 1, struct.pack(order + "I", 17)),
        entry(0xA003, 3, 1, short(13)),
    )
    found = (
        entry(271, 2, 6, b"Maker\0"),
        entry(272, 2, 4, b"Mod\0"),
        entry(274, 3, 1, short(orientation)),
        entry(306, 2, 20, b"2024:05:06 07:08:09\0"),
        entry(metadata.EXIF_IFD, 4, 1, b"", inner),
        entry(metadata.GPS_IFD, 4, 1, b"", (entry(1, 2, 2, b"N\0"),)),
    )
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    block = header + metadata.directory(found, order, 8)
    after = 8 + 2 + 12 * len(found)
    thumbnail = metadata.directory((entry(259, 3, 1, short(6)),), order, len(block))
    return block[:after] + struct.pack(order + "I", len(block)) + block[after + 4 :] + thumbnail


def facts(exif: bytes):
    """What Pillow, an independent reader, finds in an EXIF block."""
    read = Image.Exif()
    read.load(exif)
    plain = {tag: value for tag, value in read.items() if tag not in (0x8769, 0x8825)}  # but for offsets
    return plain | {"exif": read.get_ifd(0x8769), "gps": read.get_ifd(0x8825)}


def icc_of() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def same(one: Photo, two: Photo) -> bool:
    alphas = (one.alpha is None) == (two.alpha is None) and (
        one.alpha is None or np.array_equal(one.alpha, two.alpha)
    )
    return (
        alphas
        and one.grey == two.grey
        and one.pixels.dtype == two.pixels.dtype
        and np.array_equal(one.pixels, two.pixels)
    )


def refused(call, *arguments) -> ImgtoolError:
    with pytest.raises(ImgtoolError) as caught:
        call(*arguments)
    assert caught.value.hint
    return caught.value


# Round trips

LOSSLESS = [
    ("png", "uint8"),
    ("png", "uint16"),
    ("tif", "uint8"),
    ("tif", "uint16"),
    ("tif", "float32"),
    ("webp", "uint8"),
]


@pytest.mark.parametrize(("kind", "dtype"), LOSSLESS)
@pytest.mark.parametrize("alpha", [False, True], ids=["opaque", "alpha"])
@pytest.mark.parametrize("grey", [False, True], ids=["rgb", "grey"])
def test_lossless(tmp_path, kind, dtype, alpha, grey):
    photo = photo_of(DTYPES[dtype], alpha, grey)
    assert images.losses(photo, kind) == []
    path = tmp_path / f"a.{kind}"
    images.write(path, photo, quality=100)
    back = images.read(path)
    assert back.format == kind
    assert back.pixels.flags.c_contiguous
    assert back.pixels.flags.writeable
    assert same(back, replace(photo, grey=grey and kind != "webp"))
    assert images.size(path) == (17, 13)
    assert same(images.read(path.read_bytes()), back)


@pytest.mark.parametrize("kind", ["jpg", "webp"])
@pytest.mark.parametrize("grey", [False, True], ids=["rgb", "grey"])
def test_lossy_is_near(kind, grey):
    ramp = np.linspace(20, 230, 64 * 48).reshape(48, 64)
    pixels = np.dstack([ramp] * 3 if grey else [ramp, ramp[::-1], ramp[:, ::-1]]).astype(np.uint8)
    back = images.read(images.encode(Photo(pixels, grey=grey), kind))
    assert back.grey == (grey and kind == "jpg")
    assert np.abs(back.pixels.astype(int) - pixels).max() <= 8


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("alpha", [False, True], ids=["opaque", "alpha"])
def test_smallest_photos(kind, size, alpha):
    pixels = pixels_of(np.uint8, *size)
    photo = Photo(pixels, pixels[..., 0].copy() if alpha else None)
    back = images.read(images.encode(photo, kind, 100))
    assert back.pixels.shape == pixels.shape
    assert kind == "jpg" or same(photo, back)


def test_colour_under_transparency_stays():
    photo = replace(photo_of(), alpha=np.zeros((13, 17), np.uint8))
    for kind in ("png", "tif", "webp"):
        assert same(images.read(images.encode(photo, kind, 100)), photo)


@pytest.mark.parametrize("quality", [50, 89, 90, 95])
def test_jpeg_colour_resolution(quality):
    with Image.open(io.BytesIO(images.encode(photo_of(), "jpg", quality))) as image:
        assert image.layer[0][1:3] == ((1, 1) if quality >= 90 else (2, 2))


def test_quality_counts():
    photo = Photo(pixels_of(np.uint8, 64, 64))
    for kind in ("jpg", "webp"):
        assert len(images.encode(photo, kind, 40)) < len(images.encode(photo, kind, 95))


# Types


def test_sixteen_to_eight_bit_is_nearest():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(images.convert(values, np.uint8), np.round(values / 257).astype(np.uint8))
    eight = np.arange(256, dtype=np.uint8)
    assert np.array_equal(images.convert(images.convert(eight, np.uint16), np.uint8), eight)


def test_float_and_back_is_exact():
    for dtype in (np.uint8, np.uint16):
        values = np.arange(np.iinfo(dtype).max + 1).astype(dtype)
        assert images.to_float(values).dtype == np.float32
        assert images.to_float(values)[-1] == 1
        assert np.array_equal(images.to_type(images.to_float(values), dtype), values)


def test_float_is_clipped_and_rounded():
    values = np.array([-1, 0, 0.4 / 255, 0.6 / 255, 1, 7, np.nan, np.inf], np.float32)
    assert images.to_type(values, np.uint8).tolist() == [0, 0, 0, 1, 255, 255, 0, 255]
    assert images.to_type(values, np.float32) is values


@pytest.mark.parametrize(
    ("kind", "dtype", "alpha", "words"),
    [
        ("jpg", "uint8", True, ["alpha is dropped"]),
        ("jpg", "uint16", False, ["16 bit are rounded to 8 bit: JPEG"]),
        ("webp", "uint16", True, ["16 bit are rounded to 8 bit: WebP"]),
        ("jpg", "float32", True, ["floating point is rounded to 8 bit", "alpha is dropped"]),
        ("png", "float32", True, ["floating point is rounded to 16 bit"]),
        ("tif", "float32", True, []),
        ("jpg", "uint8", False, []),
    ],
)
def test_losses(kind, dtype, alpha, words):
    photo = photo_of(DTYPES[dtype], alpha)
    told = images.losses(photo, kind)
    assert len(told) == len(words)
    assert all(said.startswith(word) for said, word in zip(told, words, strict=True))
    back = images.read(images.encode(photo, kind, 100))
    wanted = {"jpg": "uint8", "webp": "uint8", "png": "uint16", "tif": dtype}[kind]
    assert back.pixels.dtype == wanted
    assert (back.alpha is not None) == (alpha and kind != "jpg")
    if kind != "jpg":
        assert np.array_equal(back.pixels, images.convert(photo.pixels, wanted))
        assert np.array_equal(back.alpha, images.convert(photo.alpha, wanted))


def test_with_pixels():
    photo = photo_of(np.uint8, alpha=True, exif=exif_of(), icc=b"icc", xmp=b"xmp", format="png")
    deeper = photo.with_pixels(images.convert(photo.pixels, np.uint16))
    assert np.array_equal(deeper.alpha, images.convert(photo.alpha, np.uint16))
    assert (deeper.exif, deeper.icc, deeper.xmp, deeper.format) == (photo.exif, b"icc", b"xmp", "png")
    assert photo.with_pixels(photo.pixels[::-1]).pixels.flags.c_contiguous
    assert photo.with_pixels(photo.pixels[:5]).alpha is None


def test_grey_photo_whose_channels_came_apart():
    photo = replace(
        photo_of(grey=True), pixels=np.dstack([np.full((4, 4), v, np.uint8) for v in (10, 11, 15)])
    )
    for kind in ("png", "tif", "webp"):
        assert (images.read(images.encode(photo, kind, 100)).pixels == 12).all()


@pytest.mark.parametrize(("name", "dtype"), [("a.jpg", "uint8"), ("b.png", "uint16"), ("c.tif", "float32")])
def test_read_rgb8(tmp_path, name, dtype):
    photo = photo_of(DTYPES[dtype], exif=exif_of(6))
    images.write(tmp_path / name, photo)
    found = images.read_rgb8(tmp_path / name)
    assert (found.dtype, found.shape) == (np.uint8, (17, 13, 3))
    assert np.array_equal(found, images.convert(images.read(tmp_path / name).pixels, np.uint8))


# Orientation

LETTER = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]], np.uint8) * 255  # an F
STORED = {
    1: LETTER, 2: LETTER[:, ::-1], 3: LETTER[::-1, ::-1], 4: LETTER[::-1],
    5: LETTER.T, 6: LETTER.T[::-1], 7: LETTER.T[::-1, ::-1], 8: LETTER.T[:, ::-1],
}  # fmt: skip
"""How a camera stores an upright F for each orientation: 6 is held turned and shown turned clockwise."""


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "dtype"), LOSSLESS)
def test_orientation(tmp_path, orientation, order, kind, dtype):
    plane = images.convert(np.ascontiguousarray(STORED[orientation]), DTYPES[dtype])
    path = tmp_path / f"a.{kind}"
    images.write(path, Photo(np.dstack([plane] * 3), plane, exif=exif_of(orientation, order), xmp=XMP), 100)
    assert images.size(path) == (3, 5)
    photo = images.read(path)
    upright = images.convert(LETTER, DTYPES[dtype])
    assert np.array_equal(photo.pixels, np.dstack([upright] * 3))
    assert np.array_equal(photo.alpha, upright)
    assert metadata.orientation(photo.exif) == 1
    again = images.read(images.encode(photo, kind, 100))
    assert np.array_equal(again.pixels, photo.pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_agrees_with_pillow(orientation):
    from PIL import ImageOps

    rows, columns = np.mgrid[:32, :48]
    pixels = np.dstack([rows * 4, columns * 4, rows + columns]).astype(np.uint8)
    data = images.encode(Photo(pixels, exif=exif_of(orientation)), "jpg", 100)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.array(ImageOps.exif_transpose(image)), images.read(data).pixels)


@pytest.mark.parametrize("order", ["<", ">"])
def test_reset_touches_nothing_else(order):
    before = exif_of(6, order)
    after = metadata.upright(before)
    assert len(after) == len(before)
    place = before.index(b"NOTE")
    assert after[place : place + 80] == before[place : place + 80]
    told, now = facts(before), facts(after)
    assert told.pop(274) == 6
    assert now.pop(274) == 1
    assert (told["exif"][0xA002], told["exif"][0xA003]) == (17, 13)
    assert (now["exif"].pop(0xA002), now["exif"].pop(0xA003)) == (13, 17)  # as the photo is turned
    link = 8 + 2 + 12 * 6  # behind the entries of the first directory stands where the thumbnail's is
    assert any(before[link : link + 4])
    assert not any(after[link : link + 4])
    del told["exif"][0xA002], told["exif"][0xA003]
    assert told == now


def test_upright_exif_is_not_touched():
    assert metadata.upright(exif_of(1)) == exif_of(1)


def test_orientation_of_xmp():
    assert b'tiff:Orientation="1"' in metadata.upright_xmp(XMP)
    assert (
        metadata.upright_xmp(b"<tiff:Orientation>8</tiff:Orientation>")
        == b"<tiff:Orientation>1</tiff:Orientation>"
    )
    turned = images.read(images.encode(photo_of(exif=exif_of(6), xmp=XMP), "png"))
    assert b'tiff:Orientation="1"' in turned.xmp


@pytest.mark.parametrize("value", [0, 9, 60000])
def test_senseless_orientation(value):
    photo = photo_of(exif=exif_of(value))
    assert same(images.read(images.encode(photo, "png")), photo)


@pytest.mark.parametrize(
    "exif", [b"x", b"II*\0", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\xff\xff\xff\xff", exif_of()[:40]]
)
def test_broken_exif(exif):
    photo = photo_of(exif=exif)
    for kind in ("jpg", "png", "tif", "webp"):
        assert images.read(images.encode(photo, kind)).pixels.shape == photo.pixels.shape


def test_exif_directory_that_points_at_itself():
    found = (metadata.Entry(metadata.EXIF_IFD, 4, 1, struct.pack("<I", 8)),)
    loop = b"II*\0" + struct.pack("<I", 8) + metadata.directory(found, "<", 8)
    assert metadata.orientation(loop) == 1
    metadata.exif_of_tiff(loop)


# Metadata


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_large_png_is_what_it_was(dtype):
    pixels = np.zeros((2000, 2000, 3), dtype)
    pixels[500:600] = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (100, 2000, 3))
    assert np.array_equal(images.read(images.encode(Photo(pixels), "png")).pixels, pixels)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_metadata_stays(kind, dtype, order):
    exif, icc = exif_of(1, order), icc_of()
    photo = photo_of(DTYPES[dtype], exif=exif, icc=icc, xmp=XMP)
    data = images.encode(photo, kind)
    back = images.read(data)
    assert back.icc == icc
    assert back.xmp == XMP
    if kind == "tif":
        wanted, found = facts(exif), facts(back.exif)
        assert found == wanted
    else:
        assert back.exif == exif


@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_metadata_is_read_by_pillow(kind, dtype):
    data = images.encode(photo_of(DTYPES[dtype], grey=True, exif=exif_of(), icc=icc_of(), xmp=XMP), kind)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.info["icc_profile"] == icc_of()
        assert image.getexif()[271] == "Maker"
        assert image.getexif().get_ifd(0x8769)[0x9003] == "2024:05:06 07:08:09"
        assert image.getexif().get_ifd(0x8825)[1] == "N"
        assert b"xmpmeta" in image.info["xmp"]


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_no_metadata_stays_none(kind):
    back = images.read(images.encode(photo_of(), kind))
    assert (back.exif, back.icc, back.xmp) == (None, None, None)


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_is_read_by_tifffile(order):
    photo = photo_of(np.uint16, exif=exif_of(1, order), icc=icc_of(), xmp=XMP)
    with tifffile.TiffFile(io.BytesIO(images.encode(photo, "tif"))) as file:
        page = file.pages[0]
        assert len(file.pages) == 1
        assert np.array_equal(page.asarray(), photo.pixels)
        assert page.tags.valueof(271) == "Maker"
        assert page.tags.valueof(34675) == icc_of()
        assert page.tags.valueof(34665)["ExposureTime"] == (1, 250)
        assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE


def test_from_tiff_to_jpeg_and_back():
    tif = images.encode(photo_of(exif=exif_of()), "tif")
    jpg = images.encode(images.read(tif), "jpg")
    back = images.read(images.encode(images.read(jpg), "tif"))
    assert facts(back.exif)["exif"] == facts(exif_of())["exif"]


def test_too_much_for_jpeg():
    long = photo_of(exif=exif_of(maker_note=bytes(70_000)), xmp=bytes(70_000))
    assert images.losses(long, "png") == []
    assert [said.split()[0] for said in images.losses(long, "jpg")] == ["EXIF", "XMP"]
    back = images.read(images.encode(long, "jpg"))
    assert (back.exif, back.xmp) == (None, None)
    fits = photo_of(exif=exif_of().ljust(65_527, b"\0"), xmp=b"x" * 65_502, icc=bytes(200_000))
    assert images.losses(fits, "jpg") == []
    back = images.read(images.encode(fits, "jpg"))
    assert (back.exif, back.xmp, back.icc) == (fits.exif, fits.xmp, fits.icc)


# Kinds of files made by others


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff_of(array, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, metadata=None, **options)
    return buffer.getvalue()


def test_palette_png():
    pixels = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    image = Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(images.read(saved(image, "PNG")).pixels, pixels)
    clear = images.read(saved(image, "PNG", transparency=int(np.array(image)[0, 1])))
    assert clear.alpha.tolist() == [[255, 0, 255]]
    assert not clear.grey


def test_one_bit_png():
    photo = images.read(saved(Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1"), "PNG"))
    assert photo.grey
    assert photo.pixels[..., 0].tolist() == [[0, 255], [255, 0]]


def test_colour_key_png():
    grey = images.read(saved(Image.fromarray(np.array([[7, 9]], np.uint8)), "PNG", transparency=9))
    assert (grey.grey, grey.alpha.tolist()) == (True, [[255, 0]])
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert images.read(saved(rgb, "PNG", transparency=(1, 2, 3))).alpha.tolist() == [[0, 255]]


def deep_png(array, kind, extra=()):
    """A 16-bit PNG written by hand; kind is PNG's colour type."""
    height, width = array.shape[:2]
    rows = np.pad(array.astype(">u2").reshape(height, -1).view(np.uint8), ((0, 0), (1, 0)))
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return metadata.png([(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")])


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_deep_png(kind, channels):
    array = np.random.default_rng(2).integers(0, 65536, (5, 6, channels)).astype(np.uint16)
    photo = images.read(deep_png(array, kind, [(b"gAMA", struct.pack(">I", 100_000))]))
    assert photo.pixels.dtype == np.uint16
    assert photo.grey == (channels < 3)
    assert np.array_equal(
        photo.pixels[..., : min(channels, 3) if channels > 2 else 1], array[..., : 3 if channels > 2 else 1]
    )
    assert (photo.alpha is None) if channels % 2 else np.array_equal(photo.alpha, array[..., -1])


def test_deep_png_with_colour_key():
    array = np.array([[[1000, 2000, 3000], [5, 6, 7]]], np.uint16)
    photo = images.read(deep_png(array, 2, [(b"tRNS", struct.pack(">HHH", 5, 6, 7))]))
    assert np.array_equal(photo.pixels, array)
    assert photo.alpha.tolist() == [[65535, 0]]
    grey = images.read(deep_png(array[..., 0], 0, [(b"tRNS", struct.pack(">H", 5))]))
    assert (grey.grey, grey.alpha.tolist()) == (True, [[65535, 0]])


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_tiff_of_pillow(compression, mode, orientation):
    rgba = np.dstack([pixels_of(np.uint8), pixels_of(np.uint8, seed=3)[..., 0]])
    image = Image.fromarray(rgba).convert(mode)
    photo = images.read(saved(image, "TIFF", compression=compression, tiffinfo={274: orientation}))
    expected = np.array(image.convert("RGBA" if mode == "RGBA" else "RGB"))
    expected = images.turn(expected, orientation)
    assert np.array_equal(photo.pixels, expected[..., :3])
    assert photo.alpha is None if mode != "RGBA" else np.array_equal(photo.alpha, expected[..., 3])
    assert photo.grey == (mode in ("L", "1"))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "predictor"),
    [("uint8", 1), ("uint8", 2), ("uint16", 1), ("uint16", 2), ("float32", 1), ("float32", 3)],
)
@pytest.mark.parametrize("compression", [5, 32946])
def test_tiff_of_opencv(channels, dtype, predictor, compression):
    array = np.dstack([pixels_of(DTYPES[dtype]), pixels_of(DTYPES[dtype], seed=4)])[..., :channels]
    stored = array[..., [2, 1, 0, 3][:channels]] if channels > 1 else array
    options = [cv2.IMWRITE_TIFF_COMPRESSION, compression, cv2.IMWRITE_TIFF_PREDICTOR, predictor]
    data = cv2.imencode(".tif", stored, options)[1].tobytes()
    photo = images.read(data)
    assert photo.pixels.dtype == dtype
    assert np.array_equal(photo.pixels, np.repeat(array, 3, 2) if channels == 1 else array[..., :3])
    assert photo.alpha is None if channels < 4 else np.array_equal(photo.alpha, array[..., 3])


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
def test_tiff_of_tifffile(planar, byteorder, dtype):
    array = pixels_of(dtype)
    stored = np.moveaxis(array, -1, 0) if planar == "separate" else array
    photo = images.read(tiff_of(stored, planarconfig=planar, photometric="rgb", byteorder=byteorder))
    assert photo.pixels.dtype == {"float16": "float32", "float64": "float32"}.get(dtype, dtype)
    assert photo.pixels.dtype.isnative
    assert np.array_equal(photo.pixels, array.astype(photo.pixels.dtype))


@pytest.mark.parametrize(
    "options", [{"tile": (16, 16)}, {"compression": "zlib", "predictor": True}, {"bigtiff": True}]
)
def test_tiff_layouts(options):
    array = pixels_of(np.uint16)
    assert np.array_equal(images.read(tiff_of(array, photometric="rgb", **options)).pixels, array)


def with_tags(data, **values) -> bytes:
    """Return a TIFF in which tags have another value, a single number of 32 bits."""
    out = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for name, value in values.items():
            place = file.pages[0].tags[name].offset + 2
            out[place : place + 10] = struct.pack("<HII", 4, 1, value)
    return bytes(out)


@pytest.mark.parametrize("compression", ["zlib", None])
def test_tiff_with_tiles_far_larger_than_the_photo(compression):
    pixels = np.zeros((64, 64), np.uint8)
    whole = tiff_of(pixels, photometric="minisblack", tile=(512, 512), compression=compression)
    assert images.read(whole).pixels.shape == (64, 64, 3)
    fault = refused(images.read, with_tags(whole, TileWidth=20480, TileLength=20480))
    assert "its tiles are larger than the photo" in fault.what


@pytest.mark.parametrize(("tile", "kind"), [(None, "Strip"), ((64, 64), "Tile")])
def test_tiff_whose_strips_unpack_to_far_more_than_the_photo(tile, kind):
    whole = tiff_of(pixels_of(np.uint8, 64, 64), photometric="rgb", tile=tile, compression="zlib")

    def with_bytes(count) -> bytes:
        strip = zlib.compress(bytes(count))
        return with_tags(whole, **{f"{kind}ByteCounts": len(strip), f"{kind}Offsets": len(whole)}) + strip

    for few in (0, 999):
        assert not images.read(with_bytes(64 * 64 * 3 + few)).pixels.any()
    bomb = with_bytes(40_000_000)
    tracemalloc.start()
    try:
        assert "hold more than the photo" in refused(images.read, bomb).what
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_tiff_white_is_zero():
    photo = images.read(tiff_of(np.array([[0, 65535]], np.uint16), photometric="miniswhite"))
    assert photo.pixels[..., 0].tolist() == [[65535, 0]]


def test_tiff_with_multiplied_alpha():
    array = np.array([[[32896, 16448, 0, 32896], [0, 0, 0, 0]]], np.uint16)
    photo = images.read(tiff_of(array, photometric="rgb", extrasamples=["assocalpha"]))
    assert photo.pixels.tolist() == [[[65535, 32768, 0], [0, 0, 0]]]
    assert photo.alpha.tolist() == [[32896, 0]]


def test_tiff_with_preview():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(pixels_of(np.uint8), photometric="rgb", metadata=None)
        file.write(pixels_of(np.uint8, 4, 4), photometric="rgb", subfiletype=1, metadata=None)
    assert images.read(buffer.getvalue()).pixels.shape == (13, 17, 3)


@pytest.mark.parametrize("array", [pixels_of(np.int16), pixels_of(np.uint32), np.zeros((5, 5, 6), np.uint8)])
def test_tiff_that_is_no_photo(array):
    fault = refused(images.read, tiff_of(array, photometric="rgb"))
    assert "channels of" in fault.what


def test_bmp():
    pixels = pixels_of(np.uint8)
    photo = images.read(saved(Image.fromarray(pixels), "BMP"))
    assert np.array_equal(photo.pixels, pixels)
    assert photo.format == "bmp"


def test_cmyk_jpeg():
    photo = images.read(saved(Image.new("CMYK", (20, 10), (0, 255, 255, 0)), "JPEG", quality=100))
    assert photo.pixels.shape == (10, 20, 3)
    assert photo.pixels[5, 5, 0] > 200
    assert photo.pixels[5, 5, 1] < 60


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "TIFF"])
def test_several_pictures(kind):
    first, second = (Image.fromarray(pixels_of(np.uint8, seed=seed)) for seed in (0, 1))
    fault = refused(images.read, saved(first, kind, save_all=True, append_images=[second]))
    assert "split it" in fault.hint


def test_jpeg_with_a_second_picture():
    first, second = (Image.fromarray(pixels_of(np.uint8, 32, 32, seed=seed)) for seed in (0, 1))
    photo = images.read(saved(first, "MPO", save_all=True, append_images=[second]))
    assert photo.format == "jpg"
    assert np.array_equal(photo.pixels, images.read(saved(first, "JPEG")).pixels)


# Faults


def test_content_decides(tmp_path):
    photo = photo_of()
    for name in ("a.jpg", "a.tif", "a.dng", "a.cr2", "a", "a.txt"):
        (tmp_path / name).write_bytes(images.encode(photo, "png"))
        assert images.read(tmp_path / name).format == "png"


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
@pytest.mark.parametrize(
    ("kind", "dtype"), [*LOSSLESS, ("jpg", "uint8"), ("bmp", "uint8"), ("lzw", "uint8"), ("lzw", "uint16")]
)
def test_truncated(tmp_path, kind, dtype, share, capfd):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(DTYPES[dtype])
    if kind == "bmp":
        whole = saved(Image.fromarray(pixels), "BMP")
    elif kind == "lzw":
        whole = cv2.imencode(".tif", pixels, [cv2.IMWRITE_TIFF_COMPRESSION, 5])[1].tobytes()
    else:
        whole = images.encode(Photo(pixels), kind)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(whole[: int(len(whole) * share)])
    fault = refused(images.read, path)
    assert fault.code == 1
    assert str(path) in fault.what
    assert "truncated" in fault.what
    assert capfd.readouterr().err == ""


def test_tiff_without_its_pixels():
    whole = tiff_of(pixels_of(np.uint8), photometric="rgb", compression="zlib")
    with tifffile.TiffFile(io.BytesIO(whole)) as file:
        place = file.pages[0].tags[279].offset  # of the entry that says how long the strip is
    assert "truncated" in refused(images.read, whole[: place + 8] + bytes(4) + whole[place + 12 :]).what


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_damaged_png(dtype, capfd):
    data = bytearray(images.encode(photo_of(DTYPES[dtype]), "png"))
    data[len(data) // 2] ^= 0xFF
    assert "corrupt" in refused(images.read, bytes(data)).what
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"just text\n" * 50, "is not an image"),
        (b"\0" * 100, "is not an image"),
        (b"\x89PNG\r\n\x1a\n", "truncated or corrupt"),
        (b"\xff\xd8\xff", "truncated or corrupt"),
        (b"II*\0\x08\0\0\0", "truncated or corrupt"),
        (b"BM", "truncated or corrupt"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "HEIC"),
        (b"%PDF-1.7", "is not an image"),
    ],
)
def test_not_an_image(tmp_path, data, words):
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    for call in (images.read, images.read_rgb8, images.size):
        fault = refused(call, path)
        assert words in fault.what
        assert str(path) in fault.what
        assert fault.code == 1
    assert words in refused(images.read, data, "standard input").what


def test_paths_that_cannot_be_read(tmp_path):
    (tmp_path / "file").touch()
    cases = [("none.jpg", 2, "no such file"), ("", 1, "is a directory"), ("file/a.jpg", 1, "not a directory")]
    for name, code, words in cases:
        for call in (images.read, images.size):
            fault = refused(call, tmp_path / name)
            assert (fault.code, words in fault.what) == (code, True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do everything")
def test_permission(tmp_path):
    images.write(tmp_path / "a.png", photo_of())
    (tmp_path / "a.png").chmod(0)
    assert "permission denied" in refused(images.read, tmp_path / "a.png").what


def test_bombs():
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    png = metadata.png([(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")])
    fault = refused(images.read, png)
    assert "2500 MP" in fault.what
    assert "500 MP" in fault.hint
    tif = tiff_of(np.zeros((2, 2), np.uint8)).replace(
        struct.pack("<HHII", 256, 4, 1, 2), struct.pack("<HHII", 256, 4, 1, 2**31)
    )
    assert "MP" in refused(images.read, tif).what


@pytest.mark.slow
def test_no_warning_gets_out(recwarn, capfd):
    limit = Image.MAX_IMAGE_PIXELS
    big = np.zeros((9500, 9500), np.uint8)  # over the 89 MP from which Pillow warns
    data = saved(Image.fromarray(big), "PNG", compress_level=1)
    warnings.simplefilter("always")
    assert images.read(data).pixels.shape == (9500, 9500, 3)
    assert not recwarn.list
    assert limit == Image.MAX_IMAGE_PIXELS
    broken = tiff_of(np.zeros((4, 4), np.uint8), extratags=[(700, "B", 2, b"xx", True)]).replace(
        b"\x1c\x01", b"\xff\xff"
    )
    images.read(broken)
    assert capfd.readouterr().err == ""


def test_unknown_output_type(tmp_path):
    for name in ("a.xyz", "a", "a.bmp", "a.dng"):
        fault = refused(images.write, tmp_path / name, photo_of())
        assert fault.code == 2
        assert "jpg, png, tif, webp" in fault.hint
    assert not list(tmp_path.iterdir())
    images.write(tmp_path / "a.xyz", photo_of(), format="png")
    assert images.read(tmp_path / "a.xyz").format == "png"


@pytest.mark.parametrize(("kind", "edge"), [("jpg", 65_501), ("webp", 16_384)])
def test_too_large_for_the_format(kind, edge):
    photo = Photo(np.zeros((1, edge, 3), np.uint8))
    assert f"{edge}×1 is too large" in refused(images.encode, photo, kind).what
    assert (
        images.read(images.encode(Photo(np.zeros((1, edge - 1, 3), np.uint8)), kind)).pixels.shape[1]
        == edge - 1
    )


def test_existing_output_stays_when_writing_fails(tmp_path, monkeypatch):
    images.write(tmp_path / "a.png", photo_of())
    before = (tmp_path / "a.png").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "no space left" in refused(images.write, tmp_path / "a.png", photo_of(np.uint16)).what
    assert (tmp_path / "a.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_names_of_types():
    assert {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"} == set(images.WRITABLE)
    assert {*images.WRITABLE, ".bmp", ".dng", ".cr2", ".nef", ".arw", ".crw", ".kdc"} <= images.READABLE
    endings = {
        "a.JPEG": "jpeg",
        "a.png": "png",
        "a.tif": "tif",
        "a.webp": "webp",
        "a.bmp": "png",
        "a.CR2": "png",
    }
    for name, ending in endings.items():
        assert images.extension(files.Path(name)) == ending
    assert images.extension(None) == "png"
    assert [images.file_type(text) for text in (".JPEG", "tiff", "webp")] == ["jpg", "tif", "webp"]
    assert refused(images.file_type, "").code == 2
