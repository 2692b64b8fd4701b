"""Contain faults in tracking: they must not stop training or leave other processes waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from weightflip.counting.tracker import WeightFlipTracker
from weightflip.session.log import Log, Source
from weightflip.session.weights import Weights


class Guard:
    """Runs the parts of a step. A fault in one of them ends tracking, with one warning."""

    def __init__(self, tracker: WeightFlipTracker, weights: Weights, log: Log, source: Source) -> None:
        self._tracker = tracker
        self._weights = weights
        self._log = log
        self._source = source

    def run(self, action: Callable[..., None], *args: Any) -> None:
        """Run an action whose faults must not stop training."""
        if self._source.is_broken and not self._log.is_sharded:
            return
        try:
            action(*args)
        except Exception as error:
            self._stop_tracking(error)

    def attempt(self, action: Callable[..., None], *args: Any, **kwargs: Any) -> bool:
        """Run a part of a step, which a broken tracker without sharded weights skips.

        In a run with sharded weights, a fault ends tracking but does not skip the rest of the step: other processes
        wait for this one in the parts that follow, or in the record, if this optimizer's steps lead to records.

        Returns:
            Whether the action succeeded.
        """
        if self._source.is_broken and not self._tracker.is_sharded:
            return False
        try:
            action(*args, **kwargs)
        except Exception as error:
            if not self._log.is_sharded:
                raise
            self._stop_tracking(error)
            return False
        return True

    def _stop_tracking(self, error: Exception) -> None:
        was_broken, self._source.is_broken = self._source.is_broken, True
        if self._tracker.is_sharded:
            # The other processes continue to count, and wait for this one in each step.
            self._tracker.abandon()
        else:
            self._tracker.drop_codes()
            self._weights.release()
        if not was_broken:
            self._log.pending_warnings.append(
                f"weightflip: tracking has stopped, training continues: {type(error).__name__}: {error}"
            )


def run_outside_graphs(action: Callable[..., None], *args: Any) -> None:
    """Run an action outside the graphs of torch.compile."""
    if torch.compiler.is_compiling():
        # A graph would read a weight's data pointer and version only once, while it is traced. So in a compiled
        # training step, tracking runs between two graphs. This is not a decorator because that imports torch's
        # compiler, which takes as long as importing torch.
        torch.compiler.disable(action)(*args)  # type: ignore[no-untyped-call]
    else:
        action(*args)
