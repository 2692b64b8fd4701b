"""The distance that quantized weights travel relative to that of the weights."""

from __future__ import annotations

import functools
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from weightflip.metrics.base import Bins, LayerMetric, Metric, Weight, register
from weightflip.quantizers.protocol import ElementwiseQuantizer
from weightflip.records import Value

# Sample size per layer: the error is about one percent from 10,000 flips on.
_SAMPLE = 1 << 14
_HIGH = 16.0
# The smallest code of one byte is minus this.
_HALF = 128


@register
class Travel(Metric):
    """``metrics=("flips", "travel")``: ``travel_ratio``, ``flip_excess`` and ``travel_high_fraction``.

    * ``travel_ratio``: the sum of ``abs(dQ(w))`` / the sum of ``abs(dw)`` over the steps since the last point, dQ on
      dequantized values: R_w of Chen et al. 2025 (TetraJet, arXiv:2502.20853), aggregated. About 1 when weights are
      spread evenly in their cells and the scale is constant. Far above 1: weights oscillate, or move with a changing
      scale. Far below 1: weights rest.
    * ``flip_excess``: flips / the sum of ``min(1, abs(dw) / cell width)``. 1 for weights spread evenly in their cells
      with a constant scale, regardless of the size of the steps. A cell is the interval that rounds to one code; it
      extends half way to both neighbors. The two outermost cells are assumed to be symmetric.
    * ``travel_high_fraction``: of the weights that moved since the last point, the share whose own ratio is above 16.
      ``log2_travel_ratio`` is the histogram of these ratios; weights whose code rested are in its first bin.

    The values come from a fixed random sample of up to 16,384 weights of each layer. In the model's values, each layer
    has the weight of all its elements. ``native`` weights do not have these values, since they equal their quantized
    values. Nor do weights whose quantizer encodes the whole weight at once, because it does not tell the values of its
    codes, and ``binary`` weights.
    """

    name = "travel"
    values = (
        Value(
            "travel_ratio",
            "rate",
            "travel",
            "distance the quantized weights went / distance the weights went",
            order=20,
        ),
        Value(
            "travel_high_fraction",
            "gauge",
            "travel high",
            "share of moving weights with a travel ratio above 16",
            "share",
            order=21,
        ),
        Value(
            "flip_excess",
            "rate",
            "flip excess",
            "flips / flips that the sizes of the steps account for",
            order=65,
            expects="step / cell width",
        ),
        Value(
            "log2_travel_ratio",
            "histogram",
            "log2 of travel",
            "travel ratios of single weights, as powers of 2",
            order=22,
        ),
    )
    histograms = (Bins("log2_travel_ratio", tuple(range(-7, 9))),)

    def open(self, name: str, weight: Weight) -> LayerMetric | None:
        quantizer = weight.elementwise
        if quantizer is None or quantizer.name == "native" or weight.values.numel() == 0:
            return None
        outermost = quantizer.ordinal_range(weight.values)
        return None if outermost is None else _LayerTravel(name, weight, quantizer, outermost)


class _Table(NamedTuple):
    """The value of each code of one byte, and the index of each sampled weight's code."""

    values: Tensor
    at: Tensor


class _Snapshot(NamedTuple):
    """The sample at one moment, with the scale of each weight, or with a table if all have the same scale."""

    weights: Tensor
    codes: Tensor
    values: Tensor
    scale: Tensor | None
    table: _Table | None


class _LayerTravel(LayerMetric):
    state = ("travelled", "quantized_travelled")

    def __init__(self, name: str, weight: Weight, quantizer: ElementwiseQuantizer, outermost: tuple[int, int]) -> None:
        self.quantizer, self.outermost = quantizer, outermost
        self.at = _sample(weight.values.numel(), name).to(weight.values.device)
        """Flat indices of the sample in the weight."""
        self.weights_per_sample = weight.values.numel() / self.at.numel()
        """The number of weights that each sampled weight represents."""
        self.old: _Snapshot | None = None
        self.travelled = torch.zeros(self.at.shape, dtype=torch.float64, device=self.at.device)
        self.quantized_travelled = torch.zeros_like(self.travelled)

    def before(self, weight: Weight) -> None:
        self.old = self._take_snapshot(weight)

    def after(self, weight: Weight, sums: Tensor) -> None:
        assert self.old is not None
        old, new = self.old, self._take_snapshot(weight)
        self.old = None
        moved = (new.weights - old.weights).abs_()
        quantized_moved = (new.values - old.values).abs_()
        # NaN, infinite weights and weights that share a scale with them count as not moved. Times 0, they are NaN.
        is_finite = moved.mul(0).add_(quantized_moved, alpha=0) == 0
        moved, quantized_moved = moved.where(is_finite, 0.0), quantized_moved.where(is_finite, 0.0)
        expected = (moved / self._cells(old)).clamp_(max=1).nan_to_num_(nan=0.0)
        flips = (new.codes != old.codes).logical_and_(is_finite)
        found = [quantized_moved.sum(), moved.sum(), flips.sum(dtype=torch.float64), expected.sum()]
        sums.add_(torch.stack(found).view(2, 2), alpha=self.weights_per_sample)
        self.travelled.add_(moved)
        self.quantized_travelled.add_(quantized_moved)

    def gauge(self, weight: Weight, gauges: Tensor, bins: Tensor) -> None:
        has_moved = self.travelled > 0
        ratios = self.quantized_travelled / self.travelled
        gauges[0, 0] = torch.count_nonzero(has_moved & (ratios > _HIGH)) * self.weights_per_sample
        gauges[0, 1] = torch.count_nonzero(has_moved) * self.weights_per_sample
        lowest, highest = Travel.histograms[0].edges[0], Travel.histograms[0].edges[-1]
        found = ratios.log2().floor().clamp_(lowest, highest - 1).sub_(lowest)
        found = (found[:, None] == torch.arange(len(bins), device=found.device)) & has_moved[:, None]
        bins.copy_((found.sum(0) * self.weights_per_sample).round_())
        self.travelled.zero_()
        self.quantized_travelled.zero_()

    def _take_snapshot(self, weight: Weight) -> _Snapshot:
        weights, codes = self._take_sample(weight.values).to(torch.float64), self._take_sample(weight.codes)
        scale = weight.scale
        if codes.dtype is torch.int8 and (scale is None or scale.numel() == 1):
            # With a single scale, each code has one value, and a table of values is shorter than the sample.
            known = _all_codes(codes.device)
            values = self._values(known, None if scale is None else scale.reshape(1).expand(known.shape))
            index = codes.int().add_(_HALF)
            return _Snapshot(weights, codes, values.index_select(0, index), None, _Table(values, index))
        if scale is not None:
            scale = self._scale_of_each(scale, weight.codes.shape)
        return _Snapshot(weights, codes, self._values(codes, scale), scale, None)

    def _take_sample(self, tensor: Tensor) -> Tensor:
        """Return the sample of a tensor in new memory."""
        if tensor.numel() == self.at.numel():
            return tensor.reshape(-1).clone()
        return tensor.view(-1).index_select(0, self.at) if tensor.is_contiguous() else torch.take(tensor, self.at)

    def _scale_of_each(self, scale: Tensor, shape: torch.Size) -> Tensor:
        if scale.shape == (*shape[:-1], 1) and scale.is_contiguous():
            return scale.view(-1).index_select(0, self.at.div(shape[-1], rounding_mode="floor"))
        return scale.expand(shape)[torch.unravel_index(self.at, shape)]

    def _values(self, codes: Tensor, scale: Tensor | None) -> Tensor:
        return self.quantizer.values(codes, scale).double()

    def _cells(self, moment: _Snapshot) -> Tensor:
        """Return the widths of the cells that contain the weights; arbitrary for NaN."""
        if moment.table is not None:
            return _cells_of_table(moment.table.values, self.outermost).index_select(0, moment.table.at)
        smallest, largest = self.outermost
        codes = moment.codes.long().clamp_(smallest, largest)

        def value(shifted: Tensor) -> Tensor:
            return self._values(shifted.clamp(smallest, largest).to(moment.codes.dtype), moment.scale)

        here = moment.values
        below, above = here - value(codes - 1), value(codes + 1) - here
        return torch.where(codes == smallest, above, torch.where(codes == largest, below, (below + above) / 2))


def _cells_of_table(values: Tensor, outermost: tuple[int, int]) -> Tensor:
    """Return the widths of the cells of all codes. Codes beyond an outermost one get its width."""
    first, last = (code + _HALF for code in outermost)
    steps = values[first : last + 1].diff()
    inner = (steps[:-1] + steps[1:]) / 2
    return torch.cat([steps[:1].expand(first + 1), inner, steps[-1:].expand(2 * _HALF - last)])


@functools.lru_cache(maxsize=8)
def _all_codes(device: torch.device) -> Tensor:
    """Return all codes of one byte."""
    return torch.arange(-_HALF, _HALF, dtype=torch.int8, device=device)


def _sample(numel: int, name: str) -> Tensor:
    """Return flat indices, one at random from each of 16,384 equal parts. They are the same in every run."""
    if numel <= _SAMPLE:
        return torch.arange(numel, device="cpu")
    borders = torch.arange(_SAMPLE + 1, dtype=torch.float64, device="cpu").mul_(numel / _SAMPLE).long()
    # A separate generator, so that tracking does not change the random numbers of the training.
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()))
    shares = torch.rand(_SAMPLE, generator=generator, dtype=torch.float64, device="cpu")
    return borders[:-1] + (shares * (borders[1:] - borders[:-1])).long()
