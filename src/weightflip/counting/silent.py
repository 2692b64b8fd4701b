"""What follows from a weight that was written without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from weightflip.counting.canary import Canary
from weightflip.counting.layer import Layer, TrackedWeight
from weightflip.counting.notices import Notices
from weightflip.counting.table import LayerTable


class SilentWrites:
    """Asks the canary, and where it has noticed something, trusts no codes and says so once.

    In a sharded run other processes may not have noticed, so that what collectives depend on stays as it is.

    Args:
        layers: All layers.
        notices: Where it is said.
    """

    def __init__(self, layers: LayerTable, notices: Notices) -> None:
        self._layers, self._notices = layers, notices
        self._canary = Canary()
        self._has_told = False

    @property
    def nbytes(self) -> int:
        """Bytes that are held between steps."""
        return self._canary.nbytes

    def look(self, weights: Sequence[TrackedWeight]) -> None:
        """Before a step, at its weights."""
        self._found(self._canary.find(weights, self._is_unwritten))

    def _is_unwritten(self, tracked: TrackedWeight) -> bool:
        layer = self._layers.get(tracked.name)
        return layer is not None and layer.is_unwritten(tracked.parameter, tracked.unwrapped()[0])

    def remember(self, steps: int, layers: Sequence[Layer]) -> None:
        """At the end of a step, which has so many before it."""
        self._canary.remember(steps, [layer.tracked for layer in layers if layer.tracked is not None])

    @property
    def pending(self) -> list[Tensor]:
        """0-dim int64 tensors whose values ``answered`` wants to know."""
        return [answer for _, answer in self._canary.pending]

    def answered(self, values: Sequence[int]) -> None:
        """Take what was pending."""
        self._found(self._canary.answered(values))

    def forget(self) -> None:
        """What is written from now on is no surprise."""
        self._canary.forget()

    def release(self) -> None:
        """Begin anew, and hold nothing."""
        self._canary = Canary()

    def _found(self, written: str | None) -> None:
        if written is None:
            return
        self._layers.distrust()
        if not self._has_told:
            self._has_told = True
            self._notices.add(
                f"{written!r} was written between two steps in a way that leaves no trace, such as through "
                "its .data; such changes are counted as flips of the next step. Snapshots are taken anew where it is "
                "noticed; pass fresh_snapshots=True to take them anew in each step"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_canary": Canary()}
