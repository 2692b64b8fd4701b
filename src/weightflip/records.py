"""Records: the counts of one logging point as plain Python numbers. Sinks and reports see nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from weightflip import notebook
from weightflip.overview import MANY_LAYERS, blocks_of, outliers
from weightflip.texts import percent
from weightflip.texts import printable as printable

Kind: TypeAlias = Literal["rate", "gauge", "histogram"]
Unit: TypeAlias = Literal["share", "count", "number"]

MODEL_TAGS = {
    "flip_rate": "flips/rate",
    "cumulative_flip_rate": "flips/cumulative_rate",
    "stall_ratio": "flips/stall_ratio",
}
"""Tags of model-wide numbers that do not follow the pattern ``flips/<value>``."""

ALERTS_TAG = "weightflip/tracking_alerts"
"""Tag of the alert texts. TensorBoard sorts by tag, so they come after the text that describes the run."""


@dataclass(frozen=True)
class Value:
    """Describes one number of a record: its meaning and how it is displayed.

    It is declared where the number is counted, and travels with the records to everything that displays them.

    Attributes:
        name: Name in records and tags.
        kind: ``"rate"``: counted over the steps since the last logging point. ``"gauge"``: measured at the logging
            point. ``"histogram"``: distribution over the weights at the logging point.
        title: Column header, one or two words. Default: derived from the name.
        description: Short explanation, used as the title of its chart.
        unit: ``"share"`` (a fraction, written as a percentage), ``"count"``, or ``"number"`` for everything else.
        chart: Section of TensorBoard's layout that holds its charts. Default: that of the metric group.
        order: Sort key, lowest first. When space is short, the highest are left out first.
        heat_map: Whether there is a heat map of all layers over time.
        expects: For a number defined as flip rate / another rate: a short description of that other rate. A scatter
            plot shows the flip rate of each layer against it.

    Raises:
        ValueError: Unknown kind or unit.
    """

    name: str
    kind: Kind = "rate"
    title: str = ""
    description: str = ""
    unit: Unit = "number"
    chart: str = ""
    order: int = 100
    heat_map: bool = False
    expects: str = ""

    def __post_init__(self) -> None:
        for field_name, value, known in (("kind", self.kind, get_args(Kind)), ("unit", self.unit, get_args(Unit))):
            if value not in known:
                raise ValueError(
                    f"{field_name} of Value({self.name!r}) must be one of {', '.join(known)}; got {value!r}"
                )
        object.__setattr__(self, "title", self.title or self.name.replace("_", " "))


CORE_VALUES = (
    Value("flip_rate", "rate", "flip rate", "fraction of weights that flip in a step", "share", "weightflip", 0, True),
    Value("stall_ratio", "rate", "stall ratio", "fraction of updates lost to rounding", "share", "weightflip", 1, True),
    Value(
        "cumulative_flip_rate", "gauge", "flips/weight", "flips since the start / weights", "number", "weightflip", 55
    ),
    Value(
        "updated_fraction",
        "rate",
        "updated",
        "fraction of weights whose gradient is not 0 in a step",
        "share",
        "weightflip",
        57,
    ),
    Value(
        "scale_changes",
        "rate",
        "scale changes",
        "fraction of block or group scales that change in a step",
        "share",
        "weightflip: scale",
        60,
    ),
    Value("nonfinite_weights", "gauge", "non-finite", "NaN and infinite weights", "count", "weightflip", 1000),
)
"""The numbers of every run."""


def in_display_order(names: Iterable[str], values: Iterable[Value]) -> list[Value]:
    """Look up the :class:`Value` of each name and sort them for display.

    Args:
        names: Names of the numbers.
        values: The values that a run declares. A number that is not declared is displayed under its name.
    """
    known = {value.name: value for value in (*CORE_VALUES, *values)}
    selected = [known.get(name) or Value(name) for name in dict.fromkeys(names)]
    return sorted(selected, key=lambda value: (value.order, value.name))


class Quotient(NamedTuple):
    """A ratio whose parts are summed over layers, steps and processes before they are divided.

    Attributes:
        numerator: Number of hits.
        denominator: Number of candidates.
    """

    numerator: float
    denominator: float

    @property
    def value(self) -> float:
        """Numerator / denominator; NaN for denominator 0."""
        return self.numerator / self.denominator if self.denominator else math.nan


class Histogram(NamedTuple):
    """Distribution of a layer's weights at one logging point.

    Attributes:
        edges: Ascending, finite bin edges, one more than there are bins.
        counts: Weights in each bin. Weights outside the edges are in the first or the last bin.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """Totals over some tracked steps.

    Attributes:
        weight_steps: Number of tracked weights, summed over the tracked steps.
        flips: Weights whose code changed.
        updates: Weights whose gradient was not exactly 0.
        stalled: Weights with an update and no flip.
        scale_steps: Number of compared block and group scales, summed over the tracked steps.
        scale_changes: How many of these scales changed.
        update_steps: Like ``weight_steps``, over the steps in which updates were counted; 0 without ``"stalls"``.
        ratios: Counts of the metric groups, by name.
    """

    weight_steps: int = 0
    flips: int = 0
    updates: int = 0
    stalled: int = 0
    scale_steps: int = 0
    scale_changes: int = 0
    update_steps: int = 0
    ratios: Mapping[str, Quotient] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        return self._combine(other, 1)

    def __sub__(self, other: Counts) -> Counts:
        return self._combine(other, -1)

    def _combine(self, other: Counts, sign: int) -> Counts:
        numbers: dict[str, Any] = {name: getattr(self, name) + sign * getattr(other, name) for name in _NUMBERS}
        return Counts(**numbers, ratios=_add_quotients(self.ratios, other.ratios, sign))

    @property
    def flip_rate(self) -> float:
        """Mean fraction of the weights that flip per step, in [0, 1]; NaN if nothing was tracked."""
        return self.flips / self.weight_steps if self.weight_steps else math.nan

    @property
    def stall_ratio(self) -> float:
        """Stalled / updates, in [0, 1]; NaN without updates."""
        return self.stalled / self.updates if self.updates else math.nan

    @property
    def updated_fraction(self) -> float:
        """Mean fraction of the weights with an update per step, in [0, 1]; NaN if updates were not counted."""
        return self.updates / self.update_steps if self.update_steps else math.nan

    @property
    def scale_change_rate(self) -> float:
        """Mean fraction of the block and group scales that change per step; NaN without such scales."""
        return self.scale_changes / self.scale_steps if self.scale_steps else math.nan

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Counts:
        """The inverse of ``to_dict``."""
        return cls(**{**data, "ratios": _quotients_from_dict(data.get("ratios", {}))})

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and numbers."""
        return {**vars(self), "ratios": {name: list(quotient) for name, quotient in self.ratios.items()}}


def _counts_to_list(counts: Counts) -> list[int]:
    """The numbers of ``counts`` in field order, without trailing zeros."""
    # Updates are counted in every step or in none, so the difference is 0 in most runs.
    fields_by_name = {
        **{name: getattr(counts, name) for name in _NUMBERS},
        "update_steps": counts.weight_steps - counts.update_steps,
    }
    numbers = list(fields_by_name.values())
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def _counts_from_list(numbers: Sequence[int], ratios: Mapping[str, Quotient]) -> Counts:
    """The inverse of ``_counts_to_list``."""
    counts: dict[str, Any] = {**dict.fromkeys(_NUMBERS, 0), **dict(zip(_NUMBERS, numbers, strict=False))}
    counts["update_steps"] = counts["weight_steps"] - counts["update_steps"]
    return Counts(**counts, ratios=ratios)


_NUMBERS = tuple(f.name for f in fields(Counts) if f.name != "ratios")


def _add_quotients(mine: Mapping[str, Quotient], others: Mapping[str, Quotient], sign: int = 1) -> dict[str, Quotient]:
    zero = Quotient(0, 0)
    pairs = {name: (mine.get(name, zero), others.get(name, zero)) for name in {**mine, **others}}
    return {name: Quotient(*(x + sign * y for x, y in zip(a, b, strict=True))) for name, (a, b) in pairs.items()}


def _sum_counts(counts: Sequence[Counts]) -> Counts:
    # Number by number: a Counts for each layer would take ten times as long.
    numbers: dict[str, Any] = {name: sum(getattr(one, name) for one in counts) for name in _NUMBERS}
    ratios: Mapping[str, Quotient] = {}
    for one in counts:
        if one.ratios:
            ratios = _add_quotients(ratios, one.ratios)
    return Counts(**numbers, ratios=ratios)


def _quotients_from_dict(data: Mapping[str, Sequence[float]]) -> dict[str, Quotient]:
    return {name: Quotient(*pair) for name, pair in data.items()}


def variant(name: str, quantizer: str) -> str:
    """The name of a weight tracked with several quantizers, as seen by one of them."""
    return f"{name}@{quantizer}"


def split_variant(name: str) -> tuple[str, str]:
    """The inverse of :func:`variant`. The quantizer is empty for a weight tracked with one quantizer."""
    name, _, quantizer = name.partition("@")
    return name, quantizer


def csv_cell(value: object) -> object:
    """A cell of a CSV file. Text that a spreadsheet would run as a formula gets a leading apostrophe."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


@dataclass(frozen=True)
class LayerRecord:
    """One layer, or the sum over layers, at one logging point.

    Attributes:
        name: Parameter name; ``name@quantizer`` if it is tracked with several quantizers.
        weights: Number of weights.
        window: Counts since the last logging point.
        total: Counts since tracking began.
        nonfinite: NaN and infinite weights at the logging point.
        gauges: Values that metric groups measured at the logging point, by name.
        histograms: Distributions over the weights at the logging point, by name.
    """

    name: str
    weights: int
    window: Counts
    total: Counts
    nonfinite: int = 0
    gauges: Mapping[str, Quotient] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {printable(self.name)}, {self.weights:,} weights, {_rates_text(self)}>"

    @property
    def flip_rate(self) -> float:
        """Mean fraction of the weights that flipped per step of the window."""
        return self.window.flip_rate

    @property
    def cumulative_flip_rate(self) -> float:
        """Flips over all tracked steps / weights. It can exceed 1. NaN for an empty layer."""
        return self.total.flips / self.weights if self.weights else math.nan

    @property
    def stall_ratio(self) -> float:
        """Stalled / updates in the window; NaN without updates."""
        return self.window.stall_ratio

    @property
    def updated_fraction(self) -> float:
        """Mean fraction of the weights with an update per step of the window; NaN if updates were not counted."""
        return self.window.updated_fraction

    @property
    def scale_change_rate(self) -> float:
        """Mean fraction of the block and group scales that changed per step of the window; NaN without such scales."""
        return self.window.scale_change_rate

    @property
    def quotients(self) -> dict[str, Quotient]:
        """The ratios behind ``values``, so that they can be summed before they are divided."""
        return {name: quotient for name, quotient in self.all_quotients.items() if not math.isnan(quotient.value)}

    @property
    def all_quotients(self) -> dict[str, Quotient]:
        """``quotients``, including those with denominator 0. Holds arrays if the fields are arrays."""
        window = self.window
        return {
            "flip_rate": Quotient(window.flips, window.weight_steps),
            "cumulative_flip_rate": Quotient(self.total.flips, self.weights),
            "stall_ratio": Quotient(window.stalled, window.updates),
            "updated_fraction": Quotient(window.updates, window.update_steps),
            "scale_changes": Quotient(window.scale_changes, window.scale_steps),
            **window.ratios,
            **self.gauges,
        }

    @property
    def values(self) -> dict[str, float]:
        """All numbers of this logging point by name, as sinks write them. Never NaN: undefined numbers are absent."""
        return {name: quotient.value for name, quotient in self.quotients.items()}

    @property
    def new_values(self) -> dict[str, float]:
        """The part of ``values`` that is new at this logging point: only metric groups' if no step was tracked."""
        if self.window.weight_steps:
            return self.values
        groups = {**self.gauges, **self.window.ratios}
        return {name: value for name, value in self.values.items() if name in groups}

    @property
    def is_new(self) -> bool:
        """Whether anything was counted since the last logging point, in tracked steps or at syncs."""
        return bool(self.window.weight_steps or any(pair.denominator for pair in self.window.ratios.values()))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerRecord:
        """The inverse of ``to_dict``."""
        histograms = {
            name: Histogram(*(tuple(numbers) for numbers in pair)) for name, pair in data.get("histograms", {}).items()
        }
        converted = {
            "window": Counts.from_dict(data["window"]),
            "total": Counts.from_dict(data["total"]),
            "gauges": _quotients_from_dict(data.get("gauges", {})),
            "histograms": histograms,
        }
        return cls(**{**data, **converted})

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        converted = {
            "window": self.window.to_dict(),
            "total": self.total.to_dict(),
            "gauges": {name: list(quotient) for name, quotient in self.gauges.items()},
            "histograms": {name: [list(numbers) for numbers in pair] for name, pair in self.histograms.items()},
        }
        return {**vars(self), **converted}

    def to_row(self) -> list[Any]:
        """Name, weights, window, total, then a dictionary of the other non-empty fields. Without histograms."""
        extras = {
            "nonfinite": self.nonfinite,
            "window": {name: list(quotient) for name, quotient in self.window.ratios.items()},
            "total": {name: list(quotient) for name, quotient in self.total.ratios.items()},
            "gauges": {name: list(quotient) for name, quotient in self.gauges.items()},
        }
        extras = {name: content for name, content in extras.items() if content}
        counts = [_counts_to_list(self.window), _counts_to_list(self.total)]
        return [self.name, self.weights, *counts, *([extras] if extras else [])]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> LayerRecord:
        """The inverse of ``to_row``."""
        name, weights, *periods, extras = row if len(row) > 4 else [*row, {}]
        window, total = (
            _counts_from_list(numbers, _quotients_from_dict(extras.get(period, {})))
            for period, numbers in zip(("window", "total"), periods, strict=True)
        )
        return cls(
            name, weights, window, total, extras.get("nonfinite", 0), _quotients_from_dict(extras.get("gauges", {}))
        )


@dataclass(frozen=True)
class FlipRecord:
    """All layers at one logging point.

    Attributes:
        step: Optimizer steps so far, without skipped ones.
        layers: All layers that were ever tracked. The window of a layer that is now frozen is empty.
        groups: Names of the layers of each group, by group name.
    """

    step: int
    layers: tuple[LayerRecord, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line, since a large record has thousands of numbers."""
        rates = "; ".join(
            f"{name}: {_rates_text(model)}" if name else _rates_text(model) for name, model in self.models.items()
        )
        return f"<{type(self).__name__}: step {self.step}, {len(self.layers):,} layers{rates and f', {rates}'}>"

    def _repr_html_(self) -> str:
        """The numbers of this logging point. More than 30 layers: one row per model block, then the outliers."""
        models = [
            replace(model, name=variant("all", quantizer) if quantizer else "all")
            for quantizer, model in self.models.items()
        ]
        names = dict.fromkeys(split_variant(layer.name)[0] for layer in self.layers)
        parts = [notebook.bars("flip rate of each layer", {layer.name: layer.flip_rate for layer in self.layers})]
        if len(names) <= MANY_LAYERS:
            parts.append(_html_table("layer", [*self.layers, *models]))
        else:
            blocks = replace(self, groups=blocks_of(names)).group_sums
            parts.append(_html_table("block" if blocks else "layers", [*blocks.values(), *models]))
            parts.append(_html_table("layers that stand out", self._outliers()))
        return notebook.page(notebook.paragraph(f"step {self.step}, {len(names)} layers"), *parts)

    def _outliers(self) -> list[LayerRecord]:
        """Layers whose flip rate stands out among the layers with the same quantizer."""
        by_name = {layer.name: layer for layer in self.layers}
        outlying: list[LayerRecord] = []
        for quantizer in self.models:
            rates = {
                name: x.all_quotients["flip_rate"] for name, x in by_name.items() if split_variant(name)[1] == quantizer
            }
            outlying += [by_name[name] for name in outliers(rates)]
        return outlying

    @property
    def model(self) -> LayerRecord:
        """The sum over all layers. Counts and sizes are summed, then divided."""
        return _sum_layers("model", self.layers)

    @property
    def models(self) -> dict[str, LayerRecord]:
        """The sum over all layers, one per quantizer if weights are tracked with several.

        Keys are quantizer names. The key is empty for weights tracked with one quantizer.
        """
        variants = dict.fromkeys(split_variant(layer.name)[1] for layer in self.layers)
        return {
            name: _sum_layers("model", [layer for layer in self.layers if split_variant(layer.name)[1] == name])
            for name in variants
        }

    @property
    def group_sums(self) -> dict[str, LayerRecord]:
        """The sum over the layers of each group; ``name@quantizer`` if they are tracked with several quantizers."""
        sums = {}
        for group, names in self.groups.items():
            members = [layer for layer in self.layers if split_variant(layer.name)[0] in names]
            for quantizer in dict.fromkeys(split_variant(layer.name)[1] for layer in members):
                name = variant(group, quantizer) if quantizer else group
                same_quantizer = [layer for layer in members if split_variant(layer.name)[1] == quantizer]
                sums[name] = _sum_layers(name, same_quantizer)
        return sums

    @classmethod
    def merged(cls, records: Sequence[FlipRecord]) -> FlipRecord:
        """One record with the layers of several trackers, at the largest of their steps."""
        groups: dict[str, tuple[str, ...]] = {}
        for record in records:
            for group, names in record.groups.items():
                groups[group] = (*groups.get(group, ()), *names)
        return cls(
            max(record.step for record in records),
            tuple(layer for record in records for layer in record.layers),
            groups,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, as the JSONL sink writes them."""
        return {
            "step": self.step,
            "layers": [layer.to_dict() for layer in self.layers],
            "groups": {group: list(names) for group, names in self.groups.items()},
        }

    def to_rows(self) -> dict[str, Any]:
        """A compact form without histograms and groups, sufficient for reports."""
        return {"step": self.step, "rows": [layer.to_row() for layer in self.layers]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FlipRecord:
        """The inverse of ``to_dict`` and ``to_rows``. Reads the output of earlier versions too."""
        if "rows" in data:
            return cls(data["step"], tuple(map(LayerRecord.from_row, data["rows"])))
        groups = {group: tuple(names) for group, names in data.get("groups", {}).items()}
        return cls(data["step"], tuple(LayerRecord.from_dict(layer) for layer in data["layers"]), groups)


def _rates_text(record: LayerRecord) -> str:
    return f"flip rate {percent(record.flip_rate)}, stall ratio {percent(record.stall_ratio)}"


def _html_table(title: str, rows: Sequence[LayerRecord]) -> str:
    if not rows:
        return ""
    columns = in_display_order((name for row in rows for name in row.values), ())
    cells = [
        (
            row.name,
            f"{row.weights:,}",
            *(_format_cell(column, row.values.get(column.name, math.nan)) for column in columns),
            f"{row.nonfinite:,}",
        )
        for row in rows
    ]
    # Leave out the last column if all weights are finite.
    end = None if any(row.nonfinite for row in rows) else -1
    head = (title, "weights", *(column.title for column in columns), "non-finite")
    return notebook.table(head[:end], [line[:end] for line in cells])


def _format_cell(column: Value, value: float) -> str:
    if math.isnan(value):
        return "-"
    return percent(value) if column.unit == "share" else f"{value:,.3g}"


@dataclass(frozen=True)
class AlertEvent:
    """An alert that fired for one layer.

    Attributes:
        step: Optimizer step of the record at which it fired.
        layer: Name of the layer, or ``"model"``.
        rule: The rule as the user wrote it.
        value: The value at that record.
        since: Step of the first record since which the condition has held.
        message: The alert as a sentence.
    """

    step: int
    layer: str
    rule: str
    value: float
    since: int
    message: str


# With more layers than this, one line summarizes them and names the first ones.
_MAX_NAMES = 5


def alert_lines(events: Iterable[AlertEvent]) -> list[str]:
    """Alerts as lines of text: one line per alert, or one line if a rule fires for many layers at one step.

    Args:
        events: Alerts, sorted so that those with the same step and rule are adjacent.
    """
    lines = []
    for (step, rule), group in itertools.groupby(events, lambda event: (event.step, event.rule)):
        same_rule = list(group)
        if len(same_rule) <= _MAX_NAMES:
            lines += [event.message for event in same_rule]
        else:
            names = ", ".join(printable(event.layer) for event in same_rule[:_MAX_NAMES])
            lines.append(f"step {step}: {rule}: {names} and {len(same_rule) - _MAX_NAMES} more")
    return lines


def _sum_layers(name: str, layers: Sequence[LayerRecord]) -> LayerRecord:
    gauges: dict[str, Quotient] = {}
    histograms: dict[str, Histogram] = {}
    for layer in layers:
        if layer.gauges:
            gauges = _add_quotients(gauges, layer.gauges)
        for value, histogram in layer.histograms.items():
            before = histograms.get(value)
            counts = (
                histogram.counts
                if before is None
                else tuple(map(sum, zip(before.counts, histogram.counts, strict=True)))
            )
            histograms[value] = Histogram(histogram.edges, counts)
    return LayerRecord(
        name,
        sum(layer.weights for layer in layers),
        _sum_counts([layer.window for layer in layers]),
        _sum_counts([layer.total for layer in layers]),
        sum(layer.nonfinite for layer in layers),
        gauges,
        histograms,
    )


# In the text panel, more weights than this with the same skip reason share one row, which names the first of them.
_SKIPPED_ROWS, _SKIPPED_NAMES = 12, 4


@dataclass(frozen=True)
class RunInfo:
    """Human-readable description of what is tracked and how.

    Attributes:
        tracked: Shape, dtype and quantizer as text, by parameter name.
        skipped: Why a parameter is not tracked, by parameter name.
        settings: Values as text, by option name.
        notes: Sentences for the user, such as which format was assumed.
        groups: Names of the tracked parameters of each group, by group name.
        values: The numbers of the metric groups and how each is displayed.
    """

    tracked: dict[str, tuple[str, str, str]]
    skipped: dict[str, str]
    settings: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    values: tuple[Value, ...] = ()

    @classmethod
    def merged(cls, infos: Sequence[RunInfo]) -> RunInfo:
        """The description of several trackers that form one run."""
        settings: dict[str, list[str]] = {}
        for info in infos:
            for name, value in info.settings.items():
                values = settings.setdefault(name, [])
                if value not in values:
                    values.append(value)
        groups: dict[str, tuple[str, ...]] = {}
        for info in infos:
            for group, names in info.groups.items():
                groups[group] = (*groups.get(group, ()), *names)
        return cls(
            {name: row for info in infos for name, row in info.tracked.items()},
            {name: reason for info in infos for name, reason in info.skipped.items()},
            {name: " and ".join(values) for name, values in settings.items()},
            tuple(dict.fromkeys(note for info in infos for note in info.notes)),
            groups,
            tuple(dict.fromkeys(value for info in infos for value in info.values)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and strings."""
        return {**vars(self), "notes": list(self.notes), "values": [dict(vars(value)) for value in self.values]}

    def to_markdown(self) -> str:
        """The text panel in TensorBoard."""
        lines = [f"**weightflip** tracks {len(self.tracked)} weights, skips {len(self.skipped)}.", ""]
        definitions = (f"*{value.title}*: {value.description}" for value in CORE_VALUES[:3])
        lines += ["; ".join(definitions) + ".", ""]
        lines += [f"- {printable(note)}" for note in self.notes]
        lines += ["", "| weight | shape | dtype | quantizer |", "|---|---|---|---|"]
        lines += [f"| `{printable(name)}` | {' | '.join(map(printable, row))} |" for name, row in self.tracked.items()]
        if self.skipped:
            lines += ["", "| skipped | why |", "|---|---|"]
            lines += [f"| {names} | {printable(reason)} |" for names, reason in self._skipped_rows()]
        if self.groups:
            lines += ["", "| group | weights |", "|---|---|"]
            lines += [
                f"| {printable(group)} | {', '.join(f'`{printable(name)}`' for name in names)} |"
                for group, names in self.groups.items()
            ]
        if self.values:
            # The report reads this table back: report.events.
            lines += ["", "| number | title | kind | unit | what it is |", "|---|---|---|---|---|"]
            lines += [
                f"| `{printable(value.name)}` | {printable(value.title)} | {value.kind} | {value.unit} | "
                f"{printable(value.description or value.title)} |"
                for value in in_display_order((value.name for value in self.values), self.values)
            ]
        lines += ["", printable(", ".join(f"{name}={value}" for name, value in self.settings.items()))]
        return "\n".join(lines)

    def _skipped_rows(self, name_format: str = "`{}`") -> Iterator[tuple[str, str]]:
        """Name and reason, one row per weight; one row for all weights if many share a reason."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name_format.format(printable(name)))
        for reason, names in by_reason.items():
            if len(names) > _SKIPPED_ROWS:
                names = [f"{', '.join(names[:_SKIPPED_NAMES])} and {len(names) - _SKIPPED_NAMES} more"]
            yield from ((name, reason) for name in names)

    def __repr__(self) -> str:
        """One line, since a large model has hundreds of weights."""
        return f"<{type(self).__name__}: {self._summary}; print() lists them>"

    @property
    def _summary(self) -> str:
        return f"{len(self.tracked)} weights tracked, {len(self.skipped)} skipped"

    def _repr_html_(self) -> str:
        """Tracked weights (more than 30: one row per model block), skipped weights with reasons, notes and settings."""
        blocks = blocks_of(split_variant(name)[0] for name in self.tracked) if len(self.tracked) > MANY_LAYERS else {}
        block_of = {name: block for block, members in blocks.items() for name in members}
        rows: dict[str, list[tuple[str, str, str]]] = {}
        for name, row in self.tracked.items():
            rows.setdefault(block_of.get(split_variant(name)[0], name), []).append(row)
        head = ["weight", "shape", "dtype", "quantizer"]
        cells = [[name, *map(_join_distinct, zip(*members, strict=True))] for name, members in rows.items()]
        if blocks:
            head = ["block", "weights", *head[1:]]
            cells = [[name, str(len(rows[name])), *others] for name, *others in cells]
        skipped = list(self._skipped_rows("{}"))
        return notebook.page(
            notebook.paragraph(self._summary),
            *map(notebook.paragraph, self.notes),
            notebook.table(head, cells, texts=len(head)) if cells else "",
            notebook.table(("skipped", "why"), skipped, texts=2) if skipped else "",
            notebook.paragraph(", ".join(f"{name}={value}" for name, value in self.settings.items())),
        )

    def __str__(self) -> str:
        width = max((len(printable(name)) for name in (*self.tracked, *self.skipped)), default=0)
        lines = [self._summary]
        lines += [
            f"  {printable(name):<{width}}  {quantizer}  {shape} {dtype}"
            for name, (shape, dtype, quantizer) in self.tracked.items()
        ]
        lines += [f"  {printable(name):<{width}}  skipped: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  group {group}: {', '.join(names)}" for group, names in self.groups.items()]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(map(printable, lines))


def _join_distinct(texts: Sequence[str]) -> str:
    """The distinct texts, or ``"several"`` for more than three."""
    distinct = dict.fromkeys(texts)
    return ", ".join(distinct) if len(distinct) <= 3 else "several"
