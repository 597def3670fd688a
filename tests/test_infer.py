"""``imgtool infer`` from the command line: what goes in, what comes out, and every fault."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch
from PIL import Image, ImageCms
from safetensors import safe_open
from safetensors.torch import save_file

from imgtool import checkpoint, cli, engines, header, images, tiles
from imgtool.engine import Engine, Result, Watch
from imgtool.engines.deblur.engine import ENGINE
from imgtool.engines.deblur.settings import Model
from imgtool.errors import ImgtoolError
from imgtool.images import Photo, metadata

ROOT = Path(__file__).parents[1]
Array = npt.NDArray[Any]
Run = Callable[..., SimpleNamespace]


def save_random_weights(path: Path, arch: str = "unet-lite") -> Path:
    """Write weights of a network that changes every pixel a little, and has learnt nothing."""
    generator = torch.Generator().manual_seed(0)
    net = ENGINE.build(Model.model_validate({"arch": arch}))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.01
    settings = Model.model_validate({"arch": arch})
    checkpoint.save_weights(path, ENGINE, settings, net.state_dict(), {"scores": {}}, half=True)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_weights(tmp_path_factory.mktemp("weights") / "random.safetensors")


def scene(height: int = 48, width: int = 64, dtype: str = "uint8", seed: int = 0) -> Array:
    """Smooth colours with an edge and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    values = np.stack([0.2 + 0.5 * x, 0.2 + 0.5 * y, 0.5 + 0.3 * (x > y)], 2)
    values = np.clip(values + rng.normal(0, 0.02, values.shape), 0, 1)
    return images.to_type(values, dtype)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in an empty folder, on no terminal; put back the variables that a run sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


@pytest.fixture
def infer(weights: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Return a function that runs ``imgtool infer deblur`` and tells how it ended."""

    def call(*words: str) -> SimpleNamespace:
        capfdbinary.readouterr()
        usual = {"--weights": str(weights), "--device": "cpu"}
        more = [each for pair in usual.items() if pair[0] not in words for each in pair]
        code = cli.run(["infer", "deblur", *words, *more])
        out, err = capfdbinary.readouterr()
        lines = [json.loads(line) for line in out.splitlines()] if "--json" in words else []
        return SimpleNamespace(
            code=code, raw=out, out=out.decode(errors="replace"), err=err.decode(), lines=lines
        )

    return call


def listing() -> list[str]:
    """Return every file below the current folder, hidden ones too."""
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def put(name: str, pixels: Array | None = None) -> Path:
    path = Path(name)
    images.write(path, Photo(scene() if pixels is None else pixels))
    return path


def with_apply(monkeypatch: pytest.MonkeyPatch, apply: Callable[..., Any]) -> None:
    engine: Engine = replace(ENGINE, apply=apply)
    monkeypatch.setattr(engines, "load", lambda name: engine)


# --- where outputs go ------------------------------------------------------------------------


def test_one_photo_lands_beside_itself(infer: Run) -> None:
    put("a.png")
    done = infer("a.png")
    assert done.code == 0
    assert listing() == ["a-deblur.png", "a.png"]
    after = images.read(Path("a-deblur.png")).pixels
    assert after.shape == (48, 64, 3)
    apart = np.abs(after.astype(int) - images.read(Path("a.png")).pixels)
    assert 0 < apart.max() < 100
    assert done.out == f"a.png -> a-deblur.png  64x48  {done.out.split()[-2]} s\n"
    assert done.err == "imgtool infer deblur: starting\n"


def mirrored(image: torch.Tensor, last: int = 0) -> torch.Tensor:
    """Mirror 16 pixels around ``(1, 3, H, W)`` and ``last`` more below."""
    pads = [(0, 0), (0, 0), (16, 16 + last), (16, 16)]
    return torch.from_numpy(np.pad(image.numpy(), pads, mode="reflect"))


def test_it_is_the_network_that_is_applied(infer: Run, weights: Path) -> None:
    put("a.png")
    infer("a.png", "-o", "b.png")
    net: Any = checkpoint.network(ENGINE, checkpoint.read_weights(weights, "deblur"))
    image = torch.from_numpy(scene().transpose(2, 0, 1)[None].astype(np.float32) / 255)
    small = torch.nn.functional.avg_pool2d(image, 4)  # 12 x 16: 4 more rows make a multiple of 8
    with torch.inference_mode():
        change = net.coarse(mirrored(small, 4))[..., 16:28, 16:32] - small
        start = image + torch.nn.functional.interpolate(change, scale_factor=4, mode="bilinear")
        out = net.fine(mirrored(start))[0, :, 16:-16, 16:-16].clamp(0, 1).permute(1, 2, 0).numpy()
    apart = np.rint(out * 255) - images.read(Path("b.png")).pixels
    assert np.abs(apart).max() <= 1
    assert (apart != 0).mean() < 1e-3


def test_a_folder_keeps_its_folders(infer: Run) -> None:
    for name in ("in/a.png", "in/deep/b.jpg", "in/deep/c.tif"):
        put(name)
    Path("in/notes.txt").write_text("no photo")
    done = infer("in", "-o", "out")
    assert done.code == 0
    assert [name for name in listing() if name.startswith("out")] == [
        "out/a.png",
        "out/deep/b.jpg",
        "out/deep/c.tif",
    ]
    assert len(done.out.splitlines()) == 3


def test_a_glob_many_files_and_a_folder_for_them(infer: Run) -> None:
    for name in ("a.png", "b.png", "c.jpg"):
        put(name)
    assert infer("*.png", "c.jpg", "-o", "out/").code == 0
    assert [name for name in listing() if "/" in name] == ["out/a.png", "out/b.png", "out/c.jpg"]


def test_the_second_run_of_a_folder_takes_no_outputs_for_inputs(infer: Run) -> None:
    put("in/a.png")
    assert infer("in").code == 0
    assert infer("in", "--force").code == 0
    assert listing() == ["in/a-deblur.png", "in/a.png"]


def test_format_and_quality(infer: Run) -> None:
    put("a.png")
    assert infer("a.png", "--format", "jpg", "--quality", "40").code == 0
    assert infer("a.png", "-o", "b.webp").code == 0
    assert images.read(Path("a-deblur.jpg")).format == "jpg"
    assert images.read(Path("b.webp")).format == "webp"
    done = infer("a.png", "-o", "c.gif")
    assert (done.code, "hint: known: jpg" in done.err) == (2, True)


def test_standard_input_to_standard_output(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    data = put("a.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    done = infer("-", "-o", "-", "--format", "png")
    assert done.code == 0
    infer("a.png", "-o", "b.png")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(done.raw))), images.read(Path("b.png")).pixels)
    assert "- -> -  64x48" in done.err  # not between the bytes of the photo


def test_standard_output_takes_the_photo_or_json_but_not_both(infer: Run) -> None:
    put("a.png")
    done = infer("a.png", "-o", "-", "--json")
    assert done.code == 2
    assert done.lines == [
        {
            "error": "standard output cannot take both the photo and JSON",
            "hint": "give -o FILE, or leave out --json",
        }
    ]


def test_a_terminal_gets_no_photo(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    put("a.png")
    with_apply(monkeypatch, lambda *_: pytest.fail("computed before the terminal was refused"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    done = infer("a.png", "-o", "-")
    assert done.code == 2
    assert "error: an image cannot be shown on a terminal" in done.err


def test_nothing_is_overwritten_unless_asked(infer: Run) -> None:
    put("a.png")
    Path("a-deblur.png").write_bytes(b"mine")
    done = infer("a.png")
    assert done.code == 1
    assert "error: a.png: a-deblur.png exists" in done.err
    assert "hint: --force" in done.err
    assert Path("a-deblur.png").read_bytes() == b"mine"
    assert infer("a.png", "-f").code == 0
    assert images.read(Path("a-deblur.png")).pixels.shape == (48, 64, 3)


def test_an_existing_sheet_is_not_overwritten_either(infer: Run) -> None:
    put("a.png")
    Path("b-compare.png").write_bytes(b"mine")
    done = infer("a.png", "-o", "b.png", "--compare")
    assert (done.code, listing()) == (1, ["a.png", "b-compare.png"])
    assert "b-compare.png exists" in done.err


def test_skip_existing_resumes_a_batch(infer: Run) -> None:
    for name in ("in/a.png", "in/b.png", "in/c.png"):
        put(name)
    infer("in/a.png", "-o", "out/")
    first = Path("out/a.png").stat().st_mtime_ns
    done = infer("in", "-o", "out", "--skip-existing", "--json")
    assert done.code == 0
    assert [(line["output"], "skipped" in line) for line in done.lines] == [
        ("out/a.png", True),
        ("out/b.png", False),
        ("out/c.png", False),
    ]
    assert Path("out/a.png").stat().st_mtime_ns == first


# --- what is told ----------------------------------------------------------------------------


def test_json_lines(infer: Run) -> None:
    put("a.png")
    put("b.png", scene(20, 30))
    done = infer("a.png", "b.png", "-o", "out", "--json", "--tile", "32", "--strength", "0.5")
    assert done.code == 0
    assert [line["input"] for line in done.lines] == ["a.png", "b.png"]
    line = done.lines[0]
    assert line.pop("seconds") > 0
    assert line == {
        "input": "a.png",
        "output": "out/a.png",
        "engine": "deblur",
        "model": "random",
        "width": 64,
        "height": 48,
        "facts": {"tiles": 4, "tile": 32, "halo": 64, "strength": 0.5},
    }
    assert done.lines[1]["facts"] == {"tiles": 1, "tile": 30, "halo": 0, "strength": 0.5}


def test_dry_run_writes_nothing(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    put("in/a.png")
    put("in/b.png")
    with_apply(monkeypatch, lambda *_: pytest.fail("a dry run computed"))
    before = listing()
    done = infer("in", "-o", "out", "--report", "page", "--compare", "-n")
    assert (done.code, listing()) == (0, before)
    for words in (
        "in/a.png -> out/a.png",
        "in/b.png -> out/b.png",
        "device: cpu",
        "parameters: ",
        "[infer.deblur]",
    ):
        assert words in done.out
    record = infer("in", "-o", "out", "-n", "--json").lines[0]
    assert record["plan"]["parameters"] > 1e5
    assert record["plan"]["outputs"] == ["in/a.png -> out/a.png", "in/b.png -> out/b.png"]


def test_strength_0_gives_the_photo_back(infer: Run) -> None:
    put("a.tif", scene(dtype="uint16"))
    assert infer("a.tif", "--strength", "0").code == 0
    assert np.array_equal(images.read(Path("a-deblur.tif")).pixels, images.read(Path("a.tif")).pixels)


def test_tiles_of_any_size_give_the_same_photo(infer: Run) -> None:
    put("a.tif", scene(150, 131, "float32"))
    infer("a.tif", "-o", "whole.tif", "--tile", "0")
    infer("a.tif", "-o", "tiles.tif", "--tile", "64")
    whole, tiled = (tifffile.imread(f"{name}.tif") for name in ("whole", "tiles"))
    assert np.abs(whole - scene(150, 131, "float32")).max() > 1e-3
    assert np.abs(whole - tiled).max() <= 0.05 / 255


# --- what is kept ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_grey_and_alpha_are_kept(infer: Run, name: str, channels: int) -> None:
    pixels = scene(dtype="uint16") // 16  # dark: only the type tells how deep it is
    alpha = scene(dtype="uint16", seed=9)[..., 0].copy() if channels in (2, 4) else None
    grey = channels < 3
    if grey:
        pixels = np.repeat(pixels[..., :1], 3, axis=2)
    images.write(Path(name), Photo(pixels, alpha, grey))
    assert infer(name, "-o", f"out/{name}").code == 0
    after = images.read(Path(f"out/{name}"))
    assert (after.pixels.dtype, after.grey) == (np.uint16, grey)
    assert (after.pixels % 257).any()
    if alpha is None:
        assert after.alpha is None
    else:
        assert np.array_equal(after.alpha, alpha)


def test_exif_profile_and_orientation(infer: Run) -> None:
    exif = Image.Exif()
    exif[271], exif[274] = "Maker", 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(scene(40, 64)).save("a.jpg", quality=98, exif=exif, icc_profile=profile)
    assert infer("a.jpg", "--strength", "0.2").code == 0
    with Image.open("a-deblur.jpg") as after:
        assert after.size == (40, 64)  # a quarter turn, applied
        assert after.getexif()[271] == "Maker"
        assert after.getexif().get(274, 1) == 1
        assert after.info["icc_profile"] == profile
        upright = np.rot90(scene(40, 64), -1).astype(int)
        assert np.abs(np.asarray(after) - upright).mean() < 10


def test_what_the_format_cannot_hold_is_said(infer: Run) -> None:
    put("a.png", scene(dtype="uint16"))
    done = infer("a.png", "-o", "b.jpg")
    assert done.code == 0
    assert "warning: a.png: 16 bit are rounded to 8 bit" in done.err


# --- faults ----------------------------------------------------------------------------------


def truncated() -> bytes:
    data = io.BytesIO()
    Image.fromarray(scene(200, 200)).save(data, "JPEG")
    return data.getvalue()[: len(data.getvalue()) // 2]


BAD = {"half.jpg": truncated(), "empty.jpg": b"", "text.jpg": b"no photo at all\n" * 9}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_photo_stops_only_itself(infer: Run, name: str) -> None:
    put("in/a.png")
    put("in/z.png")
    Path("in", name).write_bytes(BAD[name])
    done = infer("in", "-o", "out", "--json", "--compare")
    assert done.code == 1
    assert done.err.count("error: ") == 1
    assert done.err.count("hint: ") == 1
    assert f"in/{name}" in done.err
    assert "Traceback" not in done.err
    last = done.err.splitlines()[-2:]
    assert last[0] == "1 of 3 failed:"
    assert last[1].count(f"in/{name}") == 1
    good, bad = done.lines[0], done.lines[1]
    assert (good["output"], done.lines[2]["output"]) == ("out/a.png", "out/z.png")
    assert set(bad) == {"input", "error", "hint"}
    assert bad["input"] == f"in/{name}"
    assert [path for path in listing() if path.startswith("out")] == [
        "out/a-compare.png",
        "out/a.png",
        "out/z-compare.png",
        "out/z.png",
    ]


@pytest.mark.parametrize("name", BAD)
def test_one_bad_photo_alone(infer: Run, name: str) -> None:
    Path(name).write_bytes(BAD[name])
    done = infer(name, "-o", "new/out.png")
    assert done.code == 1
    assert [line.split(":")[0] for line in done.err.splitlines()[1:]] == ["error", "hint"]
    assert listing() == [name]


def test_fail_fast(infer: Run) -> None:
    for name in ("in/a.png", "in/c.png"):
        put(name)
    Path("in/b.png").write_bytes(b"")
    assert infer("in", "-o", "out", "--fail-fast").code == 1
    assert [name for name in listing() if name.startswith("out")] == ["out/a.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.png"], "no such file: none.png"),
        (["a.png", "none.png", "-o", "out"], "no such file: none.png"),
        (["*.webp"], "no photo matches *.webp"),
        (["a.png", "b.png", "-o", "c.png"], "-o c.png is one file for 2 photos found"),
        (["a.png", "-o", "a.png"], "which is the input"),
        (["a.png", "--tile", "-1"], "--tile"),
        (["a.png", "--device", "abacus"], "no device abacus here"),
        (["a.png", "--weights", "nobody"], "no weights file or shipped weights named nobody"),
        (["-", "--compare"], "--compare"),
    ],
)
def test_asked_wrongly(infer: Run, words: list[str], message: str) -> None:
    put("a.png")
    put("b.png")
    done = infer(*words)
    assert done.code == 2
    assert done.err.count("error: ") == 1
    assert message in done.err
    assert "hint: " in done.err
    assert listing() == ["a.png", "b.png"]


def edited(source: Path, target: Path, **changes: Any) -> Path:
    """Copy weights with parts of the header replaced."""
    with safe_open(source, "pt") as opened:
        header = json.loads(opened.metadata()["imgtool"]) | changes
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(state, target, metadata={"imgtool": json.dumps(header)})
    return target


def test_weights_that_will_not_do(
    infer: Run, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    put("a.png")
    folder = tmp_path_factory.mktemp("others")
    other = edited(weights, folder / "other.safetensors", engine="lens")
    done = infer("a.png", "--weights", str(other))
    assert done.code == 2
    assert "holds weights of the lens engine, not of deblur" in done.err
    seed = edited(weights, folder / "seed.safetensors", model={"arch": "unet-seed"})
    done = infer("a.png", "--weights", str(seed))
    assert (done.code, "do not fit the network" in done.err) == (1, True)
    broken = folder / "broken.safetensors"
    broken.write_bytes(weights.read_bytes()[:5000])
    done = infer("a.png", "--weights", str(broken))
    assert (done.code, "is not a readable weights file" in done.err) == (1, True)
    assert listing() == ["a.png"]


def test_a_network_that_looks_at_the_whole_photo_is_not_cut(
    infer: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = save_random_weights(tmp_path_factory.mktemp("seed") / "seed.safetensors", "unet-seed")
    put("a.png")
    done = infer("a.png", "--weights", str(path), "--tile", "32")
    assert done.code == 2
    assert "tiles would change the result: unet-seed normalises over the whole image" in done.err
    assert "hint: take --tile 0" in done.err
    assert listing() == ["a.png"]
    done = infer("a.png", "--weights", str(path), "--tile", "0", "--json")
    assert (done.code, done.lines[0]["facts"]["tiles"]) == (0, 1)


ROOT_MAY_ALL = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read and write all"
)


@ROOT_MAY_ALL
def test_a_photo_that_may_not_be_read(infer: Run) -> None:
    put("in/a.png").chmod(0)
    put("in/b.png")
    done = infer("in", "-o", "out")
    assert done.code == 1
    assert "error: cannot read in/a.png: permission denied" in done.err
    assert Path("out/b.png").exists()


@ROOT_MAY_ALL
def test_a_folder_that_may_not_be_written(infer: Run) -> None:
    put("a.png")
    Path("locked").mkdir(mode=0o500)
    done = infer("a.png", "-o", "locked/b.png")
    Path("locked").chmod(0o700)
    assert (done.code, done.err.count("cannot write locked/b.png")) == (1, 1)


def test_a_name_that_is_too_long(infer: Run) -> None:
    put("a.png")
    for name in ("x" * 300, "x" * 300 + ".png"):
        done = infer("a.png", "-o", name)
        assert (done.code, done.err.count("error: ")) == (1, 1)
        assert "file name too long" in done.err
    assert listing() == ["a.png"]


def test_a_folder_that_is_a_file(infer: Run) -> None:
    put("a.png")
    Path("file").write_bytes(b"")
    done = infer("a.png", "-o", "file/b.png")
    assert done.code == 1
    assert "error: a.png: cannot write file/b.png" in done.err
    assert "hint: " in done.err
    assert listing() == ["a.png", "file"]


@pytest.mark.parametrize("extra", [[], ["--compare"]])
def test_a_full_disk(infer: Run, monkeypatch: pytest.MonkeyPatch, extra: list[str]) -> None:
    put("a.png")
    opened = Path.open

    def full(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        file = opened(path, mode, *rest, **more)
        if "w" not in mode:
            return file

        class Full(type(file)):  # type: ignore[misc]
            def write(self, data: bytes) -> int:
                super().write(data[:10])
                raise OSError(errno.ENOSPC, "No space left on device")

        file.close()
        return Full(opened(path, mode, buffering=0))

    monkeypatch.setattr(Path, "open", full)
    done = infer("a.png", "-o", "new/b.png", "--json", *extra)
    assert done.code == 1
    assert done.lines == [
        {
            "input": "a.png",
            "error": "cannot write new/b.png: no space left on device",
            "hint": "free some space or choose another folder with -o",
        }
    ]
    assert done.err.count("error: ") == 1
    assert listing() == ["a.png"]


def interrupting(after: int) -> Callable[..., Any]:
    """Return an ``apply`` that ends like Ctrl-C at its call number ``after`` + 1."""
    calls: list[None] = []

    def apply(*arguments: Any) -> Any:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(None)
        return ENGINE.apply(*arguments)

    return apply


def test_interrupted(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("in/a.png", "in/b.png", "in/c.png"):
        put(name)
    with_apply(monkeypatch, interrupting(1))
    done = infer("in", "-o", "out", "--report", "page")
    assert done.code == 130
    assert "interrupted" in done.err
    assert "Traceback" not in done.err
    assert [name for name in listing() if not name.startswith("in")] == ["out/a.png", "page/index.html"]
    page = Path("page/index.html").read_text()
    assert "in/a.png" in page
    assert "in/b.png" not in page


def test_sigterm_ends_a_batch_like_ctrl_c(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("in/a.png", "in/b.png", "in/c.png"):
        put(name)
    calls: list[None] = []

    def apply(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:  # batch systems send it to the process, and to all of its group
                os.kill(os.getpid(), signal.SIGTERM)
        return ENGINE.apply(*arguments)

    with_apply(monkeypatch, apply)
    done = infer("in", "-o", "out", "--report", "page")
    assert done.code == 130
    told = "1 of 3 photos are done: the same command with --skip-existing goes on"
    assert done.err.splitlines()[-3:] == [told, "report: page/index.html", "interrupted"]
    assert [name for name in listing() if not name.startswith("in")] == ["out/a.png", "page/index.html"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert infer("in", "-o", "out", "--skip-existing").code == 0
    assert len(calls) == 4


def test_sigterm_stays_what_its_owner_made_it(infer: Run) -> None:
    put("a.png")
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        infer("a.png")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_interrupted_while_it_writes(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    put("a.png")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    assert infer("a.png").code == 130
    assert listing() == ["a.png"]


@pytest.mark.parametrize("fault", [ZeroDivisionError("a bug"), RuntimeError("shapes"), OSError("strange")])
def test_a_bug_is_not_hidden(infer: Run, monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    put("in/a.png")
    put("in/b.png")

    def apply(*_: Any) -> None:
        raise fault

    with_apply(monkeypatch, apply)
    with pytest.raises(type(fault)) as caught:
        infer("in", "-o", "out")
    assert caught.value is fault


def test_memory_that_ends_outside_the_tiles(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("in/a.png", "in/b.png"):
        put(name)
    calls: list[None] = []

    def apply(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            raise MemoryError
        return ENGINE.apply(*arguments)

    with_apply(monkeypatch, apply)
    done = infer("in", "-o", "out")
    assert done.code == 1
    assert "error: in/a.png: out of memory" in done.err
    assert Path("out/b.png").exists()


def test_out_of_memory_makes_the_tiles_smaller_and_says_so(
    infer: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("a.png", scene(400, 200))
    build = ENGINE.build

    def limited(settings: Any) -> torch.nn.Module:
        net = build(settings)

        def refuse(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if arguments[0].shape[-1] * arguments[0].shape[-2] > 280 * 280:
                raise torch.OutOfMemoryError("CUDA out of memory")

        for part in net.children():
            part.register_forward_pre_hook(refuse)
        return net

    infer("a.png", "-o", "whole.png")
    engine: Engine = replace(ENGINE, build=limited)
    monkeypatch.setattr(engines, "load", lambda name: engine)
    done = infer("a.png", "-o", "tiles.png", "--json", "--tile", "0", "--overlap", "64")
    assert done.code == 0
    assert done.err.count("out of memory: going on with tiles of 200 pixels\n") == 1
    assert done.lines[0]["facts"]["tiles"] > 1
    apart = images.read(Path("whole.png")).pixels.astype(int) - images.read(Path("tiles.png")).pixels
    assert np.abs(apart).max() <= 1


# --- pictures --------------------------------------------------------------------------------


def test_the_sheet_and_the_page(infer: Run) -> None:
    put("in/a.png", scene(300, 400))
    put("in/b.png", scene(40, 30))
    Path("in/c.png").write_bytes(b"")
    done = infer("in", "-o", "out", "--compare", "--report", "page")
    assert done.code == 1
    sheet = images.read(Path("out/a-compare.png")).pixels
    assert sheet.shape[1] == 1600
    assert "before/after: out/a-compare.png" in done.err
    assert "report: page/index.html" in done.err
    page = Path("page/index.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 4
    for words in ("in/a.png", "in/b.png", "in/c.png", "random"):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_page_that_exists(infer: Run) -> None:
    put("a.png")
    Path("page").mkdir()
    Path("page/index.html").write_text("mine")
    done = infer("a.png", "--report", "page")
    assert (done.code, "page/index.html exists" in done.err) == (1, True)
    assert listing() == ["a.png", "page/index.html"]
    assert infer("a.png", "--report", "page", "--force").code == 0
    assert Path("page/index.html").read_text() != "mine"


def test_the_page_also_shows_what_is_left_out(infer: Run) -> None:
    put("a.png")
    infer("a.png", "--report", "page")
    put("b.png")
    assert infer("a.png", "b.png", "--report", "page", "--skip-existing").code == 0
    page = Path("page/index.html").read_text()
    assert "a.png" in page
    assert "b.png" in page


def test_a_form_and_a_name_that_disagree_are_refused(infer: Run) -> None:
    put("a.png")
    done = infer("a.png", "-o", "b.png", "--format", "jpg")
    assert (done.code, listing()) == (2, ["a.png"])
    assert "--format" in done.err


def test_a_device_that_is_not_there_is_told_once(infer: Run) -> None:
    put("a.png")
    put("b.png")
    done = infer("a.png", "b.png", "-o", "out/", "--device", "cuda:99")
    assert (done.code, done.err.count("error:")) == (2, 1)


def test_an_overlap_that_is_too_small_is_said(infer: Run) -> None:
    put("a.png")
    assert "--overlap 8" in infer("a.png", "-o", "b.png", "--overlap", "8").err
    assert "--overlap" not in infer("a.png", "-o", "c.png").err


# --- what an engine may ask of the verb ------------------------------------------------------


def with_engine(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    engine: Engine = replace(ENGINE, **fields)
    monkeypatch.setattr(engines, "load", lambda name: engine)


def negative(_: Any, photo: Photo, *rest: Any, **more: Any) -> Result:
    """Turn a photo into its negative, and tell its mean in a file and in a row."""
    mean = float(photo.pixels.mean())
    return Result(255 - photo.pixels, files={".mean.txt": b"%.3f" % mean}, row={"mean": mean}, **more)


KEEPING = {"apply": negative, "table": "means.csv", "beside": lambda settings: (".mean.txt",)}


def table(path: str = "out/means.csv") -> list[list[str]]:
    return [line.split(",") for line in Path(path).read_text().splitlines()]


def outputs_of(folder: str) -> list[str]:
    return [name for name in listing() if name.startswith(folder)]


def test_files_and_a_table_beside_the_outputs(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with_engine(monkeypatch, **KEEPING)
    put("in/b.png")
    put("in/deep/a.png", scene(20, 30))
    assert infer("in", "-o", "out").code == 0
    assert outputs_of("out") == [
        "out/b.mean.txt", "out/b.png", "out/deep/a.mean.txt", "out/deep/a.png", "out/means.csv",
    ]  # fmt: skip
    rows = table()
    assert [row[0] for row in rows] == ["file", "b.png", "deep/a.png"]
    assert rows[0] == ["file", "mean"]
    assert float(rows[2][1]) == pytest.approx(scene(20, 30).mean())
    assert Path("out/deep/a.mean.txt").read_text() == f"{scene(20, 30).mean():.3f}"


def test_one_file_has_no_table(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with_engine(monkeypatch, **KEEPING)
    put("a.png")
    assert infer("a.png", "-o", "b.png").code == 0
    assert listing() == ["a.png", "b.mean.txt", "b.png"]
    assert infer("a.png", "-o", "out/").code == 0
    assert table()[1][0] == "a.png"


def test_a_file_beside_that_exists_is_refused_before_computing(
    infer: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_engine(monkeypatch, **KEEPING | {"apply": lambda *_: pytest.fail("computed")})
    put("a.png")
    Path("b.mean.txt").write_text("mine")
    done = infer("a.png", "-o", "b.png")
    assert (done.code, "b.mean.txt exists" in done.err) == (1, True)
    with_engine(monkeypatch, **KEEPING)
    assert infer("a.png", "-o", "b.png", "--force").code == 0
    assert Path("b.mean.txt").read_text() != "mine"


def test_an_interrupted_table_has_the_rows_of_what_was_done_and_is_gone_on_with(
    infer: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("in/a.png", "in/b.png", "in/c.png"):
        put(name)
    calls: list[str] = []

    def until(last: int) -> Callable[..., Result]:
        def apply(net: Any, photo: Photo, *rest: Any) -> Result:
            if len(calls) == last:
                raise KeyboardInterrupt
            calls.append("")
            return negative(net, photo)

        return apply

    with_engine(monkeypatch, **KEEPING | {"apply": until(2)})
    assert infer("in", "-o", "out", "--zip", "all.zip").code == 130
    assert [row[0] for row in table()] == ["file", "a.png", "b.png"]
    assert not Path("all.zip").exists()
    done = infer("in", "-o", "out")
    assert (done.code, "out/means.csv exists" in done.err, len(calls)) == (1, True, 2)
    Path("out/b.png").unlink()  # as if the run had been killed between b's row and b
    kept = Path("out/a.png").read_bytes()
    with_engine(monkeypatch, **KEEPING | {"apply": until(9)})
    done = infer("in", "-o", "out", "--skip-existing", "--json")
    assert done.code == 0
    assert [(line["output"], "skipped" in line) for line in done.lines] == [
        ("out/a.png", True),
        ("out/b.png", False),
        ("out/c.png", False),
    ]
    assert Path("out/a.png").read_bytes() == kept
    assert [row[0] for row in table()] == ["file", "a.png", "b.png", "c.png"]


def test_a_file_that_is_there_is_never_overwritten_by_a_resume(
    infer: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that somebody put there, nor one whose table was lost."""
    with_engine(monkeypatch, **KEEPING)
    for name in ("in/a.png", "in/b.png"):
        put(name)
    put("out/a.png", scene(seed=9))
    kept = Path("out/a.png").read_bytes()
    done = infer("in", "-o", "out", "--skip-existing")
    assert done.code == 0
    assert "without a row in means.csv" in done.err
    assert Path("out/a.png").read_bytes() == kept
    assert [row[0] for row in table()] == ["file", "b.png"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("in -o out --zip in/a.png --force", "is a photo of the batch"),
        ("in -o out --zip out/a.png", "is a photo of the batch"),
        ("in both/a.jpg -o out --side-by-side", "would both write"),
    ],
)
def test_files_that_would_fall_on_each_other_are_refused(
    infer: Run, monkeypatch: pytest.MonkeyPatch, words: str, what: str
) -> None:
    with_engine(monkeypatch, **KEEPING | {"apply": lambda *_: pytest.fail("computed")})
    put("in/a.png")
    put("both/a.jpg")
    before = Path("in/a.png").read_bytes()
    done = infer(*words.split())
    assert (done.code, what in done.err) == (2, True)
    assert Path("in/a.png").read_bytes() == before
    assert not Path("out").exists()


def test_a_foreign_table_is_refused(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with_engine(monkeypatch, **KEEPING | {"apply": lambda *_: pytest.fail("computed")})
    put("a.png")
    Path("out").mkdir()
    Path("out/means.csv").write_text("name,price\n")
    done = infer("a.png", "-o", "out", "--skip-existing")
    assert (done.code, "is not a table of this batch" in done.err) == (1, True)
    assert Path("out/means.csv").read_text() == "name,price\n"


def test_a_photo_left_alone_is_copied_byte_for_byte(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with_apply(monkeypatch, lambda net, photo, *_: Result(photo.pixels))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(scene(40, 64)).save("a.jpg", quality=51, exif=exif)
    done = infer("a.jpg", "-o", "b.jpg", "--json", "--quality", "99")
    assert Path("b.jpg").read_bytes() == Path("a.jpg").read_bytes()
    assert done.lines[0]["untouched"] is True
    assert infer("a.jpg", "-o", "c.jpg").out.endswith("left as it is\n")
    done = infer("a.jpg", "-o", "d.png", "--json")
    assert ("untouched" in done.lines[0], images.read(Path("d.png")).format) == (False, "png")


def test_a_photo_from_standard_input_left_alone(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with_apply(monkeypatch, lambda net, photo, *_: Result(photo.pixels))
    data = put("a.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert infer("-").raw == data


def test_an_alpha_and_a_mark_of_the_engine(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    alpha = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 20
    mark = {"DistortionCorrectionAlreadyApplied": "True"}

    def apply(net: Any, photo: Photo, *_: Any) -> Result:
        return Result(photo.pixels, alpha=alpha, xmp=mark)

    with_apply(monkeypatch, apply)
    put("a.png", scene(dtype="uint16"))
    assert infer("a.png", "-o", "b.png").code == 0
    after = images.read(Path("b.png"))
    assert np.array_equal(after.alpha, alpha)
    assert metadata.xmp_property(after.xmp, metadata.AUX[0], *mark) == "True"
    assert "alpha is dropped" in infer("a.png", "-o", "c.jpg").err


def test_an_engine_names_its_inputs_and_its_own_format(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with_engine(monkeypatch, apply=negative, suffixes=(".png",), form=lambda settings: "webp")
    put("in/a.png")
    put("in/b.jpg")
    assert infer("in", "-o", "out").code == 0
    assert outputs_of("out") == ["out/a.webp"]
    assert infer("in/a.png", "--format", "tif").code == 0
    assert infer("in/b.jpg", "-o", "c.jpg").code == 0
    assert infer("in/a.png", "-o", "-").raw[8:12] == b"WEBP"
    assert {"in/a-deblur.tif", "c.jpg"} <= set(listing())


def test_an_engine_that_needs_no_weights_gets_none(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    nets: list[Any] = []
    with_engine(
        monkeypatch,
        apply=lambda net, photo, *_: nets.append(net) or Result(255 - photo.pixels),
        uses_weights=lambda settings: False,
    )
    put("a.png")
    assert infer("a.png", "--weights", "none.safetensors", "--json").lines[0]["model"] is None
    assert nets == [None]
    assert infer("a.png", "-o", "c.png", "-n", "--weights", "none.safetensors").code == 0


def test_an_engine_asks_another_about_the_photo_and_about_bytes(
    infer: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []

    def measure(net: Any, photo: Photo, settings: Any, watch: Watch) -> Result:
        watch.say("measured")
        facts = {"mean": float(photo.pixels.mean()), "domain": settings.domain, "picture": watch.picture}
        return Result(None, facts)

    def apply(net: Any, photo: Photo, settings: Any, watch: Watch) -> Result:
        other = images.encode(Photo(np.full((4, 5, 3), 9, np.uint8)), "png")
        facts = {"own": watch.consult("awb"), "given": watch.consult("awb", other, domain="raw")}
        return Result(255 - photo.pixels, facts)

    asked: Engine = replace(
        ENGINE, name="awb", apply=measure, prepare=lambda *_: built.append(1) or 1, weights="awb-hist"
    )
    asking: Engine = replace(ENGINE, apply=apply)
    monkeypatch.setattr(engines, "load", lambda name: asked if name == "awb" else asking)
    for number in range(2):
        put(f"in/{number}.png", np.full((6, 6, 3), 40 + number, np.uint8))
    done = infer("in", "-o", "out", "--json")
    assert done.code == 0
    for number, line in enumerate(done.lines):
        assert line["facts"]["own"] == {"mean": 40 + number, "domain": "auto", "picture": False}
        assert line["facts"]["given"] == {"mean": 9, "domain": "raw", "picture": False}
    assert len(built) == 1
    assert "in/1.png: measured" in done.err
    with pytest.raises(ImgtoolError, match="cannot be asked here"):
        Watch().consult("awb")


def test_side_by_side_shows_both_at_full_size(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(scene()).save("a.png", icc_profile=profile)
    with_apply(monkeypatch, lambda net, photo, *_: Result(255 - photo.pixels.repeat(2, 0).repeat(2, 1)))
    done = infer("a.png", "-o", "b.png", "--side-by-side", "--quality", "100")
    assert "side by side: b-side-by-side.jpg\n" in done.err
    with Image.open("b-side-by-side.jpg") as both:
        assert both.info["icc_profile"] == profile
        pixels = np.asarray(both).astype(int)
    assert pixels.shape == (96, 256, 3)
    assert np.abs(pixels[:, 128:] - (255 - scene().repeat(2, 0).repeat(2, 1))).mean() < 2
    assert np.abs(pixels[:, :128] - scene().repeat(2, 0).repeat(2, 1)).mean() < 6
    put("wide.png", np.zeros((2, 40_000, 3), np.uint8))
    with_apply(monkeypatch, lambda net, photo, *_: Result(255 - photo.pixels))
    done = infer("wide.png", "-o", "c.png", "--side-by-side")
    assert "c-side-by-side.jpg, at 82 %" in done.err
    with Image.open("c-side-by-side.jpg") as both:
        assert both.size == (65_500, 1)
    assert infer("a.png", "-o", "b.png", "--side-by-side", "--skip-existing").code == 0
    Path("b.png").unlink()
    assert "b-side-by-side.jpg exists" in infer("a.png", "-o", "b.png", "--side-by-side").err


def test_a_result_of_one_channel_is_grey_everywhere(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(scene()).save("a.png", icc_profile=profile)
    grey = scene(seed=5)[..., 0]
    with_apply(monkeypatch, lambda net, photo, *_: Result(grey))
    done = infer(
        "a.png", "-o", "b.png", "--compare", "--side-by-side", "--quality", "100", "--report", "page"
    )
    assert done.code == 0
    with Image.open("b.png") as image:
        assert (image.mode, "icc_profile" in image.info) == ("L", False)
        assert np.array_equal(np.asarray(image), grey)
    pair = images.read(Path("b-side-by-side.jpg")).pixels.astype(int)
    assert np.abs(pair[:, 64:] - grey[..., None]).mean() < 2
    assert np.abs(pair[:, :64] - scene()).mean() < 6
    assert images.read(Path("b-compare.png")).pixels.shape[1] == 1600
    assert Path("page/index.html").read_text().count("data:image/jpeg;base64,") >= 2


def test_the_photos_memory_may_take_the_result_where_nothing_else_needs_it(
    infer: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []

    def apply(net: Any, photo: Photo, settings: Any, watch: Watch) -> Result:
        told.append(watch.overwrite)
        out = tiles.canvas(photo.pixels, 3, watch.overwrite)
        np.subtract(255, photo.pixels, out=out)
        return Result(out)

    with_apply(monkeypatch, apply)
    put("a.png")
    words = ((), ("--compare",), ("--side-by-side",), ("--report", "page"))
    for number, more in enumerate(words):
        assert infer("a.png", "-o", f"{number}.png", "--json", *more).lines[0].get("untouched") is None
        assert np.array_equal(images.read(Path(f"{number}.png")).pixels, 255 - scene())
    assert told == [True, False, False, False]
    pair = images.read(Path("2-side-by-side.jpg")).pixels.astype(int)
    assert np.abs(pair[:, :64] - scene()).mean() < 6


def test_an_engine_chooses_its_weights_by_the_settings(
    infer: Run, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(weights, "deblur-soft.safetensors")
    monkeypatch.setattr(header, "SHIPPED", Path.cwd())
    with_engine(monkeypatch, apply=negative, choose=lambda settings: "soft" if settings.tile else "")
    put("a.png")

    def model(*words: str) -> Any:
        done = infer("a.png", "--json", "--force", *words)
        return done.lines[0].get("model") or done.lines[0]["error"]

    assert model("--weights", str(weights), "--tile", "64") == "random"
    assert model("--weights", "soft") == "deblur-soft"
    assert model("--weights", "", "--tile", "64") == "deblur-soft"
    assert model("--weights", "") == "no weights file or shipped weights named deblur-unet-lite"
    assert "deblur-soft" in infer("a.png", "--weights", "", "--tile", "64", "--dry-run").out


def test_pictures_of_outputs_are_not_inputs_of_the_next_run(infer: Run) -> None:
    put("in/a.png")
    assert infer("in", "--compare", "--side-by-side").code == 0
    before = listing()
    assert infer("in", "--force").code == 0
    assert listing() == before


def test_the_archive_holds_all_of_the_batch(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with_engine(monkeypatch, **KEEPING)
    put("in/a.png")
    put("in/deep/b.png")
    Path("in/c.png").write_bytes(b"")
    words = ("in", "-o", "out", "--side-by-side", "--zip", "all.zip")
    assert infer(*words).code == 1
    members = [
        "outputs/a.png", "outputs/a.mean.txt", "side_by_side/a-side-by-side.jpg",
        "outputs/deep/b.png", "outputs/deep/b.mean.txt", "side_by_side/deep/b-side-by-side.jpg",
        "means.csv",
    ]  # fmt: skip
    with zipfile.ZipFile("all.zip") as zipped:
        assert zipped.namelist() == members
        assert zipped.read("outputs/a.png") == Path("out/a.png").read_bytes()
    first = Path("all.zip").read_bytes()
    done = infer(*words)
    assert (done.code, "all.zip exists" in done.err) == (1, True)
    Path("all.zip").write_bytes(b"")
    infer(*words, "--skip-existing")  # rebuilt, from what is there
    assert Path("all.zip").read_bytes() == first


def test_the_archive_holds_photos_whose_pictures_failed(infer: Run) -> None:
    put("in/a.png")
    put("in/b.png")
    Path("out/a-compare.png").mkdir(parents=True)
    assert infer("in", "-o", "out", "--compare", "--force", "--zip", "all.zip").code == 1
    assert Path("out/a.png").exists()
    with zipfile.ZipFile("all.zip") as zipped:
        assert zipped.namelist() == ["outputs/a.png", "outputs/b.png"]


def test_an_archive_of_outputs_in_several_folders(infer: Run) -> None:
    put("x/a.png")
    put("y/a.png")
    assert infer("x/a.png", "y/a.png", "--zip", "all.zip").code == 0
    with zipfile.ZipFile("all.zip") as zipped:
        assert zipped.namelist() == ["outputs/x/a-deblur.png", "outputs/y/a-deblur.png"]


def test_a_survey_of_all_photos_comes_before_the_first(infer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[object]] = []

    def survey(net: Any, photos: Any, settings: Any, watch: Any) -> list[object]:
        told: list[object] = []
        for name, read in photos:
            try:
                told.append((name, read().pixels.shape[1]))
            except ImgtoolError:
                told.append(None)
            watch.done(len(told), len(photos))
        seen.append(told)
        return told

    def apply(net: Any, photo: Photo, settings: Any, watch: Any, known: Any) -> Result:
        return Result(255 - photo.pixels, {"known": known})

    put("in/a.png")
    Path("in/b.png").write_bytes(b"")
    put("in/c.png", scene(20, 30))
    with_engine(monkeypatch, apply=apply, survey=survey, wants_survey=lambda settings: settings.quality > 90)
    done = infer("in", "-o", "out", "--json")
    assert done.code == 1
    assert seen == [[("in/a.png", 64), None, ("in/c.png", 30)]]
    assert done.lines[0]["facts"]["known"] == ["in/a.png", 64]
    assert done.lines[2]["facts"]["known"] == ["in/c.png", 30]
    Path("out/c.png").unlink()
    done = infer("in", "-o", "out", "--skip-existing", "--json")
    assert seen[1] == seen[0]  # photos left out inform their group
    assert done.lines[2]["facts"]["known"] == ["in/c.png", 30]
    Path("in/b.png").unlink()
    infer("in", "-o", "out", "--skip-existing")
    assert len(seen) == 2  # nothing to do, nothing to look at
    with_engine(monkeypatch, apply=negative, survey=survey)
    infer("in", "-o", "more")
    assert len(seen) == 2


# --- an engine whose result is not a picture -------------------------------------------------


def measured(net: Any, level: float, settings: Any, watch: Watch, *rest: Any) -> Result:
    """Tell the level of a photo; where a picture is wanted, make a grey one of that level."""
    result = Result(None, {"level": level, "net": str(net)}, row={"level": level}, line=f"level {level:.0f}")
    if settings.sheet:
        result = replace(result, files={"-levels.png": b"sheet"})
    if not watch.picture:
        return result
    grey = np.full((48, 64, 3), int(level), np.uint8)
    before = Photo(scene() if watch.before else grey[:0], exif=camera_exif(), format="raw")
    return replace(result, image=grey, before=before)


def camera_exif() -> bytes:
    exif = Image.Exif()
    exif[271] = "Maker"
    return exif.tobytes().removeprefix(b"Exif\0\0")


def level_of(source: Path | bytes, name: str, settings: Any, net: Any) -> float:
    data = source if isinstance(source, bytes) else source.read_bytes()
    if not data:
        raise ImgtoolError(f"{name} is empty", "fill it")
    return float(np.asarray(Image.open(io.BytesIO(data))).mean() // 1)


class Settings(engines.settings("deblur").Infer):  # type: ignore[misc,name-defined]
    sheet: bool = False


LEVEL = scene().mean() // 1


@pytest.fixture
def measure(
    infer: Run, weights: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Run:
    """Return a function that runs an engine whose result is a number, with or without its sheet."""
    engine: Engine = replace(
        ENGINE, apply=measured, open=level_of, picture=False, table="levels.csv", sheets=("-levels",),
        prepare=lambda path, settings: path.stem, beside=lambda s: ["-levels.png"] if s.sheet else [],
    )  # fmt: skip
    monkeypatch.setattr(engines, "load", lambda name: engine)

    def call(*words: str, sheet: bool = False) -> SimpleNamespace:
        make = partial(infer_settings, sheet)
        monkeypatch.setattr(cli, "resolve", make)
        return infer(*words)

    resolve = cli.resolve

    def infer_settings(sheet: bool, cls: Any, *rest: Any) -> Any:
        return Settings(**resolve(cls, *rest).model_dump(), sheet=sheet)

    return call


def test_without_an_output_only_the_facts_are_told(measure: Run) -> None:
    put("in/a.png")
    put("in/b.png", scene() // 2)
    done = measure("in")
    assert (done.code, listing()) == (0, ["in/a.png", "in/b.png"])
    assert done.out.splitlines()[0] == f"in/a.png  level {LEVEL:.0f}"
    line = measure("in/a.png", "--json").lines[0]
    assert line.pop("seconds") > 0
    assert line == {
        "input": "in/a.png", "output": None, "engine": "deblur", "model": "random",
        "width": None, "height": None, "facts": {"level": LEVEL, "net": "random"},
    }  # fmt: skip
    assert "in/a.png -> facts" in measure("in", "-n").out


def test_a_picture_is_written_where_an_output_is_named(measure: Run) -> None:
    put("in/a.png")
    put("in/b.png", scene() // 2)
    done = measure("in/a.png", "-o", "b.jpg")
    assert done.out.startswith("in/a.png -> b.jpg  64x48")
    assert done.out.endswith(f"level {LEVEL:.0f}\n")
    after = images.read(Path("b.jpg"))
    assert np.abs(after.pixels - LEVEL).max() <= 1
    assert metadata.tag_bytes(after.exif, 271) == b"Maker\0"
    assert measure("in", "-o", "out").code == 0
    assert outputs_of("out") == ["out/a.png", "out/b.png", "out/levels.csv"]
    rows = table("out/levels.csv")
    assert [row[0] for row in rows] == ["file", "a.png", "b.png"]
    assert float(rows[1][1]) == LEVEL
    Path("out/b.png").unlink()
    done = measure("in", "-o", "out", "--skip-existing", "--json")
    assert ["skipped" in line for line in done.lines] == [True, False]


def test_sheets_without_an_output_lie_beside_the_input_and_are_no_inputs(measure: Run) -> None:
    put("in/a.png")
    done = measure("in", "--compare", "--side-by-side", "--report", "page", "--zip", "all.zip", sheet=True)
    assert done.code == 0
    assert outputs_of("in") == ["in/a-compare.png", "in/a-levels.png", "in/a-side-by-side.jpg", "in/a.png"]
    with Image.open("in/a-side-by-side.jpg") as both:
        pixels = np.asarray(both).astype(int)
    assert np.abs(pixels[:, :64] - scene()).mean() < 6
    assert np.abs(pixels[:, 64:] - LEVEL).mean() < 2
    with zipfile.ZipFile("all.zip") as zipped:
        assert zipped.namelist() == ["outputs/a-levels.png", "side_by_side/a-side-by-side.jpg"]
    assert "data:image/jpeg" in Path("page/index.html").read_text()
    assert len(measure("in", "--json").lines) == 1  # the sheets are no photos of the folder
    done = measure("in", "--side-by-side", sheet=True)
    assert (done.code, "a-levels.png exists" in done.err) == (1, True)
    Path("in/a-levels.png").write_bytes(b"old")
    done = measure("in", "--json", "--skip-existing", sheet=True)
    assert done.lines == [{"input": "in/a.png", "output": None, "skipped": True}]
    assert Path("in/a-levels.png").read_bytes() == b"old"
    assert measure("in", "--force", sheet=True).code == 0
    assert Path("in/a-levels.png").read_bytes() == b"sheet"
    assert len(measure("in", "--json", "--skip-existing").lines[0]) > 3  # nothing would be written


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("a.png a.jpg --compare", "would both write a-compare.png"),
        ("a.png a-levels.png --force", "an input, would be overwritten"),
        ("-", "files beside the output need an output that is a file"),
        ("a.png --zip a.png --force", "is a photo of the batch"),
    ],
)
def test_files_beside_inputs_that_would_fall_on_each_other(measure: Run, words: str, what: str) -> None:
    for name in ("a.png", "a.jpg", "a-levels.png"):
        put(name)
    before = Path("a-levels.png").read_bytes()
    done = measure(*words.split(), sheet=True)
    assert (done.code, what in done.err) == (2, True)
    assert Path("a-levels.png").read_bytes() == before


def test_an_archive_of_nothing_is_refused(measure: Run) -> None:
    put("a.png")
    done = measure("a.png", "--zip", "all.zip")
    assert (done.code, "no file is written" in done.err) == (2, True)


def test_facts_and_pictures_of_standard_input(measure: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    data = put("a.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    done = measure("-", "--json")
    assert (done.lines[0]["output"], done.lines[0]["facts"]["level"]) == (None, LEVEL)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    done = measure("-", "-o", "-")
    assert np.abs(np.asarray(Image.open(io.BytesIO(done.raw))) - LEVEL).max() == 0
    assert f"level {LEVEL:.0f}" in done.err


def test_a_frame_that_cannot_be_read_stops_only_itself(measure: Run) -> None:
    put("in/a.png")
    Path("in/b.png").write_bytes(b"")
    done = measure("in", "--json")
    assert done.code == 1
    assert done.lines[1] == {"input": "in/b.png", "error": "in/b.png is empty", "hint": "fill it"}


def test_an_engine_that_needs_no_weights_for_its_settings_is_given_none(
    measure: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = replace(engines.load("deblur"), uses_weights=lambda settings: False)
    monkeypatch.setattr(engines, "load", lambda name: engine)
    put("a.png")
    line = measure("a.png", "--json", "--weights", "nobody").lines[0]
    assert (line["model"], line["facts"]["net"]) == (None, "None")


# --- processes of their own ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_in_a_pipe(weights: Path) -> None:
    put("a.png", scene(400, 500))
    command = f"{sys.executable} -m imgtool infer deblur - -o - --format png --weights {weights}"
    pipe = subprocess.run(
        ["sh", "-c", f"cat a.png | {command} | head -c 8"],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert pipe.stdout == b"\x89PNG\r\n\x1a\n"
    assert b"Traceback" not in pipe.stderr
    assert b"Exception" not in pipe.stderr
