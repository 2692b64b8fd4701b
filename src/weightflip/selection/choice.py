"""How the quantizer of one parameter is found: as named, or by what the model, the optimizer and the dtype say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weightflip import distributed
from weightflip.quantizers import Quantizer, resolve
from weightflip.quantizers.adapt import adapt, quantizer_name
from weightflip.selection.flat import check_flat, check_formats_of_flat, flattened
from weightflip.selection.rules import Skip, dtype_name
from weightflip.selection.torchao import inside_subclass, of_module, of_optimizer, of_subclass, torchao_classes
from weightflip.selection.trial import try_on, why_not

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
class Sources:
    """Where ``"auto"`` looks for the quantizer of a weight, beside the weight itself.

    Attributes:
        model: For the module that quantizes the weight.
        optimizer: One that may quantize the weights itself.
        known: Name to the quantizers, or the reason for none, that a model said which is not at hand any more.
    """

    model: nn.Module | None = None
    optimizer: Any = None
    known: Mapping[str, tuple[Quantizer, ...] | str] = field(default_factory=dict)


class Choices:
    """Finds the quantizers of an optimizer's parameters.

    Args:
        parameters: Name to parameter.
        sources: Where ``"auto"`` looks.
        strict: Whether each quantizer is tried on its weight.

    Raises:
        ValueError: If ``strict``: the model holds none of the parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor], sources: Sources, *, strict: bool) -> None:
        model = sources.model
        self._known, self._strict = sources.known, strict
        self._owners = _owners(model) if model is not None else {}
        self._of_optimizer = of_optimizer(sources.optimizer)
        self._flat = flattened(parameters.values(), model)
        is_strange = bool(parameters) and not any(id(parameter) in self._owners for parameter in parameters.values())
        if strict and model is not None and is_strange:
            raise ValueError(
                f"model= ({type(model).__name__}) holds none of the optimizer's {len(parameters)} parameters; pass the "
                "model whose parameters() the optimizer was built with, or none"
            )

    def is_flat(self, parameter: Tensor) -> bool:
        """Whether the parameter has lost its rows."""
        return id(parameter) in self._flat

    def ndim_before(self, parameter: Tensor) -> int | None:
        """Of a flat parameter, how many dimensions it had."""
        return self._flat.get(id(parameter))

    def known(self, name: str) -> tuple[Quantizer, ...] | None:
        """What a model said that is not at hand any more; None for nothing.

        Raises:
            Skip: Its reason for no quantizer.
        """
        known = self._known.get(name)
        if isinstance(known, str):
            reason = Skip(known)
            reason.is_of_model = True
            raise reason
        return known

    def choose(self, parameter: Tensor, specs: Sequence[Any]) -> tuple[tuple[Quantizer, ...], list[str]]:
        """The quantizers of one parameter, and notes.

        Args:
            parameter: One that can be tracked.
            specs: Quantizers, or ``"auto"``.

        Raises:
            Skip: It is not tracked.
        """
        if self.is_flat(parameter):
            check_flat(parameter, [spec for spec in specs if spec != "auto"])
        chosen: dict[str, Quantizer] = {}
        notes = []
        for spec in specs:
            is_named, note = spec != "auto", None
            if is_named:
                quantizer = inside_subclass(parameter, spec)
            else:
                quantizer, note = self._detect(parameter)
            # "auto" may come to the same as a name beside it.
            chosen.setdefault(quantizer_name(quantizer), quantizer)
            notes += [note] if note else []
            _check_shards(parameter, quantizer, is_named=is_named)
            if self._strict:
                try:
                    try_on(quantizer, distributed.local(parameter).detach())
                except Exception as error:
                    # Whatever it is that a format, or a tensor subclass, does not support.
                    raise Skip(why_not(quantizer, parameter, error), misfit=is_named) from None
        if self.is_flat(parameter):
            found = [quantizer for quantizer in chosen.values() if not any(quantizer is spec for spec in specs)]
            check_formats_of_flat(parameter, found, named=False)
        return tuple(chosen.values()), notes

    def _detect(self, parameter: Tensor) -> tuple[Quantizer, str | None]:
        of_optimizer = self._of_optimizer.get(id(parameter))
        if of_optimizer is not None:
            return of_optimizer, None
        owner = self._owners.get(id(parameter))
        try:
            return _detect(parameter, owner)
        except Skip as reason:
            reason.is_of_model = owner is not None
            raise


def owner_types(parameters: Mapping[str, Tensor], model: nn.Module | None) -> dict[str, str]:
    """Name to the type of the module that holds the parameter, of those that the model has."""
    owners = _owners(model) if model is not None else {}
    return {name: type(owners[id(p)]).__name__ for name, p in parameters.items() if id(p) in owners}


def _check_shards(parameter: Tensor, quantizer: Quantizer, *, is_named: bool) -> None:
    """Raise Skip for a weight that lies on several processes, and whose codes need more than each has of it."""
    layout = distributed.layout(parameter)
    if layout is None:
        return
    try:
        distributed.span(layout, adapt(quantizer).encoder)
    except ValueError as error:
        # What lies on other processes is named on all by the same line of a script.
        raise Skip(str(error), misfit=is_named and layout.shard is not None) from None


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
