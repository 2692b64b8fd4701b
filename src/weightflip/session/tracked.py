"""What both forms show of the tracking behind them."""

from __future__ import annotations

from weightflip import notebook
from weightflip.counting.tracker import WeightFlipTracker
from weightflip.records import RunInfo
from weightflip.session.session import Session


class Tracked:
    """A tracked optimizer, or the handle of one."""

    _session: Session

    @property
    def info(self) -> RunInfo:
        """What is tracked and how, what is skipped and why; ``print`` shows it."""
        return self._session.info

    @property
    def tracker(self) -> WeightFlipTracker:
        """The numbers."""
        return self._session.tracker

    def flush(self) -> None:
        """Write what was counted since the last record, and have it on disk."""
        self._session.flush()

    def close(self) -> None:
        """Write the last record and close the sinks. Steps go on being counted, and open them again if they log."""
        self._session.close()

    def _repr_html_(self) -> str:
        found = f"{type(self).__name__}: {len(self.info.tracked)} weights tracked, {len(self.info.skipped)} skipped"
        return notebook.page(notebook.folded(found, repr(self)), self.tracker._repr_html_())
