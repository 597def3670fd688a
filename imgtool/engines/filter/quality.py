"""How near to a classical filter its rivals are, on whole photos with their borders, in 8 bits."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from torch import nn

from imgtool import files, images, samples
from imgtool.engine import Engine, Watch
from imgtool.engines.filter import targets, upsample
from imgtool.engines.filter.settings import Infer
from imgtool.engines.filter.targets import Target
from imgtool.errors import USAGE, ImgtoolError

Floats = npt.NDArray[np.float32]
Picture = npt.NDArray[np.uint8]

NOTHING, CLASSICAL, HALF, QUARTER, LEARNED = "nothing", "classical", "half size", "quarter size", "learned"
SIZES: Mapping[str, float] = {HALF: 0.5, QUARTER: 0.25}
"""The rivals that filter a smaller photo, and how much smaller it is."""
BEST = 100.0
"""dB at which PSNR ends."""
TILE = 256
SHOWN = 2
"""Photos on a sheet."""


class Measured(NamedTuple):
    """How near a result is to the filter's.

    Attributes:
        psnr: In dB, all channels together, at most 100.
        ssim: NaN for less than 11 pixels.
        p999: What 99.9 % of the absolute errors do not exceed, in 1/255.
        f1: Of thin edges; the others are then those of the map before. NaN elsewhere.
    """

    psnr: float
    ssim: float
    p999: float
    f1: float = float("nan")


class Result(NamedTuple):
    """What something makes of a photo: the map, and the finished result."""

    map: npt.NDArray[Any]
    finished: npt.NDArray[Any]


def finished(target: Target, found: Floats) -> Result:
    """Finish a map; float32."""
    return Result(found, target.finish(found) if target.finish else found)


def eight_bit(result: Result) -> Result:
    """Round a result to 8 bits."""
    return Result(*(targets.eight_bit(each) for each in result))


def measured(target: Target, result: Result, truth: Result) -> Measured:
    """Compare 8-bit pixels with the filter's own, in float32."""
    edges = target.metric == "f1"
    one, two = (each.map if edges else each.finished for each in (result, truth))
    first, second = targets.unit(one).astype(np.float64), two.astype(np.float64)
    error = np.abs(first - second)
    psnr = -10 * np.log10(max(float(np.square(error).mean()), 10 ** (-BEST / 10)))
    p999 = round(255 * float(np.quantile(error, 0.999)), 3)  # 8 levels are 8, whatever floats make of them
    matched = f1(result.finished > 127, truth.finished > 0.5) if edges else float("nan")
    return Measured(float(psnr), ssim(first, second), p999, matched)


def f1(found: npt.NDArray[np.bool_], wanted: npt.NDArray[np.bool_], tolerance: int = 1) -> float:
    """Return the F1 score of thin edges, masks ``(H, W)``; 1 where there are none in either.

    An edge pixel counts as right where the other mask has one at most ``tolerance`` pixels away, along
    rows, columns or diagonals.
    """
    if not found.any() and not wanted.any():
        return 1.0
    reach = np.ones((2 * tolerance + 1,) * 2, np.uint8)
    wide, expected = (cv2.dilate(mask.astype(np.uint8), reach) > 0 for mask in (found, wanted))
    precision = (found & expected).sum() / max(found.sum(), 1)
    recall = (wanted & wide).sum() / max(wanted.sum(), 1)
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def ssim(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Return the structural similarity of ``metrics.ssim``, of ``(H, W)`` or ``(H, W, C)`` in 0..1.

    OpenCV does it in a tenth of the time. NaN for less than 11 pixels a side.
    """
    if min(first.shape[:2]) < 11:
        return float("nan")

    def mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.asarray(cv2.GaussianBlur(values, (11, 11), 1.5)[5:-5, 5:-5], np.float64)

    x, y = mean(first), mean(second)
    varied = mean(first * first) + mean(second * second) - x * x - y * y
    together = mean(first * second) - x * y
    c1, c2 = 0.01**2, 0.03**2
    return float(np.mean((2 * x * y + c1) * (2 * together + c2) / ((x * x + y * y + c1) * (varied + c2))))


def grade(values: Sequence[Measured]) -> str:
    """Return how near results are to the filter's.

    "A, within rounding": a mean PSNR of 58.9 dB, what rounding to 8 bits leaves. "B, indistinguishable": a
    mean of 45 dB, at least 40 on every photo, and 99.9 % of the errors of each at most 8/255: what two
    libraries' versions of one filter differ by. "C, good": a mean of 40 dB. "-" is less.
    """
    mean, worst = float(np.mean([each.psnr for each in values])), min(each.psnr for each in values)
    if mean >= 58.9:
        return "A, within rounding"
    if mean >= 45 and worst >= 40 and max(each.p999 for each in values) <= 8:
        return "B, indistinguishable"
    return "C, good" if mean >= 40 else "-"


# --- photos ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network under test.

    Attributes:
        label: What tables call it.
        path: Its weights.
        net: The network, in evaluation mode.
        target: The filter that it imitates.
    """

    label: str
    path: Path
    net: Any
    target: Target


@dataclass(frozen=True)
class Variants:
    """Other forms of the networks.

    Attributes:
        nets: Label of a case to name to network.
        seen: Photos that they were made with, on which they are not measured.
    """

    nets: Mapping[str, Mapping[str, nn.Module]]
    seen: Sequence[Path]


@dataclass
class Compared:
    """What was found of a network and its rivals.

    Attributes:
        target: The filter.
        names: Of the photos.
        found: Method to how near it is on each photo.
        variants: Name to by how many dB the PSNR of another form of the network is above its own, by photo.
        apart: Largest difference of tiles from the whole photo, in levels of 8 bits; None where the network
            may not be cut.
        shown: Of the first photos: photo, classical, learned.
    """

    target: Target
    names: list[str] = field(default_factory=list)
    found: dict[str, list[Measured]] = field(default_factory=dict)
    variants: dict[str, list[float]] = field(default_factory=dict)
    apart: int | None = None
    shown: list[tuple[Picture, Picture, Picture]] = field(default_factory=list)

    def add(self, method: str, result: Result, truth: Result) -> None:
        """Measure a method's result on the next photo."""
        self.found.setdefault(method, []).append(measured(self.target, result, truth))

    def value(self, method: str) -> float:
        """Return the mean F1 of thin edges, else the mean PSNR."""
        return float(np.mean([getattr(each, self.target.metric) for each in self.found[method]]))

    def figures(self) -> dict[str, dict[str, float]]:
        """Return what the record keeps, by method."""
        return {method: _figures(some) for method, some in self.found.items()}

    def changes(self) -> dict[str, float]:
        """Return the mean of ``variants``."""
        return {name: float(np.mean(some)) for name, some in self.variants.items()}

    def per_photo(self) -> dict[str, float]:
        """Return the network's PSNR by photo."""
        return {name: each.psnr for name, each in zip(self.names, self.found[LEARNED], strict=True)}


def _figures(some: Sequence[Measured]) -> dict[str, float]:
    similar = [each.ssim for each in some if np.isfinite(each.ssim)]
    found = {
        "psnr": float(np.mean([each.psnr for each in some])),
        "psnr_worst": min(each.psnr for each in some),
        "ssim": float(np.mean(similar)) if similar else float("nan"),
        "p999_worst": max(each.p999 for each in some),
    }
    edges = [each.f1 for each in some]
    return found | ({"f1": float(np.mean(edges)), "f1_worst": min(edges)} if np.isfinite(edges[0]) else {})


def pictures(folder: Path) -> list[Path]:
    """Return the photos of a folder.

    Raises:
        ImgtoolError: Code 2, where there are none.
    """
    paths = [path for path in samples.pictures_in(folder) if path.suffix.lower() not in files.RAW]
    if not paths:
        raise ImgtoolError(f"no photos in {folder}", "name a folder of photos", USAGE)
    return paths


def on_photos(
    cases: Sequence[Case], paths: Sequence[Path], engine: Engine, lab: Any, variants: Variants
) -> dict[str, Compared]:
    """Measure networks and what else does their work, each classical result being computed once.

    Args:
        cases: The networks.
        paths: The photos.
        engine: The engine.
        lab: Where progress is told.
        variants: Other forms of the networks, measured as well.

    Returns:
        By label of the case.
    """
    found = {case.label: Compared(case.target) for case in cases}
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.target.spec, []).append(case)
    with lab.console.progress(len(paths) * len(groups), "photos") as bar:
        for path in paths:
            photo = images.read_rgb8(path)
            for spec, some in groups.items():
                bar.update(f"{spec}, {path.name}")
                truth, rivals = classical(some[0].target, photo)
                for case in some:
                    each = found[case.label]
                    each.names.append(path.name)
                    for method, result in rivals.items():
                        each.add(method, result, truth)
                    others = variants.nets.get(case.label, {}) if path not in variants.seen else {}
                    _add_learned(each, case, photo, truth, engine, others)
                bar.advance(1)
    return found


def classical(target: Target, photo: Picture) -> tuple[Result, dict[str, Result]]:
    """Return what the filter makes of a photo, and by method its rivals without a network, in 8 bits."""
    truth = finished(target, target.map(photo))
    rivals = {NOTHING: nothing(target, photo, truth)}
    for method, factor in SIZES.items():
        rivals[method] = eight_bit(finished(target, upsample.reduced(target, photo, factor)))
    return truth, rivals


def _add_learned(
    found: Compared,
    case: Case,
    photo: Picture,
    truth: Result,
    engine: Engine,
    others: Mapping[str, nn.Module],
) -> None:
    ours = rendered(case.net, case.target, photo, engine)
    found.add(LEARNED, ours, truth)
    for name, net in others.items():
        other = measured(case.target, rendered(net, case.target, photo, engine), truth)
        found.variants.setdefault(name, []).append(other.psnr - found.found[LEARNED][-1].psnr)
    if case.net.local:
        tiled = infer(case.net, photo, engine, TILE)
        found.apart = max(found.apart or 0, int(cv2.norm(tiled, ours.finished, cv2.NORM_INF)))
    if len(found.shown) < SHOWN:
        found.shown.append((photo, targets.eight_bit(truth.finished), ours.finished))


def nothing(target: Target, photo: Picture, truth: Result) -> Result:
    """Return what doing nothing gives: the photo, or zeros where the map has not three channels."""
    if target.channels == 3:
        return Result(photo, photo)
    return Result(*(np.zeros(each.shape, np.uint8) for each in truth))


def rendered(net: Any, target: Target, photo: Picture, engine: Engine) -> Result:
    """Return what a network makes of a whole photo, in 8 bits; the map only of thin edges."""
    result = infer(net, photo, engine, 0)
    if target.metric != "f1":
        return Result(result, result)
    bare = copy.copy(net)
    bare.target = ""  # so that the map is the result
    return Result(infer(bare, photo, engine, 0), result)


def infer(net: Any, photo: Picture, engine: Engine, tile: int) -> Picture:
    """Return what ``infer`` writes of a photo, ``(H, W)`` or ``(H, W, 3)``."""
    pixels: Picture = engine.apply(net, images.Photo(photo), Infer(inputs=("-",), tile=tile), Watch()).pixels
    return pixels
