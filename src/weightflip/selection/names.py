"""What parameters are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

# Put into names by torch.compile, activation checkpointing and FSDP1; not what people call their layers.
_WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def name_parameters(
    param_groups: Iterable[Mapping[str, Any]], model: nn.Module | None, earlier: Sequence[Sequence[str]] = ()
) -> dict[str, Tensor]:
    """Name to parameter, for each parameter of the groups, once.

    Names come from the model; else from the groups' ``param_names``; else from what was at this place before
    (``earlier``, a list a group); else from the place, as ``group0.param3``. A parameter that the model holds under
    several names (tied weights) has the first. A partition of ZeRO-3, which takes the place of a group, is called after
    the first and the last parameter in it, as ``group0.partition0_3``.
    """
    of_model = _model_names(model) if model is not None else {}
    names: dict[int, str] = {}
    result: dict[str, Tensor] = {}
    for i, group in enumerate(param_groups):
        given = group.get("param_names") or (earlier[i] if i < len(earlier) else ())
        for j, parameter in enumerate(group["params"]):
            if id(parameter) in names:
                continue
            name = of_model.get(id(parameter)) or (given[j] if j < len(given) else f"group{i}.param{j}")
            if is_partition(parameter):
                name = f"group{i}.partition{parameter.ds_id}"
            if name in result:
                name = f"group{i}.param{j}"
            names[id(parameter)] = name
            result[name] = parameter
    return result


def _model_names(model: nn.Module) -> dict[int, str]:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        for prefix in _WRAPPER_PREFIXES:
            name = name.replace(prefix, "")
        names.setdefault(id(parameter), name)
    return names


def is_partition(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 made it of parameters, whose own ``ds_id`` are numbers."""
    return isinstance(getattr(parameter, "ds_id", None), str)
