"""The attributes and methods that both forms of tracking share."""

from __future__ import annotations

from weightflip import notebook
from weightflip.counting.tracker import WeightFlipTracker
from weightflip.records import RunInfo
from weightflip.session.session import Session


class Tracked:
    """Base class of the wrapped optimizer and of the handle returned by ``track_flips``."""

    _session: Session

    @property
    def info(self) -> RunInfo:
        """What is tracked and how, what is skipped and why. Print it to read it."""
        return self._session.info

    @property
    def tracker(self) -> WeightFlipTracker:
        """The tracker, which holds the counts."""
        return self._session.tracker

    def flush(self) -> None:
        """Write what was counted since the last record, and flush the sinks to disk."""
        self._session.flush()

    def close(self) -> None:
        """Write the last record and close the sinks. Later steps still count, and the next record reopens the sinks."""
        self._session.close()

    def _repr_html_(self) -> str:
        found = f"{type(self).__name__}: {len(self.info.tracked)} weights tracked, {len(self.info.skipped)} skipped"
        return notebook.page(notebook.folded(found, repr(self)), self.tracker._repr_html_())
