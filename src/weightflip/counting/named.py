"""Count one weight at a time, by name: a snapshot before the step, a comparison after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightflip import checks, distributed, functional, kernels
from weightflip.counting.layer import TrackedWeight
from weightflip.counting.ledger import COLUMNS, COUNTED, WEIGHT_STEPS
from weightflip.counting.table import LayerTable
from weightflip.quantizers.specs import resolve


@dataclass
class _Snapshot:
    codes: Tensor
    updated: Tensor | None
    updates: Tensor | None


class NamedSnapshots:
    """Snapshots that have not been compared yet.

    Args:
        layers: All layers, with their rows.
        scratch: Provides temporary buffers.
    """

    def __init__(self, layers: LayerTable, scratch: kernels.ScratchPool) -> None:
        self._layers, self._scratch = layers, scratch
        self._snapshots: dict[str, _Snapshot] = {}

    @property
    def codes(self) -> dict[str, Tensor]:
        """The codes of the snapshots, by name."""
        return {name: snapshot.codes for name, snapshot in self._snapshots.items()}

    def take(
        self, name: str, weight: Tensor, format: Any, scale: Tensor | float | None = None, grad: Tensor | None = None
    ) -> None:
        """As :meth:`WeightFlipTracker.snapshot_pre_step`."""
        checks.dense("weight", weight)
        if grad is not None and checks.tensor("grad", grad).shape != weight.shape:
            raise ValueError(
                f"the gradient of {name!r} has shape {tuple(grad.shape)}, but its weight has {tuple(weight.shape)}; "
                "pass the gradient of this weight"
            )
        quantizer = resolve(format, scale)
        tracked = TrackedWeight(name, weight, quantizer)
        if tracked.is_dtensor and distributed.layout(weight) is not None:
            raise ValueError(
                f"{name!r} is sharded over processes, which must count it together; use FlipTrackingOptimizer, or "
                "before_step and after_step"
            )
        codes = quantizer.encode(weight.detach()).ordinals.clone()
        updated = None if grad is None else (grad.to_dense() if grad.is_sparse else grad) != 0
        updates = None if updated is None else torch.count_nonzero(updated)
        self._layers.open(tracked, weight, quantizer)
        self._snapshots[name] = _Snapshot(codes, updated, updates)

    def compare(self, name: str, weight: Tensor, format: Any, scale: Tensor | float | None = None) -> int:
        """As :meth:`WeightFlipTracker.compute_flips_post_step`."""
        checks.dense("weight", weight)
        if name not in self._snapshots:
            raise KeyError(f"No pre-step snapshot for '{name}'. Call snapshot_pre_step before optimizer.step().")
        snapshot = self._snapshots[name]
        if snapshot.codes.shape != weight.shape:
            raise ValueError(
                f"Shape mismatch: the snapshot of '{name}' has {tuple(snapshot.codes.shape)}, "
                f"the weight has {tuple(weight.shape)}"
            )
        codes = resolve(format, scale).encode(weight.detach()).ordinals
        if codes.dtype != snapshot.codes.dtype:
            raise ValueError(
                f"the snapshot of '{name}' holds {snapshot.codes.dtype} codes, but format {format} gives "
                f"{codes.dtype}; use the same format in both calls"
            )
        row = self._layers[name].row
        assert row is not None
        counts = torch.zeros(COLUMNS, dtype=torch.int64, device=weight.device)
        functional.compare(snapshot.codes, codes, snapshot.updated, counts[COUNTED], self._scratch)
        counts[WEIGHT_STEPS].fill_(weight.numel())
        flips = int(counts[kernels.FLIPS].item())
        del self._snapshots[name]
        row.total.add_(counts)
        return flips

    def pending_updates(self) -> dict[str, int]:
        """Return the number of updates of each snapshot taken with a gradient. Synchronizes with the device."""
        return {name: int(of.updates.item()) for name, of in self._snapshots.items() if of.updates is not None}
