"""The constants of a format for compiled kernels."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from weightflip.formats import E0M7, FP32, FloatFormat, IntegerRounding, Rounding


class Constants(NamedTuple):
    """Constants for rounding float32 through its bits. See :func:`weightflip.quantizers.floatx.round_to_ordinals`.

    Attributes:
        cut: Number of mantissa bits to remove.
        offset: Difference of the exponent biases, shifted to the position of the exponent.
        first_normal: Bits of the smallest number with full precision; those of infinity if there is none.
        adder: The number whose addition rounds subnormal numbers.
        overflow: Magnitude of the ordinal for numbers out of range.
        largest: Ordinal of numbers that are too large.
        nan: Ordinal of NaN.
    """

    cut: np.int32
    offset: np.int32
    first_normal: np.int32
    adder: np.float32
    overflow: np.int32
    largest: np.int32
    nan: np.int32


class Lanes(NamedTuple):
    """The constants for the loops on the CPU, as consecutive int32.

    Attributes:
        limit: Bits of the largest magnitude in range. Larger ones are replaced by it.
        nan: Ordinal of NaN.
        cap: Largest positive ordinal.
        asymmetry: How much larger the magnitude of a negative ordinal may be.
        cut: Number of mantissa bits to remove.
        first: By adding: bits of the smallest magnitude whose exponent determines the addend.
        exponent: By adding: mask of the bits of a magnitude that determine the addend.
        add: By adding: the number that is added to these bits.
        base: By adding: the difference of the sum and the ordinal.
        first_normal: By shifting: bits of the smallest number with full precision.
        rebias: By shifting: the difference of the biases, minus just under half of the part that is removed.
        parity: By shifting: the last bit of that difference.
        tie: By shifting: 1 if ties go to the even ordinal, 0 if no bits are removed.
        adder: By shifting: bits of the number whose addition rounds subnormal numbers.
        by_adding: Whether rounding by adding, which is faster, is correct for the format. It is not for formats without
            mantissa bits, where another bit determines which ordinal is even, and not for formats with the exponents of
            float32, whose subnormal numbers must be correct even if the processor flushes them to 0.
    """

    limit: int
    nan: int
    cap: int
    asymmetry: int
    cut: int
    first: int
    exponent: int
    add: int
    base: int
    first_normal: int
    rebias: int
    parity: int
    tie: int
    adder: int
    by_adding: int


_INFINITY = int(np.float32(math.inf).view(np.int32))


@functools.lru_cache(maxsize=64)
def constants(rounding: Rounding) -> Constants | None:
    """Return the constants of a format; None if float32 cannot be rounded to it, or if it is float32."""
    numbers = _constants(rounding)
    return None if numbers is None or numbers.cut < 1 else numbers


@functools.lru_cache(maxsize=64)
def lanes(rounding: Rounding) -> Lanes | None:
    """Return the constants of a format; None if float32 cannot be rounded to it."""
    numbers = _constants(rounding)
    if numbers is None:
        return None
    cut, offset, first_normal, adder, overflow, largest, nan = (int(bits.view(np.int32)) for bits in numbers)
    mantissa_bits = FP32.mantissa_bits - cut
    is_fixed = first_normal == _INFINITY
    half = (1 << cut) >> 1
    if is_fixed or overflow < 1 << mantissa_bits:
        quantum = math.ldexp(float(numbers.adder), -FP32.mantissa_bits)
        limit = int(np.float32((overflow + 0.5) * quantum).view(np.int32))
    else:
        limit = min(((overflow + offset) << cut) + half, _INFINITY)
    if overflow % 2 and limit < _INFINITY:
        # The tie goes to the next ordinal.
        limit -= 1
    has_exponents_of_float32 = first_normal == int(np.float32(FP32.smallest_normal).view(np.int32))
    highest = (limit >> FP32.mantissa_bits) + cut
    return Lanes(
        limit=limit,
        nan=nan,
        cap=largest,
        asymmetry=overflow - largest,
        cut=cut,
        first=0 if is_fixed else first_normal,
        exponent=0 if is_fixed else _INFINITY,
        add=adder if is_fixed else cut << FP32.mantissa_bits,
        base=adder + (adder >> cut) if is_fixed else offset + ((1 + cut) << mantissa_bits),
        first_normal=0 if has_exponents_of_float32 else first_normal,
        rebias=(offset << cut) - max(half - 1, 0),
        parity=offset & 1,
        tie=int(cut > 0),
        adder=adder,
        by_adding=is_fixed or (0 < mantissa_bits <= 15 and not has_exponents_of_float32 and highest <= 253),
    )


def _constants(rounding: Rounding) -> Constants | None:
    if isinstance(rounding, IntegerRounding):
        # Fixed point with a quantum of 1.
        return _of_format(E0M7, FP32.mantissa_bits, -rounding.smallest, rounding.largest, rounding.nan)
    format = rounding.format
    adder_exponent = format.min_exponent - format.mantissa_bits + FP32.mantissa_bits
    return _of_format(format, adder_exponent, rounding.overflow, rounding.overflow, format.nan_ordinal)


def _of_format(format: FloatFormat, adder_exponent: int, overflow: int, largest: int, nan: int) -> Constants | None:
    cut = FP32.mantissa_bits - format.mantissa_bits
    if cut < 0 or format.min_exponent < FP32.min_exponent or adder_exponent > FP32.max_exponent:
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
