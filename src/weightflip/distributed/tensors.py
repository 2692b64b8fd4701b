"""The part of a tensor that is on this process."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is a DTensor, which may be spread over several processes."""
    # Without importing the DTensor module, which takes half as long as importing torch: a DTensor has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


class Identity:
    """Identifies a tensor object without keeping the tensor alive.

    The id of a deleted tensor may be reused, on one process but not on another, and then processes would disagree on
    whether their weights have been replaced. So this holds the tensor's attribute dictionary, which belongs to no other
    tensor while it is alive. It contains what was attached to the tensor, not its data.
    """

    __slots__ = ("_attributes",)

    def __init__(self, tensor: Tensor) -> None:
        self._attributes = tensor.__dict__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self._attributes is other._attributes

    def __hash__(self) -> int:
        return id(self._attributes)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, and any other tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    # Not to_local(): under autograd, that is a view with its own version counter.
    shard: Any = cast(Any, tensor)._local_tensor
    return cast(Tensor, shard.trigger_wait() if hasattr(shard, "trigger_wait") else shard)


def local_gradient(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of a gradient.

    Raises:
        ValueError: The gradient's placements differ from those of its weight.
    """
    if not is_dtensor(gradient):
        return gradient
    theirs, ours = cast(Any, gradient).placements, getattr(parameter, "placements", None)
    if ours is not None and tuple(theirs) != tuple(ours):
        raise ValueError(
            f"the gradient is placed as {_join(theirs)} and its weight as {_join(ours)}, so updates cannot be "
            "counted shard by shard; use metrics=('flips',)"
        )
    return local(gradient)


def _join(placements: Iterable[Any]) -> str:
    return ", ".join(str(placement) for placement in placements)
