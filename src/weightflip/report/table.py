"""Contents of the layer tables: columns, number formats, order of the layers, and the CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike

from weightflip.records import Value, csv_cell, in_display_order
from weightflip.report.findings import Finding
from weightflip.report.findings.phrases import percent
from weightflip.report.run import EMPTY, Layer, Run, Series

# Columns of every table, even if no layer has the number.
ALWAYS = ("flip_rate", "stall_ratio")


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


_WRITE: Mapping[str, Callable[[float], str]] = {
    "share": percent,
    "count": lambda value: f"{value:,.0f}",
    "number": _number,
}


def columns(runs: Iterable[Run], layers: Iterable[Layer]) -> list[Value]:
    """The numbers that occur in some layers of some runs. Always includes flip rate and stall ratio."""
    names = {name for layer in layers for name in layer.values} | set(ALWAYS)
    return in_display_order(names, (value for run in runs for value in run.info.values))


def cell(value: Value, series: Series, late: float) -> str:
    """A number over the last quarter of a run, or a gauge at its end, as text. Empty if there is none."""
    number = series.part(late).summary
    text = "" if math.isnan(number) else _WRITE[value.unit](number)
    return text.replace("less than ", "<").replace("more than ", ">")


def rank_layers(run: Run, findings: Sequence[Finding]) -> list[Layer]:
    """Layers sorted worst first: by the findings that name them, then by stall ratio."""
    worst = {
        name: max((finding.severity for finding in findings if concerns(finding, run, name)), default=0)
        for name in run.layers
    }

    def stalls(layer: Layer) -> float:
        ratio = layer.get("stall_ratio").part(run.late).summary
        return -1.0 if math.isnan(ratio) else ratio

    return sorted(run.layers.values(), key=lambda layer: (-worst[layer.name], -stalls(layer)))


def concerns(finding: Finding, run: Run, layer: str) -> bool:
    """Whether a finding names this layer of this run."""
    return run.name in finding.runs and layer in finding.layers


def run_formats(run: Run) -> str:
    """The quantizers of a run, as text."""
    names = dict.fromkeys(
        f"{layer.quantizer} ({layer.dtype})" if layer.is_stored and layer.dtype else layer.quantizer
        for layer in run.layers.values()
    )
    return ", ".join(name for name in names if name) or "format unknown"


def write_csv(runs: Sequence[Run], path: str | PathLike[str]) -> int:
    """Write all numbers of all records in long form, one number per row.

    The columns are run, step, layer, quantizer, value, number. The layer is empty for the sum over all layers. Numbers
    have full precision. Non-printable characters in names are escaped, and a name that a spreadsheet would run as a
    formula gets a leading apostrophe.

    Args:
        runs: Runs read with ``every_record``.
        path: The file.

    Returns:
        The number of rows.
    """
    rows = 0
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "step", "layer", "quantizer", "value", "number"])
        for run in runs:
            sources = [("", variant, model) for variant, model in run.models.items()]
            sources += [(layer.weight, layer.quantizer, layer.values) for layer in run.layers.values()]
            for name, quantizer, values in sources:
                for value, series in values.items():
                    for step, number in zip(series.steps.tolist(), series.values.tolist(), strict=True):
                        writer.writerow(map(csv_cell, [run.name, step, name, quantizer, value, number]))
                        rows += 1
    return rows


def model_series(run: Run, variant: str, value: str) -> Series:
    """A number summed over all layers with one quantizer."""
    return run.models.get(variant, {}).get(value, EMPTY)
