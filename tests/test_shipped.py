"""The weights that ship: they load, describe themselves, and keep their promises on photos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open
from torch import nn

from imgtool import checkpoint, engines, images, metrics
from imgtool.engine import Engine, Watch
from imgtool.engines.deblur.settings import Infer
from imgtool.engines.isp import libraw, quality, unprocess
from imgtool.engines.isp.settings import Infer as IspInfer
from imgtool.engines.lens.geometry import BrownConrady, error
from imgtool.engines.lens.settings import Infer as LensInfer

ROOT = Path(__file__).parents[1]
NAMES = checkpoint.shipped()
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*") if path.suffix.lower() in images.WRITABLE)
DEBLUR = [name for name in NAMES if name.startswith("deblur")]
SIZES = [(1, 1), (17, 15), (257, 255), (200, 300), (359, 641)]

pytestmark = pytest.mark.skipif(not NAMES, reason="no weights ship yet")
each_name = pytest.mark.parametrize("name", NAMES)
each_deblur = pytest.mark.parametrize("name", DEBLUR)


def loaded(name: str) -> tuple[Engine, nn.Module]:
    engine = engines.load(name.split("-")[0])
    return engine, checkpoint.network(engine, checkpoint.read_weights(checkpoint.find(name), engine.name))


def test_every_engines_default_ships() -> None:
    assert {engines.load(name).weights for name in engines.SUMMARY} <= set(NAMES)


@each_name
def test_the_header_says_what_it_is(name: str) -> None:
    engine, net = loaded(name)
    weights = checkpoint.read_weights(checkpoint.find(name), engine.name)
    assert not net.training
    assert set(weights.model) == set(engine.model.model_fields)
    assert {"format", "engine", "model", "imgtool", "scores", "licence", "data"} <= set(weights.header)


@each_name
def test_half_precision_and_finite(name: str) -> None:
    with safe_open(checkpoint.find(name), "pt") as opened:
        tensors = [opened.get_tensor(key) for key in opened.keys()]  # noqa: SIM118
    assert {str(tensor.dtype) for tensor in tensors} == {"torch.float16"}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)


@each_name
def test_the_card(name: str) -> None:
    card = (checkpoint.SHIPPED / f"{name}.md").read_text(encoding="utf-8").lower()
    measured = {"deblur": "db", "lens": "% of the diagonal", "awb": "degrees", "isp": "db", "filter": "db"}
    engine = name.split("-")[0]
    for words in ("data", "licence", "seed", f"imgtool train {engine}", measured[engine]):
        assert words in card, f"the card of {name} does not speak of {words}"


def photo(height: int, width: int) -> npt.NDArray[np.float32]:
    """Cut a piece out of an example; without examples, draw edges."""
    if EXAMPLES:
        pixels = images.to_float(images.read(EXAMPLES[0]).pixels)
    else:
        blocks = np.random.default_rng(0).random((60, 100, 3), np.float32)
        pixels = np.kron(blocks, np.ones((8, 8, 1), np.float32))
    repeats = (-(-height // pixels.shape[0]), -(-width // pixels.shape[1]), 1)
    return np.ascontiguousarray(np.tile(pixels, repeats)[:height, :width])


def apply(engine: Engine, net: nn.Module, image: npt.NDArray[Any], **settings: Any) -> npt.NDArray[Any]:
    return engine.apply(net, images.Photo(image), Infer(inputs=("-",), **settings), Watch()).image


@each_deblur
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_the_whole_photo(name: str, size: tuple[int, int]) -> None:
    engine, net = loaded(name)
    image = photo(*size)
    whole, tiled = (apply(engine, net, image, tile=tile) for tile in (0, 256))
    assert np.abs(whole - tiled).max() <= 0.05 / 255


@each_deblur
def test_a_sharp_photo_stays_as_it_is(name: str) -> None:
    engine, net = loaded(name)
    pixels = images.read_rgb8(ROOT / "examples" / "sharp.jpg")
    out = apply(engine, net, pixels)
    assert float(metrics.psnr(metrics.batch_of(out), metrics.batch_of(pixels))) >= 45


@each_deblur
def test_a_blurred_photo_is_changed(name: str) -> None:
    engine, net = loaded(name)
    pixels = images.read_rgb8(ROOT / "examples" / "blurred.jpg")
    assert np.abs(apply(engine, net, pixels).astype(int) - pixels).max() > 8


def test_a_curved_photo_is_straightened() -> None:
    """The example's camera is calibrated: -14.2 % at the corners, 1.46 % of the diagonal on the mean."""
    engine, net = loaded("lens-lines")
    truth = BrownConrady(-0.489, 0.293, -0.001, 0.0, -0.088, 0.014, 0.028)
    photo = images.read(ROOT / "examples" / "curved.jpg")
    facts = engine.apply(net, photo, LensInfer(inputs=("-",)), Watch()).facts
    found = BrownConrady(*(facts[name] for name in ("k1", "k2", "p1", "p2")))
    assert facts["method"] == "net"
    assert error(found, truth, 1280, 960) < 0.25 < 1.4 < error(BrownConrady(), truth, 1280, 960)


@pytest.mark.parametrize("name", ["sharp.jpg", "blurred.jpg"])
def test_flowers_and_shrubs_are_left_alone(name: str) -> None:
    engine, net = loaded("lens-lines")
    photo = images.read(ROOT / "examples" / name)
    assert engine.apply(net, photo, LensInfer(inputs=("-",)), Watch()).image is photo.pixels


@pytest.mark.parametrize(("shot", "above"), [(0.0, 0.0), (1e-3, 0.8), (4e-3, 1.5), (1e-2, 2.0)])
def test_raw_frames_are_developed_better_than_by_libraw(shot: float, above: float) -> None:
    """A photo not trained on, full of fine twigs, against the best of LibRaw's ways for this very frame."""
    engine, net = loaded("isp-lrfu-s")
    rgb = images.read_rgb8(ROOT / "examples" / "sharp.jpg")[100:356, 100:356]
    made = quality.recipe(shot)
    values, truth = unprocess.frame(rgb, made, np.random.default_rng(5))
    frame = quality.mosaic(values, made)
    photo = engine.apply(net, frame, IspInfer(inputs=("-",)), Watch()).image
    rivals = libraw.of_mosaic(frame, libraw.WAYS)

    def decibels(picture: npt.NDArray[Any]) -> float:
        parts = (metrics.batch_of(each[8:-8, 8:-8]) for each in (picture, truth))
        return float(metrics.psnr(*parts))

    assert decibels(photo) >= max(map(decibels, rivals.values())) + above
