"""Quality beside LibRaw: on raw frames made of photographs, whose truth is known, and on pairs.

Edges of the pictures do not count (``libraw.MARGIN``). Frames that are made of photographs tell their noise,
as DNG files of phones do; "ours, noise measured" is the same network on frames that do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imgtool import files, images, metrics, plots, samples, sheets, views
from imgtool.engine import Budget, Engine, Table, Watch
from imgtool.engines.isp import colour, layouts, libraw, unprocess
from imgtool.engines.isp.settings import Infer
from imgtool.errors import USAGE, ImgtoolError
from imgtool.mosaic import Mosaic

if TYPE_CHECKING:
    from torch import nn

    from imgtool.engines.isp.settings import Bench

Picture = npt.NDArray[np.uint8]

CAMERA = "Canon PowerShot G2"
GAINS = (1.9, 1.0, 1.6)
"""White balance of the frames that are made of photographs."""
SEED = 20_261_121
OURS, MEASURED, FRONT_END = "ours", "ours, noise measured", "front end (Malvar)"
ABOVE = {0.0: -1.0, 1e-4: -1.0, 1e-3: 1.0, 4e-3: 2.5, 1e-2: 4.0}
"""Shot noise to the dB that the network must be above LibRaw's best setting."""
CLOSER = (OURS, libraw.DEFAULT)
"""What SSIM and colour differences are measured of."""
SHOWN, DETAIL = 4, 192
"""Pictures on a sheet, and the edge of what is shown of each."""
ROWS = 20
"""Pairs that a table lists."""


@dataclass
class Part:
    """What a part of the bench adds to the report."""

    figures: dict[str, Any]
    budgets: list[Budget]
    tables: list[Table]


class Measured(NamedTuple):
    """How near a picture is to the truth."""

    psnr: float
    ssim: float
    de00: float


def measured(picture: Picture, truth: Picture, closer: bool = True) -> Measured:
    """Compare 8-bit pictures without their edges; SSIM and CIEDE2000 are NaN where ``closer`` is not set."""
    one, two = (metrics.batch_of(_inside(each)) for each in (picture, truth))
    ssim = de00 = float("nan")
    if closer:
        de00 = float(metrics.colour_difference(one, two))
        ssim = float(metrics.ssim(one, two)) if min(one.shape[2:]) >= 11 else ssim
    return Measured(float(metrics.psnr(one, two)), ssim, de00)


def _inside(picture: Picture) -> Picture:
    edge = libraw.MARGIN
    return picture if min(picture.shape[:2]) <= 2 * edge else picture[edge:-edge, edge:-edge]


def recipe(shot: float) -> unprocess.Recipe:
    """Return how the frames of a noise are made: a known camera in daylight, 12 bits, black at 256."""
    matrix = colour.camera_to_srgb(unprocess.xyz_to_camera(CAMERA))
    return unprocess.Recipe(GAINS, matrix, shot, unprocess.typical_read(shot), bits=12, black=256)


def mosaic(values: npt.NDArray[np.uint16], made: unprocess.Recipe, name: str = "") -> Mosaic:
    """Return the frame of raw integers that were made by ``recipe``; it tells its noise."""
    return replace(unprocess.as_mosaic(values, made, name), xyz_to_camera=unprocess.xyz_to_camera(CAMERA))


def developed(net: nn.Module | None, engine: Engine, frame: Mosaic) -> Picture:
    """Return what the engine makes of a whole frame, not turned; without a network, its front end."""
    words: dict[str, Any] = {} if net else {"demosaic": "malvar"}
    settings = Infer(inputs=("-",), depth="8", area="visible", flip=False, **words)
    return engine.apply(net, frame, settings, Watch()).pixels


def check(settings: Bench) -> None:
    """Raise what is wrong with folders and noise levels, before anything is measured.

    Raises:
        ImgtoolError: Code 2: a folder that does not exist or holds nothing, a noise that is no number.
    """
    if settings.photos:
        levels(settings.shot)
        _pictures(settings.photos)
    if settings.data:
        _whole_pairs(settings.data)


# --- photos -------------------------------------------------------------------------------------------


def levels(text: str) -> list[float]:
    """Return the shot noises that the settings name, ascending.

    Raises:
        ImgtoolError: Code 2, for what is no number in 0..0.1, or none.
    """
    try:
        found = sorted({float(word) for word in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 <= level <= 0.1 for level in found):
        raise ImgtoolError(f"--shot {text!r} is not understood", "give numbers in 0..0.1: 0,1e-3,1e-2", USAGE)
    return found


def on_photos(net: nn.Module, engine: Engine, settings: Bench, lab: Any) -> Part:
    """Compare on raw frames made of photographs, at each noise."""
    assert settings.photos is not None
    shots = levels(settings.shot)
    paths = _photographs(settings.photos, lab)
    found: dict[float, Level] = {shot: Level() for shot in shots}
    with lab.console.progress(len(paths) * len(shots), "photos") as bar:
        for number, path in enumerate(paths):
            rgb = images.read_rgb8(path)
            rgb = np.ascontiguousarray(rgb[: len(rgb) // 2 * 2, : rgb.shape[1] // 2 * 2])
            for shot, level in found.items():
                bar.update(path.name)
                level.add(path, *_renderings(net, engine, rgb, shot, number), keep=number < SHOWN)
                bar.advance(1)
    if settings.report:
        _report(found, settings.report)
    figures = {f"{shot:g}": level.figures() for shot, level in found.items()}
    limits = [
        Budget(f"PSNR above LibRaw's best at shot {shot:g}", ABOVE[shot], level.above(), "dB", ">=")
        for shot, level in found.items()
        if shot in ABOVE
    ]
    title = f"PSNR in dB by shot noise, {len(paths)} photos"
    told = {"photos": {"count": len(paths), "camera": CAMERA, "levels": figures}}
    return Part(told, limits, [_table(found, title), _closer_table(found)])


def _photographs(folder: Path, lab: Any) -> list[Path]:
    """Return the photos of a folder that the weights were not trained on, nor on views of them."""
    paths = _pictures(folder)
    trained = trained_on(lab)
    kept = [path for path in paths if not stems(path.name, samples.indexed_source(path)) & trained]
    _tell(len(paths) - len(kept), len(paths), "photos", lab)
    return kept


def _pictures(folder: Path) -> list[Path]:
    paths = [path for path in samples.pictures_in(folder) if path.suffix.lower() not in files.RAW]
    if not paths:
        raise ImgtoolError(f"no photos in {folder}", "name a folder of photos", USAGE)
    return paths


def trained_on(lab: Any) -> frozenset[str]:
    """Return ``stems`` of the photos that the weights were trained on, as far as their header tells."""
    header = lab.weights.header
    if "trained_on" not in header:
        lab.watch.say("the weights do not tell what they were trained on: figures on that would be no test")
    if unknown := header.get("trained_on_left_out"):
        lab.watch.say(f"{unknown} pictures that the weights were trained on have mere numbers for names: "
                      "they cannot be recognised, and figures on them would be no test")  # fmt: skip
    return stems(*header.get("trained_on", ()))


def stems(*names: str) -> frozenset[str]:
    """Return names without folders, both with and without what may be an extension.

    >>> sorted(stems("photos/a.jpg", "b.2", ""))
    ['a', 'a.jpg', 'b', 'b.2']
    """
    paths = [Path(name) for name in names if name]
    return frozenset(part for path in paths for part in (path.stem, path.name))


def _tell(left_out: int, count: int, what: str, lab: Any) -> None:
    if left_out == count:
        raise ImgtoolError(
            f"the weights were trained on all of these {what}: figures on them are no test",
            "name a folder of others",
            USAGE,
        )
    if left_out:
        lab.watch.say(f"{left_out} of {count} {what} are left out: the weights were trained on them")


def _renderings(
    net: nn.Module, engine: Engine, rgb: Picture, shot: float, number: int
) -> tuple[dict[str, Picture], Picture]:
    """Return what everything makes of a photo's raw frame, and the truth."""
    made = recipe(shot)
    values, truth = unprocess.frame(rgb, made, np.random.default_rng([SEED, number]))
    frame = mosaic(values, made)
    found = {
        OURS: developed(net, engine, frame),
        MEASURED: developed(net, engine, replace(frame, noise=None)),
        FRONT_END: developed(None, engine, frame),
    }
    return found | libraw.of_mosaic(frame, libraw.WAYS), truth


@dataclass
class Level:
    """What was found at a noise, or on a group of pairs.

    Attributes:
        names: Of the pictures.
        found: Method to how near each of its pictures is to the truth.
        details: Of the first pictures, method or "truth" to a detail of each.
    """

    names: list[str] = field(default_factory=list)
    found: dict[str, list[Measured]] = field(default_factory=dict)
    details: dict[str, list[Picture]] = field(default_factory=dict)

    def add(self, path: Path, pictures: Mapping[str, Picture], truth: Picture, *, keep: bool) -> None:
        """Measure the pictures of a frame; ``keep`` the detail in which ours and AHD differ most."""
        self.names.append(path.name)
        for name, picture in pictures.items():
            self.found.setdefault(name, []).append(measured(picture, truth, name in CLOSER))
        if keep:
            edge = (min(DETAIL, truth.shape[1]), min(DETAIL, truth.shape[0]))
            place = views.regions(pictures[libraw.DEFAULT], pictures[OURS], 1, edge)[0]
            rows = slice(place.y, place.y + place.height)
            columns = slice(place.x, place.x + place.width)
            for name, picture in {"truth": truth, **pictures}.items():
                self.details.setdefault(name, []).append(picture[rows, columns])

    def psnr(self) -> dict[str, float]:
        """Return method to mean PSNR."""
        return {name: float(np.mean([each.psnr for each in some])) for name, some in self.found.items()}

    def best(self) -> str:
        """Return the setting of LibRaw with the greatest mean PSNR."""
        means = self.psnr()
        return max((name for name in libraw.WAYS if name in means), key=lambda name: means[name])

    def gains(self, method: str = OURS) -> list[float]:
        """Return by how much a method's PSNR is above that setting's, picture by picture."""
        pairs_of = zip(self.found[method], self.found[self.best()], strict=True)
        return [ours.psnr - other.psnr for ours, other in pairs_of]

    def above(self, method: str = OURS) -> float:
        """Return the mean of ``gains``."""
        return float(np.mean(self.gains(method)))

    def figures(self) -> dict[str, Any]:
        """Return what the record keeps."""
        closer = {
            name: {
                "ssim": float(np.nanmean([each.ssim for each in self.found[name]])),
                "de00": float(np.mean([each.de00 for each in self.found[name]])),
            }
            for name in CLOSER
        }
        return {
            "count": len(self.names),
            "psnr": self.psnr(),
            "psnr_95": list(metrics.interval([each.psnr for each in self.found[OURS]])),
            "best_libraw": self.best(),
            "above_best_libraw": self.above(),
            "above_best_libraw_95": list(metrics.interval(self.gains())),
            **({"above_best_libraw_noise_measured": self.above(MEASURED)} if MEASURED in self.found else {}),
            **{
                name: {method: values[name] for method, values in closer.items()} for name in ("ssim", "de00")
            },
        }


def _table(found: Mapping[float, Level], title: str) -> Table:
    """Return mean PSNR: a row for each method, a column for each noise."""
    means = [level.psnr() for level in found.values()]
    rows: list[tuple[object, ...]] = [(name, *(f"{mean[name]:.2f}" for mean in means)) for name in means[0]]
    rows.append(("best of LibRaw", *(level.best() for level in found.values())))
    for method in (OURS, MEASURED):
        rows.append((f"{method}, above it", *(f"{level.above(method):+.2f}" for level in found.values())))
    return Table(title, ("method", *(f"{shot:g}" for shot in found)), rows)


def _closer_table(found: Mapping[float, Level]) -> Table:
    rows: list[tuple[object, ...]] = []
    for name, label, form in (("ssim", "SSIM", ".4f"), ("de00", "CIEDE2000", ".2f")):
        for method in CLOSER:
            values = (level.figures()[name][method] for level in found.values())
            rows.append((f"{label}, {method}", *(format(value, form) for value in values)))
    return Table("similarity and colour by shot noise", ("what", *(f"{shot:g}" for shot in found)), rows)


def _report(found: Mapping[float, Level], folder: Path) -> None:
    """Write a sheet for each noise, and a plot of PSNR by noise."""
    for shot, level in found.items():
        _sheet(level, level.best(), folder / f"shot-{shot:g}.png", f"Shot noise {shot:g}")
    names = (OURS, MEASURED, *libraw.WAYS)  # as many as there are colours
    lines = {
        name: np.array([[_noise_percent(shot), level.psnr()[name]] for shot, level in found.items()])
        for name in names
    }
    labels = ("standard deviation of noise at mid-grey (18 %), % of white", "mean PSNR, dB")
    title = "PSNR by noise; LibRaw by its settings"
    plots.scatter(lines, folder / "noise.png", title=title, labels=labels, lines=lines)


def _sheet(level: Level, rival: str, path: Path, title: str) -> None:
    """Write details of the first pictures: the truth, a setting of LibRaw, ours."""
    labels = {"truth": "truth", f"LibRaw {rival}": rival, OURS: OURS}
    columns: dict[str, Any] = {label: level.details[name] for label, name in labels.items()}
    captions = [
        f"{name}: {other.psnr:.2f} | {ours.psnr:.2f} dB"
        for name, other, ours in zip(level.names, level.found[rival], level.found[OURS], strict=True)
    ]
    sheets.sheet(columns, path, title=title, captions=captions[: len(level.details["truth"])])


def _noise_percent(shot: float) -> float:
    return float(100 * np.sqrt(0.18 * shot + unprocess.typical_read(shot)))


# --- pairs --------------------------------------------------------------------------------------------


def on_pairs(net: nn.Module, engine: Engine, settings: Bench, lab: Any) -> Part:
    """Compare on mosaics with their photographs, by noise where the folder tells it."""
    assert settings.data is not None
    chosen = _pairs(settings.data, lab)
    groups: dict[str, Level] = {}
    with lab.console.progress(len(chosen), "pairs") as bar:
        for each in chosen:
            bar.update(each.raw.name)
            group = f"shot {each.facts.noise[0]:.3g}" if each.facts.noise else ""
            level = groups.setdefault(group, Level())
            frame, truth = _frame_of(each)
            pictures = {OURS: developed(net, engine, frame)} | libraw.of_mosaic(frame)
            level.add(each.raw, pictures, truth, keep=len(level.names) < SHOWN)
            bar.advance(1)
    whole = _whole(groups)
    if settings.report:
        for name, level in groups.items():
            title = f"Pairs {name}".strip()
            path = settings.report / f"{title.lower().replace(' ', '-')}.png"
            _sheet(level, libraw.DEFAULT, path, title)
    told: dict[str, Any] = {
        "pairs": whole.figures()
        | {
            "files": {
                name: {"ours": ours._asdict(), "libraw": other._asdict()}
                for name, ours, other in zip(
                    whole.names, whole.found[OURS], whole.found[libraw.DEFAULT], strict=True
                )
            },
            "noise": {name: level.figures() for name, level in groups.items() if name},
        }
    }
    return Part(told, [], [_pair_table(whole, groups)])


def _pairs(folder: Path, lab: Any) -> list[layouts.Files]:
    """Return the pairs of the val and test splits, else all that the weights were not trained on."""
    found = _whole_pairs(folder)
    apart = [each for each in found if each.facts.split in ("val", "test")]
    if apart:
        return apart
    trained = trained_on(lab)
    kept = [each for each in found if not stems(each.raw.name, each.facts.source) & trained]
    _tell(len(found) - len(kept), len(found), "pairs", lab)
    return kept


def _whole_pairs(folder: Path) -> list[layouts.Files]:
    found = [each for each in layouts.files_of(folder) if each.rgb]
    if not found:
        raise ImgtoolError(f"no mosaic in {folder} has a photograph", layouts.LISTED, USAGE)
    return found


def _frame_of(each: layouts.Files) -> tuple[Mosaic, Picture]:
    """Return a pair's frame, as it is trained on, and its photograph in 8 bits."""
    frame, target = layouts.read_pair(each)
    assert target is not None
    gains = frame.gains or frame.daylight or (1.0, 1.0, 1.0)
    known = replace(frame, gains=gains, noise=each.facts.noise or frame.noise)
    return known, np.asarray(images.convert(target, np.uint8))


def _whole(groups: Mapping[str, Level]) -> Level:
    whole = Level()
    for level in groups.values():
        whole.names += level.names
        for method, some in level.found.items():
            whole.found.setdefault(method, []).extend(some)
    return whole


def _pair_table(whole: Level, groups: Mapping[str, Level]) -> Table:
    rows = [
        _pair_row(name, [ours], [other])
        for name, ours, other in zip(whole.names, whole.found[OURS], whole.found[libraw.DEFAULT], strict=True)
    ][:ROWS]
    if len(groups) > 1:
        rows += [
            _pair_row(f"mean, {name or 'unknown noise'}", level.found[OURS], level.found[libraw.DEFAULT])
            for name, level in groups.items()
        ]
    rows.append(_pair_row("mean", whole.found[OURS], whole.found[libraw.DEFAULT]))
    low, high = metrics.interval([each.psnr for each in whole.found[OURS]])
    lowest, highest = metrics.interval([each.psnr for each in whole.found[libraw.DEFAULT]])
    rows.append(("95 %", f"{low:.2f}-{high:.2f}", f"{lowest:.2f}-{highest:.2f}", "", "", "", ""))
    columns = ("pair", "PSNR", "LibRaw", "SSIM", "LibRaw", "dE00", "LibRaw")
    return Table(f"{len(whole.names)} pairs, beside LibRaw AHD", columns, rows)


def _pair_row(name: str, ours: Sequence[Measured], other: Sequence[Measured]) -> tuple[object, ...]:
    cells = [name]
    for field_name, form in (("psnr", ".2f"), ("ssim", ".4f"), ("de00", ".2f")):
        for some in (ours, other):
            cells.append(format(float(np.mean([getattr(each, field_name) for each in some])), form))
    return tuple(cells)
