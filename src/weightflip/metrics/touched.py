"""How many weights changed at least once between two syncs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weightflip.kernels import Index, ScratchPool, bits
from weightflip.kernels.pointwise import NEW, OLD, Pointwise, bit, differ
from weightflip.metrics.base import LayerMetric, Metric, RunFlag, Slice, Weight, register
from weightflip.records import Value


@register
class Touched(Metric):
    """``metrics=("flips", "touched")``: which weights flipped between two marks, with one bit per weight.

    Marks are those of ``tracker.mark_sync()`` or ``sync_every=``, as for :class:`~weightflip.metrics.sync.Sync`. These
    values cover all windows between two marks that ended since the last logging point:

    * ``touched_fraction``: weights with at least one flip in the window / weights. A weight that moves back and forth
      counts, unlike in ``changed_fraction``.
    * ``untouched_layers``: layers without such a weight / layers. Each shard of a sharded layer counts as a layer.

    Only tracked steps are seen, and skipped steps do not count. A window without such a step is continued by the next
    one.
    """

    name = "touched"
    uses_marks = True
    reads_scale = False
    values = (
        Value(
            "touched_fraction",
            "rate",
            "touched",
            "fraction of weights that flipped at least once between two syncs",
            "share",
            order=47,
        ),
        Value(
            "untouched_layers",
            "rate",
            "untouched",
            "fraction of layers without a flip since the last sync",
            "share",
            order=48,
        ),
    )

    def open(self, name: str, weight: Weight) -> LayerMetric | None:
        return _LayerTouched(weight) if weight.codes.numel() else None


_BIT = bit("bits")


class _LayerTouched(LayerMetric):
    state = ("bits", "is_marked", "has_run")
    run_flag: RunFlag
    pointwise = Pointwise(states=((_BIT, _BIT | differ(OLD, NEW)),))

    def __init__(self, weight: Weight) -> None:
        self.shape = weight.codes.shape
        self.bits = bits.zeros(weight.codes.numel(), weight.codes.device)
        """One bit per weight, in the order of contiguous codes."""
        self.is_marked = torch.zeros((), dtype=torch.bool, device="cpu")
        """Whether there was a mark. On the CPU, to be read without a device synchronization."""
        self.run_flag = RunFlag()
        self._seen = 0

    @property
    def has_run(self) -> Tensor:
        """Whether there was a step since the last mark, 0-dim bool."""
        return self.run_flag.value

    def slice(self, part: Slice, sums: Tensor) -> None:
        flipped = torch.ne(part.new, part.old, out=part.scratch("touched", part.old, torch.bool))
        first = self._start_of(part.index)
        if first is not None:
            bits.or_(self.bits, flipped.view(-1), first, part.scratch)
            return
        # Codes with other strides: collect the flags of all slices, which arrive in the order of memory.
        flags = part.scratch.flat("touched of all", self.shape.numel(), torch.bool, self.bits.device)
        flags.view(self.shape)[part.index] = flipped
        is_first = not any(at.start for at in part.index)
        self._seen = flipped.numel() + (0 if is_first else self._seen)
        if self._seen == self.shape.numel():
            bits.or_(self.bits, flags, 0, part.scratch)

    def _start_of(self, index: Index) -> int | None:
        """Return the index of the first weight of a part; None if its weights are not adjacent in contiguous codes."""
        spans = [range(*at.indices(size)) for at, size in zip(index, self.shape, strict=True)]
        starts = [span.start * math.prod(self.shape[d + 1 :]) for d, span in enumerate(spans)]
        cut = [d for d, span in enumerate(spans) if len(span) < self.shape[d]]
        is_run = not cut or all(len(span) == 1 for span in spans[: cut[-1]])
        return sum(starts) if is_run else None

    def mark(self, weight: Weight, sums: Tensor, scratch: ScratchPool) -> None:
        if not self.is_marked:
            self.bits.zero_()
            self.is_marked.fill_(True)
            return
        is_known = self.run_flag.is_known
        if is_known and not self.has_run:
            return
        # Only the device may know that there was no step. The window then counts zero times, and keeps its bits.
        windows = 1 if is_known else self.has_run.to(sums.device, torch.int64, non_blocking=True)
        touched = bits.count(self.bits)
        sums[0, 0].add_(touched * windows)
        sums[0, 1].add_(windows * self.shape.numel())
        sums[1, 0].add_((touched == 0) * windows)
        sums[1, 1].add_(windows)
        if isinstance(windows, Tensor):
            self.bits.mul_(1 - windows)
        else:
            self.bits.zero_()
