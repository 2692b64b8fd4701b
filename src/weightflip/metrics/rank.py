"""Stable and effective rank of weight matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from weightflip.metrics.base import LayerMetric, Metric, Weight, register
from weightflip.records import Value


@register
class Rank(Metric):
    """``metrics=("flips", "rank")``: ``stable_rank`` and ``effective_rank``, every 500 steps, from one SVD.

    Let ``s`` be the singular values of the weight in float32, with all dimensions but the first flattened. The stable
    rank is ``sum(s**2) / max(s)**2``. The effective rank is ``exp(-sum(p * log(p)))`` with ``p = s / sum(s)`` (Roy &
    Vetterli 2007, "The effective rank", equation 4). Both lie between 1 and ``min(rows, columns)``. The value of a
    model or a group of layers is the mean over its layers. Weights with one dimension, with only zeros, with NaN or
    infinities, or that are sharded over processes have no rank. The SVD synchronizes with the device.
    """

    name = "rank"
    values = (
        Value(
            "stable_rank", "gauge", "stable rank", "sum of the squared singular values / the largest of them", order=80
        ),
        Value(
            "effective_rank", "gauge", "effective rank", "exponential of the entropy of the singular values", order=81
        ),
    )
    every = 500
    supports_shards = False

    def open(self, name: str, weight: Weight) -> LayerMetric | None:
        return _LayerRank() if weight.ndim >= 2 else None


class _LayerRank(LayerMetric):
    def gauge(self, weight: Weight, gauges: Tensor, bins: Tensor) -> None:
        matrix = weight.values.detach().to(torch.float32).flatten(1)
        if not torch.isfinite(matrix).all() or not matrix.any():
            return
        values = torch.linalg.svdvals(matrix).to(torch.float64)
        shares = values / values.sum()
        gauges[0, 0] = values.square().sum() / values[0] ** 2
        gauges[1, 0] = torch.special.entr(shares).sum().exp()
        gauges[:, 1] = 1
