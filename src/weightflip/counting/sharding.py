"""How the processes of a run cooperate: ``sharded.py`` with sharded weights, ``unsharded.py`` without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from weightflip.counting.layer import TrackedWeight

Totals = tuple[int, dict[str, list[float]]]
"""Number of steps, and one row per layer."""


class Sharding(Protocol):
    """The sharded weights of a run: exchanges statistics before they are encoded, and sums their counts."""

    def __bool__(self) -> bool:
        """Whether there are sharded weights, so that counts have to be summed over processes."""
        ...

    def __contains__(self, name: object) -> bool:
        """Whether this weight is sharded."""
        ...

    def for_weights(self, weights: Sequence[TrackedWeight]) -> Sharding:
        """Return the implementation for the changed weights, which may be this object."""
        ...

    def request_comparison(self, *, is_selection_known: bool) -> Sharding:
        """As :meth:`WeightFlipTracker.request_comparison`; returns the implementation to use from then on."""
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

    def exchange_statistics(self, *, is_next_due: bool) -> None:
        """After the step, obtain the statistics that encoding shards needs."""
        ...

    def discard_flagged(self) -> None:
        """Drop this step's counts of weights that any process has flagged."""
        ...

    def invalidate(self) -> None:
        """Assume that weights may have been written on all processes."""
        ...

    @property
    def names(self) -> Iterable[str]:
        """Names of all sharded weights."""
        ...

    def release(self) -> None:
        """Release all weights. The next step's weights count as changed."""
        ...

    def reduce_counts(self, steps: int, rows: Mapping[str, Sequence[float]]) -> None:
        """Sum the counts over all processes.

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
