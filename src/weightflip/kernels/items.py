"""The loops over many weights on the CPU, for Numba. Imported only if Numba is installed.

They access memory by address, so that one call covers many tensors: ``places`` has one row per stretch of memory, with
the columns below. The elements of all stretches are numbered consecutively, and divided into items. Each thread that
calls a loop takes items until none are left, so that any number of threads gives the same result.

A loop is a C function with one argument, the address of a task. Any thread pool can call it. It does not allocate
memory or raise exceptions.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic

from weightflip.kernels.vectors import (
    BYTES_OF_KEEP,
    COUNTS_AT,
    FOUND,
    LANES,
    LANES_OF_LARGEST,
    MOST_STATES,
    OLD_SCALES_AT,
    STATES_AT,
    STREAMS_OF_KEEP,
    WIDE_OF_LARGEST,
    Vectors,
)

# Numba's annotations do not cover how intrinsics are called.
_intrinsic: Any = intrinsic

START, NUMEL, GROUP, SCALE, WEIGHT, CODES, WIDTH, HEIGHT = range(8)
"""Columns of ``places``: index of the first element, number of elements, number of elements that share a scale, index
of the first scale, addresses of the weight and the codes. For blocks over several rows also the number of elements in a
row, and the number of rows that share a scale."""
COLUMNS = 8

# The fields of a task, int64. Strides are in bytes.
NEXT, TOTAL, ITEM, PLACES, STRETCHES, SCALES, SCALED, LARGEST = range(8)
"""The next item. The number of elements in all stretches, and in an item. Address and number of rows of ``places``.
Address of the scales, float32, and whether there are any; if not, it is the address of a 1. Address of the largest
magnitudes, float32."""
LANES_LOOP, FORMAT, WEIGHT_SIZE, UPDATE_SIZE, CODES_SIZE, UPDATES, MASK, COUNTS, STRIDE, ROWS = range(8, 18)
"""Address of the loop over lanes: :func:`count_lanes` or :func:`largest_lanes`, compiled for the dtypes. Address of
:class:`~weightflip.kernels.constants.Lanes`. Bytes of a weight, an update and a code. Address of the addresses of the
updates, 0 for stretches without updates, and the bits of an update that are not all 0 if it counts. Address and row
stride of the counts, int64. Address of the row of each stretch in them, int64."""
STATES, STATE_PLACES, STATE_BITS, SUMS, SUM_COLUMNS, SUM_TABLE, SUM_STRIDE, OLD_SCALES = range(18, 26)
"""For metric groups; zeros if there are none. The number of states. Address of an array of shape (states, stretches)
with the address of the first element of each state. Address of the bits per element of each state. The number of sums,
address of their column indices, and address and row stride of the float64 table to which they are added. Address of the
scales from before the step; 0 to use the current ones."""
TASK = 26

KEEP_CODES, KEEP_NEW, KEEP_CHANGED = range(3, 6)
"""The fields of a task of :func:`keep` after ``NEXT``, ``TOTAL`` and ``ITEM``: addresses of the kept codes and of the
new ones, and the number of codes that differ."""
KEEP_TASK = 6

# The number of elements in a chunk. Each has its scale, and the scales of a chunk are on the stack. Fewer than LANES
# elements are copied to four buffers of _SPARE bytes each.
_CHUNK = 1 << 11
_SCALES_SIZE = 4 * (_CHUNK + LANES)
_SPARE = 4 * LANES
# Offsets in the stack memory of a call after the scales and the buffers: the counts, and for metric groups the old
# scales and a buffer for each state.
_FOUND_AT = _SCALES_SIZE + 4 * _SPARE
_OLD_SCALES_OFFSET = _FOUND_AT + 8 * FOUND
_SPARE_STATES_AT = _OLD_SCALES_OFFSET + _SCALES_SIZE
_STACK = _SPARE_STATES_AT + MOST_STATES * _SPARE

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set")

# These functions are never called from Python.
_compile = functools.partial(numba.njit, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

# ---------------------------------------------------------------------- memory


@_intrinsic
def _pointer(context, address):  # type: ignore[no-untyped-def]
    """Convert an address to a pointer for ``carray``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba.types.voidptr(numba.types.int64), generate


def make_stack(nbytes: int) -> Any:
    """Return an intrinsic that allocates stack memory, and returns its address."""

    @_intrinsic
    def stack(context):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            # Not one array, which LLVM would fill with zeros in a store that takes half a minute to compile.
            stack = cgutils.alloca_once(builder, ir.IntType(8), size=nbytes)  # type: ignore[no-untyped-call]
            stack.align = 64
            return builder.ptrtoint(stack, ir.IntType(64))

        return numba.types.int64(), generate

    return stack


_stack = make_stack(_STACK)


def _atomically(operation: str, bits: int) -> Any:
    @_intrinsic
    def change(context, address, value):  # type: ignore[no-untyped-def]
        """Return the old value."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            integer = ir.IntType(bits)
            pointer = builder.inttoptr(arguments[0], integer.as_pointer())
            operand = arguments[1] if bits == 64 else builder.trunc(arguments[1], integer)
            before = builder.atomic_rmw(operation, pointer, operand, "monotonic")
            return before if bits == 64 else builder.sext(before, ir.IntType(64))

        return numba.types.int64(numba.types.int64, numba.types.int64), generate

    return change


_add, _raise = _atomically("add", 64), _atomically("max", 32)


@_intrinsic
def _add_float(context, address, value):  # type: ignore[no-untyped-def]
    """Add atomically to a float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.DoubleType().as_pointer())
        operand = builder.sitofp(arguments[1], ir.DoubleType())
        builder.atomic_rmw("fadd", pointer, operand, "monotonic")
        return context.get_dummy_value()

    return numba.types.void(numba.types.int64, numba.types.int64), generate


@_intrinsic
def _copy(context, target, source, nbytes):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source = (builder.inttoptr(address, cgutils.voidptr_t) for address in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return numba.types.void(*[numba.types.int64] * 3), generate


@_intrinsic
def _clear(context, target, nbytes):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target = builder.inttoptr(arguments[0], cgutils.voidptr_t)
        cgutils.memset(builder, target, arguments[1], 0)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return numba.types.void(*[numba.types.int64] * 2), generate


@_intrinsic
def _fill(context, target, scale):  # type: ignore[no-untyped-def]
    """Write LANES copies of a scale."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Vectors(builder)
        v.store(v.splat(arguments[1]), arguments[0])
        return context.get_dummy_value()

    return numba.types.void(numba.types.int64, numba.types.float32), generate


@_intrinsic
def _call_4(context, function, a, b, c, d):  # type: ignore[no-untyped-def]
    return numba.types.void(*[numba.types.int64] * 5), _generate_call


@_intrinsic
def _call_9(context, function, a, b, c, d, e, f, g, h, i):  # type: ignore[no-untyped-def]
    """Call a function with the arguments of :func:`count_lanes`."""
    return numba.types.void(*[numba.types.int64] * 10), _generate_call


def _generate_call(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Call the C function at an address."""
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments[1:]])
    builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
    return context.get_dummy_value()


@_compile()
def _places(task):  # type: ignore[no-untyped-def]
    return carray(_pointer(task[PLACES]), (task[STRETCHES], COLUMNS), np.int64)


@_compile()
def _row_of(places, element):  # type: ignore[no-untyped-def]
    """Return the stretch that contains an element."""
    low, high = 0, places.shape[0]
    while high - low > 1:
        middle = (low + high) // 2
        if places[middle, START] <= element:
            low = middle
        else:
            high = middle
    return low


# ---------------------------------------------------------------------- counting


@_compile()
def _rest(task, at, update_at, codes_at, numel, scales, mask, found, spare):  # type: ignore[no-untyped-def]
    """Count fewer than LANES elements, padded with zeros. The padding has a scale of 1, so that it does not flip.

    The arguments are numbers, because Numba takes longer to compile a function that takes an object.
    """
    spare_update, spare_codes, spare_scales = spare + _SPARE, spare + 2 * _SPARE, spare + 3 * _SPARE
    _clear(spare, 3 * _SPARE)
    _fill(spare_scales, np.float32(1.0))
    _copy(spare, at, numel * task[WEIGHT_SIZE])
    _copy(spare_update, update_at, numel * task[UPDATE_SIZE])
    _copy(spare_codes, codes_at, numel * task[CODES_SIZE])
    _copy(spare_scales, scales, numel * 4)
    _call_9(task[LANES_LOOP], spare, spare_update, spare_codes, LANES, spare_scales, 4, mask, task[FORMAT], found)
    _copy(codes_at, spare_codes, numel * task[CODES_SIZE])


@_compile()
def _spread(scales, index, low, high, group, stack):  # type: ignore[no-untyped-def]
    """Write the scale of each element from ``low`` to ``high``. Writes up to LANES - 1 scales past the end."""
    at, until = low, (index + 1) * group
    while at < high:
        scale = scales[index]
        for place in range(at, min(until, high), LANES):
            # The last vector can reach into the next group, which then overwrites that part.
            _fill(stack + 4 * (place - low), scale)
        at, until, index = until, until + group, index + 1


@_compile()
def _aim(task, row, first, old_scales, found_at):  # type: ignore[no-untyped-def]
    """Pass the loop over lanes the addresses of the old scales and of the states, from element ``first`` on."""
    found = carray(_pointer(found_at), (FOUND,), np.int64)
    places = carray(_pointer(task[STATE_PLACES]), (task[STATES], task[STRETCHES]), np.int64)
    bits = carray(_pointer(task[STATE_BITS]), (task[STATES],), np.int64)
    found[OLD_SCALES_AT] = old_scales
    for state in range(task[STATES]):
        found[STATES_AT + state] = places[state, row] + first * bits[state] // 8


@_compile()
def _take_states(task, numel, found_at, spare):  # type: ignore[no-untyped-def]
    """Copy the states of fewer than LANES elements to the buffers, and pass the addresses of the buffers instead."""
    found = carray(_pointer(found_at), (FOUND,), np.int64)
    bits = carray(_pointer(task[STATE_BITS]), (task[STATES],), np.int64)
    _clear(spare, task[STATES] * _SPARE)
    for state in range(task[STATES]):
        _copy(spare + state * _SPARE, found[STATES_AT + state], (numel * bits[state] + 7) // 8)
        found[STATES_AT + state] = spare + state * _SPARE


@_compile()
def _put_states(task, row, first, numel, spare):  # type: ignore[no-untyped-def]
    """Copy the states of fewer than LANES elements from the buffers back to their tensors."""
    places = carray(_pointer(task[STATE_PLACES]), (task[STATES], task[STRETCHES]), np.int64)
    bits = carray(_pointer(task[STATE_BITS]), (task[STATES],), np.int64)
    for state in range(task[STATES]):
        place = places[state, row] + first * bits[state] // 8
        _copy(place, spare + state * _SPARE, (numel * bits[state] + 7) // 8)


@_compile()
def _whole_lanes(element, numel):  # type: ignore[no-untyped-def]
    """Return the next element that is a multiple of LANES, or the number of elements.

    Items of a stretch begin there, so that two threads never write to the same word of a state with one bit per weight.
    """
    return min((element + LANES - 1) // LANES * LANES, numel)


@_compile()
def _count_stretch(task, row, low, high, found, stack):  # type: ignore[no-untyped-def]
    """Encode, compare, count and store the elements from ``low`` to ``high`` of a stretch."""
    place = _places(task)[row]
    group, first_scale = (place[GROUP], place[SCALE]) if task[SCALED] else (place[NUMEL], 0)
    scales = carray(_pointer(task[SCALES] + 4 * first_scale), (place[NUMEL],), np.float32)
    old_spread, old_scales = stack, scales
    if task[OLD_SCALES]:
        old_spread = stack + _OLD_SCALES_OFFSET
        old_scales = carray(_pointer(task[OLD_SCALES] + 4 * first_scale), (place[NUMEL],), np.float32)
    mask, first_update = task[MASK], np.int64(0)
    if task[UPDATE_SIZE]:
        first_update = carray(_pointer(task[UPDATES]), (task[STRETCHES],), np.int64)[row]
        if not first_update:
            # Without updates, read the weight instead and ignore all of its bits.
            first_update, mask = place[WEIGHT], np.int64(0)
    while low < high:
        index = low // group
        until = min((index + 1) * group, high)
        if until - low >= _CHUNK or until == high:
            # All of these elements have one scale. Leave out those that share a vector with elements of the next group.
            if until < high:
                until -= (until - low) % LANES
            _fill(stack, scales[index])
            _fill(old_spread, old_scales[index])
            step = 0
        else:
            until = min(low + _CHUNK, high)
            _spread(scales, index, low, until, group, stack)
            if task[OLD_SCALES]:
                _spread(old_scales, index, low, until, group, old_spread)
            step = 4
        numel = (until - low) // LANES * LANES
        at, codes_at = place[WEIGHT] + low * task[WEIGHT_SIZE], place[CODES] + low * task[CODES_SIZE]
        update_at = first_update + low * task[UPDATE_SIZE]
        _aim(task, row, low, old_spread, found)
        _call_9(task[LANES_LOOP], at, update_at, codes_at, numel, stack, step, mask, task[FORMAT], found)
        if low + numel < until:
            at, codes_at = at + numel * task[WEIGHT_SIZE], codes_at + numel * task[CODES_SIZE]
            update_at += numel * task[UPDATE_SIZE]
            # A scale that all elements share is also stored LANES times.
            rest, spare_states = until - low - numel, stack + _SPARE_STATES_AT
            _aim(task, row, low + numel, old_spread + step * numel, found)
            _take_states(task, rest, found, spare_states)
            _rest(task, at, update_at, codes_at, rest, stack + step * numel, mask, found, stack + _SCALES_SIZE)
            _put_states(task, row, low + numel, rest, spare_states)
        low = until


def count(address):  # type: ignore[no-untyped-def]
    """Encode, compare, count and store. Takes items until none are left."""
    task = carray(_pointer(address), (TASK,), np.int64)
    places = _places(task)
    rows = carray(_pointer(task[ROWS]), (task[STRETCHES],), np.int64)
    stack = _stack()
    found_at = stack + _FOUND_AT
    found = carray(_pointer(found_at), (FOUND,), np.int64)
    sum_columns = carray(_pointer(task[SUM_COLUMNS]), (task[SUMS],), np.int64)
    while True:
        start = _add(address + 8 * NEXT, 1) * task[ITEM]
        if start >= task[TOTAL]:
            return
        stop = min(start + task[ITEM], task[TOTAL])
        row = _row_of(places, start)
        while start < stop:
            begin, numel = places[row, START], places[row, NUMEL]
            high = min(numel, stop - begin)
            found[:] = 0
            first, last = _whole_lanes(start - begin, numel), _whole_lanes(high, numel)
            _count_stretch(task, row, first, last, found_at, stack)
            counts = task[COUNTS] + rows[row] * task[STRIDE]
            for column in range(3):
                _add(counts + 8 * column, found[column])
            sums = task[SUM_TABLE] + rows[row] * task[SUM_STRIDE]
            for number in range(task[SUMS]):
                # The denominator of these counts is the number of flips.
                numerator = sums + 8 * sum_columns[number]
                _add_float(numerator, found[COUNTS_AT + number])
                _add_float(numerator + 8, found[0])
            start = begin + high
            row += 1


# ---------------------------------------------------------------------- the largest magnitude


def largest(address):  # type: ignore[no-untyped-def]
    """Find the largest magnitude under each scale. Takes items until none are left."""
    task = carray(_pointer(address), (TASK,), np.int64)
    places = _places(task)
    part_at = _stack()
    part = carray(_pointer(part_at), (1,), np.int32)
    items = (task[TOTAL] + task[ITEM] - 1) // task[ITEM]
    while True:
        # Backwards: the optimizer went forwards, so that the caches hold the end of the weights. Afterwards they hold
        # the beginning, where counting starts.
        start = (items - 1 - _add(address + 8 * NEXT, 1)) * task[ITEM]
        if start < 0:
            return
        stop = min(start + task[ITEM], task[TOTAL])
        row = _row_of(places, start)
        while start < stop:
            place = places[row]
            group = place[GROUP]
            low, high = start - place[START], min(place[NUMEL], stop - place[START])
            while low < high:
                index = low // group
                at, into = place[WEIGHT] + low * task[WEIGHT_SIZE], task[LARGEST] + 4 * (place[SCALE] + index)
                groups = (high - low) // group
                if low == index * group and groups:
                    _call_4(task[LANES_LOOP], at, groups, group, into)
                    low += groups * group
                else:
                    # Other items may contain the rest of this group.
                    until = min((index + 1) * group, high)
                    _call_4(task[LANES_LOOP], at, 1, until - low, part_at)
                    _raise(into, part[0])
                    low = until
            start = place[START] + high
            row += 1


# ---------------------------------------------------------------------- comparing with kept codes


def keep(address):  # type: ignore[no-untyped-def]
    """Replace kept codes with new ones, and count those that differ. Takes items until none are left."""
    task = carray(_pointer(address), (KEEP_TASK,), np.int64)
    changed = np.int64(0)
    while True:
        start = _add(address + 8 * NEXT, 1) * task[ITEM]
        if start >= task[TOTAL]:
            break
        numel = min(task[ITEM], task[TOTAL] - start)
        codes_at, new_at = task[KEEP_CODES] + start * SIZE, task[KEEP_NEW] + start * SIZE  # type: ignore[name-defined]  # noqa: F821
        lanes = STREAMS_OF_KEEP * BYTES_OF_KEEP // SIZE  # type: ignore[name-defined]  # noqa: F821
        whole = numel // lanes * lanes
        changed += KEEP(codes_at, new_at, whole)  # type: ignore[name-defined]  # noqa: F821
        codes = carray(_pointer(codes_at), (numel,), BITS)  # type: ignore[name-defined]  # noqa: F821
        new = carray(_pointer(new_at), (numel,), BITS)  # type: ignore[name-defined]  # noqa: F821
        for i in range(whole, numel):
            changed += codes[i] != new[i]
            codes[i] = new[i]
    _add(address + 8 * KEEP_CHANGED, changed)


# ---------------------------------------------------------------------- the loops over lanes

# From this size on, each group is read at several places at once.
_LARGE = 512


def count_lanes(weight, update, codes, numel, scales, step, mask, constants, found):  # type: ignore[no-untyped-def]
    """Encode, compare, count and store. See :func:`weightflip.kernels.vectors.make_advance`.

    The arguments are numbers, because this is compiled to a C function.
    """
    ADVANCE(weight, update, codes, numel, scales, step, mask, constants, found)  # type: ignore[name-defined]  # noqa: F821


def largest_lanes(address, groups, group, into):  # type: ignore[no-untyped-def]
    """Write the bits of the largest magnitude of each group, as float32."""
    found = carray(_pointer(into), (groups,), np.int32)
    first = 0
    if group % LANES_OF_LARGEST == 0 and group < _LARGE:
        first = groups // LANES_OF_LARGEST * LANES_OF_LARGEST
        IN_BLOCKS(address, first, group, into)  # type: ignore[name-defined]  # noqa: F821
    for index in range(first, groups):
        at, numel, bits = address + index * group * SIZE, group, np.int64(0)  # type: ignore[name-defined]  # noqa: F821
        if group >= _LARGE:
            numel = group // WIDE_OF_LARGEST * WIDE_OF_LARGEST
            bits = WIDE(at, numel)  # type: ignore[name-defined]  # noqa: F821
            at, numel = at + numel * SIZE, group - numel  # type: ignore[name-defined]  # noqa: F821
        narrow = numel // LANES_OF_LARGEST * LANES_OF_LARGEST
        bits = max(bits, NARROW(at, narrow))  # type: ignore[name-defined]  # noqa: F821
        rest = carray(_pointer(at), (numel,), BITS)  # type: ignore[name-defined]  # noqa: F821
        for i in range(narrow, numel):
            bits = max(bits, np.int64(rest[i]) & ((1 << (8 * SIZE - 1)) - 1))  # type: ignore[name-defined]  # noqa: F821
        # bfloat16 is the upper half of a float32.
        found[index] = bits << (32 - 8 * SIZE)  # type: ignore[name-defined]  # noqa: F821
