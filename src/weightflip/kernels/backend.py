"""Choose the implementation: the fastest available, or the requested one."""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from weightflip import checks

# The pool is not used here, but must register its fork handlers before the first kernel is used.
from weightflip.kernels import pool, proof  # noqa: F401
from weightflip.kernels.eager import keep_ as keep_in_plain_torch
from weightflip.kernels.runs import Kind, OnePass, Run
from weightflip.kernels.scratch import ScratchPool

BACKENDS = ("auto", "eager", "numba", "triton")

# The backend that "auto" tries on each type of device.
_AUTOMATIC = {"cpu": "numba", "cuda": "triton"}

_MODULES = {"numba": "weightflip.kernels.cpu", "triton": "weightflip.kernels.cuda"}
_EXTRAS = {"numba": "pip install 'weightflip[numba]'", "triton": "torch's builds for CUDA on Linux bring it"}


class _Compiled(NamedTuple):
    run: type[Run]
    device: str
    """The type of device on which it runs."""


@functools.cache
def _compiled(name: str) -> _Compiled | str:
    """Return the kernels, or the reason why there are none. Not the exception, whose traceback keeps stacks alive."""
    try:
        module = importlib.import_module(_MODULES[name])
    except Exception as error:
        # Including an llvmlite that fails to load, or a NumPy version that Numba does not support.
        return f"{type(error).__name__}: {error}"
    return _Compiled(module.Run, module.DEVICE)


def check_backend(backend: str) -> None:
    """Refuse a backend that does not exist or cannot run here.

    Raises:
        ValueError: Unknown name, or ``"triton"`` if torch finds no GPU.
        ImportError: ``"numba"`` or ``"triton"`` if Numba or Triton cannot be imported.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        meant = checks.closest_match(backend, BACKENDS)
        hint = "" if meant is None else f"; did you mean {meant!r}?"
        raise ValueError(f"backend= is one of {BACKENDS}, got {backend!r}{hint}")
    if backend not in _MODULES:
        return
    compiled = _compiled(backend)
    if isinstance(compiled, str):
        raise ImportError(f"backend={backend!r} needs {backend.capitalize()}: {_EXTRAS[backend]} ({compiled})")
    if compiled.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"backend={backend!r} is for weights on a GPU, and torch finds none; leave it out, or use 'eager'"
        )


def one_pass(backend: str, device: torch.device, eager: proof.Eager) -> OnePass | None:
    """Return the kernel that encodes, compares, counts and stores in one pass; None if there is none for the device.

    For a weight of a kind that it does not support, or for which it failed its test, it does nothing and returns False.
    """
    kernel = run(backend, device)
    if kernel is None:
        return None

    def may_count(kind: Kind, takes_scale: bool) -> bool:
        return run_for(backend, proof.Question(kind, takes_scale, finds_scale=False), eager) is not None

    return OnePass(kernel, may_count)


def run_for(
    backend: str, question: proof.Question, eager: proof.Eager, scales: proof.Scales | None = None
) -> type[Run] | None:
    """Return the kernel for many weights of a kind in one call; None unless it counts the same as plain torch.

    The first call for a kind compiles and tests the kernel, which synchronizes with the device. See
    :mod:`weightflip.kernels.proof`. A kernel that is requested by name may be slower than plain torch, but must give
    the same results.

    Args:
        backend: As in :func:`check_backend`.
        question: What the kernel must do.
        eager: Counts in plain torch, to compare the speed.
        scales: Computes scales in plain torch, if the kernel must compute them.
    """
    kernel = run(backend, question.kind.device)
    if kernel is None or not question.is_supported_by(kernel):
        return None
    name = _name(backend, question.kind.device)
    is_usable = proof.is_usable(name, kernel, question, eager, scales, must_be_faster=backend == "auto")
    return kernel if is_usable else None


def _name(backend: str, device: torch.device) -> str:
    return _AUTOMATIC.get(device.type, "eager") if backend == "auto" else backend


def run(backend: str, device: torch.device) -> type[Run] | None:
    """Return the kernel for this device, tested or not; None if there is none."""
    name = _name(backend, device)
    compiled = _compiled(name) if name in _MODULES else None
    return compiled.run if isinstance(compiled, _Compiled) and compiled.device == device.type else None


def keep_(codes: Tensor, new: Tensor, scratch: ScratchPool, backend: str = "auto") -> Tensor:
    """Store the new codes in ``codes``, and count how many differ. No device synchronization.

    Args:
        codes: Old ordinals, contiguous; overwritten.
        new: New ordinals, of the same shape and dtype.
        scratch: Provides temporaries.
        backend: As in :func:`check_backend`.

    Returns:
        0-dim int64.
    """
    kernel = run(backend, codes.device)
    if kernel is not None and proof.may_keep(kernel, codes.dtype):
        changed = kernel.keep(codes, new)
        if changed is not None:
            return changed
    return keep_in_plain_torch(codes, new, scratch)
