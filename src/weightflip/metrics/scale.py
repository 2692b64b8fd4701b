"""Flips that the weight made by itself, and flips that came with a new scale."""

from __future__ import annotations

import torch
from torch import Tensor

from weightflip.metrics.base import LayerMetric, Metric, Slice, Weight, register
from weightflip.quantizers.protocol import ElementwiseQuantizer
from weightflip.records import Value


@register
class Scale(Metric):
    """``metrics=("flips", "scale")``: ``weight_driven_fraction`` = weight-driven flips / flips.

    A flip is weight-driven if it is there also when the new weight is encoded with the old scale; the rest are
    scale-driven. Formats without a scale, and quantizers that encode the whole weight at once, have no such number.
    """

    name = "scale"
    values = (
        Value(
            "weight_driven_fraction",
            "rate",
            "weight-driven",
            "share of flips made by the weight, not by its scale",
            "share",
            order=30,
        ),
    )

    def open(self, name: str, weight: Weight) -> LayerMetric | None:
        quantizer = weight.elementwise
        return None if quantizer is None or weight.scale is None else _LayerScale(quantizer)


class _LayerScale(LayerMetric):
    def __init__(self, quantizer: ElementwiseQuantizer) -> None:
        self.quantizer = quantizer
        self.scale: Tensor | None = None

    def before(self, weight: Weight) -> None:
        self.scale = weight.scale

    def slice(self, part: Slice, sums: Tensor) -> None:
        assert self.scale is not None
        flipped = part.new != part.old
        sums[0, 0].add_(torch.count_nonzero(flipped & (part.codes_under(self.scale, self.quantizer) != part.old)))
        sums[0, 1].add_(torch.count_nonzero(flipped))

    def after(self, weight: Weight, sums: Tensor) -> None:
        self.scale = None
