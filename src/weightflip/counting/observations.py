"""The work of metric groups on weights that are counted together, and the scales that they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from weightflip import kernels


class Observation(NamedTuple):
    """What a metric group computes for each weight of a layer.

    Attributes:
        group: The name of the group.
        pointwise: The computation as an expression.
        states: The tensors that the expression reads and writes, with the layout of the codes or one bit per weight.
        columns: The column to which each count is added, among those of all groups.
    """

    group: str
    pointwise: kernels.Pointwise
    states: tuple[Tensor, ...]
    columns: tuple[int, ...]

    @property
    def kind(self) -> tuple[str, kernels.Pointwise, tuple[int, ...]]:
        """The key by which layers are grouped into one call."""
        return self.group, self.pointwise, self.columns

    def address(self, state: int, first: int) -> int:
        """Return the address of a state of the weights from ``first`` on, which is a multiple of 32."""
        tensor = self.states[state]
        expression, _ = self.pointwise.states[state]
        return tensor.data_ptr() + first * kernels.bits_of_state(expression, tensor.dtype) // 8


class KeptScale:
    """The scales of the codes of adjacent weights in a batch, concatenated.

    Attributes:
        scale: The scales as returned by the quantizer; None if there are none.
        applied: The factors by which the weights were multiplied or divided; None if they are not known.
    """

    __slots__ = ("applied", "scale")

    def __init__(self, scale: Tensor | None = None) -> None:
        self.set(scale)

    def set(self, scale: Tensor | None, applied: Tensor | None = None) -> None:
        """Set both, so that the factors are never those of other scales."""
        self.scale, self.applied = scale, applied


class ScaleSlice(NamedTuple):
    """The position of the scales of a weight, or a part of it, in a :class:`KeptScale`."""

    kept: KeptScale
    first: int
    size: int

    @property
    def scale(self) -> Tensor | None:
        return None if self.kept.scale is None else self.kept.scale[self.first : self.first + self.size]


class DueGroups(NamedTuple):
    """The metric groups that are due in a step.

    Attributes:
        groups: Their names.
        sums: float64, the columns of all groups, one row per layer. Counts are added to it.
    """

    groups: tuple[str, ...]
    sums: Tensor


class Observations:
    """The observations of adjacent weights in a batch, as addresses for a kernel.

    Args:
        parts: For each weight or part of a weight, its observations, which must be of the same kinds for all, and the
            index of its first element.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[Observation], int]]) -> None:
        self._parts = parts
        self._by_groups: dict[tuple[str, ...], kernels.Observed | None] = {}

    def kernel_arguments(self, due: DueGroups) -> kernels.Observed | None:
        """Return the kernel's arguments for a step, except the old scales; None if no group is due."""
        if due.groups not in self._by_groups:
            self._by_groups[due.groups] = self._with_addresses(due)
        arguments = self._by_groups[due.groups]
        return None if arguments is None else arguments._replace(sums=due.sums)

    def _with_addresses(self, due: DueGroups) -> kernels.Observed | None:
        due_parts = [([one for one in of_one if one.group in due.groups], first) for of_one, first in self._parts]
        of_first = due_parts[0][0]
        if not of_first:
            return None
        addresses = [
            [one.address(at, first) for one in of_one for at in range(len(one.states))] for of_one, first in due_parts
        ]
        states = np.array(addresses, dtype=np.int64).reshape(len(due_parts), -1)
        columns = np.array([column for one in of_first for column in one.columns], dtype=np.int64)
        groups = tuple(one.pointwise for one in of_first)
        return kernels.Observed(groups, np.ascontiguousarray(states.T), None, due.sums, columns)
