"""Tensors in memory-mapped files, read in parts; pages that were read are released."""

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
    """A file that is mapped into memory, for reading only."""

    def __init__(self, path: str | PathLike[str]) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.nbytes = len(self._map)

    def view(self, begin: int, nbytes: int) -> Bytes:
        """Some bytes of the file, without a copy."""
        return np.frombuffer(self._map, np.uint8, nbytes, begin)

    def release(self, begin: int, nbytes: int) -> None:
        """Drop pages from this process's memory. Reading them again maps them again."""
        if nbytes and hasattr(mmap, "MADV_DONTNEED"):
            start = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, begin + nbytes - start)


@dataclass(frozen=True, eq=False)
class MappedTensor:
    """A tensor of a checkpoint.

    Attributes:
        name: Its key.
        dtype: A key of :data:`weightflip.delta.bits.STORED`.
        shape: In elements.
        mapping: The file.
        begin: Where its first element lies.
        strides: In bytes, one for each dimension; None where it is contiguous.
        same_as: An earlier tensor that is the same memory.
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
        """How its dtype is stored."""
        return STORED[self.dtype]

    @property
    def nbytes(self) -> int:
        """Of all its elements."""
        return math.prod(self.shape) * self.stored.bits // 8

    @property
    def units(self) -> int:
        """Elements; bytes where one holds several elements."""
        return self.nbytes // self.stored.unit

    def read(self, begin: int, end: int) -> Bytes:
        """Bytes of its elements in row-major order: where they lie in the file, or a copy if it is not contiguous."""
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
            units: Of each chunk but the last.
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
        # Of unsigned integers, since numpy has not all of these dtypes; torch's files are aligned, others need not be.
        items = np.ndarray((), f"u{self.stored.unit}", flat)
        return as_strided(items, self.shape, self.strides, writeable=False)
