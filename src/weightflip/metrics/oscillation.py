"""Weights that flip back and forth."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from weightflip.kernels.pointwise import NEW, OLD, Pointwise, state, where
from weightflip.metrics.base import LayerMetric, Metric, Slice, Weight, register
from weightflip.records import Value

# The frequency above which Nagel et al. call a weight oscillating in their tables.
_THRESHOLD = 0.005


_OSCILLATING = Value(
    "oscillating_fraction", "gauge", "oscillating", "fraction of weights that oscillate often", "share", order=11
)


@register
class Oscillation(Metric):
    """``metrics=("flips", "oscillation")``: ``oscillation_ratio`` = oscillations / flips.

    An oscillation is a flip in the direction opposite to that weight's previous flip (Nagel et al. 2022,
    arXiv:2203.11086, section 4.1). The direction is that of the code, that is, of the value relative to its scale. The
    last direction takes one byte per weight.

    With ``ema``, there is also ``oscillating_fraction``, the fraction of weights with ``f > threshold``. Here ``f`` is
    the oscillation frequency of a weight as an exponential moving average: ``f = ema * o + (1 - ema) * f``, where ``o``
    is 1 in steps in which the weight oscillates, otherwise 0 (their equation 4). It takes four more bytes per weight.

    Args:
        ema: The momentum, in (0, 1]; None for no average. Nagel et al. use 0.01.
        threshold: The threshold of ``f``. Nagel et al. also use 0.005.

    Raises:
        ValueError: Invalid momentum or threshold.
    """

    name = "oscillation"
    values: tuple[Value, ...] = (
        Value(
            "oscillation_ratio",
            "rate",
            "oscillation",
            "fraction of flips that reverse the weight's previous flip",
            "share",
            order=10,
            heat_map=True,
        ),
    )

    def __init__(self, ema: float | None = None, threshold: float = _THRESHOLD) -> None:
        if ema is not None and not (_is_number(ema) and 0 < ema <= 1):
            raise ValueError(f"oscillation_ema= must be a momentum above 0 and at most 1, such as 0.01; got {ema!r}")
        if not (_is_number(threshold) and 0 <= threshold < 1):
            raise ValueError(
                f"the threshold in oscillation_ema= must be at least 0 and below 1, such as 0.005; got {threshold!r}"
            )
        self.ema = None if ema is None else float(ema)
        self.threshold = float(threshold)
        if ema is not None:
            self.values = (*self.values, _OSCILLATING)

    def open(self, name: str, weight: Weight) -> LayerMetric:
        return _LayerOscillation(weight, self.ema, self.threshold)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


_LAST, _FREQUENCY = state("directions", torch.int8), state("frequencies", torch.float32)
_UP, _DOWN = NEW > OLD, NEW < OLD
_OSCILLATES = (_UP & (_LAST < 0)) | (_DOWN & (_LAST > 0))


def _pointwise(ema: float | None) -> Pointwise:
    states = [(_LAST, where(_UP, 1, where(_DOWN, -1, _LAST)))]
    if ema is not None:
        rest = _FREQUENCY * (1 - ema)
        states.append((_FREQUENCY, where(_OSCILLATES, rest + ema, rest)))
    return Pointwise((_OSCILLATES,), tuple(states))


class _LayerOscillation(LayerMetric):
    def __init__(self, weight: Weight, ema: float | None, threshold: float) -> None:
        self.directions = torch.zeros_like(weight.codes, dtype=torch.int8)
        """Direction of the last flip: 1 or -1; 0 before the first flip."""
        self.state = ("directions",)
        self.ema, self.threshold, self.pointwise = ema, threshold, _pointwise(ema)
        if ema is not None:
            self.frequencies = torch.zeros_like(weight.codes, dtype=torch.float32)
            self.state = ("directions", "frequencies")

    def slice(self, part: Slice, sums: Tensor) -> None:
        # Arithmetic on bytes: on CPU torch.where and masks take ten times as long.
        last = self.directions[part.index]
        up = torch.gt(part.new, part.old, out=part.scratch("up", part.old, torch.bool)).view(torch.int8)
        down = torch.lt(part.new, part.old, out=part.scratch("down", part.old, torch.bool)).view(torch.int8)
        flipped = torch.add(up, down, out=part.scratch("flipped", part.old, torch.int8))
        direction = up.sub_(down)
        oscillates = torch.mul(direction, last, out=down).clamp_(max=0)
        sums[0, 0].add_(torch.count_nonzero(oscillates))
        sums[0, 1].add_(torch.count_nonzero(flipped))
        if self.ema is not None:
            # In float64, so that 1 - momentum is rounded once, as it is without `valid`.
            momentum = self.ema if part.valid is None else part.valid.double() * self.ema
            now = part.scratch("oscillates", part.old, torch.float32).copy_(oscillates).mul_(-momentum)
            self.frequencies[part.index].mul_(1 - momentum).add_(now)
        # last * (1 - flipped) + direction: the new direction of weights that flipped.
        last.sub_(flipped.mul_(last)).add_(direction)

    def gauge(self, weight: Weight, gauges: Tensor, bins: Tensor) -> None:
        if self.ema is not None:
            gauges[0, 0] = torch.count_nonzero(self.frequencies > self.threshold)
            gauges[0, 1] = weight.codes.numel()
