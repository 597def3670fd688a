"""A model for libcamera: the zones of a Raspberry Pi's statistics to the colour temperature of the light.

libcamera's ``rpi.nn.awb`` (src/ipa/rpi/controller/rpi/awb_nn.cpp) fills a TFLite model's first input with its
zones, ``(1, rows, columns, 3)``: means of the sensor's R, G, B, white at 1, times the gains of 5000 K of
the tuning's curve, times the colour matrix of 5000 K, not clipped. Its second input is the illuminance
``(1,)`` in lux, its output the colour temperature ``(1,)`` in kelvin. Gains are those of the curve there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtool import files
from imgtool.engines.awb import features
from imgtool.engines.awb.camera import BEYOND, GENERIC, Camera
from imgtool.engines.awb.network import Hist
from imgtool.engines.awb.port import frame, hats, in_bins
from imgtool.engines.awb.reading import CLIPPED_COVERAGE, RENDERED_AT
from imgtool.engines.awb.tuning import LUX, Tuning
from imgtool.errors import USAGE, ImgtoolError
from imgtool.port import Port, Slot

if TYPE_CHECKING:
    from imgtool.engines.awb.settings import Export

Array = npt.NDArray[Any]
Arrays = tuple[Array, ...]

ZONES = {"pisp": (32, 32), "bcm2835": (12, 16)}
"""Rows and columns of the statistics by a tuning's target: Raspberry Pi 5, and those before it."""
TRANSVERSE = 0.01
"""What the tuning says of lights off the curve. libcamera searches them by zones that are not divided by
green, where all are at the limit, so that the second of its points is taken: of three, that on the curve."""
LAST = features.BINS - 1.001
"""Bin that points are kept in, as ``features.histograms`` does."""
FOLDERS = {
    "pisp": "/usr/share/libcamera/ipa/rpi/pisp",
    "bcm2835": "/usr/share/libcamera/ipa/rpi/vc4",
}
"""Where libcamera's own model and tunings lie on a Raspberry Pi, by target."""
CLIPPED = 1e-4
"""How near to 0 or 1 a zone is clipped: beyond what rounding makes of those."""
DARKEST = 1e-5
"""Up to which red, green or blue of a zone is none."""
NN, BAYES = "rpi.nn.awb", "rpi.awb"
OFF = "disable."
"""What is put before the name of an algorithm that libcamera shall pass over."""
TAKEN = ("ct_curve", "modes", "sensitivity_r", "sensitivity_b", "frame_period", "speed")
"""What the network's block takes from the one of the Bayesian method."""
_NUMBERS = re.compile(r"\[[-+.\deE,\s]+\]")

COOLEST, HOTTEST = 2000.0, 10000.0
"""Colour temperatures in kelvin that the model's output is judged by."""


class Zones(nn.Module):
    """All of ``hist`` for one sensor: from libcamera's zones and illuminance to the colour temperature."""

    ccm: Tensor
    back: Tensor
    scale: Tensor
    bins: Tensor
    rows: Tensor
    columns: Tensor
    mired: Tensor
    log_white: Tensor
    log_prior: Tensor
    knots: Tensor
    kelvin: Tensor

    def __init__(self, net: Hist, tuning: Tuning) -> None:
        """Wrap a network.

        Args:
            net: The network.
            tuning: Of the sensor; its curve and matrix undo what libcamera does to zones.
        """
        super().__init__()
        self.net = net
        camera = Camera(tuning.name, tuning.curve, known=True, tuning=tuning)
        space, lights = features.Space.of(camera), features.candidates(camera)
        bins = torch.arange(features.BINS, dtype=torch.float32)
        place = torch.from_numpy(lights.place)
        ends = [tuning.curve.ct[:1] / BEYOND, tuning.curve.ct, tuning.curve.ct[-1:] * BEYOND]
        kelvin = np.concatenate(ends)
        constants: dict[str, Any] = {
            "ccm": tuning.ccm(RENDERED_AT).T,
            "back": np.linalg.inv(tuning.ccm(RENDERED_AT)).T,
            "scale": space.scale,
            "bins": bins,
            "rows": hats(in_bins(place[:, 0]), bins),
            "columns": hats(in_bins(place[:, 1]), bins),
            "mired": features.side(lights, None)[:, 0],
            "log_white": np.log(lights.white),
            "log_prior": lights.prior,
            "knots": tuning.curve.at(kelvin),
            "kelvin": kelvin,
        }
        for name, values in constants.items():
            self.register_buffer(name, torch.as_tensor(np.asarray(values, np.float32)), persistent=False)

    def forward(self, zones: Tensor, lux: Tensor) -> Tensor:
        """Return ``(1,)`` kelvin for ``(1, rows, columns, 3)`` and ``(1,)`` lux."""
        scores = self.net(self.histograms(zones[0])[None])[0, 0]
        seen = (torch.matmul(self.rows, scores) * self.columns).sum(-1)
        bright = torch.log1p(F.relu(lux)) / 10 + torch.zeros_like(self.mired)
        side = torch.stack([self.mired, bright, torch.ones_like(self.mired)], -1)
        logits = seen + self.net.prior(side)[:, 0] + self.log_prior
        shares = torch.softmax(logits, 0)
        return self.nearest((shares[:, None] * self.log_white).sum(0).exp())

    def histograms(self, zones: Tensor) -> Tensor:
        """Return the histograms ``(3, BINS, BINS)`` of zones; see ``features.points``.

        Zones are clipped before and after the matrix, and then count half, as in the statistics that
        networks have learnt from; see ``reading``.
        """
        zones = torch.matmul(torch.matmul(zones, self.back).clamp(0, 1), self.ccm).clamp(0, 1)
        balanced = torch.matmul(zones, self.back)
        inside = ((zones > CLIPPED) & (zones < 1 - CLIPPED)).all(-1)
        counts = (balanced > DARKEST).all(-1)
        level = _mean(balanced[..., 1], counts)
        counts = counts & (balanced[..., 1] > features.DARK * level)
        balanced = torch.where(counts[..., None], balanced, torch.zeros_like(balanced))
        light = balanced.sum(-1)
        mean = (_mean(light, counts) / 3).clamp_min(1e-12)
        share = torch.where(inside, torch.ones_like(light), torch.full_like(light, CLIPPED_COVERAGE))
        weight = torch.where(counts, share, torch.zeros_like(light))
        bright = weight * (light / (3 * mean)).clamp_max(features.BRIGHTEST)
        down, right = (balanced[1:] - balanced[:-1]).abs(), (balanced[:, 1:] - balanced[:, :-1]).abs()
        edges = torch.cat([down.reshape(-1, 3), right.reshape(-1, 3)])
        pairs = torch.cat(
            [
                torch.minimum(weight[1:], weight[:-1]).reshape(-1),
                torch.minimum(weight[:, 1:], weight[:, :-1]).reshape(-1),
            ]
        )
        contrast = pairs * (edges.sum(-1) / mean).clamp_max(features.BRIGHTEST)
        cells = self._hats(balanced.reshape(-1, 3), mean)
        maps = [
            _counted(*cells, weight.reshape(-1)),
            _counted(*cells, bright.reshape(-1)),
            _counted(*self._hats(edges, mean), contrast),
        ]
        return torch.stack(maps)

    def _hats(self, colours: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of colours ``(N, 3)`` in rows and in columns of a histogram, ``(N, BINS)``."""
        logs = torch.maximum(colours, features.FLAT * mean).log()
        places = (in_bins((logs[:, at] - logs[:, 1]) * self.scale[at // 2], LAST) for at in (0, 2))
        row, column = (hats(place, self.bins) for place in places)
        return row, column

    def nearest(self, white: Tensor) -> Tensor:
        """Return the colour temperature ``(1,)`` of the curve's point nearest to a white ``(2,)``.

        Like ``Locus.nearest``; where two pieces are as near, their mean.
        """
        steps, away = self.knots[1:] - self.knots[:-1], white - self.knots[:-1]
        share = ((steps * away).sum(1) / steps.square().sum(1).clamp_min(1e-18)).clamp(0, 1)
        far = (away - share[:, None] * steps).square().sum(1)
        best = (far <= far.min()).to(far.dtype)
        kelvin = self.kelvin[:-1] + share * (self.kelvin[1:] - self.kelvin[:-1])
        return (kelvin * best).sum(0, keepdim=True) / best.sum()


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts, values, torch.zeros_like(values)).sum() / counts.to(
        values.dtype
    ).sum().clamp_min(1)


def _counted(rows: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """Return the histogram of points: the product of their shares, summed; see ``features.histograms``."""
    counted = torch.matmul((rows * weight[:, None]).transpose(0, 1), columns)
    return (counted * (50 / (counted.sum() + 1e-6))).sqrt()


# --- the file and the tuning beside it ---------------------------------------------------------------


def port(net: Hist, settings: Export) -> Port:
    """Return the model for the sensor of a tuning, and its tuning with the model switched on.

    Raises:
        ImgtoolError: Code 2: no tuning is given. Code 1: it has no curve of white points or no colour
            matrices, or is of an unknown target; or as ``Tuning.load``.
    """
    if settings.tuning is None:
        what = (
            "--to libcamera needs the tuning of the sensor, whose curve and colour matrix go into the model"
        )
        raise ImgtoolError(
            what, "give it, such as --tuning /usr/share/libcamera/ipa/rpi/pisp/imx477.json", USAGE
        )
    path = settings.tuning
    tuning, told = Tuning.load(path), json.loads(files.read(path))
    target = told.get("target", "bcm2835")
    if target not in ZONES:
        what = f"{path} is for {target!r}, whose statistics are not known"
        raise ImgtoolError(what, f"give a tuning for {' or '.join(ZONES)}")
    shape = (1, *ZONES[target], 3)
    return Port(
        Zones(net, tuning),
        inputs=(
            Slot(
                "zones", shape, 0, 1,
                "Means of R, G, B of zones, white at 1, times the gains and the colour matrix of 5000 K.",
            ),
            Slot("lux", (1,), 0, 1e5, "Illuminance of the scene in lux."),
        ),
        outputs=(Slot("temperature", (1,), COOLEST, HOTTEST, "Colour temperature of the light in kelvin."),),
        axes={},
        before=_BEFORE,
        after=_AFTER,
        real=lambda path, sizes: _real(tuning, shape, path),
        made=lambda kind, sizes, rng: _made(kind, shape, rng),
        facts={"libcamera": target, "sensor": tuning.name},
        refuse=dict.fromkeys(("fp16", "int8"), "libcamera takes float32, and the model is small"),
        beside={".tuning.json": switched(told, tuning, f"{FOLDERS[target]}/{_name(settings)}")},
    )  # fmt: skip


_BEFORE = """\
libcamera's rpi.nn.awb does all of it: the means of zones, 16 bits, times sensitivity_r and sensitivity_b,
divided by 65535, times 1 / r and 1 / b of ct_curve at 5000 K, times ccm; and the illuminance of rpi.lux."""

_AFTER = """\
libcamera keeps the colour temperature in the range of its mode; the gains are sensitivity_r / r and
sensitivity_b / b of ct_curve there. Copy the model to where "model" in the tuning says, and name the tuning
as in rpicam-still --tuning-file FILE."""


def _name(settings: Export) -> str:
    """Return the name that the model will have."""
    named = Path(settings.out or ".")
    stem = Path(settings.weights or "awb-hist").stem
    return f"{stem}-libcamera.tflite" if named.is_dir() else named.name


def switched(told: Mapping[str, Any], tuning: Tuning, model: str) -> bytes:
    """Return a tuning file with the network switched on and the Bayesian method off, as Raspberry Pi does it.

    Args:
        told: The tuning file.
        tuning: What it says.
        model: Path of the model, as libcamera is to find it.
    """
    bayes, own = _block(told, BAYES), _block(told, NN)
    own = {name: bayes[name] for name in TAKEN if name in bayes} | own
    own |= {
        "model": model,
        "ct_curve": tuning.curve.ct_curve(),
        "ccm": [float(value) for value in tuning.ccm(RENDERED_AT).ravel()],
        "transverse_pos": TRANSVERSE,
        "transverse_neg": TRANSVERSE,
        "enable_nn": 1,
    }
    own |= {"enabled": True} if "enabled" in own else {}
    kept: list[Mapping[str, Any]] = []
    place = None
    for entry in told["algorithms"]:
        if {NN, OFF + NN} & entry.keys():
            continue
        if {BAYES, OFF + BAYES} & entry.keys():
            entry, place = {OFF + BAYES: bayes}, len(kept) + 1
        kept.append(entry)
    kept.insert(len(kept) if place is None else place, {NN: own})
    text = json.dumps({**told, "algorithms": kept}, indent=4)
    return (_NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n").encode()


def _block(told: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the settings of an algorithm, switched on or off; {} where there are none."""
    found = (entry[key] for entry in told["algorithms"] for key in (name, OFF + name) if key in entry)
    return dict(next(found, {}))


# --- inputs ------------------------------------------------------------------------------------------


def rendered(cells: Array, tuning: Tuning, shape: tuple[int, ...], white: Array) -> Array:
    """Return zones as libcamera shows them to the model.

    Args:
        cells: ``(h, w, 3)`` linear colours.
        tuning: Of the sensor.
        shape: Of the zones, ``(1, rows, columns, 3)``.
        white: R/G and B/G of white at 5000 K to the camera of the cells.
    """
    rows, columns = (
        np.arange(wanted) * given // wanted for wanted, given in zip(shape[1:3], cells.shape, strict=False)
    )
    balanced = cells[rows][:, columns] / np.insert(white, 1, 1)
    zones: Array = (balanced @ tuning.ccm(RENDERED_AT).T).astype(np.float32)[None]
    return zones


def _real(tuning: Tuning, shape: tuple[int, ...], path: Path) -> Arrays:
    stats = frame(path)
    lux = np.array([LUX if stats.lux is None else stats.lux], np.float32)
    cells = np.nan_to_num(stats.cells)
    return rendered(cells, tuning, shape, GENERIC.locus.at(RENDERED_AT)), lux


def _made(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Arrays:
    """Make zones: of noise, all alike under faint light, or black, white and beyond in blocks."""
    zones = rng.uniform(0.02, 0.9, shape)
    if kind == "flat":
        zones[:] = 0.2
    if kind == "extreme":
        zones = np.where(rng.random(shape[:3])[..., None] < 0.5, 0.0, rng.uniform(-0.5, 3, shape))
    lux = {"noise": 300.0, "flat": 0.0, "extreme": 1e5}[kind]
    return zones.astype(np.float32), np.array([lux], np.float32)
