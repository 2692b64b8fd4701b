"""Errors of checkpoints and deltas, and imports of optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


class DeltaError(Exception):
    """An error that the user can fix. Nothing has been written."""


def extra(package: str, purpose: str) -> ModuleType:
    """Import a package of the extra ``delta`` when it is first needed.

    Args:
        package: Name of the package.
        purpose: What needs it, as the subject of a sentence.

    Raises:
        DeltaError: The package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DeltaError(
            f"{purpose} needs the package {package}: pip install 'weightflip[delta]' (or pip install {package})"
        ) from error
