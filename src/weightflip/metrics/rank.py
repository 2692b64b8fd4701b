"""How many directions a weight matrix still uses."""

from __future__ import annotations

import torch
from torch import Tensor

from weightflip.metrics.base import LayerMetric, Metric, Weight, register
from weightflip.records import Value


@register
class Rank(Metric):
    """``metrics=("flips", "rank")``: ``stable_rank`` and ``effective_rank``, every 500 steps, from one SVD.

    With ``s`` the singular values of the weight in float32 (its dimensions but the first flattened): the stable rank is
    ``sum(s**2) / max(s)**2``; the effective rank is ``exp(-sum(p * log(p)))`` with ``p = s / sum(s)`` (Roy & Vetterli
    2007, "The effective rank", equation 4). Both lie between 1 and ``min(rows, columns)``. Of the model and of groups:
    the mean over their layers. A weight of one dimension, of zeros, with NaN or infinities, or that is sharded over
    processes has none. The SVD waits for the device.
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
    of_shards = False

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
