"""What the numbers in a counter row mean."""

from __future__ import annotations

from collections.abc import Sequence

from weightflip.counting.ledger import COLUMNS, NONFINITE, SCALE_CHANGES, SCALE_STEPS, WEIGHT_STEPS
from weightflip.kernels import FLIPS, STALLED, UPDATES
from weightflip.metrics.columns import Group, gauges_of, ratios_of
from weightflip.records import Counts, Histogram, Quotient


class Columns:
    """A layer's counters: those of the ledger, then those of the metric groups.

    Most of them add up over steps. Gauges do not: they are what was found at the last logging point.

    Args:
        groups: The metric groups, with their places among the columns that all groups have.
        with_updates: Whether updates are counted.

    Attributes:
        more: How many columns the groups have.
    """

    def __init__(self, groups: Sequence[Group], *, with_updates: bool = True) -> None:
        self._groups, self._with_updates = groups, with_updates
        self.more = groups[-1].bins.stop if groups else 0
        now = {NONFINITE}.union(*(range(COLUMNS + g.gauges.start, COLUMNS + g.bins.stop) for g in groups))
        self._is_gauge = [column in now for column in range(len(self))]
        self._ratios = {
            name: COLUMNS + group.sums.start + 2 * i for group in groups for i, name in enumerate(group.metric.ratios)
        }

    def __len__(self) -> int:
        return COLUMNS + self.more

    def zeros(self) -> list[float]:
        """The row of a layer that nothing was counted of."""
        return [0] * len(self)

    def add(self, before: Sequence[float], row: Sequence[float]) -> list[float]:
        """What was counted before and in a row, together; gauges are those of the row."""
        return [
            now if is_gauge else then + now for is_gauge, then, now in zip(self._is_gauge, before, row, strict=True)
        ]

    def since(self, then: Sequence[float], row: Sequence[float]) -> list[float]:
        """What a row has more than it had; gauges are those of the row."""
        return [
            now if is_gauge else now - before for is_gauge, before, now in zip(self._is_gauge, then, row, strict=True)
        ]

    def without_gauges(self, row: Sequence[float]) -> list[float]:
        """The row with zeros for what does not add up."""
        return [0 if is_gauge else now for is_gauge, now in zip(self._is_gauge, row, strict=True)]

    def whole(self, numbers: Sequence[float]) -> list[float]:
        """A row whose counts went through floating point."""
        return [*map(int, numbers[:COLUMNS]), *numbers[COLUMNS:]]

    def ratio(self, name: str) -> slice | None:
        """Where a group's ratio has its numerator and denominator; None if no group counts it."""
        start = self._ratios.get(name)
        return None if start is None else slice(start, start + 2)

    def counts(self, row: Sequence[float]) -> Counts:
        """The row's counts by name."""
        return Counts(
            weight_steps=int(row[WEIGHT_STEPS]),
            flips=int(row[FLIPS]),
            updates=int(row[UPDATES]),
            stalled=int(row[STALLED]),
            scale_steps=int(row[SCALE_STEPS]),
            scale_changes=int(row[SCALE_CHANGES]),
            update_steps=int(row[WEIGHT_STEPS]) if self._with_updates else 0,
            ratios=ratios_of(self._groups, row[COLUMNS:]),
        )

    def nonfinite(self, row: Sequence[float]) -> int:
        """Weights that were NaN or infinite at the last logging point."""
        return int(row[NONFINITE])

    def gauges(self, row: Sequence[float]) -> tuple[dict[str, Quotient], dict[str, Histogram]]:
        """What the groups have found at the last logging point."""
        return gauges_of(self._groups, row[COLUMNS:])
