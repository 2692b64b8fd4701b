"""Which implementation does the work: the fastest that there is, or the one that was asked for."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from weightflip import checks
from weightflip.formats import Rounding
from weightflip.kernels.runs import Run, count_alone

OnePass: TypeAlias = Callable[[Tensor, "Tensor | None", Rounding, Tensor, "Tensor | None", Tensor], bool]

BACKENDS = ("auto", "eager", "numba", "triton")

# Type of a device to what "auto" takes there. "cuda": "triton" belongs here once it has been run on a GPU.
_BY_ITSELF = {"cpu": "numba"}

_MODULES = {"numba": "weightflip.kernels.cpu", "triton": "weightflip.kernels.cuda"}
_EXTRAS = {"numba": "pip install 'weightflip[numba]'", "triton": "torch's builds for CUDA on Linux bring it"}


class _Compiled(NamedTuple):
    run: type[Run]
    device: str
    """The type of device that it runs on."""


@functools.cache
def _compiled(name: str) -> _Compiled | str:
    """The kernels, or why there are none. Never the exception itself: its traceback holds the caller's whole stack."""
    try:
        module = importlib.import_module(_MODULES[name])
    except Exception as error:
        # Also an llvmlite that cannot be loaded, or a NumPy that Numba does not know.
        return f"{type(error).__name__}: {error}"
    return _Compiled(module.Run, module.DEVICE)


def check_backend(backend: str) -> None:
    """Refuse a backend that does not exist or cannot run here.

    Raises:
        ValueError: An unknown name, or ``"triton"`` where torch sees no GPU.
        ImportError: ``"numba"`` or ``"triton"`` without a Numba or Triton that can be imported.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        meant = checks.near(backend, BACKENDS)
        hint = "" if meant is None else f"; did you mean {meant!r}?"
        raise ValueError(f"backend= is one of {BACKENDS}, got {backend!r}{hint}")
    if backend not in _MODULES:
        return
    compiled = _compiled(backend)
    if isinstance(compiled, str):
        raise ImportError(f"backend={backend!r} needs {backend.capitalize()}: {_EXTRAS[backend]} ({compiled})")
    if compiled.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"backend={backend!r} is for weights on a GPU, and torch sees none; leave it out, or take 'eager'"
        )


def one_pass(backend: str, device: torch.device) -> OnePass | None:
    """The kernel that encodes, compares, counts and stores at once on this device; None where eager torch has to."""
    kernel = run(backend, device)
    return None if kernel is None else functools.partial(count_alone, kernel)


def run(backend: str, device: torch.device) -> type[Run] | None:
    """The kernel that does so for many weights in one call; None where each has to go by itself."""
    name = _BY_ITSELF.get(device.type, "eager") if backend == "auto" else backend
    compiled = _compiled(name) if name in _MODULES else None
    return compiled.run if isinstance(compiled, _Compiled) and compiled.device == device.type else None
