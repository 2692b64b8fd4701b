"""The registry of quantizer names. The first lookup imports every module of this package."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from weightflip import modules
from weightflip.quantizers.protocol import ElementwiseQuantizer

Factory: TypeAlias = Callable[[str, tuple[str, ...]], ElementwiseQuantizer]


@dataclass(frozen=True)
class _Entry:
    pattern: re.Pattern[str]
    examples: tuple[str, ...]
    factory: Factory


_registry: list[_Entry] = []


def register(pattern: str, *, examples: tuple[str, ...]) -> Callable[[Factory], Factory]:
    """Make a quantizer available by name.

    Args:
        pattern: Regular expression for the full name without its ``:options``.
        examples: Names to show in error messages and docs, such as ``("e3m4",)``.

    Returns:
        A decorator for ``factory(name, options)``. The factory raises ValueError for an unknown option.
    """

    def add(factory: Factory) -> Factory:
        _registry.append(_Entry(re.compile(pattern), examples, factory))
        return factory

    return add


def make_quantizer(family: str, options: tuple[str, ...]) -> ElementwiseQuantizer | None:
    """Make the quantizer of a registered name; None if the name is not registered.

    Args:
        family: The name without its options.
        options: The options.

    Raises:
        ValueError: The family does not have such an option.
    """
    modules.import_all(__package__)
    for entry in _registry:
        if entry.pattern.fullmatch(family):
            return entry.factory(family, options)
    return None


def quantizer_names() -> list[str]:
    """Return example names of every registered family.

    Example:
        >>> "float8_e4m3" in quantizer_names()
        True
    """
    modules.import_all(__package__)
    return sorted(example for entry in _registry for example in entry.examples)
