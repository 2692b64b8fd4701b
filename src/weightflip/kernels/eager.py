"""Count in as few passes as eager torch allows, with reused buffers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weightflip.kernels.scratch import ScratchPool
from weightflip.kernels.slices import Index, slice_elements, slices

# Flags are bytes of 0 or 1. Up to 128 of them fit a byte when added, so 8 are added at a time as one int64.
_LANES = 128
_ALIGNMENT = 8 * _LANES


def count_(
    codes: Tensor, new: Callable[[Index], Tensor], update: Tensor | None, counts: Tensor, scratch: ScratchPool
) -> None:
    """Add flips, updates and stalled weights to ``counts``, and store the new codes in ``codes``, one slice at a time.

    Equal to :func:`weightflip.kernels.reference.count`. There is no device synchronization.

    Args:
        codes: Ordinals before the step; overwritten.
        new: Returns the ordinals after the step for a slice.
        update: The gradient, or a bool mask of the weights with an update, in the codes' shape. None: updates are not
            counted.
        counts: int64 of shape (3,), on the same device.
        scratch: Provides temporary buffers.
    """
    if codes.numel() == 0:
        return
    rows = 1 if update is None else 3
    limit = slice_elements(codes)
    # Backwards, because the computation of the amax has left the end of the weight in the cache.
    parts = list(slices(codes, limit))[::-1]
    padded = -(-min(limit, codes.numel()) // _ALIGNMENT) * _ALIGNMENT
    flags = scratch.flat("flags", rows * padded, torch.bool, codes.device).view(rows, padded)
    sums = scratch.flat("sums", len(parts) * rows * (padded // _ALIGNMENT), torch.int64, codes.device)
    sums = sums.view(len(parts), rows, -1)

    lanes = flags.view(torch.int64).view(rows, _LANES, -1)

    shape: torch.Size | None = None
    for part, index in enumerate(parts):
        before, after = codes[index], new(index)
        if after.shape != shape:
            shape, numel = after.shape, after.numel()
            flags[:, numel:].zero_()
            flipped, *rest = (row[:numel].view(shape) for row in flags)
        torch.ne(after, before, out=flipped)
        if update is not None:
            updated, stalled = rest
            # A conversion to bool is `!= 0` (NaN is True), five times faster on CPU than the comparison.
            updated.copy_(update[index])
            torch.gt(updated, flipped, out=stalled)
        torch.sum(lanes, dim=1, out=sums[part])
        before.copy_(after)

    # Each int64 sum holds eight counts, one per byte.
    counts[:rows].add_(sums.view(torch.uint8).sum((0, 2), dtype=torch.int64))


def keep_(codes: Tensor, new: Tensor, scratch: ScratchPool) -> Tensor:
    """Store the new codes in ``codes``, one slice at a time, and count how many differ. No device synchronization.

    Equal to the flips of :func:`weightflip.kernels.reference.count`.

    Args:
        codes: Old ordinals; overwritten.
        new: New ordinals, of the same shape and dtype.
        scratch: Provides temporary buffers.

    Returns:
        0-dim int64.
    """
    if codes.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=codes.device)
    # Smaller slices than above: the new codes are still in the cache when they are stored.
    limit = max(1, slice_elements(codes) // 4)
    padded = -(-min(limit, codes.numel()) // _ALIGNMENT) * _ALIGNMENT
    # The flags have the codes' dtype, since torch does not vectorize comparisons of wider integers with a bool result.
    flags = scratch.flat("kept", padded, codes.dtype, codes.device)
    lanes = flags.view(torch.int64).view(_LANES, -1)
    parts = list(slices(codes, limit))
    sums = scratch.flat("kept sums", len(parts) * lanes.size(1), torch.int64, codes.device).view(len(parts), -1)
    for part, index in enumerate(parts):
        before, after = codes[index], new[index]
        numel = after.numel()
        flags[numel:].zero_()
        torch.ne(before, after, out=flags[:numel].view(after.shape))
        torch.sum(lanes, dim=0, out=sums[part])
        before.copy_(after)
    # Each int64 sum holds several counts, each as wide as a code.
    return sums.view(torch.uint8 if codes.itemsize == 1 else codes.dtype).sum(dtype=torch.int64)
