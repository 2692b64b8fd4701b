"""What a kernel needs to know to count many weights in one call, or one by itself."""

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

Addresses: TypeAlias = "npt.NDArray[np.int64]"


class Stretch(NamedTuple):
    """Memory of one weight, or of a part of one.

    Attributes:
        weight: Address of the first element.
        codes: Address of its code.
        numel: Elements, at least one.
        group: How many neighbors share a scale; ``numel`` where all do, or where there is none.
        width: How many elements a row has, where blocks over several rows share a scale: ``group`` of each row. Blocks
            at the end of a row and in the last rows may be smaller. 0 where there are no such blocks: so in all
            stretches of a run, or in none.
        height: How many rows share a scale; 1 without a width.
    """

    weight: int
    codes: int
    numel: int
    group: int
    width: int = 0
    height: int = 1

    @property
    def scales(self) -> int:
        """How many there are."""
        if not self.width:
            return -(-self.numel // self.group)
        return -(-self.width // self.group) * -(-self.numel // (self.width * self.height))


class Kind(NamedTuple):
    """What weights have in common that one call can count.

    Attributes:
        weight: dtype of the weights.
        update: dtype of the updates; None where none are counted.
        codes: dtype of the codes.
        rounding: How a weight becomes an ordinal.
        device: Where they are.
    """

    weight: torch.dtype
    update: torch.dtype | None
    codes: torch.dtype
    rounding: Rounding
    device: torch.device


class ScaleCodes(NamedTuple):
    """Scales that are stored as codes, stretch after stretch as those of :meth:`Run.largest`.

    Attributes:
        new: Integers.
        stored: Those of before the step, as they are stored; overwritten.
        changes: int64, a column of the table that is counted in: scales whose stored value changes are added to it.
    """

    new: Tensor
    stored: Tensor
    changes: Tensor


class Observed(NamedTuple):
    """What metric groups count in the same pass, and what they keep of each weight.

    Attributes:
        groups: What each of them does.
        states: Addresses of the first element of each state, int64 of shape (states, stretches), in the groups' order;
            laid out as the weight.
        old_scale: As the scale, of before the step; None where no group looks at it.
        sums: float64 of shape (any, columns), whose columns are neighbors in memory. Each of the groups' counts is
            added to a column, and the flips to the next one, in the row of the stretch.
        columns: int64, the column of each count, in the groups' order.
    """

    groups: tuple[Pointwise, ...]
    states: Addresses
    old_scale: Tensor | None
    sums: Tensor
    columns: Addresses


class ScaleSteps(NamedTuple):
    """Scales that take at most 256 values and grow with the largest magnitude, as a table by the bits of that.

    Attributes:
        shift: How many of the last bits do not tell the slot.
        slots: int32 of shape (slots, 3): the bits from which on a magnitude has the second value here, the index of
            the first value, and that of the second one.
        factors: float32: what weights are multiplied or divided by, by index.
        codes: uint8: what is stored, by index.
    """

    shift: int
    slots: Tensor
    factors: Tensor
    codes: Tensor


@dataclass(frozen=True, eq=False)
class Scaling:
    """How the scale of a group comes from its largest magnitude.

    Attributes:
        description: What a compiled loop follows.
        is_stored: Whether the scales are stored as codes: with a formula the bits of float32, with steps bytes.
    """

    description: ScaleFormula | ScaleSteps
    is_stored: bool


class StoredScales(NamedTuple):
    """Scales that are stored as codes, stretch after stretch.

    Attributes:
        codes: Those of before the step, as they are stored; overwritten.
        changes: int64, a column of the table that is counted in: scales whose stored value changes are added to it.
    """

    codes: Tensor
    changes: Tensor


class Run(Protocol):
    """Stretches of memory of one kind that are counted together.

    Nothing here keeps the memory alive or looks at it again: who calls vouches for the addresses.
    """

    saves_calls: bool
    """Whether a call of torch costs more here than a search in a table for each scale."""

    observes: bool
    """Whether it can count for metric groups in the same pass."""

    longest_group: int
    """Groups or blocks of at most this many weights can be scaled and counted in one pass; 0: there is no such pass."""

    widest_block: int
    """The same for the rows of blocks that have several."""

    def __init__(self, stretches: Sequence[Stretch], kind: Kind) -> None: ...

    @staticmethod
    def can_do(kind: Kind, *, scaled: bool, groups: tuple[Pointwise, ...] = ()) -> bool:
        """Whether there are compiled loops for weights of this kind, and what metric groups do; compiles them."""
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
        """The largest magnitude under each scale, float32, stretch after stretch; NaN where there is one.

        On the weights' device, as all tensors here.
        """
        ...

    def count_(self, scale: Tensor | None, updates: Addresses | None) -> Tensor:
        """Encode, compare, count, and store the new codes.

        Args:
            scale: float32, one for each element of :meth:`largest`; None where weights are rounded as they are.
            updates: Addresses of the updates, a stretch each; 0 for one that has none. Not wider
                than the weight. None where none are counted.

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
        """As :meth:`count_`, but add what is found to rows of a table.

        Args:
            counts: int64 of shape (any, 3), whose columns are neighbors in memory.
            rows: int64, the row of each stretch. Stretches may share one.
            scale: As there.
            updates: As there.
            scale_codes: What is stored of the scales, if anything is.
            observed: What metric groups count, if there are any.
        """
        ...

    def count_groups_into_(
        self,
        counts: Tensor,
        rows: Tensor,
        scaling: Scaling,
        updates: Addresses | None,
        stored: StoredScales | None = None,
    ) -> None:
        """As :meth:`count_into_`, and make the scale of each group from what :meth:`largest` would give.

        Args:
            counts: As there.
            rows: As there.
            scaling: How; no group of a stretch is longer than ``longest_group``.
            updates: As there.
            stored: What is stored of the scales, if anything is.
        """
        ...


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on another device, for which nothing waits; the tensor itself where it is on that device."""
    # From memory that the system may move, a copy waits until it is done.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class OnePass(NamedTuple):
    """Counts one weight by itself in one pass, if its tensors are of the kinds known.

    Attributes:
        run: The kernel, for the weight's device.
        may_count: Whether to use the kernel for a kind, with or without a scale; None: whenever it can.
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
            weight: Before rounding; dense.
            scale: None, or float32, with one element for all weights or one for each row.
            rounding: How a weight becomes an ordinal.
            codes: Ordinals before the step, laid out as the weight; overwritten.
            update: The gradient, or a bool mask of the weights that had one, laid out as the weight; None counts no
                updates.
            counts: int64 of shape (3,): flips, updates, stalled; added to.

        Returns:
            Whether it was done; False leaves everything as it was.
        """
        group = _group(weight, scale)
        if group is None or not torch.ops.aten.is_non_overlapping_and_dense(weight):
            return False
        if not all(_is_laid_out(tensor, weight) for tensor in (weight, codes, update) if tensor is not None):
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


def _is_laid_out(tensor: Tensor, like: Tensor) -> bool:
    """Whether a tensor's memory can be read in step with that of ``like``."""
    if tensor.device != like.device or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.shape == like.shape and tensor.stride() == like.stride() and not tensor.is_neg()


def _group(weight: Tensor, scale: Tensor | None) -> int | None:
    """How many neighbors in memory share a scale."""
    numel = max(1, weight.numel())
    if scale is None or scale.numel() == 1:
        return numel if scale is None or scale.dtype is torch.float32 else None
    by_row = scale.shape == (*weight.shape[:-1], 1)
    if scale.dtype is not torch.float32 or not by_row or not weight.is_contiguous():
        return None
    return weight.shape[-1]
