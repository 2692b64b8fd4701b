"""What tracking costs beside an optimizer's step: both in one run, in turns, medians, as a ratio.

``python benchmarks/step_cost.py`` prints a table. Times vary with the machine and with what else runs there; the ratio
is what to compare.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from weightflip import FlipTrackingOptimizer


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def adamw(size: int) -> torch.optim.AdamW:
    weight = torch.nn.Parameter(torch.randn(size, size) * 0.02)
    weight.grad = torch.randn(size, size)
    return torch.optim.AdamW([weight], lr=1e-4, fused=True)


def naive_step(optimizer: torch.optim.Optimizer) -> int:
    """The way of research code: clone and quantize everything before and after, compare, read the number."""

    def quantized(weight: Tensor) -> Tensor:
        scale = (448.0 / weight.abs().max().double().clamp(min=1e-12)).float()
        return (weight * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()

    (weight,) = optimizer.param_groups[0]["params"]
    before = quantized(weight.detach().clone())
    optimizer.step()
    flipped = quantized(weight.detach().clone()) != before
    updated = weight.grad != 0
    return int(flipped.sum().item()) + int((updated & ~flipped).sum().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the one weight")
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()

    # One optimizer each, over weights of the same distribution: the tracked ones must not see each other's writes.
    bare = adamw(options.size)
    cases: dict[str, Callable[[], object]] = {"fused AdamW, bare": bare.step}
    trackers = {}
    for label, extra in {
        "flips": {"metrics": ("flips",)},
        "flips + stalls (default)": {},
        "default, low_memory": {"low_memory": True},
        "default, backend='eager'": {"backend": "eager"},
    }.items():
        wrapped = FlipTrackingOptimizer(adamw(options.size), quantizer="float8_e4m3", sinks=[], **extra)
        cases[f"wrapped: {label}"] = wrapped.step
        trackers[label] = wrapped.tracker
    plain = adamw(options.size)
    cases["naive: clone, quantize, compare, twice"] = lambda: naive_step(plain)

    times: dict[str, list[float]] = {label: [] for label in cases}
    for repeat in range(options.repeats + 2):
        for label, action in cases.items():
            elapsed = seconds(action)
            if repeat >= 2:
                times[label].append(elapsed)

    base = median(times["fused AdamW, bare"])
    print(
        f"one {options.size} x {options.size} float32 weight, float8_e4m3 tensorwise; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}\n"
    )
    print(f"{'':<42}{'ms a step':>10}{'tracking alone':>18}")
    for label, samples in times.items():
        extra_cost = median(samples) - base
        ratio = "" if label == "fused AdamW, bare" else f"{extra_cost / base:.2f} x AdamW"
        print(f"{label:<42}{median(samples) * 1e3:>10.1f}{ratio:>18}")

    weights = options.size**2
    for label in ("flips + stalls (default)", "default, backend='eager'"):
        memory = trackers[label].memory_usage()
        print(
            f"\nmemory, {label}: {memory.codes / weights:.3f} bytes of codes a weight, "
            f"{memory.buffers / 2**20:.1f} MiB of buffers whatever the weight",
            end="",
        )
    print()


if __name__ == "__main__":
    main()
