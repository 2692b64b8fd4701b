"""All sinks of a run: a broken one does not stop a training, and the training does not wait for a slow one."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from weightflip.records import AlertEvent, FlipRecord, RunInfo, printable
from weightflip.sinks.background import BackgroundSink, Worker, collected_warnings
from weightflip.sinks.base import Sink

# Those of all runs that are not closed.
_at_work: weakref.WeakSet[SinkGroup] = weakref.WeakSet()


class SinkGroup:
    """All sinks of a run. A sink that raises is warned about once and dropped; the others go on.

    Records go to a :class:`~weightflip.sinks.background.BackgroundSink` in a thread of its own, which handles one
    record at a time: the next one waits for it. So a process that is killed loses at most one record more than it
    would without the thread. :meth:`flush` and :meth:`close` wait for all of them.

    Sinks that are open belong to the process that opened them: a forked one shares their files with it, and lacks their
    threads. There nothing is written, flushed or closed.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._started: RunInfo | None = None
        # Places that this group was warned to share with another one.
        self._shared: set[str] = set()
        self._process = os.getpid()
        self._has_told_of_fork = False
        self._busy: set[str] = set()
        self._worker = Worker()
        self._untold: list[str] = []

    def claim(self) -> None:
        """From here to ``close`` the places are this run's: warn if they are those of another one, too."""
        _at_work.add(self)
        others = [group for group in _at_work if group is not self]
        for place in sorted(self._places() - self._shared):
            sharing = [group for group in others if place in group._places()]
            if not sharing:
                continue
            for group in (self, *sharing):
                group._shared.add(place)
            warnings.warn(
                f"weightflip: {place!r}: another optimizer that is still tracked writes there, and the points of both "
                "are mixed; close() that one first, choose another place, or, if the two are parts of one run, give "
                "the first to the second: sinks=first",
                stacklevel=3,
            )

    def _places(self) -> set[str]:
        return {place for sink in self._sinks if (place := getattr(sink, "place", None)) is not None}

    def __bool__(self) -> bool:
        return bool(self._sinks)

    def write(self, record: FlipRecord, info: RunInfo, first_step: int) -> None:
        """Hand a record to each sink, with what is tracked first where that is news."""
        if self._is_of_parent():
            if self._sinks and not self._has_told_of_fork:
                self._has_told_of_fork = True
                warnings.warn(
                    "weightflip: forked process: its records are not written; build the tracked optimizer in the "
                    "child, or pass sinks= there",
                    stacklevel=3,
                )
            return
        self._worker.wait()
        is_news = info != self._started
        if is_news:
            self._started, self._process = info, os.getpid()
            self._each("start", info, first_step)
        self._hand("write", record)
        if is_news or self not in _at_work:
            # A default place is chosen at the first record. Not at work is a copy, or one that goes on after close().
            self.claim()

    def alert(self, event: AlertEvent) -> None:
        """Hand an event to each sink that takes them."""
        self._hand("alert", event)

    def flush(self) -> None:
        """Flush each sink, when it has its records."""
        self._worker.wait()
        self._each("flush")

    def close(self) -> None:
        """Close each sink that was started; a later record opens it again."""
        _at_work.discard(self)
        if self._started is not None and not self._is_of_parent():
            self._started = None
            self._worker.close()
            self._each("close")

    def _is_of_parent(self) -> bool:
        """Whether the sinks were opened before a fork, by the process that this one comes from."""
        return self._started is not None and self._process != os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        # Of sinks that are not writing. Their copies are closed.
        self._worker.wait()
        return {
            **self.__dict__,
            "_started": None,
            "_shared": set(),
            "_has_told_of_fork": False,
            "_busy": set(),
            "_untold": [],
        }

    def _hand(self, method: str, *args: Any) -> None:
        """Call a method of each sink, of those that can in the background."""
        sinks = [sink for sink in self._sinks if _writes_in_background(sink)]
        if sinks and not self._is_of_parent():
            self._worker.submit(partial(self._call, sinks, method, *args))
        self._each(method, *args, sinks=[sink for sink in self._sinks if sink not in sinks])

    def _each(self, method: str, *args: Any, sinks: Sequence[Sink] | None = None) -> None:
        """Call a method of each of the sinks, or of all, and warn of what was found."""
        if self._is_of_parent():
            return
        if method in self._busy:
            # A sink that flushes or closes all of them while it is itself flushed or closed.
            return
        self._busy.add(method)
        try:
            self._call(self._sinks if sinks is None else sinks, method, *args)
        finally:
            self._busy.discard(method)
        # After the last sink: a warning may be an error.
        untold = list(self._untold)
        del self._untold[: len(untold)]
        for text in untold:
            warnings.warn(printable(text), stacklevel=3)

    def _call(self, sinks: Sequence[Sink], method: str, *args: Any) -> None:
        for sink in list(sinks):
            if sink not in self._sinks or (method == "alert" and not hasattr(sink, method)):
                continue
            with collected_warnings() as found:
                try:
                    getattr(sink, method)(*args)
                except Warning as warning:
                    # No fault, but something that a sink has to say, where warnings are errors.
                    found.append(str(warning))
                except Exception as error:
                    self._sinks.remove(sink)
                    found.append(
                        f"weightflip: {type(sink).__name__} failed and gets no more records, training goes on: "
                        f"{type(error).__name__}: {error}"
                    )
            # In place: the training's thread may be taking some.
            self._untold.extend(found)


def _writes_in_background(sink: Sink) -> bool:
    return isinstance(sink, BackgroundSink) and sink.writes_in_background
