"""The simple version of counting. All faster versions equal it bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor


def count(old: Tensor, new: Tensor, update: Tensor | None = None) -> Tensor:
    """Count flips, updates and stalled weights between two sets of codes.

    Args:
        old: Ordinals before the step.
        new: Ordinals after it, of the same shape.
        update: The gradient, or a bool mask of the weights with an update. None: updates are not counted.

    Returns:
        int64 of shape (3,): weights whose code changed, weights with ``update != 0``, and those of them that kept
        their code.
    """
    flipped = old != new
    updated = torch.zeros_like(flipped) if update is None else update != 0
    return torch.stack([flipped.sum(), updated.sum(), (updated & ~flipped).sum()])
