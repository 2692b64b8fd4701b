"""``diff``: compares two checkpoints and writes deltas."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from weightflip import checks
from weightflip.delta import coding, digests
from weightflip.delta.bits import Bytes
from weightflip.delta.checkpoint import Checkpoint, open_checkpoint
from weightflip.delta.compare import Diff, Pair, TensorDiff, pair_tensors
from weightflip.delta.container import DeltaWriter, Manifest, Step
from weightflip.delta.errors import DeltaError
from weightflip.delta.format_diff import compare_in_format, is_weight
from weightflip.delta.output import atomic_file, check_free
from weightflip.delta.parallel import map_in_order
from weightflip.quantizers import BaseQuantizer, adapt, resolve
from weightflip.quantizers.specs import QuantizerLike
from weightflip.records import printable


def diff(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    *,
    quantizers: Sequence[QuantizerLike] = (),
    write: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Diff:
    """Compare two checkpoints tensor by tensor, and optionally write the delta between them.

    The files are memory-mapped and read in parts, so checkpoints may be larger than memory.

    Args:
        old: A safetensors file, a directory of shards with an index, or a file written by ``torch.save`` with tensors
            in dictionaries and lists.
        new: The later checkpoint, in any of these forms.
        quantizers: Formats in which floating-point weights with at least two dimensions are also compared: names such
            as ``"mxfp4"``, or anything else that ``quantizer=`` accepts.
        write: Path of the delta file; None writes none.
        force: Replace an existing delta file.

    Returns:
        The changes.

    Raises:
        DeltaError: A checkpoint cannot be read, or the delta cannot be written. Nothing is written then.
        ValueError: Unknown quantizer.
        TypeError: An argument is not a path, or not a quantizer.
    """
    old, new = checks.path("old", old), checks.path("new", new)
    formats = [adapt(resolve(quantizer)) for quantizer in quantizers]
    before, after = open_checkpoint(old), open_checkpoint(new)
    found = pair_tensors(before, after)
    result = Diff(
        old,
        new,
        [pair.diff() for pair in found.values()],
        tuple(dict.fromkeys(format.name for format in formats)),
        sum(tensor.nbytes for tensor in after.tensors.values()),
    )
    if write is None:
        _count(found, result, formats, None)
        return result
    path = Path(checks.path("write", write))
    check_free(path, force)
    for checkpoint in (before, after):
        if checkpoint.holds(path):
            raise DeltaError(
                f"{printable(str(path))} is a file of the checkpoint {printable(str(checkpoint.path))}; write the "
                "delta to another file"
            )
    with atomic_file(path) as file:
        recorder = _Recorder(DeltaWriter(file))
        _count(found, result, formats, recorder)
        result.delta_nbytes = recorder.finish(before, after, found)
    for tensor in result.tensors:
        if tensor.name in after.tensors:
            tensor.nbytes = sum(recorder.chunks.get(tensor.name, ()))
    return result


class _Chunk(NamedTuple):
    """A chunk of a pair of tensors."""

    pair: Pair
    begin: int
    end: int
    is_last: bool

    def read(self) -> tuple[Bytes | None, Bytes]:
        assert self.pair.new is not None
        base = self.pair.base
        old = None if base is None else base.read(self.begin, self.end)
        return old, self.pair.new.read(self.begin, self.end)

    def release(self) -> None:
        for tensor in (self.pair.base, self.pair.new):
            if tensor is not None:
                tensor.release(self.begin, self.end)


class _Counted(NamedTuple):
    """Result for one chunk."""

    old: Bytes | None
    new: Bytes
    changed: int
    coded: bytes


def _chunks(found: Sequence[Pair], whole: bool) -> Iterator[_Chunk]:
    """All chunks to compare. With ``whole``, also chunks of new tensors without a counterpart."""
    for pair in found:
        if pair.new is None or pair.new.same_as is not None or (pair.base is None and not whole):
            continue
        for begin, end in pair.new.spans(coding.CHUNK):
            yield _Chunk(pair, begin, end, end == pair.new.nbytes)


def _compare(chunk: _Chunk) -> _Counted:
    old, new = chunk.read()
    assert old is not None
    assert chunk.pair.new is not None
    return _Counted(old, new, coding.changed_count(old, new, chunk.pair.new.stored.unit), b"")


def _encode(chunk: _Chunk) -> _Counted:
    old, new = chunk.read()
    assert chunk.pair.new is not None
    stored = chunk.pair.new.stored
    return _Counted(old, new, *coding.encode(old, new, stored.unit, stored.has_sign_bit))


def _count(found: dict[str, Pair], result: Diff, formats: Sequence[BaseQuantizer], recorder: _Recorder | None) -> None:
    """Fill in the counts, and pass each chunk to the recorder."""
    diffs = {tensor.name: tensor for tensor in result.tensors}
    chunks = _chunks(list(found.values()), whole=recorder is not None)
    for chunk, counted in map_in_order(_compare if recorder is None else _encode, chunks):
        assert chunk.pair.new is not None
        tensor = diffs[chunk.pair.new.name]
        if tensor.changed is not None:
            tensor.changed += counted.changed
        if recorder is not None:
            recorder.add(tensor.name, counted)
        chunk.release()
        if chunk.is_last and formats:
            _compare_formats(chunk.pair, tensor, formats)


def _compare_formats(pair: Pair, tensor: TensorDiff, formats: Sequence[BaseQuantizer]) -> None:
    if pair.base is None or pair.new is None or not is_weight(pair.base, pair.new):
        return
    for format in formats:
        # The format does not support the shape: leave the cell empty. The tracker skips these layers too.
        with contextlib.suppress(ValueError):
            tensor.format_diffs[format.name] = compare_in_format(pair.base, pair.new, format)


class _Recorder:
    """Collects the contents of a delta during the comparison."""

    def __init__(self, writer: DeltaWriter) -> None:
        self._writer = writer
        self._old: dict[str, digests.Digest] = {}
        self._new: dict[str, digests.Digest] = {}
        self.chunks: dict[str, list[int]] = {}

    def add(self, name: str, counted: _Counted) -> None:
        """Add the next chunk of a tensor."""
        if counted.old is not None:
            self._old.setdefault(name, digests.new_digest()).update(counted.old)
        self._new.setdefault(name, digests.new_digest()).update(counted.new)
        self.chunks.setdefault(name, []).append(len(counted.coded))
        self._writer.add(counted.coded)

    def finish(self, old: Checkpoint, new: Checkpoint, found: dict[str, Pair]) -> int:
        """Write the sections after the data. Returns the size of the file."""
        steps = tuple(self._step(pair) for pair in found.values() if pair.new is not None)
        specs = tuple((tensor.name, tensor.dtype, tensor.shape) for tensor in old.tensors.values())
        rows = [
            self._old[name].digest() if name in self._old else digests.digest_of(tensor)
            for name, tensor in old.tensors.items()
        ]
        for step in steps:
            if step.has_digest:
                rows.append(self._new.get(step.name, digests.new_digest()).digest())
        return self._writer.finish(rows, Manifest(specs, steps, new.layout))

    def _step(self, pair: Pair) -> Step:
        assert pair.new is not None
        if pair.new.same_as is not None:
            return Step(pair.new.name, "copy", pair.new.same_as)
        chunks = tuple(self.chunks.get(pair.new.name, ()))
        if pair.base is None:
            return Step(pair.new.name, "whole", chunks=chunks)
        return Step(pair.new.name, "changed", chunks=chunks) if any(chunks) else Step(pair.new.name, "same")
