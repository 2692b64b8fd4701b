"""What metric groups do with weights that are counted together, and the scales that they need for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from weightflip import kernels


class Observation(NamedTuple):
    """What a metric group does with each weight of a layer.

    Attributes:
        group: Its name.
        pointwise: The same as an expression.
        states: The tensors that the expression reads and writes, laid out as the codes.
        columns: Where each of its counts is added, among the columns of all groups.
    """

    group: str
    pointwise: kernels.Pointwise
    states: tuple[Tensor, ...]
    columns: tuple[int, ...]

    @property
    def kind(self) -> tuple[str, kernels.Pointwise, tuple[int, ...]]:
        """What layers have in common that are counted in one call."""
        return self.group, self.pointwise, self.columns


class HeldScale:
    """Scales that neighbors in a batch were encoded with last, end to end.

    Attributes:
        scale: As the quantizer gives them; None where there are none.
        applied: What the weights were multiplied or divided by.
    """

    __slots__ = ("applied", "scale")

    def __init__(self, scale: Tensor | None = None, applied: Tensor | None = None) -> None:
        self.scale, self.applied = scale, applied


class Place(NamedTuple):
    """Where in such scales those of a weight are, or of a part of it."""

    held: HeldScale
    first: int
    number: int

    @property
    def scale(self) -> Tensor | None:
        return None if self.held.scale is None else self.held.scale[self.first : self.first + self.number]


class Due(NamedTuple):
    """The metric groups that look at a step.

    Attributes:
        groups: Their names.
        sums: float64, the columns of all groups, a row for each layer; added to.
    """

    groups: tuple[str, ...]
    sums: Tensor


class Observations:
    """What metric groups do with neighbors in a batch, as addresses.

    Args:
        parts: Of each weight, or part of one, what groups do, of the same kinds; and the element that it begins with.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[Observation], int]]) -> None:
        self._parts = parts
        self._known: dict[tuple[str, ...], kernels.Observed | None] = {}

    def of(self, due: Due) -> kernels.Observed | None:
        """What the kernel is given in a step, but for the scales of before it; None where no group looks."""
        if due.groups not in self._known:
            self._known[due.groups] = self._addressed(due)
        known = self._known[due.groups]
        return None if known is None else known._replace(sums=due.sums)

    def _addressed(self, due: Due) -> kernels.Observed | None:
        looking = [([one for one in of_one if one.group in due.groups], first) for of_one, first in self._parts]
        of_first = looking[0][0]
        if not of_first:
            return None
        addresses = [
            [state.data_ptr() + first * state.element_size() for one in of_one for state in one.states]
            for of_one, first in looking
        ]
        states = np.array(addresses, dtype=np.int64).reshape(len(looking), -1)
        columns = np.array([column for one in of_first for column in one.columns], dtype=np.int64)
        groups = tuple(one.pointwise for one in of_first)
        return kernels.Observed(groups, np.ascontiguousarray(states.T), None, due.sums, columns)
