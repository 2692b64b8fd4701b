"""Text for people: what is safe to print, and how numbers are written."""

from __future__ import annotations

import math


def shown(text: str) -> str:
    r"""Text for people, with what would not print as itself escaped, as ``repr`` does.

    A layer's name may hold anything. In a terminal, escapes and overrides of the direction of writing would be obeyed,
    and a lone surrogate cannot be written to a file. What prints stays, so that this can be done twice.

    Example:
        >>> print(shown("blocks.0\x1b[2J"), shown("blocks.0"))
        blocks.0\x1b[2J blocks.0
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def percent(share: float) -> str:
    """A share in per cent; one weight of a large layer is not 0.0%.

    Example:
        >>> percent(0.123), percent(0.00002), percent(float("nan"))
        ('12.3%', '0.002%', '-')
    """
    if math.isnan(share):
        return "-"
    return f"{100 * share:.1g}%" if 0 < share < 0.001 else f"{share:.1%}"
