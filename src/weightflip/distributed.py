"""Many processes: how a weight lies on them, and every collective there is.

Works where ``torch.distributed`` is not initialised, or not built: then there are no shards and one process, which
writes. Nothing here is remembered but process groups.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

Span = Literal["tensor", "row", "block"]

PATIENCE = timedelta(seconds=60)
"""How long a process whose sharded weights have become others waits for the rest to come and compare."""


@dataclass(frozen=True)
class Layout:
    """How a sharded weight lies on processes, seen from this one.

    Attributes:
        shape: Of the whole weight.
        ranks: The processes that hold it, ascending.
        device_type: Where these processes talk to each other.
        is_first_copy: Whether this process holds a first copy, of a weight that is also replicated.
        shard: The number of this process's shard, from 0; None where it is none of ``ranks``.
        shards: How many there are.
        offsets: Where the shard begins in each dimension; None where it is no block of the weight.
        borders: In the last dimension, where shards begin and end; None where that is not known.
        is_partial: Whether the processes hold summands instead of parts.
        row_borders: As ``borders``, in the last dimension but one.
    """

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    device_type: str
    is_first_copy: bool
    shard: int | None
    shards: int
    offsets: tuple[int, ...] | None
    borders: frozenset[int] | None
    is_partial: bool
    row_borders: frozenset[int] | None = None

    @property
    def cuts_rows(self) -> bool:
        """Whether parts of one row lie on different processes."""
        return self.borders is None or len(self.borders) > 2

    def cuts_groups(self, group: int) -> bool:
        """Whether parts of one group of neighbours in the last dimension do."""
        return self.borders is None or (self.cuts_rows and any(border % group for border in self.borders))

    def cuts_blocks(self, rows: int, columns: int) -> tuple[bool, bool]:
        """Whether parts of one block do: cut between its rows, and between its columns. The last may be smaller."""

        def cuts(borders: frozenset[int] | None, size: int) -> bool:
            return borders is None or any(border % size for border in borders if border != max(borders))

        return rows > 1 and len(self.shape) > 1 and cuts(self.row_borders, rows), cuts(self.borders, columns)


def _is_available() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_writer() -> bool:
    """Whether this process writes records: the first one of the default group, or the only one."""
    return not _is_available() or torch.distributed.get_rank() == 0


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor may lie on several processes."""
    # Whoever has a DTensor has imported its module, which takes as long as the half of torch.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


class Identity:
    """Which tensor object this is, told without holding the tensor.

    Once a tensor is gone its id may be given to another one, on one process and not on another, and then processes
    would disagree on whether their weights have been replaced. The attribute dictionary of a tensor is its own for as
    long as either lives, so it is held instead. It holds what was attached to the tensor, and not its data.
    """

    __slots__ = ("_attributes",)

    def __init__(self, tensor: Tensor) -> None:
        self._attributes = tensor.__dict__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self._attributes is other._attributes

    def __hash__(self) -> int:
        return id(self._attributes)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    # Not to_local(): under autograd that is a view with a version counter of its own.
    shard: Any = cast(Any, tensor)._local_tensor
    return cast(Tensor, shard.trigger_wait() if hasattr(shard, "trigger_wait") else shard)


def first_row(parameter: Tensor) -> int:
    """Where this process's shard begins in the last dimension but one; 0 where that is not known."""
    lies = layout(parameter)
    return 0 if lies is None or lies.offsets is None or len(lies.offsets) < 2 else lies.offsets[-2]


def local_gradient(gradient: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a gradient.

    Raises:
        ValueError: It does not lie on the processes as its weight does.
    """
    if not is_dtensor(gradient):
        return gradient
    theirs, ours = cast(Any, gradient).placements, getattr(parameter, "placements", None)
    if ours is not None and tuple(theirs) != tuple(ours):
        raise ValueError(
            f"the gradient lies on the processes as {_text(theirs)}, its weight as {_text(ours)}: updates cannot be "
            "counted shard by shard; use metrics=('flips',)"
        )
    return local(gradient)


def layout(parameter: Tensor) -> Layout | None:
    """How a weight lies on processes; None where each holds all of it, and no process has to ask another."""
    if not is_dtensor(parameter):
        return None
    tensor = cast(Any, parameter)
    mesh, key = tensor.device_mesh, (tuple(tensor.shape), tuple(tensor.placements))
    known = _layouts.setdefault(mesh, {})
    if key not in known:
        known[key] = _layout(key[0], mesh, key[1])
    found = known[key]
    if found is not None and found.shard is not None and mesh.ndim == 1 and _is_available():
        groups, place = _groups_of_now(), (found.device_type, found.ranks)
        if place not in groups:
            group = mesh.get_group()
            groups[place] = None if group is torch.distributed.group.WORLD else group
    return found


# Of meshes that are in use.
_layouts: weakref.WeakKeyDictionary[Any, dict[Any, Layout | None]] = weakref.WeakKeyDictionary()


def _layout(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> Layout | None:
    is_partial = any(placement.is_partial() for placement in placements)
    # _StridedShard is no Shard in every version of torch; both have a dimension.
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
    borders: list[frozenset[int] | None] = [frozenset({0, size}) for size in shape] or [frozenset({0})]
    for i, placement in split.items():
        dim = placement.dim % len(shape)
        if strided:
            borders[dim] = None
            continue
        if (known := borders[dim]) is not None:
            borders[dim] = frozenset(_cut(set(known), mesh.size(i)))
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
        borders=borders[-1],
        is_partial=is_partial,
        row_borders=borders[-2] if len(shape) > 1 else None,
    )


def _cut(borders: set[int], parts: int) -> set[int]:
    """Each piece between two borders in ``parts`` chunks, as torch.chunk makes them."""
    ordered = sorted(borders)
    found = set(ordered)
    for start, stop in itertools.pairwise(ordered):
        chunk = -(-(stop - start) // parts)
        found.update(range(start, stop, chunk))
    return found


def _text(placements: Iterable[Any]) -> str:
    return ", ".join(str(placement) for placement in placements)


def span(layout: Layout, quantizer: Any) -> Span | None:
    """Over what processes have to add up what they know before a quantizer can encode its shards.

    Args:
        layout: How the weight lies.
        quantizer: ``scope`` says how much of a weight one code depends on (``"element"``, ``"group"``, ``"row"``,
            ``"tensor"``, or ``"block"``, of as many rows and columns as ``tile`` says), ``group`` how many neighbours
            are one, and ``has_statistic`` whether it can say what has to be known of a whole block, row or tensor.

    Returns:
        None where each process can encode its shard alone.

    Raises:
        ValueError: The codes of a shard cannot be those of the whole weight; with the reason.
    """
    scope, group = quantizer.scope, quantizer.group
    if layout.shard is None:
        raise ValueError(f"it lies on processes {', '.join(map(str, layout.ranks))}, of which this is none")
    if layout.is_partial:
        raise ValueError("each process holds a summand of it (Partial), and none a weight")
    if scope is None:
        raise ValueError(
            f"it is sharded, and {quantizer} does not say how much of a weight one code depends on; where it may be "
            "encoded shard by shard, give the quantizer scope = 'element' or 'row'"
        )
    if scope == "block":
        return _span_of_blocks(layout, quantizer)
    if group is not None and layout.cuts_groups(group):
        raise ValueError(
            f"its shards cut the groups of {group} neighbours that share a scale in {quantizer}: the last dimension of "
            f"shape {layout.shape} is cut at {sorted(layout.borders or ()) or 'places that are not multiples'}"
        )
    if scope in ("element", "group") or (scope == "row" and not layout.cuts_rows):
        return None
    if not quantizer.has_statistic:
        raise ValueError(
            f"it is sharded, and {quantizer} needs whole {'rows' if scope == 'row' else 'tensors'}, of which a process "
            "holds a part; leave it out with exclude=, or name another format in quantizer="
        )
    if scope == "row" and layout.offsets is None:
        raise ValueError(f"its rows are cut by shards in a way that {quantizer} cannot follow; name another format")
    return cast(Span, scope)


def _span_of_blocks(layout: Layout, quantizer: Any) -> Span | None:
    rows, columns = quantizer.tile
    cuts_rows, cuts_columns = layout.cuts_blocks(rows, columns)
    if cuts_columns:
        raise ValueError(
            f"its shards cut the blocks of {rows} x {columns} that share a scale in {quantizer}: the last dimension of "
            f"shape {layout.shape} is cut at {sorted(layout.borders or ()) or 'places that are not multiples'}"
        )
    if cuts_rows and layout.offsets is None:
        raise ValueError(f"its blocks are cut by shards in a way that {quantizer} cannot follow; name another format")
    return "block" if cuts_rows else None


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


# Default group to the groups of its time, by device type and ranks; None for itself, since a value that held its key
# would keep it. All go with destroy_process_group().
_groups: weakref.WeakKeyDictionary[Any, dict[tuple[str, tuple[int, ...]], Any]] = weakref.WeakKeyDictionary()


def _groups_of_now() -> dict[tuple[str, tuple[int, ...]], Any]:
    world = torch.distributed.group.WORLD
    if world is None:
        raise RuntimeError(
            "weights lie on several processes, and there is no process group to add them up; call close() before "
            "torch.distributed.destroy_process_group()"
        )
    return _groups.setdefault(world, {})


def _group(team: Team) -> Any:
    """The mesh's own group, where it has one dimension; else the default group, or one that is made now."""
    groups, key = _groups_of_now(), (team.device_type, team.ranks)
    if key not in groups:
        is_all = len(team.ranks) == torch.distributed.get_world_size()
        groups[key] = None if is_all else torch.distributed.new_group(list(team.ranks), use_local_synchronization=True)
    return groups[key] or torch.distributed.group.WORLD


def _all_reduce_(numbers: Tensor, team: Team, operation: Literal["SUM", "MAX"]) -> None:
    torch.distributed.all_reduce(numbers, getattr(torch.distributed.ReduceOp, operation), group=_group(team))


def agree(description: str, team: Team) -> bool:
    """Whether all processes of the team say the same. One collective, of 16 bytes."""
    digest = int.from_bytes(hashlib.sha256(description.encode()).digest()[:7], "big")
    numbers = torch.tensor([digest, -digest], dtype=torch.int64, device=team.device)
    _all_reduce_(numbers, team, "MAX")
    largest, smallest = numbers.tolist()
    return bool(largest == -smallest)


# Default group to how often processes have met, by what they met about.
_meetings: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()


def have_all_come(layouts: Iterable[Layout], about: str) -> bool:
    """Whether all processes that hold parts of these weights come here within ``PATIENCE``; the same answer on each.

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
        here, end = (f"weightflip/{place}/{meetings[place]}/{key}" for key in ("here", "end"))
        if store.add(here, 1) == len(team.ranks):
            store.compare_set(end, "", "all")
        else:
            try:
                store.wait([end], PATIENCE)
            except RuntimeError:
                # The one that gives up decides for those that come late.
                store.compare_set(end, "", "some")
        if store.get(end) != b"all":
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
        _all_reduce_(flag, team, "MAX")
    return flag.view(()) != 0


def add_up(numbers: Sequence[float], team: Team) -> list[float]:
    """The sum over the processes of the team, number by number. One collective, of 8 bytes a number (float64)."""
    packed = torch.tensor(numbers, dtype=torch.float64, device=team.device)
    _all_reduce_(packed, team, "SUM")
    return cast("list[float]", packed.tolist())


class Statistic(NamedTuple):
    """What has to be known of a whole weight: its place in the one collective of a step.

    Attributes:
        layout: How the weight lies.
        span: One number for the tensor, or one for each row or block.
        reduction: ``"max"`` or ``"mean"``; means are over the tensor.
        tile: Rows and columns of a block.
    """

    layout: Layout
    span: Span
    reduction: Literal["max", "mean"]
    tile: tuple[int, int] | None = None

    @property
    def numbers(self) -> int:
        """How many it takes."""
        if self.reduction == "mean":
            return self.layout.shards
        if self.span == "block":
            return math.prod(self._grid)
        return 1 if self.span == "tensor" else math.prod(self.layout.shape[:-1])

    def part(self, slots: Tensor, like: Tensor) -> Tensor:
        """Of this statistic's part of the table, what belongs to this process's shard, as a view.

        Args:
            slots: Of ``numbers`` elements.
            like: The statistic of the shard: 0-dim, or of shape ``(..., 1)``.
        """
        if self.reduction == "mean":
            assert self.layout.shard is not None
            return slots[self.layout.shard]
        if self.span == "tensor":
            return slots[0]
        assert self.layout.offsets is not None
        rows = zip(self.layout.offsets, like.shape[:-1], strict=False)
        return slots.view(self.layout.shape[:-1])[tuple(slice(start, start + size) for start, size in rows)].unsqueeze(
            -1
        )

    @property
    def _grid(self) -> tuple[int, ...]:
        """How many blocks there are in each dimension."""
        assert self.tile is not None
        *outer, rows, columns = self.layout.shape
        return *outer, -(-rows // self.tile[0]), -(-columns // self.tile[1])

    def blocks(self, slots: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of this statistic's part of the table, the blocks in this process's columns, and that of each of its rows.

        Args:
            slots: Of ``numbers`` elements.
            like: The statistic of the shard: of each row in each block.

        Returns:
            A view of the shape ``(..., rows of blocks, columns of blocks)``, and for each row of ``like`` an index.
        """
        assert self.tile is not None
        assert self.layout.offsets is not None
        *outer, row, column = self.layout.offsets
        first = column // self.tile[1]
        place = [slice(start, start + size) for start, size in zip(outer, like.shape[:-2], strict=True)]
        place += [slice(None), slice(first, first + like.shape[-1])]
        view = slots.view(self._grid)[tuple(place)]
        return view, torch.arange(row, row + like.shape[-2], device=slots.device) // self.tile[0]


class StatisticsTable:
    """What the quantizers of sharded weights have to know of them, brought together in one collective a step.

    All numbers are magnitudes, so that as float64 their bits, taken for integers, have their order, with NaN above all:
    an integer maximum keeps NaN, which the maximum of floating-point numbers loses on some backends. A mean has a
    place for each shard, and is added up here, in the order of the shards: it is the same on each process.

    One more number a weight says that this process cannot tell its codes before the step (1), or has given the weight
    up (2): then the step is not counted, on any process.

    Args:
        statistics: Of each weight, in the same order on each process.
        team: The processes.
    """

    def __init__(self, statistics: Sequence[Statistic], team: Team) -> None:
        self.team = team
        self._statistics = list(statistics)
        sizes = [statistic.numbers for statistic in statistics]
        self._values = torch.zeros(sum(sizes) + len(sizes), dtype=torch.float64, device=team.device)
        self._slots = list(torch.split(self._values, [*sizes, len(sizes)]))
        self._flags = self._slots.pop()

    @property
    def nbytes(self) -> int:
        """Bytes that each process hands in."""
        return self._values.nbytes

    def clear(self) -> None:
        """Begin a new collection. What was handed out is no longer valid."""
        self._values.zero_()

    def put(self, index: int, statistic: Tensor, weights: int) -> None:
        """Hand in what this process knows of a weight.

        Args:
            index: Which weight.
            statistic: Of this process's shard.
            weights: How many weights that has.
        """
        if not weights:
            return
        known = self._statistics[index]
        if known.reduction == "mean":
            statistic = statistic.double() * (weights / math.prod(known.layout.shape))
        if known.span == "block":
            view, rows = known.blocks(self._slots[index].view(torch.int64), statistic)
            bits = statistic.to(view.device, torch.float64).view(torch.int64) & torch.iinfo(torch.int64).max
            view.scatter_reduce_(-2, rows.unsqueeze(-1).expand_as(bits), bits, "amax")
            return
        known.part(self._slots[index], statistic).copy_(statistic)

    def flag(self, index: int, reason: int) -> None:
        """Say that a weight cannot be counted in this step: 1, not before it; 2, given up."""
        self._flags[index] = reason

    def reduce(self) -> None:
        """The collective."""
        bits = self._values.view(torch.int64)
        bits.bitwise_and_(torch.iinfo(torch.int64).max)
        _all_reduce_(bits, self.team, "MAX")

    def get(self, index: int, like: Tensor) -> Tensor:
        """The statistic of the whole weight, or of its rows in this process's shard, in ``like``'s dtype and device.

        Args:
            index: Which weight.
            like: What this process handed in.
        """
        known, slots = self._statistics[index], self._slots[index]
        if known.span == "block":
            view, rows = known.blocks(slots, like)
            found = view.index_select(-2, rows)
        else:
            found = slots.sum() if known.reduction == "mean" else known.part(slots, like)
        return found.to(like.device, like.dtype, copy=True)

    @property
    def is_counted(self) -> Tensor:
        """Of each weight, whether no process has flagged it: bool, on the team's device."""
        return self._flags == 0


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
