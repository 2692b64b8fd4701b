"""Tensors in memory-mapped files. They are read in parts, whose pages are then released."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from weightflip.delta.bits import STORED, Bytes, Stored


class Mapping:
    """A read-only memory-mapped file."""

    def __init__(self, path: str | PathLike[str]) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.nbytes = len(self._map)

    def view(self, begin: int, nbytes: int) -> Bytes:
        """A view of some bytes of the file, without a copy."""
        return np.frombuffer(self._map, np.uint8, nbytes, begin)

    def release(self, begin: int, nbytes: int) -> None:
        """Drop pages from the memory of this process. Reading them again maps them again."""
        if nbytes and hasattr(mmap, "MADV_DONTNEED"):
            start = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, begin + nbytes - start)


@dataclass(frozen=True, eq=False)
class MappedTensor:
    """A tensor of a checkpoint.

    Attributes:
        name: Key of the tensor.
        dtype: A key of :data:`weightflip.delta.bits.STORED`.
        shape: Shape in elements.
        mapping: The file.
        begin: Offset of its first element.
        strides: Strides in bytes; None if it is contiguous.
        same_as: An earlier tensor that shares the same memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    mapping: Mapping
    begin: int
    strides: tuple[int, ...] | None = None
    same_as: str | None = None

    @property
    def stored(self) -> Stored:
        """Storage of its dtype."""
        return STORED[self.dtype]

    @property
    def nbytes(self) -> int:
        """Total size of its elements."""
        return math.prod(self.shape) * self.stored.bits // 8

    @property
    def units(self) -> int:
        """Number of elements, or of bytes if a byte holds several elements."""
        return self.nbytes // self.stored.unit

    def read(self, begin: int, end: int) -> Bytes:
        """Bytes of its elements in row-major order: a view of the file, or a copy if it is not contiguous."""
        if self.strides is None:
            return self.mapping.view(self.begin + begin, end - begin)
        row = self.nbytes // self.shape[0]
        first, last = begin // row, -(-end // row)
        rows = np.ascontiguousarray(self._strided()[first:last]).reshape(-1).view(np.uint8)
        return rows[begin - first * row : end - first * row]

    def release(self, begin: int, end: int) -> None:
        """Release the pages that :meth:`read` touched."""
        if self.strides is None:
            self.mapping.release(self.begin + begin, end - begin)
        else:
            self.mapping.release(self.begin, self._extent)

    def spans(self, units: int) -> Iterator[tuple[int, int]]:
        """Begin and end of its chunks, in bytes.

        Args:
            units: Units per chunk. The last chunk may be shorter.
        """
        step = units * self.stored.unit
        for begin in range(0, self.nbytes, step):
            yield begin, min(begin + step, self.nbytes)

    @property
    def _extent(self) -> int:
        assert self.strides is not None
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return last + self.stored.unit

    def _strided(self) -> NDArray[Any]:
        assert self.strides is not None
        flat = self.mapping.view(self.begin, self._extent)
        # Unsigned integers, since numpy lacks some of these dtypes. Unlike torch's files, others may be unaligned.
        items = np.ndarray((), f"u{self.stored.unit}", flat)
        return as_strided(items, self.shape, self.strides, writeable=False)
