"""Describe how a kernel computes the scales of groups: with a formula, or with a table of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from weightflip import kernels
from weightflip.counting.quantizer_cache import Keyed, QuantizerCache
from weightflip.counting.scale_table import ScaleTable, flushes_subnormal, get_scale_table
from weightflip.formats import FP32, ScaleFormula

_CODES = 256
# A slot has at most one step. A table of this size takes 384 KiB, of which little is read.
_MAX_SLOTS = 1 << 15


class ScaledQuantizer(Keyed, Protocol):
    """The part of a quantizer that this module needs."""

    group: int | None

    def scale_of(self, largest: Tensor) -> Tensor: ...

    def applied_scale(self, scale: Tensor | None) -> Tensor | None: ...

    def scale_codes(self, scale: Tensor) -> Tensor: ...

    def scale_rule(self, dtype: torch.dtype) -> ScaleFormula | Literal["steps"] | None: ...


_scalings: QuantizerCache[kernels.Scaling | None] = QuantizerCache()


def get_scaling(
    quantizer: ScaledQuantizer, rounding: object, dtype: torch.dtype, device: torch.device
) -> kernels.Scaling | None:
    """Describe how a quantizer scales its groups; None if there is no such description.

    It is made once for each kind: quantizers with the same key and rounding have the same rule. The test of the kernel
    that uses it shows whether it is correct.

    Args:
        quantizer: A quantizer whose scales depend only on the largest magnitudes.
        rounding: Its rounding of weights.
        dtype: The dtype of the weights.
        device: Their device.
    """
    kind = rounding, dtype, device, flushes_subnormal()
    return _scalings.get(quantizer, kind, lambda: _make(quantizer, rounding, dtype, device))


def _make(
    quantizer: ScaledQuantizer, rounding: object, dtype: torch.dtype, device: torch.device
) -> kernels.Scaling | None:
    is_stored = quantizer.group is not None
    rule = quantizer.scale_rule(dtype)
    if rule is None or isinstance(rule, ScaleFormula):
        return None if rule is None else kernels.Scaling(rule, is_stored)
    # If a code has several factors (NaN and 0), only their exponents distinguish them.
    for by_code in (True, False) if is_stored else (False,):
        table = get_scale_table(quantizer, rounding, dtype, device, is_stored=by_code)
        if table is not None:
            steps = _steps(table, in_plain_torch(quantizer, dtype) if is_stored else None)
            return None if steps is None else kernels.Scaling(steps, is_stored)
    return None


def in_plain_torch(quantizer: ScaledQuantizer, dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a function that computes scales with the quantizer itself.

    Returns:
        A function of the largest magnitude under each scale, float32. It returns the factors for weights of this dtype,
        and the stored scales.
    """

    def scales(largest: Tensor) -> tuple[Tensor, Tensor]:
        scale = quantizer.scale_of(largest.to(dtype))
        applied = quantizer.applied_scale(scale)
        assert applied is not None
        return applied, quantizer.scale_codes(scale)

    return scales


def _steps(table: ScaleTable, stored: Callable[[Tensor], tuple[Tensor, Tensor]] | None) -> kernels.ScaleSteps | None:
    """Make a table that is looked up without a search; None if it would be too large."""
    bounds = table.bounds.long()
    steps = torch.unique(bounds)
    # Begin with one slot per exponent, and make them finer.
    shift = FP32.mantissa_bits
    while not _has_one_step_each(starts := _starts(shift, bounds.device), steps):
        shift -= 1
        if _slots(shift) > _MAX_SLOTS:
            return None
    first, second = (torch.searchsorted(bounds, at, right=True) for at in (starts[:-1], starts[1:] - 1))
    after_last = bounds.new_full((1,), (1 << 31) - 1)
    slots = torch.stack([torch.cat([bounds, after_last])[first], first, second], 1).to(torch.int32)
    factors = table.factors.new_zeros(_CODES)
    factors[: len(table.factors)] = table.factors
    codes = torch.zeros(_CODES, dtype=torch.uint8, device=bounds.device)
    if stored is not None:
        largest = torch.cat([table.bounds.new_zeros(1), table.bounds]).view(torch.float32)
        codes[: len(largest)] = stored(largest)[1].view(torch.uint8)
    return kernels.ScaleSteps(shift, slots.contiguous(), factors, codes)


def _slots(shift: int) -> int:
    return 1 << (31 - shift)


def _starts(shift: int, device: torch.device) -> Tensor:
    """Return the first bit pattern of each slot, and the end of the last one."""
    return torch.arange(_slots(shift) + 1, device=device) << shift


def _has_one_step_each(starts: Tensor, steps: Tensor) -> bool:
    first, second = (torch.searchsorted(steps, at, right=True) for at in (starts[:-1], starts[1:] - 1))
    return int((second - first).max()) <= 1
