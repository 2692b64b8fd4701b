"""Parse ``metrics=``, and assign columns of a layer's counters to each group."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from weightflip import checks
from weightflip.metrics.base import Metric, make_metrics
from weightflip.metrics.oscillation import Oscillation
from weightflip.records import Histogram, Quotient

METRICS = ("flips", "stalls")

MetricsLike: TypeAlias = "Sequence[str | Metric] | Mapping[str | Metric, int | None]"


class Group(NamedTuple):
    """A metric group, and its columns among those of all groups."""

    metric: Metric
    every: int
    sums: slice
    gauges: slice
    bins: slice


def make_groups(metrics: Any, oscillation_ema: float | tuple[float, float] | None) -> tuple[list[str], list[Group]]:
    """Return the names in ``metrics=``, and the groups other than flips and stalls."""
    groups: dict[Any, Any] = {}
    if isinstance(metrics, Mapping):
        groups = dict(metrics)
    elif isinstance(metrics, Iterable) and not isinstance(metrics, str):
        metrics = list(metrics)
        if all(isinstance(metric, Hashable) for metric in metrics):
            groups = dict.fromkeys(metrics)
    names = [name for name in METRICS if name in groups]
    if "flips" not in groups:
        hint = (
            "did you mean 'flips'? " if any(checks.closest_match(name, METRICS) == "flips" for name in groups) else ""
        )
        raise ValueError(
            "metrics= must be a sequence that contains 'flips', or a mapping from names to the number of steps between "
            f"two evaluations; {hint}got {metrics!r}"
        )
    for name in METRICS:
        every = groups.pop(name, None)
        if (
            every is not None
            and checks.whole_number(f"metrics={{{name!r}: n}} runs every n steps, and n", every, 1) != 1
        ):
            raise ValueError(f"metrics= counts {name!r} in every tracked step; use track_every= for fewer")
    if oscillation_ema is not None:
        if "oscillation" not in groups:
            raise ValueError("oscillation_ema= belongs to the group 'oscillation'; add it to metrics=")
        options = oscillation_ema if isinstance(oscillation_ema, (tuple, list)) else (oscillation_ema,)
        if not 1 <= len(options) <= 2:
            raise ValueError(
                f"oscillation_ema= must be a momentum, or a momentum and a threshold; got {oscillation_ema!r}"
            )
        groups = {Oscillation(*options) if name == "oscillation" else name: every for name, every in groups.items()}
    made, start = [], 0
    for metric, every in make_metrics(groups):
        sums = slice(start, start + 2 * len(metric.ratios))
        gauges = slice(sums.stop, sums.stop + 2 * len(metric.gauges))
        bins = slice(gauges.stop, gauges.stop + sum(len(bins.edges) - 1 for bins in metric.histograms))
        made.append(Group(metric, every, sums, gauges, bins))
        start = bins.stop
    return names + [group.metric.name for group in made], made


def ratios_of(groups: Sequence[Group], row: Sequence[float]) -> dict[str, Quotient]:
    """Return the groups' ratios of a layer from their columns of its row."""
    return {name: pair for group in groups for name, pair in _pairs(group.metric.ratios, row[group.sums])}


def gauges_of(groups: Sequence[Group], row: Sequence[float]) -> tuple[dict[str, Quotient], dict[str, Histogram]]:
    """Return the groups' gauges and histograms of a layer from their columns of its row."""
    gauges, histograms = {}, {}
    for group in groups:
        # A denominator of 0 means that the group was not due.
        gauges.update({name: q for name, q in _pairs(group.metric.gauges, row[group.gauges]) if q.denominator})
        counts = [int(count) for count in row[group.bins]]
        for bins in group.metric.histograms:
            of_bins, counts = tuple(counts[: len(bins.edges) - 1]), counts[len(bins.edges) - 1 :]
            if any(of_bins):
                histograms[bins.name] = Histogram(bins.edges, of_bins)
    return gauges, histograms


def _pairs(names: Sequence[str], numbers: Sequence[float]) -> list[tuple[str, Quotient]]:
    return [(name, Quotient(*numbers[2 * i : 2 * i + 2])) for i, name in enumerate(names)]
