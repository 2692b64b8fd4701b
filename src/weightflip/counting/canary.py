"""Notices weights that were written through ``.data`` between two steps, which moves no version counter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightflip.counting.layer import TrackedWeight

# Of a sample, at most: few enough that even a step over a small model does not show them.
_ELEMENTS = 4096
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Scripts write weights at such intervals, those of moving averages for example.
_ROUND_NUMBERS = frozenset(digit * 10**power for digit in (1, 2, 5) for power in range(3))


@dataclass(frozen=True)
class _Sample:
    """The bits of some elements of a weight at the end of a step. Not a view, which would hold the weight."""

    name: str
    bits: Tensor


class Canary:
    """Compares some elements of one weight before a step with what they were at the end of the last one.

    It looks after each of the first 16 steps, after 2, 4, 8, ... and 10, 20, 50, ... steps, and then after every 1,000,
    each time at the next weight. On the CPU the answer is there at once. On another device it stays in ``pending``
    until the next logging point, because reading it would wait for the device.
    """

    def __init__(self) -> None:
        self._looks = 0
        self._sample: _Sample | None = None
        self.pending: list[tuple[str, Tensor]] = []
        """Name of a weight, and a 0-dim int64 on its device: not 0 if the weight was written."""

    @property
    def nbytes(self) -> int:
        """Bytes that are held between steps."""
        return 0 if self._sample is None else self._sample.bits.nbytes

    @staticmethod
    def is_due(steps: int) -> bool:
        """Whether to look after so many steps."""
        return steps < 16 or steps & (steps - 1) == 0 or steps in _ROUND_NUMBERS or steps % 1000 == 0

    def remember(self, steps: int, weights: Sequence[TrackedWeight]) -> None:
        """At the end of a step, take the sample that is looked at before the next one, if that is due."""
        self._sample = None
        if not weights or not self.is_due(steps):
            return
        self._looks += 1
        tracked = weights[self._looks % len(weights)]
        bits = _bits(tracked)
        if bits is not None:
            self._sample = _Sample(tracked.name, bits)

    def forget(self) -> None:
        """Drop the sample: what is written from now on is no surprise."""
        self._sample = None

    def find(self, weights: Iterable[TrackedWeight], is_unwritten: Callable[[TrackedWeight], bool]) -> str | None:
        """Before a step, compare the sample.

        Args:
            weights: Those of the step.
            is_unwritten: Whether a weight has not been written, as far as its version counter and its place tell.

        Returns:
            The name of a weight that was written all the same; None if there is none, or the answer is pending.
        """
        sample, self._sample = self._sample, None
        if sample is None:
            return None
        tracked = next((tracked for tracked in weights if tracked.name == sample.name), None)
        if tracked is None or not is_unwritten(tracked):
            return None
        bits = _bits(tracked)
        if bits is None or bits.shape != sample.bits.shape:
            return None
        if bits.device.type == "cpu":
            return None if torch.equal(bits, sample.bits) else sample.name
        self.pending.append((sample.name, (bits != sample.bits).any().to(torch.int64)))
        return None

    def answered(self, answers: Sequence[int]) -> str | None:
        """Take what ``pending`` turned out to be; the name of a weight that was written, if any was."""
        names = [name for (name, _), answer in zip(self.pending, answers, strict=True) if answer]
        self.pending = []
        return names[0] if names else None


def _bits(tracked: TrackedWeight) -> Tensor | None:
    """Elements from all over a weight, as integers; None where it is made of other tensors or has no elements."""
    weight = tracked.unwrapped()[0]
    if type(weight) is not Tensor or weight.numel() == 0 or weight.ndim == 0:
        return None
    side = max(1, int(_ELEMENTS ** (1 / weight.ndim)))
    index = tuple(slice(None, None, -(-size // side)) for size in weight.shape)
    return weight[index].clone(memory_format=torch.contiguous_format).view(_INTEGERS[weight.element_size()])
