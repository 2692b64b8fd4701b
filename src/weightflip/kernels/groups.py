"""A loop for Numba that computes the scales of small groups while it counts. Imported only if Numba is installed.

It finds the largest magnitude of a group, computes the scale, and encodes the group while it is still in the cache, so
that memory is read once. Its building blocks are in :mod:`weightflip.kernels.items`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray  # type: ignore[attr-defined]

from weightflip.kernels import items
from weightflip.kernels.items import (
    CODES,
    CODES_SIZE,
    COUNTS,
    FORMAT,
    GROUP,
    HEIGHT,
    ITEM,
    LANES_LOOP,
    MASK,
    NEXT,
    NUMEL,
    ROWS,
    SCALE,
    START,
    STRETCHES,
    STRIDE,
    TOTAL,
    UPDATE_SIZE,
    UPDATES,
    WEIGHT,
    WEIGHT_SIZE,
    WIDTH,
)
from weightflip.kernels.vectors import LANES

LARGEST_LOOP, SCALES_LOOP, RULE, STORED, STORED_SIZE, CHANGES, CHANGES_STRIDE, KEPT = range(items.TASK, items.TASK + 8)
"""The fields of a task in addition to those of :mod:`weightflip.kernels.items`: the addresses of
:func:`~items.largest_lanes` and of :func:`scales_by_formula` or :func:`scales_by_steps`, compiled for the dtypes; the
address of their argument ``rule``; the address of the stored scales, and the bytes per scale; the address of the counts
of changed scales, int64, and the bytes between two of them; the address at which the largest magnitudes of groups are
kept, float32, or 0."""
TASK = items.TASK + 8

MULTIPLIES, DIVIDES, INVERSE = range(3)
"""The forms of :class:`weightflip.formats.ScaleFormula`."""

LONGEST = 1 << 18
"""The number of elements in the largest group that stays in the cache until it is encoded: 1 MiB of float32."""

WIDEST = items._CHUNK
"""The same for one row of a block over several rows."""

_CHUNK, _SPARE, _SCALES_SIZE = items._CHUNK, items._SPARE, items._SCALES_SIZE
# Offsets after the scales of a chunk: the buffers for the remainder, the counts, the number of changed scales, the
# largest magnitudes, those of a row, and the scales of groups.
_FOUND_AT = _SCALES_SIZE + 4 * _SPARE
_CHANGES_AT = _FOUND_AT + 64
_LARGEST_AT = _CHANGES_AT + 64
_OF_ROW_AT = _LARGEST_AT + 4 * _CHUNK
_SCALES_AT = _OF_ROW_AT + 4 * _CHUNK
_stack = items.make_stack(_SCALES_AT + 4 * _CHUNK)

_compile, _intrinsic, _pointer, _places = items._compile, items._intrinsic, items._pointer, items._places
_row_of, _add, _spread, _fill, _rest = items._row_of, items._add, items._spread, items._fill, items._rest
_copy, _call_4, _call_9, _generate_call = items._copy, items._call_4, items._call_9, items._generate_call


@_intrinsic
def _call_6(context, function, a, b, c, d, e, f):  # type: ignore[no-untyped-def]
    """Call a function that takes as many arguments as :func:`scales_by_formula`."""
    return numba.types.void(*[numba.types.int64] * 7), _generate_call


@_intrinsic
def _as_bits(context, number):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return numba.types.int32(numba.types.float32), generate


@_intrinsic
def _as_number(context, bits):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return numba.types.float32(numba.types.int32), generate


@_compile()
def _updates(task, row):  # type: ignore[no-untyped-def]
    """Return the address of the first update of a stretch, and the mask of its relevant bits."""
    if task[UPDATE_SIZE]:
        first = carray(_pointer(task[UPDATES]), (task[STRETCHES],), np.int64)[row]
        # Without updates, read the weight instead and ignore all of its bits.
        return (first, task[MASK]) if first else (_places(task)[row, WEIGHT], np.int64(0))
    return np.int64(0), task[MASK]


@_compile()
def _count_lanes(task, row, low, numel, first_update, mask, step, stack):  # type: ignore[no-untyped-def]
    """Encode, compare, count and store adjacent elements, with scales that are already in the buffer."""
    place = _places(task)[row]
    at, codes_at = place[WEIGHT] + low * task[WEIGHT_SIZE], place[CODES] + low * task[CODES_SIZE]
    update_at, found = first_update + low * task[UPDATE_SIZE], stack + _FOUND_AT
    whole = numel // LANES * LANES
    _call_9(task[LANES_LOOP], at, update_at, codes_at, whole, stack, step, mask, task[FORMAT], found)
    if whole < numel:
        at, codes_at = at + whole * task[WEIGHT_SIZE], codes_at + whole * task[CODES_SIZE]
        update_at += whole * task[UPDATE_SIZE]
        _rest(task, at, update_at, codes_at, numel - whole, stack + step * whole, mask, found, stack + _SCALES_SIZE)


@_compile()
def _make_scales(task, first, scales, stack):  # type: ignore[no-untyped-def]
    """Compute scales from the largest magnitudes. ``first`` is the index of the first one among all scales."""
    stored = task[STORED] + first * task[STORED_SIZE]
    _call_6(task[SCALES_LOOP], stack + _LARGEST_AT, scales, task[RULE], stack + _SCALES_AT, stored, stack + _CHANGES_AT)


@_compile()
def _count_groups(task, row, low, high, stack):  # type: ignore[no-untyped-def]
    """Count the groups whose first element is in this range."""
    place = _places(task)[row]
    group = place[GROUP]
    scales = carray(_pointer(stack + _SCALES_AT), (_CHUNK,), np.float32)
    first_update, mask = _updates(task, row)
    first, last = (low + group - 1) // group, (high + group - 1) // group
    at_once = max(1, _CHUNK // group)
    while first < last:
        groups = min(at_once, last - first)
        at, numel = place[WEIGHT] + first * group * task[WEIGHT_SIZE], groups * group
        _call_4(task[LARGEST_LOOP], at, groups, group, stack + _LARGEST_AT)
        if task[KEPT]:
            _copy(task[KEPT] + 4 * (place[SCALE] + first), stack + _LARGEST_AT, 4 * groups)
        _make_scales(task, place[SCALE] + first, groups, stack)
        if groups == 1:
            _fill(stack, scales[0])
            step = 0
        else:
            _spread(scales, 0, 0, numel, group, stack)
            step = 4
        _count_lanes(task, row, first * group, numel, first_update, mask, step, stack)
        first += groups


@_compile()
def _count_blocks(task, row, low, high, stack):  # type: ignore[no-untyped-def]
    """Count the blocks whose first element is in this range. Elements are numbered block by block."""
    place = _places(task)[row]
    width, height, across = place[WIDTH], place[HEIGHT], place[GROUP]
    rows = place[NUMEL] // width
    first_update, mask = _updates(task, row)
    scales = carray(_pointer(stack + _SCALES_AT), (_CHUNK,), np.float32)
    in_band = (width + across - 1) // across
    band = low // (height * width)
    while band * height * width < high:
        first_row = band * height
        last_row = min(first_row + height, rows)
        begin, block = first_row * width, (last_row - first_row) * across
        first = (max(low - begin, 0) + block - 1) // block
        last = min(in_band, (high - begin + block - 1) // block)
        while first < last:
            blocks = min(_CHUNK // across, last - first)
            column = first * across
            numel = min(width - column, blocks * across)
            _find_largest(task, place, first_row * width + column, last_row - first_row, numel, stack)
            _make_scales(task, place[SCALE] + band * in_band + first, blocks, stack)
            _spread(scales, 0, 0, numel, across, stack)
            for at in range(first_row * width + column, last_row * width, width):
                _count_lanes(task, row, at, numel, first_update, mask, 4, stack)
            first += blocks
        band += 1


@_compile()
def _find_largest(task, place, first, rows, numel, stack):  # type: ignore[no-untyped-def]
    """Find the largest magnitudes of adjacent blocks, which have ``numel`` elements in each row."""
    across = place[GROUP]
    whole = numel // across
    blocks = (numel + across - 1) // across
    largest = carray(_pointer(stack + _LARGEST_AT), (blocks,), np.int32)
    of_row = carray(_pointer(stack + _OF_ROW_AT), (blocks,), np.int32)
    largest[:] = 0
    for line in range(rows):
        at = place[WEIGHT] + (first + line * place[WIDTH]) * task[WEIGHT_SIZE]
        _call_4(task[LARGEST_LOOP], at, whole, across, stack + _OF_ROW_AT)
        if whole < blocks:
            at += whole * across * task[WEIGHT_SIZE]
            _call_4(task[LARGEST_LOOP], at, 1, numel - whole * across, stack + _OF_ROW_AT + 4 * whole)
        for block in range(blocks):
            largest[block] = max(largest[block], of_row[block])


def count_groups(address):  # type: ignore[no-untyped-def]
    """Compute the scales, encode, compare, count and store the remaining items.

    A group belongs to the item with its first element. If a stretch has a width, its groups are blocks over several
    rows.
    """
    task = carray(_pointer(address), (TASK,), np.int64)
    places = _places(task)
    rows = carray(_pointer(task[ROWS]), (task[STRETCHES],), np.int64)
    stack = _stack()
    found = carray(_pointer(stack + _FOUND_AT), (3,), np.int64)
    changes = carray(_pointer(stack + _CHANGES_AT), (1,), np.int64)
    while True:
        start = _add(address + 8 * NEXT, 1) * task[ITEM]
        if start >= task[TOTAL]:
            return
        stop = min(start + task[ITEM], task[TOTAL])
        row = _row_of(places, start)
        while start < stop:
            begin = places[row, START]
            high = min(places[row, NUMEL], stop - begin)
            found[:] = 0
            changes[0] = 0
            if places[row, WIDTH]:
                _count_blocks(task, row, start - begin, high, stack)
            else:
                _count_groups(task, row, start - begin, high, stack)
            counts = task[COUNTS] + rows[row] * task[STRIDE]
            for column in range(3):
                _add(counts + 8 * column, found[column])
            if task[STORED_SIZE]:
                _add(task[CHANGES] + rows[row] * task[CHANGES_STRIDE], changes[0])
            start = begin + high
            row += 1


# ---------------------------------------------------------------------- scales


def scales_by_formula(largest, groups, rule, into, stored, changes):  # type: ignore[no-untyped-def]
    """Compute scales from the largest magnitudes by a formula, and count those that differ from the stored ones.

    Args:
        largest: Address of the magnitudes, float32.
        groups: Their number.
        rule: Address of ``number`` and ``smallest`` of the formula, float64.
        into: Address of the factors that weights are multiplied or divided by, float32; written to.
        stored: Address of the stored scales, the bits of float32; overwritten.
        changes: Address of an int64 to add to.
    """
    magnitudes = carray(_pointer(largest), (groups,), np.float32)
    numbers = carray(_pointer(rule), (2,), np.float64)
    factors = carray(_pointer(into), (groups,), np.float32)
    before = carray(_pointer(stored), (groups,), np.int32)
    changed = np.int64(0)
    for i in range(groups):
        magnitude = magnitudes[i]
        if FORM == MULTIPLIES:  # type: ignore[name-defined]  # noqa: F821
            wide = np.float64(magnitude)
            # Keeps NaN.
            wide = numbers[1] if wide < numbers[1] else wide
            factor = np.float32(numbers[0] / wide)
            scale = np.float32(1.0) / factor if STORES else factor  # type: ignore[name-defined]  # noqa: F821
        else:
            scale, smallest = magnitude / np.float32(numbers[0]), np.float32(numbers[1])
            if HALF:  # type: ignore[name-defined]  # noqa: F821
                bits = _as_bits(scale)
                rounded = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) & np.int32(-65536)
                scale = _as_number(np.int32(rounded)) if scale == scale else scale
            scale = smallest if scale < smallest else scale
            factor = np.float32(1.0) / scale if FORM == INVERSE else scale  # type: ignore[name-defined]  # noqa: F821
        factors[i] = factor
        if STORES:  # type: ignore[name-defined]  # noqa: F821
            # All NaNs count as equal.
            now = _as_bits(scale) if scale == scale else np.int32(0x7FC00000)
            changed += now != before[i]
            before[i] = now
    carray(_pointer(changes), (1,), np.int64)[0] += changed


def scales_by_steps(largest, groups, rule, into, stored, changes):  # type: ignore[no-untyped-def]
    """Like :func:`scales_by_formula`, but by a table. Scales with few values grow in steps with the largest magnitude.

    ``rule`` is the address of :class:`~weightflip.kernels.runs.ScaleSteps` as int64, with addresses for tensors.
    ``stored`` is the address of bytes.
    """
    magnitudes = carray(_pointer(largest), (groups,), np.int32)
    steps = carray(_pointer(rule), (4,), np.int64)
    shift = np.int32(steps[0])
    slots = carray(_pointer(steps[1]), (1 << (31 - steps[0]), 3), np.int32)
    factor_of = carray(_pointer(steps[2]), (256,), np.float32)
    code_of = carray(_pointer(steps[3]), (256,), np.uint8)
    factors = carray(_pointer(into), (groups,), np.float32)
    before = carray(_pointer(stored), (groups,), np.uint8)
    changed = np.int64(0)
    for i in range(groups):
        bits = magnitudes[i]
        slot = bits >> shift
        index = slots[slot, 2] if bits >= slots[slot, 0] else slots[slot, 1]
        factors[i] = factor_of[index]
        if STORES:  # type: ignore[name-defined]  # noqa: F821
            code = code_of[index]
            changed += code != before[i]
            before[i] = code
    carray(_pointer(changes), (1,), np.int64)[0] += changed
