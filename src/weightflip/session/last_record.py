"""Write the last record, even if the script never calls ``close``."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Any

from weightflip.session.log import Log, Source


class LastRecord:
    """Writes the last record when the owner of a source is garbage-collected or the interpreter exits."""

    def __init__(self, log: Log, source: Source) -> None:
        self._log = log
        self._source = source
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._has_logged = False

    def register(self, owner: object) -> None:
        """Register the finalizer, once; called after each step, so that a copy that never steps writes nothing."""
        if self._finalizer is None:
            self._finalizer = weakref.finalize(owner, self._log.end_source, self._source, os.getpid())
            self._run_before_other_exit_handlers()
            # Remember the answer: the process group may be destroyed before the last record.
            self._log.is_writer()

    def note_record(self) -> None:
        """Stay ahead of exit handlers that sinks may have registered when they wrote the first record."""
        if not self._has_logged:
            self._has_logged = True
            self._run_before_other_exit_handlers()

    def write_now(self, *, is_collective: bool) -> None:
        """Write the last record now instead of at exit."""
        self._log.end_source(self._source, os.getpid(), is_collective=is_collective)
        if self._finalizer is not None:
            self._finalizer.detach()

    def _run_before_other_exit_handlers(self) -> None:
        """Register with atexit again, since handlers run in reverse order of registration.

        All finalizers share one exit handler, registered with the first of them. Without this, wandb could close its
        runs before the last record is written, whether they started before the first step or with the first record.
        """
        assert self._finalizer is not None
        atexit.register(self._finalizer)

    def __getstate__(self) -> dict[str, Any]:
        # A copy registers its own finalizer.
        return {**self.__dict__, "_finalizer": None, "_has_logged": False}
