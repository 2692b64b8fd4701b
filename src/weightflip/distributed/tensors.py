"""What of a tensor lies on this process."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor may lie on several processes."""
    # Whoever has a DTensor has imported its module, which takes as long as the half of torch.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


class Identity:
    """Which tensor object this is, told without holding the tensor.

    Once a tensor is gone its id may be given to another one, on one process and not on another, and then processes
    would disagree on whether their weights have been replaced. The attribute dictionary of a tensor is its own for as
    long as either lives, so it is held instead. It holds what was attached to the tensor, and not its data.
    """

    __slots__ = ("_attributes",)

    def __init__(self, tensor: Tensor) -> None:
        self._attributes = tensor.__dict__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self._attributes is other._attributes

    def __hash__(self) -> int:
        return id(self._attributes)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    # Not to_local(): under autograd that is a view with a version counter of its own.
    shard: Any = cast(Any, tensor)._local_tensor
    return cast(Tensor, shard.trigger_wait() if hasattr(shard, "trigger_wait") else shard)


def local_gradient(gradient: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a gradient.

    Raises:
        ValueError: It does not lie on the processes as its weight does.
    """
    if not is_dtensor(gradient):
        return gradient
    theirs, ours = cast(Any, gradient).placements, getattr(parameter, "placements", None)
    if ours is not None and tuple(theirs) != tuple(ours):
        raise ValueError(
            f"the gradient lies on the processes as {_text(theirs)}, its weight as {_text(ours)}: updates cannot be "
            "counted shard by shard; use metrics=('flips',)"
        )
    return local(gradient)


def _text(placements: Iterable[Any]) -> str:
    return ", ".join(str(placement) for placement in placements)
