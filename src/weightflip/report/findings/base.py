"""What a finding is, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from enum import IntEnum

from weightflip.records import printable
from weightflip.report.run import Layer, Run, Series

# Points that a finding about a development over time needs.
POINTS = 4


class Severity(IntEnum):
    """How much a finding matters."""

    INFO = 0
    NOTE = 1
    WARNING = 2
    SERIOUS = 3


@dataclass(frozen=True)
class Finding:
    """One thing that the numbers say.

    Attributes:
        severity: How much it matters.
        rule: What was looked for, in one or two words.
        text: One or two plain sentences.
        runs: Names of the runs that it is about.
        layers: Names of the layers that it is about, as in the runs; empty for all.
        step: Since when, or when; None where it has no beginning.
    """

    severity: Severity
    rule: str
    text: str
    runs: tuple[str, ...]
    layers: tuple[str, ...] = ()
    step: int | None = None

    def __post_init__(self) -> None:
        # Names are in the sentence, and people read it.
        object.__setattr__(self, "text", printable(self.text))


@dataclass(frozen=True)
class Check:
    """One thing that is looked for in a run.

    Attributes:
        find: From a run, and those of its layers whose weights were finite all the time, to findings.
        looks_for: What, for the sentence that nothing was found; empty to leave it out.
        needs: Names of values, one of which has to be recorded; empty where any run will do.
    """

    find: Callable[[Run, Sequence[Layer]], Iterator[Finding]]
    looks_for: str = ""
    needs: tuple[str, ...] = ()

    def can_tell(self, values: Set[str]) -> bool:
        """Whether a run with these values has what it takes."""
        return not self.needs or not values.isdisjoint(self.needs)


def late_part(run: Run, layer: Layer, value: str) -> Series:
    """A number of a layer in the last quarter of a run."""
    return layer.get(value).part(run.late)


def counts_stalls(run: Run) -> bool:
    """Whether a run saw gradients, so that its updates are counted."""
    return any(len(layer.get("stall_ratio")) for layer in run.layers.values())
