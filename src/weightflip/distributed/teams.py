"""Teams of processes whose numbers are combined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from weightflip.distributed.layouts import Layout


class Team(NamedTuple):
    """Processes that combine their numbers in collectives.

    Attributes:
        ranks: Ranks in the default process group, ascending.
        device_type: The device type that they communicate with.
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
        """Whether this process is the first of the team, which reports what all would."""
        return torch.distributed.get_rank() == self.ranks[0]

    @property
    def failure(self) -> int:
        """What a process contributes for a weight that it has given up on; see ``is_reporter``."""
        return len(self.ranks) if self.is_first else 1

    def is_reporter(self, failures: float) -> bool:
        """Whether this process reports failures on others: the first does, or the second if the first has failed.

        Args:
            failures: The sum of ``failure`` over the processes that failed.
        """
        return torch.distributed.get_rank() == self.ranks[failures >= len(self.ranks)]

    def is_counted(self, layout: Layout) -> bool:
        """Whether this process's shard counts, of several processes that hold copies of it."""
        return layout.is_first_copy and self.ranks[0] in layout.ranks


def teams(layouts: Sequence[Layout]) -> list[Team]:
    """Return the team that adds up each weight, with as few different teams as possible.

    With tensor parallelism, the mesh of some weights is a slice of the mesh of others. One collective over the larger
    mesh serves both.
    """
    largest: list[Team] = []
    for candidate in sorted(layouts, key=lambda layout: -len(layout.ranks)):
        if not any(set(candidate.ranks) <= set(team.ranks) for team in largest):
            largest.append(Team(candidate.ranks, candidate.device_type))
    return [next(team for team in largest if set(layout.ranks) <= set(team.ranks)) for layout in layouts]
