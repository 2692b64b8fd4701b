"""Codes computed independently of the library: torchao's casts, ``ml_dtypes``, a search in all numbers of a format.

torchao is imported where it is needed, since some files that use this one run without it.
"""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

# ---------------------------------------------------------------------- ExMy: the nearest number, found by search

# E4M3 and the IEEE formats use some of their largest patterns for NaN and infinity. All other splits are finite.
SPECIAL_CODES = {(4, 3): 1, (5, 2): 4, (8, 7): 128, (5, 10): 1024}


def split_name(split: tuple[int, int]) -> str:
    return f"e{split[0]}m{split[1]}"


def largest_ordinal(split: tuple[int, int]) -> int:
    return 2 ** sum(split) - 1 - SPECIAL_CODES.get(split, 0)


def nan_ordinal(split: tuple[int, int]) -> int:
    """The ordinal above all numbers, infinity included. It wraps around if a format uses all of its 8 or 16 bits."""
    has_infinity = SPECIAL_CODES.get(split, 0) > 1
    ordinal = largest_ordinal(split) + 1 + has_infinity
    return -ordinal if ordinal in (128, 32768) else ordinal


@cache
def number(split: tuple[int, int], magnitude: int) -> Fraction:
    exponent_bits, mantissa_bits = split
    fraction = Fraction(magnitude % 2**mantissa_bits, 2**mantissa_bits)
    if exponent_bits == 0:
        return fraction
    field, bias = magnitude // 2**mantissa_bits, 2 ** (exponent_bits - 1) - 1
    return Fraction(2) ** (1 - bias) * fraction if field == 0 else Fraction(2) ** (field - bias) * (1 + fraction)


def nearest(x: Fraction, split: tuple[int, int]) -> int:
    """Ordinal of the number nearest to ``x``; of two equally near, the even one; beyond the largest, the largest."""
    magnitude, largest = abs(x), largest_ordinal(split)
    above = bisect_left(range(largest + 1), magnitude, key=lambda k: number(split, k))
    if above > largest:
        ordinal = largest
    elif above == 0:
        ordinal = 0
    else:
        up, down = number(split, above) - magnitude, magnitude - number(split, above - 1)
        ordinal = above if up < down or (up == down and above % 2 == 0) else above - 1
    return -ordinal if x < 0 else ordinal


@cache
def half_values(split: tuple[int, int]) -> np.ndarray:
    """All non-negative finite numbers, exact in float64."""
    exponent_bits, mantissa_bits = split
    assert exponent_bits <= 10
    field, mantissa = np.divmod(np.arange(largest_ordinal(split) + 1), 2**mantissa_bits)
    if exponent_bits == 0:
        return np.ldexp(mantissa.astype(float), -mantissa_bits)
    significand = mantissa + np.where(field > 0, 2**mantissa_bits, 0)
    bias = 2 ** (exponent_bits - 1) - 1
    return np.ldexp(significand.astype(float), np.maximum(field, 1) - bias - mantissa_bits)


@cache
def midpoints(split: tuple[int, int]) -> np.ndarray:
    values = half_values(split)
    return (values[:-1] + values[1:]) / 2


def nearest_array(x: np.ndarray, split: tuple[int, int]) -> np.ndarray:
    """``nearest`` for many float64 values at once; NaN gives the format's NaN ordinal."""
    x = x.astype(np.float64)
    magnitude = np.abs(x)
    below = np.searchsorted(midpoints(split), magnitude, side="left")
    above = np.searchsorted(midpoints(split), magnitude, side="right")
    # At a midpoint the two differ by one: take the even one.
    ordinals = np.where((below != above) & (below % 2 == 1), above, below)
    ordinals = np.where(x < 0, -ordinals, ordinals)
    return np.where(np.isnan(x), nan_ordinal(split), ordinals)


# ---------------------------------------------------------------------- float8

# Largest magnitude pattern that is a number, infinity included.
LAST = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7C}


def float8_ordinals(data: Tensor) -> np.ndarray:
    """Convert bits to integers that are equal if the numbers are: from sign and magnitude, with a single NaN."""
    bits = data.contiguous().view(torch.uint8).numpy().astype(np.int64)
    magnitude, last = bits & 0x7F, LAST[data.dtype]
    return np.where(magnitude > last, last + 1, np.where(bits >= 0x80, -magnitude, magnitude))


# ---------------------------------------------------------------------- MX and NVFP4

TORCHAO_ELEMENT = {
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp4": torch.float4_e2m1fn_x2,
}
BLOCK_ELEMENT = {
    "mxfp8_e4m3": (4, 3),
    "mxfp8_e5m2": (5, 2),
    "mxfp6_e2m3": (2, 3),
    "mxfp6_e3m2": (3, 2),
    "mxfp4": (2, 1),
    "nvfp4": (2, 1),
}
SIGN = {"mxfp8_e4m3": 0x80, "mxfp8_e5m2": 0x80, "mxfp6_e2m3": 0x20, "mxfp6_e3m2": 0x20, "mxfp4": 8, "nvfp4": 8}


def per_tensor_scale(weight: Tensor, name: str) -> Tensor | None:
    from torchao.prototype.mx_formats.nvfp4_tensor import per_tensor_amax_to_scale

    return per_tensor_amax_to_scale(weight.abs().max()) if name == "nvfp4:tensor" else None


def block_codes(weight: Tensor, name: str) -> tuple[np.ndarray, Tensor]:
    """Ordinals from the bits of torchao's elements, and its block scales. The bits of NaN are ignored."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.kernels import unpack_uint4
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    family, _, mode = name.partition(":")
    if family == "nvfp4":
        scale, data = nvfp4_quantize(weight, 16, per_tensor_scale(weight, name))
        scale = scale.view(*weight.shape[:-1], -1)
        group = 16
    else:
        scale, data = to_mx(weight, TORCHAO_ELEMENT[family], 32, ScaleCalculationMode(mode))
        group = 32
    bits = unpack_uint4(data) if SIGN[family] == 8 else data.view(torch.uint8)
    bits, sign = bits.numpy().astype(np.int64), SIGN[family]
    ordinals = np.where(bits & sign, -(bits & (sign - 1)), bits)
    is_nan = scale.float().isnan().repeat_interleave(group, -1) | becomes_nan(weight, name)
    return np.where(is_nan.numpy(), nan_ordinal(BLOCK_ELEMENT[family]), ordinals), scale


def becomes_nan(weight: Tensor, name: str) -> Tensor:
    """Zeros multiplied by an inverse scale that overflows: torchao stores whatever the bits of that NaN give."""
    scale = per_tensor_scale(weight, name)
    return (weight == 0) & (scale is not None and (1 / scale).isinf())


# ---------------------------------------------------------------------- integers


def integer_codes(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, codes and values of torchao's symmetric integers."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = weight if weight.ndim > 1 else weight.unsqueeze(0)
    block = (1,) * (weight.ndim - 1) + (group or weight.shape[-1],)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale, zero_point = primitives.choose_qparams_affine(
        weight,
        primitives.MappingType.SYMMETRIC,
        block,
        torch.int8,
        low,
        high,
        scale_dtype=torch.float32,
        keepdim=True,
    )
    codes = primitives.quantize_affine(weight, block, scale, zero_point, torch.int8, low, high)
    values = primitives.dequantize_affine(codes, block, scale, zero_point, torch.int8, low, high)
    return scale, codes, values
