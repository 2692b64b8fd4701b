"""Float8 as torchao's Float8Linear and Float8BlockwiseLinear cast their weights in forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from weightflip.formats import (
    BLOCK_FORMATS,
    E4M3,
    E5M2,
    E8M0,
    FLOAT8_E4M3_1X128,
    FLOAT8_E4M3_128X128,
    FP32,
    BlockFormat,
    FloatFormat,
    FloatRounding,
    ScaleFormula,
)
from weightflip.quantizers.ordinals import amax, cast_to_float8, ordinals_to_values
from weightflip.quantizers.protocol import ElementwiseQuantizer, Scope, Scratch, bits_of_scale
from weightflip.quantizers.registry import register

# torchao.float8.float8_utils.EPS: the smallest amax that torchao divides by.
_EPS = 1e-12

_BLOCK_NAMES = (FLOAT8_E4M3_1X128.name, FLOAT8_E4M3_128X128.name)


class _Float8Cast(ElementwiseQuantizer):
    """Multiplies by a scale ``s``, clamps and casts. Values are ``code / s``."""

    format: FloatFormat

    def code_dtype(self, weight: Tensor) -> torch.dtype:
        return torch.int8

    def _check_dtype(self, weight: Tensor) -> None:
        if not weight.is_floating_point():
            raise ValueError(f"quantizer {self.name!r} casts floating-point weights, got {weight.dtype}")

    def scale_of(self, largest: Tensor) -> Tensor:
        # In float64, like torchao: 1.0 / float32 differs between eager and compiled code.
        return (self.format.max / largest.to(torch.float64).clamp(min=_EPS)).to(torch.float32)

    @property
    def _formula(self) -> ScaleFormula:
        return ScaleFormula("multiplies", self.format.max, _EPS)

    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        assert scale is not None
        values = scratch("values", weight, torch.float32)
        if weight.dtype is torch.float32:
            torch.mul(weight, scale, out=values)
        else:
            # torchao multiplies in float32. A 0-dim scale would not promote bfloat16.
            values.copy_(weight).mul_(scale)
        # torchao clamps here. Since |w| <= amax, |w * s| exceeds max by at most two float32 roundings, far less than
        # the half step at which a cast leaves max. So the clamp never changes a code, and its pass is saved.
        # Only a scale that is NaN (from a NaN weight) or 0 (from an infinite one) gives NaN, and then only NaN and 0.
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

    def value_rule(self) -> Literal["divides"]:
        return "divides"

    def ordinal_range(self, weight: Tensor) -> tuple[int, int]:
        return -self.format.max_ordinal, self.format.max_ordinal


class Float8Quantizer(_Float8Cast):
    """torchao's dynamic float8 weight cast: ``"float8_e4m3"``, ``"float8_e5m2"``, ``":row"``, ``":pow2"``.

    ``s = max / max(amax, 1e-12)``, computed in float64 and stored in float32; ``pow2`` rounds it down to a power of
    two. The code is that of ``clamp(float32(w) * s, -max, max)``. Source: torchao 0.18,
    ``torchao/float8/float8_utils.py``. The scale of the codes is ``s``: values are ``code / s``.

    Args:
        format: E4M3 or E5M2.
        granularity: ``"tensor"``, or ``"row"`` for one scale over the last dimension: one per output channel of a
            linear layer's weight.
        round_scales_to_power_of_2: Round ``s`` down, as torchao's rowwise recipes do.

    Raises:
        ValueError: Another format.
    """

    is_defined_by_name = True
    only_needs_amax = True

    def __init__(
        self,
        format: FloatFormat,
        granularity: Literal["tensor", "row"] = "tensor",
        *,
        round_scales_to_power_of_2: bool = False,
    ) -> None:
        if format not in (E4M3, E5M2):
            raise ValueError(f"the format of float8 must be E4M3 or E5M2, got {format}")
        self.format = format
        self.granularity: Literal["tensor", "row"] = granularity
        self.scope = granularity
        self.round_scales_to_power_of_2 = round_scales_to_power_of_2
        self.name = (
            f"float8_{format.name}"
            + (":row" if granularity == "row" else "")
            + (":pow2" if round_scales_to_power_of_2 else "")
        )

    def statistic(self, weight: Tensor) -> Tensor:
        """Return the largest magnitude of the weight, or of each row. Exact for shards."""
        self._check_dtype(weight)
        return amax(weight, self.granularity)

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor:
        return self.scale_of(self.statistic(weight) if statistic is None else statistic)

    def scale_rule(self, dtype: torch.dtype) -> ScaleFormula | Literal["steps"]:
        return "steps" if self.round_scales_to_power_of_2 else self._formula

    def scale_of(self, largest: Tensor) -> Tensor:
        scale = super().scale_of(largest)
        if self.round_scales_to_power_of_2:
            scale = torch.exp2(torch.floor(torch.log2(scale)))
        return scale


class Float8BlockQuantizer(_Float8Cast):
    """DeepSeek-V3's float8, one scale per block: ``"float8_e4m3:128x128"``, ``"float8_e4m3:1x128"``, ``":pow2"``.

    ``s = 448 / max(amax, 1e-12)``, computed in float64 and stored in float32. ``:pow2`` rounds it down to a power of
    two, so that its inverse is the smallest power with which nothing saturates. The code is that of
    ``clamp(float32(w) * s, -448, 448)``. Source: torchao 0.18, ``torch_blockwise_scale_weight_quant`` and
    ``torch_blockwise_scale_act_quant_lhs`` in ``torchao/prototype/blockwise_fp8_training/kernels.py``; for ``:pow2``,
    DeepGEMM's ``ceil_to_ue8m0``.

    Blocks span the last two dimensions. The last block of a row or column may be smaller, and its scale is that of its
    own weights. ``grouped`` splits rows into groups that no block boundary cuts: of 128 weights; of the whole row if it
    is shorter; or, if the last block is smaller, of the greatest common divisor. Each group in each row has the scale
    of its block, ``(..., K // g, 1)``.

    Args:
        block: One of the ``BLOCK_FORMATS`` of this family.
    """

    is_defined_by_name = True
    scope: Scope = "block"
    only_needs_amax = True

    def __init__(self, block: BlockFormat) -> None:
        self.block = block
        self.name = block.name
        self.format = block.element
        self.group: int = block.block_size
        self.tile = (block.rows, block.block_size)

    def grouped(self, tensor: Tensor) -> Tensor:
        size = self._group_size(tensor.shape)
        return tensor.view(*tensor.shape[:-1], (tensor.shape or (1,))[-1] // size, size)

    def _group_size(self, shape: Sequence[int]) -> int:
        columns, size = (shape or (1,))[-1], self.block.block_size
        return columns if 0 < columns < size else math.gcd(columns, size)

    def statistic(self, weight: Tensor) -> Tensor:
        """Return the largest magnitude of each row in each block, ``(..., R, number of blocks)``."""
        return self._max_of_rows_in_blocks(self.grouped(weight))

    def _max_of_rows_in_blocks(self, grouped: Tensor) -> Tensor:
        self._check_dtype(grouped)
        return _max_over_chunks(amax(grouped, "row").squeeze(-1), self.block.block_size // grouped.shape[-1], -1)

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor:
        """Return the scales, one per group of ``weight``.

        Args:
            weight: As ``grouped`` returns it.
            statistic: For each row of ``weight`` in each block, the largest magnitude of the whole block.
        """
        if statistic is not None:
            scale = self.scale_of(statistic)
        elif self.block.rows == 1 or weight.ndim == 2:
            scale = self.scale_of(self._max_of_rows_in_blocks(weight))
        else:
            of_blocks = self.scale_of(_max_over_chunks(self._max_of_rows_in_blocks(weight), self.block.rows, -2))
            scale = of_blocks.repeat_interleave(self.block.rows, -2)[..., : weight.shape[-3], :]
        per_block = self.block.block_size // weight.shape[-1]
        if per_block > 1:
            scale = scale.repeat_interleave(per_block, -1)[..., : weight.shape[-2]]
        return scale.unsqueeze(-1)

    def scale_rule(self, dtype: torch.dtype) -> ScaleFormula | Literal["steps"]:
        return "steps" if self.block.rule == "pow2" else self._formula

    def scale_of(self, largest: Tensor) -> Tensor:
        scale = super().scale_of(largest)
        if self.block.rule == "pow2":
            # Uses the bits: a float32 logarithm would round a number just below a power of two up to that power.
            powers = (scale.view(torch.int32) >> FP32.mantissa_bits << FP32.mantissa_bits).view(torch.float32)
            scale = torch.where(scale.isnan(), scale, powers)
        return scale

    def block_scales(self, scale: Tensor, shape: Sequence[int], first_row: int = 0) -> Tensor:
        scale = scale[..., :: self.block.block_size // self._group_size(shape), :]
        if self.block.rows > 1 and len(shape) > 1:
            scale = scale[..., -first_row % self.block.rows :: self.block.rows, :, :]
        return scale

    def scale_codes(self, scale: Tensor) -> Tensor:
        """Return ``1 / s``, which is stored with the codes: float32 bits as int32; with ``:pow2`` E8M0 as uint8."""
        stored = scale.reciprocal()
        if self.block.scale == E8M0:
            return stored.to(torch.float8_e8m0fnu).view(torch.uint8)
        return bits_of_scale(stored)


def _max_over_chunks(magnitudes: Tensor, size: int, dim: int) -> Tensor:
    """Return the maximum of each ``size`` neighbors in a negative dimension. The last chunk may be smaller."""
    if size == 1:
        return magnitudes
    blocks = -(-magnitudes.shape[dim] // size)
    missing = blocks * size - magnitudes.shape[dim]
    if missing:
        magnitudes = torch.nn.functional.pad(magnitudes, [0, 0] * (-1 - dim) + [0, missing])
    shape = list(magnitudes.shape)
    shape[len(shape) + dim : len(shape) + dim + 1] = [blocks, size]
    return magnitudes.reshape(shape).amax(dim)


@register("float8_(e4m3|e5m2)", examples=("float8_e4m3", "float8_e5m2", *_BLOCK_NAMES))
def _float8(name: str, options: tuple[str, ...]) -> ElementwiseQuantizer:
    block = BLOCK_FORMATS.get(":".join((name, *sorted(options))))
    if block is not None:
        return Float8BlockQuantizer(block)
    unknown = set(options) - {"row", "pow2"}
    if unknown or len(set(options)) != len(options):
        blocks = ", or '1x128' or '128x128' with or without 'pow2'" if name == "float8_e4m3" else ""
        raise ValueError(f"quantizer {name!r} takes the options 'row' and 'pow2'{blocks}, got {':'.join(options)!r}")
    return Float8Quantizer(
        E4M3 if name.endswith("e4m3") else E5M2,
        "row" if "row" in options else "tensor",
        round_scales_to_power_of_2="pow2" in options,
    )
