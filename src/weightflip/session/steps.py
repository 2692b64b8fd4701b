"""Tell training steps from calls of ``step`` by which frameworks only initialize optimizer state."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from weightflip import distributed


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters, in the order of the param groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def weak_reference(optimizer: Optimizer) -> Callable[[], Optimizer | None]:
    """Return a weak reference to the optimizer, or a strong one if its class does not support weak references."""
    try:
        return weakref.ref(optimizer)
    except TypeError:
        # __slots__ without __weakref__
        return lambda: optimizer


def is_state_initialization(optimizer: Optimizer) -> bool:
    """Whether torch.distributed.checkpoint calls ``step`` only to initialize optimizer state.

    It does so only on processes without state, so this must be known before any collective. The call stack tells. Such
    steps by other callers are recognized from their gradients (:func:`is_training_step`).
    """
    if _has_nonzero_learning_rate(optimizer):
        return False
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__") != "torch.distributed.checkpoint.state_dict":
        frame = frame.f_back
    return frame.f_back is not None


def is_training_step(optimizer: Optimizer, *, is_sharded: bool) -> Tensor | None:
    """Whether the first step is a training step, found without a device synchronization.

    Frameworks initialize optimizer state by a step with learning rates and gradients of 0. Warm-ups also begin with a
    learning rate of 0, but their gradients are not 0. With sharded weights, a process may hold only zeros, or have
    state where others have none, so all processes exchange what they see. Learning rates are the same on all.

    Args:
        optimizer: The optimizer about to step.
        is_sharded: Whether tracking uses a collective in each step.

    Returns:
        A 0-dim bool tensor; None if it certainly is a training step.
    """
    if _has_nonzero_learning_rate(optimizer) or not any("lr" in group for group in optimizer.param_groups):
        return None
    parameters = parameters_of(optimizer)
    layouts = [layout for p in parameters if (layout := distributed.layout(p)) is not None and layout.shard is not None]
    if not is_sharded:
        # Sharded parameters that are not tracked (yet): without a collective, one process cannot decide alone.
        return None if layouts or optimizer.state else _count_updates(parameters) != 0
    try:
        flag = torch.ones((), dtype=torch.int64, device="cpu") if optimizer.state else _count_updates(parameters)
    except Exception:
        # If the gradients cannot be read, the step counts. The collective must take place in any case.
        flag = torch.ones((), dtype=torch.int64, device="cpu")
    return distributed.is_set_on_any(flag, layouts)


def _has_nonzero_learning_rate(optimizer: Optimizer) -> bool:
    """Whether a learning rate is not 0. One in a tensor on a device is not read, and counts as nonzero."""
    for group in optimizer.param_groups:
        rate = group.get("lr", 0)
        if (isinstance(rate, Tensor) and rate.device.type != "cpu") or rate:
            return True
    return False


@torch.no_grad()
def _count_updates(parameters: Sequence[Tensor]) -> Tensor:
    """Count the nonzero elements of this process's gradients: 0-dim, on the device of the first gradient."""
    counts = []
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = distributed.local(parameter.grad)
            if gradient.layout is not torch.strided:
                gradient = gradient.to_sparse_coo().coalesce().values()  # type: ignore[no-untyped-call]
            counts.append(torch.count_nonzero(gradient))
    if not counts:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    return torch.stack([count.to(counts[0].device, non_blocking=True) for count in counts]).sum()
