"""From the trackers to the sinks: the records of one optimizer, or of several that are one run."""

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
from weightflip.records import Counts, FlipRecord, RunInfo, shown, split_variant
from weightflip.selection import make_groups
from weightflip.session.alerts import AlertWatch
from weightflip.sinks import SinkGroup


class Source:
    """One optimizer's part of a run.

    Args:
        tracker: Of the optimizer.
        owner: What lives as long as its steps come.
        asked_groups: ``groups=``, as it was given.

    Attributes:
        is_broken: Whether a fault has ended its tracking.
    """

    def __init__(self, tracker: WeightFlipTracker, owner: object, asked_groups: object = None) -> None:
        self.info = RunInfo({}, {})
        self.groups: dict[str, tuple[str, ...]] = {}
        self.asked_groups = asked_groups
        self.is_broken = False
        self._tracker: WeightFlipTracker | None = tracker
        self._last = FlipRecord(0, ())
        self._last_totals: list[tuple[str, str, int, Counts]] = []
        self._owner: weakref.ref[object] | None = weakref.ref(owner)
        self._first_step = 0

    @property
    def is_live(self) -> bool:
        """Whether steps still come from here: not after its end, and not in a copy of another optimizer's log."""
        return self._owner is not None and self._owner() is not None

    def adopt(self, owner: object) -> None:
        self._owner = weakref.ref(owner)

    def record(self) -> FlipRecord:
        """What was counted; after the end, the totals of then."""
        if self._tracker is not None:
            record = self._tracker.record(may_be_empty=True)
            assert record is not None
            names = {split_variant(layer.name)[0] for layer in record.layers}
            self._last = replace(record, step=self._first_step + record.step, groups=restricted(self.groups, names))
        return self._last

    def totals(self) -> tuple[int, list[tuple[str, str, int, Counts]]]:
        """As :meth:`WeightFlipTracker.totals`; after the end, what they were then."""
        if self._tracker is not None:
            steps, layers = self._tracker.totals()
            return self._first_step + steps, layers
        return self._last.step, self._last_totals

    @property
    def is_sharded(self) -> bool:
        """Whether a record needs all processes."""
        return self._tracker is not None and self._tracker.is_sharded

    def synchronize(self) -> None:
        """Take part in a record that this process does not write."""
        if self._tracker is not None:
            self._tracker.synchronize(is_logging_point=True)

    def take_warnings(self) -> list[str]:
        """What the tracker has not warned about yet."""
        return [] if self._tracker is None else self._tracker.take_warnings()

    def follow(self, sources: Sequence[Source]) -> None:
        """Count steps on from where optimizers left that have all come to their end."""
        if not any(source.is_live for source in sources):
            self._first_step = max((source.record().step for source in sources), default=0)

    def end(self) -> None:
        """Keep plain numbers, and let tensors go."""
        with suppress(Exception):
            # Of a broken device none: the last record stays.
            steps, self._last_totals = self.totals()
            self._last = replace(self._last, step=steps)
        layers = (replace(layer, window=Counts(), nonfinite=0, gauges={}, histograms={}) for layer in self._last.layers)
        self._last = replace(self._last, layers=tuple(layers))
        self._tracker = self._owner = None

    def give_up_names(self, names: Set[str]) -> None:
        """After the end: another optimizer goes on with these weights."""
        self._last = replace(self._last, layers=tuple(x for x in self._last.layers if x.name not in names))
        self._last_totals = [total for total in self._last_totals if total[0] not in names]
        self.info = replace(self.info, tracked={k: v for k, v in self.info.tracked.items() if k not in names})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None}


class Log:
    """Takes records to the sinks: those of one optimizer, or of several that are one run, as one record."""

    def __init__(self, sinks: SinkGroup, *, is_wanted: bool) -> None:
        self.sinks = sinks
        self.alerts = AlertWatch()
        self.sources: list[Source] = []
        self.first_step = 0
        self.untold: list[str] = []
        self._is_wanted = is_wanted
        self._is_writer = True
        self._is_writing = False
        self._deferred: list[Callable[[], None]] = []

    def join(self, source: Source) -> None:
        """Take in an optimizer's part, with the weights that it has now.

        If it is new, and all others have come to their end, it goes on from them. Those at their end give up its
        weights.
        """
        if source not in self.sources:
            source.follow(self.sources)
            self.sources.append(source)
        for other in self.sources:
            if other is not source and not other.is_live:
                other.give_up_names(source.info.tracked.keys())

    def find_writer(self) -> bool:
        """Whether this process writes: of several, one does. Known from then on, also when they have parted."""
        self._is_writer = self._is_writer and distributed.is_writer()
        return self._is_writer

    def totals(self) -> tuple[int, list[tuple[str, str, int, Counts]]]:
        """Steps of the optimizer that has made most, and the totals of all layers."""
        parts = [source.totals() for source in self.sources]
        return max((steps for steps, _ in parts), default=0), [layer for _, layers in parts for layer in layers]

    def is_led_by(self, source: Source) -> bool:
        """Whether this optimizer's steps say when to write: the first one's that is still at work.

        A broken one leads on where weights are sharded: others, where it is not broken, write at its steps.
        """
        is_sharded = any(candidate.is_sharded for candidate in self.sources)
        leaders = (it for it in self.sources if it.is_live and (is_sharded or not it.is_broken))
        return next(leaders, None) is source

    def write(self) -> None:
        """Write what was counted since the last record, if anything.

        Where weights are sharded, every process comes here at the same steps, whether it writes or not, and takes part
        in exactly one collective for each optimizer.
        """
        if self._is_writing:
            # A sink or a callback that flushes or closes: what it would have written is being written.
            return
        self._is_writing = True
        try:
            self._write()
        finally:
            self._is_writing = False
            deferred, self._deferred = self._deferred, []
            for action in deferred:
                self._unless_warned(action)

    def _write(self) -> None:
        is_writer = self.find_writer()
        is_used = bool(self.sinks) or bool(self.alerts)
        if not any(source.is_sharded for source in self.sources) and not (is_writer and is_used):
            return
        is_read = self._is_wanted or bool(self.alerts)
        records: list[FlipRecord] = []
        faults: list[Exception] = []
        for source in self.sources:
            try:
                if is_read:
                    records.append(source.record())
                else:
                    source.synchronize()
            except Exception as error:
                # The next source has a collective, too. A broken one was warned about, and takes no other with it.
                if not source.is_broken:
                    faults.append(error)
        if faults:
            raise faults[0]
        if records and is_writer:
            merged = FlipRecord.merged(records)
            if merged.model.is_new:
                self._show(merged)

    def _show(self, record: FlipRecord) -> None:
        info = RunInfo.merged([source.info for source in self.sources])
        asked = [source.asked_groups for source in self.sources]
        if len(asked) > 1 and all(groups is None or groups == "blocks" for groups in asked):
            # What repeats shows in the names of all; one optimizer may have a single weight of each block.
            names = dict.fromkeys(split_variant(layer.name)[0] for layer in record.layers)
            groups = make_groups("blocks" if any(asked) else None, (), {}, tracked=list(names))
            record, info = replace(record, groups=groups), replace(info, groups=groups)
        self._unless_warned(self.sinks.write, record, info, self.first_step)
        for event in self.alerts.check(record):
            self._unless_warned(self.sinks.alert, event)
        self.untold += self.alerts.take_warnings()

    def _unless_warned(self, action: Callable[..., None], *args: Any) -> None:
        """A sink that fails is warned about: where that is an error, it is raised later."""
        try:
            action(*args)
        except Warning as error:
            self.untold.append(str(error))

    def tell(self) -> None:
        """Warn of what was found, now that no process waits for this one: a warning may be an error."""
        if self._is_writing:
            return
        self.untold[:0] = [text for source in self.sources for text in source.take_warnings()]
        while self.untold:
            # Out first: where a warning is an error, the others are for the next time.
            warnings.warn(shown(self.untold.pop(0)), stacklevel=2)

    def flush(self) -> None:
        """Have on disk what was written; where a sink or a callback asks for it, once the others have the record."""
        if self._is_writing:
            self._deferred.append(self.sinks.flush)
            return
        self.sinks.flush()
        self.tell()

    def close(self, *, together: bool = True) -> None:
        """Write the last record and let the sinks go.

        Args:
            together: Whether all processes do so now. If not, what a sharded run has counted since its last record is
                not written: the others would be waited for.
        """
        if self._is_writing:
            # Not while the record is on its way to the other sinks.
            self._deferred.append(self.sinks.close)
            return
        self._write_last(together)
        self.sinks.close()
        self.tell()

    def leave(self, source: Source, process: int, *, together: bool = False) -> None:
        """The end of one optimizer's part; with the last one, the sinks are closed."""
        if os.getpid() != process:
            # A forked process that ends: the record, and the threads that write it, are the parent's.
            return
        if self._is_writing:
            self._deferred.append(partial(self.leave, source, process))
            return
        self._write_last(together)
        untold = source.take_warnings()
        source.end()
        self.untold += untold
        if not any(source.is_live for source in self.sources):
            self.sinks.close()
        self.tell()

    def __getstate__(self) -> dict[str, Any]:
        # A copy that a callback makes.
        return {**self.__dict__, "_is_writing": False, "_deferred": []}

    def _write_last(self, together: bool) -> None:
        if not together and any(source.is_sharded for source in self.sources):
            return
        try:
            self.write()
        except Exception as error:
            self.untold.append(f"weightflip: the last record is lost: {type(error).__name__}: {error}")


def restricted(groups: Mapping[str, tuple[str, ...]], names: Set[str]) -> dict[str, tuple[str, ...]]:
    """What of the groups is among these names."""
    found = {group: tuple(name for name in members if name in names) for group, members in groups.items()}
    return {group: members for group, members in found.items() if members}
