"""The loop that counts weights whose scale they share with few neighbors, for Numba. Imported only where Numba is.

It finds the largest magnitude of a group, makes the scale of it, and encodes the group while it is still in the cache:
memory is read once. :mod:`weightflip.kernels.items` has what it is made of.
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
)
from weightflip.kernels.vectors import LANES

LARGEST_LOOP, SCALES_LOOP, RULE, STORED, STORED_SIZE, CHANGES, CHANGES_STRIDE = range(items.TASK, items.TASK + 7)
"""What a task holds besides that of :mod:`weightflip.kernels.items`: addresses of :func:`~items.largest_lanes` and of
:func:`scales_by_formula` or :func:`scales_by_steps`, compiled for the dtypes; address of what they are told of the
rule; address of the stored scales, and bytes of one; address of the changes of scales, int64, and how many bytes they
are apart."""
TASK = items.TASK + 7

MULTIPLIES, DIVIDES, INVERSE = range(3)
"""The forms of :class:`weightflip.formats.ScaleFormula`."""

LONGEST = 1 << 15
"""Elements of a group that fits the caches beside everything else."""

_CHUNK, _SPARE, _ROOM = items._CHUNK, items._SPARE, items._ROOM
# Behind the room for scales: the buffers for the rest, what was found, the largest magnitudes, and their scales.
_FOUND_AT = _ROOM + 4 * _SPARE
_LARGEST_AT = _FOUND_AT + 64
_SCALES_AT = _LARGEST_AT + 4 * _CHUNK
_stack = items.make_stack(_SCALES_AT + 4 * _CHUNK)

_compile, _intrinsic, _pointer, _places = items._compile, items._intrinsic, items._pointer, items._places
_row_of, _add, _spread, _fill, _rest = items._row_of, items._add, items._spread, items._fill, items._rest
_call_4, _call_9, _generate_call = items._call_4, items._call_9, items._generate_call


@_intrinsic
def _call_6(context, function, a, b, c, d, e, f):  # type: ignore[no-untyped-def]
    """With as many arguments as :func:`scales_by_formula`."""
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
def _count_groups(task, row, first, last, room):  # type: ignore[no-untyped-def]
    place = _places(task)[row]
    group = place[GROUP]
    found, largest, at_scales = room + _FOUND_AT, room + _LARGEST_AT, room + _SCALES_AT
    scales = carray(_pointer(at_scales), (_CHUNK,), np.float32)
    mask, first_update = task[MASK], np.int64(0)
    if task[UPDATE_SIZE]:
        first_update = carray(_pointer(task[UPDATES]), (task[STRETCHES],), np.int64)[row]
        if not first_update:
            # The weight takes its place, and no bit of it counts.
            first_update, mask = place[WEIGHT], np.int64(0)
    at_once = max(1, _CHUNK // group)
    while first < last:
        groups = min(at_once, last - first)
        low, numel = first * group, groups * group
        at, codes_at = place[WEIGHT] + low * task[WEIGHT_SIZE], place[CODES] + low * task[CODES_SIZE]
        update_at = first_update + low * task[UPDATE_SIZE]
        stored = task[STORED] + (place[SCALE] + first) * task[STORED_SIZE]
        _call_4(task[LARGEST_LOOP], at, groups, group, largest)
        _call_6(task[SCALES_LOOP], largest, groups, task[RULE], at_scales, stored, found + 24)
        if groups == 1:
            _fill(room, scales[0])
            step = 0
        else:
            _spread(scales, 0, 0, numel, group, room)
            step = 4
        whole = numel // LANES * LANES
        _call_9(task[LANES_LOOP], at, update_at, codes_at, whole, room, step, mask, task[FORMAT], found)
        if whole < numel:
            at, codes_at = at + whole * task[WEIGHT_SIZE], codes_at + whole * task[CODES_SIZE]
            update_at += whole * task[UPDATE_SIZE]
            _rest(task, at, update_at, codes_at, numel - whole, room + step * whole, mask, found, room + _ROOM)
        first += groups


def count_groups(address):  # type: ignore[no-untyped-def]
    """Make the scales, encode, compare, count and store, in as many items as there are left.

    A group belongs to the item that has its first element.
    """
    task = carray(_pointer(address), (TASK,), np.int64)
    places = _places(task)
    rows = carray(_pointer(task[ROWS]), (task[STRETCHES],), np.int64)
    room = _stack()
    found = carray(_pointer(room + _FOUND_AT), (4,), np.int64)
    while True:
        start = _add(address + 8 * NEXT, 1) * task[ITEM]
        if start >= task[TOTAL]:
            return
        stop = min(start + task[ITEM], task[TOTAL])
        row = _row_of(places, start)
        while start < stop:
            begin, group = places[row, START], places[row, GROUP]
            high = min(places[row, NUMEL], stop - begin)
            first, last = (start - begin + group - 1) // group, (high + group - 1) // group
            if first < last:
                found[:] = 0
                _count_groups(task, row, first, last, room)
                counts = task[COUNTS] + rows[row] * task[STRIDE]
                for column in range(3):
                    _add(counts + 8 * column, found[column])
                if task[STORED_SIZE]:
                    _add(task[CHANGES] + rows[row] * task[CHANGES_STRIDE], found[3])
            start = begin + high
            row += 1


# ---------------------------------------------------------------------- scales


def scales_by_formula(largest, groups, rule, into, stored, changes):  # type: ignore[no-untyped-def]
    """Make scales of largest magnitudes as a formula says it, and count those that differ from what is stored.

    Args:
        largest: Address of the magnitudes, float32.
        groups: How many there are.
        rule: Address of ``number`` and ``smallest`` of the formula, float64.
        into: Address for what weights are multiplied or divided by, float32.
        stored: Address of the stored scales, the bits of float32; overwritten.
        changes: Address of an int64 that is added to.
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
            # NaN stays.
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
            # All NaN are one.
            now = _as_bits(scale) if scale == scale else np.int32(0x7FC00000)
            changed += now != before[i]
            before[i] = now
    carray(_pointer(changes), (1,), np.int64)[0] += changed


def scales_by_steps(largest, groups, rule, into, stored, changes):  # type: ignore[no-untyped-def]
    """As :func:`scales_by_formula`, by a table: scales that take few values grow with the largest magnitude in steps.

    ``rule`` is the address of :class:`~weightflip.kernels.runs.ScaleSteps`: int64, addresses for tensors. ``stored`` is
    that of bytes.
    """
    magnitudes = carray(_pointer(largest), (groups,), np.int32)
    told = carray(_pointer(rule), (4,), np.int64)
    shift = np.int32(told[0])
    slots = carray(_pointer(told[1]), (1 << (31 - told[0]), 3), np.int32)
    factor_of = carray(_pointer(told[2]), (256,), np.float32)
    code_of = carray(_pointer(told[3]), (256,), np.uint8)
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
