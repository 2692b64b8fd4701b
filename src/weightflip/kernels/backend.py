"""Which implementation does the work: the fastest that there is, or the one that was asked for."""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from weightflip import checks

# The pool is not used here, but has to note forks before the first kernel is used.
from weightflip.kernels import pool, proof  # noqa: F401
from weightflip.kernels.eager import keep_ as keep_in_plain_torch
from weightflip.kernels.runs import Kind, OnePass, Run
from weightflip.kernels.scratch import ScratchPool

BACKENDS = ("auto", "eager", "numba", "triton")

# Type of a device to what "auto" tries there.
_BY_ITSELF = {"cpu": "numba", "cuda": "triton"}

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
            f"backend={backend!r} is for weights on a GPU, and torch sees none; leave it out, or take 'eager'"
        )


def one_pass(backend: str, device: torch.device, eager: proof.Eager) -> OnePass | None:
    """The kernel that encodes, compares, counts and stores at once on this device; None where eager torch has to.

    It does nothing, and says so, for a weight of a kind that it cannot do or has not been shown to do.
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
    """The kernel for many weights of a kind in one call, if it was shown to count as plain torch; else None.

    The first call for a kind compiles, and tries it, which waits for the device: see
    :mod:`weightflip.kernels.proof`. A kernel that is asked for by name may be slower than plain torch, but not count
    otherwise.

    Args:
        backend: As in :func:`check_backend`.
        question: What the kernel is to do.
        eager: Plain torch's way, to race against.
        scales: Plain torch's way to make scales, where the kernel has to make them.
    """
    kernel = run(backend, question.kind.device)
    if kernel is None or not question.can_be_asked(kernel):
        return None
    name = _name(backend, question.kind.device)
    is_usable = proof.is_usable(name, kernel, question, eager, scales, must_be_faster=backend == "auto")
    return kernel if is_usable else None


def _name(backend: str, device: torch.device) -> str:
    return _BY_ITSELF.get(device.type, "eager") if backend == "auto" else backend


def run(backend: str, device: torch.device) -> type[Run] | None:
    """The kernel that there is for this device, whether or not it was shown to count right; None for none."""
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
