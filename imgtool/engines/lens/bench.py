"""Bench of the lens engine: accuracy beside doing nothing, harm, calibrated cameras, cost of applying."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from imgtool import images, metrics, plots, samples, sheets
from imgtool.engine import Budget, Engine, Report, Subject, Table, Timing
from imgtool.engines.lens import data, estimate, lines, plumb, posterior, prior, synthesis, warp
from imgtool.engines.lens.geometry import BrownConrady, diagonal, error, zoom
from imgtool.engines.lens.settings import RISK, Infer
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from torch import nn

    from imgtool.engines.lens.settings import Bench

LARGE = (4000, 6000)
EXAMPLE = "-0.06,0.02,0.0005,-0.0005"
"""Coefficients with which applying is timed."""
DECENTRED = 0.001
"""Standard deviation of p1 and p2 of the lenses that photos are seen through."""
SEED = 20_261_121
HARM = posterior.HARM
SHOWN = 6
LONGER = 1600
"""Least pixels of a photo's shorter side that reading keeps."""
TOGETHER = 8
"""Photos of one lens that are solved together."""
MIRRORED = 24
"""Photos whose mirror image is looked at too."""
Parts = tuple[dict[str, object], list[Budget], list[Table]]


@dataclass
class Errors:
    """Displacement errors in % of the diagonal, by method, photo after photo."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **errors: float) -> None:
        """Add those of one photo."""
        for name, value in errors.items():
            self.values.setdefault(name, []).append(value)

    def mean(self, name: str) -> float:
        """Return the mean of a method."""
        return float(np.mean(self.values[name]))

    def harmed(self, name: str) -> float:
        """Return the share of photos that a method made worse by more than ``HARM``."""
        return float(np.mean(np.array(self.values[name]) > np.array(self.values["nothing"]) + HARM))

    def table(self, title: str) -> Table:
        """Return mean, median, 90th percentile and harm of every method."""
        rows: list[tuple[object, ...]] = []
        for name, values in self.values.items():
            low, high = metrics.interval(values)
            quantiles = (f"{np.quantile(values, part):.3f}" for part in (0.5, 0.9))
            rows.append(
                (
                    name,
                    f"{np.mean(values):.3f}",
                    f"{low:.3f}-{high:.3f}",
                    *quantiles,
                    f"{100 * self.harmed(name):.1f}",
                )
            )
        return Table(
            title, ("method", "mean", "95 %", "median", "p90", f"worse by > {HARM} %, % of photos"), rows
        )

    def figures(self) -> dict[str, object]:
        """Return the same as numbers."""
        return {
            name: {
                "mean": self.mean(name), "median": float(np.median(values)),
                "p90": float(np.quantile(values, 0.9)), "mean_95": list(metrics.interval(values)),
                "harmed": self.harmed(name),
            }
            for name, values in self.values.items()
        }  # fmt: skip


def run(settings: Bench, lab: Any, engine: Engine) -> Report:
    """Measure the cost of applying always, accuracy where ``photos`` or ``data`` are named."""
    net = lab.network()
    parts = [_cost(settings, lab)] if settings.large else []
    parts += [_photos(settings, net, lab)] if settings.photos else []
    parts += [_cameras(settings, net, lab)] if settings.data else []
    figures: dict[str, object] = {"parameters": sum(p.numel() for p in net.parameters())}
    budgets: list[Budget] = []
    tables: list[Table] = []
    for more, limits, shown in parts:
        figures |= more
        budgets += limits
        tables += shown
    return Report("lens distortion: accuracy, harm, cost", figures, budgets, tables)


# --- cost ------------------------------------------------------------------------------------------


def _cost(settings: Bench, lab: Any) -> Parts:
    straight = {"coeffs": EXAMPLE, "crop": "same"}
    ways = ("linear", "cubic", "lanczos")
    subjects = [Subject(f"ours, {way}", *LARGE, settings=straight | {"interpolation": way}) for way in ways]
    subjects.append(Subject("cv2.undistort, linear", *LARGE, baseline=True))
    timings: dict[str, Timing] = lab.measure(subjects)
    reference = timings["cv2.undistort, linear"].cpu
    ratio = timings["ours, linear"].cpu / reference
    memory = timings["ours, linear"].peak_mb - timings["ours, linear"].base_mb
    levels = apart_from_opencv()
    figures: dict[str, object] = {
        "apply_cpu_seconds": {name: timing.cpu for name, timing in timings.items()},
        "apply_extra_mb": {name: timing.peak_mb - timing.base_mb for name, timing in timings.items()},
        "apply_ratio_to_opencv": ratio,
        "apply_levels_from_opencv": levels,
    }
    budgets = [
        Budget("CPU time of 24 MP linear over cv2.undistort", 1.2, ratio, "times"),
        Budget("memory above the photo, 24 MP", 100, memory, "MB"),
        Budget("largest difference to OpenCV's map", 1, levels, "levels"),
    ]
    rows: list[tuple[object, ...]] = [
        (name, f"{t.cpu:.3f}", f"{t.cpu / reference:.2f}", f"{t.peak_mb - t.base_mb:.0f}")
        for name, t in timings.items()
    ]
    if settings.report:
        seconds = {name: timing.cpu for name, timing in timings.items()}
        plots.bars(seconds, settings.report / "apply.png", title="6000x4000", xlabel="CPU seconds")
    title = f"straightening 6000x4000, {settings.threads} thread(s)"
    return figures, budgets, [Table(title, ("what", "CPU s", "to OpenCV", "MB above the photo"), rows)]


def apart_from_opencv() -> int:
    """Return the largest difference to ``cv2.undistort`` on a smooth picture, in levels of 255."""
    rng = np.random.default_rng(0)
    picture = cv2.resize(
        rng.integers(0, 256, (30, 45, 3), np.uint8), (1500, 1000), interpolation=cv2.INTER_CUBIC
    )
    height, width = picture.shape[:2]
    unit = diagonal(width, height) / 2
    coefficients = np.array([float(word) for word in EXAMPLE.split(",")])
    matrix = np.array([[unit, 0, (width - 1) / 2], [0, unit, (height - 1) / 2], [0, 0, 1]])
    wanted = cv2.undistort(picture, matrix, coefficients).astype(int)
    model = BrownConrady(*coefficients.tolist())
    ours = warp.straighten(np.asarray(picture), model, 1.0, interpolation="linear", border="black")
    return int(np.abs(ours.astype(int) - wanted).max())


# --- accuracy --------------------------------------------------------------------------------------


def through(photo: npt.NDArray[Any], model: BrownConrady) -> npt.NDArray[Any]:
    """Return a straight photo ``(H, W, 3)`` as a lens would show it: same size, no border."""
    height, width = photo.shape[:2]
    view = synthesis.View(0.995 * synthesis.zoom(model, width, height))
    return synthesis.look(photo, *synthesis.inverse_map(model, width, height), view)


def _infer() -> Infer:
    return Infer(inputs=("-",))


def _judge(
    net: nn.Module, picture: npt.NDArray[Any], truth: BrownConrady, errors: Errors
) -> estimate.Evidence:
    """Add the errors of all methods on one picture; return what the network saw."""
    height, width = picture.shape[:2]
    settings = _infer()
    edges = lines.find(picture)
    seen = (
        estimate.edge_evidence(net, picture, edges)
        if isinstance(net, plumb.LinesNet)
        else estimate.look(net, picture, settings)
    )
    said = estimate.together([seen])
    fixed = estimate.together([estimate.edge_evidence(None, picture, edges)])
    models = {
        "nothing": BrownConrady(),
        "ours": estimate.decide(said, "net", settings.risk).model,
        "ours without gate": said.model,
        "lines, fixed weights, gated": estimate.decide(fixed, "lines", settings.risk).model,
    }
    errors.add(**{name: error(model, truth, width, height) for name, model in models.items()})
    return seen


def _pictures(folder: Path) -> list[Path]:
    found = [path for path in samples.pictures_in(folder) if path.suffix.lower() in images.WRITABLE]
    if not found:
        raise ImgtoolError(f"no photos in {folder}", "name a folder of straight photos", USAGE)
    return found


def _photos(settings: Bench, net: nn.Module, lab: Any) -> Parts:
    """Measure on straight photos, and on the same seen through lenses drawn at random."""
    paths = _pictures(settings.photos or Path())
    straight, spent, mirrored = _straight(paths, net)
    lab.watch.say(f"{len(paths)} straight photos")
    bent = Errors()
    for number in range(settings.count):
        photo, model = _drawn(paths, number), _lens(number, settings)
        _judge(net, through(photo, model), model, bent)
        if settings.report and number < SHOWN:
            _show(photo, model, net, settings.report / f"photo-{number:03d}.png")
        if number % 25 == 24:
            lab.watch.say(f"{number + 1} distorted photos")
    groups = _groups(settings, paths, net)
    ratio, harm = bent.mean("ours") / bent.mean("nothing"), straight.harmed("ours")
    figures: dict[str, object] = {
        "distorted": bent.figures() | {"photos": settings.count, "prior": settings.prior},
        "straight": straight.figures() | {"photos": len(paths)},
        "together": groups.figures() | {"photos": TOGETHER} if groups.values else {},
        "mirrored_apart": mirrored,
        "estimate_cpu_seconds": spent,
    }
    budgets = [
        Budget("distorted photos: mean error over doing nothing", 0.5, ratio, "times"),
        Budget("straight photos made worse", 2, 100 * harm, "%"),
    ]
    if settings.report:
        shown = {name: bent.values[name] for name in ("nothing", "ours")}
        plots.histogram(
            shown,
            settings.report / "errors.png",
            title=f"{settings.count} distorted photos",
            xlabel="mean displacement error, % of the diagonal",
        )
    tables = [
        bent.table(f"distorted photos, error in % of the diagonal, {settings.count}"),
        straight.table(f"straight photos, {len(paths)}"),
    ]
    tables += [groups.table(f"{TOGETHER} photos of one lens together")] if groups.values else []
    return figures, budgets, tables


def _drawn(paths: Sequence[Path], number: int) -> npt.NDArray[Any]:
    """Return photo ``number`` of an endless list in which every photo comes as often."""
    turn, place = divmod(number, len(paths))
    order = np.random.default_rng([SEED, 1, turn]).permutation(len(paths))
    return images.read_rgb8(paths[order[place]], LONGER)


def _lens(number: int, settings: Bench) -> BrownConrady:
    return prior.draw(np.random.default_rng([SEED, number]), settings.prior, DECENTRED)


def _groups(settings: Bench, paths: Sequence[Path], net: nn.Module) -> Errors:
    """Return the errors of solving photos of one lens together, for a tenth as many lenses as photos."""
    errors = Errors()
    for group in range(max(settings.count // 10, 1)):
        model = _lens(settings.count + group, settings)
        photos = [through(_drawn(paths, TOGETHER * group + number), model) for number in range(TOGETHER)]
        seen = [estimate.look(net, photo, _infer()) for photo in photos]
        found = estimate.decide(estimate.together(seen), "net", RISK).model
        width, height = seen[0].width, seen[0].height
        errors.add(
            nothing=error(BrownConrady(), model, width, height), ours=error(found, model, width, height)
        )
    return errors


def _straight(paths: Sequence[Path], net: nn.Module) -> tuple[Errors, float, float]:
    """Return the errors on straight photos, CPU seconds of an estimate, and how far mirror images differ."""
    errors, spent, apart = Errors(), [], []
    for number, path in enumerate(paths):
        photo = images.read_rgb8(path, LONGER)
        height, width = photo.shape[:2]
        _judge(net, photo, BrownConrady(), errors)
        if number < MIRRORED:
            began = time.process_time()
            said = estimate.together([estimate.look(net, photo, _infer())]).model
            spent.append(time.process_time() - began)
            turned = np.ascontiguousarray(photo[:, ::-1])
            other = estimate.together([estimate.look(net, turned, _infer())]).model
            apart.append(error(other.mirrored(), said, width, height))
    return errors, float(np.mean(spent)), float(np.mean(apart))


def _show(photo: npt.NDArray[Any], model: BrownConrady, net: nn.Module, path: Path) -> None:
    picture = through(photo, model)
    said = estimate.decide(estimate.together([estimate.look(net, picture, _infer())]), "net", RISK).model
    height, width = picture.shape[:2]
    larger = zoom(said, width, height, "fill")
    after = warp.straighten(picture, said, larger, interpolation="cubic", border="black")
    words = f"true corner {50 * model.corner:+.2f} %, found {50 * said.corner:+.2f} %"
    sheets.compare(picture, after, path, title=words)


# --- calibrated cameras ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Label:
    """A photo of a calibrated camera."""

    path: Path
    truth: BrownConrady


def labels(folder: Path) -> dict[str, list[Label]]:
    """Return the photos that every labels.jsonl in a folder names, by camera: the path of its folder.

    Raises:
        ImgtoolError: Code 2, where there are none; code 1 for labels that lack a coefficient.
    """
    found: dict[str, list[Label]] = {}
    for file in sorted(folder.rglob("labels.jsonl")) if folder.is_dir() else []:
        camera = str(file.parent.relative_to(folder)) if file.parent != folder else folder.name
        for name, row in data.read_labels(file.parent).items():
            try:
                label = Label(file.parent / name, data.model_of(row))
            except ValueError as fault:
                raise ImgtoolError(f"{file}: the label of {name} has {fault}", "write it again") from None
            found.setdefault(camera, []).append(label)
    if not found:
        hint = "imgtool data calibrate lens writes them from photos of a chessboard"
        raise ImgtoolError(f"no labels.jsonl in {folder}", hint, USAGE)
    return found


def _cameras(settings: Bench, net: nn.Module, lab: Any) -> Parts:
    """Measure on photos of calibrated cameras, as they are and straightened by the calibration."""
    figures: dict[str, object] = {}
    tables: list[Table] = []
    every, straight = Errors(), Errors()
    for camera, photos in labels(settings.data or Path()).items():
        errors, seen = Errors(), []
        for label in photos:
            picture = images.read_rgb8(label.path)
            height, width = picture.shape[:2]
            seen.append(_judge(net, picture, label.truth, errors))
            larger = zoom(label.truth, width, height, "fill")
            flat = warp.straighten(picture, label.truth, larger, interpolation="cubic", border="black")
            _judge(net, flat, BrownConrady(), straight)
        for name, values in errors.values.items():
            every.values.setdefault(name, []).extend(values)
        group = error(estimate.together(seen).model, photos[0].truth, seen[0].width, seen[0].height)
        figures[camera] = errors.figures() | {"photos": len(photos), "together": group}
        table = errors.table(f"camera {camera}, error in % of the diagonal, {len(photos)} photos")
        table.rows.append(("ours, all photos together", f"{group:.3f}", "", "", "", ""))
        tables.append(table)
        lab.watch.say(f"camera {camera}: {len(photos)} photos")
    count = len(every.values["ours"])
    tables.append(straight.table(f"straightened by calibration, {count} photos"))
    budgets = [
        Budget(
            "calibrated cameras: mean error over doing nothing",
            0.5,
            every.mean("ours") / every.mean("nothing"),
            "times",
        ),
        Budget("photos straightened by calibration made worse", 2, 100 * straight.harmed("ours"), "%"),
    ]
    more: dict[str, object] = {
        "cameras": figures,
        "all_cameras": every.figures(),
        "straightened": straight.figures(),
    }
    return more, budgets, tables
