"""Line plots of model-wide numbers over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from weightflip.records import Value, in_display_order, printable
from weightflip.report.html.bins import bin_edges, bin_series
from weightflip.report.html.figures import Figures
from weightflip.report.html.markup import escape
from weightflip.report.run import Run
from weightflip.report.table import model_series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_LINES = 12
_COLORS = ["#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#be185d", "#4d7c0f", "#475569"]


class _Line(NamedTuple):
    """One line in each plot of a set: a run, or one format of a run."""

    label: str
    run: Run
    variant: str
    color: str
    dashes: Literal["-", "--"]


def _lines(runs: Sequence[tuple[str, Run, str]]) -> list[_Line]:
    return [
        _Line(label, run, variant, _COLORS[at % len(_COLORS)], "-" if at < len(_COLORS) else "--")
        for at, (label, run, variant) in enumerate(runs)
    ]


def curves(figures: Figures, runs: Sequence[Run]) -> str:
    """All model-wide numbers over time, one line per run, or per format of a run."""
    if any(len(run.models) > 1 for run in runs):
        sets = [(_lines([(variant or "model", run, variant) for variant in run.models]), run.name) for run in runs]
    else:
        sets = [(_lines([(run.name, run, next(iter(run.models))) for run in runs]), "")]
    return "".join(_curve_set(figures, lines[:_MAX_LINES], title, len(lines)) for lines, title in sets)


def _curve_set(figures: Figures, lines: Sequence[_Line], title: str, total: int) -> str:
    names = {name for line in lines for name in line.run.models.get(line.variant, {})} - {"nonfinite_weights"}
    values = in_display_order(names, [value for line in lines for value in line.run.info.values])
    column_count = 3 if len(values) > 2 else max(1, len(values))
    rows = math.ceil(len(values) / column_count)
    figure = figures.new(11.2, 2.7 * rows + 0.35)
    grid = list(figure.subplots(rows, column_count, squeeze=False).flat)
    for axes, value in zip(grid, values, strict=False):
        _draw(axes, value, lines)
    for axes in grid[len(values) :]:
        axes.set_visible(False)
    if len(lines) > 1:
        _draw_legend(figure, lines)
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    caption = f"The first {len(lines)} of {total}." if total > len(lines) else ""
    return heading + figures.element(figure, f"Curves for all layers combined {title}", caption)


def _draw(axes: Axes, value: Value, lines: Sequence[_Line]) -> None:
    """Draw the plot of one number."""
    top = 0.0
    for line in lines:
        series = model_series(line.run, line.variant, value.name)
        if not len(series):
            continue
        edges = bin_edges(line.run)
        points = bin_series(series, edges)
        has_points = ~np.isnan(points)
        top = max(top, float(np.nanmax(points)) if has_points.any() else 0.0)
        style: Any = {"marker": "." if has_points.sum() <= 30 else "", "color": line.color, "linestyle": line.dashes}
        axes.plot(edges[1:][has_points], points[has_points], linewidth=1.4, **style)
    axes.set_title(printable(value.title), loc="left", fontweight="bold", color="#374151")
    axes.set_xlabel("step")
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    if value.name == "stall_ratio":
        axes.set_ylim(-0.02, 1.02)
    elif top > 0:
        axes.set_ylim(bottom=0)
    if value.unit == "share":
        from matplotlib.ticker import PercentFormatter

        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _draw_legend(figure: Figure, lines: Sequence[_Line]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=line.color, linestyle=line.dashes, label=printable(line.label)) for line in lines]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(6, len(lines)), frameon=False)
