"""Count NaN and infinite weights at logging points."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from weightflip import functional, kernels
from weightflip.counting.layer import Layer
from weightflip.counting.ledger import NONFINITE
from weightflip.counting.table import LayerTable

# The dtypes that torch.aminmax takes.
_ORDERED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def count_nonfinite(layers: Iterable[Layer], table: LayerTable, scratch: kernels.ScratchPool) -> None:
    """Write the number of NaN and infinite weights of each layer whose weight is held into its row."""
    for layer in layers:
        if layer.tracked is None or not layer.tracked.is_held:
            continue
        try:
            assert layer.row is not None
            weight, count = layer.tracked.plain(), layer.row.total[NONFINITE]
            if _is_finite(weight):
                count.zero_()
            else:
                functional.count_nonfinite(weight, count, scratch)
        except Exception as error:
            table.fail(layer.name, error)


def _is_finite(weight: Tensor) -> bool:
    """Whether a weight is known to be finite, in one fast pass. Only on the CPU, since a device would synchronize."""
    if weight.device.type != "cpu" or weight.dtype not in _ORDERED or not weight.numel():
        return False
    # Both are NaN if any is.
    lowest, highest = torch.aminmax(weight)
    return math.isfinite(lowest.item()) and math.isfinite(highest.item())
