"""Pure functions from codes to counts and rates. The classes in :mod:`weightflip.counting` add the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from weightflip import checks, kernels

Observer: TypeAlias = Callable[[kernels.Index, Tensor, Tensor], None]


class Elementwise(Protocol):
    """The part of an elementwise quantizer's interface used here."""

    def grouped(self, tensor: Tensor) -> Tensor: ...

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor | None: ...

    def rounding(self, weight: Tensor) -> kernels.Rounding | None: ...

    def applied_scale(self, scale: Tensor | None) -> Tensor | None: ...

    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: kernels.ScratchPool) -> None: ...

    def encode_under(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: kernels.ScratchPool) -> None: ...


class Encoding(NamedTuple):
    """How a weight becomes ordinals.

    Attributes:
        quantizer: The quantizer.
        scratch: Pool of temporary buffers.
        backend: As in :func:`weightflip.kernels.check_backend`.
        statistic: For a shard, what the quantizer needs to know about the whole weight.
    """

    quantizer: Elementwise
    scratch: kernels.ScratchPool
    backend: str = "auto"
    statistic: Tensor | None = None

    def scale(self, weight: Tensor) -> Tensor | None:
        """The scale of a weight in the shape returned by ``quantizer.grouped``."""
        # A custom quantizer's scale() may not accept a statistic.
        return self.quantizer.scale(weight) if self.statistic is None else self.quantizer.scale(weight, self.statistic)


def compute_flip_rate(prev_quantized: Tensor, curr_quantized: Tensor) -> float:
    """Fraction of elements that differ between two quantized tensors. For a run, use :class:`WeightFlipTracker`.

    Args:
        prev_quantized: Quantized values or codes, of any shape and dtype.
        curr_quantized: The same after the step. NaN to NaN is not a flip, and +0 equals -0.

    Returns:
        Flips / elements, in [0, 1]. 0.0 for empty tensors.

    Raises:
        TypeError: An argument is not a tensor.
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
        # torch cannot compare float8 tensors.
        prev_quantized, curr_quantized = prev_quantized.float(), curr_quantized.float()
    flipped = prev_quantized != curr_quantized
    if prev_quantized.is_floating_point() and curr_quantized.is_floating_point():
        flipped &= ~(prev_quantized.isnan() & curr_quantized.isnan())
    return torch.count_nonzero(flipped).item() / flipped.numel()


def compute_stall_ratio(flips: int, updates: int) -> float:
    """``1 - flips / updates``, from two totals.

    This is an estimate: it assumes that only updated weights flip, and is negative if many weights without a gradient
    flip. ``get_stall_ratios`` counts the stalled weights.

    Args:
        flips: Number of weights whose code changed.
        updates: Number of weights whose gradient was not exactly 0.

    Returns:
        The ratio. 0.0 without updates.

    Raises:
        TypeError: An argument is not a number.

    Example:
        >>> compute_stall_ratio(flips=10, updates=100)
        0.9
    """
    checks.number("flips", flips)
    checks.number("updates", updates)
    return 1.0 - flips / updates if updates > 0 else 0.0


def encode_into(weight: Tensor, encoding: Encoding, codes: Tensor) -> Tensor | None:
    """Write the ordinals of ``weight`` into ``codes``.

    Args:
        weight: Any shape and strides.
        encoding: How to encode it.
        codes: Output, same shape as the weight.

    Returns:
        The quantizer's scale.
    """
    weight, codes = encoding.quantizer.grouped(weight), encoding.quantizer.grouped(codes)
    scale = encoding.scale(weight)
    if _in_one_pass(weight, encoding, scale, codes, None, codes.new_zeros(3, dtype=torch.int64)):
        return scale
    new = _slice_encoder(weight, encoding, scale, codes.dtype)
    for index in kernels.slices(weight, kernels.slice_elements(weight)):
        codes[index].copy_(new(index))
    return scale


def encode_under(weight: Tensor, encoding: Encoding, scale: Tensor | None, codes: Tensor) -> None:
    """Write the ordinals of a slice into ``codes``, encoded with a given scale.

    Args:
        weight: The slice, in the shape returned by ``quantizer.grouped``.
        encoding: How to encode it.
        scale: Scale for the slice. It may differ from the slice's own scale.
        codes: Output, same shape as the slice.
    """
    if not _in_one_pass(weight, encoding, scale, codes, None, codes.new_zeros(3, dtype=torch.int64)):
        encoding.quantizer.encode_under(weight, scale, codes, encoding.scratch)


def advance(
    weight: Tensor,
    encoding: Encoding,
    codes: Tensor,
    update: Tensor | None,
    counts: Tensor,
    observe: Observer | None = None,
) -> Tensor | None:
    """Encode ``weight`` again, count the changes against ``codes``, and store the new codes there, in one pass.

    Args:
        weight: Any shape and strides.
        encoding: How to encode it.
        codes: Ordinals before the step, same shape as the weight. Overwritten.
        update: Dense gradient, or bool mask of the updated weights, same shape as the weight. None counts no updates.
        counts: int64 of shape (3,): flips, updates, stalled. Incremented in place.
        observe: Called for each slice with its index and its ordinals before and after, in the shape returned by
            ``quantizer.grouped``.

    Returns:
        The quantizer's scale.
    """
    quantizer, scratch = encoding.quantizer, encoding.scratch
    weight, codes = quantizer.grouped(weight), quantizer.grouped(codes)
    update = None if update is None else quantizer.grouped(update)
    scale = encoding.scale(weight)

    def advance_part(index: kernels.Index) -> None:
        part, part_codes = weight[index], codes[index]
        part_scale = None if scale is None else kernels.take(scale, index)
        part_update = None if update is None else update[index]
        if not _in_one_pass(part, encoding, part_scale, part_codes, part_update, counts):
            new = _slice_encoder(part, encoding, part_scale, codes.dtype)
            kernels.count_(part_codes, new, part_update, counts, scratch)

    _for_each_slice(codes, advance_part, observe, scratch)
    return scale


def _for_each_slice(
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


def in_plain_torch(quantizer: Elementwise) -> Callable[[Tensor, Tensor, Tensor | None, Tensor], object]:
    """:func:`advance` in plain torch, as a function of weight, codes, update and counts."""
    encoding = Encoding(quantizer, kernels.ScratchPool(), "eager")

    def advance_eagerly(weight: Tensor, codes: Tensor, update: Tensor | None, counts: Tensor) -> Tensor | None:
        return advance(weight, encoding, codes, update, counts)

    return advance_eagerly


def _in_one_pass(
    weight: Tensor,
    encoding: Encoding,
    scale: Tensor | None,
    codes: Tensor,
    update: Tensor | None,
    counts: Tensor,
) -> bool:
    quantizer = encoding.quantizer
    kernel = kernels.one_pass(encoding.backend, weight.device, in_plain_torch(quantizer))
    rounding = None if kernel is None else quantizer.rounding(weight)
    if kernel is None or rounding is None:
        return False
    return kernel(weight, quantizer.applied_scale(scale), rounding, codes, update, counts)


def _slice_encoder(
    weight: Tensor, encoding: Encoding, scale: Tensor | None, dtype: torch.dtype
) -> Callable[[kernels.Index], Tensor]:
    """A function from a slice's index to its ordinals. They are valid until the next call, which reuses the buffer."""
    quantizer, scratch = encoding.quantizer, encoding.scratch

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
    """Like :func:`advance`, for new codes that exist already."""

    def advance_part(index: kernels.Index) -> None:
        part_update = None if update is None else update[index]
        kernels.count_(codes[index], new[index].__getitem__, part_update, counts, scratch)

    _for_each_slice(codes, advance_part, observe, scratch)


def count_nonfinite(weight: Tensor, count: Tensor, scratch: kernels.ScratchPool) -> None:
    """Write the number of NaN and infinite weights into ``count``, 0-dim int64."""
    count.zero_()
    for index in kernels.slices(weight, kernels.slice_elements(weight)):
        part = weight[index]
        values = scratch("values", part, torch.float64 if part.dtype is torch.float64 else torch.float32)
        # x * 0 is 0 for finite x and NaN otherwise. Cheaper than isfinite(), which allocates two masks.
        count.add_(torch.count_nonzero(values.copy_(part).mul_(0)))
