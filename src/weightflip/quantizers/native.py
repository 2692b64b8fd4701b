"""The bits themselves: stored weights, casts to a torch dtype, and whatever values a user's function returns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weightflip.formats import BF16, E4M3, E5M2, FP16, FP32, FP64, FloatFormat, FloatRounding
from weightflip.quantizers.base import Codes, ElementwiseQuantizer, Scope, Scratch, register

STORED_FORMATS: dict[torch.dtype, FloatFormat] = {
    torch.float8_e4m3fn: E4M3,
    torch.float8_e5m2: E5M2,
    torch.bfloat16: BF16,
    torch.float16: FP16,
    torch.float32: FP32,
    torch.float64: FP64,
}
ORDINAL_DTYPES = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
# Tensors, because torch makes one of a Python number at each call. 0-dim ones on the CPU go with tensors of any device.
_SIGN_BIT = {
    dtype: torch.tensor(torch.iinfo(dtype).min, dtype=dtype, device="cpu") for dtype in ORDINAL_DTYPES.values()
}


def bits_to_ordinals_(bits: Tensor, format: FloatFormat, scratch: Scratch, *, nan_is_positive: bool = False) -> None:
    """Turn IEEE-like bit patterns into ordinals, in place.

    Sign and magnitude become two's complement, -0 becomes 0, every NaN becomes ``format.nan_ordinal``.

    Args:
        bits: Contiguous int8, int16, int32 or int64, as wide as the format.
        format: One with NaN.
        scratch: Where temporaries come from.
        nan_is_positive: No NaN among the bits has its sign bit set, which saves looking for them.
    """
    sign = torch.bitwise_and(bits, _SIGN_BIT[bits.dtype], out=scratch("sign", bits, bits.dtype))
    # For a negative pattern abs() gives 2**(n-1) - magnitude (the sign bit alone stays as it is), and putting the sign
    # bit back gives -magnitude: three passes instead of shift, mask, xor and subtract.
    bits.abs_().bitwise_xor_(sign)

    nan = format.nan_ordinal
    if nan < torch.iinfo(bits.dtype).max:
        bits.clamp_(-nan, nan)
    if nan_is_positive:
        return
    # NaN carries a sign, which arithmetic on different machines sets differently: -nan moves onto nan by a subtraction
    # that wraps. The comparison goes into integers because torch's CPU kernels vectorize it only without a bool result.
    is_negative_nan = torch.eq(bits, -nan, out=sign)
    width = format.storage_bits
    distance = (-2 * nan) % (1 << width)
    bits.sub_(is_negative_nan, alpha=distance - (1 << width) if distance >> (width - 1) else distance)


def ordinals_to_bits(ordinals: Tensor, format: FloatFormat) -> Tensor:
    """The inverse of :func:`bits_to_ordinals_`, with +0 for 0 and one positive NaN."""
    magnitude = ordinals.abs()
    return torch.where(ordinals < 0, magnitude | torch.iinfo(ordinals.dtype).min, magnitude)


class NativeQuantizer(ElementwiseQuantizer):
    """The stored bits: did the weight itself change? ``"native"``.

    For float8, float16, bfloat16, float32 and float64 weights; 1, 2, 4 or 8 bytes of code a weight.
    """

    name = "native"
    scope = "element"
    only_needs_amax = True

    def stored_dtype(self, weight: Tensor) -> torch.dtype:
        """The dtype whose bits are the codes.

        Raises:
            ValueError: There is no ordering of this dtype's bits.
        """
        if weight.dtype not in STORED_FORMATS:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORED_FORMATS)
            raise ValueError(f"quantizer 'native' reads the bits of {known} weights, got {weight.dtype}")
        return weight.dtype

    def code_dtype(self, weight: Tensor) -> torch.dtype:
        return ORDINAL_DTYPES[STORED_FORMATS[self.stored_dtype(weight)].storage_bits]

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor | None:
        self.stored_dtype(weight)
        return None

    def encode(self, weight: Tensor) -> Codes:
        codes = super().encode(weight)
        # 16-bit codes alone do not tell which 16-bit dtype they are of.
        return Codes(codes.ordinals, None, CastQuantizer(self.stored_dtype(weight)))

    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        dtype = self.stored_dtype(weight)
        out.view(dtype).copy_(weight)
        bits_to_ordinals_(out, STORED_FORMATS[dtype], scratch)

    def rounding(self, weight: Tensor) -> FloatRounding | None:
        format = STORED_FORMATS[self.stored_dtype(weight)]
        return FloatRounding(format, format.max_ordinal if format.inf_ordinal is None else format.inf_ordinal)

    def values(self, ordinals: Tensor, scale: Tensor | None) -> Tensor:
        return _bits_as_values(ordinals, _format_of_width(ordinals.element_size() * 8))

    def ordinal_range(self, weight: Tensor) -> tuple[int, int]:
        largest = STORED_FORMATS[self.stored_dtype(weight)].max_ordinal
        return -largest, largest


def _format_of_width(bits: int) -> FloatFormat:
    candidates = [format for format in STORED_FORMATS.values() if format.bits == bits]
    if len(candidates) != 1:
        names = " or ".join(format.name for format in candidates)
        raise ValueError(f"{bits}-bit codes may be {names}: decode with that format instead of 'native'")
    return candidates[0]


def _bits_as_values(ordinals: Tensor, format: FloatFormat) -> Tensor:
    dtype = next(dtype for dtype, stored in STORED_FORMATS.items() if stored == format)
    values = ordinals_to_bits(ordinals, format).view(dtype)
    return values if dtype is torch.float64 else values.float()


class CastQuantizer(NativeQuantizer):
    """A plain cast without a scale: ``"bfloat16"``, ``"float16"``. Overflow becomes infinity, as the cast has it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.format = STORED_FORMATS[dtype]
        self.name = str(dtype).removeprefix("torch.")

    def stored_dtype(self, weight: Tensor) -> torch.dtype:
        if not weight.is_floating_point():
            raise ValueError(f"quantizer {self.name!r} casts floating-point weights, got {weight.dtype}")
        return self.dtype

    def values(self, ordinals: Tensor, scale: Tensor | None) -> Tensor:
        return _bits_as_values(ordinals, self.format)


class FunctionQuantizer:
    """Codes of whatever a function from a weight to its quantized values returns: the bits of those values.

    The function sees the whole weight, detached; its result is as large as the weight, and the codes are as wide as its
    dtype. Return bfloat16 where its 8 bits of significand hold the values. Of a weight that is sharded over processes
    it sees a shard, and only where it has an attribute ``scope`` that allows this: see :class:`Quantizer`.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.scope: Scope | None = getattr(function, "scope", None)
        self._native = NativeQuantizer()

    def encode(self, weight: Tensor) -> Codes:
        values = self.function(weight.detach())
        if not isinstance(values, Tensor) or values.shape != weight.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"the function {self.name!r} has to return a tensor of the weight's shape {tuple(weight.shape)}, "
                f"got {got}"
            )
        if not values.is_floating_point() and not values.is_complex():
            # Integers are ordinals already; uint8, as torch's own quantized tensors have it, needs a sign bit more. A
            # copy, since a function may hand out a tensor that it writes to later.
            dtype = {torch.bool: torch.int8, torch.uint8: torch.int16}.get(values.dtype, values.dtype)
            return Codes(values.to(dtype, copy=True))
        return self._native.encode(values)

    def __str__(self) -> str:
        return self.name


def _no_options(name: str, options: tuple[str, ...]) -> None:
    if options:
        raise ValueError(f"quantizer {name!r} has no options, got {':'.join(options)!r}")


@register("native", examples=("native",))
def _native(name: str, options: tuple[str, ...]) -> ElementwiseQuantizer:
    _no_options(name, options)
    return NativeQuantizer()


@register("bfloat16|float16", examples=("bfloat16", "float16"))
def _cast(name: str, options: tuple[str, ...]) -> ElementwiseQuantizer:
    _no_options(name, options)
    return CastQuantizer(getattr(torch, name))
