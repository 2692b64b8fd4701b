"""Detect weights that were written through ``.data`` between two steps, which changes no version counter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightflip.counting.layer import TrackedWeight

# Maximum size of a sample: small enough not to affect the step time even of a small model.
_ELEMENTS = 4096
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Scripts write weights at round intervals, for example those of moving averages.
_ROUND_NUMBERS = frozenset(digit * 10**power for digit in (1, 2, 5) for power in range(3))


@dataclass(frozen=True)
class _Sample:
    """The bits of some elements of a weight at the end of a step. Not a view, which would hold the weight."""

    name: str
    bits: Tensor


class Canary:
    """Compares some elements of one weight before a step with their values at the end of the last step.

    It does so after each of the first 16 steps, after 2, 4, 8, ... and 10, 20, 50, ... steps, and then after every
    1,000, each time with the next weight. On the CPU the result is available immediately. On another device it stays in
    ``pending`` until the next logging point, because reading it would synchronize with the device.
    """

    def __init__(self) -> None:
        self._checks = 0
        self._sample: _Sample | None = None
        self.pending: list[tuple[str, Tensor]] = []
        """Name of a weight, and a 0-dim int64 tensor on its device, which is not 0 if the weight was written."""

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return 0 if self._sample is None else self._sample.bits.nbytes

    @staticmethod
    def is_due(steps: int) -> bool:
        """Whether to take a sample after this number of steps."""
        return steps < 16 or steps & (steps - 1) == 0 or steps in _ROUND_NUMBERS or steps % 1000 == 0

    def remember(self, steps: int, weights: Sequence[TrackedWeight]) -> None:
        """At the end of a step, take a sample to compare before the next step, if one is due."""
        self._sample = None
        if not weights or not self.is_due(steps):
            return
        self._checks += 1
        tracked = weights[self._checks % len(weights)]
        bits = _bits(tracked)
        if bits is not None:
            self._sample = _Sample(tracked.name, bits)

    def forget(self) -> None:
        """Drop the sample, since writes from now on are expected."""
        self._sample = None

    def find(self, weights: Iterable[TrackedWeight], is_unwritten: Callable[[TrackedWeight], bool]) -> str | None:
        """Before a step, compare the sample.

        Args:
            weights: The weights of the step.
            is_unwritten: Whether a weight is unwritten according to its version counter and data pointer.

        Returns:
            The name of a weight that was written nevertheless; None if there is none, or the result is pending.
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

    def receive(self, answers: Sequence[int]) -> str | None:
        """Receive the values of ``pending``, and return the name of a weight that was written, if any."""
        names = [name for (name, _), answer in zip(self.pending, answers, strict=True) if answer]
        self.pending = []
        return names[0] if names else None


def _bits(tracked: TrackedWeight) -> Tensor | None:
    """Return elements from all over a weight, as integers; None if it consists of other tensors or has no elements."""
    weight = tracked.unwrapped()[0]
    if type(weight) is not Tensor or weight.numel() == 0 or weight.ndim == 0:
        return None
    side = max(1, int(_ELEMENTS ** (1 / weight.ndim)))
    index = tuple(slice(None, None, -(-size // side)) for size in weight.shape)
    return weight[index].clone(memory_format=torch.contiguous_format).view(_INTEGERS[weight.element_size()])
