"""Loops over 32 weights at a time, in vectors that LLVM compiles for AVX2, AVX-512, NEON and others.

Plain loops that mix int8, int32 and float32 take twice as many instructions when Numba vectorizes them. These loops
access memory by address. Imported only if Numba is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from weightflip.kernels.constants import Lanes
from weightflip.kernels.sampled import LANES as LANES_OF_SAMPLES

# The annotations of Numba and llvmlite do not cover how intrinsics are written and called.
_intrinsic: Any = intrinsic
_tools: Any = cgutils
_types: Any = types

LANES = 32
# In the loops that find the largest magnitude: the number of lanes, and of places in memory that are read at once.
LANES_OF_LARGEST, _STREAMS = 16, 4
WIDE_OF_LARGEST = LANES_OF_LARGEST * _STREAMS

# In the loop that compares codes with those at the last mark: the bytes of a vector, and the number of such places.
BYTES_OF_KEEP, STREAMS_OF_KEEP = 64, 4

# Prefetch distances in bytes. Processors also prefetch by themselves, but seem to start again at each page.
_AHEAD, _AHEAD_CODES, _AHEAD_LARGEST = 2048, 1024, 512
_CACHE_LINE = 64

# The counting loop goes through this many weights at four places in turns, with a quarter of the distances: processors
# prefetch each place on their own, and so get more memory at once.
_MANY, _LOG_PLACES = 1 << 14, 2

# The int64 array ``found`` of the counting loop: flips, updates and stalled weights. For metric groups also the address
# of the old scales, up to MOST_COUNTS counts, and the addresses of up to MOST_STATES states.
OLD_SCALES_AT, COUNTS_AT, MOST_COUNTS, MOST_STATES = 3, 4, 8, 8
STATES_AT = COUNTS_AT + MOST_COUNTS
FOUND = STATES_AT + MOST_STATES

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_ADDRESS = types.int64


class Vectors:
    """Builds instructions on vectors with this number of lanes."""

    def __init__(self, builder: Any, lanes: int = LANES) -> None:
        self.b, self.lanes = builder, lanes
        self.word = ir.IntType(lanes)
        """One bit for each lane."""

    def type(self, of: Any) -> Any:
        return ir.VectorType(of, self.lanes)

    def all(self, of: Any, value: float) -> Any:
        return ir.Constant(self.type(of), [value] * self.lanes)

    def splat(self, scalar: Any) -> Any:
        undefined = ir.Constant(self.type(scalar.type), ir.Undefined)
        first = self.b.insert_element(undefined, scalar, ir.Constant(_I32, 0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(self.type(_I32), [0] * self.lanes))

    def load(self, address: Any, of: Any, align: int) -> Any:
        return self.b.load(self.b.inttoptr(address, self.type(of).as_pointer()), align=align)

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=1)

    def smaller(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    def larger(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.icmp_signed(">", x, y), x, y)

    def loop(self, numel: Any) -> Any:
        return cgutils.for_range_slice(self.b, ir.Constant(_I64, 0), numel, ir.Constant(_I64, self.lanes), _I64)

    def at(self, address: Any, index: Any, size: int) -> Any:
        return self.b.add(address, self.b.mul(index, ir.Constant(_I64, size)))

    def largest_lane(self, value: Any) -> Any:
        lanes = self.lanes
        while lanes > 1:
            lanes //= 2
            low, high = (
                self.b.shuffle_vector(value, value, ir.Constant(ir.VectorType(_I32, lanes), list(range(first, last))))
                for first, last in ((0, lanes), (lanes, 2 * lanes))
            )
            value = self.larger(low, high)
        return self.b.extract_element(value, ir.Constant(_I32, 0))

    def magnitude(self, address: Any, of: Any) -> Any:
        """Load floats without their signs, as integers. These have the order of the numbers, and NaN is the largest."""
        return self.b.and_(self.load(address, of, of.width // 8), self.all(of, (1 << (of.width - 1)) - 1))

    def larger_neighbors(self, x: Any, y: Any) -> Any:
        """Return the larger value of each pair of lanes."""
        even, odd = (
            self.b.shuffle_vector(x, y, ir.Constant(self.type(_I32), list(range(first, 2 * self.lanes, 2))))
            for first in (0, 1)
        )
        return self.larger(even, odd)

    def prefetch(self, address: Any, ahead: int, size: int, shift: Any = None) -> None:
        """Prefetch the memory ``ahead >> shift`` bytes after the current lanes."""
        pointer = _I8.as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        function = _tools.get_or_insert_function(self.b.module, signature, "llvm.prefetch.p0")
        to_read, keep, data = ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)
        distance = ir.Constant(_I64, ahead)
        if shift is not None:
            distance = self.b.lshr(distance, shift)
        for line in range(0, self.lanes * size, _CACHE_LINE):
            place = self.b.add(self.b.add(address, distance), ir.Constant(_I64, line))
            self.b.call(function, [self.b.inttoptr(place, pointer), to_read, keep, data])


class _Turns:
    """Goes through many elements at several places in turns, and through few in order.

    Attributes:
        shift: The logarithm of the number of places, to the base 2.
    """

    def __init__(self, vectors: Vectors, numel: Any) -> None:
        self._v = v = vectors
        self.shift = v.b.select(
            v.b.icmp_unsigned(">=", numel, ir.Constant(_I64, _MANY)),
            ir.Constant(_I64, _LOG_PLACES),
            ir.Constant(_I64, 0),
        )
        self._log_lanes = ir.Constant(_I64, v.lanes.bit_length() - 1)
        self._each = v.b.lshr(v.b.lshr(numel, self._log_lanes), self.shift)
        self._places = v.b.shl(ir.Constant(_I64, 1), self.shift)

    def index(self, at: Any) -> Any:
        """Return the index of the element whose turn it is. Vectors that are left over come last."""
        b = self._v.b
        vector = b.lshr(at, self._log_lanes)
        place = b.and_(vector, b.sub(self._places, ir.Constant(_I64, 1)))
        in_turn = b.add(b.lshr(vector, self.shift), b.mul(place, self._each))
        is_left_over = b.icmp_unsigned(">=", vector, b.mul(self._each, self._places))
        return b.shl(b.select(is_left_over, vector, in_turn), self._log_lanes)


class _Rounding:
    """Rounds magnitudes, given as bits of float32, to ordinals. Signs and NaN are handled elsewhere."""

    def __init__(self, vectors: Vectors, constants: Any, codes: Any) -> None:
        self.v, self.codes = vectors, codes
        self.scalars = {
            name: vectors.b.load(
                vectors.b.inttoptr(vectors.b.add(constants, ir.Constant(_I64, 4 * at)), _I32.as_pointer()), align=4
            )
            for at, name in enumerate(Lanes._fields)
        }

    def __getitem__(self, name: str) -> Any:
        return self.v.splat(self.scalars[name])

    def narrow(self, value: Any) -> Any:
        return value if value.type.element == self.codes else self.v.b.trunc(value, self.v.type(self.codes))

    def by_adding(self, magnitude: Any) -> Any:
        """Let the processor round to nearest even, by adding a power of two to normal and subnormal numbers.

        The unit in the last place of that power is the distance between neighboring numbers of the format. The last
        bits of the sum are then the ordinal plus a constant that depends on the exponent.
        """
        b, v = self.v.b, self.v
        at_least = v.larger(magnitude, self["first"])
        added = b.add(b.and_(at_least, self["exponent"]), self["add"])
        total = b.fadd(b.bitcast(magnitude, v.type(_F32)), b.bitcast(added, v.type(_F32)))
        bits = b.add(b.bitcast(total, v.type(_I32)), b.lshr(added, self["cut"]))
        return b.sub(self.narrow(bits), self.narrow(self["base"]))

    def by_shifting(self, magnitude: Any) -> Any:
        """Round as :func:`weightflip.quantizers.ordinals.round_to_ordinals` does, which explains the method.

        Used for formats without mantissa bits, in which the exponent decides what is even, and for formats with the
        exponents of float32, whose subnormal numbers must be right even if the processor flushes them to 0.
        """
        b, v = self.v.b, self.v
        is_odd = b.and_(b.xor(b.lshr(magnitude, self["cut"]), self["parity"]), self["tie"])
        normal = b.ashr(b.add(b.sub(magnitude, self["rebias"]), is_odd), self["cut"])
        total = b.fadd(b.bitcast(magnitude, v.type(_F32)), b.bitcast(self["adder"], v.type(_F32)))
        subnormal = b.sub(b.bitcast(total, v.type(_I32)), self["adder"])
        return self.narrow(b.select(b.icmp_signed("<", magnitude, self["first_normal"]), subnormal, normal))


def _encoded(rounding: _Rounding, by_adding: bool, number: Any) -> Any:
    """Return the ordinals of float32 numbers."""
    b, v = rounding.v.b, rounding.v
    bits = b.bitcast(number, v.type(_I32))
    magnitude = b.and_(bits, v.all(_I32, 0x7FFFFFFF))
    is_nan = b.icmp_signed(">", magnitude, v.all(_I32, 0x7F800000))
    magnitude = v.smaller(magnitude, rounding["limit"])
    code = rounding.by_adding(magnitude) if by_adding else rounding.by_shifting(magnitude)
    # All bits are set if the number is negative.
    sign = rounding.narrow(b.ashr(bits, v.all(_I32, 31)))
    cap = b.add(rounding.narrow(rounding["cap"]), b.and_(sign, rounding.narrow(rounding["asymmetry"])))
    code = b.select(b.icmp_unsigned("<", code, cap), code, cap)
    code = b.sub(b.xor(code, sign), sign)
    return b.select(is_nan, rounding.narrow(rounding["nan"]), code)


PLAIN, MULTIPLIED, DIVIDED = range(3)
"""The operation on a weight before it is rounded."""


def _number(v: Vectors, weight_bits: int, address: Any, scaling: int, scale: Any) -> Any:
    """Load weights as float32, and apply the scale."""
    if weight_bits == 32:
        number = v.load(address, _F32, 4)
    else:
        # bfloat16 is the upper half of a float32.
        bits = v.b.zext(v.load(address, _I16, 2), v.type(_I32))
        number = v.b.bitcast(v.b.shl(bits, v.all(_I32, 16)), v.type(_F32))
    if scaling == PLAIN:
        return number
    under = v.load(scale, _F32, 4)
    return v.b.fmul(number, under) if scaling == MULTIPLIED else v.b.fdiv(number, under)


class Observing(Protocol):
    """The work of metric groups in the counting loop; see :class:`weightflip.kernels.lowering.Observing`."""

    def each(self, index: Any, old: Any, new: Any, flipped: Any, under_old_scale: Callable[[], Any]) -> None: ...

    def end(self) -> None: ...


def make_advance(
    weight_bits: int,
    update_bits: int,
    code_bits: int,
    scaling: int,
    by_adding: bool,
    observing: Callable[[Vectors, Any, Any], Observing] | None = None,
) -> Any:
    """Make the loop that encodes, compares, counts and stores.

    Args:
        weight_bits: 32 for float32, 16 for bfloat16.
        update_bits: Size of an update, which is a float or, with 8 bits, a bool; 0 if updates are not counted.
        code_bits: Size of an ordinal.
        scaling: How the scale is applied before rounding.
        by_adding: Whether to use :meth:`_Rounding.by_adding`; otherwise :meth:`_Rounding.by_shifting`.
        observing: Makes the work of metric groups from the vectors, the address ``found`` and LLVM's type of an
            ordinal; None if there is none.

    Returns:
        ``advance(weight, update, codes, numel, scales, scale_step, mask, constants, found)``. ``weight``, ``update``
        and ``codes`` are addresses of the first of ``numel`` elements, a multiple of ``LANES``. ``scales`` is the
        address of ``LANES`` scales, and ``scale_step`` is 4 if each weight has its own scale there, or 0 if all weights
        share these. ``mask`` has the bits of an update that are not all 0 if it counts. ``constants`` is the address of
        :class:`~weightflip.kernels.constants.Lanes`. ``found`` is the address of three int64 to which flips, updates
        and stalled weights are added; with metric groups, of the array described above.
    """
    code, bits = ir.IntType(code_bits), ir.IntType(update_bits or 8)
    weight_size, update_size, code_size = weight_bits // 8, update_bits // 8, code_bits // 8

    def generate(context: Any, b: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        weight_at, update_at, codes_at, numel, scales, scale_step, mask, constants, found_at = arguments
        v = Vectors(b)
        rounding = _Rounding(v, constants, code)
        found = [_tools.alloca_once_value(b, ir.Constant(_I64, 0)) for _ in range(3)]
        more = None if observing is None else observing(v, found_at, code)

        def count(at: int, flags: Any) -> None:
            number = b.zext(b.ctpop(b.bitcast(flags, ir.IntType(LANES))), _I64)
            b.store(b.add(b.load(found[at]), number), found[at])

        turns = _Turns(v, numel)
        with v.loop(numel) as (at, _):
            i = turns.index(at)
            place, code_place = v.at(weight_at, i, weight_size), v.at(codes_at, i, code_size)
            v.prefetch(place, _AHEAD, weight_size, turns.shift)
            v.prefetch(code_place, _AHEAD_CODES, code_size, turns.shift)
            number = _number(v, weight_bits, place, scaling, b.add(scales, b.mul(i, scale_step)))
            new = _encoded(rounding, by_adding, number)
            old = v.load(code_place, code, code_size)
            v.store(new, code_place)
            flipped = b.icmp_signed("!=", new, old)
            count(0, flipped)
            if update_bits:
                update_place = v.at(update_at, i, update_size)
                v.prefetch(update_place, _AHEAD, update_size, turns.shift)
                # As integers, so that it holds also where the processor takes subnormal numbers for 0.
                masked = b.and_(v.load(update_place, bits, update_size), v.splat(b.trunc(mask, bits)))
                updated = b.icmp_signed("!=", masked, v.all(bits, 0))
                count(1, updated)
                count(2, b.and_(updated, b.not_(flipped)))
            if more is not None:

                def under_old_scale(place: Any = place, index: Any = i) -> Any:
                    word = b.inttoptr(b.add(found_at, ir.Constant(_I64, 8 * OLD_SCALES_AT)), _I64.as_pointer())
                    old_scales = b.add(b.load(word), b.mul(index, scale_step))
                    return _encoded(rounding, by_adding, _number(v, weight_bits, place, scaling, old_scales))

                more.each(i, old, new, flipped, under_old_scale)
        if more is not None:
            more.end()
        for at, number in enumerate(found):
            pointer = b.inttoptr(b.add(found_at, ir.Constant(_I64, 8 * at)), _I64.as_pointer())
            b.store(b.add(b.load(pointer), b.load(number)), pointer)
        return context.get_dummy_value()

    @_intrinsic
    def advance(  # type: ignore[no-untyped-def]
        context, weight, update, codes, numel, scales, scale_step, mask, constants, found
    ):
        return _types.void(*[_ADDRESS] * 9), generate

    return advance


def make_largest(weight_bits: int, streams: int) -> Any:
    """Make the loop that finds the largest magnitude.

    Args:
        weight_bits: 32 for float32, 16 for bfloat16.
        streams: The number of places in memory that are read at once.

    Returns:
        ``largest(address, numel)``, which returns the bits of the largest magnitude. ``numel`` is a multiple of
        ``LANES_OF_LARGEST * streams``.
    """
    bits, size = ir.IntType(weight_bits), weight_bits // 8

    def generate(context: Any, b: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        address, numel = arguments
        v = Vectors(b, LANES_OF_LARGEST)
        found = [_tools.alloca_once_value(b, v.all(bits, 0)) for _ in range(streams)]
        each = b.udiv(numel, ir.Constant(_I64, streams))
        with v.loop(each) as (i, _):
            for stream, largest in enumerate(found):
                place = v.at(v.at(address, b.mul(each, ir.Constant(_I64, stream)), size), i, size)
                if streams > 1:
                    v.prefetch(place, _AHEAD_LARGEST, size)
                b.store(v.larger(b.load(largest), v.magnitude(place, bits)), largest)
        value = b.load(found[0])
        for other in found[1:]:
            value = v.larger(value, b.load(other))
        return b.zext(v.largest_lane(value), _I64)

    @_intrinsic
    def largest(context, address, numel):  # type: ignore[no-untyped-def]
        return _types.int64(_ADDRESS, _ADDRESS), generate

    return largest


def make_largest_of_blocks(weight_bits: int) -> Any:
    """Make the loop that finds the largest magnitude of each small group, ``LANES_OF_LARGEST`` groups at a time.

    Returns:
        ``largest(address, groups, group, into)``, which writes the magnitudes of ``groups`` groups of ``group`` weights
        to the address ``into``, as bits of float32. Both numbers are multiples of ``LANES_OF_LARGEST``.
    """
    bits, size = ir.IntType(weight_bits), weight_bits // 8

    def generate(context: Any, b: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        address, groups, group, into = arguments
        v = Vectors(b, LANES_OF_LARGEST)
        found = [_tools.alloca_once_value(b, v.all(bits, 0)) for _ in range(LANES_OF_LARGEST)]
        with v.loop(groups) as (first, _):
            for largest in found:
                b.store(v.all(bits, 0), largest)
            block = v.at(address, b.mul(first, group), size)
            with v.loop(group) as (i, _):
                for at, largest in enumerate(found):
                    place = v.at(v.at(block, b.mul(group, ir.Constant(_I64, at)), size), i, size)
                    v.prefetch(place, _AHEAD, size)
                    b.store(v.larger(b.load(largest), v.magnitude(place, bits)), largest)
            vectors = [b.load(largest) for largest in found]
            # Halve the number of vectors until each group is left with one lane.
            while len(vectors) > 1:
                vectors = [v.larger_neighbors(*vectors[at : at + 2]) for at in range(0, len(vectors), 2)]
            result = vectors[0]
            if weight_bits < 32:
                result = b.shl(b.zext(result, v.type(_I32)), v.all(_I32, 32 - weight_bits))
            v.store(result, v.at(into, first, 4))
        return context.get_dummy_value()

    @_intrinsic
    def largest(context, address, groups, group, into):  # type: ignore[no-untyped-def]
        return _types.void(*[_ADDRESS] * 4), generate

    return largest


def make_keep(code_bits: int) -> Any:
    """Make the loop that replaces kept codes with new ones.

    Returns:
        ``keep(codes, new, numel)``, which returns how many codes differed. ``codes`` and ``new`` are addresses of
        ``numel`` codes, a multiple of ``STREAMS_OF_KEEP`` vectors; ``codes`` are overwritten.
    """
    code, size = ir.IntType(code_bits), code_bits // 8
    lanes = BYTES_OF_KEEP // size

    def generate(context: Any, b: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        codes_at, new_at, numel = arguments
        v = Vectors(b, lanes)
        found = _tools.alloca_once_value(b, ir.Constant(_I64, 0))
        each = b.udiv(numel, ir.Constant(_I64, STREAMS_OF_KEEP))
        with v.loop(each) as (i, _):
            for stream in range(STREAMS_OF_KEEP):
                at = b.add(b.mul(each, ir.Constant(_I64, stream)), i)
                place, new_place = v.at(codes_at, at, size), v.at(new_at, at, size)
                v.prefetch(place, _AHEAD, size)
                v.prefetch(new_place, _AHEAD, size)
                new = v.load(new_place, code, size)
                differs = b.bitcast(b.icmp_signed("!=", new, v.load(place, code, size)), ir.IntType(lanes))
                # Cache lines that are not written need not be written back to memory.
                with b.if_then(b.icmp_unsigned("!=", differs, ir.Constant(differs.type, 0))):
                    v.store(new, place)
                number = b.ctpop(differs)
                b.store(b.add(b.load(found), number if lanes == 64 else b.zext(number, _I64)), found)
        return b.load(found)

    @_intrinsic
    def keep(context, codes, new, numel):  # type: ignore[no-untyped-def]
        return _types.int64(*[_ADDRESS] * 3), generate

    return keep


def make_tally(weight_bits: int, code_bits: int, *, by_table: bool) -> Any:
    """The loop that adds what sampled weights moved, and keeps them for the next step.

    Returns:
        ``tally(new, new_codes, old, old_codes, numel, ways, cells, moved, quantized_moved, sums)``: addresses of
        ``numel`` weights and codes, a multiple of ``LANES_OF_SAMPLES``, after the step and before it, which are
        overwritten; of how far each quantized weight moved, and of the widths of the old cells, float64; of the sums of
        each weight; and of four vectors of sums, in the order of :class:`weightflip.kernels.sampled.Sample`. By table,
        for codes of one byte, ``ways`` is instead the address of three rows with a float64 for each code, from the
        smallest on: the values before and after the step, and the widths of the old cells; ``cells`` is unused.
    """
    code, weight_size, code_size = ir.IntType(code_bits), weight_bits // 8, code_bits // 8

    def generate(context: Any, b: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        new_at, new_codes_at, old_at, old_codes_at, numel, ways, cells, moved_at, quantized_at, sums_at = arguments
        v = Vectors(b, LANES_OF_SAMPLES)
        zero, one = v.all(_F64, 0.0), v.all(_F64, 1.0)
        places = [b.add(sums_at, ir.Constant(_I64, 8 * LANES_OF_SAMPLES * at)) for at in range(4)]
        sums = [_tools.alloca_once_value(b, v.load(place, _F64, 8)) for place in places]

        def magnitude(x: Any) -> Any:
            bits = b.and_(b.bitcast(x, v.type(_I64)), v.all(_I64, (1 << 63) - 1))
            return b.bitcast(bits, v.type(_F64))

        def weights(address: Any) -> Any:
            return b.fpext(_number(v, weight_bits, address, PLAIN, None), v.type(_F64))

        def found_in_table(row: int, codes: Any) -> Any:
            of_zero = b.add(ways, ir.Constant(_I64, 8 * ((row << code_bits) + (1 << (code_bits - 1)))))
            addresses = b.add(v.splat(of_zero), b.shl(b.sext(codes, v.type(_I64)), v.all(_I64, 3)))
            pointers = ir.VectorType(_F64.as_pointer(), v.lanes)
            signature = ir.FunctionType(v.type(_F64), [pointers, _I32, v.type(_I1), v.type(_F64)])
            name = f"llvm.masked.gather.v{v.lanes}f64.v{v.lanes}p0"
            function = _tools.get_or_insert_function(b.module, signature, name)
            return b.call(function, [b.inttoptr(addresses, pointers), ir.Constant(_I32, 8), v.all(_I1, 1), zero])

        with v.loop(numel) as (i, _):
            place, old_place = v.at(new_at, i, weight_size), v.at(old_at, i, weight_size)
            code_place, old_code_place = v.at(new_codes_at, i, code_size), v.at(old_codes_at, i, code_size)
            v.prefetch(place, _AHEAD, weight_size)
            v.prefetch(old_place, _AHEAD, weight_size)
            for address in (moved_at, quantized_at):
                v.prefetch(v.at(address, i, 8), _AHEAD, 8)
            way = magnitude(b.fsub(weights(place), weights(old_place)))
            codes, old_codes = v.load(code_place, code, code_size), v.load(old_code_place, code, code_size)
            if by_table:
                quantized_way = magnitude(b.fsub(found_in_table(1, codes), found_in_table(0, old_codes)))
                cell = found_in_table(2, old_codes)
            else:
                quantized_way, cell = (v.load(v.at(address, i, 8), _F64, 8) for address in (ways, cells))
            # NaN and infinities count as not moved. Times 0, they are NaN.
            is_finite = b.fcmp_ordered("==", b.fadd(b.fmul(way, zero), b.fmul(quantized_way, zero)), zero)
            way, quantized_way = (b.select(is_finite, x, zero) for x in (way, quantized_way))
            differs = b.icmp_signed("!=", codes, old_codes)
            share = b.fdiv(way, cell)
            # NaN counts as 0.
            at_least = b.select(b.fcmp_ordered(">=", share, one), one, zero)
            share = b.select(b.fcmp_ordered("<", share, one), share, at_least)
            flips = b.select(b.and_(differs, is_finite), one, zero)
            for total, value in zip(sums, (quantized_way, way, flips, share), strict=True):
                b.store(b.fadd(b.load(total), value), total)
            for address, value in ((moved_at, way), (quantized_at, quantized_way)):
                into = v.at(address, i, 8)
                v.store(b.fadd(v.load(into, _F64, 8), value), into)
            bits = ir.IntType(weight_bits)
            v.store(v.load(place, bits, weight_size), old_place)
            v.store(codes, old_code_place)
        for place, total in zip(places, sums, strict=True):
            v.store(b.load(total), place)
        return context.get_dummy_value()

    @_intrinsic
    def tally(  # type: ignore[no-untyped-def]
        context, new, new_codes, old, old_codes, numel, ways, cells, moved, quantized_moved, sums
    ):
        return _types.void(*[_ADDRESS] * 10), generate

    return tally
