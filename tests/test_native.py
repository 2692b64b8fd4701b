"""Codes that are the bits of a dtype: stored weights, casts, and values that functions return."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from weightflip import Codes, decode, encode, quantize
from weightflip.formats import BF16, E4M3, E5M2, FP16, FP32, FP64
from weightflip.kernels import ScratchPool
from weightflip.quantizers.ordinals import bits_to_ordinals_

NARROW = [
    pytest.param(torch.float8_e4m3fn, torch.int8, E4M3, id="float8_e4m3fn"),
    pytest.param(torch.float8_e5m2, torch.int8, E5M2, id="float8_e5m2"),
    pytest.param(torch.bfloat16, torch.int16, BF16, id="bfloat16"),
    pytest.param(torch.float16, torch.int16, FP16, id="float16"),
]
WIDE = [
    pytest.param(torch.float32, torch.int32, FP32, id="float32"),
    pytest.param(torch.float64, torch.int64, FP64, id="float64"),
]


def all_bits(integer: torch.dtype) -> torch.Tensor:
    info = torch.iinfo(integer)
    return torch.arange(info.min, info.max + 1, dtype=torch.int32).to(integer)


def assert_ordinals_follow_values(ordinals: torch.Tensor, values: torch.Tensor, nan_ordinal: int) -> None:
    """Codes have the order of the values, are equal exactly if the values are, and have a single code for NaN."""
    codes, numbers = ordinals.long().numpy(), values.double().numpy()
    is_nan = np.isnan(numbers)
    assert is_nan.any()
    assert (codes[is_nan] == nan_ordinal).all()
    codes, numbers = codes[~is_nan], numbers[~is_nan]
    assert (codes != nan_ordinal).all()
    order = np.argsort(numbers, kind="stable")
    codes, numbers = codes[order], numbers[order]
    np.testing.assert_array_equal(codes[1:] > codes[:-1], numbers[1:] > numbers[:-1])
    assert (codes[1:] >= codes[:-1]).all()


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dtype", "integer", "fmt"), NARROW)
def test_every_bit_pattern(dtype, integer, fmt):
    bits = all_bits(integer)
    values = bits.view(dtype).double()
    ordinals = bits.clone()
    bits_to_ordinals_(ordinals, fmt, ScratchPool())

    assert_ordinals_follow_values(ordinals, values, fmt.nan_ordinal)
    # Ordinals count the numbers from zero, so there are no gaps.
    finite = values.isfinite()
    assert (ordinals[finite].min(), ordinals[finite].max()) == (-fmt.max_ordinal, fmt.max_ordinal)
    assert ordinals[finite].unique().numel() == 2 * fmt.max_ordinal + 1
    assert ordinals[values == 0].tolist() == [0, 0]
    for one in (1.0, -1.0):
        assert fmt.value(ordinals[values == one].item()) == one


@pytest.mark.parametrize(("dtype", "integer", "fmt"), NARROW)
def test_native_reads_every_bit_pattern(dtype, integer, fmt):
    bits = all_bits(integer)
    expected = bits.clone()
    bits_to_ordinals_(expected, fmt, ScratchPool())

    weight = bits.view(dtype)
    codes = encode(weight, "native")
    assert codes.scale is None
    assert codes.ordinals.dtype is integer
    assert torch.equal(codes.ordinals, expected)
    assert torch.equal(weight.view(integer), bits), "the weight was written to"


@pytest.mark.parametrize(("dtype", "integer", "fmt"), WIDE)
def test_bit_patterns_of_wide_floats(dtype, integer, fmt):
    rng = np.random.default_rng(0)
    bits = torch.from_numpy(rng.integers(-(2**63), 2**63, 50_000)).view(integer)
    # Neighbors, both zeros, and NaN at both ends of its patterns, quiet and signaling, with both signs.
    exponent = FP32.inf_ordinal if integer is torch.int32 else FP64.inf_ordinal
    ends = [0, 1, 2, exponent - 1, exponent, exponent + 1, torch.iinfo(integer).max]
    minimum = torch.iinfo(integer).min
    special = torch.tensor(ends + [minimum + k for k in ends], dtype=integer)
    bits = torch.cat([bits, bits + 1, special])
    codes = encode(bits.view(dtype), "native")
    assert codes.ordinals.dtype is integer
    assert_ordinals_follow_values(codes.ordinals, bits.view(dtype), fmt.nan_ordinal)


def test_float32_specials():
    tiny = 2.0**-149
    weight = torch.tensor([0.0, -0.0, tiny, -tiny, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan])
    one, infinity = 127 << 23, 255 << 23
    expected = [0, 0, 1, -1, one, -one, infinity, -infinity, infinity + 1, infinity + 1]
    assert encode(weight, "native").ordinals.tolist() == expected


@pytest.mark.parametrize(("dtype", "integer", "fmt"), [*NARROW, *WIDE])
def test_native_strides_and_shapes(dtype, integer, fmt):
    weight = gaussian(12, 16).to(dtype)
    expected = encode(weight, "native").ordinals
    assert torch.equal(encode(weight.t(), "native").ordinals, expected.t())
    assert torch.equal(encode(weight[1::2, ::3], "native").ordinals, expected[1::2, ::3])
    assert torch.equal(encode(weight.view(2, 6, 16).permute(2, 0, 1), "native").ordinals.flatten(1).t(), expected)
    assert encode(weight[0, 0], "native").ordinals.shape == ()
    assert encode(weight[:0], "native").ordinals.shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fnuz])
def test_native_rejects_other_dtypes(dtype):
    with pytest.raises(ValueError, match=f"'native' reads the bits of .* weights, got {dtype}$"):
        encode(torch.zeros(2, 2).to(dtype), "native")


@pytest.mark.parametrize(("dtype", "integer", "fmt"), WIDE)
def test_native_decodes_wide_floats(dtype, integer, fmt):
    weight = torch.tensor([1.5, -2.0, 0.0, math.inf, -math.inf, math.nan, 2.0**-130], dtype=dtype)
    values = decode(encode(weight, "native"), "native")
    assert values.dtype is dtype
    assert torch.equal(values.nan_to_num(nan=7.0), weight.nan_to_num(nan=7.0))


@pytest.mark.parametrize("integer", [torch.int8, torch.int16])
def test_native_does_not_guess_the_format_of_narrow_codes(integer):
    with pytest.raises(ValueError, match=r"codes may be .* or .*: decode with one of these formats"):
        decode(Codes(torch.zeros(2, dtype=integer)), "native")


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_casts_match_torch(name, source):
    dtype = getattr(torch, name)
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)).to(source)
    weight = torch.cat([weight, gaussian(5000).to(source)])
    codes = encode(weight, name)
    assert codes.ordinals.dtype is torch.int16
    assert codes.scale is None
    assert_ordinals_follow_values(
        codes.ordinals, weight.to(dtype), {"bfloat16": BF16, "float16": FP16}[name].nan_ordinal
    )

    values = decode(codes, name)
    assert values.dtype is torch.float32
    # -0 has the code of 0, so compare numbers. Overflow is infinite, as in the cast.
    assert torch.equal(values.nan_to_num(nan=0.5), weight.to(dtype).float().nan_to_num(nan=0.5))
    assert torch.equal(values.isnan(), weight.isnan())
    assert torch.equal(quantize(weight, name).nan_to_num(), values.nan_to_num())


def test_casts_overflow_to_infinity():
    assert decode(encode(torch.tensor([1e6, -1e6]), "float16"), "float16").tolist() == [math.inf, -math.inf]


def test_cast_ordinals_equal_those_of_the_stored_weight():
    weight = gaussian(50, 50)
    assert torch.equal(encode(weight, "bfloat16").ordinals, encode(weight.bfloat16(), "native").ordinals)
    assert torch.equal(encode(weight, "float16").ordinals, encode(weight.half(), "native").ordinals)


def test_a_function_is_a_quantizer():
    def ternary(weight):
        return weight.sign() * (weight.abs() > 0.5)

    weight = torch.tensor([[0.7, -0.2], [-0.9, 0.0]])
    codes = encode(weight, ternary)
    one = 127 << 23
    assert codes.ordinals.tolist() == [[one, 0], [-one, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_codes_of_a_function_are_the_bits_it_returns(dtype):
    weight = gaussian(10, 10)
    codes = encode(weight, lambda w: w.to(dtype))
    assert torch.equal(codes.ordinals, encode(weight.to(dtype), "native").ordinals)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_of_a_function_are_ordinals_already(dtype):
    weight = torch.tensor([[1.4, -2.6], [0.2, 100.0]])
    codes = encode(weight, lambda w: w.round().to(dtype))
    assert codes.ordinals.dtype is dtype
    assert codes.ordinals.tolist() == [[1, -3], [0, 100]]
    assert codes.scale is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_a_function_may_reuse_its_result(dtype):
    buffer = torch.zeros(4, dtype=dtype)
    codes = encode(torch.ones(4), lambda w: buffer.copy_(w))
    before = codes.ordinals.clone()
    buffer.zero_()
    assert torch.equal(codes.ordinals, before)
    assert before.all()


def test_a_function_gets_a_detached_weight():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    seen = []
    encode(weight, lambda w: seen.append((w.requires_grad, torch.is_grad_enabled())) or w)
    assert seen == [(False, False)]


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (lambda w: w.flatten(), r"\(4,\)"),
        (lambda w: w[:1], r"\(1, 2\)"),
        (lambda w: w.sum(), r"\(\)"),
        (lambda w: w.numpy(), "ndarray"),
        (lambda w: (w, w), "tuple"),
        (lambda w: None, "NoneType"),
    ],
)
def test_a_function_must_return_a_tensor_of_the_weights_shape(result, got):
    def rounded(weight):
        return result(weight)

    with pytest.raises(ValueError, match=rf"'rounded' must return a tensor of the weight's shape \(2, 2\), got {got}$"):
        encode(torch.ones(2, 2), rounded)


@pytest.mark.parametrize("name", ["float8_e4m3", "float8_e5m2", "float8_e4m3:row", "float8_e5m2:row:pow2"])
def test_the_sign_of_float8_nan_is_ignored(name):
    nan, inf = float("nan"), float("inf")
    special = E4M3.nan_ordinal if "e4m3" in name else E5M2.nan_ordinal
    weight = torch.tensor([[nan, -nan, 1.0, -1.0]])
    weight[0, 1] = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)  # a NaN with its sign bit set
    assert encode(weight, name).ordinals.tolist() == [[special] * 4]
    assert encode(torch.tensor([[inf, -inf, 1.0, -1.0]]), name).ordinals.tolist() == [[special, special, 0, 0]]
    rows = encode(torch.tensor([[nan, -1.0], [-2.0, 1.0]]), name).ordinals
    assert rows[0].tolist() == [special] * 2
    assert (rows[1].tolist() == [special] * 2) == (":row" not in name)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fnuz])
def test_a_function_must_return_values_with_an_order(dtype):
    with pytest.raises(ValueError, match=f"got {dtype}$"):
        encode(torch.ones(2, 2), lambda w: w.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_codes_of_a_function_decode_to_its_values(dtype):
    def third(weight):
        return (weight / 3).to(dtype)

    weight = torch.tensor([1.0, -2.0, 0.1])
    assert torch.equal(decode(encode(weight, third)), third(weight).to(torch.promote_types(dtype, torch.float32)))


def test_an_object_without_decode_only_encodes():
    class Signs:
        def encode(self, weight):
            return Codes(weight.sign().to(torch.int8))

        def __str__(self):
            return "signs"

    with pytest.raises(ValueError, match="signs only encodes"):
        decode(encode(torch.ones(2), Signs()), Signs())
    with pytest.raises(ValueError, match="these codes have no quantizer"):
        decode(encode(torch.ones(2), Signs()))
