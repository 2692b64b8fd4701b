"""The fraction of weights that have flipped at all, and the fraction that differ from their first code."""

from __future__ import annotations

import torch
from torch import Tensor

from weightflip.kernels.pointwise import NEW, OLD, Pointwise, state
from weightflip.metrics.base import LayerMetric, Metric, Slice, Weight, register
from weightflip.records import Value


@register
class Coverage(Metric):
    """``metrics=("flips", "coverage")``: ``ever_flipped`` and ``net_flipped``, since tracking began.

    ``ever_flipped`` is the fraction of the weights that have flipped at least once, ``net_flipped`` the fraction whose
    code differs from their code when tracking began: 1 - C2I of Liu et al. 2021 (arXiv:2106.11890).
    """

    name = "coverage"
    values = (
        Value(
            "ever_flipped",
            "gauge",
            "ever flipped",
            "fraction of weights that have flipped since the start",
            "share",
            order=50,
        ),
        Value(
            "net_flipped",
            "gauge",
            "net flipped",
            "fraction of weights with another code than at the start",
            "share",
            order=51,
        ),
    )

    def open(self, name: str, weight: Weight) -> LayerMetric:
        return _LayerCoverage(weight)


_CHANGED = state("changed_bits")


class _LayerCoverage(LayerMetric):
    state = ("first_codes", "changed_bits")
    pointwise = Pointwise(states=((_CHANGED, _CHANGED | (OLD ^ NEW)),))

    def __init__(self, weight: Weight) -> None:
        self.first_codes = weight.codes.clone()
        self.changed_bits = torch.zeros_like(weight.codes)
        """The bits of each code that any flip has changed; 0 without flips. Updating it needs no mask."""

    def slice(self, part: Slice, sums: Tensor) -> None:
        changed = torch.bitwise_xor(part.old, part.new, out=part.scratch("changed", part.old, part.old.dtype))
        self.changed_bits[part.index].bitwise_or_(changed)

    def gauge(self, weight: Weight, gauges: Tensor, bins: Tensor) -> None:
        gauges[0, 0] = torch.count_nonzero(self.changed_bits)
        gauges[1, 0] = torch.count_nonzero(self.first_codes != weight.codes)
        gauges[:, 1] = weight.codes.numel()
