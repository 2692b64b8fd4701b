"""What a compiled kernel needs to know of a format."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from weightflip.formats import E0M7, FP32, FloatFormat, IntegerRounding, Rounding


class Constants(NamedTuple):
    """Numbers for rounding float32 by its bits, as :func:`weightflip.quantizers.floatx.round_to_ordinals` explains.

    Attributes:
        cut: How many mantissa bits go.
        offset: Between the biases, at the place of the exponent.
        first_normal: Bits of the smallest number with full precision; those of infinity where there is none.
        adder: What makes the floating-point adder round subnormal numbers.
        overflow: Magnitude of the ordinal of what is too large, or too small.
        largest: Ordinal of what is too large.
        nan: Ordinal of NaN.
    """

    cut: np.int32
    offset: np.int32
    first_normal: np.int32
    adder: np.float32
    overflow: np.int32
    largest: np.int32
    nan: np.int32


@functools.lru_cache(maxsize=64)
def constants(rounding: Rounding) -> Constants | None:
    """Of a format; None for one that cannot be rounded to in float32."""
    if isinstance(rounding, IntegerRounding):
        # Fixed point, whose quantum is 1.
        return _constants(E0M7, FP32.mantissa_bits, -rounding.smallest, rounding.largest, rounding.nan)
    format = rounding.format
    adder_exponent = format.min_exponent - format.mantissa_bits + FP32.mantissa_bits
    return _constants(format, adder_exponent, rounding.overflow, rounding.overflow, format.nan_ordinal)


def _constants(format: FloatFormat, adder_exponent: int, overflow: int, largest: int, nan: int) -> Constants | None:
    cut = FP32.mantissa_bits - format.mantissa_bits
    if cut < 1 or format.min_exponent < FP32.min_exponent or adder_exponent > FP32.max_exponent:
        return None
    offset = (FP32.bias - format.bias) << format.mantissa_bits
    first_normal = np.float32(math.inf if format.exponent_bits == 0 else format.smallest_normal).view(np.int32)
    adder = np.float32(math.ldexp(1.0, adder_exponent))
    return Constants(
        np.int32(cut),
        np.int32(offset),
        first_normal,
        adder,
        np.int32(overflow),
        np.int32(largest),
        np.int32(nan),
    )
