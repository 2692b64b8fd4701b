"""Summaries of many layers: the model blocks they form, the spread of their numbers, and the outliers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

MANY_LAYERS = 30
"""Above this number, layers are summarized by model block. Only outliers are displayed individually."""

# More groups than this are no summary. An outermost level with more is used nevertheless.
_MAX_BLOCKS = 48
# Fewer blocks than the first number, with more weights on average than the second, are split once more.
_FEW_BLOCKS, _LARGE_BLOCK = 6, 8
# More weights than this outside any block are grouped by the first part of their name.
_MAX_SINGLE = 16

FAR_OUTSIDE = 3.0
"""Interquartile ranges beyond a quartile, as in Tukey's "far out" values ("Exploratory data analysis", 1977)."""

# In addition, the odds must differ from those of the median by at least this factor.
_MIN_FACTOR = 2.0
# Quartiles of fewer layers mean little.
_MIN_LAYERS = 8


def blocks_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Find the repeated blocks of a model from the names of its weights.

    A block is a name prefix that ends in a number and occurs with other numbers: ``layers.3`` next to ``layers.4``,
    ``layer2.0`` next to ``layer2.1``. For nested blocks, the inner ones are used if each has several weights and there
    are at most 48 in total. The other weights of the outer block are then called ``layers.0 (rest)``. A few large
    blocks are split into their parts, such as ``blocks.0.attn``. Weights outside any block are grouped by module.

    Args:
        names: Names of the weights.

    Returns:
        The weights of each group, by group name. Each weight is in exactly one group. Empty if no block repeats.

    Example:
        >>> blocks_of(["wte.weight", *(f"h.{i}.{part}.weight" for i in range(2) for part in ("qkv", "out"))])["h.1"]
        ('h.1.qkv.weight', 'h.1.out.weight')
    """
    names = list(dict.fromkeys(names))
    paths = {name: name.split(".")[:-1] for name in names}
    cuts = _find_cuts(paths)
    deepest = max(map(len, cuts.values()), default=0)
    keys: dict[str, str] | None = None
    for level in range(1, deepest + 1):
        at_level = {name: ".".join(paths[name][: at[:level][-1] + 1]) for name, at in cuts.items() if at}
        if not _has_two_each([at_level[name] for name, at in cuts.items() if len(at) >= level]):
            continue
        if keys is None or len(set(at_level.values())) <= _MAX_BLOCKS:
            keys = at_level
    if keys is None:
        return {}
    keys = _mark_rests(_split_large_blocks(keys, paths))
    keys |= _group_by_module({name: path for name, path in paths.items() if name not in keys})
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(keys[name], []).append(name)
    return {key: tuple(members) for key, members in groups.items()}


def _find_cuts(paths: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """The positions in each path that hold a number and take several numbers in the model."""
    numbers: dict[tuple[str, ...], set[str]] = {}
    places: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
    for name, path in paths.items():
        for at, part in enumerate(path):
            if match := re.fullmatch(r"(.*?)(\d+)", part):
                place = (*path[:at], match[1])
                numbers.setdefault(place, set()).add(match[2])
                places.setdefault(name, []).append((at, place))
    return {name: [at for at, place in places.get(name, ()) if len(numbers[place]) > 1] for name in paths}


def _has_two_each(keys: Sequence[str]) -> bool:
    """Whether groups have at least two members on average."""
    return len(keys) >= 2 * max(1, len(set(keys)))


def _split_large_blocks(keys: dict[str, str], paths: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Split blocks into their parts if there are few and large ones."""
    count = len(set(keys.values()))
    if count >= _FEW_BLOCKS or len(keys) <= _LARGE_BLOCK * count:
        return keys
    finer = {name: ".".join(paths[name][: key.count(".") + 2]) for name, key in keys.items()}
    return finer if len(set(finer.values())) <= _MAX_BLOCKS and _has_two_each(list(finer.values())) else keys


def _mark_rests(keys: dict[str, str]) -> dict[str, str]:
    """Append ``(rest)`` to the name of a group that contains other groups."""
    groups = set(keys.values())
    outer = {key[:at] for key in groups for at in range(len(key)) if key[at] == "."} & groups
    return {name: f"{key} (rest)" if key in outer else key for name, key in keys.items()}


def _group_by_module(paths: Mapping[str, Sequence[str]]) -> dict[str, str]:
    keys = {name: ".".join(path) or name for name, path in paths.items()}
    if len(set(keys.values())) > _MAX_SINGLE:
        keys = {name: path[0] if path else name for name, path in paths.items()}
    return keys


class Spread(NamedTuple):
    """Distribution of a number over layers. Each layer counts once."""

    min: float
    p25: float
    median: float
    p75: float
    max: float


def spread(values: Iterable[float]) -> Spread | None:
    """Minimum, quartiles and maximum, interpolated like NumPy's default; None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Spread(*(_quantile(ordered, fraction) for fraction in (0.0, 0.25, 0.5, 0.75, 1.0)))


def _quantile(ordered: Sequence[float], fraction: float) -> float:
    at = fraction * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return low + (high - low) * (at - math.floor(at))


def outliers(fractions: Mapping[str, tuple[float, float]]) -> list[str]:
    """The layers whose fraction, such as the flip rate, is far from that of the other layers.

    Odds are compared on a logarithmic scale, so that 0.001 is as far from 0.01 as 0.999 is from 0.99. A layer is an
    outlier if it lies 3 interquartile ranges beyond a quartile and its odds are more than twice, or less than half,
    those of the median.

    Args:
        fractions: Numerator and denominator, by layer. The numerator is at most as large as the denominator.

    Returns:
        Names, farthest first. Empty for fewer than 8 layers.
    """
    # Haldane's correction adds half a weight on both sides: 0 of 16 is weak evidence, 0 of a million is strong.
    odds = {
        name: math.log((numerator + 0.5) / (max(0.0, denominator - numerator) + 0.5))
        for name, (numerator, denominator) in fractions.items()
        if denominator and math.isfinite(numerator / denominator)
    }
    usual = spread(odds.values())
    if usual is None or len(odds) < _MIN_LAYERS:
        return []
    reach = FAR_OUTSIDE * (usual.p75 - usual.p25)
    low = min(usual.p25 - reach, usual.median - math.log(_MIN_FACTOR))
    high = max(usual.p75 + reach, usual.median + math.log(_MIN_FACTOR))
    far = {name: abs(value - usual.median) for name, value in odds.items() if not low <= value <= high}
    return sorted(far, key=lambda name: -far[name])
