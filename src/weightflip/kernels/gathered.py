"""Many tensors as one, in plain torch: each call is for all of them, and none waits for the device.

Tensors are laid end to end. Their sizes, and the numbers of neighbors that share a scale, have a common divisor: in
chunks of that width no chunk belongs to two tensors, or to two scales. So the largest magnitudes, and the counts, are
first those of chunks, as rows of a matrix, and then those of all chunks of a scale or a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from weightflip.kernels.runs import upload

# 64 MiB of float32. What a format and the counts need besides is up to 16 bytes an element.
_ELEMENTS = 1 << 24
# Where chunks are narrower than this, there are nearly as many of them as elements, each with an index and a scale.
_NARROW = 16
_ELEMENTS_IN_NARROW = 1 << 20

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def is_small(numel: int, group: int) -> bool:
    """Whether a tensor can be gathered with others.

    Args:
        numel: Its elements.
        group: How many neighbors share a scale.
    """
    return 0 < numel <= (_ELEMENTS_IN_NARROW if _is_narrow(group) else _ELEMENTS)


def pack(numels: Sequence[int], groups: Sequence[int]) -> list[list[int]]:
    """Which tensors to gather together, by index; as few heaps of small ones as there can well be.

    Args:
        numels: Elements of each.
        groups: How many neighbors share a scale, in each.
    """
    heaps: list[tuple[list[int], int, bool]] = []
    # Narrow ones last, so that they spoil at most one heap of wide ones.
    for index in sorted(range(len(numels)), key=lambda index: (_is_narrow(groups[index]), -numels[index])):
        is_narrow = _is_narrow(groups[index])
        for at, (heap, numel, has_narrow) in enumerate(heaps):
            together = numel + numels[index]
            if together <= (_ELEMENTS_IN_NARROW if is_narrow or has_narrow else _ELEMENTS):
                heaps[at] = [*heap, index], together, is_narrow or has_narrow
                break
        else:
            heaps.append(([index], numels[index], is_narrow))
    return [sorted(heap) for heap, _, _ in heaps]


def _is_narrow(group: int) -> bool:
    return group % _NARROW != 0


class Layout:
    """How tensors lie end to end.

    Args:
        numels: Elements of each.
        groups: How many neighbors share a scale, in each; ``numels`` where all do, or where there is none.
        device: Where they are.
        width: A divisor of the groups, for chunks of that width; None for the widest.

    Attributes:
        numels: As above.
        width: Of the chunks.
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
        """The tensors in one; a single one itself, flat, if its memory is."""
        flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
        return flat

    def chunks(self, flat: Tensor) -> Tensor:
        """A view of a gathered tensor, a row for each chunk."""
        return flat.view(-1, self.width)

    def scales_of_chunks(self) -> Tensor | None:
        """Which scale each chunk has, int64; None where each has its own."""
        if self._chunks_of_scales is None:
            return None
        of_scales = self._chunks_of_scales
        if self._scales != len(self.numels):
            of_scales = torch.repeat_interleave(of_scales, self._scales_of_tensors, output_size=self._scales)
        return torch.repeat_interleave(of_scales, output_size=self._numel // self.width)

    @staticmethod
    def magnitudes(chunks: Tensor) -> Tensor:
        """The largest magnitude of each chunk, in their dtype, NaN where there is one; ``(chunks, 1)``."""
        low, high = torch.aminmax(chunks, dim=-1, keepdim=True)
        # Last abs: what torch makes of two NaN may have a sign.
        return torch.maximum(low.neg_(), high).abs_()

    def largest(self, magnitudes: Tensor, scales: Tensor | None) -> Tensor:
        """The largest magnitude under each scale, ``(scales, 1)``.

        Args:
            magnitudes: Of the chunks.
            scales: As ``scales_of_chunks`` gives them.
        """
        if scales is None:
            return magnitudes
        wide = magnitudes if magnitudes.dtype in _BITS else magnitudes.float()
        # Of numbers without a sign the bit patterns have the numbers' order, and NaN is above them all.
        bits = wide.view(_BITS[wide.dtype]).squeeze(1)
        largest = bits.new_zeros(self._scales).scatter_reduce_(0, scales, bits, "amax")
        return largest.view(wide.dtype).to(magnitudes.dtype).unsqueeze(1)

    def sums(self, flags: Tensor, of_chunks: Tensor | None = None) -> Tensor:
        """How many flags of each tensor are set.

        Args:
            flags: bool of shape (rows, elements).
            of_chunks: bool, one for each chunk; None for no row of these.

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
