"""How a quantizer gets a name: every module of this folder is imported when the first one is looked up."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

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
        pattern: Regular expression that the name without its ``:options`` matches in full.
        examples: Names that error messages and docs show, such as ``("e3m4",)``.

    Returns:
        A decorator for ``factory(name, options)``; the factory raises ValueError for an option that it does not know.
    """

    def add(factory: Factory) -> Factory:
        _registry.append(_Entry(re.compile(pattern), examples, factory))
        return factory

    return add


def _load_rooms() -> None:
    package = importlib.import_module(__package__ or "")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def make(family: str, options: tuple[str, ...]) -> ElementwiseQuantizer | None:
    """The quantizer of a registered name without its options; None where none is called so.

    Raises:
        ValueError: An option that the family does not know.
    """
    _load_rooms()
    for entry in _registry:
        if entry.pattern.fullmatch(family):
            return entry.factory(family, options)
    return None


def quantizer_names() -> list[str]:
    """Example names of every registered family.

    Example:
        >>> "float8_e4m3" in quantizer_names()
        True
    """
    _load_rooms()
    return sorted(example for entry in _registry for example in entry.examples)
