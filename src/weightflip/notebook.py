"""HTML for notebooks: tables and small pictures that need no script, no style sheet and no other file."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from weightflip.texts import percent, shown

# The text's own colour fits light and dark themes; these are readable on both.
_COLORS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#94a3b8")
_WIDTH, _HEIGHT = 320, 72
# Above so many bars, a picture takes more room than the table beside it.
_MOST_BARS = 400


def escape(text: str) -> str:
    """Text of the page: names may hold what no page can."""
    return html.escape(shown(text))


def page(*parts: str) -> str:
    """What one cell shows.

    Args:
        *parts: HTML; empty ones are left out.
    """
    return f"<div>{''.join(filter(None, parts))}</div>"


def paragraph(text: str) -> str:
    """A line or more of text; nothing of none."""
    return f'<p style="margin:4px 0">{escape(text)}</p>' if text else ""


def folded(title: str, text: str) -> str:
    """Text that opens with a click."""
    lines = "\n".join(map(escape, text.splitlines()))
    return f"<details><summary>{escape(title)}</summary><pre>{lines}</pre></details>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """A table.

    Args:
        head: Of each column.
        rows: Their cells, as text.
        texts: How many columns, from the left, hold text; the others hold numbers.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = ("left" if at < texts else "right" for at in range(len(cells)))
        return "".join(
            f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for side, cell in zip(sides, cells, strict=True)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{line('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A share over the steps, as a small picture, from 0 to its highest value.

    Args:
        title: What it is.
        lines: Name of each line to its points, step and share; NaN is no point.

    Returns:
        The picture; empty without points.
    """
    there = {name: [point for point in points if math.isfinite(point[1])] for name, points in lines.items()}
    there = {name: points for name, points in there.items() if points}
    if not there:
        return ""
    steps = [step for points in there.values() for step, _ in points]
    first, last = min(steps), max(steps)
    top = max(share for points in there.values() for _, share in points)
    drawn = []
    for color, (name, points) in zip(_COLORS, there.items(), strict=False):
        places = [
            (
                _WIDTH * (step - first) / (last - first) if last > first else _WIDTH / 2,
                _HEIGHT * (1 - (share / top if top else 0.0)),
            )
            for step, share in points
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        shape = (
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'
            if len(places) > 1
            else f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="2.5" fill="{color}"/>'
        )
        drawn.append(f"<g><title>{escape(name)}</title>{shape}</g>")
    names = [f'<span style="color:{color}">{escape(name)}</span>' for color, name in zip(_COLORS, there, strict=False)]
    left_out = f" and {len(there) - len(names)} more" if len(there) > len(names) else ""
    legend = f": {', '.join(names)}{left_out}" if len(there) > 1 else ""
    caption = f"{escape(title)}{legend}; at most {percent(top)}, steps {first:,.0f} to {last:,.0f}"
    return _picture(caption, title, drawn)


def bars(title: str, shares: Mapping[str, float]) -> str:
    """A share of each layer, in their order, as a small picture.

    Args:
        title: What it is.
        shares: By layer; NaN is no bar.

    Returns:
        The picture; empty where there are fewer than two bars, or more than 400.
    """
    there = {name: share for name, share in shares.items() if math.isfinite(share)}
    if not 1 < len(there) <= _MOST_BARS:
        return ""
    top, width = max(there.values()), _WIDTH / len(there)
    drawn = []
    for at, (name, share) in enumerate(there.items()):
        height = _HEIGHT * share / top if top else 0.0
        drawn.append(
            f'<rect x="{at * width:.2f}" y="{_HEIGHT - height:.1f}" width="{0.8 * width:.2f}" height="{height:.1f}" '
            f'fill="{_COLORS[0]}"><title>{escape(name)}: {percent(share)}</title></rect>'
        )
    return _picture(f"{escape(title)}; at most {percent(top)}", title, drawn)


def _picture(caption: str, title: str, drawn: Iterable[str]) -> str:
    return (
        '<figure style="display:inline-block;margin:4px 16px 4px 0">'
        f'<svg role="img" aria-label="{escape(title)}" width="{_WIDTH}" height="{_HEIGHT + 4}" '
        f'viewBox="0 -2 {_WIDTH} {_HEIGHT + 4}"><path d="M0 {_HEIGHT}H{_WIDTH}" stroke="currentColor" '
        f'stroke-opacity="0.3"/>{"".join(drawn)}</svg>'
        f'<figcaption style="font-size:smaller">{caption}</figcaption></figure>'
    )
