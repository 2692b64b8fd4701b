"""The optimizer of a step, and which calls of its step are none of the training: frameworks make its state by one."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from weightflip import distributed


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, in the order of the groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def reference(optimizer: Optimizer) -> Callable[[], Optimizer | None]:
    """Does not keep the optimizer alive, if it is of a class that allows that."""
    try:
        return weakref.ref(optimizer)
    except TypeError:
        # __slots__ without __weakref__
        return lambda: optimizer


def is_phantom(optimizer: Optimizer) -> bool:
    """Whether torch.distributed.checkpoint is about to have the optimizer make its state.

    A process does so where it has no state, which the others may have. So this has to be known before anything that
    they take part in, and is seen by who calls; other callers' steps are known by what they are (:func:`is_real`).
    """
    if any("lr" in group for group in optimizer.param_groups) and not _has_zero_rates(optimizer):
        return False
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__") != "torch.distributed.checkpoint.state_dict":
        frame = frame.f_back
    return frame.f_back is not None


def is_real(optimizer: Optimizer, *, is_sharded: bool) -> Tensor | None:
    """Find out, without waiting for the device, whether the first step only makes the optimizer's state.

    Checkpoints of frameworks have it do so by a step with a learning rate of 0 and gradients of 0. Warm-ups begin
    with such a rate, too, and have other gradients. Where weights are sharded, a process may have nothing but zeros
    in its shards, or a state where others have none, so that all ask each other; the rate is the same on all.

    Args:
        optimizer: What is about to step.
        is_sharded: Whether tracking asks the other processes in each step.

    Returns:
        Whether this is a step of the training, 0-dim; None if it is for sure.
    """
    if not _has_zero_rates(optimizer):
        return None
    every = parameters_of(optimizer)
    layouts = [layout for p in every if (layout := distributed.layout(p)) is not None and layout.shard is not None]
    if not is_sharded:
        # Sharded parameters that are not tracked (yet): nobody asks, and nobody decides alone.
        return None if layouts or optimizer.state else _count_updates(every) != 0
    try:
        flag = torch.ones((), dtype=torch.int64, device="cpu") if optimizer.state else _count_updates(every)
    except Exception:
        # What cannot be looked at counts. The others are asked for in any case.
        flag = torch.ones((), dtype=torch.int64, device="cpu")
    return distributed.is_any(flag, layouts)


def _has_zero_rates(optimizer: Optimizer) -> bool:
    """Whether all learning rates are 0, as far as that is known without waiting for the device."""
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    return bool(rates) and not any((isinstance(rate, Tensor) and rate.device.type != "cpu") or rate for rate in rates)


@torch.no_grad()
def _count_updates(parameters: Sequence[Tensor]) -> Tensor:
    """How many elements of the gradients are not 0, on this process: 0-dim, on the device of the first."""
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
