"""What parameters are called."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

# Put into names by torch.compile, activation checkpointing, FSDP1 and Fabric; not what people call their layers.
_WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_forward_module.")
# Called ``module`` in them, as people may call a layer, too.
_DATA_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_BY_PLACE = re.compile(r"group\d+\.param\d+")


def name_parameters(
    param_groups: Sequence[Mapping[str, Any]], model: nn.Module | None, earlier: Sequence[Sequence[str]] = ()
) -> dict[str, Tensor]:
    """Name to parameter, for each parameter of the groups, once.

    Names come from the model; else from the groups' ``param_names``; else from what was at this place before
    (``earlier``, a list a group); else from the place, as ``group0.param3``. A parameter that the model holds under
    several names (tied weights) has the first. A partition of ZeRO-3, which takes the place of a group, is called after
    the first and the last parameter in it, as ``group0.partition0_3``. What wrappers such as DDP put into names is left
    out.
    """
    of_model = _model_names(model) if model is not None else {}
    of_groups = _group_names(param_groups)
    names: dict[int, str] = {}
    result: dict[str, Tensor] = {}
    for i, group in enumerate(param_groups):
        given = of_groups[i] or (earlier[i] if i < len(earlier) else ())
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


def is_by_place(name: str) -> bool:
    """Whether a parameter is called after its place, for want of a name."""
    return _BY_PLACE.fullmatch(name) is not None


def _model_names(model: nn.Module) -> dict[int, str]:
    inside = {f"{path}.module".lstrip(".") for path, part in model.named_modules() if isinstance(part, _DATA_PARALLEL)}
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names.setdefault(id(parameter), _without_wrappers(name, inside))
    return names


def _without_wrappers(name: str, inside: Container[str]) -> str:
    """A name without what wrappers put into it.

    Args:
        name: Of a parameter.
        inside: Paths of the modules in a wrapper that calls its own ``module``.
    """
    parts = name.split(".")
    name = ".".join(part for i, part in enumerate(parts, 1) if ".".join(parts[:i]) not in inside)
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def _group_names(param_groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The groups' ``param_names``; where all are inside of one module called ``module``, it is taken for DDP."""
    names = [[_without_wrappers(name, ()) for name in group.get("param_names") or ()] for group in param_groups]
    if all(name.startswith("module.") for of_group in names for name in of_group):
        return [[name.removeprefix("module.") for name in of_group] for of_group in names]
    return names


def is_partition(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 made it of parameters, whose own ``ds_id`` are numbers."""
    return isinstance(getattr(parameter, "ds_id", None), str)
