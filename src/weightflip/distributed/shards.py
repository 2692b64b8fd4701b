"""The sharded weights of one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from weightflip.distributed.collectives import is_same_on_all
from weightflip.distributed.layouts import Layout, layout
from weightflip.distributed.statistics import Statistic, StatisticsTable, span
from weightflip.distributed.teams import Team, teams


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
    """The sharded weights of one optimizer, and the teams of processes that hold them.

    Attributes:
        tables: For each team, its table and the names of the weights in it, in order.
        refused: Name to the reason why a weight is not tracked. The same on each process.
        reported_elsewhere: The refused names whose reason the first process of the team reports.
    """

    def __init__(self) -> None:
        self._members: dict[str, ShardedWeight] = {}
        self._now: dict[str, ShardedWeight] = {}
        self.tables: list[tuple[StatisticsTable, list[str]]] = []
        self.refused: dict[str, str] = {}
        self.reported_elsewhere: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def update(
        self,
        weights: Iterable[tuple[str, Tensor, Any]],
        name_of: Callable[[Any], str],
        *,
        compare: bool,
        is_membership_unknown: bool,
    ) -> bool:
        """Set the weights to track from now on: name, parameter and quantizer.

        If they may have changed, the processes of each team compare what they track, in one collective of 16 bytes per
        team. If they differ, their counts cannot be added up, and all weights of the team are refused. Weights that
        were tracked before remain in the sums.

        Args:
            weights: In the same order on each process. For a quantizer that ``encodes`` with another, that one counts.
            name_of: Returns the name of a quantizer.
            compare: Whether the weights may have changed on all processes. If they have, they are compared anyway.
            is_membership_unknown: Whether this process failed to find out what it has to track.

        Returns:
            Whether the weights were compared.
        """
        now: dict[str, ShardedWeight] = {}
        refused: dict[str, str] = {}
        for name, parameter, quantizer in weights:
            placed = layout(parameter)
            if placed is None:
                continue
            try:
                quantizer = quantizer.encoder
                over = span(placed, quantizer)
                statistic = None if over is None else Statistic(placed, over, quantizer.reduction, quantizer.tile)
                now[name] = ShardedWeight(name, name_of(quantizer), placed, statistic)
            except Exception as error:
                # Compare refused weights as well: a weight refused on one process only must not keep others waiting.
                reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                refused[name] = reason
                if placed.shard is not None:
                    now[name] = ShardedWeight(name, reason, placed, None)
        if not compare and list(now.items()) == list(self._now.items()):
            return False
        self._now, self.refused, self.reported_elsewhere = now, refused, set()
        self._members = {**{name: known for name, known in self._members.items() if name not in now}, **now}
        for team, members in self.teams:
            if not is_same_on_all("\n".join([*map(str, members), "?" * is_membership_unknown]), team):
                for member in members:
                    if member.name not in self.refused and not team.is_first:
                        self.reported_elsewhere.add(member.name)
                    self.refused.setdefault(
                        member.name,
                        f"processes {', '.join(map(str, team.ranks))} do not track the same weights in the same order, "
                        "so their counts cannot be added up",
                    )
        for name in self.refused:
            self._members.pop(name, None)
        self.tables = []
        for team, members in self.teams:
            shared = [member for member in members if member.name in now and member.statistic is not None]
            if shared:
                table = StatisticsTable([member.statistic for member in shared if member.statistic is not None], team)
                self.tables.append((table, [member.name for member in shared]))
        return True

    @property
    def teams(self) -> list[tuple[Team, list[ShardedWeight]]]:
        """Each team with its weights."""
        members = list(self._members.values())
        found: dict[Team, list[ShardedWeight]] = {}
        for team, member in zip(teams([member.layout for member in members]), members, strict=True):
            found.setdefault(team, []).append(member)
        return list(found.items())
