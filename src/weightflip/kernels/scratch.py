"""Reusable buffers, because large allocations cost more than the arithmetic on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ScratchPool:
    """Holds one buffer per slot, dtype and device, as large as the largest request so far."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, torch.device, torch.Size], Tensor] = {}

    def __call__(self, slot: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a contiguous buffer with the shape and device of ``like``, valid until the next call for this slot."""
        key = (slot, dtype, like.device, like.shape)
        view = self._views.get(key)
        if view is None:
            # Kept, because making a view costs as much as a small slice's arithmetic.
            view = self._views[key] = self.flat(slot, like.numel(), dtype, like.device).view(like.shape)
        return view

    def flat(self, slot: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a 1-d buffer of ``numel`` elements."""
        key = (slot, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[key] = torch.empty(numel, dtype=dtype, device=device)
            self._views.clear()
        return buffer[:numel]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def clear(self) -> None:
        """Release all buffers."""
        self._buffers.clear()
        self._views.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"_buffers": {}, "_views": {}}
