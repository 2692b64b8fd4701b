"""Which numbers a table of layers has, how they are called and written, and the CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike

from weightflip.records import table_cell
from weightflip.report.findings import Finding, percent
from weightflip.report.read import EMPTY, Layer, Run, Series


@dataclass(frozen=True)
class Value:
    """How one of the numbers is shown.

    Attributes:
        name: As in the records.
        title: The head of its column.
        write: From the number to text.
        meaning: In a few words.
    """

    name: str
    title: str
    write: Callable[[float], str]
    meaning: str


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


# In the order of the columns; the first two are always there.
VALUES = [
    Value("flip_rate", "flip rate", percent, "weights that flip in a step"),
    Value("stall_ratio", "stall ratio", percent, "updates that change no code in their step"),
    Value("oscillation_ratio", "oscillation", percent, "flips that take back the flip before"),
    Value("oscillating_fraction", "oscillating", percent, "weights that jump to and fro often"),
    Value("travel_ratio", "travel", _number, "way of the quantized weights / way of the weights"),
    Value("travel_high_fraction", "travel high", percent, "weights whose own travel ratio is above 16"),
    Value("weight_driven_fraction", "weight-driven", percent, "flips that are there with the old scale, too"),
    Value("ever_flipped", "ever flipped", percent, "weights that have flipped at least once"),
    Value("net_flipped", "net flipped", percent, "weights on another code than at the start"),
    Value("cumulative_flip_rate", "flips/weight", _number, "flips since the start / weights"),
    Value("scale_changes", "scale changes", percent, "block scales that change in a step"),
    Value(
        "flip_excess", "flip excess", _number, "flips / flips that the size of the steps lets one expect; 1 is usual"
    ),
    Value("zero_fraction", "zero", percent, "codes that stand for 0"),
    Value("saturated_fraction", "saturated", percent, "weights at the two ends of the format"),
    Value("underflow_fraction", "underflow", percent, "of the weights that are not 0, those that round to 0"),
    Value("stable_rank", "stable rank", _number, "sum of the squared singular values / the largest of them"),
    Value("effective_rank", "effective rank", _number, "exponential of the entropy of the singular values"),
    Value("nonfinite_weights", "non-finite", lambda value: f"{value:,.0f}", "NaN and infinite weights"),
]


def columns(layers: Iterable[Layer]) -> list[Value]:
    """The numbers that some layers have; those that no one here knows come last."""
    found = {name for layer in layers for name in layer.values} | {"flip_rate", "stall_ratio"}
    known = [value for value in VALUES if value.name in found]
    unknown = sorted(found - {value.name for value in VALUES})
    return known + [Value(name, name.replace("_", " "), _number, "") for name in unknown]


def cell(value: Value, series: Series, late: float) -> str:
    """A number in the last quarter of a run; of a gauge, at its end. Empty where there is none."""
    number = series.part(late).summary
    text = "" if math.isnan(number) else value.write(number)
    return text.replace("less than ", "<").replace("more than ", ">")


def ranked(run: Run, findings: Sequence[Finding]) -> list[Layer]:
    """Layers, the worst first: by the findings that name them, then by the updates that change no code."""
    worst = {
        name: max((finding.severity for finding in findings if concerns(finding, run, name)), default=0)
        for name in run.layers
    }

    def stalls(layer: Layer) -> float:
        ratio = layer.get("stall_ratio").part(run.late).summary
        return -1.0 if math.isnan(ratio) else ratio

    return sorted(run.layers.values(), key=lambda layer: (-worst[layer.name], -stalls(layer)))


def concerns(finding: Finding, run: Run, layer: str) -> bool:
    """Whether a finding names a layer of a run."""
    return run.name in finding.runs and layer in finding.layers


def formats(run: Run) -> str:
    """The quantizers of a run, for a line of text."""
    names = dict.fromkeys(
        f"{layer.quantizer} ({layer.dtype})" if layer.is_stored and layer.dtype else layer.quantizer
        for layer in run.layers.values()
    )
    return ", ".join(name for name in names if name) or "format unknown"


def write_csv(runs: Sequence[Run], path: str | PathLike[str]) -> int:
    """Every number of every record, one a row, in long form.

    The columns are run, step, layer, quantizer, value, number. The layer is empty for all layers together; numbers are
    written with all their digits. In names, what does not print is escaped, and one that a spreadsheet would take for a
    formula begins with an apostrophe.

    Args:
        runs: Read with ``every_record``.
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
                        writer.writerow(map(table_cell, [run.name, step, name, quantizer, value, number]))
                        rows += 1
    return rows


def model_series(run: Run, variant: str, value: str) -> Series:
    """A number of all layers together."""
    return run.models.get(variant, {}).get(value, EMPTY)
