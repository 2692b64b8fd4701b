"""One page of HTML with everything in it: plots as inline SVG, no script, no address of anything outside."""

from __future__ import annotations

from weightflip.report.html.page import write_html

__all__ = ["write_html"]
