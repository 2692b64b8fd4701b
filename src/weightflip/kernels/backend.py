"""Which implementation does the work: the fastest that there is, or the one that was asked for."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from weightflip.formats import Rounding

OnePass: TypeAlias = Callable[[Tensor, "Tensor | None", Rounding, Tensor, "Tensor | None", Tensor], bool]

BACKENDS = ("auto", "eager", "numba")


@functools.cache
def _numba() -> OnePass | str:
    """The kernel, or why there is none. Never the exception itself: its traceback holds the caller's whole stack."""
    try:
        count_: OnePass = importlib.import_module("weightflip.kernels.cpu").count_
    except Exception as error:
        # Also an llvmlite that cannot be loaded, or a NumPy that Numba does not know.
        return f"{type(error).__name__}: {error}"
    return count_


def check_backend(backend: str) -> None:
    """Refuse a backend that does not exist or cannot run here.

    Raises:
        ValueError: An unknown name.
        ImportError: ``"numba"`` without a Numba that can be imported.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend= is one of {BACKENDS}, got {backend!r}")
    if backend == "numba" and isinstance(reason := _numba(), str):
        raise ImportError(f"backend='numba' needs Numba: pip install 'weightflip[numba]' ({reason})")


def one_pass(backend: str, device: torch.device) -> OnePass | None:
    """The kernel that encodes, compares, counts and stores at once on this device; None where eager torch has to."""
    if backend == "eager" or device.type != "cpu":
        return None
    kernel = _numba()
    return None if isinstance(kernel, str) else kernel
