"""Warnings that are deferred until no other process waits for this one."""

from __future__ import annotations

import warnings

from weightflip.records import printable


class Notices:
    """Collects warnings and issues them later.

    A warning that is configured to raise could otherwise keep this process from a collective that others wait for.

    Attributes:
        hold: Whether the owner takes the texts and warns itself; then ``flush`` does nothing.
    """

    def __init__(self) -> None:
        self.hold = False
        self._texts: list[str] = []

    def add(self, text: str) -> None:
        """Add a sentence."""
        self._texts.append(f"weightflip: {text}")

    def take(self) -> list[str]:
        """Return the pending texts and clear them."""
        texts, self._texts = [printable(text) for text in self._texts], []
        return texts

    def flush(self, stacklevel: int = 5) -> None:
        """Issue all pending warnings, unless they are held.

        Args:
            stacklevel: As in :func:`warnings.warn`. The default is the caller of a method of the tracker, which has two
                decorators.
        """
        if not self.hold:
            for text in self.take():
                warnings.warn(text, stacklevel=stacklevel)


class WarningsMixin:
    """The attributes and methods of a tracker that concern its warnings."""

    _notices: Notices

    @property
    def holds_warnings(self) -> bool:
        """Whether the caller takes the warnings, and issues them when no process waits for this one."""
        return self._notices.hold

    @holds_warnings.setter
    def holds_warnings(self, hold: bool) -> None:
        self._notices.hold = hold

    def take_warnings(self) -> list[str]:
        """Return the pending warnings, if ``holds_warnings`` is set."""
        return self._notices.take()
