"""Which processes add up their numbers with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from weightflip.distributed.layouts import Layout


class Team(NamedTuple):
    """Processes that bring their numbers together.

    Attributes:
        ranks: Ascending.
        device_type: Where they talk to each other.
    """

    ranks: tuple[int, ...]
    device_type: str

    @property
    def device(self) -> torch.device:
        if self.device_type == "cpu":
            return torch.device("cpu")
        return torch.device(self.device_type, torch.get_device_module(self.device_type).current_device())

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of them, which says what all would."""
        return torch.distributed.get_rank() == self.ranks[0]

    @property
    def failure(self) -> int:
        """What a process hands in for a weight that it has given up; see ``tells_of``."""
        return len(self.ranks) if self.is_first else 1

    def tells_of(self, failures: float) -> bool:
        """Whether this process tells of failures on others: the first one does, or the second where the first failed.

        Args:
            failures: The sum of what was handed in.
        """
        return torch.distributed.get_rank() == self.ranks[failures >= len(self.ranks)]

    def counts(self, layout: Layout) -> bool:
        """Whether this process's shard is the one that is counted, of several that hold the same."""
        return layout.is_first_copy and self.ranks[0] in layout.ranks


def teams(layouts: Sequence[Layout]) -> list[Team]:
    """Of each weight, the processes to add it up with: as few different teams as there can be.

    With tensor parallelism some weights lie on a mesh that is a slice of another's: one collective over the larger one
    serves both.
    """
    largest: list[Team] = []
    for candidate in sorted(layouts, key=lambda layout: -len(layout.ranks)):
        if not any(set(candidate.ranks) <= set(team.ranks) for team in largest):
            largest.append(Team(candidate.ranks, candidate.device_type))
    return [next(team for team in largest if set(layout.ranks) <= set(team.ranks)) for layout in layouts]
