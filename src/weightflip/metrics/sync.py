"""How much changed between two syncs, and how large a delta would be."""

from __future__ import annotations

import torch
from torch import Tensor

from weightflip.kernels import ScratchPool, keep_
from weightflip.metrics import sizes
from weightflip.metrics.base import LayerMetric, Metric, Weight, register
from weightflip.quantizers.protocol import BaseQuantizer, bits_of_scale
from weightflip.records import Value

# Layers with more weights are sampled for sizes: this many runs of this many consecutive weights.
_RUNS, _RUN = 16, 1 << 12
_SIZES = "weightflip: sync, size of a delta"


@register
class Sync(Metric):
    """``metrics=("flips", "sync")``: what changed between two marks of ``tracker.mark_sync()`` or ``sync_every=``.

    A mark is where the training publishes its weights. Codes are those of the weights at the mark, regardless of what
    wrote them. These values cover all windows between two marks that ended since the last logging point:

    * ``changed_fraction``: weights whose code differs from that at the last mark / weights. This is the net change: a
      weight that moves back and forth does not count.
    * ``empty_layers``: layers without any changed weight / layers. Each shard of a sharded layer counts as a layer.
    * ``scale_changed_fraction``: scales that differ from those at the last mark / scales.
    * ``delta_index_ratio``: size of a delta that lists each changed weight as a 32-bit index and its new code / size of
      all codes.

    These values describe the last window:

    * ``delta_bits``: entropy bound of a delta in bits per weight, see :func:`weightflip.metrics.sizes.bound_bits`.
    * ``delta_bound_ratio``: the same / bits per code.
    * ``delta_zstd_ratio``: size of the XOR of the old and the new stored codes under zstd / size of all codes. Only
      with ``zstandard`` installed.

    For layers with more than 65,536 weights, the entropy of the differences and the XOR are taken from 16 runs of 4,096
    weights. Sizes do not include scales.
    """

    name = "sync"
    uses_steps = False
    uses_marks = True
    reads_scale = False
    values = (
        Value(
            "changed_fraction",
            "rate",
            "changed",
            "fraction of weights whose code changed between two syncs",
            "share",
            order=40,
        ),
        Value(
            "empty_layers",
            "rate",
            "empty",
            "fraction of layers that did not change since the last sync",
            "share",
            order=41,
        ),
        Value(
            "scale_changed_fraction",
            "rate",
            "scales changed",
            "fraction of scales that changed between two syncs",
            "share",
            order=42,
        ),
        Value(
            "delta_index_ratio",
            "rate",
            "delta, index",
            "size of a delta with index and value / of all codes",
            "share",
            chart=_SIZES,
            order=45,
        ),
        Value(
            "delta_bits", "gauge", "delta bits", "entropy bound of a delta, in bits per weight", chart=_SIZES, order=43
        ),
        Value(
            "delta_bound_ratio",
            "gauge",
            "delta, bound",
            "entropy bound of a delta / size of all codes",
            "share",
            chart=_SIZES,
            order=44,
        ),
        Value(
            "delta_zstd_ratio",
            "gauge",
            "delta, zstd",
            "size of the XOR with the old codes, under zstd / of all codes",
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
        """Those at the last mark."""
        scales = _stored_scales(weight)
        self.scales = None if scales is None else torch.empty_like(scales)
        self.is_marked = torch.zeros((), dtype=torch.bool, device="cpu")
        """Whether there was a mark. A tensor, to be saved with the codes; on the CPU, to be read without a device
        synchronization."""
        self.state = ("codes", "is_marked") if scales is None else ("codes", "is_marked", "scales")
        self.old_sample: Tensor | None = None
        """Sample of the codes at the mark before the last one, until the sizes are computed."""
        self.changed: Tensor | None = None
        bits, self.has_sign_bit = _code_kind(weight)
        self.bits = sizes.stored_bits(bits)

    def mark(self, weight: Weight, sums: Tensor, scratch: ScratchPool) -> None:
        scales = _stored_scales(weight)
        if self.is_marked:
            self.old_sample = self._sample().clone()
            self.changed, weights = keep_(self.codes, weight.codes, scratch, weight.backend), self.codes.numel()
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
        if self.old_sample is None or self.changed is None:
            return
        old, new = torch.stack([self.old_sample, self._sample()]).flatten(1).cpu().numpy()
        weights, changed = self.codes.numel(), int(self.changed)
        self.old_sample = self.changed = None
        bound = sizes.bound_bits(weights, changed, old, new)
        compressed = sizes.compressed_bits(
            *(sizes.stored_bytes(sample, self.bits, self.has_sign_bit) for sample in (old, new))
        )
        found = [(bound, weights), (bound, weights * self.bits), (0, 0)]
        if compressed is not None:
            found[2] = compressed * weights / len(old), weights * self.bits
        gauges.copy_(torch.tensor(found, dtype=torch.float64, device="cpu"))

    def _sample(self) -> Tensor:
        """Return the sample of the codes, as a view."""
        flat = self.codes.view(-1)
        if len(flat) <= _RUNS * _RUN:
            return flat
        return flat.as_strided((_RUNS, _RUN), ((len(flat) - _RUN) // (_RUNS - 1), 1))


def _stored_scales(weight: Weight) -> Tensor | None:
    """Return the scales as integers: those that the format stores, or the bits of a tensor's or a row's scale."""
    if weight.scale_codes is not None or weight.scale is None:
        return weight.scale_codes
    return bits_of_scale(weight.scale)


def _code_kind(weight: Weight) -> tuple[int, bool]:
    """Return the bits of a code, and whether it is stored as sign and magnitude."""
    quantizer, elementwise = weight.quantizer, weight.elementwise
    is_float = isinstance(quantizer, BaseQuantizer) and (quantizer.format is not None or quantizer.name == "native")
    if elementwise is not None and elementwise.name == "binary":
        return 1, is_float
    outermost = None if elementwise is None else elementwise.ordinal_range(weight.values)
    if outermost is None:
        return 8 * weight.codes.element_size(), is_float
    return (outermost[1] - outermost[0]).bit_length(), is_float
