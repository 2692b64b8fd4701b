"""React to weights that were written without changing their version counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from weightflip.counting.canary import Canary
from weightflip.counting.layer import Layer, TrackedWeight
from weightflip.counting.notices import Notices
from weightflip.counting.table import LayerTable


class SilentWrites:
    """Uses the canary. When it detects a write, no kept codes are trusted any more, and the user is warned once.

    In a run with sharded weights, other processes may not have detected it, so nothing that collectives depend on
    changes.

    Args:
        layers: All layers.
        notices: Receives the warning.
    """

    def __init__(self, layers: LayerTable, notices: Notices) -> None:
        self._layers, self._notices = layers, notices
        self._canary = Canary()
        self._has_warned = False

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return self._canary.nbytes

    def check(self, weights: Sequence[TrackedWeight]) -> None:
        """Before a step, check its weights."""
        self._invalidate_codes(self._canary.find(weights, self._is_unwritten))

    def _is_unwritten(self, tracked: TrackedWeight) -> bool:
        layer = self._layers.get(tracked.name)
        return layer is not None and layer.is_unwritten(tracked.parameter, tracked.unwrapped()[0])

    def remember(self, steps: int, layers: Sequence[Layer]) -> None:
        """At the end of a step, take a sample if one is due after this number of steps."""
        is_due = self._canary.is_due(steps)
        weights = [layer.tracked for layer in layers if layer.tracked is not None] if is_due else []
        self._canary.remember(steps, weights)

    @property
    def pending(self) -> list[Tensor]:
        """0-dim int64 tensors whose values ``receive`` must receive."""
        return [answer for _, answer in self._canary.pending]

    def receive(self, values: Sequence[int]) -> None:
        """Receive the values of ``pending``."""
        self._invalidate_codes(self._canary.receive(values))

    def forget(self) -> None:
        """Expect writes from now on."""
        self._canary.forget()

    def release(self) -> None:
        """Start again, and hold nothing."""
        self._canary = Canary()

    def _invalidate_codes(self, written: str | None) -> None:
        if written is None:
            return
        self._layers.invalidate()
        if not self._has_warned:
            self._has_warned = True
            self._notices.add(
                f"{written!r} was written between two steps in a way that tracking cannot reliably detect, such as "
                "through its .data; undetected changes count as flips of the next step. Weights are encoded again "
                "when a write is detected; pass fresh_snapshots=True to encode them again before each step"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_canary": Canary()}
