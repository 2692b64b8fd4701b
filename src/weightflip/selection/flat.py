"""Flat parameters and their shards (FSDP1, DeepSpeed ZeRO-3), which have no rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from weightflip.quantizers import ElementwiseQuantizer, Quantizer
from weightflip.quantizers.adapt import adapt, quantizer_name
from weightflip.selection.names import is_partition
from weightflip.selection.rules import Skip, expected_skip
from weightflip.selection.trial import trial_failure_message, try_quantizer

FLAT_NOTE = (
    "Flat parameters and their shards (FSDP1, DeepSpeed ZeRO-3) have no rows or channels. Only per-tensor formats fit: "
    "a scale per row, group or block would be shared by unrelated weights. One scale covers all layers in the tensor, "
    "and it is computed from this process's part alone"
)


def find_flattened(parameters: Iterable[Tensor], model: nn.Module | None) -> dict[int, int]:
    """Map the id of each flattened parameter to its original number of dimensions; 2 if it holds several."""
    found = {}
    for parameter in cast(Iterable[Any], parameters):
        if getattr(parameter, "_is_flat_param", False) or is_partition(parameter):
            found[id(parameter)] = 2
        elif hasattr(parameter, "ds_shape"):
            # ZeRO-3 leaves empty tensors in the model.
            found[id(parameter)] = len(parameter.ds_shape)
    for module in model.modules() if model is not None else ():
        # FSDP1 with use_orig_params=True: 1-dimensional pieces, cut anywhere, and empty on most ranks.
        handle = getattr(module, "_handle", None)
        if getattr(handle, "uses_sharded_strategy", False):
            flat = cast(Any, handle).flat_param
            for parameter, shape in zip(flat._params or (), flat._shapes, strict=False):
                found[id(parameter)] = len(shape)
    return found


def check_flat(parameter: Tensor, named: Sequence[Quantizer]) -> None:
    """Check what can be checked without the data of a flat parameter, with the same result on each rank.

    Raises:
        Skip: A format that the user named does not fit, or this rank has no data.
    """
    check_formats_for_flat(parameter, named, named=True)
    if parameter.numel() == 0:
        raise expected_skip(
            "ZeRO-3 keeps it in partitions, which are tracked once DeepSpeed passes them to the optimizer"
            if hasattr(parameter, "ds_shape")
            else "none of it is on this rank"
        )


def check_formats_for_flat(parameter: Tensor, quantizers: Iterable[Quantizer], *, named: bool) -> None:
    """Check that no quantizer has a scale per row, group or block, which a flat parameter does not have.

    Raises:
        Skip: A quantizer does not fit.
    """
    for quantizer in quantizers:
        if not _has_at_most_one_scale(quantizer, parameter, otherwise=named):
            raise Skip(
                f"it is a flat parameter or a shard of one, without rows or channels, but {quantizer_name(quantizer)} "
                "has one scale per row, group or block; name a format with at most one scale per tensor, such as "
                "'float8_e4m3', 'e3m4' or 'bfloat16'",
                is_mismatch=named,
            )


def _has_at_most_one_scale(quantizer: Quantizer, weight: Tensor, *, otherwise: bool) -> bool:
    """Whether the quantizer uses at most one scale per tensor; ``otherwise`` if that cannot be determined."""
    quantizer = adapt(quantizer).encoder
    if not isinstance(quantizer, ElementwiseQuantizer):
        return otherwise
    if quantizer.group is not None:
        return False
    try:
        # Two rows: with a single one, per-row and per-tensor scales look alike.
        scale = try_quantizer(quantizer, torch.ones(2, 2, dtype=weight.dtype, device=weight.device))
    except ValueError:
        # A user-defined scale for weights of another shape.
        return False
    except Exception as error:
        raise Skip(trial_failure_message(quantizer, weight, error), is_mismatch=otherwise) from None
    return scale is None or scale.numel() == 1
