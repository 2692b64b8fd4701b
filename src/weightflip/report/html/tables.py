"""Text sections of the page: findings, and tables of runs and layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightflip.records import Value, in_display_order
from weightflip.report.block_summary import make_overview
from weightflip.report.findings import Finding, Severity
from weightflip.report.html.markup import escape, table, td
from weightflip.report.run import Layer, Run, Series
from weightflip.report.table import ALWAYS, cell, columns, concerns, model_series, rank_layers, run_formats

WORDS = {Severity.SERIOUS: "serious", Severity.WARNING: "warning", Severity.NOTE: "note", Severity.INFO: "info"}


def findings_list(runs: Sequence[Run], findings: Sequence[Finding]) -> str:
    """The findings, each with a colored word for its severity."""
    rows = []
    for finding in findings:
        whose = f"<b>{escape(finding.runs[0])}:</b> " if len(runs) > 1 and len(finding.runs) == 1 else ""
        word = WORDS[finding.severity]
        rows.append(
            f'<li><span class="tag {word}">{word}</span><span class=text>{whose}{escape(finding.text)}.</span></li>'
        )
    return f"<ul class=findings>{''.join(rows)}</ul>"


def _number(value: Value, series: Series, late: float) -> str:
    text = cell(value, series, late)
    if value.unit != "share" or not text:
        return td(text)
    fraction = min(1.0, max(0.0, series.part(late).summary))
    return f'<td class="bar" style="--share: {100 * fraction:.1f}%">{escape(text)}</td>'


def runs_table(runs: Sequence[Run]) -> str:
    """One row per run, or per format of a run, with model-wide numbers."""
    head = [("run", True), ("steps", False), ("layers", False), ("weights", False), ("format", True)]
    head += [("optimizer", True), ("flip rate", False), ("stall ratio", False)]
    rows = []
    for run in runs:
        for variant in run.models:
            layers = [layer for layer in run.layers.values() if layer.variant == variant]
            rows.append(
                [
                    td(run.name, "left name"),
                    td(f"{run.end:,}"),
                    td(f"{len(layers):,}"),
                    td(f"{sum(layer.weights for layer in layers):,}"),
                    td(variant or run_formats(run), "left"),
                    td(run.info.settings.get("optimizer", ""), "left"),
                    *(
                        _number(value, model_series(run, variant, value.name), run.late)
                        for value in in_display_order(ALWAYS, ())
                    ),
                ]
            )
    notes = "".join(f"<p class=soft>{escape(run.name)}: {escape(note)}.</p>" for run in runs for note in run.notes)
    late = "<p class=soft>Rates are means over the last quarter of a run.</p>"
    return table(head, rows) + late + notes


def layers_table(run: Run, findings: Sequence[Finding], with_title: bool) -> str:
    """The layers of a run, worst first. With many layers: model blocks, outliers, and a collapsed list of all."""
    all_layers = _table(run, findings, "layer", rank_layers(run, findings))
    overview = make_overview(run, findings)
    if overview is not None:
        tables = [_table(run, findings, "block", overview.blocks, overview.members)]
        if overview.layers:
            tables.append(_table(run, findings, "layers that stand out", overview.layers))
        all_layers = f"<details><summary>All {len(run.layers):,} layers, worst first</summary>{all_layers}</details>"
        all_layers = "".join([*tables, all_layers])
    title = f"<h3>{escape(run.name)}</h3>" if with_title else ""
    steps = f"steps {max(0, int(run.late)):,} to {run.end:,}"
    late = f"<p class=soft>Means over {steps}; fractions of weights at the end.</p>"
    return title + late + all_layers


def _table(
    run: Run,
    findings: Sequence[Finding],
    title: str,
    layers: Sequence[Layer],
    members: Mapping[str, Sequence[str]] | None = None,
) -> str:
    values = columns([run], run.layers.values())
    head = [(title, True), ("weights", False), ("format", True), *((value.title, False) for value in values)]
    rows = []
    for layer in layers:
        names = (members or {}).get(layer.name, [layer.name])
        worst = max(
            (finding.severity for finding in findings if any(concerns(finding, run, name) for name in names)),
            default=None,
        )
        dot = f'<i class="dot {WORDS[worst] if worst else ""}"></i>'
        rows.append(
            [
                f'<td class="left name">{dot}{escape(layer.name)}</td>',
                td(f"{layer.weights:,}" if layer.weights else ""),
                td(layer.quantizer, "left"),
                *(_number(value, layer.get(value.name), run.late) for value in values),
            ]
        )
    return table(head, rows)


def column_explanations(runs: Sequence[Run]) -> str:
    """Explanations of the columns."""
    rows = [
        f"<dt>{escape(value.title)}</dt><dd>{escape(value.description)}</dd>"
        for value in columns(runs, [layer for run in runs for layer in run.layers.values()])
        if value.description
    ]
    return f"<dl>{''.join(rows)}</dl>"
