"""The delta file: a safetensors file of bytes that ends with a digest of its contents.

All its tensors are uint8. ``data``: the coded chunks of all changed tensors, concatenated. ``digests``: 16 bytes for
each old tensor and for each new tensor created from the data. ``manifest``: JSON compressed with zstd. ``checksum``:
the digest of these three tensors, followed by everything before them.
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
# Space reserved for the header, which is written last, when all lengths are known.
_HEADER = 512
_PART = 1 << 24


class Step(NamedTuple):
    """How to create one new tensor.

    Attributes:
        name: Name of the new tensor.
        how: ``"same"``: equal to the old one. ``"changed"``: from the old one and the data. ``"whole"``: from the data
            alone. ``"copy"``: a copy of another new tensor.
        source: Name of the tensor to copy.
        chunks: Lengths of the coded chunks in the data.
    """

    name: str
    how: str
    source: str = ""
    chunks: tuple[int, ...] = ()

    @property
    def has_digest(self) -> bool:
        """Whether the delta holds a digest of the new tensor. For the others, the digest of the old one suffices."""
        return self.how in ("changed", "whole")


class Manifest(NamedTuple):
    """Metadata of a delta.

    Attributes:
        old: Name, dtype and shape of each old tensor.
        steps: One step per new tensor, in the order of the files.
        layout: Layout of the new files.
        chunk: Units per chunk. The last chunk of a tensor may be shorter.
    """

    old: tuple[tuple[str, str, tuple[int, ...]], ...]
    steps: tuple[Step, ...]
    layout: Layout
    chunk: int = CHUNK

    def pack(self) -> bytes:
        """Encode as JSON, compressed with zstd."""
        content = {
            "old": self.old,
            "steps": self.steps,
            "files": [(file.name, file.header.decode()) for file in self.layout.files],
            "index": self.layout.index,
            "chunk": self.chunk,
        }
        text = json.dumps(content, separators=(",", ":")).encode()
        compressed: bytes = extra("zstandard", "a delta").ZstdCompressor(level=9).compress(text)
        return compressed

    @staticmethod
    def unpack(data: Bytes) -> Manifest:
        """The inverse of ``pack``. Damaged data may raise any of the errors that ``open_delta`` handles."""
        content = json.loads(extra("zstandard", "a delta").ZstdDecompressor().decompress(data))
        files = tuple(File(name, header.encode()) for name, header in content["files"])
        index = None if content["index"] is None else (str(content["index"][0]), str(content["index"][1]))
        names = [file.name for file in files] + ([] if index is None else [index[0]])
        if not files or len(set(names)) < len(names) or not all(map(is_plain_name, names)):
            raise ValueError(f"invalid file names {', '.join(names)}")
        if index is None and len(files) > 1:
            raise ValueError("several files without an index")
        return Manifest(
            tuple((str(name), str(dtype), tuple(shape)) for name, dtype, shape in content["old"]),
            tuple(Step(name, how, of, tuple(chunks)) for name, how, of, chunks in content["steps"]),
            Layout(files, index),
            int(content["chunk"]),
        )


class DeltaWriter:
    """Writes a delta sequentially.

    Args:
        file: An empty, readable and seekable file.
    """

    def __init__(self, file: BinaryIO) -> None:
        # Fail now, not after all tensors have been compared.
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
        """Write the sections after the data, and the header.

        Args:
            found: Digests of the old tensors, and of the new ones that have one, in the manifest's order.
            manifest: Description of the data.

        Returns:
            Size of the file in bytes.
        """
        self._end_section()
        self.add(b"".join(found))
        self._end_section()
        self.add(manifest.pack())
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
    """A delta that has been opened and verified.

    Attributes:
        path: Path of the file.
        manifest: Description of the data.
        old_digests: Digests of the old tensors, by name.
        new_digests: Digests of those new tensors whose step has one, by name.
        mapping: The mapped file.
    """

    path: Path
    manifest: Manifest
    old_digests: dict[str, bytes]
    new_digests: dict[str, bytes]
    mapping: Mapping


DATA_BEGIN = _HEADER
"""Offset of the data in the file."""


def open_delta(path: Path) -> Delta:
    """Open a delta and verify that it is complete and unmodified.

    Raises:
        DeltaError: The file is not a delta, or it is truncated or modified.
    """
    if not path.is_file():
        raise DeltaError(
            f"{printable(str(path))} does not exist; expected a delta file written by weightflip diff --write"
        )
    header = read_header(path)
    metadata: dict[str, Any] = json.loads(header.header).get("__metadata__") or {}
    if metadata.get("format") != _FORMAT["format"]:
        raise DeltaError(
            f"expected a delta file written by weightflip diff --write, got another safetensors file, "
            f"{printable(str(path))}. The order of arguments is: weightflip apply OLD DELTA NEW"
        )
    if metadata != _FORMAT:
        raise DeltaError(
            f"{printable(str(path))} is a delta of version {printable(str(metadata.get('version')))}, expected "
            f"{_FORMAT['version']}; use the version of weightflip that wrote it"
        )
    mapping = Mapping(path)
    try:
        lengths = [entry.nbytes for entry in header.entries()]
        if header.prefix != _header(lengths):
            raise ValueError("wrong header")
        checksum = mapping.view(mapping.nbytes - digests.NBYTES, digests.NBYTES).tobytes()
        if _checksum(mapping, header.prefix) != checksum:
            raise ValueError("wrong checksum")
        data, table, packed, _ = lengths
        manifest = Manifest.unpack(mapping.view(_HEADER + data + table, packed))
        found = mapping.view(_HEADER + data, table).reshape(-1, digests.NBYTES)
        return Delta(path, manifest, *_split_digests(manifest, found, data), mapping)
    except (ValueError, KeyError, TypeError, AttributeError, extra("zstandard", "a delta").ZstdError) as error:
        raise DeltaError(
            f"{printable(str(path))} was truncated or modified after weightflip diff --write wrote it "
            f"({printable(str(error))}); copy it again, or create it again"
        ) from error


def _split_digests(manifest: Manifest, found: Bytes, data: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    makers = [step.name for step in manifest.steps if step.has_digest]
    if len(found) != len(manifest.old) + len(makers):
        raise ValueError("wrong number of digests")
    if sum(sum(step.chunks) for step in manifest.steps) != data:
        raise ValueError("wrong length of data")
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
