"""Convert values to ordinals and back, and find the largest magnitude, for all quantizers."""

from __future__ import annotations

import functools
import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from weightflip.formats import BF16, E4M3, E5M2, FP16, FP32, FP64, FloatFormat
from weightflip.quantizers.protocol import Scratch

Granularity: TypeAlias = Literal["tensor", "row", "none"]

STORED_FORMATS: dict[torch.dtype, FloatFormat] = {
    torch.float8_e4m3fn: E4M3,
    torch.float8_e5m2: E5M2,
    torch.bfloat16: BF16,
    torch.float16: FP16,
    torch.float32: FP32,
    torch.float64: FP64,
}
ORDINAL_DTYPES = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
# Tensors, because torch creates one from a Python number at each call. 0-dim CPU tensors combine with any device.
_SIGN_BIT = {
    dtype: torch.tensor(torch.iinfo(dtype).min, dtype=dtype, device="cpu") for dtype in ORDINAL_DTYPES.values()
}
_ALL_BUT_SIGN = torch.tensor(127, dtype=torch.int8, device="cpu")
TORCH_FLOAT8 = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def amax(weight: Tensor, granularity: Granularity) -> Tensor:
    """Return the largest magnitude of the weight (0-dim) or of each row (``(..., 1)``), in its dtype; NaN wins.

    aminmax reads the weight once and, unlike ``weight.abs().max()``, allocates nothing of its size.
    """
    by_row = granularity == "row" and weight.ndim > 0
    if weight.numel() == 0:
        return weight.new_zeros((*weight.shape[:-1], 1) if by_row else ())
    if by_row and weight.device.type == "cpu":
        # On the CPU, aminmax along a dimension is not vectorized: reading twice takes a third of its time.
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    else:
        low, high = torch.aminmax(weight, dim=-1, keepdim=True) if by_row else torch.aminmax(weight)
    return torch.maximum(low.abs(), high.abs())


def bits_to_ordinals_(bits: Tensor, format: FloatFormat, scratch: Scratch, *, nan_is_positive: bool = False) -> None:
    """Turn IEEE-like bit patterns into ordinals, in place.

    Sign and magnitude become two's complement, -0 becomes 0, and every NaN becomes ``format.nan_ordinal``.

    Args:
        bits: Contiguous int8, int16, int32 or int64, as wide as the format.
        format: A format with NaN.
        scratch: Provides temporary buffers.
        nan_is_positive: Whether it is known that no NaN has its sign bit set, which saves searching for them.
    """
    sign = torch.bitwise_and(bits, _SIGN_BIT[bits.dtype], out=scratch("sign", bits, bits.dtype))
    # For a negative pattern abs() gives 2**(n-1) - magnitude (the sign bit alone stays as it is), and restoring the
    # sign bit gives -magnitude: three passes instead of shift, mask, xor and subtract.
    bits.abs_().bitwise_xor_(sign)

    nan = format.nan_ordinal
    if nan < torch.iinfo(bits.dtype).max:
        bits.clamp_(-nan, nan)
    if nan_is_positive:
        return
    # The sign of NaN differs between machines, so -nan is mapped to nan, by a subtraction that wraps around. The
    # comparison writes integers because torch's CPU kernels do not vectorize it with a bool result.
    is_negative_nan = torch.eq(bits, -nan, out=sign)
    width = format.storage_bits
    distance = (-2 * nan) % (1 << width)
    bits.sub_(is_negative_nan, alpha=distance - (1 << width) if distance >> (width - 1) else distance)


def ordinals_to_bits(ordinals: Tensor, format: FloatFormat) -> Tensor:
    """Invert :func:`bits_to_ordinals_`, with +0 for 0 and a positive NaN."""
    magnitude = ordinals.abs()
    return torch.where(ordinals < 0, magnitude | torch.iinfo(ordinals.dtype).min, magnitude)


def cast_to_float8(
    values: Tensor, format: FloatFormat, out: Tensor, scratch: Scratch, *, has_number: Tensor | None = None
) -> None:
    """Cast float32 values to ordinals of E4M3 or E5M2, with torch's own conversion.

    Args:
        values: Contiguous float32. Values that may exceed ``format.max`` by more than rounding must be clamped first:
            torch before 2.12 does not saturate (e4m3 overflows to NaN, e5m2 to infinity).
        format: E4M3 or E5M2.
        out: int8, contiguous, of the values' shape.
        scratch: Provides temporary buffers.
        has_number: Bool, broadcastable to the values. If given, all values are NaN or 0 where it is False, and none is
            NaN elsewhere.
    """
    out.view(TORCH_FLOAT8[format]).copy_(values)
    if has_number is not None:
        # Clears the signs of NaN and 0 in one pass; searching for NaN everywhere takes two. The mask keeps all bits
        # where there is a number. torch.where would copy its constants to a GPU, which synchronizes.
        out.bitwise_and_(has_number.to(torch.int8).neg_().bitwise_or_(_ALL_BUT_SIGN))
    bits_to_ordinals_(out, format, scratch, nan_is_positive=has_number is not None)


def round_to_ordinals(
    values: Tensor, format: FloatFormat, out: Tensor, scratch: Scratch, *, exponent_shift: int = 0
) -> None:
    """Round float32 or float64 values to the nearest number of a format; ties go to the even code.

    Works on the bits. In the normal range the float's bit pattern, cut to M mantissa bits, is the code up to the bias.
    Adding just under half of what is cut off, plus the last bit kept, rounds to nearest even. In the subnormal range,
    where numbers are multiples of one quantum, adding a power of two whose last place is that quantum makes the
    floating-point adder round.

    Args:
        values: Contiguous float32 (for formats of up to 7 exponent bits) or float64, overwritten.
        format: The format to round to. Magnitudes above ``format.max``, infinities included, saturate.
        out: Receives the ordinals; of the values' shape.
        scratch: Provides temporary buffers.
        exponent_shift: The values are already divided by ``2**exponent_shift``.
    """
    source, integer = (FP64, torch.int64) if values.dtype is torch.float64 else (FP32, torch.int32)
    cut = source.mantissa_bits - format.mantissa_bits
    offset = (source.bias - format.bias - exponent_shift) << format.mantissa_bits
    min_exponent = format.min_exponent - exponent_shift

    is_negative = torch.lt(values, 0, out=scratch("negative", values, torch.bool))
    is_nan = torch.ne(values, values, out=scratch("nan", values, torch.bool))
    magnitude = values.abs_()
    largest = format.value(format.max_ordinal, exponent_shift=exponent_shift)
    is_within = largest <= torch.finfo(values.dtype).max
    if is_within:
        magnitude.clamp_(max=largest)

    bits = magnitude.view(integer)
    codes = torch.bitwise_right_shift(bits, cut, out=scratch("codes", values, integer))
    # "Even" refers to the code: without mantissa bits, the last bit kept is the exponent's, which the bias shifts.
    codes.sub_(offset).bitwise_and_(1).add_(bits).add_((1 << (cut - 1)) - 1)
    codes.bitwise_right_shift_(cut).sub_(offset)
    if not is_within:
        codes.masked_fill_(magnitude == math.inf, format.max_ordinal)

    is_subnormal = scratch("subnormal", values, torch.bool)
    # The number whose last place is one quantum, 2**(min_exponent - mantissa_bits).
    adder = math.ldexp(1.0, min_exponent + cut)
    if min_exponent < source.min_exponent:
        # Every number that float64 holds with full precision is normal in this format. Zero and float64 subnormals
        # become 0.
        codes.masked_fill_(torch.lt(magnitude, source.smallest_normal, out=is_subnormal), 0)
    elif format.exponent_bits == 0:
        torch.sub(magnitude.add_(adder).view(integer), _bits_of(adder, source), out=codes)
    else:
        torch.lt(magnitude, math.ldexp(1.0, min_exponent), out=is_subnormal)
        magnitude.add_(adder)
        torch.where(is_subnormal, bits.sub_(_bits_of(adder, source)), codes, out=codes)

    torch.where(is_negative, torch.neg(codes, out=bits), codes, out=codes)
    out.copy_(codes.masked_fill_(is_nan, format.nan_ordinal))


def _bits_of(power_of_two: float, source: FloatFormat) -> int:
    return (math.frexp(power_of_two)[1] - 1 + source.bias) << source.mantissa_bits


@functools.lru_cache(maxsize=64)
def _value_table(format: FloatFormat, exponent_shift: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the value of every ordinal of the storage dtype, from its smallest integer up; NaN without a number.

    Cached on each device, since copying it there synchronizes.
    """
    half = 1 << (format.storage_bits - 1)
    last = format.max_ordinal if format.inf_ordinal is None else format.inf_ordinal
    values = [format.value(ordinal, exponent_shift=exponent_shift) for ordinal in range(-last, last + 1)]
    table = torch.full((2 * half,), math.nan, dtype=torch.float64, device="cpu")
    table[half - last : half + last + 1] = torch.tensor(values, dtype=torch.float64, device="cpu")
    return table.to(device=device, dtype=dtype)


def ordinals_to_values(ordinals: Tensor, format: FloatFormat, dtype: torch.dtype, *, exponent_shift: int = 0) -> Tensor:
    """Return the numbers that ordinals stand for, divided by ``2**exponent_shift``."""
    table = _value_table(format, exponent_shift, dtype, ordinals.device)
    return table[ordinals.long() + (1 << (format.storage_bits - 1))]
