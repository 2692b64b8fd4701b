"""Changes between two checkpoints: what they are, and files of them that can be applied.

Unlike the tracker, which warns and lets the training go on, this raises and has then written nothing.
"""

from __future__ import annotations

from weightflip.delta.apply import apply
from weightflip.delta.compare import Diff, Seen, TensorDiff
from weightflip.delta.diff import diff
from weightflip.delta.errors import DeltaError

__all__ = ["DeltaError", "Diff", "Seen", "TensorDiff", "apply", "diff"]
