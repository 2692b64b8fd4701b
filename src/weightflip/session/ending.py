"""The last record: written also where a script never calls ``close``."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Any

from weightflip.session.log import Log, Source


class Ending:
    """Writes what was counted last when the owner of a source is collected, or the interpreter exits."""

    def __init__(self, log: Log, source: Source) -> None:
        self._log = log
        self._source = source
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._has_logged = False

    def arrange(self, owner: object) -> None:
        """See to it, after each step of the owner; a copy that is thrown away before its first one writes nothing."""
        if self._finalizer is None:
            self._finalizer = weakref.finalize(owner, self._log.leave, self._source, os.getpid())
            self._come_before_others()
            # Asked now, since processes may part before they write.
            self._log.find_writer()

    def note_record(self) -> None:
        """A record was written, with which a sink may have arranged for an end of its own."""
        if not self._has_logged:
            self._has_logged = True
            self._come_before_others()

    def come(self, *, together: bool) -> None:
        """End now, and not again."""
        self._log.leave(self._source, os.getpid(), together=together)
        if self._finalizer is not None:
            self._finalizer.detach()

    def _come_before_others(self) -> None:
        """At exit, what was registered last runs first, and finalizers come where the first of all was made.

        So the last record is written before wandb closes its runs, be they begun before the first step or with the
        first record.
        """
        assert self._finalizer is not None
        atexit.register(self._finalizer)

    def __getstate__(self) -> dict[str, Any]:
        # A copy arranges for its own.
        return {**self.__dict__, "_finalizer": None, "_has_logged": False}
