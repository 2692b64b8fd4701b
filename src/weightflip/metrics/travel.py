"""The distance that quantized weights travel relative to that of the weights."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weightflip.kernels import LANES, Sample
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
            "fraction of moving weights with a travel ratio above 16",
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


class _Moment(NamedTuple):
    """The codes of the sample at one moment, with the scale of each, or with a table if all have the same scale."""

    codes: Tensor
    values: Tensor
    scale: Tensor | None
    table: _Table | None


class _LayerTravel(LayerMetric):
    state = ("traveled", "quantized_traveled")
    sample: Sample

    def __init__(self, name: str, weight: Weight, quantizer: ElementwiseQuantizer, outermost: tuple[int, int]) -> None:
        self.quantizer = quantizer
        numel, like = weight.values.numel(), weight.values
        at = None if numel <= _SAMPLE else _choose(numel, name).to(like.device)
        sampled = min(numel, _SAMPLE)
        self.sample = Sample(
            at,
            weights=like.new_zeros(sampled),
            codes=weight.codes.new_zeros(sampled),
            moved=like.new_zeros(sampled, dtype=torch.float64),
            quantized_moved=like.new_zeros(sampled, dtype=torch.float64),
            share=numel / sampled,
            outermost=outermost,
        )

    @property
    def traveled(self) -> Tensor:
        """The distance that each sampled weight moved since the last logging point."""
        return self.sample.moved

    @property
    def quantized_traveled(self) -> Tensor:
        """The same for their quantized values."""
        return self.sample.quantized_moved

    def before(self, weight: Weight) -> None:
        if self.sample.weights.dtype is not weight.values.dtype:
            # Model.to(dtype) does not change the codes' dtype, so that the group is not opened again.
            self.sample.weights = self.sample.weights.to(weight.values.dtype)
        self.sample.weights.copy_(self._take_sample(weight.values))
        self.sample.codes.copy_(self._take_sample(weight.codes))
        self.sample.scale = weight.scale

    def after(self, weight: Weight, sums: Tensor) -> None:
        shape = weight.codes.shape
        old = self._at_moment(self.sample.codes, self.sample.scale, shape)
        new = self._at_moment(self._take_sample(weight.codes), weight.scale, shape)
        self.sample.scale = None
        # Not in place: the sample of a float64 weight may be the weight itself.
        moved = (self._take_sample(weight.values).double() - self.sample.weights.double()).abs_()
        quantized_moved = (new.values - old.values).abs_()
        # NaN, infinite weights and weights that share a scale with them count as not moved. Times 0, they are NaN.
        is_finite = moved.mul(0).add_(quantized_moved, alpha=0) == 0
        moved, quantized_moved = moved.where(is_finite, 0.0), quantized_moved.where(is_finite, 0.0)
        expected = (moved / self._cells(old)).clamp_(max=1).nan_to_num_(nan=0.0)
        flips = (new.codes != old.codes).logical_and_(is_finite)
        found = _sum_in_lanes([quantized_moved, moved, flips, expected])
        sums.add_(found.view(2, 2), alpha=self.sample.share)
        self.traveled.add_(moved)
        self.quantized_traveled.add_(quantized_moved)

    def gauge(self, weight: Weight, gauges: Tensor, bins: Tensor) -> None:
        has_moved = self.traveled > 0
        ratios = self.quantized_traveled / self.traveled
        gauges[0, 0] = torch.count_nonzero(has_moved & (ratios > _HIGH)) * self.sample.share
        gauges[0, 1] = torch.count_nonzero(has_moved) * self.sample.share
        lowest, highest = Travel.histograms[0].edges[0], Travel.histograms[0].edges[-1]
        found = ratios.log2().floor().clamp_(lowest, highest - 1).sub_(lowest)
        found = (found[:, None] == torch.arange(len(bins), device=found.device)) & has_moved[:, None]
        bins.copy_((found.sum(0) * self.sample.share).round_())
        self.traveled.zero_()
        self.quantized_traveled.zero_()

    def _take_sample(self, tensor: Tensor) -> Tensor:
        at = self.sample.at
        if at is None:
            return tensor.reshape(-1)
        return tensor.view(-1).index_select(0, at) if tensor.is_contiguous() else torch.take(tensor, at)

    def _at_moment(self, codes: Tensor, scale: Tensor | None, shape: torch.Size) -> _Moment:
        """Return the sample's values.

        Args:
            codes: The codes of the sample.
            scale: The scale of the whole weight.
            shape: The shape of the weight.
        """
        if codes.dtype is torch.int8 and (scale is None or scale.numel() == 1):
            # With a single scale, each code has one value, and a table of values is shorter than the sample.
            known = _all_codes(codes.device)
            values = self._values(known, None if scale is None else scale.reshape(1).expand(known.shape))
            index = codes.int().add_(_HALF)
            return _Moment(codes, values.index_select(0, index), None, _Table(values, index))
        if scale is not None:
            scale = self._scale_of_each(scale, shape)
        return _Moment(codes, self._values(codes, scale), scale, None)

    def _scale_of_each(self, scale: Tensor, shape: torch.Size) -> Tensor:
        at = self.sample.at
        if at is None:
            return scale.expand(shape).reshape(-1)
        if scale.shape == (*shape[:-1], 1) and scale.is_contiguous():
            return scale.view(-1).index_select(0, at.div(shape[-1], rounding_mode="floor"))
        return scale.expand(shape)[torch.unravel_index(at, shape)]

    def _values(self, codes: Tensor, scale: Tensor | None) -> Tensor:
        return self.quantizer.values(codes, scale).double()

    def _cells(self, moment: _Moment) -> Tensor:
        """Return the widths of the cells that contain the weights; arbitrary for NaN."""
        if moment.table is not None:
            return _cells_of_table(moment.table.values, self.sample.outermost).index_select(0, moment.table.at)
        smallest, largest = self.sample.outermost
        codes = moment.codes.long().clamp_(smallest, largest)

        def value(shifted: Tensor) -> Tensor:
            return self._values(shifted.clamp(smallest, largest).to(moment.codes.dtype), moment.scale)

        here = moment.values
        below, above = here - value(codes - 1), value(codes + 1) - here
        return torch.where(codes == smallest, above, torch.where(codes == largest, below, (below + above) / 2))


def _sum_in_lanes(rows: Sequence[Tensor]) -> Tensor:
    """Return the sums of 1-dim tensors, float64. On the CPU, they are added in the order that ``LANES`` describes."""
    if rows[0].device.type != "cpu":
        # There is no kernel with the same order there, and no deterministic cumsum() on CUDA.
        return torch.stack([row.sum(dtype=torch.float64) for row in rows])
    numel = rows[0].numel()
    padded = torch.zeros(len(rows), -(-numel // LANES) * LANES, dtype=torch.float64, device=rows[0].device)
    for row, numbers in zip(padded, rows, strict=True):
        row[:numel].copy_(numbers)
    # Unlike sum(), cumsum() adds one after the other on the CPU.
    return padded.view(len(rows), -1, LANES).cumsum(1)[:, -1].cumsum(1)[:, -1]


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


def _choose(numel: int, name: str) -> Tensor:
    """Return flat indices, one at random from each of 16,384 equal parts. They are the same in every run."""
    borders = torch.arange(_SAMPLE + 1, dtype=torch.float64, device="cpu").mul_(numel / _SAMPLE).long()
    # A separate generator, so that tracking does not change the random numbers of the training.
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()))
    shares = torch.rand(_SAMPLE, generator=generator, dtype=torch.float64, device="cpu")
    return borders[:-1] + (shares * (borders[1:] - borders[:-1])).long()
