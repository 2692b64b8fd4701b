"""Integer, ternary and binary codes, against torchao, ml_dtypes' range and simple brute force."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from oracles import integer_codes

from weightflip import FlipTrackingOptimizer, decode, encode, quantize
from weightflip.quantizers import resolve
from weightflip.quantizers.integer import NAN_ORDINAL, BinaryQuantizer, IntegerQuantizer, TernaryQuantizer

BITS = range(2, 9)
SHAPES = [(1, 32), (7, 5), (33, 96), (2, 3, 64), (4, 3, 3, 3), (13,)]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outliers(shape) -> torch.Tensor:
    weight = gaussian(*shape) * 0.02
    weight.view(-1)[:: weight.numel() // 3 + 1] *= 1e4
    return weight


def mixed(shape) -> torch.Tensor:
    """Rows of every magnitude, some zeros of both signs, some subnormal numbers."""
    weight = gaussian(*shape) * torch.logspace(-12, 6, shape[0]).view(-1, *[1] * (len(shape) - 1))
    weight.view(-1)[::3] = 0.0
    weight.view(-1)[::7] = -0.0
    weight.view(-1)[::11] *= 1e-42
    return weight


WEIGHTS = {
    "initial": lambda shape: gaussian(*shape) * 0.02,
    "outliers": outliers,
    "mixed": mixed,
    "subnormal": lambda shape: gaussian(*shape) * 1e-39,
    "zeros": lambda shape: torch.zeros(shape),
    "ties": lambda shape: torch.randint(-15, 16, shape, generator=torch.Generator().manual_seed(1)) / 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("bits", BITS)
def test_rows_match_torchao(bits, kind, dtype):
    for shape in SHAPES:
        weight = WEIGHTS[kind](shape).to(dtype)
        if not weight.isfinite().all():
            continue
        codes = encode(weight, f"int{bits}")
        scale, expected, values = integer_codes(weight, bits, None)
        assert codes.ordinals.dtype is torch.int8
        assert torch.equal(codes.ordinals, expected.view(shape))
        assert torch.equal(codes.scale.flatten(), scale.flatten())
        assert torch.equal(decode(codes), values.view(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [4, 8, 32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_match_torchao(bits, group, dtype):
    for kind in WEIGHTS:
        for shape in [(1, 32), (33, 96), (2, 3, 64)]:
            weight = WEIGHTS[kind](shape).to(dtype)
            codes = encode(weight, f"int{bits}:g{group}")
            _, expected, values = integer_codes(weight, bits, group)
            assert torch.equal(codes.ordinals, expected)
            assert torch.equal(decode(codes), values)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_is_reached_and_stands_for_its_number(bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # The amax that gives a scale of exactly 1; all codes, and the midpoints between them.
    amax = (high - low) / 2
    halves = torch.arange(2 * low + 1, 2 * high + 2, dtype=torch.float32) / 2
    codes = encode(torch.cat([halves, torch.tensor([amax, -amax])]), f"int{bits}")
    assert codes.scale.item() == 1.0
    assert codes.ordinals.unique().tolist() == list(range(low, high + 1))
    expected = [min(max(round(value), low), high) for value in [*halves.tolist(), amax, -amax]]  # Python rounds to even
    assert codes.ordinals.tolist() == expected
    assert decode(codes).tolist() == expected


def test_int4_has_the_numbers_of_ml_dtypes():
    info = ml_dtypes.iinfo(ml_dtypes.int4)
    codes = encode(torch.linspace(-7.5, 7.5, 400), "int4").ordinals.numpy()
    assert (codes.min(), codes.max()) == (info.min, info.max)
    np.testing.assert_array_equal(codes.astype(ml_dtypes.int4).astype(np.int8), codes)


def test_a_row_is_the_last_dimension_and_a_group_part_of_it():
    weight = torch.tensor([[7.5, 1.0, 75.0, 10.0], [0.75, 0.1, 0.0, -750.0]])
    assert encode(weight, "int4").ordinals.tolist() == [[1, 0, 7, 1], [0, 0, 0, -8]]
    assert encode(weight, "int4:g2").ordinals.tolist() == [[7, 1, 7, 1], [7, 1, 0, -8]]
    assert encode(weight, "int4:g2").scale.flatten().tolist() == pytest.approx([1.0, 10.0, 0.1, 100.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int4", "int4:g4", "ternary", "binary"])
def test_nan_and_infinity(name, dtype):
    weight = gaussian(3, 8).to(dtype)
    weight[1, 1] = math.nan
    weight[2, 1] = -math.inf
    codes, plain = encode(weight, name), encode(gaussian(3, 8).to(dtype), name).ordinals
    assert codes.ordinals[1, 1] == NAN_ORDINAL
    assert decode(codes)[1, 1].isnan()
    if name == "binary":
        assert codes.ordinals[2, 1] == -1
        assert torch.equal(codes.ordinals[0], plain[0])
    elif name == "ternary":
        assert (codes.ordinals == NAN_ORDINAL).all()
    else:
        assert codes.ordinals[1].tolist()[:4] == [NAN_ORDINAL] * 4
        assert codes.ordinals[2].tolist()[:4] == [0, NAN_ORDINAL, 0, 0]
        assert decode(codes)[2, 1].isnan()
        assert torch.equal(codes.ordinals[0], plain[0])
        if name == "int4:g4":
            assert torch.equal(codes.ordinals[1:, 4:], plain[1:, 4:])


def test_infinity_in_a_ternary_tensor():
    codes = encode(torch.tensor([1.0, math.inf, -2.0]), "ternary")
    assert codes.ordinals.tolist() == [0, NAN_ORDINAL, 0]
    assert decode(codes).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_ternary_by_brute_force(kind, dtype):
    for shape in SHAPES:
        weight = WEIGHTS[kind](shape).to(dtype)
        if not weight.isfinite().all():
            continue
        codes = encode(weight, "ternary")
        mean = np.abs(weight.float().numpy().astype(np.float64)).mean()
        assert codes.scale.item() == pytest.approx(mean, rel=1e-5, abs=1e-44)
        for number, code in zip(weight.flatten().tolist(), codes.ordinals.flatten().tolist(), strict=True):
            ratio = float(np.float32(number)) / max(codes.scale.item(), 1e-5)
            if abs(abs(ratio) - 0.5) > 1e-6:
                assert code == (abs(ratio) > 0.5) * (1 if number > 0 else -1)
        assert torch.equal(decode(codes), codes.ordinals * codes.scale)


def test_ternary_matches_torchaos_bitnet():
    bitnet = pytest.importorskip("torchao.prototype.quantized_training.bitnet")
    for dtype in (torch.float32, torch.bfloat16):
        for kind in WEIGHTS:
            weight = WEIGHTS[kind]((33, 31)).to(dtype)
            scale = bitnet.get_bitnet_scale(weight)
            codes = encode(weight, "ternary")
            assert torch.equal(codes.scale, scale)
            assert torch.equal(codes.ordinals, bitnet.quantize_bitnet_weight(weight, scale))


def test_binary_is_the_sign_and_zero_counts_as_positive():
    weight = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.0, -math.inf, math.inf, math.nan])
    codes = encode(weight, "binary")
    assert codes.ordinals.tolist() == [1, 1, 1, -1, 1, -1, 1, NAN_ORDINAL]
    assert codes.scale is None
    assert decode(codes).tolist()[:-1] == [1, 1, 1, -1, 1, -1, 1]
    assert torch.equal(quantize(gaussian(5, 7).bfloat16(), "binary"), gaussian(5, 7).sign())


@pytest.mark.parametrize("name", ["int8", "int4", "int3:g5", "ternary", "binary"])
def test_strides_and_scalars_do_not_matter(name):
    weight = gaussian(20, 40)
    for view in (weight.t(), weight[::2, ::2], weight.view(4, 5, 40).mT):
        assert torch.equal(encode(view, name).ordinals, encode(view.clone().contiguous(), name).ordinals)
    if ":" not in name:
        assert encode(torch.tensor(2.0), name).ordinals.item() in (1, 7, 127)
        assert encode(torch.zeros(0, 4), name).ordinals.shape == (0, 4)


def test_float64_weights_are_rounded_in_float32():
    for name in ("int8", "int4:g8", "ternary", "binary"):
        weight = gaussian(16, 32)
        assert torch.equal(encode(weight.double(), name).ordinals, encode(weight, name).ordinals)
        assert decode(encode(weight.double(), name)).dtype is torch.float32
    assert encode(torch.tensor([[1e-320, 0.0]], dtype=torch.float64), "int8").ordinals.tolist() == [[0, 0]]


def test_names():
    assert {bits: str(resolve(f"int{bits}")) for bits in (2, 8)} == {2: "int2", 8: "int8"}
    assert str(resolve("INT4:G128")) == "int4:g128"
    assert (resolve("int4:g128").bits, resolve("int4:g128").group) == (4, 128)
    assert type(resolve("ternary")) is TernaryQuantizer
    assert type(resolve("binary")) is BinaryQuantizer


@pytest.mark.parametrize("name", ["int4:row", "int4:g", "int4:g0", "int4:g-1", "int4:g8:g8", "int8:", "int8:32"])
def test_options_that_do_not_exist(name):
    with pytest.raises(ValueError, match=r"takes one option, such as 'g32' .*, got"):
        resolve(name)


@pytest.mark.parametrize("name", ["ternary:row", "binary:g32"])
def test_formats_without_options(name):
    with pytest.raises(ValueError, match="has no options, got"):
        resolve(name)


@pytest.mark.parametrize("name", ["int1", "int9", "int16"])
def test_other_widths_are_unknown(name):
    with pytest.raises(ValueError, match="unknown quantizer"):
        resolve(name)
    with pytest.raises(ValueError, match="bits= must be from 2 to 8"):
        IntegerQuantizer(int(name[3:]))


def test_an_empty_group():
    with pytest.raises(ValueError, match="group= must be at least 1"):
        IntegerQuantizer(4, 0)


def test_a_weight_that_does_not_divide_into_groups():
    with pytest.raises(ValueError, match=r"'int4:g32' .* shape \(2, 48\) does not divide"):
        encode(torch.ones(2, 48), "int4:g32")


@pytest.mark.parametrize("name", ["int8", "ternary", "binary"])
def test_integer_weights_are_refused(name):
    with pytest.raises(ValueError, match=f"quantizer '{name}' rounds floating-point weights"):
        encode(torch.ones(2, 2, dtype=torch.int32), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int4", "int4:g32", "ternary", "binary"])
def test_the_tracker_counts_what_brute_force_counts(name, dtype):
    # Larger than a slice, with rows that no slice size divides.
    parameter = torch.nn.Parameter((gaussian(1100, 1056) * 0.02).to(dtype))
    optimizer = FlipTrackingOptimizer(torch.optim.SGD([parameter], lr=1.0), quantizer=name, sinks=[])
    expected = 0
    for step in range(2):
        parameter.grad = (gaussian(1100, 1056, seed=step + 1) * 1e-3).to(dtype)
        before = encode(parameter.detach(), name).ordinals
        optimizer.step()
        expected += int((encode(parameter.detach(), name).ordinals != before).sum())
    assert list(optimizer.tracker.get_flip_counts().values()) == [expected]
    assert expected > 0
