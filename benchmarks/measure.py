"""Time and memory. Times of one run stand beside each other: only their ratios mean something on a shared machine."""

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
    """Measure on one thread of torch's, and what the processor works for it: others on the machine count less."""
    global _clock
    torch.set_num_threads(1)
    _clock = time.thread_time


_clock = time.perf_counter


def in_turns(cases: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each case, all of them once in each turn.

    Args:
        cases: What to do, by name.
        repeats: Turns that count.
        warmup: Turns before them: the first ones make optimizer states and compile.
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
    """How far the process's memory rises above where it was, while something runs; None where Linux does not tell."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    gc.collect()
    # What the allocator keeps for itself would hide what is taken from it.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    # 5 sets the high-water mark back to what is held now.
    reset.write_text("5")
    before = _status("VmRSS")
    action()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
