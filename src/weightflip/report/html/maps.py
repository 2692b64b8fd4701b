"""Heat maps of layers over time, and of layers by format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from weightflip.records import Value, printable
from weightflip.report.html.bins import bin_edges, bin_series
from weightflip.report.html.figures import ROW_LABELS, Figures, row_labels, rows_by_block
from weightflip.report.html.markup import escape
from weightflip.report.run import Layer, Run
from weightflip.report.table import columns, model_series

_MAPS_PER_ROW = 4
_CELLS_WITH_NUMBERS = 240


def heat_maps(figures: Figures, runs: Sequence[Run]) -> str:
    """Heat maps of layers over time, for each number that has one."""
    parts = []
    for value in columns(runs, [layer for run in runs for layer in run.layers.values()]):
        runs_with_value = [run for run in runs if any(len(layer.get(value.name)) for layer in run.layers.values())]
        for begin in range(0, len(runs_with_value) if value.heat_map else 0, _MAPS_PER_ROW):
            parts.append(_heat_map_row(figures, runs_with_value[begin : begin + _MAPS_PER_ROW], runs_with_value, value))
    return "".join(parts)


def _heat_map_row(figures: Figures, runs: Sequence[Run], scale: Sequence[Run], value: Value) -> str:
    """Heat maps of some runs side by side. All runs share the color scale."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.ticker import PercentFormatter

    top = max(
        float(np.nanmax(np.append(layer.get(value.name).values, 0))) for r in scale for layer in r.layers.values()
    )
    is_rate = value.name == "flip_rate"
    # Most flip rates are small. A square root separates them.
    norm = PowerNorm(0.5, 0, top or 1) if is_rate else Normalize(0, 1 if value.unit == "share" else top or 1)
    colors = colormaps["viridis" if is_rate else "magma"].with_extremes(bad="#eef0f3")
    max_layers = max(len(run.layers) for run in runs)
    figure = figures.new(
        11.2, min(14.0, 1.1 + max(4, max_layers) * (0.17 if max_layers <= ROW_LABELS else 8 / max_layers))
    )
    # The same number of columns as in the other rows, so that all maps have the same width.
    column_count = min(len(scale), _MAPS_PER_ROW)
    grid = figure.subplots(1, column_count, squeeze=False)[0]
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    mesh: Any = None
    for at, (axes, run) in enumerate(zip(grid, runs, strict=False)):
        order, rows, names = rows_by_block(list(run.layers))
        edges = bin_edges(run)
        cells = np.stack([bin_series(run.layers[name].get(value.name), edges) for name in order])
        mesh = axes.pcolormesh(edges, np.arange(len(order) + 1), cells, norm=norm, cmap=colors, rasterized=True)
        axes.invert_yaxis()
        same = at > 0 and list(run.layers) == list(runs[at - 1].layers)
        axes.set_yticks(rows, [] if same else names, fontsize=7)
        axes.tick_params(axis="y", length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("step")
        axes.set_title(printable(run.name) if len(scale) > 1 else "", loc="left", color="#374151")
    bar = figure.colorbar(
        mesh, ax=list(grid), pad=0.01, aspect=30, format=PercentFormatter(1.0) if value.unit == "share" else None
    )
    bar.outline.set_visible(False)
    label = f"{value.title}: {value.description}" if value.description else value.title
    return f"<h3>{escape(label[0].upper() + label[1:])}</h3>" + figures.element(figure, f"Heat map, {label}")


def format_matrix(figures: Figures, run: Run) -> str:
    """Stall ratio over the whole run, by layer and format."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    variants = list(run.models)
    weights = list(dict.fromkeys(layer.weight for layer in run.layers.values()))
    cells = np.full((len(weights) + 1, len(variants)), math.nan)
    found: dict[tuple[str, str], Layer] = {(layer.weight, layer.variant): layer for layer in run.layers.values()}
    for column, variant in enumerate(variants):
        for row, weight in enumerate(weights):
            if (weight, variant) in found:
                cells[row, column] = found[weight, variant].get("stall_ratio").summary
        cells[-1, column] = model_series(run, variant, "stall_ratio").summary
    if np.isnan(cells).all():
        return ""
    figure = figures.new(min(11.2, 3.2 + 0.85 * len(variants)), min(14.0, 1.0 + 0.24 * (len(weights) + 1)))
    axes = figure.subplots()
    colors = colormaps["magma"].with_extremes(bad="#eef0f3")
    axes.pcolormesh(cells, norm=Normalize(0, 1), cmap=colors, rasterized=True, edgecolors="white", linewidth=0.5)
    axes.invert_yaxis()
    rows, names = row_labels([*weights, "all"])
    axes.set_yticks([row + 0.5 for row in rows], names, fontsize=7.5)
    axes.set_xticks(
        [column + 0.5 for column in range(len(variants))], [printable(name) or "one format" for name in variants]
    )
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False, axis="x", labelsize=7.5)
    axes.tick_params(length=0, axis="y")
    axes.spines[:].set_visible(False)
    if cells.size <= _CELLS_WITH_NUMBERS:
        for (row, column), fraction in np.ndenumerate(cells):
            if not math.isnan(fraction):
                color = "white" if fraction < 0.6 else "black"
                text = f"{100 * fraction:.{0 if 0.1 <= fraction <= 0.9 else 1}f} %"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7.5, color=color)
    title = f"<h3>{escape(run.name)}: fraction of updates that change no code in their step, over the whole run</h3>"
    return title + figures.element(figure, "Stall ratio of each layer in each format")
