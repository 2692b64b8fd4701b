"""What differs between two moments at which a training publishes its weights, and how large that difference is."""

from __future__ import annotations

import torch
from torch import Tensor

from weightflip.kernels import ScratchPool, keep_
from weightflip.metrics import sizes
from weightflip.metrics.base import LayerMetric, Metric, Weight, register
from weightflip.quantizers.protocol import BaseQuantizer, bits_of_scale
from weightflip.records import Value

# Of a larger layer, so many runs of so many neighbours are looked at for what needs more than a comparison.
_RUNS, _RUN = 16, 1 << 12
_SIZES = "weightflip: sync, size of a delta"


@register
class Sync(Metric):
    """``metrics=("flips", "sync")``: what changed between two marks.

    A mark is where the training publishes its weights: ``tracker.mark_sync()``, or every ``sync_every`` steps. The
    codes are those of the weights as they are then, whoever wrote them. Over the windows between two marks that ended
    since the last point:

    * ``changed_fraction``: weights whose code is another one than at the last mark / weights. Net: there and back again
      is no change.
    * ``empty_layers``: the share of the layers in which no code is. Of a sharded layer, each part counts by itself.
    * ``scale_changed_fraction``: scales that are others than at the last mark / scales.
    * ``delta_index_ratio``: the size of a delta that lists each changed weight, with an index of 32 bits and its new
      code, as a share of the size of all codes.

    And of the last one of these windows:

    * ``delta_bits``: bits per weight that a delta takes at least, if changes are independent of each other: the
      entropy of what changed, and of the differences of the ordinals. ``delta_bound_ratio`` is the same as a share of
      the size of all codes.
    * ``delta_zstd_ratio``: the size of the XOR of old and new codes, as they are stored, under zstd; where
      ``zstandard`` is installed.

    Of layers with more than 65,536 weights, the differences and the XOR are those of 16 runs of 4,096 weights. Scales
    are in none of the sizes.
    """

    name = "sync"
    looks_at_steps = False
    looks_at_marks = True
    values = (
        Value(
            "changed_fraction",
            "rate",
            "changed",
            "share of weights whose code differs between two syncs",
            "share",
            order=40,
        ),
        Value(
            "empty_layers",
            "rate",
            "empty",
            "share of layers that did not change since the last sync",
            "share",
            order=41,
        ),
        Value(
            "scale_changed_fraction",
            "rate",
            "scales changed",
            "share of scales that differ between two syncs",
            "share",
            order=42,
        ),
        Value(
            "delta_index_ratio",
            "rate",
            "delta, index",
            "size of index and value of each change / of all codes",
            "share",
            chart=_SIZES,
            order=45,
        ),
        Value(
            "delta_bits", "gauge", "delta bits", "bits per weight that a delta takes at least", chart=_SIZES, order=43
        ),
        Value(
            "delta_bound_ratio",
            "gauge",
            "delta, bound",
            "size that a delta takes at least / of all codes",
            "share",
            chart=_SIZES,
            order=44,
        ),
        Value(
            "delta_zstd_ratio",
            "gauge",
            "delta, zstd",
            "size of the XOR with the old codes under zstd / of all codes",
            "share",
            chart=_SIZES,
            order=46,
        ),
    )

    def open(self, name: str, weight: Weight) -> LayerMetric | None:
        return _LayerSync(weight) if weight.codes.numel() else None


class _LayerSync(LayerMetric):
    def __init__(self, weight: Weight) -> None:
        self.codes = torch.empty_like(weight.codes, memory_format=torch.contiguous_format)
        """At the last mark."""
        scales = _stored_scales(weight)
        self.scales = None if scales is None else torch.empty_like(scales)
        self.is_marked = torch.zeros((), dtype=torch.bool, device="cpu")
        """Whether there was one. A tensor, so that it is saved with the codes; on the CPU, so that nobody waits."""
        self.state = ("codes", "is_marked") if scales is None else ("codes", "is_marked", "scales")
        self.old_part: Tensor | None = None
        """At the mark before, of a part of the weights: where a window has ended."""
        self.changed: Tensor | None = None
        bits, self.has_sign_bit = _code_kind(weight)
        self.bits = sizes.stored_bits(bits)

    def mark(self, weight: Weight, sums: Tensor, scratch: ScratchPool) -> None:
        scales = _stored_scales(weight)
        if self.is_marked:
            self.old_part = self._part().clone()
            self.changed, weights = keep_(self.codes, weight.codes, scratch), self.codes.numel()
            sums[0, 0].add_(self.changed)
            sums[0, 1].add_(weights)
            sums[1, 0].add_(self.changed == 0)
            sums[1, 1].add_(1)
            if scales is not None and self.scales is not None and scales.shape == self.scales.shape:
                sums[2, 0].add_(torch.count_nonzero(scales != self.scales))
                sums[2, 1].add_(scales.numel())
            sums[3, 0].add_(self.changed, alpha=sizes.INDEX_BITS + self.bits)
            sums[3, 1].add_(weights * self.bits)
        else:
            self.codes.copy_(weight.codes)
            self.is_marked.fill_(True)
        if scales is not None and self.scales is not None:
            self.scales.copy_(scales)

    def gauge(self, weight: Weight, gauges: Tensor, bins: Tensor) -> None:
        if self.old_part is None or self.changed is None:
            return
        old, new = torch.stack([self.old_part, self._part()]).flatten(1).cpu().numpy()
        weights, changed = self.codes.numel(), int(self.changed)
        self.old_part = self.changed = None
        bound = sizes.bound_bits(weights, changed, old, new)
        compressed = sizes.compressed_bits(*(sizes.stored(part, self.bits, self.has_sign_bit) for part in (old, new)))
        found = [(bound, weights), (bound, weights * self.bits), (0, 0)]
        if compressed is not None:
            found[2] = compressed * weights / len(old), weights * self.bits
        gauges.copy_(torch.tensor(found, dtype=torch.float64, device="cpu"))

    def _part(self) -> Tensor:
        """Of the codes, those that are looked at; a view."""
        flat = self.codes.view(-1)
        if len(flat) <= _RUNS * _RUN:
            return flat
        return flat.as_strided((_RUNS, _RUN), ((len(flat) - _RUN) // (_RUNS - 1), 1))


def _stored_scales(weight: Weight) -> Tensor | None:
    """What is stored of the scales, as integers."""
    if weight.scale is None:
        return None
    elementwise = weight.elementwise
    if elementwise is not None and elementwise.group is not None:
        return elementwise.scale_codes(weight.scale)
    return bits_of_scale(weight.scale)


def _code_kind(weight: Weight) -> tuple[int, bool]:
    """Bits that a code has, and whether they are a sign and a magnitude where codes are stored."""
    quantizer, elementwise = weight.quantizer, weight.elementwise
    is_float = isinstance(quantizer, BaseQuantizer) and (quantizer.format is not None or quantizer.name == "native")
    if elementwise is not None and elementwise.name == "binary":
        return 1, is_float
    outermost = None if elementwise is None else elementwise.ordinal_range(weight.values)
    if outermost is None:
        return 8 * weight.codes.element_size(), is_float
    return (outermost[1] - outermost[0]).bit_length(), is_float
