"""One pass over weights on the CPU, compiled by Numba: encode, compare, count and store, with nothing in between.

Equal to :mod:`weightflip.kernels.eager` bit for bit, and about three times as fast. Imported only where Numba is.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import types
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from weightflip.formats import FP32, Rounding

_INT32, _FLOAT32 = np.int32, np.float32

# Weights with fewer elements than this are done before a second thread has woken up.
_ELEMENTS_PER_THREAD = 1 << 16
# Few enough for int32 counters, and, going backwards in such steps, for what an amax has left in the cache.
_ELEMENTS_PER_CHUNK = 1 << 16

# What NumPy, which has no bfloat16, sees each dtype as.
_STORED = {torch.float32: torch.float32, torch.bfloat16: torch.int16}
_CODES = {torch.int8: torch.int8, torch.int16: torch.int16}
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.bool: torch.uint8}
_MAGNITUDE = {torch.int32: np.int32(0x7FFFFFFF), torch.int16: np.int32(0x7FFF), torch.uint8: np.int32(0xFF)}
_NO_SCALE = np.ones(1, dtype=np.float32)

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set")

_compile = functools.partial(numba.njit, nogil=True, error_model="numpy")


@functools.lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="weightflip")


if hasattr(os, "register_at_fork"):
    # A forked process has the pool but not its threads.
    os.register_at_fork(after_in_child=_threads.cache_clear)


def _to_float32(stored):  # type: ignore[no-untyped-def]
    """A stored weight as a number: float32 as it is, bfloat16 from the upper half of one."""


@overload(_to_float32)
def _implementation(stored):  # type: ignore[no-untyped-def]
    if stored is numba.types.float32:
        return lambda stored: stored
    return lambda stored: _INT32(_INT32(stored) << _INT32(16)).view(_FLOAT32)


@_compile()
def _count_chunk(weight, scale, divide, update, update_mask, codes, cut, offset, first_normal, adder, overflow, nan):  # type: ignore[no-untyped-def]
    # Numba computes int32 with int32 in int64, which halves the width of the vectors: hence the casts.
    one, magnitude_mask, infinity = _INT32(1), _INT32(0x7FFFFFFF), _INT32(0x7F800000)
    just_under_half = _INT32((1 << (cut - 1)) - 1)
    adder_bits = _FLOAT32(adder).view(_INT32)
    flips, updates, stalled = _INT32(0), _INT32(0), _INT32(0)
    for i in range(weight.size):
        number = _to_float32(weight[i])  # type: ignore[no-untyped-call]
        scaled = number / scale if divide else number * scale
        bits = _FLOAT32(scaled).view(_INT32)
        magnitude = _INT32(bits & magnitude_mask)
        # As weightflip.quantizers.floatx.round_to_ordinals, which explains it.
        is_odd = _INT32(_INT32(_INT32(magnitude >> cut) - offset) & one)
        normal = _INT32(_INT32(_INT32(_INT32(magnitude + just_under_half) + is_odd) >> cut) - offset)
        subnormal = _INT32(_FLOAT32(magnitude.view(_FLOAT32) + adder).view(_INT32) - adder_bits)
        code = min(subnormal if magnitude < first_normal else normal, overflow)
        code = _INT32(-code) if bits < 0 else code
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


def _count_range(start, stop, group, weight, scale, divide, update, update_mask, codes, counts, rounding):  # type: ignore[no-untyped-def]
    while stop > start:
        index = (stop - 1) // group
        first = max(start, index * group, stop - _ELEMENTS_PER_CHUNK)
        part = slice(first, stop)
        flips, updates, stalled = _count_chunk(
            weight[part],
            scale[index],
            divide,
            None if update is None else update[part],
            update_mask,
            codes[part],
            *rounding,
        )
        counts[0] += flips
        counts[1] += updates
        counts[2] += stalled
        stop = first


_kernels: dict[tuple[torch.dtype, torch.dtype | None, torch.dtype], Any] = {}


def _kernel(weight: torch.dtype, update: torch.dtype | None, codes: torch.dtype, constants: tuple[Any, ...]) -> Any:
    """``_count_range`` for these dtypes, compiled and loaded: it raises here or not at all. None if it cannot be."""
    key = weight, update, codes
    if key not in _kernels:
        try:
            _kernels[key] = _compiled(key, constants)
        except Exception as error:
            _kernels[key] = None
            message = str(error).strip().splitlines()[:1]
            warnings.warn(
                "weightflip: Numba cannot compile, counting goes on without it: "
                f"{type(error).__name__}: {' '.join(message)}",
                stacklevel=2,
            )
    return _kernels[key]


def _compiled(key: tuple[torch.dtype | None, ...], constants: tuple[Any, ...]) -> Any:
    # A function of its own for each signature and processor: Numba's cache holds one file of a name for all of a
    # function's signatures, and processes that start together can mix them up. Here they write the same.
    processor = f"{llvmlite.binding.get_host_cpu_name()} {llvmlite.binding.get_host_cpu_features().flatten()}"
    names = ["none" if dtype is None else str(dtype).removeprefix("torch.") for dtype in key]
    name = f"_count_range_{'_'.join(names)}_{hashlib.sha256(processor.encode()).hexdigest()[:12]}"
    function = types.FunctionType(_count_range.__code__, _count_range.__globals__, name)
    function.__qualname__ = name
    weight, update, codes = (None if dtype is None else torch.zeros(1, dtype=dtype).numpy() for dtype in key)
    for cache in (True, False):
        try:
            kernel = _compile(cache=cache)(function)
            kernel(0, 0, 1, weight, _NO_SCALE, False, update, np.int32(0), codes, np.zeros(3, np.int64), constants)
        except Exception:
            # Mostly a cache that has no place, or cannot be written or read.
            if not cache:
                raise
        else:
            break
    return kernel


@functools.lru_cache(maxsize=64)
def _constants(rounding: Rounding) -> tuple[np.generic, ...] | None:
    """What ``_count_chunk`` needs to know of a format; None for one that it cannot round to in float32."""
    format = rounding.format
    cut = FP32.mantissa_bits - format.mantissa_bits
    adder_exponent = format.min_exponent + cut
    if cut < 1 or format.min_exponent < FP32.min_exponent or adder_exponent > FP32.max_exponent:
        return None
    offset = (FP32.bias - format.bias) << format.mantissa_bits
    first_normal = np.float32(math.inf if format.exponent_bits == 0 else format.smallest_normal).view(np.int32)
    adder = np.float32(math.ldexp(1.0, adder_exponent))
    return (
        np.int32(cut),
        np.int32(offset),
        first_normal,
        adder,
        np.int32(rounding.overflow),
        np.int32(format.nan_ordinal),
    )


def count_(
    weight: Tensor, scale: Tensor | None, rounding: Rounding, codes: Tensor, update: Tensor | None, counts: Tensor
) -> bool:
    """Encode, compare, add to ``counts`` and store the new codes, if these tensors are of the kinds known here.

    Args:
        weight: Before rounding; float32 or bfloat16, dense.
        scale: None, or float32 of one element, or of one for so many neighbours in memory.
        rounding: How a weight becomes an ordinal.
        codes: Ordinals before the step, laid out as the weight; overwritten.
        update: The gradient, or a bool mask of the weights that had one, laid out as the weight; None counts no
            updates.
        counts: int64 of shape (3,): flips, updates, stalled; added to.

    Returns:
        Whether it was done; False leaves everything as it was.
    """
    constants = _constants(rounding)
    group = _group(weight, scale)
    flat_weight = _flat(weight, weight, _STORED) if torch.ops.aten.is_non_overlapping_and_dense(weight) else None
    flat_codes = _flat(codes, weight, _CODES)
    flat_update = None if update is None else _flat(update, weight, _BITS)
    if constants is None or group is None or flat_weight is None or flat_codes is None:
        return False
    if update is not None and flat_update is None:
        return False
    kernel = _kernel(_STORED[weight.dtype], None if update is None else _BITS[update.dtype], codes.dtype, constants)
    if kernel is None:
        return False
    flat_scale = _NO_SCALE if scale is None else scale.detach().reshape(-1).contiguous().numpy()
    mask = np.int32(0) if update is None else _MAGNITUDE[_BITS[update.dtype]]

    numel = weight.numel()
    parts = max(1, min(torch.get_num_threads(), numel // _ELEMENTS_PER_THREAD))
    found = np.zeros((parts, 3), dtype=np.int64)

    def work(part: int) -> None:
        kernel(
            numel * part // parts,
            numel * (part + 1) // parts,
            group,
            flat_weight,
            flat_scale,
            rounding.divides,
            flat_update,
            mask,
            flat_codes,
            found[part],
            constants,
        )

    others = [_threads().submit(work, part) for part in range(1, parts)]
    work(0)
    for other in others:
        other.result()
    counts.add_(torch.from_numpy(found.sum(0)))
    return True


def _flat(tensor: Tensor, like: Tensor, views: Mapping[torch.dtype, torch.dtype]) -> Any:
    """The tensor's memory as a NumPy array, if it is laid out as ``like``."""
    if tensor.dtype not in views or tensor.device.type != "cpu" or type(tensor) not in (Tensor, torch.nn.Parameter):
        return None
    if tensor.shape != like.shape or tensor.stride() != like.stride():
        return None
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(views[tensor.dtype]).numpy()


def _group(weight: Tensor, scale: Tensor | None) -> int | None:
    """How many neighbours in memory share a scale."""
    numel = max(1, weight.numel())
    if scale is None or scale.numel() == 1:
        return numel if scale is None or scale.dtype is torch.float32 else None
    by_row = scale.shape == (*weight.shape[:-1], 1)
    if scale.dtype is not torch.float32 or not by_row or not weight.is_contiguous():
        return None
    return weight.shape[-1]
