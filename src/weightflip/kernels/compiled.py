"""The loops over weights on the CPU, compiled by Numba. Imported only where Numba is.

They see memory as addresses, so that one call goes over many tensors: a row of ``places`` for each stretch of memory,
with the columns below. The elements of all stretches are numbered through, and cut into items. Each thread that calls a
loop takes items until there are none, so that any number of threads is right.

A loop is a C function of one address, that of a task, and can be called by any thread pool. Nothing in it allocates or
raises.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic

from weightflip.kernels import pool, vectors
from weightflip.kernels.vectors import DIVIDED, LANES, MULTIPLIED, PLAIN

# Numba's types say that it is called with what it is defined with.
_intrinsic: Any = intrinsic

START, NUMEL, GROUP, SCALE, WEIGHT, CODES = range(6)
"""Columns of ``places``: number of the first element, elements, how many of them share a scale, index of the first
scale, addresses of the weight and the codes."""
COLUMNS = 6

NEXT, TOTAL, ITEM, PLACES, STRETCHES, SCALES, SCALED, LARGEST = range(8)
WAY, FORMAT, UPDATES, MASK, COUNTS, STRIDE, ROWS = range(8, 15)
"""What a task holds, int64: the next item; elements of all stretches, and of an item; address and number of the places;
address of the scales, float32, and whether there is more than one of 1; address of the largest magnitudes, float32;
which of :data:`WAYS`; address of :class:`~weightflip.kernels.constants.Lanes`; address of the updates' addresses, 0 for
one that has none, and the bits of an update that tell whether it is 0; address of the counts, int64, and how many bytes
their rows are apart; address of the row of each stretch, int64."""
TASK = 15

WAYS = ((MULTIPLIED, True), (DIVIDED, True), (PLAIN, False), (MULTIPLIED, False), (DIVIDED, False))
"""How weights are scaled, and whether they are rounded by adding."""

# Scales that lie beside the weights of so many elements; and bytes of four buffers for fewer than LANES elements.
_CHUNK = 1 << 11
_ROOM = 4 * (_CHUNK + LANES)
_SPARE = 4 * LANES
# Of these loops the first reads at four places at once.
_WIDE, _NARROW = 64, 16

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set")

# Nobody calls them from Python.
_compile = functools.partial(numba.njit, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

# ---------------------------------------------------------------------- memory


@_intrinsic
def _pointer(context, address):  # type: ignore[no-untyped-def]
    """An address as something that ``carray`` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba.types.voidptr(numba.types.int64), generate


@_intrinsic
def _stack(context):  # type: ignore[no-untyped-def]
    """Address of the memory that a call has for itself."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # Not as one array, which would be filled with zeros in a store that takes LLVM half a minute.
        room = cgutils.alloca_once(builder, ir.IntType(8), size=_ROOM + 4 * _SPARE)  # type: ignore[no-untyped-call]
        room.align = 64
        return builder.ptrtoint(room, ir.IntType(64))

    return numba.types.int64(), generate


def _atomically(operation: str, bits: int) -> Any:
    @_intrinsic
    def change(context, address, value):  # type: ignore[no-untyped-def]
        """What was there before."""

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
    """Write LANES times a scale."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = vectors.Vectors(builder)
        v.store(v.splat(arguments[1]), arguments[0])
        return context.get_dummy_value()

    return numba.types.void(numba.types.int64, numba.types.float32), generate


@_intrinsic
def _size(context, dtype):  # type: ignore[no-untyped-def]
    """Bytes of an element; 0 for none."""
    nbytes = 0 if isinstance(dtype, numba.types.NoneType) else dtype.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(64), nbytes)

    return numba.types.int64(dtype), generate


@_compile()
def _places(task):  # type: ignore[no-untyped-def]
    return carray(_pointer(task[PLACES]), (task[STRETCHES], COLUMNS), np.int64)


@_compile()
def _row_of(places, element):  # type: ignore[no-untyped-def]
    """The stretch that has this element."""
    low, high = 0, places.shape[0]
    while high - low > 1:
        middle = (low + high) // 2
        if places[middle, START] <= element:
            low = middle
        else:
            high = middle
    return low


# ---------------------------------------------------------------------- counting

_advance = tuple(vectors.make_advance(scaling, by_adding) for scaling, by_adding in WAYS)
_by_way_0, _by_way_1, _by_way_2, _by_way_3, _by_way_4 = _advance


@_compile()
def _lanes(weight, update, codes, task, at, update_at, codes_at, numel, scales, step, mask):  # type: ignore[no-untyped-def]
    way, constants = task[WAY], task[FORMAT]
    if way == 0:
        return _by_way_0(weight, update, codes, at, update_at, codes_at, numel, scales, step, mask, constants)
    if way == 1:
        return _by_way_1(weight, update, codes, at, update_at, codes_at, numel, scales, step, mask, constants)
    if way == 2:
        return _by_way_2(weight, update, codes, at, update_at, codes_at, numel, scales, step, mask, constants)
    if way == 3:
        return _by_way_3(weight, update, codes, at, update_at, codes_at, numel, scales, step, mask, constants)
    return _by_way_4(weight, update, codes, at, update_at, codes_at, numel, scales, step, mask, constants)


@_compile()
def _rest(weight, update, codes, task, at, update_at, codes_at, numel, scales, step, mask, spare):  # type: ignore[no-untyped-def]
    """Fewer than LANES elements: beside them zeros, which stay zeros, under a scale of 1."""
    spare_update, spare_codes, spare_scales = spare + _SPARE, spare + 2 * _SPARE, spare + 3 * _SPARE
    _clear(spare, 3 * _SPARE)
    _fill(spare_scales, np.float32(1.0))
    _copy(spare, at, numel * _size(weight))
    _copy(spare_update, update_at, numel * _size(update))
    _copy(spare_codes, codes_at, numel * _size(codes))
    # Those of a single scale lie LANES times in memory as well.
    _copy(spare_scales, scales, numel * 4)
    found = _lanes(weight, update, codes, task, spare, spare_update, spare_codes, LANES, spare_scales, 4, mask)
    _copy(codes_at, spare_codes, numel * _size(codes))
    return found


@_compile()
def _spread(scales, index, low, high, group, room):  # type: ignore[no-untyped-def]
    """A scale for each element, from one for each group."""
    at = low
    while at < high:
        until = min((index + 1) * group, high)
        for place in range(at, until, LANES):
            # Beyond the group, too: the next one writes there after it.
            _fill(room + 4 * (place - low), scales[index])
        at, index = until, index + 1


@_compile()
def _count_stretch(weight, update, codes, task, row, low, high, room):  # type: ignore[no-untyped-def]
    place = _places(task)[row]
    group, first_scale = (place[GROUP], place[SCALE]) if task[SCALED] else (place[NUMEL], 0)
    scales = carray(_pointer(task[SCALES] + 4 * first_scale), (place[NUMEL],), np.float32)
    mask, update_at = task[MASK], np.int64(0)
    if _size(update):
        update_at = carray(_pointer(task[UPDATES]), (task[STRETCHES],), np.int64)[row]
        if not update_at:
            # The weight takes its place, and no bit of it counts.
            update_at, mask = place[WEIGHT], np.int64(0)
    flips, updates, stalled = np.int64(0), np.int64(0), np.int64(0)
    while low < high:
        index = low // group
        until = min((index + 1) * group, high)
        if until - low >= _CHUNK or until == high:
            # One scale; without those at the end that need the next one beside them.
            if until < high:
                until -= (until - low) % LANES
            _fill(room, scales[index])
            step = 0
        else:
            until = min(low + _CHUNK, high)
            _spread(scales, index, low, until, group, room)
            step = 4
        numel = (until - low) // LANES * LANES
        at, codes_at = place[WEIGHT] + low * _size(weight), place[CODES] + low * _size(codes)
        beside = update_at + low * _size(update)
        a, b, c = _lanes(weight, update, codes, task, at, beside, codes_at, numel, room, step, mask)
        flips, updates, stalled = flips + a, updates + b, stalled + c
        low += numel
        if low < until:
            at, codes_at = place[WEIGHT] + low * _size(weight), place[CODES] + low * _size(codes)
            beside, under = update_at + low * _size(update), room + step * numel
            a, b, c = _rest(
                weight, update, codes, task, at, beside, codes_at, until - low, under, step, mask, room + _ROOM
            )
            flips, updates, stalled = flips + a, updates + b, stalled + c
            low = until
    return flips, updates, stalled


@_compile()
def _count_items(address, weight, update, codes):  # type: ignore[no-untyped-def]
    task = carray(_pointer(address), (TASK,), np.int64)
    places = _places(task)
    rows = carray(_pointer(task[ROWS]), (task[STRETCHES],), np.int64)
    room = _stack()
    while True:
        start = _add(address + 8 * NEXT, 1) * task[ITEM]
        if start >= task[TOTAL]:
            return
        stop = min(start + task[ITEM], task[TOTAL])
        row = _row_of(places, start)
        while start < stop:
            begin = places[row, START]
            high = min(places[row, NUMEL], stop - begin)
            found = _count_stretch(weight, update, codes, task, row, start - begin, high, room)
            counts = task[COUNTS] + rows[row] * task[STRIDE]
            for column in range(3):
                _add(counts + 8 * column, found[column])
            start = begin + high
            row += 1


def _count(task):  # type: ignore[no-untyped-def]
    _count_items(task, WEIGHT_TYPE, UPDATE_TYPE, CODES_TYPE)  # type: ignore[name-defined]  # noqa: F821


# ---------------------------------------------------------------------- the largest magnitude

_largest_wide, _largest_narrow = vectors.make_largest(_WIDE // _NARROW), vectors.make_largest(1)


@_compile()
def _largest_of(bits, address, numel):  # type: ignore[no-untyped-def]
    found = np.int64(0)
    wide = numel - numel % _WIDE
    if wide > _WIDE:
        found = _largest_wide(bits, address, wide)
        address, numel = address + wide * _size(bits), numel - wide
    narrow = numel - numel % _NARROW
    if narrow:
        found = max(found, _largest_narrow(bits, address, narrow))
    for at in range(narrow, numel):
        number = np.int64(carray(_pointer(address), (numel,), bits)[at])
        found = max(found, number & ((np.int64(1) << (8 * _size(bits) - 1)) - 1))
    return found


@_compile()
def _largest_items(address, bits):  # type: ignore[no-untyped-def]
    task = carray(_pointer(address), (TASK,), np.int64)
    places = _places(task)
    # bfloat16 is the upper half of a float32.
    shift = 32 - 8 * _size(bits)
    items = (task[TOTAL] + task[ITEM] - 1) // task[ITEM]
    while True:
        # Backwards, since an optimizer goes forwards: the caches hold the end. What then stays there is the beginning,
        # with which counting starts.
        start = (items - 1 - _add(address + 8 * NEXT, 1)) * task[ITEM]
        if start < 0:
            return
        stop = min(start + task[ITEM], task[TOTAL])
        row = _row_of(places, start)
        while start < stop:
            place = places[row]
            low, high = start - place[START], min(place[NUMEL], stop - place[START])
            while low < high:
                index = low // place[GROUP]
                until = min((index + 1) * place[GROUP], high)
                found = _largest_of(bits, place[WEIGHT] + low * _size(bits), until - low)
                # Others may have a part of this group.
                _raise(task[LARGEST] + 4 * (place[SCALE] + index), found << shift)
                low = until
            start = place[START] + high
            row += 1


def _largest(task):  # type: ignore[no-untyped-def]
    _largest_items(task, WEIGHT_TYPE)  # type: ignore[name-defined]  # noqa: F821


# ---------------------------------------------------------------------- compiling

WEIGHTS = (torch.float32, torch.bfloat16)
"""dtypes of the weights that there are loops for."""

# What Numba, which has no bfloat16, sees each dtype as.
_SEEN_AS = {
    torch.float32: np.float32,
    torch.bfloat16: np.int16,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
}
_BITS = {torch.float32: np.int32, torch.bfloat16: np.int16, torch.float16: np.int16, torch.bool: np.uint8, None: None}

_loops: dict[tuple[Any, ...], Any] = {}


def count_loop(weight: torch.dtype, update: torch.dtype | None, codes: torch.dtype) -> pool.Work | None:
    """The loop that encodes, compares, counts and stores, for these dtypes, ready to be called; None if there is none.

    Called with the address of a task, it adds flips, updates and stalled weights to the rows of its counts.
    """
    if weight not in WEIGHTS or update not in _BITS or codes not in _SEEN_AS:
        return None
    seen = {"WEIGHT_TYPE": _SEEN_AS[weight], "UPDATE_TYPE": _BITS[update], "CODES_TYPE": _SEEN_AS[codes]}
    return _loop(_count, (weight, update, codes), seen)


def largest_loop(weight: torch.dtype) -> pool.Work | None:
    """The loop that finds the largest magnitude under each scale, for this dtype; None if there is none.

    Called with the address of a task, it raises the numbers at its address of the largest, float32, from 0 or more.
    """
    return _loop(_largest, (weight,), {"WEIGHT_TYPE": _BITS[weight]}) if weight in WEIGHTS else None


def _loop(
    function: Callable[[int], None], dtypes: tuple[torch.dtype | None, ...], seen: dict[str, Any]
) -> pool.Work | None:
    key = (function.__name__, *dtypes)
    if key not in _loops:
        try:
            _loops[key] = _compiled(function, dtypes, seen)
        except Exception as error:
            _loops[key] = None
            message = str(error).strip().splitlines()[:1]
            warnings.warn(
                "weightflip: Numba cannot compile, counting goes on without it: "
                f"{type(error).__name__}: {' '.join(message)}",
                stacklevel=2,
            )
    loop = _loops[key]
    return None if loop is None else loop.ctypes


def _compiled(function: Any, dtypes: tuple[torch.dtype | None, ...], seen: dict[str, Any]) -> Any:
    own = types.FunctionType(function.__code__, {**function.__globals__, **seen}, "_")
    own.__name__ = own.__qualname__ = _name(function, dtypes)
    own.__module__ = function.__module__
    signature = numba.types.void(numba.types.int64)
    for cache in (True, False):
        try:
            loop = numba.cfunc(signature, cache=cache, error_model="numpy")(own)
        except Exception:
            # Mostly a cache that has no place, or cannot be written or read.
            if not cache:
                raise
        else:
            break
    return loop


def _name(function: Any, dtypes: tuple[torch.dtype | None, ...]) -> str:
    """Another one for each signature, processor and version of this code.

    Numba's cache holds one file of a name for all of a function's signatures, and processes that start together can mix
    them up: here they write the same. And it knows a function by its own file alone.
    """
    processor = f"{llvmlite.binding.get_host_cpu_name()} {llvmlite.binding.get_host_cpu_features().flatten()}"
    digest = hashlib.sha256(processor.encode())
    for module in (vectors, sys.modules[__name__]):
        digest.update(inspect.getsource(module).encode())
    names = ["none" if dtype is None else str(dtype).removeprefix("torch.") for dtype in dtypes]
    return f"{function.__name__}_{'_'.join(names)}_{digest.hexdigest()[:12]}"
