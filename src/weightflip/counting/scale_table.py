"""Look up block scales with two calls of torch, while a format's own rule takes ten.

A scale that is stored in a byte takes at most 256 values and grows with the largest magnitude under it. So the
magnitudes at which each value begins replace the rule. They are found with the rule itself, on the device, because
devices divide and take logarithms differently.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from weightflip.counting.quantizer_cache import Keyed, QuantizerCache
from weightflip.formats import E8M0, FP32

_LAST = 0x7FFFFFFF
# The number of bit patterns on each side of a bound that are also tried.
_AROUND = 64


class ScaleRule(Keyed, Protocol):
    """The part of a quantizer that this module needs."""

    def scale_of(self, largest: Tensor) -> Tensor: ...

    def applied_scale(self, scale: Tensor | None) -> Tensor | None: ...

    def scale_codes(self, scale: Tensor) -> Tensor: ...


class ScaleTable(NamedTuple):
    """The results of a rule, by the bits of the largest magnitude.

    Attributes:
        bounds: int32, ascending: the first bit pattern of float32 for which the stored scale is 1, 2, 3, ...
        factors: float32: the factors by which weights are multiplied or divided for a stored scale of 0, 1, 2, 3, ...
    """

    bounds: Tensor
    factors: Tensor

    def look_up(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors by which the weights are multiplied or divided, and the stored scales.

        Args:
            largest: Magnitudes, float32; NaN without a sign.

        Returns:
            float32 and int32, in the shape of ``largest``.
        """
        codes = torch.bucketize(largest.view(torch.int32), self.bounds, out_int32=True, right=True)
        return self.factors.index_select(0, codes), codes


_tables: QuantizerCache[ScaleTable | None] = QuantizerCache()


def get_scale_table(
    quantizer: ScaleRule, rounding: object, dtype: torch.dtype, device: torch.device, *, is_stored: bool = True
) -> ScaleTable | None:
    """Return the table of a quantizer; None if it does not reproduce the quantizer's rule exactly.

    It is made once for each kind, with a device synchronization. Quantizers with the same key and rounding have the
    same rule.

    Args:
        quantizer: A quantizer whose scales depend only on the largest magnitudes.
        rounding: Its rounding of weights.
        dtype: The dtype of the weights.
        device: Their device.
        is_stored: Whether scales are stored in a byte. If not, they are powers of two, and the table returns their
            exponents.
    """

    def make() -> ScaleTable | None:
        try:
            return _make(quantizer, dtype, device, is_stored)
        except Exception:
            # The rule is then evaluated in each step, which reports the error.
            return None

    return _tables.get(quantizer, (rounding, dtype, device, is_stored, flushes_subnormal()), make)


def flushes_subnormal() -> bool:
    """Whether the processor currently treats subnormal numbers as 0, which changes the scales of some rules."""
    return bool(np.float32(FP32.smallest_subnormal) * np.float32(2.0) == 0)


def _make(quantizer: ScaleRule, dtype: torch.dtype, device: torch.device, is_stored: bool) -> ScaleTable | None:
    def rule(bits: Tensor) -> tuple[Tensor | None, Tensor]:
        scale = quantizer.scale_of(bits.to(torch.int32).view(torch.float32).to(dtype))
        factor = quantizer.applied_scale(scale)
        return factor, quantizer.scale_codes(scale) if is_stored or factor is None else _exponents(factor)

    stored = rule(torch.zeros(1, dtype=torch.int32, device=device))[1].dtype
    if stored not in (torch.int8, torch.uint8):
        return None
    wanted = torch.arange(1, torch.iinfo(stored).max + 1, device=device)
    # Bisect all bounds at once. The last pattern is larger than that of any number.
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, _LAST)
    for _ in range(31):
        middle = (low + high) // 2
        is_above = rule(middle)[1] >= wanted
        low, high = torch.where(is_above, low, middle + 1), torch.where(is_above, middle, high)
    factors, _ = rule(torch.cat([torch.zeros_like(high[:1]), high]))
    if factors is None or factors.dtype is not torch.float32:
        return None
    table = ScaleTable(high.to(torch.int32), factors)
    return table if _is_exact(table, rule) else None


def _exponents(factor: Tensor) -> Tensor:
    """Return codes of factors that are powers of two, larger for smaller factors. As in E8M0, NaN is the last code."""
    exponent = factor.float().view(torch.int32) >> FP32.mantissa_bits
    return torch.where(factor.isnan(), E8M0.nan_code, E8M0.max_code - exponent).to(torch.uint8)


def _is_exact(table: ScaleTable, rule: Any) -> bool:
    """Whether the table agrees with the rule for all values of 16 bits, and around each bound."""
    device = table.bounds.device
    around = table.bounds.long().unsqueeze(1) + torch.arange(-_AROUND, _AROUND + 1, device=device)
    bits = torch.cat([torch.arange(1 << 15, device=device) << 16, around.flatten().clamp(0, _LAST)])
    factors, codes = rule(bits)
    found_factors, found_codes = table.look_up(bits.to(torch.int32).view(torch.float32))
    is_number = ~factors.isnan()
    return (
        torch.equal(found_codes, codes.to(torch.int32))
        and torch.equal(found_factors.isnan(), ~is_number)
        and torch.equal(found_factors[is_number], factors[is_number])
    )
