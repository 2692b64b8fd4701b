"""Choose the quantizers of one parameter: those named by the user, or those found in the model, optimizer or dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from weightflip import distributed
from weightflip.quantizers import Quantizer, resolve
from weightflip.quantizers.adapt import adapt, quantizer_name
from weightflip.selection.flat import check_flat, check_formats_for_flat, find_flattened
from weightflip.selection.rules import Skip, dtype_name
from weightflip.selection.torchao import (
    quantizer_of_module,
    quantizer_of_subclass,
    quantizers_of_optimizer,
    torchao_classes,
    wrap_for_subclass,
)
from weightflip.selection.trial import trial_failure_message, try_quantizer

_FLOAT32_DEFAULT = "float8_e4m3"
_DTYPE_DEFAULTS = {
    torch.float32: _FLOAT32_DEFAULT,
    torch.float64: _FLOAT32_DEFAULT,
    torch.bfloat16: "native",
    torch.float16: "native",
    torch.float8_e4m3fn: "native",
    torch.float8_e5m2: "native",
}
_UNCONVERTED_NOTE = (
    "Weights that torchao left in high precision while it converted other layers are not tracked, and the model's "
    "numbers leave them out; to track some of them, name a format: quantizer={'head.*': 'bfloat16', '*': 'auto'}"
)


@dataclass(frozen=True)
class QuantizerSources:
    """Where ``"auto"`` looks for the quantizer of a weight, in addition to the weight itself.

    Attributes:
        model: Its modules may quantize the weights.
        optimizer: May quantize the weights itself.
        remembered: Parameter name to the quantizers, or to the reason for skipping, that came from a model that is no
            longer available.
    """

    model: nn.Module | None = None
    optimizer: Any = None
    remembered: Mapping[str, tuple[Quantizer, ...] | str] = field(default_factory=dict)


class QuantizerChooser:
    """Chooses the quantizers of an optimizer's parameters.

    Args:
        parameters: Name to parameter.
        sources: Where ``"auto"`` looks.
        strict: Whether to try each quantizer on its weight.
        with_unconverted: Whether to also track weights that torchao leaves in high precision while it converts others.

    Raises:
        ValueError: If ``strict`` and the model holds none of the parameters.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        sources: QuantizerSources,
        *,
        strict: bool,
        with_unconverted: bool = False,
    ) -> None:
        model = sources.model
        self._remembered, self._strict, self._with_unconverted = sources.remembered, strict, with_unconverted
        # All of the model's parameters: another optimizer of the run may hold the converted ones.
        self._all = [*parameters.values(), *(model.parameters() if model is not None else ())]
        self._owners = _find_owners(model) if model is not None else {}
        self._optimizer_quantizers = quantizers_of_optimizer(sources.optimizer)
        self._flat = find_flattened(parameters.values(), model)
        has_no_parameter = bool(parameters) and not any(
            id(parameter) in self._owners for parameter in parameters.values()
        )
        if strict and model is not None and has_no_parameter:
            raise ValueError(
                f"model= ({type(model).__name__}) holds none of the optimizer's {len(parameters)} parameters; pass the "
                "model whose parameters() the optimizer was built with, or leave model= out"
            )

    def is_flat(self, parameter: Tensor) -> bool:
        """Whether the parameter was flattened, so that it no longer has rows."""
        return id(parameter) in self._flat

    def original_ndim(self, parameter: Tensor) -> int | None:
        """Number of dimensions a flat parameter had before it was flattened; None for any other parameter."""
        return self._flat.get(id(parameter))

    def recall(self, name: str) -> tuple[Quantizer, ...] | None:
        """Return the quantizers that a model no longer available gave this parameter; None if there are none.

        Raises:
            Skip: That model gave a reason for skipping the parameter.
        """
        remembered = self._remembered.get(name)
        if isinstance(remembered, str):
            reason = Skip(remembered)
            reason.is_from_model = True
            raise reason
        return remembered

    def choose(self, parameter: Tensor, specs: Sequence[Any]) -> tuple[tuple[Quantizer, ...], list[str]]:
        """Choose the quantizers of one parameter.

        Args:
            parameter: A parameter that can be tracked.
            specs: Quantizers, or ``"auto"``.

        Returns:
            The quantizers, and notes for the user.

        Raises:
            Skip: The parameter is not tracked.
        """
        if self.is_flat(parameter):
            check_flat(parameter, [spec for spec in specs if spec != "auto"])
        chosen: dict[str, Quantizer] = {}
        notes = []
        for spec in specs:
            is_named, note = spec != "auto", None
            if is_named:
                quantizer = wrap_for_subclass(parameter, spec)
            else:
                quantizer, note = self._detect(parameter, is_only=len(specs) == 1)
            # "auto" may find the same quantizer that the list also names.
            chosen.setdefault(quantizer_name(quantizer), quantizer)
            notes += [note] if note else []
            _check_shards(parameter, quantizer, is_named=is_named)
            if self._strict:
                try:
                    try_quantizer(quantizer, distributed.local(parameter).detach())
                except Exception as error:
                    # Formats and tensor subclasses raise all kinds of errors for what they do not support.
                    raise Skip(trial_failure_message(quantizer, parameter, error), is_mismatch=is_named) from None
        if self.is_flat(parameter):
            found = [quantizer for quantizer in chosen.values() if not any(quantizer is spec for spec in specs)]
            check_formats_for_flat(parameter, found, named=False)
        return tuple(chosen.values()), notes

    def _detect(self, parameter: Tensor, *, is_only: bool) -> tuple[Quantizer, str | None]:
        owner = self._owners.get(id(parameter))
        try:
            converted = self._find_conversion(parameter)
            if converted is not None:
                return converted
            if is_only and not self._with_unconverted and self._has_converted:
                raise _skip_unconverted()
            return _default_quantizer(parameter)
        except Skip as reason:
            reason.is_from_model = owner is not None
            raise

    def _find_conversion(self, parameter: Tensor) -> tuple[Quantizer, str | None] | None:
        """Return the quantizer that torchao or the optimizer applies, and a note; None for a plain weight."""
        quantizer = self._optimizer_quantizers.get(id(parameter))
        if quantizer is not None:
            return quantizer, None
        return _torchao_quantizer(parameter, self._owners.get(id(parameter)))

    @cached_property
    def _has_converted(self) -> bool:
        """Whether torchao converted any weight that is trained. The frozen base of adapters does not count."""
        for parameter in self._all:
            with suppress(Skip):
                if parameter.requires_grad and self._find_conversion(parameter) is not None:
                    return True
        return False


def owner_types(parameters: Mapping[str, Tensor], model: nn.Module | None) -> dict[str, str]:
    """Map the name of each parameter that the model holds to the type of the module that owns it."""
    owners = _find_owners(model) if model is not None else {}
    return {name: type(owners[id(p)]).__name__ for name, p in parameters.items() if id(p) in owners}


def _check_shards(parameter: Tensor, quantizer: Quantizer, *, is_named: bool) -> None:
    """Raise Skip for a sharded weight whose codes depend on more than one process can provide or exchange."""
    layout = distributed.layout(parameter)
    if layout is None:
        return
    try:
        distributed.span(layout, adapt(quantizer).encoder)
    except ValueError as error:
        # All ranks run the same script, so a weight may be named on a rank that holds none of it.
        raise Skip(str(error), is_mismatch=is_named and layout.shard is not None) from None


def _find_owners(model: nn.Module) -> dict[int, nn.Module]:
    """Map the id of each parameter to the module that owns it; of several, to the first one from torchao."""
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        # module.parameters(recurse=False) takes ten times as long.
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            held = owners.get(id(parameter))
            if held is None or (not torchao_classes(held) and torchao_classes(module)):
                owners[id(parameter)] = module
    return owners


def _skip_unconverted() -> Skip:
    reason = Skip("left in high precision by torchao, which converted other layers")
    reason.is_expected, reason.note = True, _UNCONVERTED_NOTE
    return reason


def _torchao_quantizer(parameter: Tensor, owner: nn.Module | None) -> tuple[Quantizer, str | None] | None:
    """Return the quantizer that torchao applies to a weight, and a note; None if it applies none."""
    shard = distributed.local(parameter)
    classes = torchao_classes(shard)
    if classes:
        return quantizer_of_subclass(shard, classes, owner)
    modules = () if owner is None else torchao_classes(owner)
    if any(name.endswith("FakeQuantizer") for name in modules):
        raise Skip(f"a scale or zero point that torchao's {modules[0]} learns, not a weight")
    if modules and parameter is not getattr(owner, "bias", None):
        return quantizer_of_module(owner, modules)
    return None


def _default_quantizer(parameter: Tensor) -> tuple[Quantizer, str | None]:
    """Return the default quantizer of the parameter's dtype, and a note."""
    default = _DTYPE_DEFAULTS.get(parameter.dtype)
    if default is None:
        raise Skip(f"no default quantizer for dtype {dtype_name(parameter)}; name one in quantizer=")
    if default == _FLOAT32_DEFAULT:
        return resolve(default), (
            f"Plain {dtype_name(parameter)} weights have no quantizer of their own: they are tracked as if cast to "
            f"{default}; quantizer= names another format, exclude= leaves them out"
        )
    return resolve(default), None
