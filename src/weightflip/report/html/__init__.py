"""A self-contained HTML page: plots as inline SVG, no scripts, no external resources."""

from __future__ import annotations

from weightflip.report.html.page import write_html

__all__ = ["write_html"]
