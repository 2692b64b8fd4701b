"""Trace each executed line of the library, to raise at one of them."""

from __future__ import annotations

import sys
from pathlib import Path

import weightflip

SOURCE = str(Path(weightflip.__file__).parent)


class Traced:
    """Traces lines while its context is entered. Subclasses define ``_trace``, as in :func:`sys.settrace`."""

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exc_info):
        sys.settrace(None)
