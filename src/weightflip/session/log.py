"""Pass records from the trackers to the sinks, for one optimizer or several that form one run."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from weightflip import distributed
from weightflip.counting.tracker import WeightFlipTracker
from weightflip.records import Counts, FlipRecord, RunInfo, printable, split_variant
from weightflip.selection import make_layer_groups
from weightflip.session.alerts import AlertWatch
from weightflip.sinks import SinkGroup


class Source:
    """One optimizer's part of a run.

    Args:
        tracker: The optimizer's tracker.
        owner: An object that lives as long as the optimizer is stepped.
        requested_groups: ``groups=``, as the user passed it.

    Attributes:
        is_broken: Whether a fault has ended its tracking.
    """

    def __init__(self, tracker: WeightFlipTracker, owner: object, requested_groups: object = None) -> None:
        self.info = RunInfo({}, {})
        self.groups: dict[str, tuple[str, ...]] = {}
        self.requested_groups = requested_groups
        self.is_broken = False
        self._tracker: WeightFlipTracker | None = tracker
        self._last = FlipRecord(0, ())
        self._last_totals: list[tuple[str, str, int, Counts]] = []
        self._owner: weakref.ref[object] | None = weakref.ref(owner)
        self._first_step = 0

    @property
    def is_live(self) -> bool:
        """Whether it can still make steps: not after its end, and not in a copy of another optimizer's log."""
        return self._owner is not None and self._owner() is not None

    def set_owner(self, owner: object) -> None:
        self._owner = weakref.ref(owner)

    def record(self) -> FlipRecord:
        """Return what was counted since the last record; after the end, only the final totals."""
        if self._tracker is not None:
            record = self._tracker.record(may_be_empty=True)
            assert record is not None
            names = {split_variant(layer.name)[0] for layer in record.layers}
            groups = restrict_groups(self.groups, names)
            self._last = replace(record, step=self._first_step + record.step, groups=groups)
        return self._last

    def totals(self) -> tuple[int, list[tuple[str, str, int, Counts]]]:
        """As :meth:`WeightFlipTracker.totals`; after the end, the final totals."""
        if self._tracker is not None:
            steps, layers = self._tracker.totals()
            return self._first_step + steps, layers
        return self._last.step, self._last_totals

    @property
    def is_sharded(self) -> bool:
        """Whether a record needs all processes."""
        return self._tracker is not None and self._tracker.is_sharded

    def synchronize(self) -> None:
        """Take part in the collective of a record that this process does not write."""
        if self._tracker is not None:
            self._tracker.synchronize(is_logging_point=True)

    def take_warnings(self) -> list[str]:
        """Return the tracker's pending warnings and clear them."""
        return [] if self._tracker is None else self._tracker.take_warnings()

    def free_memory(self) -> None:
        """After a fault, free the memory of the codes. If weights are sharded, still take part in collectives."""
        if self._tracker is not None:
            if self._tracker.is_sharded:
                # The other processes continue to count, and wait for this one in each step.
                self._tracker.abandon()
            else:
                self._tracker.drop_codes()

    def continue_from(self, sources: Sequence[Source]) -> None:
        """Continue the step count of other sources if all of them have ended."""
        if not any(source.is_live for source in sources):
            self._first_step = max((source.record().step for source in sources), default=0)

    def freeze(self) -> None:
        """Keep the final numbers and release the tensors."""
        with suppress(Exception):
            # A broken device has no totals; keep those of the last record.
            steps, self._last_totals = self.totals()
            self._last = replace(self._last, step=steps)
        layers = (replace(layer, window=Counts(), nonfinite=0, gauges={}, histograms={}) for layer in self._last.layers)
        self._last = replace(self._last, layers=tuple(layers))
        self._tracker = self._owner = None

    def drop_names(self, names: Set[str]) -> None:
        """After the end, drop the weights that another optimizer continues to track."""
        self._last = replace(self._last, layers=tuple(x for x in self._last.layers if x.name not in names))
        self._last_totals = [total for total in self._last_totals if total[0] not in names]
        self.info = replace(self.info, tracked={k: v for k, v in self.info.tracked.items() if k not in names})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None}


class Log:
    """Writes records to the sinks. Several optimizers that form one run write one common record.

    Args:
        sinks: The sinks of this process.
        has_sinks: Whether the run has sinks, even if this process does not write to them.
    """

    def __init__(self, sinks: SinkGroup, *, has_sinks: bool) -> None:
        self.sinks = sinks
        self.alerts = AlertWatch()
        self.sources: list[Source] = []
        self.first_step = 0
        self.pending_warnings: list[str] = []
        self._has_sinks = has_sinks
        self._is_writer = True
        self._is_writing = False
        self._known_effects: set[str] = set()
        """The effects of faults that were warned about. Others of the kind are likely at each record."""
        self._deferred: list[Callable[[], None]] = []

    def add_source(self, source: Source) -> None:
        """Add an optimizer, or update the weights it tracks.

        A new one continues the step count if all others have ended. Ended ones drop the weights that it tracks.
        """
        if source not in self.sources:
            source.continue_from(self.sources)
            self.sources.append(source)
        for other in self.sources:
            if other is not source and not other.is_live:
                other.drop_names(source.info.tracked.keys())

    def is_writer(self) -> bool:
        """Whether this process writes records. A False is remembered for when there is no process group any more."""
        self._is_writer = self._is_writer and distributed.is_writer()
        return self._is_writer

    @property
    def is_sharded(self) -> bool:
        """Whether a record needs all processes, because an optimizer of the run has sharded weights."""
        return any(source.is_sharded for source in self.sources)

    def totals(self) -> tuple[int, list[tuple[str, str, int, Counts]]]:
        """Return the largest step count of any optimizer, and the totals of all layers."""
        parts = [source.totals() for source in self.sources]
        return max((steps for steps, _ in parts), default=0), [layer for _, layers in parts for layer in layers]

    def is_leader(self, source: Source) -> bool:
        """Whether records are written at this optimizer's steps: the first one that is live and not broken.

        With sharded weights, a broken one can still lead: on other processes it may not be broken, and they write at
        its steps.
        """
        leaders = (it for it in self.sources if it.is_live and (self.is_sharded or not it.is_broken))
        return next(leaders, None) is source

    def write(self) -> None:
        """Write what was counted since the last record, if anything.

        With sharded weights, every process calls this at the same steps, whether it writes or not, and takes part in
        exactly one collective per optimizer.
        """
        if self._is_writing:
            # A sink or a callback called flush() or close(); the record is already being written.
            return
        self._is_writing = True
        try:
            self._write()
        finally:
            self._is_writing = False
            deferred, self._deferred = self._deferred, []
            for action in deferred:
                self._run_deferring_warnings(action)

    def _write(self) -> None:
        is_writer = self.is_writer()
        has_readers = bool(self.sinks) or bool(self.alerts)
        if not self.is_sharded and not (is_writer and has_readers):
            return
        needs_records = self._has_sinks or bool(self.alerts)
        records: list[FlipRecord] = []
        for source in self.sources:
            try:
                if needs_records:
                    records.append(source.record())
                else:
                    source.synchronize()
            except Exception as error:
                # Go on with the next source: its numbers are valid, and with sharded weights it has a collective.
                self.stop_tracking(source, error)
        if records and is_writer:
            try:
                self._send(records)
            except Exception as error:
                # The optimizers share this work: none of them stops. The next record has the totals.
                self._warn_of_fault("a record could not be written, tracking continues", error)

    def _send(self, records: Sequence[FlipRecord]) -> None:
        record = FlipRecord.merged(records)
        if not any(layer.is_new for layer in record.layers):
            return
        info = self._merge_info()
        requested = [source.requested_groups for source in self.sources]
        if len(requested) > 1 and all(groups is None or groups == "blocks" for groups in requested):
            # Find repeated model blocks in all names: one optimizer may hold only part of each block.
            names = dict.fromkeys(split_variant(layer.name)[0] for layer in record.layers)
            groups = make_layer_groups("blocks" if any(requested) else None, (), {}, tracked=list(names))
            record, info = replace(record, groups=groups), replace(info, groups=groups)
        self._run_deferring_warnings(self.sinks.write, record, info, self.first_step)
        for event in self.alerts.check(record):
            self._run_deferring_warnings(self.sinks.alert, event)
        self.pending_warnings += self.alerts.take_warnings()

    def _merge_info(self) -> RunInfo:
        """Describe the run. An optimizer whose description cannot be merged is left out of it."""
        infos = [source.info for source in self.sources]
        try:
            return RunInfo.merged(infos)
        except Exception as error:
            self._warn_of_fault("some of the tracked weights are written without their description", error)
        mergeable = []
        for info in infos:
            with suppress(Exception):
                mergeable.append(RunInfo.merged([info]))
        return RunInfo.merged(mergeable)

    def _warn_of_fault(self, effect: str, error: Exception) -> None:
        if effect not in self._known_effects:
            self._known_effects.add(effect)
            self.pending_warnings.append(f"weightflip: {effect}: {type(error).__name__}: {error}")

    def stop_tracking(self, source: Source, error: Exception) -> None:
        """End the tracking of an optimizer after a fault, with a warning about the first one. Never raises."""
        was_broken, source.is_broken = source.is_broken, True
        if not was_broken:
            self.pending_warnings.append(
                f"weightflip: tracking has stopped, training continues: {type(error).__name__}: {error}"
            )
        with suppress(Exception):
            source.free_memory()

    def _run_deferring_warnings(self, action: Callable[..., None], *args: Any) -> None:
        """Run an action, and keep its warning for later if warnings are configured to raise."""
        try:
            action(*args)
        except Warning as error:
            self.pending_warnings.append(str(error))

    def emit_warnings(self) -> None:
        """Issue the pending warnings. Not while other processes wait: warnings may be configured to raise."""
        if self._is_writing:
            return
        texts: list[str] = []
        for source in self.sources:
            texts += self._take_warnings(source)
        self.pending_warnings[:0] = texts
        while self.pending_warnings:
            # Remove it first: if the warning raises, the others are issued next time.
            warnings.warn(printable(self.pending_warnings.pop(0)), stacklevel=2)

    def _take_warnings(self, source: Source) -> list[str]:
        try:
            return source.take_warnings()
        except Exception as error:
            self.stop_tracking(source, error)
            return []

    def flush(self) -> None:
        """Flush the sinks. If a sink or callback calls this, the flush waits until all sinks have the record."""
        if self._is_writing:
            self._deferred.append(self.sinks.flush)
            return
        self._attempt("the sinks could not be flushed", self.sinks.flush)
        self.emit_warnings()

    def close(self, *, is_collective: bool = True) -> None:
        """Write the last record and close the sinks.

        Args:
            is_collective: Whether all processes do so now. If not, a sharded run does not write what it counted since
                its last record, since that would wait for the others.
        """
        if self._is_writing:
            # Wait until all sinks have the record.
            self._deferred.append(self.sinks.close)
            return
        self._attempt("the last record could not be written", self._write_last, is_collective)
        self._attempt("the sinks could not be closed", self.sinks.close)
        self.emit_warnings()

    def end_source(self, source: Source, process: int, *, is_collective: bool = False) -> None:
        """End one optimizer's part. With the last one, close the sinks."""
        if os.getpid() != process:
            # A forked process is ending: the record and the writer threads belong to its parent.
            return
        if self._is_writing:
            self._deferred.append(partial(self.end_source, source, process))
            return
        self._attempt("the last record could not be written", self._write_last, is_collective)
        self.pending_warnings += self._take_warnings(source)
        self._attempt("the final numbers could not be kept", source.freeze)
        self._attempt("the sinks could not be closed", self._close_after_last)
        self.emit_warnings()

    def __getstate__(self) -> dict[str, Any]:
        # A callback may make the copy, while a record is being written.
        return {**self.__dict__, "_is_writing": False, "_deferred": []}

    def _write_last(self, is_collective: bool) -> None:
        if is_collective or not self.is_sharded:
            self.write()

    def _close_after_last(self) -> None:
        if not any(source.is_live for source in self.sources):
            self.sinks.close()

    def _attempt(self, failure: str, action: Callable[..., None], *args: Any) -> None:
        """Run an action outside the steps. A fault becomes a warning, which begins with what has failed."""
        try:
            self._run_deferring_warnings(action, *args)
        except Exception as error:
            self.pending_warnings.append(f"weightflip: {failure}: {type(error).__name__}: {error}")


def restrict_groups(groups: Mapping[str, tuple[str, ...]], names: Set[str]) -> dict[str, tuple[str, ...]]:
    """Keep only these names in the layer groups, and drop groups that become empty."""
    found = {group: tuple(name for name in members if name in names) for group, members in groups.items()}
    return {group: members for group, members in found.items() if members}
