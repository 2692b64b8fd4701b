"""Pure functions between codes and rates. The stateful classes of :mod:`weightflip.counting` are thin over these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from weightflip import checks, kernels

Observer: TypeAlias = Callable[[kernels.Index, Tensor, Tensor], None]


class Elementwise(Protocol):
    """What is needed here of an elementwise quantizer."""

    def grouped(self, tensor: Tensor) -> Tensor: ...

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor | None: ...

    def rounding(self, weight: Tensor) -> kernels.Rounding | None: ...

    def applied_scale(self, scale: Tensor | None) -> Tensor | None: ...

    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: kernels.ScratchPool) -> None: ...

    def encode_under(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: kernels.ScratchPool) -> None: ...


def compute_flip_rate(prev_quantized: Tensor, curr_quantized: Tensor) -> float:
    """Share of elements that differ between two quantized tensors; see :class:`WeightFlipTracker` for a whole run.

    Args:
        prev_quantized: Quantized values or codes, any shape and dtype.
        curr_quantized: The same after the step. NaN to NaN is no flip, and +0 equals -0.

    Returns:
        Flips / elements, in [0, 1]; 0.0 for empty tensors.

    Raises:
        TypeError: No tensors.
        ValueError: The shapes differ.

    Example:
        >>> compute_flip_rate(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 2.5, 4.0]))
        0.25
    """
    checks.tensor("prev_quantized", prev_quantized)
    checks.tensor("curr_quantized", curr_quantized)
    if prev_quantized.shape != curr_quantized.shape:
        raise ValueError(
            f"Shape mismatch: prev_quantized has {tuple(prev_quantized.shape)}, "
            f"curr_quantized has {tuple(curr_quantized.shape)}; compare the same weight before and after a step"
        )
    if prev_quantized.numel() == 0:
        return 0.0
    if prev_quantized.dtype.itemsize == 1 and prev_quantized.is_floating_point():
        # torch has no comparison of float8 tensors.
        prev_quantized, curr_quantized = prev_quantized.float(), curr_quantized.float()
    flipped = prev_quantized != curr_quantized
    if prev_quantized.is_floating_point() and curr_quantized.is_floating_point():
        flipped &= ~(prev_quantized.isnan() & curr_quantized.isnan())
    return torch.count_nonzero(flipped).item() / flipped.numel()


def compute_stall_ratio(flips: int, updates: int) -> float:
    """``1 - flips / updates``, from two totals alone.

    An estimate: it takes every flip for a flip of an updated weight, and is negative when weights without a gradient
    flip too. ``get_stall_ratios`` counts the stalled weights themselves.

    Args:
        flips: Weights that changed their code.
        updates: Weights whose gradient was not exactly 0.

    Returns:
        The ratio; 0.0 without updates.

    Raises:
        TypeError: No numbers.

    Example:
        >>> compute_stall_ratio(flips=10, updates=100)
        0.9
    """
    checks.number("flips", flips)
    checks.number("updates", updates)
    return 1.0 - flips / updates if updates > 0 else 0.0


def encode_into(
    weight: Tensor,
    quantizer: Elementwise,
    codes: Tensor,
    scratch: kernels.ScratchPool,
    backend: str = "auto",
    statistic: Tensor | None = None,
) -> Tensor | None:
    """Write the ordinals of ``weight`` into ``codes``.

    Args:
        weight: Any shape and strides.
        quantizer: What encodes it.
        codes: Of the weight's shape.
        scratch: Where temporaries come from.
        backend: As in :func:`weightflip.kernels.check_backend`.
        statistic: What the quantizer has to know of the whole weight, where this is a shard.

    Returns:
        The quantizer's scale.
    """
    weight, codes = quantizer.grouped(weight), quantizer.grouped(codes)
    scale = _scale(quantizer, weight, statistic)
    if _in_one_pass(weight, scale, quantizer, codes, None, codes.new_zeros(3, dtype=torch.int64), backend):
        return scale
    new = _slice_encoder(weight, scale, quantizer, codes.dtype, scratch)
    for index in kernels.slices(weight, kernels.slice_elements(weight)):
        codes[index].copy_(new(index))
    return scale


def encode_under(
    weight: Tensor,
    quantizer: Elementwise,
    scale: Tensor | None,
    codes: Tensor,
    scratch: kernels.ScratchPool,
    backend: str = "auto",
) -> None:
    """Write the ordinals of a slice under a scale that need not be its own into ``codes``.

    Args:
        weight: As ``quantizer.grouped`` gives it.
        quantizer: What encodes it.
        scale: Of the slice.
        codes: Of the slice's shape.
        scratch: Where temporaries come from.
        backend: As in :func:`weightflip.kernels.check_backend`.
    """
    if not _in_one_pass(weight, scale, quantizer, codes, None, codes.new_zeros(3, dtype=torch.int64), backend):
        quantizer.encode_under(weight, scale, codes, scratch)


def advance(
    weight: Tensor,
    quantizer: Elementwise,
    codes: Tensor,
    update: Tensor | None,
    counts: Tensor,
    scratch: kernels.ScratchPool,
    backend: str = "auto",
    observe: Observer | None = None,
    statistic: Tensor | None = None,
) -> Tensor | None:
    """Encode ``weight`` anew, count what changed against ``codes``, and keep the new codes there, in one go.

    Args:
        weight: Any shape and strides.
        quantizer: What encodes it.
        codes: Ordinals before the step, of the weight's shape; overwritten.
        update: The dense gradient or a bool mask of the updated weights, of the weight's shape; None counts none.
        counts: int64 of shape (3,): flips, updates, stalled; added to.
        scratch: Where temporaries come from.
        backend: As in :func:`weightflip.kernels.check_backend`.
        observe: Called for each slice in turn with its index and its ordinals before and after, in the shape that
            ``quantizer.grouped`` gives.
        statistic: What the quantizer has to know of the whole weight, where this is a shard.

    Returns:
        The quantizer's scale.
    """
    weight, codes = quantizer.grouped(weight), quantizer.grouped(codes)
    update = None if update is None else quantizer.grouped(update)
    scale = _scale(quantizer, weight, statistic)

    def advance_part(index: kernels.Index) -> None:
        part, part_codes = weight[index], codes[index]
        part_scale = None if scale is None else kernels.take(scale, index)
        part_update = None if update is None else update[index]
        if not _in_one_pass(part, part_scale, quantizer, part_codes, part_update, counts, backend):
            new = _slice_encoder(part, part_scale, quantizer, codes.dtype, scratch)
            kernels.count_(part_codes, new, part_update, counts, scratch)

    _observed(codes, advance_part, observe, scratch)
    return scale


def _observed(
    codes: Tensor, advance_part: Callable[[kernels.Index], None], observe: Observer | None, scratch: kernels.ScratchPool
) -> None:
    if observe is None:
        advance_part((slice(None),) * codes.ndim)
        return
    for index in kernels.slices(codes, kernels.slice_elements(codes)):
        part = codes[index]
        old = scratch("old", part, codes.dtype).copy_(part)
        advance_part(index)
        observe(index, old, part)


def _scale(quantizer: Elementwise, weight: Tensor, statistic: Tensor | None) -> Tensor | None:
    # A quantizer of a user's own may know of no statistics.
    return quantizer.scale(weight) if statistic is None else quantizer.scale(weight, statistic)


def in_plain_torch(quantizer: Elementwise) -> Callable[[Tensor, Tensor, Tensor | None, Tensor], object]:
    """What :func:`advance` does of weight, codes, update and counts without a compiled kernel."""
    scratch = kernels.ScratchPool()

    def advance_eagerly(weight: Tensor, codes: Tensor, update: Tensor | None, counts: Tensor) -> Tensor | None:
        return advance(weight, quantizer, codes, update, counts, scratch, "eager")

    return advance_eagerly


def _in_one_pass(
    weight: Tensor,
    scale: Tensor | None,
    quantizer: Elementwise,
    codes: Tensor,
    update: Tensor | None,
    counts: Tensor,
    backend: str,
) -> bool:
    kernel = kernels.one_pass(backend, weight.device, in_plain_torch(quantizer))
    rounding = None if kernel is None else quantizer.rounding(weight)
    if kernel is None or rounding is None:
        return False
    return kernel(weight, quantizer.applied_scale(scale), rounding, codes, update, counts)


def _slice_encoder(
    weight: Tensor, scale: Tensor | None, quantizer: Elementwise, dtype: torch.dtype, scratch: kernels.ScratchPool
) -> Callable[[kernels.Index], Tensor]:
    """From a slice's index to its ordinals, in a buffer that the next slice takes back."""

    def new(index: kernels.Index) -> Tensor:
        part = weight[index]
        ordinals = scratch("new", part, dtype)
        quantizer.encode_into(part, None if scale is None else kernels.take(scale, index), ordinals, scratch)
        return ordinals

    return new


def compare(
    codes: Tensor,
    new: Tensor,
    update: Tensor | None,
    counts: Tensor,
    scratch: kernels.ScratchPool,
    observe: Observer | None = None,
) -> None:
    """As :func:`advance`, for codes that are there already."""

    def advance_part(index: kernels.Index) -> None:
        part_update = None if update is None else update[index]
        kernels.count_(codes[index], new[index].__getitem__, part_update, counts, scratch)

    _observed(codes, advance_part, observe, scratch)


def count_nonfinite(weight: Tensor, count: Tensor, scratch: kernels.ScratchPool) -> None:
    """Write the number of NaN and infinite weights into ``count``, 0-dim int64."""
    count.zero_()
    for index in kernels.slices(weight, kernels.slice_elements(weight)):
        part = weight[index]
        values = scratch("values", part, torch.float64 if part.dtype is torch.float64 else torch.float32)
        # x * 0 is 0 for every number and NaN for the rest: cheaper than isfinite(), which makes two masks.
        count.add_(torch.count_nonzero(values.copy_(part).mul_(0)))
