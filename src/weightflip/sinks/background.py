"""Writing in a background thread, so that training does not wait for files and pictures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


class BackgroundSink:
    """Base class of sinks whose ``write`` and ``alert`` may run outside the training thread.

    A :class:`~weightflip.sinks.SinkGroup` calls one method of a sink at a time, in order. It calls ``start``, ``flush``
    and ``close`` in the training thread. These sinks must issue warnings through :func:`warn`.
    """

    writes_in_background = True
    """Whether this sink may run in the background. Instances can override it."""


class Worker:
    """Runs jobs in a thread, one after another. Jobs must not raise.

    The thread starts with the first job and ends with :meth:`close`. If no thread can be started, as during interpreter
    exit, jobs run immediately. A copied or unpickled worker has no jobs.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []
        self._process = os.getpid()

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job after the earlier ones."""
        try:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="weightflip-sinks")
                self._process = os.getpid()
            self._jobs.append(self._executor.submit(job))
        except RuntimeError:
            self.wait()
            job()

    def wait(self) -> None:
        """Return when all jobs are done. A forked process has no thread and drops the jobs of its parent."""
        if self._process != os.getpid():
            self._executor, self._jobs = None, []
        for future in self._jobs:
            future.result()
        self._jobs = []

    def close(self) -> None:
        """Wait for all jobs and end the thread. A later job starts a new one."""
        self.wait()
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def __reduce__(self) -> tuple[type[Worker], tuple[()]]:
        return Worker, ()


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Collect the warnings from :func:`warn` in this thread instead of issuing them."""
    collected: list[str] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


def warn(text: str, stacklevel: int = 2) -> None:
    """Warn. In a sink group, the warning is issued later in the training thread, once all sinks have the record."""
    collected = _collected.get()
    if collected is None:
        warnings.warn(text, stacklevel=stacklevel + 1)
    else:
        collected.append(text)
