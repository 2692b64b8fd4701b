"""Marks: the moments at which the training publishes its weights, for the metric groups that compare them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from weightflip import checks
from weightflip.counting.layer import Layer
from weightflip.counting.metric_runner import MetricRunner
from weightflip.counting.notices import Notices
from weightflip.counting.schedule import Schedule
from weightflip.counting.shards import Shards
from weightflip.counting.table import LayerTable


class SyncMarks:
    """When marks are due, and who looks at them.

    Args:
        runner: The metric groups.
        schedule: Says which step it is.
        layers: All layers.
        notices: Where faults are noted.
        every: Steps from one mark to the next; None where the training says when.

    Raises:
        ValueError: Marks are asked for, and no metric group looks at them.
    """

    def __init__(
        self, runner: MetricRunner, schedule: Schedule, layers: LayerTable, notices: Notices, every: int | None
    ) -> None:
        self._runner, self._schedule, self._layers, self._notices = runner, schedule, layers, notices
        self._every = None if every is None else checks.whole("sync_every", every, 1)
        self._has_begun = self._is_asked = False
        if self._every is not None:
            self.check("sync_every=")

    def check(self, what: str) -> None:
        """Raise where nobody looks at marks.

        Args:
            what: What asks for them.
        """
        if not self._runner.looks_at_marks:
            raise ValueError(f"{what} belongs to the group 'sync', which is not asked for; add it to metrics=")

    def ask(self) -> None:
        """Have a mark made at the next moment at which one can be made."""
        self.check("mark_sync()")
        self._is_asked = True

    def take_due(self) -> bool:
        """Whether a mark has to be made now, which then is due no more."""
        is_asked, self._is_asked = self._is_asked, False
        is_due = is_asked or (self._every is not None and self._schedule.steps % self._every == 0)
        return is_due and self._schedule.takes_marks

    @property
    def is_first_due(self) -> bool:
        """Whether the first step of the run begins, before which the weights count as published."""
        steps = self._schedule.steps
        return self._every is not None and steps == 0 and not self._has_begun and self._schedule.takes_marks

    def make(self, layers: Iterable[Layer], shards: Shards) -> None:
        """Make a mark. A layer that is not there, such as a frozen one, begins its next window at a later mark.

        Args:
            layers: With their codes of now.
            shards: Say of which layers other processes have parts.
        """
        self._has_begun = True
        marked = set()
        for layer in layers:
            self._runner.mark(layer, is_shard=layer.name in shards)
            marked.add(layer.name)
        for layer in self._layers.values():
            if layer.name not in marked:
                self._runner.skip_mark(layer)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Where a mark cannot be made, training goes on, and windows begin anew."""
        try:
            yield
        except Exception as error:
            # Codes may be of now, or not yet.
            self._layers.distrust()
            for layer in self._layers.values():
                self._runner.skip_mark(layer)
            self._notices.add(
                f"a mark of mark_sync() or sync_every= is lost, the next one begins a window anew: "
                f"{type(error).__name__}: {error}"
            )
