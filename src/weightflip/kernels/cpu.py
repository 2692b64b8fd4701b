"""One pass over weights on the CPU: encode, compare, count and store, with nothing in between.

Equal to :mod:`weightflip.kernels.eager` bit for bit, and about three times as fast. Imported only where Numba is.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightflip.kernels import compiled
from weightflip.kernels.constants import constants
from weightflip.kernels.runs import Addresses, Kind, ScaleCodes, Stretch

DEVICE = "cpu"

# Weights with fewer elements than this are done before a second thread has woken up.
_ELEMENTS_PER_THREAD = 1 << 16

# What NumPy, which has no bfloat16, sees each dtype as.
_STORED = {torch.float32: torch.float32, torch.bfloat16: torch.int16}
_CODES = {torch.int8: torch.int8, torch.int16: torch.int16}
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.bool: torch.uint8}
_MAGNITUDE = {torch.int32: np.int32(0x7FFFFFFF), torch.int16: np.int32(0x7FFF), torch.uint8: np.int32(0xFF)}
_NO_SCALE = np.ones(1, dtype=np.float32)


@functools.lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="weightflip")


if hasattr(os, "register_at_fork"):
    # A forked process has the pool but not its threads.
    os.register_at_fork(after_in_child=_threads.cache_clear)


class Run:
    """A :class:`weightflip.kernels.runs.Run` for the CPU: threads share the elements evenly."""

    saves_calls = False

    def __init__(self, stretches: Sequence[Stretch], kind: Kind) -> None:
        self.kind = kind
        numbers = constants(kind.rounding)
        assert numbers is not None
        self._constants = tuple(numbers)
        self._places = places = np.zeros((len(stretches), compiled.COLUMNS), dtype=np.int64)
        table = np.array(stretches, dtype=np.int64)
        places[:, compiled.WEIGHT], places[:, compiled.CODES] = table[:, 0], table[:, 1]
        places[:, compiled.NUMEL], places[:, compiled.GROUP] = table[:, 2], table[:, 3]
        scales = -(-table[:, 2] // table[:, 3])
        places[1:, compiled.START] = table[:-1, 2].cumsum()
        places[1:, compiled.SCALE] = scales[:-1].cumsum()
        self._scales = int(scales.sum())
        self._last_scales = torch.from_numpy(scales.cumsum() - 1)
        self._numel = int(table[:, 2].sum())
        self._likes = tuple(
            compiled.like(None if dtype is None else views[dtype])
            for dtype, views in ((kind.weight, _STORED), (kind.update, _BITS), (kind.codes, _CODES))
        )

    @staticmethod
    def can_do(kind: Kind, *, scaled: bool) -> bool:
        numbers = constants(kind.rounding)
        if numbers is None or kind.weight not in _STORED or kind.codes not in _CODES:
            return False
        if kind.update is not None and kind.update not in _BITS:
            return False
        if scaled and compiled.largest_range(_BITS[kind.weight]) is None:
            return False
        return _count_range(kind, tuple(numbers)) is not None

    def largest(self) -> Tensor:
        bits = _BITS[self.kind.weight]
        kernel, like = compiled.largest_range(bits), compiled.like(bits)
        largest = np.zeros(self._scales, dtype=np.int32)
        bounds = self._bounds()
        shared = np.full((len(bounds) - 1, 2), -1, dtype=np.int64)

        def work(part: int) -> None:
            kernel(bounds[part], bounds[part + 1], self._places, like, _MAGNITUDE[bits], largest, shared[part])

        _in_threads(work, len(bounds) - 1)
        for index, found in shared:
            if index >= 0:
                largest[index] = max(largest[index], found)
        if bits is torch.int16:
            largest <<= 16
        return torch.from_numpy(largest.view(np.float32))

    def count_(self, scale: Tensor | None, updates: Addresses | None) -> Tensor:
        places = self._places
        if updates is not None:
            has_update = updates != 0
            assert self.kind.update is not None
            # Where there is no update, the weight takes its place, and no bit of it counts.
            places[:, compiled.UPDATE] = np.where(has_update, updates, places[:, compiled.WEIGHT])
            places[:, compiled.MASK] = np.where(has_update, _MAGNITUDE[_BITS[self.kind.update]], 0)
        if scale is None:
            places[:, compiled.SCALE] = 0
            places[:, compiled.GROUP] = places[:, compiled.NUMEL]
        scales = _NO_SCALE if scale is None else scale.numpy()
        kernel = _count_range(self.kind, self._constants)
        bounds = self._bounds()
        found = np.zeros((len(bounds) - 1, len(places), 3), dtype=np.int64)

        def work(part: int) -> None:
            kernel(
                bounds[part],
                bounds[part + 1],
                places,
                scales,
                self.kind.rounding.divides,
                *self._likes,
                found[part],
                self._constants,
            )

        _in_threads(work, len(bounds) - 1)
        return torch.from_numpy(found.sum(0))

    def count_into_(
        self,
        counts: Tensor,
        rows: Tensor,
        scale: Tensor | None,
        updates: Addresses | None,
        scale_codes: ScaleCodes | None = None,
    ) -> None:
        counts.index_add_(0, rows, self.count_(scale, updates))
        if scale_codes is not None:
            new, stored, changes = scale_codes
            until = torch.cumsum(new != stored, 0).index_select(0, self._last_scales)
            changes.index_add_(0, rows, until)
            changes.index_add_(0, rows[1:], until[:-1], alpha=-1)
            stored.copy_(new)

    def _bounds(self) -> list[int]:
        parts = max(1, min(torch.get_num_threads(), self._numel // _ELEMENTS_PER_THREAD))
        return [self._numel * part // parts for part in range(parts + 1)]


def _count_range(kind: Kind, numbers: tuple[np.generic, ...]) -> Any:
    update = None if kind.update is None else _BITS[kind.update]
    return compiled.count_range(_STORED[kind.weight], update, _CODES[kind.codes], numbers)


def _in_threads(work: Callable[[int], None], parts: int) -> None:
    others = [_threads().submit(work, part) for part in range(1, parts)]
    try:
        work(0)
    finally:
        # Also when this is interrupted: they write to memory that may be given back then.
        wait(others)
    for other in others:
        other.result()
