"""Every collective there is, and the one place where processes meet without one."""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal, cast

import torch
from torch import Tensor

from weightflip.distributed import groups
from weightflip.distributed.layouts import Layout
from weightflip.distributed.teams import Team, teams

MEETING_TIMEOUT = timedelta(seconds=60)
"""How long a process whose sharded weights have become others waits for the rest to come and compare."""


def all_reduce_(numbers: Tensor, team: Team, operation: Literal["SUM", "MAX"]) -> None:
    """The sum or the maximum over the processes of the team, in place."""
    torch.distributed.all_reduce(
        numbers, getattr(torch.distributed.ReduceOp, operation), group=groups.group_of((team.device_type, team.ranks))
    )


def agree(description: str, team: Team) -> bool:
    """Whether all processes of the team say the same. One collective, of 16 bytes."""
    digest = int.from_bytes(hashlib.sha256(description.encode()).digest()[:7], "big")
    numbers = torch.tensor([digest, -digest], dtype=torch.int64, device=team.device)
    all_reduce_(numbers, team, "MAX")
    largest, smallest = numbers.tolist()
    return bool(largest == -smallest)


# Default group to how often processes have met, by what they met about.
_meetings: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()


def have_all_come(layouts: Iterable[Layout], about: str) -> bool:
    """Whether all processes that hold parts of these weights come here within ``MEETING_TIMEOUT``; the same answer on each.

    They meet in the default group's store: a collective that some do not come to would wait for the group's timeout,
    and then leave a group that cannot be used any more.

    Args:
        layouts: How the weights lie, of which this process has a part each.
        about: What all know alike and others do not meet about at the same time.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    meetings = _meetings.setdefault(torch.distributed.group.WORLD, Counter())
    for team in dict.fromkeys(teams(list(layouts))):
        place = hashlib.sha256(f"{team} {about}".encode()).hexdigest()[:16]
        meetings[place] += 1
        here, end, gone = (f"weightflip/{place}/{meetings[place]}/{key}" for key in ("here", "end", "gone"))
        if store.add(here, 1) == len(team.ranks):
            store.compare_set(end, "", "all")
        else:
            try:
                store.wait([end], MEETING_TIMEOUT)
            except RuntimeError:
                # The one that gives up decides for those that come late.
                store.compare_set(end, "", "some")
        have_come = store.get(end) == b"all"
        with suppress(Exception):
            # The answer is known: the last to leave tidies up, since the next default group may have the same store and
            # count its meetings anew. Where some have not come, this stays, and says so again.
            if store.add(gone, 1) == len(team.ranks):
                for key in (here, end, gone):
                    store.delete_key(key)
        if not have_come:
            return False
    return True


def is_any(flag: Tensor, layouts: Iterable[Layout]) -> Tensor:
    """Whether a flag is set on any process that holds a part of these weights. One collective a team, of 8 bytes.

    Args:
        flag: 0-dim, not negative; set where it is not 0.
        layouts: How the weights lie, of which this process has a part each.

    Returns:
        0-dim bool, without waiting for the device.
    """
    for team in dict.fromkeys(teams(list(layouts))):
        flag = flag.to(team.device, torch.int64).clamp(max=1).view(1)
        all_reduce_(flag, team, "MAX")
    return flag.view(()) != 0


def add_up(numbers: Sequence[float], team: Team) -> list[float]:
    """The sum over the processes of the team, number by number. One collective, of 8 bytes a number (float64)."""
    packed = torch.tensor(numbers, dtype=torch.float64, device=team.device)
    all_reduce_(packed, team, "SUM")
    return cast("list[float]", packed.tolist())
