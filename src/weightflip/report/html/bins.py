"""Series in the time bins of a plot."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from weightflip.report.run import Run, Series

# Columns of a heat map and points of a curve: more than that no screen shows.
_TIME_BINS = 240


def edges_of(run: Run) -> NDArray[np.float64]:
    """Borders of the time bins of a run, at logging points: at most ``_TIME_BINS`` bins."""
    steps = run.steps
    ends = steps if len(steps) <= _TIME_BINS else steps[np.linspace(0, len(steps) - 1, _TIME_BINS).round().astype(int)]
    return np.concatenate([[float(min(run.begin, ends[0] - 1))], ends.astype(np.float64)])


def binned(series: Series, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """A number in each bin (edge, next edge]: of a gauge the last one, else the quotient of the sums.

    Returns:
        (bins,), NaN where there is no point.
    """
    bins = len(edges) - 1
    found = np.full(bins, math.nan)
    if not len(series):
        return found
    at = np.searchsorted(edges[1:], series.steps, side="left")
    inside = at < bins
    if series.gauge:
        found[at[inside]] = series.values[inside]
        return found
    numerators = np.bincount(at[inside], series.numerators[inside], bins)
    denominators = np.bincount(at[inside], series.denominators[inside], bins)
    there = denominators > 0
    found[there] = numerators[there] / denominators[there]
    return found
