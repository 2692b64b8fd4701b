"""HTML for notebooks: self-contained tables and small charts without scripts or style sheets."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from weightflip.texts import percent, printable

# Readable on light and dark themes.
_COLORS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#94a3b8")
_WIDTH, _HEIGHT = 320, 72
# With more bars than this, a chart takes more space than the table next to it.
_MAX_BARS = 400


def escape(text: str) -> str:
    """Escape text for HTML. Names may contain any character."""
    return html.escape(printable(text))


def page(*parts: str) -> str:
    """The output of one notebook cell.

    Args:
        *parts: HTML fragments; empty ones are skipped.
    """
    return f"<div>{''.join(filter(None, parts))}</div>"


def paragraph(text: str) -> str:
    """A paragraph of text; empty for empty text."""
    return f'<p style="margin:4px 0">{escape(text)}</p>' if text else ""


def folded(title: str, text: str) -> str:
    """Text in a collapsible section."""
    lines = "\n".join(map(escape, text.splitlines()))
    return f"<details><summary>{escape(title)}</summary><pre>{lines}</pre></details>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """A table.

    Args:
        head: Column headers.
        rows: Cells of each row, as text.
        texts: Number of left-aligned text columns, from the left. The other columns hold numbers.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = ("left" if at < texts else "right" for at in range(len(cells)))
        return "".join(
            f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for side, cell in zip(sides, cells, strict=True)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{line('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A small line chart of fractions over steps, from 0 to the highest value.

    Args:
        title: Title of the chart.
        lines: Points (step, fraction) of each line, by name. NaN points are skipped.

    Returns:
        The chart; empty without points.
    """
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in lines.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return ""
    steps = [step for points in finite.values() for step, _ in points]
    first, last = min(steps), max(steps)
    top = max(fraction for points in finite.values() for _, fraction in points)
    shapes = []
    for color, (name, points) in zip(_COLORS, finite.items(), strict=False):
        places = [
            (
                _WIDTH * (step - first) / (last - first) if last > first else _WIDTH / 2,
                _HEIGHT * (1 - (fraction / top if top else 0.0)),
            )
            for step, fraction in points
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        shape = (
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'
            if len(places) > 1
            else f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="2.5" fill="{color}"/>'
        )
        shapes.append(f"<g><title>{escape(name)}</title>{shape}</g>")
    names = [f'<span style="color:{color}">{escape(name)}</span>' for color, name in zip(_COLORS, finite, strict=False)]
    left_out = f" and {len(finite) - len(names)} more" if len(finite) > len(names) else ""
    legend = f": {', '.join(names)}{left_out}" if len(finite) > 1 else ""
    caption = f"{escape(title)}{legend}; at most {percent(top)}, steps {first:,.0f} to {last:,.0f}"
    return _figure(caption, title, shapes)


def bars(title: str, fractions: Mapping[str, float]) -> str:
    """A small bar chart of fractions, one bar per layer.

    Args:
        title: Title of the chart.
        fractions: Fraction of each layer, by name. NaN gets no bar.

    Returns:
        The chart; empty for fewer than two bars or more than 400.
    """
    finite = {name: fraction for name, fraction in fractions.items() if math.isfinite(fraction)}
    if not 1 < len(finite) <= _MAX_BARS:
        return ""
    top, width = max(finite.values()), _WIDTH / len(finite)
    shapes = []
    for at, (name, fraction) in enumerate(finite.items()):
        height = _HEIGHT * fraction / top if top else 0.0
        shapes.append(
            f'<rect x="{at * width:.2f}" y="{_HEIGHT - height:.1f}" width="{0.8 * width:.2f}" height="{height:.1f}" '
            f'fill="{_COLORS[0]}"><title>{escape(name)}: {percent(fraction)}</title></rect>'
        )
    return _figure(f"{escape(title)}; at most {percent(top)}", title, shapes)


def _figure(caption: str, title: str, shapes: Iterable[str]) -> str:
    return (
        '<figure style="display:inline-block;margin:4px 16px 4px 0">'
        f'<svg role="img" aria-label="{escape(title)}" width="{_WIDTH}" height="{_HEIGHT + 4}" '
        f'viewBox="0 -2 {_WIDTH} {_HEIGHT + 4}"><path d="M0 {_HEIGHT}H{_WIDTH}" stroke="currentColor" '
        f'stroke-opacity="0.3"/>{"".join(shapes)}</svg>'
        f'<figcaption style="font-size:smaller">{caption}</figcaption></figure>'
    )
