"""Figures as PNG: training curves, distributions, bars; and the sheets of photos.

Drawn with matplotlib's object interface: no pyplot, no state that another figure could see.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from imgtool.files import write
from imgtool.sheets import compare, sheet

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

__all__ = [
    "against_time", "bands", "bars", "compare", "curves", "front", "histogram", "rivals", "scatter", "sheet",
]  # fmt: skip

PALETTE = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#64748b")
LARGEST = 1e100  # beyond it, the margins of an axis overflow
INK, FAINT = "#4b5563", "#e5e7eb"


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.14)
    figure = Figure(figsize=(width, height), dpi=120, layout=layout, facecolor="white")
    if title:
        figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left", parse_math=False)
    return figure


def _save(figure: Figure, path: Path) -> None:
    data = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; that is no news for the user.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(data, format="png")
    write(path, data.getvalue())


def _dress(axes: Axes, title: str = "", xlabel: str = "", grid: str = "both") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis=grid, color=FAINT, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=11, loc="left", parse_math=False)
    axes.set_xlabel(xlabel, fontsize=9, color=INK, parse_math=False)
    if xlabel == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _number(value: object) -> float:
    """Return a float that an axis can hold, or NaN, which is drawn as a gap."""
    if isinstance(value, int | float) and abs(value) <= LARGEST:
        return float(value)
    return math.nan


def _line(axes: Axes, steps: Sequence[float], values: Sequence[float], **style: Any) -> None:
    # Without marks, a point between two gaps would not be seen at all.
    axes.plot(steps, values, marker="o", markersize=3 if len(values) < 40 else 1.2, **style)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[float]]:
    """Return name to values of the inner mapping ``key`` of all rows, NaN where a row has none."""
    inner = [row.get(key) or {} for row in rows]
    names = dict.fromkeys(name for mapping in inner for name in mapping)
    return {name: [_number(mapping.get(name)) for mapping in inner] for name in names}


def _plain(texts: Iterable[Text]) -> None:
    """Take a $ in the user's names for what it is."""
    for text in texts:
        text.set_parse_math(False)


def _losses(axes: Axes, rows: Sequence[Mapping[str, Any]], steps: Sequence[float]) -> None:
    """Loss and its terms; what is not above zero has no place on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    series = {"loss": [_number(row.get("loss")) for row in rows]}
    terms = _series(rows, "terms")
    series |= terms if len(terms) > 1 else {}
    shown = [value for values in series.values() for value in values if value > 0]
    if shown:
        axes.set_yscale("log")
        narrow = max(shown) < 100 * min(shown)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5) if narrow else (2, 5)))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if narrow else NullFormatter())
        axes.tick_params(which="minor", colors=INK, labelsize=9)
    for (name, values), colour in zip(series.items(), cycle(("#111827", *PALETTE)), strict=False):
        above = [value if value > 0 else math.nan for value in values]
        _line(axes, steps, above, label=name, color=colour, linewidth=2.0 if name == "loss" else 1.4)
    _plain(axes.legend(frameon=False, fontsize=9, ncols=4).get_texts())


def _panel(axes: Axes, steps: Sequence[float], values: Sequence[float], colour: str) -> None:
    from matplotlib.ticker import StrMethodFormatter

    _line(axes, steps, values, color=colour, linewidth=1.6)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.margins(y=0.12)
    finite = [value for value in values if not math.isnan(value)]
    if finite:
        axes.set_title(f"{finite[-1]:.4g}", fontsize=11, fontweight="bold", loc="right", color=colour)


def curves(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> None:
    """Write how a training went as PNG: loss and terms, each score, and the learning rate by step.

    Args:
        rows: Epoch rows of ``log.jsonl``: step, lr, loss, terms, scores. Any number of them, with
            any of these missing or not finite.
        path: The file to write.
        title: Line at the top.

    Raises:
        ImgtoolError: The file cannot be written.
    """
    rows = [row for row in rows if not math.isnan(_number(row.get("step")))]
    steps = [_number(row["step"]) for row in rows]
    panels = _series(rows, "scores")
    panels["learning rate"] = [_number(row.get("lr")) for row in rows]
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = _figure(11, 3.9 + 2.4 * lines, title)
    grid = figure.add_gridspec(1 + lines, columns, height_ratios=[1.5] + [1.0] * lines)
    top = figure.add_subplot(grid[0, :])
    _dress(top, "loss" if rows else "no epoch has ended yet", "step")
    if rows:
        _losses(top, rows, steps)
    for number, (name, values) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[1 + number // columns, number % columns])
        _dress(axes, name, "step")
        _panel(axes, steps, values, "#6b7280" if name == "learning rate" else PALETTE[number % len(PALETTE)])
    _save(figure, path)


Band = Sequence[tuple[float, float, float, float]]
"""Step, mean, low and high end of an interval, by step; NaN where one is unknown."""


def bands(panels: Mapping[str, Band], path: Path, *, title: str, logarithmic: Collection[str] = ()) -> None:
    """Write means within their intervals by step as PNG, a panel for each figure.

    Args:
        panels: Name of a figure to its means and intervals.
        path: The file to write.
        title: Line at the top.
        logarithmic: Names of the figures whose axis is logarithmic, where all their means are above zero.

    Raises:
        ImgtoolError: The file cannot be written.
    """
    figure = _figure(11, 1 + 3.2 * max(len(panels), 1), title)
    places = zip(panels.items(), cycle(PALETTE), strict=False)
    for number, ((name, rows), colour) in enumerate(places):
        axes = figure.add_subplot(len(panels), 1, number + 1)
        _dress(axes, name, "step")
        steps, means, lows, highs = ([_number(row[column]) for row in rows] for column in range(4))
        if means and name in logarithmic and all(mean > 0 for mean in means):
            axes.set_yscale("log")
            least = min(means) / 2  # an interval that reaches zero has no end on such an axis
            lows = [max(low, least) if low == low else low for low in lows]
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.25, linewidth=0)
        _panel(axes, steps, means, colour)
    _save(figure, path)


def _distribution(
    axes: Axes, name: str, values: Sequence[float], given: int, edges: Sequence[float], colour: str
) -> None:
    label = f"{name}: {given}"
    if values:
        middle = median(values)
        label += f", median {middle:.4g}"
        axes.axvline(middle, color=colour, linewidth=1, linestyle=(0, (4, 3)))
    if given > len(values):
        label += f", {given - len(values)} not finite"
    axes.hist(values, edges, color=colour, alpha=0.3, histtype="stepfilled")
    axes.hist(values, edges, color=colour, histtype="step", linewidth=1.4, label=label)


def histogram(values: Mapping[str, Iterable[float]], path: Path, *, title: str, xlabel: str) -> None:
    """Write distributions as PNG, all with the same bins; the legend names counts and medians.

    Args:
        values: Label to values; those that are not finite are counted in the legend and left out.
        path: The file to write.
        title: Line at the top.
        xlabel: What the values are, with their unit.

    Raises:
        ImgtoolError: The file cannot be written.
    """
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    figure = _figure(9, 4.5, title)
    axes = figure.add_subplot()
    _dress(axes, xlabel=xlabel, grid="y")
    axes.set_ylabel("count", fontsize=9, color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    series = {name: np.asarray(list(given), np.float64) for name, given in values.items()}
    everything = np.concatenate([*series.values(), np.empty(0)])
    everything = everything[np.isfinite(everything)]
    edges = np.histogram_bin_edges(everything, bins=max(5, min(60, math.isqrt(everything.size) * 2))).tolist()
    for (name, given), colour in zip(series.items(), cycle(PALETTE), strict=False):
        _distribution(axes, name, given[np.isfinite(given)].tolist(), len(given), edges, colour)
    if series:
        _plain(axes.legend(frameon=False, fontsize=9).get_texts())
    _save(figure, path)


Points = Mapping[str, "npt.NDArray[np.float64]"]
"""Label to x and y, ``(N, 2)``."""


def scatter(
    points: Points, path: Path, *, title: str, labels: tuple[str, str], lines: Points | None = None
) -> None:
    """Write clouds of points as PNG, each the darker the denser, and lines over them.

    The density is Gaussian with a cloud's own covariance, halved in scale, as kernel, and of at most 2000
    of its points.

    Args:
        points: Label to points; the legend names their counts, and those not finite are left out.
        path: The file to write.
        title: Line at the top.
        labels: What x and y are, with their units.
        lines: Label to the corners of a line, which a row of NaN breaks; of the colour of the cloud of
            that label, where there is one.

    Raises:
        ImgtoolError: The file cannot be written.
    """
    import numpy as np
    from matplotlib.colors import to_rgba

    figure = _figure(9, 6.5, title)
    axes = figure.add_subplot()
    _dress(axes, xlabel=labels[0])
    axes.set_ylabel(labels[1], fontsize=9, color=INK, parse_math=False)
    colours = dict(zip(points, cycle(PALETTE), strict=False))
    for name, given in points.items():
        cloud, colour = given[np.isfinite(given).all(1)], colours[name]
        shades = [to_rgba(colour, shade) for shade in _shades(cloud)]
        axes.scatter(cloud[:, 0], cloud[:, 1], s=10, c=shades, linewidths=0)
        axes.scatter([], [], s=20, color=colour, label=f"{name}: {len(cloud)}")
    for name, corners in (lines or {}).items():
        label = "_" if name in points else name  # which matplotlib leaves out of the legend
        axes.plot(*corners.T, color=colours.get(name, "#111827"), linewidth=1.2, label=label)
    if points or lines:
        _plain(axes.legend(frameon=False, fontsize=9).get_texts())
    _save(figure, path)


def _shades(cloud: npt.NDArray[np.float64]) -> list[float]:
    """Return opacities of points ``(N, 2)``: from 0.25, where they are rare, to 0.9, where they crowd."""
    import numpy as np

    if len(cloud) < 3:
        return [0.9] * len(cloud)
    covariance = 0.25 * np.cov(cloud.T)
    kernel = np.linalg.cholesky(covariance + (1e-9 * np.trace(covariance) + 1e-30) * np.eye(2))
    scaled = np.linalg.solve(kernel, cloud.T)
    among = scaled[:, :: math.ceil(len(cloud) / 2000)]
    density = np.array([np.exp(-0.5 * np.square(among.T - point).sum(1)).mean() for point in scaled.T])
    shades: list[float] = (0.25 + 0.65 * density / density.max()).tolist()
    return shades


def front(
    points: Mapping[int, tuple[float, float]],
    best: Sequence[int],
    path: Path,
    *,
    title: str,
    labels: tuple[str, str],
    limit: float,
) -> None:
    """Write a Pareto front as PNG: all points, those on the front joined, and the limit on x as a line.

    Points without y stand as crosses at the upper border, and what lies far beyond the limit at the right.

    Args:
        points: Number to x and y, both the better the smaller; NaN or infinity where unknown.
        best: Numbers of those on the front, by x; they are written beside their points.
        path: The file to write.
        title: Line at the top.
        labels: What x and y are, with their units.
        limit: Largest x that is allowed; 0 is none.

    Raises:
        ImgtoolError: The file cannot be written.
    """
    figure = _figure(9, 5.5, title)
    axes = figure.add_subplot()
    _dress(axes, xlabel=labels[0])
    axes.set_ylabel(labels[1], fontsize=9, color=INK, parse_math=False)
    known = {number: (x, y) for number, (x, y) in points.items() if math.isfinite(x + y)}
    right = 1.1 * max([limit, *(x for x, _ in known.values())])
    axes.set_xlim(0, right)
    if limit:
        axes.axvline(limit, color=PALETTE[4], linewidth=1, linestyle=(0, (4, 3)), label=f"limit {limit:g}")
    grey: dict[str, Any] = {"color": "#9ca3af", "linestyle": ""}
    axes.plot(*_columns(known.values()), marker="o", label=f"tried: {len(known)}", **grey)
    corners = _columns(known[number] for number in best)
    axes.plot(*corners, "o-", color=PALETTE[0], label=f"front: {len(best)}")
    others = [x for number, (x, _) in points.items() if number not in known]
    places = [right if math.isnan(x) else min(x, right) for x in others]
    top: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "in_layout": False}
    axes.plot(places, [1.0] * len(places), marker="x", label=f"no result: {len(places)}", **grey, **top)
    for number in best:
        axes.annotate(str(number), points[number], xytext=(5, 5), textcoords="offset points", fontsize=9)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def against_time(
    points: Mapping[str, tuple[float, float]],
    path: Path,
    *,
    title: str,
    labels: tuple[str, str],
    line: Sequence[str],
    highlight: str,
) -> None:
    """Write quality against time as PNG, time being logarithmic; every point has its label beside it.

    Points of no time are level lines; those of infinite quality stand at the upper border.

    Args:
        points: Label to time and quality.
        path: The file to write.
        title: Line at the top.
        labels: What x and y are, with their units.
        line: Labels of points to join.
        highlight: Label of the point to bring out.

    Raises:
        ImgtoolError: The file cannot be written.
    """
    figure = _figure(8, 5, title)
    axes = figure.add_subplot()
    _dress(axes, xlabel=labels[0])
    axes.set_ylabel(labels[1], fontsize=9, color=INK, parse_math=False)
    axes.set_xscale("log")
    _plain_decades(axes)
    levels = [y for _, y in points.values() if math.isfinite(y)]
    room = max(0.15 * (max(levels) - min(levels)), 1e-3)
    top = max(levels) + room
    axes.set_ylim(min(levels) - room, top)
    axes.margins(x=0.25)
    corners = _columns((points[name][0], min(points[name][1], top)) for name in line)
    axes.plot(*corners, color="#9ca3af", linewidth=1.4)
    for name, (x, y) in points.items():
        bold = name == highlight
        colour = PALETTE[1] if bold else INK
        told: dict[str, Any] = {"color": colour, "fontsize": 10, "fontweight": "bold" if bold else "normal"}
        if x <= 0:
            axes.axhline(y, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            spot: Any = axes.get_yaxis_transform()
            axes.annotate(name, (0.01, y), xycoords=spot, xytext=(0, 4), textcoords="offset points", **told)
            continue
        place = (x, min(y, top))
        mark = {"marker": "*" if bold else "o", "markersize": 16 if bold else 7, "color": colour}
        axes.plot(*place, linestyle="", clip_on=False, zorder=3, **mark)  # type: ignore[arg-type]
        axes.annotate(name, place, xytext=(8, 6 if bold else -14), textcoords="offset points", **told)
    _save(figure, path)


def _plain_decades(axes: Axes) -> None:
    """Write the numbers of a logarithmic x axis as they are, also between the powers of ten."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    axes.tick_params(which="minor", colors=INK, labelsize=9)


def rivals(
    points: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, title: str, labels: tuple[str, str]
) -> None:
    """Write groups of points as PNG, x being logarithmic: a line through all but the last, which is a star.

    Args:
        points: Label to x and y.
        path: The file to write.
        title: Line at the top.
        labels: What x and y are, with their units.

    Raises:
        ImgtoolError: The file cannot be written.
    """
    figure = _figure(9, 6, title)
    axes = figure.add_subplot()
    _dress(axes, xlabel=labels[0])
    axes.set_ylabel(labels[1], fontsize=9, color=INK, parse_math=False)
    axes.set_xscale("log")
    _plain_decades(axes)
    for (name, some), colour in zip(points.items(), cycle(PALETTE), strict=False):
        *others, (x, y) = some
        axes.plot(*_columns(others), "o-", color=colour, linewidth=1.2, markersize=5)
        axes.plot(x, y, "*", color=colour, markersize=15, label=name, zorder=3)
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    _plain(axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1)).get_texts())
    _save(figure, path)


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    pairs = list(points)
    return [x for x, _ in pairs], [y for _, y in pairs]


def bars(values: Mapping[str, float], path: Path, *, title: str, xlabel: str, highlight: str = "") -> None:
    """Write figures as horizontal bars, as PNG, in the order given, each with its value.

    Args:
        values: Label to figure; one that is not finite is written as "n/a".
        path: The file to write.
        title: Line at the top.
        xlabel: What the figures are, with their unit.
        highlight: Label of the bar to bring out; without it all bars have one colour.

    Raises:
        ImgtoolError: The file cannot be written.
    """
    figure = _figure(9, 1.4 + 0.42 * max(1, len(values)), title)
    axes = figure.add_subplot()
    _dress(axes, xlabel=xlabel, grid="x")
    numbers = [_number(value) for value in values.values()]
    colours = [PALETTE[0] if highlight in ("", name) else "#9ca3af" for name in values]
    lengths = [0.0 if math.isnan(number) else number for number in numbers]
    words = ["n/a" if math.isnan(number) else f"{number:.4g}" for number in numbers]
    drawn = axes.barh(range(len(values)), lengths, 0.62, color=colours)
    axes.bar_label(drawn, words, padding=5, fontsize=10)
    axes.set_yticks(range(len(values)), list(values), fontsize=10, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    _save(figure, path)
