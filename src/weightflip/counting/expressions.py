"""Check that the expression of a metric group computes the same as its slices, before a kernel uses the expression.

A kernel is tested against plain torch's evaluation of the expression (:mod:`weightflip.kernels.proof`). This test shows
that the expression is what the group computes without a kernel. It makes a few steps with a small weight, once for each
class of groups, which takes a few milliseconds. It draws no random numbers.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from weightflip import functional, kernels
from weightflip.kernels import bits
from weightflip.kernels.pointwise import NEW, NEW_UNDER_OLD_SCALE, OLD, Expression, evaluate
from weightflip.metrics import LayerMetric, Metric, Slice, Weight
from weightflip.quantizers.protocol import ElementwiseQuantizer

logger = logging.getLogger("weightflip")

# In which direction a weight moves in each step; seven kinds of weights take turns.
_DIRECTIONS = ((1, -1, 0, 0, -1, 1, -1), (1, 1, 1, 0, -1, 0, 1), (-1, -1, 0, 0, -1, 0, 1), (-1, 1, -1, 0, -1, 1, 0))
_ROWS, _COLUMNS, _GROUPS = 16, 67, 2

_are_equal: dict[tuple[Any, ...], bool] = {}


def is_usable(metric: Metric, layer_metric: LayerMetric, name: str, weight: Tensor, quantizer: Any) -> bool:
    """Whether the expression of a group computes the same as its slices. If not, this is logged, once.

    Args:
        metric: The group.
        layer_metric: Its state for a weight, with an expression.
        name: The name of the weight.
        weight: The weight. Not read.
        quantizer: Its quantizer.
    """
    if not isinstance(quantizer, ElementwiseQuantizer):
        return False
    key = type(layer_metric), layer_metric.pointwise, quantizer.code_dtype(weight), weight.device
    if key not in _are_equal:
        difference = find_difference(metric, name, weight, quantizer)
        _are_equal[key] = difference is None
        if difference is not None:
            logger.warning(
                "weightflip: the metric group %r is counted by its slice(), which is slower: its expression, "
                "pointwise, is different: %s",
                metric.name,
                difference,
            )
    return _are_equal[key]


@torch.no_grad()
def find_difference(metric: Metric, name: str, like: Tensor, quantizer: ElementwiseQuantizer) -> str | None:
    """Describe how the expression of a group differs from its slices; None if it does not, or if it has none.

    Args:
        metric: The group.
        name: A name for the weight of the test.
        like: A weight of the dtype, device and number of dimensions to test.
        quantizer: The quantizer of the test.
    """
    try:
        return _Trial(name, like, quantizer).difference(metric)
    except Exception as error:
        return f"a test with a small weight raised {type(error).__name__}: {error}"


class _Trial:
    """A small weight, which makes a few steps."""

    def __init__(self, name: str, like: Tensor, quantizer: ElementwiseQuantizer) -> None:
        columns = _COLUMNS if quantizer.group is None else _GROUPS * quantizer.group
        shape = (*(1 for _ in range(like.ndim - 2)), *((_ROWS,) if like.ndim > 1 else ()), columns)
        self._at = torch.arange(torch.Size(shape).numel(), device=like.device).view(shape)
        # Numbers of both signs and many magnitudes, and some zeros.
        numbers = (self._at * 7919 % 1009 - 504).float() / 504
        self._weight = torch.where(self._at % 11 == 0, 0, numbers**3).to(like.dtype)
        self._name, self._quantizer = name, quantizer
        self._scratch = kernels.ScratchPool()
        self._encoding = functional.Encoding(quantizer, self._scratch, "eager")
        self._codes = torch.empty(shape, dtype=quantizer.code_dtype(self._weight), device=like.device)
        self._scale = functional.encode_into(self._weight, self._encoding, self._codes)
        self._fault: str | None = None

    def difference(self, metric: Metric) -> str | None:
        # Not under the name of a layer: a group may remember what it opened.
        layer_metric = metric.open(f"{self._name} (test)", self._view)
        if layer_metric is None or layer_metric.pointwise is None:
            return None
        for step in range(len(_DIRECTIONS) + 1):
            layer_metric.before(self._view)
            self._move(step)
            self._count(metric, layer_metric)
            if self._fault is not None:
                return self._fault
        return None

    @property
    def _view(self) -> Weight:
        grouped = self._quantizer.grouped
        return Weight(grouped(self._weight), grouped(self._codes), self._scale, self._quantizer, "eager")

    def _move(self, step: int) -> None:
        """Change about half of the weights; also the largest, and with it the scale. In the last step, one is NaN."""
        if step == len(_DIRECTIONS):
            self._weight.view(-1)[1] = float("nan")
            return
        directions = torch.tensor(_DIRECTIONS[step], device=self._at.device)[self._at % 7]
        self._weight.mul_(1 + 0.4 * directions)

    def _count(self, metric: Metric, layer_metric: LayerMetric) -> None:
        pointwise, tensors = layer_metric.pointwise, layer_metric.tensors
        assert pointwise is not None
        sums = torch.zeros(len(metric.ratios), 2, dtype=torch.float64, device=self._at.device)
        values, old_scale = self._quantizer.grouped(self._weight), self._scale

        def observe(index: kernels.Index, old: Tensor, new: Tensor) -> None:
            part = Slice(index, values[index], old, new, old_scale, None, self._scratch, "eager")
            leaves = {OLD: old.clone(), NEW: new.clone()}
            if old_scale is not None:
                leaves[NEW_UNDER_OLD_SCALE] = part.codes_under(old_scale, self._quantizer).clone()
            for state, _ in pointwise.states:
                leaves[state] = _of_each(state, tensors, old)
            layer_metric.slice(part, sums)
            self._fault = _fault_of_sums(pointwise, leaves, sums) or _fault_of_states(pointwise, leaves, tensors)

        self._scale = functional.advance(
            self._weight,
            self._encoding,
            self._codes,
            None,
            torch.zeros(3, dtype=torch.int64, device=sums.device),
            observe,
        )
        layer_metric.after(self._view, torch.zeros_like(sums))


def _of_each(state: Expression, tensors: dict[str, Tensor], like: Tensor) -> Tensor:
    """Return a copy of a state in the shape of the codes."""
    name, dtype = state.operands
    if dtype is torch.bool:
        return bits.unpack(tensors[name], like.numel()).view(like.shape)
    return tensors[name].clone().view(like.shape)


def _fault_of_sums(pointwise: kernels.Pointwise, leaves: dict[Expression, Tensor], sums: Tensor) -> str | None:
    if not pointwise.counts:
        return None
    flipped = leaves[OLD] != leaves[NEW]
    flips = torch.count_nonzero(flipped)
    expected = torch.stack(
        [torch.stack([torch.count_nonzero(evaluate(flag, leaves) & flipped), flips]) for flag in pointwise.counts]
    )
    if torch.equal(sums, expected.to(sums.dtype)):
        return None
    return f"it counts {expected.tolist()}, slice() {sums.tolist()}"


def _fault_of_states(
    pointwise: kernels.Pointwise, leaves: dict[Expression, Tensor], tensors: dict[str, Tensor]
) -> str | None:
    for state, value in pointwise.states:
        found = _of_each(state, tensors, leaves[OLD])
        expected = evaluate(value, leaves).to(found.dtype)
        wrong = int(torch.count_nonzero((found != expected) & ~(found.isnan() & expected.isnan())))
        if wrong:
            return f"{wrong} of {found.numel()} numbers in {state.operands[0]!r} differ"
    return None
