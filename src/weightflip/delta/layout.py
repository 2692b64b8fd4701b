"""The header of a safetensors file, and how a checkpoint lies in files."""

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
    """A tensor, as a header has it.

    Attributes:
        name: The key.
        dtype: A key of :data:`weightflip.delta.bits.STORED`.
        shape: In elements.
        begin: Where its bytes begin, after the header.
        nbytes: How many there are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class File(NamedTuple):
    """One safetensors file.

    Attributes:
        name: Without a directory.
        header: The JSON, with the spaces that follow it.
    """

    name: str
    header: bytes

    @property
    def prefix(self) -> bytes:
        """What stands before the tensors."""
        return struct.pack("<Q", len(self.header)) + self.header

    def entries(self) -> list[Entry]:
        """Its tensors, in the order of their bytes.

        Raises:
            DeltaError: A dtype that is not known here, or no header of a safetensors file.
        """
        try:
            content = json.loads(self.header)
            content.pop("__metadata__", None)
            found = [_entry(self.name, name, value) for name, value in content.items()]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DeltaError(
                f"{printable(self.name)} has no header of a safetensors file: {printable(str(error))}"
            ) from error
        return sorted(found, key=lambda entry: (entry.begin, entry.nbytes))


@dataclass(frozen=True)
class Layout:
    """The files of a checkpoint.

    Attributes:
        files: One, or the shards.
        index: Name and text of the index of a sharded checkpoint; None for one file.
    """

    files: tuple[File, ...]
    index: tuple[str, str] | None


def _entry(file: str, name: str, value: dict[str, object]) -> Entry:
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in STORED:
        raise DeltaError(
            f"tensor {printable(name)!r} of {printable(file)} has the dtype {printable(str(dtype))}, which is not "
            f"known here; expected one of {', '.join(STORED)}"
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
    """The layout of a safetensors file for tensors that come from elsewhere.

    As the library writes it: the widest dtypes first, so that each tensor is aligned, and a header of whole 8 bytes.

    Args:
        tensors: Name, dtype and shape of each.
        name: Of the file.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for key, dtype, shape in sorted(tensors, key=lambda tensor: -STORED[tensor[1]].bits):
        end = begin + math.prod(shape) * STORED[dtype].bits // 8
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return Layout((File(name, text + b" " * (-len(text) % 8)),), None)
