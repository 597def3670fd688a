"""What every engine must keep to, so that one loop, one tiling and one command line serve all."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from imgtool import checkpoint, engines
from imgtool.engine import Engine, TileFacts, Watch
from imgtool.errors import USAGE, ImgtoolError
from imgtool.flags import commands
from imgtool.images import Photo
from imgtool.settings.sources import make, table, to_toml

MATERIAL: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "deblur": lambda folder: {"photos": (folder,), "crop": 32, "held_out": 3},
    "lens": lambda folder: {"photos": (folder,), "held_out": 3, "untouched": 0.0, "input": 64, "lr": 3e-3},
    "awb": lambda folder: {"photos": (folder,), "held_out": 3, "height": 48, "width": 64},
    "isp": lambda folder: {"photos": (folder,), "held_out": 3, "crop": 64, "width": "8"},
    "filter": lambda folder: {"photos": (folder,), "held_out": 3, "crop": 32},
}
"""Settings with which an engine trains on a folder of small photographs: a new engine, a new line."""

NETWORKS = [
    ("deblur", "unet-lite", {}),
    ("deblur", "unet-seed", {"arch": "unet-seed"}),
    ("lens", "lines", {}),
    ("lens", "efficientnet-b0", {"arch": "efficientnet-b0", "input": 64}),
    ("lens", "original", {"arch": "efficientnet-b0", "head": "original", "input": 64, "lr": 3e-4}),
    ("awb", "hist", {}),
    ("awb", "deepawb", {"arch": "deepawb", "lr": 1e-3}),
    ("isp", "lrfu", {}),
    ("isp", "punet", {"arch": "punet", "lr": 4e-3}),
    ("filter", "fold", {"lr": 2e-2}),
    ("filter", "pooled", {"arch": "pooled", "target": "erode:size=9", "loss": "l2"}),
    ("filter", "unshuffle", {"arch": "unshuffle", "factor": 2, "width": 16}),
    ("filter", "dilated", {"arch": "dilated", "dilations": "1,3,1", "width": 8}),
    ("filter", "clapp", {"arch": "clapp"}),
    ("filter", "int8", {"arithmetic": "int8"}),
]
"""Every network: engine, a name, the settings that shape it."""

HEAVY = ("torch", "numpy", "cv2", "PIL", "rawpy", "matplotlib", "jinja2", "tifffile", "safetensors")

names = pytest.mark.parametrize("name", engines.SUMMARY)
SLOW = ("efficientnet-b0", "original", "unet-seed", "punet", "unshuffle", "dilated", "int8")
"""Networks tested with the slow tests: large ones, and those that differ from another in a last layer."""

networks = pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param(name, model, id=word, marks=[pytest.mark.slow] * (word in SLOW))
        for name, word, model in NETWORKS
    ],
)


class Case(NamedTuple):
    """An engine with training settings, a batch of four, and a network."""

    engine: Engine
    settings: Any
    batch: Any
    net: nn.Module


@cache
def _examples(name: str, folder: Path, model: tuple[tuple[str, Any], ...] = ()) -> tuple[Any, Any, Any]:
    settings = engines.settings(name).Train(**MATERIAL[name](folder) | dict(model), batch=4, seed=1)
    train, held_out = engines.load(name).data(settings)
    return settings, default_collate([train[n] for n in range(4)]), held_out


@pytest.fixture
def case(name: str, model: dict[str, Any], photographs: Path) -> Case:
    settings, batch, _ = _examples(name, photographs, tuple(model.items()))
    torch.manual_seed(settings.seed)
    engine = engines.load(name)
    return Case(engine, settings, batch, engine.build(settings))


def stepped(case: Case, steps: int) -> list[float]:
    """Train on the one batch at the engine's own rate; return the loss before every step."""
    optimiser = torch.optim.AdamW(case.net.parameters(), case.settings.lr)
    losses = []
    for _ in range(steps):
        loss = sum(case.engine.loss(case.net, case.batch, case.settings).values(), torch.zeros(()))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(case.net.parameters(), case.settings.clip)
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def disturbed(case: Case) -> nn.Module:
    """Return the network with no weight at zero: a network fresh from the factory may do nothing."""
    with torch.no_grad():
        for parameter in case.net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return case.net.eval()


def infer_settings(engine: Engine, **values: Any) -> Any:
    return engines.settings(engine.name).Infer(inputs=("-",), **values)


def noise(height: int, width: int, kind: str) -> Any:
    values = 0.1 + 0.8 * np.random.default_rng(height * width).random((height, width, 3))
    if kind == "float32":
        return values.astype(np.float32)
    return np.rint(values * np.iinfo(kind).max).astype(kind)


def inputs(engine: Engine, height: int, width: int) -> list[Any]:
    """What an engine reads, in every type."""
    if engine.specimen:
        return [engine.specimen(height, width, height * width)]
    return [Photo(noise(height, width, kind)) for kind in ("uint8", "uint16", "float32")]


def pixels(opened: Any) -> Any:
    return opened.pixels if isinstance(opened, Photo) else opened.values


# --- the record ---------------------------------------------------------------------------------


def test_every_engine_is_tested_here() -> None:
    assert set(MATERIAL) == set(engines.SUMMARY)
    assert {name for name, _, _ in NETWORKS} == set(engines.SUMMARY)


@names
def test_the_record_is_complete(name: str) -> None:
    engine, settings = engines.load(name), engines.settings(name)
    assert engine.name == name
    assert engines.SUMMARY[name].endswith(".")
    assert engine.reads in ("rgb", "bayer")
    assert engine.scale >= 1
    assert engine.weights.startswith(f"{name}-")
    assert set(engine.actions) == set(settings.ACTIONS)
    assert issubclass(settings.Train, engine.model)
    for field, info in engine.model.model_fields.items():
        assert settings.Train.model_fields[field].default == info.default


@names
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_the_baseline_keeps_shape_and_type(name: str, kind: str) -> None:
    engine = engines.load(name)
    if engine.specimen:
        assert engine.baseline(engine.specimen(13, 17, 0)).shape == (13, 17, 3)
        return
    image = noise(13, 17, kind)
    before = image.copy()
    out = engine.baseline(image)
    assert (out.shape, out.dtype) == (image.shape, image.dtype)
    assert np.array_equal(image, before)


def test_an_unknown_engine_is_asked_wrongly() -> None:
    with pytest.raises(ImgtoolError, match="no engine named denoise") as caught:
        engines.load("denoise")
    assert caught.value.code == USAGE


# --- settings and help --------------------------------------------------------------------------


@pytest.mark.parametrize("command", list(commands()), ids=lambda command: command.words)
def test_settings_go_through_toml_and_come_back(command: Any, tmp_path: Path) -> None:
    cls = command.settings

    def some(name: str, kind: Any) -> Any:
        if get_origin(kind) is Literal:
            return get_args(kind)[0]
        return [f"a '{name}' \\ \"€\""] if "tuple" in str(kind) else f"some/{name}"

    needed = {
        name: some(name, info.annotation) for name, info in cls.model_fields.items() if info.is_required()
    }
    other = {
        name: info.default * 2 if type(info.default) is int else not info.default
        for name, info in cls.model_fields.items()
        if type(info.default) in (int, bool) and not info.metadata
    }
    for settings in (make(cls, needed, "here"), make(cls, needed | other, "here")):
        path = tmp_path / "imgtool.toml"
        path.write_text(to_toml(settings, command.verb, command.table), encoding="utf-8")
        assert make(cls, table(path, command.verb, command.table), "there") == settings


def test_help_of_every_command_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom imgtool import cli\n"
        f"for words in {[command.words for command in commands()]}:\n"
        "    assert cli.run([*words.split(), '--help']) == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


# --- data ---------------------------------------------------------------------------------------


@names
def test_samples_are_functions_of_their_number(name: str, photographs: Path) -> None:
    settings, batch, held_out = _examples(name, photographs)
    again, held_again = engines.load(name).data(settings)
    for number in (3, 1):
        for part, kept in zip(again[number], batch, strict=True):
            assert torch.equal(part, kept[number])
    assert again[len(again) + 10**6]
    assert len(held_out) == len(held_again) > 0
    other = engines.load(name).data(settings.changed(seed=77))
    for part, kept in zip(other[1][0], held_out[0], strict=True):
        assert torch.equal(part, kept)  # what is validated on does not depend on the seed
    assert not all(torch.equal(part, kept[0]) for part, kept in zip(other[0][0], batch, strict=True))


# --- networks -----------------------------------------------------------------------------------


@networks
def test_a_seed_gives_the_same_weights(case: Case) -> None:
    torch.manual_seed(case.settings.seed)
    again = case.engine.build(case.settings).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in case.net.state_dict().items())


@networks
def test_the_loss_falls_and_gradients_reach_every_weight(case: Case) -> None:
    """Some weights begin at zero, and hold back the gradient of those before them for a step or two."""
    losses = stepped(case, 20)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.7 * losses[0]
    idle = [
        name
        for name, parameter in case.net.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert not idle


@networks
def test_terms_scores_and_samples_have_their_shapes(case: Case) -> None:
    terms = case.engine.loss(case.net, case.batch, case.settings)
    assert all(term.shape == () and term.requires_grad for term in terms.values())
    with torch.inference_mode():
        scores = case.engine.score(case.net.eval(), case.batch)
        samples = case.engine.samples(case.net, case.batch)
    assert case.engine.best in scores
    assert all(score.shape == (4,) and score.isfinite().all() for score in scores.values())
    assert len(samples) >= 2
    for picture in samples.values():
        assert picture.ndim == 4
        assert picture.shape[1] == 3


@networks
def test_scores_are_of_each_image_alone(case: Case) -> None:
    with torch.inference_mode():
        together = case.engine.score(disturbed(case), case.batch)
        for number in range(2):
            alone = type(case.batch)(*(part[number : number + 1] for part in case.batch))
            for name, value in case.engine.score(case.net, alone).items():
                assert float(value[0]) == pytest.approx(float(together[name][number]), abs=0.02)


@networks
def test_weights_saved_and_loaded_give_the_same(case: Case, tmp_path: Path) -> None:
    disturbed(case)
    path = tmp_path / "kept.safetensors"
    checkpoint.save_weights(path, case.engine, case.settings, case.net.state_dict(), {})
    again = checkpoint.network(case.engine, checkpoint.read_weights(path, case.engine.name))
    opened, settings = inputs(case.engine, 21, 34)[0], infer_settings(case.engine)
    one, two = (case.engine.apply(net, opened, settings, Watch()) for net in (case.net.eval(), again))
    assert np.array_equal(one.image, two.image)
    assert one.facts == two.facts


@networks
@pytest.mark.parametrize("size", [(1, 1), (1, 23), (19, 1), (2, 2), (15, 17), (40, 57)])
def test_any_size_and_type(case: Case, size: tuple[int, int]) -> None:
    for opened in inputs(case.engine, *size):
        before = pixels(opened).copy()
        if case.engine.specimen and min(size) < 2:
            with pytest.raises(ImgtoolError, match="less than one of each colour"):
                case.engine.apply(disturbed(case), opened, infer_settings(case.engine), Watch())
            continue
        result = case.engine.apply(disturbed(case), opened, infer_settings(case.engine), Watch())
        assert result.image.shape[:2] == (size[0] * case.engine.scale, size[1] * case.engine.scale)
        assert result.image.shape[2:] in ((3,), ())  # the latter is grey
        assert result.image.dtype == (np.uint8 if case.engine.specimen else before.dtype)
        assert np.isfinite(result.image).all()
        assert np.array_equal(pixels(opened), before)


@networks
def test_tiled_equals_whole_or_is_refused(case: Case) -> None:
    if "tile" not in engines.settings(case.engine.name).Infer.model_fields:
        pytest.skip("the engine cuts nothing")
    facts: TileFacts = case.engine.tiles(disturbed(case))
    edge = max(64, facts.grid)
    opened = inputs(case.engine, 3 * edge + 9, 3 * edge - 19)[-1]
    exact = {"depth": "16"} if case.engine.specimen else {}  # 16 bits: rounding hides little
    whole = case.engine.apply(case.net, opened, infer_settings(case.engine, tile=0, **exact), Watch())
    if not facts.local:
        with pytest.raises(ImgtoolError, match="tiles would change the result") as caught:
            case.engine.apply(case.net, opened, infer_settings(case.engine, tile=edge), Watch())
        assert facts.reason in caught.value.what
        return
    scale = 65535 if exact else 1
    if not exact:
        given = opened.pixels if whole.image.ndim == 3 else opened.pixels[..., 0]
        assert np.abs(whole.image - given).max() > 0.01  # the network does something
    tiled = case.engine.apply(case.net, opened, infer_settings(case.engine, tile=edge, **exact), Watch())
    assert tiled.facts["tiles"] == 12
    apart = np.abs(tiled.image.astype(np.float64) - whole.image).max() / scale
    assert apart < (1.01 / 65535 if exact else 0.05 / 255 / 10)


@networks
def test_progress_is_told(case: Case) -> None:
    told: list[tuple[int, int]] = []
    watch = Watch(done=lambda finished, total: told.append((finished, total)))
    case.engine.apply(case.net.eval(), inputs(case.engine, 30, 30)[0], infer_settings(case.engine), watch)
    assert told[-1][0] == told[-1][1] > 0


@networks
def test_half_precision_works(case: Case) -> None:
    """Bfloat16, as on a GPU: losses are finite, and near to those of float32."""
    case.net.eval()  # what is dropped at random differs
    exact = case.engine.loss(case.net, case.batch, case.settings)
    with torch.autocast("cpu", torch.bfloat16):
        terms = case.engine.loss(case.net, case.batch, case.settings)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert float(term.detach()) == pytest.approx(float(exact[name].detach()), rel=0.05)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@networks
def test_half_precision_weights_are_half_the_size(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    state = case.net.state_dict()
    checkpoint.save_weights(path, case.engine, case.settings, state, {}, half=True)
    assert path.stat().st_size < 0.5 * _bytes(state) + 50_000
