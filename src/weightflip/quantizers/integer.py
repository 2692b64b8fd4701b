"""Integers with a shared scale, and the two smallest formats: ternary and binary."""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor

from weightflip.formats import BF16, FP32, IntegerRounding, ScaleFormula
from weightflip.quantizers.ordinals import amax
from weightflip.quantizers.protocol import ElementwiseQuantizer, Scratch
from weightflip.quantizers.registry import register

NAN_ORDINAL = -128
"""The code of NaN in every format here. In ``int8``, which uses the whole byte, it is also the code of -128."""

# torchao.prototype.quantized_training.bitnet: the smallest scale that torchao divides by.
_TERNARY_EPS = 1e-5


class _Integers(ElementwiseQuantizer):
    """Base class of the integer formats: one byte per code, floating-point weights."""

    largest = 1

    def code_dtype(self, weight: Tensor) -> torch.dtype:
        return torch.int8

    def _check_dtype(self, weight: Tensor) -> None:
        if not weight.is_floating_point():
            raise ValueError(f"quantizer {self.name!r} rounds floating-point weights, got {weight.dtype}")

    def values(self, ordinals: Tensor, scale: Tensor | None) -> Tensor:
        values = ordinals.float()
        if self.largest < 127:
            values.masked_fill_(ordinals == NAN_ORDINAL, torch.nan)
        # A NaN or infinite weight makes its scale non-finite, and then all values under that scale are NaN.
        return values if scale is None else torch.where(scale.isfinite(), values * scale, torch.nan)

    def value_rule(self) -> Literal["multiplies"]:
        # Under a scale that is not finite, no value is finite either way.
        return "multiplies"


class IntegerQuantizer(_Integers):
    """Symmetric integers of 2 to 8 bits: ``"int8"``, ``"int4"`` per row, ``"int4:g32"`` per group of 32 neighbors.

    ``scale = amax / (2**bits - 1) * 2``, computed in the weight's dtype and stored in float32. The code is that of
    ``clamp(round(w * (1 / scale)), -2**(bits - 1), 2**(bits - 1) - 1)``, ties to even. Values are ``code * scale``.

    This is ``MappingType.SYMMETRIC`` of torchao 0.18 (``choose_qparams_affine`` and ``quantize_affine`` in
    ``torchao/quantization/quant_primitives.py``), the default of its int8 and intx weight configurations. (The intx
    ones keep the scale of half-precision weights in that precision, which changes some codes.) The largest magnitude
    maps to 127.5 (7.5), half a step beyond the largest code, so that -128 (-8) is reached and the largest positive
    weight is clamped. The scale is at least the smallest normal number of the weight's dtype, torchao's default.
    ``Int8Tensor`` uses 2**-23 instead, which only affects rows below 1.5e-5.

    A NaN makes its whole row or group NaN. An infinite weight becomes NaN, and the others in its row or group 0.

    Args:
        bits: 2 to 8.
        group: The number of neighbors in the last dimension that share a scale; None for the whole row.

    Raises:
        ValueError: ``bits`` or ``group`` is out of range.
    """

    is_defined_by_name = True
    only_needs_amax = True

    def __init__(self, bits: int, group: int | None = None) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"bits= must be from 2 to 8, got {bits}")
        if group is not None and group < 1:
            raise ValueError(f"group= must be at least 1, got {group}")
        self.bits = bits
        self.group = group
        self.largest = 2 ** (bits - 1) - 1
        self.scope = "row" if group is None else "group"
        self.name = f"int{bits}" + (f":g{group}" if group is not None else "")

    def ordinal_range(self, weight: Tensor) -> tuple[int, int]:
        return -self.largest - 1, self.largest

    def statistic(self, weight: Tensor) -> Tensor:
        """Return the largest magnitude of each row or group. Exact for shards."""
        self._check_dtype(weight)
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
        # torchao multiplies by the inverse; a division would round some ties differently.
        return 1.0 / scale

    def rounding(self, weight: Tensor) -> IntegerRounding:
        return IntegerRounding(-self.largest - 1, self.largest, NAN_ORDINAL)

    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        values = scratch("values", weight, torch.float32).copy_(weight)
        values.mul_(self.applied_scale(scale)).round_().clamp_(-self.largest - 1, self.largest)
        out.copy_(values.nan_to_num_(nan=float(NAN_ORDINAL)))


class TernaryQuantizer(_Integers):
    """-1, 0 and 1 with one scale per tensor, the absmean of BitNet b1.58: ``"ternary"``.

    ``scale = mean(|w|)`` in float32. The code is that of ``clamp(round(w / max(scale, 1e-5)), -1, 1)``, ties to even,
    so magnitudes up to half the mean become 0. Source: Ma et al. 2024 (arXiv:2402.17764, equations 1 to 3), with the
    lower bound of torchao's ``BitNetTrainingLinearWeight``. Values are ``code * scale``. A NaN makes the whole tensor
    NaN.

    A float32 sum depends on the order of its terms. The mean of a sharded weight is computed in float64, so that it is
    the same for any number of shards. It may differ from that of the whole weight in the last bits.
    """

    is_defined_by_name = True
    name = "ternary"
    scope = "tensor"
    reduction = "mean"

    def ordinal_range(self, weight: Tensor) -> tuple[int, int]:
        return -1, 1

    def statistic(self, weight: Tensor) -> Tensor:
        """Return the mean magnitude, float64."""
        return weight.float().abs().mean(dtype=torch.float64)

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor:
        self._check_dtype(weight)
        if statistic is not None:
            return statistic.float()
        if weight.numel() == 0:
            return weight.new_zeros((), dtype=torch.float32)
        # This order gives torchao's sum, bit for bit.
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
    """The sign, without a scale: ``"binary"``. 1 for both zeros and positive weights, -1 for negative ones.

    Source: Courbariaux et al. 2015 (BinaryConnect, arXiv:1511.00363, equation 1).
    """

    is_defined_by_name = True
    name = "binary"
    scope = "element"
    only_needs_amax = True

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> None:
        self._check_dtype(weight)

    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        flags = scratch("flags", weight, torch.bool)
        out.copy_(torch.ge(weight, 0, out=flags)).mul_(2).sub_(1)
        out.masked_fill_(torch.ne(weight, weight, out=flags), NAN_ORDINAL)


@register("int[2-8]", examples=("int8", "int4"))
def _integer(name: str, options: tuple[str, ...]) -> ElementwiseQuantizer:
    group = re.fullmatch(r"g([1-9]\d*)", options[0]) if len(options) == 1 else None
    if options and group is None:
        raise ValueError(
            f"quantizer {name!r} takes one option, such as 'g32' for one scale per 32 neighbors, got "
            f"{':'.join(options)!r}"
        )
    return IntegerQuantizer(int(name[3:]), int(group[1]) if group else None)


@register("ternary|binary", examples=("ternary", "binary"))
def _ternary_or_binary(name: str, options: tuple[str, ...]) -> ElementwiseQuantizer:
    if options:
        raise ValueError(f"quantizer {name!r} has no options, got {':'.join(options)!r}")
    return TernaryQuantizer() if name == "ternary" else BinaryQuantizer()
