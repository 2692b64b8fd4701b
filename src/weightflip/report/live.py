"""What moves on a terminal: a bar while much is read, and a report that is drawn again as points come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from weightflip.report.findings import find
from weightflip.report.read import size_of
from weightflip.report.run import Run
from weightflip.report.terminal import parts_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Bytes that take more than a moment.
_MUCH = 30_000_000


@contextmanager
def reading(paths: Sequence[str], console: Console | None) -> Iterator[Callable[[float], object]]:
    """A bar while much is read, on a terminal; gone afterwards.

    Args:
        paths: What is read.
        console: Where to; None for nowhere.

    Yields:
        What to call with a number of bytes, each time that so many more are read.
    """
    size = size_of(paths)
    if size < _MUCH or console is None or not console.is_terminal:
        yield lambda size: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading", total=size)
        yield lambda size: progress.advance(task, size)


def watch(reports: Iterable[Sequence[Run]], console: Console) -> None:
    """Draw the report of some runs again and again, until it is interrupted; then leave the last one.

    Args:
        reports: As of :func:`weightflip.report.follow.follow`.
        console: Where to. What is no terminal gets each report below the one before.
    """
    if not console.is_terminal:
        with suppress(KeyboardInterrupt):
            for runs in reports:
                _print(console, runs)
        return
    from rich.console import Group
    from rich.live import Live

    last: Sequence[Run] = ()
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False, transient=True) as live:
        for runs in reports:
            last = runs or last
            drawn = Group(_when(runs), *parts_of(console, runs, find(runs))) if runs else _when(runs)
            live.update(drawn, refresh=True)
    if last:
        _print(console, last)


def _when(runs: Sequence[Run]) -> Text:
    from rich.text import Text

    points = f"up to step {max(run.end for run in runs):,}" if runs else "no points yet"
    return Text(f"Read at {time.strftime('%H:%M:%S')}, {points}. Ctrl+C ends.")


def _print(console: Console, runs: Sequence[Run]) -> None:
    for part in parts_of(console, runs, find(runs)) if runs else ["No points yet."]:
        console.print(part)
