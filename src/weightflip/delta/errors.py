"""What goes wrong with checkpoints and deltas, and packages that may be missing."""

from __future__ import annotations

import importlib
from types import ModuleType


class DeltaError(Exception):
    """What a person can put right. Nothing has been written."""


def extra(package: str, purpose: str) -> ModuleType:
    """Import a package of the extra ``delta``, where it is first needed.

    Args:
        package: What to import.
        purpose: What needs it, as the subject of a sentence.

    Raises:
        DeltaError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DeltaError(
            f"{purpose} needs the package {package}: pip install 'weightflip[delta]' (or pip install {package})"
        ) from error
