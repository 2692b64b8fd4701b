"""Count many weights with a few kernel calls, because the calls for small weights cost more than the work."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from weightflip import functional, kernels
from weightflip.counting.observations import DueGroups, KeptScale, Observation, Observations, ScaleSlice
from weightflip.counting.quantizer_cache import Keyed
from weightflip.counting.scale_table import ScaleTable, get_scale_table
from weightflip.counting.scaling import get_scaling, in_plain_torch
from weightflip.formats import ScaleFormula

# Maximum elements of a run: enough that starting threads costs little (2M took a third longer), and few enough that
# its block scales stay small: 4 MiB for blocks of 16.
_ELEMENTS_PER_RUN = 1 << 24

# Pieces of large weights begin at multiples of this, so that a state with one bit per weight begins with a whole word.
_ELEMENTS_PER_WORD = 32


class Batchable(functional.Elementwise, Keyed, Protocol):
    """The part of an elementwise quantizer that a batch needs."""

    name: str
    group: int | None
    tile: tuple[int, int] | None

    @property
    def scope(self) -> str | None: ...

    @property
    def only_needs_amax(self) -> bool: ...

    def scale_of(self, largest: Tensor) -> Tensor: ...

    def scale_codes(self, scale: Tensor) -> Tensor: ...

    def scale_rule(self, dtype: torch.dtype) -> ScaleFormula | Literal["steps"] | None: ...


@dataclass(eq=False)
class Member:
    """One weight of a batch, as addresses. The caller ensures that they are valid.

    Attributes:
        address: Address of the weight.
        numel: Number of elements.
        dtype: The dtype of the weight and of its update.
        codes: Ordinals with the layout of the weight; written to.
        scale_codes: Stored block scales, in their shape; written to. None for formats without block scales.
        quantizer: Encodes the weight.
        rounding: The quantizer's rounding of this weight.
        group: The number of adjacent weights that share a scale; 0 without scales. This and the next two are as in
            :class:`weightflip.kernels.Stretch`.
        width: The number of elements in a row if blocks over several rows share a scale; otherwise 0.
        height: The number of rows that share a scale.
        run: The kernel's class of runs.
        scaling: How the kernel computes the scales of groups in the pass that counts; None if it does not.
        scaling_before: The same for scales that are shared by too many weights for one pass; None if the quantizer
            computes them.
        scale_shape: Shape of the quantizer's scale.
        keeps_scale: Whether the scale of its codes is kept, for metric groups. The same for all members of a quantizer.
        places: The positions of the parts of that scale, for metric groups.
        observations: What metric groups compute for it; None if a kernel cannot do that.
    """

    address: int
    numel: int
    dtype: torch.dtype
    codes: Tensor
    scale_codes: Tensor | None
    quantizer: Batchable
    rounding: kernels.Rounding
    group: int
    width: int
    height: int
    run: type[kernels.Run]
    scaling: kernels.Scaling | None
    scale_shape: tuple[int, ...]
    scaling_before: kernels.Scaling | None = None
    keeps_scale: bool = False
    scale_slices: list[ScaleSlice] = field(default_factory=list)
    observations: tuple[Observation, ...] | None = ()

    @property
    def scale(self) -> Tensor | None:
        """The scale of the codes as the quantizer returned it; None if it was not kept."""
        parts = [part for scale_slice in self.scale_slices if (part := scale_slice.scale) is not None]
        if not parts:
            return None
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.scale_shape)

    def set_scale(self, scale: Tensor | None) -> None:
        """Set the scale of codes that were not made in a batch."""
        self.scale_slices = [] if scale is None else [ScaleSlice(KeptScale(scale.reshape(-1)), 0, scale.numel())]

    def can_be_observed(self, groups: tuple[kernels.Pointwise, ...], backend: str, *, with_updates: bool) -> bool:
        """Whether a kernel has been tested to compute what these metric groups need."""
        kind = kernels.Kind(
            self.dtype, self.dtype if with_updates else None, self.codes.dtype, self.rounding, self.codes.device
        )
        question = kernels.Question(kind, takes_scale=self.group != 0, finds_scale=False, groups=groups)
        return kernels.run_for(backend, question, functional.in_plain_torch(self.quantizer)) is not None

    def computed_scale(self, backend: str) -> Tensor | None:
        """Compute the scale of a weight whose scales the kernel makes in the pass that counts; None if it cannot.

        Args:
            backend: As in :func:`weightflip.kernels.check_backend`.
        """
        if self.scaling is None or self.quantizer.tile is not None:
            return None
        kind = kernels.Kind(self.dtype, None, self.codes.dtype, self.rounding, self.codes.device)
        question = kernels.Question(kind, takes_scale=True, finds_scale=True)
        if kernels.run_for(backend, question, functional.in_plain_torch(self.quantizer)) is None:
            return None
        whole = kernels.Stretch(self.address, self.codes.data_ptr(), self.numel, self.group, 0, 1)
        largest = self.run([whole], kind).largest()
        return self.quantizer.scale_of(largest.to(self.dtype)).view(self.scale_shape)

    @property
    def kind(self) -> tuple[Any, ...]:
        """The key by which members are grouped into one call."""
        return (
            self.quantizer.key,
            self.rounding,
            self.dtype,
            self.codes.dtype,
            self.group == 0,
            self.width == 0,
            self.scaling,
            self.scaling_before,
        )

    def count_scales(self, numel: int) -> int:
        """Return the number of scales for this many elements, which must start and end at scale boundaries."""
        if not self.width:
            return numel // self.group
        assert self.scale_codes is not None
        return self.scale_codes.numel() // self.matrices * (numel * self.matrices // self.numel)

    @property
    def matrices(self) -> int:
        """The number of matrices, each of which is divided into blocks."""
        return math.prod(self.codes.shape[:-2])

    def matches(self, weight: Tensor, quantizer: Any, codes: Tensor | None) -> bool:
        """Whether a weight is still in the same memory and encoded in the same way."""
        is_same_quantizer = self.quantizer is quantizer or (
            self.quantizer.key == quantizer.key and self.rounding == quantizer.rounding(weight)
        )
        return is_same_quantizer and (
            self.address == weight.data_ptr()
            and self.dtype is weight.dtype
            and self.codes is codes
            and self.codes.shape == weight.shape
            and weight.is_contiguous()
        )


def make_member(
    weight: Tensor, quantizer: Batchable, codes: Tensor, backend: str, *, with_updates: bool, observed: bool = False
) -> Member | None:
    """Return a weight as a member of a batch; None if it is not contiguous or no kernel supports it.

    Args:
        weight: The detached weight.
        quantizer: Encodes the weight.
        codes: Codes in the weight's shape.
        backend: As in :func:`weightflip.kernels.check_backend`.
        with_updates: Whether updates will be counted.
        observed: Whether metric groups run in steps. If so, the scales are computed before the weight is counted.
    """
    run, rounding = kernels.run(backend, weight.device), quantizer.rounding(weight)
    if run is None or rounding is None or not quantizer.only_needs_amax:
        return None
    if type(weight) is not Tensor or weight.numel() == 0 or weight.is_neg():
        return None
    if not weight.is_contiguous() or not codes.is_contiguous():
        return None
    if weight.data_ptr() == 0 or weight.data_ptr() % weight.element_size():
        return None
    group, width, height = _scale_layout(weight, quantizer)
    scale_codes = None
    if quantizer.group is not None:
        scale_codes = quantizer.scale_codes(weight.new_ones((), dtype=torch.float32))
        scale_codes = scale_codes.new_zeros(_shape_of_scale_codes(weight, quantizer))

    def is_usable(scaling: kernels.Scaling | None) -> bool:
        return all(
            kernels.run_for(
                backend,
                kernels.Question(
                    kernels.Kind(weight.dtype, update, codes.dtype, rounding, weight.device),
                    takes_scale=group > 0,
                    finds_scale=group > 0,
                    scaling=scaling,
                ),
                functional.in_plain_torch(quantizer),
                in_plain_torch(quantizer, weight.dtype),
            )
            for update in ((None, weight.dtype) if with_updates else (None,))
        )

    scaling = scaling_before = None
    fits = 0 < group * height <= run.longest_group and not (width and group > run.widest_block)
    if not observed and (fits or (group and run.longest_group and quantizer.group is None)):
        scaling = get_scaling(quantizer, rounding, weight.dtype, weight.device)
    if scaling is not None and not is_usable(scaling):
        scaling = None
    if not fits:
        scaling, scaling_before = None, scaling
    if observed and quantizer.tile is not None and quantizer.tile[0] > 1:
        # Metric groups expect one scale per group in each row.
        return None
    if scaling is None and (width or not is_usable(None)):
        # No other kernel supports blocks over several rows.
        return None
    place = weight.data_ptr(), weight.numel(), weight.dtype
    of_scales = scaling, _shape_of_scale(weight, quantizer), scaling_before
    return Member(*place, codes, scale_codes, quantizer, rounding, group, width, height, run, *of_scales)


def _scale_layout(weight: Tensor, quantizer: Batchable) -> tuple[int, int, int]:
    """Return group, width and height as in :class:`Member`."""
    columns = weight.shape[-1] if weight.ndim else 1
    if quantizer.tile is not None:
        height, across = quantizer.tile
        rows, across = weight.shape[-2] if weight.ndim > 1 else 1, min(across, columns)
        height = min(height, rows)
        # The elements of a block as wide as its matrix are adjacent in memory.
        is_flat = columns % across == 0 if height == 1 else columns == across and rows % height == 0
        return (across * height, 0, 1) if is_flat else (across, columns, height)
    if quantizer.group is not None:
        return quantizer.group, 0, 1
    return {"row": columns, "tensor": weight.numel()}.get(quantizer.scope or "", 0), 0, 1


def _shape_of_scale(weight: Tensor, quantizer: Batchable) -> tuple[int, ...]:
    if quantizer.group is not None:
        return (*quantizer.grouped(weight).shape[:-1], 1)
    return (*weight.shape[:-1], 1) if quantizer.scope == "row" and weight.ndim else ()


def _shape_of_scale_codes(weight: Tensor, quantizer: Batchable) -> tuple[int, ...]:
    """Return ``(..., blocks in a column, blocks in a row, 1)``."""
    assert quantizer.group is not None
    height, across = quantizer.tile or (1, quantizer.group)
    *rows, columns = weight.shape or (1,)
    if rows:
        rows[-1] = -(-rows[-1] // height)
    return (*rows, -(-columns // across), 1)


class Counted(NamedTuple):
    """The result of counting a batch, on its device.

    Attributes:
        counts: int64 of shape (rows, 3): flips, updates, stalled.
        scale_changes: int64 of shape (rows,): block scales whose stored value changed.
        failed: The index of each member that could not be counted, and the reason.
    """

    counts: Tensor
    scale_changes: Tensor
    failed: list[tuple[int, Exception]]


class Batch:
    """Weights that are counted together. Holds their codes, but not the weights.

    Args:
        members: The weights, on one device.
        with_updates: Whether updates are counted.
        is_persistent: Whether the batch is used for several steps. If so, the scale codes of its members are moved into
            one tensor, and the members must not be in another persistent batch at the same time.
        rows: The row of each member in the tables of :meth:`advance`; None: in the order of the members.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        with_updates: bool,
        is_persistent: bool = True,
        rows: Sequence[int] | None = None,
    ) -> None:
        self.members = list(members)
        rows = range(len(self.members)) if rows is None else rows
        self.with_updates = with_updates
        self._device = self.members[0].codes.device
        most = _ELEMENTS_PER_RUN if self._device.type == "cpu" else sys.maxsize
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for index, member in enumerate(self.members):
            kind = member.kind, tuple(observation.kind for observation in member.observations or ())
            kinds.setdefault(kind, []).append(index)
        self._groups: list[tuple[list[int], list[_Part]]] = []
        for indices in kinds.values():
            parts = [
                _Part(run, self.members, rows, with_updates=with_updates) for run in _runs(indices, self.members, most)
            ]
            if is_persistent:
                _concatenate_scale_codes(
                    [m.scale_codes for m in (self.members[i] for i in indices) if m.scale_codes is not None], parts
                )
            self._groups.append((indices, parts))
        self._is_persistent = is_persistent
        if is_persistent:
            self.adopt_scales()

    def adopt_scales(self) -> None:
        """Take over the current scales of the members, which then refer to the scales of this batch."""
        for part in self._scaled_parts:
            part.adopt_scale(self.members)
        self._assign_scales()

    def _assign_scales(self) -> None:
        for member in self.members:
            member.scale_slices = []
        for part in self._scaled_parts:
            part.assign_scale(self.members)

    @property
    def _scaled_parts(self) -> list[_Part]:
        return [part for _, parts in self._groups for part in parts if part.kept_scale is not None]

    def advance(
        self, updates: Sequence[int], out: tuple[Tensor, Tensor] | None = None, due: DueGroups | None = None
    ) -> Counted:
        """Encode all weights again, count the changes, and replace the old codes with the new ones.

        Args:
            updates: Addresses of the gradients, which must have the layout and dtype of the weights; 0 if there is no
                gradient. Ignored if updates are not counted.
            out: Tables to add to, as in :class:`Counted`; None for new ones with one row per member.
            due: The metric groups that are due; None for none.
        """
        if out is None:
            table = torch.zeros(len(self.members), 4, dtype=torch.int64, device=self._device)
            out = table[:, :3], table[:, 3]
        counts, scale_changes = out
        addresses = np.array(updates, dtype=np.int64) if self.with_updates else None
        failed: list[tuple[int, Exception]] = []
        for indices, parts in self._groups:
            try:
                for part in parts:
                    part.advance(addresses, counts, scale_changes, due)
            except Exception as error:
                failed += [(index, error) for index in indices]
        if not self._is_persistent:
            self._assign_scales()
        return Counted(counts, scale_changes, failed)


class _Piece(NamedTuple):
    """A member or a part of one."""

    member: int
    first: int
    numel: int


def _runs(indices: Sequence[int], members: Sequence[Member], elements: int) -> Iterator[list[_Piece]]:
    """Yield the pieces of each run. Large members are split at scale boundaries to keep runs near ``elements``."""
    run: list[_Piece] = []
    remaining = elements
    for index in indices:
        member = members[index]
        numel, matrix = member.numel, member.numel // member.matrices
        # A piece with blocks over several rows must not cross matrices.
        unit = matrix if member.width else math.lcm(member.group or 1, _ELEMENTS_PER_WORD)
        first = 0
        while first < numel:
            size = max(1, remaining // unit) * unit
            if size > remaining and run:
                size = 0
            if member.width:
                size = min(size, matrix)
            piece = _Piece(index, first, min(size, numel - first))
            if piece.numel:
                run.append(piece)
            first, remaining = first + piece.numel, remaining - piece.numel
            if remaining <= 0 or (first < numel and (not member.width or not piece.numel)):
                yield run
                run, remaining = [], elements
    if run:
        yield run


class _Part:
    """A run, and the positions of its pieces in the members."""

    def __init__(
        self,
        pieces: Sequence[_Piece],
        members: Sequence[Member],
        rows: Sequence[int],
        *,
        with_updates: bool,
    ) -> None:
        first = members[pieces[0].member]
        self.quantizer, self.dtype = first.quantizer, first.dtype
        self.is_scaled = first.group != 0
        self.scaling, self.scaling_before = first.scaling, first.scaling_before
        kind = kernels.Kind(
            first.dtype, first.dtype if with_updates else None, first.codes.dtype, first.rounding, first.codes.device
        )
        item, code = first.dtype.itemsize, first.codes.dtype.itemsize
        of_members = [(piece, members[piece.member]) for piece in pieces]
        self.run = first.run(
            [
                kernels.Stretch(
                    member.address + piece.first * item,
                    member.codes.data_ptr() + piece.first * code,
                    piece.numel,
                    member.group or piece.numel,
                    member.width,
                    member.height,
                )
                for piece, member in of_members
            ],
            kind,
        )
        self.members = [piece.member for piece in pieces]
        rows_of_pieces = torch.tensor([rows[member] for member in self.members], device="cpu")
        self.device_rows = kernels.upload(rows_of_pieces, first.codes.device)
        self.offsets = np.array([piece.first * item for piece in pieces], dtype=np.int64)
        self.has_offsets = bool(self.offsets.any())
        # The stored scales of these pieces; and all of them as one tensor, if a persistent batch has moved them there.
        self.scale_codes = [
            member.scale_codes.view(-1)[member.count_scales(piece.first) :][: member.count_scales(piece.numel)]
            for piece, member in of_members
            if member.scale_codes is not None
        ]
        self.joined_scale_codes: Tensor | None = None
        self.table: ScaleTable | None = None
        self.kept_scale = KeptScale() if first.keeps_scale else None
        self.scale_ranges = _scale_ranges(of_members) if first.keeps_scale else []
        self.scales = sum(number for _, number in self.scale_ranges)
        self.observations = Observations([(members[piece.member].observations or (), piece.first) for piece in pieces])
        if self.scale_codes and first.run.saves_calls and not first.keeps_scale:
            self.table = get_scale_table(first.quantizer, first.rounding, first.dtype, first.codes.device)

    def adopt_scale(self, members: Sequence[Member]) -> None:
        """Take over the current scales of the members."""
        assert self.kept_scale is not None
        scales = [members[member].scale for member in self.members] if self.is_scaled else []
        found = [
            scale.reshape(-1)[first : first + number]
            for scale, (first, number) in zip(scales, self.scale_ranges, strict=True)
            if scale is not None
        ]
        self.kept_scale = KeptScale()
        if found and len(found) == len(scales):
            scale = torch.cat(found)
            self.kept_scale.set(scale, self.quantizer.applied_scale(scale))

    def assign_scale(self, members: Sequence[Member]) -> None:
        """Let the members refer to the scales of this part."""
        assert self.kept_scale is not None
        start = 0
        for member, (_, number) in zip(self.members, self.scale_ranges, strict=False):
            members[member].scale_slices.append(ScaleSlice(self.kept_scale, start, number))
            start += number

    def advance(
        self, updates: kernels.Addresses | None, counts: Tensor, scale_changes: Tensor, due: DueGroups | None = None
    ) -> None:
        addresses = None
        if updates is not None:
            of_pieces = updates[self.members]
            addresses = np.where(of_pieces == 0, 0, of_pieces + self.offsets) if self.has_offsets else of_pieces
        old_factors = None if self.kept_scale is None else self.kept_scale.applied
        factors, new = self._scales() if self.scaling is None else (None, None)
        observed = None if due is None else self.observations.kernel_arguments(due)
        if observed is not None:
            if factors is not None and old_factors is None:
                raise RuntimeError("expected the scales from before the step, but there are none")
            observed = observed._replace(old_scale=old_factors)
        stored = self.joined_scale_codes
        if stored is None and self.scale_codes:
            stored = torch.cat(self.scale_codes)
        if self.scaling is not None:
            of_scales = None if stored is None else kernels.StoredScales(stored, scale_changes)
            largest = (
                None if self.kept_scale is None else torch.empty(self.scales, dtype=torch.float32, device=counts.device)
            )
            self.run.count_groups_into_(counts, self.device_rows, self.scaling, addresses, of_scales, largest)
            if self.kept_scale is not None and largest is not None:
                self.kept_scale.set(self.quantizer.scale_of(largest.to(self.dtype)))
        else:
            codes = None if new is None or stored is None else kernels.ScaleCodes(new, stored, scale_changes)
            self.run.count_into_(counts, self.device_rows, factors, addresses, codes, observed)
        if stored is not None and self.joined_scale_codes is None:
            torch._foreach_copy_(self.scale_codes, torch.split(stored, [codes.numel() for codes in self.scale_codes]))

    def _scales(self) -> tuple[Tensor | None, Tensor | None]:
        """Compute the scale factors and the stored scales; None for what the format does not have."""
        if not self.is_scaled:
            return self.quantizer.applied_scale(None), None
        if self.scaling_before is not None and self.kept_scale is None:
            return self.run.factors(self.scaling_before), None
        largest = self.run.largest()
        if self.table is not None:
            return self.table.look_up(largest)
        scale = self.quantizer.scale_of(largest.to(self.dtype))
        factors = self.quantizer.applied_scale(scale)
        if self.kept_scale is not None:
            self.kept_scale.set(scale, factors)
        return factors, self.quantizer.scale_codes(scale) if self.scale_codes else None


def _scale_ranges(pieces: Sequence[tuple[_Piece, Member]]) -> list[tuple[int, int]]:
    """Return for each piece its first scale in the member, and the number of its scales."""
    return [(piece.first // member.group, -(-piece.numel // member.group)) for piece, member in pieces if member.group]


def _concatenate_scale_codes(scale_codes: Sequence[Tensor], parts: Sequence[_Part]) -> None:
    """Move the scale codes of the members into one tensor, in order, and set the views of it that the parts have."""
    if not scale_codes:
        return
    whole, first = torch.cat([codes.view(-1) for codes in scale_codes]), 0
    for codes in scale_codes:
        # Change the tensor in place, because layers also hold it.
        codes.set_(whole[first : first + codes.numel()].view(codes.shape))  # type: ignore[call-overload]
        first += codes.numel()
    first = 0
    for part in parts:
        numel = sum(codes.numel() for codes in part.scale_codes)
        part.joined_scale_codes = whole[first : first + numel]
        part.scale_codes = list(torch.split(part.joined_scale_codes, [codes.numel() for codes in part.scale_codes]))
        first += numel
