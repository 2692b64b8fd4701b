"""Expressions for the work of metric groups on each weight. Kernels compile them into the pass that counts flips."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Operand: TypeAlias = "Expression | int | float"


@dataclass(frozen=True)
class Expression:
    """A number or a flag of one weight.

    ``<``, ``>``, :func:`differ`, ``&``, ``|``, ``^``, ``~``, ``+``, ``-``, ``*`` and :func:`where` make new ones.
    A plain number takes the dtype of the other operand. Two operands have the same dtype.
    """

    operation: str
    operands: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        # Cached, because batches of many weights use expressions as keys.
        object.__setattr__(self, "_hash", hash((self.operation, self.operands)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        # Hashes differ between processes.
        return Expression, (self.operation, self.operands)

    def __lt__(self, other: Operand) -> Expression:
        return Expression("<", (self, other))

    def __gt__(self, other: Operand) -> Expression:
        return Expression(">", (self, other))

    def __and__(self, other: Operand) -> Expression:
        return Expression("&", (self, other))

    def __or__(self, other: Operand) -> Expression:
        return Expression("|", (self, other))

    def __xor__(self, other: Operand) -> Expression:
        return Expression("^", (self, other))

    def __invert__(self) -> Expression:
        return Expression("~", (self,))

    def __add__(self, other: Operand) -> Expression:
        return Expression("+", (self, other))

    def __sub__(self, other: Operand) -> Expression:
        return Expression("-", (self, other))

    def __mul__(self, other: Operand) -> Expression:
        return Expression("*", (self, other))

    def __bool__(self) -> bool:
        raise TypeError("an expression has no truth value; use & and | for `and` and `or`, where() for `if`")


OLD, NEW = Expression("old"), Expression("new")
"""The ordinals before and after the step, in the dtype of the codes."""

NEW_UNDER_OLD_SCALE = Expression("new_under_old_scale")
"""The ordinal of the weight after the step under the scale from before it."""


def state(name: str, dtype: torch.dtype | None = None) -> Expression:
    """Return the per-weight state before the step: an element of a tensor.

    Args:
        name: The name of the attribute that holds the tensor.
        dtype: The dtype of the tensor, an integer or float32; None for that of the codes.
    """
    return Expression("state", (name, dtype))


def bit(name: str) -> Expression:
    """Return the per-weight flag before the step. The tensor has one bit per weight: :mod:`weightflip.kernels.bits`.

    Args:
        name: The name of the attribute that holds the tensor. Weights have the order of contiguous codes.
    """
    return Expression("state", (name, torch.bool))


def bits_of_state(state: Expression, codes: torch.dtype) -> int:
    """Return the number of bits per weight that a state takes, with codes of this dtype."""
    dtype: torch.dtype = state.operands[1] or codes
    return 1 if dtype is torch.bool else 8 * dtype.itemsize


def differ(one: Expression, other: Operand) -> Expression:
    """Return a flag that is set if two numbers differ."""
    return Expression("!=", (one, other))


def where(flag: Expression, one: Operand, other: Operand) -> Expression:
    """Return ``one`` if the flag is set, otherwise ``other``. At least one of them must be an expression."""
    return Expression("where", (flag, one, other))


class Pointwise(NamedTuple):
    """The work of a group on each weight.

    Attributes:
        counts: One flag per ratio of the group. The numerator is the number of flips with that flag, the denominator
            the number of all flips. Empty if the group does not count its ratios in steps.
        states: Results of :func:`state` or :func:`bit`, and their new values.
    """

    counts: tuple[Expression, ...] = ()
    states: tuple[tuple[Expression, Expression], ...] = ()


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "<": operator.lt,
    ">": operator.gt,
    "!=": operator.ne,
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
    "~": operator.invert,
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "where": torch.where,
}


def evaluate(expression: Operand, leaves: Mapping[Expression, Tensor]) -> Any:
    """Evaluate an expression in plain torch, for many weights at once. The compiled form must give the same results.

    Args:
        expression: The expression.
        leaves: The values of ``OLD``, ``NEW``, ``NEW_UNDER_OLD_SCALE`` and each state.
    """
    if not isinstance(expression, Expression):
        return expression
    if expression in leaves:
        return leaves[expression]
    return _OPERATIONS[expression.operation](*(evaluate(operand, leaves) for operand in expression.operands))
