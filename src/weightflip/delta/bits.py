"""Stored elements as integers: how wide each dtype is, and differences of ordinals that lose no bit."""

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
        bits: Of one element of a shape.
        unit: Bytes that are compared together: those of an element, or one where a byte holds several elements.
        has_sign_bit: Whether the highest bit of a unit is a sign, and the rest a magnitude.
        dtype: What torch calls it; None where torch has none.
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
    # Two to a byte, and four to three bytes. torch has none of them in this form: its float4 is a pair.
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
"""By the names that safetensors has."""

OF_TORCH = {stored.dtype: name for name, stored in STORED.items() if stored.dtype is not None}

_INTEGERS: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def integers(data: Bytes, unit: int) -> Integers:
    """Bytes as signed integers, little-endian as both file formats are; a view."""
    found: Integers = data.view(np.dtype(_INTEGERS[unit]).newbyteorder("<"))
    return found


def differences(old: Integers, new: Integers, has_sign_bit: bool) -> Unsigned:
    """How far each element moved in the order of its numbers, to and fro as even and odd.

    Not one bit is lost: -0 and NaN with a payload have places of their own in that order, and what overflows wraps.

    Args:
        old: Stored elements.
        new: The same elements, each with other bits.
        has_sign_bit: As in :class:`Stored`.

    Returns:
        0 for one step down, 1 for one step up, 2 for two down, ...; unsigned, as wide as the elements.
    """
    last = 8 * old.itemsize - 1
    moved = _ordered(new, has_sign_bit) - _ordered(old, has_sign_bit)
    zigzag: Unsigned = ((moved << 1) ^ (moved >> last)).view(_UNSIGNED[old.itemsize])
    # Nothing is 0: these elements changed.
    found: Unsigned = zigzag - zigzag.dtype.type(1)
    return found


def moved(old: Integers, differences: Unsigned, has_sign_bit: bool) -> Integers:
    """The inverse: the new elements."""
    zigzag = differences + differences.dtype.type(1)
    signs = (zigzag & zigzag.dtype.type(1)).view(old.dtype)
    steps = (zigzag >> zigzag.dtype.type(1)).view(old.dtype) ^ -signs
    return _ordered(_ordered(old, has_sign_bit) + steps, has_sign_bit)


def _ordered(elements: Integers, has_sign_bit: bool) -> Integers:
    """Sign and magnitude to two's complement, with -0 as -1; its own inverse."""
    if not has_sign_bit:
        return elements
    last = 8 * elements.itemsize - 1
    return elements ^ ((elements >> last) & np.iinfo(elements.dtype).max)
