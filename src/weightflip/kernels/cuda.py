"""One pass over many weights on a GPU, as a Triton kernel: encode, compare, count and store, with nothing in between.

Imported only where Triton is, which comes with torch's builds for CUDA. Under ``TRITON_INTERPRET=1`` Triton runs the
same kernels on the CPU, slowly: that is how they are tested where there is no GPU.

A program handles a tile: some scales' groups of weights, and some neighbors of each. A table on the device tells where
each stretch of memory lies, and a list which stretch a tile belongs to; both are made once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from weightflip.kernels.constants import constants
from weightflip.kernels.pointwise import Pointwise
from weightflip.kernels.runs import (
    Addresses,
    Kind,
    Observed,
    ScaleCodes,
    Scaling,
    StoredScales,
    Stretch,
    upload,
)

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"

_ELEMENTS_PER_TILE = 1 << 12
# Adjacent elements in a tile, if there are enough: whole cache lines, even of one-byte codes.
_NEIGHBORS = 128
_WARPS = 8
# The number of bytes that a thread can read at once.
_ALIGNMENT = 16

_STORED = {torch.float32: tl.int32, torch.bfloat16: tl.int16, torch.float16: tl.float16}
_CODES = {torch.int8: tl.int8, torch.int16: tl.int16}
_BITS = {torch.float32: tl.int32, torch.bfloat16: tl.int16, torch.float16: tl.int16, torch.bool: tl.int8}
_MAGNITUDE = {tl.int32: 0x7FFFFFFF, tl.int16: 0x7FFF, tl.int8: 0x7F}

# Columns of the table: see ``_tile``.
_COLUMNS = tl.constexpr(6)


@triton.jit
def _tile(places, tiles, rows: tl.constexpr, columns: tl.constexpr, is_aligned: tl.constexpr):
    """Locate this program's tile: stretch, weight and codes, first scale, groups, elements, and a mask of the elements.

    The last result says whether the tile has the first elements of its groups, which may span several tiles.
    """
    stretch = tl.load(tiles + tl.program_id(0)).to(tl.int64)
    place = places + stretch * _COLUMNS
    weight, codes = tl.load(place), tl.load(place + 1)
    numel, group = tl.load(place + 2), tl.load(place + 3)
    first_scale, first_tile = tl.load(place + 4), tl.load(place + 5)
    if is_aligned:
        numel, group = tl.multiple_of(numel, 16), tl.multiple_of(group, 16)
    tile = tl.program_id(0) - first_tile
    across = tl.cdiv(group, columns)
    groups = (tile // across) * rows + tl.arange(0, rows)
    within = (tile % across) * columns + tl.arange(0, columns)
    elements = groups[:, None] * group + within[None, :]
    is_there = (elements < numel) & (within < group)[None, :]
    return stretch, weight, codes, first_scale, groups, elements, is_there, tile % across == 0


@triton.jit
def _pointers(address, elements, dtype: tl.constexpr, is_aligned: tl.constexpr):
    pointers = address.to(tl.pointer_type(dtype)) + elements
    if is_aligned:
        # Set the hint for all elements: the compiler does not derive it from the address.
        pointers = tl.multiple_of(pointers, [1, 16])
    return pointers


@triton.jit
def _float32_bits(address, elements, is_there, stored: tl.constexpr, is_aligned: tl.constexpr):
    """Load weights as the bits of float32; 0 outside of the tile's elements."""
    weight = tl.load(_pointers(address, elements, stored, is_aligned), mask=is_there, other=0)
    if stored == tl.int16:
        # bfloat16 is the upper half of float32.
        bits = weight.to(tl.int32) << 16
    else:
        bits = weight.to(tl.float32).to(tl.int32, bitcast=True) if stored == tl.float16 else weight
    return bits


@triton.jit
def _largest(
    places,
    tiles,
    largest,
    stored: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    is_aligned: tl.constexpr,
):
    _, weight, _, first_scale, groups, elements, is_there, _ = _tile(places, tiles, rows, columns, is_aligned)
    # Bit patterns of numbers without a sign are ordered like the numbers, with NaN above all of them.
    found = tl.max(_float32_bits(weight, elements, is_there, stored, is_aligned) & 0x7FFFFFFF, axis=1)
    has_any = tl.max(is_there.to(tl.int32), axis=1) != 0
    tl.atomic_max(largest + first_scale + groups, found, mask=has_any, sem="relaxed")


@triton.jit(do_not_specialize=["stride", "cut", "offset", "first_normal", "adder", "overflow", "largest", "nan"])
def _count(
    places,
    tiles,
    scales,
    updates,
    counts,
    counted,
    new_scales,
    stored_scales,
    scale_changes,
    stride,
    cut,
    offset,
    first_normal,
    adder,
    overflow,
    largest,
    nan,
    stored: tl.constexpr,
    coded: tl.constexpr,
    has_rows: tl.constexpr,
    has_scale_codes: tl.constexpr,
    updated: tl.constexpr,
    update_mask: tl.constexpr,
    is_scaled: tl.constexpr,
    divides: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    is_aligned: tl.constexpr,
):
    stretch, weight, codes, first_scale, groups, elements, is_there, is_first = _tile(
        places, tiles, rows, columns, is_aligned
    )
    # Load before storing the codes: a load that waits for a store takes as long as the rest of the kernel.
    row = tl.load(counted + stretch) if has_rows else stretch
    if has_scale_codes:
        counts_scale = (tl.max(is_there.to(tl.int32), axis=1) != 0) & is_first
        at = first_scale + groups
        new = tl.load(new_scales + at, mask=counts_scale, other=0).to(stored_scales.dtype.element_ty)
        has_changed = (tl.load(stored_scales + at, mask=counts_scale, other=0) != new) & counts_scale
    scaled = _float32_bits(weight, elements, is_there, stored, is_aligned).to(tl.float32, bitcast=True)
    if is_scaled:
        has_any = tl.max(is_there.to(tl.int32), axis=1) != 0
        scale = tl.load(scales + first_scale + groups, mask=has_any, other=1.0)[:, None]
        # `/` is approximate on a GPU.
        scaled = tl.div_rn(scaled, scale) if divides else scaled * scale
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # The same as weightflip.quantizers.floatx.round_to_ordinals, which explains it.
    is_odd = ((magnitude >> cut) - offset) & 1
    normal = ((magnitude + ((1 << (cut - 1)) - 1) + is_odd) >> cut) - offset
    raised = magnitude.to(tl.float32, bitcast=True) + adder.to(tl.float32, bitcast=True)
    subnormal = raised.to(tl.int32, bitcast=True) - adder
    code = tl.minimum(tl.where(magnitude < first_normal, subnormal, normal), overflow)
    code = tl.where(bits < 0, -code, tl.minimum(code, largest))
    code = tl.where(magnitude > 0x7F800000, nan, code).to(coded)

    kept = _pointers(codes, elements, coded, is_aligned)
    has_flipped = (tl.load(kept, mask=is_there, other=0) != code) & is_there
    tl.store(kept, code, mask=is_there)
    count = counts + row * stride
    if has_scale_codes:
        tl.store(stored_scales + at, new, mask=counts_scale)
        tl.atomic_add(scale_changes + row * stride, tl.sum(has_changed.to(tl.int32)).to(tl.int64), sem="relaxed")
    tl.atomic_add(count, tl.sum(has_flipped.to(tl.int32)).to(tl.int64), sem="relaxed")
    if updated is not None:
        update = tl.load(updates + stretch)
        if update != 0:
            stored_update = tl.load(_pointers(update, elements, updated, is_aligned), mask=is_there, other=0)
            is_updated = (stored_update & update_mask) != 0
            is_stalled = is_updated & (has_flipped == 0)
            tl.atomic_add(count + 1, tl.sum(is_updated.to(tl.int32)).to(tl.int64), sem="relaxed")
            tl.atomic_add(count + 2, tl.sum(is_stalled.to(tl.int32)).to(tl.int64), sem="relaxed")


class _Launch(NamedTuple):
    """Stretches whose tiles have one shape.

    Attributes:
        stretches: Indices of the stretches, a NumPy array.
        tiles: The stretch of each tile, int32.
        columns: The number of adjacent elements in a tile.
        is_aligned: Whether wide reads are possible.
    """

    stretches: Any
    tiles: Tensor
    columns: int
    is_aligned: bool


class Run:
    """A :class:`weightflip.kernels.runs.Run` for CUDA devices. It never synchronizes with the device."""

    saves_calls = True
    observes = False
    samples = None
    longest_group = 0
    widest_block = 0

    def __init__(self, stretches: Sequence[Stretch], kind: Kind) -> None:
        self.kind, self.device = kind, kind.device
        table = np.array(stretches, dtype=np.int64)
        numel, group = table[:, 2], table[:, 3]
        scales = -(-numel // group)
        self._scales = int(scales.sum())
        places = np.zeros((len(table), _COLUMNS.value), dtype=np.int64)
        places[:, :4] = table[:, :4]
        places[1:, 4] = scales[:-1].cumsum()

        alike: dict[tuple[int, bool], list[int]] = {}
        for index, stretch in enumerate(stretches):
            alike.setdefault((_columns(stretch.group, int(scales[index])), _is_aligned(stretch)), []).append(index)
        self._launches = []
        for (columns, is_aligned), indices in alike.items():
            tiles = _tiles(group[indices], scales[indices], columns)
            places[indices, 5] = tiles.cumsum() - tiles
            stretch_of = torch.from_numpy(np.repeat(np.array(indices, dtype=np.int32), tiles))
            self._launches.append(_Launch(np.array(indices), upload(stretch_of, kind.device), columns, is_aligned))
        self._places = upload(torch.from_numpy(places), kind.device)
        self._updates: tuple[Addresses, int, Tensor] | None = None

    @staticmethod
    def can_do(kind: Kind, *, scaled: bool, groups: tuple[Pointwise, ...] = ()) -> bool:
        return (
            not groups
            and constants(kind.rounding) is not None
            and kind.weight in _STORED
            and kind.codes in _CODES
            and (kind.update is None or kind.update in _BITS)
        )

    @staticmethod
    def can_scale(kind: Kind, scaling: Scaling) -> bool:
        return False

    @staticmethod
    def keep(codes: Tensor, new: Tensor) -> Tensor | None:
        return None

    def factors(self, scaling: Scaling) -> Tensor:
        raise NotImplementedError("this kernel does not compute scales")

    def count_groups_into_(
        self,
        counts: Tensor,
        rows: Tensor,
        scaling: Scaling,
        updates: Addresses | None,
        stored: StoredScales | None = None,
        largest: Tensor | None = None,
    ) -> None:
        raise NotImplementedError("this kernel does not compute the scales of groups")

    def largest(self) -> Tensor:
        bits = torch.zeros(self._scales, dtype=torch.int32, device=self.device)
        for launch in self._launches:
            self._start(_largest, launch, launch.is_aligned, bits, stored=_STORED[self.kind.weight])
        return bits.view(torch.float32)

    def count_(self, scale: Tensor | None, updates: Addresses | None) -> Tensor:
        counts = torch.zeros(len(self._places), 3, dtype=torch.int64, device=self.device)
        self.count_into_(counts, None, scale, updates)
        return counts

    def count_into_(
        self,
        counts: Tensor,
        rows: Tensor | None,
        scale: Tensor | None,
        updates: Addresses | None,
        scale_codes: ScaleCodes | None = None,
        observed: Observed | None = None,
    ) -> None:
        numbers = constants(self.kind.rounding)
        assert numbers is not None
        updated = None if self.kind.update is None or updates is None else _BITS[self.kind.update]
        addresses = counts if updates is None else self._uploaded(updates)
        assert scale_codes is None or scale_codes.changes.stride(0) == counts.stride(0)
        for launch in self._launches:
            is_aligned = launch.is_aligned
            if updates is not None:
                is_aligned = is_aligned and not (updates[launch.stretches] % _ALIGNMENT).any()
            self._start(
                _count,
                launch,
                is_aligned,
                counts if scale is None else scale,
                addresses,
                counts,
                counts if rows is None else rows,
                *((counts, counts, counts) if scale_codes is None else scale_codes),
                counts.stride(0),
                *(int(number.view(np.int32)) for number in numbers),
                stored=_STORED[self.kind.weight],
                coded=_CODES[self.kind.codes],
                has_rows=rows is not None,
                has_scale_codes=scale_codes is not None,
                updated=updated,
                update_mask=0 if updated is None else _MAGNITUDE[updated],
                is_scaled=scale is not None,
                divides=self.kind.rounding.divides,
            )

    def _uploaded(self, updates: Addresses) -> Tensor:
        """Copy addresses to the device, or reuse the last copy, because gradients often stay in place."""
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        kept = self._updates
        # A tensor must not be read in another stream than its own, since it could be freed too early.
        if kept is None or kept[1] != stream or not np.array_equal(kept[0], updates):
            # A copy, because the caller may write to its array. One tuple, so that an interrupt leaves it consistent.
            addresses = updates.copy()
            kept = self._updates = addresses, stream, upload(torch.from_numpy(addresses), self.device)
        return kept[2]

    def _start(self, kernel: Any, launch: _Launch, is_aligned: bool, *arguments: Any, **options: Any) -> None:
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            kernel[(len(launch.tiles),)](
                self._places,
                launch.tiles,
                *arguments,
                **options,
                rows=_ELEMENTS_PER_TILE // launch.columns,
                columns=launch.columns,
                is_aligned=is_aligned,
                num_warps=_WARPS,
                # Round a product before adding to it, as in plain torch.
                enable_fp_fusion=False,
            )


def _columns(group: int, groups: int) -> int:
    """Return the number of adjacent elements in a tile that leads to the fewest tiles."""
    width, widths = min(_NEIGHBORS, 1 << (group - 1).bit_length(), _ELEMENTS_PER_TILE), []
    while width <= _ELEMENTS_PER_TILE:
        widths.append(width)
        width *= 2
    return min(reversed(widths), key=lambda width: _tiles(group, groups, width))


def _tiles(group: Any, groups: Any, columns: int) -> Any:
    return -(-group // columns) * -(-groups // (_ELEMENTS_PER_TILE // columns))


def _is_aligned(stretch: Stretch) -> bool:
    return all(number % _ALIGNMENT == 0 for number in (stretch.weight, stretch.codes, stretch.numel, stretch.group))
