"""One pass over weights on the CPU: encode, compare, count and store, with nothing in between.

Equal to :mod:`weightflip.kernels.eager` bit for bit, and several times as fast. Imported only where Numba is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from weightflip.kernels import compiled, pool, vectors
from weightflip.kernels.constants import lanes
from weightflip.kernels.runs import Addresses, Kind, Stretch

DEVICE = "cpu"

# So many that starting a thread for them does not show, and so few that threads end together.
_ELEMENTS_PER_ITEM = 1 << 16

_MAGNITUDE = {torch.float32: 0x7FFFFFFF, torch.bfloat16: 0x7FFF, torch.float16: 0x7FFF, torch.bool: 0xFF, None: 0}
_NO_SCALE = np.ones(1, dtype=np.float32)


class Run:
    """A :class:`weightflip.kernels.runs.Run` for the CPU: threads share the elements."""

    def __init__(self, stretches: Sequence[Stretch], kind: Kind) -> None:
        self.kind = kind
        numbers = lanes(kind.rounding)
        assert numbers is not None
        self._lanes = np.array(numbers, dtype=np.int32)
        table = np.array(stretches, dtype=np.int64)
        self._places = places = np.zeros((len(table), compiled.COLUMNS), dtype=np.int64)
        places[:, compiled.WEIGHT], places[:, compiled.CODES] = table[:, 0], table[:, 1]
        places[:, compiled.NUMEL], places[:, compiled.GROUP] = table[:, 2], table[:, 3]
        scales = -(-table[:, 2] // table[:, 3])
        places[1:, compiled.START] = table[:-1, 2].cumsum()
        places[1:, compiled.SCALE] = scales[:-1].cumsum()
        self._scales, self._numel = int(scales.sum()), int(table[:, 2].sum())
        self._in_order = np.arange(len(table))
        self._task = np.zeros(compiled.TASK, dtype=np.int64)
        self._task[compiled.TOTAL] = self._numel
        self._task[compiled.STRETCHES] = len(table)
        self._task[compiled.PLACES] = places.ctypes.data
        self._task[compiled.FORMAT] = self._lanes.ctypes.data
        self._task[compiled.MASK] = _MAGNITUDE[kind.update]

    @staticmethod
    def can_do(kind: Kind, *, scaled: bool) -> bool:
        numbers = lanes(kind.rounding)
        # The sum's last 16 bits are those of the ordinal.
        if numbers is None or (numbers.by_adding and kind.codes.itemsize > 2):
            return False
        if scaled and compiled.largest_loop(kind.weight) is None:
            return False
        return compiled.count_loop(kind.weight, kind.update, kind.codes) is not None

    def largest(self) -> Tensor:
        largest = torch.zeros(self._scales, dtype=torch.float32, device="cpu")
        task = self._task.copy()
        task[compiled.LARGEST] = largest.data_ptr()
        self._call(compiled.largest_loop(self.kind.weight), task)
        return largest

    def count_(self, scale: Tensor | None, updates: Addresses | None) -> Tensor:
        counts = torch.zeros(len(self._places), 3, dtype=torch.int64, device="cpu")
        self._count_into(counts, self._in_order.ctypes.data, scale, updates)
        return counts

    def count_into_(self, counts: Tensor, rows: Tensor, scale: Tensor | None, updates: Addresses | None) -> None:
        self._count_into(counts, rows.data_ptr(), scale, updates)

    def _count_into(self, counts: Tensor, rows: int, scale: Tensor | None, updates: Addresses | None) -> None:
        rounding, by_adding = self.kind.rounding, bool(self._lanes[-1])
        task = self._task.copy()
        if scale is not None:
            scaling = vectors.DIVIDED if rounding.divides else vectors.MULTIPLIED
        else:
            scaling = vectors.MULTIPLIED if by_adding else vectors.PLAIN
        task[compiled.WAY] = compiled.WAYS.index((scaling, by_adding))
        task[compiled.SCALES] = _NO_SCALE.ctypes.data if scale is None else scale.data_ptr()
        task[compiled.SCALED] = scale is not None
        if updates is not None:
            task[compiled.UPDATES] = updates.ctypes.data
        task[compiled.COUNTS], task[compiled.STRIDE] = counts.data_ptr(), counts.stride(0) * counts.element_size()
        task[compiled.ROWS] = rows
        self._call(compiled.count_loop(self.kind.weight, self.kind.update, self.kind.codes), task)

    def _call(self, loop: pool.Work | None, task: Addresses) -> None:
        assert loop is not None
        task[compiled.ITEM] = _ELEMENTS_PER_ITEM
        pool.run(loop, task.ctypes.data, -(-self._numel // _ELEMENTS_PER_ITEM))
