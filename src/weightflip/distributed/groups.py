"""Whether there are other processes, and the process groups to talk to them in.

Works where ``torch.distributed`` is not initialized, or not built: then there is one process, which writes.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

Place = tuple[str, tuple[int, ...]]
"""Where processes talk to each other (a device type), and which ones (ascending)."""

# Default group to the groups of its time; None for itself, since a value that held its key would keep it. All go with
# destroy_process_group().
_groups: weakref.WeakKeyDictionary[Any, dict[Place, Any]] = weakref.WeakKeyDictionary()


def is_available() -> bool:
    """Whether processes can talk to each other."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_writer() -> bool:
    """Whether this process writes records: the first one of the default group, or the only one."""
    return not is_available() or torch.distributed.get_rank() == 0


def group_of(place: Place) -> Any:
    """The group that was adopted for these processes; else the default group, or one that is made now."""
    groups = _groups_of_now()
    if place not in groups:
        ranks = list(place[1])
        is_all = len(ranks) == torch.distributed.get_world_size()
        groups[place] = None if is_all else torch.distributed.new_group(ranks, use_local_synchronization=True)
    return groups[place] or torch.distributed.group.WORLD


def adopt_group_of(mesh: Any, place: Place) -> None:
    """Use the group of a mesh of one dimension for its processes, instead of a new one."""
    groups = _groups_of_now()
    if place not in groups:
        group = mesh.get_group()
        groups[place] = None if group is torch.distributed.group.WORLD else group


def _groups_of_now() -> dict[Place, Any]:
    world = torch.distributed.group.WORLD
    if world is None:
        raise RuntimeError(
            "weights lie on several processes, and there is no process group to add them up; call close() before "
            "torch.distributed.destroy_process_group()"
        )
    return _groups.setdefault(world, {})
