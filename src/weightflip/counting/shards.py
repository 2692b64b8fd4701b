"""The interface for the cooperation of processes: ``single.py`` without sharded weights, ``sharded.py`` with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from weightflip.counting.layer import TrackedWeight

Totals = tuple[int, dict[str, list[float]]]
"""Number of steps, and one row per layer."""


class Shards(Protocol):
    """The sharded weights of a run, as the tracker sees them."""

    def __bool__(self) -> bool:
        """Whether there are sharded weights, so that counts have to be added up."""
        ...

    def __contains__(self, name: object) -> bool:
        """Whether this weight is sharded."""
        ...

    def for_weights(self, weights: Sequence[TrackedWeight]) -> Shards:
        """Return the implementation for the changed weights, which may be this object."""
        ...

    def expect_others(self, *, are_known: bool) -> Shards:
        """As :meth:`WeightFlipTracker.expect_others`; returns the implementation to use from then on."""
        ...

    def begin(self, weights: Sequence[TrackedWeight], *, have_changed: bool, force: bool) -> None:
        """Before the step, obtain the statistics that encoding shards needs.

        Args:
            weights: The weights of the step.
            have_changed: Whether they are other objects than in the last step.
            force: Whether no codes are kept from the last step.
        """
        ...

    def may_keep(self, name: str, is_unwritten: bool) -> bool:
        """Whether the codes after the last step can be used as the codes before this one.

        Args:
            name: The name of the weight.
            is_unwritten: Whether this process's part of it was not written since.
        """
        ...

    def share(self, *, is_next_due: bool) -> None:
        """After the step, obtain the statistics that encoding shards needs."""
        ...

    def discard_flagged(self) -> None:
        """Drop this step's counts of weights that any process has flagged."""
        ...

    def forget(self) -> None:
        """Assume that weights may have been written on all processes."""
        ...

    @property
    def names(self) -> Iterable[str]:
        """Names of all sharded weights."""
        ...

    def release(self) -> None:
        """Release all weights. The next step's weights count as changed."""
        ...

    def add_up(self, steps: int, rows: Mapping[str, Sequence[float]]) -> None:
        """Add up the counts of all processes.

        Args:
            steps: The number of steps of this process.
            rows: The rows of all layers.
        """
        ...

    def totals(self, steps: int) -> Totals | None:
        """Return the totals of the last synchronization, the same on every process; None without sharded weights.

        Args:
            steps: The number of steps so far, skipped ones included.
        """
        ...
