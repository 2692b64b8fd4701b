"""Flat parameters and shards of them (FSDP1, DeepSpeed ZeRO-3), which have no rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from weightflip.quantizers import ElementwiseQuantizer, Quantizer
from weightflip.quantizers.adapt import adapt, quantizer_name
from weightflip.selection.names import is_partition
from weightflip.selection.rules import Skip, elsewhere
from weightflip.selection.trial import try_on, why_not

FLAT_NOTE = (
    "Flat parameters and shards (FSDP1, DeepSpeed ZeRO-3) have no rows or channels: per-tensor formats only, since a "
    "scale for each row, group or block would be one of wrong neighbours. A scale serves all layers that are in the "
    "tensor, and is that of this process's part alone"
)


def flattened(parameters: Iterable[Tensor], model: nn.Module | None) -> dict[int, int]:
    """How many dimensions the parameters had that have no rows any more, by id; 2 where several are in one."""
    found = {}
    for parameter in cast(Iterable[Any], parameters):
        if getattr(parameter, "_is_flat_param", False) or is_partition(parameter):
            found[id(parameter)] = 2
        elif hasattr(parameter, "ds_shape"):
            # ZeRO-3 leaves an empty tensor in the model.
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
    """What is known of a flat parameter before its data: on each rank the same.

    Raises:
        Skip: A format asked for by name does not fit; or there is no data here.
    """
    check_formats_of_flat(parameter, named, named=True)
    if parameter.numel() == 0:
        raise elsewhere(
            "ZeRO-3 keeps it in partitions, which are tracked once DeepSpeed gives them to the optimizer"
            if hasattr(parameter, "ds_shape")
            else "none of it is on this rank"
        )


def check_formats_of_flat(parameter: Tensor, quantizers: Iterable[Quantizer], *, named: bool) -> None:
    """Only formats without rows, groups and blocks fit a flat parameter.

    Raises:
        Skip: One does not fit.
    """
    for quantizer in quantizers:
        if not _has_at_most_one_scale(quantizer, parameter, otherwise=named):
            raise Skip(
                f"it is a flat parameter or a shard of one, without rows or channels, and {quantizer_name(quantizer)} "
                "has a scale for each row, group or block; name a format with at most one scale a tensor, such as "
                "'float8_e4m3', 'e3m4' or 'bfloat16'",
                misfit=named,
            )


def _has_at_most_one_scale(quantizer: Quantizer, weight: Tensor, *, otherwise: bool) -> bool:
    """Whether all weights share what scale there is; ``otherwise`` where only the quantizer itself could know."""
    quantizer = adapt(quantizer).encoder
    if not isinstance(quantizer, ElementwiseQuantizer):
        return otherwise
    if quantizer.group is not None:
        return False
    try:
        # Of a single row, a scale a row and a scale a tensor look alike.
        scale = try_on(quantizer, torch.ones(2, 2, dtype=weight.dtype, device=weight.device))
    except ValueError:
        # A scale of the user's own, for weights of another shape.
        return False
    except Exception as error:
        raise Skip(why_not(quantizer, weight, error), misfit=otherwise) from None
    return scale is None or scale.numel() == 1
