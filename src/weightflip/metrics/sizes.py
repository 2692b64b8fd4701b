"""How large the change of some codes is: pure functions of codes before and after."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ordinals = NDArray[np.signedinteger[Any]]

INDEX_BITS = 32
"""Of the position of a changed weight, in the encoding that lists them."""
_WIDTHS = (1, 2, 4, 6, 8, 16, 32, 64)
# What deltas are compressed with unless somebody says otherwise.
_LEVEL = 3


def stored_bits(bits: int) -> int:
    """Bits that a code takes where it is stored, from those that it has.

    Example:
        >>> [stored_bits(bits) for bits in (2, 3, 4, 6, 8, 12)]
        [2, 4, 4, 6, 8, 16]
    """
    return next(width for width in _WIDTHS if width >= bits)


def entropy(counts: NDArray[np.integer[Any]]) -> float:
    """Bits of one symbol, from how often each comes.

    Example:
        >>> entropy(np.array([1, 1, 2]))
        1.5
    """
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def bound_bits(weights: int, changed: int, old: Ordinals, new: Ordinals) -> float:
    """Bits that a delta takes at least: which weights changed, and by how much each.

    ``weights * H(changed / weights) + changed * H(differences)``, where changes are independent of each other and of
    the weights.

    Args:
        weights: How many there are.
        changed: How many of them have another code.
        old: Codes before, of all weights or of a part of them from which the differences are estimated.
        new: The same after.
    """
    if not changed:
        return 0.0
    differs = old != new
    # A difference of int64 codes may wrap; equal ones stay equal.
    steps = new[differs].astype(np.int64) - old[differs].astype(np.int64)
    _, counts = np.unique(steps, return_counts=True)
    of_steps = entropy(counts) if len(counts) else 0.0
    return weights * entropy(np.array([changed, weights - changed])) + changed * of_steps


def stored(ordinals: Ordinals, bits: int, has_sign_bit: bool) -> NDArray[np.uint8]:
    """The bytes of codes where they are stored: packed, if they are smaller than a byte.

    Args:
        ordinals: The codes, one-dimensional.
        bits: As :func:`stored_bits` gives them.
        has_sign_bit: Whether they are a sign and a magnitude there, as floating-point numbers are; else integers.
    """
    width = f"<u{max(8, bits) // 8}"
    unsigned = ordinals.astype(ordinals.dtype.newbyteorder("<"), copy=False).view(f"<u{ordinals.itemsize}")
    if has_sign_bit:
        magnitude = np.where(ordinals < 0, -unsigned, unsigned)
        unsigned = magnitude | ((ordinals < 0).astype(unsigned.dtype) << unsigned.dtype.type(bits - 1))
    found = np.ascontiguousarray(unsigned.astype(width)).view(np.uint8)
    if bits >= 8:
        return found
    return np.packbits(np.unpackbits(found[:, None], axis=1)[:, 8 - bits :])


def compressed_bits(old: NDArray[np.uint8], new: NDArray[np.uint8]) -> int | None:
    """Bits of the XOR of stored codes under zstd; None where ``zstandard`` is not installed."""
    compress = _zstd()
    return None if compress is None else 8 * len(compress(np.bitwise_xor(old, new)))


@functools.cache
def _zstd() -> Callable[[NDArray[np.uint8]], bytes] | None:
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        return None

    def compress(data: NDArray[np.uint8]) -> bytes:
        # A context for each: threads must not share one.
        found: bytes = zstandard.ZstdCompressor(level=_LEVEL).compress(data)
        return found

    return compress
