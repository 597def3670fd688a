"""The model for libcamera: zones to colour temperature, and the tuning that switches it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from imgtool.engines.awb import estimate, features, libcamera, model, port, reading
from imgtool.engines.awb.camera import Camera
from imgtool.engines.awb.settings import Export, Model, Sources
from imgtool.engines.awb.stats import AwbStats
from imgtool.engines.awb.tuning import Tuning
from imgtool.errors import ImgtoolError

CURVE = [2800.0, 0.80, 0.35, 4000.0, 0.60, 0.50, 4800.0, 0.52, 0.56, 6500.0, 0.42, 0.66]
WARM = [1.6, -0.5, -0.1, -0.3, 1.5, -0.2, -0.05, -0.6, 1.65]
COLD = [1.8, -0.6, -0.2, -0.2, 1.6, -0.4, -0.05, -0.4, 1.45]
AWB: dict[str, Any] = {
    "priors": [{"lux": 0, "prior": [2000, 1.0, 3000, 0.0, 13000, 0.0]}],
    "modes": {"auto": {"lo": 2500, "hi": 7700}},
    "bayes": 1,
    "ct_curve": CURVE,
    "sensitivity_r": 1.1,
    "sensitivity_b": 0.9,
    "transverse_pos": 0.03,
    "transverse_neg": 0.02,
}
CCM = {"ccms": [{"ct": 4000, "ccm": WARM}, {"ct": 6000, "ccm": COLD}]}


def tuning(*more: dict[str, Any], target: str = "pisp", awb: str = "rpi.awb") -> dict[str, Any]:
    algorithms = [{"rpi.black_level": {"black_level": 4096}}, {awb: AWB}, *more, {"rpi.ccm": CCM}]
    return {"version": 2.0, "target": target, "algorithms": algorithms}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "imx1.json"
    found.write_text(json.dumps(tuning()))
    return found


def network() -> Any:
    torch.manual_seed(4)
    net = model.build(Model()).eval().requires_grad_(False)
    for part in net.modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(part.weight)
    return net


def ported(path: Path, **values: Any) -> Any:
    return port.port(network(), Export(**{"to": "libcamera", "tuning": path} | values))


def ccm() -> np.ndarray:
    """Return the colour matrix at 5000 K, midway between both."""
    return (np.array(WARM) + np.array(COLD)).reshape(3, 3) / 2


def at(kelvin: float) -> np.ndarray:
    ct, r, b = np.array(CURVE).reshape(-1, 3).T
    return np.array([np.interp(kelvin, ct, r), np.interp(kelvin, ct, b)])


def shown(means: np.ndarray) -> np.ndarray:
    """Do what awb_nn.cpp does with the means of zones, 16 bits, of this tuning."""
    r, b = at(5000)
    canonical = means * [AWB["sensitivity_r"], 1, AWB["sensitivity_b"]] / 65535
    return ((canonical / [r, 1, b]) @ ccm().T).astype(np.float32)[None]


def answered(told: Any, zones: np.ndarray, lux: float) -> float:
    out = told.module(torch.from_numpy(zones), torch.tensor([lux]))
    assert out.shape == (1,)
    return float(out[0])


def scene(seed: int, rows: int = 32, columns: int = 32) -> np.ndarray:
    """Return canonical colours of a scene under a light."""
    rng = np.random.default_rng(seed)
    grey = rng.uniform(0.05, 0.4, (rows // 2, columns // 2, 1))
    patches = (grey * rng.uniform(0.75, 1.25, (rows // 2, columns // 2, 3))).repeat(2, 0).repeat(2, 1)
    light = at(rng.uniform(3000, 6500))
    return patches * [light[0], 1, light[1]]


def estimated(cells: np.ndarray, path: Path, lux: float) -> tuple[float, np.ndarray]:
    """Return the colour temperature and white that the package finds in canonical colours."""
    read = Tuning.load(path)
    camera = Camera("one", read.curve, known=True, tuning=read)
    stats = AwbStats(cells.astype(np.float32), np.ones(cells.shape[:2], np.float32), camera, lux=lux)
    white = estimate.white(network(), stats)
    return read.curve.nearest(white.r, white.b)[0], np.array(white[:2])


@pytest.mark.parametrize("target", ["pisp", "bcm2835"])
def test_it_answers_what_the_package_finds_in_the_same_zones(tmp_path: Path, target: str) -> None:
    path = tmp_path / "imx1.json"
    path.write_text(json.dumps(tuning(target=target)))
    rows, columns = {"pisp": (32, 32), "bcm2835": (12, 16)}[target]
    told, found = ported(path), []
    assert [slot.shape for slot in told.inputs] == [(1, rows, columns, 3), (1,)]
    assert [slot.shape for slot in told.outputs] == [(1,)]
    assert not any(slot.picture for slot in told.inputs)
    for seed, lux in enumerate((20.0, 300.0, 9000.0)):
        cells = scene(seed, rows, columns)
        zones = shown(cells * 65535 / [AWB["sensitivity_r"], 1, AWB["sensitivity_b"]])
        assert 0 < zones.min() < zones.max() < 1
        right, _ = estimated(cells, path, lux)
        found.append(answered(told, zones, lux))
        assert found[-1] == pytest.approx(right, abs=0.5)
    assert np.ptp(found) > 50


def test_clipped_zones_count_as_in_the_statistics_that_networks_learn_from(
    path: Path, tmp_path: Path
) -> None:
    """A PNG of a Raspberry Pi's statistics is clipped before the matrix and after it."""
    cells = scene(7) * 1.2
    cells[:16, :20] *= [12, 12, 3]
    r, b = at(5000)
    clipped = np.clip(np.clip(cells / [r, 1, b], 0, 1) @ ccm().T, 0, 1)
    png = tmp_path / "someone,imx1,1,4000,300,4000.png"
    cv2.imwrite(str(png), np.rint(clipped * 65535).astype(np.uint16)[..., ::-1])
    stats = reading.read(png, png.name, Sources(tuning=path))
    assert 0.05 < (stats.coverage < 1).mean() < 0.6
    white = estimate.white(network(), stats)
    right, _ = Tuning.load(path).curve.nearest(white.r, white.b)
    zones = shown(cells * 65535 / [AWB["sensitivity_r"], 1, AWB["sensitivity_b"]])
    assert zones.max() > 1.5
    told = ported(path)
    assert answered(told, zones, 300) == pytest.approx(right, abs=0.5)
    assert abs(estimated(cells, path, 300)[0] - right) > 100  # what was clipped matters


def test_histograms_are_those_of_numpy(path: Path) -> None:
    cells = scene(3)
    read = Tuning.load(path)
    camera = Camera("one", read.curve, known=True, tuning=read)
    stats = AwbStats(cells.astype(np.float32), np.ones((32, 32), np.float32), camera)
    right = features.histograms(features.points(stats, features.Space.of(camera)))
    zones = shown(cells * 65535 / [AWB["sensitivity_r"], 1, AWB["sensitivity_b"]])
    got = libcamera.Zones(network(), read).double().histograms(torch.from_numpy(zones[0]).double()).numpy()
    assert np.abs(got - right).max() < 2e-3


@pytest.mark.parametrize("value", [0.0, 1.0, -0.2, 5.0])
def test_zones_without_anything_to_measure_give_a_likely_light(path: Path, value: float) -> None:
    kelvin = answered(ported(path), np.full((1, 32, 32, 3), value, np.float32), 0.0)
    assert 2000 < kelvin < 8000


def test_float64_stays_float64_and_made_and_real_inputs_fit(path: Path, tmp_path: Path) -> None:
    told = ported(path)
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), np.random.default_rng(0).integers(20, 200, (40, 60, 3), np.uint8))
    every = [told.made(kind, {}, np.random.default_rng(1)) for kind in ("noise", "flat", "extreme")]
    for arrays in (*every, told.real(photo, {})):
        assert [array.shape for array in arrays] == [slot.shape for slot in told.inputs]
        single = told.module.float()(*map(torch.from_numpy, arrays))
        double = told.module.double()(*(torch.from_numpy(array).double() for array in arrays))
        assert double.dtype == torch.float64
        assert float(single) == pytest.approx(float(double), abs=0.8)


# --- the tuning beside it -----------------------------------------------------------------------------


def switched(path: Path, told: dict[str, Any], **values: Any) -> dict[str, Any]:
    path.write_text(json.dumps(told))
    found: dict[str, Any] = json.loads(ported(path, **values).beside[".tuning.json"])
    return found


def blocks(told: dict[str, Any]) -> dict[str, Any]:
    return {name: block for entry in told["algorithms"] for name, block in entry.items()}


def test_the_tuning_switches_the_network_on_and_the_other_method_off(path: Path) -> None:
    told = switched(path, tuning(), out="some/where/mine.tflite")
    names = ["rpi.black_level", "disable.rpi.awb", "rpi.nn.awb", "rpi.ccm"]
    assert [*blocks(told)] == names
    assert blocks(told)["disable.rpi.awb"] == AWB
    own = blocks(told)["rpi.nn.awb"]
    assert own["model"] == "/usr/share/libcamera/ipa/rpi/pisp/mine.tflite"
    assert own["ccm"] == pytest.approx(ccm().ravel().tolist())
    for name in ("ct_curve", "modes", "sensitivity_r", "sensitivity_b"):
        assert own[name] == AWB[name]
    assert own["enable_nn"] == 1
    assert (told["version"], told["target"]) == (2.0, "pisp")


def test_libcamera_then_stays_on_the_curve(path: Path) -> None:
    """Its transverse search: all zones are at the limit, so the second of its points is taken."""
    own = blocks(switched(path, tuning()))["rpi.nn.awb"]
    low, high = own["transverse_neg"], own["transverse_pos"]
    points = min(max(int((low + high) * 100 + 0.5) + 1, 3), 12)
    assert -low + (low + high) / (points - 1) == pytest.approx(0)
    assert low > 0 < high


@pytest.mark.parametrize("name", ["rpi.nn.awb", "disable.rpi.nn.awb"])
def test_what_a_tuning_says_of_the_network_stays(path: Path, name: str) -> None:
    mine = {
        "enabled": False,
        "speed": 0.2,
        "ct_curve": CURVE,
        "ccm": [0.1] * 9,
        "modes": {"auto": {"lo": 3000, "hi": 7000}},
    }
    own = blocks(switched(path, tuning({name: mine}, target="bcm2835")))["rpi.nn.awb"]
    assert own["enabled"] is True
    assert own["speed"] == 0.2
    assert own["modes"]["auto"]["lo"] == 3000
    assert own["ccm"] == pytest.approx(ccm().ravel().tolist())
    assert own["model"] == "/usr/share/libcamera/ipa/rpi/vc4/awb-hist-libcamera.tflite"


def test_tunings_that_do_not_do(path: Path) -> None:
    for told, words in (
        (tuning(target="rkisp1"), "is for 'rkisp1'"),
        ({**tuning(), "algorithms": tuning()["algorithms"][:2]}, "no colour matrices"),
        ({**tuning(), "algorithms": tuning()["algorithms"][2:]}, "has no rpi.awb"),
    ):
        path.write_text(json.dumps(told))
        with pytest.raises(ImgtoolError, match=words):
            ported(path)
