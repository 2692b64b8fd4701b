"""Shows a comparison on a terminal or as an HTML page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from os import PathLike
from typing import IO

from weightflip.delta.compare import Diff
from weightflip.delta.errors import extra
from weightflip.delta.table import cells, heading, rank_tensors, summary, total_cells
from weightflip.records import printable

# Width for a pipe or a file.
_PIPE_WIDTH = 200
_TENSORS_SHOWN = 40
_STYLE = """
body { margin: 0; background: #f8fafc; color: #1f2937; line-height: 1.5; font-size: 15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 48px; } h1 { font-size: 24px; margin: 0; }
section { background: #fff; border: 1px solid #e5e7eb; border-radius: 8px; padding: 18px 20px; margin: 18px 0;
  overflow-x: auto; }
.soft { color: #6b7280; } p { margin: 0 0 10px; }
table { border-collapse: collapse; font-size: 13px; }
th { font-weight: 600; color: #6b7280; white-space: nowrap; } tr.all td { font-weight: 600; }
th, td { padding: 4px 12px 4px 6px; border-bottom: 1px solid #e5e7eb; text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th.left, td.left { text-align: left; }
"""


def check_terminal() -> None:
    """Check that :func:`print_diff` can print.

    Raises:
        DeltaError: rich is missing.
    """
    extra("rich", "the table on the terminal")


def print_diff(diff: Diff, file: IO[str] | None = None) -> None:
    """Print the totals and the tensors that changed most.

    Args:
        diff: The comparison.
        file: Output; None for standard output.

    Raises:
        DeltaError: rich is missing.
    """
    check_terminal()
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(file=file, highlight=False, width=_PIPE_WIDTH)
    is_unicode = console.encoding.lower().startswith("utf")
    table = Table(box=box.SIMPLE_HEAD if is_unicode else box.ASCII, pad_edge=False, show_footer=False)
    for title, is_left in heading(diff):
        table.add_column(Text(title), justify="left" if is_left else "right", overflow="fold")
    tensors = rank_tensors(diff)
    for tensor in tensors[:_TENSORS_SHOWN]:
        table.add_row(*(Text(printable(cell)) for cell in cells(diff, tensor)))
    if tensors:
        table.add_section()
        table.add_row(*(Text(cell, style="bold") for cell in total_cells(diff)))
        with console.capture() as captured:
            console.print(table)
        # Strip the padding of the last column.
        console.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())
    if len(tensors) > _TENSORS_SHOWN:
        console.print(f"{len(tensors) - _TENSORS_SHOWN:,} more tensors differ; use --html or --csv for all.")
    for line in summary(diff):
        console.print(line, markup=False)


def write_html(diff: Diff, path: str | PathLike[str]) -> None:
    """Write a self-contained HTML page with all tensors that differ.

    Args:
        diff: The comparison.
        path: The file. An existing file is replaced.
    """
    lefts = [is_left for _, is_left in heading(diff)]
    titles = "".join(_cell("th", title, is_left) for title, is_left in heading(diff))
    rows = [_row(total_cells(diff), lefts, "all"), *(_row(cells(diff, tensor), lefts) for tensor in rank_tensors(diff))]
    lines = "".join(f"<p>{escape(line)}</p>" for line in summary(diff))
    names = f"{escape(printable(diff.old))} to {escape(printable(diff.new))}"
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>weightflip diff: {names}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>weightflip diff</h1>\n<p class=soft>{names}</p>\n<section>{lines}</section>\n"
            f"<section><table><thead><tr>{titles}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
            "</section>\n</main>\n</body>\n</html>\n"
        )


def _row(texts: Sequence[str], lefts: Sequence[bool], kind: str = "") -> str:
    inner = "".join(_cell("td", text, is_left) for text, is_left in zip(texts, lefts, strict=True))
    return f'<tr class="{kind}">{inner}</tr>' if kind else f"<tr>{inner}</tr>"


def _cell(element: str, text: str, is_left: bool) -> str:
    return f"<{element}{' class=left' if is_left else ''}>{escape(printable(text))}</{element}>"
