"""What ``imgtool data check`` and ``stats`` do for the isp engine: look at every pair of a folder.

Pairs are looked at as training takes them: the same layouts, levels and sizes.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from imgtool import files, images, plots
from imgtool.engine import Watch
from imgtool.engines.isp import bayer, layouts
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.engines.isp.settings import Check, Stats
    from imgtool.mosaic import Mosaic

Floats = npt.NDArray[np.float64]

ALIGNED = 200
"""Pairs whose alignment is measured, evenly over all of them."""

WINDOW = 512
"""Largest edge, in pixels, of the middle of a pair that its alignment is measured in."""

CLEAR = 0.05
"""Least response of the phase correlation for a shift to count: below, there is nothing to see."""

FEWEST = 5
"""Least number of shifts whose median says something of a whole folder."""

FAR = 0.75
"""Median shift, in pixels, from which on the photographs do not belong to the pixels of the mosaics."""

DARK = 0.001
"""Share of the pixels below which the black level is looked for."""

BELOW = 0.02
"""By how much of the range that share may lie below black: noise does."""

DRAWN = 500
"""Pairs that the plots are made of, evenly over all of them."""

PIXELS = 400
"""Pixels of a plane of a pair in the plots."""

PLANES = ("R", "Gr", "Gb", "B")


def green(frame: Mosaic) -> npt.NDArray[np.float32]:
    """Return the green of a mosaic ``(H, W)``, as it lies: 0 black, 1 white; between, the mean of four."""
    height, width = frame.values.shape
    down, right = bayer.phase(frame.pattern)
    rows, columns = bayer.aligned_size(frame)
    values = bayer.window(frame, (-2, rows + 2), (-2, columns + 2))
    values[::2, ::2] = 0
    values[1::2, 1::2] = 0
    inside = values[1:-1, 1:-1] + 0.25 * (
        values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:]
    )
    found: npt.NDArray[np.float32] = inside[1 + down : 1 + down + height, 1 + right : 1 + right + width]
    return found


def shift(frame: Mosaic, target: layouts.Picture) -> tuple[float, float] | None:
    """Return by how many pixels a photograph lies right of and below its mosaic.

    Phase correlation (Kuglin and Hines, 1975) of the greens in the middle of the pair.

    Args:
        frame: The mosaic.
        target: ``(H, W, 3)`` of the same size.

    Returns:
        Across and down; None where there is nothing to tell it by.
    """
    height, width = (min(side, WINDOW) for side in frame.values.shape)
    top, left = ((side - part) // 2 for side, part in zip(frame.values.shape, (height, width), strict=True))
    middle = layouts.within(frame, (top, left, height, width))
    first = np.sqrt(np.clip(green(middle), 0, 1))
    second = images.to_float(target[top : top + height, left : left + width, 1])
    if min(first.std(), second.std()) < 1e-3:
        return None
    window = cv2.createHanningWindow((width, height), cv2.CV_32F)
    plain = [each - np.float32(each.mean()) for each in (first, second)]
    (across, down), response = cv2.phaseCorrelate(plain[0], plain[1], window)
    return (float(across), float(down)) if response >= CLEAR else None


class Levels(NamedTuple):
    """What a mosaic holds beside what it is read with, in its own numbers.

    Attributes:
        path: Its file.
        least: Least value.
        dark: The value that ``DARK`` of the pixels lie below.
        largest: Largest value.
        black: Least level of black.
        white: Level of white.
    """

    path: Path
    least: float
    dark: float
    largest: float
    black: float
    white: float

    @property
    def low(self) -> bool:
        """Whether there is more below black than noise explains."""
        return self.dark < self.black - BELOW * (self.white - self.black)


def levels(path: Path, frame: Mosaic) -> Levels:
    """Look at a mosaic's values."""
    values = frame.values
    dark = float(np.quantile(values, DARK, method="nearest"))
    return Levels(path, float(values.min()), dark, float(values.max()), min(frame.black), frame.white)


@dataclass
class _Findings:
    """What was found, pair by pair."""

    faults: list[str] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    sizes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    cameras: Counter[str] = field(default_factory=Counter)
    seen: dict[bytes, tuple[str, Path]] = field(default_factory=dict)
    duplicates: int = 0
    stated: list[Levels] = field(default_factory=list)
    shifts: list[tuple[float, float]] = field(default_factory=list)

    def take(self, each: layouts.Files, measured: bool) -> None:
        """Look at one pair."""
        count = self.counts.setdefault(each.facts.split or "pairs", Counter(mosaics=0, pairs=0, usable=0))
        count["mosaics"] += 1
        count["pairs"] += each.rgb is not None
        self.kinds[each.facts.layout.name] += 1
        try:
            self._unique(each)
            frame, target = layouts.read_pair(each)
        except ImgtoolError as fault:
            self.faults.append(fault.what)
            return
        count["usable"] += target is not None
        self.sizes[f"{frame.values.shape[1]}x{frame.values.shape[0]}"] += 1
        self.cameras[frame.camera or "unknown"] += 1
        if each.facts.layout.black is not None:
            self.stated.append(levels(each.raw, frame))
        found = shift(frame, target) if measured and target is not None else None
        self.shifts += [found] if found else []

    def _unique(self, each: layouts.Files) -> None:
        digest = hashlib.sha256(files.read(each.raw)).digest()
        split, path = self.seen.setdefault(digest, (each.facts.split, each.raw))
        if path == each.raw:
            return
        self.duplicates += 1
        if split != each.facts.split:
            self.faults.append(f"{each.raw}: the same as {path}, of another split")

    def of_levels(self) -> list[str]:
        """Return the faults of levels, one for each kind."""
        above = [each for each in self.stated if each.largest > each.white]
        low = [each for each in self.stated if each.low]
        return [
            f"{each.path}: values to {each.largest:g}, above white {each.white:g}; {len(above)} such mosaics"
            for each in above[:1]
        ] + [
            f"{each.path}: values below black {each.black:g}, from {each.least:g}; {len(low)} such mosaics"
            for each in low[:1]
        ]

    def of_alignment(self) -> list[str]:
        """Return the fault of a folder whose photographs all lie beside their mosaics."""
        if len(self.shifts) < FEWEST:
            return []
        across, down = (float(middle) for middle in np.median(self.shifts, 0))
        if math.hypot(across, down) < FAR:
            return []
        return [f"the photographs lie {across:+.2f} pixels across and {down:+.2f} down from their mosaics"]


def check(settings: Check, watch: Watch) -> Mapping[str, object]:
    """Read every pair of a folder and list every fault.

    Faults are: no partner, unreadable, other sizes, the same mosaic in two splits, levels that those of the
    layout do not fit, photographs that are shifted as a whole against the mosaics.

    Returns:
        The record: layouts, counts by split (mosaics, pairs, and pairs that can be used), sizes, cameras,
        mosaics that are there twice, levels of PNG mosaics (the least value, the lowest and the median of
        those that 0.1 % of a mosaic lies below, the largest), shifts (``shift_record``), and the faults.

    Raises:
        ImgtoolError: Code 2: no such folder, or no pairs in it.
    """
    found = layouts.groups(settings.folder)
    every = [each for group in found for each in group.files()]
    findings = _Findings([f"{path}: no partner" for group in found for path in group.lonely()])
    measured = set(_evenly(range(len(every)), ALIGNED))
    for number, each in enumerate(every):
        findings.take(each, number in measured)
        watch.done(number + 1, len(every))
    return {
        "folder": str(settings.folder),
        "layouts": dict(findings.kinds),
        "splits": {name: dict(count) for name, count in findings.counts.items()},
        "sizes": dict(findings.sizes.most_common(10)),
        "cameras": dict(findings.cameras.most_common(10)),
        "duplicates": findings.duplicates,
        "levels": _levels_record(findings.stated),
        "shift": shift_record(findings.shifts),
        "faults": findings.faults + findings.of_levels() + findings.of_alignment(),
    }


def _levels_record(found: Sequence[Levels]) -> Mapping[str, float] | None:
    if not found:
        return None
    darks = [each.dark for each in found]
    return {
        "black": min(each.black for each in found),
        "white": max(each.white for each in found),
        "least": min(each.least for each in found),
        "darkest": min(darks),
        "dark": float(np.median(darks)),
        "largest": max(each.largest for each in found),
    }


def shift_record(shifts: Sequence[tuple[float, float]]) -> Mapping[str, float] | None:
    """Return count, medians across and down, the median and the 95th percentile of the length, in pixels."""
    if not shifts:
        return None
    across, down = np.array(shifts, np.float64).T
    length = np.hypot(across, down)
    return {
        "measured": len(shifts),
        "across": round(float(np.median(across)), 3),
        "down": round(float(np.median(down)), 3),
        "median": round(float(np.median(length)), 3),
        "p95": round(float(np.percentile(length, 95)), 3),
    }


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many items, evenly over all."""
    if len(items) <= most:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, most)]


# --- plots -----------------------------------------------------------------------------------


@dataclass
class _Drawn:
    """What the plots show."""

    planes: dict[str, list[Floats]] = field(default_factory=lambda: {name: [] for name in PLANES})
    brightness: list[float] = field(default_factory=list)
    ratios: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {"red / green": [], "blue / green": []}
    )
    noise: list[tuple[float, float]] = field(default_factory=list)
    shifts: list[tuple[float, float]] = field(default_factory=list)

    def take(self, frame: Mosaic, target: layouts.Picture | None) -> None:
        """Add one pair."""
        rows, columns = bayer.aligned_size(frame)
        packed = bayer.pack(bayer.window(frame, (0, rows), (0, columns)))
        for name, plane in zip(PLANES, packed, strict=True):
            self.planes[name].append(_some(plane))
        if frame.noise and min(frame.noise) > 0:
            self.noise.append((math.log10(frame.noise[0]), math.log10(frame.noise[1])))
        if target is not None:
            self._beside(frame, packed, target)

    def _beside(self, frame: Mosaic, packed: npt.NDArray[np.float32], target: layouts.Picture) -> None:
        photo = images.to_float(target).reshape(-1, 3).mean(0)
        self.brightness.append(float(photo.mean()))
        red, right, below, blue = (float(plane.mean()) for plane in packed)
        middle = (right + below) / 2
        if min(red, blue, middle, *photo) > 0:
            for name, raw, shown in (("red / green", red, photo[0]), ("blue / green", blue, photo[2])):
                self.ratios[name].append((math.log2(raw / middle), math.log2(float(shown / photo[1]))))
        found = shift(frame, target)
        self.shifts += [found] if found else []


def _some(plane: npt.NDArray[np.float32]) -> Floats:
    """Return about ``PIXELS`` of a plane's pixels, evenly over it."""
    flat = plane.ravel()
    return flat[:: max(len(flat) // PIXELS, 1)].astype(np.float64)


def stats(settings: Stats, watch: Watch) -> Mapping[str, object]:
    """Draw what a folder of pairs holds, of at most ``DRAWN`` pairs evenly over it.

    Writes ``levels.png`` (raw levels of each plane), ``targets.png`` (mean brightness of the photographs),
    ``colours.png`` (red and blue over green of photographs against those of mosaics),
    ``noise.png`` and ``alignment.png``, as far as there is something to draw.

    Returns:
        The record: how many pairs were drawn, medians, shifts, the files, and the faults of pairs that could
        not be read.

    Raises:
        ImgtoolError: Code 2: no such folder, no pairs in it, or the output would lie among them. Code 1: none
            of them can be read.
    """
    every = layouts.files_of(settings.folder)
    out = settings.out or settings.folder / "stats"
    taken = {path.resolve().parent for each in every for path in each[:2] if path}
    if out.resolve() in {settings.folder.resolve(), *taken}:
        raise ImgtoolError(f"{out} holds the pairs", "name another folder by -o", USAGE)
    drawn, faults = _Drawn(), []
    chosen = _evenly(every, DRAWN)
    for number, each in enumerate(chosen, 1):
        try:
            drawn.take(*layouts.read_pair(each))
        except ImgtoolError as fault:
            faults.append(fault.what)
        watch.done(number, len(chosen))
    if len(faults) == len(chosen):
        raise ImgtoolError(f"no pair of {settings.folder} can be read", "imgtool data check isp says why")
    written = _draw(drawn, out)
    return {
        "folder": str(settings.folder),
        "drawn": len(chosen) - len(faults),
        "levels": {name: _median(np.concatenate(given)) for name, given in drawn.planes.items()},
        "brightness": _median(drawn.brightness),
        "shift": shift_record(drawn.shifts),
        "files": [str(path) for path in written],
        "faults": faults,
    }


def _median(values: Sequence[float] | Floats) -> float | None:
    return round(float(np.median(values)), 4) if len(values) else None


def _draw(drawn: _Drawn, out: Path) -> list[Path]:
    levels_of = {name: np.concatenate(given) for name, given in drawn.planes.items()}
    plots.histogram(
        levels_of, out / "levels.png", title="Raw levels", xlabel="value, black 0 and white 1, not balanced"
    )
    written = [out / "levels.png"]
    if drawn.brightness:
        plots.histogram(
            {"photographs": drawn.brightness},
            out / "targets.png",
            title="Brightness of the photographs",
            xlabel="mean sRGB value, 0 to 1",
        )
        written.append(out / "targets.png")
    clouds = (
        ("colours", drawn.ratios, "Colours", ("mosaic: log2 of the ratio", "photograph: log2 of the ratio")),
        ("noise", {"pairs": drawn.noise}, "Noise", ("log10 of shot variance", "log10 of read variance")),
        ("alignment", {"pairs": drawn.shifts}, "Photographs against mosaics",
         ("pixels to the right", "pixels down")),
    )  # fmt: skip
    for name, given, title, labels in clouds:
        points = {label: np.array(each, np.float64) for label, each in given.items() if each}
        if points:
            plots.scatter(points, out / f"{name}.png", title=title, labels=labels)
            written.append(out / f"{name}.png")
    return written
