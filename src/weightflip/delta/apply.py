"""``apply``: creates the new checkpoint from an old one and a delta, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from weightflip import checks
from weightflip.delta import coding, digests
from weightflip.delta.bits import STORED, Bytes
from weightflip.delta.checkpoint import Checkpoint, open_checkpoint
from weightflip.delta.container import DATA_BEGIN, Delta, Step, open_delta
from weightflip.delta.errors import DeltaError
from weightflip.delta.layout import Entry
from weightflip.delta.mapped import MappedTensor
from weightflip.delta.output import atomic_directory, atomic_file, check_free, new_file
from weightflip.delta.parallel import map_in_order
from weightflip.records import printable

_PART = 1 << 24


def apply(
    old: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    new: str | os.PathLike[str],
    *,
    force: bool = False,
) -> None:
    """Create the new checkpoint from the old one and a delta.

    The files are byte-for-byte those that the delta was made from: one safetensors file, or shards and their index. A
    file written by ``torch.save`` becomes one safetensors file with the same tensors.

    Args:
        old: The checkpoint that the delta starts from, in any form that ``diff`` reads.
        delta: A file written by ``diff``.
        new: The file to write. For a sharded checkpoint, a directory that is empty or does not exist.
        force: Replace an existing file. It may be ``old`` itself.

    Raises:
        DeltaError: ``old`` does not have exactly the expected weights, the delta is truncated or modified, or ``new``
            is not writable. Nothing is written then.
        TypeError: An argument is not a path.
    """
    old, delta = checks.path("old", old), checks.path("delta", delta)
    target = Path(checks.path("new", new))
    found = open_delta(Path(delta))
    layout = found.manifest.layout
    if layout.index is None:
        _check_file(target, found, force)
    else:
        _check_directory(target)
    writer = _CheckpointWriter(open_checkpoint(old), found)
    if layout.index is None:
        with atomic_file(target) as file:
            writer.write(file, 0)
            writer.check_unused()
        return
    with atomic_directory(target) as directory:
        for at, each in enumerate(layout.files):
            with new_file(directory / each.name) as file:
                writer.write(file, at)
        writer.check_unused()
        name, text = layout.index
        with new_file(directory / name) as file:
            file.write(text.encode())


def _check_file(target: Path, delta: Delta, force: bool) -> None:
    if target.suffix != ".safetensors":
        raise DeltaError(
            f"expected a file name that ends in .safetensors, got {printable(str(target))}; choose another name"
        )
    check_free(target, force)
    if target.exists() and target.samefile(delta.path):
        raise DeltaError(f"{printable(str(target))} is the delta itself; write the new checkpoint to another file")


def _check_directory(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise DeltaError(
            f"{printable(str(target))} already exists, and this delta creates several files; name a new or empty "
            "directory"
        )
    if not target.parent.is_dir():
        raise DeltaError(f"the directory {printable(str(target.parent))} does not exist; create it first")


class _Chunk(NamedTuple):
    """A chunk of a new tensor, the source of its old bytes, and its coded change."""

    base: MappedTensor | None
    begin: int
    end: int
    coded: Bytes
    dtype: str


def _decode_chunk(chunk: _Chunk) -> tuple[Bytes | None, Bytes]:
    stored = STORED[chunk.dtype]
    old = None if chunk.base is None else chunk.base.read(chunk.begin, chunk.end)
    if old is not None and not len(chunk.coded):
        return old, old
    return old, coding.decode(old, chunk.coded, chunk.end - chunk.begin, stored.unit, stored.has_sign_bit)


class _CheckpointWriter:
    """Writes the new files and verifies old and new tensors."""

    def __init__(self, old: Checkpoint, delta: Delta) -> None:
        self._old = old
        self._delta = delta
        self._steps = {step.name: step for step in delta.manifest.steps}
        self._verified: set[str] = set()
        self._written: dict[str, tuple[int, int]] = {}
        self._data_offsets: dict[str, int] = {}
        begin = DATA_BEGIN
        for step in delta.manifest.steps:
            self._data_offsets[step.name] = begin
            begin += sum(step.chunks)
        self._check_specs()

    def write(self, file: BinaryIO, at: int) -> None:
        """Write one of the files completely."""
        layout = self._delta.manifest.layout.files[at]
        file.write(layout.prefix)
        for entry in layout.entries():
            step = self._steps.get(entry.name)
            if step is None or file.tell() != len(layout.prefix) + entry.begin:
                raise self._damaged(f"no way to make tensor {entry.name!r}")
            self._written[entry.name] = (file.tell(), entry.nbytes)
            if step.how == "copy":
                self._write_copy(file, step, entry)
            else:
                self._write_tensor(file, step, entry)

    def check_unused(self) -> None:
        """Verify old tensors that no new tensor is made from."""
        for name, tensor in self._old.tensors.items():
            if name not in self._verified:
                self._check_old(name, digests.digest_of(tensor))

    def _write_tensor(self, file: BinaryIO, step: Step, entry: Entry) -> None:
        before, after = digests.new_digest(), digests.new_digest()
        for chunk, (old, new) in map_in_order(_decode_chunk, self._chunks(step, entry)):
            if old is not None:
                before.update(old)
            if step.has_digest:
                after.update(new)
            file.write(new.data)
            if chunk.base is not None:
                chunk.base.release(chunk.begin, chunk.end)
        if step.how != "whole":
            self._check_old(step.name, before.digest())
            self._verified.add(step.name)
        if step.has_digest and after.digest() != self._delta.new_digests[step.name]:
            raise self._damaged(f"tensor {step.name!r} differs from the original new tensor")

    def _chunks(self, step: Step, entry: Entry) -> Iterator[_Chunk]:
        base = None if step.how == "whole" else self._old.tensors.get(step.name)
        fits = base is not None and (base.dtype, base.nbytes) == (entry.dtype, entry.nbytes)
        if step.how not in ("same", "changed", "whole") or (step.how != "whole" and not fits):
            raise self._damaged(f"no way to make tensor {step.name!r}")
        at, size = self._data_offsets[step.name], self._delta.manifest.chunk * STORED[entry.dtype].unit
        begins = range(0, entry.nbytes, size)
        lengths = (0,) * len(begins) if step.how == "same" else step.chunks
        if len(lengths) != len(begins):
            raise self._damaged(f"wrong number of chunks of tensor {step.name!r}")
        for begin, length in zip(begins, lengths, strict=True):
            coded = self._delta.mapping.view(at, length)
            yield _Chunk(base, begin, min(begin + size, entry.nbytes), coded, entry.dtype)
            at += length

    def _write_copy(self, file: BinaryIO, step: Step, entry: Entry) -> None:
        begin, nbytes = self._written.get(step.source, (0, -1))
        if nbytes != entry.nbytes:
            raise self._damaged(f"tensor {step.name!r} is a copy of an unknown tensor")
        end = file.tell()
        for at in range(0, nbytes, _PART):
            file.seek(begin + at)
            part = file.read(min(_PART, nbytes - at))
            file.seek(end + at)
            file.write(part)

    def _check_specs(self) -> None:
        """Verify names, dtypes and shapes before anything is read."""
        expected = {name: (dtype, shape) for name, dtype, shape in self._delta.manifest.old}
        for name, spec in expected.items():
            tensor = self._old.tensors.get(name)
            if tensor is None:
                raise self._wrong_checkpoint(f"tensor {name!r} is missing")
            if (tensor.dtype, tensor.shape) != spec:
                got = f"{tensor.dtype} {list(tensor.shape)}"
                raise self._wrong_checkpoint(f"tensor {name!r} is {got}, expected {spec[0]} {list(spec[1])}")
        for name in self._old.tensors:
            if name not in expected:
                raise self._wrong_checkpoint(f"tensor {name!r} is unexpected")

    def _check_old(self, name: str, digest: bytes) -> None:
        expected = self._delta.old_digests[name]
        if digest != expected:
            raise self._wrong_checkpoint(
                f"tensor {name!r} has other weights (xxh3-128 {digest.hex()}, expected {expected.hex()})"
            )

    def _wrong_checkpoint(self, reason: str) -> DeltaError:
        return DeltaError(
            f"{printable(str(self._old.path))} is not the checkpoint that {printable(str(self._delta.path))} starts "
            f"from: {printable(reason)}. Apply the delta to that checkpoint, or create a new delta from this one"
        )

    def _damaged(self, reason: str) -> DeltaError:
        return DeltaError(f"{printable(str(self._delta.path))} is damaged: {printable(reason)}; create it again")
