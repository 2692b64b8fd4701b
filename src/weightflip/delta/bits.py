"""Stored elements as integers: width of each dtype, and lossless differences of ordinals."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Integers: TypeAlias = NDArray[np.signedinteger[Any]]
Unsigned: TypeAlias = NDArray[np.unsignedinteger[Any]]


class Stored(NamedTuple):
    """How a dtype is stored.

    Attributes:
        bits: Bits per element.
        unit: Bytes that are compared together: those of an element, or 1 if a byte holds several elements.
        has_sign_bit: Whether the highest bit of a unit is a sign and the rest a magnitude.
        dtype: The torch dtype; None if torch has none.
    """

    bits: int
    unit: int
    has_sign_bit: bool
    dtype: torch.dtype | None


STORED: dict[str, Stored] = {
    "BOOL": Stored(8, 1, False, torch.bool),
    "U8": Stored(8, 1, False, torch.uint8),
    "I8": Stored(8, 1, False, torch.int8),
    "U16": Stored(16, 2, False, torch.uint16),
    "I16": Stored(16, 2, False, torch.int16),
    "U32": Stored(32, 4, False, torch.uint32),
    "I32": Stored(32, 4, False, torch.int32),
    "U64": Stored(64, 8, False, torch.uint64),
    "I64": Stored(64, 8, False, torch.int64),
    # Two elements per byte, and four elements per three bytes. torch has no such dtypes: its float4 is a pair.
    "F4": Stored(4, 1, False, None),
    "F6_E2M3": Stored(6, 1, False, None),
    "F6_E3M2": Stored(6, 1, False, None),
    "F8_E8M0": Stored(8, 1, False, torch.float8_e8m0fnu),
    "F8_E4M3": Stored(8, 1, True, torch.float8_e4m3fn),
    "F8_E5M2": Stored(8, 1, True, torch.float8_e5m2),
    "F8_E4M3FNUZ": Stored(8, 1, True, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": Stored(8, 1, True, torch.float8_e5m2fnuz),
    "F16": Stored(16, 2, True, torch.float16),
    "BF16": Stored(16, 2, True, torch.bfloat16),
    "F32": Stored(32, 4, True, torch.float32),
    "F64": Stored(64, 8, True, torch.float64),
    "C64": Stored(64, 8, False, torch.complex64),
}
"""Storage of each dtype, by its safetensors name."""

OF_TORCH = {stored.dtype: name for name, stored in STORED.items() if stored.dtype is not None}

_INTEGERS: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def integers(data: Bytes, unit: int) -> Integers:
    """View bytes as signed integers, little-endian like both file formats."""
    view: Integers = data.view(np.dtype(_INTEGERS[unit]).newbyteorder("<"))
    return view


def differences(old: Integers, new: Integers, has_sign_bit: bool) -> Unsigned:
    """The distance that each element moved in the order of its ordinals, zigzag-encoded.

    This is lossless: -0 and NaN payloads have their own positions in the order, and overflows wrap around.

    Args:
        old: Stored elements.
        new: The same elements. The bits of every element must differ.
        has_sign_bit: As in :class:`Stored`.

    Returns:
        0 for one step down, 1 for one step up, 2 for two steps down, ... Unsigned, as wide as the elements.
    """
    last = 8 * old.itemsize - 1
    moved = _ordered(new, has_sign_bit) - _ordered(old, has_sign_bit)
    zigzag: Unsigned = ((moved << 1) ^ (moved >> last)).view(_UNSIGNED[old.itemsize])
    # No difference is 0, since every element changed.
    shifted: Unsigned = zigzag - zigzag.dtype.type(1)
    return shifted


def add_differences(old: Integers, differences: Unsigned, has_sign_bit: bool) -> Integers:
    """The inverse of :func:`differences`: the new elements."""
    zigzag = differences + differences.dtype.type(1)
    signs = (zigzag & zigzag.dtype.type(1)).view(old.dtype)
    steps = (zigzag >> zigzag.dtype.type(1)).view(old.dtype) ^ -signs
    return _ordered(_ordered(old, has_sign_bit) + steps, has_sign_bit)


def _ordered(elements: Integers, has_sign_bit: bool) -> Integers:
    """Convert sign-magnitude to two's complement, with -0 as -1. This function is its own inverse."""
    if not has_sign_bit:
        return elements
    last = 8 * elements.itemsize - 1
    return elements ^ ((elements >> last) & np.iinfo(elements.dtype).max)
