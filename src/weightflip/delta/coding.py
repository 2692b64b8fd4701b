"""One chunk of a tensor, as the change that leads from its old bits to its new ones.

A coded chunk begins with its kind: the new bytes as they are, or the number of changed elements, their positions and
their differences. Positions are the gaps between them under a Rice code, or a bitmap under zstd. Differences of
ordinals go into fields of 2 or 4 bits, with an escape for larger ones, or straight into planes of bytes, all under
zstd. Of each the smallest is taken. Numbers in between are LEB128.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from weightflip.delta.bits import Bytes, Unsigned, differences, integers, moved
from weightflip.delta.errors import DeltaError, extra

CHUNK = 1 << 20
"""Units that are coded together."""

_RAW, _RICE, _BITMAP = range(3)
_FIELDS = (2, 4, 8)
# Level 1 finds few false matches in what is nearly random, and is as fast as the disk.
_LEVEL = 1


class _Damaged(Exception):
    pass


def encode(old: Bytes | None, new: Bytes, unit: int, has_sign_bit: bool) -> tuple[int, bytes]:
    """Code one chunk.

    Args:
        old: Its old bytes; None for zeros.
        new: As many new ones.
        unit: Bytes of an element.
        has_sign_bit: As in :class:`weightflip.delta.bits.Stored`.

    Returns:
        How many elements differ, and the code: nothing where none does, else at most one byte more than ``new``.
    """
    after = integers(new, unit)
    before = np.zeros_like(after) if old is None else integers(old, unit)
    changed = before != after
    at = np.flatnonzero(changed)
    if not len(at):
        return 0, b""
    coded = _positions(changed, at) + _differences(differences(before[at], after[at], has_sign_bit))
    return len(at), coded if len(coded) <= len(new) else bytes([_RAW]) + new.tobytes()


def decode(old: Bytes | None, coded: Bytes, nbytes: int, unit: int, has_sign_bit: bool) -> Bytes:
    """The new bytes.

    Args:
        old: As for :func:`encode`.
        coded: What it gave.
        nbytes: Of the chunk.
        unit: As for :func:`encode`.
        has_sign_bit: As for :func:`encode`.

    Raises:
        DeltaError: This is no code of such a chunk.
    """
    new = np.zeros(nbytes, np.uint8) if old is None else old.copy()
    try:
        if len(coded) and not _decode_into(new, _Reader(coded), unit, has_sign_bit):
            new = coded[1:].copy()
        if len(new) != nbytes:
            raise _Damaged
    except (_Damaged, ValueError, IndexError, OverflowError, _zstd().error) as error:
        raise DeltaError("a chunk of the delta does not decode: the file was damaged, or not made here") from error
    return new


def changed_count(old: Bytes, new: Bytes, unit: int) -> int:
    """How many elements differ in any bit."""
    return int(np.count_nonzero(integers(old, unit) != integers(new, unit)))


def _decode_into(new: Bytes, reader: _Reader, unit: int, has_sign_bit: bool) -> bool:
    """Change the elements in place; False where the chunk is not coded."""
    elements = integers(new, unit)
    kind = reader.byte()
    if kind == _RAW:
        return False
    count = reader.number()
    if not 0 < count <= len(elements):
        raise _Damaged
    at = _read_positions(reader, kind, count, len(elements))
    steps = _read_differences(reader, count, unit)
    reader.end()
    elements[at] = moved(elements[at], steps, has_sign_bit)
    return True


# ---------------------------------------------------------------------- positions


def _positions(changed: NDArray[np.bool_], at: NDArray[np.intp]) -> bytes:
    gaps = np.diff(at, prepend=-1) - 1
    mean = float(gaps.mean())
    # The best parameter is next to the logarithm of mean * ln 2.
    guess = max(0, int(np.log2(max(1.0, 0.69 * mean))))
    sizes = {bits: int((gaps >> bits).sum()) + len(gaps) * (1 + bits) for bits in {guess, guess + 1, max(0, guess - 1)}}
    bits = min(sizes, key=lambda bits: sizes[bits])
    bitmap = _packed(np.packbits(changed))
    count = _number(len(at))
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
        + _number(len(unary))
        + np.packbits(unary).tobytes()
        + np.packbits(rest.astype(bool)).tobytes()
    )


def _read_positions(reader: _Reader, kind: int, count: int, elements: int) -> NDArray[np.intp]:
    if kind == _BITMAP:
        at = np.flatnonzero(np.unpackbits(reader.packed((elements + 7) // 8), count=elements))
    elif kind == _RICE:
        bits, length = reader.byte(), reader.number()
        if bits > 32 or not count <= length <= count + elements:
            raise _Damaged
        ends = np.flatnonzero(np.unpackbits(reader.take((length + 7) // 8), count=length))
        low = np.unpackbits(reader.take((count * bits + 7) // 8), count=count * bits).reshape(count, bits)
        gaps = (np.diff(ends, prepend=-1) - 1) << bits
        gaps += low.astype(np.intp) @ (1 << np.arange(bits, dtype=np.intp))
        at = np.cumsum(gaps + 1) - 1
    else:
        raise _Damaged
    if len(at) != count or at[-1] >= elements:
        raise _Damaged
    return at


# ---------------------------------------------------------------------- differences


def _differences(steps: Unsigned) -> bytes:
    coded = []
    for width in _FIELDS:
        # Where more than the smaller half of all is too large for a field, escapes only add to what is stored.
        if width == 8 or np.count_nonzero(steps >= (1 << width) - 1) * 2 < len(steps):
            coded.append(bytes([width]) + _fields(steps, width))
    return min(coded, key=len)


def _fields(steps: Unsigned, width: int) -> bytes:
    if width == 8:
        return _planes(steps)
    escape = (1 << width) - 1
    small = np.minimum(steps, escape).astype(np.uint8)
    per_byte = 8 // width
    columns = np.pad(small, (0, -len(small) % per_byte)).reshape(-1, per_byte)
    shifts = (width * np.arange(per_byte)).astype(np.uint8)
    packed = np.bitwise_or.reduce(columns << shifts, axis=1)
    large = steps[steps >= escape] - steps.dtype.type(escape)
    return _packed(packed) + _planes(large)


def _planes(steps: Unsigned) -> bytes:
    """The lowest bytes of all, then the next ones; as many planes as the largest needs, none if all are 0."""
    planes = steps.astype(steps.dtype.newbyteorder("<")).view(np.uint8).reshape(-1, steps.itemsize)
    used = (int(steps.max()).bit_length() + 7) // 8 if len(steps) else 0
    return bytes([used]) + b"".join(_packed(np.ascontiguousarray(planes[:, at])) for at in range(used))


def _read_differences(reader: _Reader, count: int, unit: int) -> Unsigned:
    width = reader.byte()
    if width not in _FIELDS:
        raise _Damaged
    if width == 8:
        return _read_planes(reader, count, unit)
    per_byte, escape = 8 // width, (1 << width) - 1
    packed = reader.packed(-(-count // per_byte))
    shifts = (width * np.arange(per_byte)).astype(np.uint8)
    small = ((packed[:, None] >> shifts) & np.uint8(escape)).reshape(-1)[:count]
    steps: Unsigned = small.astype(f"u{unit}")
    is_large = small == escape
    steps[is_large] += _read_planes(reader, int(np.count_nonzero(is_large)), unit)
    return steps


def _read_planes(reader: _Reader, count: int, unit: int) -> Unsigned:
    used = reader.byte()
    if used > unit:
        raise _Damaged
    planes = np.zeros((count, unit), np.uint8)
    for at in range(used):
        planes[:, at] = reader.packed(count)
    found: Unsigned = planes.view(f"<u{unit}").reshape(count)
    return found


# ---------------------------------------------------------------------- streams


def _number(value: int) -> bytes:
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _packed(data: Bytes) -> bytes:
    """Under zstd, or as they are: their length, and 0, says that."""
    squeezed = _zstd().compress(data)
    if len(squeezed) < len(data):
        return _number(len(squeezed)) + squeezed
    return _number(0) + data.tobytes()


class _Zstd(threading.local):
    """Contexts, which threads must not share; to make one takes longer than a small chunk."""

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
    """Takes a coded chunk apart, and never reads beyond its end."""

    def __init__(self, data: Bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> Bytes:
        if count > len(self._data) - self._at:
            raise _Damaged
        self._at += count
        return self._data[self._at - count : self._at]

    def byte(self) -> int:
        return int(self.take(1)[0])

    def number(self) -> int:
        value, shift = 0, 0
        while shift < 63:
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise _Damaged

    def packed(self, count: int) -> Bytes:
        length = self.number()
        if not length:
            return self.take(count)
        squeezed = self.take(length)
        # Before anything is allocated.
        if _zstd().size(squeezed) != count:
            raise _Damaged
        return np.frombuffer(_zstd().decompress(squeezed), np.uint8)

    def end(self) -> None:
        if self._at != len(self._data):
            raise _Damaged
