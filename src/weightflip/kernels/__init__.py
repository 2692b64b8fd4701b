"""The hot path: encode, compare, count, store.

``reference`` is the simple version. ``eager``, and with Numba or Triton installed ``cpu`` and ``cuda``, give exactly
the same results.
"""

from __future__ import annotations

from weightflip.formats import Rounding
from weightflip.kernels.backend import check_backend, keep_, one_pass, run, run_for
from weightflip.kernels.eager import count_
from weightflip.kernels.gathered import Layout, is_small, pack
from weightflip.kernels.pointwise import Pointwise, bits_of_state
from weightflip.kernels.proof import Question
from weightflip.kernels.runs import (
    Addresses,
    Kind,
    Observed,
    Run,
    ScaleCodes,
    ScaleSteps,
    Scaling,
    StoredScales,
    Stretch,
    upload,
)
from weightflip.kernels.sampled import LANES, Sample, SampledWeight, Samples
from weightflip.kernels.scratch import ScratchPool
from weightflip.kernels.slices import Index, slice_elements, slices, take

FLIPS, UPDATES, STALLED = range(3)
"""The columns of the counts."""

__all__ = [
    "FLIPS",
    "LANES",
    "STALLED",
    "UPDATES",
    "Addresses",
    "Index",
    "Kind",
    "Layout",
    "Observed",
    "Pointwise",
    "Question",
    "Rounding",
    "Run",
    "Sample",
    "SampledWeight",
    "Samples",
    "ScaleCodes",
    "ScaleSteps",
    "Scaling",
    "ScratchPool",
    "StoredScales",
    "Stretch",
    "bits_of_state",
    "check_backend",
    "count_",
    "is_small",
    "keep_",
    "one_pass",
    "pack",
    "run",
    "run_for",
    "slice_elements",
    "slices",
    "take",
    "upload",
]
