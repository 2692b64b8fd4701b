"""A change as a number format shows it: weights whose code differs, and scales that do."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from weightflip import functional, kernels
from weightflip.delta.compare import Seen
from weightflip.delta.mapped import MappedTensor
from weightflip.quantizers import BaseQuantizer, ElementwiseQuantizer
from weightflip.quantizers.protocol import bits_of_scale

_ELEMENTS = 1 << 22
_FLOATS = ("F16", "BF16", "F32", "F64")


def is_weight(old: MappedTensor, new: MappedTensor) -> bool:
    """Whether both are matrices of floating-point numbers, of one dtype and shape, so that a format can show them."""
    same = (old.dtype, old.shape) == (new.dtype, new.shape)
    return same and new.dtype in _FLOATS and len(new.shape) >= 2 and new.nbytes > 0


@torch.no_grad()
def seen_as(old: MappedTensor, new: MappedTensor, quantizer: BaseQuantizer) -> Seen:
    """Compare the codes of two tensors, in parts where the format allows it.

    Args:
        old: The tensor before.
        new: The tensor after; see :func:`is_weight`.
        quantizer: What makes the codes.

    Raises:
        ValueError: The shape or the dtype does not fit the format.
    """
    if not isinstance(quantizer, ElementwiseQuantizer) or not _in_rows(quantizer):
        return _whole(old, new, quantizer)
    statistics: list[Tensor | None] = [None, None]
    if quantizer.scope == "tensor":
        statistics = [_statistic(tensor, quantizer) for tensor in (old, new)]
    counts = torch.zeros(3, dtype=torch.int64)
    scratch = kernels.ScratchPool()
    scales, scales_changed = 0, 0
    for before, after in zip(_parts(old), _parts(new), strict=True):
        codes = torch.empty(before.shape, dtype=quantizer.code_dtype(before))
        first = functional.encode_into(before, quantizer, codes, scratch, statistic=statistics[0])
        second = functional.advance(after, quantizer, codes, None, counts, scratch, statistic=statistics[1])
        part, part_changed = _scales(quantizer, first, second)
        if part == 1 and quantizer.scope == "tensor":
            # One and the same for all parts.
            scales, scales_changed = part, part_changed
        else:
            scales, scales_changed = scales + part, scales_changed + part_changed
    return Seen(int(counts[kernels.FLIPS]), scales, scales_changed)


def _in_rows(quantizer: ElementwiseQuantizer) -> bool:
    """Whether whole rows can be encoded apart from each other, at most with the largest magnitude of them all."""
    if quantizer.scope == "tensor":
        return quantizer.has_statistic and quantizer.reduction == "max"
    return quantizer.scope in ("element", "group", "row")


def _whole(old: MappedTensor, new: MappedTensor, quantizer: BaseQuantizer) -> Seen:
    first, second = (quantizer.encode(_rows(tensor, 0, tensor.nbytes).view(tensor.shape)) for tensor in (old, new))
    changed = int(torch.count_nonzero(first.ordinals != second.ordinals))
    return Seen(changed, *_scales(quantizer, first.scale, second.scale))


def _statistic(tensor: MappedTensor, quantizer: ElementwiseQuantizer) -> Tensor:
    return functools.reduce(torch.maximum, (quantizer.statistic(quantizer.grouped(part)) for part in _parts(tensor)))


def _scales(quantizer: BaseQuantizer, old: Tensor | None, new: Tensor | None) -> tuple[int, int]:
    if old is None or new is None:
        return 0, 0
    stored = quantizer.scale_codes if isinstance(quantizer, ElementwiseQuantizer) else bits_of_scale
    return new.numel(), int(torch.count_nonzero(stored(old) != stored(new)))


def _parts(tensor: MappedTensor) -> Iterator[Tensor]:
    """Whole rows, as many as make a part; each is gone when the next one is asked for."""
    row = tensor.nbytes // (tensor.units // tensor.shape[-1])
    step = max(1, _ELEMENTS // tensor.shape[-1]) * row
    for begin in range(0, tensor.nbytes, step):
        end = min(begin + step, tensor.nbytes)
        yield _rows(tensor, begin, end)
        tensor.release(begin, end)


def _rows(tensor: MappedTensor, begin: int, end: int) -> Tensor:
    dtype = tensor.stored.dtype
    assert dtype is not None
    # A copy, since torch takes no memory that cannot be written.
    return torch.from_numpy(tensor.read(begin, end).copy()).view(dtype).view(-1, tensor.shape[-1])
