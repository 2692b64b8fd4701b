"""Which parameters are tracked, under which name, with which quantizer; and why the others are not."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from weightflip import distributed
from weightflip.checks import described, globs
from weightflip.quantizers import Codes, ElementwiseQuantizer, Quantizer, resolve, torchao
from weightflip.quantizers.adapt import adapt, quantizer_name
from weightflip.quantizers.protocol import fresh

logger = logging.getLogger("weightflip")

# Put into names by torch.compile, activation checkpointing and FSDP1; not what people call their layers.
_WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")

_ORDINALS = (torch.int8, torch.int16, torch.int32, torch.int64)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_STORED_CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)

_FLAT_NOTE = (
    "Flat parameters and shards (FSDP1, DeepSpeed ZeRO-3) have no rows or channels: per-tensor formats only, since a "
    "scale for each row, group or block would be one of wrong neighbours. A scale serves all layers that are in the "
    "tensor, and is that of this process's part alone"
)

_FLOAT32_DEFAULT = "float8_e4m3"
_DTYPE_DEFAULTS = {
    torch.float32: _FLOAT32_DEFAULT,
    torch.float64: _FLOAT32_DEFAULT,
    torch.bfloat16: "native",
    torch.float16: "native",
    torch.float8_e4m3fn: "native",
    torch.float8_e5m2: "native",
}


class Skip(Exception):
    """A parameter cannot be tracked; the message says why.

    Args:
        reason: For people.
        misfit: Whether the user asked for a format that the weight does not fit.
        unknown: A class of torchao's that weightflip should know and does not; said once in the log.
    """

    is_of_model = False
    """Whether it is the model that says so, which a copy of an optimizer cannot ask."""

    is_elsewhere = False
    """Whether other processes, or later steps, have the weights: no fault of the call."""

    def __init__(self, reason: str, *, misfit: bool = False, unknown: str | None = None) -> None:
        super().__init__(reason)
        self.misfit = misfit
        self.unknown = unknown


@dataclass(frozen=True)
class Plan:
    """What to do with each parameter of an optimizer.

    Attributes:
        tracked: Name to the quantizers it is seen through, one for most.
        listed: Names that a list of quantizers was given for, even if it came down to one.
        skipped: Name to the reason.
        skipped_by_model: Names of those whose reason comes from the model.
        notes: Sentences worth reading.
    """

    tracked: dict[str, tuple[Quantizer, ...]] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    skipped_by_model: set[str] = field(default_factory=set)
    notes: tuple[str, ...] = ()

    @property
    def nothing_to_track(self) -> str:
        """What there was instead, and why it is left out, if all of it is."""
        names_of: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            names_of.setdefault(reason, []).append(name)
        reasons = "; ".join(f"{_some(names)}: {reason}" for reason, names in names_of.items())
        return f"nothing to track among {len(self.skipped)} parameters ({reasons or 'there are none'})"


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
            if _is_partition(parameter):
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


def _is_partition(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 made it of parameters, whose own ``ds_id`` are numbers."""
    return isinstance(getattr(parameter, "ds_id", None), str)


def _flattened(parameters: Iterable[Tensor], model: nn.Module | None) -> dict[int, int]:
    """How many dimensions the parameters had that have no rows any more, by id; 2 where several are in one."""
    found = {}
    for parameter in cast(Iterable[Any], parameters):
        if getattr(parameter, "_is_flat_param", False) or _is_partition(parameter):
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


def make_plan(
    parameters: Mapping[str, Tensor],
    model: nn.Module | None,
    quantizer: Any = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    *,
    strict: bool = True,
    may_be_empty: bool = False,
    optimizer: Any = None,
    known: Mapping[str, tuple[Quantizer, ...] | str] | None = None,
) -> Plan:
    """Decide for each parameter whether it is tracked and with which quantizer.

    Args:
        parameters: Name to parameter.
        model: Where ``"auto"`` looks for the module that quantizes a weight; None leaves it the dtype alone.
        quantizer: ``"auto"``, a name, an object, a function, a list of these, or a mapping from globs over names to
            any of them, of which the first that matches counts.
        include: Globs over names; None for every floating-point weight that has two dimensions or more, or had them
            before it was made flat.
        exclude: Globs over names.
        strict: Whether a rule that leads nowhere is an error. While training goes on, a parameter that cannot be
            tracked any more is skipped with its reason instead.
        may_be_empty: Whether patterns that leave nothing to track are no error, even if ``strict``.
        optimizer: Where ``"auto"`` looks for an optimizer that quantizes the weights itself.
        known: Name to the quantizers, or the reason for none, that a model said which is not at hand any more.

    Returns:
        The plan.

    Raises:
        ValueError: An unknown quantizer. If ``strict``: a glob that matches nothing; a weight that does not fit the
            format named for it; a parameter that is included by its full name and cannot be tracked; patterns that
            leave nothing to track, now or later.
        TypeError: Something that is no quantizer.
    """
    rules = _rules(quantizer)
    include_globs, exclude_globs = globs("include", include), globs("exclude", exclude)
    if strict:
        _check_globs("quantizer", list(rules) if isinstance(quantizer, Mapping) else [], parameters)
        _check_globs("include", include_globs, parameters)
        _check_globs("exclude", exclude_globs, parameters)

    owners = _owners(model) if model is not None else {}
    by_optimizer = _of_optimizer(optimizer)
    flat = _flattened(parameters.values(), model)
    # Ranks have different shards of FSDP1, and must not come to different ends; ZeRO-3's partitions are yet to come.
    may_be_empty |= any(id(p) in flat and not getattr(p, "_is_flat_param", False) for p in parameters.values())
    is_strange = bool(parameters) and not any(id(parameter) in owners for parameter in parameters.values())
    if strict and model is not None and is_strange:
        raise ValueError(
            f"model= ({type(model).__name__}) holds none of the optimizer's {len(parameters)} parameters; pass the "
            "model whose parameters() the optimizer was built with, or none"
        )
    plan, noted, unknown = Plan(), dict[str, list[str]](), dict[str, None]()
    for name, parameter in parameters.items():
        try:
            _check_trackable(name, parameter, flat.get(id(parameter)), include_globs, exclude_globs)
            specs = _known(known[name]) if known and name in known else _specs_of(name, rules)
            if id(parameter) in flat:
                noted.setdefault(_FLAT_NOTE, []).append(name)
                _check_flat(parameter, [spec for spec in specs if spec != "auto"])
            chosen, notes = _choose(
                parameter, specs, owners.get(id(parameter)), by_optimizer.get(id(parameter)), strict=strict
            )
            if id(parameter) in flat:
                found = [quantizer for quantizer in chosen if not any(quantizer is spec for spec in specs)]
                _check_formats_of_flat(parameter, found, named=False)
        except Skip as reason:
            if strict and (reason.misfit or (name in include_globs and not reason.is_elsewhere)):
                raise ValueError(f"parameter {name!r} cannot be tracked as asked for: {reason}") from None
            plan.skipped[name] = str(reason)
            may_be_empty |= reason.is_elsewhere
            if reason.is_of_model:
                plan.skipped_by_model.add(name)
            if reason.unknown is not None:
                unknown[reason.unknown] = None
        else:
            plan.tracked[name] = chosen
            if len(specs) > 1:
                plan.listed.add(name)
            for note in notes:
                noted.setdefault(note, []).append(name)
    for cls in unknown if distributed.is_writer() else ():
        logger.warning("weightflip: torchao's %s is not known yet; its weights are not tracked", cls)
    # Without patterns of the user's, having nothing is no mistake: an optimizer of biases is a script that runs.
    has_patterns = bool(include_globs or exclude_globs) or isinstance(quantizer, Mapping)
    if strict and has_patterns and not plan.tracked and not may_be_empty:
        raise ValueError(
            f"{plan.nothing_to_track}; expected a floating-point weight with two dimensions that the patterns in "
            "include=, exclude= and quantizer= leave, or others that include= names"
        )
    return replace(plan, notes=tuple(f"{note} ({_some(names)})" for note, names in noted.items()))


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


def owner_types(parameters: Mapping[str, Tensor], model: nn.Module | None) -> dict[str, str]:
    """Name to the type of the module that holds the parameter, of those that the model has."""
    owners = _owners(model) if model is not None else {}
    return {name: type(owners[id(p)]).__name__ for name, p in parameters.items() if id(p) in owners}


def make_groups(
    groups: Mapping[str, str | Sequence[str]] | str | None,
    names: Sequence[str],
    types: Mapping[str, str],
    *,
    strict: bool = True,
) -> dict[str, tuple[str, ...]]:
    """Name of each group of layers to the parameters in it.

    Args:
        groups: Name to globs over parameter names, or ``"type"`` for a group of each type; None for none.
        names: Of the parameters.
        types: Name to the type of the module that holds the parameter; what has none is in no group.
        strict: Whether a glob that matches nothing is an error.

    Returns:
        The groups, in the order in which they were given, or first met.

    Raises:
        ValueError: If ``strict``: a glob that matches nothing, or ``"type"`` without types.
    """
    if groups is None:
        return {}
    if isinstance(groups, str):
        if strict and not types:
            raise ValueError("groups='type' looks at the model's modules; pass model=, or globs over parameter names")
        found: dict[str, tuple[str, ...]] = {}
        for name in names:
            if name in types:
                found[types[name]] = (*found.get(types[name], ()), name)
        return found
    rules = {group: globs(f"groups[{group!r}]", matching) for group, matching in groups.items()}
    if strict:
        for matching in rules.values():
            _check_globs("groups", matching, names)
    return {group: tuple(name for name in names if _matches(name, matching)) for group, matching in rules.items()}


def _rules(quantizer: Any) -> dict[str, tuple[Any, ...]]:
    """Glob to quantizers, each resolved or "auto"."""
    rules = dict(quantizer) if isinstance(quantizer, Mapping) else {"*": quantizer}
    if not rules:
        raise ValueError("quantizer= is an empty mapping; expected globs over names, such as {'*': 'auto'}")
    for glob in rules:
        if not isinstance(glob, str):
            raise TypeError(
                f"quantizer= maps globs over names, such as 'blocks.*', to quantizers; got the key {described(glob)}"
            )
    return {glob: _specs(specs) for glob, specs in rules.items()}


def _specs(specs: Any) -> tuple[Any, ...]:
    found = tuple(
        spec if isinstance(spec, str) and spec == "auto" else resolve(spec)
        for spec in (specs if isinstance(specs, (list, tuple)) else [specs])
    )
    names = [spec if isinstance(spec, str) else quantizer_name(spec) for spec in found]
    if not found or len(set(names)) < len(names):
        raise ValueError(
            f"quantizer= takes a list of different quantizers, got {names}; objects and functions need a name each"
        )
    return found


def _check_globs(option: str, globs: Sequence[str], names: Iterable[str]) -> None:
    names = list(names)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"the pattern {glob!r} in {option}= matches none of the {len(names)} parameters: {shown}")


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _check_trackable(
    name: str, parameter: Tensor, ndim_before: int | None, include: Sequence[str], exclude: Sequence[str]
) -> None:
    """What the parameter itself and its name say; and its dimensions before it was made flat, if it was.

    Raises:
        Skip: It is not tracked.
    """
    if _matches(name, exclude):
        raise Skip("excluded")
    if include and not _matches(name, include):
        raise Skip("not included")
    if nn.parameter.is_lazy(parameter):
        raise _elsewhere("not initialised yet")
    ndim = parameter.ndim if ndim_before is None else ndim_before
    if not include and ndim < 2:
        raise Skip(f"{ndim}-dimensional (name it in include= to track it)")
    if not parameter.is_floating_point():
        raise Skip(f"dtype {_dtype(parameter)} is not floating-point")
    if parameter.is_meta:
        raise _elsewhere("on the meta device, without data yet")
    if parameter.numel() == 0 and ndim_before is None:
        raise Skip("empty")
    if parameter.layout is not torch.strided:
        raise Skip(f"layout {parameter.layout} is not strided")
    if not parameter.requires_grad:
        raise Skip("frozen (requires_grad=False)")


def _check_flat(parameter: Tensor, named: Sequence[Quantizer]) -> None:
    """What is known of a flat parameter before its data: on each rank the same.

    Raises:
        Skip: A format asked for by name does not fit; or there is no data here.
    """
    _check_formats_of_flat(parameter, named, named=True)
    if parameter.numel() == 0:
        raise _elsewhere(
            "ZeRO-3 keeps it in partitions, which are tracked once DeepSpeed gives them to the optimizer"
            if hasattr(parameter, "ds_shape")
            else "none of it is on this rank"
        )


def _elsewhere(reason: str) -> Skip:
    """Other processes, or later steps, have the weights."""
    skip = Skip(reason)
    skip.is_elsewhere = True
    return skip


def _check_formats_of_flat(parameter: Tensor, quantizers: Iterable[Quantizer], *, named: bool) -> None:
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
        scale = _try(quantizer, torch.ones(2, 2, dtype=weight.dtype, device=weight.device))
    except ValueError:
        # A scale of the user's own, for weights of another shape.
        return False
    except Exception as error:
        raise Skip(_why_not(quantizer, weight, error), misfit=otherwise) from None
    return scale is None or scale.numel() == 1


def _specs_of(name: str, rules: Mapping[str, tuple[Any, ...]]) -> tuple[Any, ...]:
    for glob, specs in rules.items():
        if fnmatchcase(name, glob):
            return specs
    raise Skip("no pattern in quantizer= matches; add '*' for the rest")


def _known(known: tuple[Quantizer, ...] | str) -> tuple[Quantizer, ...]:
    if isinstance(known, str):
        reason = Skip(known)
        reason.is_of_model = True
        raise reason
    return known


def _choose(
    parameter: Tensor, specs: Sequence[Any], owner: nn.Module | None, of_optimizer: Quantizer | None, *, strict: bool
) -> tuple[tuple[Quantizer, ...], list[str]]:
    """The quantizers of one parameter, and notes.

    Raises:
        Skip: It is not tracked.
    """
    chosen: dict[str, Quantizer] = {}
    notes = []
    for spec in specs:
        note = None
        if spec != "auto":
            quantizer = _inside(parameter, spec)
        elif of_optimizer is not None:
            quantizer = of_optimizer
        else:
            try:
                quantizer, note = _detect(parameter, owner)
            except Skip as reason:
                reason.is_of_model = owner is not None
                raise
        # "auto" may come to the same as a name beside it.
        chosen.setdefault(quantizer_name(quantizer), quantizer)
        notes += [note] if note else []
        layout = distributed.layout(parameter)
        if layout is not None:
            try:
                distributed.span(layout, adapt(quantizer).encoder)
            except ValueError as error:
                # What lies on other processes is named on all by the same line of a script.
                raise Skip(str(error), misfit=spec != "auto" and layout.shard is not None) from None
        if strict:
            try:
                _try(quantizer, distributed.local(parameter).detach())
            except Exception as error:
                # Whatever it is that a format, or a tensor subclass, does not support.
                raise Skip(_why_not(quantizer, parameter, error), misfit=spec != "auto") from None
    return tuple(chosen.values()), notes


def _why_not(quantizer: Quantizer, parameter: Tensor, error: Exception) -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return (
        f"{quantizer_name(quantizer)!r} does not encode it, dtype {_dtype(parameter)}, shape {tuple(parameter.shape)}: "
        f"{kind}{error}; name another quantizer for it in quantizer=, or leave it out with exclude="
    )


@torch.no_grad()
def _try(quantizer: Quantizer, weight: Tensor) -> Tensor | None:
    """Find out now what would fail at the first step; random numbers go on from where they were.

    A quantizer that goes element by element shows on a row what it does. Any other sees the whole weight, as in each
    step: it may need all of its shape.

    Returns:
        The scale of the weight.

    Raises:
        Exception: Whatever the quantizer raises, or ValueError for codes that are none.
    """
    with _random_numbers_kept(weight.device):
        if not isinstance(quantizer, ElementwiseQuantizer):
            # A copy: one that works in place would change the training.
            given = weight.clone() if type(weight) is Tensor else weight
            codes = quantizer.encode(given)
            _check_codes(quantizer, codes, weight)
            if given is not weight and not torch.equal(_bits(given), _bits(weight)):
                raise ValueError(
                    f"{quantizer} writes the weight that it is given, which would change the training; "
                    "have it work on a copy, such as weight.clone()"
                )
            return codes.scale
        weight = quantizer.grouped(weight)
        scale = quantizer.scale(weight)
        if weight.numel():
            row = (slice(0, 1),) * (weight.ndim - 1)
            piece, scale_of_piece = weight[row], scale
            if scale is not None and scale.ndim:
                scale_of_piece = scale[(slice(0, 1),) * (scale.ndim - 1)]
            out = torch.empty(piece.shape, dtype=quantizer.code_dtype(weight), device=weight.device)
            quantizer.encode_into(piece, scale_of_piece, out, fresh)
        return scale


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """What is drawn inside, by a quantizer of the user's, is drawn again afterwards."""
    devices = [device] if device.type == "cuda" else []
    numpy = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


def _check_codes(quantizer: Quantizer, codes: Any, weight: Tensor) -> None:
    if not isinstance(codes, Codes) or codes.ordinals.shape != weight.shape or codes.ordinals.dtype not in _ORDINALS:
        got = (
            f"{codes.ordinals.dtype} ordinals of shape {tuple(codes.ordinals.shape)}"
            if isinstance(codes, Codes)
            else type(codes).__name__
        )
        raise ValueError(
            f"encode() of {quantizer} has to return Codes with int8, int16, int32 or int64 ordinals of the weight's "
            f"shape, got {got}"
        )


def _bits(tensor: Tensor) -> Tensor:
    """What equals itself, NaN too."""
    return tensor.view(_BITS[tensor.element_size()])


def _dtype(parameter: Tensor) -> str:
    return str(parameter.dtype).removeprefix("torch.")


def _owners(model: nn.Module) -> dict[int, nn.Module]:
    """The module that holds each parameter; of several, the first that belongs to torchao."""
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            held = owners.get(id(parameter))
            if held is None or (not _torchao_classes(held) and _torchao_classes(module)):
                owners[id(parameter)] = module
    return owners


def _torchao_classes(thing: object) -> list[str]:
    """Names of the torchao classes in the type's MRO. torchao is not imported to look."""
    return [cls.__name__ for cls in type(thing).__mro__ if cls.__module__.split(".")[0] == "torchao"]


def quantizes_weights(optimizer: Any) -> bool:
    """Whether the optimizer's step itself quantizes weights, as torchao's PARQ does."""
    return "QuantOptimizer" in _torchao_classes(optimizer)


def _of_optimizer(optimizer: Any) -> dict[int, Quantizer]:
    """The quantizers of weights that the optimizer itself quantizes."""
    if not quantizes_weights(optimizer):
        return {}
    regularized = {id(group) for group in optimizer.regularized_param_groups()}
    return {
        id(parameter): torchao.ParqQuantizer(optimizer, (i, j), group["quant_bits"])
        for i, group in enumerate(optimizer.param_groups)
        if id(group) in regularized
        for j, parameter in enumerate(group["params"])
    }


def _inside(parameter: Tensor, quantizer: Quantizer) -> Quantizer:
    """A quantizer that was asked for by name, for the master copy where a subclass has one.

    Raises:
        Skip: The subclass has none.
    """
    parameter = distributed.local(parameter)
    classes = _torchao_classes(parameter)
    if not classes or adapt(quantizer).has_plain:
        return quantizer
    for attribute in ("_data", "_tensor"):
        if isinstance(getattr(parameter, attribute, None), Tensor):
            return torchao.OfMaster(attribute, quantizer)
    raise Skip(
        f"torchao's {classes[0]} has no high-precision copy that {quantizer} could encode; use quantizer='auto'",
        misfit=True,
    )


def _detect(parameter: Tensor, owner: nn.Module | None) -> tuple[Quantizer, str | None]:
    shard = distributed.local(parameter)
    classes = _torchao_classes(shard)
    if classes:
        return _subclass(shard, classes, owner)
    modules = [] if owner is None else _torchao_classes(owner)
    if any(name.endswith("FakeQuantizer") for name in modules):
        raise Skip(f"a scale or zero point that torchao's {modules[0]} learns, no weight")
    if modules and parameter is not getattr(owner, "bias", None):
        return _module(owner, modules)

    default = _DTYPE_DEFAULTS.get(parameter.dtype)
    if default is None:
        raise Skip(f"no default quantizer for dtype {_dtype(parameter)}; name one in quantizer=")
    if default == _FLOAT32_DEFAULT:
        return resolve(default), (
            f"Plain {_dtype(parameter)} weights have no quantizer of their own: they are tracked as {default} would "
            "see them; quantizer= names another format, exclude= leaves them out"
        )
    return resolve(default), None


def _module(module: Any, classes: Sequence[str]) -> tuple[Quantizer, str | None]:
    """How a module of torchao's quantizes its ``weight``, and a note."""
    if "Float8Linear" in classes:
        return _float8_training(module.config), None
    if "FakeQuantizedLinear" in classes or "FakeQuantizedEmbedding" in classes:
        quantizer = _fake_quantized(module.weight_fake_quantizer)
        note = None if quantizer.is_active else "Fake quantization is off: counted from when it is enabled"
        return quantizer, note
    if "Int8MixedPrecisionTrainingLinear" in classes:
        return _int8_mixed_precision(module.config), None
    if "MXFakeQuantizedLinear" in classes:
        config = module.weight_config
        return _mx(config.dtype, config.scaling_mode, config.block_size), None
    if "NVFP4FakeQuantizedLinear" in classes:
        return resolve("nvfp4:tensor" if module.weight_config.use_per_tensor_scale else "nvfp4"), None
    raise Skip(
        f"how torchao's {classes[0]} quantizes its weight is not known to weightflip; name it in quantizer=",
        unknown=classes[0],
    )


def _subclass(parameter: Any, classes: Sequence[str], owner: nn.Module | None) -> tuple[Quantizer, str | None]:
    """How a tensor subclass of torchao's is quantized, and a note."""
    if "Float8TrainingWeightWrapperTensor" in classes:
        if not hasattr(parameter.config, "_float8_linear_config"):
            raise Skip("torchao before 0.18 casts such weights in its grouped_mm alone: not known yet")
        if parameter.ndim != 2:
            raise Skip(f"torchao casts {parameter.ndim}-dimensional weights for its grouped_mm: not known yet")
        return torchao.OfMaster("_data", _float8_training(parameter.config._float8_linear_config)), None
    if "MXFP8TrainingWeightWrapperTensor" in classes:
        if parameter.ndim != 2:
            raise Skip(f"torchao casts {parameter.ndim}-dimensional weights for its grouped_mm: not known yet")
        return torchao.OfMaster("_data", _mx(torch.float8_e4m3fn, parameter.config.scale_calculation_mode)), None
    if "BitNetTrainingLinearWeight" in classes:
        return torchao.OfMaster("_data", resolve("ternary")), None
    if "Int8MixedPrecisionTrainingLinearWeight" in classes:
        quantizer = torchao.OfMaster("_data", _int8_mixed_precision(parameter.config))
        # torchao 0.18 registers the layer's function where it is never looked up.
        functions = getattr(type(parameter), "_TORCH_FN_TABLE", {}).values()
        if any(nn.functional.linear in table for table in functions):
            return quantizer, None
        return quantizer, (
            f"This torchao computes with the weights of {classes[0]} themselves, and not in int8; "
            "Int8MixedPrecisionTrainingConfig(module_swap=True) does. They are tracked as int8 would see them"
        )
    if "WeightWithDynamicFloat8CastTensor" in classes:
        if owner is not None and "Float8Linear" in _torchao_classes(owner):
            return torchao.OfMaster("_tensor", _float8_training(cast(Any, owner).config)), None
        return torchao.OfMaster("_tensor", _float8(parameter._dtype)), None
    for attribute in ("int_data", "qdata"):
        stored = getattr(parameter, attribute, None)
        if isinstance(stored, Tensor) and isinstance(getattr(parameter, "scale", None), Tensor):
            if stored.shape != parameter.shape or stored.dtype not in _STORED_CODES:
                raise Skip(f"torchao's {classes[0]} packs its codes ({attribute}: {_dtype(stored)}): not known yet")
            return torchao.StoredCodes(attribute, f"stored_{_dtype(stored)}"), None
    raise Skip(f"torchao's {classes[0]} is not known to weightflip", unknown=classes[0])


def _fake_quantized(fake_quantizer: Any) -> torchao.FakeQuantizer:
    """What stands behind the weight of a layer in quantization-aware training."""
    if fake_quantizer is None:
        raise Skip("torchao's QAT leaves the weight in high precision, and quantizes activations alone")
    for name in _torchao_classes(fake_quantizer):
        if name in torchao.FAKE_QUANTIZERS:
            try:
                return torchao.FAKE_QUANTIZERS[name](fake_quantizer)
            except KeyError:
                raise Skip(f"torchao's {fake_quantizer} casts to a dtype that is not known yet") from None
    name = type(fake_quantizer).__name__
    raise Skip(f"how torchao's {name} quantizes is not known to weightflip; name it in quantizer=", unknown=name)


def _int8_mixed_precision(config: Any) -> Quantizer:
    if not config.output:
        raise Skip("its int8 mixed-precision training leaves the weight in high precision in forward (output=False)")
    return torchao.Int8RowwiseQuantizer()


def _float8_training(config: Any) -> Quantizer:
    """Read from a Float8LinearConfig how the weight is cast."""
    weight = config.cast_config_weight
    if weight.scaling_type.name == "DISABLED":
        raise Skip("its Float8Linear leaves the weight in high precision (scaling DISABLED)")
    granularity = {"TENSORWISE": "", "AXISWISE": ":row"}.get(weight.scaling_granularity.name)
    if granularity is None:
        raise Skip(f"its Float8Linear casts to {weight.target_dtype}, {weight.scaling_granularity}: not known yet")
    return _float8(weight.target_dtype, granularity + (":pow2" if config.round_scales_to_power_of_2 else ""))


def _float8(dtype: torch.dtype, options: str = "") -> Quantizer:
    name = {torch.float8_e4m3fn: "float8_e4m3", torch.float8_e5m2: "float8_e5m2"}.get(dtype)
    if name is None:
        raise Skip(f"torchao casts it to {dtype}: not known yet")
    return resolve(name + options)


def _mx(dtype: torch.dtype, mode: Any, block_size: int = 32) -> Quantizer:
    """MX with what a config of torchao's says of the scale."""
    name = {
        torch.float4_e2m1fn_x2: "mxfp4",
        torch.float8_e4m3fn: "mxfp8_e4m3",
        torch.float8_e5m2: "mxfp8_e5m2",
    }.get(dtype)
    if name is None or block_size != 32:
        raise Skip(f"torchao casts it to {dtype} in blocks of {block_size}: not known yet")
    return resolve(f"{name}:{mode.value}")
