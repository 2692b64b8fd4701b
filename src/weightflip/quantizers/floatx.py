"""Any ExMy format of up to 16 bits, rounded here: to the nearest value, ties to the even code, saturating."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from weightflip import checks
from weightflip.formats import E4M3, E5M2, FP32, FP64, FloatFormat, FloatRounding, exmy
from weightflip.quantizers.base import ElementwiseQuantizer, Scope, Scratch, register
from weightflip.quantizers.native import ORDINAL_DTYPES, bits_to_ordinals_

Granularity: TypeAlias = Literal["tensor", "row", "none"]

_ALL_BUT_SIGN = torch.tensor(127, dtype=torch.int8, device="cpu")
_TORCH_FLOAT8 = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}

# Formats with a wider exponent are scaled so that their largest number meets 2**512 instead of itself: float64 holds
# that, and every float32 weight divided by the largest of its tensor is above 2**-277.
_FLOAT64_EXPONENT = 512


def amax(weight: Tensor, granularity: Granularity) -> Tensor:
    """Largest magnitude of the weight (0-dim) or of each row (``(..., 1)``), in its dtype; NaN if there is one.

    aminmax reads the weight once and allocates nothing of its size, which ``weight.abs().max()`` does.
    """
    by_row = granularity == "row" and weight.ndim > 0
    if weight.numel() == 0:
        return weight.new_zeros((*weight.shape[:-1], 1) if by_row else ())
    if by_row and weight.device.type == "cpu":
        # There aminmax along a dimension is not vectorized: reading twice takes a third of its time.
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    else:
        low, high = torch.aminmax(weight, dim=-1, keepdim=True) if by_row else torch.aminmax(weight)
    return torch.maximum(low.abs(), high.abs())


def cast_to_float8(
    values: Tensor, format: FloatFormat, out: Tensor, scratch: Scratch, *, has_number: Tensor | None = None
) -> None:
    """Cast float32 values to ordinals of E4M3 or E5M2, through torch's own conversion.

    Args:
        values: Contiguous float32. Nothing is promised above ``format.max`` by more than rounding: torch before 2.12
            does not saturate (e4m3 overflows to NaN, e5m2 to infinity), so clamp first what may be larger.
        format: E4M3 or E5M2.
        out: int8, contiguous, of the values' shape.
        scratch: Where temporaries come from.
        has_number: Where given, bool and broadcastable to the values: where it is False all values are NaN or 0, and
            nowhere else is one NaN.
    """
    out.view(_TORCH_FLOAT8[format]).copy_(values)
    if has_number is not None:
        # NaN and 0 lose their signs in one pass; looking for NaN everywhere takes two.
        # All bits where there is a number. torch.where would copy its constants to a GPU, and wait for that.
        out.bitwise_and_(has_number.to(torch.int8).neg_().bitwise_or_(_ALL_BUT_SIGN))
    bits_to_ordinals_(out, format, scratch, nan_is_positive=has_number is not None)


def round_to_ordinals(
    values: Tensor, format: FloatFormat, out: Tensor, scratch: Scratch, *, exponent_shift: int = 0
) -> None:
    """Round float32 or float64 values to the nearest number of a format; ties go to the even code.

    Works on the bits. In the normal range the float's own bit pattern, cut to M mantissa bits, is the code but for the
    bias; adding just under half of what is cut off, plus the last bit kept, rounds to nearest even. In the subnormal
    range, where numbers are multiples of one quantum, adding a power of two whose last place is that quantum makes the
    floating-point adder round.

    Args:
        values: Contiguous float32 (for formats of up to 7 exponent bits) or float64, overwritten.
        format: What to round to. Magnitudes above ``format.max``, infinities included, saturate.
        out: Where the ordinals go, of the values' shape.
        scratch: Where temporaries come from.
        exponent_shift: Values come divided by ``2**exponent_shift``.
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
    # Even means an even code: without mantissa bits the last bit kept belongs to the exponent, which the bias moves.
    codes.sub_(offset).bitwise_and_(1).add_(bits).add_((1 << (cut - 1)) - 1)
    codes.bitwise_right_shift_(cut).sub_(offset)
    if not is_within:
        codes.masked_fill_(magnitude == math.inf, format.max_ordinal)

    is_subnormal = scratch("subnormal", values, torch.bool)
    # The number whose last place is one quantum, 2**(min_exponent - mantissa_bits).
    adder = math.ldexp(1.0, min_exponent + cut)
    if min_exponent < source.min_exponent:
        # All that float64 holds with full precision is normal in this format; zero and float64 subnormals remain.
        codes.masked_fill_(torch.lt(magnitude, source.smallest_normal, out=is_subnormal), 0)
    elif format.exponent_bits == 0:
        torch.sub(magnitude.add_(adder).view(integer), _bits_of(adder, source), out=codes)
    else:
        torch.lt(magnitude, math.ldexp(1.0, min_exponent), out=is_subnormal)
        magnitude.add_(adder)
        torch.where(is_subnormal, bits.sub_(_bits_of(adder, source)), codes, out=codes)

    torch.where(is_negative, torch.neg(codes, out=bits), codes, out=codes)
    out.copy_(codes.masked_fill_(is_nan, format.nan_ordinal))


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    trailing = to[len(to) - len(shape) :] if len(shape) <= len(to) else ()
    return len(trailing) == len(shape) and all(a in (1, b) for a, b in zip(shape, trailing, strict=True))


def _bits_of(power_of_two: float, source: FloatFormat) -> int:
    return (math.frexp(power_of_two)[1] - 1 + source.bias) << source.mantissa_bits


@functools.lru_cache(maxsize=64)
def _value_table(format: FloatFormat, exponent_shift: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Value of every ordinal of the storage, from its smallest integer on; NaN where there is no number.

    Kept where it is used: to copy it to a device waits for that device.
    """
    half = 1 << (format.storage_bits - 1)
    last = format.max_ordinal if format.inf_ordinal is None else format.inf_ordinal
    values = [format.value(ordinal, exponent_shift=exponent_shift) for ordinal in range(-last, last + 1)]
    table = torch.full((2 * half,), math.nan, dtype=torch.float64, device="cpu")
    table[half - last : half + last + 1] = torch.tensor(values, dtype=torch.float64, device="cpu")
    return table.to(device=device, dtype=dtype)


def ordinals_to_values(ordinals: Tensor, format: FloatFormat, dtype: torch.dtype, *, exponent_shift: int = 0) -> Tensor:
    """What the ordinals stand for, divided by ``2**exponent_shift``."""
    table = _value_table(format, exponent_shift, dtype, ordinals.device)
    return table[ordinals.long() + (1 << (format.storage_bits - 1))]


class FloatxQuantizer(ElementwiseQuantizer):
    """An ExMy element with one scale for the tensor, one a row, or none: ``"e3m4"``, ``"e3m4:row"``, ``"e3m4:none"``.

    The weight is divided by ``scale = amax / format.max``, so that the largest magnitude meets the largest number, and
    rounded to nearest even. ``scale`` and the quotient are float32; float64 for float64 weights and for formats of 6
    and more exponent bits, whose range is too wide for float32.

    Args:
        format: The element.
        granularity: What shares a scale.
        fixed_scale: A scale of the user's own instead, a number or a tensor that broadcasts to the weight.

    Raises:
        TypeError: A scale that is neither a number nor a tensor.
        ValueError: More than 16 bits, an unknown granularity, or a number as scale that is not positive and finite. The
            elements of a tensor are not looked at: that would wait for the device.
    """

    def __init__(
        self,
        format: FloatFormat,
        granularity: Granularity = "none",
        *,
        fixed_scale: Tensor | float | None = None,
    ) -> None:
        if format.bits > 16:
            raise ValueError(f"ExMy formats have up to 16 bits, got {format}")
        if granularity not in get_args(Granularity):
            raise ValueError(f"granularity is one of {get_args(Granularity)}, got {granularity!r}")
        if isinstance(fixed_scale, Real) and not isinstance(fixed_scale, bool):
            # Also NumPy's numbers.
            fixed_scale = float(fixed_scale)
        elif isinstance(fixed_scale, Tensor) and fixed_scale.is_complex():
            dtype = str(fixed_scale.dtype).removeprefix("torch.")
            raise TypeError(f"scale= is a number or a torch.Tensor of real numbers, got a {dtype} tensor")
        elif fixed_scale is not None and not isinstance(fixed_scale, Tensor):
            hint = "; make a tensor of it with torch.tensor(...)" if hasattr(fixed_scale, "__len__") else ""
            raise TypeError(f"scale= is a number or a torch.Tensor, got {checks.described(fixed_scale)}{hint}")
        if isinstance(fixed_scale, float) and not 0 < fixed_scale < math.inf:
            raise ValueError(
                f"scale= is what the weight is divided by and has to be positive and finite, got {fixed_scale}"
            )
        self.format = format
        self.granularity: Granularity = granularity
        self.fixed_scale = fixed_scale
        scaled = granularity != "none" and fixed_scale is None
        self._exponent_shift = max(0, format.max_exponent - _FLOAT64_EXPONENT) if scaled else 0
        self.name = format.name + {"tensor": "", "row": ":row", "none": ":none"}[granularity]

    def code_dtype(self, weight: Tensor) -> torch.dtype:
        return ORDINAL_DTYPES[self.format.storage_bits]

    def _compute_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        # With 6 exponent bits and more, amax / max leaves the normal range of float32 for small weights.
        wide = weight_dtype is torch.float64 or self.format.exponent_bits > 5
        return torch.float64 if wide else torch.float32

    @property
    def scope(self) -> Scope | None:  # type: ignore[override]
        if self.fixed_scale is None:
            return "element" if self.granularity == "none" else self.granularity
        # Which part of many scales belongs to a shard is not known here.
        return "element" if not isinstance(self.fixed_scale, Tensor) or self.fixed_scale.numel() == 1 else None

    @property
    def only_needs_amax(self) -> bool:  # type: ignore[override]
        return self.fixed_scale is None

    def statistic(self, weight: Tensor) -> Tensor:
        """The largest magnitude of the weight, or of each row: exact in shards."""
        return amax(weight, self.granularity)

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor | None:
        if not weight.is_floating_point():
            raise ValueError(f"quantizer {self.name!r} rounds floating-point weights, got {weight.dtype}")
        if self.fixed_scale is not None:
            dtype = self._compute_dtype(weight.dtype)
            scale = torch.as_tensor(self.fixed_scale, dtype=dtype, device=weight.device)
            # What the user does to a tensor of his own must not reach codes that are kept.
            scale = scale.clone() if isinstance(self.fixed_scale, Tensor) else scale
            if not _broadcasts(scale.shape, weight.shape):
                raise ValueError(
                    f"scale of shape {tuple(scale.shape)} does not broadcast to a weight of shape {tuple(weight.shape)}"
                )
            return scale
        if self.granularity == "none":
            return None
        return self.scale_of(self.statistic(weight) if statistic is None else statistic)

    def scale_of(self, largest: Tensor) -> Tensor:
        largest = largest.to(self._compute_dtype(largest.dtype))
        # A tensor there: by a number, or a tensor on the CPU, a GPU divides as by a product with its inverse.
        meets = largest.new_full((), self.format.value(self.format.max_ordinal, exponent_shift=self._exponent_shift))
        # The smallest normal number stands in for the scale of an all-zero tensor: 0 / 0 would be NaN.
        return (largest / meets).clamp_(min=torch.finfo(largest.dtype).tiny)

    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        dtype = self._compute_dtype(weight.dtype)
        values = scratch("values", weight, dtype)
        if scale is None or weight.dtype is not dtype:
            values.copy_(weight)
            if scale is not None:
                values.div_(scale)
        else:
            torch.div(weight, scale, out=values)
        if dtype is torch.float32 and self.format in _TORCH_FLOAT8:
            values.clamp_(-self.format.max, self.format.max)
            cast_to_float8(values, self.format, out, scratch)
        else:
            round_to_ordinals(values, self.format, out, scratch, exponent_shift=self._exponent_shift)

    def rounding(self, weight: Tensor) -> FloatRounding | None:
        if self._compute_dtype(weight.dtype) is torch.float64:
            return None
        return FloatRounding(self.format, self.format.max_ordinal, divides=True)

    def values(self, ordinals: Tensor, scale: Tensor | None) -> Tensor:
        dtype = scale.dtype if scale is not None else self._compute_dtype(torch.float32)
        values = ordinals_to_values(ordinals, self.format, dtype, exponent_shift=self._exponent_shift)
        return values if scale is None else values * scale

    def ordinal_range(self, weight: Tensor) -> tuple[int, int]:
        return -self.format.max_ordinal, self.format.max_ordinal


@register(r"e\d+m\d+", examples=("e3m4",))
def _floatx(name: str, options: tuple[str, ...]) -> ElementwiseQuantizer:
    format = exmy(name)
    if options not in ((), ("row",), ("none",)):
        raise ValueError(f"quantizer {name!r} takes one of the options 'row', 'none', got {':'.join(options)!r}")
    granularity: Granularity = "row" if "row" in options else "none" if "none" in options else "tensor"
    return FloatxQuantizer(format, granularity)
