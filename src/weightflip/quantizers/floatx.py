"""Any ExMy format of up to 16 bits: rounds to the nearest value, ties to the even code, and saturates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from weightflip import checks
from weightflip.formats import FloatFormat, FloatRounding, ScaleFormula, exmy
from weightflip.quantizers.ordinals import (
    ORDINAL_DTYPES,
    TORCH_FLOAT8,
    Granularity,
    amax,
    cast_to_float8,
    ordinals_to_values,
    round_to_ordinals,
)
from weightflip.quantizers.protocol import ElementwiseQuantizer, Scope, Scratch
from weightflip.quantizers.registry import register

# Formats with a wider exponent are scaled so that amax maps to 2**512 instead of their largest number. float64 holds
# that, and every float32 weight divided by the largest of its tensor is above 2**-277.
_FLOAT64_EXPONENT = 512


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    trailing = to[len(to) - len(shape) :] if len(shape) <= len(to) else ()
    return len(trailing) == len(shape) and all(a in (1, b) for a, b in zip(shape, trailing, strict=True))


class FloatxQuantizer(ElementwiseQuantizer):
    """An ExMy format with one scale per tensor, per row, or none: ``"e3m4"``, ``"e3m4:row"``, ``"e3m4:none"``.

    The weight is divided by ``scale = amax / format.max``, so that the largest magnitude maps to the largest number,
    and rounded to nearest even. ``scale`` and the quotient are float32; float64 for float64 weights and for formats
    with 6 or more exponent bits, whose range is too wide for float32.

    Args:
        format: The element format.
        granularity: What shares a scale.
        fixed_scale: A user-defined scale instead: a number or a tensor that broadcasts to the weight.

    Raises:
        TypeError: A scale that is neither a number nor a tensor.
        ValueError: More than 16 bits, an unknown granularity, or a number as scale that is not positive and finite. The
            elements of a tensor are not checked, since that would synchronize with the device.
    """

    def __init__(
        self,
        format: FloatFormat,
        granularity: Granularity = "none",
        *,
        fixed_scale: Tensor | float | None = None,
    ) -> None:
        if format.bits > 16:
            raise ValueError(f"an ExMy format must have at most 16 bits, got {format}")
        if granularity not in get_args(Granularity):
            raise ValueError(f"granularity= must be one of {get_args(Granularity)}, got {granularity!r}")
        if isinstance(fixed_scale, Real) and not isinstance(fixed_scale, bool):
            # Includes NumPy's numbers. An integer may be too large for a float.
            try:
                fixed_scale = float(fixed_scale)
            except OverflowError:
                fixed_scale = math.inf
        elif isinstance(fixed_scale, Tensor) and fixed_scale.is_complex():
            dtype = str(fixed_scale.dtype).removeprefix("torch.")
            raise TypeError(f"scale= must be a number or a torch.Tensor of real numbers, got a {dtype} tensor")
        elif fixed_scale is not None and not isinstance(fixed_scale, Tensor):
            hint = "; convert it with torch.tensor(...)" if hasattr(fixed_scale, "__len__") else ""
            raise TypeError(f"scale= must be a number or a torch.Tensor, got {checks.describe(fixed_scale)}{hint}")
        if isinstance(fixed_scale, float) and not 0 < fixed_scale < math.inf:
            raise ValueError(
                f"scale= must be positive and finite, since the weight is divided by it; got {fixed_scale}"
            )
        self.format: FloatFormat = format
        self.granularity: Granularity = granularity
        self.fixed_scale = fixed_scale
        scaled = granularity != "none" and fixed_scale is None
        self._exponent_shift = max(0, format.max_exponent - _FLOAT64_EXPONENT) if scaled else 0
        self.name = format.name + {"tensor": "", "row": ":row", "none": ":none"}[granularity]

    def code_dtype(self, weight: Tensor) -> torch.dtype:
        return ORDINAL_DTYPES[self.format.storage_bits]

    def _compute_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        # With 6 or more exponent bits, amax / max leaves the normal range of float32 for small weights.
        wide = weight_dtype is torch.float64 or self.format.exponent_bits > 5
        return torch.float64 if wide else torch.float32

    @property
    def scope(self) -> Scope | None:  # type: ignore[override]
        if self.fixed_scale is None:
            return "element" if self.granularity == "none" else self.granularity
        # With several scales, it is unknown which of them belong to a shard.
        return "element" if not isinstance(self.fixed_scale, Tensor) or self.fixed_scale.numel() == 1 else None

    @property
    def is_defined_by_name(self) -> bool:  # type: ignore[override]
        return self.fixed_scale is None

    @property
    def only_needs_amax(self) -> bool:  # type: ignore[override]
        return self.fixed_scale is None

    def statistic(self, weight: Tensor) -> Tensor:
        """Return the largest magnitude of the weight, or of each row. Exact for shards."""
        return amax(weight, self.granularity)

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor | None:
        if not weight.is_floating_point():
            raise ValueError(f"quantizer {self.name!r} rounds floating-point weights, got {weight.dtype}")
        if self.fixed_scale is not None:
            dtype = self._compute_dtype(weight.dtype)
            scale = torch.as_tensor(self.fixed_scale, dtype=dtype, device=weight.device)
            # Users may change their tensor later, which must not affect kept codes.
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
        # A tensor on the same device: a GPU divides by a number or a CPU tensor as a product with its inverse.
        maximum = largest.new_full((), self.format.value(self.format.max_ordinal, exponent_shift=self._exponent_shift))
        # An all-zero tensor gets the smallest normal number as scale: 0 / 0 would be NaN.
        return (largest / maximum).clamp_(min=torch.finfo(largest.dtype).tiny)

    def scale_rule(self, dtype: torch.dtype) -> ScaleFormula | None:
        if self._compute_dtype(dtype) is not torch.float32:
            return None
        return ScaleFormula("divides", self.format.max, torch.finfo(torch.float32).tiny)

    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        dtype = self._compute_dtype(weight.dtype)
        values = scratch("values", weight, dtype)
        if scale is None or weight.dtype is not dtype:
            values.copy_(weight)
            if scale is not None:
                values.div_(scale)
        else:
            torch.div(weight, scale, out=values)
        if dtype is torch.float32 and self.format in TORCH_FLOAT8:
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

    def value_rule(self) -> Literal["multiplies"] | None:
        return "multiplies" if self._compute_dtype(torch.float32) is torch.float32 else None

    def ordinal_range(self, weight: Tensor) -> tuple[int, int]:
        return -self.format.max_ordinal, self.format.max_ordinal


@register(r"e\d+m\d+", examples=("e3m4",))
def _floatx(name: str, options: tuple[str, ...]) -> ElementwiseQuantizer:
    format = exmy(name)
    if options not in ((), ("row",), ("none",)):
        raise ValueError(f"quantizer {name!r} takes one of the options 'row', 'none', got {':'.join(options)!r}")
    granularity: Granularity = "row" if "row" in options else "none" if "none" in options else "tensor"
    return FloatxQuantizer(format, granularity)
