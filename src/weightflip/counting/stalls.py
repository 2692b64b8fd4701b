"""Predict stalls: whether an update would change the code at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weightflip import checks
from weightflip.quantizers.specs import resolve


class BitStallDetector:
    """Predicts stalls: whether an update would change the code at all.

    While :class:`WeightFlipTracker` measures what a step did, this predicts the effect of any update you pass.

    Args:
        format: A quantizer name, ``FloatFormat``, quantizer object or function.
        scale: What weights are divided by before rounding, instead of the format's own rule.

    Attributes:
        stall_count: Stalled updates so far.
        total_count: Attempted updates so far.

    Raises:
        ValueError: Unknown format, or a scale for a format that takes none.

    Example:
        >>> detector = BitStallDetector("bfloat16")
        >>> detector.update(torch.ones(4), torch.tensor([0.0, 0.001, 0.004, 0.01]))
        (1, 3)
        >>> detector.get_stall_rate()
        0.3333333333333333
    """

    def __init__(self, format: Any, scale: Tensor | float | None = None) -> None:
        self.quantizer = resolve(format, scale)
        self.reset()

    def reset(self) -> None:
        """Reset both counts to 0."""
        self.stall_count = 0
        self.total_count = 0

    @torch.no_grad()
    def update(self, weight: Tensor, update: Tensor) -> tuple[int, int]:
        """Count the updates that would be lost to rounding, and add them to the counts so far.

        Args:
            weight: A floating-point tensor of any shape.
            update: What would be added to it, such as ``-lr * grad``; of the same shape. The sum is computed in the
                weight's dtype.

        Returns:
            The numbers of stalled and attempted updates: weights with ``update != 0`` that keep their code, and weights
            with ``update != 0``.

        Raises:
            TypeError: An argument is not a tensor.
            ValueError: The shapes differ.
        """
        checks.tensor("weight", weight)
        checks.tensor("update", update)
        if weight.shape != update.shape:
            raise ValueError(f"Shape mismatch: weight has {tuple(weight.shape)}, update has {tuple(update.shape)}")
        before = self.quantizer.encode(weight.detach()).ordinals
        after = self.quantizer.encode((weight + update).to(weight.dtype)).ordinals
        attempted = update != 0
        stalled = int(torch.count_nonzero(attempted & (before == after)).item())
        total = int(torch.count_nonzero(attempted).item())
        self.stall_count += stalled
        self.total_count += total
        return stalled, total

    def get_stall_rate(self) -> float:
        """Return stalled / attempted updates over all calls; 0.0 without updates."""
        return self.stall_count / self.total_count if self.total_count else 0.0
