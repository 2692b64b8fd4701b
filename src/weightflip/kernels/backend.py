"""Which implementation does the work: the fastest that there is, or the one that was asked for."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from weightflip.formats import Rounding
from weightflip.kernels.runs import Run

OnePass: TypeAlias = Callable[[Tensor, "Tensor | None", Rounding, Tensor, "Tensor | None", Tensor], bool]


class _Compiled(NamedTuple):
    count_: OnePass
    run: type[Run]


BACKENDS = ("auto", "eager", "numba")


@functools.cache
def _numba() -> _Compiled | str:
    """The kernels, or why there is none. Never the exception itself: its traceback holds the caller's whole stack."""
    try:
        cpu = importlib.import_module("weightflip.kernels.cpu")
    except Exception as error:
        # Also an llvmlite that cannot be loaded, or a NumPy that Numba does not know.
        return f"{type(error).__name__}: {error}"
    return _Compiled(cpu.count_, cpu.Run)


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
    kernels = _for_device(backend, device)
    return None if kernels is None else kernels.count_


def run(backend: str, device: torch.device) -> type[Run] | None:
    """The kernel that does so for many weights in one call; None where each has to go by itself."""
    kernels = _for_device(backend, device)
    return None if kernels is None else kernels.run


def _for_device(backend: str, device: torch.device) -> _Compiled | None:
    if backend == "eager" or device.type != "cpu":
        return None
    kernels = _numba()
    return None if isinstance(kernels, str) else kernels
