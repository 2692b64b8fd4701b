"""Marks: the moments at which the training publishes its weights, for metric groups that compare them."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager

from weightflip import checks, distributed
from weightflip.counting.layer import Layer
from weightflip.counting.metric_runner import MetricRunner
from weightflip.counting.notices import Notices
from weightflip.counting.schedule import Schedule
from weightflip.counting.sharding import Sharding
from weightflip.counting.table import LayerTable

logger = logging.getLogger("weightflip")


class SyncMarks:
    """Knows when a mark is due, and passes the layers to the metric groups.

    Args:
        runner: The metric groups.
        schedule: Counts the steps.
        layers: All layers.
        notices: Collects warnings.
        every: Number of steps between two marks. None if the training calls ``mark_sync``.

    Raises:
        ValueError: ``every`` is given, but no metric group uses marks.
    """

    def __init__(
        self, runner: MetricRunner, schedule: Schedule, layers: LayerTable, notices: Notices, every: int | None
    ) -> None:
        self._runner, self._schedule, self._layers, self._notices = runner, schedule, layers, notices
        self._every = None if every is None else checks.whole_number("sync_every", every, 1)
        self._has_begun = self._is_requested = False
        self._logged: set[str] = set()
        if self._every is not None:
            self._check("sync_every=")

    def _check(self, what: str) -> None:
        if not self._runner.uses_marks:
            raise ValueError(f"{what} belongs to the groups 'sync' and 'touched'; add one of them to metrics=")

    def request(self) -> None:
        """Request a mark, to be made as soon as no step is in progress.

        Raises:
            ValueError: No metric group uses marks.
        """
        self._check("mark_sync()")
        self._is_requested = True

    @property
    def are_expected(self) -> bool:
        """Whether a mark is requested, or made every few steps."""
        return self._is_requested or self._every is not None

    def take_due(self) -> bool:
        """Return whether a mark is due now, and clear the request. A request that cannot be met is logged."""
        is_requested, self._is_requested = self._is_requested, False
        schedule = self._schedule
        if schedule.allows_marks:
            return is_requested or (
                self._every is not None and (schedule.steps - schedule.start_step) % self._every == 0
            )
        if is_requested:
            kind = "before the first step" if schedule.steps < schedule.start_step else "after the last step"
            span = f"start_step={schedule.start_step}"
            if schedule.end_step is not None:
                span += f" to end_step={schedule.end_step}"
            self._log_missing(kind, f"marks are made from {span}; to mark all syncs, leave out these options")
        return False

    def make_first_if_due(self, layers: Iterable[Layer], sharding: Sharding) -> None:
        """Make the mark that ``sync_every=`` needs before the first tracked step of a run.

        Args:
            layers: The layers of the step that begins, each with its current codes.
            sharding: Tells which layers are sharded.
        """
        is_first = self._every is not None and self._schedule.steps == self._schedule.start_step
        if is_first and not self._has_begun:
            with self.guarded():
                # A resumed run may have codes from a mark before start_step.
                self._forget_all()
                self.make(layers, sharding)

    def make(self, layers: Iterable[Layer], sharding: Sharding) -> None:
        """Make a mark. Other layers, such as frozen ones, start a new window at the next mark that includes them.

        Args:
            layers: The layers to mark, each with its current codes.
            sharding: Tells which layers are sharded.
        """
        self._has_begun = True
        marked = set()
        for layer in layers:
            self._runner.mark(layer, is_shard=layer.name in sharding)
            marked.add(layer.name)
        self._runner.end_mark()
        self._forget_all(marked)
        if not marked and self._every is None:
            self._log_missing(
                "no weights",
                "no weight is tracked at this time. Tracking may have ended, or all weights may be frozen or excluded; "
                "a WeightFlipTracker without an optimizer has weights once before_step() is called",
            )

    def _forget_all(self, marked: Container[str] = ()) -> None:
        """Start new windows, except for layers that are part of a mark."""
        for layer in self._layers.values():
            if layer.name not in marked:
                self._runner.forget_mark(layer)

    def _log_missing(self, kind: str, reason: str) -> None:
        """Log that a requested mark is not made, once for each kind of reason."""
        if kind not in self._logged and distributed.is_writer():
            logger.warning("weightflip: mark_sync() made no mark at step %d: %s", self._schedule.steps, reason)
        self._logged.add(kind)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn an error into a warning. All layers then start a new window at the next mark."""
        try:
            yield
        except Exception as error:
            # Some codes may be older than others.
            self._layers.invalidate()
            self._forget_all()
            self._notices.add(
                "a mark of mark_sync() or sync_every= failed, training continues, and the next mark starts a new "
                f"window: {type(error).__name__}: {error}"
            )
