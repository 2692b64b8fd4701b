"""Averages series in the time bins of a plot."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from weightflip.report.run import Run, Series

# Maximum columns of a heat map and points of a curve. A screen cannot show more.
_TIME_BINS = 240


def bin_edges(run: Run) -> NDArray[np.float64]:
    """Edges of the time bins of a run, at logging points. At most ``_TIME_BINS`` bins."""
    steps = run.steps
    ends = steps if len(steps) <= _TIME_BINS else steps[np.linspace(0, len(steps) - 1, _TIME_BINS).round().astype(int)]
    return np.concatenate([[float(min(run.begin, ends[0] - 1))], ends.astype(np.float64)])


def bin_series(series: Series, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """The value in each bin (edge, next edge]: the last one of a gauge, else the ratio of the sums.

    Returns:
        (bins,), NaN for bins without points.
    """
    bins = len(edges) - 1
    binned = np.full(bins, math.nan)
    if not len(series):
        return binned
    at = np.searchsorted(edges[1:], series.steps, side="left")
    inside = at < bins
    if series.gauge:
        binned[at[inside]] = series.values[inside]
        return binned
    numerators = np.bincount(at[inside], series.numerators[inside], bins)
    denominators = np.bincount(at[inside], series.denominators[inside], bins)
    has_points = denominators > 0
    binned[has_points] = numerators[has_points] / denominators[has_points]
    return binned
