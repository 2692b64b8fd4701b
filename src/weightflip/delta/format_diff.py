"""Compares tensors in a number format: weights whose code differs, and scales that differ."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from weightflip import functional, kernels
from weightflip.delta.bits import integers
from weightflip.delta.compare import FormatDiff
from weightflip.delta.mapped import MappedTensor
from weightflip.delta.parallel import map_in_order
from weightflip.quantizers import BaseQuantizer, ElementwiseQuantizer
from weightflip.quantizers.protocol import bits_of_scale

_ELEMENTS = 1 << 21
_FLOATS = ("F16", "BF16", "F32", "F64")


def is_weight(old: MappedTensor, new: MappedTensor) -> bool:
    """Whether both are floating-point tensors with at least two dimensions and the same dtype and shape."""
    same = (old.dtype, old.shape) == (new.dtype, new.shape)
    return same and new.dtype in _FLOATS and len(new.shape) >= 2 and new.nbytes > 0


@torch.no_grad()
def compare_in_format(old: MappedTensor, new: MappedTensor, quantizer: BaseQuantizer) -> FormatDiff:
    """Compare the codes of two tensors, in parts if the format allows it.

    Args:
        old: The old tensor.
        new: The new tensor. See :func:`is_weight`.
        quantizer: The quantizer.

    Raises:
        ValueError: The format does not support the shape or the dtype.
    """
    if not isinstance(quantizer, ElementwiseQuantizer) or not _can_split_rows(quantizer):
        return _compare_whole(old, new, quantizer)
    statistics: list[Tensor | None] = [None, None]
    if quantizer.scope == "tensor":
        statistics = [_compute_statistic(tensor, quantizer) for tensor in (old, new)]
    # Raise for unsupported shapes and dtypes even if no bit changed.
    quantizer.scale(quantizer.grouped(_read_rows(new, 0, _row_nbytes(new))), statistics[1])
    unit = _unit_size(quantizer, new, statistics)
    counts = torch.zeros(3, dtype=torch.int64)
    scratch = kernels.ScratchPool()
    scales_changed = 0
    for _, (before, after) in map_in_order(_read_touched_units, (_Part(old, new, unit, *span) for span in _spans(new))):
        if not before.numel():
            continue
        codes = torch.empty(before.shape, dtype=quantizer.code_dtype(before))
        encodings = [functional.Encoding(quantizer, scratch, statistic=statistic) for statistic in statistics]
        first = functional.encode_into(before, encodings[0], codes)
        second = functional.advance(after, encodings[1], codes, None, counts)
        changed = _count_changed_scales(quantizer, first, second)
        # A single scale for the whole tensor is compared in every part, but counts once.
        is_one = quantizer.scope == "tensor" and quantizer.group is None
        scales_changed = changed if is_one else scales_changed + changed
    return FormatDiff(int(counts[kernels.FLIPS]), _count_scales(quantizer, new), scales_changed)


def _can_split_rows(quantizer: ElementwiseQuantizer) -> bool:
    """Whether rows can be encoded independently, given at most the largest magnitude of the tensor."""
    if quantizer.scope == "tensor":
        return quantizer.has_statistic and quantizer.reduction == "max"
    return quantizer.scope in ("element", "group", "row")


def _unit_size(quantizer: ElementwiseQuantizer, tensor: MappedTensor, statistics: list[Tensor | None]) -> int | None:
    """Number of adjacent elements on which a code depends: it cannot change unless their bits do. None for all."""
    first, second = statistics
    if first is not None and second is not None and not torch.equal(first, second):
        return None
    return tensor.shape[-1] if quantizer.scope == "row" else quantizer.group or 1


class _Part(NamedTuple):
    """Some rows of a tensor in both checkpoints, and the number of adjacent elements on which a code depends."""

    old: MappedTensor
    new: MappedTensor
    unit: int | None
    begin: int
    end: int


def _read_touched_units(part: _Part) -> tuple[Tensor, Tensor]:
    """The units with any differing bit, one unit per row. Units of one element form a single row."""
    if part.unit is None:
        return _read_rows(part.old, part.begin, part.end), _read_rows(part.new, part.begin, part.end)
    first, second = (
        integers(tensor.read(part.begin, part.end), tensor.stored.unit).reshape(-1, part.unit)
        for tensor in (part.old, part.new)
    )
    differs = (first != second).any(-1) if part.unit > 1 else (first != second)[:, 0]
    width = -1 if part.unit == 1 else part.unit
    found = _to_tensor(part.old, first[differs], width), _to_tensor(part.new, second[differs], width)
    for tensor in (part.old, part.new):
        tensor.release(part.begin, part.end)
    return found


def _count_scales(quantizer: ElementwiseQuantizer, tensor: MappedTensor) -> int:
    if quantizer.group is not None:
        return tensor.units // quantizer.group
    return {"row": tensor.units // tensor.shape[-1], "tensor": 1}.get(quantizer.scope or "", 0)


def _count_changed_scales(quantizer: BaseQuantizer, old: Tensor | None, new: Tensor | None) -> int:
    if old is None or new is None:
        return 0
    stored = quantizer.scale_codes if isinstance(quantizer, ElementwiseQuantizer) else bits_of_scale
    return int(torch.count_nonzero(stored(old) != stored(new)))


def _compare_whole(old: MappedTensor, new: MappedTensor, quantizer: BaseQuantizer) -> FormatDiff:
    first, second = (quantizer.encode(_read_rows(tensor, 0, tensor.nbytes).view(tensor.shape)) for tensor in (old, new))
    changed = int(torch.count_nonzero(first.ordinals != second.ordinals))
    scales = 0 if second.scale is None else second.scale.numel()
    return FormatDiff(changed, scales, _count_changed_scales(quantizer, first.scale, second.scale))


def _compute_statistic(tensor: MappedTensor, quantizer: ElementwiseQuantizer) -> Tensor:
    def of_part(span: tuple[int, int]) -> Tensor:
        return quantizer.statistic(quantizer.grouped(_read_rows(tensor, *span)))

    return functools.reduce(torch.maximum, (found for _, found in map_in_order(of_part, _spans(tensor))))


def _row_nbytes(tensor: MappedTensor) -> int:
    """Bytes per row."""
    return tensor.shape[-1] * tensor.stored.unit


def _spans(tensor: MappedTensor) -> Iterator[tuple[int, int]]:
    """Begin and end of parts made of complete rows, in bytes."""
    step = max(1, _ELEMENTS // tensor.shape[-1]) * _row_nbytes(tensor)
    for begin in range(0, tensor.nbytes, step):
        yield begin, min(begin + step, tensor.nbytes)


def _read_rows(tensor: MappedTensor, begin: int, end: int) -> Tensor:
    # A copy, since torch requires writable memory.
    found = _to_tensor(tensor, tensor.read(begin, end).copy(), tensor.shape[-1])
    tensor.release(begin, end)
    return found


def _to_tensor(tensor: MappedTensor, data: NDArray[Any], width: int) -> Tensor:
    """Bytes of a tensor as rows of ``width`` elements; -1 for a single row."""
    dtype = tensor.stored.dtype
    assert dtype is not None
    elements = torch.from_numpy(data.reshape(-1)).view(dtype)
    return elements.view(1, -1) if width < 0 else elements.view(-1, width)
