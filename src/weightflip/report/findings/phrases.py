"""Phrases shared by findings: percentages, lists of layers, formats."""

from __future__ import annotations

from collections.abc import Sequence

from weightflip.report.run import Layer


def percent(fraction: float) -> str:
    """A fraction as a percentage, with more digits near 0 % and 100 %. Never rounded to either of them.

    Example:
        >>> [percent(fraction) for fraction in (0, 0.00001, 0.0123, 0.5, 0.99912, 0.999999, 1)]
        ['0 %', 'less than 0.01 %', '1.2 %', '50 %', '99.91 %', 'more than 99.99 %', '100 %']
    """
    number = 100 * fraction
    if number in (0, 100):
        return f"{number:.0f} %"
    distance = min(number, 100 - number)
    if distance < 0.01:
        return "less than 0.01 %" if number < 50 else "more than 99.99 %"
    return f"{number:.{0 if distance >= 10 else 1 if distance >= 1 else 2}f} %"


def format_factor(factor: float) -> str:
    """A factor, with one decimal below 10."""
    return f"{factor:.1f}" if factor < 10 else f"{factor:,.0f}"


def list_layers(names: Sequence[str], total: int, unnamed: int = 0) -> str:
    """Describe a set of layers: a single one by name, several by their number and the first names.

    Args:
        names: Names of the layers.
        total: Number of layers in the run.
        unnamed: Number of further layers without a known name.

    Example:
        >>> list_layers(["a"], 9), list_layers(["a", "b"], 9), list_layers(list("abcd"), 9)
        ('a', '2 of 9 layers (a and b)', '4 of 9 layers (a, b, c and 1 more)')
        >>> list_layers(["a"], 2, unnamed=1)
        'both layers'
    """
    count = len(names) + unnamed
    if count == len(names) == 1:
        return names[0]
    if count == total:
        return f"all {total} layers" if total > 2 else "both layers"
    if not names:
        return f"{count} of {total} layers"
    listed = list(names[:3])
    more = count - len(listed)
    text = ", ".join(listed) + f" and {more} more" if more else " and ".join([", ".join(listed[:-1]), listed[-1]])
    return f"{count} of {total} layers ({text})"


def describe_format(layer: Layer) -> str:
    """The format of a layer's codes, for a sentence."""
    return f"stored {layer.dtype} bits" if layer.is_stored and layer.dtype else layer.quantizer or "its format"


def describe_formats(layers: Sequence[Layer]) -> str:
    """The formats of some layers' codes, each one once."""
    return " and ".join(dict.fromkeys(describe_format(layer) for layer in layers))


def explain_stalls(layers: Sequence[Layer]) -> str:
    """What happens to an update that changes no code, as a sentence."""
    if all(layer.is_stored for layer in layers):
        return "These updates are permanently lost to rounding"
    kept = " and ".join(dict.fromkeys(layer.dtype for layer in layers if not layer.is_stored and layer.dtype))
    return f"The {kept or 'master'} weights may still move, but the forward pass does not see it"
