"""Words that findings share: shares, names, formats."""

from __future__ import annotations

from collections.abc import Sequence

from weightflip.report.run import Layer


def percent(share: float) -> str:
    """A share in percent, with digits where they count, near 0 % and 100 %; never rounded to either.

    Example:
        >>> [percent(share) for share in (0, 0.00001, 0.0123, 0.5, 0.99912, 0.999999, 1)]
        ['0 %', 'less than 0.01 %', '1.2 %', '50 %', '99.91 %', 'more than 99.99 %', '100 %']
    """
    number = 100 * share
    if number in (0, 100):
        return f"{number:.0f} %"
    room = min(number, 100 - number)
    if room < 0.01:
        return "less than 0.01 %" if number < 50 else "more than 99.99 %"
    return f"{number:.{0 if room >= 10 else 1 if room >= 1 else 2}f} %"


def times(factor: float) -> str:
    """A factor, with digits where they count."""
    return f"{factor:.1f}" if factor < 10 else f"{factor:,.0f}"


def named(names: Sequence[str], of: int, unnamed: int = 0) -> str:
    """Layers by name; many of them by number.

    Args:
        names: Some of them, or all.
        of: How many layers there are.
        unnamed: How many there are beside ``names``.

    Example:
        >>> named(["a"], 9), named(["a", "b"], 9), named(list("abcd"), 9), named(["a"], 2, unnamed=1)
        ('a', '2 of 9 layers (a and b)', '4 of 9 layers (a, b, c and 1 more)', 'both layers')
    """
    count = len(names) + unnamed
    if count == len(names) == 1:
        return names[0]
    if count == of:
        return f"all {of} layers" if of > 2 else "both layers"
    if not names:
        return f"{count} of {of} layers"
    listed = list(names[:3])
    more = count - len(listed)
    text = ", ".join(listed) + f" and {more} more" if more else " and ".join([", ".join(listed[:-1]), listed[-1]])
    return f"{count} of {of} layers ({text})"


def format_of(layer: Layer) -> str:
    """What a layer's codes are, for a sentence."""
    return f"stored {layer.dtype} bits" if layer.is_stored and layer.dtype else layer.quantizer or "its format"


def formats_of(layers: Sequence[Layer]) -> str:
    """What the codes of some layers are, each kind once."""
    return " and ".join(dict.fromkeys(format_of(layer) for layer in layers))


def what_becomes_of_it(layers: Sequence[Layer]) -> str:
    """What becomes of an update that changes no code."""
    if all(layer.is_stored for layer in layers):
        return "Rounding swallows these updates for good"
    kept = " and ".join(dict.fromkeys(layer.dtype for layer in layers if not layer.is_stored and layer.dtype))
    return f"The {kept or 'master'} weights may still move, the forward pass sees nothing of it"
