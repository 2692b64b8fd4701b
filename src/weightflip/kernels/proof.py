"""Test compiled kernels in this process before they are used: they must count the same as plain torch.

Compiled code depends on combinations of drivers, compilers and processors that nobody has tested. So before a kernel
counts the first weight of a kind, it counts difficult numbers: every value of 16 bits, values between them, ties, NaN
and infinities, in stretches of odd lengths and offsets. The expected results come from a simple implementation, which
looks for the nearest number in a table. On other devices than the CPU, a kernel must also be faster than plain torch.

The test runs once for each kind and device, and synchronizes with the device. It does not draw random numbers.
"""

from __future__ import annotations

import functools
import logging
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from weightflip.formats import FP32, FloatRounding, IntegerRounding, Rounding
from weightflip.kernels import bits, reference
from weightflip.kernels.pointwise import NEW, NEW_UNDER_OLD_SCALE, OLD, Expression, Pointwise, bits_of_state, evaluate
from weightflip.kernels.runs import (
    Addresses,
    Kind,
    Observed,
    Run,
    ScaleCodes,
    ScaleSteps,
    Scaling,
    StoredScales,
    Stretch,
)
from weightflip.kernels.scratch import ScratchPool

logger = logging.getLogger("weightflip")

Eager: TypeAlias = Callable[[Tensor, Tensor, "Tensor | None", Tensor], object]
"""Counts one weight in plain torch: weight, codes (overwritten), update or None, counts (added to)."""

Scales: TypeAlias = Callable[[Tensor], "tuple[Tensor, Tensor]"]
"""Computes scales in plain torch: from the largest magnitudes, float32, to the factors by which weights are multiplied
or divided, and the stored scales."""

# Elements around each stretch of codes, which must not change.
_GUARD = 64
_UNTOUCHED = 99
# The number and shape of the weights for the comparison of speed.
_RACE_WEIGHTS, _RACE_SHAPE = 16, (512, 1024)
_TIES = 1024
_SMALLEST_NORMAL = 1 << FP32.mantissa_bits
"""The bits of the smallest normal float32."""


class Question(NamedTuple):
    """What a kernel must do.

    Attributes:
        kind: The kind of the weights.
        takes_scale: Whether weights are scaled before they are rounded.
        finds_scale: Whether the kernel must also find the largest magnitudes.
        groups: What metric groups compute in the same pass.
        scaling: How the kernel must compute the scales of groups in the same pass; None: it does not.
    """

    kind: Kind
    takes_scale: bool
    finds_scale: bool
    groups: tuple[Pointwise, ...] = ()
    scaling: Scaling | None = None

    def is_supported_by(self, run: type[Run]) -> bool:
        """Whether a kernel supports this. Compiles its loops."""
        if self.scaling is None:
            return run.can_do(self.kind, scaled=self.finds_scale, groups=self.groups)
        return run.can_scale(self.kind, self.scaling)


class _Answer(NamedTuple):
    is_equal: bool
    is_faster: bool


class _Key(NamedTuple):
    """A question with a weak reference to its scaling, so that the answers do not keep the tables of scalings."""

    run: type[Run]
    question: Question
    scaling: weakref.ref[Scaling] | None


_answers: dict[_Key, _Answer] = {}


def is_usable(
    name: str,
    run: type[Run],
    question: Question,
    eager: Eager,
    scales: Scales | None = None,
    *,
    must_be_faster: bool,
) -> bool:
    """Whether a kernel counts the same as plain torch, and is faster if required.

    The first call tests the kernel, and logs the result to the logger ``weightflip``. During the capture of a CUDA
    graph it cannot be tested, and the result is False.

    Args:
        name: The name of the kernel, for the log.
        run: The kernel.
        question: What it must do.
        eager: Counts in plain torch, to compare the speed.
        scales: Computes the expected scales, if the kernel computes scales.
        must_be_faster: Whether a kernel that is not faster is unusable.
    """
    scaling = question.scaling
    key = _Key(run, question._replace(scaling=None), None if scaling is None else weakref.ref(scaling))
    answer = _answers.get(key)
    if answer is None:
        # A kernel that has passed a test with scales does not need the test without them.
        answer = _answers.get(key._replace(question=key.question._replace(finds_scale=question.takes_scale)))
    if answer is None:
        if question.kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        answer = _answers[key] = _test(name, run, question, eager, scales)
        if scaling is not None:
            weakref.finalize(scaling, _answers.pop, key, None).atexit = False
    return answer.is_equal and (answer.is_faster or not must_be_faster)


@torch.no_grad()
def _test(name: str, run: type[Run], question: Question, eager: Eager, scales: Scales | None) -> _Answer:
    kind = question.kind
    what = f"{name} for {_describe(kind)}{' with metric groups' if question.groups else ''} on {kind.device}"
    try:
        if question.scaling is None:
            fault = find_fault(run, question)
        else:
            what = f"{what}, scales of groups in the same pass"
            assert scales is not None
            fault = find_fault_in_groups(run, question, scales)
    except Exception as error:
        fault = f"it raised {type(error).__name__}: {error}"
    if fault is not None:
        instead = "counts" if question.scaling is None else "computes the scales"
        logger.warning("weightflip: %s: not used, plain torch %s instead: %s", what, instead, fault)
        return _Answer(False, False)
    if question.scaling is not None or not _must_be_faster_on(kind.device):
        logger.info("%s: equal", what)
        return _Answer(True, True)
    try:
        ratio = _speedup(run, question, eager)
    except Exception as error:
        logger.warning(
            "weightflip: %s: equal, but its speed could not be measured: %s: %s", what, type(error).__name__, error
        )
        return _Answer(True, False)
    if ratio <= 1:
        logger.info("%s: equal, but %.1fx as fast as eager, so not used automatically", what, ratio)
    else:
        logger.info("%s: equal, %.1fx faster than eager", what, ratio)
    return _Answer(True, ratio > 1)


def _describe(kind: Kind) -> str:
    rounding, dtypes = kind.rounding, (kind.weight, kind.update, kind.codes)
    weight, update, codes = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    to = f"{rounding.smallest}..{rounding.largest}" if isinstance(rounding, IntegerRounding) else rounding.format.name
    return f"{weight} to {to} ({codes}; updates {update})"


# ---------------------------------------------------------------------- equal


def ordinals(values: Tensor, rounding: Rounding) -> Tensor:
    """Round float32 values to int64 ordinals, by looking for the nearest number in a table."""
    if isinstance(rounding, IntegerRounding):
        clamped = values.round().clamp(rounding.smallest, rounding.largest)
        return clamped.nan_to_num(nan=float(rounding.nan)).to(torch.int64)
    bits = values.view(torch.int32)
    magnitude_bits = (bits & 0x7FFFFFFF).to(torch.int64)
    if _is_stored(rounding):
        # Nothing is rounded: the bits without the sign are the magnitude of the ordinal.
        code = magnitude_bits
    else:
        numbers = _numbers(rounding, values.device)
        between = (numbers[1:] + numbers[:-1]) / 2
        # The processor may treat subnormal numbers as 0. In float64, these are normal numbers.
        is_subnormal = magnitude_bits < _SMALLEST_NORMAL
        magnitude = torch.where(is_subnormal, magnitude_bits.double() * FP32.smallest_subnormal, values.double().abs())
        magnitude = magnitude.nan_to_num(nan=0.0, posinf=float("inf"))
        below, until = (torch.searchsorted(between, magnitude, right=right) for right in (False, True))
        code = torch.where(below % 2 == 1, until, below)
    code = torch.where(bits < 0, -code, code)
    return torch.where(values.isnan(), rounding.format.nan_ordinal, code)


def _is_stored(rounding: FloatRounding) -> bool:
    """Whether the format is float32, which has too many numbers for a table."""
    return rounding.format.mantissa_bits >= FP32.mantissa_bits


def _numbers(rounding: Rounding, device: torch.device) -> Tensor:
    """Return the values of the ordinals from 0 to that of overflow, float64. Infinity counts as the next number."""
    assert not isinstance(rounding, IntegerRounding)
    format, bits = rounding.format, rounding.format.mantissa_bits
    ordinal = torch.arange(rounding.overflow + 1, dtype=torch.float64, device=device)
    if format.exponent_bits == 0:
        return ordinal * 2.0 ** (format.min_exponent - bits)
    exponent = (ordinal / 2**bits).floor()
    fraction = ordinal - exponent * 2**bits
    subnormal = fraction * 2.0 ** (format.min_exponent - bits)
    normal = (fraction + 2**bits) * torch.exp2(exponent - format.bias - bits)
    return torch.where(exponent == 0, subnormal, normal)


def hard_numbers(kind: Kind) -> Tensor:
    """Return every value of 16 bits in the weight's dtype; for float32 also some of their neighbors and some ties."""
    patterns = torch.arange(1 << 16, dtype=torch.int32, device="cpu")
    if kind.weight.itemsize == 2:
        return patterns.to(torch.int16).view(kind.weight)
    bits = patterns << 16
    found = [bits, bits[::32] - 1, bits[::32] + 1]
    if not isinstance(kind.rounding, IntegerRounding) and not _is_stored(kind.rounding):
        numbers = _numbers(kind.rounding, bits.device)
        ties = ((numbers[1:] + numbers[:-1]) / 2)[:: max(1, len(numbers) // _TIES)].float().view(torch.int32)
        found += [ties, ties - 1, ties + 1]
    return torch.cat(found).view(torch.float32)


class _Part(NamedTuple):
    """A part of the numbers, from its first element on, with ``group``, ``width`` and ``height`` of a stretch."""

    first: int
    numel: int
    group: int
    has_update: bool
    width: int = 0
    height: int = 1

    def stretch(self, weights: Tensor, codes: Tensor, place: int) -> Stretch:
        address = weights.data_ptr() + self.first * weights.element_size()
        address_of_codes = codes.data_ptr() + place * codes.element_size()
        return Stretch(address, address_of_codes, self.numel, self.group, self.width, self.height)

    def scale_of_each(self, device: torch.device) -> Tensor:
        """Return the index of each element's scale."""
        at = torch.arange(self.numel, device=device)
        if not self.width:
            return at // self.group
        in_band = -(-self.width // self.group)
        return at // self.width // self.height * in_band + at % self.width // self.group


class _Trial(NamedTuple):
    """The input of a test, and the expected results.

    Attributes:
        parts: The parts of the numbers that are one stretch each.
        places: The index of the first code of each part.
        weights: All numbers.
        updates: One update per number; None if updates are not counted.
        scales: The scales of all parts, concatenated; None without scales.
        codes: The codes before the step, with a guard around those of each part.
        expected: The codes after the step.
        counts: int64 of shape (parts, 3).
        largest: The largest magnitude under each scale.
        stored: The stored form of the scales that the kernel computes; None if it computes none.
    """

    parts: list[_Part]
    places: list[int]
    weights: Tensor
    updates: Tensor | None
    scales: Tensor | None
    codes: Tensor
    expected: Tensor
    counts: Tensor
    largest: Tensor
    stored: Tensor | None

    @property
    def scales_of_parts(self) -> list[int]:
        """The number of scales of each part."""
        return [stretch.scales for stretch in self.stretches]

    @property
    def stretches(self) -> list[Stretch]:
        return [
            part.stretch(self.weights, self.codes, place) for place, part in zip(self.places, self.parts, strict=True)
        ]

    @property
    def addresses(self) -> Addresses | None:
        """The address of each part's updates; 0 for a part without updates."""
        if self.updates is None:
            return None
        start, size = self.updates.data_ptr(), self.updates.element_size()
        return np.array([start + part.first * size if part.has_update else 0 for part in self.parts], dtype=np.int64)


# Blocks that are smaller at the end of a row and in the last rows.
_BLOCKS = [
    _Part(0x3F07, 70 * 300, 128, True, width=300, height=32),
    _Part(0x7F00, 9 * 130, 128, False, width=130, height=1),
]


def _trial(question: Question, scales_of: Scales | None = None, *, in_blocks: bool = False) -> _Trial:
    kind, scaling = question.kind, question.scaling
    numbers = hard_numbers(kind)
    if scaling is not None and kind.weight.itemsize > 2:
        numbers = torch.cat([numbers, _around_steps(scaling)])
    whole = len(numbers) - len(numbers) % 16
    # All numbers, with aligned memory, and an odd number of them with unaligned memory.
    parts = [_Part(0, whole, whole if scaling is None else 1, True), _Part(1, 4099, 4099, True)]
    if question.takes_scale:
        # Blocks that cover the largest numbers, infinity, NaN and the smallest numbers, and rows of odd length.
        parts += [_Part(0x7F00, 64 * 32, 32, False), _Part(0x3F07, 9 * 129, 129, True)]
    if in_blocks:
        parts = _BLOCKS
    weights = numbers.to(kind.device)
    updates = _updates(kind, len(numbers))
    if updates is not None:
        updates = updates.to(kind.device)

    places, size = [], 0
    for part in parts:
        places.append(size + _GUARD)
        size += (part.numel + 3 * _GUARD) // _GUARD * _GUARD
    codes = torch.full((size,), _UNTOUCHED, dtype=kind.codes, device=kind.device)
    expected = codes.clone()
    of_parts = [(weights[part.first :][: part.numel].float(), part.scale_of_each(kind.device)) for part in parts]
    largest = torch.cat([_largest_of_each(values.abs(), index) for values, index in of_parts])
    scales, stored = None, None
    if scales_of is not None:
        scales, stored = scales_of(largest)
    elif question.takes_scale:
        scales = _scales(len(largest), kind.device)

    counts, at = [], 0
    for place, part, (values, index) in zip(places, parts, of_parts, strict=True):
        if scales is not None:
            scale = scales[at + index]
            values = values / scale if kind.rounding.divides else values * scale
        at += int(index.max()) + 1
        new = ordinals(values, kind.rounding).to(kind.codes)
        old = torch.where(torch.arange(part.numel, device=kind.device) % 3 == 0, new ^ 1, new)
        codes[place : place + part.numel] = old
        expected[place : place + part.numel] = new
        update = updates[part.first :][: part.numel] if updates is not None and part.has_update else None
        counts.append(reference.count(old, new, update))
    return _Trial(parts, places, weights, updates, scales, codes, expected, torch.stack(counts), largest, stored)


def _largest_of_each(magnitudes: Tensor, index: Tensor) -> Tensor:
    """Return the largest magnitude for each index; NaN if there is one."""
    return magnitudes.new_zeros(int(index.max()) + 1).scatter_reduce(0, index, magnitudes, "amax")


def _around_steps(scaling: Scaling) -> Tensor:
    """Return the magnitudes at which the scale changes, and their neighbors."""
    if not isinstance(scaling.description, ScaleSteps):
        return torch.empty(0, device="cpu")
    steps = torch.unique(scaling.description.slots[:, 0])
    return torch.cat([steps - 1, steps, (steps + 1).clamp(min=0)]).cpu().view(torch.float32)


def find_fault(run: type[Run], question: Question) -> str | None:
    """Describe how a kernel's results differ from those of plain torch; None if they do not.

    Args:
        run: The kernel.
        question: What it must do.
    """
    trial = _trial(question)
    kernel = run(trial.stretches, question.kind)
    if question.finds_scale and not _is_equal(kernel.largest(), trial.largest):
        return "its largest magnitudes differ"
    observation = _observation(question, trial) if question.groups else None
    if observation is None:
        found = kernel.count_(trial.scales, trial.addresses)
    else:
        found = torch.zeros_like(trial.counts)
        rows = torch.arange(len(found), device=found.device)
        kernel.count_into_(found, rows, trial.scales, trial.addresses, observed=observation.observed)
    fault = _fault_of_counts(found, trial)
    if fault is not None:
        return fault
    if observation is not None:
        return observation.fault()
    return None if trial.scales is None else _fault_of_scale_codes(kernel, trial)


def _is_equal(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors of floats are equal. NaN equals NaN."""
    return found.shape == expected.shape and bool(((found == expected) | (found.isnan() & expected.isnan())).all())


def _fault_of_counts(found: Tensor, trial: _Trial) -> str | None:
    wrong = int(torch.count_nonzero(trial.codes != trial.expected))
    if wrong:
        return f"{wrong} of {len(trial.codes)} codes differ"
    if not torch.equal(found, trial.counts):
        return f"it counts {found.tolist()}, plain torch {trial.counts.tolist()}"
    return None


def find_fault_in_groups(run: type[Run], question: Question, scales: Scales) -> str | None:
    """As :func:`find_fault`, for a kernel that also computes the scales of groups.

    Args:
        run: The kernel.
        question: What it must do.
        scales: Computes the expected scales.
    """
    for in_blocks in (False, True):
        fault = _fault_of_scaling(run, question, _trial(question, scales, in_blocks=in_blocks), in_blocks=in_blocks)
        if fault is not None:
            return f"in blocks over several rows, {fault}" if in_blocks else fault
    return None


def _fault_of_scaling(run: type[Run], question: Question, trial: _Trial, *, in_blocks: bool) -> str | None:
    assert question.scaling is not None
    assert trial.stored is not None
    kernel, expected = run(trial.stretches, question.kind), trial.stored
    device = trial.codes.device
    table = torch.zeros(len(trial.parts), 4, dtype=torch.int64, device=device)
    stored, rows = None, torch.arange(len(trial.parts), device=device)
    if question.scaling.is_stored:
        is_other = torch.arange(len(expected), device=device) % 3 == 0
        codes = torch.where(is_other, expected ^ 1, expected)
        stored = StoredScales(codes, table[:, 3])
        changes = torch.stack([part.count_nonzero() for part in torch.split(is_other, trial.scales_of_parts)])
    largest = None if trial.parts[0].width else torch.full_like(trial.largest, -1.0)
    kernel.count_groups_into_(table[:, :3], rows, question.scaling, trial.addresses, stored, largest)
    if largest is not None and not _is_equal(largest, trial.largest):
        return "its largest magnitudes differ"
    fault = _fault_of_counts(table[:, :3], trial)
    if fault is not None:
        return fault
    if stored is None:
        return None if in_blocks else _fault_of_factors(kernel, question.scaling, trial)
    if not torch.equal(stored.codes, expected):
        return "its stored scales differ"
    if not torch.equal(table[:, 3], changes):
        return f"it counts changes of scales {table[:, 3].tolist()}, plain torch {changes.tolist()}"
    return None


def _fault_of_factors(kernel: Run, scaling: Scaling, trial: _Trial) -> str | None:
    """Test the factors that are computed before the pass that counts."""
    assert trial.scales is not None
    return None if _is_equal(kernel.factors(scaling), trial.scales) else "its scales before counting differ"


class _Observation(NamedTuple):
    """The input of a test for metric groups, and the expected results.

    Attributes:
        observed: The kernel's argument.
        states: The tensors behind its addresses.
        expected: These tensors after the step.
        sums: The expected sums.
    """

    observed: Observed
    states: list[Tensor]
    expected: list[Tensor]
    sums: Tensor

    def fault(self) -> str | None:
        wrong = sum(int(torch.count_nonzero(a != b)) for a, b in zip(self.states, self.expected, strict=True))
        if wrong:
            return f"{wrong} states of metric groups differ"
        if not torch.equal(self.observed.sums, self.sums):
            return f"metric groups count {self.observed.sums.tolist()}, in plain torch {self.sums.tolist()}"
        return None


def _observation(question: Question, trial: _Trial) -> _Observation:
    """Make the test for the groups of a question. Call it before the kernel has counted."""
    codes, device = trial.codes, trial.codes.device
    names = [state for group in question.groups for state, _ in group.states]
    old_states = [_old_state(state, codes) for state in names]
    new_states = [state.clone() for state in old_states]
    kept = [_packed(state) for state in old_states]
    flags = [flag for group in question.groups for flag in group.counts]
    sums = torch.zeros(len(trial.parts), 2 * len(flags), dtype=torch.float64, device=device)
    # The scales before the step are the current ones in another order.
    old_scales = None if trial.scales is None else trial.scales.roll(1)
    at = 0
    for row, (place, part) in enumerate(zip(trial.places, trial.parts, strict=True)):
        here, groups = slice(place, place + part.numel), part.numel // part.group
        old, new = codes[here], trial.expected[here]
        leaves = {OLD: old, NEW: new} | {name: state[here] for name, state in zip(names, old_states, strict=True)}
        values = trial.weights[part.first :][: part.numel].float().view(groups, part.group)
        if old_scales is not None:
            scale = old_scales[at : at + groups, None]
            values = values / scale if question.kind.rounding.divides else values * scale
        leaves[NEW_UNDER_OLD_SCALE] = ordinals(values.flatten(), question.kind.rounding).to(codes.dtype)
        at += groups
        for column, flag in enumerate(flags):
            sums[row, 2 * column] = torch.count_nonzero(evaluate(flag, leaves) & (old != new))
            sums[row, 2 * column + 1] = torch.count_nonzero(old != new)
        news = [value for group in question.groups for _, value in group.states]
        for state, value in zip(new_states, news, strict=True):
            state[here] = evaluate(value, leaves)
    addresses = [
        [state.data_ptr() + place * bits_of_state(name, codes.dtype) // 8 for place in trial.places]
        for name, state in zip(names, kept, strict=True)
    ]
    columns = 2 * np.arange(len(flags), dtype=np.int64)
    places = np.array(addresses, dtype=np.int64).reshape(len(names), len(trial.parts))
    observed = Observed(question.groups, places, old_scales, torch.zeros_like(sums), columns)
    return _Observation(observed, kept, [_packed(state) for state in new_states], sums)


def _old_state(state: Expression, codes: Tensor) -> Tensor:
    """Return numbers of both signs and 0, with another period than the codes, also between the weights."""
    dtype: torch.dtype = state.operands[1] or codes.dtype
    numbers = torch.arange(len(codes), device=codes.device) % 5 - 2
    if dtype is torch.bool:
        return numbers > 1
    return (numbers.to(dtype) / 8).to(dtype) if dtype.is_floating_point else numbers.clamp_(-1, 1).to(dtype)


def _packed(state: Tensor) -> Tensor:
    """Return the state of all weights as a metric group keeps it."""
    if state.dtype is not torch.bool:
        return state
    packed = bits.zeros(len(state), state.device)
    bits.or_(packed, state, 0, ScratchPool())
    return packed


def _fault_of_scale_codes(kernel: Run, trial: _Trial) -> str | None:
    """As :func:`find_fault`, for stored scales. The codes were counted before, so no other count changes."""
    assert trial.scales is not None
    scales, of_parts = trial.scales, trial.scales_of_parts
    without = None if trial.addresses is None else trial.addresses * 0
    rows = torch.arange(len(of_parts), device=scales.device)
    new = torch.arange(len(scales), dtype=torch.int32, device=scales.device) % 256
    for dtype in (torch.uint8, torch.int32):
        stored = torch.where(new % 3 == 0, new ^ 1, new).to(dtype)
        expected = torch.stack([torch.count_nonzero(part) for part in torch.split(stored != new, of_parts)])
        table = torch.zeros(len(of_parts), 4, dtype=torch.int64, device=scales.device)
        kernel.count_into_(table[:, :3], rows, scales, without, ScaleCodes(new, stored, table[:, 3]))
        if not torch.equal(stored, new.to(dtype)):
            return "its stored scales differ"
        if not torch.equal(table[:, 3], expected) or table[:, :3].count_nonzero():
            return f"it counts changes of scales {table.tolist()}, plain torch {expected.tolist()}"
    return None


def _updates(kind: Kind, numel: int) -> Tensor | None:
    """Return gradients with zeros of both signs, NaN, large and small numbers, with another period than the codes."""
    if kind.update is None:
        return None
    some = [0.0, 1.0, -0.0, float("nan"), -3e-5, 0.0, float("inf")]
    return torch.tensor(some, dtype=torch.float32, device="cpu").to(kind.update).repeat(-(-numel // 7))[:numel]


def _scales(number: int, device: torch.device) -> Tensor:
    some = [1.0, 3.0, 0.37, 2.0**-20, 2.0**20, 1e-38, 0.1, float("nan"), 1.5e38]
    return torch.tensor(some, dtype=torch.float32, device="cpu").repeat(-(-number // len(some)))[:number].to(device)


# ---------------------------------------------------------------------- faster


def _must_be_faster_on(device: torch.device) -> bool:
    """Whether a kernel must be faster. On the CPU it is known to be, and measuring it would delay the training."""
    return device.type != "cpu"


def _speedup(run: type[Run], question: Question, eager: Eager) -> float:
    """Return the time of plain torch / the time of the kernel, for the weights of a small model."""
    kind = question.kind
    shape = (_RACE_WEIGHTS, *_RACE_SHAPE)
    # Numbers of many magnitudes, without drawing random numbers.
    weights = torch.arange(torch.Size(shape).numel(), device=kind.device).mul_(7919).remainder_(1000003).sub_(500000)
    weights = weights.to(torch.float32).mul_(1e-7).to(kind.weight).view(shape)
    codes = torch.zeros(shape, dtype=kind.codes, device=kind.device)
    counts = torch.zeros(3, dtype=torch.int64, device=kind.device)
    updates = None if kind.update is None else weights.to(kind.update)
    scales = torch.ones(len(weights), device=kind.device) if question.takes_scale else None
    addresses = None if updates is None else np.array([update.data_ptr() for update in updates])
    numel = weights[0].numel()
    kernel = run([Stretch(w.data_ptr(), c.data_ptr(), numel, numel) for w, c in zip(weights, codes, strict=True)], kind)

    def count() -> None:
        if question.finds_scale:
            kernel.largest()
        kernel.count_(scales, addresses)

    def count_eagerly() -> None:
        for i, weight in enumerate(weights):
            eager(weight, codes[i], None if updates is None else updates[i], counts)

    return _seconds(count_eagerly, kind.device) / _seconds(count, kind.device)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of a few times, after some that include compilation and allocations."""
    times = []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[3:])


# ---------------------------------------------------------------------- what is kept

# More than one item, and a rest.
_KEPT = (1 << 16) + 77


@functools.cache
def may_keep(run: type[Run], dtype: torch.dtype) -> bool:
    """Whether :meth:`Run.keep` counts as the reference and stores what it should, for codes on the CPU."""
    places = torch.arange(_KEPT, device="cpu")
    # Changes in some vectors, none in others, and one at the end.
    is_changed = (places % 251 == 0) | (places == _KEPT - 1)
    codes = (places % 127 - 63).to(dtype)
    new = torch.where(is_changed, -1 - codes, codes)
    expected = reference.count(codes, new)[0]
    changed = run.keep(codes, new)
    if changed is None:
        return False
    if bool(changed == expected) and torch.equal(codes, new):
        return True
    logger.warning(
        "weightflip: %s codes at a sync: not compared by the kernel, plain torch compares them instead: expected %d "
        "changes in a trial, got %d, or other codes",
        dtype,
        int(expected),
        int(changed),
    )
    return False
