"""What was counted up to one logging point, as plain Python numbers: all that sinks and reports get to see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any


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
    """

    weight_steps: int = 0
    flips: int = 0
    updates: int = 0
    stalled: int = 0
    scale_steps: int = 0
    scale_changes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))

    @property
    def flip_rate(self) -> float:
        """Mean share of the weights that flip in a step, in [0, 1]; NaN where nothing was tracked."""
        return self.flips / self.weight_steps if self.weight_steps else math.nan

    @property
    def stall_ratio(self) -> float:
        """Stalled / updates, in [0, 1]; NaN without updates."""
        return self.stalled / self.updates if self.updates else math.nan

    @property
    def scale_change_rate(self) -> float:
        """Mean share of the block and group scales that change in a step; NaN where there are none."""
        return self.scale_changes / self.scale_steps if self.scale_steps else math.nan


def variant(name: str, quantizer: str) -> str:
    """The name of a weight as one of the several quantizers sees it that it is tracked with."""
    return f"{name}@{quantizer}"


def split_variant(name: str) -> tuple[str, str]:
    """The inverse of :func:`variant`; the quantizer is empty where there is but one."""
    name, _, quantizer = name.partition("@")
    return name, quantizer


@dataclass(frozen=True)
class LayerRecord:
    """One layer, or the sum of all, at one logging point.

    Attributes:
        name: The parameter's name; ``name@quantizer`` where it is tracked with several quantizers.
        weights: Number of weights.
        window: Counted since the last logging point.
        total: Counted since tracking began.
        nonfinite: NaN and infinite weights at the logging point.
    """

    name: str
    weights: int
    window: Counts
    total: Counts
    nonfinite: int = 0

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
    def scale_change_rate(self) -> float:
        """Mean share of the block and group scales that changed in a step of the window; NaN where there are none."""
        return self.window.scale_change_rate


@dataclass(frozen=True)
class FlipRecord:
    """All layers at one logging point.

    Attributes:
        step: Optimizer steps so far, skipped ones not counted.
        layers: All layers that were ever tracked; the window of one that is frozen now is empty.
    """

    step: int
    layers: tuple[LayerRecord, ...]

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

    @classmethod
    def merged(cls, records: Sequence[FlipRecord]) -> FlipRecord:
        """One record of several trackers' layers, at the step of the one that is furthest."""
        return cls(
            max(record.step for record in records), tuple(layer for record in records for layer in record.layers)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and numbers, as the JSONL sink writes them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FlipRecord:
        """The inverse of ``to_dict``."""
        layers = tuple(
            LayerRecord(**{**layer, "window": Counts(**layer["window"]), "total": Counts(**layer["total"])})
            for layer in data["layers"]
        )
        return cls(data["step"], layers)


def _summed(name: str, layers: Sequence[LayerRecord]) -> LayerRecord:
    return LayerRecord(
        name,
        sum(layer.weights for layer in layers),
        sum((layer.window for layer in layers), Counts()),
        sum((layer.total for layer in layers), Counts()),
        sum(layer.nonfinite for layer in layers),
    )


@dataclass(frozen=True)
class RunInfo:
    """What is tracked and how, for people.

    Attributes:
        tracked: Parameter name to (shape, dtype, quantizer), as text.
        skipped: Parameter name to the reason.
        settings: Name to value, as text.
        notes: Sentences worth reading, such as which format was assumed.
    """

    tracked: dict[str, tuple[str, str, str]]
    skipped: dict[str, str]
    settings: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def merged(cls, infos: Sequence[RunInfo]) -> RunInfo:
        """What several trackers that are shown as one run track."""
        settings: dict[str, list[str]] = {}
        for info in infos:
            for name, value in info.settings.items():
                values = settings.setdefault(name, [])
                if value not in values:
                    values.append(value)
        return cls(
            {name: row for info in infos for name, row in info.tracked.items()},
            {name: reason for info in infos for name, reason in info.skipped.items()},
            {name: " and ".join(values) for name, values in settings.items()},
            tuple(dict.fromkeys(note for info in infos for note in info.notes)),
        )

    def to_markdown(self) -> str:
        """The text panel."""
        lines = [f"**weightflip** tracks {len(self.tracked)} weights, skips {len(self.skipped)}.", ""]
        lines += [f"- {note}" for note in self.notes]
        lines += ["", "| weight | shape | dtype | quantizer |", "|---|---|---|---|"]
        lines += [f"| `{name}` | {' | '.join(row)} |" for name, row in self.tracked.items()]
        if self.skipped:
            lines += ["", "| skipped | why |", "|---|---|"]
            lines += [f"| `{name}` | {reason} |" for name, reason in self.skipped.items()]
        lines += ["", ", ".join(f"{name}={value}" for name, value in self.settings.items())]
        return "\n".join(lines)

    def __str__(self) -> str:
        width = max((len(name) for name in (*self.tracked, *self.skipped)), default=0)
        lines = [f"{len(self.tracked)} weights tracked, {len(self.skipped)} skipped"]
        lines += [
            f"  {name:<{width}}  {quantizer}  {shape} {dtype}"
            for name, (shape, dtype, quantizer) in self.tracked.items()
        ]
        lines += [f"  {name:<{width}}  skipped: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)
