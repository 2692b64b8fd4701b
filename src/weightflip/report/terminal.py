"""Findings and tables on a terminal, or in a file or pipe, where rich omits colors."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from weightflip.records import in_display_order
from weightflip.records import printable as escaped
from weightflip.report.block_summary import make_overview
from weightflip.report.findings import Finding, Severity
from weightflip.report.run import Layer, ReportError, Run, Series
from weightflip.report.table import ALWAYS, cell, columns, concerns, model_series, rank_layers, run_formats

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_STYLES = {
    Severity.SERIOUS: ("bold red", "serious"),
    Severity.WARNING: ("yellow", "warning"),
    Severity.NOTE: ("cyan", "note"),
    Severity.INFO: ("green", "info"),
}
_TEXT_WIDTH = 110
# Width for a pipe or a file.
_PIPE_WIDTH = 200
_LAYERS_SHOWN = 40
_MAX_COMPARED = 4
_BARS = "▁▂▃▄▅▆▇█"
_SPARKS = 12
_NAME_WIDTH = 24
# Columns that a narrow terminal drops last.
_KEEP = {"flip_rate": 10, "stall_ratio": 9}


def print_report(runs: Sequence[Run], findings: Sequence[Finding], file: IO[str] | None = None) -> None:
    """Print the findings and the layers, worst first.

    Args:
        runs: At least one run.
        findings: Findings about these runs, worst first.
        file: Output; None for standard output.

    Raises:
        ReportError: rich is missing.
    """
    console = make_console(file)
    for part in report_parts(console, runs, findings):
        console.print(part)


def make_console(file: IO[str] | None = None) -> Console:
    """Create a console. For a pipe or a file it is wide.

    Raises:
        ReportError: rich is missing.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise ReportError(
            "tables on the terminal need rich: pip install 'weightflip[report]' (or pip install rich)"
        ) from error
    console = Console(file=file, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(file=file, highlight=False, width=_PIPE_WIDTH)
    return console


def report_parts(console: Console, runs: Sequence[Run], findings: Sequence[Finding]) -> list[RenderableType]:
    """The parts of the report, formatted for the width of the console."""
    parts = [*_run_table(console, runs), _findings_table(console, runs, findings), ""]
    if 1 < len(runs) <= _MAX_COMPARED and _share_layers(runs):
        parts += _comparison_tables(console, runs, findings)
    elif len(runs) <= _MAX_COMPARED:
        for run in runs:
            parts += _layer_tables(console, run, findings, with_title=len(runs) > 1)
    else:
        parts.append(_make_text(f"Layers are listed for up to {_MAX_COMPARED} runs; --html lists those of all runs."))
    return parts


def _share_layers(runs: Sequence[Run]) -> bool:
    return all(not set(run.layers).isdisjoint(runs[0].layers) for run in runs)


def _is_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _make_table(console: Console, **options: Any) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD if _is_unicode(console) else box.ASCII, pad_edge=False, **options)


def _make_text(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(escaped(text), style=style)


def _run_table(console: Console, runs: Sequence[Run]) -> Iterator[RenderableType]:
    rows = []
    for run in runs:
        for variant in run.models:
            layers = [layer for layer in run.layers.values() if layer.variant == variant]
            weights = sum(layer.weights for layer in layers)
            rates = [
                cell(value, model_series(run, variant, value.name), run.late) for value in in_display_order(ALWAYS, ())
            ]
            optimizer = run.info.settings.get("optimizer", "")
            rows.append(
                (f"{run.end:,}", f"{len(layers):,}", f"{weights:,}", variant or run_formats(run), optimizer, *rates)
            )
    titles = ("steps", "layers", "weights", "format", "optimizer", "flip rate", "stall ratio")
    others = [
        _Column(title, cells, keep, left=title in ("format", "optimizer"))
        for title, cells, keep in zip(titles, zip(*rows, strict=True), (5, 1, 3, 4, 2, 7, 6), strict=True)
    ]
    names = [run.name for run in runs for _ in run.models]
    shown = _columns_that_fit(console, names, others)
    table = _make_table(console)
    table.add_column("run", overflow="fold")
    for column in shown:
        table.add_column(_make_text(column.title), justify="left" if column.left else "right", overflow="fold")
    for at, name in enumerate(names):
        table.add_row(_make_text(name), *(_make_text(column.cells[at]) for column in shown))
    yield table
    for run in runs:
        for note in run.notes:
            yield _make_text(f"{run.name}: {note}" if len(runs) > 1 else note, style="dim")


def _findings_table(console: Console, runs: Sequence[Run], findings: Sequence[Finding]) -> RenderableType:
    from rich.constrain import Constrain
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        style, word = _STYLES[finding.severity]
        whose = f"{finding.runs[0]}: " if len(runs) > 1 and len(finding.runs) == 1 else ""
        table.add_row(_make_text(word, style=style), _make_text(whose + finding.text + "."))
    return Constrain(table, min(console.width, _TEXT_WIDTH))


def _mark(run: Run, findings: Sequence[Finding], layers: Sequence[str]) -> tuple[str, str]:
    worst = max(
        (finding.severity for finding in findings if any(concerns(finding, run, layer) for layer in layers)),
        default=Severity.INFO,
    )
    return {Severity.SERIOUS: "!!", Severity.WARNING: "!", Severity.NOTE: "*"}.get(worst, ""), _STYLES[worst][0]


def sparkline(series: Series, begin: int, end: int) -> str:
    """A number over time as text: one bar per twelfth of the run, or per point. A space where there is no point.

    Example:
        >>> steps = np.arange(1, 13)
        >>> sparkline(Series(steps, steps.astype(float), np.ones(12)), 0, 12)
        '▂▂▃▃▄▅▅▆▆▇▇█'
    """
    edges = np.linspace(begin, end, min(_SPARKS, max(1, len(series))) + 1)
    parts = [series.part(after, to).summary for after, to in itertools.pairwise(edges)]
    top = np.nanmax([*parts, 0.0])
    if not top > 0:
        return "".join(" " if np.isnan(part) else _BARS[0] for part in parts)
    return "".join(" " if np.isnan(part) else _BARS[round(part / top * (len(_BARS) - 1))] for part in parts)


class _Column:
    """A column that may be dropped if the console is narrow. The highest ``keep`` is dropped last."""

    def __init__(self, title: str, cells: Sequence[str], keep: int, left: bool = False, letter: str = "") -> None:
        self.title = f"{title} {letter}" if letter else title
        self.value = title
        self.cells = list(cells)
        self.keep = keep
        self.left = left

    @property
    def width(self) -> int:
        return max(len(text) for text in (self.title, *self.cells)) + 3


def _columns_that_fit(console: Console, names: Sequence[str], others: Sequence[_Column]) -> list[_Column]:
    """The columns that fit next to the names. Those with the lowest ``keep`` are dropped first."""
    shown = list(others)
    name = min(_NAME_WIDTH, max(map(len, names), default=0)) + 8
    while name + sum(column.width for column in shown) > console.width:
        # The columns of a number are dropped for all runs together.
        lowest = min(column.keep for column in shown)
        fewer = [column for column in shown if column.keep > lowest]
        if not fewer:
            break
        shown = fewer
    return shown


class _TableRows(NamedTuple):
    """Layers or model blocks as rows of a table.

    Attributes:
        title: Header of the name column.
        names: Names of the rows.
        of_runs: Layers or blocks of each run, by name.
        members: Names of the layers of each block, by block name.
        others: Number of layers without a row.
    """

    title: str
    names: list[str]
    of_runs: Sequence[Mapping[str, Layer]]
    members: Mapping[str, Sequence[str]] = {}
    others: int = 0

    def first(self, name: str) -> Layer:
        return next(layers[name] for layers in self.of_runs if name in layers)


def _layer_rows(runs: Sequence[Run], findings: Sequence[Finding]) -> list[_TableRows]:
    """One table of layers, worst first; or one table of model blocks and one of the layers that stand out."""
    layers = [run.layers for run in runs]
    overviews = [make_overview(run, findings) for run in runs]
    if not all(overviews):
        names = _worst_first(runs, findings)
        return [_TableRows("layer", names[:_LAYERS_SHOWN], layers, others=len(names[_LAYERS_SHOWN:]))]
    known = [overview for overview in overviews if overview is not None]
    blocks = [{block.name: block for block in overview.blocks} for overview in known]
    members = {name: names for overview in known for name, names in overview.members.items()}
    outlying = list(dict.fromkeys(layer.name for overview in known for layer in overview.layers))
    others = len(dict.fromkeys(name for run in runs for name in run.layers)) - len(outlying)
    tables = [_TableRows("block", list(members), blocks, members, 0 if outlying else others)]
    return [*tables, _TableRows("layers that stand out", outlying, layers, others=others)] if outlying else tables


def _worst_first(runs: Sequence[Run], findings: Sequence[Finding]) -> list[str]:
    def worst(name: str) -> int:
        return max(
            (finding.severity for run in runs for finding in findings if concerns(finding, run, name)), default=0
        )

    return sorted({layer.name: None for run in runs for layer in rank_layers(run, findings)}, key=worst, reverse=True)


def _layer_tables(
    console: Console, run: Run, findings: Sequence[Finding], with_title: bool
) -> Iterator[RenderableType]:
    if with_title:
        yield _make_text(f"{run.name}: {run_formats(run)}", style="bold")
    for rows in _layer_rows([run], findings):
        shown = [rows.first(name) for name in rows.names]
        others = [_Column("weights", [f"{layer.weights:,}" if layer.weights else "" for layer in shown], 3)]
        if len({layer.quantizer for layer in run.layers.values()}) > 1:
            others.append(_Column("format", [layer.quantizer for layer in shown], 5, left=True))
        for at, value in enumerate(columns([run], shown)):
            cells = [cell(value, layer.get(value.name), run.late) for layer in shown]
            others.append(_Column(value.title, cells, _KEEP.get(value.name, -at)))
            if value.name == "flip_rate" and _is_unicode(console):
                sparks = [sparkline(layer.get("flip_rate"), run.begin, run.end) for layer in shown]
                others.append(_Column("over time", sparks, 4, left=True))
        yield from _render_layer_table(console, [run], rows, findings, others)


def _comparison_tables(console: Console, runs: Sequence[Run], findings: Sequence[Finding]) -> Iterator[RenderableType]:
    """Tables with one column per number and run."""
    letters = "ABCDEFGH"
    for letter, run in zip(letters, runs, strict=False):
        yield _make_text(f"{letter} = {run.name}: {run_formats(run)}", style="bold")
    for rows in _layer_rows(runs, findings):
        others = []
        for at, value in enumerate(columns(runs, [layer for run in runs for layer in run.layers.values()])):
            for letter, run, layers in zip(letters, runs, rows.of_runs, strict=False):
                cells = [
                    cell(value, layers[name].get(value.name), run.late) if name in layers else "" for name in rows.names
                ]
                others.append(_Column(value.title, cells, _KEEP.get(value.name, -at), letter=letter))
        yield from _render_layer_table(console, runs, rows, findings, others)


def _render_layer_table(
    console: Console, runs: Sequence[Run], rows: _TableRows, findings: Sequence[Finding], others: Sequence[_Column]
) -> Iterator[RenderableType]:
    shown = _columns_that_fit(console, rows.names, others)
    table = _make_table(console)
    table.add_column("")
    table.add_column(rows.title, overflow="fold", min_width=12)
    for column in shown:
        table.add_column(_make_text(column.title), justify="left" if column.left else "right", no_wrap=True)
    for at, name in enumerate(rows.names):
        of_runs = zip(runs, rows.of_runs, strict=True)
        marks = [_mark(run, findings, rows.members.get(name, [name])) for run, layers in of_runs if name in layers]
        mark, style = max(marks, key=lambda pair: ["", "*", "!", "!!"].index(pair[0]))
        cells = [_make_text(column.cells[at]) for column in shown]
        table.add_row(_make_text(mark, style=style), _make_text(name, style=style if mark else ""), *cells)
    yield table
    if rows.members and not rows.others:
        # The next table has the same notes.
        return
    late = " and ".join(dict.fromkeys(f"{max(0, int(run.late)):,} to {run.end:,}" for run in runs))
    yield _make_text(f"Means over the last quarter, steps {late}; fractions of weights at its end.", style="dim")
    if rows.others:
        yield _make_text(f"{rows.others:,} more layers: use --html or --csv for all.", style="dim")
    hidden = list(dict.fromkeys(column.value for column in others if column not in shown))
    if hidden:
        yield _make_text(f"Columns that do not fit: {', '.join(hidden)}.", style="dim")
