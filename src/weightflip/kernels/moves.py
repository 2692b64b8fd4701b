"""The loops over samples of many weights on the CPU, for Numba. Imported only if Numba is installed.

As in :mod:`weightflip.kernels.items`, a loop is a C function with the address of a task as its argument, and accesses
memory by address. ``places`` has one row per layer, with the columns below. Each thread that calls a loop takes layers
until none are left. One thread adds up the sums of a layer, in the order that :data:`weightflip.kernels.sampled.LANES`
describes, so that any number of threads gives the same result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, types  # type: ignore[attr-defined]

from weightflip.kernels.items import _add, _compile, _copy, _intrinsic, _pointer, make_stack
from weightflip.kernels.sampled import LANES

WEIGHT, CODES, AT, NUMEL, GROUP, OLD_WEIGHTS, OLD_CODES, MOVED, QUANTIZED_MOVED = range(9)
"""Columns of ``places``: addresses of the weight, of its codes, and of the indices of the sample, int64, or 0 for all
weights in order; the number of sampled weights; the number of adjacent weights that share a scale, or 0 if all do;
addresses of the sample before the step, of its codes, and of the sums of each sampled weight, float64."""
NUMBERS, FORM, SMALLEST, LARGEST, SHARE, ROW = range(9, 15)
"""Address of the numbers that codes stand for, float32; what a scale does with them; the outermost codes; the bits of
the float64 by which the sums are multiplied; and the row of the sums."""
COLUMNS = 15

PLAIN, MULTIPLIES, DIVIDES = range(3)
"""Numbers without a scale, times a scale, and over a scale."""

NEXT, LAYERS, PLACES, INDICES, OLD_SCALES, NEW_SCALES, SUMS, STRIDE = range(8)
"""What a task holds, int64: the next layer; the number of layers, address of the places, and of the indices of the
places of these layers; addresses of the addresses of the scales before and after the step, float32, one for each place;
address of four adjacent float64 columns, and how many bytes their rows are apart."""
TASK = 8

# Sampled weights that are handled together, so that what is collected of them stays in the first cache.
_CHUNK = 512
_ALL_CODES = 256
# The stack memory of a call: the sums, the values of all codes before and after the step and the widths of their cells;
# of a chunk, weights, codes, scales before and after the step, ways of quantized weights, and widths of old cells.
_VALUES_AT = 8 * 4 * LANES
_WEIGHTS_AT = _VALUES_AT + 3 * 8 * _ALL_CODES
_CODES_AT = _WEIGHTS_AT + 4 * _CHUNK
_SCALES_AT = _CODES_AT + 4 * _CHUNK
_WAYS_AT = _SCALES_AT + 2 * 4 * _CHUNK
_stack = make_stack(_WAYS_AT + 2 * 8 * _CHUNK)


@_intrinsic
def _number(context, bits):  # type: ignore[no-untyped-def]
    """Convert the bits of a weight, float32 or bfloat16, to float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = arguments[0]
        if signature.args[0].bitwidth == 16:
            # bfloat16 is the upper half of a float32.
            bits = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.fpext(builder.bitcast(bits, ir.FloatType()), ir.DoubleType())

    return types.float64(bits), generate


@_compile()
def _value(number, scale, form):  # type: ignore[no-untyped-def]
    if form == MULTIPLIES:
        return np.float64(number * scale)
    if form == DIVIDES:
        return np.float64(number / scale)
    return np.float64(number)


@_compile()
def _tally(sums, lane, moved, quantized_moved, way, quantized_way, differs, cell):  # type: ignore[no-untyped-def]
    """Add one sampled weight, the first of two arrays: as :func:`weightflip.kernels.vectors.make_tally`."""
    # NaN and infinities count as not moved. Times 0, they are NaN.
    if way * 0.0 + quantized_way * 0.0 != 0.0:
        way, quantized_way, differs = 0.0, 0.0, False
    share = way / cell
    # NaN counts as 0.
    share = share if share < 1.0 else (1.0 if share >= 1.0 else 0.0)
    sums[0, lane] += quantized_way
    sums[1, lane] += way
    sums[2, lane] += 1.0 if differs else 0.0
    sums[3, lane] += share
    moved[lane] += way
    quantized_moved[lane] += quantized_way


@_compile()
def _take_values(place, old_scale_at, new_scale_at, values):  # type: ignore[no-untyped-def]
    """Compute the values of all codes of one byte before and after the step, and the widths of their old cells."""
    numbers = carray(_pointer(place[NUMBERS]), (_ALL_CODES,), np.float32)
    old_scale, new_scale = np.float32(1.0), np.float32(1.0)
    if place[FORM] != PLAIN:
        old_scale = carray(_pointer(old_scale_at), (1,), np.float32)[0]
        new_scale = carray(_pointer(new_scale_at), (1,), np.float32)[0]
    for i in range(_ALL_CODES):
        values[0, i] = _value(numbers[i], old_scale, place[FORM])
        values[1, i] = _value(numbers[i], new_scale, place[FORM])
    first, last = place[SMALLEST] + _ALL_CODES // 2, place[LARGEST] + _ALL_CODES // 2
    for i in range(_ALL_CODES):
        at = min(max(i, first), last)
        values[2, i] = _cell(
            values[0, max(at - 1, first)], values[0, at], values[0, min(at + 1, last)], at, first, last
        )


@_compile()
def _cell(lower, here, upper, code, smallest, largest):  # type: ignore[no-untyped-def]
    """Return the width of the cell of a code, from its value and those of its neighbors."""
    below, above = here - lower, upper - here
    if code == smallest:
        return above
    return below if code == largest else (below + above) / 2


@_compile()
def _take_scales(place, low, numel, scales_at, found, row):  # type: ignore[no-untyped-def]
    """Collect the scales of a chunk."""
    group = place[GROUP]
    if place[FORM] == PLAIN:
        return
    scales = carray(_pointer(scales_at), (1,), np.float32)
    if place[AT]:
        at = carray(_pointer(place[AT] + 8 * low), (numel,), np.int64)
        for i in range(numel):
            found[row, i] = scales[at[i] // group] if group else scales[0]
        return
    index, until = (low // group, low // group * group + group) if group else (0, low + numel)
    for i in range(numel):
        if low + i == until:
            index, until = index + 1, until + group
        found[row, i] = scales[index]


@_compile()
def _gather(source, at, into):  # type: ignore[no-untyped-def]
    for i in range(at.shape[0]):
        into[i] = source[at[i]]


@_compile()
def _look_up(new_codes, old_codes, first, values, ways, cells):  # type: ignore[no-untyped-def]
    """Find how far quantized weights moved, and the widths of their old cells, in the table of all codes."""
    half = _ALL_CODES // 2
    for i in range(first, new_codes.shape[0]):
        before = np.int64(old_codes[i]) + half
        ways[i] = abs(values[1, np.int64(new_codes[i]) + half] - values[0, before])
        cells[i] = values[2, before]


@_compile()
def _compute(place, new_codes, old_codes, half, scales, ways, cells):  # type: ignore[no-untyped-def]
    """As :func:`_look_up`, with a scale for each weight, and for all weights of a chunk."""
    numbers = carray(_pointer(place[NUMBERS]), (2 * half,), np.float32)
    form, smallest, largest = place[FORM], place[SMALLEST], place[LARGEST]
    for i in range(new_codes.shape[0]):
        before, after, old_scale = np.int64(old_codes[i]), np.int64(new_codes[i]), scales[0, i]
        here = _value(numbers[before + half], old_scale, form)
        ways[i] = abs(_value(numbers[after + half], scales[1, i], form) - here)
        code = min(max(before, smallest), largest)
        lower = _value(numbers[max(code - 1, smallest) + half], old_scale, form)
        upper = _value(numbers[min(code + 1, largest) + half], old_scale, form)
        cells[i] = _cell(lower, here, upper, code, smallest, largest)


def take(address):  # type: ignore[no-untyped-def]
    """Copy the samples and their codes."""
    task = carray(_pointer(address), (TASK,), np.int64)
    indices = carray(_pointer(task[INDICES]), (task[LAYERS],), np.int64)
    while True:
        item = _add(address + 8 * NEXT, 1)
        if item >= task[LAYERS]:
            return
        place = carray(_pointer(task[PLACES] + 8 * COLUMNS * indices[item]), (COLUMNS,), np.int64)
        numel = place[NUMEL]
        if not place[AT]:
            _copy(place[OLD_WEIGHTS], place[WEIGHT], numel * BITS_SIZE)  # type: ignore[name-defined]  # noqa: F821
            _copy(place[OLD_CODES], place[CODES], numel * CODE_SIZE)  # type: ignore[name-defined]  # noqa: F821
            continue
        at = carray(_pointer(place[AT]), (numel,), np.int64)
        weight = carray(_pointer(place[WEIGHT]), (numel,), BITS)  # type: ignore[name-defined]  # noqa: F821
        codes = carray(_pointer(place[CODES]), (numel,), CODE)  # type: ignore[name-defined]  # noqa: F821
        _gather(weight, at, carray(_pointer(place[OLD_WEIGHTS]), (numel,), BITS))  # type: ignore[name-defined]  # noqa: F821
        _gather(codes, at, carray(_pointer(place[OLD_CODES]), (numel,), CODE))  # type: ignore[name-defined]  # noqa: F821


def move(address):  # type: ignore[no-untyped-def]
    """Compare the samples with those before the step, add what they moved, and keep them for the next step."""
    task = carray(_pointer(address), (TASK,), np.int64)
    indices = carray(_pointer(task[INDICES]), (task[LAYERS],), np.int64)
    stack = _stack()
    sums = carray(_pointer(stack), (4, LANES), np.float64)
    values = carray(_pointer(stack + _VALUES_AT), (3, _ALL_CODES), np.float64)
    scales = carray(_pointer(stack + _SCALES_AT), (2, _CHUNK), np.float32)
    ways = carray(_pointer(stack + _WAYS_AT), (_CHUNK,), np.float64)
    cells = carray(_pointer(stack + _WAYS_AT + 8 * _CHUNK), (_CHUNK,), np.float64)
    while True:
        item = _add(address + 8 * NEXT, 1)
        if item >= task[LAYERS]:
            return
        index = indices[item]
        place = carray(_pointer(task[PLACES] + 8 * COLUMNS * index), (COLUMNS,), np.int64)
        old_scales_at = carray(_pointer(task[OLD_SCALES] + 8 * index), (1,), np.int64)[0]
        new_scales_at = carray(_pointer(task[NEW_SCALES] + 8 * index), (1,), np.int64)[0]
        for number in range(4):
            for lane in range(LANES):
                sums[number, lane] = 0.0
        has_table = HALF == _ALL_CODES // 2 and place[GROUP] == 0  # type: ignore[name-defined]  # noqa: F821
        if has_table:
            _take_values(place, old_scales_at, new_scales_at, values)
        for low in range(0, place[NUMEL], _CHUNK):
            numel = min(_CHUNK, place[NUMEL] - low)
            new_at, codes_at = place[WEIGHT] + low * BITS_SIZE, place[CODES] + low * CODE_SIZE  # type: ignore[name-defined]  # noqa: F821
            if place[AT]:
                at = carray(_pointer(place[AT] + 8 * low), (numel,), np.int64)
                new_at, codes_at = stack + _WEIGHTS_AT, stack + _CODES_AT
                _gather(carray(_pointer(place[WEIGHT]), (1,), BITS), at, carray(_pointer(new_at), (numel,), BITS))  # type: ignore[name-defined]  # noqa: F821
                _gather(carray(_pointer(place[CODES]), (1,), CODE), at, carray(_pointer(codes_at), (numel,), CODE))  # type: ignore[name-defined]  # noqa: F821
            new = carray(_pointer(new_at), (numel,), BITS)  # type: ignore[name-defined]  # noqa: F821
            codes = carray(_pointer(codes_at), (numel,), CODE)  # type: ignore[name-defined]  # noqa: F821
            old = carray(_pointer(place[OLD_WEIGHTS] + low * BITS_SIZE), (numel,), BITS)  # type: ignore[name-defined]  # noqa: F821
            old_codes = carray(_pointer(place[OLD_CODES] + low * CODE_SIZE), (numel,), CODE)  # type: ignore[name-defined]  # noqa: F821
            moved_at, quantized_at = place[MOVED] + 8 * low, place[QUANTIZED_MOVED] + 8 * low
            old_at, old_codes_at = place[OLD_WEIGHTS] + low * BITS_SIZE, place[OLD_CODES] + low * CODE_SIZE  # type: ignore[name-defined]  # noqa: F821
            whole, ways_at = numel // LANES * LANES, stack + _WAYS_AT
            if has_table:
                table_at = stack + _VALUES_AT
                TALLY_BY_TABLE(  # type: ignore[name-defined]  # noqa: F821
                    new_at, codes_at, old_at, old_codes_at, whole, table_at, 0, moved_at, quantized_at, stack
                )
                _look_up(codes, old_codes, whole, values, ways, cells)
            else:
                _take_scales(place, low, numel, old_scales_at, scales, 0)
                _take_scales(place, low, numel, new_scales_at, scales, 1)
                _compute(place, codes, old_codes, HALF, scales, ways, cells)  # type: ignore[name-defined]  # noqa: F821
                cells_at = ways_at + 8 * _CHUNK
                TALLY(new_at, codes_at, old_at, old_codes_at, whole, ways_at, cells_at, moved_at, quantized_at, stack)  # type: ignore[name-defined]  # noqa: F821
            moved = carray(_pointer(moved_at + 8 * whole), (LANES,), np.float64)
            quantized_moved = carray(_pointer(quantized_at + 8 * whole), (LANES,), np.float64)
            for i in range(whole, numel):
                way = abs(_number(new[i]) - _number(old[i]))
                differs = codes[i] != old_codes[i]
                _tally(sums, i - whole, moved, quantized_moved, way, ways[i], differs, cells[i])
                old[i], old_codes[i] = new[i], codes[i]
        share = carray(_pointer(task[PLACES] + 8 * (COLUMNS * index + SHARE)), (1,), np.float64)[0]
        into = carray(_pointer(task[SUMS] + place[ROW] * task[STRIDE]), (4,), np.float64)
        for number in range(4):
            total = 0.0
            for lane in range(LANES):
                total += sums[number, lane]
            into[number] += share * total
