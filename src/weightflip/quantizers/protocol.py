"""What a quantizer is.

A new one is one new file in this folder: a class with ``encode``, and a factory under ``@register``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from weightflip.formats import FloatFormat, Rounding, ScaleFormula

Scope: TypeAlias = Literal["element", "group", "block", "row", "tensor"]
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
      last dimension), ``"block"`` (of as many rows and columns as ``tile`` says, or fewer at the edges), ``"row"`` (the
      last dimension) or ``"tensor"``. Without it no shard is encoded, since its codes may not be those of the whole
      weight.
    """

    def encode(self, weight: Tensor) -> Codes:
        """Codes of ``weight``, in its shape."""
        ...


def bits_of_scale(scale: Tensor) -> Tensor:
    """Integers that are equal where float32 scales are: int32, of their shape. All NaN are one."""
    return scale.float().masked_fill(scale.isnan(), torch.nan).view(torch.int32)


class Scratch(Protocol):
    """Lends buffers that are reused, so that nothing large is allocated in a step."""

    def __call__(self, slot: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous buffer of ``like``'s shape and device; the next call with this slot and dtype takes it back."""
        ...


def fresh(slot: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The :class:`Scratch` that keeps nothing."""
    return torch.empty(like.shape, dtype=dtype, device=like.device)


class BaseQuantizer(ABC):
    """A quantizer that says of itself what the tracker has to know; each answer has a default.

    Users need not derive from it: ``adapt`` makes one of any object with ``encode``, and of functions.

    Attributes:
        name: What it is called in tables, tags and checkpoints.
        is_active: False while the weight is not quantized.
        has_state: Whether codes depend on more than the weight, so that they are never kept from step to step.
        scope: How much of a weight one code depends on; None if that is not known. Of these, :class:`Quantizer` tells.
        group: How many neighbours in the last dimension share a scale, if any do.
        tile: How many rows and columns do, where ``scope`` is ``"block"``.
        reduction: How ``statistic`` comes from those of a weight's parts.
        batchable: Whether nothing but itself and the weight's memory decides on the codes, so that a kernel may make
            those of many weights at once.
        format: The element, where that is one number format.
        encodes: What encodes ``plain(weight)``, where that is all that ``encode`` does.
    """

    name: str
    is_active: bool = True
    has_state: bool = False
    scope: Scope | None = None
    group: int | None = None
    tile: tuple[int, int] | None = None
    reduction: Reduction = "max"
    batchable: bool = False
    format: FloatFormat | None = None
    encodes: BaseQuantizer | None = None

    @abstractmethod
    def encode(self, weight: Tensor) -> Codes:
        """Codes of ``weight``, in its shape."""

    def decode(self, codes: Codes) -> Tensor:
        """The quantized values.

        Raises:
            ValueError: It only encodes.
        """
        raise ValueError(f"quantizer {self} only encodes: it has no decode(codes)")

    def plain(self, weight: Tensor) -> Tensor:
        """A tensor of a plain type whose non-finite elements are those of the weight."""
        return weight

    def statistic(self, weight: Tensor) -> Tensor:
        """What has to be known of a whole block, row or tensor, of a part of it: magnitudes.

        0-dim; or ``(..., 1)``, of each row; or ``(..., number of blocks)``, of each row in each block.
        """
        raise NotImplementedError(f"quantizer {self} has no statistic")

    @property
    def has_plain(self) -> bool:
        """Whether it looks into tensor subclasses itself."""
        return type(self).plain is not BaseQuantizer.plain

    @property
    def has_statistic(self) -> bool:
        """Whether shards of what is in its ``scope`` can be encoded, once their statistics are brought together."""
        return type(self).statistic is not BaseQuantizer.statistic

    @property
    def encoder(self) -> BaseQuantizer:
        """What makes the codes: ``encodes``, or itself."""
        return self.encodes or self

    def __str__(self) -> str:
        return self.name


class ElementwiseQuantizer(BaseQuantizer):
    """A quantizer that needs at most a scale of the whole weight and then looks at each element by itself.

    So the tracker can encode in slices that fit the cache. ``name`` is what people write to get it; two quantizers of
    one class that have the same ``name`` and ``rounding`` make the same codes. Where a scale
    belongs to a group (a block) of ``group`` neighbours along the last dimension, the other methods get the weight, and
    anything as large, with that dimension split: ``(..., K // group, group)``.

    A weight may be sharded over processes. Where ``scope``, of which :class:`Quantizer` tells, is ``"tensor"``, or
    ``"row"`` and rows are cut, no process can make the scale alone. A quantizer with a method ``statistic`` takes part
    even so: the statistics of all shards are brought together, and handed to ``scale``.
    """

    batchable = True
    only_needs_amax: bool = False
    """Whether all that a code depends on beside its weight is the largest magnitude in its ``scope``, from which
    :meth:`scale_of` makes the scale; nothing where that is ``"element"``. With this and ``rounding`` many weights are
    counted in one call."""
    is_two_level: bool = False
    """Whether a code depends on the largest magnitudes of its group and of its tensor, from which
    :meth:`scale_of_groups` makes the scale, and on no more."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "encode_into" in vars(cls) and "rounding" not in vars(cls):
            # Another encode_into is not what an inherited rounding says.
            cls.rounding = ElementwiseQuantizer.rounding  # type: ignore[method-assign]
        if vars(cls).keys() & {"scale_of", "applied_scale", "scale_codes"} and "scale_rule" not in vars(cls):
            # Nor is another way to make scales what an inherited rule says.
            cls.scale_rule = ElementwiseQuantizer.scale_rule  # type: ignore[method-assign]
        if vars(cls).keys() & {"is_active", "has_state", "encodes"} and "batchable" not in vars(cls):
            # What changes from step to step is asked for each weight by itself.
            cls.batchable = False
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

    def of_blocks(self, scale: Tensor, shape: Sequence[int], first_row: int = 0) -> Tensor:
        """Of group scales, those that are counted: one for each block, where several groups share one.

        Args:
            scale: Of all groups.
            shape: Of the weight.
            first_row: In the last dimension but one, where the weight begins in the whole one, if it is a shard. A
                block counts where it begins.
        """
        return scale

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

    def scale_rule(self, dtype: torch.dtype) -> ScaleFormula | Literal["steps"] | None:
        """What ``scale_of``, ``applied_scale`` and ``scale_codes`` do for weights of a dtype, as data.

        ``"steps"``: what weights are multiplied or divided by takes at most 256 values. The stored code of each is a
        byte that grows with the largest magnitude; where nothing is stored, each is a power of two. None: ask them.
        """
        return None

    def scale_of_groups(self, largest: Tensor, of_tensors: Tensor) -> Tensor:
        """The scales, from the largest magnitude of each group and of the tensor that it is in, as in ``scale_of``."""
        raise NotImplementedError(f"quantizer {self.name!r} has no scale of two levels")

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
        self.encode_into(grouped, scale, out, fresh)
        return Codes(out.view(weight.shape), scale, self)
