"""The sharded weights of one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from weightflip.distributed.collectives import agree
from weightflip.distributed.layouts import Layout, layout
from weightflip.distributed.statistics import Statistic, StatisticsTable, span
from weightflip.distributed.teams import Team, teams


class ShardedWeight(NamedTuple):
    """A weight that lies in parts on several processes.

    Attributes:
        name: As the tracker has it.
        quantizer: The name of its quantizer.
        layout: How it lies.
        statistic: What has to be known of all of it; None for nothing.
    """

    name: str
    quantizer: str
    layout: Layout
    statistic: Statistic | None

    @property
    def weights(self) -> int:
        """Of all processes."""
        return math.prod(self.layout.shape)

    def __str__(self) -> str:
        needs = None if self.statistic is None else self.statistic[1:]
        return f"{self.name} {self.quantizer} {self.layout.shape} {self.layout.shards} {needs}"


class ShardedWeights:
    """The sharded weights of one optimizer, and who has to talk to whom about them.

    Attributes:
        tables: For each team, its table and the names of the weights in it, in order.
        refused: Name to the reason why a weight is not tracked; the same on each process.
        told_elsewhere: Names of those whose reason the first process of the team tells.
    """

    def __init__(self) -> None:
        self._members: dict[str, ShardedWeight] = {}
        self._now: dict[str, ShardedWeight] = {}
        self.tables: list[tuple[StatisticsTable, list[str]]] = []
        self.refused: dict[str, str] = {}
        self.told_elsewhere: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def follow(
        self, weights: Iterable[tuple[str, Tensor, Any]], call: Callable[[Any], str], *, compare: bool, is_lost: bool
    ) -> bool:
        """Take up the weights that are tracked from now on: name, parameter and quantizer.

        Where they may be others than before there is one collective of 16 bytes a team, in which the processes compare
        what they track: where they differ, nothing of it can be added up, and all of it is refused. Weights that were
        tracked before stay in the sums.

        Args:
            weights: In the same order on each process. Of a quantizer that ``encodes`` by another, that counts.
            call: What a quantizer is called.
            compare: Whether they may be others than before, on all processes. Where it turns out that they are, they
                are compared in any case.
            is_lost: This process does not know what the others track.

        Returns:
            Whether they were compared.
        """
        now: dict[str, ShardedWeight] = {}
        refused: dict[str, str] = {}
        for name, parameter, quantizer in weights:
            lies = layout(parameter)
            if lies is None:
                continue
            try:
                quantizer = quantizer.encoder
                over = span(lies, quantizer)
                statistic = None if over is None else Statistic(lies, over, quantizer.reduction, quantizer.tile)
                now[name] = ShardedWeight(name, call(quantizer), lies, statistic)
            except Exception as error:
                # Compared, too: no process must wait because it is refused on another one only.
                reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                refused[name] = reason
                if lies.shard is not None:
                    now[name] = ShardedWeight(name, reason, lies, None)
        if not compare and list(now.items()) == list(self._now.items()):
            return False
        self._now, self.refused, self.told_elsewhere = now, refused, set()
        self._members = {**{name: known for name, known in self._members.items() if name not in now}, **now}
        for team, members in self.teams:
            if not agree("\n".join([*map(str, members), "?" * is_lost]), team):
                for member in members:
                    if member.name not in self.refused and not team.is_first:
                        self.told_elsewhere.add(member.name)
                    self.refused.setdefault(
                        member.name,
                        f"processes {', '.join(map(str, team.ranks))} do not track the same weights in the same order, "
                        "so that their counts cannot be added up",
                    )
        for name in self.refused:
            self._members.pop(name, None)
        self.tables = []
        for team, members in self.teams:
            asked = [member for member in members if member.name in now and member.statistic is not None]
            if asked:
                table = StatisticsTable([member.statistic for member in asked if member.statistic is not None], team)
                self.tables.append((table, [member.name for member in asked]))
        return True

    @property
    def teams(self) -> list[tuple[Team, list[ShardedWeight]]]:
        """Each team, with its weights."""
        members = list(self._members.values())
        found: dict[Team, list[ShardedWeight]] = {}
        for team, member in zip(teams([member.layout for member in members]), members, strict=True):
            found.setdefault(team, []).append(member)
        return list(found.items())
