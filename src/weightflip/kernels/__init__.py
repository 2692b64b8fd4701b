"""The hot path: compare codes, count, store. ``reference`` is the obvious version; ``eager`` equals it exactly."""

from __future__ import annotations

from weightflip.kernels.eager import count_
from weightflip.kernels.scratch import ScratchPool
from weightflip.kernels.slices import Index, slice_elements, slices, take

FLIPS, UPDATES, STALLED = range(3)
"""Columns of what ``count_`` adds to."""

__all__ = ["FLIPS", "STALLED", "UPDATES", "Index", "ScratchPool", "count_", "slice_elements", "slices", "take"]
