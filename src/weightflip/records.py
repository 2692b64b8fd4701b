"""What was counted up to one logging point, as plain Python numbers: all that sinks and reports get to see."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from weightflip import notebook
from weightflip.overview import MANY_LAYERS, blocks_of, outliers
from weightflip.texts import percent
from weightflip.texts import shown as shown

Kind: TypeAlias = Literal["rate", "gauge", "histogram"]
Unit: TypeAlias = Literal["share", "count", "number"]

MODEL_TAGS = {
    "flip_rate": "flips/rate",
    "cumulative_flip_rate": "flips/cumulative_rate",
    "stall_ratio": "flips/stall_ratio",
}
"""Where there are tags, those of the model's numbers that are not ``flips/<value>``."""

ALERTS_TAG = "weightflip/tracking_alerts"
"""The text of alerts, which TensorBoard shows after that of what is tracked: it sorts them by tag."""


@dataclass(frozen=True)
class Value:
    """One of the numbers of a record: what it is, and how and where it is shown.

    It is declared where the number is counted, and goes with the records to all that show it.

    Attributes:
        name: As in records and tags.
        kind: ``"rate"``: counted over the steps since the last logging point. ``"gauge"``: found at the logging point.
            ``"histogram"``: the same, of a number that each weight has.
        title: The head of its column, in a word or two; from the name, unless it is said.
        description: What it is, in a few words: the title of its chart.
        unit: ``"share"`` of a whole, written in per cent; ``"count"`` of something; any other ``"number"``.
        chart: What charts it stands among in TensorBoard's layout; the metric group's, unless it is said.
        order: Its place among the numbers, the lowest first: the last ones are left out first where there is no room.
        heat_map: Whether it has a picture of all layers over time.
        expects: Of a number that is the flip rate / another rate: what that is, in a few words. There is a picture of
            each layer's flip rate against it.

    Raises:
        ValueError: A kind or a unit that there is not.
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
        for what, given, known in (("kind", self.kind, get_args(Kind)), ("unit", self.unit, get_args(Unit))):
            if given not in known:
                raise ValueError(f"the {what} of Value({self.name!r}) is one of {', '.join(known)}; got {given!r}")
        object.__setattr__(self, "title", self.title or self.name.replace("_", " "))


CORE_VALUES = (
    Value("flip_rate", "rate", "flip rate", "share of weights that flip in a step", "share", "weightflip", 0, True),
    Value(
        "stall_ratio", "rate", "stall ratio", "share of updates swallowed by rounding", "share", "weightflip", 1, True
    ),
    Value(
        "cumulative_flip_rate", "gauge", "flips/weight", "flips since the start / weights", "number", "weightflip", 55
    ),
    Value(
        "updated_fraction",
        "rate",
        "updated",
        "share of weights whose gradient is not 0 in a step",
        "share",
        "weightflip",
        57,
    ),
    Value(
        "scale_changes",
        "rate",
        "scale changes",
        "share of block or group scales that change in a step",
        "share",
        "weightflip: scale",
        60,
    ),
    Value("nonfinite_weights", "gauge", "non-finite", "NaN and infinite weights", "count", "weightflip", 1000),
)
"""The numbers that every run has."""


def shown_as(names: Iterable[str], values: Iterable[Value]) -> list[Value]:
    """How some numbers are shown, in their order.

    Args:
        names: Of the numbers.
        values: Those that a run declares; one that nobody declares is shown under its name.
    """
    known = {value.name: value for value in (*CORE_VALUES, *values)}
    found = [known.get(name) or Value(name) for name in dict.fromkeys(names)]
    return sorted(found, key=lambda value: (value.order, value.name))


class Quotient(NamedTuple):
    """A number that is summed over layers, steps and processes before it is divided.

    Attributes:
        numerator: What is counted.
        denominator: What it is counted of.
    """

    numerator: float
    denominator: float

    @property
    def value(self) -> float:
        """NaN where nothing was there to count."""
        return self.numerator / self.denominator if self.denominator else math.nan


class Histogram(NamedTuple):
    """How the weights of a layer are spread, at one logging point.

    Attributes:
        edges: Ascending, finite borders of the bins, one more than there are bins.
        counts: Weights in each bin; those beyond the borders are in the first and in the last.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """Totals over some tracked steps.

    Attributes:
        weight_steps: Sum over the tracked steps of the weights tracked in each.
        flips: Weights that changed their code.
        updates: Weights whose gradient was not exactly 0.
        stalled: Weights with an update and no flip.
        scale_steps: Sum over the tracked steps of the block and group scales that were compared in each.
        scale_changes: Those of them that changed.
        update_steps: As ``weight_steps``, of the steps in which updates were counted: none without ``"stalls"``.
        ratios: What metric groups counted, by name.
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
        return self._combined(other, 1)

    def __sub__(self, other: Counts) -> Counts:
        return self._combined(other, -1)

    def _combined(self, other: Counts, sign: int) -> Counts:
        numbers: dict[str, Any] = {name: getattr(self, name) + sign * getattr(other, name) for name in _NUMBERS}
        return Counts(**numbers, ratios=_added(self.ratios, other.ratios, sign))

    @property
    def flip_rate(self) -> float:
        """Mean share of the weights that flip in a step, in [0, 1]; NaN where nothing was tracked."""
        return self.flips / self.weight_steps if self.weight_steps else math.nan

    @property
    def stall_ratio(self) -> float:
        """Stalled / updates, in [0, 1]; NaN without updates."""
        return self.stalled / self.updates if self.updates else math.nan

    @property
    def updated_fraction(self) -> float:
        """Mean share of the weights with an update in a step, in [0, 1]; NaN where updates were not counted."""
        return self.updates / self.update_steps if self.update_steps else math.nan

    @property
    def scale_change_rate(self) -> float:
        """Mean share of the block and group scales that change in a step; NaN where there are none."""
        return self.scale_changes / self.scale_steps if self.scale_steps else math.nan

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Counts:
        """The inverse of ``to_dict``."""
        return cls(**{**data, "ratios": _quotients(data.get("ratios", {}))})

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and numbers."""
        return {**vars(self), "ratios": {name: list(quotient) for name, quotient in self.ratios.items()}}


def _short(counts: Counts) -> list[int]:
    """The numbers of ``counts`` in their order, without zeros at the end."""
    # Updates are counted in all steps, or in none: what is left over is 0 in most runs.
    found = {
        **{name: getattr(counts, name) for name in _NUMBERS},
        "update_steps": counts.weight_steps - counts.update_steps,
    }
    numbers = list(found.values())
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def _of_short(numbers: Sequence[int], ratios: Mapping[str, Quotient]) -> Counts:
    """The inverse of ``_short``."""
    counts: dict[str, Any] = {**dict.fromkeys(_NUMBERS, 0), **dict(zip(_NUMBERS, numbers, strict=False))}
    counts["update_steps"] = counts["weight_steps"] - counts["update_steps"]
    return Counts(**counts, ratios=ratios)


_NUMBERS = tuple(f.name for f in fields(Counts) if f.name != "ratios")


def _added(mine: Mapping[str, Quotient], others: Mapping[str, Quotient], sign: int = 1) -> dict[str, Quotient]:
    zero = Quotient(0, 0)
    pairs = {name: (mine.get(name, zero), others.get(name, zero)) for name in {**mine, **others}}
    return {name: Quotient(*(x + sign * y for x, y in zip(a, b, strict=True))) for name, (a, b) in pairs.items()}


def _quotients(data: Mapping[str, Sequence[float]]) -> dict[str, Quotient]:
    return {name: Quotient(*pair) for name, pair in data.items()}


def variant(name: str, quantizer: str) -> str:
    """The name of a weight as one of the several quantizers sees it that it is tracked with."""
    return f"{name}@{quantizer}"


def split_variant(name: str) -> tuple[str, str]:
    """The inverse of :func:`variant`; the quantizer is empty where there is but one."""
    name, _, quantizer = name.partition("@")
    return name, quantizer


def table_cell(value: object) -> object:
    """A cell of a CSV file: text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    text = shown(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


@dataclass(frozen=True)
class LayerRecord:
    """One layer, or the sum of all, at one logging point.

    Attributes:
        name: The parameter's name; ``name@quantizer`` where it is tracked with several quantizers.
        weights: Number of weights.
        window: Counted since the last logging point.
        total: Counted since tracking began.
        nonfinite: NaN and infinite weights at the logging point.
        gauges: What metric groups found at the logging point, by name.
        histograms: The same, of numbers that each weight has.
    """

    name: str
    weights: int
    window: Counts
    total: Counts
    nonfinite: int = 0
    gauges: Mapping[str, Quotient] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {shown(self.name)}, {self.weights:,} weights, {_rates(self)}>"

    @property
    def flip_rate(self) -> float:
        """Mean share of the weights that flipped in a step of the window."""
        return self.window.flip_rate

    @property
    def cumulative_flip_rate(self) -> float:
        """Flips over all tracked steps / weights; can exceed 1. NaN for an empty layer."""
        return self.total.flips / self.weights if self.weights else math.nan

    @property
    def stall_ratio(self) -> float:
        """Stalled / updates in the window; NaN without updates."""
        return self.window.stall_ratio

    @property
    def updated_fraction(self) -> float:
        """Mean share of the weights that had an update in a step of the window; NaN where updates were not counted."""
        return self.window.updated_fraction

    @property
    def scale_change_rate(self) -> float:
        """Mean share of the block and group scales that changed in a step of the window; NaN where there are none."""
        return self.window.scale_change_rate

    @property
    def quotients(self) -> dict[str, Quotient]:
        """What ``values`` are made of, so that they can be added before they are divided."""
        return {name: quotient for name, quotient in self.pairs.items() if not math.isnan(quotient.value)}

    @property
    def pairs(self) -> dict[str, Quotient]:
        """The same, and those where nothing was there to count. Of numbers that are arrays, arrays."""
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
        """Every number of this logging point that there is, by name: what sinks write. None is NaN."""
        return {name: quotient.value for name, quotient in self.quotients.items()}

    @property
    def news(self) -> dict[str, float]:
        """Those of ``values`` that this logging point adds: without a tracked step in the window, those of groups."""
        if self.window.weight_steps:
            return self.values
        groups = {**self.gauges, **self.window.ratios}
        return {name: value for name, value in self.values.items() if name in groups}

    @property
    def is_new(self) -> bool:
        """Whether anything was counted since the last logging point: in tracked steps, or at marks between them."""
        return bool(self.window.weight_steps or any(pair.denominator for pair in self.window.ratios.values()))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerRecord:
        """The inverse of ``to_dict``."""
        histograms = {
            name: Histogram(*(tuple(numbers) for numbers in pair)) for name, pair in data.get("histograms", {}).items()
        }
        given = {
            "window": Counts.from_dict(data["window"]),
            "total": Counts.from_dict(data["total"]),
            "gauges": _quotients(data.get("gauges", {})),
            "histograms": histograms,
        }
        return cls(**{**data, **given})

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        given = {
            "window": self.window.to_dict(),
            "total": self.total.to_dict(),
            "gauges": {name: list(quotient) for name, quotient in self.gauges.items()},
            "histograms": {name: [list(numbers) for numbers in pair] for name, pair in self.histograms.items()},
        }
        return {**vars(self), **given}

    def to_row(self) -> list[Any]:
        """Name, weights, the numbers of the window and of the total, and what else is not empty, but no histograms."""
        more = {
            "nonfinite": self.nonfinite,
            "window": {name: list(quotient) for name, quotient in self.window.ratios.items()},
            "total": {name: list(quotient) for name, quotient in self.total.ratios.items()},
            "gauges": {name: list(quotient) for name, quotient in self.gauges.items()},
        }
        more = {name: content for name, content in more.items() if content}
        return [self.name, self.weights, _short(self.window), _short(self.total), *([more] if more else [])]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> LayerRecord:
        """The inverse of ``to_row``."""
        name, weights, *periods, more = row if len(row) > 4 else [*row, {}]
        window, total = (
            _of_short(numbers, _quotients(more.get(of, {})))
            for of, numbers in zip(("window", "total"), periods, strict=True)
        )
        return cls(name, weights, window, total, more.get("nonfinite", 0), _quotients(more.get("gauges", {})))


@dataclass(frozen=True)
class FlipRecord:
    """All layers at one logging point.

    Attributes:
        step: Optimizer steps so far, skipped ones not counted.
        layers: All layers that were ever tracked; the window of one that is frozen now is empty.
        groups: Name of a group to the names of its layers.
    """

    step: int
    layers: tuple[LayerRecord, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """In a line: a large record has thousands of numbers."""
        rates = "; ".join(f"{name}: {_rates(model)}" if name else _rates(model) for name, model in self.models.items())
        return f"<{type(self).__name__}: step {self.step}, {len(self.layers):,} layers{rates and f', {rates}'}>"

    def _repr_html_(self) -> str:
        """The numbers of this logging point; of more than 30 layers by block, with those that stand out below."""
        models = [replace(model, name=variant("all", of) if of else "all") for of, model in self.models.items()]
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
        """Layers that stand out by their flip rate, among those of the same quantizer."""
        by_name = {layer.name: layer for layer in self.layers}
        found: list[LayerRecord] = []
        for of in self.models:
            rates = {name: x.pairs["flip_rate"] for name, x in by_name.items() if split_variant(name)[1] == of}
            found += [by_name[name] for name in outliers(rates)]
        return found

    @property
    def model(self) -> LayerRecord:
        """The sum of all layers: counts and sizes are summed, then divided."""
        return _summed("model", self.layers)

    @property
    def models(self) -> dict[str, LayerRecord]:
        """The sum of all layers for each quantizer, where weights are tracked with several; else only ``model``.

        Keys are the quantizers' names, empty for weights that are tracked with one.
        """
        variants = dict.fromkeys(split_variant(layer.name)[1] for layer in self.layers)
        return {
            name: _summed("model", [layer for layer in self.layers if split_variant(layer.name)[1] == name])
            for name in variants
        }

    @property
    def group_sums(self) -> dict[str, LayerRecord]:
        """The sum of the layers of each group; ``name@quantizer`` where they are tracked with several quantizers."""
        sums = {}
        for group, names in self.groups.items():
            members = [layer for layer in self.layers if split_variant(layer.name)[0] in names]
            for seen_as in dict.fromkeys(split_variant(layer.name)[1] for layer in members):
                name = variant(group, seen_as) if seen_as else group
                sums[name] = _summed(name, [layer for layer in members if split_variant(layer.name)[1] == seen_as])
        return sums

    @classmethod
    def merged(cls, records: Sequence[FlipRecord]) -> FlipRecord:
        """One record of several trackers' layers, at the step of the one that is furthest."""
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
        """The same in less room, without histograms and groups: what a report needs."""
        return {"step": self.step, "rows": [layer.to_row() for layer in self.layers]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FlipRecord:
        """The inverse of ``to_dict`` and ``to_rows``; also of what earlier versions wrote."""
        if "rows" in data:
            return cls(data["step"], tuple(map(LayerRecord.from_row, data["rows"])))
        groups = {group: tuple(names) for group, names in data.get("groups", {}).items()}
        return cls(data["step"], tuple(LayerRecord.from_dict(layer) for layer in data["layers"]), groups)


def _rates(record: LayerRecord) -> str:
    return f"flip rate {percent(record.flip_rate)}, stall ratio {percent(record.stall_ratio)}"


def _html_table(what: str, rows: Sequence[LayerRecord]) -> str:
    if not rows:
        return ""
    columns = shown_as((name for row in rows for name in row.values), ())
    cells = [
        (
            row.name,
            f"{row.weights:,}",
            *(_cell(column, row.values.get(column.name, math.nan)) for column in columns),
            f"{row.nonfinite:,}",
        )
        for row in rows
    ]
    # Mostly there are none.
    end = None if any(row.nonfinite for row in rows) else -1
    head = (what, "weights", *(column.title for column in columns), "non-finite")
    return notebook.table(head[:end], [line[:end] for line in cells])


def _cell(column: Value, value: float) -> str:
    if math.isnan(value):
        return "-"
    return percent(value) if column.unit == "share" else f"{value:,.3g}"


@dataclass(frozen=True)
class AlertEvent:
    """A rule that came true, of one layer.

    Attributes:
        step: Optimizer steps at the record at which it did.
        layer: The layer's name, or ``"model"``.
        rule: The rule, as it was given.
        value: The value at that record.
        since: The step of the first record from which on the rule's condition held.
        message: All of it as a sentence.
    """

    step: int
    layer: str
    rule: str
    value: float
    since: int
    message: str


# Layers that one line names.
_NAMED = 5


def in_lines(events: Iterable[AlertEvent]) -> list[str]:
    """What to tell people of some alerts: a line each; of many layers with one rule at one step, one line.

    Args:
        events: Those of one step and rule together.
    """
    told = []
    for (step, rule), group in itertools.groupby(events, lambda event: (event.step, event.rule)):
        alike = list(group)
        if len(alike) <= _NAMED:
            told += [event.message for event in alike]
        else:
            names = ", ".join(shown(event.layer) for event in alike[:_NAMED])
            told.append(f"step {step}: {rule}: {names} and {len(alike) - _NAMED} more")
    return told


def _summed(name: str, layers: Sequence[LayerRecord]) -> LayerRecord:
    gauges: dict[str, Quotient] = {}
    histograms: dict[str, Histogram] = {}
    for layer in layers:
        gauges = _added(gauges, layer.gauges)
        for of, histogram in layer.histograms.items():
            before = histograms.get(of)
            counts = (
                histogram.counts
                if before is None
                else tuple(map(sum, zip(before.counts, histogram.counts, strict=True)))
            )
            histograms[of] = Histogram(histogram.edges, counts)
    return LayerRecord(
        name,
        sum(layer.weights for layer in layers),
        sum((layer.window for layer in layers), Counts()),
        sum((layer.total for layer in layers), Counts()),
        sum(layer.nonfinite for layer in layers),
        gauges,
        histograms,
    )


# In the text panel, more than so many weights that are skipped for one reason are one row, with the first of them.
_SKIPPED_ROWS, _SKIPPED_NAMES = 12, 4


@dataclass(frozen=True)
class RunInfo:
    """What is tracked and how, for people.

    Attributes:
        tracked: Parameter name to (shape, dtype, quantizer), as text.
        skipped: Parameter name to the reason.
        settings: Name to value, as text.
        notes: Sentences worth reading, such as which format was assumed.
        groups: Name of a group to the names of its tracked parameters.
        values: The metric groups' numbers, and how each is shown.
    """

    tracked: dict[str, tuple[str, str, str]]
    skipped: dict[str, str]
    settings: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    values: tuple[Value, ...] = ()

    @classmethod
    def merged(cls, infos: Sequence[RunInfo]) -> RunInfo:
        """What several trackers that are shown as one run track."""
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
        """Plain dictionaries, lists and texts."""
        return {**vars(self), "notes": list(self.notes), "values": [dict(vars(value)) for value in self.values]}

    def to_markdown(self) -> str:
        """The text panel."""
        lines = [f"**weightflip** tracks {len(self.tracked)} weights, skips {len(self.skipped)}.", ""]
        about = (f"*{value.title}*: {value.description}" for value in CORE_VALUES[:3])
        lines += ["; ".join(about) + ".", ""]
        lines += [f"- {shown(note)}" for note in self.notes]
        lines += ["", "| weight | shape | dtype | quantizer |", "|---|---|---|---|"]
        lines += [f"| `{shown(name)}` | {' | '.join(map(shown, row))} |" for name, row in self.tracked.items()]
        if self.skipped:
            lines += ["", "| skipped | why |", "|---|---|"]
            lines += [f"| {names} | {shown(reason)} |" for names, reason in self._skipped_in_rows()]
        if self.groups:
            lines += ["", "| group | weights |", "|---|---|"]
            lines += [
                f"| {shown(group)} | {', '.join(f'`{shown(name)}`' for name in names)} |"
                for group, names in self.groups.items()
            ]
        if self.values:
            lines += ["", "| number | kind | unit | what it is |", "|---|---|---|---|"]
            lines += [
                f"| `{shown(value.name)}` | {value.kind} | {value.unit} | {shown(value.description or value.title)} |"
                for value in shown_as((value.name for value in self.values), self.values)
            ]
        lines += ["", shown(", ".join(f"{name}={value}" for name, value in self.settings.items()))]
        return "\n".join(lines)

    def _skipped_in_rows(self, quoted: str = "`{}`") -> Iterator[tuple[str, str]]:
        """Names and the reason: one row for each, or, of many with one reason, one for all."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(quoted.format(shown(name)))
        for reason, names in by_reason.items():
            if len(names) > _SKIPPED_ROWS:
                names = [f"{', '.join(names[:_SKIPPED_NAMES])} and {len(names) - _SKIPPED_NAMES} more"]
            yield from ((name, reason) for name in names)

    def __repr__(self) -> str:
        """In a line: a large model has hundreds of weights."""
        return f"<{type(self).__name__}: {self._sizes}; print() shows which>"

    @property
    def _sizes(self) -> str:
        return f"{len(self.tracked)} weights tracked, {len(self.skipped)} skipped"

    def _repr_html_(self) -> str:
        """What is tracked, of more than 30 weights by block; what is skipped and why; notes and settings."""
        blocks = blocks_of(split_variant(name)[0] for name in self.tracked) if len(self.tracked) > MANY_LAYERS else {}
        block_of = {name: block for block, members in blocks.items() for name in members}
        rows: dict[str, list[tuple[str, str, str]]] = {}
        for name, row in self.tracked.items():
            rows.setdefault(block_of.get(split_variant(name)[0], name), []).append(row)
        head = ["weight", "shape", "dtype", "quantizer"]
        cells = [[name, *map(_common, zip(*of, strict=True))] for name, of in rows.items()]
        if blocks:
            head = ["block", "weights", *head[1:]]
            cells = [[name, str(len(rows[name])), *more] for name, *more in cells]
        skipped = list(self._skipped_in_rows("{}"))
        return notebook.page(
            notebook.paragraph(self._sizes),
            *map(notebook.paragraph, self.notes),
            notebook.table(head, cells, texts=len(head)) if cells else "",
            notebook.table(("skipped", "why"), skipped, texts=2) if skipped else "",
            notebook.paragraph(", ".join(f"{name}={value}" for name, value in self.settings.items())),
        )

    def __str__(self) -> str:
        width = max((len(shown(name)) for name in (*self.tracked, *self.skipped)), default=0)
        lines = [self._sizes]
        lines += [
            f"  {shown(name):<{width}}  {quantizer}  {shape} {dtype}"
            for name, (shape, dtype, quantizer) in self.tracked.items()
        ]
        lines += [f"  {shown(name):<{width}}  skipped: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  group {group}: {', '.join(names)}" for group, names in self.groups.items()]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(map(shown, lines))


def _common(texts: Sequence[str]) -> str:
    """Those that there are, or that they are several."""
    found = dict.fromkeys(texts)
    return ", ".join(found) if len(found) <= 3 else "several"
