"""Statistics of whole weights that are needed before their shards can be encoded, such as amax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from weightflip.distributed import collectives
from weightflip.distributed.layouts import Layout
from weightflip.distributed.rank_groups import RankGroup

Span = Literal["tensor", "row", "block"]


def span(layout: Layout, quantizer: Any) -> Span | None:
    """Return over which part of a weight processes must combine statistics before a quantizer can encode shards.

    Args:
        layout: The layout of the weight.
        quantizer: Its ``scope`` says how much of a weight one code depends on (``"element"``, ``"group"``, ``"row"``,
            ``"tensor"``, or ``"block"``, with rows and columns as in ``tile``), ``group`` the number of neighbors in a
            group, and ``has_statistic`` whether it can compute the statistic of a block, row or tensor from its parts.

    Returns:
        The part; None if each process can encode its shard alone.

    Raises:
        ValueError: The codes of a shard cannot be those of the whole weight; the message gives the reason.
    """
    scope, group = quantizer.scope, quantizer.group
    if layout.shard is None:
        raise ValueError(f"it is on processes {', '.join(map(str, layout.ranks))}, and this is not one of them")
    if layout.is_partial:
        raise ValueError("each process holds only a term of a sum (Partial), not a weight")
    if scope is None:
        raise ValueError(
            f"it is sharded, and {quantizer} does not say how much of a weight one code depends on; if it can be "
            "encoded shard by shard, give the quantizer scope = 'element' or 'row'"
        )
    if scope == "block":
        return _span_of_blocks(layout, quantizer)
    if group is not None and layout.cuts_groups(group):
        raise ValueError(
            f"its shards cut the groups of {group} neighbors that share a scale in {quantizer}: the last dimension of "
            f"shape {layout.shape} is cut at {sorted(layout.boundaries or ()) or 'positions that are not multiples'}"
        )
    if scope in ("element", "group") or (scope == "row" and not layout.cuts_rows):
        return None
    if not quantizer.has_statistic:
        raise ValueError(
            f"it is sharded, and {quantizer} needs whole {'rows' if scope == 'row' else 'tensors'}, but each process "
            "holds only a part; leave it out with exclude=, or name another format in quantizer="
        )
    if scope == "row" and layout.offsets is None:
        raise ValueError(f"its rows are cut by shards in a way that {quantizer} does not support; name another format")
    return cast(Span, scope)


def _span_of_blocks(layout: Layout, quantizer: Any) -> Span | None:
    rows, columns = quantizer.tile
    cuts_rows, cuts_columns = layout.cuts_blocks(rows, columns)
    if cuts_columns:
        raise ValueError(
            f"its shards cut the blocks of {rows} x {columns} that share a scale in {quantizer}: the last dimension of "
            f"shape {layout.shape} is cut at {sorted(layout.boundaries or ()) or 'positions that are not multiples'}"
        )
    if cuts_rows and layout.offsets is None:
        raise ValueError(
            f"its blocks are cut by shards in a way that {quantizer} does not support; name another format"
        )
    return "block" if cuts_rows else None


class Statistic(NamedTuple):
    """A statistic of a whole weight, and its slots in the one collective per step.

    Attributes:
        layout: The layout of the weight.
        span: One number for the tensor, or one per row or block.
        reduction: ``"max"`` or ``"mean"``. A mean is over the tensor.
        tile: Rows and columns of a block.
    """

    layout: Layout
    span: Span
    reduction: Literal["max", "mean"]
    tile: tuple[int, int] | None = None

    @property
    def numbers(self) -> int:
        """How many numbers it takes."""
        if self.reduction == "mean":
            return self.layout.shards
        if self.span == "block":
            return math.prod(self._grid)
        return 1 if self.span == "tensor" else math.prod(self.layout.shape[:-1])

    def view_of_shard(self, slots: Tensor, like: Tensor) -> Tensor:
        """View the slots that belong to this process's shard.

        Args:
            slots: The slots of this statistic in the table, ``numbers`` elements.
            like: The statistic of the shard: 0-dim, or of shape ``(..., 1)``.
        """
        if self.reduction == "mean":
            assert self.layout.shard is not None
            return slots[self.layout.shard]
        if self.span == "tensor":
            return slots[0]
        assert self.layout.offsets is not None
        rows = zip(self.layout.offsets, like.shape[:-1], strict=False)
        return slots.view(self.layout.shape[:-1])[tuple(slice(start, start + size) for start, size in rows)].unsqueeze(
            -1
        )

    @property
    def _grid(self) -> tuple[int, ...]:
        """The number of blocks in each dimension."""
        assert self.tile is not None
        *outer, rows, columns = self.layout.shape
        return *outer, -(-rows // self.tile[0]), -(-columns // self.tile[1])

    def view_of_blocks(self, slots: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """View the slots of the blocks in this process's columns, and find the block of each of its rows.

        Args:
            slots: The slots of this statistic in the table, ``numbers`` elements.
            like: The statistic of the shard: one number per row and block.

        Returns:
            A view of shape ``(..., rows of blocks, columns of blocks)``, and for each row of ``like`` the index of its
            row of blocks.
        """
        assert self.tile is not None
        assert self.layout.offsets is not None
        *outer, row, column = self.layout.offsets
        first = column // self.tile[1]
        place = [slice(start, start + size) for start, size in zip(outer, like.shape[:-2], strict=True)]
        place += [slice(None), slice(first, first + like.shape[-1])]
        view = slots.view(self._grid)[tuple(place)]
        return view, torch.arange(row, row + like.shape[-2], device=slots.device) // self.tile[0]


class StatisticsTable:
    """Combines the statistics of all sharded weights of a group in one collective per step.

    All numbers are magnitudes, so their float64 bits, read as integers, have the same order, with NaN above all others.
    An integer maximum therefore keeps NaN, which a floating-point maximum loses on some backends. A mean has one slot
    per shard, and is summed after the collective in the order of the shards, so that it is the same on each process.

    One flag per weight says that this process does not know its codes before the step (1), or has given up on the
    weight (2). The weight's step is then not counted on any process.

    Args:
        statistics: One per weight, in the same order on each process.
        group: The processes.
    """

    def __init__(self, statistics: Sequence[Statistic], group: RankGroup) -> None:
        self.group = group
        self._statistics = list(statistics)
        sizes = [statistic.numbers for statistic in statistics]
        self._values = torch.zeros(sum(sizes) + len(sizes), dtype=torch.float64, device=group.device)
        self._slots = list(torch.split(self._values, [*sizes, len(sizes)]))
        self._flags = self._slots.pop()

    @property
    def nbytes(self) -> int:
        """Bytes that each process contributes to the collective."""
        return self._values.nbytes

    @property
    def bits(self) -> Tensor:
        """A view of the bits of all numbers as int64."""
        return self._values.view(torch.int64)

    def clear(self) -> None:
        """Start the next collective. Views of the table are no longer valid."""
        self._values.zero_()

    def put(self, index: int, statistic: Tensor, weights: int) -> None:
        """Store the statistic of this process's shard.

        Args:
            index: The index of the weight.
            statistic: The statistic of the shard.
            weights: The number of elements in the shard.
        """
        if not weights:
            return
        known = self._statistics[index]
        if known.reduction == "mean":
            statistic = statistic.double() * (weights / math.prod(known.layout.shape))
        if known.span == "block":
            view, rows = known.view_of_blocks(self._slots[index].view(torch.int64), statistic)
            bits = statistic.to(view.device, torch.float64).view(torch.int64) & torch.iinfo(torch.int64).max
            view.scatter_reduce_(-2, rows.unsqueeze(-1).expand_as(bits), bits, "amax")
            return
        known.view_of_shard(self._slots[index], statistic).copy_(statistic)

    def flag(self, index: int, reason: int) -> None:
        """Flag that a weight cannot be counted in this step: 1, its codes before it are unknown; 2, given up."""
        self._flags[index] = reason

    def reduce(self) -> None:
        """Run the collective."""
        self.bits.bitwise_and_(torch.iinfo(torch.int64).max)
        collectives.all_reduce_(self.bits, self.group, "MAX")

    def get(self, index: int, like: Tensor) -> Tensor:
        """Return the statistic of the whole weight, or of its rows in this process's shard, like ``like``.

        Args:
            index: The index of the weight.
            like: The statistic that this process stored, for dtype, device and shape.
        """
        known, slots = self._statistics[index], self._slots[index]
        if known.span == "block":
            view, rows = known.view_of_blocks(slots, like)
            found = view.index_select(-2, rows)
        else:
            found = slots.sum() if known.reduction == "mean" else known.view_of_shard(slots, like)
        return found.to(like.device, like.dtype, copy=True)

    @property
    def is_counted(self) -> Tensor:
        """For each weight, whether no process has flagged it: bool, on the group's device."""
        return self._flags == 0
