"""Elements of the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape as escape_html

from weightflip.records import printable


def escape(text: str, quote: bool = True) -> str:
    """Text of the page: names may hold what no page can."""
    return escape_html(printable(text), quote)


def table(head: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """The head: titles, and whether the column is flush left. Cells are whole ``<td>`` elements."""
    titles = "".join(f"<th{' class=left' if left else ''}>{escape(title)}</th>" for title, left in head)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{titles}</tr></thead><tbody>\n{body}\n</tbody></table></div>"


def td(text: str, kind: str = "") -> str:
    """A cell of a table; its classes are in ``kind``."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{escape(text)}</td>"
