"""Converts matplotlib figures to HTML elements."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weightflip.overview import MANY_LAYERS, blocks_of
from weightflip.records import printable
from weightflip.report.html.markup import escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Maximum row labels of a heat map. More would overlap.
ROW_LABELS = 48


class Figures:
    """Creates figures and converts them to HTML elements."""

    def __init__(self) -> None:
        self._count = 0

    def new(self, width: float, height: float) -> Figure:
        from matplotlib.figure import Figure

        return Figure(figsize=(width, height), layout="constrained")

    def element(self, figure: Figure, label: str, caption: str = "") -> str:
        """The figure as inline SVG, with ids that are unique on the page."""
        self._count += 1
        written = io.StringIO()
        empty: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", dpi=130, metadata=empty)
        svg = written.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
        prefix = f"f{self._count}-"
        svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{prefix}", svg)
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label, quote=True)}" ', 1)
        below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        return f"<figure>{svg}{below}</figure>"


def rows_by_block(names: Sequence[str]) -> tuple[list[str], list[float], list[str]]:
    """Order of the layers in a heat map, and positions and texts of the labels.

    With more than 30 layers, the layers of a model block are adjacent, and labels name blocks.
    """
    blocks = blocks_of(names) if len(names) > MANY_LAYERS else {}
    if not blocks:
        rows, labels = row_labels(names)
        return list(names), [row + 0.5 for row in rows], labels
    ends = list(itertools.accumulate(len(members) for members in blocks.values()))
    middles = [end - len(members) / 2 for end, members in zip(ends, blocks.values(), strict=True)]
    at, labels = row_labels(list(blocks))
    return [name for members in blocks.values() for name in members], [middles[row] for row in at], labels


def row_labels(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Rows with a label, and their labels: all rows, or evenly spaced ones."""
    every = math.ceil(len(names) / ROW_LABELS)
    at = list(range(0, len(names), every))
    return at, [printable(names[row]) for row in at]
