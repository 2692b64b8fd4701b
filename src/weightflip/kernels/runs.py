"""What a kernel needs to know to count many weights in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from weightflip.formats import Rounding


class Stretch(NamedTuple):
    """Memory of one weight, or of a part of one.

    Attributes:
        weight: Address of the first element.
        codes: Address of its code.
        numel: Elements, at least one.
        group: How many neighbours share a scale; ``numel`` where all do, or where there is none.
    """

    weight: int
    codes: int
    numel: int
    group: int


class Kind(NamedTuple):
    """What weights have in common that one call can count.

    Attributes:
        weight: dtype of the weights.
        update: dtype of the updates; None where none are counted.
        codes: dtype of the codes.
        rounding: How a weight becomes an ordinal.
    """

    weight: torch.dtype
    update: torch.dtype | None
    codes: torch.dtype
    rounding: Rounding


class Run(Protocol):
    """Stretches of memory of one kind that are counted together.

    Nothing here keeps the memory alive or looks at it again: who calls vouches for the addresses.
    """

    def __init__(self, stretches: Sequence[Stretch], kind: Kind) -> None: ...

    @staticmethod
    def can_do(kind: Kind, *, scaled: bool) -> bool:
        """Whether there are compiled loops for weights of this kind; compiles them."""
        ...

    def largest(self) -> Tensor:
        """The largest magnitude under each scale, float32, stretch after stretch; NaN where there is one."""
        ...

    def count_(self, scale: Tensor | None, updates: Tensor | None) -> Tensor:
        """Encode, compare, count, and store the new codes.

        Args:
            scale: float32, one for each element of :meth:`largest`; None where weights are rounded as they are.
            updates: int64, addresses of the updates, a stretch each; 0 for one that has none. Not wider than the
                weight. None where none are counted.

        Returns:
            int64 of shape (stretches, 3): flips, updates, stalled.
        """
        ...
