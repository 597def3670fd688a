"""The proof of an exported file: it is run where it will run, and compared with torch in float64."""

from __future__ import annotations

import copy
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from imgtool.errors import ImgtoolError
from imgtool.export.order import PICTURE
from imgtool.port import Loss

if TYPE_CHECKING:
    from imgtool.port import Port

Array = npt.NDArray[Any]
Arrays = tuple[Array, ...]
Done = Callable[[int, int], None]

MADE = ("noise", "flat", "extreme")
"""Kinds of inputs beside real ones."""
PHOTOS = 3
"""Real inputs at the usual size."""
DISTURBED = {False: 0.05, True: 0.25}
"""By what share of themselves weights are changed that the comparison must tell from the file's: of floats,
of 8 bits."""
TOLD, LOSSY = 10.0, 1e-3
"""How many times the file's difference to torch outputs must differ between inputs; what counts as that
difference in 8 bits."""
LEAST_PSNR, WORST_PSNR = 40.0, 34.0
"""dB to torch that 8 bits must keep on average and at worst, where the engine counts in nothing else."""
PEAK = 150.0
"""dB at most: of arrays that are equal."""


@dataclass(frozen=True)
class Case:
    """Inputs that a file is run on.

    Attributes:
        name: What they are, such as "city.jpg".
        sizes: Length of every axis.
        real: Whether they are of a real photo.
        draw: Makes them.
    """

    name: str
    sizes: Mapping[str, int]
    real: bool
    draw: Callable[[], Arrays]

    @property
    def shown(self) -> str:
        """Name and lengths, for people."""
        lengths = " ".join(f"{axis} {size}" for axis, size in self.sizes.items() if axis not in PICTURE)
        picture = "x".join(str(self.sizes[axis]) for axis in PICTURE if axis in self.sizes)
        return " ".join(filter(None, (self.name, picture, lengths)))


def cases(
    port: Port,
    sizes: Mapping[str, int],
    free: frozenset[str],
    photos: Sequence[Path],
    largest: tuple[int, int],
    count: int = PHOTOS,
) -> list[Case]:
    """Return what a file is run on: photos and made inputs at its usual size, both at others it may take.

    Args:
        port: What it holds.
        sizes: Its usual, or fixed, lengths.
        free: Axes that are free.
        photos: Real files.
        largest: Height and width of the largest picture.
        count: Photos at the usual size, at most.
    """
    taken = itertools.cycle(photos)
    found = [_real(port, next(taken), sizes) for _ in range(min(count, len(photos)))]
    found += [_made(port, kind, sizes, number) for number, kind in enumerate(MADE)]
    for number, other in enumerate(_others(port, sizes, free, largest), len(MADE)):
        found += [_real(port, next(taken), other), _made(port, "noise", other, number)]
    return found


def _others(
    port: Port, sizes: Mapping[str, int], free: frozenset[str], largest: tuple[int, int]
) -> Iterator[dict[str, int]]:
    """Yield further lengths of the free axes: least, odd, large; and several pictures at once."""
    if not free:
        return
    up = {axis: (lambda size, axis=axis: _up(size, port.axes[axis].multiple)) for axis in free}
    pictures = [axis for axis in PICTURE if axis in free]
    yield dict(sizes) | {axis: up[axis](port.axes[axis].least) for axis in free}
    odd = {"height": 203, "width": 301}
    rest = {axis: up[axis](max(port.axes[axis].least, sizes[axis] * 2 + 1)) for axis in free}
    several = dict(sizes) | {axis: up[axis](odd[axis]) if axis in odd else rest[axis] for axis in free}
    yield several | ({"batch": 3} if "batch" in free else {})
    if pictures:
        yield dict(sizes) | {axis: up[axis](largest[PICTURE.index(axis)]) for axis in pictures}


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _real(port: Port, photo: Path, sizes: Mapping[str, int]) -> Case:
    return Case(photo.name, sizes, True, lambda: port.real(photo, sizes))


def _made(port: Port, kind: str, sizes: Mapping[str, int], seed: int) -> Case:
    return Case(kind, sizes, False, lambda: port.made(kind, sizes, np.random.default_rng(seed)))


# --- running -----------------------------------------------------------------------------------


@torch.inference_mode()
def by_torch(module: nn.Module, inputs: Arrays, dtype: torch.dtype) -> list[Array]:
    """Return the outputs of a module whose parameters have a type, on inputs that are given it."""
    out = module(*(torch.from_numpy(np.ascontiguousarray(each)).to(dtype) for each in inputs))
    return [each.double().numpy() for each in (out if isinstance(out, tuple | list) else (out,))]


def by_file(path: Path, names: Sequence[str], folder: Path, threads: int) -> Mapping[str, Any]:
    """Run a file on cases in a process of its own; outputs lie beside them afterwards.

    Raises:
        ImgtoolError: It cannot be run on one of them, or kills its process.
    """
    order = folder / "order.json"
    order.write_text(json.dumps({"file": str(path), "threads": threads, "cases": list(names)}))
    words = [sys.executable, "-m", "imgtool.export.worker", str(order)]
    child = subprocess.run(words, capture_output=True, text=True, check=False)
    hint = "take another --to or --precision, or fix the size by --size"
    if child.returncode < 0:
        raise ImgtoolError(f"what runs {path.name} died of signal {-child.returncode}", hint)
    try:
        said: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (child.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ImgtoolError(f"{path.name} does not run: {last[:200]}", hint) from None
    if "error" in said:
        raise ImgtoolError(str(said["error"]).replace(str(path), path.name), hint)
    return said


# --- comparing ---------------------------------------------------------------------------------


def shares(port: Port, right: Sequence[Array], got: Sequence[Array]) -> list[Array]:
    """Return the absolute differences of every output as shares of its range.

    That is the range that is meant or, where an output leaves it, the one that it covers: a number of 20 has
    not the digits behind the point that one of 1 has.

    Raises:
        ImgtoolError: An output has another shape, or is not finite.
    """
    found = []
    for slot, a, b in zip(port.outputs, right, got, strict=True):
        if a.shape != b.shape:
            raise ImgtoolError(f"the file's {slot.name} is {b.shape}, not {a.shape}", _REPORT)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ImgtoolError(f"{slot.name}, of the file or of torch, is not finite everywhere", _REPORT)
        found.append(np.abs(a - b) / max(slot.high - slot.low, float(np.ptp(a))))
    return found


def default_loss(port: Port) -> Loss:
    """Return what 8 bits may cost where the engine counts in nothing of its own: PSNR, in dB."""

    def psnr(right: Sequence[Array], got: Sequence[Array]) -> float:
        error = float(np.mean([np.square(each).mean() for each in shares(port, right, got)]))
        return min(-10 * math.log10(max(error, 1e-30)), PEAK)

    return Loss("PSNR to torch", "dB", psnr, LEAST_PSNR, higher_is_better=True, worst=WORST_PSNR)


class Proof:
    """The comparison of one file with the module that it was made from."""

    def __init__(self, port: Port, limit: float | None, threads: int = 0) -> None:
        """Take what the file should compute.

        Args:
            port: What it holds.
            limit: Largest difference as a share of an output's range; None where ``port.loss`` decides.
            threads: CPU threads of the file's runs; 0 takes all cores.
        """
        self.port, self.limit, self.threads = port, limit, threads
        self.loss = port.loss or default_loss(port)
        self.single = copy.deepcopy(port.module).eval().requires_grad_(False)
        self.double = copy.deepcopy(self.single).double()
        self.other = self._disturbed()

    def check(
        self, path: Path, every: Sequence[Case], folder: Path, done: Done = lambda n, of: None
    ) -> dict[str, Any]:
        """Compare a file with torch.

        Args:
            path: The file.
            every: What it is run on.
            folder: An empty folder for inputs and outputs.
            done: Told how many cases are compared.

        Returns:
            The record: {"max_abs", "mean_abs", "samples", "limit", "cases", ...}, differences as shares of
            the outputs' ranges.

        Raises:
            ImgtoolError: It differs by more than the limit, does not run, or answers all inputs alike.
        """
        names = [f"{number}.npz" for number in range(len(every))]
        for name, case in zip(names, every, strict=True):
            np.savez(folder / name, *(np.asarray(each, np.float32) for each in case.draw()))
        said = by_file(path, names, folder, self.threads)
        rows, seen = [], []
        for number, (name, case) in enumerate(zip(names, every, strict=True)):
            inputs, got = _arrays(folder / name), _arrays(folder / f"{name}.out.npz")
            right = by_torch(self.double, inputs, torch.float64)
            rows.append(self._row(case, inputs, right, got))
            if case.sizes == every[0].sizes:
                seen.append(got)
            if not number:
                self._check_guard(inputs, got)
            for used in (name, f"{name}.out.npz"):
                (folder / used).unlink()
            done(number + 1, len(every))
        record = self._record(rows) | {"peak_mb": said["peak_mb"]}
        self._check_spread(seen, record["max_abs"])
        self._judge(path, record, rows)
        return record

    def _disturbed(self) -> nn.Module | None:
        """Return the network with other weights, which a file must be told from; None without weights."""
        if not any(True for _ in self.port.module.parameters()):
            return None
        other, random = copy.deepcopy(self.single), torch.Generator().manual_seed(0)
        for each in other.parameters():
            each.mul_(1 + DISTURBED[self.limit is None] * torch.randn(each.shape, generator=random))
        return other

    def _row(
        self, case: Case, inputs: Arrays, right: Sequence[Array], got: Sequence[Array]
    ) -> dict[str, Any]:
        apart = shares(self.port, right, got)
        torch_apart = shares(self.port, right, by_torch(self.single, inputs, torch.float32))
        row: dict[str, Any] = {
            "input": case.shown,
            "real": case.real,
            "max_abs": _largest(apart),
            "mean_abs": float(np.mean([each.mean() for each in apart])),
            "torch_max_abs": _largest(torch_apart),
            "absolute": {
                slot.name: float(np.abs(a - b).max(initial=0))
                for slot, a, b in zip(self.port.outputs, right, got, strict=True)
            },
        }
        if self.limit is None and case.real:
            row["loss"] = self.loss.of(right, got)
            row["nothing"] = self._nothing(inputs, right)
            if self.other is not None:
                row["disturbed"] = self.loss.of(right, by_torch(self.other, inputs, torch.float32))
        return row

    def _nothing(self, inputs: Arrays, right: Sequence[Array]) -> float | None:
        """Return the loss of handing the input on as it is; None where that cannot be."""
        if [each.shape for each in inputs] != [each.shape for each in right]:
            return None
        return self.loss.of(right, [each.astype(np.float64) for each in inputs])

    def _record(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        record: dict[str, Any] = {
            "max_abs": max(row["max_abs"] for row in rows),
            "mean_abs": float(np.mean([row["mean_abs"] for row in rows])),
            "torch_max_abs": max(row["torch_max_abs"] for row in rows),
            "samples": len(rows),
            "reference": "torch, float64, on the CPU",
            "limit": self.limit,
            "cases": list(rows),
        }
        if self.limit is None:
            values = _column(rows, "loss")
            about = {"name": self.loss.name, "unit": self.loss.unit, "limit": self.loss.limit}
            worst = min(values) if self.loss.higher_is_better else max(values)
            rivals = {rival: _mean(_column(rows, rival)) for rival in RIVALS}
            told = {"mean": _mean(values), "worst": worst, "samples": len(values)}
            record["loss"] = about | told | rivals
        return record

    def _judge(self, path: Path, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        if self.limit is None:
            self._judge_loss(path, record["loss"])
        elif not record["max_abs"] <= self.limit:
            worst = max(rows, key=lambda row: row["max_abs"])
            what = f"{path.name} differs from torch by {worst['max_abs']:.2g} of the output's range"
            raise ImgtoolError(f"{what} on {worst['input']}, more than {self.limit:.2g}", _LIMIT)

    def _judge_loss(self, path: Path, told: Mapping[str, Any]) -> None:
        """Judge 8 bits: by the limits, and by rivals that know nothing of these weights."""
        loss, mean = self.loss, told["mean"]
        if not loss.holds(mean, loss.limit):
            what = f"{path.name}: {loss.name} is {mean:.4g} {loss.unit} on average"
            raise ImgtoolError(f"{what}, the limit is {loss.limit:g}", _EIGHT)
        if loss.worst is not None and not loss.holds(told["worst"], loss.worst):
            what = f"{path.name}: {loss.name} is {told['worst']:.4g} {loss.unit} at worst"
            raise ImgtoolError(f"{what}, the limit of the worst is {loss.worst:g}", _EIGHT)
        for rival, words in RIVALS.items():
            if told[rival] is not None and loss.holds(told[rival], mean):
                what = f"{path.name}: {loss.name} is {mean:.4g} {loss.unit}, and that of {words}"
                raise ImgtoolError(f"{what} {told[rival]:.4g}", _EIGHT)

    def _check_guard(self, inputs: Arrays, got: Sequence[Array]) -> None:
        """Refuse a comparison that could not tell the file from one of other weights."""
        if self.limit is None or self.other is None:
            return
        if _largest(shares(self.port, by_torch(self.other, inputs, torch.float32), got)) <= self.limit:
            raise ImgtoolError("the comparison cannot tell these weights from others", _ALIKE)

    def _check_spread(self, seen: Sequence[Sequence[Array]], error: float) -> None:
        """Refuse outputs that differ between inputs by little more than the file differs from torch."""
        apart = max((_largest(shares(self.port, seen[0], each)) for each in seen[1:]), default=math.inf)
        if not apart > TOLD * (LOSSY if self.limit is None else min(error, self.limit)):
            raise ImgtoolError("the network answers every input alike: nothing can be compared", _ALIKE)


RIVALS = {
    "nothing": "the input as it is",
    "disturbed": f"weights that are wrong by {100 * DISTURBED[True]:g} %",
}
"""What 8 bits must be nearer to torch than, and the words for it."""


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _arrays(path: Path) -> Arrays:
    with np.load(path) as found:
        return tuple(found[name] for name in found.files)


def _largest(shares: Sequence[Array]) -> float:
    return float(np.max([each.max(initial=0) for each in shares]))


_REPORT = "take another --to"
_LIMIT = "take another --to or --precision; --limit allows more"
_EIGHT = "calibrate on more photos by --photos, take --precision fp16, or allow more by --limit"
_ALIKE = "train the weights, or give other --photos"
