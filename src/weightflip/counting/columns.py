"""The meaning of the columns in a row of counters."""

from __future__ import annotations

from collections.abc import Sequence

from weightflip.counting.ledger import COLUMNS, NONFINITE, SCALE_CHANGES, SCALE_STEPS, WEIGHT_STEPS
from weightflip.kernels import FLIPS, STALLED, UPDATES
from weightflip.metrics.columns import Group, gauges_of, ratios_of
from weightflip.records import Counts, Histogram, Quotient


class Columns:
    """The columns of a layer's row: those of the ledger, then those of the metric groups.

    Most of them add up over steps. Gauges do not: they hold the value of the last logging point.

    Args:
        groups: The metric groups, with their positions among the columns of all groups.
        with_updates: Whether updates are counted.

    Attributes:
        metric_columns: The number of columns of the metric groups.
    """

    def __init__(self, groups: Sequence[Group], *, with_updates: bool = True) -> None:
        self._groups, self._with_updates = groups, with_updates
        self.metric_columns = groups[-1].bins.stop if groups else 0
        gauges = {NONFINITE}.union(*(range(COLUMNS + g.gauges.start, COLUMNS + g.bins.stop) for g in groups))
        self._is_gauge = [column in gauges for column in range(len(self))]
        self._ratios = {
            name: COLUMNS + group.sums.start + 2 * i for group in groups for i, name in enumerate(group.metric.ratios)
        }

    def __len__(self) -> int:
        return COLUMNS + self.metric_columns

    def zeros(self) -> list[float]:
        """Return the row of a layer for which nothing was counted."""
        return [0] * len(self)

    def add(self, earlier: Sequence[float], row: Sequence[float]) -> list[float]:
        """Add a row to earlier counts. Gauges are taken from the row."""
        return [new if is_gauge else old + new for is_gauge, old, new in zip(self._is_gauge, earlier, row, strict=True)]

    def subtract(self, earlier: Sequence[float], row: Sequence[float]) -> list[float]:
        """Subtract earlier counts from a row. Gauges are taken from the row."""
        return [new if is_gauge else new - old for is_gauge, old, new in zip(self._is_gauge, earlier, row, strict=True)]

    def without_gauges(self, row: Sequence[float]) -> list[float]:
        """Return the row with gauges set to 0."""
        return [0 if is_gauge else number for is_gauge, number in zip(self._is_gauge, row, strict=True)]

    def to_integers(self, numbers: Sequence[float]) -> list[float]:
        """Convert a row in floating point: its counts back to integers, metric groups' numbers as they are."""
        return [*map(int, numbers[:COLUMNS]), *numbers[COLUMNS:]]

    def ratio(self, name: str) -> slice | None:
        """Return the columns of a ratio's numerator and denominator; None if no metric group counts it."""
        start = self._ratios.get(name)
        return None if start is None else slice(start, start + 2)

    def counts(self, row: Sequence[float]) -> Counts:
        """Return the row's counts by name."""
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
        """Return the number of weights that were NaN or infinite at the last logging point."""
        return int(row[NONFINITE])

    def gauges(self, row: Sequence[float]) -> tuple[dict[str, Quotient], dict[str, Histogram]]:
        """Return the gauges and histograms of the last logging point."""
        return gauges_of(self._groups, row[COLUMNS:])
