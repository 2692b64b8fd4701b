"""What processes have to agree on. ``single.py`` has the run where there is nothing, ``sharded.py`` any other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from weightflip.counting.layer import TrackedWeight

Totals = tuple[int, dict[str, list[float]]]
"""Steps, and a row for each layer."""


class Shards(Protocol):
    """The sharded weights of a run, as the tracker sees them."""

    def __bool__(self) -> bool:
        """Whether there are any, so that counts have to be added up."""
        ...

    def __contains__(self, name: str) -> bool:
        """Whether this weight is one."""
        ...

    def for_weights(self, weights: Sequence[TrackedWeight]) -> Shards:
        """What is right for other weights than before."""
        ...

    def expect_others(self, *, are_known: bool) -> Shards:
        """As :meth:`WeightFlipTracker.expect_others`; what is right from then on."""
        ...

    def begin(self, weights: Sequence[TrackedWeight], *, are_others: bool, anew: bool) -> None:
        """Before the step, have at hand what the codes of shards need.

        Args:
            weights: Of the step.
            are_others: Whether they are other objects than in the last step.
            anew: Whether no codes are kept.
        """
        ...

    def may_keep(self, name: str, is_unwritten: bool) -> bool:
        """Whether the codes of the last step are those before this one, in so far as others have a say in it.

        Args:
            name: Of the weight.
            is_unwritten: Whether this process's part of it has been left alone.
        """
        ...

    def share(self, *, is_next_due: bool) -> None:
        """After the step, have at hand what the codes of shards need."""
        ...

    def drop_uncertain(self) -> None:
        """Count nothing of a weight that any process is not sure of."""
        ...

    def forget(self) -> None:
        """Weights may have been written on all processes."""
        ...

    @property
    def names(self) -> Iterable[str]:
        """Of all sharded weights."""
        ...

    def release(self) -> None:
        """Hold no weight; the next ones are others."""
        ...

    def add_up(self, steps: int, rows: Mapping[str, Sequence[float]]) -> None:
        """Bring together what the processes have counted.

        Args:
            steps: Of this process.
            rows: Of all layers.
        """
        ...

    def totals(self, steps: int) -> Totals | None:
        """What every process answers alike, without asking the others; None where there are no others.

        Args:
            steps: How many there were, skipped ones included.
        """
        ...
