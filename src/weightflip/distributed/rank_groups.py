"""Groups of processes whose numbers are combined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from weightflip.distributed.layouts import Layout


class RankGroup(NamedTuple):
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
        """Whether this process is the first of the group, which reports for all of them."""
        return torch.distributed.get_rank() == self.ranks[0]

    @property
    def failure(self) -> int:
        """The number that a process adds to the sum for a weight that failed on it; see ``is_reporter``."""
        return len(self.ranks) if self.is_first else 1

    def is_reporter(self, failures: float) -> bool:
        """Whether this process reports failures of others: the first one does, or the second if the first has failed.

        Args:
            failures: The sum of ``failure`` over the processes that failed.
        """
        return torch.distributed.get_rank() == self.ranks[failures >= len(self.ranks)]

    def is_counted(self, layout: Layout) -> bool:
        """Whether this process's copy of a shard counts, if several processes hold copies of it."""
        return layout.is_first_copy and self.ranks[0] in layout.ranks


def find_rank_groups(layouts: Sequence[Layout]) -> list[RankGroup]:
    """Return the group that sums each weight, with as few different groups as possible.

    With tensor parallelism, the mesh of some weights is a slice of the mesh of others. One collective over the larger
    mesh serves both.
    """
    largest: list[RankGroup] = []
    for candidate in sorted(layouts, key=lambda layout: -len(layout.ranks)):
        if not any(set(candidate.ranks) <= set(group.ranks) for group in largest):
            largest.append(RankGroup(candidate.ranks, candidate.device_type))
    return [next(group for group in largest if set(layout.ranks) <= set(group.ranks)) for layout in layouts]
