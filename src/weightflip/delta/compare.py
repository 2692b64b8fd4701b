"""Result of a comparison of two checkpoints, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from weightflip.delta.checkpoint import Checkpoint
from weightflip.delta.mapped import MappedTensor

_TensorSpec = tuple[str, tuple[int, ...]]


class FormatDiff(NamedTuple):
    """The change of a tensor in one number format.

    Attributes:
        changed: Weights whose code differs.
        scales: Number of scales that the format has for the tensor.
        scales_changed: Scales that differ.
    """

    changed: int
    scales: int
    scales_changed: int


@dataclass
class TensorDiff:
    """The change of one tensor.

    Attributes:
        name: Key in the checkpoint.
        old: Dtype, as named by safetensors, and shape in the old checkpoint; None for an added tensor.
        new: The same in the new checkpoint; None for a removed tensor.
        weights: Number of elements in the new checkpoint, or in the old one for a removed tensor. Number of bytes for
            dtypes of less than a byte.
        changed: Number of elements whose stored bits differ; None if dtype or size differ.
        same_as: Another tensor of the new checkpoint that shares the same memory and is counted instead.
        format_diffs: Changes in number formats, by format name.
        nbytes: Size of its coded change in the delta; None if no delta was written.
    """

    name: str
    old: _TensorSpec | None
    new: _TensorSpec | None
    weights: int
    changed: int | None = None
    same_as: str | None = None
    format_diffs: dict[str, FormatDiff] = field(default_factory=dict)
    nbytes: int | None = None

    @property
    def changed_fraction(self) -> float | None:
        """Changed / weights, 0 for an empty tensor; None if ``changed`` is None."""
        return None if self.changed is None else self.changed / max(1, self.weights)

    @property
    def note(self) -> str:
        """Why it is not compared, or which other properties differ; empty if none do."""
        if self.old is None or self.new is None:
            parts = ["added" if self.old is None else "removed"]
        else:
            (old_dtype, old_shape), (new_dtype, new_shape) = self.old, self.new
            parts = [f"was {old_dtype}"] if old_dtype != new_dtype else []
            parts += [f"shape was {list(old_shape)}"] if old_shape != new_shape else []
        return ", ".join([*parts, f"same memory as {self.same_as}"] if self.same_as else parts)


@dataclass
class Diff:
    """The changes between two checkpoints.

    Attributes:
        old: Path of the old checkpoint.
        new: Path of the new checkpoint.
        tensors: Tensors of the new checkpoint in the order of its files, then removed tensors.
        formats: Names of the compared number formats.
        new_nbytes: Total size of the tensors in the new checkpoint.
        delta_nbytes: Size of the delta file; None if none was written.
    """

    old: str
    new: str
    tensors: list[TensorDiff]
    formats: tuple[str, ...]
    new_nbytes: int
    delta_nbytes: int | None = None

    @property
    def comparable(self) -> list[TensorDiff]:
        """Tensors with the same dtype and size in both checkpoints. Shared memory is included once."""
        return [tensor for tensor in self.tensors if tensor.changed is not None]

    @property
    def weights(self) -> int:
        """Number of elements of all comparable tensors."""
        return sum(tensor.weights for tensor in self.comparable)

    @property
    def changed(self) -> int:
        """Number of elements whose stored bits differ."""
        return sum(tensor.changed or 0 for tensor in self.tensors)

    @property
    def changed_fraction(self) -> float:
        """Changed / weights; 0 without weights."""
        return self.changed / max(1, self.weights)

    def format_diff(self, format: str) -> tuple[FormatDiff, int]:
        """The total change in a number format, and the number of weights compared in it."""
        tensors = [tensor for tensor in self.tensors if format in tensor.format_diffs]
        sums = (sum(column) for column in zip(*(tensor.format_diffs[format] for tensor in tensors), strict=True))
        return FormatDiff(*sums) if tensors else FormatDiff(0, 0, 0), sum(tensor.weights for tensor in tensors)


class Pair(NamedTuple):
    """A tensor in the old and the new checkpoint."""

    old: MappedTensor | None
    new: MappedTensor | None

    @property
    def base(self) -> MappedTensor | None:
        """The old tensor if its elements can be compared with the new ones, else None."""
        if self.old is None or self.new is None or self.new.same_as is not None:
            return None
        return self.old if (self.old.dtype, self.old.nbytes) == (self.new.dtype, self.new.nbytes) else None

    def diff(self) -> TensorDiff:
        """The change of the tensor, with all counts still 0."""
        either = self.new or self.old
        assert either is not None
        old, new = (None if each is None else (each.dtype, each.shape) for each in self)
        same_as = None if self.new is None else self.new.same_as
        return TensorDiff(either.name, old, new, either.units, None if self.base is None else 0, same_as)


def pair_tensors(old: Checkpoint, new: Checkpoint) -> dict[str, Pair]:
    """Pairs by name: tensors of the new checkpoint in the order of its files, then removed tensors."""
    before: Mapping[str, MappedTensor] = old.tensors
    names = dict.fromkeys([each.name for file in new.layout.files for each in file.entries()])
    return {name: Pair(before.get(name), new.tensors.get(name)) for name in [*names, *before]}
