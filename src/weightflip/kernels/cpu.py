"""One pass over weights on the CPU: encode, compare, count and store, with nothing in between.

Equal to :mod:`weightflip.kernels.eager` bit for bit, and several times as fast. Imported only where Numba is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from weightflip.formats import BF16, ScaleFormula
from weightflip.kernels import compiled, groups, items, moves, pool, vectors
from weightflip.kernels.constants import lanes
from weightflip.kernels.pointwise import Expression, Pointwise, bits_of_state
from weightflip.kernels.runs import Addresses, Kind, Observed, ScaleCodes, ScaleSteps, Scaling, StoredScales, Stretch
from weightflip.kernels.sampled import SampledWeight

DEVICE = "cpu"

# Enough that starting a thread costs little in comparison, and few enough that threads finish together.
_ELEMENTS_PER_ITEM = 1 << 16

# For blocks over several rows: the row of an item is long enough for the processor to prefetch it.
_ELEMENTS_PER_ITEM_OF_BLOCKS = 1 << 17

_WEIGHTS = (torch.float32, torch.bfloat16)
_UPDATES = (None, torch.float32, torch.bfloat16, torch.float16, torch.bool)
_CODES = (torch.int8, torch.int16, torch.int32)
_NO_SCALE = np.ones(1, dtype=np.float32)


class Samples:
    """:class:`weightflip.kernels.sampled.Samples` on the CPU: threads share the weights."""

    def __init__(self, weights: Sequence[SampledWeight]) -> None:
        # The tensors must stay where they are.
        self._weights = list(weights)
        sample = weights[0].sample
        self._bits = 8 * sample.weights.itemsize, 8 * sample.codes.itemsize
        self._places = np.array([_place(weight) for weight in weights], dtype=np.int64)
        self._all = np.arange(len(weights))

    @staticmethod
    def can_do(weight: torch.dtype, codes: torch.dtype) -> bool:
        if weight not in _WEIGHTS or codes not in (torch.int8, torch.int16):
            return False
        bits = 8 * weight.itemsize, 8 * codes.itemsize
        return compiled.take_loop(*bits) is not None and compiled.move_loop(*bits) is not None

    def take(self) -> None:
        self._call(compiled.take_loop(*self._bits), self._task(self._all))

    def move(self, indices: Addresses, old_scales: Addresses, new_scales: Addresses, sums: Tensor) -> None:
        task = self._task(indices)
        task[moves.OLD_SCALES], task[moves.NEW_SCALES] = old_scales.ctypes.data, new_scales.ctypes.data
        task[moves.SUMS], task[moves.STRIDE] = sums.data_ptr(), sums.stride(0) * sums.element_size()
        self._call(compiled.move_loop(*self._bits), task)

    def _task(self, indices: Addresses) -> Addresses:
        task = np.zeros(moves.TASK, dtype=np.int64)
        task[moves.LAYERS], task[moves.INDICES] = len(indices), indices.ctypes.data
        task[moves.PLACES] = self._places.ctypes.data
        return task

    def _call(self, loop: compiled.Loop | None, task: Addresses) -> None:
        assert loop is not None
        pool.run(loop.address, loop.call, task.ctypes.data, int(task[moves.LAYERS]))


_MOVES = {None: moves.PLAIN, False: moves.MULTIPLIES, True: moves.DIVIDES}


def _place(weight: SampledWeight) -> list[int]:
    """Return a row of the table of samples."""
    sample = weight.sample
    place = [0] * moves.COLUMNS
    place[moves.WEIGHT], place[moves.CODES] = weight.address, weight.codes
    place[moves.AT] = 0 if sample.at is None else sample.at.data_ptr()
    place[moves.NUMEL], place[moves.GROUP] = sample.weights.numel(), weight.group
    place[moves.OLD_WEIGHTS], place[moves.OLD_CODES] = sample.weights.data_ptr(), sample.codes.data_ptr()
    place[moves.MOVED], place[moves.QUANTIZED_MOVED] = sample.moved.data_ptr(), sample.quantized_moved.data_ptr()
    place[moves.NUMBERS], place[moves.FORM] = weight.numbers.data_ptr(), _MOVES[weight.divides]
    place[moves.SMALLEST], place[moves.LARGEST] = sample.outermost
    place[moves.SHARE] = int(np.float64(sample.share).view(np.int64))
    place[moves.ROW] = weight.row
    return place


class Run:
    """A :class:`weightflip.kernels.runs.Run` for the CPU: threads share the elements."""

    saves_calls = False
    observes = True
    samples = Samples
    longest_group = groups.LONGEST
    widest_block = groups.WIDEST

    def __init__(self, stretches: Sequence[Stretch], kind: Kind) -> None:
        self.kind = kind
        numbers = lanes(kind.rounding)
        assert numbers is not None
        self._lanes = np.array(numbers, dtype=np.int32)
        table = np.array(stretches, dtype=np.int64)
        self._places = places = np.zeros((len(table), items.COLUMNS), dtype=np.int64)
        places[:, items.WEIGHT], places[:, items.CODES] = table[:, 0], table[:, 1]
        places[:, items.NUMEL], places[:, items.GROUP] = table[:, 2], table[:, 3]
        places[:, items.WIDTH], places[:, items.HEIGHT] = table[:, 4], table[:, 5]
        scales = np.array([stretch.scales for stretch in stretches], dtype=np.int64)
        places[1:, items.START] = table[:-1, 2].cumsum()
        places[1:, items.SCALE] = scales[:-1].cumsum()
        self._scales, self._numel = int(scales.sum()), int(table[:, 2].sum())
        self._in_order = np.arange(len(table))
        self._factors: _Factors | None = None
        self._scaling: Scaling | None = None
        self._task = np.zeros(items.TASK, dtype=np.int64)
        self._task[items.TOTAL] = self._numel
        self._task[items.STRETCHES] = len(table)
        self._task[items.PLACES] = places.ctypes.data
        self._task[items.FORMAT] = self._lanes.ctypes.data
        weight_size, update_size, code_size = _sizes(kind)
        self._task[items.WEIGHT_SIZE], self._task[items.UPDATE_SIZE] = weight_size, update_size
        self._task[items.CODES_SIZE] = code_size
        # All bits except the sign; a bool has no sign.
        self._task[items.MASK] = 0xFF if update_size == 1 else (1 << 8 * update_size >> 1) - 1

    @staticmethod
    def can_do(kind: Kind, *, scaled: bool, groups: tuple[Pointwise, ...] = ()) -> bool:
        if kind.weight not in _WEIGHTS or kind.update not in _UPDATES or kind.codes not in _CODES:
            return False
        numbers = lanes(kind.rounding)
        # The ordinal is in the last 16 bits of the sum.
        if numbers is None or (numbers.by_adding and kind.codes.itemsize > 2):
            return False
        if sum(len(g.counts) for g in groups) > vectors.MOST_COUNTS or len(_states(groups)) > vectors.MOST_STATES:
            return False
        loops = [_count_lanes(kind, groups, is_scaled=is_scaled) for is_scaled in (False, True)]
        loops.append(compiled.count_loop())
        if scaled:
            loops += [compiled.largest_loop(), compiled.largest_lanes(8 * kind.weight.itemsize)]
        return all(loop is not None for loop in loops)

    @staticmethod
    def can_scale(kind: Kind, scaling: Scaling) -> bool:
        if not Run.can_do(kind, scaled=False):
            return False
        loops = [compiled.count_groups_loop(), compiled.largest_lanes(8 * kind.weight.itemsize), _scales_loop(scaling)]
        return all(loop is not None for loop in loops)

    @staticmethod
    def keep(codes: Tensor, new: Tensor) -> Tensor | None:
        if codes.dtype not in _CODES or new.dtype is not codes.dtype or new.shape != codes.shape:
            return None
        if not all(type(tensor) is Tensor and tensor.is_contiguous() for tensor in (codes, new)):
            return None
        loop = compiled.keep_loop(8 * codes.itemsize)
        if loop is None:
            return None
        task = np.zeros(items.KEEP_TASK, dtype=np.int64)
        task[items.TOTAL], task[items.ITEM] = codes.numel(), _ELEMENTS_PER_ITEM
        task[items.KEEP_CODES], task[items.KEEP_NEW] = codes.data_ptr(), new.data_ptr()
        pool.run(loop.address, loop.call, task.ctypes.data, -(-codes.numel() // _ELEMENTS_PER_ITEM))
        return torch.tensor(task[items.KEEP_CHANGED], device="cpu")

    def largest(self) -> Tensor:
        largest = torch.zeros(self._scales, dtype=torch.float32, device="cpu")
        self._find_largest(largest)
        return largest

    def _find_largest(self, largest: Tensor) -> None:
        task = self._task.copy()
        task[items.LARGEST] = largest.data_ptr()
        self._call(compiled.largest_loop(), compiled.largest_lanes(8 * self.kind.weight.itemsize), task)

    def factors(self, scaling: Scaling) -> Tensor:
        if self._factors is None or self._factors.scaling is not scaling:
            self._factors = _Factors(scaling, self._scales)
        self._find_largest(self._factors.largest.zero_())
        return self._factors.compute()

    def count_(self, scale: Tensor | None, updates: Addresses | None) -> Tensor:
        counts = torch.zeros(len(self._places), 3, dtype=torch.int64, device="cpu")
        self._count_into(counts, self._in_order.ctypes.data, scale, updates)
        return counts

    def count_into_(
        self,
        counts: Tensor,
        rows: Tensor,
        scale: Tensor | None,
        updates: Addresses | None,
        scale_codes: ScaleCodes | None = None,
        observed: Observed | None = None,
    ) -> None:
        self._count_into(counts, rows.data_ptr(), scale, updates, observed)
        if scale_codes is not None:
            new, stored, changes = scale_codes
            # A cumulative sum and its differences take five times as long.
            has_changed = (new != stored).numpy().view(np.uint8)
            changed = np.add.reduceat(has_changed, self._places[:, items.SCALE], dtype=np.uint32)
            changes.index_add_(0, rows, torch.from_numpy(changed.astype(np.int64)))
            stored.copy_(new)

    def count_groups_into_(
        self,
        counts: Tensor,
        rows: Tensor,
        scaling: Scaling,
        updates: Addresses | None,
        stored: StoredScales | None = None,
        largest: Tensor | None = None,
    ) -> None:
        task = self._counting(self._task_for_groups(scaling), counts, rows.data_ptr(), updates)
        task[groups.KEPT] = 0 if largest is None else largest.data_ptr()
        if stored is not None:
            codes, changes = stored
            task[groups.STORED], task[groups.STORED_SIZE] = codes.data_ptr(), codes.element_size()
            task[groups.CHANGES] = changes.data_ptr()
            task[groups.CHANGES_STRIDE] = changes.stride(0) * changes.element_size()
        self._call(compiled.count_groups_loop(), _count_lanes(self.kind, is_scaled=True), task)

    def _task_for_groups(self, scaling: Scaling) -> Addresses:
        """Return what is the same in each call of ``count_groups_into_``."""
        if self._scaling is not scaling:
            task = np.zeros(groups.TASK, dtype=np.int64)
            task[: items.TASK] = self._task
            largest, scales = compiled.largest_lanes(8 * self.kind.weight.itemsize), _scales_loop(scaling)
            assert largest is not None
            assert scales is not None
            task[groups.LARGEST_LOOP], task[groups.SCALES_LOOP] = largest.address, scales.address
            self._rule = _rule(scaling.description)
            task[groups.RULE] = self._rule.ctypes.data
            self._scaling, self._group_task = scaling, task
        return self._group_task

    def _count_into(
        self,
        counts: Tensor,
        rows: int,
        scale: Tensor | None,
        updates: Addresses | None,
        observed: Observed | None = None,
    ) -> None:
        task = self._counting(self._task, counts, rows, updates)
        task[items.SCALED] = scale is not None
        task[items.SCALES] = _NO_SCALE.ctypes.data if scale is None else scale.data_ptr()
        groups = () if observed is None else observed.groups
        bits = np.array([bits_of_state(state, self.kind.codes) for state in _states(groups)], dtype=np.int64)
        if observed is not None:
            task[items.STATES], task[items.STATE_BITS] = len(bits), bits.ctypes.data
            task[items.STATE_PLACES] = observed.states.ctypes.data
            task[items.SUMS], task[items.SUM_COLUMNS] = len(observed.columns), observed.columns.ctypes.data
            task[items.SUM_TABLE] = observed.sums.data_ptr()
            task[items.SUM_STRIDE] = observed.sums.stride(0) * observed.sums.element_size()
            if scale is not None and observed.old_scale is not None:
                task[items.OLD_SCALES] = observed.old_scale.data_ptr()
        self._call(compiled.count_loop(), _count_lanes(self.kind, groups, is_scaled=scale is not None), task)

    def _counting(self, task: Addresses, counts: Tensor, rows: int, updates: Addresses | None) -> Addresses:
        """Return a copy of a task that counts into a table."""
        task = task.copy()
        if updates is not None:
            task[items.UPDATES] = updates.ctypes.data
        task[items.COUNTS], task[items.STRIDE] = counts.data_ptr(), counts.stride(0) * counts.element_size()
        task[items.ROWS] = rows
        return task

    def _call(self, loop: compiled.Loop | None, over_lanes: compiled.Loop | None, task: Addresses) -> None:
        assert loop is not None
        assert over_lanes is not None
        item = _ELEMENTS_PER_ITEM_OF_BLOCKS if self._places[0, items.WIDTH] else _ELEMENTS_PER_ITEM
        task[items.LANES_LOOP], task[items.ITEM] = over_lanes.address, item
        pool.run(loop.address, loop.call, task.ctypes.data, -(-self._numel // item))


class _Factors:
    """Computes factors from the largest magnitudes, in memory that is kept for the next step.

    Args:
        scaling: How to compute them.
        numel: Their number.
    """

    def __init__(self, scaling: Scaling, numel: int) -> None:
        loop = _scales_loop(scaling)
        assert loop is not None
        assert not scaling.is_stored
        self.scaling, self._loop = scaling, loop
        self.largest = torch.zeros(numel, dtype=torch.float32, device="cpu")
        self._factors = torch.zeros_like(self.largest)
        self._rule, self._changes = _rule(scaling.description), np.zeros(1, dtype=np.int64)

    def compute(self) -> Tensor:
        largest, factors = self.largest.data_ptr(), self._factors.data_ptr()
        self._loop.call(largest, len(self.largest), self._rule.ctypes.data, factors, 0, self._changes.ctypes.data)
        return self._factors


def _sizes(kind: Kind) -> tuple[int, int, int]:
    """Return the bytes of a weight, an update and a code."""
    return kind.weight.itemsize, 0 if kind.update is None else kind.update.itemsize, kind.codes.itemsize


_FORMS = {"multiplies": groups.MULTIPLIES, "divides": groups.DIVIDES, "inverse": groups.INVERSE}


def _scales_loop(scaling: Scaling) -> compiled.Loop | None:
    if isinstance(formula := scaling.description, ScaleFormula):
        form = _FORMS[formula.form]
        return compiled.scales_loop(form, is_half=formula.format == BF16, stores=scaling.is_stored)
    return compiled.scales_loop(None, is_half=False, stores=scaling.is_stored)


def _rule(description: ScaleFormula | ScaleSteps) -> Addresses:
    """Return the argument ``rule`` of the loop that computes scales."""
    if isinstance(description, ScaleFormula):
        return np.array([description.number, description.smallest]).view(np.int64)
    shift, *tables = description
    return np.array([shift, *(table.data_ptr() for table in tables)], dtype=np.int64)


def _states(groups: tuple[Pointwise, ...]) -> list[Expression]:
    return [state for group in groups for state, _ in group.states]


def _count_lanes(kind: Kind, groups: tuple[Pointwise, ...] = (), *, is_scaled: bool) -> compiled.Loop | None:
    numbers = lanes(kind.rounding)
    assert numbers is not None
    by_adding = bool(numbers.by_adding)
    scaling = vectors.DIVIDED if kind.rounding.divides else vectors.MULTIPLIED
    if not is_scaled and not by_adding:
        # When rounding by adding, a scale of 1 avoids another loop. Here, a processor that flushes subnormal numbers
        # would turn them into 0.
        scaling = vectors.PLAIN
    weight_size, update_size, code_size = _sizes(kind)
    return compiled.count_lanes(8 * weight_size, 8 * update_size, 8 * code_size, scaling, by_adding, groups)
