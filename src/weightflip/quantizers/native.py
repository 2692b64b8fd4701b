"""Codes that are the stored bits of a weight, or of its cast to a torch dtype."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from weightflip.formats import FloatFormat, FloatRounding
from weightflip.quantizers.ordinals import ORDINAL_DTYPES, STORED_FORMATS, bits_to_ordinals_, ordinals_to_bits
from weightflip.quantizers.protocol import Codes, ElementwiseQuantizer, Scratch
from weightflip.quantizers.registry import register


class NativeQuantizer(ElementwiseQuantizer):
    """The stored bits of the weight, to see whether the weight itself changes: ``"native"``.

    For float8, float16, bfloat16, float32 and float64 weights. Codes take 1, 2, 4 or 8 bytes per weight.
    """

    is_defined_by_name = True
    name = "native"
    scope = "element"
    only_needs_amax = True

    def stored_dtype(self, weight: Tensor) -> torch.dtype:
        """Return the dtype whose bits are the codes.

        Raises:
            ValueError: The dtype is not supported.
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
        # 16-bit codes alone do not reveal whether they are float16 or bfloat16.
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
        raise ValueError(f"{bits}-bit codes may be {names}: decode with one of these formats instead of 'native'")
    return candidates[0]


def _bits_as_values(ordinals: Tensor, format: FloatFormat) -> Tensor:
    dtype = next(dtype for dtype, stored in STORED_FORMATS.items() if stored == format)
    values = ordinals_to_bits(ordinals, format).view(dtype)
    return values if dtype is torch.float64 else values.float()


class CastQuantizer(NativeQuantizer):
    """A plain cast without a scale: ``"bfloat16"``, ``"float16"``. Overflow becomes infinity, as in torch's cast."""

    is_defined_by_name = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.format: FloatFormat = STORED_FORMATS[dtype]
        self.name = str(dtype).removeprefix("torch.")

    def stored_dtype(self, weight: Tensor) -> torch.dtype:
        if not weight.is_floating_point():
            raise ValueError(f"quantizer {self.name!r} casts floating-point weights, got {weight.dtype}")
        return self.dtype

    def values(self, ordinals: Tensor, scale: Tensor | None) -> Tensor:
        return _bits_as_values(ordinals, self.format)

    def value_rule(self) -> Literal["multiplies"]:
        return "multiplies"


def _reject_options(name: str, options: tuple[str, ...]) -> None:
    if options:
        raise ValueError(f"quantizer {name!r} has no options, got {':'.join(options)!r}")


@register("native", examples=("native",))
def _native(name: str, options: tuple[str, ...]) -> ElementwiseQuantizer:
    _reject_options(name, options)
    return NativeQuantizer()


@register("bfloat16|float16", examples=("bfloat16", "float16"))
def _cast(name: str, options: tuple[str, ...]) -> ElementwiseQuantizer:
    _reject_options(name, options)
    return CastQuantizer(getattr(torch, name))
