"""Bench of the awb engine: cost against its limits, the same answer everywhere, errors on known frames.

Every subject runs in a fresh process (``worker``) with one thread. CPU time is that of all threads of the
process; memory is the peak resident set of the whole process, imports included.
"""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgtool import runtime
from imgtool.engine import Budget, Report, Table
from imgtool.engines.awb import accuracy, angles, estimate, exported, sets, worker
from imgtool.engines.awb.settings import Model
from imgtool.engines.awb.stats import AwbStats, of_linear
from imgtool.errors import USAGE, ImgtoolError, did_you_mean

if TYPE_CHECKING:
    from imgtool.engines.awb.settings import Bench

Array = npt.NDArray[Any]

RUNTIMES = ("numpy", "onnx", "tflite", "torch")
DEFAULT = "numpy"
GOAL_MS, GOAL_PNG, GOAL_RAW = 2.0, 80.0, 95.0
"""Limits besides those asked for, as long as nobody asks for looser ones than the usual."""
USUAL_MS, USUAL_MB = 10.0, 100.0
APART = 0.01
"""Largest angle in degrees between the gains of two runtimes."""
DISTURBED = 3.0
"""p95 over p50 of CPU time from which on other work disturbed the measurement."""
PHASES = ("import", "load", "first", "steady")
SAME = 32
"""Frames on which runtimes are compared."""
FEWER = 5
"""Share of the timed calls that the original's slow network gets."""
SEED = 20_261_121


@dataclass
class Subject:
    """A network run by a runtime.

    Attributes:
        network: What the tables call the network.
        runtime: What runs it.
        weights: Its weights, or the exported file that the runtime takes.
        frames: Timed calls.
        lacks: Why it cannot be measured, "" where it can.
        found: What was measured.
    """

    network: str
    runtime: str
    weights: Path
    frames: int = 300
    lacks: str = ""
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return network and runtime."""
        return f"{self.network}, {self.runtime}"


def run(settings: Bench, lab: Any) -> Report:
    """Measure cost and agreement always, errors where ``data`` is named."""
    runtimes, methods = _runtimes(settings.runtimes), accuracy.wanted(settings)
    if settings.threads != 1:
        lab.watch.say("the awb engine is measured on one thread, whatever --threads says")
    entries = sets.dataset(settings.data, settings) if settings.data else []
    with tempfile.TemporaryDirectory(prefix="imgtool-") as name:
        folder = Path(name)
        ours = staged(lab.weights.name, lab.path, runtimes, settings.frames)
        rivals = _original(runtimes, settings.frames, folder) if settings.original else []
        everyone = ours + rivals
        for subject in everyone:
            if subject.lacks:
                lab.watch.say(f"{subject.name}: {subject.lacks}")
        _measure(everyone, settings, folder, lab)
        apart = {group[0].network: parity(group, entries) for group in (ours, rivals) if group}
        figures = cost_figures(everyone) | {"parity_degrees": apart}
        tables = [*cost_tables(everyone, settings), _parity_table(apart)]
        limits = budgets(ours[0], apart, settings)
        if entries:
            net = worker.network(ours[0].weights, DEFAULT)
            told = accuracy.run(net, entries, methods, settings, lab)
            figures["accuracy"] = told
            tables += accuracy.tables(told)
            limits += accuracy.budgets(told)
    for note in figures["notes"]:
        lab.watch.say(note)
    return Report("white balance: cost, agreement, errors", figures, limits, tables)


def _runtimes(text: str) -> list[str]:
    """Return the runtimes asked for, the default one first."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in RUNTIMES:
            raise ImgtoolError(f"--runtimes: {word} is unknown", did_you_mean(word, RUNTIMES), USAGE)
    return list(dict.fromkeys([DEFAULT, *words]))


# --- subjects -----------------------------------------------------------------------------------------


def staged(network: str, path: Path, runtimes: Sequence[str], frames: int) -> list[Subject]:
    """Return a network by several runtimes, its exported files made where they lack.

    Args:
        network: What tables call it.
        path: The weights.
        runtimes: What it shall be run by.
        frames: Timed calls.
    """
    found = []
    for name in runtimes:
        subject = Subject(network, name, path, frames=frames)
        if name in ("onnx", "tflite"):
            try:
                subject.weights = exported.of_weights(path, name).path
            except ImgtoolError as fault:
                subject.lacks = fault.what if runtime.installed(name) else "not installed"
        found.append(subject)
    return found


def _original(runtimes: Sequence[str], frames: int, folder: Path) -> list[Subject]:
    """Return the original's network at its own size, untrained: what it costs is the same."""
    import torch

    from imgtool import checkpoint
    from imgtool.engines.awb import model
    from imgtool.engines.awb.engine import ENGINE

    shape = Model(arch="deepawb")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        state = model.build(shape).state_dict()
    path = folder / "original.safetensors"
    checkpoint.save_weights(path, ENGINE, shape, state, {})
    name = f"original (deepawb, {shape.height}x{shape.width})"
    return staged(name, path, runtimes, max(20, frames // FEWER))


def _measure(subjects: Sequence[Subject], settings: Bench, folder: Path, lab: Any) -> None:
    """Measure all subjects in turn, ``settings.runs`` times, and keep the best time and the largest peak."""
    png, raw = folder / "frame.png", folder / "frame.dng"
    _write_png(png)
    if settings.megapixels:
        write_dng(raw, settings.megapixels)
    able = [subject for subject in subjects if not subject.lacks]
    ours = able[0].network
    with lab.console.progress(settings.runs * len(able), "bench") as bar:
        for _ in range(settings.runs):
            for subject in able:
                bar.update(subject.name)
                _core(subject)
                _command(subject, "png", png)
                if settings.megapixels and subject.network == ours:
                    _command(subject, "raw", raw)
                bar.advance(1)


def _core(subject: Subject) -> None:
    order = {"task": "core", "weights": str(subject.weights), "runtime": subject.runtime}
    answer = worker.ask(order | {"frames": subject.frames})
    answer.pop("gains")
    older = subject.found.get("core")
    if older:
        peak = max(older["peak_mb"], answer["peak_mb"])
        answer = min(older, answer, key=lambda each: float(each["core"]["p95"])) | {"peak_mb": peak}
    subject.found["core"] = answer


def _command(subject: Subject, kind: str, path: Path) -> None:
    """Measure ``imgtool infer awb`` on a file."""
    words = ["infer", "awb", str(path), "--json", "--quiet", "--runtime", subject.runtime]
    answer = worker.ask({"task": "command", "words": [*words, "--weights", str(subject.weights)]})
    record = answer.pop("record")
    if answer.pop("code"):
        raise ImgtoolError(f"{subject.name} on a {kind} file: {record.get('error')}", record.get("hint", ""))
    older = subject.found.get(kind)
    if older:
        answer = {
            name: min(older[name], value) if name == "cpu" else max(older[name], value)
            for name, value in answer.items()
        }
    subject.found[kind] = answer


# --- files that are measured --------------------------------------------------------------------------


def _write_png(path: Path) -> None:
    import cv2

    cv2.imwrite(str(path), np.ascontiguousarray(worker.frames(1)[0][..., ::-1]))


def write_dng(path: Path, megapixels: float) -> tuple[int, int]:
    """Write a camera RAW of this size: an uncompressed 14-bit RGGB mosaic as DNG (Adobe, DNG 1.4).

    Pixels are written strip by strip, so that little memory is needed.

    Args:
        path: The file.
        megapixels: Size in 10^6 pixels, 3:2.

    Returns:
        Rows and columns.
    """
    high = 4 * math.ceil((megapixels * 1e6 / 1.5) ** 0.5 / 4)
    wide, strip = high * 3 // 2, 2 * worker.PATCH
    tags = _tags(high, wide)
    offset = 8 + 2 + 12 * (len(tags) + 1) + 4
    pixels = offset + sum(_padded(data) for *_, data in tags)
    entries, body = b"", b""
    for number, kind, count, data in sorted([*tags, (273, 4, 1, struct.pack("<I", pixels))]):
        place = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", offset + len(body))
        entries += struct.pack("<HHI", number, kind, count) + place
        body += data.ljust(_padded(data), b"\0") if _padded(data) else b""
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags) + 1)
    frame = worker.frames(1, (strip, wide))[0]
    mosaic = frame[..., 1].copy()
    mosaic[::2, ::2], mosaic[1::2, 1::2] = frame[::2, ::2, 0], frame[1::2, 1::2, 2]
    with path.open("wb") as file:
        file.write(head + entries + bytes(4) + body)
        for top in range(0, high, strip):
            file.write(np.roll(mosaic, top, 1)[: high - top].astype("<u2").tobytes())
    return high, wide


def _padded(data: bytes) -> int:
    """Return the bytes that a tag's data take behind the directory: none where they fit into it."""
    return len(data) + len(data) % 2 if len(data) > 4 else 0


def _tags(high: int, wide: int) -> list[tuple[int, int, int, bytes]]:
    """Return the tags of a DNG but the place of its pixels: number, type, count, data."""

    def longs(*values: int) -> bytes:
        return struct.pack(f"<{len(values)}I", *values)

    def parts(values: Sequence[float], code: str) -> bytes:
        whole = [part for value in values for part in (round(value * 10_000), 10_000)]
        return struct.pack(f"<{len(whole)}{code}", *whole)

    model = b"Synthetic\0"
    to_camera = (0.6844, -0.0996, -0.0856, -0.3876, 1.1761, 0.2396, -0.0593, 0.1772, 0.6198)
    shorts = {256: wide, 257: high, 258: 16, 259: 1, 262: 32803, 274: 1, 277: 1, 278: high, 284: 1, 50778: 21}
    tags = [(number, 4, 1, longs(value)) for number, value in shorts.items() if value > 0xFFFF]
    tags += [(n, 3, 1, struct.pack("<H", value)) for n, value in shorts.items() if value <= 0xFFFF]
    tags += [(254, 4, 1, longs(0)), (279, 4, 1, longs(2 * high * wide))]
    tags += [(271, 2, len(model), model), (272, 2, len(model), model), (50708, 2, len(model), model)]
    tags += [(33421, 3, 2, struct.pack("<2H", 2, 2)), (33422, 1, 4, bytes([0, 1, 1, 2]))]
    tags += [(50706, 1, 4, bytes([1, 4, 0, 0])), (50714, 4, 1, longs(0)), (50717, 4, 1, longs(worker.WHITE))]
    tags += [(50721, 10, 9, parts(to_camera, "i")), (50728, 5, 3, parts((0.5, 1, 0.65), "I"))]
    return tags


# --- agreement ----------------------------------------------------------------------------------------


def parity(subjects: Sequence[Subject], entries: Sequence[sets.Entry] = ()) -> dict[str, float]:
    """Return, by runtime, the largest angle in degrees between its gains and those of NumPy.

    Args:
        subjects: A network by several runtimes, the default one first; those that lack something are
            left out.
        entries: Frames of a data set, of which the first 32 that can be read are taken too.
    """
    nets = {s.runtime: worker.network(s.weights, s.runtime) for s in subjects if not s.lacks}
    seen = _some(entries) if len(nets) > 1 else []
    gains = {
        name: np.array([[1 / r, 1 / b] for r, b, _ in (estimate.white(net, stats) for stats in seen)])
        for name, net in nets.items()
    }
    return {
        name: float(angles.recovery(some, gains[DEFAULT]).max())
        for name, some in gains.items()
        if name != DEFAULT
    }


def _some(entries: Sequence[sets.Entry]) -> list[AwbStats]:
    """Return frames under different lights, and some of the data."""
    rng = np.random.default_rng(3)
    found = []
    for frame in worker.frames(SAME):
        stats = of_linear(frame, 0, worker.WHITE)
        light = np.exp(rng.normal(0, 0.3, 3)).astype(np.float32)
        found.append(stats.changed(cells=stats.cells * light))
    for entry in entries[:SAME]:
        try:
            stats = entry.read()
        except ImgtoolError:
            continue
        if len(stats.points()):
            found.append(stats)
    return found


# --- what is told -------------------------------------------------------------------------------------


def budgets(default: Subject, apart: Mapping[str, Mapping[str, float]], settings: Bench) -> list[Budget]:
    """Return the limits of the default runtime, and that all runtimes agree."""
    p95 = default.found["core"]["core"]["p95"]
    kinds = {"png": ("PNG", GOAL_PNG), "raw": (f"RAW of {settings.megapixels} MP", GOAL_RAW)}
    found = [Budget("frame in memory to gains, CPU p95", settings.max_ms, p95, "ms")]
    if settings.max_ms <= USUAL_MS:
        found.append(Budget("goal: frame in memory to gains, CPU p95", GOAL_MS, p95, "ms"))
    for kind, (name, goal) in kinds.items():
        if kind not in default.found:
            continue
        peak = default.found[kind]["peak_mb"]
        found.append(Budget(f"largest process, {name}", settings.max_mb, peak, "MB"))
        if settings.max_mb <= USUAL_MB:
            found.append(Budget(f"goal: largest process, {name}", goal, peak, "MB"))
    largest = max((angle for some in apart.values() for angle in some.values()), default=0.0)
    return [*found, Budget("largest angle between the gains of runtimes", APART, largest, "degrees")]


def cost_figures(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Return what was measured by subject, ratios to the default runtime's, and notes."""
    default = subjects[0]
    own = default.found["core"]
    found: dict[str, Any] = {
        "threads": 1,
        "parameters": own["parameters"],
        "cost": {s.name: s.found or {"lacks": s.lacks} for s in subjects},
    }
    ratios = {}
    for subject in subjects[1:]:
        if subject.found:
            core = subject.found["core"]
            ratios[f"{subject.name} over {default.name}"] = {
                "core_p50": core["core"]["p50"] / own["core"]["p50"],
                "network_p50": core["network"]["p50"] / own["network"]["p50"],
                "peak_mb": core["peak_mb"] / own["peak_mb"],
            }
    spread = own["core"]["p95"] / own["core"]["p50"]
    note = f"disturbed: p95 of the CPU time is {spread:.1f} times p50, so other work slowed this machine"
    return found | {"ratios": ratios, "notes": [note] if spread > DISTURBED else []}


def cost_tables(subjects: Sequence[Subject], settings: Bench) -> list[Table]:
    """Return tables of CPU time, of memory by phase, and of files to gains."""
    high, wide = worker.FRAME
    one = Table(
        f"frame of {wide}x{high} in memory to gains, CPU ms, one thread",
        ("subject", "p50", "p95", "max", "network p50", "process MB"),
        [_row(s, 5, _core_cells) for s in subjects],
    )
    two = Table(
        "the same process: peak MB after each phase, and CPU ms up to the first gains",
        ("subject", *PHASES, "first ms"),
        [_row(s, 5, _phase_cells) for s in subjects],
    )
    three = Table(
        f"file to gains by infer (PNG {wide}x{high}, RAW {settings.megapixels} MP), CPU s and peak MB; "
        "a child decodes RAW, and what it shares with its parent counts once in the sum",
        ("subject", "PNG s", "PNG MB", "RAW s", "parent MB", "child MB", "sum MB"),
        [_row(s, 6, _file_cells) for s in subjects],
    )
    return [one, two, three]


def _row(subject: Subject, count: int, cells: Callable[[Mapping[str, Any]], list[str]]) -> tuple[object, ...]:
    """Return a row of a table, which says what a subject lacks where it could not be measured."""
    if subject.lacks:
        return (subject.name, subject.lacks, *[""] * (count - 1))
    return (subject.name, *cells(subject.found))


def _core_cells(found: Mapping[str, Any]) -> list[str]:
    core = found["core"]
    times = [core["core"][name] for name in ("p50", "p95", "max")] + [core["network"]["p50"]]
    return [*(f"{time:.3f}" for time in times), f"{core['peak_mb']:.1f}"]


def _phase_cells(found: Mapping[str, Any]) -> list[str]:
    core = found["core"]
    peaks = [f"{core['phases_mb'][name]:.1f}" for name in PHASES]
    return [*peaks, f"{sum(core['phases_ms'][name] for name in PHASES[:3]):.0f}"]


def _file_cells(found: Mapping[str, Any]) -> list[str]:
    png, raw = found["png"], found.get("raw")
    cells = [f"{png['cpu']:.2f}", f"{png['peak_mb']:.1f}"]
    if not raw:
        return cells + ["-"] * 4
    memory = (f"{raw[name]:.1f}" for name in ("own_mb", "child_mb", "sum_mb"))
    return [*cells, f"{raw['cpu']:.2f}", *memory]


def _parity_table(apart: Mapping[str, Mapping[str, float]]) -> Table:
    rows: list[tuple[object, ...]] = [
        (network, name, f"{angle:.2g}") for network, some in apart.items() for name, angle in some.items()
    ]
    return Table("largest angle to NumPy's gains in degrees", ("network", "runtime", "degrees"), rows)
