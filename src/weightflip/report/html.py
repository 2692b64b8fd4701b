"""One page of HTML with everything in it: plots as inline SVG, no script, no address of anything outside."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from html import escape as escape_html
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weightflip.records import Value, shown, shown_as
from weightflip.report.findings import Finding, Severity
from weightflip.report.run import Layer, ReportError, Run, Series
from weightflip.report.table import ALWAYS, cell, columns, concerns, formats, model_series, ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Columns of a heat map and points of a curve: more than that no screen shows.
_TIME_BINS = 240
_LINES_AT_MOST = 12
_ROW_LABELS = 48
_MAPS_A_ROW = 4
_CELLS_WITH_NUMBERS = 240
_COLORS = ["#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#be185d", "#4d7c0f", "#475569"]
_WORDS = {Severity.SERIOUS: "serious", Severity.WARNING: "warning", Severity.NOTE: "note", Severity.INFO: "info"}
_STYLE = """
:root { --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --accent: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; font-size: 15px; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 17px; margin: 0 0 12px; } h3 { font-size: 15px; margin: 20px 0 8px; }
p { margin: 0 0 10px; } .soft { color: var(--soft); } header { margin-bottom: 20px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 18px 20px;
  margin-bottom: 18px; }
ul.findings { list-style: none; margin: 0; padding: 0; }
ul.findings li { display: flex; gap: 12px; padding: 8px 0; border-top: 1px solid var(--line); }
ul.findings li:first-child { border-top: 0; }
ul.findings span.text { overflow-wrap: anywhere; }
.tag { flex: none; width: 66px; height: 22px; text-align: center; font-size: 12px; font-weight: 600;
  line-height: 22px; border-radius: 4px; }
.serious { background: #fee2e2; color: #991b1b; } .warning { background: #fef3c7; color: #92400e; }
.note { background: #e0f2fe; color: #075985; } .info { background: #dcfce7; color: #166534; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; min-width: 60%; }
th { text-align: right; font-weight: 600; color: var(--soft); white-space: nowrap; }
th, td { padding: 4px 12px 4px 6px; border-bottom: 1px solid var(--line); }
td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.left, td.left { text-align: left; }
td.name { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 12px; }
td.bar { background: linear-gradient(to right, #dbeafe var(--share), transparent var(--share)); }
i.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px; }
i.serious { background: #dc2626; } i.warning { background: #f59e0b; } i.note { background: #38bdf8; }
figure { margin: 0; } figure svg { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 13px; margin: 2px 0 14px; }
dl { display: grid; grid-template-columns: max-content auto; gap: 2px 16px; margin: 0; font-size: 13px; }
dt { font-weight: 600; } dd { margin: 0; }
"""


def escape(text: str, quote: bool = True) -> str:
    """Text of the page: names may hold what no page can."""
    return escape_html(shown(text), quote)


def write_html(runs: Sequence[Run], findings: Sequence[Finding], path: str | PathLike[str]) -> None:
    """Write the page.

    Args:
        runs: At least one.
        findings: Of these runs, the worst first.
        path: The file.

    Raises:
        ReportError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError(
            "plots need matplotlib: pip install 'weightflip[report]' (or pip install matplotlib)"
        ) from error
    style: Any = {
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#9ca3af",
        "axes.labelcolor": "#374151",
        "xtick.color": "#4b5563",
        "ytick.color": "#4b5563",
        # A name may hold a dollar sign.
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        page = _page(runs, findings)
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


def _page(runs: Sequence[Run], findings: Sequence[Finding]) -> str:
    figures = _Figures()
    title = ", ".join(run.name for run in runs)
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        f"<header><h1>weightflip report</h1><p class=soft>{count}: {escape(title)}</p></header>",
        f"<section><h2>What stands out</h2>{_findings(runs, findings)}</section>",
        f"<section><h2>Runs</h2>{_runs(runs)}</section>",
        f"<section><h2>All layers together</h2>{_curves(figures, runs)}</section>",
    ]
    matrices = "".join(_format_matrix(figures, run) for run in runs if len(run.models) > 1)
    if matrices:
        parts.append(f"<section><h2>Formats compared</h2>{matrices}</section>")
    parts.append(f"<section><h2>Layers over time</h2>{_heat_maps(figures, runs)}</section>")
    tables = "".join(_layers(run, findings, titled=len(runs) > 1) for run in runs)
    parts.append(f"<section><h2>Layers</h2>{tables}</section>")
    parts.append(f"<section><h2>What the columns mean</h2>{_meanings(runs)}</section>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>weightflip report: {escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------------- text and tables


def _findings(runs: Sequence[Run], findings: Sequence[Finding]) -> str:
    rows = []
    for finding in findings:
        whose = f"<b>{escape(finding.runs[0])}:</b> " if len(runs) > 1 and len(finding.runs) == 1 else ""
        word = _WORDS[finding.severity]
        rows.append(
            f'<li><span class="tag {word}">{word}</span><span class=text>{whose}{escape(finding.text)}.</span></li>'
        )
    return f"<ul class=findings>{''.join(rows)}</ul>"


def _table(head: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """The head: titles, and whether the column is flush left. Cells are whole ``<td>`` elements."""
    titles = "".join(f"<th{' class=left' if left else ''}>{escape(title)}</th>" for title, left in head)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{titles}</tr></thead><tbody>\n{body}\n</tbody></table></div>"


def _td(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{escape(text)}</td>"


def _number(value: Value, series: Series, late: float) -> str:
    text = cell(value, series, late)
    if value.unit != "share" or not text:
        return _td(text)
    share = min(1.0, max(0.0, series.part(late).summary))
    return f'<td class="bar" style="--share: {100 * share:.1f}%">{escape(text)}</td>'


def _runs(runs: Sequence[Run]) -> str:
    head = [("run", True), ("steps", False), ("layers", False), ("weights", False), ("format", True)]
    head += [("optimizer", True), ("flip rate", False), ("stall ratio", False)]
    rows = []
    for run in runs:
        for variant in run.models:
            layers = [layer for layer in run.layers.values() if layer.variant == variant]
            rows.append(
                [
                    _td(run.name, "left name"),
                    _td(f"{run.end:,}"),
                    _td(f"{len(layers):,}"),
                    _td(f"{sum(layer.weights for layer in layers):,}"),
                    _td(variant or formats(run), "left"),
                    _td(run.info.settings.get("optimizer", ""), "left"),
                    *(
                        _number(value, model_series(run, variant, value.name), run.late)
                        for value in shown_as(ALWAYS, ())
                    ),
                ]
            )
    notes = "".join(f"<p class=soft>{escape(run.name)}: {escape(note)}.</p>" for run in runs for note in run.notes)
    late = "<p class=soft>Rates are means of the last quarter of a run.</p>"
    return _table(head, rows) + late + notes


def _layers(run: Run, findings: Sequence[Finding], titled: bool) -> str:
    values = columns([run], run.layers.values())
    head = [("layer", True), ("weights", False), ("format", True), *((value.title, False) for value in values)]
    rows = []
    for layer in ranked(run, findings):
        worst = max((finding.severity for finding in findings if concerns(finding, run, layer.name)), default=None)
        dot = f'<i class="dot {_WORDS[worst] if worst else ""}"></i>'
        rows.append(
            [
                f'<td class="left name">{dot}{escape(layer.name)}</td>',
                _td(f"{layer.weights:,}" if layer.weights else ""),
                _td(layer.quantizer, "left"),
                *(_number(value, layer.get(value.name), run.late) for value in values),
            ]
        )
    title = f"<h3>{escape(run.name)}</h3>" if titled else ""
    late = f"<p class=soft>Means of steps {max(0, int(run.late)):,} to {run.end:,}; shares of weights at the end.</p>"
    return title + late + _table(head, rows)


def _meanings(runs: Sequence[Run]) -> str:
    rows = [
        f"<dt>{escape(value.title)}</dt><dd>{escape(value.description)}</dd>"
        for value in columns(runs, [layer for run in runs for layer in run.layers.values()])
        if value.description
    ]
    return f"<dl>{''.join(rows)}</dl>"


# ---------------------------------------------------------------------- plots


class _Figures:
    """Turns figures into elements of the page."""

    def __init__(self) -> None:
        self._count = 0

    def new(self, width: float, height: float) -> Figure:
        from matplotlib.figure import Figure

        return Figure(figsize=(width, height), layout="constrained")

    def element(self, figure: Figure, label: str, caption: str = "") -> str:
        """Inline SVG, with names of its own among all the figures of the page."""
        self._count += 1
        written = io.StringIO()
        empty: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", dpi=130, metadata=empty)
        svg = written.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
        prefix = f"f{self._count}-"
        svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{prefix}", svg)
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label, quote=True)}" ', 1)
        below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        return f"<figure>{svg}{below}</figure>"


def edges_of(run: Run) -> NDArray[np.float64]:
    """Borders of the time bins of a run, at logging points: at most ``_TIME_BINS`` bins."""
    steps = run.steps
    ends = steps if len(steps) <= _TIME_BINS else steps[np.linspace(0, len(steps) - 1, _TIME_BINS).round().astype(int)]
    return np.concatenate([[float(min(run.begin, ends[0] - 1))], ends.astype(np.float64)])


def binned(series: Series, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """A number in each bin (edge, next edge]: of a gauge the last one, else the quotient of the sums.

    Returns:
        (bins,), NaN where there is no point.
    """
    bins = len(edges) - 1
    found = np.full(bins, math.nan)
    if not len(series):
        return found
    at = np.searchsorted(edges[1:], series.steps, side="left")
    inside = at < bins
    if series.gauge:
        found[at[inside]] = series.values[inside]
        return found
    numerators = np.bincount(at[inside], series.numerators[inside], bins)
    denominators = np.bincount(at[inside], series.denominators[inside], bins)
    there = denominators > 0
    found[there] = numerators[there] / denominators[there]
    return found


def _axis(axes: Axes, value: Value) -> None:
    from matplotlib.ticker import PercentFormatter

    if value.unit == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _curves(figures: _Figures, runs: Sequence[Run]) -> str:
    """Every number of the model over time; a line for each run, or for each format of one run."""
    if any(len(run.models) > 1 for run in runs):
        sets = [([(variant or "model", run, variant) for variant in run.models], run.name) for run in runs]
    else:
        sets = [([(run.name, run, next(iter(run.models))) for run in runs], "")]
    return "".join(_curve_set(figures, lines[:_LINES_AT_MOST], title, len(lines)) for lines, title in sets)


def _curve_set(figures: _Figures, lines: Sequence[tuple[str, Run, str]], title: str, of: int) -> str:
    names = {name for _, run, variant in lines for name in run.models.get(variant, {})} - {"nonfinite_weights"}
    values = shown_as(names, [value for _, run, _ in lines for value in run.info.values])
    columns_of = 3 if len(values) > 2 else max(1, len(values))
    rows = math.ceil(len(values) / columns_of)
    figure = figures.new(11.2, 2.7 * rows + 0.35)
    grid = figure.subplots(rows, columns_of, squeeze=False)
    for axes, value in zip(grid.flat, values, strict=False):
        top = 0.0
        for at, (_, run, variant) in enumerate(lines):
            series = model_series(run, variant, value.name)
            if not len(series):
                continue
            edges = edges_of(run)
            points = binned(series, edges)
            there = ~np.isnan(points)
            top = max(top, float(np.nanmax(points)) if there.any() else 0.0)
            marker = "." if there.sum() <= 30 else ""
            color, dashes = _COLORS[at % len(_COLORS)], "-" if at < len(_COLORS) else "--"
            axes.plot(edges[1:][there], points[there], marker=marker, color=color, linewidth=1.4, linestyle=dashes)
        axes.set_title(shown(value.title), loc="left", fontweight="bold", color="#374151")
        axes.set_xlabel("step")
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
        if value.name == "stall_ratio":
            axes.set_ylim(-0.02, 1.02)
        elif top > 0:
            axes.set_ylim(bottom=0)
        _axis(axes, value)
    for axes in list(grid.flat)[len(values) :]:
        axes.set_visible(False)
    if len(lines) > 1:
        from matplotlib.lines import Line2D

        handles = [
            Line2D(
                [],
                [],
                color=_COLORS[at % len(_COLORS)],
                linestyle="-" if at < len(_COLORS) else "--",
                label=shown(name),
            )
            for at, (name, _, _) in enumerate(lines)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(6, len(lines)), frameon=False)
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    caption = f"The first {len(lines)} of {of}." if of > len(lines) else ""
    return heading + figures.element(figure, f"Curves of all layers together {title}", caption)


def _labels(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Which rows get a label: all of them, or evenly spread ones."""
    every = math.ceil(len(names) / _ROW_LABELS)
    at = list(range(0, len(names), every))
    return at, [shown(names[row]) for row in at]


def _heat_maps(figures: _Figures, runs: Sequence[Run]) -> str:
    parts = []
    for value in columns(runs, [layer for run in runs for layer in run.layers.values()]):
        having = [run for run in runs if any(len(layer.get(value.name)) for layer in run.layers.values())]
        for begin in range(0, len(having) if value.heat_map else 0, _MAPS_A_ROW):
            parts.append(_heat_map_row(figures, having[begin : begin + _MAPS_A_ROW], having, value))
    return "".join(parts)


def _heat_map_row(figures: _Figures, runs: Sequence[Run], scale: Sequence[Run], value: Value) -> str:
    """Heat maps of some runs side by side; their colours are those of all runs."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.ticker import PercentFormatter

    top = max(
        float(np.nanmax(np.append(layer.get(value.name).values, 0))) for r in scale for layer in r.layers.values()
    )
    is_rate = value.name == "flip_rate"
    # Most flip rates are small: a square root shows them apart.
    norm = PowerNorm(0.5, 0, top or 1) if is_rate else Normalize(0, 1 if value.unit == "share" else top or 1)
    colors = colormaps["viridis" if is_rate else "magma"].with_extremes(bad="#eef0f3")
    most = max(len(run.layers) for run in runs)
    figure = figures.new(11.2, min(14.0, 1.1 + max(4, most) * (0.17 if most <= _ROW_LABELS else 8 / most)))
    # As many as in the other rows, so that all maps are of one width.
    wide = min(len(scale), _MAPS_A_ROW)
    grid = figure.subplots(1, wide, squeeze=False)[0]
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    mesh: Any = None
    for at, (axes, run) in enumerate(zip(grid, runs, strict=False)):
        layers = list(run.layers.values())
        edges = edges_of(run)
        cells = np.stack([binned(layer.get(value.name), edges) for layer in layers])
        mesh = axes.pcolormesh(edges, np.arange(len(layers) + 1), cells, norm=norm, cmap=colors, rasterized=True)
        axes.invert_yaxis()
        rows, names = _labels([layer.name for layer in layers])
        same = at > 0 and list(run.layers) == list(runs[at - 1].layers)
        axes.set_yticks([row + 0.5 for row in rows], [] if same else names, fontsize=7)
        axes.tick_params(axis="y", length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("step")
        axes.set_title(shown(run.name) if len(scale) > 1 else "", loc="left", color="#374151")
    bar = figure.colorbar(
        mesh, ax=list(grid), pad=0.01, aspect=30, format=PercentFormatter(1.0) if value.unit == "share" else None
    )
    bar.outline.set_visible(False)
    label = f"{value.title}: {value.description}" if value.description else value.title
    return f"<h3>{escape(label[0].upper() + label[1:])}</h3>" + figures.element(figure, f"Heat map, {label}")


def _format_matrix(figures: _Figures, run: Run) -> str:
    """Stall ratio over the whole run, layers by formats."""
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
    rows, names = _labels([*weights, "all"])
    axes.set_yticks([row + 0.5 for row in rows], names, fontsize=7.5)
    axes.set_xticks(
        [column + 0.5 for column in range(len(variants))], [shown(name) or "one format" for name in variants]
    )
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False, axis="x", labelsize=7.5)
    axes.tick_params(length=0, axis="y")
    axes.spines[:].set_visible(False)
    if cells.size <= _CELLS_WITH_NUMBERS:
        for (row, column), share in np.ndenumerate(cells):
            if not math.isnan(share):
                color = "white" if share < 0.6 else "black"
                text = f"{100 * share:.{0 if 0.1 <= share <= 0.9 else 1}f} %"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7.5, color=color)
    title = f"<h3>{escape(run.name)}: updates that change no code in their step, over the whole run</h3>"
    return title + figures.element(figure, "Stall ratio of each layer in each format")
