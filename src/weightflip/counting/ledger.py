"""The counters on a device, one row per layer in one table, so that a logging point makes one transfer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

COUNTED = slice(0, 3)
"""The columns that the kernels count. Those that the tracker adds follow."""
WEIGHT_STEPS, NONFINITE, SCALE_STEPS, SCALE_CHANGES = 3, 4, 5, 6
COLUMNS = 7


@dataclass
class Ledger:
    """The counters of all layers on one device, one row per layer."""

    device: torch.device
    metric_columns: int
    """The number of columns of the metric groups."""
    rows: int = 0
    total: Tensor = field(init=False)
    step: Tensor = field(init=False)
    metric_total: Tensor | None = None
    metric_step: Tensor | None = None
    """float64, which counts exactly up to 2**53. None without metric groups: not every device has float64."""
    _prepared: tuple[Tensor, Tensor | None] | None = None

    def __post_init__(self) -> None:
        self.total = torch.zeros(0, COLUMNS, dtype=torch.int64, device=self.device)
        self.step = torch.zeros_like(self.total)
        if self.metric_columns:
            self.metric_total = torch.zeros(0, self.metric_columns, dtype=torch.float64, device=self.device)
            self.metric_step = torch.zeros_like(self.metric_total)

    @property
    def _tables(self) -> dict[str, Tensor]:
        return {name: table for name, table in vars(self).items() if isinstance(table, Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self._tables.values())

    def add_row(self) -> int:
        for name, table in self._tables.items():
            # Check each table: an interrupt may have left some grown and others not.
            if self.rows == table.size(0):
                setattr(self, name, torch.cat([table, table.new_zeros(max(16, self.rows), table.size(1))]))
        self.rows += 1
        return self.rows - 1

    def clear_row(self, row: int) -> None:
        for table in self._tables.values():
            table[row].zero_()

    def begin_step(self) -> None:
        self.step.zero_()
        if self.metric_step is not None:
            self.metric_step.zero_()

    def prepare(self, valid: Tensor | None) -> None:
        """Add the step's counts to copies of the totals, unless it was skipped; ``commit`` puts them in place."""
        if valid is None:
            total = self.total + self.step
        else:
            valid = valid.to(self.device, torch.int64, non_blocking=True)
            total = torch.addcmul(self.total, self.step, valid)
        metric_total = None
        if self.metric_total is not None and self.metric_step is not None:
            # Not a product: a metric group's numbers of a skipped step may be infinite.
            metric_total = self.metric_total + (
                self.metric_step if valid is None else self.metric_step.where(valid != 0, 0.0)
            )
        self._prepared = total, metric_total

    def commit(self) -> None:
        """Put the totals of ``prepare`` in place. Calling it twice is harmless."""
        if self._prepared is not None:
            self.total, self.metric_total = self._prepared
            self._prepared = None

    def read(self, scalars: Sequence[Tensor] = ()) -> tuple[list[list[float]], list[int]]:
        """Read all rows, and 0-dim int64 tensors on this device, in one transfer."""
        table = self.total[: self.rows]
        if self.metric_total is not None:
            table = torch.cat([table, self.metric_total[: self.rows].view(torch.int64)], dim=1)
        host = torch.cat([table.flatten(), *(scalar.view(1) for scalar in scalars)]).cpu()
        numbers, values = host[: table.numel()].view(table.shape), host[table.numel() :]
        metrics = numbers[:, COLUMNS:].view(torch.float64) if self.metric_columns else numbers[:, COLUMNS:]
        rows = zip(numbers[:, :COLUMNS].tolist(), metrics.tolist(), strict=True)
        return [[*counts, *of_groups] for counts, of_groups in rows], values.tolist()

    def keep_counts(self, rows: list[int], mask: Tensor) -> None:
        """Drop this step's counts of some layers.

        Args:
            rows: The rows of layers.
            mask: bool, one per row: whether to keep its counts.
        """
        dropped = torch.zeros(self.step.size(0), dtype=torch.bool, device=self.device)
        dropped[rows] = ~mask.to(self.device)
        self.step.masked_fill_(dropped.unsqueeze(1), 0)
        if self.metric_step is not None:
            self.metric_step.masked_fill_(dropped.unsqueeze(1), 0)

    def discard(self, row: int) -> None:
        """Drop this step's counts of one layer."""
        self.step[row].zero_()
        if self.metric_step is not None:
            self.metric_step[row].zero_()


@dataclass(frozen=True, eq=False)
class Row:
    """The row of a layer. One object, so that an interrupt never leaves a ledger without its index."""

    ledger: Ledger
    index: int

    @property
    def total(self) -> Tensor:
        return self.ledger.total[self.index]

    @property
    def step(self) -> Tensor:
        return self.ledger.step[self.index]

    def metric_step(self, columns: slice) -> Tensor:
        """Return a metric group's columns of this step."""
        assert self.ledger.metric_step is not None
        return self.ledger.metric_step[self.index, columns]

    def metric_total(self, columns: slice) -> Tensor:
        """Return a metric group's columns in total."""
        assert self.ledger.metric_total is not None
        return self.ledger.metric_total[self.index, columns]

    def read(self) -> list[float]:
        """Read the row's totals. Synchronizes with the device."""
        metrics = [] if self.ledger.metric_total is None else self.ledger.metric_total[self.index].tolist()
        return [*self.total.tolist(), *metrics]

    def discard(self) -> None:
        """Drop this step's counts."""
        self.ledger.discard(self.index)

    def clear(self) -> None:
        """Reset all counts of the row."""
        self.ledger.clear_row(self.index)
