"""What changed between two checkpoints, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from weightflip.delta.checkpoint import Checkpoint
from weightflip.delta.mapped import MappedTensor

_Form = tuple[str, tuple[int, ...]]


class Seen(NamedTuple):
    """A change as a format shows it.

    Attributes:
        changed: Weights whose code differs.
        scales: How many scales the format has for the tensor.
        scales_changed: Those that differ.
    """

    changed: int
    scales: int
    scales_changed: int


@dataclass
class TensorDiff:
    """What became of one tensor.

    Attributes:
        name: The key in the checkpoint.
        old: Dtype, as safetensors calls it, and shape before; None where it is new.
        new: The same after; None where it is gone.
        weights: Elements, after; before, where it is gone. Bytes for dtypes that share a byte.
        changed: Of them those whose stored bits differ; None where dtype or size are others.
        same_as: Another tensor of the new checkpoint that is the same memory, and is counted there.
        seen: By the name of a format.
        nbytes: Of its code in the delta; None where none was written.
    """

    name: str
    old: _Form | None
    new: _Form | None
    weights: int
    changed: int | None = None
    same_as: str | None = None
    seen: dict[str, Seen] = field(default_factory=dict)
    nbytes: int | None = None

    @property
    def changed_fraction(self) -> float | None:
        """Changed / weights, 0 where there are none; None where ``changed`` is."""
        return None if self.changed is None else self.changed / max(1, self.weights)

    @property
    def note(self) -> str:
        """Why it is not compared, or what else differs; empty where nothing does."""
        if self.old is None or self.new is None:
            parts = ["added" if self.old is None else "removed"]
        else:
            (old_dtype, old_shape), (new_dtype, new_shape) = self.old, self.new
            parts = [f"was {old_dtype}"] if old_dtype != new_dtype else []
            parts += [f"shape was {list(old_shape)}"] if old_shape != new_shape else []
        return ", ".join([*parts, f"same memory as {self.same_as}"] if self.same_as else parts)


@dataclass
class Diff:
    """What became of a checkpoint.

    Attributes:
        old: The path.
        new: The path.
        tensors: Those of the new checkpoint in the order of its files, then those that are gone.
        formats: Names of the formats that it was seen in.
        new_nbytes: Of all tensors of the new checkpoint.
        delta_nbytes: Of the file of the delta; None where none was written.
    """

    old: str
    new: str
    tensors: list[TensorDiff]
    formats: tuple[str, ...]
    new_nbytes: int
    delta_nbytes: int | None = None

    @property
    def comparable(self) -> list[TensorDiff]:
        """Tensors that have their dtype and their size in both checkpoints, each memory once."""
        return [tensor for tensor in self.tensors if tensor.changed is not None]

    @property
    def weights(self) -> int:
        """Elements of all comparable tensors."""
        return sum(tensor.weights for tensor in self.comparable)

    @property
    def changed(self) -> int:
        """Those of which a stored bit differs."""
        return sum(tensor.changed or 0 for tensor in self.tensors)

    @property
    def changed_fraction(self) -> float:
        """Changed / weights; 0 without weights."""
        return self.changed / max(1, self.weights)

    def seen(self, format: str) -> tuple[Seen, int]:
        """The sums of what a format shows, and how many weights those are."""
        tensors = [tensor for tensor in self.tensors if format in tensor.seen]
        sums = (sum(column) for column in zip(*(tensor.seen[format] for tensor in tensors), strict=True))
        return Seen(*sums) if tensors else Seen(0, 0, 0), sum(tensor.weights for tensor in tensors)


class Pair(NamedTuple):
    """A tensor before and after."""

    old: MappedTensor | None
    new: MappedTensor | None

    @property
    def base(self) -> MappedTensor | None:
        """The old tensor, where its elements can be compared with the new ones one by one."""
        if self.old is None or self.new is None or self.new.same_as is not None:
            return None
        return self.old if (self.old.dtype, self.old.nbytes) == (self.new.dtype, self.new.nbytes) else None

    def diff(self) -> TensorDiff:
        """Without what has to be counted."""
        some = self.new or self.old
        assert some is not None
        old, new = (None if each is None else (each.dtype, each.shape) for each in self)
        same_as = None if self.new is None else self.new.same_as
        return TensorDiff(some.name, old, new, some.units, None if self.base is None else 0, same_as)


def pairs(old: Checkpoint, new: Checkpoint) -> dict[str, Pair]:
    """By name: those of the new checkpoint in the order of its files, then those that are gone."""
    before: Mapping[str, MappedTensor] = old.tensors
    names = dict.fromkeys([each.name for file in new.layout.files for each in file.entries()])
    return {name: Pair(before.get(name), new.tensors.get(name)) for name in [*names, *before]}
