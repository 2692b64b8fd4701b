"""A change as a number format shows it: weights whose code differs, and scales that do."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from weightflip import functional, kernels
from weightflip.delta.bits import integers
from weightflip.delta.compare import Seen
from weightflip.delta.mapped import MappedTensor
from weightflip.delta.parallel import in_order
from weightflip.quantizers import BaseQuantizer, ElementwiseQuantizer
from weightflip.quantizers.protocol import bits_of_scale

_ELEMENTS = 1 << 21
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
    # Shapes and dtypes that do not fit are refused, also where no bit changed.
    quantizer.scale(quantizer.grouped(_rows(new, 0, _row(new))), statistics[1])
    unit = _unit(quantizer, new, statistics)
    counts = torch.zeros(3, dtype=torch.int64)
    scratch = kernels.ScratchPool()
    scales_changed = 0
    for _, (before, after) in in_order(_touched, (_Part(old, new, unit, *span) for span in _spans(new))):
        if not before.numel():
            continue
        codes = torch.empty(before.shape, dtype=quantizer.code_dtype(before))
        encodings = [functional.Encoding(quantizer, scratch, statistic=statistic) for statistic in statistics]
        first = functional.encode_into(before, encodings[0], codes)
        second = functional.advance(after, encodings[1], codes, None, counts)
        changed = _scales_changed(quantizer, first, second)
        # Without groups there is one for the whole tensor, and every part says the same of it.
        is_one = quantizer.scope == "tensor" and quantizer.group is None
        scales_changed = changed if is_one else scales_changed + changed
    return Seen(int(counts[kernels.FLIPS]), _scales(quantizer, new), scales_changed)


def _in_rows(quantizer: ElementwiseQuantizer) -> bool:
    """Whether whole rows can be encoded apart from each other, at most with the largest magnitude of them all."""
    if quantizer.scope == "tensor":
        return quantizer.has_statistic and quantizer.reduction == "max"
    return quantizer.scope in ("element", "group", "row")


def _unit(quantizer: ElementwiseQuantizer, tensor: MappedTensor, statistics: list[Tensor | None]) -> int | None:
    """How many neighbours decide on one code, so that it stays where none of their bits changed; None for all."""
    first, second = statistics
    if first is not None and second is not None and not torch.equal(first, second):
        return None
    return tensor.shape[-1] if quantizer.scope == "row" else quantizer.group or 1


class _Part(NamedTuple):
    """Some rows of a tensor before and after, and how many neighbours belong together."""

    old: MappedTensor
    new: MappedTensor
    unit: int | None
    begin: int
    end: int


def _touched(part: _Part) -> tuple[Tensor, Tensor]:
    """The units in which any bit differs, one a row; where a unit is one element, all in one row."""
    if part.unit is None:
        return _rows(part.old, part.begin, part.end), _rows(part.new, part.begin, part.end)
    first, second = (
        integers(tensor.read(part.begin, part.end), tensor.stored.unit).reshape(-1, part.unit)
        for tensor in (part.old, part.new)
    )
    differs = (first != second).any(-1) if part.unit > 1 else (first != second)[:, 0]
    width = -1 if part.unit == 1 else part.unit
    found = _tensor(part.old, first[differs], width), _tensor(part.new, second[differs], width)
    for tensor in (part.old, part.new):
        tensor.release(part.begin, part.end)
    return found


def _scales(quantizer: ElementwiseQuantizer, tensor: MappedTensor) -> int:
    if quantizer.group is not None:
        return tensor.units // quantizer.group
    return {"row": tensor.units // tensor.shape[-1], "tensor": 1}.get(quantizer.scope or "", 0)


def _scales_changed(quantizer: BaseQuantizer, old: Tensor | None, new: Tensor | None) -> int:
    if old is None or new is None:
        return 0
    stored = quantizer.scale_codes if isinstance(quantizer, ElementwiseQuantizer) else bits_of_scale
    return int(torch.count_nonzero(stored(old) != stored(new)))


def _whole(old: MappedTensor, new: MappedTensor, quantizer: BaseQuantizer) -> Seen:
    first, second = (quantizer.encode(_rows(tensor, 0, tensor.nbytes).view(tensor.shape)) for tensor in (old, new))
    changed = int(torch.count_nonzero(first.ordinals != second.ordinals))
    scales = 0 if second.scale is None else second.scale.numel()
    return Seen(changed, scales, _scales_changed(quantizer, first.scale, second.scale))


def _statistic(tensor: MappedTensor, quantizer: ElementwiseQuantizer) -> Tensor:
    def of_part(span: tuple[int, int]) -> Tensor:
        return quantizer.statistic(quantizer.grouped(_rows(tensor, *span)))

    return functools.reduce(torch.maximum, (found for _, found in in_order(of_part, _spans(tensor))))


def _row(tensor: MappedTensor) -> int:
    """Bytes of one."""
    return tensor.shape[-1] * tensor.stored.unit


def _spans(tensor: MappedTensor) -> Iterator[tuple[int, int]]:
    """Begin and end of parts of whole rows, in bytes."""
    step = max(1, _ELEMENTS // tensor.shape[-1]) * _row(tensor)
    for begin in range(0, tensor.nbytes, step):
        yield begin, min(begin + step, tensor.nbytes)


def _rows(tensor: MappedTensor, begin: int, end: int) -> Tensor:
    # A copy, since torch takes no memory that cannot be written.
    found = _tensor(tensor, tensor.read(begin, end).copy(), tensor.shape[-1])
    tensor.release(begin, end)
    return found


def _tensor(tensor: MappedTensor, data: NDArray[Any], width: int) -> Tensor:
    """Bytes of a tensor as rows of so many elements; -1 for one row."""
    dtype = tensor.stored.dtype
    assert dtype is not None
    elements = torch.from_numpy(data.reshape(-1)).view(dtype)
    return elements.view(1, -1) if width < 0 else elements.view(-1, width)
