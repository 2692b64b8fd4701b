"""The loops over weights on the CPU, compiled by Numba. Imported only where Numba is.

They see memory as addresses, so that one call goes over many tensors: a row of ``places`` for each stretch of memory,
with the columns below. The elements of all stretches are numbered through, and a call handles a range of them.
"""

from __future__ import annotations

import functools
import hashlib
import types
import warnings
from collections.abc import Callable
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numba
import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic, overload

_INT32, _FLOAT32 = np.int32, np.float32

# Few enough for int32 counters, enough to hide the start of a vectorized loop; the scales beside them fit the first
# cache.
_ELEMENTS_PER_CHUNK = 1 << 12

START, NUMEL, GROUP, SCALE, WEIGHT, CODES, UPDATE, MASK = range(8)
"""Columns of ``places``: number of the first element, elements, how many of them share a scale, index of the first
scale, addresses of the weight, the codes and the update, and the bits of an update that tell whether it is 0 (none of
them where there is no update: the address is then any readable one)."""
COLUMNS = 8

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set")

_compile = functools.partial(numba.njit, nogil=True, error_model="numpy")


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """An address as something that ``carray`` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba.types.voidptr(numba.types.int64), generate


def _to_float32(stored):  # type: ignore[no-untyped-def]
    """A stored weight as a number: float32 as it is, bfloat16 from the upper half of one."""


@overload(_to_float32)
def _implementation(stored):  # type: ignore[no-untyped-def]
    if stored is numba.types.float32:
        return lambda stored: stored
    return lambda stored: _INT32(_INT32(stored) << _INT32(16)).view(_FLOAT32)


@_compile()
def _count_chunk(  # type: ignore[no-untyped-def]
    weight, scale, divide, update, update_mask, codes, cut, offset, first_normal, adder, overflow, largest, nan
):
    # Numba computes int32 with int32 in int64, which halves the width of the vectors: hence the casts.
    one, magnitude_mask, infinity = _INT32(1), _INT32(0x7FFFFFFF), _INT32(0x7F800000)
    # Just under half of what is cut off, and the difference of the biases, in one number.
    rebias = _INT32(_INT32(offset << cut) - _INT32((1 << (cut - 1)) - 1))
    parity = _INT32(offset & one)
    adder_bits = _FLOAT32(adder).view(_INT32)
    flips, updates, stalled = _INT32(0), _INT32(0), _INT32(0)
    for i in range(weight.size):
        number = _to_float32(weight[i])  # type: ignore[no-untyped-call]
        scaled = number / scale[i] if divide else number * scale[i]
        bits = _FLOAT32(scaled).view(_INT32)
        magnitude = _INT32(bits & magnitude_mask)
        # As weightflip.quantizers.floatx.round_to_ordinals, which explains it.
        is_odd = _INT32(_INT32(_INT32(magnitude >> cut) ^ parity) & one)
        normal = _INT32(_INT32(_INT32(magnitude - rebias) + is_odd) >> cut)
        subnormal = _INT32(_FLOAT32(magnitude.view(_FLOAT32) + adder).view(_INT32) - adder_bits)
        code = min(subnormal if magnitude < first_normal else normal, overflow)
        code = _INT32(-code) if bits < 0 else min(code, largest)
        code = nan if magnitude > infinity else code
        stored = codes.dtype.type(code)
        flipped = _INT32(stored != codes[i])
        codes[i] = stored
        flips = _INT32(flips + flipped)
        if update is not None:
            updated = _INT32(_INT32(update[i] & update_mask) != 0)
            updates = _INT32(updates + updated)
            stalled = _INT32(stalled + _INT32(updated & _INT32(one ^ flipped)))
    return flips, updates, stalled


def _count_range(start, stop, places, scale, divide, weight_like, update_like, codes_like, counts, rounding):  # type: ignore[no-untyped-def]
    # A scale for each element of the chunk: the inner loop is the same for a tensor and for blocks of 16.
    scales = np.empty(_ELEMENTS_PER_CHUNK, np.float32)
    held = -1
    row = 0
    while row + 1 < places.shape[0] and places[row + 1, START] <= start:
        row += 1
    while start < stop:
        begin, numel, group, first_scale = (
            places[row, START],
            places[row, NUMEL],
            places[row, GROUP],
            places[row, SCALE],
        )
        low = start - begin
        high = min(low + _ELEMENTS_PER_CHUNK, numel, stop - begin)
        index = low // group
        if index == (high - 1) // group:
            if held != first_scale + index:
                held = first_scale + index
                scales[:] = scale[held]
        else:
            held = -1
            at = low
            while at < high:
                until = min((index + 1) * group, high)
                scales[at - low : until - low] = scale[first_scale + index]
                at, index = until, index + 1
        weight = carray(_pointer(places[row, WEIGHT]), (numel,), weight_like.dtype)  # type: ignore[call-arg]
        codes = carray(_pointer(places[row, CODES]), (numel,), codes_like.dtype)
        if update_like is None:
            update = None
        else:
            update = carray(_pointer(places[row, UPDATE]), (numel,), update_like.dtype)[low:high]
        flips, updates, stalled = _count_chunk(
            weight[low:high],
            scales[: high - low],
            divide,
            update,
            _INT32(places[row, MASK]),
            codes[low:high],
            *rounding,
        )
        counts[row, 0] += flips
        counts[row, 1] += updates
        counts[row, 2] += stalled
        start = begin + high
        if high == numel:
            row += 1


@_compile()
def _largest_of(weight, mask):  # type: ignore[no-untyped-def]
    found = _INT32(0)
    for i in range(weight.size):
        # Of numbers without a sign the bit patterns have the numbers' order, and NaN is above them all.
        found = max(found, _INT32(weight[i] & mask))
    return found


def _largest_range(start, stop, places, weight_like, mask, largest, shared):  # type: ignore[no-untyped-def]
    # Backwards, since an optimizer goes forwards: the caches hold the end. What then stays there is the beginning,
    # with which counting starts.
    row = places.shape[0] - 1
    while stop > start:
        while places[row, START] >= stop:
            row -= 1
        begin, numel, group, first_scale = (
            places[row, START],
            places[row, NUMEL],
            places[row, GROUP],
            places[row, SCALE],
        )
        weight = carray(_pointer(places[row, WEIGHT]), (numel,), weight_like.dtype)  # type: ignore[call-arg]
        low, high = max(start - begin, 0), stop - begin
        while high > low:
            index = (high - 1) // group
            first = max(index * group, low)
            found = _INT32(0)
            while high > first:
                until = max(first, high - _ELEMENTS_PER_CHUNK)
                found = max(found, _largest_of(weight[until:high], mask))
                high = until
            if first > index * group:
                shared[0], shared[1] = first_scale + index, found
            else:
                largest[first_scale + index] = found
        stop = begin + low


_kernels: dict[tuple[Any, ...], Any] = {}

_EMPTY = np.zeros((1, COLUMNS), dtype=np.int64)


@functools.cache
def like(dtype: torch.dtype | None) -> Any:
    """An array of this dtype, for a kernel to see what it is to read."""
    return None if dtype is None else torch.zeros(1, dtype=dtype, device="cpu").numpy()


def count_range(
    weight: torch.dtype, update: torch.dtype | None, codes: torch.dtype, constants: tuple[np.generic, ...]
) -> Any:
    """The counting loop for these dtypes, compiled and loaded: it raises here or not at all. None if it cannot be.

    ``kernel(start, stop, places, scale, divide, weight_like, update_like, codes_like, counts, constants)`` adds flips,
    updates and stalled weights to the rows of ``counts``, int64 of shape (stretches, 3).
    """
    arrays = like(weight), like(update), like(codes)
    return _kernel(
        _count_range,
        (weight, update, codes),
        (0, 0, _EMPTY, np.ones(1, np.float32), False, *arrays, np.zeros((1, 3), np.int64), constants),
    )


def largest_range(weight: torch.dtype) -> Any:
    """The loop that finds the largest magnitudes, for weights seen as integers of this dtype, compiled; None if not.

    ``kernel(start, stop, places, weight_like, mask, largest, shared)`` writes the bits of the largest magnitude under
    each scale to ``largest``. For a scale whose elements begin before ``start``, index and bits go to ``shared``.
    """
    return _kernel(
        _largest_range,
        (weight,),
        (0, 0, _EMPTY, like(weight), np.int32(0), np.zeros(1, np.int32), np.zeros(2, np.int64)),
    )


def _kernel(function: Callable[..., None], dtypes: tuple[torch.dtype | None, ...], arguments: tuple[Any, ...]) -> Any:
    key = (function.__name__, *dtypes)
    if key not in _kernels:
        try:
            _kernels[key] = _compiled(function, dtypes, arguments)
        except Exception as error:
            _kernels[key] = None
            message = str(error).strip().splitlines()[:1]
            warnings.warn(
                "weightflip: Numba cannot compile, counting goes on without it: "
                f"{type(error).__name__}: {' '.join(message)}",
                stacklevel=2,
            )
    return _kernels[key]


def _compiled(function: Any, dtypes: tuple[torch.dtype | None, ...], arguments: tuple[Any, ...]) -> Any:
    # A function of its own for each signature and processor: Numba's cache holds one file of a name for all of a
    # function's signatures, and processes that start together can mix them up. Here they write the same.
    processor = f"{llvmlite.binding.get_host_cpu_name()} {llvmlite.binding.get_host_cpu_features().flatten()}"
    names = ["none" if dtype is None else str(dtype).removeprefix("torch.") for dtype in dtypes]
    name = f"{function.__name__}_{'_'.join(names)}_{hashlib.sha256(processor.encode()).hexdigest()[:12]}"
    own = types.FunctionType(function.__code__, function.__globals__, name)
    own.__qualname__ = name
    for cache in (True, False):
        try:
            kernel = _compile(cache=cache)(own)
            kernel(*arguments)
        except Exception:
            # Mostly a cache that has no place, or cannot be written or read.
            if not cache:
                raise
        else:
            break
    return kernel
