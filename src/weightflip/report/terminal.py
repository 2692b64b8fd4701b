"""Findings and tables on a terminal, or in a file or pipe: rich leaves the colours out there by itself."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from weightflip.records import in_display_order
from weightflip.records import printable as escaped
from weightflip.report.findings import Finding, Severity
from weightflip.report.many import overview_of
from weightflip.report.run import Layer, ReportError, Run, Series
from weightflip.report.table import ALWAYS, cell, columns, concerns, formats, model_series, ranked

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
# Of a pipe or a file, whose reader scrolls.
_PIPE_WIDTH = 200
_LAYERS_SHOWN = 40
_SIDE_BY_SIDE = 4
_BARS = "▁▂▃▄▅▆▇█"
_SPARKS = 12
_NAME_WIDTH = 24
# Columns that a narrow terminal loses last.
_KEEP = {"flip_rate": 10, "stall_ratio": 9}


def print_report(runs: Sequence[Run], findings: Sequence[Finding], file: IO[str] | None = None) -> None:
    """Print what was found, and the layers, the worst first.

    Args:
        runs: At least one.
        findings: Of these runs, the worst first.
        file: Where to; None for standard output.

    Raises:
        ReportError: rich is missing.
    """
    console = console_of(file)
    for part in parts_of(console, runs, findings):
        console.print(part)


def console_of(file: IO[str] | None = None) -> Console:
    """The terminal; a pipe or a file is wide.

    Raises:
        ReportError: rich is missing.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise ReportError(
            "the table on the terminal needs rich: pip install 'weightflip[report]' (or pip install rich)"
        ) from error
    console = Console(file=file, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(file=file, highlight=False, width=_PIPE_WIDTH)
    return console


def parts_of(console: Console, runs: Sequence[Run], findings: Sequence[Finding]) -> list[RenderableType]:
    """The report, part by part, as wide as a console."""
    parts = [*_runs(console, runs), _findings(console, runs, findings), ""]
    if 1 < len(runs) <= _SIDE_BY_SIDE and _share_layers(runs):
        parts += _side_by_side(console, runs, findings)
    elif len(runs) <= _SIDE_BY_SIDE:
        for run in runs:
            parts += _layers(console, run, findings, titled=len(runs) > 1)
    else:
        parts.append(_text(f"Layers are listed for up to {_SIDE_BY_SIDE} runs; --html has those of all."))
    return parts


def _share_layers(runs: Sequence[Run]) -> bool:
    return all(not set(run.layers).isdisjoint(runs[0].layers) for run in runs)


def _is_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _table(console: Console, **options: Any) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD if _is_unicode(console) else box.ASCII, pad_edge=False, **options)


def _text(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(escaped(text), style=style)


def _runs(console: Console, runs: Sequence[Run]) -> Iterator[RenderableType]:
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
                (f"{run.end:,}", f"{len(layers):,}", f"{weights:,}", variant or formats(run), optimizer, *rates)
            )
    titles = ("steps", "layers", "weights", "format", "optimizer", "flip rate", "stall ratio")
    others = [
        _Column(title, cells, keep, left=title in ("format", "optimizer"))
        for title, cells, keep in zip(titles, zip(*rows, strict=True), (5, 1, 3, 4, 2, 7, 6), strict=True)
    ]
    names = [run.name for run in runs for _ in run.models]
    shown = _fitting(console, names, others)
    table = _table(console)
    table.add_column("run", overflow="fold")
    for column in shown:
        table.add_column(_text(column.title), justify="left" if column.left else "right", overflow="fold")
    for at, name in enumerate(names):
        table.add_row(_text(name), *(_text(column.cells[at]) for column in shown))
    yield table
    for run in runs:
        for note in run.notes:
            yield _text(f"{run.name}: {note}" if len(runs) > 1 else note, style="dim")


def _findings(console: Console, runs: Sequence[Run], findings: Sequence[Finding]) -> RenderableType:
    from rich.constrain import Constrain
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        style, word = _STYLES[finding.severity]
        whose = f"{finding.runs[0]}: " if len(runs) > 1 and len(finding.runs) == 1 else ""
        table.add_row(_text(word, style=style), _text(whose + finding.text + "."))
    return Constrain(table, min(console.width, _TEXT_WIDTH))


def _mark(run: Run, findings: Sequence[Finding], layers: Sequence[str]) -> tuple[str, str]:
    worst = max(
        (finding.severity for finding in findings if any(concerns(finding, run, layer) for layer in layers)),
        default=Severity.INFO,
    )
    return {Severity.SERIOUS: "!!", Severity.WARNING: "!", Severity.NOTE: "*"}.get(worst, ""), _STYLES[worst][0]


def sparkline(series: Series, begin: int, end: int) -> str:
    """The course of a number, one bar for each twelfth of the run, or for each point; a space where there is none.

    Example:
        >>> steps = np.arange(1, 13)
        >>> sparkline(Series(steps, steps.astype(float), np.ones(12)), 0, 12)
        '▂▂▃▃▄▅▅▆▆▇▇█'
    """
    borders = np.linspace(begin, end, min(_SPARKS, max(1, len(series))) + 1)
    parts = [series.part(after, to).summary for after, to in itertools.pairwise(borders)]
    top = np.nanmax([*parts, 0.0])
    if not top > 0:
        return "".join(" " if np.isnan(part) else _BARS[0] for part in parts)
    return "".join(" " if np.isnan(part) else _BARS[round(part / top * (len(_BARS) - 1))] for part in parts)


class _Column:
    """A column of a table that may have to leave something out."""

    def __init__(self, title: str, cells: Sequence[str], keep: int, left: bool = False, letter: str = "") -> None:
        self.title = f"{title} {letter}" if letter else title
        self.value = title
        self.cells = list(cells)
        self.keep = keep
        self.left = left

    @property
    def width(self) -> int:
        return max(len(text) for text in (self.title, *self.cells)) + 3


def _fitting(console: Console, names: Sequence[str], others: Sequence[_Column]) -> list[_Column]:
    """As many columns as fit beside the names, those with the lowest ``keep`` left out first."""
    shown = list(others)
    name = min(_NAME_WIDTH, max(map(len, names), default=0)) + 8
    while name + sum(column.width for column in shown) > console.width:
        # The columns of a number stay or go for all runs together.
        least = min(column.keep for column in shown)
        fewer = [column for column in shown if column.keep > least]
        if not fewer:
            break
        shown = fewer
    return shown


class _Rows(NamedTuple):
    """Some layers, or blocks of them, as rows of a table.

    Attributes:
        title: What they are.
        names: Of the rows.
        of_runs: For each run, its layers or blocks by name.
        members: Of a block, the names of its layers.
        others: How many layers have no row.
    """

    title: str
    names: list[str]
    of_runs: Sequence[Mapping[str, Layer]]
    members: Mapping[str, Sequence[str]] = {}
    others: int = 0

    def first(self, name: str) -> Layer:
        return next(layers[name] for layers in self.of_runs if name in layers)


def _rows(runs: Sequence[Run], findings: Sequence[Finding]) -> list[_Rows]:
    """One table with the layers, the worst first; or one with blocks, and one with the layers that stand out."""
    layers = [run.layers for run in runs]
    overviews = [overview_of(run, findings) for run in runs]
    if not all(overviews):
        names = _worst_first(runs, findings)
        return [_Rows("layer", names[:_LAYERS_SHOWN], layers, others=len(names[_LAYERS_SHOWN:]))]
    known = [overview for overview in overviews if overview is not None]
    blocks = [{block.name: block for block in overview.blocks} for overview in known]
    members = {name: of for overview in known for name, of in overview.members.items()}
    odd = list(dict.fromkeys(layer.name for overview in known for layer in overview.layers))
    others = len(dict.fromkeys(name for run in runs for name in run.layers)) - len(odd)
    tables = [_Rows("block", list(members), blocks, members, 0 if odd else others)]
    return [*tables, _Rows("layers that stand out", odd, layers, others=others)] if odd else tables


def _worst_first(runs: Sequence[Run], findings: Sequence[Finding]) -> list[str]:
    def worst(name: str) -> int:
        return max(
            (finding.severity for run in runs for finding in findings if concerns(finding, run, name)), default=0
        )

    return sorted({layer.name: None for run in runs for layer in ranked(run, findings)}, key=worst, reverse=True)


def _layers(console: Console, run: Run, findings: Sequence[Finding], titled: bool) -> Iterator[RenderableType]:
    if titled:
        yield _text(f"{run.name}: {formats(run)}", style="bold")
    for rows in _rows([run], findings):
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
        yield from _table_of_layers(console, [run], rows, findings, others)


def _side_by_side(console: Console, runs: Sequence[Run], findings: Sequence[Finding]) -> Iterator[RenderableType]:
    """One table, with a column of each run for each number."""
    letters = "ABCDEFGH"
    for letter, run in zip(letters, runs, strict=False):
        yield _text(f"{letter} = {run.name}: {formats(run)}", style="bold")
    for rows in _rows(runs, findings):
        others = []
        for at, value in enumerate(columns(runs, [layer for run in runs for layer in run.layers.values()])):
            for letter, run, layers in zip(letters, runs, rows.of_runs, strict=False):
                cells = [
                    cell(value, layers[name].get(value.name), run.late) if name in layers else "" for name in rows.names
                ]
                others.append(_Column(value.title, cells, _KEEP.get(value.name, -at), letter=letter))
        yield from _table_of_layers(console, runs, rows, findings, others)


def _table_of_layers(
    console: Console, runs: Sequence[Run], rows: _Rows, findings: Sequence[Finding], others: Sequence[_Column]
) -> Iterator[RenderableType]:
    shown = _fitting(console, rows.names, others)
    table = _table(console)
    table.add_column("")
    table.add_column(rows.title, overflow="fold", min_width=12)
    for column in shown:
        table.add_column(_text(column.title), justify="left" if column.left else "right", no_wrap=True)
    for at, name in enumerate(rows.names):
        of_runs = zip(runs, rows.of_runs, strict=True)
        marks = [_mark(run, findings, rows.members.get(name, [name])) for run, layers in of_runs if name in layers]
        mark, style = max(marks, key=lambda pair: ["", "*", "!", "!!"].index(pair[0]))
        cells = [_text(column.cells[at]) for column in shown]
        table.add_row(_text(mark, style=style), _text(name, style=style if mark else ""), *cells)
    yield table
    if rows.members and not rows.others:
        # Another table follows, with the same notes.
        return
    late = " and ".join(dict.fromkeys(f"{max(0, int(run.late)):,} to {run.end:,}" for run in runs))
    yield _text(f"Means of the last quarter, steps {late}; shares of weights at its end.", style="dim")
    if rows.others:
        yield _text(f"{rows.others:,} more layers: --html and --csv have all.", style="dim")
    hidden = list(dict.fromkeys(column.value for column in others if column not in shown))
    if hidden:
        yield _text(f"Left out in this width: {', '.join(hidden)}.", style="dim")
