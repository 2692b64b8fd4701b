"""What both forms show of the tracking behind them."""

from __future__ import annotations

from weightflip.counting.tracker import WeightFlipTracker
from weightflip.records import RunInfo
from weightflip.tracking import Tracking


class Tracked:
    """A tracked optimizer, or the handle of one."""

    _tracking: Tracking

    @property
    def info(self) -> RunInfo:
        """What is tracked and how, what is skipped and why; ``print`` shows it."""
        return self._tracking.info

    @property
    def tracker(self) -> WeightFlipTracker:
        """The numbers."""
        return self._tracking.tracker

    def flush(self) -> None:
        """Write what was counted since the last record, and have it on disk."""
        self._tracking.flush()

    def close(self) -> None:
        """Write the last record and close the sinks. Steps go on being counted, and open them again if they log."""
        self._tracking.log.close()
