"""What a fault in tracking may not do: stop a training, or leave other processes waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from weightflip.counting.tracker import WeightFlipTracker
from weightflip.session.log import Log, Source
from weightflip.session.weights import Weights


class Guard:
    """Runs the parts of a step: a fault in one is warned about once, and ends tracking."""

    def __init__(self, tracker: WeightFlipTracker, weights: Weights, log: Log, source: Source) -> None:
        self._tracker = tracker
        self._weights = weights
        self._log = log
        self._source = source

    def run(self, action: Callable[..., None], *args: Any) -> None:
        """Run something that must not stop a training."""
        if self._source.is_broken and not self._tracker.is_sharded:
            return
        try:
            action(*args)
        except Exception as error:
            self._stop(error)

    def attempt(self, action: Callable[..., None], *args: Any, **kwargs: Any) -> bool:
        """Do a part of a step. Where other processes wait for what follows, a fault in it ends tracking only.

        Returns:
            Whether it was done.
        """
        try:
            action(*args, **kwargs)
        except Exception as error:
            if not self._tracker.is_sharded:
                raise
            self._stop(error)
            return False
        return True

    def _stop(self, error: Exception) -> None:
        was_broken, self._source.is_broken = self._source.is_broken, True
        if self._tracker.is_sharded:
            # Other processes count on, and wait for this one in each step.
            self._tracker.abandon()
        else:
            self._tracker.drop_codes()
            self._weights.release()
        if not was_broken:
            self._log.untold.append(
                f"weightflip: tracking has stopped, training goes on: {type(error).__name__}: {error}"
            )


def outside_of_graphs(action: Callable[..., None], *args: Any) -> None:
    """Run something that torch.compile leaves alone."""
    if torch.compiler.is_compiling():
        # Inside a compiled training step, tracking runs between two graphs: a graph would read a weight's data
        # pointer and version once, while it is traced. Not a decorator: that imports torch's compiler, which takes
        # as long as the whole of torch.
        torch.compiler.disable(action)(*args)  # type: ignore[no-untyped-call]
    else:
        action(*args)
