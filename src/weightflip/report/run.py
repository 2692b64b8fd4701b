"""The data of one training: numbers over time for each layer. All views of a report use it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from weightflip.records import CORE_VALUES, RunInfo, split_variant


class ReportError(Exception):
    """An error that the user can fix, such as a path without records or a missing package."""


class NoRecords(ReportError):
    """The path does not exist or has no records. A training may be about to write them."""


@dataclass(frozen=True, eq=False)
class Series:
    """One number over time.

    Attributes:
        steps: Optimizer steps of the logging points, ascending: int64, (points,).
        numerators: float64, (points,).
        denominators: float64, (points,). Event files hold only ratios. For them this is an estimate, proportional to
            the denominator if all steps count the same.
        gauge: Whether the number is measured at the logging point instead of counted since the previous one.
    """

    steps: NDArray[np.int64]
    numerators: NDArray[np.float64]
    denominators: NDArray[np.float64]
    gauge: bool = False

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def values(self) -> NDArray[np.float64]:
        """Numerators / denominators, (points,)."""
        return self.numerators / self.denominators

    @property
    def summary(self) -> float:
        """The last value of a gauge, else the ratio of the sums; NaN if undefined."""
        if not len(self):
            return math.nan
        with np.errstate(all="ignore"):
            number = float(self.values[-1] if self.gauge else self.numerators.sum() / self.denominators.sum())
        return number if math.isfinite(number) else math.nan

    def part(self, after: float, to: float = math.inf) -> Series:
        """The points with steps in (after, to]."""
        kept = (self.steps > after) & (self.steps <= to)
        return Series(self.steps[kept], self.numerators[kept], self.denominators[kept], self.gauge)


EMPTY = Series(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))


def sum_series(series: Iterable[Series]) -> Series:
    """The sum over several layers: numerators and denominators are summed at each step."""
    parts = [one for one in series if len(one)]
    if not parts:
        return EMPTY
    steps, at = np.unique(np.concatenate([part.steps for part in parts]), return_inverse=True)
    numerators, denominators = (
        np.bincount(at, np.concatenate([getattr(part, name) for part in parts]), len(steps)).astype(np.float64)
        for name in ("numerators", "denominators")
    )
    return Series(steps, numerators, denominators, parts[0].gauge)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer with one quantizer.

    Attributes:
        name: Name as in the records: ``weight@quantizer`` if there are several quantizers.
        weights: Number of weights; 0 if unknown.
        dtype: Dtype of the parameter; empty if unknown.
        quantizer: Name of the quantizer; empty if unknown.
        values: All numbers of the layer, by name.
    """

    name: str
    weights: int
    dtype: str
    quantizer: str
    values: Mapping[str, Series]

    @property
    def weight(self) -> str:
        """The parameter's name."""
        return split_variant(self.name)[0]

    @property
    def variant(self) -> str:
        """The quantizer if there are several, else empty."""
        return split_variant(self.name)[1]

    @property
    def is_stored(self) -> bool:
        """Whether the codes are the stored weights, so that a stalled update is lost."""
        return self.quantizer == "native" or (bool(self.quantizer) and self.quantizer == self.dtype)

    @property
    def grid(self) -> str:
        """Name of the format of the codes."""
        return self.dtype if self.is_stored else self.quantizer

    def get(self, value: str) -> Series:
        """A number over time; without points if it was not recorded."""
        return self.values.get(value, EMPTY)


class Alert(NamedTuple):
    """An alert that fired during training.

    Attributes:
        step: Step at which it fired.
        layer: Name of the layer; empty if unknown.
        rule: The rule.
        message: The alert as a sentence; may be empty.
        layers: Number of layers. More than 1 for layers that a line in an event file counts but does not name.
    """

    step: int
    layer: str
    rule: str
    message: str
    layers: int = 1


@dataclass(frozen=True, eq=False)
class Run:
    """One training.

    Attributes:
        name: Its path, shortened to what distinguishes the runs of a report.
        path: Path of the files, followed by ``writer 1``, ``writer 2``, ... if several runs wrote at the same time.
        info: What is tracked and how. Without rows if the files do not say.
        layers: Layers by name, in the order of the records.
        models: Numbers summed over all layers, by quantizer and name. The quantizer is empty if there is only one.
        alerts: Alerts in the order in which they fired.
        notes: Notes about reading the files.
    """

    name: str
    path: Path
    info: RunInfo
    layers: Mapping[str, Layer]
    models: Mapping[str, Mapping[str, Series]]
    alerts: tuple[Alert, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """Steps of all logging points."""
        everything = [layer.get("flip_rate").steps for layer in self.layers.values()]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *everything]))

    @property
    def begin(self) -> int:
        """The step before the first window, estimated from the distance of the first two points."""
        steps = self.steps
        return max(0, int(2 * steps[0] - steps[1])) if len(steps) > 1 else 0

    @property
    def end(self) -> int:
        """The step of the last point."""
        steps = self.steps
        return int(steps[-1]) if len(steps) else 0

    @property
    def late(self) -> float:
        """The step after which the last quarter begins."""
        return self.end - (self.end - self.begin) / 4


def sum_models(layers: Mapping[str, Layer]) -> dict[str, dict[str, Series]]:
    """All numbers summed over all layers, by quantizer."""
    variants = dict.fromkeys(layer.variant for layer in layers.values())
    return {
        variant: sum_layers([layer for layer in layers.values() if layer.variant == variant]) for variant in variants
    }


def sum_layers(layers: Sequence[Layer]) -> dict[str, Series]:
    """All numbers summed over some layers, by name."""
    names = dict.fromkeys(name for layer in layers for name in layer.values if name != "nonfinite_weights")
    return {name: sum_series(layer.get(name) for layer in layers) for name in names}


def gauge_names(info: RunInfo) -> set[str]:
    """Names of the gauges."""
    return {value.name for value in (*CORE_VALUES, *info.values) if value.kind == "gauge"}


def merge_info(info: RunInfo, newer: RunInfo) -> RunInfo:
    """Merge two descriptions: everything that was tracked at any time, with the newer description."""
    return RunInfo(
        {**info.tracked, **newer.tracked},
        newer.skipped,
        newer.settings or info.settings,
        newer.notes,
        values=tuple({value.name: value for value in (*info.values, *newer.values)}.values()),
    )


def group_into_chains(spans: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Group time spans into chains of consecutive spans. Each chain is one training that may have been resumed."""
    chains: list[list[int]] = []
    for index in sorted(range(len(spans)), key=lambda index: spans[index][0]):
        ended = [chain for chain in chains if spans[chain[-1]][1] <= spans[index][0]]
        if ended:
            max(ended, key=lambda chain: spans[chain[-1]][1]).append(index)
        else:
            chains.append([index])
    return chains


def nonfinite_note(points: int) -> str:
    """The note about points that are skipped."""
    return f"{points:,} non-finite point{'s' * (points > 1)} skipped"
