"""Frames developed: the same picture whatever the pattern, size, flip and tiles; colours, levels, outputs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dng
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageCms
from torch import nn

from imgtool import checkpoint, cli, images, raw
from imgtool import dng as writer
from imgtool.engine import Result, Watch
from imgtool.engines.isp import apply, bayer, model
from imgtool.engines.isp.engine import ENGINE
from imgtool.engines.isp.settings import Infer, Model
from imgtool.errors import USAGE, ImgtoolError
from imgtool.mosaic import Mosaic

Array = npt.NDArray[Any]
Run = Callable[..., SimpleNamespace]

WHITE, GAINS = 4095.0, (2.0, 1.0, 1.5)
MATRIX = np.array([[1.6, -0.5, -0.1], [-0.2, 1.5, -0.3], [0.0, -0.6, 1.6]])


def random_net(**settings: Any) -> Any:
    """Return a small network that does more than Malvar's demosaicing."""
    net = model.build(Model.model_validate({"size": "xs", **settings}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.02
    return net.eval()


def rgb(height: int, width: int) -> Array:
    """Return a linear scene, ``(H, W, 3)`` in 0..1, with tones, edges and a lamp that clips."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    scene = np.stack([0.1 + 0.5 * x, 0.2 + 0.4 * y, 0.4 - 0.3 * x * y], 2)
    scene[height // 3 : height // 2, width // 4 : width // 2] *= 0.3
    scene[:9, 20:30] = 1.2
    return scene


def frame(height: int = 76, width: int = 92, **more: Any) -> Mosaic:
    """Return an RGGB frame of the scene."""
    values = dng.mosaic(np.rint(np.clip(rgb(height, width) * WHITE, 0, WHITE)).astype(np.uint16))
    known: dict[str, Any] = {"gains": GAINS, "matrix": MATRIX, "matrix_source": "file", "noise": (1e-3, 1e-6)}
    return Mosaic(values, **{"white": WHITE, **known, **more})


def settings(**more: Any) -> Infer:
    return Infer.model_validate({"inputs": ("x.dng",), "depth": "16", "device": "cpu", **more})


def made(mosaic: Mosaic, net: nn.Module | None = None, watch: Watch | None = None, **more: Any) -> Result:
    asked = settings(**({"demosaic": "malvar"} if net is None else {}), **more)
    return apply.apply(net, mosaic, asked, watch or Watch())


def srgb(linear: Array) -> Array:
    """Apply the curve of IEC 61966-2-1."""
    kept = np.clip(linear, 0, 1)
    return np.where(kept <= 0.0031308, 12.92 * kept, 1.055 * kept ** (1 / 2.4) - 0.055)


# --- the picture -----------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [32, 50])
@pytest.mark.parametrize("net", [random_net(), random_net(colour="learned"), model.Demosaic("linear")])
def test_tiled_equals_whole(net: nn.Module, tile: int) -> None:
    whole, cut = (made(frame(), net, tile=edge) for edge in (0, tile))
    assert (whole.facts["tiles"], whole.facts["halo"]) == (1, 0)
    assert int(str(cut.facts["tiles"])) >= 4
    assert np.abs(cut.pixels.astype(int) - whole.pixels).max() <= 1  # of 65535


def test_the_frame_goes_on_mirrored_beyond_its_edges() -> None:
    plain, net = frame(40, 60), random_net()
    wide = replace(plain, values=np.pad(plain.values, 32, mode="reflect"))
    inner = made(wide, net, tile=0).pixels[32:-32, 32:-32]
    assert np.abs(inner.astype(int) - made(plain, net, tile=0).pixels).max() <= 1


@pytest.mark.parametrize("down", [0, 1])
@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("size", [(60, 70), (61, 71)])
def test_every_pattern_and_size_gives_the_same_picture(down: int, right: int, size: tuple[int, int]) -> None:
    lift = np.array([[30, 60], [90, 120]])
    whole, net = frame(), random_net()
    lifted = (whole.values.astype(int) * 0.9).astype(int) + np.tile(lift, (38, 46))
    whole = replace(whole, values=lifted.astype(np.uint16), black=(30.0, 60.0, 90.0, 120.0))
    pattern = "RGGB" if not (down or right) else {(0, 1): "GRBG", (1, 0): "GBRG", (1, 1): "BGGR"}[down, right]
    black = np.roll(lift, (-down, -right), (0, 1)).ravel().astype(float)
    values = whole.values[down : down + size[0], right : right + size[1]]
    part = replace(whole, values=values, pattern=pattern, black=tuple(black))
    reference = made(whole, net).pixels[down : down + size[0], right : right + size[1]]
    found = made(part, net).pixels
    assert found.shape == (*size, 3)
    margin = net.halo + 2  # beyond it, what is mirrored is another
    inner = np.s_[margin:-margin, margin:-margin]
    assert np.abs(found[inner].astype(int) - reference[inner]).max() <= 1


@pytest.mark.parametrize(("flip", "turns"), [(0, 0), (3, 2), (5, 1), (6, -1)])
def test_the_photo_is_cropped_and_turned_upright(flip: int, turns: int) -> None:
    crop = (3, 5, 40, 61)
    lying = frame(flip=flip, crop=crop)
    whole = made(lying, area="visible", flip=False).pixels
    assert whole.shape == (76, 92, 3)
    wanted = np.rot90(whole[3:43, 5:66], turns)
    assert np.array_equal(made(lying).pixels, wanted)
    assert np.array_equal(made(lying, flip=False).pixels, whole[3:43, 5:66])
    assert np.array_equal(made(lying, area="visible").pixels, np.rot90(whole, turns))


@pytest.mark.parametrize(("depth", "top"), [("8", 255), ("16", 65535)])
@pytest.mark.parametrize("ev", [0.0, -1.0])
def test_levels_gains_matrix_exposure_and_curve(depth: str, top: int, ev: float) -> None:
    camera = np.array([0.2, 0.3, 0.15])
    black = (64.0, 60.0, 70.0, 50.0)
    values = np.tile(np.array([[camera[0], camera[1]], [camera[1], camera[2]]]), (8, 8))
    span = WHITE - np.tile(np.array(black).reshape(2, 2), (8, 8))
    raws = np.rint(WHITE - span + values * span).astype(np.uint16)
    flat = Mosaic(raws, "RGGB", black, WHITE, matrix=MATRIX, noise=(0, 0))
    found = made(flat, wb="4,2,3", depth=depth, ev=ev).pixels
    wanted = srgb(MATRIX @ (camera * [2, 1, 1.5]) * 2**ev) * top
    assert found.dtype == (np.uint8 if top == 255 else np.uint16)
    assert np.abs(found - wanted).max() <= 0.5 + top * 5e-4  # and what rounding to 12 bits gives


def test_what_saturates_is_white() -> None:
    burnt = replace(frame(), values=np.full((20, 20), 4095, np.uint16))
    assert (made(burnt, depth="8").pixels == 255).all()


def test_linear_demosaicing_is_that_of_libraw(tmp_path: Path) -> None:
    path = dng.write(tmp_path / "a.dng", frame().values, black=0, neutral=(0.5, 1.0, 0.7))
    watch = Watch(source=path)
    asked = settings(demosaic="linear")
    found = apply.apply(None, apply.opened(path, "a.dng", asked, None), asked, watch).pixels
    other = raw.render(path, demosaic="linear")
    apart = (found.astype(float) - other)[4:-4, 4:-4] / 65535
    assert -10 * np.log10(np.square(apart).mean()) > 85


def test_the_original_is_fed_what_it_was_fed() -> None:
    values = np.random.default_rng(0).integers(60, 1024, (64, 64), dtype=np.uint16)
    raws = Mosaic(values, "RGGB", (60.0,) * 4, 1023.0, matrix=MATRIX, noise=(1e-3, 1e-6))
    net = random_net(arch="punet", width="8", packing="mai21", scaling="mai21", colour="learned")
    result = made(raws, net, depth="8", tile=0)
    assert (result.facts["wb"], result.facts["wb_source"]) == ([1.0, 1.0, 1.0], "none")
    padded = np.pad(values, 512, mode="reflect").astype(np.float32) / 1020
    planes = np.stack([padded[row::2, column::2] for row, column in ((1, 1), (0, 1), (0, 0), (1, 0))])
    with torch.inference_mode():
        fed = torch.from_numpy(planes)[None]
        wanted = (
            net(torch.cat([fed, 0 * fed], 1))[0, :, 512:-512, 512:-512].clamp(0, 1).permute(1, 2, 0) * 255
        )
    assert np.abs(result.pixels - wanted.numpy()).max() < 0.51


def test_a_damaged_network_is_told() -> None:
    net = random_net()
    net.tail.bias.data[0] = float("nan")
    with pytest.raises(ImgtoolError, match="not finite"):
        made(frame(), net)


# --- white balance and noise -----------------------------------------------------------------


class Asked:
    """A watch's ears and another engine."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.calls: list[tuple[Any, ...]] = []

    def consult(self, engine: str, source: bytes | None = None, **more: Any) -> Mapping[str, Any]:
        self.calls.append((engine, source, more))
        return {"red_gain": 1.8, "blue_gain": 0.9}

    def watch(self) -> Watch:
        return Watch(say=self.said.append, consult=self.consult)


FOUND = [2.0, 1 / 0.9, 1.0]


@pytest.mark.parametrize(
    ("wb", "gains", "daylight", "wanted", "source"),
    [
        ("camera", (2.0, 1.0, 1.5), (1.9, 1.0, 1.4), [2.0, 1.0, 1.5], "camera"),
        ("camera", None, (1.9, 1.0, 0.5), [3.8, 2.0, 1.0], "daylight"),
        ("camera", None, None, FOUND, "auto"),
        ("daylight", (2.0, 1.0, 1.5), (1.9, 1.0, 1.4), [1.9, 1.0, 1.4], "daylight"),
        ("daylight", (2.0, 1.0, 1.5), None, FOUND, "auto"),
        ("auto", (2.0, 1.0, 1.5), (1.9, 1.0, 1.4), FOUND, "auto"),
        ("1.5,0.5,1", (2.0, 1.0, 1.5), None, [3.0, 1.0, 2.0], "given"),
    ],
)
def test_white_balance(wb: str, gains: Any, daylight: Any, wanted: list[float], source: str) -> None:
    asked = Asked()
    facts = made(frame(gains=gains, daylight=daylight), None, asked.watch(), wb=wb).facts
    assert facts["wb"] == pytest.approx(wanted)
    assert facts["wb_source"] == source
    assert bool(asked.calls) == (source == "auto")
    assert bool(asked.said) == (source != wb and wb in ("camera", "daylight"))


def test_a_network_that_learned_its_colours_needs_neither_balance_nor_matrix() -> None:
    asked, net = Asked(), random_net(colour="learned")
    bare = frame(gains=None, matrix=None, matrix_source="")
    facts = made(bare, net, asked.watch()).facts
    assert (facts["wb"], facts["wb_source"]) == ([1.0, 1.0, 1.0], "none")
    assert not asked.calls
    assert not asked.said
    assert made(frame(), net).facts["wb_source"] == "camera"


def test_awb_is_asked_about_the_file_or_about_a_linear_picture_of_a_bare_mosaic() -> None:
    asked = Asked()
    made(frame(), None, asked.watch(), wb="auto")
    assert asked.calls == [("awb", None, {})]
    bare = frame(40, 60, matrix=None, matrix_source="", gains=None)
    asked = Asked()
    made(bare, None, asked.watch(), wb="auto")
    ((_, source, more),) = asked.calls
    assert more == {"black": 0.0, "white": 65535.0, "domain": "raw"}
    pixels = images.read(source).pixels
    green = (bare.values[::2, 1::2].astype(float) + bare.values[1::2, ::2]) / 2
    wanted = np.stack([bare.values[::2, ::2], green, bare.values[1::2, 1::2]], 2) / WHITE * 65535
    assert np.abs(pixels - wanted).max() < 1
    assert asked.said == ["the camera's colours are taken for those of sRGB"]


def test_noise_of_the_file_given_or_measured() -> None:
    assert made(frame()).facts["noise_source"] == "file"
    given = made(frame(), noise="2e-3,0").facts
    assert (given["noise"][0], given["noise_source"]) == (2e-3, "given")
    assert 0 < given["noise"][1] < 1e-7  # whole numbers are never without
    assert made(frame(noise=None)).facts["noise_source"] == "measured"


def test_the_network_sees_the_noise() -> None:
    net = random_net()
    plain, noisy = (made(frame(), net, noise=noise).pixels for noise in ("0,0", "1e-2,1e-4"))
    assert not np.array_equal(plain, noisy)


# --- the command line ------------------------------------------------------------------------


@pytest.fixture
def infer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Return a function that runs ``imgtool infer isp`` in an empty folder and tells how it ended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")

    def call(*words: str, net: bool = False) -> SimpleNamespace:
        more = () if net else ("--demosaic", "malvar")
        code = cli.run(["infer", "isp", *words, *more, "--device", "cpu"])
        out, err = capfdbinary.readouterr()
        lines = [json.loads(line) for line in out.splitlines()] if "--json" in words else []
        return SimpleNamespace(code=code, raw=out, err=err.decode(), lines=lines)

    return call


def put(name: str = "a.dng", **more: Any) -> Path:
    shot = {"iso": 200.0, "exposure": 0.01, "aperture": 2.8, "focal": 35.0, "time": "2024:05:06 07:08:09"}
    known = {
        "xyz_to_camera": np.array(dng.SRGB_CAMERA).reshape(3, 3),
        "camera": "Maker Model 1",
        "exif": shot,
    }
    writer.write(Path(name), frame(**{**known, **more}))
    return Path(name)


def listing() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_a_raw_becomes_a_jpeg_that_says_what_the_raw_says(infer: Run) -> None:
    put(flip=6)
    done = infer("a.dng", "--json")
    assert (done.code, listing()) == (0, ["a-isp.jpg", "a.dng"])
    (line,) = done.lines
    assert (line["width"], line["height"], line["model"]) == (76, 92, None)
    facts = line["facts"]
    assert (facts["pattern"], facts["black"], facts["white"]) == ("RGGB", [0.0] * 4, 4095.0)
    assert facts["wb"] == pytest.approx(GAINS, rel=1e-3)
    assert {"wb_source", "noise", "matrix_source", "tiles", "tile", "halo", "camera"} <= set(facts)
    with Image.open("a-isp.jpg") as photo:
        exif = photo.getexif()
        assert (exif[0x010F], exif.get(0x0112, 1)) == ("Maker", 1)
        assert exif.get_ifd(0x8769)[0x8827] == 200
        profile = ImageCms.getOpenProfile(io.BytesIO(photo.info["icc_profile"]))
        assert "sRGB" in ImageCms.getProfileDescription(profile)


@pytest.mark.parametrize(
    ("words", "name", "dtype"),
    [
        (["-o", "b.png"], "b.png", np.uint8),
        (["-o", "b.tif"], "b.tif", np.uint16),
        (["--format", "tif", "--depth", "8"], "a-isp.tif", np.uint8),
        (["--depth", "16"], "a-isp.png", np.uint16),
        (["-o", "out/"], "out/a.jpg", np.uint8),
    ],
)
def test_formats_and_depths(infer: Run, words: list[str], name: str, dtype: Any) -> None:
    put()
    assert infer("a.dng", *words).code == 0
    assert images.read(Path(name)).pixels.dtype == dtype


def test_a_raw_through_standard_input_and_output(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
    done = infer("-", "-o", "-")
    assert done.code == 0
    infer("a.dng", "-o", "b.jpg")
    assert done.raw == Path("b.jpg").read_bytes()


def test_a_network_a_sheet_beside_libraw_and_the_gains_of_awb(infer: Run) -> None:
    put(gains=None)
    chosen = Model(size="xs")
    checkpoint.save_weights(
        Path("w.safetensors"), ENGINE, chosen, random_net().state_dict(), {"scores": {}}, half=True
    )
    words = ["--compare", "libraw", "--weights", "w.safetensors", "--wb", "auto", "--json"]
    done = infer("a.dng", "-o", "b.jpg", *words, net=True)
    assert done.code == 0, done.err
    assert "PSNR between the photo and LibRaw AHD: " in done.err
    assert done.lines[0]["facts"]["wb_source"] == "auto"
    assert min(done.lines[0]["facts"]["wb"]) == 1
    assert done.lines[0]["model"] == "w"
    assert listing() == ["a.dng", "b-compare.png", "b.jpg", "w.safetensors"]


def test_libraws_rendering_is_cropped_and_turned_alike(infer: Run) -> None:
    put(flip=6, crop=(4, 6, 60, 80))
    done = infer("a.dng", "-o", "b.png", "--compare", "libraw", "--json")
    assert (done.lines[0]["width"], done.lines[0]["height"]) == (60, 80)
    found = re.search(r"LibRaw AHD: (\S+) dB", done.err)
    assert found
    assert float(found[1]) > 34  # 13 where it lies otherwise, 31 where it is shifted by a pixel


def test_a_bare_mosaic_is_compared_with_the_front_end(infer: Run) -> None:
    Path("x.bin").write_bytes(frame().values.tobytes())
    words = ["--size", "92x76", "--bits", "12", "--wb", "2,1,1.5", "--side-by-side"]
    done = infer("x.bin", "-o", "b.png", *words)
    assert done.code == 0, done.err
    assert "LibRaw does not render this file" in done.err
    assert listing() == ["b-side-by-side.jpg", "b.png", "x.bin"]


def test_photos_in_folders_are_no_inputs(infer: Run) -> None:
    Path("card").mkdir()
    put("card/a.dng")
    Image.new("RGB", (40, 30)).save("card/a.jpg")
    assert infer("card", "-o", "out").code == 0
    assert "out/a.jpg" in listing()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["photo.jpg"], 1, "photograph"),
        (["rgb.png"], 1, "photograph"),
        (["cut.dng"], 1, "cut.dng"),
        (["a.dng", "--wb", "sunny"], USAGE, "--wb"),
        (["a.dng", "--wb", "1,0,1"], USAGE, "--wb"),
        (["a.dng", "--noise", "1e-3"], USAGE, "--noise"),
        (["a.dng", "--noise", "1e-3,-1"], USAGE, "--noise"),
        (["a.dng", "--ev", "99"], USAGE, "--ev"),
        (["a.dng", "--compare", "dcraw"], USAGE, "--compare"),
        (["x.raw"], 1, "--size"),
    ],
)
def test_refusals_leave_no_file(infer: Run, words: list[str], code: int, told: str) -> None:
    Image.new("RGB", (40, 30)).save("photo.jpg")
    Image.new("RGB", (40, 30)).save("rgb.png")
    Path("x.raw").write_bytes(bytes(1000))
    Path("cut.dng").write_bytes(put().read_bytes()[:4000])
    before = listing()
    done = infer(*words, "-o", "out.jpg")
    assert done.code == code
    assert done.err.count("error: ") <= 1
    assert told in done.err
    assert listing() == before


def test_a_frame_of_one_row_is_refused() -> None:
    with pytest.raises(ImgtoolError, match="less than one of each colour"):
        made(replace(frame(), values=np.zeros((1, 9), np.uint16)))


def test_the_aligned_frame_covers_every_pixel() -> None:
    for pattern in dng.PATTERNS:
        odd = replace(frame(), values=frame().values[:5, :7], pattern=pattern)
        assert made(odd).pixels.shape == (5, 7, 3)
        assert all(size % 2 == 0 for size in bayer.aligned_size(odd))


def test_a_real_file_with_a_matrix_hidden_in_libraw_is_rendered_as_libraw_does() -> None:
    """The example of a Kodak DC50: nothing that LibRaw tells of it has the matrix that it uses."""
    path = Path(__file__).parents[2] / "examples" / "chart.kdc"
    asked = settings(demosaic="linear", area="visible", flip=False)
    frame = apply.opened(path, "chart.kdc", asked, None)
    assert frame.gains == (1.0, 1.0, 1.0)
    assert frame.matrix_source == "library"
    found = apply.apply(None, frame, asked, Watch(source=path)).pixels
    other = raw.render(path, demosaic="linear", upright=False)
    apart = (found.astype(float) - other)[4:-4, 4:-4] / 65535
    assert -10 * np.log10(np.square(apart).mean()) > 80
