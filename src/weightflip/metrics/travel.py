"""How far quantized weights travel, for how far the weights do."""

from __future__ import annotations

import functools
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from weightflip.metrics.base import Bins, LayerMetric, Metric, Weight, register
from weightflip.quantizers.protocol import ElementwiseQuantizer
from weightflip.records import Value

# Weights of a layer that are looked at: errors of about a percent from 10,000 flips on.
_SAMPLE = 1 << 14
_HIGH = 16.0
# Codes of a byte begin at minus this.
_HALF = 128


@register
class Travel(Metric):
    """``metrics=("flips", "travel")``: ``travel_ratio``, ``flip_excess`` and ``travel_high_fraction``.

    * ``travel_ratio``: the sum of ``abs(dQ(w))`` / the sum of ``abs(dw)`` over the steps since the last point, dQ on
      dequantized values: R_w of Chen et al. 2025 (TetraJet, arXiv:2502.20853), aggregated. About 1 when weights are
      spread evenly in their cells and the scale rests; far above: oscillating, or carried along by a scale that moves;
      far below: resting.
    * ``flip_excess``: flips / the sum of ``min(1, abs(dw) / cell width)``. 1 for weights spread evenly in their cells
      under a scale that rests, however large the steps are. A cell is what rounds to one code: half way to the
      neighbors on both sides. The two outermost ones are taken to reach as far out as in.
    * ``travel_high_fraction``: of the weights that moved since the last point, the share whose own ratio is above 16.
      ``log2_travel_ratio`` is the histogram of these ratios; weights whose code rested are in its first bin.

    Looks at up to 16,384 weights of each layer, always the same ones, drawn at random; layers count in the model's
    numbers as if all their weights had been looked at. ``native`` weights are their own quantized values, and
    quantizers that encode the whole weight at once do not say what a code stands for: neither has such numbers, nor has
    ``binary``.
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
    """What each code of a byte stands for, and where in it the sample is."""

    values: Tensor
    at: Tensor


class _Moment(NamedTuple):
    """The sample at one moment: with the scale of each weight, or with a table where all have the same."""

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
        """Where the sample is in the weight, laid out row after row."""
        self.of_each = weight.values.numel() / self.at.numel()
        """Weights that each one of the sample stands for."""
        self.old: _Moment | None = None
        self.travelled = torch.zeros(self.at.shape, dtype=torch.float64, device=self.at.device)
        self.quantized_travelled = torch.zeros_like(self.travelled)

    def before(self, weight: Weight) -> None:
        self.old = self._look(weight)

    def after(self, weight: Weight, sums: Tensor) -> None:
        assert self.old is not None
        old, new = self.old, self._look(weight)
        self.old = None
        moved = (new.weights - old.weights).abs_()
        quantized_moved = (new.values - old.values).abs_()
        # NaN, infinite weights and what shares a scale with them have not moved any distance: times 0 they are NaN.
        is_finite = moved.mul(0).add_(quantized_moved, alpha=0) == 0
        moved, quantized_moved = moved.where(is_finite, 0.0), quantized_moved.where(is_finite, 0.0)
        expected = (moved / self._cells(old)).clamp_(max=1).nan_to_num_(nan=0.0)
        flips = (new.codes != old.codes).logical_and_(is_finite)
        found = [quantized_moved.sum(), moved.sum(), flips.sum(dtype=torch.float64), expected.sum()]
        sums.add_(torch.stack(found).view(2, 2), alpha=self.of_each)
        self.travelled.add_(moved)
        self.quantized_travelled.add_(quantized_moved)

    def gauge(self, weight: Weight, gauges: Tensor, bins: Tensor) -> None:
        has_moved = self.travelled > 0
        ratios = self.quantized_travelled / self.travelled
        gauges[0, 0] = torch.count_nonzero(has_moved & (ratios > _HIGH)) * self.of_each
        gauges[0, 1] = torch.count_nonzero(has_moved) * self.of_each
        lowest, highest = Travel.histograms[0].edges[0], Travel.histograms[0].edges[-1]
        found = ratios.log2().floor().clamp_(lowest, highest - 1).sub_(lowest)
        found = (found[:, None] == torch.arange(len(bins), device=found.device)) & has_moved[:, None]
        bins.copy_((found.sum(0) * self.of_each).round_())
        self.travelled.zero_()
        self.quantized_travelled.zero_()

    def _look(self, weight: Weight) -> _Moment:
        weights, codes = self._take(weight.values).to(torch.float64), self._take(weight.codes)
        scale = weight.scale
        if codes.dtype is torch.int8 and (scale is None or scale.numel() == 1):
            # With a single scale, each code has one value, and a table of values is shorter than the sample.
            known = _all_codes(codes.device)
            values = self._values(known, None if scale is None else scale.reshape(1).expand(known.shape))
            index = codes.int().add_(_HALF)
            return _Moment(weights, codes, values.index_select(0, index), None, _Table(values, index))
        if scale is not None:
            scale = self._scale_of_each(scale, weight.codes.shape)
        return _Moment(weights, codes, self._values(codes, scale), scale, None)

    def _take(self, tensor: Tensor) -> Tensor:
        """The sample of a tensor; new memory."""
        if tensor.numel() == self.at.numel():
            return tensor.reshape(-1).clone()
        return tensor.view(-1).index_select(0, self.at) if tensor.is_contiguous() else torch.take(tensor, self.at)

    def _scale_of_each(self, scale: Tensor, shape: torch.Size) -> Tensor:
        if scale.shape == (*shape[:-1], 1) and scale.is_contiguous():
            return scale.view(-1).index_select(0, self.at.div(shape[-1], rounding_mode="floor"))
        return scale.expand(shape)[torch.unravel_index(self.at, shape)]

    def _values(self, codes: Tensor, scale: Tensor | None) -> Tensor:
        return self.quantizer.values(codes, scale).double()

    def _cells(self, moment: _Moment) -> Tensor:
        """Widths of the cells that the weights lie in; of those that are no number, of any cell."""
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
    """Widths of the cells of all codes, from their values; those beyond the outermost ones have theirs."""
    first, last = (code + _HALF for code in outermost)
    steps = values[first : last + 1].diff()
    inner = (steps[:-1] + steps[1:]) / 2
    return torch.cat([steps[:1].expand(first + 1), inner, steps[-1:].expand(2 * _HALF - last)])


@functools.lru_cache(maxsize=8)
def _all_codes(device: torch.device) -> Tensor:
    """Those of a byte."""
    return torch.arange(-_HALF, _HALF, dtype=torch.int8, device=device)


def _sample(numel: int, name: str) -> Tensor:
    """Flat indices: one at random out of each of so many equal parts, the same ones in every run."""
    if numel <= _SAMPLE:
        return torch.arange(numel, device="cpu")
    borders = torch.arange(_SAMPLE + 1, dtype=torch.float64, device="cpu").mul_(numel / _SAMPLE).long()
    # A generator of its own: training must not see a difference.
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()))
    shares = torch.rand(_SAMPLE, generator=generator, dtype=torch.float64, device="cpu")
    return borders[:-1] + (shares * (borders[1:] - borders[:-1])).long()
