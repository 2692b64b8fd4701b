"""Findings and checks, and helpers shared by several checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from enum import IntEnum

from weightflip.records import printable
from weightflip.report.run import Layer, Run, Series

# Minimum number of points for a finding about a trend.
POINTS = 4


class Severity(IntEnum):
    """Severity of a finding."""

    INFO = 0
    NOTE = 1
    WARNING = 2
    SERIOUS = 3


@dataclass(frozen=True)
class Finding:
    """One conclusion from the numbers.

    Attributes:
        severity: How serious it is.
        rule: Name of the check, one or two words.
        text: One or two sentences.
        runs: Names of the affected runs.
        layers: Names of the affected layers, as in the runs; empty for all.
        step: Step at which it happened or started; None if unknown.
    """

    severity: Severity
    rule: str
    text: str
    runs: tuple[str, ...]
    layers: tuple[str, ...] = ()
    step: int | None = None

    def __post_init__(self) -> None:
        # The sentence may contain layer names.
        object.__setattr__(self, "text", printable(self.text))


@dataclass(frozen=True)
class Check:
    """One check of a run.

    Attributes:
        find: Yields findings for a run and those of its layers whose weights were always finite.
        looks_for: What it checks, for the message that nothing was found. Empty to omit it there.
        needs: Names of values, at least one of which must be recorded. Empty if every run qualifies.
    """

    find: Callable[[Run, Sequence[Layer]], Iterator[Finding]]
    looks_for: str = ""
    needs: tuple[str, ...] = ()

    def can_check(self, values: Set[str]) -> bool:
        """Whether a run with these values can be checked."""
        return not self.needs or not values.isdisjoint(self.needs)


def late_part(run: Run, layer: Layer, value: str) -> Series:
    """A number of a layer over the last quarter of a run."""
    return layer.get(value).part(run.late)


def has_stall_counts(run: Run) -> bool:
    """Whether updates were counted, which requires gradients."""
    return any(len(layer.get("stall_ratio")) for layer in run.layers.values())
