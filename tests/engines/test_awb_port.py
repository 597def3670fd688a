"""What files of the awb networks hold, and how they are read back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imgtool.engines.awb import apply, estimate, exported, features, model, port
from imgtool.engines.awb.settings import Export, Infer, Model
from imgtool.engines.awb.stats import AwbStats, of_linear
from imgtool.errors import FAILED, USAGE, ImgtoolError
from imgtool.export import npz
from imgtool.export.order import Order
from imgtool.port import Slot

HIST = Model()
SMALL = Model(arch="deepawb", channels="4,6,8", neurons=40, layers=2, height=48, width=64)


def network(shape: Model = HIST) -> Any:
    """Return a network whose answers differ from frame to frame."""
    torch.manual_seed(5)
    net = model.build(shape).eval().requires_grad_(False)
    for part in net.modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(part.weight)
    return net


def ported(shape: Model = HIST, **values: Any) -> Any:
    return port.port(network(shape), Export(**{"to": "onnx"} | values))


def frame(seed: int = 0) -> AwbStats:
    rng = np.random.default_rng(seed)
    patches = rng.uniform(0.01, 0.9, (18, 27, 3)) * rng.uniform(0.3, 1, 3)
    pixels = (16_000 * patches.repeat(8, 0).repeat(8, 1)).astype(np.uint16)
    pixels[:40, :50], pixels[60:90, 60:90] = 16_383, 20
    return of_linear(pixels, 0, 16_383)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(3).integers(100, 60_000, (48, 64, 3)).astype(np.uint16)
    cv2.imwrite(str(path), cv2.GaussianBlur(pixels, (0, 0), 3))
    return path


# --- what is computed ---------------------------------------------------------------------------------


def test_the_whole_of_hist_is_what_training_computes_with_grid_sample() -> None:
    net = network().double()
    rng = np.random.default_rng(0)
    for count, lights in ((1, 360), (3, 5)):
        inputs = [rng.random((count, 3, 32, 32)), rng.uniform(-2, 2, (count, lights, 2))]
        inputs += [rng.normal(size=(count, lights, 3)), rng.uniform(-2, 0, (count, lights))]
        inputs[1][0, :4] = [[-1.4, 1.4], [1.4, 1.4], [0, 0], [-9, 9]]
        given = x, place, side, prior = [torch.from_numpy(each) for each in inputs]
        grid = (place / 1.4).flip(-1)[:, None]
        seen = F.grid_sample(net(x), grid, padding_mode="border", align_corners=True)[:, 0, 0]
        right = F.log_softmax(seen + net.prior(side)[..., 0] + prior, -1)
        got = port.Whole(net).double()(*given)
        assert got.dtype == torch.float64
        assert torch.allclose(got, right, atol=1e-12)
        assert float(np.ptp(right.numpy())) > 0.1
        single = [each.float() for each in given]
        assert torch.allclose(network().log_posterior(*single), right.float(), atol=1e-4)


@pytest.mark.parametrize("shape", [HIST, SMALL], ids=["hist", "deepawb"])
@pytest.mark.parametrize("kind", ["noise", "flat", "extreme"])
def test_made_inputs_have_the_lengths_asked_for_and_give_finite_answers(shape: Model, kind: str) -> None:
    told = ported(shape)
    sizes = {"batch": 2, "lights": 11}
    arrays = told.made(kind, sizes, np.random.default_rng(0))
    again = told.made(kind, sizes, np.random.default_rng(0))
    for slot, array, same in zip(told.inputs, arrays, again, strict=True):
        assert array.shape == tuple(sizes.get(word, word) for word in slot.shape)
        assert array.dtype == np.float32
        assert np.array_equal(array, same)
        assert slot.low * 1.5 - 0.1 <= array.min() <= array.max() <= slot.high * 1.5 + 0.1
    out = told.module(*map(torch.from_numpy, arrays)).numpy()
    assert np.isfinite(out).all()


@pytest.mark.parametrize("shape", [HIST, SMALL], ids=["hist", "deepawb"])
def test_real_inputs_are_those_of_the_photo(shape: Model, photo: Path) -> None:
    told = ported(shape)
    arrays = told.real(photo, {"batch": 2, "lights": 360})
    expected = estimate.inputs(shape, port.frame(photo))
    for array, one in zip(arrays, expected, strict=True):
        assert len(array) == 2
        assert np.array_equal(array[0], one)
    assert not np.array_equal(arrays[0][0], arrays[0][1])
    if shape is HIST:
        more = told.real(photo, {"batch": 1, "lights": 721})
        assert more[1].shape == (1, 721, 2)
        assert np.array_equal(more[3][0, 360:720], more[3][0, :360])


def on_curve(kelvin: float, curve: list[float]) -> np.ndarray:
    ct, r, b = np.array(curve).reshape(-1, 3).T
    piece = int(np.clip(np.searchsorted(ct, kelvin, "right") - 1, 0, len(ct) - 2))
    share = (kelvin - ct[piece]) / (ct[piece + 1] - ct[piece])
    return np.maximum([c[piece] + share * (c[piece + 1] - c[piece]) for c in (r, b)], 0.01)


def counted(stats: AwbStats, origin: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Follow the steps 1 and 3 to 5 in plain loops."""
    cells, coverage = stats.cells.astype(np.float64), stats.coverage
    counts = (coverage >= 0.25) & (cells > 0).all(2)
    counts &= cells[..., 1] > 0.01 * cells[counts][:, 1].mean()
    cells = cells / np.exp([origin[0], 0, origin[1]])
    mean = cells[counts].sum(1).mean() / 3
    maps = np.zeros((3, 32, 32))

    def add(which: int, colour: np.ndarray, weight: float) -> None:
        logs = np.log(np.maximum(colour, 0.002 * mean))
        u, v = np.clip((scale * (logs[[0, 2]] - logs[1]) + 1.4) * 31 / 2.8, 0, 30.999)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            share = (1 - abs(u - (int(u) + i))) * (1 - abs(v - (int(v) + j)))
            maps[which, int(u) + i, int(v) + j] += share * weight

    for y, x in np.argwhere(counts):
        add(0, cells[y, x], coverage[y, x])
        add(1, cells[y, x], coverage[y, x] * min(cells[y, x].sum() / (3 * mean), 4))
        for other in ((y + 1, x), (y, x + 1)):
            if other[0] < len(counts) and other[1] < len(counts[0]) and counts[other]:
                edge = np.abs(cells[other] - cells[y, x])
                share = min(coverage[y, x], coverage[other])
                add(2, edge, share * min(edge.sum() / mean, 4))
    return np.sqrt(50 * maps / (maps.sum((1, 2), keepdims=True) + 1e-6))


def by_the_words(stats: AwbStats, curve: list[float], run: Any) -> tuple[float, float]:
    """Follow ``before`` and ``after`` step by step, as a stranger would."""
    origin = np.log(on_curve(5000, curve))
    length = np.log(on_curve(7500, curve)) - np.log(on_curve(3000, curve))
    scale = 0.65 / np.maximum(np.abs(length), 0.1)
    mired = np.linspace(1e6 / 9000, 1e6 / 2400, 40)
    on = np.array([(np.log(on_curve(1e6 / each, curve)) - origin) * scale for each in mired])
    place, side, prior = [], [], []
    for number in range(40):
        low, up = max(number - 1, 0), min(number + 1, 39)
        way = (on[up] - on[low]) / (up - low)
        across = np.array([-way[1], way[0]]) / np.hypot(*way)
        for offset in np.arange(-2, 2.25, 0.5):
            place.append(on[number] + offset * 0.25 * across)
            side.append([mired[number] / 200 - 1.3, 0, 0])
            prior.append(-0.5 * offset**2)
    p = np.exp(run(counted(stats, origin, scale), np.array(place), np.array(side), np.array(prior)))
    white = np.exp((p / p.sum()) @ (np.array(place) / scale + origin))
    return float(white[0]), float(white[1])


def test_a_stranger_who_follows_the_words_finds_the_same_gains() -> None:
    told, net, found = ported(), network(), []

    def run(*given: np.ndarray) -> np.ndarray:
        tensors = [torch.from_numpy(each[None].astype(np.float32)) for each in given]
        answer: np.ndarray = told.module(*tensors)[0].numpy().astype(np.float64)
        return answer

    for seed in range(2):
        stats = frame(seed)
        found.append(by_the_words(stats, np.ravel(told.facts["generic_curve"]).tolist(), run))
        r, b, _ = estimate.white(net, stats)
        assert (r, b) == pytest.approx(found[-1], rel=2e-4)
    assert abs(found[0][0] - found[1][0]) > 1e-3
    for word in ("0.25", "1536", "0.002", "0.65", "30.999", "1.4", "2.8", "40 evenly", "0.05", "0.98"):
        assert word in told.before
    assert "below a confidence of 0.2" in told.after
    assert "26 lights evenly in mired from 2000 to 12000 K" in told.before


def test_eight_bits_are_judged_by_the_angle_between_gains() -> None:
    loss = ported(SMALL).loss
    one, two = np.array([[1.0, 1.0], [0.5, 0.8]]), np.array([[1.0, 1.0], [0.5, 1.0]])
    a, b = np.array([2, 1, 1.25]), np.array([2, 1, 1.0])
    expected = math.degrees(math.acos(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
    assert loss.of([one], [two]) == pytest.approx(expected)
    assert not loss.higher_is_better
    whole = ported().loss
    lights = features.candidates(port.GENERIC)
    sharp = np.full((1, 360), -50.0)
    first, second = sharp.copy(), sharp.copy()
    first[0, 4], second[0, 4 + 9] = 0, 0
    a, b = (np.array([1 / w[0], 1, 1 / w[1]]) for w in lights.white[[4, 13]])
    expected = math.degrees(math.acos(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
    assert whole.of([first], [first]) == pytest.approx(0, abs=1e-4)
    assert whole.of([first], [second]) == pytest.approx(expected, rel=1e-3)


# --- files as weights ---------------------------------------------------------------------------------


def about(shape: Model, told: Any, **values: Any) -> dict[str, Any]:
    plain = {"format": "imgtool-export/1", "engine": "awb", "model": shape.model_dump(), "facts": told.facts}
    return json.loads(json.dumps(plain)) | values


def archive(path: Path, shape: Model, **values: Any) -> Path:
    told = ported(shape)
    npz.write(Order(told, {}, frozenset(), about(shape, told, **values)), path)
    return path


@pytest.mark.parametrize("shape", [HIST, SMALL], ids=["hist", "deepawb"])
def test_an_archive_is_weights_without_torch(shape: Model, tmp_path: Path) -> None:
    path = archive(tmp_path / "w.npz", shape)
    net = apply.prepare(path, Infer(inputs=("x",)))
    stats = frame(1)
    assert estimate.white(net, stats)[:2] == pytest.approx(
        estimate.white(network(shape), stats)[:2], rel=1e-5
    )
    assert net.parameters == sum(each.numel() for each in network(shape).parameters())
    with np.load(path) as archived:
        arrays = {name: archived[name] for name in archived.files}
    run = exported.archived(json.loads(arrays.pop("imgtool").tobytes()), arrays)
    given = ported(shape).made("noise", {"batch": 2, "lights": 9}, np.random.default_rng(0))
    right = ported(shape).module(*map(torch.from_numpy, given)).numpy()
    assert np.allclose(run(*given)[0], right, atol=1e-4)


def lengths(slot: Slot) -> tuple[int | None, ...]:
    """Return the shape of a slot in a file whose axes are free."""
    return tuple(None if isinstance(word, str) else word for word in slot.shape)


class Runtime:
    """A file that a runtime runs, in its stead."""

    def __init__(self, shape: Model, **values: Any) -> None:
        told = ported(shape)
        self.path, self.about = Path("model.onnx"), about(shape, told, **values)
        self.inputs, self.outputs = (
            tuple(SimpleNamespace(name=slot.name, shape=lengths(slot)) for slot in slots)
            for slots in (told.inputs, told.outputs)
        )
        self.module = told.module

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        return [self.module(*map(torch.from_numpy, arrays)).numpy()]


@pytest.mark.parametrize("shape", [HIST, SMALL], ids=["hist", "deepawb"])
def test_a_file_of_a_runtime_is_weights(shape: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: Any = Runtime(shape)
    monkeypatch.setattr(exported.runtime, "open", lambda path: loaded)
    net = apply.prepare(Path("model.onnx"), Infer(inputs=("x",)))
    stats = frame(2)
    assert estimate.white(net, stats)[:2] == pytest.approx(
        estimate.white(network(shape), stats)[:2], rel=1e-5
    )


def refused(call: Any, *given: Any) -> ImgtoolError:
    with pytest.raises(ImgtoolError) as caught:
        call(*given)
    return caught.value


def test_files_that_are_no_weights_of_this_engine_are_refused(tmp_path: Path) -> None:
    other = archive(tmp_path / "other.npz", HIST, engine="isp")
    fault = refused(exported.opened, other)
    assert fault.what == f"{other} holds weights of the isp engine, not of awb"
    assert fault.code == USAGE
    assert "imgtool infer isp" in fault.hint
    alien = tmp_path / "alien.npz"
    np.savez(alien, a=np.zeros(3))
    assert "was not written by imgtool" in refused(exported.opened, alien).what
    np.save(tmp_path / "alone.npy", np.zeros(3))
    for content in (b"", b"PK\x03\x04nonsense", (tmp_path / "alone.npy").read_bytes()):
        alien.write_bytes(content)
        fault = refused(exported.opened, alien)
        assert (fault.code, "not a readable archive" in fault.what) == (FAILED, True)
    np.savez(alien, a=np.array(["words"]))
    assert "not a readable archive" in refused(exported.opened, alien).what
    for said in (b"[1]", b"3", b"null"):
        np.savez(alien, imgtool=np.frombuffer(said, np.uint8))
        assert "was not written by imgtool" in refused(exported.opened, alien).what
    nothing: Any = Runtime(HIST)
    nothing.about = {}
    fault = refused(exported.ported, nothing)
    assert (fault.code, "imgtool export awb" in fault.hint) == (FAILED, True)
    libcamera: Any = Runtime(HIST)
    libcamera.inputs = (SimpleNamespace(name="zones"), SimpleNamespace(name="lux"))
    assert "libcamera" in refused(exported.ported, libcamera).what


@pytest.mark.parametrize("shape", [HIST, SMALL], ids=["hist", "deepawb"])
def test_an_archive_whose_arrays_are_not_those_of_its_network_is_refused(
    shape: Model, tmp_path: Path
) -> None:
    path = archive(tmp_path / "w.npz", shape)
    with np.load(path) as found:
        every = {name: found[name] for name in found.files}
    said = {name: every[name] for name in every if name == "imgtool"}
    first = next(name for name in every if name.endswith(".weight"))
    damaged = [
        said,
        {name: values for name, values in every.items() if not name.endswith(".2.bias")},
        every | {first: every[first][:, :2]},
        every | {first: np.zeros((0, *every[first].shape[1:]), np.float32)},
        every | {first: np.float32(3)},
    ]
    for arrays in damaged:
        np.savez(path, **arrays)
        fault = refused(exported.opened, path)
        assert fault.code == FAILED
        assert f"{path} is damaged: " in fault.what
    np.savez(path, **every | {first: every[first] * np.float32("nan")})
    assert "not finite" in refused(estimate.white, exported.opened(path), frame(1)).what


@pytest.mark.parametrize("strides", ["1,2", "a,b,c", "0,1,1", "1,2,-2", ""])
def test_an_archive_that_says_nonsense_of_its_network_is_refused(strides: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "w.npz", SMALL, model=SMALL.model_dump() | {"strides": strides})
    assert "is damaged" in refused(exported.opened, path).what


def test_a_file_whose_inputs_or_outputs_are_not_those_of_its_network_is_refused() -> None:
    for place, wrong in ((0, (None, 3, 32, 31)), (1, (None, None)), (3, ())):
        loaded: Any = Runtime(HIST)
        inputs = list(loaded.inputs)
        inputs[place] = SimpleNamespace(name=inputs[place].name, shape=wrong)
        loaded.inputs = tuple(inputs)
        fault = refused(exported.ported, loaded)
        assert (fault.code, "model.onnx has an input of" in fault.what) == (FAILED, True)
    loaded = Runtime(HIST)
    loaded.outputs *= 2
    assert "has 2 outputs, not 1" in refused(exported.ported, loaded).what


def test_a_runtime_that_is_not_the_files_is_refused(tmp_path: Path) -> None:
    fault = refused(apply.prepare, tmp_path / "a.npz", Infer(inputs=("x",), runtime="torch"))
    assert fault.code == USAGE
    assert "--runtime torch does not run" in fault.what


def test_libcamera_needs_a_tuning_and_histograms() -> None:
    fault = refused(port.port, network(), Export(to="libcamera"))
    assert (fault.code, "needs the tuning" in fault.what) == (USAGE, True)
    fault = refused(port.port, network(SMALL), Export(to="libcamera", tuning=Path("imx477.json")))
    assert (fault.code, "sees no zones" in fault.what) == (USAGE, True)
