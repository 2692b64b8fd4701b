"""Split tensors of any shape and strides into slices that fit the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from torch import Tensor

Index: TypeAlias = tuple[slice, ...]

# On the CPU, the buffers of a slice fit the outer caches, and each operation is long enough to hide its overhead.
_CPU_ELEMENTS = 1 << 20
# Elsewhere, fewer calls matter more than the cache: 64 MiB of buffers with up to 16 bytes per element.
_DEVICE_ELEMENTS = 1 << 22


def slice_elements(tensor: Tensor) -> int:
    """Return the number of elements per slice on the tensor's device."""
    return _CPU_ELEMENTS if tensor.device.type == "cpu" else _DEVICE_ELEMENTS


def slices(like: Tensor, limit: int) -> Iterator[Index]:
    """Yield indices of parts with at most ``limit`` elements, split along the outermost dimensions in memory."""
    if like.numel() <= limit:
        yield (slice(None),) * like.ndim
        return
    by_stride = sorted(range(like.ndim), key=like.stride, reverse=True)
    yield from _cut(like, by_stride, [slice(None)] * like.ndim, like.numel(), limit)


def _cut(like: Tensor, dims: list[int], index: list[slice], numel: int, limit: int) -> Iterator[Index]:
    dim, size = dims[0], like.size(dims[0])
    inner = numel // size
    step = max(1, limit // inner)
    for start in range(0, size, step):
        part = index.copy()
        part[dim] = slice(start, min(start + step, size))
        if inner > limit:
            yield from _cut(like, dims[1:], part, inner, limit)
        else:
            yield tuple(part)


def take(tensor: Tensor, index: Index) -> Tensor:
    """Return the part of ``tensor`` that belongs to a slice of a larger tensor to which it broadcasts."""
    if tensor.ndim == 0:
        return tensor
    aligned = index[len(index) - tensor.ndim :]
    return tensor[tuple(part if size > 1 else slice(None) for part, size in zip(aligned, tensor.shape, strict=True))]
