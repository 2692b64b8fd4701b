"""What has to be known of a whole weight before its shards can be encoded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from weightflip.distributed import collectives
from weightflip.distributed.layouts import Layout
from weightflip.distributed.teams import Team

Span = Literal["tensor", "row", "block"]


def span(layout: Layout, quantizer: Any) -> Span | None:
    """Over what processes have to add up what they know before a quantizer can encode its shards.

    Args:
        layout: How the weight lies.
        quantizer: ``scope`` says how much of a weight one code depends on (``"element"``, ``"group"``, ``"row"``,
            ``"tensor"``, or ``"block"``, of as many rows and columns as ``tile`` says), ``group`` how many neighbours
            are one, and ``has_statistic`` whether it can say what has to be known of a whole block, row or tensor.

    Returns:
        None where each process can encode its shard alone.

    Raises:
        ValueError: The codes of a shard cannot be those of the whole weight; with the reason.
    """
    scope, group = quantizer.scope, quantizer.group
    if layout.shard is None:
        raise ValueError(f"it lies on processes {', '.join(map(str, layout.ranks))}, of which this is none")
    if layout.is_partial:
        raise ValueError("each process holds a summand of it (Partial), and none a weight")
    if scope is None:
        raise ValueError(
            f"it is sharded, and {quantizer} does not say how much of a weight one code depends on; where it may be "
            "encoded shard by shard, give the quantizer scope = 'element' or 'row'"
        )
    if scope == "block":
        return _span_of_blocks(layout, quantizer)
    if group is not None and layout.cuts_groups(group):
        raise ValueError(
            f"its shards cut the groups of {group} neighbours that share a scale in {quantizer}: the last dimension of "
            f"shape {layout.shape} is cut at {sorted(layout.borders or ()) or 'places that are not multiples'}"
        )
    if scope in ("element", "group") or (scope == "row" and not layout.cuts_rows):
        return None
    if not quantizer.has_statistic:
        raise ValueError(
            f"it is sharded, and {quantizer} needs whole {'rows' if scope == 'row' else 'tensors'}, of which a process "
            "holds a part; leave it out with exclude=, or name another format in quantizer="
        )
    if scope == "row" and layout.offsets is None:
        raise ValueError(f"its rows are cut by shards in a way that {quantizer} cannot follow; name another format")
    return cast(Span, scope)


def _span_of_blocks(layout: Layout, quantizer: Any) -> Span | None:
    rows, columns = quantizer.tile
    cuts_rows, cuts_columns = layout.cuts_blocks(rows, columns)
    if cuts_columns:
        raise ValueError(
            f"its shards cut the blocks of {rows} x {columns} that share a scale in {quantizer}: the last dimension of "
            f"shape {layout.shape} is cut at {sorted(layout.borders or ()) or 'places that are not multiples'}"
        )
    if cuts_rows and layout.offsets is None:
        raise ValueError(f"its blocks are cut by shards in a way that {quantizer} cannot follow; name another format")
    return "block" if cuts_rows else None


class Statistic(NamedTuple):
    """What has to be known of a whole weight: its place in the one collective of a step.

    Attributes:
        layout: How the weight lies.
        span: One number for the tensor, or one for each row or block.
        reduction: ``"max"`` or ``"mean"``; means are over the tensor.
        tile: Rows and columns of a block.
    """

    layout: Layout
    span: Span
    reduction: Literal["max", "mean"]
    tile: tuple[int, int] | None = None

    @property
    def numbers(self) -> int:
        """How many it takes."""
        if self.reduction == "mean":
            return self.layout.shards
        if self.span == "block":
            return math.prod(self._grid)
        return 1 if self.span == "tensor" else math.prod(self.layout.shape[:-1])

    def part(self, slots: Tensor, like: Tensor) -> Tensor:
        """Of this statistic's part of the table, what belongs to this process's shard, as a view.

        Args:
            slots: Of ``numbers`` elements.
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
        """How many blocks there are in each dimension."""
        assert self.tile is not None
        *outer, rows, columns = self.layout.shape
        return *outer, -(-rows // self.tile[0]), -(-columns // self.tile[1])

    def blocks(self, slots: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of this statistic's part of the table, the blocks in this process's columns, and that of each of its rows.

        Args:
            slots: Of ``numbers`` elements.
            like: The statistic of the shard: of each row in each block.

        Returns:
            A view of the shape ``(..., rows of blocks, columns of blocks)``, and for each row of ``like`` an index.
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
    """What the quantizers of sharded weights have to know of them, brought together in one collective a step.

    All numbers are magnitudes, so that as float64 their bits, taken for integers, have their order, with NaN above all:
    an integer maximum keeps NaN, which the maximum of floating-point numbers loses on some backends. A mean has a
    place for each shard, and is added up here, in the order of the shards: it is the same on each process.

    One more number a weight says that this process cannot tell its codes before the step (1), or has given the weight
    up (2): then the step is not counted, on any process.

    Args:
        statistics: Of each weight, in the same order on each process.
        team: The processes.
    """

    def __init__(self, statistics: Sequence[Statistic], team: Team) -> None:
        self.team = team
        self._statistics = list(statistics)
        sizes = [statistic.numbers for statistic in statistics]
        self._values = torch.zeros(sum(sizes) + len(sizes), dtype=torch.float64, device=team.device)
        self._slots = list(torch.split(self._values, [*sizes, len(sizes)]))
        self._flags = self._slots.pop()

    @property
    def nbytes(self) -> int:
        """Bytes that each process hands in."""
        return self._values.nbytes

    @property
    def bits(self) -> Tensor:
        """The bits of all numbers as int64: a view."""
        return self._values.view(torch.int64)

    def clear(self) -> None:
        """Begin a new collection. What was handed out is no longer valid."""
        self._values.zero_()

    def put(self, index: int, statistic: Tensor, weights: int) -> None:
        """Hand in what this process knows of a weight.

        Args:
            index: Which weight.
            statistic: Of this process's shard.
            weights: How many weights that has.
        """
        if not weights:
            return
        known = self._statistics[index]
        if known.reduction == "mean":
            statistic = statistic.double() * (weights / math.prod(known.layout.shape))
        if known.span == "block":
            view, rows = known.blocks(self._slots[index].view(torch.int64), statistic)
            bits = statistic.to(view.device, torch.float64).view(torch.int64) & torch.iinfo(torch.int64).max
            view.scatter_reduce_(-2, rows.unsqueeze(-1).expand_as(bits), bits, "amax")
            return
        known.part(self._slots[index], statistic).copy_(statistic)

    def flag(self, index: int, reason: int) -> None:
        """Say that a weight cannot be counted in this step: 1, not before it; 2, given up."""
        self._flags[index] = reason

    def reduce(self) -> None:
        """The collective."""
        self.bits.bitwise_and_(torch.iinfo(torch.int64).max)
        collectives.all_reduce_(self.bits, self.team, "MAX")

    def get(self, index: int, like: Tensor) -> Tensor:
        """The statistic of the whole weight, or of its rows in this process's shard, in ``like``'s dtype and device.

        Args:
            index: Which weight.
            like: What this process handed in.
        """
        known, slots = self._statistics[index], self._slots[index]
        if known.span == "block":
            view, rows = known.blocks(slots, like)
            found = view.index_select(-2, rows)
        else:
            found = slots.sum() if known.reduction == "mean" else known.part(slots, like)
        return found.to(like.device, like.dtype, copy=True)

    @property
    def is_counted(self) -> Tensor:
        """Of each weight, whether no process has flagged it: bool, on the team's device."""
        return self._flags == 0
