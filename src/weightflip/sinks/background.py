"""Writing in a thread of its own, so that the training does not wait for files and pictures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

_found: ContextVar[list[str] | None] = ContextVar("found", default=None)


class BackgroundSink:
    """Base class of sinks whose ``write`` and ``alert`` may run in another thread than the training's.

    A :class:`~weightflip.sinks.SinkGroup` calls one method of a sink at a time, in order, and ``start``, ``flush`` and
    ``close`` in the training's thread. What such a sink warns of goes through :func:`warn`.
    """

    writes_in_background = True
    """Whether this one does; an instance may say no."""


class Worker:
    """Runs jobs in a thread, one after another. Jobs do not raise.

    The thread is started with the first job and ended by :meth:`close`. Where no thread can be started, which is so
    while the interpreter exits, jobs run at once. A copy, or a pickle, has no jobs.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []
        self._process = os.getpid()

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job done, after those before it."""
        try:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="weightflip-sinks")
                self._process = os.getpid()
            self._jobs.append(self._executor.submit(job))
        except RuntimeError:
            self.wait()
            job()

    def wait(self) -> None:
        """Return when all jobs are done. In a forked process there is no thread, and no job of the parent's is done."""
        if self._process != os.getpid():
            self._executor, self._jobs = None, []
        for future in self._jobs:
            future.result()
        self._jobs = []

    def close(self) -> None:
        """Wait, and end the thread; a later job starts another one."""
        self.wait()
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def __reduce__(self) -> tuple[type[Worker], tuple[()]]:
        return Worker, ()


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect what :func:`warn` says, in this thread, instead of showing it."""
    found: list[str] = []
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)


def warn(text: str, stacklevel: int = 2) -> None:
    """Warn; of a sink in a group, in the training's thread and when all sinks have the record."""
    found = _found.get()
    if found is None:
        warnings.warn(text, stacklevel=stacklevel + 1)
    else:
        found.append(text)
