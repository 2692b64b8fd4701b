"""Non-finite weights are counted exactly, with and without the fast check for finite weights."""

from __future__ import annotations

import math

import pytest
import torch

from weightflip import WeightFlipTracker
from weightflip.counting.layer import TrackedWeight
from weightflip.quantizers import resolve


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_counts_equal_brute_force(dtype):
    generator = torch.Generator().manual_seed(0)
    tracker = WeightFlipTracker(metrics=["flips"])
    weights = [torch.randn(n, 7, generator=generator).to(dtype) for n in (0, 1, 5, 64, 700)]
    limits = torch.finfo(dtype)
    weights[3][0, :2] = torch.tensor([limits.max, limits.min])
    tracked = [TrackedWeight(str(i), weight, resolve("float8_e4m3")) for i, weight in enumerate(weights)]
    for spoiled in ([], [(4, 3, math.nan)], [(4, 9, math.inf), (1, 0, -math.inf)], [(4, 10, -math.inf)]):
        for at, row, value in spoiled:
            weights[at][row, row % 7] = value
        tracker.before_step(tracked)
        tracker.after_step()
        record = tracker.record()
        assert [layer.nonfinite for layer in record.layers] == [int((~w.isfinite()).sum()) for w in weights]
        for at, row, _ in spoiled:
            weights[at][row, row % 7] = 0.0
