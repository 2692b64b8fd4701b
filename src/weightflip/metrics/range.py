"""The fractions of weights at 0 and at the ends of the format's range."""

from __future__ import annotations

import torch
from torch import Tensor

from weightflip.kernels import slice_elements, slices
from weightflip.metrics.base import LayerMetric, Metric, Weight, register
from weightflip.records import Value


@register
class Range(Metric):
    """``metrics=("flips", "range")``: current ``zero_fraction``, ``saturated_fraction`` and ``underflow_fraction``.

    * ``zero_fraction``: weights whose code stands for 0 / weights.
    * ``saturated_fraction``: weights with one of the two outermost codes / weights. If the scale follows the largest
      weight, that weight is always one of them.
    * ``underflow_fraction``: weights other than 0 whose code stands for 0 / weights other than 0.

    Quantizers that encode the whole weight at once do not have these values. Neither has ``binary``, which has no 0.
    """

    name = "range"
    values = (
        Value("zero_fraction", "gauge", "zero", "fraction of codes that stand for 0", "share", order=70),
        Value(
            "saturated_fraction", "gauge", "saturated", "fraction of codes at the format's two ends", "share", order=71
        ),
        Value(
            "underflow_fraction",
            "gauge",
            "underflow",
            "fraction of weights other than 0 with the code of 0",
            "share",
            order=72,
        ),
    )

    def open(self, name: str, weight: Weight) -> LayerMetric | None:
        quantizer = weight.elementwise
        outermost = None if quantizer is None else quantizer.ordinal_range(weight.values)
        return None if outermost is None else _LayerRange(*outermost)


class _LayerRange(LayerMetric):
    def __init__(self, smallest: int, largest: int) -> None:
        self.smallest, self.largest = smallest, largest

    def gauge(self, weight: Weight, gauges: Tensor, bins: Tensor) -> None:
        zeros, saturated, underflows = gauges
        for index in slices(weight.codes, slice_elements(weight.codes)):
            codes, is_nonzero = weight.codes[index], weight.values[index] != 0
            is_zero = codes == 0
            zeros[0] += torch.count_nonzero(is_zero)
            saturated[0] += torch.count_nonzero((codes == self.smallest) | (codes == self.largest))
            underflows[0] += torch.count_nonzero(is_zero & is_nonzero)
            underflows[1] += torch.count_nonzero(is_nonzero)
        gauges[:2, 1] = weight.codes.numel()
