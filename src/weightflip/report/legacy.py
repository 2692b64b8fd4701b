"""Descriptions of numbers for old files, written before runs declared their numbers.

Do not add to this list: runs now declare their own numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from weightflip.records import CORE_VALUES, RunInfo, Value

_VALUES = (
    Value(
        "oscillation_ratio",
        "rate",
        "oscillation",
        "fraction of flips that reverse the previous one",
        "share",
        order=10,
        heat_map=True,
    ),
    Value(
        "oscillating_fraction", "gauge", "oscillating", "fraction of weights that oscillate often", "share", order=11
    ),
    Value("travel_ratio", "rate", "travel", "distance of the quantized weights / distance of the weights", order=20),
    Value(
        "travel_high_fraction", "gauge", "travel high", "fraction of weights with a ratio above 16", "share", order=21
    ),
    Value("weight_driven_fraction", "rate", "weight-driven", "flips also under the old scale", "share", order=30),
    Value("ever_flipped", "gauge", "ever flipped", "fraction of weights that have flipped", "share", order=50),
    Value("net_flipped", "gauge", "net flipped", "fraction of weights on another code", "share", order=51),
    Value("flip_excess", "rate", "flip excess", "flips / flips that the steps account for", order=65),
    Value("zero_fraction", "gauge", "zero", "fraction of codes that stand for 0", "share", order=70),
    Value("saturated_fraction", "gauge", "saturated", "fraction of codes at the two ends", "share", order=71),
    Value("underflow_fraction", "gauge", "underflow", "fraction of weights that round to 0", "share", order=72),
    Value("stable_rank", "gauge", "stable rank", order=80),
    Value("effective_rank", "gauge", "effective rank", order=81),
)


def add_legacy_values(info: RunInfo, gauges: Iterable[str] = ()) -> RunInfo:
    """Add descriptions of known numbers that a run does not declare.

    Args:
        info: The description read from the files.
        gauges: Names of the gauges in the records.
    """
    known = {value.name for value in (*CORE_VALUES, *info.values)}
    added = [value for value in _VALUES if value.name not in known]
    known.update(value.name for value in added)
    added += [Value(name, "gauge") for name in gauges if name not in known]
    return replace(info, values=(*info.values, *added))
