"""Every number of every small format, against closed forms in this file and ml_dtypes."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from weightflip import formats
from weightflip.formats import FloatFormat, exmy

SPLITS_BY_WIDTH = {bits: [(e, bits - 1 - e) for e in range(bits)] for bits in (4, 6, 8, 12, 16)}
SMALL_SPLITS = SPLITS_BY_WIDTH[4] + SPLITS_BY_WIDTH[6] + SPLITS_BY_WIDTH[8]
ALL_SPLITS = SMALL_SPLITS + SPLITS_BY_WIDTH[12] + SPLITS_BY_WIDTH[16]

# Number of magnitudes, from the top, that are not finite numbers. All other splits are finite.
SPECIAL_CODES = {(4, 3): 1, (5, 2): 4, (8, 7): 128, (5, 10): 1024}


def split_name(split: tuple[int, int]) -> str:
    return f"e{split[0]}m{split[1]}"


def number(exponent_bits: int, mantissa_bits: int, magnitude: int) -> Fraction:
    """The textbook value of a bit pattern: fixed point without exponent bits, IEEE 754 with them."""
    fraction = Fraction(magnitude % 2**mantissa_bits, 2**mantissa_bits)
    if exponent_bits == 0:
        return fraction
    bias = 2 ** (exponent_bits - 1) - 1
    field = magnitude // 2**mantissa_bits
    if field == 0:
        return Fraction(2) ** (1 - bias) * fraction
    return Fraction(2) ** (field - bias) * (1 + fraction)


def finite_codes(split: tuple[int, int]) -> int:
    """The number of non-negative codes that are finite numbers."""
    return 2 ** sum(split) - SPECIAL_CODES.get(split, 0)


def exponent_of(x: Fraction) -> int:
    """floor(log2(x))."""
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


@pytest.mark.parametrize("split", SMALL_SPLITS, ids=split_name)
def test_every_number_of_the_small_splits(split):
    half = [number(*split, magnitude) for magnitude in range(finite_codes(split))]
    expected = [-x for x in reversed(half[1:])] + half
    assert [Fraction(x) for x in exmy(split_name(split)).values] == expected


@pytest.mark.parametrize("split", SPLITS_BY_WIDTH[12] + SPLITS_BY_WIDTH[16], ids=split_name)
def test_numbers_of_the_large_splits(split):
    fmt = exmy(split_name(split))
    step = 2 ** split[1]
    magnitudes = {k + d for k in range(0, finite_codes(split) + 1, max(step, 64)) for d in (-1, 0, 1)}
    magnitudes.update(range(0, finite_codes(split), 97))
    for magnitude in sorted(magnitudes & set(range(finite_codes(split)))):
        expected = number(*split, magnitude)
        try:
            expected_float = float(expected)
        except OverflowError:
            expected_float = math.inf
        assert fmt.value(magnitude) == expected_float
        assert fmt.value(-magnitude) == -expected_float


@pytest.mark.parametrize("split", ALL_SPLITS, ids=split_name)
def test_properties(split):
    exponent_bits, mantissa_bits = split
    fmt = exmy(split_name(split))
    largest = number(*split, finite_codes(split) - 1)

    assert (fmt.name, fmt.exponent_bits, fmt.mantissa_bits) == (split_name(split), exponent_bits, mantissa_bits)
    assert fmt.bits == 1 + exponent_bits + mantissa_bits
    assert fmt.storage_bits == (8 if fmt.bits <= 8 else 16)
    assert fmt.max_ordinal == finite_codes(split) - 1
    assert fmt.max_exponent == exponent_of(largest)
    assert fmt.inf_ordinal == (2**exponent_bits * 2**mantissa_bits - 2**mantissa_bits if fmt.has_inf else None)
    if exponent_bits:
        assert fmt.min_exponent == exponent_of(number(*split, 2**mantissa_bits))
    if exponent_bits < 11:
        assert Fraction(fmt.max) == largest
        assert Fraction(fmt.smallest_subnormal) == number(*split, 1)
        if exponent_bits:
            assert Fraction(fmt.smallest_normal) == number(*split, 2**mantissa_bits)


def test_one_exponent_bit_is_also_fixed_point():
    # Bias 0: the subnormal half reaches 2, the normal half continues to 4, in equal steps.
    assert formats.E1M2.values[7:] == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)


@pytest.mark.parametrize("split", ALL_SPLITS, ids=split_name)
def test_nan_ordinal_fits_the_storage_and_is_not_a_number(split):
    fmt = exmy(split_name(split))
    half = 2 ** (fmt.storage_bits - 1)
    assert -half <= fmt.nan_ordinal < half
    assert abs(fmt.nan_ordinal) > fmt.max_ordinal
    assert abs(fmt.nan_ordinal) != fmt.inf_ordinal
    assert math.isnan(fmt.value(fmt.nan_ordinal))


@pytest.mark.parametrize(
    ("name", "nan"),
    # The first NaN pattern of the hardware formats; wrapped around if a finite format leaves no pattern free.
    [
        ("e4m3", 0x7F),
        ("e5m2", 0x7D),
        ("e8m7", 0x7F81),
        ("e5m10", 0x7C01),
        ("e3m4", -128),
        ("e2m1", 8),
        ("e6m9", -32768),
    ],
)
def test_nan_ordinal_known_values(name, nan):
    assert exmy(name).nan_ordinal == nan


# Name in ml_dtypes, the format here, and the width of the integers that ml_dtypes stores it in.
TWINS = [
    ("float4_e2m1fn", formats.E2M1, np.uint8),
    ("float6_e2m3fn", formats.E2M3, np.uint8),
    ("float6_e3m2fn", formats.E3M2, np.uint8),
    ("float8_e4m3fn", formats.E4M3, np.uint8),
    ("float8_e5m2", formats.E5M2, np.uint8),
    ("float8_e3m4", FloatFormat("ieee_e3m4", 3, 4, 3, has_inf=True, has_nan=True), np.uint8),
    ("float8_e4m3", FloatFormat("ieee_e4m3", 4, 3, 7, has_inf=True, has_nan=True), np.uint8),
    ("bfloat16", formats.BF16, np.uint16),
    ("float16", formats.FP16, np.uint16),
]


@pytest.mark.parametrize(("twin", "fmt", "storage"), TWINS, ids=[name for name, *_ in TWINS])
def test_every_bit_pattern_agrees_with_ml_dtypes(twin, fmt, storage):
    dtype = np.float16 if twin == "float16" else getattr(ml_dtypes, twin)
    patterns = np.arange(2 ** (fmt.bits - 1), dtype=storage)
    with np.errstate(invalid="ignore"):  # signaling NaN patterns
        expected = patterns.view(dtype).astype(np.float64)
    is_nan = np.isnan(expected)

    got = np.array([fmt.value(int(k)) for k in patterns[~is_nan]])
    np.testing.assert_array_equal(got, expected[~is_nan])
    assert len(got) == fmt.max_ordinal + (2 if fmt.has_inf else 1)
    # Only the sign bit distinguishes the negative half.
    negative = (patterns[~is_nan] | storage(1 << (fmt.bits - 1))).view(dtype).astype(np.float64)
    np.testing.assert_array_equal([fmt.value(-int(k)) for k in patterns[~is_nan]], negative)


@pytest.mark.parametrize(("twin", "fmt"), [(name, fmt) for name, fmt, _ in TWINS if name != "float16"])
def test_limits_agree_with_ml_dtypes(twin, fmt):
    info = ml_dtypes.finfo(getattr(ml_dtypes, twin))
    assert fmt.max == float(info.max)
    assert fmt.smallest_normal == float(info.smallest_normal)
    assert fmt.smallest_subnormal == float(info.smallest_subnormal)
    assert fmt.bits == info.bits


@pytest.mark.parametrize(("fmt", "dtype"), [(formats.FP32, np.float32), (formats.FP64, np.float64)])
def test_wide_native_formats(fmt, dtype):
    info = np.finfo(dtype)
    assert fmt.max == float(info.max)
    assert fmt.smallest_normal == float(info.smallest_normal)
    assert fmt.smallest_subnormal == float(info.smallest_subnormal)
    assert fmt.value(fmt.inf_ordinal) == math.inf
    assert fmt.value(-fmt.inf_ordinal) == -math.inf
    storage = {32: np.uint32, 64: np.uint64}[fmt.storage_bits]
    for x in (1.0, math.pi, float(info.smallest_subnormal) * 3):
        stored = dtype(x)
        assert fmt.value(int(stored.view(storage))) == float(stored)


@pytest.mark.parametrize("name", ["e12m3", "e13m2", "e14m1", "e15m0"])
def test_beyond_float64(name):
    fmt = exmy(name)
    assert fmt.max == math.inf
    assert fmt.smallest_subnormal == 0.0
    assert fmt.smallest_normal == 0.0
    # The middle of the exponent range behaves normally.
    one = (2 ** (fmt.exponent_bits - 1) - 1) << fmt.mantissa_bits
    assert fmt.value(one) == 1.0

    shift = 2 ** (fmt.exponent_bits - 1)
    largest = number(fmt.exponent_bits, fmt.mantissa_bits, fmt.max_ordinal)
    assert Fraction(fmt.value(fmt.max_ordinal, exponent_shift=shift)) == largest / Fraction(2) ** shift
    smallest = number(fmt.exponent_bits, fmt.mantissa_bits, 1)
    assert Fraction(fmt.value(1, exponent_shift=-shift)) == smallest * Fraction(2) ** shift


@pytest.mark.parametrize("fmt", [formats.E4M3, formats.E5M2, formats.E3M4, formats.E2M1])
def test_no_value_outside_the_format(fmt):
    outside = {fmt.max_ordinal + 1, fmt.max_ordinal + 3, -fmt.max_ordinal - 3, 1000, -1000}
    for ordinal in outside - {fmt.nan_ordinal, fmt.inf_ordinal}:
        with pytest.raises(ValueError, match=f"-{fmt.max_ordinal} to {fmt.max_ordinal}, got {ordinal}$"):
            fmt.value(ordinal)


@pytest.mark.parametrize("split", SMALL_SPLITS + SPLITS_BY_WIDTH[16], ids=split_name)
def test_the_module_has_a_name_for_every_split(split):
    assert getattr(formats, split_name(split).upper()) == exmy(split_name(split))


def test_exmy_gives_the_hardware_formats():
    assert exmy("e4m3") is formats.E4M3
    assert exmy("E5M2") is formats.E5M2
    assert exmy("e8m7") is formats.BF16
    assert exmy("e5m10") is formats.FP16
    assert not exmy("e4m2").has_nan


@pytest.mark.parametrize(
    "name", ["", "e4", "m3", "e4m", "em3", "4m3", "e4m3fn", "e-1m3", " e4m3", "float8_e4m3", "e4.0m3"]
)
def test_exmy_rejects_invalid_names(name):
    with pytest.raises(ValueError, match="expected a format such as") as error:
        exmy(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(("name", "bits"), [("e0m0", 1), ("e8m8", 17), ("e16m0", 17), ("e0m16", 17), ("e11m52", 64)])
def test_exmy_rejects_widths(name, bits):
    with pytest.raises(ValueError, match=f"2 to 16 bits, including the sign; got '{name}' with {bits}$"):
        exmy(name)


@pytest.mark.parametrize(
    "arguments",
    [
        {"exponent_bits": 0, "mantissa_bits": 0},
        {"exponent_bits": -1, "mantissa_bits": 4},
        {"exponent_bits": 4, "mantissa_bits": -1},
        {"exponent_bits": 4, "mantissa_bits": 3, "has_inf": True},
        {"exponent_bits": 4, "mantissa_bits": 0, "has_inf": True, "has_nan": True},
    ],
)
def test_impossible_formats(arguments):
    with pytest.raises(ValueError, match=r"bit in addition to the sign|infinities require NaN"):
        FloatFormat("x", bias=7, **arguments)


def test_formats_are_values():
    copy = FloatFormat("e4m3", 4, 3, 7, has_nan=True)
    assert copy == formats.E4M3
    assert hash(copy) == hash(formats.E4M3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        copy.bias = 8


def test_table_of_e2m1():
    header, columns, *rows = formats.E2M1.table().splitlines()
    assert header == str(formats.E2M1)
    assert columns.split() == ["ordinal", "bits", "value"]
    assert [row.split() for row in rows] == [
        ["0", "0", "00", "0", "0"],
        ["1", "0", "00", "1", "0.5"],
        ["2", "0", "01", "0", "1"],
        ["3", "0", "01", "1", "1.5"],
        ["4", "0", "10", "0", "2"],
        ["5", "0", "10", "1", "3"],
        ["6", "0", "11", "0", "4"],
        ["7", "0", "11", "1", "6"],
    ]


@pytest.mark.parametrize("split", SMALL_SPLITS, ids=split_name)
def test_table_rows_read_back(split):
    fmt = exmy(split_name(split))
    rows = [row.split() for row in fmt.table().splitlines()[2:]]
    if fmt.has_inf:
        assert rows.pop()[-1] == "inf"
    assert len(rows) == finite_codes(split)
    for magnitude, (ordinal, *bits, value) in enumerate(rows):
        assert int(ordinal) == magnitude
        assert int("".join(bits), 2) == magnitude
        assert float(value) == pytest.approx(float(number(*split, magnitude)), rel=1e-8)


@pytest.mark.parametrize(
    ("fmt", "text"),
    [
        (
            formats.E4M3,
            "e4m3: 8 bits = 1 sign + 4 exponent + 3 mantissa, bias 7, NaN but no infinities, "
            "largest 448, smallest 0.00195312",
        ),
        (
            formats.E5M2,
            "e5m2: 8 bits = 1 sign + 5 exponent + 2 mantissa, bias 15, infinities and NaN, "
            "largest 57344, smallest 1.52588e-05",
        ),
        (
            formats.E0M3,
            "e0m3: 4 bits = 1 sign + 0 exponent + 3 mantissa, bias 0, every code is a number, "
            "largest 0.875, smallest 0.125",
        ),
        # Numbers beyond float64 are written as a product, never as inf or 0.
        (
            formats.E12M3,
            "e12m3: 16 bits = 1 sign + 12 exponent + 3 mantissa, bias 2047, every code is a number, "
            "largest 1.875 * 2**2048, smallest 0.125 * 2**-2046",
        ),
        (
            formats.E15M0,
            "e15m0: 16 bits = 1 sign + 15 exponent + 0 mantissa, bias 16383, every code is a number, "
            "largest 1 * 2**16384, smallest 1 * 2**-16382",
        ),
    ],
)
def test_str(fmt, text):
    assert str(fmt) == text


def test_special_codes_that_leave_no_number_are_refused():
    with pytest.raises(ValueError, match="leave no code for positive numbers"):
        FloatFormat("fixed point with infinities", 0, 7, 0, has_inf=True, has_nan=True)
    with pytest.raises(ValueError, match="leave no code for positive numbers"):
        FloatFormat("two bits with NaN", 0, 1, 0, has_nan=True)
