"""Names of parameters."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

# Added to names by torch.compile, activation checkpointing, FSDP1 and Fabric; not part of the user's names.
_WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_forward_module.")
# These hold the model as ``module``, a name that users may also give to a layer.
_DATA_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_POSITIONAL_NAME = re.compile(r"group\d+\.param\d+")


def name_parameters(
    param_groups: Sequence[Mapping[str, Any]], model: nn.Module | None, earlier: Sequence[Sequence[str]] = ()
) -> dict[str, Tensor]:
    """Map a unique name to each parameter of the param groups.

    The name comes from the first of these that has one: the model; the param group's ``param_names``; the names used
    earlier at the same position (``earlier``, one list per param group); the position itself, as in ``group0.param3``.
    A tied weight, which the model holds under several names, gets the first. A ZeRO-3 partition, which replaces a
    param group, is named after its first and last parameter, as in ``group0.partition0_3``. Prefixes that wrappers
    such as DDP add are removed.
    """
    model_names = _model_names(model) if model is not None else {}
    group_names = _group_names(param_groups)
    names: dict[int, str] = {}
    result: dict[str, Tensor] = {}
    for i, group in enumerate(param_groups):
        fallbacks = group_names[i] or (earlier[i] if i < len(earlier) else ())
        for j, parameter in enumerate(group["params"]):
            if id(parameter) in names:
                continue
            name = model_names.get(id(parameter)) or (fallbacks[j] if j < len(fallbacks) else f"group{i}.param{j}")
            if is_partition(parameter):
                name = f"group{i}.partition{parameter.ds_id}"
            if name in result:
                name = f"group{i}.param{j}"
            names[id(parameter)] = name
            result[name] = parameter
    return result


def is_positional(name: str) -> bool:
    """Whether a name is a position in the param groups, for lack of a better one."""
    return _POSITIONAL_NAME.fullmatch(name) is not None


def _model_names(model: nn.Module) -> dict[int, str]:
    wrapped = {f"{path}.module".lstrip(".") for path, part in model.named_modules() if isinstance(part, _DATA_PARALLEL)}
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names.setdefault(id(parameter), _strip_wrappers(name, wrapped))
    return names


def _strip_wrappers(name: str, wrapped: Container[str]) -> str:
    """Remove what wrappers add to the name of a parameter.

    Args:
        name: The name of a parameter.
        wrapped: Paths of the modules that a wrapper holds as ``module``.
    """
    parts = name.split(".")
    name = ".".join(part for i, part in enumerate(parts, 1) if ".".join(parts[:i]) not in wrapped)
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def _group_names(param_groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return each group's ``param_names``. If all of them begin with ``module.``, the prefix is taken for DDP's."""
    groups = [[_strip_wrappers(name, ()) for name in group.get("param_names") or ()] for group in param_groups]
    if all(name.startswith("module.") for names in groups for name in names):
        return [[name.removeprefix("module.") for name in names] for names in groups]
    return groups


def is_partition(parameter: Any) -> bool:
    """Whether this is a DeepSpeed ZeRO-3 partition: its ``ds_id`` is text, that of a parameter a number."""
    return isinstance(getattr(parameter, "ds_id", None), str)
