"""What a sink is, how one is found for what a user passes, and how a broken one is kept from stopping a training."""

from __future__ import annotations

import os
import pickle
import warnings
import weakref
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Protocol, TypeAlias, runtime_checkable

from weightflip import checks
from weightflip.records import AlertEvent, FlipRecord, RunInfo, shown


@runtime_checkable
class Sink(Protocol):
    """Takes records as they come. May raise: the error is warned about once, and the sink gets no more of them.

    A sink that also has a method ``alert(event)`` gets each :class:`~weightflip.AlertEvent`, after its record.
    """

    def start(self, info: RunInfo, first_step: int) -> None:
        """Called before the first record, and again when what is tracked changes.

        Args:
            info: What is tracked and how.
            first_step: The step number after which records come; not 0 in a resumed run.
        """
        ...

    def write(self, record: FlipRecord) -> None:
        """Take one record."""
        ...

    def flush(self) -> None:
        """Have everything on disk."""
        ...

    def close(self) -> None:
        """Flush and let go; a later ``start`` opens again."""
        ...


# Those of all runs that are not closed.
_at_work: weakref.WeakSet[SinkGroup] = weakref.WeakSet()

SinkLike: TypeAlias = "Sink | str | PathLike[str] | Callable[[FlipRecord], object] | Any"


class CallableSink:
    """Calls a function with each record."""

    def __init__(self, function: Callable[[FlipRecord], object]) -> None:
        self.function = function

    def __deepcopy__(self, memo: dict[int, Any]) -> CallableSink:
        return CallableSink(self.function)

    def __getstate__(self) -> dict[str, Any]:
        try:
            pickle.dumps(self.function)
        except Exception as error:
            warnings.warn(f"weightflip: a function in sinks= is not pickled with the optimizer: {error}", stacklevel=2)
            return {"function": _nowhere}
        return self.__dict__

    def start(self, info: RunInfo, first_step: int) -> None:
        """Nothing to open."""

    def write(self, record: FlipRecord) -> None:
        self.function(record)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing to close."""


def _nowhere(record: FlipRecord) -> None:
    """Stands in for a function that could not be pickled."""


def make_sink(spec: SinkLike) -> Sink:
    """The sink for one element of ``sinks=``.

    Args:
        spec: A ``Sink``, a ``SummaryWriter``, a ``wandb`` run, a path that ends in ``.jsonl`` or ``.csv``, or a
            function of a ``FlipRecord``.

    Raises:
        TypeError: Nothing of the above.
        ValueError: A path with another ending, or to a ``.csv`` file with other columns.
        OSError: A path that cannot be written.
    """
    from weightflip.sinks.csv import CSVSink
    from weightflip.sinks.jsonl import JSONLSink
    from weightflip.sinks.tensorboard import TensorBoardSink
    from weightflip.sinks.wandb import WandbSink

    if isinstance(spec, (str, PathLike)):
        path = checks.path("a path in sinks=", spec)
        if path.endswith(".jsonl"):
            return JSONLSink(path)
        if path.endswith(".csv"):
            return CSVSink(path)
        raise ValueError(
            f"a path in sinks= ends in .jsonl or .csv, got {path!r}; for a TensorBoard directory use log_dir="
        )
    if isinstance(spec, type):
        raise TypeError(f"sinks= takes instances, got the class {spec.__name__}; call it")
    if isinstance(spec, Sink):
        return spec
    if hasattr(spec, "add_scalar"):
        writer: Any = spec
        return TensorBoardSink(writer=writer)
    if hasattr(spec, "define_metric") and hasattr(spec, "step"):
        run: Any = spec
        return WandbSink(run)
    if callable(spec):
        return CallableSink(spec)
    raise TypeError(
        "sinks= takes SummaryWriters, wandb runs, paths that end in .jsonl or .csv, functions of a FlipRecord, or "
        f"objects with start, write, flush and close; got {type(spec).__name__}"
    )


def make_sinks(specs: Sequence[SinkLike]) -> list[Sink]:
    """The sinks for ``sinks=``.

    Raises:
        TypeError: As :func:`make_sink`.
        ValueError: As :func:`make_sink`; or one is there twice.
        OSError: As :func:`make_sink`.
    """
    sinks: list[Sink] = []
    seen: set[object] = set()
    for spec in specs:
        sink = make_sink(spec)
        keys = {id(spec), getattr(sink, "place", None)} - {None}
        if seen & keys:
            shown = repr(str(spec)) if isinstance(spec, (str, PathLike)) else checks.described(spec)
            raise ValueError(f"{shown} is twice in sinks=, and every point would be written twice; leave one out")
        seen |= keys
        sinks.append(sink)
    return sinks


class SinkGroup:
    """All sinks of a run. A sink that raises is warned about once and dropped; the others go on.

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
        is_news = info != self._started
        if is_news:
            self._started, self._process = info, os.getpid()
            self._each("start", info, first_step)
        self._each("write", record)
        if is_news or self not in _at_work:
            # A default place is chosen at the first record. Not at work is a copy, or one that goes on after close().
            self.claim()

    def alert(self, event: AlertEvent) -> None:
        """Hand an event to each sink that takes them."""
        self._each("alert", event)

    def flush(self) -> None:
        """Flush each sink."""
        self._each("flush")

    def close(self) -> None:
        """Close each sink that was started; a later record opens it again."""
        _at_work.discard(self)
        if self._started is not None and not self._is_of_parent():
            self._started = None
            self._each("close")

    def _is_of_parent(self) -> bool:
        """Whether the sinks were opened before a fork, by the process that this one comes from."""
        return self._started is not None and self._process != os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        # The copies of the sinks are closed.
        return {**self.__dict__, "_started": None, "_shared": set(), "_has_told_of_fork": False, "_busy": set()}

    def _each(self, method: str, *args: Any) -> None:
        if self._is_of_parent():
            return
        if method in self._busy:
            # A sink that flushes or closes all of them while it is itself flushed or closed.
            return
        self._busy.add(method)
        try:
            failed = self._failures(method, *args)
        finally:
            self._busy.discard(method)
        # After the last sink: a warning may be an error.
        for text in failed:
            warnings.warn(shown(text), stacklevel=3)

    def _failures(self, method: str, *args: Any) -> list[str]:
        failed: list[str] = []
        for sink in list(self._sinks):
            if method == "alert" and not hasattr(sink, method):
                continue
            try:
                getattr(sink, method)(*args)
            except Warning as warning:
                # No fault, but something that a sink has to say, where warnings are errors.
                failed.append(str(warning))
            except Exception as error:
                self._sinks.remove(sink)
                failed.append(
                    f"weightflip: {type(sink).__name__} failed and gets no more records, training goes on: "
                    f"{type(error).__name__}: {error}"
                )
        return failed
