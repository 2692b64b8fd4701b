"""Float8 as torchao's Float8Linear casts its weight in forward."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from weightflip.formats import E4M3, E5M2, FloatFormat, FloatRounding
from weightflip.quantizers.ordinals import amax, cast_to_float8, ordinals_to_values
from weightflip.quantizers.protocol import ElementwiseQuantizer, Scratch
from weightflip.quantizers.registry import register

# torchao.float8.float8_utils.EPS: the smallest amax that it divides by.
_EPS = 1e-12


class Float8Quantizer(ElementwiseQuantizer):
    """torchao's dynamic float8 weight cast: ``"float8_e4m3"``, ``"float8_e5m2"``, ``":row"``, ``":pow2"``.

    ``s = max / max(amax, 1e-12)``, taken in float64 and stored in float32, with ``pow2`` rounded down to a power of
    two; the code is that of ``clamp(float32(w) * s, -max, max)``. Source: torchao 0.18,
    ``torchao/float8/float8_utils.py``. The scale of the codes is ``s``: values are ``code / s``.

    Args:
        format: E4M3 or E5M2.
        granularity: ``"tensor"``, or ``"row"`` for one scale over the last dimension: of a linear layer's weight, one
            per output channel.
        round_scales_to_power_of_2: Round ``s`` down, as torchao's rowwise recipes do.

    Raises:
        ValueError: Another format.
    """

    only_needs_amax = True

    def __init__(
        self,
        format: FloatFormat,
        granularity: Literal["tensor", "row"] = "tensor",
        *,
        round_scales_to_power_of_2: bool = False,
    ) -> None:
        if format not in (E4M3, E5M2):
            raise ValueError(f"float8 is E4M3 or E5M2, got {format}")
        self.format: FloatFormat = format
        self.granularity: Literal["tensor", "row"] = granularity
        self.scope = granularity
        self.round_scales_to_power_of_2 = round_scales_to_power_of_2
        self.name = (
            f"float8_{format.name}"
            + (":row" if granularity == "row" else "")
            + (":pow2" if round_scales_to_power_of_2 else "")
        )

    def code_dtype(self, weight: Tensor) -> torch.dtype:
        return torch.int8

    def statistic(self, weight: Tensor) -> Tensor:
        """The largest magnitude of the weight, or of each row: exact in shards."""
        if not weight.is_floating_point():
            raise ValueError(f"quantizer {self.name!r} casts floating-point weights, got {weight.dtype}")
        return amax(weight, self.granularity)

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor:
        return self.scale_of(self.statistic(weight) if statistic is None else statistic)

    def scale_of(self, largest: Tensor) -> Tensor:
        # float64, as torchao divides: 1.0 / float32 differs between eager and compiled code.
        scale = (self.format.max / largest.to(torch.float64).clamp(min=_EPS)).to(torch.float32)
        if self.round_scales_to_power_of_2:
            scale = torch.exp2(torch.floor(torch.log2(scale)))
        return scale

    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        assert scale is not None
        values = scratch("values", weight, torch.float32)
        if weight.dtype is torch.float32:
            torch.mul(weight, scale, out=values)
        else:
            # A 0-dim scale would not promote bfloat16: torchao multiplies in float32.
            values.copy_(weight).mul_(scale)
        # torchao clamps here. |w| <= amax makes |w * s| exceed max by two float32 roundings at the most, far from the
        # half step at which a cast leaves max, so the clamp never changes the code and its pass is saved.
        # Only a scale that is NaN (of a NaN weight) or 0 (of an infinite one) makes NaN, and then nothing else but 0.
        cast_to_float8(values, self.format, out, scratch, has_number=scale > 0)

    def encode_under(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        assert scale is not None
        values = scratch("values", weight, torch.float32).copy_(weight)
        values.mul_(scale).clamp_(-self.format.max, self.format.max)
        cast_to_float8(values, self.format, out, scratch)

    def rounding(self, weight: Tensor) -> FloatRounding:
        return FloatRounding(self.format, self.format.max_ordinal)

    def values(self, ordinals: Tensor, scale: Tensor | None) -> Tensor:
        values = ordinals_to_values(ordinals, self.format, torch.float32)
        return values if scale is None else values / scale

    def ordinal_range(self, weight: Tensor) -> tuple[int, int]:
        return -self.format.max_ordinal, self.format.max_ordinal


@register("float8_(e4m3|e5m2)", examples=("float8_e4m3", "float8_e5m2"))
def _float8(name: str, options: tuple[str, ...]) -> ElementwiseQuantizer:
    unknown = set(options) - {"row", "pow2"}
    if unknown or len(set(options)) != len(options):
        raise ValueError(f"quantizer {name!r} takes the options 'row' and 'pow2', got {':'.join(options)!r}")
    return Float8Quantizer(
        E4M3 if name.endswith("e4m3") else E5M2,
        "row" if "row" in options else "tensor",
        round_scales_to_power_of_2="pow2" in options,
    )
