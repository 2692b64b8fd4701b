"""All sinks of a run. A failing sink does not stop training, and training does not wait for a slow one."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from weightflip.records import AlertEvent, FlipRecord, RunInfo, printable
from weightflip.sinks.background import BackgroundSink, Worker, collect_warnings
from weightflip.sinks.base import Sink

_open_groups: weakref.WeakSet[SinkGroup] = weakref.WeakSet()


class SinkGroup:
    """All sinks of a run. A sink that raises is dropped with one warning; the others continue.

    Each :class:`~weightflip.sinks.background.BackgroundSink` gets its records in a background thread, which handles one
    record at a time: the next record waits for it. So a killed process loses at most one record more than without the
    thread. :meth:`flush` and :meth:`close` wait for all records.

    Open sinks belong to the process that opened them. A forked process shares their files but lacks their threads, so
    nothing is written, flushed or closed there.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._started_info: RunInfo | None = None
        # Destinations shared with another group, about which there was a warning.
        self._warned_destinations: set[str] = set()
        self._process = os.getpid()
        self._has_warned_of_fork = False
        self._running: set[str] = set()
        self._worker = Worker()
        self._pending_warnings: list[str] = []

    def claim(self) -> None:
        """Reserve the destinations until ``close``. Warn if another open group writes to one of them."""
        _open_groups.add(self)
        others = [group for group in _open_groups if group is not self]
        for destination in sorted(self._destinations() - self._warned_destinations):
            sharing = [group for group in others if destination in group._destinations()]
            if not sharing:
                continue
            for group in (self, *sharing):
                group._warned_destinations.add(destination)
            warnings.warn(
                f"weightflip: {destination!r}: another tracked optimizer also writes there, and the points of both are "
                "mixed; close() it first, choose another path, or, if both belong to one run, pass the first to the "
                "second: sinks=first",
                stacklevel=3,
            )

    def _destinations(self) -> set[str]:
        return {path for sink in self._sinks if (path := getattr(sink, "destination", None)) is not None}

    def __bool__(self) -> bool:
        return bool(self._sinks)

    def write(self, record: FlipRecord, info: RunInfo, first_step: int) -> None:
        """Pass a record to each sink, preceded by ``start`` if ``info`` has changed."""
        if self._belongs_to_parent():
            if self._sinks and not self._has_warned_of_fork:
                self._has_warned_of_fork = True
                warnings.warn(
                    "weightflip: records of a forked process are not written; create the tracked optimizer in the "
                    "child process, or pass sinks= there",
                    stacklevel=3,
                )
            return
        self._worker.wait()
        is_new_info = info != self._started_info
        if is_new_info:
            self._started_info, self._process = info, os.getpid()
            self._call_sinks("start", info, first_step)
        self._dispatch("write", record)
        if is_new_info or self not in _open_groups:
            # The first record may choose a default destination. Copies and groups used after close() are not open.
            self.claim()

    def alert(self, event: AlertEvent) -> None:
        """Pass an event to each sink with an ``alert`` method."""
        self._dispatch("alert", event)

    def flush(self) -> None:
        """Wait for pending records, then flush each sink."""
        self._worker.wait()
        self._call_sinks("flush")

    def close(self) -> None:
        """Close each started sink. A later record opens it again."""
        _open_groups.discard(self)
        if self._started_info is not None and not self._belongs_to_parent():
            self._started_info = None
            self._worker.close()
            self._call_sinks("close")

    def _belongs_to_parent(self) -> bool:
        """Whether the parent process opened the sinks before a fork."""
        return self._started_info is not None and self._process != os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        # Copy sinks only when idle. The copies are closed.
        self._worker.wait()
        return {
            **self.__dict__,
            "_started_info": None,
            "_warned_destinations": set(),
            "_has_warned_of_fork": False,
            "_running": set(),
            "_pending_warnings": [],
        }

    def _dispatch(self, method: str, *args: Any) -> None:
        """Call a method of each sink, in the background for sinks that support it."""
        sinks = [sink for sink in self._sinks if _writes_in_background(sink)]
        if sinks and not self._belongs_to_parent():
            self._worker.submit(partial(self._call_each, sinks, method, *args))
        self._call_sinks(method, *args, sinks=[sink for sink in self._sinks if sink not in sinks])

    def _call_sinks(self, method: str, *args: Any, sinks: Sequence[Sink] | None = None) -> None:
        """Call a method of the given sinks, by default all, and issue collected warnings."""
        if self._belongs_to_parent():
            return
        if method in self._running:
            # A sink flushes or closes the whole group from its own flush() or close().
            return
        self._running.add(method)
        try:
            self._call_each(self._sinks if sinks is None else sinks, method, *args)
        finally:
            self._running.discard(method)
        # After the last sink, since warnings may be turned into errors.
        pending = list(self._pending_warnings)
        del self._pending_warnings[: len(pending)]
        for text in pending:
            warnings.warn(printable(text), stacklevel=3)

    def _call_each(self, sinks: Sequence[Sink], method: str, *args: Any) -> None:
        for sink in list(sinks):
            if sink not in self._sinks or (method == "alert" and not hasattr(sink, method)):
                continue
            with collect_warnings() as collected:
                try:
                    getattr(sink, method)(*args)
                except Warning as warning:
                    # Not a failure: the sink issued a warning, and warnings are errors.
                    collected.append(str(warning))
                except Exception as error:
                    self._sinks.remove(sink)
                    collected.append(
                        f"weightflip: {type(sink).__name__} failed and gets no more records, training continues: "
                        f"{type(error).__name__}: {error}"
                    )
            # In place: the training thread may be removing entries.
            self._pending_warnings.extend(collected)


def _writes_in_background(sink: Sink) -> bool:
    return isinstance(sink, BackgroundSink) and sink.writes_in_background
