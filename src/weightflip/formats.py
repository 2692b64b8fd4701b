"""Number formats as data: the value of each code of a small floating-point format, and the scales of block formats.

Formats do not operate on tensors. Quantizers and kernels read their fields and do the work.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias


@dataclass(frozen=True)
class FloatFormat:
    """A signed floating-point format of 1 sign bit, ``E`` exponent bits and ``M`` mantissa bits.

    A code is represented by its *ordinal*: a signed integer that increases with the value. Its magnitude is the bit
    pattern without the sign. Both zeros have ordinal 0. With ``e`` the exponent field and ``m`` the mantissa field of
    the magnitude, the value is

    * ``e > 0``: ``2**(e - bias) * (1 + m / 2**M)``,
    * ``e == 0``: ``2**(1 - bias) * (m / 2**M)`` (subnormal),
    * ``E == 0``: ``m / 2**M`` (fixed point).

    Attributes:
        name: Usual name, such as ``"e4m3"``.
        exponent_bits: ``E``.
        mantissa_bits: ``M``.
        bias: Subtracted from the exponent field.
        has_inf: The all-ones exponent with mantissa 0 is infinity (IEEE 754). Requires ``has_nan``.
        has_nan: With ``has_inf``, every larger pattern is NaN (IEEE 754). Without it, only the all-ones pattern is NaN
            ("fn" formats). A format with neither is finite: every code is a number.

    Raises:
        ValueError: Negative widths, no bits except the sign, or infinities without NaN.

    Example:
        >>> E4M3.max, E4M3.smallest_subnormal, E4M3.value(1)
        (448.0, 0.001953125, 0.001953125)
        >>> print(E4M3)
        e4m3: 8 bits = 1 sign + 4 exponent + 3 mantissa, bias 7, NaN but no infinities, largest 448, smallest 0.00195312
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    has_inf: bool = False
    has_nan: bool = False

    def __post_init__(self) -> None:
        if self.exponent_bits < 0 or self.mantissa_bits < 0 or self.exponent_bits + self.mantissa_bits == 0:
            raise ValueError(
                f"a format needs at least one bit in addition to the sign, got exponent_bits={self.exponent_bits}, "
                f"mantissa_bits={self.mantissa_bits}"
            )
        if self.has_inf and (not self.has_nan or self.mantissa_bits == 0):
            raise ValueError(f"format {self.name!r}: infinities require NaN codes (IEEE 754) and a mantissa bit")
        if self.max_ordinal < 1:
            raise ValueError(f"format {self.name!r}: infinities and NaN leave no code for positive numbers")

    @property
    def bits(self) -> int:
        """Width in bits, including the sign."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number and of the subnormal numbers."""
        return 1 - self.bias if self.exponent_bits else 0

    @property
    def max_ordinal(self) -> int:
        """Ordinal of the largest finite number."""
        if self.has_inf:
            return (((1 << self.exponent_bits) - 1) << self.mantissa_bits) - 1
        return (1 << (self.bits - 1)) - (2 if self.has_nan else 1)

    @property
    def inf_ordinal(self) -> int | None:
        """Ordinal of +infinity; None if the format has no infinities."""
        return self.max_ordinal + 1 if self.has_inf else None

    @property
    def nan_ordinal(self) -> int:
        """The ordinal of every NaN: the first one above all numbers, in the storage's two's complement.

        A finite format has no NaN, but a NaN weight still needs a code. If the format fills its storage (``e3m4`` in 8
        bits), the ordinal wraps around: ``127 + 1`` is -128, which no number uses.
        """
        ordinal = self.max_ordinal + (2 if self.has_inf else 1)
        half = 1 << (self.storage_bits - 1)
        return ordinal - 2 * half if ordinal >= half else ordinal

    @property
    def storage_bits(self) -> int:
        """Width of the integers that hold ordinals: 8, 16, 32 or 64."""
        return max(8, 1 << (self.bits - 1).bit_length())

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite number: ``max`` lies in ``[2**max_exponent, 2**(max_exponent + 1))``."""
        significand, exponent = self._significand(self.max_ordinal)
        return exponent + math.frexp(significand)[1] - 1

    @property
    def max(self) -> float:
        """Largest finite number; infinity if it exceeds float64 (11 or more exponent bits)."""
        return self.value(self.max_ordinal)

    @property
    def smallest_normal(self) -> float:
        """Smallest positive number with full precision; 0.0 if float64 underflows, NaN without exponent bits."""
        if self.exponent_bits == 0:
            return math.nan
        return math.ldexp(1.0, self.min_exponent)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive number; 0.0 if float64 underflows."""
        return self.value(1)

    def _significand(self, magnitude: int) -> tuple[float, int]:
        """``(s, e)`` such that the value is ``s * 2**e``. Exact for every width."""
        field = magnitude >> self.mantissa_bits
        mantissa = (magnitude & ((1 << self.mantissa_bits) - 1)) / (1 << self.mantissa_bits)
        if field == 0 or self.exponent_bits == 0:
            return mantissa, self.min_exponent
        return 1.0 + mantissa, field - self.bias

    def value(self, ordinal: int, *, exponent_shift: int = 0) -> float:
        """The value of an ordinal.

        Args:
            ordinal: Between ``-max_ordinal`` and ``max_ordinal``, or the ordinal of an infinity or of NaN.
            exponent_shift: Divide the value by ``2**exponent_shift``, to inspect formats beyond float64.

        Returns:
            The value as a float64. Infinity if it overflows float64, 0.0 if it underflows.

        Raises:
            ValueError: The format has no such ordinal.
        """
        if ordinal == self.nan_ordinal:
            return math.nan
        sign, magnitude = (-1.0 if ordinal < 0 else 1.0), abs(ordinal)
        if magnitude == self.inf_ordinal:
            return sign * math.inf
        if magnitude > self.max_ordinal:
            raise ValueError(f"{self.name} has ordinals -{self.max_ordinal} to {self.max_ordinal}, got {ordinal}")
        significand, exponent = self._significand(magnitude)
        try:
            return sign * math.ldexp(significand, exponent - exponent_shift)
        except OverflowError:
            return sign * math.inf

    @cached_property
    def values(self) -> tuple[float, ...]:
        """All finite numbers in ascending order. Element ``i`` has ordinal ``i - max_ordinal``."""
        return tuple(self.value(k) for k in range(-self.max_ordinal, self.max_ordinal + 1))

    def table(self) -> str:
        """The non-negative half of the format as text, one line per code: ordinal, bits, value."""
        lines = [str(self), f"{'ordinal':>8}  {'bits':<{self.bits + 2}}  value"]
        last = self.max_ordinal + (1 if self.has_inf else 0)
        for ordinal in range(last + 1):
            pattern = format(ordinal, f"0{self.bits - 1}b")
            split = self.exponent_bits
            lines.append(f"{ordinal:>8}  0 {pattern[:split]} {pattern[split:]}  {self.value(ordinal):.9g}")
        return "\n".join(lines)

    def __str__(self) -> str:
        if self.has_inf:
            specials = "infinities and NaN"
        elif self.has_nan:
            specials = "NaN but no infinities"
        else:
            specials = "every code is a number"
        return (
            f"{self.name}: {self.bits} bits = 1 sign + {self.exponent_bits} exponent + {self.mantissa_bits} mantissa, "
            f"bias {self.bias}, {specials}, largest {self._readable(self.max_ordinal)}, "
            f"smallest {self._readable(1)}"
        )

    def _readable(self, ordinal: int) -> str:
        value = self.value(ordinal)
        if 0.0 < value < math.inf:
            return f"{value:.6g}"
        significand, exponent = self._significand(ordinal)
        return f"{significand:g} * 2**{exponent}"


class FloatRounding(NamedTuple):
    """How to round a weight to an ordinal, as data for compiled kernels.

    The weight is converted to float32, multiplied or divided by the scale in float32 if there is one, and rounded to
    the nearest number of the format, ties to the even code. Every NaN becomes ``format.nan_ordinal``.

    Attributes:
        format: The target format.
        overflow: Ordinal of everything too large, including infinities.
        divides: Whether the scale divides the weight instead of multiplying it.
    """

    format: FloatFormat
    overflow: int
    divides: bool = False


class IntegerRounding(NamedTuple):
    """Like :class:`FloatRounding`, for integers: round to the nearest, ties to even, then clamp.

    Attributes:
        smallest: Smallest ordinal. At most 0, and at least as large in magnitude as ``largest``.
        largest: Ordinal of everything larger.
        nan: Ordinal of NaN.
        divides: Whether the scale divides the weight instead of multiplying it.
    """

    smallest: int
    largest: int
    nan: int
    divides: bool = False


Rounding: TypeAlias = FloatRounding | IntegerRounding


def _finite(exponent_bits: int, mantissa_bits: int) -> FloatFormat:
    """A format in which every code is a number, with the IEEE bias (0 where E <= 1)."""
    bias = 2 ** (exponent_bits - 1) - 1 if exponent_bits else 0
    return FloatFormat(f"e{exponent_bits}m{mantissa_bits}", exponent_bits, mantissa_bits, bias)


# 8 bits. E4M3 is torch.float8_e4m3fn and E5M2 torch.float8_e5m2 (OCP 8-bit Floating Point Specification 1.0).
E0M7 = _finite(0, 7)
E1M6 = _finite(1, 6)
E2M5 = _finite(2, 5)
E3M4 = _finite(3, 4)
E4M3 = FloatFormat("e4m3", 4, 3, 7, has_nan=True)
E5M2 = FloatFormat("e5m2", 5, 2, 15, has_inf=True, has_nan=True)
E6M1 = _finite(6, 1)
E7M0 = _finite(7, 0)

# 6 and 4 bits. E2M3, E3M2 and E2M1 are the elements of the OCP Microscaling formats.
E0M5 = _finite(0, 5)
E1M4 = _finite(1, 4)
E2M3 = _finite(2, 3)
E3M2 = _finite(3, 2)
E4M1 = _finite(4, 1)
E5M0 = _finite(5, 0)
E0M3 = _finite(0, 3)
E1M2 = _finite(1, 2)
E2M1 = _finite(2, 1)
E3M0 = _finite(3, 0)

# 16 bits: the two formats that hardware implements, and the other splits.
BF16 = FloatFormat("e8m7", 8, 7, 127, has_inf=True, has_nan=True)
FP16 = FloatFormat("e5m10", 5, 10, 15, has_inf=True, has_nan=True)
E0M15 = _finite(0, 15)
E1M14 = _finite(1, 14)
E2M13 = _finite(2, 13)
E3M12 = _finite(3, 12)
E4M11 = _finite(4, 11)
E5M10 = FP16
E6M9 = _finite(6, 9)
E7M8 = _finite(7, 8)
E8M7 = BF16
E9M6 = _finite(9, 6)
E10M5 = _finite(10, 5)
E11M4 = _finite(11, 4)
E12M3 = _finite(12, 3)
E13M2 = _finite(13, 2)
E14M1 = _finite(14, 1)
E15M0 = _finite(15, 0)

# Storage of master weights. Used by `native` only.
FP32 = FloatFormat("e8m23", 8, 23, 127, has_inf=True, has_nan=True)
FP64 = FloatFormat("e11m52", 11, 52, 1023, has_inf=True, has_nan=True)


class ScaleFormula(NamedTuple):
    """How a scale comes from the largest magnitude under it, as data that a compiled kernel can follow.

    * ``"multiplies"``: ``number / max(largest, smallest)``, in float64 and then rounded to float32. Weights are
      multiplied by it. What is stored is its inverse.
    * ``"divides"``: ``max(largest / number, smallest)``, with the quotient rounded to ``format``. Weights are divided
      by it.
    * ``"inverse"``: the same, and weights are multiplied by its inverse.

    NaN stays NaN. Stored scales are the bits of float32.

    Attributes:
        form: One of these.
        number: What the largest magnitude meets.
        smallest: The smallest magnitude or scale that counts.
        format: float32 or bfloat16.
    """

    form: Literal["multiplies", "divides", "inverse"]
    number: float
    smallest: float
    format: FloatFormat = FP32


@dataclass(frozen=True)
class ExponentFormat:
    """Powers of two, the storage of block scales: an exponent without sign or mantissa. The last code is NaN.

    Attributes:
        name: Usual name.
        bits: Width in bits.
        bias: Subtracted from the code.

    Example:
        >>> E8M0.value(127), E8M0.value(0) == 2.0**-127
        (1.0, True)
    """

    name: str
    bits: int
    bias: int

    @property
    def max_code(self) -> int:
        """Code of the largest number."""
        return (1 << self.bits) - 2

    @property
    def nan_code(self) -> int:
        """Code of NaN."""
        return (1 << self.bits) - 1

    def value(self, code: int) -> float:
        """The value of a code.

        Raises:
            ValueError: The format has no such code.
        """
        if not 0 <= code <= self.nan_code:
            raise ValueError(f"{self.name} has codes 0 to {self.nan_code}, got {code}")
        return math.nan if code == self.nan_code else math.ldexp(1.0, code - self.bias)


# OCP Microscaling specification; torch.float8_e8m0fnu.
E8M0 = ExponentFormat("e8m0", 8, 127)

ScaleRule: TypeAlias = Literal["floor", "rceil", "ceil", "even", "amax", "tensor", "pow2"]

# Scale rules and the storage of the scale, for MX, NVFP4 and float8. The default rule of each comes first.
_SCALE_RULES: tuple[dict[ScaleRule, FloatFormat | ExponentFormat], ...] = (
    {"floor": E8M0, "rceil": E8M0, "ceil": E8M0, "even": E8M0},
    {"amax": E4M3, "tensor": E4M3},
    {"amax": FP32, "pow2": E8M0},
)


@dataclass(frozen=True)
class BlockFormat:
    """Elements of one format in scale blocks. The scale of each block is a code too.

    Attributes:
        family: Name without the rule, such as ``"mxfp4"``.
        element: Format of each weight.
        block_size: Number of elements per block in the last dimension.
        scale: Format of the block's scale.
        rule: How the scale follows from the largest magnitude ``amax``. For E8M0, ``"floor"``, ``"rceil"``, ``"ceil"``
            or ``"even"``: how the exponent of ``amax`` is rounded. For E4M3 and float32, ``"amax"``: ``amax`` maps to
            the element's largest number. For E4M3, ``"tensor"``: the same, under a float32 scale of the whole tensor.
            For E8M0, ``"pow2"``: like ``"amax"``, rounded up to a power of two.
        rows: Number of elements per block in the second-to-last dimension.

    Raises:
        ValueError: An empty block, an unsupported scale format, or a rule that does not apply to it.

    Example:
        >>> print(MXFP4)
        mxfp4: e2m1 in blocks of 32, each with an e8m0 scale (floor), 4.25 bits per weight
    """

    family: str
    element: FloatFormat
    block_size: int
    scale: FloatFormat | ExponentFormat
    rule: ScaleRule
    rows: int = 1

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.rows < 1:
            raise ValueError(f"a block must have at least one weight, got {self._shape}")
        rules = [rule for known in _SCALE_RULES for rule, scale in known.items() if scale == self.scale]
        if not rules:
            known = " or ".join(dict.fromkeys(scale.name for known in _SCALE_RULES for scale in known.values()))
            raise ValueError(f"the scale of a block must be {known}, got {self.scale.name}")
        if self.rule not in rules:
            raise ValueError(f"the rule of an {self.scale.name} scale must be one of {tuple(rules)}, got {self.rule!r}")

    @property
    def _rules(self) -> dict[ScaleRule, FloatFormat | ExponentFormat]:
        return next(known for known in _SCALE_RULES if known.get(self.rule) == self.scale)

    @property
    def rules(self) -> tuple[ScaleRule, ...]:
        """This rule and its alternatives. The first one has no suffix in the name."""
        return tuple(self._rules)

    @property
    def variants(self) -> tuple[BlockFormat, ...]:
        """The same elements and blocks with each of ``rules``."""
        return tuple(replace(self, rule=rule, scale=scale) for rule, scale in self._rules.items())

    @property
    def name(self) -> str:
        """Name of the quantizer, such as ``"mxfp4"`` or ``"mxfp4:rceil"``."""
        return self.family if self.rule == self.rules[0] else f"{self.family}:{self.rule}"

    @property
    def bits(self) -> float:
        """Bits per weight, including its share of the block's scale."""
        return self.element.bits + self.scale.bits / (self.rows * self.block_size)

    @property
    def _shape(self) -> str:
        return str(self.block_size) if self.rows == 1 else f"{self.rows} x {self.block_size}"

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.element.name} in blocks of {self._shape}, each with an {self.scale.name} scale "
            f"({self.rule}), {self.bits:g} bits per weight"
        )


# OCP Microscaling Formats 1.0, and NVIDIA's.
MXFP8_E4M3 = BlockFormat("mxfp8_e4m3", E4M3, 32, E8M0, "floor")
MXFP8_E5M2 = BlockFormat("mxfp8_e5m2", E5M2, 32, E8M0, "floor")
MXFP6_E2M3 = BlockFormat("mxfp6_e2m3", E2M3, 32, E8M0, "floor")
MXFP6_E3M2 = BlockFormat("mxfp6_e3m2", E3M2, 32, E8M0, "floor")
MXFP4 = BlockFormat("mxfp4", E2M1, 32, E8M0, "floor")
NVFP4 = BlockFormat("nvfp4", E2M1, 16, E4M3, "amax")

# DeepSeek-V3's: tiles of activations and blocks of weights.
FLOAT8_E4M3_1X128 = BlockFormat("float8_e4m3:1x128", E4M3, 128, FP32, "amax")
FLOAT8_E4M3_128X128 = BlockFormat("float8_e4m3:128x128", E4M3, 128, FP32, "amax", rows=128)

BLOCK_FORMATS: dict[str, BlockFormat] = {
    variant.name: variant
    for usual in (
        *(MXFP8_E4M3, MXFP8_E5M2, MXFP6_E2M3, MXFP6_E3M2, MXFP4, NVFP4),
        *(FLOAT8_E4M3_1X128, FLOAT8_E4M3_128X128),
    )
    for variant in usual.variants
}
"""All block formats with a quantizer, by name."""

_NAMED = {f.name: f for f in (E4M3, E5M2, BF16, FP16)}
_EXMY = re.compile(r"e(\d+)m(\d+)")


def exmy(name: str) -> FloatFormat:
    """Return the format called ``name``, such as ``"e3m4"``.

    ``e4m3``, ``e5m2``, ``e8m7`` and ``e5m10`` are the formats that hardware implements. All others are finite.

    Raises:
        ValueError: Not of the form ``eXmY``, or wider than 16 bits.

    Example:
        >>> exmy("e2m1").values[7:]
        (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """
    match = _EXMY.fullmatch(name.lower())
    if match is None:
        raise ValueError(f"expected a format such as 'e4m3' or 'e2m1', got {name!r}")
    exponent_bits, mantissa_bits = int(match[1]), int(match[2])
    if not 1 <= exponent_bits + mantissa_bits <= 15:
        raise ValueError(
            f"expected a format of 2 to 16 bits, including the sign; got {name!r} with "
            f"{1 + exponent_bits + mantissa_bits}"
        )
    canonical = f"e{exponent_bits}m{mantissa_bits}"
    return _NAMED.get(canonical) or _finite(exponent_bits, mantissa_bits)
