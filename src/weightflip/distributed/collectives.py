"""All collectives, and the one rendezvous of processes that works without a collective."""

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
"""How long a process whose sharded weights have changed waits for the others to compare theirs."""


def all_reduce_(numbers: Tensor, team: Team, operation: Literal["SUM", "MAX"]) -> None:
    """Take the sum or the maximum over the processes of the team, in place."""
    torch.distributed.all_reduce(
        numbers, getattr(torch.distributed.ReduceOp, operation), group=groups.group_of((team.device_type, team.ranks))
    )


def is_same_on_all(description: str, team: Team) -> bool:
    """Whether all processes of the team pass the same description. One collective of 16 bytes."""
    digest = int.from_bytes(hashlib.sha256(description.encode()).digest()[:7], "big")
    numbers = torch.tensor([digest, -digest], dtype=torch.int64, device=team.device)
    all_reduce_(numbers, team, "MAX")
    largest, smallest = numbers.tolist()
    return bool(largest == -smallest)


# Default process group to the number of meetings so far, per topic.
_meetings: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()


def have_all_arrived(layouts: Iterable[Layout], about: str) -> bool:
    """Whether all processes that hold parts of these weights call this within ``MEETING_TIMEOUT``.

    The answer is the same on each. They meet in the default process group's store: a collective that some processes do
    not join would wait for the group's timeout, and then leave a group that can no longer be used.

    Args:
        layouts: Layouts of the weights. This process holds a part of each.
        about: The topic: the same on all processes that meet, and different from that of any other meeting at the time.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    meetings = _meetings.setdefault(torch.distributed.group.WORLD, Counter())
    for team in dict.fromkeys(teams(list(layouts))):
        topic = hashlib.sha256(f"{team} {about}".encode()).hexdigest()[:16]
        meetings[topic] += 1
        arrived, result, left = (f"weightflip/{topic}/{meetings[topic]}/{key}" for key in ("here", "end", "gone"))
        if store.add(arrived, 1) == len(team.ranks):
            store.compare_set(result, "", "all")
        else:
            try:
                store.wait([result], MEETING_TIMEOUT)
            except RuntimeError:
                # The first to give up decides for those that arrive late.
                store.compare_set(result, "", "some")
        is_complete = store.get(result) == b"all"
        with suppress(Exception):
            # The last to leave deletes the keys, since the next default group may use the same store and start counting
            # meetings again. If some have not arrived, the keys remain as the answer for them.
            if store.add(left, 1) == len(team.ranks):
                for key in (arrived, result, left):
                    store.delete_key(key)
        if not is_complete:
            return False
    return True


def is_set_on_any(flag: Tensor, layouts: Iterable[Layout]) -> Tensor:
    """Whether a flag is set on any process that holds a part of these weights. One collective of 8 bytes per team.

    Args:
        flag: 0-dim, not negative; set if it is not 0.
        layouts: Layouts of the weights. This process holds a part of each.

    Returns:
        A 0-dim bool tensor, without a device synchronization.
    """
    for team in dict.fromkeys(teams(list(layouts))):
        flag = flag.to(team.device, torch.int64).clamp(max=1).view(1)
        all_reduce_(flag, team, "MAX")
    return flag.view(()) != 0


def add_up(numbers: Sequence[float], team: Team) -> list[float]:
    """Sum each number over the processes of the team. One collective of 8 bytes per number (float64)."""
    packed = torch.tensor(numbers, dtype=torch.float64, device=team.device)
    all_reduce_(packed, team, "SUM")
    return cast("list[float]", packed.tolist())
