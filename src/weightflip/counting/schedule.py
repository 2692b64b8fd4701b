"""Which steps are tracked, and how many steps there were."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weightflip import checks


class Progress(NamedTuple):
    """The progress of a run. Replaced as a whole, so that after an interrupt a step is either counted or not."""

    steps: int = 0
    """Optimizer steps, skipped ones included."""
    skipped: Tensor | None = None
    """The number of skipped steps, 0-dim int64; None as long as no step can have been skipped."""
    is_committed: bool = True
    """Whether the ledgers have the totals that belong to this progress."""

    def next(self, valid: Tensor | None) -> Progress:
        """Return the progress after one more step.

        Args:
            valid: 0-dim, on any device: False if the step was skipped. None if it certainly was not.
        """
        skipped = self.skipped
        if valid is not None:
            more = valid.logical_not().to(torch.int64)
            skipped = more if skipped is None else skipped.to(more.device) + more
        return Progress(self.steps + 1, skipped)


class Schedule:
    """Tracks every n-th step in a range of steps.

    Args:
        track_every: Track every n-th step.
        start_step: The first step to track, counted from 0.
        end_step: The first step that is no longer tracked; None for no end.

    Attributes:
        progress: The progress of the run.
    """

    def __init__(self, track_every: int = 1, start_step: int = 0, end_step: int | None = None) -> None:
        self.track_every = checks.whole_number("track_every", track_every, 1)
        self._end_step: int | None = None
        self.start_step = start_step
        self.end_step = end_step
        self.progress = Progress()

    @property
    def start_step(self) -> int:
        """The first step to track."""
        return self._start_step

    @start_step.setter
    def start_step(self, value: int) -> None:
        value = checks.whole_number("start_step", value, 0)
        if self._end_step is not None and value >= self._end_step:
            raise ValueError(f"start_step= must be below end_step={self._end_step}, got {value}; set end_step first")
        self._start_step = value

    @property
    def end_step(self) -> int | None:
        """The first step that is no longer tracked."""
        return self._end_step

    @end_step.setter
    def end_step(self, value: int | None) -> None:
        self._end_step = None if value is None else checks.whole_number("end_step", value, self.start_step + 1)

    @property
    def steps(self) -> int:
        """Optimizer steps so far, skipped ones included."""
        return self.progress.steps

    @property
    def tracked_steps(self) -> int:
        """The number of tracked steps before the coming one, if that is tracked."""
        return (self.steps - self.start_step) // self.track_every

    def is_due(self, step: int | None = None) -> bool:
        """Whether a step, counted from 0, is tracked; by default the coming one."""
        # Called several times in each step, so without calls of its own.
        step, first, end = self.progress.steps if step is None else step, self._start_step, self._end_step
        return step >= first and (end is None or step < end) and (step - first) % self.track_every == 0

    def is_over(self, step: int | None = None) -> bool:
        """Whether neither a step nor any after it is tracked; by default the coming one."""
        return self.end_step is not None and (self.steps if step is None else step) >= self.end_step

    def completed(self) -> int:
        """Return the number of optimizer steps without skipped ones. Synchronizes if a step may have been skipped."""
        skipped = self.progress.skipped
        return self.steps - (0 if skipped is None else int(skipped.item()))

    @property
    def allows_marks(self) -> bool:
        """Whether the current step lies between ``start_step`` and ``end_step``, both included."""
        return self.steps >= self.start_step and (self.end_step is None or self.steps <= self.end_step)


class ScheduleMixin:
    """The attributes of a tracker that concern its schedule."""

    _schedule: Schedule

    @property
    def is_tracking(self) -> bool:
        """Whether the coming step is tracked."""
        return self._schedule.is_due()

    @property
    def step_count(self) -> int:
        """Optimizer steps so far, without skipped ones. Synchronizes if steps may have been skipped."""
        return self._schedule.completed()

    @property
    def track_every(self) -> int:
        """The interval between tracked steps."""
        return self._schedule.track_every

    @track_every.setter
    def track_every(self, value: int) -> None:
        self._schedule.track_every = checks.whole_number("track_every", value, 1)

    @property
    def start_step(self) -> int:
        """The first step to track."""
        return self._schedule.start_step

    @start_step.setter
    def start_step(self, value: int) -> None:
        self._schedule.start_step = value

    @property
    def end_step(self) -> int | None:
        """The first step that is no longer tracked; None for no end."""
        return self._schedule.end_step

    @end_step.setter
    def end_step(self, value: int | None) -> None:
        self._schedule.end_step = value
