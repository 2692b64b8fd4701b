"""What is said of many layers: the blocks they form, how their numbers are spread, and which of them stand out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

MANY_LAYERS = 30
"""Above this, layers are shown by block, and one by one only where they stand out."""

# More groups than this are no overview; where an outer level has more, it is taken all the same.
_MOST_BLOCKS = 48
# Fewer blocks than this, of more weights than that on average, are divided once more.
_FEW_BLOCKS, _LARGE_BLOCK = 6, 8
# Weights outside of any block, beyond which they are put together.
_MOST_SINGLE = 16

FAR_OUTSIDE = 3.0
"""So many interquartile ranges beyond a quartile, as Tukey has it ("Exploratory data analysis", 1977)."""

# And the odds differ from the median's at least by this factor.
_LEAST_FACTOR = 2.0
# Of fewer layers, quartiles say little.
_LEAST_LAYERS = 8


def blocks_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The repeated blocks of a model, from the names of its weights.

    A block is a name up to a number that others have, too: ``layers.3`` beside ``layers.4``, ``layer2.0`` beside
    ``layer2.1``. Of blocks within blocks, the inner ones are taken if they have several weights each and are at most 48
    altogether; what an outer block holds beside them is ``layers.0 (rest)``. A few large blocks are divided into their
    parts, ``blocks.0.attn``. Weights outside of any block are groups of their own, under their module's name.

    Args:
        names: Of the weights.

    Returns:
        Name of each group to its weights; each weight is in exactly one. Empty where no block repeats.

    Example:
        >>> blocks_of(["wte.weight", *(f"h.{i}.{part}.weight" for i in range(2) for part in ("qkv", "out"))])["h.1"]
        ('h.1.qkv.weight', 'h.1.out.weight')
    """
    names = list(dict.fromkeys(names))
    paths = {name: name.split(".")[:-1] for name in names}
    cuts = _cuts(paths)
    deepest = max(map(len, cuts.values()), default=0)
    keys: dict[str, str] | None = None
    for level in range(1, deepest + 1):
        found = {name: ".".join(paths[name][: of[:level][-1] + 1]) for name, of in cuts.items() if of}
        if not _has_several([found[name] for name, of in cuts.items() if len(of) >= level]):
            continue
        if keys is None or len(set(found.values())) <= _MOST_BLOCKS:
            keys = found
    if keys is None:
        return {}
    keys = _with_rests(_divided(keys, paths))
    keys |= _outside({name: path for name, path in paths.items() if name not in keys})
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(keys[name], []).append(name)
    return {key: tuple(members) for key, members in groups.items()}


def _cuts(paths: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Where in each path there are numbers of which the same place has several."""
    numbers: dict[tuple[str, ...], set[str]] = {}
    places: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
    for name, path in paths.items():
        for at, part in enumerate(path):
            if match := re.fullmatch(r"(.*?)(\d+)", part):
                place = (*path[:at], match[1])
                numbers.setdefault(place, set()).add(match[2])
                places.setdefault(name, []).append((at, place))
    return {name: [at for at, place in places.get(name, ()) if len(numbers[place]) > 1] for name in paths}


def _has_several(keys: Sequence[str]) -> bool:
    """Whether groups have two members or more, on average."""
    return len(keys) >= 2 * max(1, len(set(keys)))


def _divided(keys: dict[str, str], paths: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """A few large blocks, by their parts."""
    count = len(set(keys.values()))
    if count >= _FEW_BLOCKS or len(keys) <= _LARGE_BLOCK * count:
        return keys
    finer = {name: ".".join(paths[name][: key.count(".") + 2]) for name, key in keys.items()}
    return finer if len(set(finer.values())) <= _MOST_BLOCKS and _has_several(list(finer.values())) else keys


def _with_rests(keys: dict[str, str]) -> dict[str, str]:
    """The name of a group that others lie in says that it is not all of them."""
    found = set(keys.values())
    outer = {key[:at] for key in found for at in range(len(key)) if key[at] == "."} & found
    return {name: f"{key} (rest)" if key in outer else key for name, key in keys.items()}


def _outside(paths: Mapping[str, Sequence[str]]) -> dict[str, str]:
    keys = {name: ".".join(path) or name for name, path in paths.items()}
    if len(set(keys.values())) > _MOST_SINGLE:
        keys = {name: path[0] if path else name for name, path in paths.items()}
    return keys


class Spread(NamedTuple):
    """How a number is spread over layers, each of which counts once."""

    min: float
    p25: float
    median: float
    p75: float
    max: float


def spread(values: Iterable[float]) -> Spread | None:
    """Lowest, quartiles and highest, interpolated as NumPy does by default; None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Spread(*(_quantile(ordered, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)))


def _quantile(ordered: Sequence[float], share: float) -> float:
    at = share * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return low + (high - low) * (at - math.floor(at))


def outliers(shares: Mapping[str, tuple[float, float]]) -> list[str]:
    """The layers whose share, such as the flip rate, lies far from that of the others.

    It is the odds that are compared, on a logarithmic scale: 0.001 is as far from 0.01 as 0.999 from 0.99. A layer
    stands out if it is 3 interquartile ranges beyond a quartile, and its odds are more than twice, or less than half,
    the median's.

    Args:
        shares: By layer, a numerator that is at most as large as the denominator, and that one.

    Returns:
        Names, the farthest first; none of fewer than 8 layers.
    """
    # Half a weight more on both sides, as Haldane has it: 0 of 16 is no strong sign, 0 of a million is.
    odds = {
        name: math.log((numerator + 0.5) / (max(0.0, denominator - numerator) + 0.5))
        for name, (numerator, denominator) in shares.items()
        if denominator and math.isfinite(numerator / denominator)
    }
    found = spread(odds.values())
    if found is None or len(odds) < _LEAST_LAYERS:
        return []
    reach = FAR_OUTSIDE * (found.p75 - found.p25)
    low = min(found.p25 - reach, found.median - math.log(_LEAST_FACTOR))
    high = max(found.p75 + reach, found.median + math.log(_LEAST_FACTOR))
    far = {name: abs(value - found.median) for name, value in odds.items() if not low <= value <= high}
    return sorted(far, key=lambda name: -far[name])
