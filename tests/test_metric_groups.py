"""Scale, travel, range and rank against closed forms and brute force."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import backward, digits_model
from torch import Tensor, nn

from weightflip import FlipTrackingOptimizer, quantize
from weightflip.formats import E0M7
from weightflip.quantizers import resolve
from weightflip.quantizers.floatx import FloatxQuantizer
from weightflip.quantizers.protocol import new_buffer

INTEGERS = FloatxQuantizer(E0M7, fixed_scale=128.0)
"""e0m7 holds multiples of 1/128: times 128 that is the grid of the integers."""


def tracked(weight: Tensor, format, *groups, lr=1.0, **options):
    parameter = nn.Parameter(weight)
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD([parameter], lr=lr),
        quantizer=format,
        metrics=("flips", "stalls", *groups),
        include="*",
        sinks=[],
        **options,
    )
    return parameter, optimizer


def move(parameter: nn.Parameter, optimizer, by: Tensor) -> None:
    parameter.grad = -by.to(parameter.dtype)
    optimizer.step()


# ------------------------------------------------------------------ Nagel's toy regression


@pytest.mark.parametrize("k", [1, 3, 5, 8, 11, 15])
@pytest.mark.parametrize("a", [1 / 64, 1 / 32, 1 / 8])
def test_one_weight_with_a_straight_through_estimator(k, a):
    """Nagel et al. 2022, section 2.2: grad = q(w) - w*; the limit cycle of 16 steps has a closed form."""
    target = k / 16
    d = min(target, 1 - target)
    # In the cycle from the start: right at the border between 0 and 1.
    parameter, optimizer = tracked(torch.tensor([0.5 + 0.01 * a]), INTEGERS, "oscillation", "travel", lr=a)

    def steps(n: int) -> None:
        for _ in range(n):
            parameter.grad = quantize(parameter.detach(), INTEGERS) - target
            optimizer.step()

    steps(32)
    optimizer.tracker.record()
    cycles = 5
    steps(16 * cycles)
    window = optimizer.tracker.record().layers[0].window
    assert window.flips == 16 * cycles * 2 * d
    assert window.ratios["oscillation_ratio"] == (window.flips, window.flips)
    assert window.ratios["travel_ratio"].value == pytest.approx(1 / (a * (1 - d)), rel=1e-4)


# ------------------------------------------------------------------ bfloat16 in place


@pytest.mark.parametrize("r", [2**-8.9, 2**-8.5, 2**-8.1])
def test_lost_updates_of_log_uniform_bfloat16_weights(r):
    n = 200_000
    generator = torch.Generator().manual_seed(0)
    weight = torch.exp2(torch.rand(n, generator=generator, dtype=torch.float64)).to(torch.bfloat16)
    parameter = nn.Parameter(weight)
    optimizer = FlipTrackingOptimizer(torch.optim.SGD([parameter], lr=r), include="*", sinks=[])
    parameter.grad = -parameter.detach().clone()
    optimizer.step()
    layer = optimizer.tracker.record().layers[0]
    # Weights on the grid of bfloat16: the closed form is that of the continuum, good to one of 128 mantissas.
    assert layer.stall_ratio == pytest.approx(math.log2(2**-8 / r), abs=1 / 128 + 3 * 0.5 / math.sqrt(n))


def test_relative_updates_below_2_to_the_minus_9_are_always_lost():
    weight = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)
    parameter = nn.Parameter(weight)
    optimizer = FlipTrackingOptimizer(torch.optim.SGD([parameter], lr=2**-9 * 0.999), include="*", sinks=[])
    parameter.grad = -parameter.detach().clone()
    optimizer.step()
    assert optimizer.tracker.record().layers[0].stall_ratio == 1


def test_one_plus_a_thousand_thousandths_is_one():
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = FlipTrackingOptimizer(torch.optim.SGD([parameter], lr=1.0), include="*", sinks=[])
    for _ in range(1000):
        parameter.grad = torch.full((1,), -0.001, dtype=torch.bfloat16)
        optimizer.step()
    assert parameter.item() == 1.0
    layer = optimizer.tracker.record().layers[0]
    assert (layer.stall_ratio, layer.window.updates) == (1, 1000)


# ------------------------------------------------------------------ travel


@pytest.mark.parametrize(
    "format",
    ["e3m4", "float8_e4m3", "float8_e5m2:row", "float8_e4m3:pow2", "int8", "int4", "mxfp8_e4m3", "mxfp4", "nvfp4"],
)
def test_weights_spread_evenly_travel_as_far_as_their_codes(format):
    """Uniform weights are uniform in each cell, whatever the cells; anchors keep every scale where it is."""
    generator = torch.Generator().manual_seed(1)
    top = {"mxfp8_e4m3": 1.75, "mxfp4": 1.5}.get(format, 1.0)
    weight = (torch.rand(512, 512, generator=generator) * 1.98 - 0.99) * top
    # Of each block of 16, so of each block of any format here, one weight rests at the format's largest number.
    weight[:, ::16] = top
    parameter, optimizer = tracked(weight.clone(), format, "travel")
    for _ in range(8):
        by = torch.randn(weight.shape, generator=generator) * 0.002
        by[:, ::16] = 0
        move(parameter, optimizer, by.clamp(-0.009, 0.009) * (parameter.detach().abs() < 0.985 * top))
    record = optimizer.tracker.record()
    flips = record.model.window.ratios["flip_excess"].numerator
    tolerance = 5 / math.sqrt(flips)
    assert flips > 1000
    assert record.model.values["flip_excess"] == pytest.approx(1, abs=tolerance)
    assert record.model.values["travel_ratio"] == pytest.approx(1, abs=2 * tolerance)


@pytest.mark.parametrize("format", ["float8_e4m3", "int4:g16", "mxfp4"])
def test_travel_equals_brute_force_on_training(format, digits):
    """Layers of up to 16,384 weights are looked at in full."""
    model = digits_model(width=64)
    optimizer = FlipTrackingOptimizer(
        torch.optim.Adam(model.parameters(), lr=3e-3), model, quantizer=format, metrics=("flips", "travel"), sinks=[]
    )
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    sums = {name: torch.zeros(2, *p.shape, dtype=torch.float64) for name, p in weights.items()}
    for step in range(20):
        old = {name: (p.detach().clone(), quantize(p.detach(), format)) for name, p in weights.items()}
        backward(model, digits, step)
        optimizer.step()
        for name, p in weights.items():
            sums[name][0] += (quantize(p.detach(), format).double() - old[name][1].double()).abs()
            sums[name][1] += (p.detach().double() - old[name][0].double()).abs()
    for layer in optimizer.tracker.record().layers:
        quantized, moved = sums[layer.name]
        assert layer.values["travel_ratio"] == pytest.approx((quantized.sum() / moved.sum()).item(), rel=1e-9)
        ratios = (quantized / moved)[moved > 0]
        assert layer.gauges["travel_high_fraction"] == ((ratios > 16).sum(), ratios.numel())
        logs = ratios.log2().clamp(-7, 7.5).numpy()
        expected, _ = np.histogram(logs, bins=layer.histograms["log2_travel_ratio"].edges)
        assert layer.histograms["log2_travel_ratio"].counts == tuple(expected)


def test_cells_are_half_way_to_the_neighbors():
    """Weights on a fine grid over all of e2m1's range, each moved by a known step: expected by Fractions."""
    values = [Fraction(x) for x in (-6, -4, -3, -2, Fraction(-3, 2), -1, Fraction(-1, 2), 0)]
    values += [-x for x in values[-2::-1]]
    borders = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    weight = torch.arange(-6 * 64 + 1, 6 * 64, dtype=torch.float32) / 64 + 1 / 256
    step = Fraction(3, 16)
    parameter, optimizer = tracked(weight.clone(), "e2m1:none", "travel")
    move(parameter, optimizer, torch.full_like(weight, float(step)))
    expected = Fraction(0)
    for w in map(Fraction, weight.tolist()):
        at = sum(border < w for border in borders)
        if 0 < at < len(borders):
            width = borders[at] - borders[at - 1]
        else:
            width = 2 * abs(values[at] - borders[0 if at == 0 else -1])
        expected += min(Fraction(1), step / width)
    excess = optimizer.tracker.record().layers[0].window.ratios["flip_excess"]
    assert excess.denominator == pytest.approx(float(expected), rel=1e-12)


def test_a_large_layer_counts_in_full_and_its_sample_is_the_same_in_each_run():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(300, 1000, generator=generator)
    by = torch.randn(300, 1000, generator=generator) * 0.05
    found = []
    for _ in range(2):
        torch.manual_seed(len(found))
        parameter, optimizer = tracked(weight.clone(), "float8_e4m3", "travel")
        state = torch.get_rng_state()
        move(parameter, optimizer, by)
        assert torch.equal(state, torch.get_rng_state())
        found.append(optimizer.tracker.record())
    assert found[0] == found[1]
    traveled = found[0].layers[0].window.ratios["travel_ratio"].denominator
    assert traveled == pytest.approx(by.abs().sum().item(), rel=0.03)
    # An index, both distances, the weight before the step and its code.
    assert optimizer.tracker.memory_usage().metrics == 16384 * (8 + 8 + 8 + 4 + 1)


# ------------------------------------------------------------------ scale


def test_scaling_all_weights_flips_none_under_a_tensorwise_scale():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 64, generator=generator)
    parameter, optimizer = tracked(weight.clone(), "float8_e4m3", "scale")
    with torch.no_grad():
        expected = (quantize(weight, "float8_e4m3") / quantize(weight, "float8_e4m3").abs().max()).float()
        after = weight * 0.9
        moved = (quantize(after, "float8_e4m3") / quantize(after, "float8_e4m3").abs().max()).float()
    assert torch.allclose(expected, moved, rtol=1e-5)
    move(parameter, optimizer, after - weight)
    assert optimizer.tracker.record().model.window.flips <= 1, "a tie, if any: 0.9 has no exact float32"


def test_scaling_all_weights_flips_with_the_power_of_two():
    """On e2m1's grid 0.9 is less than half a cell: only the scale, halved with the largest weight, flips codes."""
    numbers = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, -0.5, -1.0, -1.5, -2.0, -3.0, 4.0])
    weight = numbers[torch.randint(11, (64, 64), generator=torch.Generator().manual_seed(3))]
    weight[:, ::32] = 4.0
    parameter, optimizer = tracked(weight.clone(), "mxfp4", "scale")
    move(parameter, optimizer, weight * 0.9 - weight)
    window = optimizer.tracker.record().model.window
    assert window.ratios["weight_driven_fraction"] == (0, 64 * 64)


@pytest.mark.parametrize("format", ["float8_e4m3:pow2", "float8_e4m3:row:pow2", "mxfp8_e4m3", "mxfp4"])
def test_flips_by_a_new_power_of_two_are_scale_driven(format):
    """Only the largest weight of each row, and block, moves: over a power of two. All others flip with the scale."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.rand(32, 32, generator=generator) * 0.55 + 0.05
    weight[:, 0] = 0.625
    by = torch.zeros_like(weight)
    by[:, 0] = 1.5
    parameter, optimizer = tracked(weight.clone(), format, "scale")
    before, after = (resolve(format).encode(w).ordinals.clone() for w in (weight, weight + by))
    move(parameter, optimizer, by)
    window = optimizer.tracker.record().model.window
    flips = before != after
    assert window.flips == int(flips.sum()) > 900
    assert window.ratios["weight_driven_fraction"] == (int(flips[:, 0].sum()), window.flips)


@pytest.mark.parametrize(
    "format",
    [
        "float8_e4m3",
        "float8_e5m2:row:pow2",
        "e3m4",
        "e4m1:row",
        "int8",
        "int4:g16",
        "ternary",
        "mxfp4",
        "nvfp4",
        "nvfp4:tensor",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_driven_flips_equal_brute_force(format, dtype):
    """The old scale, spelled out: the code is the nearest number of the format to the new weight in its units."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(32, 64, generator=generator).to(dtype)
    parameter, optimizer = tracked(weight.clone(), format, "scale")
    quantizer = resolve(format)
    expected = flips = 0
    for _ in range(4):
        old_weight = parameter.detach().clone()
        old = quantizer.encode(old_weight)
        move(parameter, optimizer, torch.randn(32, 64, generator=generator) * 0.3)
        new_weight = parameter.detach().clone()
        under_old = nearest(new_weight, quantizer, old)
        flipped = old.ordinals != quantizer.encode(new_weight).ordinals
        flips += int(flipped.sum())
        expected += int((flipped & (under_old != old.ordinals)).sum())
    found = optimizer.tracker.record().layers[0].total.ratios["weight_driven_fraction"]
    assert found.denominator == flips
    # Where float32 rounds a weight in units of its scale, a tie may fall to the other side: none or a few of 8,192.
    assert abs(found.numerator - expected) <= 4
    assert found.numerator < found.denominator


def nearest(weight: Tensor, quantizer, codes) -> Tensor:
    """Ordinals of the numbers nearest to a weight under the scale of other codes, by trying all of them."""
    grouped = quantizer.grouped(weight).double()
    smallest, largest = quantizer.ordinal_range(weight)
    best, found = None, torch.zeros(grouped.shape, dtype=torch.int64)
    for ordinal in range(smallest, largest + 1):
        here = torch.full(grouped.shape, ordinal, dtype=codes.ordinals.dtype)
        distance = (quantizer.values(here, codes.scale).double() - grouped).abs()
        if best is None:
            best, found = distance, here.long()
            continue
        # Ties to the even code.
        closer = (distance < best) | ((distance == best) & (ordinal % 2 == 0))
        best, found = torch.where(closer, distance, best), torch.where(closer, ordinal, found)
    return found.view(weight.shape)


@pytest.mark.parametrize(
    "format", ["float8_e4m3", "float8_e5m2:row:pow2", "e3m4", "int4:g16", "ternary", "mxfp4", "nvfp4:tensor"]
)
def test_its_own_scale_gives_a_weight_its_own_codes(format):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(6))
    weight[3, 5], weight[9, 9] = math.nan, math.inf
    quantizer = resolve(format)
    codes = quantizer.encode(weight)
    out = torch.empty(quantizer.grouped(weight).shape, dtype=codes.ordinals.dtype)
    quantizer.encode_under(quantizer.grouped(weight), codes.scale, out, new_buffer)
    assert torch.equal(out.view(weight.shape), codes.ordinals)


@pytest.mark.parametrize("format", ["float8_e4m3", "e3m4:row", "mxfp4", "nvfp4:tensor", "int4:g32", "ternary", "e6m1"])
def test_weight_driven_flips_are_those_under_the_old_scale(format):
    generator = torch.Generator().manual_seed(0)
    quantizer, weight = resolve(format), torch.randn(40, 64, generator=generator)
    expected = [0, 0]
    found = [tracked(weight.clone(), format, "scale", backend=backend) for backend in ("eager", "auto")]
    for step in range(3):
        # Far beyond the old scale, far below it, and not a number.
        by = weight * torch.tensor([3.0, -0.9, 0.01])[step]
        if step == 2:
            by[7, 3], by[11, 40] = math.inf, math.nan
        for parameter, optimizer in found:
            move(parameter, optimizer, by)
        old, new = quantizer.encode(weight), weight + by
        under = torch.empty_like(quantizer.grouped(old.ordinals))
        quantizer.encode_under(quantizer.grouped(new), old.scale, under, new_buffer)
        flipped = old.ordinals != quantizer.encode(new).ordinals
        expected[0] += int((flipped & (under.view(old.ordinals.shape) != old.ordinals)).sum())
        expected[1] += int(flipped.sum())
        weight = new
    for _, optimizer in found:
        assert optimizer.tracker.record().model.total.ratios["weight_driven_fraction"] == tuple(expected)
    assert expected[0] > 0


def test_formats_without_a_scale_have_no_such_number():
    parameter, optimizer = tracked(torch.randn(4, 4), "bfloat16", "scale")
    move(parameter, optimizer, torch.ones(4, 4))
    assert "weight_driven_fraction" not in optimizer.tracker.record().layers[0].values


# ------------------------------------------------------------------ range and rank


@pytest.mark.parametrize("format", ["float8_e4m3", "e3m4:row", "int4", "ternary", "mxfp4", "nvfp4", "float16"])
def test_range_equals_brute_force(format):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(7)) ** 5
    weight[0, :7] = 0
    weight[1, 1] = 6e4
    parameter, optimizer = tracked(weight.clone(), format, "range")
    move(parameter, optimizer, torch.full_like(weight, 1e-3) * (weight != 0))
    after = parameter.detach()
    values, gauges = quantize(after, format), optimizer.tracker.record().layers[0].gauges
    codes = resolve(format).encode(after).ordinals
    assert gauges["zero_fraction"] == (int((values == 0).sum()), after.numel())
    assert gauges["underflow_fraction"] == (int(((values == 0) & (after != 0)).sum()), int((after != 0).sum()))
    largest = {"float8_e4m3": 126, "e3m4:row": 127, "int4": 7, "ternary": 1, "float16": 0x7BFF}.get(format, 7)
    smallest = -8 if format == "int4" else -largest
    assert gauges["saturated_fraction"] == (int(((codes == smallest) | (codes == largest)).sum()), after.numel())
    assert codes.min() >= smallest
    assert codes.max() == largest or format == "float16"


def test_rank_of_matrices_whose_singular_values_are_known():
    generator = torch.Generator().manual_seed(8)
    u, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    values = np.array([4.0, 2.0, 1.0, 0.5] + [0.0] * 20)
    weight = (u * torch.tensor(values)) @ v[:24]
    parameter, optimizer = tracked(weight.float(), "float8_e4m3", "rank")
    move(parameter, optimizer, torch.zeros(24, 40))
    found = optimizer.tracker.record().layers[0].values
    shares = values[:4] / values.sum()
    assert found["stable_rank"] == pytest.approx((values**2).sum() / 16, rel=1e-5)
    assert found["effective_rank"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def test_rank_is_looked_at_seldom(digits):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, metrics={"flips": 1, "rank": 6}, sinks=[]
    )
    have_rank = []
    for step in range(16):
        backward(model, digits, step)
        optimizer.step()
        if step % 2:
            have_rank.append("stable_rank" in optimizer.tracker.record().model.values)
    assert have_rank == [True, False, False, True, False, False, True, False]


def test_weights_that_have_no_rank_have_no_number():
    weights = [nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.full((3, 3), math.nan)), nn.Parameter(torch.ones(3))]
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(weights, lr=0.1), include="*", metrics=("flips", "rank", "range", "travel"), sinks=[]
    )
    optimizer.step()
    assert all("stable_rank" not in layer.values for layer in optimizer.tracker.record().layers)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_nan_weight_does_not_affect_the_distances_of_others(bad):
    parameter, optimizer = tracked(torch.linspace(-1, 1, 64).view(8, 8).clone(), "e3m4:none", "travel")
    by = torch.full((8, 8), 0.1)
    by[2, 2] = bad
    move(parameter, optimizer, by)
    move(parameter, optimizer, by)
    found = optimizer.tracker.record().layers[0].window.ratios["travel_ratio"]
    assert found.denominator == pytest.approx(2 * 63 * 0.1, rel=1e-5)


def test_a_weight_without_dimensions_travels_too():
    parameter, optimizer = tracked(torch.tensor(0.3), "e3m4:none", "travel")
    for _ in range(4):
        move(parameter, optimizer, torch.tensor(0.25))
    window = optimizer.tracker.record().layers[0].window
    assert window.ratios["flip_excess"] == (4, 4)
    assert window.ratios["travel_ratio"].denominator == pytest.approx(1)


def test_travel_starts_again_at_each_point():
    weight = torch.linspace(-1, 1, 64).view(8, 8)
    parameter, optimizer = tracked(weight.clone(), "e3m4:none", "travel")
    move(parameter, optimizer, torch.full((8, 8), 0.5))
    assert optimizer.tracker.record().layers[0].gauges["travel_high_fraction"].denominator == 64
    by = torch.zeros(8, 8)
    by[0] = 0.5
    move(parameter, optimizer, by)
    layer = optimizer.tracker.record().layers[0]
    assert layer.gauges["travel_high_fraction"].denominator == 8
    assert sum(layer.histograms["log2_travel_ratio"].counts) == 8


def test_travel_does_not_write_to_float64_weights():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    parameter, optimizer = tracked(weight.clone(), "e3m4", "travel", lr=1.0)
    move(parameter, optimizer, torch.full_like(weight, 0.25))
    assert torch.equal(parameter, weight + 0.25)


def test_the_scale_of_ones_own_is_not_looked_at_later():
    scale = torch.tensor(0.01)
    quantizer = FloatxQuantizer(E0M7, fixed_scale=scale)
    parameter, optimizer = tracked(torch.linspace(-0.01, 0.01, 64), quantizer, "scale")
    optimizer.register_step_pre_hook(lambda *args: scale.mul_(1.7) and None)
    move(parameter, optimizer, torch.zeros(64))
    window = optimizer.tracker.record().layers[0].window
    assert window.flips > 0
    assert window.ratios["weight_driven_fraction"].numerator == 0


def test_rank_of_a_convolution_is_that_of_its_flattened_filters():
    weight = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(9))
    parameter, optimizer = tracked(weight.clone(), "int4:g2", "rank")
    move(parameter, optimizer, torch.zeros(6, 3, 2, 2))
    values = np.linalg.svd(weight.double().reshape(6, 12).numpy(), compute_uv=False)
    found = optimizer.tracker.record().layers[0].values["stable_rank"]
    assert found == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-5)


def test_a_vector_has_no_rank_in_a_group_format_either():
    parameter, optimizer = tracked(torch.randn(64), "int4:g16", "rank")
    move(parameter, optimizer, torch.ones(64))
    assert "stable_rank" not in optimizer.tracker.record().layers[0].values
