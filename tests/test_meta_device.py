"""What a step does on a device, seen on torch's meta device, which has no numbers.

There, reading a number raises, as it would wait for a device, and so does combining a tensor with one on the CPU.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from weightflip import WeightFlipTracker
from weightflip.counting.layer import TrackedWeight
from weightflip.metrics import metric_names
from weightflip.quantizers import resolve

QUANTIZERS = (
    "float8_e4m3", "float8_e4m3:row", "float8_e5m2:pow2", "e3m4", "mxfp4", "mxfp8_e4m3:rceil", "nvfp4", "nvfp4:tensor",
    "int4:g32", "int8", "bfloat16", "native", "ternary", "binary", "float8_e4m3:1x128", "float8_e4m3:128x128",
)  # fmt: skip
OPTIONS = {
    "default": {},
    "groups": {"metrics": ("flips", "stalls", *metric_names()), "oscillation_ema": 0.01, "sync_every": 2},
    "low_memory": {"low_memory": True, "metrics": ("flips", "stalls", "oscillation", "scale")},
    "sparsely": {"track_every": 2, "fresh_snapshots": True},
}


def count(quantizer: str, **options) -> tuple[WeightFlipTracker, list[str]]:
    """Count steps of a few weights, the last one with a flag that says on the device whether it was skipped."""
    shapes = [(64, 256), (64, 256), (3, 2, 128)]
    tracked = [
        TrackedWeight(f"w{i}", nn.Parameter(torch.empty(shape, device="meta")), resolve(quantizer))
        for i, shape in enumerate(shapes)
    ]
    tracker = WeightFlipTracker(**options)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for step in range(4):
            for weight in tracked:
                weight.parameter.grad = torch.empty_like(weight.parameter)
            tracker.before_step(tracked)
            for weight in tracked:
                weight.parameter.add_(1)
            tracker.after_step(torch.ones((), dtype=torch.bool, device="meta") if step == 3 else None)
    return tracker, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("options", OPTIONS)
def test_no_step_waits_for_the_device_or_mixes_devices(options):
    for quantizer in QUANTIZERS if options in ("default", "groups") else QUANTIZERS[::4]:
        tracker, texts = count(quantizer, **OPTIONS[options])
        assert texts == [], quantizer
        assert len(tracker.layers) == 3
        assert not any(layer.state.name == "FAILED" for layer in tracker.layers.values()), quantizer


def test_what_reads_a_number_is_noticed():
    """Otherwise, the test above would show nothing."""

    def quantizer(weight):
        return weight if weight.sum() > 0 else -weight

    weight = TrackedWeight("w", nn.Parameter(torch.empty(8, 8, device="meta")), resolve(quantizer))
    with pytest.warns(UserWarning, match="'w' is no longer tracked.*meta"):
        WeightFlipTracker().before_step([weight])
