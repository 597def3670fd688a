"""Figures as PNG: training curves, distributions, bars; and the sheets of photos.

Drawn with matplotlib's object interface: no pyplot, no state that another figure could see.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from imgtool.files import write
from imgtool.sheets import compare, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

__all__ = ["bars", "compare", "curves", "histogram", "sheet"]

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
