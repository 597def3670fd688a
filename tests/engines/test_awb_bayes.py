"""The Bayesian method: equal to libcamera's arithmetic, written out here in plain loops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from imgtool.engines.awb.bayes import bayes
from imgtool.engines.awb.camera import GENERIC_LOCUS, Camera, Locus
from imgtool.engines.awb.stats import AwbStats
from imgtool.engines.awb.tuning import Parameters, Tuning, write_tuning
from imgtool.errors import USAGE, ImgtoolError

Array = npt.NDArray[Any]
Curve = list[tuple[float, float]]

PRIORS = {
    0: [(2000, 1.0), (3000, 0.0), (13000, 0.0)],
    800: [(2000, 0.0), (6000, 2.0), (13000, 2.0)],
    1500: [(2000, 0.0), (4000, 1.0), (6000, 6.0), (6500, 7.0), (7000, 1.0), (13000, 1.0)],
}
CURVE = [(2850, 0.43, 0.395), (2960, 0.415, 0.43), (3580, 0.377, 0.52), (4560, 0.303, 0.657),
         (5880, 0.28, 0.694), (7600, 0.226, 0.776)]  # fmt: skip


def value(curve: Curve, x: float) -> float:
    """A piecewise linear function, extended at both ends."""
    piece = 0
    while piece < len(curve) - 2 and x >= curve[piece + 1][0]:
        piece += 1
    (x0, y0), (x1, y1) = curve[piece], curve[piece + 1]
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)


def parabola(x: list[float], y: list[float]) -> float:
    ca, ba = (x[2] - x[0], y[2] - y[0]), (x[1] - x[0], y[1] - y[0])
    bottom = 2 * (ba[1] * ca[0] - ca[1] * ba[0])
    if abs(bottom) > 1e-3:
        top = ba[1] * ca[0] ** 2 - ca[1] * ba[0] ** 2
        return max(x[0], min(x[2], top / bottom + x[0]))
    if y[0] < y[2] - 1e-3:
        return x[0]
    return x[2] if y[2] < y[0] - 1e-3 else x[1]


class Slow:
    """libcamera's rpi.awb for one frame."""

    def __init__(self, stats: AwbStats, tuning: Tuning) -> None:
        self.p = p = tuning.parameters
        self.red = list(zip(tuning.curve.ct, tuning.curve.r, strict=True))
        self.blue = list(zip(tuning.curve.ct, tuning.curve.b, strict=True))
        self.priors = [(q.lux, list(zip(q.ct, q.likelihood, strict=True))) for q in tuning.priors]
        self.lux = 400 if stats.lux is None else stats.lux
        self.zones = []
        for colour, share in zip(stats.cells.reshape(-1, 3), stats.coverage.ravel(), strict=True):
            r, g, b = (float(part) * 65535 for part in colour)
            if share >= 0.25 and g >= p.min_G:
                self.zones.append((r * p.sensitivity_r / (g + 1), b * p.sensitivity_b / (g + 1)))
        self.scale = len(self.zones) / stats.coverage.size

    def prior(self, ct: float) -> float:
        level = 0
        if self.lux <= self.priors[0][0]:
            first = last = self.priors[0]
        elif self.lux >= self.priors[-1][0]:
            first = last = self.priors[-1]
        else:
            while self.priors[level + 1][0] < self.lux:
                level += 1
            first, last = self.priors[level], self.priors[level + 1]
        low = min(first[1][0][0], last[1][0][0])
        high = max(first[1][-1][0], last[1][-1][0])
        ct = max(low, min(high, ct))
        one, two = value(first[1], ct), value(last[1], ct)
        share = 0 if first is last else (self.lux - first[0]) / (last[0] - first[0])
        return self.scale * (one + (two - one) * share)

    def cost(self, ct: float, r: float, b: float) -> float:
        total = 0.0
        for red, blue in self.zones:
            across = red / r - 1 - self.p.whitepoint_r
            up = blue / b - 1 - self.p.whitepoint_b
            total += min(across * across + up * up, self.p.delta_limit)
        return total - self.prior(ct)

    def white(self, ct: float) -> tuple[float, float]:
        return value(self.red, ct), value(self.blue, ct)

    def coarse(self, low: float, high: float) -> float:
        ct, x, y = low, [], []
        while True:
            x.append(ct)
            y.append(self.cost(ct, *self.white(ct)))
            if ct == high:
                break
            ct = min(ct + ct / 10 * self.p.coarse_step, high)
        best = y.index(min(y))
        if len(x) < 3:
            return x[best]
        best = max(1, min(best, len(x) - 2))
        return parabola(x[best - 1 : best + 2], y[best - 1 : best + 2])

    def fine(self, ct: float) -> tuple[float, float, float]:
        step = ct / 10 * self.p.coarse_step * 0.1
        (r1, b1), (r0, b0) = self.white(ct + 5 * step), self.white(ct - 5 * step)
        length = math.hypot(r1 - r0, b1 - b0)
        if length**2 < 1e-6:
            return ct, *self.white(ct)
        out = (b1 - b0) / length, (r0 - r1) / length
        reach = self.p.transverse_neg + self.p.transverse_pos
        count = max(3, min(12, math.floor(reach * 100 + 0.5) + 1))
        found: tuple[float, float, float, float] | None = None
        for number in range(-5 - count, 6 + count):
            tried = ct + number * step
            r, b = self.white(tried)
            x = [-self.p.transverse_neg + reach * j / (count - 1) for j in range(count)]
            y = [self.cost(tried, r + out[0] * off, b + out[1] * off) for off in x]
            best = max(1, min(y.index(min(y)), count - 2))
            off = parabola(x[best - 1 : best + 2], y[best - 1 : best + 2])
            r, b = r + out[0] * off, b + out[1] * off
            cost = self.cost(tried, r, b)
            if found is None or cost < found[0]:
                found = cost, tried, r, b
        assert found
        return found[1:]

    def answer(self, low: float, high: float) -> tuple[float, float, float]:
        ct, r, b = self.fine(self.coarse(low, high))
        return ct, r / self.p.sensitivity_r, b / self.p.sensitivity_b


def tuning(**parameters: float) -> Tuning:
    return Tuning("sensor", Locus(*np.array(CURVE).T), parameters=Parameters(**parameters))


TUNINGS = {
    "defaults": tuning(),
    "wide": tuning(transverse_pos=0.034, transverse_neg=0.026),
    "widest": tuning(transverse_pos=0.1, transverse_neg=0.08, delta_limit=0.05),
    "sensitive": tuning(sensitivity_r=0.9, sensitivity_b=1.05, transverse_pos=0.02),
    "aimed": tuning(whitepoint_r=0.05, whitepoint_b=-0.04, coarse_step=0.35, min_G=2000),
    "generic": Tuning("", GENERIC_LOCUS),
}


def greys(light: tuple[float, float], spread: float, seed: int, size: tuple[int, int] = (9, 12)) -> AwbStats:
    """Surfaces about grey under a light."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(0.02, 0.6, (*size, 1))
    colours = level * np.array([light[0], 1, light[1]]) * np.exp(rng.normal(0, spread, (*size, 3)))
    return AwbStats(colours.astype(np.float32), np.ones(size, np.float32))


def leaf(seed: int) -> AwbStats:
    """A green scene with little grey, in which parts are dark, saturated or masked."""
    stats = greys((0.28, 0.7), 0.05, seed)
    cells, coverage = stats.cells.copy(), stats.coverage.copy()
    cells[:7] *= np.float32([0.6, 1.2, 0.4])
    cells[8, :4] = 0
    cells[8, 4] = np.nan
    coverage[7, ::3], coverage[8, 4] = 0.2, 0
    return stats.changed(cells=cells, coverage=coverage, lux=2000.0)


SCENES: dict[str, Callable[[], AwbStats]] = {
    "daylight": lambda: greys((0.28, 0.70), 0.10, 1).changed(lux=5000.0),
    "lamp": lambda: greys((0.42, 0.41), 0.15, 2).changed(lux=30.0),
    "unknown lux": lambda: greys((0.33, 0.60), 0.30, 3),
    "greenish": lambda: greys((0.29, 0.55), 0.12, 4).changed(lux=800.0),
    "off the end": lambda: greys((0.60, 0.25), 0.08, 5).changed(lux=1100.0),
    "one colour": lambda: greys((0.30, 0.68), 0.0, 6).changed(lux=0.0),
    "nothing grey": lambda: greys((3.0, 3.0), 0.1, 7).changed(lux=1500.0),
    "leaf": lambda: leaf(8),
}


KINDS = list(TUNINGS) * 4
"""Each scene has three of the six tunings, and each tuning four scenes."""


@pytest.mark.parametrize(
    ("scene", "kind"), [(name, KINDS[3 * place + k]) for place, name in enumerate(SCENES) for k in range(3)]
)
def test_the_white_is_that_of_the_arithmetic_written_out(scene: str, kind: str) -> None:
    stats, chosen = SCENES[scene](), TUNINGS[kind]
    found = bayes(stats, chosen)
    assert found is not None
    assert found[:3] == pytest.approx(Slow(stats, chosen).answer(2500, 8000), rel=1e-6)


def test_a_range_limits_the_coarse_search() -> None:
    stats = SCENES["daylight"]()
    for text, span in (("tungsten", (3000, 3500)), ("4000,4100", (4000, 4100)), ("4000, 4000", (4000, 4000))):
        found = bayes(stats, tuning(), text)
        assert found is not None
        assert found[:3] == pytest.approx(Slow(stats, tuning()).answer(*span), rel=1e-6)


def test_the_white_of_grey_under_a_light_of_the_curve_is_that_light() -> None:
    chosen = tuning()
    for ct in (2900.0, 6500.0):
        r, b = chosen.locus.at(ct)
        found = bayes(greys((r, b), 0.02, 0, (32, 32)), chosen)
        assert found is not None
        assert found.r == pytest.approx(r, rel=0.03)
        assert found.b == pytest.approx(b, rel=0.03)
        assert found.zones == 1024


def test_sensitivities_give_the_white_in_the_sensors_own_colours() -> None:
    stats = greys((0.3, 0.66), 0.1, 3)
    plain = bayes(stats, tuning())
    dull = stats.changed(cells=stats.cells / np.float32([0.8, 1, 1.25]))
    found = bayes(dull, tuning(sensitivity_r=0.8, sensitivity_b=1.25))
    assert plain is not None
    assert found is not None
    assert found.ct == pytest.approx(plain.ct, rel=1e-5)
    assert (found.r * 0.8, found.b * 1.25) == pytest.approx((plain.r, plain.b), rel=1e-5)


def test_without_a_tuning_the_curve_of_the_frames_camera_serves() -> None:
    locus = Locus(*np.array(CURVE).T)
    stats = greys((0.3, 0.66), 0.1, 3).changed(camera=Camera("c", locus, known=True))
    assert bayes(stats) == bayes(stats, Tuning("c", locus))
    tuned = replace(stats.camera, tuning=TUNINGS["wide"])
    assert bayes(stats.changed(camera=tuned)) == bayes(stats, TUNINGS["wide"])


def test_too_few_zones_have_no_answer() -> None:
    stats = greys((0.3, 0.66), 0.1, 3)
    coverage = np.zeros_like(stats.coverage)
    coverage.ravel()[:10] = 1
    assert bayes(stats.changed(coverage=coverage), tuning()) is None
    coverage.ravel()[:11] = 1
    assert bayes(stats.changed(coverage=coverage), tuning()) is not None
    assert bayes(stats.changed(cells=stats.cells * 0), tuning()) is None


def file_of(path: Path, **awb: Any) -> Path:
    block = {
        "ct_curve": [number for point in CURVE for number in point],
        "priors": [
            {"lux": lux, "prior": [n for pair in prior for n in pair]} for lux, prior in PRIORS.items()
        ],
        "modes": {"auto": {"lo": 2500, "hi": 7700}, "cold": {"lo": 6000, "hi": 8000}},
    }
    ccms = [{"ct": 3000, "ccm": list(range(9))}, {"ct": 5000, "ccm": list(range(2, 11))}]
    told = {
        "version": 2.0,
        "algorithms": [{"rpi.black_level": {}}, {"rpi.awb": block | awb}, {"rpi.ccm": {"ccms": ccms}}],
    }
    path.write_text(json.dumps(told))
    return path


def test_a_tuning_file_is_read(tmp_path: Path) -> None:
    found = Tuning.load(file_of(tmp_path / "imx1.json", sensitivity_r=0.8, transverse_pos=0.03, min_G=40))
    assert found.name == "imx1"
    np.testing.assert_allclose(found.curve.at(3580.0), [0.377, 0.52])
    np.testing.assert_allclose(found.locus.at(3580.0), [0.377 / 0.8, 0.52])
    assert found.parameters == Parameters(sensitivity_r=0.8, transverse_pos=0.03, min_G=40)
    assert found.span() == (2500, 7700)
    assert found.span("cold") == (6000, 8000)
    np.testing.assert_allclose(found.ccm(4500), np.arange(1.5, 10.5).reshape(3, 3))
    np.testing.assert_allclose(found.ccm(1000), np.arange(9).reshape(3, 3))
    np.testing.assert_allclose(found.ccm(9000), np.arange(2, 11).reshape(3, 3))
    stats = SCENES["unknown lux"]()
    answer = bayes(stats, found)
    assert answer is not None
    assert answer[:3] == pytest.approx(Slow(stats, found).answer(2500, 7700), rel=1e-6)


def test_priors_that_the_file_has_are_used(tmp_path: Path) -> None:
    likely = [{"lux": 10, "prior": [2500, 0, 3000, 500, 3500, 0, 9000, 0]}]
    found = bayes(SCENES["daylight"](), Tuning.load(file_of(tmp_path / "a.json", priors=likely)))
    assert found is not None
    assert found.ct == pytest.approx(3000, abs=60)


def test_a_written_tuning_reads_back(tmp_path: Path) -> None:
    write_tuning(GENERIC_LOCUS, tmp_path / "sensor.json")
    found = Tuning.load(tmp_path / "sensor.json")
    for name in ("ct", "r", "b"):
        np.testing.assert_allclose(getattr(found.locus, name), getattr(GENERIC_LOCUS, name), atol=1e-5)
    plain = Tuning("sensor", GENERIC_LOCUS)
    assert (found.priors, found.modes, found.parameters) == (plain.priors, plain.modes, plain.parameters)


@pytest.mark.parametrize(
    ("awb", "part"),
    [
        ({"ct_curve": [3000, 0.4, 0.5]}, "two points or more"),
        ({"ct_curve": [3000, 0.4, 0.5, 4000]}, "groups of 3"),
        ({"ct_curve": [3000, 0.4, 0.5, 2000, 0.3, 0.6]}, "rising"),
        ({"ct_curve": [3000, 0.4, 0.5, 4000, -0.3, 0.6]}, "positive"),
        ({"priors": []}, "priors"),
        ({"priors": [{"lux": 5, "prior": [1, 2, 3]}]}, "prior"),
        ({"priors": [{"prior": [1000, 2, 3000, 4]}]}, "lacks 'lux'"),
        ({"modes": {"auto": {"lo": 5000}}}, "lacks 'hi'"),
        ({"modes": {"auto": {"lo": 5000, "hi": 4000}}}, "lo <= hi"),
        ({"sensitivity_r": 0}, "sensitivity_r must be above 0"),
        ({"delta_limit": None}, "no tuning that can be used"),
    ],
)
def test_a_broken_tuning_is_a_clear_error(tmp_path: Path, awb: dict[str, Any], part: str) -> None:
    with pytest.raises(ImgtoolError) as caught:
        Tuning.load(file_of(tmp_path / "sensor.json", **awb))
    assert part in caught.value.what
    assert "sensor.json" in caught.value.what


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "no JSON"),
        ("[]", "no list of algorithms"),
        ('{"version": 1.0, "algorithms": []}', "version 1.0"),
        ('{"version": 2.0, "algorithms": [{"rpi.ccm": {}}]}', "no rpi.awb"),
        ('{"version": 2.0, "algorithms": [{"rpi.awb": {"bayes": 0}}]}', "no ct_curve"),
    ],
)
def test_what_is_no_tuning_is_a_clear_error(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "sensor.json").write_text(text)
    with pytest.raises(ImgtoolError, match=part):
        Tuning.load(tmp_path / "sensor.json")


def test_a_missing_tuning_and_an_unknown_range_are_errors_of_usage(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match="no such file") as caught:
        Tuning.load(tmp_path / "none.json")
    assert caught.value.code == USAGE
    for text in ("sunny", "5000", "5000,4000", "10,20", "nan,5000"):
        with pytest.raises(ImgtoolError, match="colour temperatures") as caught:
            tuning().span(text)
        assert caught.value.code == USAGE
    with pytest.raises(ImgtoolError, match="no colour matrices"):
        tuning().ccm(5000)
