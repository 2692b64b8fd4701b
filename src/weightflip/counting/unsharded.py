"""A run without sharded weights, in which processes do not need to cooperate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from weightflip.counting.columns import Columns
from weightflip.counting.layer import TrackedWeight
from weightflip.counting.sharding import Sharding, Totals
from weightflip.counting.table import LayerTable


class UnshardedRun:
    """A run on one process, or with weights that each process holds as a whole.

    Args:
        layers: All layers.
        columns: The columns of their rows.
    """

    def __init__(self, layers: LayerTable, columns: Columns) -> None:
        self._layers, self._columns = layers, columns

    def __bool__(self) -> bool:
        return False

    def __contains__(self, name: object) -> bool:
        return False

    def for_weights(self, weights: Sequence[TrackedWeight]) -> Sharding:
        return self._sharded() if any(tracked.is_dtensor for tracked in weights) else self

    def request_comparison(self, *, is_selection_known: bool) -> Sharding:
        return self._sharded().request_comparison(is_selection_known=is_selection_known)

    def _sharded(self) -> Sharding:
        # Imported here, so that a run on one process does not load it.
        from weightflip.counting.sharded import ShardedRun

        return ShardedRun(self._layers, self._columns)

    def begin(self, weights: Sequence[TrackedWeight], *, have_changed: bool, force: bool) -> None:
        pass

    def may_keep(self, name: str, is_unwritten: bool) -> bool:
        return is_unwritten

    def exchange_statistics(self, *, is_next_due: bool) -> None:
        pass

    def discard_flagged(self) -> None:
        pass

    def invalidate(self) -> None:
        pass

    @property
    def names(self) -> Iterable[str]:
        return ()

    def release(self) -> None:
        pass

    def reduce_counts(self, steps: int, rows: Mapping[str, Sequence[float]]) -> None:
        pass

    def totals(self, steps: int) -> Totals | None:
        return None
