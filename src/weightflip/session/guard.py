"""Contain faults in tracking: they must not stop training or leave other processes waiting."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from weightflip.counting.tracker import WeightFlipTracker
from weightflip.session.log import Log, Source
from weightflip.session.weights import Weights


class Guard:
    """Runs the parts of a step. A fault in one of them ends tracking, with one warning.

    A fault while tracking ends is suppressed: what is left to do then is to free memory.
    """

    def __init__(self, tracker: WeightFlipTracker, weights: Weights, log: Log, source: Source) -> None:
        self._tracker = tracker
        self._weights = weights
        self._log = log
        self._source = source

    def run(self, action: Callable[..., None], *args: Any) -> None:
        """Run an action whose faults must not stop training, unless tracking has ended on all processes."""
        try:
            if not self._source.is_broken or self._log.is_sharded:
                action(*args)
        except Exception as error:
            self._stop_tracking(error)

    def contain(self, action: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """As :meth:`run`, but also after tracking has ended."""
        try:
            action(*args, **kwargs)
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
        with suppress(Exception):
            self._log.stop_tracking(self._source, error)
        with suppress(Exception):
            # The other processes of a sharded run continue to count, and wait for this one in each step.
            if not self._tracker.is_sharded:
                self._weights.release()


def run_outside_graphs(action: Callable[..., None], *args: Any) -> None:
    """Run an action outside the graphs of torch.compile."""
    if torch.compiler.is_compiling():
        # A graph would read a weight's data pointer and version only once, while it is traced. So in a compiled
        # training step, tracking runs between two graphs. This is not a decorator because that imports torch's
        # compiler, which takes as long as importing torch.
        torch.compiler.disable(action)(*args)  # type: ignore[no-untyped-call]
    else:
        action(*args)
