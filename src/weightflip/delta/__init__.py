"""Changes between two checkpoints: comparison, and delta files that can be applied.

Unlike the tracker, which warns and lets training continue, this package raises, and then has written nothing.
"""

from __future__ import annotations

from weightflip.delta.apply import apply
from weightflip.delta.compare import Diff, FormatDiff, TensorDiff
from weightflip.delta.diff import diff
from weightflip.delta.errors import DeltaError

__all__ = ["DeltaError", "Diff", "FormatDiff", "TensorDiff", "apply", "diff"]
