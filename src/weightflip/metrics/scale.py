"""The fraction of flips that the weight caused, and not a new scale."""

from __future__ import annotations

import torch
from torch import Tensor

from weightflip.kernels.pointwise import NEW_UNDER_OLD_SCALE, OLD, Pointwise, differ
from weightflip.metrics.base import LayerMetric, Metric, Slice, Weight, register
from weightflip.quantizers.protocol import ElementwiseQuantizer
from weightflip.records import Value


@register
class Scale(Metric):
    """``metrics=("flips", "scale")``: ``weight_driven_fraction`` = weight-driven flips / flips.

    A flip is weight-driven if the code also changes when the new weight is encoded with the old scale. All other flips
    are scale-driven. Formats without a scale, and quantizers that encode the whole weight at once, do not have this
    value.
    """

    name = "scale"
    values = (
        Value(
            "weight_driven_fraction",
            "rate",
            "weight-driven",
            "fraction of flips made by the weight, not by its scale",
            "share",
            order=30,
        ),
    )

    def open(self, name: str, weight: Weight) -> LayerMetric | None:
        quantizer = weight.elementwise
        return None if quantizer is None or weight.scale is None else _LayerScale(quantizer)


class _LayerScale(LayerMetric):
    pointwise = Pointwise((differ(NEW_UNDER_OLD_SCALE, OLD),))

    def __init__(self, quantizer: ElementwiseQuantizer) -> None:
        self.quantizer = quantizer

    def slice(self, part: Slice, sums: Tensor) -> None:
        assert part.old_scale is not None
        flipped = part.new != part.old
        sums[0, 0].add_(torch.count_nonzero(flipped & (part.codes_under(part.old_scale, self.quantizer) != part.old)))
        sums[0, 1].add_(torch.count_nonzero(flipped))
