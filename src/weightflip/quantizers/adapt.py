"""Adapt users' objects and functions to quantizers: the one place that checks which attributes an object has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weightflip.formats import FloatFormat
from weightflip.quantizers.native import NativeQuantizer
from weightflip.quantizers.protocol import BaseQuantizer, Codes, Quantizer, Reduction, Scope


def adapt(quantizer: Quantizer | Callable[[Tensor], Tensor]) -> BaseQuantizer:
    """Wrap a quantizer so that it has every attribute of :class:`BaseQuantizer`; one that already is stays as it is.

    Args:
        quantizer: An object with ``encode(weight)``, or a function from a weight to its quantized values.
    """
    if isinstance(quantizer, BaseQuantizer):
        return quantizer
    if callable(quantizer) and not isinstance(quantizer, Quantizer):
        return FunctionQuantizer(quantizer)
    return _ObjectQuantizer(quantizer)


def quantizer_name(quantizer: Quantizer) -> str:
    """Return a quantizer's name in tables, tags and checkpoints: its ``name``, its ``str()``, or its class name."""
    return adapt(quantizer).name


class _ObjectQuantizer(BaseQuantizer):
    """Wraps a user's object. Attributes are read each time they are needed, since they may change, and may raise."""

    def __init__(self, quantizer: Any) -> None:
        self._quantizer = quantizer

    @property
    def name(self) -> str:  # type: ignore[override]
        name = getattr(self._quantizer, "name", None)
        if isinstance(name, str):
            return name
        cls: Any = type(self._quantizer)
        return cls.__name__ if cls.__str__ is object.__str__ else str(self._quantizer)

    @property
    def is_active(self) -> bool:  # type: ignore[override]
        return bool(getattr(self._quantizer, "is_active", True))

    @property
    def has_state(self) -> bool:  # type: ignore[override]
        return bool(getattr(self._quantizer, "has_state", False))

    @property
    def scope(self) -> Scope | None:  # type: ignore[override]
        scope: Scope | None = getattr(self._quantizer, "scope", None)
        return scope

    @property
    def group(self) -> int | None:  # type: ignore[override]
        group: int | None = getattr(self._quantizer, "group", None)
        return group

    @property
    def reduction(self) -> Reduction:  # type: ignore[override]
        reduction: Reduction = getattr(self._quantizer, "reduction", "max")
        return reduction

    @property
    def format(self) -> FloatFormat | None:  # type: ignore[override]
        format: FloatFormat | None = getattr(self._quantizer, "format", None)
        return format

    @property
    def encodes(self) -> BaseQuantizer | None:  # type: ignore[override]
        inner: Quantizer | None = getattr(self._quantizer, "encodes", None)
        return None if inner is None else adapt(inner)

    @property
    def has_plain(self) -> bool:
        return hasattr(self._quantizer, "plain")

    @property
    def has_statistic(self) -> bool:
        return hasattr(self._quantizer, "statistic")

    def encode(self, weight: Tensor) -> Codes:
        codes: Codes = self._quantizer.encode(weight)
        return codes

    def decode(self, codes: Codes) -> Tensor:
        decode: Callable[[Codes], Tensor] | None = getattr(self._quantizer, "decode", None)
        return super().decode(codes) if decode is None else decode(codes)

    def plain(self, weight: Tensor) -> Tensor:
        plain: Callable[[Tensor], Tensor] | None = getattr(self._quantizer, "plain", None)
        return weight if plain is None else plain(weight)

    def statistic(self, weight: Tensor) -> Tensor:
        statistic: Tensor = self._quantizer.statistic(weight)
        return statistic

    def __str__(self) -> str:
        return str(self._quantizer)


class FunctionQuantizer(BaseQuantizer):
    """Wraps a function from a weight to its quantized values; the codes are the bits of those values.

    The function gets the whole weight, detached, and returns a tensor of its shape. The codes are as wide as its dtype:
    return bfloat16 if 8 bits of significand hold the values. The function gets a shard of a sharded weight only if it
    has an attribute ``scope`` that allows it; see :class:`Quantizer`.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.scope = getattr(function, "scope", None)
        self._native = NativeQuantizer()

    def encode(self, weight: Tensor) -> Codes:
        values = self.function(weight.detach())
        if not isinstance(values, Tensor) or values.shape != weight.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"the function {self.name!r} must return a tensor of the weight's shape {tuple(weight.shape)}, "
                f"got {got}"
            )
        if not values.is_floating_point() and not values.is_complex():
            # Integers are ordinals already. uint8, which torch's quantized tensors use, needs one more bit for the
            # sign. Copy them, since the function may write to its result later.
            dtype = {torch.bool: torch.int8, torch.uint8: torch.int16}.get(values.dtype, values.dtype)
            return Codes(values.to(dtype, copy=True))
        return self._native.encode(values)
