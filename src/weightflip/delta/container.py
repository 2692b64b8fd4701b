"""The file of a delta: a safetensors file of bytes, with a digest of all of it at its end.

Its tensors, all of uint8: ``data``, the coded chunks of all changed tensors one after the other; ``digests``, 16 bytes
for each old tensor and for each new one that the data make; ``manifest``, JSON under zstd; ``checksum``, the digest of
these three and then of everything before them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from weightflip.delta import digests
from weightflip.delta.bits import Bytes
from weightflip.delta.checkpoint import is_plain_name, read_header
from weightflip.delta.coding import CHUNK
from weightflip.delta.errors import DeltaError, extra
from weightflip.delta.layout import File, Layout
from weightflip.delta.mapped import Mapping
from weightflip.records import printable

_SECTIONS = ("data", "digests", "manifest", "checksum")
_FORMAT = {"format": "weightflip-delta", "version": "1"}
# The header is written last, when all lengths are known, into a space of this size.
_HEADER = 512
_PART = 1 << 24


class Step(NamedTuple):
    """How one new tensor is made.

    Attributes:
        name: Of the new tensor.
        how: ``"same"`` as the old one; ``"changed"`` from it; ``"whole"``, from nothing; ``"copy"`` of a new one.
        of: Which is copied.
        chunks: Lengths of the coded chunks in the data.
    """

    name: str
    how: str
    of: str = ""
    chunks: tuple[int, ...] = ()

    @property
    def has_digest(self) -> bool:
        """Whether the delta has one of the new tensor: of the others it follows from the old one's."""
        return self.how in ("changed", "whole")


class Manifest(NamedTuple):
    """What there is to know of a delta beside its data.

    Attributes:
        old: Name, dtype and shape of each old tensor.
        steps: One for each new tensor, in the order of the files.
        layout: The new files.
        chunk: Units of each chunk but the last of a tensor.
    """

    old: tuple[tuple[str, str, tuple[int, ...]], ...]
    steps: tuple[Step, ...]
    layout: Layout
    chunk: int = CHUNK

    def packed(self) -> bytes:
        """JSON under zstd."""
        content = {
            "old": self.old,
            "steps": self.steps,
            "files": [(file.name, file.header.decode()) for file in self.layout.files],
            "index": self.layout.index,
            "chunk": self.chunk,
        }
        text = json.dumps(content, separators=(",", ":")).encode()
        squeezed: bytes = extra("zstandard", "a delta").ZstdCompressor(level=9).compress(text)
        return squeezed

    @staticmethod
    def unpacked(data: Bytes) -> Manifest:
        """The inverse; raises whatever it meets."""
        content = json.loads(extra("zstandard", "a delta").ZstdDecompressor().decompress(data))
        files = tuple(File(name, header.encode()) for name, header in content["files"])
        index = None if content["index"] is None else (str(content["index"][0]), str(content["index"][1]))
        names = [file.name for file in files] + ([] if index is None else [index[0]])
        if not files or len(set(names)) < len(names) or not all(map(is_plain_name, names)):
            raise ValueError(f"files called {', '.join(names)}")
        if index is None and len(files) > 1:
            raise ValueError("several files and no index")
        return Manifest(
            tuple((str(name), str(dtype), tuple(shape)) for name, dtype, shape in content["old"]),
            tuple(Step(name, how, of, tuple(chunks)) for name, how, of, chunks in content["steps"]),
            Layout(files, index),
            int(content["chunk"]),
        )


class DeltaWriter:
    """Writes a delta from front to back.

    Args:
        file: Empty, and can be read and sought in.
    """

    def __init__(self, file: BinaryIO) -> None:
        # Fail here, not after all tensors have been compared.
        extra("zstandard", "a delta")
        self._file = file
        self._digest = digests.new_digest()
        self._lengths: list[int] = []
        self._written = 0
        file.write(b" " * _HEADER)

    def add(self, data: bytes) -> None:
        """Append to the data."""
        self._file.write(data)
        self._digest.update(data)
        self._written += len(data)

    def finish(self, found: list[bytes], manifest: Manifest) -> int:
        """Write what follows the data, and the header.

        Args:
            found: Digests of the old tensors, and of the new ones that have one, in the manifest's order.
            manifest: What the data are.

        Returns:
            Bytes of the whole file.
        """
        self._end_section()
        self.add(b"".join(found))
        self._end_section()
        self.add(manifest.packed())
        self._end_section()
        self._lengths.append(digests.NBYTES)
        header = _header(self._lengths)
        self._digest.update(header)
        self._file.write(self._digest.digest())
        self._file.seek(0)
        self._file.write(header)
        return _HEADER + sum(self._lengths)

    def _end_section(self) -> None:
        self._lengths.append(self._written)
        self._written = 0


class Delta(NamedTuple):
    """A delta that has been read, and is whole.

    Attributes:
        path: The file.
        manifest: What it makes.
        old_digests: By name of the old tensor.
        new_digests: By name of the new one, where its step has one.
        mapping: The file.
    """

    path: Path
    manifest: Manifest
    old_digests: dict[str, bytes]
    new_digests: dict[str, bytes]
    mapping: Mapping


DATA_BEGIN = _HEADER
"""Where in the file the data begin."""


def open_delta(path: Path) -> Delta:
    """Read a delta, and see that it is whole.

    Raises:
        DeltaError: It is none, or it was cut short or altered.
    """
    if not path.is_file():
        raise DeltaError(f"{printable(str(path))} is not there; expected a delta that weightflip diff --write has made")
    header = read_header(path)
    metadata: dict[str, Any] = json.loads(header.header).get("__metadata__") or {}
    if metadata.get("format") != _FORMAT["format"]:
        raise DeltaError(
            f"{printable(str(path))} is a safetensors file, and no delta; expected one that weightflip diff --write "
            "has made. The order is: weightflip apply OLD DELTA NEW"
        )
    if metadata != _FORMAT:
        raise DeltaError(
            f"{printable(str(path))} is a delta of version {printable(str(metadata.get('version')))}, expected "
            f"{_FORMAT['version']}; use the weightflip that made it"
        )
    mapping = Mapping(path)
    try:
        lengths = [entry.nbytes for entry in header.entries()]
        if header.prefix != _header(lengths):
            raise ValueError("another header")
        checksum = mapping.view(mapping.nbytes - digests.NBYTES, digests.NBYTES).tobytes()
        if _checksum(mapping, header.prefix) != checksum:
            raise ValueError("another checksum")
        data, table, packed, _ = lengths
        manifest = Manifest.unpacked(mapping.view(_HEADER + data + table, packed))
        found = mapping.view(_HEADER + data, table).reshape(-1, digests.NBYTES)
        return Delta(path, manifest, *_digests(manifest, found, data), mapping)
    except (ValueError, KeyError, TypeError, AttributeError, extra("zstandard", "a delta").ZstdError) as error:
        raise DeltaError(
            f"{printable(str(path))} is not what weightflip diff --write has made: it was cut short or altered "
            f"({printable(str(error))}); copy it again, or make it again"
        ) from error


def _digests(manifest: Manifest, found: Bytes, data: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    makers = [step.name for step in manifest.steps if step.has_digest]
    if len(found) != len(manifest.old) + len(makers):
        raise ValueError("another number of digests")
    if sum(sum(step.chunks) for step in manifest.steps) != data:
        raise ValueError("another length of data")
    rows = [row.tobytes() for row in found]
    old = dict(zip([name for name, _, _ in manifest.old], rows, strict=False))
    return old, dict(zip(makers, rows[len(manifest.old) :], strict=True))


def _header(lengths: list[int]) -> bytes:
    content: dict[str, object] = {"__metadata__": _FORMAT}
    ends = np.cumsum(lengths).tolist()
    for name, end, length in zip(_SECTIONS, ends, lengths, strict=True):
        content[name] = {"dtype": "U8", "shape": [length], "data_offsets": [end - length, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    return File("", text + b" " * (_HEADER - 8 - len(text))).prefix


def _checksum(mapping: Mapping, prefix: bytes) -> bytes:
    digest = digests.new_digest()
    for begin in range(_HEADER, mapping.nbytes - digests.NBYTES, _PART):
        length = min(_PART, mapping.nbytes - digests.NBYTES - begin)
        digest.update(mapping.view(begin, length))
        mapping.release(begin, length)
    digest.update(prefix)
    return digest.digest()
