"""Measures time and memory. On a shared machine, only the ratios of times from one run are meaningful."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch


def cpu_time_of_one_thread() -> None:
    """Measure CPU time with a single torch thread, so that other processes matter less."""
    global _clock
    torch.set_num_threads(1)
    _clock = time.thread_time


_clock = time.perf_counter


def time_in_rounds(cases: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 18) -> dict[str, float]:
    """Median seconds of each case. All cases run once per round.

    Args:
        cases: Functions to time, by name.
        repeats: Number of timed rounds.
        warmup: Number of rounds before them, which create optimizer states and compile. After each of the first 16
            steps, tracking also checks a sample of a weight for external writes.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + repeats):
        for name, action in cases.items():
            start = _clock()
            action()
            elapsed = _clock() - start
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: median(samples) for name, samples in times.items()}


def peak_bytes(action: Callable[[], object]) -> int | None:
    """Peak increase of the process's memory while ``action`` runs; None if Linux does not report it."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    gc.collect()
    # Memory cached by the allocator would hide new allocations.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    # 5 resets the peak to the current usage.
    reset.write_text("5")
    before = _status("VmRSS")
    action()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
