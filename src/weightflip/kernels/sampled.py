"""The interface of kernels that compare samples of many weights with those before the optimizer's step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LANES = 16
"""Sums over a sample are made of this many running sums, of every 16th number, which are then added one by one. Plain
torch and kernels add in the same order, so that the sums are equal bit for bit."""


@dataclass(eq=False)
class Sample:
    """A sample of a weight, and how far its weights and their quantized values have moved.

    ``after`` of the metric group that holds it, or a kernel, adds to its sums over the steps, in float64:

    * ``abs(dQ)``, ``abs(dw)``, 1 for a flip, and ``min(1, abs(dw) / cell width)``, times ``share``. A cell extends half
      way to both neighboring codes, and the two outermost cells are symmetric.
    * ``abs(dw)`` to ``moved``, and ``abs(dQ)`` to ``quantized_moved``.

    Weights for which one of both is not finite count as not moved.

    Attributes:
        at: Flat indices of the sample in the weight, int64, in ascending order; None for all weights.
        weights: The sampled weights before the step, in the weight's dtype.
        codes: Their codes.
        moved: The sum for each sampled weight.
        quantized_moved: As ``moved``.
        share: The number of weights that each sampled weight represents.
        outermost: The smallest and the largest code.
        scale: The scale of ``codes``; unused by kernels.
    """

    at: Tensor | None
    weights: Tensor
    codes: Tensor
    moved: Tensor
    quantized_moved: Tensor
    share: float
    outermost: tuple[int, int]
    scale: Tensor | None = None


class SampledWeight(NamedTuple):
    """A weight of which a kernel handles a sample, as addresses. The caller ensures that they are valid.

    Attributes:
        address: Address of the weight, which is contiguous.
        codes: Address of its codes.
        sample: The sample.
        group: The number of adjacent weights that share a scale; 0 if all do, or if there is no scale.
        numbers: float32: the number that each code stands for, from the smallest integer of the codes' dtype on.
        divides: Whether that number is divided by the scale, or multiplied by it; None without a scale.
        row: The row of its sums.
    """

    address: int
    codes: int
    sample: Sample
    group: int
    numbers: Tensor
    divides: bool | None
    row: int


class Samples(Protocol):
    """Samples of weights of the same dtype, with codes of the same dtype."""

    def __init__(self, weights: Sequence[SampledWeight]) -> None: ...

    @staticmethod
    def can_do(weight: torch.dtype, codes: torch.dtype) -> bool:
        """Whether there are compiled loops for these dtypes. Compiles them."""
        ...

    def take(self) -> None:
        """Copy the weights and their codes to all samples, before the step."""
        ...

    def move(
        self,
        indices: npt.NDArray[np.int64],
        old_scales: npt.NDArray[np.int64],
        new_scales: npt.NDArray[np.int64],
        sums: Tensor,
    ) -> None:
        """Compare some weights with their samples, add to the sums, and copy them to the samples.

        If it raises an exception, it has changed nothing.

        Args:
            indices: Which of the weights, int64.
            old_scales: For each weight, the address of the scales of the samples' codes, float32; any number without a
                scale.
            new_scales: As ``old_scales``, after the step.
            sums: float64 of shape (rows, 4), with stride 1 between columns: the sums over the samples, as listed in
                :class:`Sample`.
        """
        ...
