"""The meaning of the columns in a row of counters."""

from __future__ import annotations

from weightflip.counting.columns import Columns
from weightflip.metrics.columns import make_groups
from weightflip.records import Quotient


def columns(*metrics: str) -> Columns:
    return Columns(make_groups(("flips", *metrics), None)[1])


def test_counts_add_up_and_gauges_do_not():
    plain = columns()
    before, now = [1, 2, 3, 4, 5, 6, 7], [10, 20, 30, 40, 50, 60, 70]
    # The fifth column is the number of non-finite weights, a gauge.
    assert plain.add(before, now) == [11, 22, 33, 44, 50, 66, 77]
    assert plain.subtract(before, now) == [9, 18, 27, 36, 50, 54, 63]
    assert plain.without_gauges(now) == [10, 20, 30, 40, 0, 60, 70]
    assert plain.nonfinite(now) == 50
    counts = plain.counts(now)
    assert (counts.flips, counts.updates, counts.stalled, counts.weight_steps) == (10, 20, 30, 40)
    assert (counts.scale_steps, counts.scale_changes) == (60, 70)


def test_each_metric_group_has_its_own_columns():
    found = columns("oscillation", "range")
    assert len(found) == 7 + found.metric_columns
    row = found.zeros()
    at = found.ratio("oscillation_ratio")
    row[at] = [3.0, 12.0]
    assert found.counts(row).ratios["oscillation_ratio"] == Quotient(3.0, 12.0)
    assert found.ratio("saturated_fraction") is None  # a gauge
    assert found.gauges(row) == ({}, {})
    assert found.to_integers([1.0] * len(found))[:7] == [1] * 7
