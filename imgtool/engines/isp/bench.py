"""Bench of the isp engine: latency beside the original and LibRaw, RAW file to JPEG, quality.

Latency is that of a network alone, as challenges state it, and of all that lies between raw integers and
display bytes: only there do ours and the original's network do the same.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from imgtool import checkpoint, compute, dng, plots
from imgtool.engine import Budget, Engine, Report, Table, Timing
from imgtool.engines.isp import latency, libraw, quality, unprocess, worker

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

    from imgtool.engines.isp.quality import Part
    from imgtool.engines.isp.settings import Bench

OURS, SMALLEST, ORIGINAL, LIBRAW = "ours", "xs", "punet-16", "LibRaw AHD"
ORIGINAL_MODEL: Mapping[str, object] = {
    "arch": "punet", "width": "16", "packing": "mai21", "scaling": "mai21", "colour": "learned",
}  # fmt: skip
SMALLEST_WEIGHTS = "isp-lrfu-xs"
"""Shipped weights that are timed too, where they are shipped."""
FULL_HD = (1088, 1920)
RATIO, PEAK_MB = 3.0, 1500.0
"""From file to JPEG: wall time over LibRaw's, and memory."""
MULTIPLE = 32
"""Of the sides of the timed picture: that of the original's network."""
SCENE = (1024, 1536)
ALONE, WHOLE = "network alone", "raw to display bytes"
TASKS = {ALONE: "forward", WHOLE: "whole"}
"""What is timed of a network on the CPU, and the worker's task that does it."""
CPU_NETWORK, CUDA_NETWORK = "network alone, fastest form on the CPU", latency.GRAPH.name
"""What "network_ms" is, and what --max-ms limits."""
SCRIPT = """
import sys, cv2, rawpy
rgb = rawpy.imread(sys.argv[1]).postprocess(use_camera_wb=True, no_auto_bright=True)
cv2.imwrite(sys.argv[2], rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(sys.argv[3])])
"""
"""A program that does no more than have LibRaw make a JPEG of a RAW file."""


def run(settings: Bench, lab: Any, engine: Engine) -> Report:
    """Measure latency always, a file, pairs and photos where the settings name them."""
    quality.check(settings)
    net = lab.network()
    later = [quality.on_photos(net, engine, settings, lab)] if settings.photos else []
    later += [quality.on_pairs(net, engine, settings, lab)] if settings.data else []
    with tempfile.TemporaryDirectory(prefix="imgtool-") as name:
        parts = [_latency(settings, lab, engine, net, Path(name))]
        if settings.megapixels:
            parts.append(_file(settings, lab, Path(name)))
    parts += later
    figures: dict[str, object] = {}
    for part in parts:
        figures |= part.figures
    limits = [limit for part in parts for limit in part.budgets]
    tables = [table for part in parts for table in part.tables]
    return Report("RAW to photograph: latency, cost, quality", figures, limits, tables)


# --- latency ------------------------------------------------------------------------------------------


def subjects(lab: Any) -> dict[str, dict[str, Any]]:
    """Return the networks that are timed: name to "model", or to "weights" where that is empty."""
    found: dict[str, dict[str, Any]] = {OURS: {"model": {}, "weights": str(lab.path)}}
    shipped = checkpoint.SHIPPED / f"{SMALLEST_WEIGHTS}.safetensors"
    if shipped.exists() and shipped != lab.path:
        found[SMALLEST] = {"model": {}, "weights": str(shipped)}
    return found | {ORIGINAL: {"model": dict(ORIGINAL_MODEL), "weights": ""}}


def _latency(settings: Bench, lab: Any, engine: Engine, net: nn.Module, folder: Path) -> Part:
    size = (math.ceil(settings.height / MULTIPLE) * MULTIPLE, math.ceil(settings.width / MULTIPLE) * MULTIPLE)
    if size != (settings.height, settings.width):
        lab.watch.say(f"timed at {size[1]}x{size[0]}: the original's network takes multiples of {MULTIPLE}")
    known = subjects(lab)
    nets = {name: net if name == OURS else worker.network(engine, order) for name, order in known.items()}
    works = {name: latency.work(each, size) for name, each in nets.items()}
    frame = folder / "timed.dng"
    write_scene(frame, *size)
    where = compute.device(settings.device)
    threads = list(dict.fromkeys([settings.threads or _cores(), _cores()]))
    orders = {_title(LIBRAW, n): {"task": "rival", "path": str(frame), "threads": n} for n in threads}
    if where.type == "cuda":
        part = _on_cuda(nets, works, size, where, settings, lab)
    else:
        part = _on_cpu(known, works, size, threads, lab)
    rivals: dict[str, Timing] = lab.measure_by(worker.MODULE, orders)
    part.figures |= {
        "size": [size[1], size[0]],
        "networks": {name: vars(work) for name, work in works.items()},
        "libraw_ms": {name: 1e3 * timing.wall for name, timing in rivals.items()},
        "libraw_cpu_ms": {name: 1e3 * timing.cpu for name, timing in rivals.items()},
    }
    rows = [_timing_row(name, timing) for name, timing in rivals.items()]
    part.tables.insert(1, Table("the same frame by LibRaw, opened, on the CPU", CPU_COLUMNS, rows))
    part.budgets.extend(_limits(part.figures, settings))
    if settings.report:
        _draw(part.figures, settings.report)
    return part


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _title(name: str, threads: int, kind: str = "", what: str = "") -> str:
    return ", ".join(filter(None, (name, what, kind, f"{threads} thread" + "s" * (threads != 1))))


def _limits(figures: Mapping[str, Any], settings: Bench) -> list[Budget]:
    """Return the limit that the user states, and those of the original's network at the usual size."""
    form = figures["network_form"]
    limits = []
    if settings.max_ms:
        limits.append(Budget(f"latency, {form}", settings.max_ms, figures["network_ms"][OURS], "ms"))
    if (settings.height, settings.width) == FULL_HD:
        for what, name in ((WHOLE, "whole_cost_ms"), (ALONE, "network_cost_ms")):
            cost = figures[name]
            limits.append(Budget(f"{what}, over {ORIGINAL}", 1, cost[OURS] / cost[ORIGINAL], "times"))
    return limits


def _draw(figures: Mapping[str, Any], folder: Path) -> None:
    shown, title = figures["whole_ms"], f"Latency, {WHOLE}, fastest form"
    plots.bars(shown, folder / "latency.png", title=title, xlabel="milliseconds", highlight=OURS)


def _on_cuda(
    nets: Mapping[str, nn.Module],
    works: Mapping[str, latency.Work],
    size: tuple[int, int],
    where: torch.device,
    settings: Bench,
    lab: Any,
) -> Part:
    """Climb the ladder with every network."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    top = latency.ceiling(where)
    with lab.console.progress(len(nets), "bench") as bar:
        for name, net in nets.items():
            bar.update(name)
            found[name] = latency.ladder(net, size, where, settings.iterations)
            bar.advance(1)
    floors = {name: top.floors(work, 2) for name, work in works.items()}
    rows = [
        _rung_row(name, form, rung, floors[name]["arithmetic"])
        for name, rungs in found.items()
        for form, rung in rungs.items()
    ]
    alone = {name: rungs[latency.GRAPH.name].get("median", math.nan) for name, rungs in found.items()}
    best = {name: fastest_whole(rungs) for name, rungs in found.items()}
    ways = latency.transfers(size, settings.iterations, where)
    rows += [(f"transfer {way}", f"{ms:.3f}", "", "", "", "") for way, ms in ways.items()]
    figures: dict[str, object] = {
        "latency": found,
        "network_form": CUDA_NETWORK,
        "network_ms": alone,
        "network_cost_ms": alone,
        "whole_ms": best,
        "whole_cost_ms": best,
        "transfers_ms": ways,
        "ceiling": {"tflops": top.flops / 1e12, "gb_per_second": top.bandwidth / 1e9},
        "floors_ms": floors,
    }
    columns = ("subject", "ms", "p10-p90", "p99", "peak MB", "of fp16 peak")
    title = f"latency at {size[1]}x{size[0]}, batch 1, {settings.iterations} single iterations"
    tables = [Table(title, columns, rows), _roofline(works, floors, "fp16")]
    return quality.Part(figures, [], tables)


def fastest_whole(rungs: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the least median of the forms from raw integers to display bytes, NaN where none works."""
    whole = (form.name for form in latency.FORMS if form.whole)
    return min((rungs[name]["median"] for name in whole if "median" in rungs[name]), default=math.nan)


_OF_PEAK = frozenset(form.name for form in latency.FORMS if form.half and not form.whole)
"""Forms whose arithmetic the fp16 peak limits, and nothing else."""


def _rung_row(name: str, form: str, rung: Mapping[str, Any], floor: float) -> tuple[object, ...]:
    title = f"{name}: {form}"
    if "failed" in rung:
        return title, "-", rung["failed"], "", "", ""
    between = f"{rung['p10']:.3f}-{rung['p90']:.3f}"
    share = f"{100 * floor / rung['median']:.0f} %" if form in _OF_PEAK else ""
    return title, f"{rung['median']:.3f}", between, f"{rung['p99']:.3f}", f"{rung['peak_mb']:.0f}", share


def _on_cpu(
    known: Mapping[str, Mapping[str, Any]],
    works: Mapping[str, latency.Work],
    size: tuple[int, int],
    threads: Sequence[int],
    lab: Any,
) -> Part:
    """Time every network in processes of their own: alone and whole, each number of threads, each type."""
    cases = [(n, kind) for n in threads for kind in latency.TYPES]
    common = {(n, kind): {"threads": n, "type": kind, "size": size} for n, kind in cases}
    timings: dict[str, Timing] = lab.measure_by(
        worker.MODULE,
        {
            _title(name, *case, what): {"task": task, **order, **common[case]}
            for what, task in TASKS.items()
            for case in cases
            for name, order in known.items()
        },
    )
    tops = _ceilings(common, lab)
    floors = {
        _title(name, *case, ALONE): tops[case].floors(work, latency.TYPES[case[1]].itemsize)
        for case in cases
        for name, work in works.items()
    }
    threads_of = {_title(name, *case, ALONE): case[0] for case in cases for name in works}
    shares = {
        title: floors[title]["arithmetic"] * count / (1e3 * timings[title].cpu)
        for title, count in threads_of.items()
    }
    rows = [
        _timing_row(title, timing, f"{100 * shares[title]:.0f} %" if title in shares else "")
        for title, timing in timings.items()
    ]

    def least(what: str, cost: str) -> dict[str, float]:
        times = {name: [timings[_title(name, *case, what)] for case in cases] for name in works}
        return {name: 1e3 * min(getattr(each, cost) for each in some) for name, some in times.items()}

    figures: dict[str, object] = {
        "latency": {
            title: {"ms": 1e3 * t.wall, "cpu_ms": 1e3 * t.cpu, "peak_mb": t.peak_mb}
            for title, t in timings.items()
        },
        "network_form": CPU_NETWORK,
        "network_ms": least(ALONE, "wall"),
        "network_cost_ms": least(ALONE, "cpu"),
        "whole_ms": least(WHOLE, "wall"),
        "whole_cost_ms": least(WHOLE, "cpu"),
        "floors_ms": floors,
    }
    first = {name: floors[_title(name, *cases[0], ALONE)] for name in works}
    tables = [
        Table(f"latency at {size[1]}x{size[0]}, batch 1, channels last", CPU_COLUMNS, rows),
        _roofline(works, first, _title("", *cases[0])),
    ]
    return quality.Part(figures, [], tables)


def _ceilings(
    common: Mapping[tuple[int, str], Mapping[str, Any]], lab: Any
) -> dict[tuple[int, str], latency.Ceiling]:
    """Return what the CPU reaches by threads and type: work per CPU second, times the threads."""
    orders = {
        _title(task, *case): {"task": task, **order}
        for case, order in common.items()
        for task in ("product", "convolution", "copying")
    }
    spent = {name: t.cpu for name, t in lab.measure_by(worker.MODULE, orders, 1).items()}
    operations = {"product": 2 * worker.EDGE**3, "convolution": 18 * (latency.WIDE * worker.PIXELS) ** 2}
    return {
        case: latency.Ceiling(
            case[0] * max(count / spent[_title(task, *case)] for task, count in operations.items()),
            case[0] * 2 * worker.COPIED / spent[_title("copying", *case)],
        )
        for case in common
    }


CPU_COLUMNS = ("subject", "ms", "CPU ms", "peak MB", "of peak")


def _timing_row(name: str, timing: Timing, share: str = "") -> tuple[object, ...]:
    return name, f"{1e3 * timing.wall:.1f}", f"{1e3 * timing.cpu:.1f}", f"{timing.peak_mb:.0f}", share


def _roofline(
    works: Mapping[str, latency.Work], floors: Mapping[str, Mapping[str, float]], kind: str
) -> Table:
    """Return what every network has to do, and what that takes at the peaks measured in this run."""
    rows: list[tuple[object, ...]] = []
    for name, work in works.items():
        moved = (f"{2e-6 * numbers:.0f}" for numbers in (work.elements, work.least))
        times = (f"{floors[name][limit]:.3g}" for limit in ("arithmetic", "traffic", "least"))
        rows.append((name, f"{work.parameters / 1e6:.2g} M", f"{work.macs / 1e9:.1f}", *moved, *times))
    columns = ("network", "size", "GMAC", "MB", "least MB", "compute", "traffic", "least")
    title = f"what limits: MB moved in fp16, and ms at the peaks of this run ({kind})"
    return Table(title, columns, rows)


# --- RAW file to JPEG ---------------------------------------------------------------------------------


def scene(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return a picture like a photograph, ``(H, W, 3)`` sRGB: soft tones, edges, texture, always the same."""
    rng = np.random.default_rng(5)
    tones = cv2.resize(rng.uniform(10, 220, (7, 10, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(120):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        axes = (int(rng.integers(4, width // 8 + 5)), int(rng.integers(4, height // 8 + 5)))
        cv2.ellipse(
            tones, centre, axes, float(rng.uniform(0, 180)), 0, 360, rng.uniform(0, 255, 3).tolist(), -1
        )
    texture = cv2.GaussianBlur(rng.normal(0, 25, (height, width, 1)), (0, 0), 1.0)
    return np.asarray(np.clip(tones + texture.reshape(height, width, 1), 0, 255), np.uint8)


def write_scene(path: Path, height: int, width: int, shot: float = 1e-3) -> None:
    """Write ``scene``, repeated, as a noisy 12-bit DNG of this size."""
    recipe = quality.recipe(shot)
    part = scene(min(height, SCENE[0]), min(width, SCENE[1]))
    values, _ = unprocess.frame(part, recipe, np.random.default_rng(0))
    times = (math.ceil(height / values.shape[0]), math.ceil(width / values.shape[1]))
    whole = np.tile(values, times)[:height, :width]
    dng.write(path, libraw.plain(quality.mosaic(np.ascontiguousarray(whole), recipe)))


def _file(settings: Bench, lab: Any, folder: Path) -> Part:
    """Time the way from a RAW file to a JPEG, ours and LibRaw's."""
    height = 2 * round((settings.megapixels * 1e6 * 3 / 4) ** 0.5 / 2)
    width = 2 * round(settings.megapixels * 1e6 / height / 2)
    path = folder / "frame.dng"
    write_scene(path, height, width)
    common = {"path": str(path), "threads": _cores(), "model": {}, "weights": str(lab.path)}
    orders = {
        name: {"task": task, "target": str(folder / f"{number}.jpg"), **common}
        for number, (name, task) in enumerate(((OURS, "file"), (LIBRAW, "file by LibRaw")))
    }
    timings: dict[str, Timing] = lab.measure_by(worker.MODULE, orders)
    ours, other = timings[OURS], timings[LIBRAW]
    ratio = ours.wall / other.wall
    cold: dict[str, float] = lab.wall(commands(lab.path, path, folder), _cores())
    rows: list[tuple[object, ...]] = [
        (name, f"{t.wall:.2f}", f"{t.cpu:.2f}", f"{t.peak_mb:.0f}", f"{cold[name]:.2f}")
        for name, t in timings.items()
    ]
    figures: dict[str, object] = {
        "file": {
            "size": [width, height],
            "threads": _cores(),
            "wall_seconds": {name: t.wall for name, t in timings.items()},
            "cpu_seconds": {name: t.cpu for name, t in timings.items()},
            "peak_mb": {name: t.peak_mb for name, t in timings.items()},
            "cold_wall_seconds": cold,
            "wall_ratio_to_libraw": ratio,
        }
    }
    what = f"RAW file of {settings.megapixels} MP to JPEG"
    limits = [
        Budget(f"{what}, wall time over that of LibRaw AHD", RATIO, ratio, "times"),
        Budget(f"{what}, peak memory", PEAK_MB, ours.peak_mb, "MB"),
    ]
    title = f"{what}, {_cores()} threads, the decoder's process included; cold: a whole command, once"
    columns = ("subject", "wall s", "CPU s", "peak MB", "cold wall s")
    return quality.Part(figures, limits, [Table(title, columns, rows)])


def commands(weights: Path, path: Path, folder: Path) -> dict[str, list[str]]:
    """Return what makes JPEG files of a RAW file in a new Python process, ours and LibRaw's by rawpy.

    Args:
        weights: Of the network.
        path: The RAW file.
        folder: For the JPEG files.
    """
    ours = ["-m", "imgtool", "infer", "isp", str(path), "--weights", str(weights), "--device", "cpu"]
    return {
        OURS: [sys.executable, *ours, "-o", str(folder / "cold.jpg")],
        LIBRAW: [
            sys.executable,
            "-c",
            SCRIPT,
            str(path),
            str(folder / "cold-libraw.jpg"),
            str(worker.QUALITY),
        ],
    }
