"""Basic HTML elements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape as escape_html

from weightflip.records import printable


def escape(text: str, quote: bool = True) -> str:
    """Escape text for HTML. Names may contain any character."""
    return escape_html(printable(text), quote)


def table(head: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """A table. ``head`` holds titles and whether the column is left-aligned; cells are complete ``<td>`` elements."""
    titles = "".join(f"<th{' class=left' if left else ''}>{escape(title)}</th>" for title, left in head)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{titles}</tr></thead><tbody>\n{body}\n</tbody></table></div>"


def td(text: str, kind: str = "") -> str:
    """A table cell with the CSS classes in ``kind``."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{escape(text)}</td>"
