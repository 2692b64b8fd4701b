"""Process many tensors as one in plain torch: each call is for all of them, without a device synchronization.

The tensors are concatenated. Their sizes and group sizes have a common divisor, and a chunk of that width never belongs
to two tensors or two scales. So largest magnitudes and counts are first computed per chunk, as rows of a matrix, and
then reduced over the chunks of each scale or tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from weightflip.kernels.runs import upload

# 64 MiB of float32. Formats and counts need up to 16 more bytes per element.
_ELEMENTS = 1 << 24
# Narrower chunks are nearly as many as elements, and each needs an index and a scale.
_NARROW = 16
_ELEMENTS_IN_NARROW = 1 << 20

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def is_small(numel: int, group: int) -> bool:
    """Whether a tensor can be gathered with others.

    Args:
        numel: Number of elements.
        group: The number of adjacent elements that share a scale.
    """
    return 0 < numel <= (_ELEMENTS_IN_NARROW if _is_narrow(group) else _ELEMENTS)


def pack(numels: Sequence[int], groups: Sequence[int]) -> list[list[int]]:
    """Distribute tensors over few buckets that are gathered together, and return the indices of each bucket.

    Args:
        numels: Number of elements of each tensor.
        groups: The number of adjacent elements that share a scale in each tensor.
    """
    buckets: list[tuple[list[int], int, bool]] = []
    # Narrow ones last, so that they reduce the size of at most one bucket of wide ones.
    for index in sorted(range(len(numels)), key=lambda index: (_is_narrow(groups[index]), -numels[index])):
        is_narrow = _is_narrow(groups[index])
        for at, (bucket, numel, has_narrow) in enumerate(buckets):
            together = numel + numels[index]
            if together <= (_ELEMENTS_IN_NARROW if is_narrow or has_narrow else _ELEMENTS):
                buckets[at] = [*bucket, index], together, is_narrow or has_narrow
                break
        else:
            buckets.append(([index], numels[index], is_narrow))
    return [sorted(bucket) for bucket, _, _ in buckets]


def _is_narrow(group: int) -> bool:
    return group % _NARROW != 0


class Layout:
    """The layout of concatenated tensors.

    Args:
        numels: Number of elements of each tensor.
        groups: The number of adjacent elements that share a scale in each tensor; ``numels`` if all of them do, or if
            there is no scale.
        device: The device of the tensors.
        width: Width of the chunks, a divisor of the groups; None for the largest possible width.

    Attributes:
        numels: Number of elements of each tensor.
        width: Width of the chunks.
    """

    def __init__(
        self, numels: Sequence[int], groups: Sequence[int], device: torch.device, width: int | None = None
    ) -> None:
        self.numels = list(numels)
        self._numel = sum(numels)
        self.width = math.gcd(*groups) if width is None else width
        self._scales = sum(numel // group for numel, group in zip(numels, groups, strict=True))

        def uploaded(numbers: Sequence[int]) -> Tensor:
            return upload(torch.tensor(numbers, dtype=torch.int64, device="cpu"), device)

        self._chunks_of_scales: Tensor | None = None
        if any(group != self.width for group in groups):
            self._chunks_of_scales = uploaded([group // self.width for group in groups])
            self._scales_of_tensors = uploaded([n // group for n, group in zip(numels, groups, strict=True)])
        self._stride = math.gcd(*numels)
        self._ends: Tensor | None = None
        if any(numel != self._stride for numel in numels):
            self._ends = uploaded(numels).cumsum(0).floor_divide_(self._stride).sub_(1)

    @staticmethod
    def gather(tensors: Sequence[Tensor]) -> Tensor:
        """Concatenate tensors. A single contiguous tensor is returned as a view."""
        flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
        return flat

    def chunks(self, flat: Tensor) -> Tensor:
        """Return a view of a gathered tensor with one row per chunk."""
        return flat.view(-1, self.width)

    def scales_of_chunks(self) -> Tensor | None:
        """Return the index of each chunk's scale, int64; None if each chunk has a separate scale."""
        if self._chunks_of_scales is None:
            return None
        of_scales = self._chunks_of_scales
        if self._scales != len(self.numels):
            of_scales = torch.repeat_interleave(of_scales, self._scales_of_tensors, output_size=self._scales)
        return torch.repeat_interleave(of_scales, output_size=self._numel // self.width)

    @staticmethod
    def magnitudes(chunks: Tensor) -> Tensor:
        """Return the largest magnitude of each chunk in the chunks' dtype, NaN if it has one; ``(chunks, 1)``."""
        low, high = torch.aminmax(chunks, dim=-1, keepdim=True)
        # abs comes last, because the maximum of two NaN may have a sign.
        return torch.maximum(low.neg_(), high).abs_()

    def largest(self, magnitudes: Tensor, scales: Tensor | None) -> Tensor:
        """Return the largest magnitude under each scale, ``(scales, 1)``.

        Args:
            magnitudes: The magnitudes of the chunks.
            scales: The result of ``scales_of_chunks``.
        """
        if scales is None:
            return magnitudes
        wide = magnitudes if magnitudes.dtype in _BITS else magnitudes.float()
        # Bit patterns of numbers without a sign are ordered like the numbers, with NaN above all of them.
        bits = wide.view(_BITS[wide.dtype]).squeeze(1)
        largest = bits.new_zeros(self._scales).scatter_reduce_(0, scales, bits, "amax")
        return largest.view(wide.dtype).to(magnitudes.dtype).unsqueeze(1)

    def sums(self, flags: Tensor, of_chunks: Tensor | None = None) -> Tensor:
        """Count the set flags of each tensor.

        Args:
            flags: bool of shape (rows, elements).
            of_chunks: bool, one per chunk; None to leave that row out.

        Returns:
            int64 of shape (rows, tensors); the last row is that of the chunks.
        """
        sums = flags.view(len(flags), -1, self._stride).sum(-1)
        if of_chunks is not None:
            sums = torch.cat([sums, of_chunks.view(1, -1, self._stride // self.width).sum(-1)])
        if self._ends is None:
            return sums
        until = sums.cumsum(1).index_select(1, self._ends)
        until[:, 1:].copy_(until[:, 1:] - until[:, :-1])
        return until
