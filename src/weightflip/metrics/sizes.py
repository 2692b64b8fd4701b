"""Sizes of a delta between two sets of codes, as pure functions."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ordinals = NDArray[np.signedinteger[Any]]

INDEX_BITS = 32
"""Bits of the position of a changed weight, in the encoding that lists positions."""
_WIDTHS = (1, 2, 4, 6, 8, 16, 32, 64)
# The default of zstd.
_LEVEL = 3


def stored_bits(bits: int) -> int:
    """Return the number of bits in which a code is stored.

    Example:
        >>> [stored_bits(bits) for bits in (2, 3, 4, 6, 8, 12)]
        [2, 4, 4, 6, 8, 16]
    """
    return next(width for width in _WIDTHS if width >= bits)


def entropy(counts: NDArray[np.integer[Any]]) -> float:
    """Return the entropy in bits per symbol.

    Args:
        counts: How often each symbol occurs.

    Example:
        >>> entropy(np.array([1, 1, 2]))
        1.5
    """
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def bound_bits(weights: int, changed: int, old: Ordinals, new: Ordinals) -> float:
    """Return the entropy bound of a delta in bits: which weights changed, and by how much.

    ``weights * H(changed / weights) + changed * H(differences)``. It assumes that changes are independent of each other
    and of the weights.

    Args:
        weights: Number of weights.
        changed: Number of weights whose code changed.
        old: Old codes of all weights, or of a sample from which ``H(differences)`` is estimated.
        new: New codes of the same weights.
    """
    if not changed:
        return 0.0
    differs = old != new
    # Differences of int64 codes may wrap; equal ones stay equal.
    differences = new[differs].astype(np.int64) - old[differs].astype(np.int64)
    _, counts = np.unique(differences, return_counts=True)
    of_differences = entropy(counts) if len(counts) else 0.0
    return weights * entropy(np.array([changed, weights - changed])) + changed * of_differences


def stored_bytes(ordinals: Ordinals, bits: int, has_sign_bit: bool) -> NDArray[np.uint8]:
    """Return codes as the bytes that a format stores.

    Args:
        ordinals: The codes, one-dimensional.
        bits: Stored bits per code, from :func:`stored_bits`. Codes of less than 8 bits are packed.
        has_sign_bit: Whether a code is stored as sign and magnitude, as floating-point numbers are, or as an integer.
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
    """Return the size in bits of the XOR of stored codes under zstd, or None without ``zstandard``."""
    compress = _zstd()
    return None if compress is None else 8 * len(compress(np.bitwise_xor(old, new)))


@functools.cache
def _zstd() -> Callable[[NDArray[np.uint8]], bytes] | None:
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        return None

    def compress(data: NDArray[np.uint8]) -> bytes:
        # A compressor per call: threads must not share one.
        found: bytes = zstandard.ZstdCompressor(level=_LEVEL).compress(data)
        return found

    return compress
