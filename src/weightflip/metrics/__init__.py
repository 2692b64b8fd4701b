"""Metric groups in addition to flips and stalls: one file per group, found by name."""

from __future__ import annotations

from weightflip.metrics.base import (
    CORE_VALUES,
    Bins,
    LayerMetric,
    Metric,
    Slice,
    Weight,
    make_metrics,
    metric_names,
    register,
)
from weightflip.records import Value

__all__ = [
    "CORE_VALUES",
    "Bins",
    "LayerMetric",
    "Metric",
    "Slice",
    "Value",
    "Weight",
    "make_metrics",
    "metric_names",
    "register",
]
