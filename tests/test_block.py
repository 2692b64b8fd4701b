"""MX and NVFP4: codes, scales and values against torchao, and every number against ml_dtypes."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import case
from oracles import SIGN, TORCHAO_ELEMENT, becomes_nan, block_codes, per_tensor_scale
from torch import nn

from weightflip import FlipTrackingOptimizer, decode, encode, functional, kernels
from weightflip.formats import E2M1, E3M4, E4M3, E5M2
from weightflip.quantizers import resolve
from weightflip.quantizers.block import MX_NAMES, MXQuantizer, NVFP4Quantizer

pytest.importorskip("torchao")

from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

MODES = ("floor", "rceil", "ceil", "even")
MX = [f"{name}:{mode}" for name in MX_NAMES for mode in MODES]
NVFP4 = ["nvfp4", "nvfp4:tensor"]
NAMES = [*MX, *NVFP4]

NUMPY_ELEMENT = {
    "mxfp8_e4m3": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
    "mxfp6_e2m3": ml_dtypes.float6_e2m3fn,
    "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "nvfp4": ml_dtypes.float4_e2m1fn,
}
# The exponent of the largest power of two that is not above the largest number.
MAX_POW2 = {"mxfp8_e4m3": 8, "mxfp8_e5m2": 15, "mxfp6_e2m3": 2, "mxfp6_e3m2": 4, "mxfp4": 2}
MANTISSA_BITS = {"mxfp8_e4m3": 3, "mxfp8_e5m2": 2, "mxfp6_e2m3": 3, "mxfp6_e3m2": 2, "mxfp4": 1}
LARGEST = {"mxfp8_e4m3": 448, "mxfp8_e5m2": 57344, "mxfp6_e2m3": 7.5, "mxfp6_e3m2": 28, "mxfp4": 6}
NAN, INF = math.nan, math.inf


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def initial(*shape: int) -> torch.Tensor:
    return gaussian(*shape) * 0.02


def outliers(*shape: int) -> torch.Tensor:
    weight = initial(*shape)
    weight.view(-1)[::37] *= 1e4
    return weight


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def zero_blocks(*shape: int) -> torch.Tensor:
    weight = initial(*shape)
    weight.view(-1, 32)[::2] = 0.0
    weight.view(-1, 32)[::4, ::3] = -0.0
    return weight


def subnormal(*shape: int) -> torch.Tensor:
    return gaussian(*shape) * 1e-39


def every_size(*shape: int) -> torch.Tensor:
    """Blocks of all magnitudes, from below the smallest float32 up to the largest."""
    weight = gaussian(*shape).view(-1, 16).clamp_(-3, 3)
    return (weight * torch.logspace(-46, 38, len(weight)).unsqueeze(1)).view(shape)


def one_large(*shape: int) -> torch.Tensor:
    """With an outlier, next to which the rest of the block underflows to subnormal codes and zero."""
    weight = gaussian(*shape) * torch.logspace(-9, 0, shape[-1])
    weight.view(-1, 32)[:, 5] = 3.0
    return weight


def at_the_edges(*shape: int) -> torch.Tensor:
    """Largest magnitudes where the scale changes: powers of two, midpoints, formats' largest; and their neighbors."""
    edges = [1.0, 448.0, 57344.0, 7.5, 28.0, 6.0, 1.75, 1.875, 1.9375, 1.5]
    edges = [np.float32(edge * 2.0**exponent) for exponent in (-120, -9, 0, 1, 30) for edge in edges]
    zero, inf = np.float32(0), np.float32(INF)
    edges = [near for edge in edges for near in (edge, np.nextafter(edge, zero), np.nextafter(edge, inf))]
    weight = gaussian(*shape).view(-1, 16).clamp_(-1, 1)
    amax = torch.from_numpy(np.resize(np.array(edges), len(weight)))
    weight *= amax.unsqueeze(1)
    weight[:, 3] = amax
    return weight.view(shape)


def with_nan(*shape: int) -> torch.Tensor:
    weight = initial(*shape)
    weight.view(-1)[[7, -1]] = torch.tensor([NAN, -NAN])
    return weight


def with_infinity(*shape: int) -> torch.Tensor:
    weight = initial(*shape)
    weight.view(-1)[[7, -1]] = torch.tensor([INF, -INF])
    return weight


def with_both(*shape: int) -> torch.Tensor:
    weight = with_infinity(*shape)
    weight.view(-1)[8] = NAN
    return weight


FINITE = [initial, outliers, zeros, zero_blocks, subnormal, every_size, one_large, at_the_edges]
WEIGHTS = [*FINITE, with_nan, with_infinity, with_both]
SHAPES = [(64, 96), (3, 5, 64), (64,), (1, 32), (0, 32)]


def torchao_tensor(weight: torch.Tensor, name: str):
    family, _, mode = name.partition(":")
    if family == "nvfp4":
        return NVFP4Tensor.to_nvfp4(weight, 16, per_tensor_scale(weight, name))
    return MXTensor.to_mx(weight, TORCHAO_ELEMENT[family], 32, ScaleCalculationMode(mode))


def assert_equals_torchao(weight: torch.Tensor, name: str) -> None:
    quantizer = resolve(name)
    codes = quantizer.encode(weight)
    if weight.numel() == 0:
        assert codes.ordinals.shape == weight.shape
        assert decode(codes).shape == weight.shape
        return
    # torchao's NVFP4 only takes matrices.
    theirs = weight if weight.ndim > 1 else weight.unsqueeze(0)
    ordinals, scale = block_codes(theirs, name)
    np.testing.assert_array_equal(codes.ordinals.numpy(), ordinals.reshape(weight.shape))
    assert codes.scale.shape == (*weight.shape[:-1], weight.shape[-1] // quantizer.group, 1)
    scale_bits = scale.view(torch.uint8).numpy()
    if name in NVFP4:
        # Ignore the sign of NaN.
        scale_bits = np.where(scale.float().isnan().numpy(), 0x7F, scale_bits)
    scale_bits = scale_bits.reshape(codes.scale.shape)
    np.testing.assert_array_equal(quantizer.scale_codes(codes.scale).numpy(), scale_bits)
    values = torchao_tensor(theirs, name).dequantize(torch.float32)
    values = values.masked_fill(becomes_nan(theirs, name), NAN).view(weight.shape)
    torch.testing.assert_close(decode(codes), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_codes_scales_and_values_match_torchao(name):
    for weight, dtype, shape in itertools.product(WEIGHTS, (torch.float32, torch.bfloat16), SHAPES):
        if math.prod(shape) or weight is initial:
            with case(weight.__name__, dtype, shape):
                assert_equals_torchao(weight(*shape).to(dtype), name)


@pytest.mark.parametrize("name", NAMES)
def test_every_bfloat16_number_as_a_weight(name):
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    weight = weight[weight.isfinite()].view(-1, 128)
    assert_equals_torchao(weight, name)
    # Shuffled, so that blocks contain numbers of all magnitudes.
    shuffled = weight.view(-1)[torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0))]
    assert_equals_torchao(shuffled.view(-1, 128), name)


def all_numbers(family: str) -> tuple[np.ndarray, np.ndarray]:
    """Ordinal and value of every finite code of an element format, according to ml_dtypes."""
    sign = SIGN[family]
    bits = np.arange(2 * sign, dtype=np.uint8)
    values = bits.view(NUMPY_ELEMENT[family]).astype(np.float32)
    ordinals = np.where(bits & sign, -(bits & (sign - 1)).astype(int), bits)
    return ordinals[np.isfinite(values)], values[np.isfinite(values)]


@pytest.mark.parametrize("name", MX)
def test_every_element_of_mx(name):
    family = name.partition(":")[0]
    ordinals, values = all_numbers(family)
    # In a block with the format's largest power of two, or largest number, every other number stays as it is.
    largest = LARGEST[family] if name.endswith("rceil") else 2.0 ** MAX_POW2[family]
    inside = np.abs(values) <= largest
    weight = torch.full((inside.sum(), 32), float(largest))
    weight[:, 7] = torch.from_numpy(values[inside])
    for exponent in (-60, -3, 0, 3, 60):
        with case("exponent", exponent):
            codes = encode(weight * 2.0**exponent, name)
            assert codes.scale.unique().tolist() == [2.0**exponent]
            np.testing.assert_array_equal(codes.ordinals[:, 7].numpy(), ordinals[inside])
            np.testing.assert_array_equal(decode(codes)[:, 7].numpy(), values[inside] * np.float32(2.0**exponent))


@pytest.mark.parametrize("name", NVFP4)
def test_every_element_of_nvfp4(name):
    ordinals, values = all_numbers("nvfp4")
    # With the largest block scale, 448, one and two levels agree: an amax of 448 * 6 gives a tensor scale of 1.
    weight = torch.full((len(values), 16), 6.0 * 448)
    weight[:, 7] = torch.from_numpy(values) * 448
    codes = encode(weight, name)
    assert resolve(name).scale_codes(codes.scale).unique().tolist() == [E4M3.max_ordinal]
    np.testing.assert_array_equal(codes.ordinals[:, 7].numpy(), ordinals)
    np.testing.assert_array_equal(decode(codes)[:, 7].numpy(), values * 448)


@pytest.mark.parametrize("name", [*MX, "nvfp4"])
def test_rounding_matches_ml_dtypes(name):
    family = name.partition(":")[0]
    element = NUMPY_ELEMENT[family]
    _, values = all_numbers(family)
    values = np.unique(values)
    middle = (values[1:] + values[:-1]) / 2
    numbers = np.concatenate([middle, np.nextafter(middle, np.float32(-INF)), np.nextafter(middle, np.float32(INF))])
    quantizer = resolve(name)
    # Everything from a subnormal of the format to beyond its largest number, with ties and their neighbors.
    weight = torch.cat([torch.from_numpy(numbers), gaussian(4096) * values.max()])
    weight = weight[: len(weight) // quantizer.group * quantizer.group].view(-1, quantizer.group)
    codes = quantizer.encode(weight)
    scale = codes.scale.view(-1, 1).numpy()
    scaled = weight.numpy() * (np.float32(1) / scale)
    expected = np.clip(scaled, -values.max(), values.max()).astype(element).astype(np.float32)
    np.testing.assert_array_equal(decode(codes).numpy(), expected * scale)


def exponent_of(amax: np.float32, family: str, mode: str) -> int:
    """The exponent of an MX scale in exact arithmetic, following the specification."""
    exact = Fraction(float(amax))
    if mode == "rceil":
        exact /= Fraction(LARGEST[family])
    floor = math.frexp(float(exact))[1] - 1
    floor -= exact < Fraction(2) ** floor
    if mode == "even":
        step = Fraction(2) ** (floor - MANTISSA_BITS[family])
        rounded = math.floor(exact / step + Fraction(1, 2)) * step
        floor += rounded == Fraction(2) ** (floor + 1)
    ceiling = floor + (exact > Fraction(2) ** floor)
    exponent = {"floor": floor, "even": floor, "ceil": ceiling, "rceil": ceiling}[mode]
    return exponent if mode == "rceil" else exponent - MAX_POW2[family]


@pytest.mark.parametrize("name", MX)
def test_mx_scales_follow_the_specification(name):
    family, _, mode = name.partition(":")
    significands = [1, 1.0625, 1.25, 1.5, 1.75, 1.8125, 1.875, 1.90625, 1.9375, 1.96875, 2 - 2**-23]
    amaxes = np.array([np.ldexp(s, e) for s in significands for e in range(-126, 128)], dtype=np.float32)
    weight = torch.zeros(len(amaxes), 32)
    weight[:, 3] = -torch.from_numpy(amaxes)
    quantizer = resolve(name)
    scale = quantizer.encode(weight).scale
    expected = np.clip([exponent_of(amax, family, mode) for amax in amaxes], -127, 127)
    np.testing.assert_array_equal(quantizer.scale_codes(scale).flatten().numpy(), expected + 127)
    # ml_dtypes reads the same number from each code.
    stored = (expected + 127).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(scale.flatten().numpy(), stored)


def test_every_scale_code():
    mx, nv, two_level = resolve("mxfp4"), resolve("nvfp4"), resolve("nvfp4:tensor")
    e8m0 = torch.from_numpy(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    assert mx.scale_codes(e8m0).tolist() == list(range(256))
    # From the smallest normal number up, torchao's minimum; 127 is NaN.
    bits = np.arange(8, 128, dtype=np.uint8)
    e4m3 = torch.from_numpy(bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert nv.scale_codes(e4m3).tolist() == bits.tolist()
    assert two_level.scale_codes(torch.complex(e4m3, torch.full_like(e4m3, 0.3))).tolist() == bits.tolist()
    weight = torch.zeros(126 - 8 + 1, 16)
    weight[:, 2] = e4m3[:-1] * 6
    assert nv.scale_codes(nv.encode(weight).scale).flatten().tolist() == bits[:-1].tolist()


def test_rceil_computes_the_logarithm_in_float32_like_torchao():
    weight = torch.zeros(1, 32)
    weight[0, 0] = float(np.nextafter(np.float32(6 * 2.0**20), np.float32(INF)))
    codes = encode(weight, "mxfp4:rceil")
    # The exact scale is 2**21, but in float32 log2 of a number just above 2**20 is 20, and the weight saturates.
    assert codes.scale.item() == 2.0**20
    assert codes.ordinals[0, 0] == E2M1.max_ordinal
    assert_equals_torchao(weight, "mxfp4:rceil")


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_zeros(name):
    weight = initial(4, 96)
    weight[1, :32], weight[2, 32:64] = 0.0, -0.0
    quantizer = resolve(name)
    codes = quantizer.encode(weight)
    assert codes.ordinals[1, :32].tolist() == codes.ordinals[2, 32:64].tolist() == [0] * 32
    assert decode(codes)[1, :32].tolist() == [0.0] * 32
    smallest = 8 if name in NVFP4 else 0
    blocks = 32 // quantizer.group
    assert quantizer.scale_codes(codes.scale)[1, :blocks].flatten().tolist() == [smallest] * blocks


def test_a_tensor_of_zeros():
    weight = torch.zeros(4, 64)
    for name in NAMES:
        codes = encode(weight, name)
        if name == "nvfp4:tensor":
            # 0 / 0, as in torchao.
            assert per_tensor_scale(weight, name) == 0
            assert codes.ordinals.unique().tolist() == [E2M1.nan_ordinal]
            assert decode(codes).isnan().all()
        else:
            assert codes.ordinals.count_nonzero() == 0
            assert decode(codes).count_nonzero() == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nan", [NAN, -NAN])
def test_a_nan_makes_its_block_nan(nan, name):
    quantizer = resolve(name)
    weight = initial(4, 96)
    clean = quantizer.encode(weight).ordinals
    weight[2, 40] = nan
    codes = quantizer.encode(weight)
    # The tensor's scale depends on all blocks.
    affected = torch.full((4, 96), name == "nvfp4:tensor")
    start = 40 // quantizer.group * quantizer.group
    affected[2, start : start + quantizer.group] = True
    assert (codes.ordinals[affected] == quantizer.format.nan_ordinal).all()
    assert torch.equal(codes.ordinals[~affected], clean[~affected])
    assert torch.equal(decode(codes).isnan(), affected)
    # No flip from NaN to NaN.
    weight[2, 41] += 1.0
    assert torch.equal(quantizer.encode(weight).ordinals, codes.ordinals)


@pytest.mark.parametrize("name", [*MX, "nvfp4"])
def test_an_infinite_weight_saturates(name):
    quantizer = resolve(name)
    weight = initial(4, 96)
    weight[2, 40] = -INF
    codes = quantizer.encode(weight)
    assert codes.ordinals[2, 40] == -quantizer.format.max_ordinal
    assert not decode(codes).isnan().any()


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_of_another_weight(name):
    quantizer = resolve(name)
    old, new = initial(4, 96), initial(4, 96) * 3
    new[1, 5:8] = torch.tensor([NAN, -NAN, -INF])
    scale = quantizer.scale(quantizer.grouped(old))
    out = torch.empty(4, 96, dtype=torch.int8)
    grouped = quantizer.grouped(out)
    quantizer.encode_into(quantizer.grouped(new), scale, grouped, kernels.ScratchPool())
    largest = quantizer.format.max_ordinal
    assert out[1, 5:8].tolist() == [quantizer.format.nan_ordinal] * 2 + [-largest]
    number = new.isfinite()
    assert out[number].abs().max() == largest
    assert torch.equal(out[number].sign(), torch.where(out == 0, 0, new.sign())[number])


@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_are_rounded_from_float32(name):
    weight = initial(8, 64)
    half = weight.half()
    assert torch.equal(encode(half, name).ordinals, encode(half.float(), name).ordinals)
    double = weight.double() * (1 + 1e-9)
    assert torch.equal(encode(double, name).ordinals, encode(double.float(), name).ordinals)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", [64, 1000, 1 << 20])
def test_slices_and_strides_do_not_matter(limit, name, monkeypatch):
    monkeypatch.setattr(kernels, "slice_elements", lambda tensor: limit)
    weight, quantizer, scratch = outliers(24, 160), resolve(name), kernels.ScratchPool()
    views = [weight, weight[:, ::5], weight[::3], weight.view(4, 6, 160).transpose(0, 1), weight.t()[:96].mT]
    views.append(outliers(96, 24).t())
    for view in views:
        expected = quantizer.encode(view.contiguous())
        codes = torch.empty_like(view, dtype=torch.int8)
        functional.encode_into(view, functional.Encoding(quantizer, scratch, "eager"), codes)
        assert torch.equal(codes, expected.ordinals)
        assert torch.equal(quantizer.encode(view).ordinals, expected.ordinals)


@pytest.mark.parametrize("name", NAMES)
def test_buffers_do_not_grow_with_the_weight(name, monkeypatch):
    monkeypatch.setattr(kernels, "slice_elements", lambda tensor: 1024)
    quantizer, held = resolve(name), []
    for rows in (16, 256):
        scratch, weight = kernels.ScratchPool(), initial(rows, 64)
        functional.encode_into(
            weight, functional.Encoding(quantizer, scratch, "eager"), torch.empty(rows, 64, dtype=torch.int8)
        )
        held.append(scratch.nbytes)
    assert held[0] == held[1] > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_kernel_equals_eager(name):
    pytest.importorskip("numba")
    from weightflip.kernels import cpu, runs

    quantizer, generator = resolve(name), torch.Generator().manual_seed(1)
    for weight, dtype in itertools.product(WEIGHTS, (torch.float32, torch.bfloat16)):
        with case(weight.__name__, dtype):
            tensor = weight(64, 96).to(dtype)
            old = quantizer.encode(tensor).ordinals
            old[torch.rand(old.shape, generator=generator) < 0.5] += 1
            gradient = gaussian(64, 96, seed=2)
            gradient[torch.rand(old.shape, generator=generator) < 0.3] = 0.0
            found = []
            for backend in ("eager", "numba"):
                codes, counts = old.clone(), torch.tensor([5, 6, 7])
                encoding = functional.Encoding(quantizer, kernels.ScratchPool(), backend)
                functional.advance(tensor, encoding, codes, gradient, counts)
                found.append((codes, counts))
            assert torch.equal(found[0][0], found[1][0])
            assert found[0][1].tolist() == found[1][1].tolist()
            grouped = quantizer.grouped(tensor)
            scale = quantizer.applied_scale(quantizer.scale(grouped))
            # It must not have fallen back to eager.
            rounding, old = quantizer.rounding(grouped), quantizer.grouped(old)
            assert runs.OnePass(cpu.Run)(grouped, scale, rounding, old, None, counts)


@pytest.mark.parametrize("name", NAMES)
def test_a_last_dimension_that_does_not_divide(name):
    quantizer = resolve(name)
    message = rf"{quantizer.group} neighbors in the last dimension, but shape .* does not divide"
    for shape in ((), (8,), (33,), (4, 40), (64, 1), (16, 8, 3, 3)):
        with case(shape):
            with pytest.raises(ValueError, match=message):
                quantizer.encode(torch.ones(shape))
            model = nn.ParameterDict({"w": nn.Parameter(torch.ones(shape))})
            inner = torch.optim.SGD(model.parameters(), lr=0.1)
            with pytest.raises(ValueError, match="does not divide"):
                FlipTrackingOptimizer(inner, model, quantizer=name, include="w", sinks=[])


@pytest.mark.parametrize("name", NAMES)
def test_integer_weights_are_refused(name):
    with pytest.raises(ValueError, match=r"rounds floating-point weights, got torch\.int8"):
        encode(torch.ones(4, 32, dtype=torch.int8), name)


@pytest.mark.parametrize("name", MX)
def test_mx_names(name):
    family, _, mode = name.partition(":")
    quantizer = resolve(name)
    assert type(quantizer) is MXQuantizer
    assert (quantizer.format, quantizer.mode, quantizer.group) == (MX_NAMES[family], mode, 32)
    assert str(quantizer) == (family if mode == "floor" else name)
    assert str(resolve(str(quantizer))) == str(quantizer)
    assert str(resolve(family)) == family
    # The modes of torchao's configs.
    assert str(MXQuantizer(MX_NAMES[family], ScaleCalculationMode(mode).value)) == str(quantizer)


def test_nvfp4_names():
    for name, two_levels in (("nvfp4", False), ("nvfp4:tensor", True)):
        quantizer = resolve(name)
        assert type(quantizer) is NVFP4Quantizer
        assert (quantizer.per_tensor_scale, quantizer.group, str(quantizer)) == (two_levels, 16, name)
        assert str(NVFP4Quantizer(per_tensor_scale=two_levels)) == name


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("mxfp4:round", "round"),
        ("mxfp8_e4m3:", ""),
        ("mxfp8_e5m2:floor:ceil", "floor:ceil"),
        ("mxfp6_e2m3:even:even", "even:even"),
        ("nvfp4:row", "row"),
        ("nvfp4:tensor:tensor", "tensor:tensor"),
        ("nvfp4:", ""),
    ],
)
def test_unknown_and_repeated_options(name, got):
    family = name.partition(":")[0]
    with pytest.raises(ValueError, match=rf"^quantizer '{family}' takes .*, got '{got}'$"):
        resolve(name)


def test_other_elements_and_modes():
    with pytest.raises(ValueError, match="MX formats must be one of e4m3, e5m2, e2m3, e3m2, e2m1, got e3m4"):
        MXQuantizer(E3M4)
    with pytest.raises(ValueError, match=r"one of \('floor', 'rceil', 'ceil', 'even'\), got 'FLOOR'"):
        MXQuantizer(E5M2, "FLOOR")
    with pytest.raises(ValueError, match="did you mean 'nvfp4'"):
        resolve("nv_fp4")


def elements(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Element values in units of the smallest one, from torchao's dequantized values and stored scales."""
    tensor, group = torchao_tensor(weight, name), resolve(name).group
    scale = tensor.get_hp_scales() if isinstance(tensor, NVFP4Tensor) else tensor.scale.float()
    values = tensor.dequantize(torch.float32).double() / scale.double().repeat_interleave(group, -1)
    return (values / resolve(name).format.smallest_subnormal).round()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_counts_of_training_equal_brute_force(name, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8, bias=False)).to(dtype)
    inner = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = FlipTrackingOptimizer(inner, model, quantizer=name, sinks=[])
    weights = {"0.weight": model[0].weight, "2.weight": model[2].weight}
    flips, stalled = dict.fromkeys(weights, 0), dict.fromkeys(weights, 0)
    for step in range(20):
        optimizer.zero_grad()
        inputs = gaussian(16, 64, seed=step).to(dtype)
        (model(inputs) - inputs[:, :8]).square().mean().backward()
        before = {key: elements(weight.detach(), name) for key, weight in weights.items()}
        optimizer.step()
        for key, weight in weights.items():
            flipped = elements(weight.detach(), name) != before[key]
            flips[key] += flipped.sum().item()
            stalled[key] += ((weight.grad != 0) & ~flipped).sum().item()
    assert optimizer.tracker.get_flip_counts() == flips
    assert optimizer.tracker.get_stall_counts() == stalled
    assert min(flips.values()) > 0
    assert min(stalled.values()) > 0
