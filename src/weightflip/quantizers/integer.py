"""Integers that share a scale, and the two smallest formats: ternary and binary."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from weightflip.formats import BF16, FP32, IntegerRounding, ScaleFormula
from weightflip.quantizers.ordinals import amax
from weightflip.quantizers.protocol import ElementwiseQuantizer, Scratch
from weightflip.quantizers.registry import register

NAN_ORDINAL = -128
"""The code of NaN in every format here. ``int8`` fills its byte and shares it with the number -128."""

# torchao.prototype.quantized_training.bitnet: the smallest scale that it divides by.
_TERNARY_EPS = 1e-5


class _Integers(ElementwiseQuantizer):
    """What the integer formats have in common: one byte a code, floating-point weights."""

    largest = 1

    def code_dtype(self, weight: Tensor) -> torch.dtype:
        return torch.int8

    def _check(self, weight: Tensor) -> None:
        if not weight.is_floating_point():
            raise ValueError(f"quantizer {self.name!r} rounds floating-point weights, got {weight.dtype}")

    def values(self, ordinals: Tensor, scale: Tensor | None) -> Tensor:
        values = ordinals.float()
        if self.largest < 127:
            values.masked_fill_(ordinals == NAN_ORDINAL, torch.nan)
        # NaN and infinite weights make their scale so: with it goes every number that it was for.
        return values if scale is None else torch.where(scale.isfinite(), values * scale, torch.nan)


class IntegerQuantizer(_Integers):
    """Symmetric integers of 2 to 8 bits: ``"int8"``, ``"int4"`` by row, ``"int4:g32"`` by groups of 32 neighbours.

    ``scale = amax / (2**bits - 1) * 2``, in the weight's dtype and then stored in float32; the code is that of
    ``clamp(round(w * (1 / scale)), -2**(bits - 1), 2**(bits - 1) - 1)``, ties to even. Values are ``code * scale``.

    That is ``MappingType.SYMMETRIC`` of torchao 0.18 (``choose_qparams_affine`` and ``quantize_affine`` in
    ``torchao/quantization/quant_primitives.py``), which its int8 and intx weight configurations have by default (the
    intx ones keep the scale of half-precision weights in that precision, which moves some codes): the largest magnitude
    meets 127.5 (7.5), half a step beyond the largest code, so that -128 (-8) is reached and the largest positive weight
    is clamped. The scale is at least the smallest normal number of the weight's dtype, as is the default there;
    ``Int8Tensor`` takes 2**-23 instead, which only rows below 1.5e-5 notice.

    A NaN makes its whole row or group NaN. An infinite weight is NaN, and all others beside it are 0.

    Args:
        bits: 2 to 8.
        group: Neighbours in the last dimension that share a scale; None for the whole row.

    Raises:
        ValueError: Another number of bits, or a group of no weights.
    """

    only_needs_amax = True

    def __init__(self, bits: int, group: int | None = None) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"integers have 2 to 8 bits, got {bits}")
        if group is not None and group < 1:
            raise ValueError(f"a group has at least one weight, got {group}")
        self.bits = bits
        self.group = group
        self.largest = 2 ** (bits - 1) - 1
        self.scope = "row" if group is None else "group"
        self.name = f"int{bits}" + (f":g{group}" if group is not None else "")

    def ordinal_range(self, weight: Tensor) -> tuple[int, int]:
        return -self.largest - 1, self.largest

    def statistic(self, weight: Tensor) -> Tensor:
        """The largest magnitude of each row or group: exact in shards."""
        self._check(weight)
        return amax(weight, "row")

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor:
        return self.scale_of(self.statistic(weight) if statistic is None else statistic)

    def scale_rule(self, dtype: torch.dtype) -> ScaleFormula | None:
        formats = {torch.float32: FP32, torch.bfloat16: BF16}
        if dtype not in formats:
            return None
        return ScaleFormula("inverse", self.largest + 0.5, FP32.smallest_normal, formats[dtype])

    def scale_of(self, largest: Tensor) -> Tensor:
        smallest = max(torch.finfo(largest.dtype).smallest_normal, torch.finfo(torch.float32).smallest_normal)
        return (largest / (self.largest + 0.5)).clamp_(min=smallest).float()

    def applied_scale(self, scale: Tensor | None) -> Tensor:
        assert scale is not None
        # torchao multiplies by the inverse; a division rounds some ties elsewhere.
        return 1.0 / scale

    def rounding(self, weight: Tensor) -> IntegerRounding:
        return IntegerRounding(-self.largest - 1, self.largest, NAN_ORDINAL)

    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        values = scratch("values", weight, torch.float32).copy_(weight)
        values.mul_(self.applied_scale(scale)).round_().clamp_(-self.largest - 1, self.largest)
        out.copy_(values.nan_to_num_(nan=float(NAN_ORDINAL)))


class TernaryQuantizer(_Integers):
    """-1, 0 and 1 with one scale a tensor, BitNet b1.58's absmean: ``"ternary"``.

    ``scale = mean(|w|)`` in float32; the code is that of ``clamp(round(w / max(scale, 1e-5)), -1, 1)``, ties to even,
    so 0 reaches up to half the mean magnitude. Source: Ma et al. 2024 (arXiv:2402.17764, equations 1 to 3), with the
    guard of torchao's ``BitNetTrainingLinearWeight``. Values are ``code * scale``. A NaN makes the whole tensor NaN.

    A float32 sum depends on the order of its summands. The mean of a sharded weight is taken in float64, so that it is
    the same for any number of shards, and may differ from that of the whole weight in its last bits.
    """

    name = "ternary"
    scope = "tensor"
    reduction = "mean"

    def ordinal_range(self, weight: Tensor) -> tuple[int, int]:
        return -1, 1

    def statistic(self, weight: Tensor) -> Tensor:
        """The mean magnitude, float64."""
        return weight.float().abs().mean(dtype=torch.float64)

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor:
        self._check(weight)
        if statistic is not None:
            return statistic.float()
        if weight.numel() == 0:
            return weight.new_zeros((), dtype=torch.float32)
        # In this order the sum is torchao's, bit for bit.
        return weight.float().abs().mean()

    def applied_scale(self, scale: Tensor | None) -> Tensor:
        assert scale is not None
        return scale.clamp(min=_TERNARY_EPS)

    def rounding(self, weight: Tensor) -> IntegerRounding:
        return IntegerRounding(-1, 1, NAN_ORDINAL, divides=True)

    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        values = scratch("values", weight, torch.float32).copy_(weight)
        values.div_(self.applied_scale(scale)).round_().clamp_(-1, 1)
        out.copy_(values.nan_to_num_(nan=float(NAN_ORDINAL)))


class BinaryQuantizer(_Integers):
    """The sign, without a scale: ``"binary"``. 1 from 0 on, both zeros included, and -1 below.

    Source: Courbariaux et al. 2015 (BinaryConnect, arXiv:1511.00363, equation 1).
    """

    name = "binary"
    scope = "element"
    only_needs_amax = True

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> None:
        self._check(weight)

    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        flags = scratch("flags", weight, torch.bool)
        out.copy_(torch.ge(weight, 0, out=flags)).mul_(2).sub_(1)
        out.masked_fill_(torch.ne(weight, weight, out=flags), NAN_ORDINAL)


@register("int[2-8]", examples=("int8", "int4"))
def _integer(name: str, options: tuple[str, ...]) -> ElementwiseQuantizer:
    group = re.fullmatch(r"g([1-9]\d*)", options[0]) if len(options) == 1 else None
    if options and group is None:
        raise ValueError(
            f"quantizer {name!r} takes one option, 'g32' for a scale for each 32 neighbours (or another number), got "
            f"{':'.join(options)!r}"
        )
    return IntegerQuantizer(int(name[3:]), int(group[1]) if group else None)


@register("ternary|binary", examples=("ternary", "binary"))
def _smallest(name: str, options: tuple[str, ...]) -> ElementwiseQuantizer:
    if options:
        raise ValueError(f"quantizer {name!r} has no options, got {':'.join(options)!r}")
    return TernaryQuantizer() if name == "ternary" else BinaryQuantizer()
