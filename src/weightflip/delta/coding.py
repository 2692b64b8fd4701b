"""Encodes the change of one chunk of a tensor from its old bits to its new bits.

A coded chunk starts with its kind. Then follow either the raw new bytes, or the number of changed elements, their
positions and their differences. Positions are gaps in a Rice code, or a bitmap compressed with zstd. Differences of
ordinals are stored in fields of 2 or 4 bits, with an escape for larger ones, or directly in planes of bytes, all
compressed with zstd. The smallest encoding of each is used. Other numbers are LEB128.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from weightflip.delta.bits import Bytes, Unsigned, add_differences, differences, integers
from weightflip.delta.errors import DeltaError, extra

CHUNK = 1 << 20
"""Units per chunk."""

_RAW, _RICE, _BITMAP = range(3)
_FIELDS = (2, 4, 8)
# Level 1 finds few useless matches in nearly random data, and is as fast as the disk.
_LEVEL = 1


class _Damaged(Exception):
    pass


def encode(old: Bytes | None, new: Bytes, unit: int, has_sign_bit: bool) -> tuple[int, bytes]:
    """Encode one chunk.

    Args:
        old: Old bytes; None for zeros.
        new: New bytes, same length.
        unit: Bytes per element.
        has_sign_bit: As in :class:`weightflip.delta.bits.Stored`.

    Returns:
        Number of elements that differ, and the coded chunk: empty if none differs, else at most one byte longer than
        ``new``.
    """
    after = integers(new, unit)
    before = np.zeros_like(after) if old is None else integers(old, unit)
    changed = before != after
    at = np.flatnonzero(changed)
    if not len(at):
        return 0, b""
    coded = _encode_positions(changed, at) + _encode_differences(differences(before[at], after[at], has_sign_bit))
    return len(at), coded if len(coded) <= len(new) else bytes([_RAW]) + new.tobytes()


def decode(old: Bytes | None, coded: Bytes, nbytes: int, unit: int, has_sign_bit: bool) -> Bytes:
    """Decode the new bytes of one chunk.

    Args:
        old: As in :func:`encode`.
        coded: Result of :func:`encode`.
        nbytes: Size of the chunk.
        unit: As in :func:`encode`.
        has_sign_bit: As in :func:`encode`.

    Raises:
        DeltaError: ``coded`` is not a valid chunk.
    """
    new = np.zeros(nbytes, np.uint8) if old is None else old.copy()
    try:
        if len(coded) and not _decode_into(new, _Reader(coded), unit, has_sign_bit):
            new = coded[1:].copy()
        if len(new) != nbytes:
            raise _Damaged
    except (_Damaged, ValueError, IndexError, OverflowError, _zstd().error) as error:
        raise DeltaError(
            "a chunk of the delta cannot be decoded: the file is damaged or comes from another program; create it again"
        ) from error
    return new


def changed_count(old: Bytes, new: Bytes, unit: int) -> int:
    """Number of elements that differ in any bit."""
    return int(np.count_nonzero(integers(old, unit) != integers(new, unit)))


def _decode_into(new: Bytes, reader: _Reader, unit: int, has_sign_bit: bool) -> bool:
    """Update the elements in place. Returns False if the chunk holds raw bytes."""
    elements = integers(new, unit)
    kind = reader.read_byte()
    if kind == _RAW:
        return False
    count = reader.read_number()
    if not 0 < count <= len(elements):
        raise _Damaged
    at = _read_positions(reader, kind, count, len(elements))
    steps = _read_differences(reader, count, unit)
    reader.check_end()
    elements[at] = add_differences(elements[at], steps, has_sign_bit)
    return True


# ---------------------------------------------------------------------- positions


def _encode_positions(changed: NDArray[np.bool_], at: NDArray[np.intp]) -> bytes:
    gaps = np.diff(at, prepend=-1) - 1
    mean = float(gaps.mean())
    # The best parameter is close to log2(mean * ln 2).
    guess = max(0, int(np.log2(max(1.0, 0.69 * mean))))
    sizes = {bits: int((gaps >> bits).sum()) + len(gaps) * (1 + bits) for bits in {guess, guess + 1, max(0, guess - 1)}}
    bits = min(sizes, key=lambda bits: sizes[bits])
    bitmap = _compress(np.packbits(changed))
    count = _encode_number(len(at))
    if len(bitmap) <= sizes[bits] // 8 + 8:
        return bytes([_BITMAP]) + count + bitmap
    quotients = gaps >> bits
    unary = np.zeros(int(quotients.sum()) + len(gaps), bool)
    unary[np.cumsum(quotients + 1) - 1] = True
    rest = (gaps[:, None] >> np.arange(bits)) & 1 if bits else np.zeros((0, 0), np.intp)
    return (
        bytes([_RICE])
        + count
        + bytes([bits])
        + _encode_number(len(unary))
        + np.packbits(unary).tobytes()
        + np.packbits(rest.astype(bool)).tobytes()
    )


def _read_positions(reader: _Reader, kind: int, count: int, elements: int) -> NDArray[np.intp]:
    if kind == _BITMAP:
        at = np.flatnonzero(np.unpackbits(reader.read_compressed((elements + 7) // 8), count=elements))
    elif kind == _RICE:
        bits, length = reader.read_byte(), reader.read_number()
        if bits > 32 or not count <= length <= count + elements:
            raise _Damaged
        ends = np.flatnonzero(np.unpackbits(reader.read_bytes((length + 7) // 8), count=length))
        low = np.unpackbits(reader.read_bytes((count * bits + 7) // 8), count=count * bits).reshape(count, bits)
        gaps = (np.diff(ends, prepend=-1) - 1) << bits
        gaps += low.astype(np.intp) @ (1 << np.arange(bits, dtype=np.intp))
        at = np.cumsum(gaps + 1) - 1
    else:
        raise _Damaged
    if len(at) != count or at[-1] >= elements:
        raise _Damaged
    return at


# ---------------------------------------------------------------------- differences


def _encode_differences(steps: Unsigned) -> bytes:
    coded = []
    for width in _FIELDS:
        # If half of the differences or more do not fit a field, escapes only increase the size.
        if width == 8 or np.count_nonzero(steps >= (1 << width) - 1) * 2 < len(steps):
            coded.append(bytes([width]) + _encode_fields(steps, width))
    return min(coded, key=len)


def _encode_fields(steps: Unsigned, width: int) -> bytes:
    if width == 8:
        return _encode_planes(steps)
    escape = (1 << width) - 1
    small = np.minimum(steps, escape).astype(np.uint8)
    per_byte = 8 // width
    columns = np.pad(small, (0, -len(small) % per_byte)).reshape(-1, per_byte)
    shifts = (width * np.arange(per_byte)).astype(np.uint8)
    packed = np.bitwise_or.reduce(columns << shifts, axis=1)
    large = steps[steps >= escape] - steps.dtype.type(escape)
    return _compress(packed) + _encode_planes(large)


def _encode_planes(steps: Unsigned) -> bytes:
    """Byte planes, lowest first. As many as the largest value needs; none if all are 0."""
    planes = steps.astype(steps.dtype.newbyteorder("<")).view(np.uint8).reshape(-1, steps.itemsize)
    used = (int(steps.max()).bit_length() + 7) // 8 if len(steps) else 0
    return bytes([used]) + b"".join(_compress(np.ascontiguousarray(planes[:, at])) for at in range(used))


def _read_differences(reader: _Reader, count: int, unit: int) -> Unsigned:
    width = reader.read_byte()
    if width not in _FIELDS:
        raise _Damaged
    if width == 8:
        return _read_planes(reader, count, unit)
    per_byte, escape = 8 // width, (1 << width) - 1
    packed = reader.read_compressed(-(-count // per_byte))
    shifts = (width * np.arange(per_byte)).astype(np.uint8)
    small = ((packed[:, None] >> shifts) & np.uint8(escape)).reshape(-1)[:count]
    steps: Unsigned = small.astype(f"u{unit}")
    is_large = small == escape
    steps[is_large] += _read_planes(reader, int(np.count_nonzero(is_large)), unit)
    return steps


def _read_planes(reader: _Reader, count: int, unit: int) -> Unsigned:
    used = reader.read_byte()
    if used > unit:
        raise _Damaged
    planes = np.zeros((count, unit), np.uint8)
    for at in range(used):
        planes[:, at] = reader.read_compressed(count)
    steps: Unsigned = planes.view(f"<u{unit}").reshape(count)
    return steps


# ---------------------------------------------------------------------- streams


def _encode_number(value: int) -> bytes:
    encoded = bytearray()
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def _compress(data: Bytes) -> bytes:
    """Compressed size and compressed data, or 0 and raw data if zstd does not help."""
    compressed = _zstd().compress(data)
    if len(compressed) < len(data):
        return _encode_number(len(compressed)) + compressed
    return _encode_number(0) + data.tobytes()


class _Zstd(threading.local):
    """zstd contexts, one per thread. Creating one takes longer than compressing a small chunk."""

    def __init__(self) -> None:
        zstandard = extra("zstandard", "a delta")
        self.compress: Callable[[Bytes], bytes] = zstandard.ZstdCompressor(level=_LEVEL).compress
        self.decompress: Callable[[Bytes], bytes] = zstandard.ZstdDecompressor().decompress
        self.size: Callable[[Bytes], int] = zstandard.frame_content_size
        self.error: type[Exception] = zstandard.ZstdError


@functools.cache
def _zstd() -> _Zstd:
    return _Zstd()


class _Reader:
    """Parses a coded chunk. Never reads beyond its end."""

    def __init__(self, data: Bytes) -> None:
        self._data = data
        self._at = 0

    def read_bytes(self, count: int) -> Bytes:
        if count > len(self._data) - self._at:
            raise _Damaged
        self._at += count
        return self._data[self._at - count : self._at]

    def read_byte(self) -> int:
        return int(self.read_bytes(1)[0])

    def read_number(self) -> int:
        value, shift = 0, 0
        while shift < 63:
            byte = self.read_byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise _Damaged

    def read_compressed(self, count: int) -> Bytes:
        length = self.read_number()
        if not length:
            return self.read_bytes(count)
        compressed = self.read_bytes(length)
        # Check the size before memory is allocated.
        if _zstd().size(compressed) != count:
            raise _Damaged
        return np.frombuffer(_zstd().decompress(compressed), np.uint8)

    def check_end(self) -> None:
        if self._at != len(self._data):
            raise _Damaged
