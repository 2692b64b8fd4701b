"""Block formats: one scale, itself a code, per 32 (MX) or 16 (NVFP4) neighbors in the last dimension."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from weightflip.formats import BLOCK_FORMATS, E4M3, E5M2, E8M0, FP32, NVFP4, BlockFormat, FloatFormat, FloatRounding
from weightflip.quantizers.ordinals import amax, cast_to_float8, ordinals_to_values, round_to_ordinals
from weightflip.quantizers.protocol import ElementwiseQuantizer, Scope, Scratch
from weightflip.quantizers.registry import register

ScaleMode: TypeAlias = Literal["floor", "rceil", "ceil", "even"]

MX_NAMES = {block.family: block.element for block in BLOCK_FORMATS.values() if block.rule == "floor"}
"""Names of the MX formats without options, and their element formats."""


class _BlockQuantizer(ElementwiseQuantizer):
    """Base class of MX and NVFP4: ``float32(w)`` times the inverse of a scale, rounded to nearest even, saturating.

    A block that contains NaN has NaN as its scale, and all its weights get NaN's code.

    Args:
        block: The element format, the size of a block, and its scale.
    """

    scope: Scope = "group"
    only_needs_amax = True

    def __init__(self, block: BlockFormat) -> None:
        self.block = block
        self.format: FloatFormat = block.element
        self.group: int = block.block_size
        self.name = block.name

    def code_dtype(self, weight: Tensor) -> torch.dtype:
        return torch.int8

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor:
        if not weight.is_floating_point():
            raise ValueError(f"quantizer {self.name!r} rounds floating-point weights, got {weight.dtype}")
        return self.scale_of(amax(weight, "row"), statistic)

    @abstractmethod
    def scale_of(self, largest: Tensor, of_tensor: Tensor | None = None) -> Tensor:
        """Compute the scales from the largest magnitude of each block: float32, in its shape.

        Args:
            largest: The largest magnitude of each block, in the weight's dtype.
            of_tensor: The largest magnitude of the tensor; None to use the maximum of ``largest``.
        """

    @abstractmethod
    def applied_scale(self, scale: Tensor | None) -> Tensor:
        """Return what the weight is multiplied by: an inverse of the scale, float32."""

    @abstractmethod
    def scale_codes(self, scale: Tensor) -> Tensor:
        """Return the block scales as the format stores them: ordinals, in the scale's shape."""

    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        factor = self.applied_scale(scale)
        values = scratch("values", weight, torch.float32)
        if weight.dtype is torch.float32:
            torch.mul(weight, factor, out=values)
        else:
            values.copy_(weight).mul_(factor)
        if self.format in (E4M3, E5M2):
            values.clamp_(-self.format.max, self.format.max)
            cast_to_float8(values, self.format, out, scratch)
        else:
            round_to_ordinals(values, self.format, out, scratch)

    def rounding(self, weight: Tensor) -> FloatRounding:
        return FloatRounding(self.format, self.format.max_ordinal)

    def values(self, ordinals: Tensor, scale: Tensor | None) -> Tensor:
        values = ordinals_to_values(ordinals, self.format, torch.float32)
        return values if scale is None else values * self.value_scale(scale)

    def value_rule(self) -> Literal["multiplies"]:
        return "multiplies"

    def ordinal_range(self, weight: Tensor) -> tuple[int, int]:
        return -self.format.max_ordinal, self.format.max_ordinal


class MXQuantizer(_BlockQuantizer):
    """OCP Microscaling: blocks of 32 with a power of two as scale. ``"mxfp8_e4m3"``, ``"mxfp4:rceil"``, ...

    The scale is ``2**e``, stored as E8M0: ``e`` from -127 to 127, or NaN. With ``amax`` the largest magnitude of the
    block, ``max`` the format's largest number and ``max_exponent`` its exponent,

    * ``"floor"`` (OCP): ``e = floor(log2(amax)) - max_exponent``; magnitudes above ``max`` saturate,
    * ``"ceil"``: ``e = ceil(log2(amax)) - max_exponent``,
    * ``"even"``: as ``"floor"``, with ``amax`` first rounded (half up) to the format's mantissa bits,
    * ``"rceil"`` (NVIDIA): ``e = ceil(log2(amax / max))``, in float32, so nothing saturates.

    Source: OCP Microscaling Formats 1.0, section 6.3; torchao 0.18, ``to_mx`` in
    ``torchao/prototype/mx_formats/mx_tensor.py``. Values are ``code * scale``. For scales below ``2**-126``, torchao
    computes with a different scale than it stores, and so does this class: with ``2**-126``, or 1 for ``"rceil"``.

    Args:
        format: E4M3, E5M2, E2M3, E3M2 or E2M1.
        mode: The rule for the scale; a value of torchao's ``ScaleCalculationMode``.

    Raises:
        ValueError: Another format, or an unknown mode.
    """

    is_defined_by_name = True

    def __init__(self, format: FloatFormat, mode: ScaleMode = "floor") -> None:
        name = next((name for name, known in MX_NAMES.items() if known == format), None)
        if name is None:
            raise ValueError(
                f"elements of MX formats must be one of {', '.join(f.name for f in MX_NAMES.values())}, got {format}"
            )
        if mode not in get_args(ScaleMode):
            raise ValueError(f"the scale mode must be one of {get_args(ScaleMode)}, got {mode!r}")
        super().__init__(replace(BLOCK_FORMATS[name], rule=mode))
        self.mode: ScaleMode = mode

    def scale_of(self, largest: Tensor, of_tensor: Tensor | None = None) -> Tensor:
        largest = largest.to(torch.float32)
        if self.mode == "rceil":
            # As in torchao: in float32, the logarithm rounds amax just above a power of two down to that power.
            exponent = (largest / self.format.max).log2_().ceil_().add_(E8M0.bias)
            codes = exponent.clamp_(0, E8M0.max_code).nan_to_num_(nan=E8M0.nan_code)
        else:
            # Uses the bits of float32, whose exponent has the same bias as E8M0.
            bits = largest.view(torch.int32)
            if self.mode == "even":
                bits = bits + (1 << (FP32.mantissa_bits - self.format.mantissa_bits - 1))
            elif self.mode == "ceil":
                bits = bits + ((1 << FP32.mantissa_bits) - 1)
            codes = (bits >> FP32.mantissa_bits).sub_(self.format.max_exponent).clamp_(0, E8M0.max_code)
            codes.masked_fill_(largest.isnan(), E8M0.nan_code)
        return codes.to(torch.uint8).view(torch.float8_e8m0fnu).to(torch.float32)

    def scale_rule(self, dtype: torch.dtype) -> Literal["steps"]:
        return "steps"

    def applied_scale(self, scale: Tensor | None) -> Tensor:
        assert scale is not None
        # Scales are powers of two, so multiplying by the inverse is exact.
        if self.mode == "rceil":
            return scale.masked_fill(scale < FP32.smallest_normal, 1.0).reciprocal_()
        return scale.clamp(min=FP32.smallest_normal).reciprocal_()

    def scale_codes(self, scale: Tensor) -> Tensor:
        """Return the biased exponents of E8M0, uint8: 0 (``2**-127``) to 254, and 255 for NaN."""
        return scale.to(torch.float8_e8m0fnu).view(torch.uint8)


class NVFP4Quantizer(_BlockQuantizer):
    """NVIDIA's 4-bit floating point: E2M1 in blocks of 16 with an E4M3 scale. ``"nvfp4"``, ``"nvfp4:tensor"``.

    The block's scale ``s`` is ``clamp(amax / 6, 2**-6, 448)`` rounded to E4M3. With ``per_tensor_scale``, ``amax / 6``
    is first divided by ``t = amax of the tensor / (448 * 6)``, and ``s * t`` replaces ``s``. All computations are in
    float32; the weight is multiplied by ``(1 / t) / s``. Source: torchao 0.18, ``nvfp4_quantize`` in
    ``torchao/prototype/mx_formats/nvfp4_tensor.py``.

    The scale of the codes is ``s``, float32. With ``per_tensor_scale`` it is one complex number that holds both levels,
    ``s + t * 1j``, so that each slice of it is all that a slice of the weight needs.

    As in torchao, an all-zero tensor has no scale with ``per_tensor_scale``: 0 / 0 makes all its values NaN.

    Args:
        per_tensor_scale: Use two levels, as in NVIDIA's recipe and by default in torchao's QAT, with ``t`` computed
            from the weight's own amax.
    """

    is_defined_by_name = True

    def __init__(self, per_tensor_scale: bool = False) -> None:
        super().__init__(replace(NVFP4, rule="tensor") if per_tensor_scale else NVFP4)
        self.per_tensor_scale = per_tensor_scale
        self.scope = "tensor" if per_tensor_scale else "group"
        # False for a subclass that overrides scale().
        is_known = type(self).only_needs_amax
        self.only_needs_amax, self.is_two_level = is_known and not per_tensor_scale, is_known and per_tensor_scale

    def statistic(self, weight: Tensor) -> Tensor:
        """Return the largest magnitude of the weight. Exact for shards."""
        return amax(weight, "tensor")

    def scale_of(self, largest: Tensor, of_tensor: Tensor | None = None) -> Tensor:
        largest = largest.to(torch.float32)
        per_block = largest / self.format.max
        if not self.per_tensor_scale:
            return self._round_scale(per_block)
        of_tensor = amax(largest, "tensor") if of_tensor is None else of_tensor.to(torch.float32)
        per_tensor = of_tensor / (E4M3.max * self.format.max)
        per_block = self._round_scale(per_block / per_tensor)
        return torch.complex(per_block, per_tensor.expand_as(per_block))

    def scale_of_groups(self, largest: Tensor, of_tensors: Tensor) -> Tensor:
        return self.scale_of(largest, of_tensors)

    @staticmethod
    def _round_scale(scale: Tensor) -> Tensor:
        return scale.clamp_(E4M3.smallest_normal, E4M3.max).to(torch.float8_e4m3fn).to(torch.float32)

    def scale_rule(self, dtype: torch.dtype) -> Literal["steps"] | None:
        return None if self.per_tensor_scale else "steps"

    def applied_scale(self, scale: Tensor | None) -> Tensor:
        assert scale is not None
        if not self.per_tensor_scale:
            return scale.reciprocal()
        return scale.imag.reciprocal().div_(scale.real)

    def value_scale(self, scale: Tensor) -> Tensor:
        return scale.imag * scale.real if self.per_tensor_scale else scale

    def scale_codes(self, scale: Tensor) -> Tensor:
        """Return the ordinals of the E4M3 block scales, without the tensor's: int8, 8 to 126, and 127 for NaN."""
        per_block = scale.real if self.per_tensor_scale else scale
        # Bit patterns of positive numbers are ordinals.
        return per_block.abs().to(torch.float8_e4m3fn).view(torch.int8)


@register("|".join(MX_NAMES), examples=tuple(MX_NAMES))
def _mx(name: str, options: tuple[str, ...]) -> ElementwiseQuantizer:
    modes: dict[tuple[str, ...], ScaleMode] = {(): "floor", **{(mode,): mode for mode in get_args(ScaleMode)}}
    if options not in modes:
        raise ValueError(
            f"quantizer {name!r} takes one of the options {', '.join(map(repr, get_args(ScaleMode)))}, "
            f"got {':'.join(options)!r}"
        )
    return MXQuantizer(MX_NAMES[name], modes[options])


@register("nvfp4", examples=("nvfp4",))
def _nvfp4(name: str, options: tuple[str, ...]) -> ElementwiseQuantizer:
    if options not in ((), ("tensor",)):
        raise ValueError(f"quantizer {name!r} takes the option 'tensor', got {':'.join(options)!r}")
    return NVFP4Quantizer(per_tensor_scale=bool(options))
