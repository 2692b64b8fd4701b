"""Which parameters are tracked, under which name, with which quantizer; and why the others are not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from weightflip import distributed
from weightflip.checks import globs
from weightflip.quantizers import Quantizer, resolve
from weightflip.quantizers.adapt import adapt, quantizer_name
from weightflip.selection.flat import FLAT_NOTE, check_flat, check_formats_of_flat, flattened
from weightflip.selection.rules import (
    Skip,
    check_globs,
    check_trackable,
    dtype_name,
    known_or_skip,
    quantizer_rules,
    specs_of,
)
from weightflip.selection.torchao import inside_subclass, of_module, of_optimizer, of_subclass, torchao_classes
from weightflip.selection.trial import try_on, why_not

logger = logging.getLogger("weightflip")

_FLOAT32_DEFAULT = "float8_e4m3"
_DTYPE_DEFAULTS = {
    torch.float32: _FLOAT32_DEFAULT,
    torch.float64: _FLOAT32_DEFAULT,
    torch.bfloat16: "native",
    torch.float16: "native",
    torch.float8_e4m3fn: "native",
    torch.float8_e5m2: "native",
}


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
    rules = quantizer_rules(quantizer)
    include_globs, exclude_globs = globs("include", include), globs("exclude", exclude)
    if strict:
        check_globs("quantizer", list(rules) if isinstance(quantizer, Mapping) else [], parameters)
        check_globs("include", include_globs, parameters)
        check_globs("exclude", exclude_globs, parameters)

    owners = _owners(model) if model is not None else {}
    by_optimizer = of_optimizer(optimizer)
    flat = flattened(parameters.values(), model)
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
            check_trackable(name, parameter, flat.get(id(parameter)), include_globs, exclude_globs)
            specs = known_or_skip(known[name]) if known and name in known else specs_of(name, rules)
            if id(parameter) in flat:
                noted.setdefault(FLAT_NOTE, []).append(name)
                check_flat(parameter, [spec for spec in specs if spec != "auto"])
            chosen, notes = _choose(
                parameter, specs, owners.get(id(parameter)), by_optimizer.get(id(parameter)), strict=strict
            )
            if id(parameter) in flat:
                found = [quantizer for quantizer in chosen if not any(quantizer is spec for spec in specs)]
                check_formats_of_flat(parameter, found, named=False)
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
            quantizer = inside_subclass(parameter, spec)
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
                try_on(quantizer, distributed.local(parameter).detach())
            except Exception as error:
                # Whatever it is that a format, or a tensor subclass, does not support.
                raise Skip(why_not(quantizer, parameter, error), misfit=spec != "auto") from None
    return tuple(chosen.values()), notes


def _owners(model: nn.Module) -> dict[int, nn.Module]:
    """The module that holds each parameter; of several, the first that belongs to torchao."""
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            held = owners.get(id(parameter))
            if held is None or (not torchao_classes(held) and torchao_classes(module)):
                owners[id(parameter)] = module
    return owners


def _detect(parameter: Tensor, owner: nn.Module | None) -> tuple[Quantizer, str | None]:
    shard = distributed.local(parameter)
    classes = torchao_classes(shard)
    if classes:
        return of_subclass(shard, classes, owner)
    modules = [] if owner is None else torchao_classes(owner)
    if any(name.endswith("FakeQuantizer") for name in modules):
        raise Skip(f"a scale or zero point that torchao's {modules[0]} learns, no weight")
    if modules and parameter is not getattr(owner, "bias", None):
        return of_module(owner, modules)

    default = _DTYPE_DEFAULTS.get(parameter.dtype)
    if default is None:
        raise Skip(f"no default quantizer for dtype {dtype_name(parameter)}; name one in quantizer=")
    if default == _FLOAT32_DEFAULT:
        return resolve(default), (
            f"Plain {dtype_name(parameter)} weights have no quantizer of their own: they are tracked as {default} "
            "would see them; quantizer= names another format, exclude= leaves them out"
        )
    return resolve(default), None
