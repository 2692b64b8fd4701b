"""Import all modules of a package, because those that its users add fill a registry."""

from __future__ import annotations

import functools
import importlib
import pkgutil


def import_all(package: str) -> None:
    """Import all modules of a package, also those in directories that were added to its ``__path__``.

    Args:
        package: Its full name.
    """
    _import_below(package, tuple(importlib.import_module(package).__path__))


@functools.cache
def _import_below(package: str, directories: tuple[str, ...]) -> None:
    for module in pkgutil.iter_modules(directories):
        importlib.import_module(f"{package}.{module.name}")
