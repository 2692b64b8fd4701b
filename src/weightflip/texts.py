"""Text for display: escaping of unsafe names, and number formats."""

from __future__ import annotations

import math


def printable(text: str) -> str:
    r"""Escape non-printable characters, as ``repr`` does.

    A layer name may contain any character. A terminal would obey escape sequences and text direction overrides, and a
    lone surrogate cannot be written to a file. Printable text is unchanged, so applying this twice is harmless.

    Example:
        >>> print(printable("blocks.0\x1b[2J"), printable("blocks.0"))
        blocks.0\x1b[2J blocks.0
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def percent(fraction: float) -> str:
    """A fraction as a percentage. Small values keep one significant digit instead of becoming 0.0%.

    Example:
        >>> percent(0.123), percent(0.00002), percent(float("nan"))
        ('12.3%', '0.002%', '-')
    """
    if math.isnan(fraction):
        return "-"
    return f"{100 * fraction:.1g}%" if 0 < fraction < 0.001 else f"{fraction:.1%}"
