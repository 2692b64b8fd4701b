"""Test a kernel that compares samples before it is used: it must do the same as the methods of the metric group.

The test runs once for each metric group, format and dtypes, with numbers of many magnitudes, NaN and infinities, for a
weight that is sampled and one that is used whole, over two steps. It draws no random numbers.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from weightflip import kernels
from weightflip.counting.quantizer_cache import QuantizerCache
from weightflip.metrics import Metric, Weight
from weightflip.quantizers.protocol import ElementwiseQuantizer

logger = logging.getLogger("weightflip")


class Kind(NamedTuple):
    """What a kernel is tested for."""

    quantizer: ElementwiseQuantizer
    weight: torch.dtype
    codes: torch.dtype

    def numbers(self) -> Tensor:
        """Return the number that each code stands for without a scale."""
        limits = torch.iinfo(self.codes)
        known = torch.arange(limits.min, limits.max + 1, dtype=self.codes, device="cpu")
        return _as_float32(self.quantizer.values(known, None), "values()", self.quantizer)


def value_scale(quantizer: Any, scale: Tensor) -> Tensor:
    """Return the scales as numbers are multiplied or divided by them, one after the other.

    Raises:
        TypeError: They are not float32.
    """
    return _as_float32(quantizer.value_scale(scale).reshape(-1), "value_scale()", quantizer)


def _as_float32(found: Tensor, what: str, quantizer: Any) -> Tensor:
    if found.dtype is not torch.float32:
        raise TypeError(f"expected {what} of quantizer {quantizer.name!r} to be float32, got {found.dtype}")
    return found.contiguous()


_answers: QuantizerCache[Tensor | None] = QuantizerCache()


def numbers_if_usable(kernel: type[kernels.Samples], metric: Metric, kind: Kind) -> Tensor | None:
    """Return the numbers of all codes if a kernel does the same as the methods of a metric group; otherwise None.

    The first call for a kind tests the kernel.
    """

    def test() -> Tensor | None:
        return kind.numbers() if _passes_test(kernel, metric, kind) else None

    return _answers.get(kind.quantizer, (kernel, type(metric), kind.weight, kind.codes), test)


@torch.no_grad()
def _passes_test(kernel: type[kernels.Samples], metric: Metric, kind: Kind) -> bool:
    fault, what = None, f"samples of {kind.quantizer.name} ({kind.weight}) for {metric.name!r}"
    try:
        if kind.quantizer.value_rule() is None or not kernel.can_do(kind.weight, kind.codes):
            return False
        # All weights, and a sample of more.
        for rows, is_finite in ((3, True), (3, False), (70, True), (70, False)):
            fault = fault or find_fault(kernel, metric, kind, rows, is_finite=is_finite)
    except Exception as error:
        fault = f"it raised {type(error).__name__}: {error}"
    if fault is not None:
        logger.warning("weightflip: %s: the kernel is not used, plain torch compares them instead: %s", what, fault)
    else:
        logger.info("%s: equal", what)
    return fault is None


def find_fault(kernel: type[kernels.Samples], metric: Metric, kind: Kind, rows: int, *, is_finite: bool) -> str | None:
    """Describe how a kernel's results differ from those of a metric group's own methods; None if they do not.

    Args:
        kernel: The kernel.
        metric: The group.
        kind: The format and the dtypes.
        rows: The number of rows of the weight.
        is_finite: Whether all weights are finite.
    """
    quantizer = kind.quantizer
    moments = [_moment(kind, rows, number, is_finite=is_finite) for number in range(3)]
    expected, found = (metric.open("weight (test)", moments[0]) for _ in range(2))
    if expected is None or found is None:
        return None
    assert found.sample is not None
    weight, codes = moments[0].values.clone(), moments[0].codes.clone()
    scales = [None if moment.scale is None else value_scale(quantizer, moment.scale) for moment in moments]
    group = 0 if scales[0] is None or len(scales[0]) == 1 else codes.numel() // len(scales[0])
    divides = None if scales[0] is None else quantizer.value_rule() == "divides"
    of_weight = weight.data_ptr(), codes.data_ptr(), found.sample, group, kind.numbers(), divides, 0
    addresses = [np.array([0 if scale is None else scale.data_ptr()]) for scale in scales]
    samples = kernel([kernels.SampledWeight(*of_weight)])
    samples.take()
    for before, after, old, new in zip(moments, moments[1:], addresses, addresses[1:], strict=False):
        sums = torch.zeros(2, 4, dtype=torch.float64, device="cpu")
        expected.before(before)
        expected.after(after, sums[0].view(2, 2))
        weight.copy_(after.values)
        codes.copy_(after.codes)
        samples.move(np.zeros(1, dtype=np.int64), old, new, sums[1:])
        if not torch.equal(*sums):
            return f"its sums are {sums[1].tolist()}, those of plain torch {sums[0].tolist()}"
    differ = [name for name, state in expected.tensors.items() if not torch.equal(state, found.tensors[name])]
    return f"{differ} differ" if differ else None


def _moment(kind: Kind, rows: int, number: int, *, is_finite: bool) -> Weight:
    """Return a weight with numbers of many magnitudes; others for another number."""
    quantizer = kind.quantizer
    columns = 10 * quantizer.group if quantizer.group else 331
    numbers = torch.arange(rows * columns, device="cpu").mul_(7919).remainder_(100003).sub_(50001).double()
    numbers.mul_(torch.exp2(torch.arange(len(numbers), device="cpu") % 23 - 20.0)).mul_(1e-5)
    # Some move by more than a cell, some by less, and some not at all.
    numbers.mul_(1 + number * torch.tensor([0.3, 0.004, 0.0], device="cpu").repeat(len(numbers))[: len(numbers)])
    if not is_finite:
        for at, value in ((5, torch.nan), (columns + 7, torch.inf), (2 * columns - 9, -torch.inf)):
            numbers[at : at + number + 1] = value
    weight = numbers.view(rows, columns).to(kind.weight)
    codes = quantizer.encode(weight)
    return Weight(quantizer.grouped(weight), quantizer.grouped(codes.ordinals), codes.scale, quantizer)
