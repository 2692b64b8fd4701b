"""Translate the expressions of metric groups into LLVM vector instructions. Imported only if Numba is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils

from weightflip.kernels.pointwise import NEW, NEW_UNDER_OLD_SCALE, OLD, Expression, Pointwise
from weightflip.kernels.vectors import COUNTS_AT, STATES_AT, Vectors

_tools: Any = cgutils
_I64, _FLAG = ir.IntType(64), ir.IntType(1)
_TYPES = {torch.int8: ir.IntType(8), torch.int16: ir.IntType(16), torch.int32: ir.IntType(32)}
_TYPES[torch.float32] = ir.FloatType()


class Observing:
    """Generates the instructions of metric groups in the loop that counts.

    Args:
        vectors: The vector operations of the loop.
        found_at: Address of the counts and arguments of the loop; see :mod:`weightflip.kernels.vectors`.
        groups: The expressions of each group.
        code: LLVM type of an ordinal.
    """

    def __init__(self, vectors: Vectors, found_at: Any, groups: Sequence[Pointwise], code: Any) -> None:
        self._v, self._found_at, self._groups, self._code = vectors, found_at, groups, code
        states = [state for group in groups for state, _ in group.states]
        self._addresses = {state: self._load_word(STATES_AT + at) for at, state in enumerate(states)}
        numbers = [flag for group in groups for flag in group.counts]
        self._counts = [_tools.alloca_once_value(vectors.b, ir.Constant(_I64, 0)) for _ in numbers]

    def _word(self, at: int) -> Any:
        b = self._v.b
        return b.inttoptr(b.add(self._found_at, ir.Constant(_I64, 8 * at)), _I64.as_pointer())

    def _load_word(self, at: int) -> Any:
        return self._v.b.load(self._word(at))

    def each(self, index: Any, old: Any, new: Any, flipped: Any, under_old_scale: Callable[[], Any]) -> None:
        """Generate the counts and new states of the groups for ``LANES`` weights.

        Args:
            index: Index of the first weight.
            old: Ordinals before the step.
            new: Ordinals after it.
            flipped: Mask of the ordinals that differ.
            under_old_scale: Generates the ordinals of the weights under the old scale.
        """
        b, v = self._v.b, self._v
        values: dict[Expression, Any] = {OLD: old, NEW: new}
        places = {}
        for state, address in self._addresses.items():
            if state.operands[1] is torch.bool:
                places[state] = b.add(address, b.lshr(index, ir.Constant(_I64, 3)))
                word = b.load(b.inttoptr(places[state], v.word.as_pointer()), align=1)
                values[state] = b.bitcast(word, v.type(_FLAG))
                continue
            of = _TYPES[state.operands[1]] if state.operands[1] is not None else self._code
            places[state] = v.at(address, index, of.width // 8 if isinstance(of, ir.IntType) else 4)
            values[state] = v.load(places[state], of, 1)
        lowered = _Lowered(v, values, under_old_scale)
        at = 0
        for group in self._groups:
            for flag in group.counts:
                bits = b.bitcast(b.and_(lowered[flag], flipped), v.word)
                b.store(b.add(b.load(self._counts[at]), b.zext(b.ctpop(bits), _I64)), self._counts[at])
                at += 1
        new_states = [(places[state], lowered[value], values[state]) for g in self._groups for state, value in g.states]
        for place, value, before in new_states:
            if value.type != before.type:
                raise TypeError(f"a state of type {before.type} becomes {value.type}")
            v.store(b.bitcast(value, v.word) if value.type.element == _FLAG else value, place)

    def end(self) -> None:
        """Add the counts to those in memory."""
        b = self._v.b
        for at, count in enumerate(self._counts):
            word = self._word(COUNTS_AT + at)
            b.store(b.add(b.load(word), b.load(count)), word)


class _Lowered:
    """Evaluates expressions as vectors. Each subexpression is computed once."""

    def __init__(self, vectors: Vectors, values: dict[Expression, Any], under_old_scale: Callable[[], Any]) -> None:
        self._v, self._values, self._under_old_scale = vectors, values, under_old_scale

    def __getitem__(self, expression: Expression) -> Any:
        value = self._values.get(expression)
        if value is None:
            value = self._values[expression] = self._lower(expression)
        return value

    def _lower(self, expression: Expression) -> Any:
        if expression == NEW_UNDER_OLD_SCALE:
            return self._under_old_scale()
        b, operation = self._v.b, expression.operation
        if operation == "where":
            flag, *rest = expression.operands
            return b.select(self[flag], *self._alike(rest))
        operands = self._alike(expression.operands)
        element = operands[0].type.element
        if operation == "~":
            return b.not_(*operands)
        if operation in ("<", ">", "!="):
            if isinstance(element, ir.FloatType):
                return (b.fcmp_unordered if operation == "!=" else b.fcmp_ordered)(operation, *operands)
            return b.icmp_signed(operation, *operands)
        whole = {"&": b.and_, "|": b.or_, "^": b.xor, "+": b.add, "-": b.sub, "*": b.mul}
        if isinstance(element, ir.FloatType):
            whole = {"+": b.fadd, "-": b.fsub, "*": b.fmul}
        elif element == _FLAG:
            whole = {operation: whole[operation] for operation in "&|^"}
        return whole[operation](*operands)

    def _alike(self, operands: Sequence[Any]) -> list[Any]:
        """Return operands as vectors. Plain numbers become constants of the other operands' type."""
        found = [self[operand] if isinstance(operand, Expression) else None for operand in operands]
        types = {str(value.type): value.type for value in found if value is not None}
        if len(types) != 1:
            raise TypeError(f"operands of one type are expected, got {sorted(types) or 'plain numbers only'}")
        (vector,) = types.values()
        return [
            ir.Constant(vector, [operand] * self._v.lanes) if value is None else value
            for operand, value in zip(operands, found, strict=True)
        ]
