"""Differences between several runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from weightflip.report.findings.base import Finding, Severity
from weightflip.report.findings.lost import severity_of_losses
from weightflip.report.findings.phrases import describe_formats, percent
from weightflip.report.run import Layer, Run, sum_layers

# Runs that differ by less than this are reported as similar.
_SIMILAR, _SIMILAR_FACTOR = 0.05, 2.0


@dataclass(frozen=True)
class _Pair:
    """The weights that two runs share, with one quantizer per run, up to the last step that both have reached."""

    names: tuple[str, str]
    layers: tuple[tuple[Layer, ...], tuple[Layer, ...]]
    end: int

    @property
    def both_stored(self) -> bool:
        return all(layer.is_stored and layer.dtype for side in self.layers for layer in side)

    @property
    def same_grid(self) -> bool:
        return all(a.grid == b.grid and a.grid for a, b in zip(*self.layers, strict=True))

    @property
    def same_storage(self) -> bool:
        return all(a.dtype == b.dtype for a, b in zip(*self.layers, strict=True))

    def values(self, value: str) -> tuple[float, float]:
        a, b = (sum_layers(side).get(value, None) for side in self.layers)
        return (
            a.part(-1, self.end).summary if a is not None else math.nan,
            b.part(-1, self.end).summary if b is not None else math.nan,
        )

    @property
    def value(self) -> str:
        """Name of the compared number."""
        return "stall_ratio" if not any(map(math.isnan, self.values("stall_ratio"))) else "flip_rate"

    @property
    def difference(self) -> float:
        """Size of the difference, for ranking pairs."""
        return abs(_gap(*self.values(self.value)))

    @property
    def is_similar(self) -> bool:
        a, b = self.values(self.value)
        low, high = sorted((a, b))
        return high - low < _SIMILAR and not (
            high - low >= 0.001 and (high >= _SIMILAR_FACTOR * low or 1 - low >= _SIMILAR_FACTOR * (1 - high))
        )

    def format(self, side: int) -> str:
        return describe_formats(self.layers[side])


def _make_pairs(a: Run, b: Run) -> list[_Pair]:
    pairs = []
    for one, other in itertools.product(a.models, b.models):
        mine = {layer.weight: layer for layer in a.layers.values() if layer.variant == one}
        theirs = {layer.weight: layer for layer in b.layers.values() if layer.variant == other}
        common = [
            name
            for name in mine
            if name in theirs
            and not len(mine[name].get("nonfinite_weights"))
            and not len(theirs[name].get("nonfinite_weights"))
        ]
        if common:
            layers = (tuple(mine[name] for name in common), tuple(theirs[name] for name in common))
            pairs.append(_Pair((a.name, b.name), layers, min(a.end, b.end)))
    return pairs


def compare(runs: Sequence[Run]) -> list[Finding]:
    """Find the largest difference between two comparable runs.

    Runs are comparable if they track the same weights in the same format, or if both track stored bits: then a stalled
    update is one that left the stored weight unchanged, for any dtype. Different formats have different distances
    between codes, so these runs are listed but not compared.
    """
    found: list[Finding] = []
    comparable: list[_Pair] = []
    in_different_formats: list[_Pair] = []
    without_common_layers: list[tuple[str, str]] = []
    for a, b in itertools.combinations(runs, 2):
        pairs = _make_pairs(a, b)
        # Stored bits of different dtypes first: which updates are lost is the most important difference.
        candidates = sorted(
            (pair for pair in pairs if pair.both_stored or pair.same_grid),
            key=lambda pair: (not (pair.both_stored and not pair.same_storage), not pair.same_grid, -pair.difference),
        )
        if candidates:
            comparable.append(candidates[0])
        elif pairs:
            in_different_formats.append(pairs[0])
        else:
            without_common_layers.append((a.name, b.name))
    comparable = [pair for pair in comparable if not any(map(math.isnan, pair.values(pair.value)))]
    if comparable:
        found.append(_describe_difference(max(comparable, key=lambda pair: pair.difference), len(comparable)))
    if in_different_formats:
        pair = in_different_formats[0]
        (a_name, b_name), more = pair.names, len(in_different_formats) - 1
        keeps = [f"{name} as {pair.format(side)}" for side, name in enumerate((a_name, b_name))]
        text = (
            f"{a_name} and {b_name} are tracked in different formats, {' and '.join(keeps)}: their rates are not "
            "compared"
            + (f" (nor are those of {more} more pairs of runs)" if more else "")
            + '. Track both with the same quantizer=, or with quantizer="native" to compare what is stored'
        )
        found.append(Finding(Severity.INFO, "not compared", text, pair.names))
    if without_common_layers and not comparable and not in_different_formats:
        text = "The runs have no healthy layer in common: each is reported separately"
        found.append(Finding(Severity.INFO, "not compared", text, without_common_layers[0]))
    return found


def _describe_difference(pair: _Pair, pairs: int) -> Finding:
    """The sentence about two runs, which have the largest difference among a number of pairs."""
    a, b = pair.values(pair.value)
    until = f"up to step {pair.end:,}"
    among = f", the largest difference among {pairs} pairs of runs" if pairs > 1 else ""
    if pair.is_similar:
        what = "of the updates change no code" if pair.value == "stall_ratio" else "of the weights flip per step"
        text = (
            f"{pair.names[0]} and {pair.names[1]} differ little{among}: {percent(a)} and {percent(b)} {what} "
            f"({pair.format(0)}, {until})"
        )
        return Finding(Severity.INFO, "comparison", text, pair.names)
    low, high = (0, 1) if a <= b else (1, 0)
    severity = Severity.NOTE
    if pair.value == "flip_rate":
        text = _describe_flips(pair, low, high, until + among)
    elif pair.both_stored and not pair.same_grid:
        text = _describe_stored(pair, low, high, until + among)
        stalls = sum_layers(pair.layers[high])["stall_ratio"].part(-1, pair.end)
        severity = max(severity, severity_of_losses(stalls, 0.75 * pair.end))
    else:
        text = _describe_stalls(pair, low, high, until + among)
    return Finding(severity, "comparison", text, pair.names)


def _describe_flips(pair: _Pair, low: int, high: int, when: str) -> str:
    fractions, names = pair.values("flip_rate"), pair.names
    return (
        f"Per step, {percent(fractions[high])} of the weights of {names[high]} flip, compared with "
        f"{percent(fractions[low])} of those of {names[low]} ({pair.format(high)}, {when})"
    )


def _describe_stored(pair: _Pair, low: int, high: int, when: str) -> str:
    fractions, names = pair.values("stall_ratio"), pair.names
    dtypes = [" and ".join(dict.fromkeys(layer.dtype for layer in side)) for side in pair.layers]
    return (
        f"In {names[high]} (stored {dtypes[high]} weights), {percent(fractions[high])} of the updates left the stored "
        f"weight unchanged, compared with {percent(fractions[low])} in {names[low]} (stored {dtypes[low]} weights): "
        f"steps below half the distance between two {dtypes[high]} numbers are rounded away "
        f"({when}){_describe_largest_layer(pair, high)}"
    )


def _describe_stalls(pair: _Pair, low: int, high: int, when: str) -> str:
    fractions, names = pair.values("stall_ratio"), pair.names
    text = (
        f"In {names[high]}, {percent(fractions[high])} of the updates changed no code, compared with "
        f"{percent(fractions[low])} in {names[low]} (both tracked in {pair.layers[0][0].grid}, {when})"
    )
    keeps = [all(not layer.is_stored for layer in side) for side in pair.layers]
    stores = [all(layer.is_stored for layer in side) for side in pair.layers]
    for side in (0, 1):
        if keeps[side] and stores[1 - side]:
            dtypes = dict.fromkeys(layer.dtype for layer in pair.layers[side] if layer.dtype)
            text += (
                f": {names[side]} accumulates these updates in its {' and '.join(dtypes) or 'master'} weights, "
                f"{names[1 - side]} keeps no higher-precision copy and loses them"
            )
    return text + _describe_largest_layer(pair, high)


def _gap(a: float, b: float) -> float:
    """How far one fraction is above another. Near 1, the ratio of the remainders counts too."""
    return a - b + 0.05 * math.log(max(1 - b, 1e-6) / max(1 - a, 1e-6))


def _describe_largest_layer(pair: _Pair, high: int) -> str:
    """The layer with the largest difference, if it differs clearly from the model-wide difference."""
    overall = pair.values("stall_ratio")
    gaps = []
    for mine, theirs in zip(pair.layers[high], pair.layers[1 - high], strict=True):
        a, b = (layer.get("stall_ratio").part(-1, pair.end).summary for layer in (mine, theirs))
        if not math.isnan(a - b):
            gaps.append((_gap(a, b), mine.weight, a, b))
    if len(gaps) < 2:
        return ""
    gap, name, a, b = max(gaps)
    if gap < _gap(overall[high], overall[1 - high]) + 0.1:
        return ""
    return f"; most in {name}, {percent(a)} compared with {percent(b)}"
