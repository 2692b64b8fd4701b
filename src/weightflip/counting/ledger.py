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
    more: int
    """The number of columns of the metric groups."""
    rows: int = 0
    total: Tensor = field(init=False)
    step: Tensor = field(init=False)
    more_total: Tensor | None = None
    more_step: Tensor | None = None
    """float64, which counts exactly up to 2**53. None without metric groups: not every device has float64."""
    _prepared: tuple[Tensor, Tensor | None] | None = None

    def __post_init__(self) -> None:
        self.total = torch.zeros(0, COLUMNS, dtype=torch.int64, device=self.device)
        self.step = torch.zeros_like(self.total)
        if self.more:
            self.more_total = torch.zeros(0, self.more, dtype=torch.float64, device=self.device)
            self.more_step = torch.zeros_like(self.more_total)

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
        if self.more_step is not None:
            self.more_step.zero_()

    def prepare(self, valid: Tensor | None) -> None:
        """Add the step's counts to copies of the totals, unless it was skipped; ``commit`` puts them in place."""
        if valid is None:
            total = self.total + self.step
        else:
            valid = valid.to(self.device, torch.int64, non_blocking=True)
            total = torch.addcmul(self.total, self.step, valid)
        more_total = None
        if self.more_total is not None and self.more_step is not None:
            # Not a product: a metric group's numbers of a skipped step may be infinite.
            more_total = self.more_total + (self.more_step if valid is None else self.more_step.where(valid != 0, 0.0))
        self._prepared = total, more_total

    def commit(self) -> None:
        """Put the totals of ``prepare`` in place. Calling it twice is harmless."""
        if self._prepared is not None:
            self.total, self.more_total = self._prepared
            self._prepared = None

    def read(self, others: Sequence[Tensor] = ()) -> tuple[list[list[float]], list[int]]:
        """Read all rows, and other 0-dim int64 tensors on this device, in one transfer."""
        table = self.total[: self.rows]
        if self.more_total is not None:
            table = torch.cat([table, self.more_total[: self.rows].view(torch.int64)], dim=1)
        host = torch.cat([table.flatten(), *(other.view(1) for other in others)]).cpu()
        numbers, values = host[: table.numel()].view(table.shape), host[table.numel() :]
        more = numbers[:, COLUMNS:].view(torch.float64) if self.more else numbers[:, COLUMNS:]
        rows = zip(numbers[:, :COLUMNS].tolist(), more.tolist(), strict=True)
        return [[*counts, *found] for counts, found in rows], values.tolist()

    def keep(self, rows: list[int], wanted: Tensor) -> None:
        """Drop this step's counts of the layers that are not wanted.

        Args:
            rows: The rows of layers.
            wanted: bool, one per row.
        """
        unwanted = torch.zeros(self.step.size(0), dtype=torch.bool, device=self.device)
        unwanted[rows] = ~wanted.to(self.device)
        self.step.masked_fill_(unwanted.unsqueeze(1), 0)
        if self.more_step is not None:
            self.more_step.masked_fill_(unwanted.unsqueeze(1), 0)

    def discard(self, row: int) -> None:
        """Drop this step's counts of one layer."""
        self.step[row].zero_()
        if self.more_step is not None:
            self.more_step[row].zero_()


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

    def more_step(self, columns: slice) -> Tensor:
        """Return a metric group's columns of this step."""
        assert self.ledger.more_step is not None
        return self.ledger.more_step[self.index, columns]

    def more_total(self, columns: slice) -> Tensor:
        """Return a metric group's columns in total."""
        assert self.ledger.more_total is not None
        return self.ledger.more_total[self.index, columns]

    def read(self) -> list[float]:
        """Read the row's totals. Synchronizes with the device."""
        more = [] if self.ledger.more_total is None else self.ledger.more_total[self.index].tolist()
        return [*self.total.tolist(), *more]

    def discard(self) -> None:
        """Drop this step's counts."""
        self.ledger.discard(self.index)

    def clear(self) -> None:
        """Reset all counts of the row."""
        self.ledger.clear_row(self.index)
