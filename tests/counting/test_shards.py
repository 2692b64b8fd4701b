"""A run on one process does not run any sharding code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from parts import weight

import weightflip
from weightflip import WeightFlipTracker

ROOT = Path(weightflip.__file__).parent
SHARDING = {str(path) for path in (*(ROOT / "distributed").glob("*.py"), ROOT / "counting/sharded.py")}


def entered(action) -> set[str]:
    """Record the functions of sharding code that are called."""
    found = set()

    def trace(frame, event, arg):
        if frame.f_code.co_filename in SHARDING:
            found.add(frame.f_code.co_name)

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return found


class Subclass(torch.Tensor):
    pass


def life(weights):
    tracker = WeightFlipTracker(metrics=("flips", "stalls"))

    def run():
        for _ in range(3):
            tracker.before_step(weights)
            with torch.no_grad():
                for tracked in weights:
                    tracked.parameter.mul_(-1)
            tracker.after_step()
        tracker.record()
        tracker.state_dict()
        tracker.drop_codes()
        str(tracker)

    return run


def test_an_unsharded_run_calls_no_sharding_code():
    weights = [weight("a", "float8_e4m3"), weight("bb", "ternary"), weight("ccc", "native")]
    # The first run compiles kernels, and only one process logs that.
    life(weights)()
    assert entered(life(weights)) == set()


def test_a_tensor_subclass_is_only_checked_for_dtensor():
    tracked = weight("a", "float8_e4m3")
    tracked.parameter = torch.randn(8, 64).as_subclass(Subclass)
    assert entered(life([tracked])) == {"is_dtensor"}


def test_sharding_code_is_not_imported():
    code = """
import sys, torch, weightflip
weight = torch.nn.Parameter(torch.ones(4, 4))
weight.grad = torch.ones(4, 4)
optimizer = weightflip.FlipTrackingOptimizer(torch.optim.SGD([weight]), sinks=[])
optimizer.step()
optimizer.close()
print("weightflip.counting.sharded" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
