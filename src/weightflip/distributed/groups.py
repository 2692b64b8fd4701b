"""The process groups used for collectives, and which process writes records.

Also works if ``torch.distributed`` is not initialized or not available: then the only process is the writer.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

GroupKey = tuple[str, tuple[int, ...]]
"""The device type that the processes communicate with, and their ranks (ascending)."""

# Default process group to the groups created while it exists. None stands for the default group itself: a value that
# refers to its key would keep the entry alive. destroy_process_group() removes all.
_groups: weakref.WeakKeyDictionary[Any, dict[GroupKey, Any]] = weakref.WeakKeyDictionary()


def is_available() -> bool:
    """Whether ``torch.distributed`` is initialized."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_writer() -> bool:
    """Whether this process writes records: rank 0 of the default process group, or the only process."""
    return not is_available() or torch.distributed.get_rank() == 0


def process_group(key: GroupKey) -> Any:
    """Return the adopted group of these processes; else the default group if it is the same, or a new one."""
    groups = _current_groups()
    if key not in groups:
        ranks = list(key[1])
        is_all = len(ranks) == torch.distributed.get_world_size()
        groups[key] = None if is_all else torch.distributed.new_group(ranks, use_local_synchronization=True)
    return groups[key] or torch.distributed.group.WORLD


def adopt_mesh_group(mesh: Any, key: GroupKey) -> None:
    """Use the process group of a one-dimensional mesh for its processes instead of creating a new one."""
    groups = _current_groups()
    if key not in groups:
        group = mesh.get_group()
        groups[key] = None if group is torch.distributed.group.WORLD else group


def _current_groups() -> dict[GroupKey, Any]:
    world = torch.distributed.group.WORLD
    if world is None:
        raise RuntimeError(
            "counts of sharded weights cannot be summed, since there is no process group any more; call close() "
            "before torch.distributed.destroy_process_group()"
        )
    return _groups.setdefault(world, {})
