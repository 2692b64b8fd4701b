"""Live terminal output: a progress bar for large files, and a report that is redrawn as points arrive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from weightflip.report.findings import find
from weightflip.report.read import total_size
from weightflip.report.run import Run
from weightflip.report.terminal import report_parts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Reading more bytes than this takes noticeable time.
_LARGE = 30_000_000


@contextmanager
def progress_bar(paths: Sequence[str], console: Console | None) -> Iterator[Callable[[float], object]]:
    """Show a progress bar on a terminal while large files are read.

    Args:
        paths: Paths that are read.
        console: The console; None for no output.

    Yields:
        A function to call with the number of bytes read since the last call.
    """
    size = total_size(paths)
    if size < _LARGE or console is None or not console.is_terminal:
        yield lambda size: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading", total=size)
        yield lambda size: progress.advance(task, size)


def watch(reports: Iterable[Sequence[Run]], console: Console) -> None:
    """Redraw the report of some runs until interrupted, then leave the last report on the terminal.

    Args:
        reports: From :func:`weightflip.report.follow.follow`.
        console: The console. If it is not a terminal, each report is appended.
    """
    if not console.is_terminal:
        with suppress(KeyboardInterrupt):
            for runs in reports:
                _print_report(console, runs)
        return
    from rich.console import Group
    from rich.live import Live

    last: Sequence[Run] = ()
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False, transient=True) as live:
        for runs in reports:
            last = runs or last
            drawn = Group(_status_line(runs), *report_parts(console, runs, find(runs))) if runs else _status_line(runs)
            live.update(drawn, refresh=True)
    if last:
        _print_report(console, last)


def _status_line(runs: Sequence[Run]) -> Text:
    from rich.text import Text

    points = f"up to step {max(run.end for run in runs):,}" if runs else "no points yet"
    return Text(f"Read at {time.strftime('%H:%M:%S')}, {points}. Press Ctrl+C to stop.")


def _print_report(console: Console, runs: Sequence[Run]) -> None:
    for part in report_parts(console, runs, find(runs)) if runs else ["No points yet."]:
        console.print(part)
