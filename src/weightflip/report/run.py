"""What was read of one training: numbers over time, layer by layer. Every view of a report is made from it."""

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
    """What a person can put right: a path without records, a package that is missing."""


@dataclass(frozen=True, eq=False)
class Series:
    """One number over time.

    Attributes:
        steps: Optimizer steps, ascending, one for each logging point: int64, (points,).
        numerators: What was counted, float64, (points,).
        denominators: What it was counted of; of event files, which hold quotients only, an estimate that is
            proportional to it where each step counts the same.
        gauge: A number of one moment; else one of the window since the point before.
    """

    steps: NDArray[np.int64]
    numerators: NDArray[np.float64]
    denominators: NDArray[np.float64]
    gauge: bool = False

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def values(self) -> NDArray[np.float64]:
        """(points,)."""
        return self.numerators / self.denominators

    @property
    def summary(self) -> float:
        """Of a gauge its last value, else the quotient of the sums; NaN where there is nothing."""
        if not len(self):
            return math.nan
        with np.errstate(all="ignore"):
            number = float(self.values[-1] if self.gauge else self.numerators.sum() / self.denominators.sum())
        return number if math.isfinite(number) else math.nan

    def part(self, after: float, to: float = math.inf) -> Series:
        """The points of the steps in (after, to]."""
        kept = (self.steps > after) & (self.steps <= to)
        return Series(self.steps[kept], self.numerators[kept], self.denominators[kept], self.gauge)


EMPTY = Series(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))


def total(series: Iterable[Series]) -> Series:
    """Of several layers: numerators and denominators are summed at each step, then divided."""
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
    """One weight, as one quantizer sees it.

    Attributes:
        name: As in the records: ``weight@quantizer`` where there are several quantizers.
        weights: Number of weights; 0 where it is not known.
        dtype: Of the parameter; empty where it is not known.
        quantizer: Its name; empty where it is not known.
        values: Every number of it, by name.
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
        """The quantizer where there are several, else empty."""
        return split_variant(self.name)[1]

    @property
    def is_stored(self) -> bool:
        """Whether a code is the weight as stored, so that a stalled update is lost."""
        return self.quantizer == "native" or (bool(self.quantizer) and self.quantizer == self.dtype)

    @property
    def grid(self) -> str:
        """The numbers that the codes stand for."""
        return self.dtype if self.is_stored else self.quantizer

    def get(self, value: str) -> Series:
        """A number over time; without points where it was not recorded."""
        return self.values.get(value, EMPTY)


class Alert(NamedTuple):
    """What a rule said during training.

    Attributes:
        step: When.
        layer: Of which layer; empty where that is not known.
        rule: The rule.
        message: All of it as a sentence; may be empty.
        layers: Of how many layers; several are those that a line in an event file does not name.
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
        name: Its path, as short as tells the runs of a report apart.
        path: Where it was read; with ``writer 1``, ``writer 2``, ... below it where several wrote at once.
        info: What is tracked and how; without rows where the files do not say.
        layers: By name, in the order of the records.
        models: Numbers of all layers together, by name, for each quantizer; the key is empty where there is but one.
        alerts: In the order in which they came.
        notes: What to know about the reading.
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
        """Of all logging points."""
        everything = [layer.get("flip_rate").steps for layer in self.layers.values()]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *everything]))

    @property
    def begin(self) -> int:
        """The step before the first window, as far as the distance of the points tells."""
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


def models_of(layers: Mapping[str, Layer]) -> dict[str, dict[str, Series]]:
    """Every number of all layers together, for each quantizer."""
    variants = dict.fromkeys(layer.variant for layer in layers.values())
    return {variant: sums([layer for layer in layers.values() if layer.variant == variant]) for variant in variants}


def sums(layers: Sequence[Layer]) -> dict[str, Series]:
    """Every number of some layers together."""
    names = dict.fromkeys(name for layer in layers for name in layer.values if name != "nonfinite_weights")
    return {name: total(layer.get(name) for layer in layers) for name in names}


def gauges_of(info: RunInfo) -> set[str]:
    """Names of the numbers of one moment."""
    return {value.name for value in (*CORE_VALUES, *info.values) if value.kind == "gauge"}


def updated(info: RunInfo, newer: RunInfo) -> RunInfo:
    """What was tracked at any time, as it was last."""
    return RunInfo(
        {**info.tracked, **newer.tracked},
        newer.skipped,
        newer.settings or info.settings,
        newer.notes,
        values=tuple({value.name: value for value in (*info.values, *newer.values)}.values()),
    )


def chains_of(spans: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Which of some spans of time follow each other: those of one training, that was resumed. Others wrote at once."""
    chains: list[list[int]] = []
    for index in sorted(range(len(spans)), key=lambda index: spans[index][0]):
        over = [chain for chain in chains if spans[chain[-1]][1] <= spans[index][0]]
        if over:
            max(over, key=lambda chain: spans[chain[-1]][1]).append(index)
        else:
            chains.append([index])
    return chains


def of_nonfinite(points: int) -> str:
    """The note on points that are left out."""
    return f"{points:,} point{'s' * (points > 1)} left out that are not finite"
