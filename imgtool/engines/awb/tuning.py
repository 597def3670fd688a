"""Tuning files of libcamera's Raspberry Pi cameras: curve of white points, priors, modes, colour matrices."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imgtool import files
from imgtool.engines.awb.camera import Camera, Locus, piecewise
from imgtool.errors import USAGE, ImgtoolError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

LUX = 400.0
"""Illuminance that libcamera assumes where it knows none."""

_BLOCKS = ("rpi.awb", "rpi.nn.awb", "disable.rpi.awb", "disable.rpi.nn.awb")
_FROM = "give a tuning file of libcamera for Raspberry Pi, such as src/ipa/rpi/pisp/data/imx477.json"


class Prior(NamedTuple):
    """Log-likelihood of colour temperatures at one illuminance, piecewise linear.

    Attributes:
        lux: Illuminance.
        ct: Kelvin, rising.
        likelihood: Log-likelihood there.
    """

    lux: float
    ct: tuple[float, ...]
    likelihood: tuple[float, ...]

    def at(self, ct: Array) -> Floats:
        """Return the log-likelihood of temperatures, beyond its ends on its last pieces."""
        return piecewise(ct, np.asarray(self.ct, np.float64), np.asarray(self.likelihood, np.float64))


PRIORS = (
    Prior(0, (2000, 3000, 13000), (1, 0, 0)),
    Prior(800, (2000, 6000, 13000), (0, 2, 2)),
    Prior(1500, (2000, 4000, 6000, 6500, 7000, 13000), (0, 1, 6, 7, 1, 1)),
)
"""The priors that libcamera's tuning files of Raspberry Pi cameras share."""

MODES: Mapping[str, tuple[float, float]] = {
    "auto": (2500, 8000),
    "incandescent": (2500, 3000),
    "tungsten": (3000, 3500),
    "fluorescent": (4000, 4700),
    "indoor": (3000, 5000),
    "daylight": (5500, 6500),
    "cloudy": (7000, 8600),
}
"""Their modes: least and largest colour temperature in kelvin."""


class Parameters(NamedTuple):
    """Numbers of libcamera's Bayesian white balance, with its defaults.

    Attributes:
        delta_limit: Largest squared distance from grey that a zone can contribute.
        transverse_pos: How far off the curve is searched, towards larger r and b.
        transverse_neg: How far, towards smaller ones.
        sensitivity_r: Factor that makes this sensor's red that of the sensor of the curve.
        sensitivity_b: The same for blue.
        whitepoint_r: Gained red over green that is aimed at, less 1.
        whitepoint_b: Gained blue over green that is aimed at, less 1.
        min_G: Least green of a zone that counts, white at 65535.
        min_regions: Number of zones that must be exceeded.
        coarse_step: Step of the search along the curve, in tenths of the colour temperature.
    """

    delta_limit: float = 0.2
    transverse_pos: float = 0.01
    transverse_neg: float = 0.01
    sensitivity_r: float = 1.0
    sensitivity_b: float = 1.0
    whitepoint_r: float = 0.0
    whitepoint_b: float = 0.0
    min_G: float = 32.0
    min_regions: float = 10.0
    coarse_step: float = 0.2


DEFAULTS = Parameters()
_POSITIVE = (
    "delta_limit", "transverse_pos", "transverse_neg", "sensitivity_r", "sensitivity_b", "coarse_step",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tuning:
    """What a tuning file says about white balance.

    ``min_pixels`` and ``bias_proportion`` are not taken over: they are about numbers of pixels, and the
    statistics know shares.

    Attributes:
        name: Stem of its file: the sensor.
        curve: White points in the colours of the canonical sensor, for which the curve was measured.
        priors: By rising illuminance, one or more.
        modes: Name to the least and the largest colour temperature that is searched, in kelvin.
        parameters: Those of the Bayesian method.
        ccms: Colour temperature in kelvin to the matrix ``(3, 3)`` from balanced camera colours to sRGB.
    """

    name: str
    curve: Locus
    priors: tuple[Prior, ...] = PRIORS
    modes: Mapping[str, tuple[float, float]] = field(default_factory=lambda: MODES)
    parameters: Parameters = DEFAULTS
    ccms: Mapping[float, Floats] = field(default_factory=dict)

    @cached_property
    def locus(self) -> Locus:
        """The curve in this sensor's own raw colours.

        libcamera multiplies zones by the sensitivities before it looks at the curve, and the gains that
        it finds there too: the gain is sensitivity / r for r on the curve, thus white is r / sensitivity.
        """
        parameters = self.parameters
        red, blue = self.curve.r / parameters.sensitivity_r, self.curve.b / parameters.sensitivity_b
        return Locus(self.curve.ct, red, blue)

    def ccm(self, ct: float) -> Floats:
        """Return the colour matrix ``(3, 3)`` at a temperature in kelvin, interpolated linearly in kelvin.

        Beyond the first and the last it is theirs.

        Raises:
            ImgtoolError: The tuning has no colour matrices.
        """
        if not self.ccms:
            raise ImgtoolError(f"the tuning {self.name} has no colour matrices (rpi.ccm)", _FROM)
        known = sorted(self.ccms)
        place = float(np.interp(ct, known, np.arange(len(known))))
        low, share = int(place), place % 1
        high = min(low + 1, len(known) - 1)
        return (1 - share) * self.ccms[known[low]] + share * self.ccms[known[high]]

    def span(self, ct_range: str = "auto") -> tuple[float, float]:
        """Return the least and the largest colour temperature of a mode, or of "LOW,HIGH", in kelvin.

        "auto" is the first mode where none has that name.

        Raises:
            ImgtoolError: Code 2: no such mode, or no range.
        """
        name = ct_range.strip()
        if name in self.modes:
            return self.modes[name]
        if name == "auto" and self.modes:
            return next(iter(self.modes.values()))
        numbers = re.fullmatch(r"(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)", name)
        if not numbers:
            known = ", ".join(self.modes)
            raise ImgtoolError(
                f"no range of colour temperatures: {ct_range!r}", f"give one of {known}, or LOW,HIGH", USAGE
            )
        low, high = map(float, numbers.groups())
        if not 1000 <= low <= high <= 20000:
            what = f"{ct_range} is no range of colour temperatures"
            raise ImgtoolError(what, "give LOW,HIGH in kelvin, such as 2500,8000", USAGE)
        return low, high

    def likelihood(self, ct: Array, lux: float) -> Floats:
        """Return the log-likelihood of colour temperatures in kelvin, interpolated between the priors.

        Below the lowest illuminance of a prior, and above the highest, it is that prior's; beyond the
        temperatures of the priors it stays as it is at the last one.
        """
        levels = [prior.lux for prior in self.priors]
        place = float(np.interp(lux, levels, np.arange(len(levels))))
        low = min(int(place), max(len(levels) - 2, 0))
        pair = self.priors[low : low + 2] if place % 1 else self.priors[int(place) : int(place) + 1]
        kept = np.clip(ct, min(prior.ct[0] for prior in pair), max(prior.ct[-1] for prior in pair))
        first, last = pair[0].at(kept), pair[-1].at(kept)
        found: Floats = first + (last - first) * (place - low)
        return found

    @classmethod
    def of(cls, camera: Camera) -> Tuning:
        """Return a camera's tuning; without one, its curve with libcamera's defaults."""
        return camera.tuning or cls(camera.name, camera.locus)

    @classmethod
    def load(cls, path: Path) -> Tuning:
        """Read a tuning file, version 2.

        Args:
            path: JSON, as in libcamera's src/ipa/rpi/pisp/data and vc4/data.

        Raises:
            ImgtoolError: Code 2 where there is no such file; code 1 where it is no such tuning, or has
                no curve of white points.
        """
        blocks = _blocks(files.read(path), path)
        named = [blocks[name] for name in _BLOCKS if name in blocks]
        if not named:
            raise ImgtoolError(f"{path} has no rpi.awb: it says nothing about white balance", _FROM)
        awb = next((block for block in named if "ct_curve" in block), None)
        if awb is None:
            hint = "this sensor was never calibrated, or is monochrome; give another tuning"
            raise ImgtoolError(f"{path} has no ct_curve", hint)
        try:
            return _tuning(path.stem, awb, blocks.get("rpi.ccm", {}))
        except (TypeError, KeyError, ValueError, AttributeError) as fault:
            raise ImgtoolError(f"{path} is no tuning that can be used: {_said(fault)}", _FROM) from None


def _said(fault: Exception) -> str:
    return f"it lacks {fault.args[0]!r}" if isinstance(fault, KeyError) else str(fault)


def _blocks(data: bytes, path: Path) -> dict[str, Any]:
    """Return the algorithms of a tuning file by name."""
    try:
        told = json.loads(data)
    except ValueError as fault:
        raise ImgtoolError(f"{path} is no JSON: {fault}", _FROM) from None
    if not isinstance(told, dict) or not isinstance(told.get("algorithms"), list):
        raise ImgtoolError(f"{path} is no libcamera tuning: it has no list of algorithms", _FROM)
    if told.get("version") not in (2, 2.0):
        hint = "libcamera's utils/raspberrypi/ctt/convert_tuning.py makes version 2 of older files"
        raise ImgtoolError(f"{path} is a tuning of version {told.get('version')}, not 2", hint)
    return {
        name: block
        for entry in told["algorithms"]
        if isinstance(entry, dict)
        for name, block in entry.items()
        if isinstance(block, dict)
    }


def _tuning(name: str, awb: Mapping[str, Any], ccm: Mapping[str, Any]) -> Tuning:
    curve = _numbers(awb["ct_curve"], 3, "ct_curve")
    priors = tuple(_prior(prior) for prior in awb["priors"]) if "priors" in awb else PRIORS
    if not priors or any(one.lux >= two.lux for one, two in pairwise(priors)):
        raise ValueError("priors must be in the order of their lux")
    modes = _modes(awb["modes"]) if "modes" in awb else MODES
    return Tuning(name, Locus(*curve.T), priors, modes, _parameters(awb), _matrices(ccm))


def _modes(told: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    modes = {mode: (float(span["lo"]), float(span["hi"])) for mode, span in told.items()}
    if not modes or any(not 0 < low <= high for low, high in modes.values()):
        raise ValueError("modes must have 0 < lo <= hi")
    return modes


def _numbers(values: Sequence[float], width: int, what: str) -> Floats:
    """Return a flat list as ``(N, width)``, N >= 1."""
    flat = np.asarray(values, np.float64)
    if flat.ndim != 1 or not flat.size or flat.size % width or not np.isfinite(flat).all():
        raise ValueError(f"{what} takes numbers in groups of {width}")
    return flat.reshape(-1, width)


def _prior(told: Mapping[str, Any]) -> Prior:
    ct, likelihood = _numbers(told["prior"], 2, "prior").T
    if len(ct) < 2 or (np.diff(ct) <= 0).any():
        raise ValueError("a prior takes two temperatures or more, rising")
    return Prior(float(told["lux"]), tuple(ct.tolist()), tuple(likelihood.tolist()))


def _parameters(awb: Mapping[str, Any]) -> Parameters:
    found = Parameters(**{name: float(awb[name]) for name in Parameters._fields if name in awb})
    for name in _POSITIVE:
        if not getattr(found, name) > 0:
            raise ValueError(f"{name} must be above 0")
    return found


def _matrices(ccm: Mapping[str, Any]) -> dict[float, Floats]:
    return {float(told["ct"]): _numbers(told["ccm"], 9, "ccm").reshape(3, 3) for told in ccm.get("ccms", ())}


def write_tuning(locus: Locus, path: Path, target: str = "pisp") -> None:
    """Write a curve of white points as a minimal tuning file, with libcamera's usual priors and modes.

    Args:
        locus: In the sensor's own raw colours.
        path: JSON file to write.
        target: Platform: "pisp" (Raspberry Pi 5) or "bcm2835" (before it).

    Raises:
        ImgtoolError: The file cannot be written.
    """
    priors = [
        {"lux": prior.lux, "prior": [*chain(*zip(prior.ct, prior.likelihood, strict=True))]}
        for prior in PRIORS
    ]
    awb = {
        "priors": priors,
        "modes": {mode: {"lo": low, "hi": high} for mode, (low, high) in MODES.items()},
        "bayes": 1,
        "ct_curve": [round(value, 5) for value in locus.ct_curve()],
        "sensitivity_r": 1.0,
        "sensitivity_b": 1.0,
        "transverse_pos": DEFAULTS.transverse_pos,
        "transverse_neg": DEFAULTS.transverse_neg,
    }
    told = {"version": 2.0, "target": target, "algorithms": [{"rpi.awb": awb}]}
    files.write(path, (json.dumps(told, indent=4) + "\n").encode())
