"""What a quantizer is, and how one is found by name.

A new quantizer is one new file in this folder: a class with ``encode``, and a factory under ``@register``. Every module
of the folder is imported when the first name is looked up.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from weightflip import checks
from weightflip.formats import FloatFormat, Rounding

Scope: TypeAlias = Literal["element", "group", "row", "tensor"]
Reduction: TypeAlias = Literal["max", "mean"]


@dataclass(frozen=True)
class Codes:
    """The codes of one weight tensor.

    Attributes:
        ordinals: Signed integers of the weight's shape that grow with the number they stand for; equal ordinals stand
            for equal numbers. int8 for formats of up to 8 bits, else int16, int32 or int64.
        scale: The factor that the format shares among the weights, broadcastable to their shape, or, for groups of
            ``g`` neighbours in the last dimension, of shape ``(..., K // g, 1)``; None where it has none. Whether it
            divides or multiplies is the quantizer's own affair.
        quantizer: What made the codes and can decode them, where it is known.
    """

    ordinals: Tensor
    scale: Tensor | None = None
    quantizer: Quantizer | None = None


@runtime_checkable
class Quantizer(Protocol):
    """Anything that turns a weight into codes.

    ``encode`` is called without gradients. It must not change the weight and must not draw random numbers. ``name``,
    or else ``str()``, is what it is called in tables, tags and checkpoints.

    What follows is for quantizers that belong to a module or a tensor subclass; the tracker asks for it where it is
    there:

    * ``is_active``: False while the weight is not quantized. Nothing is counted then, and the first codes afterwards
      are a baseline.
    * ``has_state``: True where codes depend on more than the weight, so that they are never kept from step to step.
    * ``plain(weight)``: a tensor of a plain type whose non-finite elements are those of the weight.
    * ``encodes``: the quantizer of ``plain(weight)``, where that is all that ``encode`` does.

    And of any quantizer, for weights that are sharded over processes:

    * ``scope``: how much of a weight one code depends on, ``"element"``, ``"group"`` (of ``group`` neighbours in the
      last dimension), ``"row"`` (the last dimension) or ``"tensor"``. Without it no shard is encoded, since its codes
      may not be those of the whole weight.
    """

    def encode(self, weight: Tensor) -> Codes:
        """Codes of ``weight``, in its shape."""
        ...


def quantizer_name(quantizer: Quantizer) -> str:
    """What a quantizer is called in tables, tags and checkpoints: its ``name``, its ``str``, or that of its class."""
    name = getattr(quantizer, "name", None)
    if isinstance(name, str):
        return name
    return type(quantizer).__name__ if type(quantizer).__str__ is object.__str__ else str(quantizer)


def bits_of_scale(scale: Tensor) -> Tensor:
    """Integers that are equal where float32 scales are: int32, of their shape. All NaN are one."""
    return scale.float().masked_fill(scale.isnan(), torch.nan).view(torch.int32)


class Scratch(Protocol):
    """Lends buffers that are reused, so that nothing large is allocated in a step."""

    def __call__(self, slot: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous buffer of ``like``'s shape and device; the next call with this slot and dtype takes it back."""
        ...


def _fresh(slot: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape, dtype=dtype, device=like.device)


class ElementwiseQuantizer(ABC):
    """A quantizer that needs at most a scale of the whole weight and then looks at each element by itself.

    So the tracker can encode in slices that fit the cache. ``name`` is what people write to get it; two quantizers of
    one class that have the same ``name`` and ``rounding`` make the same codes. Where a scale
    belongs to a group (a block) of ``group`` neighbours along the last dimension, the other methods get the weight, and
    anything as large, with that dimension split: ``(..., K // group, group)``.

    A weight may be sharded over processes. Where ``scope``, of which :class:`Quantizer` tells, is ``"tensor"``, or
    ``"row"`` and rows are cut, no process can make the scale alone. A quantizer with a method ``statistic`` takes part
    even so: the statistics of all shards are brought together, and handed to ``scale``.
    """

    name: str
    group: int | None = None
    scope: Scope | None = None
    reduction: Reduction = "max"
    """How ``statistic`` comes from those of a weight's parts."""
    only_needs_amax: bool = False
    """Whether all that a code depends on beside its weight is the largest magnitude in its ``scope``, from which
    :meth:`scale_of` makes the scale; nothing where that is ``"element"``. With this and ``rounding`` many weights are
    counted in one call."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "encode_into" in vars(cls) and "rounding" not in vars(cls):
            # Another encode_into is not what an inherited rounding says.
            cls.rounding = ElementwiseQuantizer.rounding  # type: ignore[method-assign]
        if "scale" in vars(cls) and "only_needs_amax" not in vars(cls):
            # Nor is another scale what an inherited scale_of gives.
            cls.only_needs_amax = False

    def grouped(self, tensor: Tensor) -> Tensor:
        """A view of the weight, or of anything as large, as the other methods take it.

        Raises:
            ValueError: The last dimension does not divide into groups.
        """
        if self.group is None:
            return tensor
        if tensor.ndim == 0 or tensor.shape[-1] % self.group:
            raise ValueError(
                f"quantizer {self.name!r} has a scale for each {self.group} neighbours in the last dimension; "
                f"shape {tuple(tensor.shape)} does not divide into them"
            )
        return tensor.view(*tensor.shape[:-1], tensor.shape[-1] // self.group, self.group)

    @abstractmethod
    def code_dtype(self, weight: Tensor) -> torch.dtype:
        """Integer dtype of the ordinals."""

    @abstractmethod
    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor | None:
        """The scale of ``weight``, 0-dim or broadcastable to it (one a group: ``(..., K // group, 1)``); None if none.

        Args:
            weight: The weight, or a shard of it.
            statistic: That of the whole weight, where ``weight`` is a shard; None to take the weight's own. Only
                quantizers that have a method ``statistic(weight)`` get one: it returns a 0-dim tensor, or one of shape
                ``(..., 1)`` where ``scope`` is ``"row"``, of magnitudes.

        Raises:
            ValueError: The weight's shape or dtype does not fit the format.
        """

    def scale_codes(self, scale: Tensor) -> Tensor:
        """What is stored of group scales, as integers of their shape, so that a change of one can be counted."""
        return bits_of_scale(scale)

    @abstractmethod
    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        """Write the ordinals of a slice.

        Args:
            weight: A slice of the weight.
            scale: The scale of the slice.
            out: Contiguous, in the slice's shape, of ``code_dtype``.
            scratch: Where temporaries come from.
        """

    def encode_under(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        """As ``encode_into``, for a scale that need not be the weight's own: what lies beyond the format saturates."""
        self.encode_into(weight, scale, out, scratch)

    def rounding(self, weight: Tensor) -> Rounding | None:
        """What ``encode_into`` does to ``weight``, as data, for kernels that do more in one pass; None: ask it.

        The scale that a :class:`Rounding` speaks of is ``applied_scale``.
        """
        return None

    def scale_of(self, largest: Tensor) -> Tensor:
        """The scales, from the largest magnitudes under each: element by element, whichever weights they are of.

        The largest magnitudes are in the weight's dtype, and NaN where there is one.
        """
        raise NotImplementedError(f"quantizer {self.name!r} takes its scales from whole weights")

    def applied_scale(self, scale: Tensor | None) -> Tensor | None:
        """What the weight is multiplied or divided by: the scale, unless the format computes with another number."""
        return scale

    @abstractmethod
    def values(self, ordinals: Tensor, scale: Tensor | None) -> Tensor:
        """What ordinals stand for under a scale that broadcasts to them: float32, or float64 where that needs it."""

    def ordinal_range(self, weight: Tensor) -> tuple[int, int] | None:
        """The smallest and the largest ordinal of a finite number; None where not every one between has a number."""
        return None

    def decode(self, codes: Codes) -> Tensor:
        """The quantized values, float32 (float64 for float64 weights and formats beyond float32)."""
        return self.values(self.grouped(codes.ordinals), codes.scale).view(codes.ordinals.shape)

    @torch.no_grad()
    def encode(self, weight: Tensor) -> Codes:
        """Codes of the whole weight at once; the tracker goes through ``encode_into``."""
        weight = weight.detach()
        grouped = self.grouped(weight)
        scale = self.scale(grouped)
        out = torch.empty(grouped.shape, dtype=self.code_dtype(weight), device=weight.device)
        self.encode_into(grouped, scale, out, _fresh)
        return Codes(out.view(weight.shape), scale, self)

    def __str__(self) -> str:
        return self.name


QuantizerLike: TypeAlias = "str | torch.dtype | FloatFormat | Quantizer | Callable[[Tensor], Tensor]"

# What others call a format, where exactly one is meant; and where it may be any of several.
_ALIASES = {"float8_e4m3fn": "float8_e4m3", "e4m3fn": "e4m3", "fp16": "float16", "bf16": "bfloat16"}
_SEVERAL = {
    **dict.fromkeys(("fp8", "float8"), ("float8_e4m3", "float8_e5m2")),
    "mxfp8": ("mxfp8_e4m3", "mxfp8_e5m2"),
    "mxfp6": ("mxfp6_e2m3", "mxfp6_e3m2"),
    "fp4": ("mxfp4", "nvfp4"),
    **dict.fromkeys(("fp32", "float32", "fp64", "float64"), ("native",)),
}
_OF_DTYPE = {
    torch.float8_e4m3fn: "float8_e4m3",
    torch.float8_e5m2: "float8_e5m2",
    torch.int8: "int8",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

Factory: TypeAlias = Callable[[str, tuple[str, ...]], ElementwiseQuantizer]


@dataclass(frozen=True)
class _Entry:
    pattern: re.Pattern[str]
    examples: tuple[str, ...]
    factory: Factory


_registry: list[_Entry] = []


def register(pattern: str, *, examples: tuple[str, ...]) -> Callable[[Factory], Factory]:
    """Make a quantizer available by name.

    Args:
        pattern: Regular expression that the name without its ``:options`` matches in full.
        examples: Names that error messages and docs show, such as ``("e3m4",)``.

    Returns:
        A decorator for ``factory(name, options)``; the factory raises ValueError for an option that it does not know.
    """

    def add(factory: Factory) -> Factory:
        _registry.append(_Entry(re.compile(pattern), examples, factory))
        return factory

    return add


def _load_rooms() -> None:
    package = importlib.import_module(__package__ or "")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def quantizer_names() -> list[str]:
    """Example names of every registered family.

    Example:
        >>> "float8_e4m3" in quantizer_names()
        True
    """
    _load_rooms()
    return sorted(example for entry in _registry for example in entry.examples)


def _by_name(name: str) -> ElementwiseQuantizer:
    _load_rooms()
    family, *options = name.lower().split(":")
    # What is registered comes first.
    for candidate in (family, _ALIASES.get(family)):
        for entry in _registry:
            if candidate is not None and entry.pattern.fullmatch(candidate):
                return entry.factory(candidate, tuple(options))
    known = quantizer_names()
    hint = checks.did_you_mean(family, known)
    if family in _SEVERAL:
        hint = f"did you mean {' or '.join(map(repr, _SEVERAL[family]))}? "
    raise ValueError(
        f"unknown quantizer {name!r}; {hint}Expected one of {', '.join(known)} (and any eXmY of up to 16 bits), "
        "a FloatFormat, an object with encode(weight), or a function from a weight to its quantized values"
    )


def resolve(spec: Any, scale: Tensor | float | None = None) -> Quantizer:
    """The quantizer that ``spec`` means.

    Args:
        spec: A name (``"float8_e4m3:row"``), a ``torch.dtype`` that there is one format for, a ``FloatFormat``
            (unscaled unless ``scale`` is given), an object with ``encode(weight) -> Codes``, or a function from a
            weight to its quantized values.
        scale: What the weight is divided by before rounding, a number or a tensor that broadcasts to the weight;
            instead of the format's own rule. Only for formats with a ``FloatFormat`` element.

    Raises:
        ValueError: An unknown name, option or dtype, or a scale for something that takes none.
        TypeError: Nothing of the above.
    """
    from weightflip.quantizers.floatx import FloatxQuantizer
    from weightflip.quantizers.native import FunctionQuantizer

    if isinstance(spec, torch.dtype):
        if spec not in _OF_DTYPE:
            raise ValueError(
                f"there is no one format for {spec}; expected {', '.join(map(str, _OF_DTYPE))}, or a name such as "
                "'e3m4', or 'native' for the bits that are stored"
            )
        spec = _OF_DTYPE[spec]
    if isinstance(spec, str):
        spec = _by_name(spec)
    if isinstance(spec, FloatFormat):
        return FloatxQuantizer(spec, fixed_scale=scale)
    if isinstance(spec, type):
        raise TypeError(f"expected a quantizer, got the class {spec.__name__}; pass an instance of it")
    if isinstance(spec, Quantizer):
        if scale is None:
            return spec
        element = getattr(spec, "format", None)
        if isinstance(element, FloatFormat):
            return FloatxQuantizer(element, fixed_scale=scale)
        raise ValueError(f"quantizer {spec} takes no scale=; leave it out, or name a format such as 'e4m3'")
    if callable(spec):
        if scale is not None:
            raise ValueError("a function from a weight to its quantized values takes no scale=; scale inside it")
        return FunctionQuantizer(spec)
    raise TypeError(
        "expected a quantizer name such as 'float8_e4m3', a FloatFormat, an object with encode(weight), or a function "
        f"from a weight to its quantized values, got {type(spec).__name__}"
    )
