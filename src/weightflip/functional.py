"""Pure functions between codes and rates. The stateful classes of :mod:`weightflip.counting` are thin over these."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

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


class Encoding(NamedTuple):
    """How a weight becomes ordinals.

    Attributes:
        quantizer: What encodes it.
        scratch: Where temporaries come from.
        backend: As in :func:`weightflip.kernels.check_backend`.
        statistic: What the quantizer has to know of the whole weight, where this is a shard.
    """

    quantizer: Elementwise
    scratch: kernels.ScratchPool
    backend: str = "auto"
    statistic: Tensor | None = None

    def scale(self, weight: Tensor) -> Tensor | None:
        """The quantizer's scale of a weight, as ``quantizer.grouped`` gives it."""
        # A quantizer of a user's own may know of no statistics.
        return self.quantizer.scale(weight) if self.statistic is None else self.quantizer.scale(weight, self.statistic)


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


def encode_into(weight: Tensor, encoding: Encoding, codes: Tensor) -> Tensor | None:
    """Write the ordinals of ``weight`` into ``codes``.

    Args:
        weight: Any shape and strides.
        encoding: How it is encoded.
        codes: Of the weight's shape.

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
    """Write the ordinals of a slice under a scale that need not be its own into ``codes``.

    Args:
        weight: As ``quantizer.grouped`` gives it.
        encoding: How it is encoded.
        scale: Of the slice.
        codes: Of the slice's shape.
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
    """Encode ``weight`` anew, count what changed against ``codes``, and keep the new codes there, in one go.

    Args:
        weight: Any shape and strides.
        encoding: How it is encoded.
        codes: Ordinals before the step, of the weight's shape; overwritten.
        update: The dense gradient or a bool mask of the updated weights, of the weight's shape; None counts none.
        counts: int64 of shape (3,): flips, updates, stalled; added to.
        observe: Called for each slice in turn with its index and its ordinals before and after, in the shape that
            ``quantizer.grouped`` gives.

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


def in_plain_torch(quantizer: Elementwise) -> Callable[[Tensor, Tensor, Tensor | None, Tensor], object]:
    """What :func:`advance` does of weight, codes, update and counts without a compiled kernel."""
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
    """From a slice's index to its ordinals, in a buffer that the next slice takes back."""
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
