"""Headers of safetensors files, and the files of a checkpoint."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from weightflip.delta.bits import STORED
from weightflip.delta.errors import DeltaError
from weightflip.records import printable


class Entry(NamedTuple):
    """A tensor in a header.

    Attributes:
        name: Key of the tensor.
        dtype: A key of :data:`weightflip.delta.bits.STORED`.
        shape: Shape in elements.
        begin: Offset of its bytes after the header.
        nbytes: Number of bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class File(NamedTuple):
    """One safetensors file.

    Attributes:
        name: File name without a directory.
        header: The JSON header, including trailing spaces.
    """

    name: str
    header: bytes

    @property
    def prefix(self) -> bytes:
        """The bytes before the tensors."""
        return struct.pack("<Q", len(self.header)) + self.header

    def entries(self) -> list[Entry]:
        """The tensors, in the order of their bytes.

        Raises:
            DeltaError: Unknown dtype, or not a valid header.
        """
        try:
            content = json.loads(self.header)
            content.pop("__metadata__", None)
            found = [_entry(self.name, name, value) for name, value in content.items()]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DeltaError(
                f"{printable(self.name)} has no valid safetensors header ({printable(str(error))}); write or copy it "
                "again"
            ) from error
        return sorted(found, key=lambda entry: (entry.begin, entry.nbytes))


@dataclass(frozen=True)
class Layout:
    """The files of a checkpoint.

    Attributes:
        files: A single file, or the shards.
        index: Name and text of the index of a sharded checkpoint; None for a single file.
    """

    files: tuple[File, ...]
    index: tuple[str, str] | None


def _entry(file: str, name: str, value: dict[str, object]) -> Entry:
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in STORED:
        raise DeltaError(
            f"tensor {printable(name)!r} of {printable(file)} has the unknown dtype {printable(str(dtype))}; expected "
            f"one of {', '.join(STORED)}"
        )
    assert isinstance(dtype, str)
    if not (isinstance(shape, list) and isinstance(offsets, list)):
        raise TypeError(f"tensor {name!r} has no shape or no offsets")
    begin, end = map(int, offsets)
    size = tuple(map(int, shape))
    if min(size, default=0) < 0 or (end - begin) * 8 != math.prod(size) * STORED[dtype].bits:
        raise ValueError(f"tensor {name!r} has {end - begin} bytes, which do not make {list(size)} of {dtype}")
    return Entry(name, dtype, size, begin, end - begin)


def one_file(tensors: Iterable[tuple[str, str, tuple[int, ...]]], name: str = "model.safetensors") -> Layout:
    """The layout of a single safetensors file for given tensors.

    As in the safetensors library, the widest dtypes come first, so that each tensor is aligned, and the header size is
    a multiple of 8 bytes.

    Args:
        tensors: Name, dtype and shape of each tensor.
        name: Name of the file.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for key, dtype, shape in sorted(tensors, key=lambda tensor: -STORED[tensor[1]].bits):
        end = begin + math.prod(shape) * STORED[dtype].bits // 8
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return Layout((File(name, text + b" " * (-len(text) % 8)),), None)
