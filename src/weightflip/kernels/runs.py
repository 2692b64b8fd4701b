"""The interface of kernels that count many weights in one call, or a single one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weightflip.formats import Rounding, ScaleFormula
from weightflip.kernels.pointwise import Pointwise
from weightflip.kernels.sampled import Samples

Addresses: TypeAlias = "npt.NDArray[np.int64]"


class Stretch(NamedTuple):
    """The memory of one weight, or of a part of one.

    Attributes:
        weight: Address of the first element.
        codes: Address of its code.
        numel: Number of elements, at least one.
        group: The number of adjacent elements that share a scale; ``numel`` if all of them do, or if there is no scale.
        width: The number of elements in a row if blocks over several rows share a scale, with ``group`` elements of
            each row. Blocks at the end of a row and in the last rows may be smaller. 0 if there are no such blocks,
            which must be the same for all stretches of a run.
        height: The number of rows that share a scale; 1 without a width.
    """

    weight: int
    codes: int
    numel: int
    group: int
    width: int = 0
    height: int = 1

    @property
    def scales(self) -> int:
        """The number of scales."""
        if not self.width:
            return -(-self.numel // self.group)
        return -(-self.width // self.group) * -(-self.numel // (self.width * self.height))


class Kind(NamedTuple):
    """The common properties of weights that one call can count.

    Attributes:
        weight: dtype of the weights.
        update: dtype of the updates; None if updates are not counted.
        codes: dtype of the codes.
        rounding: The rounding of weights to ordinals.
        device: The device of the weights.
    """

    weight: torch.dtype
    update: torch.dtype | None
    codes: torch.dtype
    rounding: Rounding
    device: torch.device


class ScaleCodes(NamedTuple):
    """Scales that are stored as codes, concatenated over stretches as in :meth:`Run.largest`.

    Attributes:
        new: The new codes, integers.
        stored: The codes before the step in their stored form; overwritten.
        changes: int64, a column of the table of counts, to which the number of changed codes is added.
    """

    new: Tensor
    stored: Tensor
    changes: Tensor


class Observed(NamedTuple):
    """What metric groups count in the same pass, and their per-weight state.

    Attributes:
        groups: The computation of each group.
        states: Addresses of the first element of each state, int64 of shape (states, stretches), in the groups' order.
            States have the layout of the weight.
        old_scale: Like the scale, from before the step; None if no group needs it.
        sums: float64 of shape (any, columns), with stride 1 between columns. Each count of the groups is added to a
            column, and the flips to the next one, in the row of the stretch.
        columns: int64, the column of each count, in the groups' order.
    """

    groups: tuple[Pointwise, ...]
    states: Addresses
    old_scale: Tensor | None
    sums: Tensor
    columns: Addresses


class ScaleSteps(NamedTuple):
    """Scales that take at most 256 values and grow with the largest magnitude, as a table indexed by its bits.

    Attributes:
        shift: The number of low bits to drop to get the slot.
        slots: int32 of shape (slots, 3): the first bit pattern with the second value of the slot, the index of the
            first value, and the index of the second value.
        factors: float32: the factors by which weights are multiplied or divided, by index.
        codes: uint8: the stored scales, by index.
    """

    shift: int
    slots: Tensor
    factors: Tensor
    codes: Tensor


@dataclass(frozen=True, eq=False)
class Scaling:
    """How to compute the scale of a group from its largest magnitude.

    Attributes:
        description: The formula or table.
        is_stored: Whether the scales are stored as codes: the bits of float32 for a formula, bytes for steps.
    """

    description: ScaleFormula | ScaleSteps
    is_stored: bool


class StoredScales(NamedTuple):
    """Scales that are stored as codes, concatenated over stretches.

    Attributes:
        codes: The codes before the step in their stored form; overwritten.
        changes: int64, a column of the table of counts, to which the number of changed codes is added.
    """

    codes: Tensor
    changes: Tensor


class Run(Protocol):
    """Stretches of memory of one kind that are counted together.

    It does not keep the memory alive and cannot check it. The caller must ensure that the addresses are valid.
    """

    saves_calls: bool
    """Whether a call of torch costs more on this device than a table search for each scale."""

    observes: bool
    """Whether it supports metric groups in the same pass."""

    samples: type[Samples] | None
    """Compares samples of many weights in one call; None if there is no kernel for this."""

    longest_group: int
    """The maximum size of groups or blocks that can be scaled and counted in one pass; 0 if there is no such pass."""

    widest_block: int
    """The same for the rows of blocks that have several."""

    def __init__(self, stretches: Sequence[Stretch], kind: Kind) -> None: ...

    @staticmethod
    def can_do(kind: Kind, *, scaled: bool, groups: tuple[Pointwise, ...] = ()) -> bool:
        """Whether there are compiled loops for weights of this kind and for metric groups. Compiles them."""
        ...

    @staticmethod
    def can_scale(kind: Kind, scaling: Scaling) -> bool:
        """The same for :meth:`count_groups_into_`."""
        ...

    @staticmethod
    def keep(codes: Tensor, new: Tensor) -> Tensor | None:
        """As :func:`weightflip.kernels.eager.keep_`; None, with nothing done, for tensors that it cannot read."""
        ...

    def largest(self) -> Tensor:
        """Return the largest magnitude under each scale, float32, concatenated over stretches; NaN if there is one.

        It is on the weights' device, like all tensors here.
        """
        ...

    def factors(self, scaling: Scaling) -> Tensor:
        """Compute the factors that weights are multiplied or divided by, if too many weights share them for one pass.

        Args:
            scaling: How to compute scales, which are not stored. See :meth:`can_scale`.

        Returns:
            float32, one for each element of :meth:`largest`. The next call overwrites them.
        """
        ...

    def count_(self, scale: Tensor | None, updates: Addresses | None) -> Tensor:
        """Encode the weights, compare, count, and store the new codes.

        Args:
            scale: float32, one for each element of :meth:`largest`; None if weights are not scaled.
            updates: Address of the updates of each stretch; 0 without updates. Their dtype must not be wider than that
                of the weight. None if updates are not counted.

        Returns:
            int64 of shape (stretches, 3): flips, updates, stalled.
        """
        ...

    def count_into_(
        self,
        counts: Tensor,
        rows: Tensor,
        scale: Tensor | None,
        updates: Addresses | None,
        scale_codes: ScaleCodes | None = None,
        observed: Observed | None = None,
    ) -> None:
        """As :meth:`count_`, but add the counts to rows of a table.

        Args:
            counts: int64 of shape (any, 3), with stride 1 between columns.
            rows: int64, the row of each stretch. Stretches may share a row.
            scale: As in :meth:`count_`.
            updates: As in :meth:`count_`.
            scale_codes: The stored scales, if any.
            observed: The metric groups, if any.
        """
        ...

    def count_groups_into_(
        self,
        counts: Tensor,
        rows: Tensor,
        scaling: Scaling,
        updates: Addresses | None,
        stored: StoredScales | None = None,
        largest: Tensor | None = None,
    ) -> None:
        """As :meth:`count_into_`, but also compute the scale of each group from its largest magnitude.

        Args:
            counts: As in :meth:`count_into_`.
            rows: As in :meth:`count_into_`.
            scaling: How to compute scales. No group may be longer than ``longest_group``.
            updates: As in :meth:`count_`.
            stored: The stored scales, if any.
            largest: Overwritten with what :meth:`largest` would return. Not for blocks over several rows.
        """
        ...


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without synchronization. Returns the tensor itself if it is there already."""
    # A copy from memory that is not pinned would synchronize.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class OnePass(NamedTuple):
    """Counts a single weight in one pass, if the kernel supports its tensors.

    Attributes:
        run: The kernel, for the weight's device.
        may_count: Whether to use the kernel for a kind, with or without a scale. None: if the kernel supports it.
    """

    run: type[Run]
    may_count: Callable[[Kind, bool], bool] | None = None

    def __call__(
        self,
        weight: Tensor,
        scale: Tensor | None,
        rounding: Rounding,
        codes: Tensor,
        update: Tensor | None,
        counts: Tensor,
    ) -> bool:
        """Encode the weight, compare, add to ``counts`` and store the new codes.

        Args:
            weight: The weight before rounding; dense.
            scale: None, or float32 with one element for all weights or one per row.
            rounding: The rounding of weights to ordinals.
            codes: Ordinals before the step, with the layout of the weight; overwritten.
            update: The gradient, or a bool mask of the weights with an update, with the layout of the weight. None:
                updates are not counted.
            counts: int64 of shape (3,), to which flips, updates and stalled weights are added.

        Returns:
            Whether the weight was counted. If not, nothing has changed.
        """
        group = _group(weight, scale)
        if group is None or not torch.ops.aten.is_non_overlapping_and_dense(weight):
            return False
        if not all(_has_same_layout(tensor, weight) for tensor in (weight, codes, update) if tensor is not None):
            return False
        kind = Kind(weight.dtype, None if update is None else update.dtype, codes.dtype, rounding, weight.device)
        if not self._may_count(kind, takes_scale=scale is not None):
            return False
        if weight.numel() == 0:
            return True
        alone = self.run([Stretch(weight.data_ptr(), codes.data_ptr(), weight.numel(), group)], kind)
        flat_scale = None if scale is None else scale.detach().reshape(-1).contiguous()
        address = None if update is None else np.array([update.data_ptr()], dtype=np.int64)
        counts.add_(alone.count_(flat_scale, address)[0])
        return True

    def _may_count(self, kind: Kind, *, takes_scale: bool) -> bool:
        if self.may_count is None:
            return self.run.can_do(kind, scaled=False)
        return self.may_count(kind, takes_scale)


def _has_same_layout(tensor: Tensor, like: Tensor) -> bool:
    """Whether a tensor has the memory layout of ``like``."""
    if tensor.device != like.device or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.shape == like.shape and tensor.stride() == like.stride() and not tensor.is_neg()


def _group(weight: Tensor, scale: Tensor | None) -> int | None:
    """Return the number of elements, adjacent in memory, that share a scale; None if the scale is not supported."""
    numel = max(1, weight.numel())
    if scale is None or scale.numel() == 1:
        return numel if scale is None or scale.dtype is torch.float32 else None
    by_row = scale.shape == (*weight.shape[:-1], 1)
    if scale.dtype is not torch.float32 or not by_row or not weight.is_contiguous():
        return None
    return weight.shape[-1]
