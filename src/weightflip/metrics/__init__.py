"""Metric groups in addition to flips and stalls: one file per group, found by name."""

from __future__ import annotations

from weightflip.kernels.pointwise import NEW, NEW_UNDER_OLD_SCALE, OLD, Pointwise, differ, state, where
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
    "NEW",
    "NEW_UNDER_OLD_SCALE",
    "OLD",
    "Bins",
    "LayerMetric",
    "Metric",
    "Pointwise",
    "Slice",
    "Value",
    "Weight",
    "differ",
    "make_metrics",
    "metric_names",
    "register",
    "state",
    "where",
]
