"""What a metric group does with each weight, as data: kernels compile it into the pass that counts flips."""

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
"""The ordinal before the step, and after it; of the dtype of the codes."""

NEW_UNDER_OLD_SCALE = Expression("new_under_old_scale")
"""The ordinal that the weight after the step has under the scale of before it."""


def state(name: str, dtype: torch.dtype | None = None) -> Expression:
    """What is kept of the weight: an element of a tensor, as it was before the step.

    Args:
        name: Of the attribute that holds the tensor.
        dtype: Of the tensor: an integer or float32; None for that of the codes.
    """
    return Expression("state", (name, dtype))


def differ(one: Expression, other: Operand) -> Expression:
    """Whether two numbers differ."""
    return Expression("!=", (one, other))


def where(flag: Expression, one: Operand, other: Operand) -> Expression:
    """``one`` if the flag is set, else ``other``. At least one of them is an expression."""
    return Expression("where", (flag, one, other))


class Pointwise(NamedTuple):
    """What a group does with each weight by itself.

    Attributes:
        counts: A flag for each of the group's ratios: the flips that have it are the numerator, all flips the
            denominator.
        states: What :func:`state` names, and its new value.
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
    """An expression in plain torch: what the compiled form has to equal.

    Args:
        expression: Of many weights at once.
        leaves: What ``OLD``, ``NEW``, ``NEW_UNDER_OLD_SCALE`` and each state are.
    """
    if not isinstance(expression, Expression):
        return expression
    if expression in leaves:
        return leaves[expression]
    return _OPERATIONS[expression.operation](*(evaluate(operand, leaves) for operand in expression.operands))
