"""The sharded weights of one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from weightflip.distributed.collectives import is_same_on_all
from weightflip.distributed.layouts import Layout, layout
from weightflip.distributed.rank_groups import RankGroup, find_rank_groups
from weightflip.distributed.statistics import Statistic, StatisticsTable, span


class ShardedWeight(NamedTuple):
    """A sharded weight.

    Attributes:
        name: Its name in the tracker.
        quantizer: The name of its quantizer.
        layout: Its layout over processes.
        statistic: The statistic of the whole weight that encoding needs; None if it needs none.
    """

    name: str
    quantizer: str
    layout: Layout
    statistic: Statistic | None

    @property
    def weights(self) -> int:
        """Number of elements of the whole weight."""
        return math.prod(self.layout.shape)

    def __str__(self) -> str:
        needs = None if self.statistic is None else self.statistic[1:]
        return f"{self.name} {self.quantizer} {self.layout.shape} {self.layout.shards} {needs}"


class ShardedWeights:
    """The sharded weights of one optimizer, and the process groups that hold them.

    Attributes:
        tables: For each group, its table and the names of the weights in it, in order.
        rejected: The reason why a weight is not tracked, by name. The same on each process.
        reported_elsewhere: The rejected names whose reason the first process of the group reports.
    """

    def __init__(self) -> None:
        self._members: dict[str, ShardedWeight] = {}
        self._current: dict[str, ShardedWeight] = {}
        self.tables: list[tuple[StatisticsTable, list[str]]] = []
        self.rejected: dict[str, str] = {}
        self.reported_elsewhere: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def update(
        self,
        weights: Iterable[tuple[str, Tensor, Any]],
        get_name: Callable[[Any], str],
        *,
        compare: bool,
        is_membership_unknown: bool,
    ) -> bool:
        """Set the weights to track from now on: name, parameter and quantizer.

        If they may have changed, the processes of each group compare what they track, in one collective of 16 bytes per
        group. If they differ, their counts cannot be summed, and all weights of the group are rejected. Weights that
        were tracked before remain in the sums.

        Args:
            weights: In the same order on each process. For a quantizer that ``encodes`` with another, that one counts.
            get_name: Returns the name of a quantizer.
            compare: Whether to compare even if the weights of this process have not changed.
            is_membership_unknown: Whether this process failed to find out what it has to track.

        Returns:
            Whether the weights were compared.
        """
        current: dict[str, ShardedWeight] = {}
        rejected: dict[str, str] = {}
        for name, parameter, quantizer in weights:
            placement = layout(parameter)
            if placement is None:
                continue
            try:
                quantizer = quantizer.encoder
                statistic_span = span(placement, quantizer)
                statistic = None
                if statistic_span is not None:
                    statistic = Statistic(placement, statistic_span, quantizer.reduction, quantizer.tile)
                current[name] = ShardedWeight(name, get_name(quantizer), placement, statistic)
            except Exception as error:
                # Compare rejected weights as well: a weight rejected on one process only must not keep others waiting.
                reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                rejected[name] = reason
                if placement.shard is not None:
                    current[name] = ShardedWeight(name, reason, placement, None)
        if not compare and list(current.items()) == list(self._current.items()):
            return False
        self._current, self.rejected, self.reported_elsewhere = current, rejected, set()
        self._members = {**{name: known for name, known in self._members.items() if name not in current}, **current}
        for group, members in self.rank_groups:
            if not is_same_on_all("\n".join([*map(str, members), "?" * is_membership_unknown]), group):
                for member in members:
                    if member.name not in self.rejected and not group.is_first:
                        self.reported_elsewhere.add(member.name)
                    self.rejected.setdefault(
                        member.name,
                        f"processes {', '.join(map(str, group.ranks))} do not track the same weights in the same "
                        "order, so their counts cannot be summed",
                    )
        for name in self.rejected:
            self._members.pop(name, None)
        self.tables = []
        for group, members in self.rank_groups:
            shared = [member for member in members if member.name in current and member.statistic is not None]
            if shared:
                table = StatisticsTable([member.statistic for member in shared if member.statistic is not None], group)
                self.tables.append((table, [member.name for member in shared]))
        return True

    @property
    def rank_groups(self) -> list[tuple[RankGroup, list[ShardedWeight]]]:
        """Each process group with its weights."""
        members = list(self._members.values())
        found: dict[RankGroup, list[ShardedWeight]] = {}
        for group, member in zip(find_rank_groups([member.layout for member in members]), members, strict=True):
            found.setdefault(group, []).append(member)
        return list(found.items())
