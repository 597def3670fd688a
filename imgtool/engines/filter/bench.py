"""Bench of the filter engine: error and time of networks, the filters, and what else could replace them.

Where a network pays is told by figures alone. Its rivals are the filter itself, the filter on a smaller
photo (``upsample``), and doing nothing. What the two smaller sizes reach in a time between theirs is
interpolated, over the logarithm of time.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from imgtool import checkpoint, compute, images, plots, sheets, views
from imgtool.engine import Budget, Engine, Report, Table, Timing
from imgtool.engines.filter import blackbox, quality, synthetic, worker
from imgtool.engines.filter.quality import CLASSICAL, HALF, LEARNED, NOTHING, QUARTER, SIZES, Case, Compared
from imgtool.errors import USAGE, ImgtoolError
from imgtool.tiles import mirrored

if TYPE_CHECKING:
    from imgtool.engines.filter.quality import Picture
    from imgtool.engines.filter.settings import Bench

FLOORS: Mapping[str, float] = {
    "sobel_3": 49, "bilateral": 48.5, "tv": 43, "rolling_guidance": 44, "nlm": 40.5, "weighted_median": 41.5,
    "l0": 35,
}  # fmt: skip
"""Filter to the least mean PSNR in dB of its network."""
FASTER, AT = 5.0, 39.5
"""How many times as fast as the filter a network of this PSNR must be,"""
FAST = ("nlm", "tv", "weighted_median")
"""of these filters."""
L0_MS = 200.0
PARAMETERS = 2505
"""Of the original's network, for sobel_3."""
AMPLIFIED = 8
DETAIL = 256
"""Edge in pixels of what sheets show of a photo."""


class Point(NamedTuple):
    """A way to a result: milliseconds per megapixel, and PSNR in dB or F1, NaN where unknown."""

    ms: float
    value: float = float("nan")


def run(settings: Bench, lab: Any, engine: Engine) -> Report:
    """Measure time always, error where ``photos`` is named."""
    paths = quality.pictures(settings.photos) if settings.photos else []
    cases = chosen(settings, lab, engine)
    picture = timed_picture(settings.megapixels, paths)
    clock = "cpu" if compute.device(settings.device).type == "cpu" else "wall"
    times = _times(cases, picture, settings, lab, clock)
    smaller = _variants(cases, paths, settings)
    compared = quality.on_photos(cases, paths, engine, lab, smaller) if paths else {}
    points = {case.label: _points(times[case.label], compared.get(case.label)) for case in cases}
    figures: dict[str, dict[str, Any]] = {
        case.label: _figures(case, points[case.label], compared.get(case.label), clock) for case in cases
    }
    if settings.report:
        _draw(points, compared, settings.report, clock)
    unit = (
        f"ms per megapixel, {clock} time, {settings.threads} thread(s), {picture.shape[1]}x{picture.shape[0]}"
    )
    tables = [_time_table(points, unit), *_quality_tables(compared, len(paths)), _verdict_table(figures)]
    told = {
        "clock": clock,
        "size": [picture.shape[1], picture.shape[0]],
        "photos": len(paths),
        "filters": figures,
    }
    return Report("networks beside the filters that they imitate", told, limits(figures), tables)


# --- what is measured ------------------------------------------------------------------------


def chosen(settings: Bench, lab: Any, engine: Engine) -> list[Case]:
    """Return the networks that the settings name.

    Raises:
        ImgtoolError: Code 2: no shipped weights for a filter; weights of a filter that only pairs tell.
    """
    if settings.weights and settings.target:
        raise ImgtoolError("--target and --weights both name weights", "give one of them", USAGE)
    paths = (
        [lab.path] if settings.weights else sorted(checkpoint.SHIPPED.glob(f"{engine.name}-*.safetensors"))
    )
    found = [_case(path, engine, settings.device) for path in paths]
    if settings.target:
        wanted = [blackbox.resolve(spec).spec for spec in settings.target]
        for spec in wanted:
            if spec not in (case.target.spec for case in found):
                known = ", ".join(case.target.spec for case in found)
                raise ImgtoolError(f"no shipped weights imitate {spec}", f"there are: {known}", USAGE)
        found = [case for case in found if case.target.spec in wanted]
    specs = [case.target.spec for case in found]
    return [
        case if specs.count(case.label) == 1 else replace(case, label=f"{case.label} ({case.path.stem})")
        for case in found
    ]


def _case(path: Path, engine: Engine, device: str) -> Case:
    weights = checkpoint.read_weights(path, engine.name)
    spec = str(weights.model.get("target", ""))
    if spec.startswith("pairs:"):
        hint = "give weights of a filter by name, or of a Python function"
        raise ImgtoolError(f"{path.name} imitates pairs: there is no filter to measure beside", hint, USAGE)
    target = blackbox.resolve(spec)
    net = compute.channels_last(checkpoint.network(engine, weights).to(compute.device(device)))
    return Case(target.spec, path, net, target)


def timed_picture(megapixels: float, paths: Sequence[Path]) -> Picture:
    """Return a picture of this size, 4 to 3: of the first photo, mirrored where that ends, or drawn."""
    width = max(1, round(math.sqrt(megapixels * 1e6 * 4 / 3)))
    height = max(1, round(megapixels * 1e6 / width))
    if not paths:
        return drawn(height, width)
    photo = images.read_rgb8(paths[0])
    rows, columns = (
        mirrored((size - length) // 2, (size - length) // 2 + length, size)
        for size, length in zip(photo.shape[:2], (height, width), strict=True)
    )
    return np.ascontiguousarray(photo[rows][:, columns])


def drawn(height: int, width: int) -> Picture:
    """Return a picture with edges, texture, soft tones and a little noise, ``(H, W, 3)``, always the same."""
    rng = np.random.default_rng(6)
    tones = 0.7 * synthetic.leaves(rng, height, width) + 0.3 * synthetic.gradients(rng, height, width)
    return np.asarray(np.clip(255 * tones + rng.normal(0, 3, tones.shape), 0, 255), np.uint8)


def _times(
    cases: Sequence[Case], picture: Picture, settings: Bench, lab: Any, clock: str
) -> dict[str, dict[str, float]]:
    """Return milliseconds per megapixel by case and method, each timed in fresh processes, in turn."""
    with tempfile.TemporaryDirectory(prefix="imgtool-") as name:
        file = Path(name, "picture.npy")
        np.save(file, picture)
        common = {"picture": str(file), "threads": settings.threads}
        orders: dict[str, dict[str, Any]] = {}
        for case in cases:
            for method, factor in {CLASSICAL: 1.0, **SIZES}.items():
                orders[f"{case.target.spec}, {method}"] = {
                    "target": case.target.spec,
                    "factor": factor,
                    **common,
                }
            order = {"weights": str(case.path), "device": settings.device, **common}
            orders[f"{case.label}, {LEARNED}"] = order
        timings: dict[str, Timing] = lab.measure_by(worker.MODULE, orders)
    scale = 1e9 / (picture.shape[0] * picture.shape[1])
    return {
        case.label: {
            method: scale * getattr(timings[f"{name}, {method}"], clock)
            for method, name in {
                **dict.fromkeys((CLASSICAL, *SIZES), case.target.spec), LEARNED: case.label
            }.items()
        }
        for case in cases
    }  # fmt: skip


def _variants(cases: Sequence[Case], paths: Sequence[Path], settings: Bench) -> quality.Variants:
    """Return smaller forms of the networks, calibrated on every fourth photo, or on a drawn picture."""
    if not (settings.variants and paths):
        return quality.Variants({}, [])
    from imgtool.engines.filter import variants

    seen = paths[::4] if len(paths) > 3 else []
    pictures = [images.read_rgb8(path) for path in seen] or [drawn(768, 1024)]
    return quality.Variants({case.label: variants.variants(case.net, pictures) for case in cases}, seen)


def _points(times: Mapping[str, float], compared: Compared | None) -> dict[str, Point]:
    points = {method: Point(ms, compared.value(method) if compared and method != CLASSICAL else math.nan)
              for method, ms in times.items()}  # fmt: skip
    points[CLASSICAL] = Point(times[CLASSICAL], math.inf)
    return {NOTHING: Point(0.0, compared.value(NOTHING) if compared else math.nan), **points}


def _figures(
    case: Case, points: Mapping[str, Point], compared: Compared | None, clock: str
) -> dict[str, Any]:
    """Return what the record keeps of a network."""
    found: dict[str, Any] = {
        "target": case.target.spec,
        "weights": case.path.name,
        "parameters": sum(each.numel() for each in case.net.parameters()),
        "ms_per_megapixel": {method: point.ms for method, point in points.items() if method != NOTHING},
        "times_as_fast": points[CLASSICAL].ms / points[LEARNED].ms,
        "verdict": verdict(points, case.target.metric, "this CPU" if clock == "cpu" else "this device"),
    }
    if compared is None:
        return found
    return found | {
        "quality": compared.figures(),
        "grade": quality.grade(compared.found[LEARNED]),
        "photos": compared.per_photo(),
        "tiled_apart": compared.apart,
        "variants": compared.changes(),
    }


# --- verdicts --------------------------------------------------------------------------------


def verdict(points: Mapping[str, Point], metric: str = "psnr", where: str = "this CPU") -> str:
    """Say whether a network pays, from the figures of one run alone.

    Args:
        points: By method: nothing, classical, half size, quarter size, learned.
        metric: What the values are: "psnr" or "f1".
        where: What it was timed on.
    """
    ours = points[LEARNED]
    speed = points[CLASSICAL].ms / ours.ms
    if speed <= 1:
        told = f"the filter itself takes {_ms(points[CLASSICAL])}, the network {_ms(ours)}"
        return f"does not pay on {where}: {told}"
    if math.isnan(ours.value):
        return f"{speed:.1f} times as fast as the filter; how near it comes, photos tell (--photos)"
    if points[NOTHING].value >= ours.value:
        told = f"{_told(points[NOTHING].value, metric)} against {_told(ours.value, metric)}"
        return f"does not pay: doing nothing is as near to the filter ({told})"
    for name in SIZES:
        rival = points[name]
        if rival.value >= ours.value and rival.ms <= ours.ms:
            told = f"{_both(rival, metric)}, the network {_both(ours, metric)}"
            return f"does not pay: the filter at {name} is better and faster ({told})"
    level, how = reached(points, ours.ms)
    if level >= ours.value:
        told = f"{_told(level, metric)}, the network {_told(ours.value, metric)}"
        return f"does not pay: {how} has {told}"
    gain = f"{_told(ours.value - level, metric)} better than {how}".rstrip(",")
    return f"pays: {speed:.1f} times as fast as the filter, and {gain}"


def reached(points: Mapping[str, Point], ms: float) -> tuple[float, str]:
    """Return what is reached without a network in at most a time, and in words how.

    Where the filter at quarter size does not take longer and that at half size does, there are sizes between:
    what they give is interpolated over the logarithm of time.
    """
    small, large, least = points[QUARTER], points[HALF], points[NOTHING].value
    in_time = [name for name in SIZES if points[name].ms <= ms]
    found = [(points[name].value, f"the filter at {name} ({_ms(points[name])})") for name in in_time]
    if in_time == [QUARTER]:
        share = math.log(ms / small.ms) / math.log(large.ms / small.ms)
        between = small.value + share * (large.value - small.value)
        found.append((between, "the filter at a size between, in the same time,"))
    nothing = "doing nothing" if in_time else "doing nothing (the filter at quarter size takes longer)"
    return max([(least, nothing), *found])


def _ms(point: Point) -> str:
    return f"{point.ms:.3g} ms/MP"


def _told(value: float, metric: str) -> str:
    return f"F1 {value:.3f}" if metric == "f1" else f"{value:.1f} dB"


def _both(point: Point, metric: str) -> str:
    return f"{_told(point.value, metric)} in {_ms(point)}"


# --- limits ----------------------------------------------------------------------------------


def limits(figures: Mapping[str, Mapping[str, Any]]) -> list[Budget]:
    """Return the limits of the filters that were measured, with their usual parameters.

    Where several networks imitate one filter, the nearest has to be near enough; that one is fast enough is
    asked of those that reach a PSNR of ``AT``.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for each in figures.values():
        groups.setdefault(each["target"], []).append(each)
    found = [limit for spec, some in groups.items() for limit in _limits_of(spec, some)]
    apart = [each["tiled_apart"] for each in figures.values() if each.get("tiled_apart") is not None]
    if apart:
        name = f"tiles of {quality.TILE} against the whole photo, largest difference"
        found.append(Budget(name, 0, max(apart), "levels"))
    return found


def _limits_of(spec: str, some: Sequence[Mapping[str, Any]]) -> list[Budget]:
    found = []
    if spec == "sobel_3":
        found.append(Budget(f"{spec}: parameters", PARAMETERS, min(each["parameters"] for each in some), ""))
    if spec in FLOORS and all("quality" in each for each in some):
        best = max(_psnr(each) for each in some)
        found.append(Budget(f"{spec}: mean PSNR", FLOORS[spec], best, "dB", ">="))
    if spec in FAST:
        speed = max((each["times_as_fast"] for each in some if _psnr(each) >= AT), default=0.0)
        found.append(
            Budget(f"{spec}: times as fast as the filter, at {AT:g} dB", FASTER, speed, "times", ">=")
        )
    if spec == "l0":
        least = min(each["ms_per_megapixel"][LEARNED] for each in some)
        found.append(Budget(f"{spec}: time per megapixel", L0_MS, least, "ms"))
    return found


def _psnr(figures: Mapping[str, Any]) -> float:
    """Return the network's mean PSNR, infinity where no photos told it."""
    return float(figures["quality"][LEARNED]["psnr"]) if "quality" in figures else math.inf


# --- what people see -------------------------------------------------------------------------


SHORT = {NOTHING: "nothing", QUARTER: "1/4 size", HALF: "1/2 size", LEARNED: "learned"}


def _time_table(points: Mapping[str, Mapping[str, Point]], title: str) -> Table:
    rows: list[tuple[object, ...]] = []
    for label, each in points.items():
        times = (f"{each[method].ms:.3g}" for method in (CLASSICAL, HALF, QUARTER, LEARNED))
        rows.append((label, *times, f"{each[CLASSICAL].ms / each[LEARNED].ms:.2f}"))
    return Table(title, ("filter", CLASSICAL, "1/2 size", "1/4 size", LEARNED, "faster"), rows)


def _quality_tables(compared: Mapping[str, Compared], count: int) -> list[Table]:
    """Return PSNR with grades, SSIM with errors; F1 where there are thin edges, and smaller forms."""
    if not compared:
        return []
    figures = {label: each.figures() for label, each in compared.items()}
    ours = {label: each[LEARNED] for label, each in figures.items()}
    grades = {label: quality.grade(each.found[LEARNED]).partition(",")[0] for label, each in compared.items()}
    worst = {label: (f"{each['psnr_worst']:.2f}", grades[label]) for label, each in ours.items()}
    errors = {label: (f"{each['p999_worst']:.1f}",) for label, each in ours.items()}
    edges = {label: (f"{each['f1_worst']:.3f}",) for label, each in ours.items() if "f1" in each}
    changed: list[tuple[object, ...]] = [
        (label, name, f"{change:+.2f}")
        for label, each in compared.items()
        for name, change in each.changes().items()
    ]
    title = f"PSNR in dB to the filter, {count} photo(s): means, the network's worst, its grade"
    tables = [
        _methods(title, "psnr", ".2f", figures, ("worst", "grade"), worst),
        _methods("SSIM; what 99.9 % of errors keep to, in 1/255", "ssim", ".4f", figures, ("p99.9",), errors),
    ]
    if edges:
        tables.append(_methods("F1 of edges, one pixel off allowed", "f1", ".3f", figures, ("worst",), edges))
    if changed:
        tables.append(Table("smaller forms: change of PSNR in dB", ("filter", "form", "change"), changed))
    return tables


def _methods(
    title: str,
    name: str,
    form: str,
    figures: Mapping[str, Mapping[str, Mapping[str, float]]],
    columns: Sequence[str],
    more: Mapping[str, tuple[str, ...]],
) -> Table:
    """Return a table of a figure by filter and method, with ``columns`` that ``more`` fills."""
    rows: list[tuple[object, ...]] = [
        (label, *(format(figures[label][method][name], form) for method in SHORT), *last)
        for label, last in more.items()
    ]
    return Table(title, ("filter", *SHORT.values(), *columns), rows)


def _verdict_table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    rows: list[tuple[object, ...]] = [(f"{label}: {each['verdict']}",) for label, each in figures.items()]
    return Table("Where learning pays", ("filter and verdict",), rows)


def _draw(
    points: Mapping[str, Mapping[str, Point]], compared: Mapping[str, Compared], folder: Path, clock: str
) -> None:
    """Draw quality against time for each filter and for all, and sheets of the first photos."""
    xlabel = f"milliseconds per megapixel ({clock} time)"
    for label, each in compared.items():
        ylabel = "F1 of thin edges" if each.target.metric == "f1" else "mean PSNR to the filter, dB"
        stem = re.sub(r"[^\w.=-]+", "-", label).strip("-")
        shown = {method: (point.ms, point.value) for method, point in points[label].items()}
        words: dict[str, Any] = {"title": label, "line": (QUARTER, HALF), "highlight": LEARNED}
        plots.against_time(shown, folder / f"{stem}.png", labels=(xlabel, ylabel), **words)
        _sheet(each, folder / f"{stem}-photos.png", label)
    if compared:
        title = "Learned filters (stars), and the filters at quarter and half size"
        labels = ("time, as a share of the filter's own", "mean PSNR to the filter, dB")
        plots.rivals(_shares(points, compared), folder / "overview.png", title=title, labels=labels)


def _shares(
    points: Mapping[str, Mapping[str, Point]], compared: Mapping[str, Compared]
) -> dict[str, list[tuple[float, float]]]:
    """Return quarter size, half size, learned of each filter: share of the filter's time, and PSNR."""
    return {
        label: [
            (points[label][method].ms / points[label][CLASSICAL].ms, each.figures()[method]["psnr"])
            for method in (QUARTER, HALF, LEARNED)
        ]
        for label, each in compared.items()
    }


def _sheet(compared: Compared, path: Path, title: str) -> None:
    """Write details of the first photos, where the network differs most from the filter."""
    names = ("photo", "filter", "network", f"difference × {AMPLIFIED}")
    columns: dict[str, Any] = {name: [] for name in names}
    for photo, classical, learned in compared.shown:
        pair = [
            np.broadcast_to(each.reshape(*each.shape[:2], -1), photo.shape) for each in (classical, learned)
        ]
        size = (min(DETAIL, photo.shape[1]), min(DETAIL, photo.shape[0]))
        place = views.regions(pair[0], pair[1], 1, size)[0]
        shown = [place.cut(each) for each in (photo, *pair, cv2.absdiff(*pair))]
        shown[-1] = np.minimum(shown[-1].astype(np.uint16) * AMPLIFIED, 255).astype(np.uint8)
        for name, picture in zip(names, shown, strict=True):
            columns[name].append(picture)
    metric = compared.target.metric
    captions = [
        f"{name}: {_told(getattr(each, metric), metric)}"
        for name, each in zip(compared.names, compared.found[LEARNED], strict=True)
    ][: len(compared.shown)]
    sheets.sheet(columns, path, title=title, captions=captions)
