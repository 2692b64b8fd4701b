"""All collectives, and a barrier with a timeout, which uses the store instead of a collective."""

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
from weightflip.distributed.rank_groups import RankGroup, find_rank_groups

BARRIER_TIMEOUT = timedelta(seconds=60)
"""How long a process whose sharded weights have changed waits for the others to compare theirs."""


def all_reduce_(numbers: Tensor, group: RankGroup, operation: Literal["SUM", "MAX"]) -> None:
    """Take the sum or the maximum over the processes of the group, in place."""
    process_group = groups.process_group((group.device_type, group.ranks))
    torch.distributed.all_reduce(numbers, getattr(torch.distributed.ReduceOp, operation), group=process_group)


def is_same_on_all(description: str, group: RankGroup) -> bool:
    """Whether all processes of the group pass the same description. One collective of 16 bytes."""
    digest = int.from_bytes(hashlib.sha256(description.encode()).digest()[:7], "big")
    numbers = torch.tensor([digest, -digest], dtype=torch.int64, device=group.device)
    all_reduce_(numbers, group, "MAX")
    largest, smallest = numbers.tolist()
    return bool(largest == -smallest)


# Maps a default process group to the number of barriers so far, by topic.
_barrier_counts: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()


def try_barrier(layouts: Iterable[Layout], topic: str) -> bool:
    """Whether all processes that hold parts of these weights call this within ``BARRIER_TIMEOUT``.

    All of them get the same answer. The barrier uses the default process group's store: a collective that some
    processes do not join would wait for the group's timeout, and the group could not be used afterward.

    Args:
        layouts: Layouts of the weights. This process holds a part of each.
        topic: Identifies the barrier. The same on all processes, and different from that of any other barrier that may
            be entered at the same time.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    counts = _barrier_counts.setdefault(torch.distributed.group.WORLD, Counter())
    for group in dict.fromkeys(find_rank_groups(list(layouts))):
        digest = hashlib.sha256(f"{group} {topic}".encode()).hexdigest()[:16]
        counts[digest] += 1
        arrived, result, left = (f"weightflip/{digest}/{counts[digest]}/{key}" for key in ("arrived", "result", "left"))
        if store.add(arrived, 1) == len(group.ranks):
            store.compare_set(result, "", "all")
        else:
            try:
                store.wait([result], BARRIER_TIMEOUT)
            except RuntimeError:
                # The first process that gives up decides for those that arrive later.
                store.compare_set(result, "", "some")
        is_complete = store.get(result) == b"all"
        with suppress(Exception):
            # The last process deletes the keys, since the next default group may use the same store and count its
            # barriers from 1 again. If some have not arrived, the keys remain as the answer for them.
            if store.add(left, 1) == len(group.ranks):
                for key in (arrived, result, left):
                    store.delete_key(key)
        if not is_complete:
            return False
    return True


def is_set_on_any(flag: Tensor, layouts: Iterable[Layout]) -> Tensor:
    """Whether a flag is set on any process that holds a part of these weights. One collective of 8 bytes per group.

    Args:
        flag: 0-dim, not negative; set if it is not 0.
        layouts: Layouts of the weights. This process holds a part of each.

    Returns:
        A 0-dim bool tensor, without a device synchronization.
    """
    for group in dict.fromkeys(find_rank_groups(list(layouts))):
        flag = flag.to(group.device, torch.int64).clamp(max=1).view(1)
        all_reduce_(flag, group, "MAX")
    return flag.view(()) != 0


def all_reduce_sum(numbers: Sequence[float], group: RankGroup) -> list[float]:
    """Sum each number over the processes of the group. One collective of 8 bytes per number (float64)."""
    packed = torch.tensor(numbers, dtype=torch.float64, device=group.device)
    all_reduce_(packed, group, "SUM")
    return cast("list[float]", packed.tolist())
