"""How weights are laid out over several processes."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from weightflip.distributed import groups
from weightflip.distributed.tensors import is_dtensor


@dataclass(frozen=True)
class Layout:
    """The layout of a sharded weight over processes, as seen from this process.

    Attributes:
        shape: Shape of the whole weight.
        ranks: The processes that hold it, ascending.
        device_type: The device type that these processes communicate with.
        is_first_copy: Whether this process holds the first copy, if the weight is also replicated.
        shard: The index of this process's shard, from 0; None if this process is not one of ``ranks``.
        shards: The number of shards.
        offsets: Where the shard begins in each dimension; None if it is not a contiguous block of the weight.
        boundaries: Where shards begin and end in the last dimension; None if unknown.
        is_partial: Whether the processes hold terms of a sum instead of parts.
        row_boundaries: As ``boundaries``, in the last dimension but one.
    """

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    device_type: str
    is_first_copy: bool
    shard: int | None
    shards: int
    offsets: tuple[int, ...] | None
    boundaries: frozenset[int] | None
    is_partial: bool
    row_boundaries: frozenset[int] | None = None

    @property
    def cuts_rows(self) -> bool:
        """Whether shards cut rows."""
        return self.boundaries is None or len(self.boundaries) > 2

    def cuts_groups(self, group: int) -> bool:
        """Whether shards cut groups of ``group`` neighbors in the last dimension."""
        return self.boundaries is None or (self.cuts_rows and any(boundary % group for boundary in self.boundaries))

    def cuts_blocks(self, rows: int, columns: int) -> tuple[bool, bool]:
        """Whether shards cut blocks between their rows, and between their columns. The last block may be smaller."""

        def cuts(boundaries: frozenset[int] | None, size: int) -> bool:
            return boundaries is None or any(boundary % size for boundary in boundaries if boundary != max(boundaries))

        return rows > 1 and len(self.shape) > 1 and cuts(self.row_boundaries, rows), cuts(self.boundaries, columns)


def layout(parameter: Tensor) -> Layout | None:
    """Return how a weight is laid out over processes; None if every process holds all of it."""
    if not is_dtensor(parameter):
        return None
    tensor = cast(Any, parameter)
    mesh, key = tensor.device_mesh, (tuple(tensor.shape), tuple(tensor.placements))
    known = _layouts.setdefault(mesh, {})
    if key not in known:
        known[key] = _layout(key[0], mesh, key[1])
    found = known[key]
    if found is not None and found.shard is not None and mesh.ndim == 1 and groups.is_available():
        groups.adopt_mesh_group(mesh, (found.device_type, found.ranks))
    return found


def first_row(parameter: Tensor) -> int:
    """Return where this process's shard begins in the last dimension but one; 0 if unknown."""
    found = layout(parameter)
    return 0 if found is None or found.offsets is None or len(found.offsets) < 2 else found.offsets[-2]


# Layouts by mesh, for as long as the mesh is in use.
_layouts: weakref.WeakKeyDictionary[Any, dict[Any, Layout | None]] = weakref.WeakKeyDictionary()


def _layout(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> Layout | None:
    is_partial = any(placement.is_partial() for placement in placements)
    # In some versions of torch, _StridedShard does not derive from Shard; both have a dimension.
    split = {i: placement for i, placement in enumerate(placements) if getattr(placement, "dim", None) is not None}
    if not split and not is_partial:
        return None
    found = mesh.get_coordinate()
    coordinate = [0] * mesh.ndim if found is None else found
    shard, shards, strided = 0, 1, False
    for i, placement in split.items():
        shard, shards = shard * mesh.size(i) + coordinate[i], shards * mesh.size(i)
        strided = strided or hasattr(placement, "split_factor")
    offsets: list[int] = [0] * len(shape)
    sizes = list(shape)
    boundaries: list[frozenset[int] | None] = [frozenset({0, size}) for size in shape] or [frozenset({0})]
    for i, placement in split.items():
        dim = placement.dim % len(shape)
        if strided:
            boundaries[dim] = None
            continue
        if (known := boundaries[dim]) is not None:
            boundaries[dim] = frozenset(chunk_boundaries(set(known), mesh.size(i)))
        chunk = -(-sizes[dim] // mesh.size(i)) if sizes[dim] else 0
        start = min(chunk * coordinate[i], sizes[dim])
        offsets[dim] += start
        sizes[dim] = min(chunk, sizes[dim] - start)
    ranks = tuple(sorted(int(rank) for rank in mesh.mesh.flatten().tolist()))
    return Layout(
        shape=shape,
        ranks=ranks,
        device_type=mesh.device_type,
        is_first_copy=not any(coordinate[i] for i in range(mesh.ndim) if i not in split),
        shard=None if found is None else shard,
        shards=shards,
        offsets=None if strided else tuple(offsets),
        boundaries=boundaries[-1],
        is_partial=is_partial,
        row_boundaries=boundaries[-2] if len(shape) > 1 else None,
    )


def chunk_boundaries(boundaries: set[int], parts: int) -> set[int]:
    """Split each piece between two boundaries into ``parts`` chunks, as torch.chunk does, and return all boundaries."""
    ordered = sorted(boundaries)
    found = set(ordered)
    for start, stop in itertools.pairwise(ordered):
        chunk = -(-(stop - start) // parts)
        found.update(range(start, stop, chunk))
    return found
